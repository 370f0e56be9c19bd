"""What Prometheus reads, by vLLM's names."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from treeflash.decoding import Scheduler
from treeflash.text.assembler import Chunk

SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """Counters, gauges and histograms of one server."""

    def __init__(self) -> None:
        """Start at 0."""
        self._registry = CollectorRegistry()
        gauge, counter, histogram = self._gauge, self._counter, self._histogram
        self._running = gauge("num_requests_running", "Texts that are being decoded.")
        self._waiting = gauge("num_requests_waiting", "Texts that wait to be decoded.")
        self._state_bytes = gauge("kv_cache_bytes", "Device memory of the running texts.")
        self._prefix_bytes = gauge("prefix_cache_bytes", "Device memory of the prefix cache.")
        self._queries = counter("prefix_cache_queries", "Prompt tokens looked up in the cache.")
        self._hits = counter("prefix_cache_hits", "Prompt tokens that came from the cache.")
        self._prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
        self._tokens = counter("generation_tokens", "Tokens that were generated.")
        self._drafts = counter("spec_decode_num_drafts", "Draft trees that were verified.")
        self._drafted = counter("spec_decode_num_draft_tokens", "Tokens that were drafted.")
        self._accepted = counter("spec_decode_num_accepted_tokens", "Drafted tokens accepted.")
        self._finished = Counter(
            "treeflash:request_success",
            "Texts that were finished.",
            ("finished_reason",),
            registry=self._registry,
        )
        self._failed = counter("request_failure", "Texts that ended with an error.")
        self._queue_time = histogram("request_queue_time_seconds", "Time before the prefill.")
        self._first = histogram("time_to_first_token_seconds", "Time to the first token.")
        self._between = histogram("inter_token_latency_seconds", "Time between two tokens.")
        self._latency = histogram("e2e_request_latency_seconds", "Time to the last token.")

    def prefilled(self, chunk: Chunk, prompt_tokens: int, seconds: float) -> None:
        """Count a text's first token, so many seconds after it was submitted."""
        self._queries.inc(prompt_tokens)
        self._hits.inc(chunk.step.cached_tokens)
        self._prompt_tokens.inc(prompt_tokens)
        self._tokens.inc(len(chunk.token_ids))
        self._first.observe(seconds)
        self._queue_time.observe(max(0.0, seconds - chunk.step.seconds.get("prefill", 0.0)))

    def decoded(self, chunk: Chunk, seconds: float) -> None:
        """Count a text's iteration, so many seconds after the previous one."""
        for _ in chunk.token_ids:
            self._between.observe(seconds / len(chunk.token_ids))
        self._tokens.inc(len(chunk.token_ids))
        tree, path = chunk.step.tree, chunk.step.path
        if tree is not None and path is not None and len(tree) > 1:
            self._drafts.inc()
            self._drafted.inc(len(tree) - 1)
            self._accepted.inc(len(path) - 1)

    def finished(self, reason: str, seconds: float) -> None:
        """Count the end of a text, so many seconds after it was submitted."""
        self._finished.labels(reason).inc()
        self._latency.observe(seconds)

    def failed(self, texts: int) -> None:
        """Count texts that ended with an error."""
        self._failed.inc(texts)

    def observe(self, scheduler: Scheduler) -> None:
        """Note how much is running and waiting."""
        self._running.set(scheduler.running)
        self._waiting.set(scheduler.waiting)
        self._state_bytes.set(scheduler.nbytes)
        cache = scheduler.prefix_cache
        self._prefix_bytes.set(0 if cache is None else cache.nbytes)

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self._registry)

    def _gauge(self, name: str, help: str) -> Gauge:
        return Gauge(f"treeflash:{name}", help, registry=self._registry)

    def _counter(self, name: str, help: str) -> Counter:
        return Counter(f"treeflash:{name}", help, registry=self._registry)

    def _histogram(self, name: str, help: str) -> Histogram:
        return Histogram(f"treeflash:{name}", help, registry=self._registry, buckets=SECONDS)
