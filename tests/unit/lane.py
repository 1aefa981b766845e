"""A lane for unit tests: the database, the network and the provider in memory, and ways to disturb them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from autoembed import worker
from autoembed.errors import ProviderTrouble, Refused, Trouble
from autoembed.jobs import Report
from autoembed.providers import PROVIDERS
from autoembed.records import Message
from autoembed.worker import Options
from unit.fakes import MODEL, PIPELINE, Cancelled, FakeDatabase, FakeNetwork, FakeProvider, Vector, vectors_of


class Lane:
    """The surroundings of a pass, and the pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.database = FakeDatabase()
        self.network = FakeNetwork()
        self.provider = FakeProvider()
        monkeypatch.setitem(PROVIDERS, "fake", self.provider)

    def run(self, batch_size: int = 100, max_requests: int = 1, timeout_seconds: float = 60) -> Report:
        options = Options(batch_size, max_requests, timeout_seconds)
        return worker.run_pass(self.database, self.network, options)

    def work(self, run_seconds: float, max_requests: int = 1, *, batch_size: int = 100, backfill: bool = False) -> None:
        options = Options(batch_size, max_requests, 60)
        worker.work(self.database, self.network, options, run_seconds, backfill=backfill)

    def stop_when(self, condition: Callable[[], object]) -> None:
        """Ends the lane after the pass in which the condition comes true."""
        self._monkeypatch.setattr(worker, "LOOK_AROUND_SECONDS", 0.0)
        self.database.is_wanted = lambda: not condition()

    def add_model(self, name: str, owner: int = PIPELINE.owner) -> FakeProvider:
        """Has pipeline 2 use another model, of a provider of that name; returns the provider."""
        provider = FakeProvider()
        self._monkeypatch.setitem(PROVIDERS, name, provider)
        model = replace(MODEL, name=name, provider=name)
        self.database.defined[2] = replace(PIPELINE, id=2, owner=owner, model=model)
        return provider

    def limit_inputs(self, most: int) -> None:
        """Lets a request hold so many texts from now on. A claim may then take several requests' worth."""
        self.database.defined[1] = replace(PIPELINE, model=replace(MODEL, max_inputs_per_request=most))

    def refuse(self, *guilty: str) -> None:
        """Has the provider refuse requests that contain one of these parts of texts from now on."""

        def answer(texts: list[str]) -> Vector:
            if any(part in text for part in guilty for text in texts):
                raise Refused("the provider answered 400: not these words")
            return vectors_of(texts)

        self.provider.answer = answer

    def stumble(self, trouble: Callable[[], Trouble], *guilty: str) -> None:
        """Has requests that contain one of these parts of texts end in trouble from now on."""

        def answer(texts: list[str]) -> Vector:
            if any(part in text for part in guilty for text in texts):
                raise trouble()
            return vectors_of(texts)

        self.provider.answer = answer

    def fail_with(self, error: BaseException) -> None:
        def answer(texts: list[str]) -> Vector:
            raise error

        self.provider.answer = answer

    def hang(self) -> None:
        """Lets requests last until they are aborted from now on."""

        def answer(texts: list[str]) -> Vector:
            self.provider.aborted.wait(10)
            raise ProviderTrouble("aborted")

        self.provider.answer = answer

    def change_in_flight(self, change: Callable[[], object]) -> None:
        """Has something happen while the next request is in flight."""

        def answer(texts: list[str]) -> Vector:
            self.provider.answer = vectors_of
            change()
            return vectors_of(texts)

        self.provider.answer = answer


def cancel() -> None:
    raise Cancelled


def bodies(messages: list[Message]) -> list[Any]:
    return [message.body for message in messages]
