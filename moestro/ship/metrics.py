"""What a Prometheus server reads at /metrics; one registry per server, so that tests may run several."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

LATENCY_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 60)


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("method", "route", "status")
        self.requests = Counter("moestro_ship_requests_total", "Requests answered", labels, registry=self.registry)
        self.latency = Histogram(
            "moestro_ship_request_seconds",
            "Time from request to end of answer",
            ("route",),
            buckets=LATENCY_S,
            registry=self.registry,
        )
        self.sent = self._counter("sent_bytes", "Bytes of file content sent")
        self.received = self._counter("received_bytes", "Bytes of chunks accepted")
        self.bad_chunks = self._counter("bad_chunks", "Chunks refused because their digest differs")
        self.refused_tokens = self._counter("refused_tokens", "Requests with an unknown, wrong or expired token")
        self.slowed = self._counter("slowed", "Requests refused because they came too fast")
        self.published = self._counter("published", "Releases published")
        self.collected = self._counter("collected_bytes", "Bytes removed by garbage collection")
        self.last_collection = Gauge(
            "moestro_ship_last_collection_seconds", "When garbage was last collected", registry=self.registry
        )
        self.reports = Counter(
            "moestro_ship_device_reports_total", "Reports of devices", ("state",), registry=self.registry
        )

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"moestro_ship_{name}_total", text, registry=self.registry)

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        """One request; status 0 stands for a connection that broke first."""
        self.requests.labels(method if method in METHODS else "other", route, str(status)).inc()
        self.latency.labels(route).observe(seconds)

    def collected_now(self, num_bytes: int) -> None:
        """Garbage was collected."""
        self.collected.inc(num_bytes)
        self.last_collection.set(time.time())

    def text(self) -> bytes:
        """In Prometheus' format."""
        return bytes(generate_latest(self.registry))


METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE")
