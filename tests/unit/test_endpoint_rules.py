"""Where a model may be: what is said of a URL, and which addresses are never connected to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autoembed import endpoints
from autoembed.errors import Fault, ProviderTrouble
from autoembed.model import Model, Request
from autoembed.network import HttpAnswer, Network
from autoembed.providers import openai

ALLOWED = ("embeddings.internal", "10.1.2.3", "fd12::7")


@pytest.mark.parametrize(
    "url",
    [
        "https://api.openai.com/v1",
        "https://api.openai.com",
        "https://10.0.0.1:8443/v1",
        "https://[2001:db8::1]/v1",
        "https://bücher.example/v1",
        "http://127.0.0.1:11434",
        "http://127.3.2.1/v1",
        "http://[::1]:8080/v1",
        "http://[::ffff:127.0.0.1]/v1",
        "http://localhost:8080/v1",
        "http://LOCALHOST./v1",
        "http://tei.localhost/v1",
        "http://embeddings.internal:8080/v1",
        "http://Embeddings.Internal./v1",
        "http://10.1.2.3/v1",
        "http://[fd12::7]/v1",
    ],
)
def test_https_anywhere_and_http_here_or_where_it_is_allowed_may_be_called(url: str) -> None:
    assert endpoints.fault_of(url, ALLOWED) is None


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("http://api.example/v1", "api.example"),
        ("http://api.example:443", "api.example"),
        ("http://elsewhere.embeddings.internal/v1", "elsewhere.embeddings.internal"),
        ("http://10.1.2.4/v1", "10.1.2.4"),
        ("http://[2001:db8::1]:80/v1", "2001:db8::1"),
        ("http://localhost.example/v1", "localhost.example"),
        ("http://notlocalhost/v1", "notlocalhost"),
        ("http://0.0.0.0/v1", "0.0.0.0"),
    ],
)
def test_http_to_another_machine_must_be_allowed_first(url: str, host: str) -> None:
    fault = endpoints.fault_of(url, ALLOWED)

    assert fault is not None
    assert fault.problem == f'"{url}" would be called without encryption'
    assert fault.hint == f"Use https, or allow it first: SELECT autoembed.allow_http_host('{host}')."


FORBIDDEN_HOSTS = [
    "169.254.169.254",
    "169.254.1.1",
    "[fe80::1]",
    "[fe80::1%eth0]",
    "[fe80::1%no_such_card]",
    "[fd00:ec2::254]",
    "[fd20:ce::254]",
    "100.100.100.200",
    "168.63.129.16",
    "192.0.0.192",
    "metadata.google.internal",
    "Metadata.Google.Internal.",
    "metadata.goog",
    "instance-data.ec2.internal",
    # The same in other words.
    "[::ffff:169.254.169.254]",
    "[::ffff:a9fe:a9fe]",
    "[64:ff9b::169.254.169.254]",
    "[2002:a9fe:a9fe::1]",
    "2852039166",
    "0xA9FEA9FE",
    "0251.0376.0251.0376",
    "169.254.43518",
    "１６９.254.169.254",
]


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("host", FORBIDDEN_HOSTS)
def test_link_local_and_metadata_addresses_are_refused_even_where_they_are_allowed(scheme: str, host: str) -> None:
    url = f"{scheme}://{host}/v1"

    fault = endpoints.fault_of(url, [host.strip("[]").lower()])

    assert fault is not None
    assert fault.problem == f'"{url}" is a link-local address or a cloud\'s metadata service, which is never called'


@pytest.mark.parametrize(
    "url",
    [
        "",
        "api.openai.com/v1",
        "ftp://host/v1",
        "file:///etc/passwd",
        "http://",
        "https:///v1",
        "https://two words/v1",
        "https://api.example\\@127.0.0.1/v1",
        "http://127.0.0.1\t/v1",
        "https://api.example:port/v1",
        "https://[::1/v1",
        "https://api.example/v1\nHost: other",
    ],
)
def test_what_is_no_url_is_said_to_be_none(url: str) -> None:
    fault = endpoints.fault_of(url, ALLOWED)

    assert fault is not None
    assert fault.problem.endswith(" is not an http or https URL")


@pytest.mark.parametrize("url", ["https://user:secret@api.example/v1", "http://127.0.0.1@evil.example/v1"])
def test_a_url_holds_no_user_and_password(url: str) -> None:
    fault = endpoints.fault_of(url, ALLOWED)

    assert fault is not None
    assert fault.problem.endswith(
        'example/v1" names a user, who would not be sent and whose password would stand in a table'
    )
    assert "secret" not in fault.problem


MODEL = Model("own", "openai", "m", 3, base_url="http://embeddings.example:8080/v1")


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("rest", ["?key=secret", "/?key=secret", "/v1?key=secret", "/openai/?key=secret", "/v1#secret"])
def test_a_base_url_has_no_query_and_shows_none(scheme: str, rest: str) -> None:
    with pytest.raises(Fault, match="has a query or a fragment, which may hold a key") as caught:
        openai.check(replace(MODEL, base_url=f"{scheme}://user:secret@api.example{rest}"))

    assert "secret" not in str(caught.value)


def test_a_model_that_would_be_called_without_encryption_is_an_error_with_a_hint() -> None:
    with pytest.raises(Fault) as caught:
        openai.check(MODEL)

    assert str(caught.value) == (
        'model "own" has an unusable base_url: "http://embeddings.example:8080/v1" would be called without encryption'
    )
    assert caught.value.hint == (
        "Use https, or allow it first: SELECT autoembed.allow_http_host('embeddings.example')."
    )
    openai.check(replace(MODEL, http_hosts=("embeddings.example",)))


def test_a_password_in_a_base_url_is_in_no_error() -> None:
    with pytest.raises(Fault, match="names a user") as caught:
        openai.check(replace(MODEL, base_url="https://user:secret@api.example/v1"))

    assert "secret" not in str(caught.value)


def test_a_host_that_is_allowed_no_more_is_not_called() -> None:
    class Unreachable(Network):
        def post(self, *_: Any, **__: Any) -> HttpAnswer:
            raise AssertionError("called")

    with pytest.raises(ProviderTrouble, match="would be called without encryption") as caught:
        openai.embed(Request(MODEL, ["a"], 5), Unreachable(1))

    assert caught.value.permanent


def test_the_hosts_that_are_allowed_come_with_the_models_row() -> None:
    row = {**vars(MODEL), "http_hosts": ["embeddings.example"], "builtin": False}

    model = Model.from_row(row)

    assert list(model.http_hosts) == ["embeddings.example"]
    assert {model: "usable as a key"}


@pytest.mark.parametrize(
    ("host", "address", "may_be"),
    [
        ("api.example", "203.0.113.5", True),
        ("api.example", "2001:db8::5", True),
        ("tei", "10.0.0.5", True),
        ("rebound.example", "127.0.0.1", True),
        ("api.example", "169.254.169.254", False),
        ("api.example", "fe80::5%2", False),
        ("api.example", "::ffff:169.254.169.254", False),
        ("api.example", "fd00:ec2::254", False),
        ("api.example", "100.100.100.200", False),
        ("localhost", "127.0.0.1", True),
        ("localhost", "::1", True),
        ("tei.localhost.", "203.0.113.5", False),
        ("localhost", "10.0.0.5", False),
    ],
)
def test_an_address_is_judged_for_the_name_that_led_to_it(host: str, address: str, may_be: bool) -> None:
    assert endpoints.may_connect(host, address) is may_be


# --- private authorities -----------------------------------------------------------------------------


def test_a_models_ca_file_goes_with_its_requests() -> None:
    files = []

    class Noting(Network):
        def post(self, *_: Any, ca_file: str | None = None, **__: Any) -> HttpAnswer:
            files.append(ca_file)
            return HttpAnswer(500, {}, b"")

    for options in ({"ca_file": "/etc/ssl/our.pem"}, {}):
        with pytest.raises(ProviderTrouble):
            openai.embed(Request(replace(MODEL, base_url="https://a.example", options=options), ["a"], 5), Noting(1))

    assert files == ["/etc/ssl/our.pem", None]


def test_a_ca_file_that_is_not_there_is_trouble_to_mend(tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    model = replace(MODEL, base_url="https://a.example/v1", options={"ca_file": str(path)})

    with pytest.raises(ProviderTrouble, match=f"the ca_file {path} cannot be read"):
        openai.check(model)
    path.touch()
    openai.check(model)


def test_a_ca_file_is_a_path() -> None:
    with pytest.raises(Fault, match='option ca_file of model "own" is not a text'):
        openai.check(replace(MODEL, base_url="https://a.example/v1", options={"ca_file": True}))
