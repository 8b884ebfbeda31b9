"""Metrics for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


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
        self.ratings = Counter(
            "megalite_ratings", "answers that were rated", ("rating",), registry=registry
        )
