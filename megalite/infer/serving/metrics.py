"""Metrics for Prometheus."""

from __future__ import annotations

from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Counted(Protocol):
    """Describes an engine as the metrics see it."""

    @property
    def num_slots(self) -> int: ...

    @property
    def num_busy(self) -> int: ...

    @property
    def num_waiting(self) -> int: ...


class Metrics:
    """Holds the server's metrics in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "megalite_requests", "HTTP requests", ("path", "status"), registry=registry
        )
        self.seconds = Histogram(
            "megalite_request_seconds",
            "until a response has ended",
            ("path",),
            buckets=SECONDS,
            registry=registry,
        )
        self.answers = Counter(
            "megalite_answers", "answers that ended, by why", ("finish",), registry=registry
        )
        self.prompted = Counter("megalite_prompt_tokens", "tokens of prompts", registry=registry)
        self.generated = Counter(
            "megalite_generated_tokens", "tokens of answers", registry=registry
        )
        self.first_token = Histogram(
            "megalite_first_token_seconds",
            "from a request to its first token",
            buckets=SECONDS,
            registry=registry,
        )
        self.slots = Gauge(
            "megalite_slots", "answers that are computed at a time, at most", registry=registry
        )
        self.busy = Gauge("megalite_slots_busy", "answers that are computed now", registry=registry)
        self.waiting = Gauge("megalite_waiting", "requests that wait for a slot", registry=registry)
        self.engines: list[Counted] = []
        """Those that answer now: more than one while a model takes another's place."""
        # Called whenever Prometheus reads the metrics, in the thread of the event loop.
        self.slots.set_function(lambda: sum(each.num_slots for each in self.engines))
        self.busy.set_function(lambda: sum(each.num_busy for each in self.engines))
        self.waiting.set_function(lambda: sum(each.num_waiting for each in self.engines))
        self.ratings = Counter(
            "megalite_ratings", "answers that were rated", ("rating",), registry=registry
        )
        self.model = Gauge(
            "megalite_model",
            "1 for the model that is served",
            ("version", "folder"),
            registry=registry,
        )
        self.reloads = Counter(
            "megalite_reloads",
            "times that a model was to be loaded anew",
            ("outcome",),
            registry=registry,
        )
