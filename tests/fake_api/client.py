"""FakeApi, what a test holds in its hand."""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FakeApi:
    """One tenant of a running server, for a test to use.

    control_url is the server as the test sees it, base_url the tenant's API as the database sees it.

        api.behave(faults=[{"status": 429, "retry_after": 2, "times": 3}])
        api.behave(faults=[{"status": 400, "match": "poison", "times": "forever"}])
        api.behave(rate_limit={"requests_per_minute": 600, "burst_requests": 5}); ...; api.counters()["rate_limited"]
        api.behave(hold="first text"); ...; api.wait_for(held=1); ...; api.release()
        api.texts(), api.counters()["max_in_flight"], api.log()[0]["status"]

    A shared port cannot refuse connections for one tenant. For an outage use a port of your own:

        port = api.listen()                      # base_url = f"http://127.0.0.1:{port}/{tenant}/v1"
        api.refuse(port); ...; api.listen(port)  # nobody there; there again
    """

    control_url: str
    base_url: str
    tenant: str

    @property
    def root(self) -> str:
        """The address of the tenant, under which the other protocols have theirs."""
        return self.base_url.removesuffix("/v1")

    def behave(self, **behaviour: Any) -> None:
        """Set the whole behaviour; what is not named is as by default."""
        self._call("PUT", f"control/{self.tenant}", behaviour)

    def amend(self, **behaviour: Any) -> None:
        """Change what is named; faults and rate limits that are not named keep their count."""
        self._call("PATCH", f"control/{self.tenant}", behaviour)

    def release(self) -> None:
        """Let the held requests go, and those that come."""
        self.amend(hold=False)

    def reset(self) -> None:
        """Default behaviour, empty log."""
        self._call("DELETE", f"control/{self.tenant}")

    def log(self) -> list[dict[str, Any]]:
        """Every request so far, in order of arrival."""
        requests: list[dict[str, Any]] = self._call("GET", f"control/{self.tenant}")["requests"]
        return requests

    def texts(self) -> list[str]:
        """Every text so far, in order of arrival."""
        return [text for request in self.log() for text in request["texts"] or []]

    def counters(self) -> dict[str, Any]:
        counters: dict[str, Any] = self._call("GET", f"control/{self.tenant}?only=counters")["counters"]
        return counters

    def wait_for(self, seconds: float = 10, **least: int) -> dict[str, Any]:
        """Wait until each named counter has at least this value; return all of them."""
        return self._wait(seconds, least=least, most={})

    def wait_until_idle(self, seconds: float = 10) -> dict[str, Any]:
        """Wait until no request is in flight; return all counters."""
        return self._wait(seconds, least={}, most={"in_flight": 0})

    def _wait(self, seconds: float, least: dict[str, int], most: dict[str, int]) -> dict[str, Any]:
        order = {"seconds": seconds, "least": least, "most": most}
        answer = self._call("POST", f"control/{self.tenant}/wait", order, 30 + seconds)
        counters: dict[str, Any] = answer["counters"]
        if not answer["reached"]:
            raise TimeoutError(f"waited {seconds} s for at least {least}, at most {most}, have {counters}")
        return counters

    def listen(self, port: int = 0, **tls: str) -> int:
        """Open a further port (0: any free one; tls_cert and tls_key: paths on the server's side)."""
        return int(self._call("PUT", f"ports/{port}", tls)["port"])

    def refuse(self, port: int) -> None:
        """Close that port: connections to it end, new ones are refused."""
        self._call("DELETE", f"ports/{port}")

    def _call(self, method: str, path: str, order: object = None, timeout_seconds: float = 30) -> Any:
        body = None if order is None else json.dumps(order).encode()
        request = urllib.request.Request(f"{self.control_url}/{path}", body, method=method)
        # neither a proxy nor a certificate's name matters on the way to our own server
        handlers = [
            urllib.request.ProxyHandler({}),
            urllib.request.HTTPSHandler(context=ssl._create_unverified_context()),
        ]
        try:
            with urllib.request.build_opener(*handlers).open(request, timeout=timeout_seconds) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise ValueError(json.load(error)["error"]) from None
