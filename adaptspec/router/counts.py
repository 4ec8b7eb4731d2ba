"""What the router counts: requests by class, server and status, never their texts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest


class Counts:
    """The figures behind ``/metrics``, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._answers = Counter(
            "adaptspec_router_answers",
            "Answers that a server gave",
            ("prompt_class", "server", "status"),
            registry=self.registry,
        )
        self._ended = Counter(
            "adaptspec_router_ended_early",
            "Requests that ended early, by who ended them",
            ("by",),
            registry=self.registry,
        )
        self._open = Gauge(
            "adaptspec_router_open_requests",
            "Requests that are being answered",
            registry=self.registry,
        )
        self.open = 0

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count a request as open."""
        self.open += 1
        self._open.inc()
        try:
            yield
        finally:
            self.open -= 1
            self._open.dec()

    def answered(self, prompt_class: str | None, server: str, status: int) -> None:
        """Count a server's answer."""
        self._answers.labels(prompt_class or "", server, str(status)).inc()

    def ended_early(self, by: str) -> None:
        """Count a request that a ``client`` or a ``server`` broke off."""
        self._ended.labels(by).inc()

    def as_text(self) -> bytes:
        """In the text format of Prometheus."""
        return generate_latest(self.registry)
