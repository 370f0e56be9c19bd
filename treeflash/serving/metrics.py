"""Metrics in Prometheus' format, with vLLM's names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from treeflash.decoding import Scheduler
from treeflash.decoding.interfaces import DeviceReport, count_captures
from treeflash.serving.acceptance import AcceptanceMonitor
from treeflash.text.stream import Chunk

TIME_BUCKETS = (
    0.001,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    10,
    30,
    60,
    300,
)


class Metrics:
    """Counters, gauges and histograms of one model, however often it is loaded."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

        def counter(name: str, help: str, labels: Sequence[str] = ()) -> Counter:
            return Counter(f"treeflash:{name}", help, labels, registry=self._registry)

        def gauge(name: str, help: str, labels: Sequence[str] = ()) -> Gauge:
            return Gauge(f"treeflash:{name}", help, labels, registry=self._registry)

        def histogram(name: str, help: str) -> Histogram:
            name = f"treeflash:{name}"
            return Histogram(name, help, registry=self._registry, buckets=TIME_BUCKETS)

        self._running = gauge("num_requests_running", "Sequences being decoded.")
        self._waiting = gauge("num_requests_waiting", "Sequences waiting to be decoded.")
        self._state_bytes = gauge("kv_cache_bytes", "Device memory of running sequences.")
        self._prefix_bytes = gauge("prefix_cache_bytes", "Device memory of the prefix cache.")
        self._queries = counter("prefix_cache_queries", "Prompt tokens looked up in the cache.")
        self._hits = counter("prefix_cache_hits", "Prompt tokens found in the cache.")
        self._disk_hits = counter(
            "external_prefix_cache_hits",
            "Prompt tokens that came from the disk.",
        )
        self._disk_written = gauge("prefix_cache_disk_written_bytes", "Bytes of stored states.")
        self._disk_skipped = gauge(
            "prefix_cache_disk_skipped", "Files of stored states that could not be used."
        )
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens.")
        self._tokens = counter("generation_tokens", "Generated tokens.")
        self._drafts = counter("spec_decode_num_drafts", "Verified draft trees.")
        self._drafted = counter("spec_decode_num_draft_tokens", "Drafted tokens.")
        self._accepted = counter("spec_decode_num_accepted_tokens", "Accepted drafted tokens.")
        self._drafting = gauge(
            "drafting",
            "1 for the present state: on; paused, because drafts of the budget auto cost more than "
            "they bring; or no_drafter.",
            ["state"],
        )
        self._first_share = gauge(
            "first_draft_acceptance",
            "Share of drafts whose first token was right: of the latest ones, and expected by the "
            "drafter's evaluation.",
            ["of"],
        )
        self._low = gauge(
            "low_acceptance", "1 if that share is far below what is expected; the log has reasons."
        )
        self._exact = gauge(
            "exact",
            "1 if no answer depends on drafts or other requests, bit for bit; 0 with the reason.",
            ["reason"],
        )
        self._batches = gauge(
            "batches", "1 if sequences share forward passes, 0 if each has passes of its own."
        )
        self._kernels = gauge(
            "kernel",
            "1 if the backend uses a kernel of its own in layers of this shape, for this number of "
            "rows, nodes or columns, or in this dtype; 0 with the reason.",
            ["kernel", "size", "reason"],
        )
        self._captures = gauge(
            "captures", "Captured or compiled graphs; all sequences wait for a capture."
        )
        self._finished = counter("request_success", "Finished sequences.", ["finished_reason"])
        self._failed = counter("request_failure", "Sequences that ended with an error.")
        self._queue_time = histogram("request_queue_time_seconds", "Time before the prefill.")
        self._first = histogram("time_to_first_token_seconds", "Time to the first token.")
        self._between = histogram("inter_token_latency_seconds", "Time between two tokens.")
        self._latency = histogram("e2e_request_latency_seconds", "Time to the last token.")
        self._loaded = gauge("model_loaded", "1 while the model is in memory.")
        self._loads = counter("model_loads", "How often the model was loaded.")
        self._failed_loads = counter("model_load_failures", "How often it could not be loaded.")
        self._load_time = counter("model_load_seconds", "Seconds that loading it took in all.")
        self._unloads = counter(
            "model_unloads",
            "How often it was put out of memory: to make room, because its time was over, or on "
            "request.",
            ["reason"],
        )

    def set_device(self, report: DeviceReport) -> None:
        """Set the gauges of the device, which does not change until the next load."""
        for gauge in (self._kernels, self._exact):  # an earlier load may have had other reasons
            gauge.clear()
        self._batches.set(report.batches)
        for kernel, verdicts in report.kernels.items():
            for size, verdict in verdicts.items():
                used = verdict.startswith("used")
                self._kernels.labels(kernel, size, "" if used else verdict).set(used)

    def count_prefill(self, chunk: Chunk, prompt_tokens: int, seconds: float) -> None:
        """Count a sequence's first token, `seconds` after its submission."""
        self._queries.inc(prompt_tokens)
        self._hits.inc(chunk.step.cached_tokens)
        self._disk_hits.inc(chunk.step.disk_tokens)
        self._prompt_tokens.inc(prompt_tokens)
        self._tokens.inc(len(chunk.token_ids))
        self._first.observe(seconds)
        self._queue_time.observe(max(0.0, seconds - chunk.step.seconds.get("prefill", 0.0)))

    def count_iteration(self, chunk: Chunk, seconds: float) -> None:
        """Count an iteration of a sequence, `seconds` after the previous one."""
        for _ in chunk.token_ids:
            self._between.observe(seconds / len(chunk.token_ids))
        self._tokens.inc(len(chunk.token_ids))
        tree = chunk.step.tree
        if tree is not None and len(tree) > 1:
            self._drafts.inc()
            self._drafted.inc(len(tree) - 1)
            self._accepted.inc(chunk.step.accepted_tokens)

    def count_finish(self, reason: str, seconds: float) -> None:
        """Count a finished sequence, `seconds` after its submission."""
        self._finished.labels(reason).inc()
        self._latency.observe(seconds)

    def count_failures(self, sequences: int) -> None:
        self._failed.inc(sequences)

    def count_load(self, seconds: float) -> None:
        self._loads.inc()
        self._load_time.inc(seconds)
        self._loaded.set(1)

    def count_failed_load(self) -> None:
        self._failed_loads.inc()

    def count_unload(self, reason: str) -> None:
        self._unloads.labels(reason).inc()
        self._loaded.set(0)
        for gauge in (self._running, self._waiting, self._state_bytes, self._prefix_bytes):
            gauge.set(0)

    def update_gauges(self, scheduler: Scheduler) -> None:
        """Set the gauges from the scheduler's present state."""
        self._running.set(scheduler.running)
        self._waiting.set(scheduler.waiting)
        self._state_bytes.set(scheduler.nbytes)
        self._captures.set(count_captures(scheduler.backend))
        for state in ("on", "paused", "no_drafter"):
            self._drafting.labels(state).set(state == _drafting_state(scheduler))
        reason = scheduler.backend.inexact
        self._exact.labels(reason or "").set(reason is None)
        cache = scheduler.prefix_cache
        self._prefix_bytes.set(0 if cache is None else cache.nbytes)
        if cache is not None and cache.disk is not None:
            self._disk_written.set(cache.disk.written_bytes)
            self._disk_skipped.set(cache.disk.skipped)

    def update_acceptance(self, acceptance: AcceptanceMonitor) -> None:
        """Set the gauges of the drafts' first tokens, as far as they are known."""
        self._low.set(acceptance.is_low)
        for of, share in (("latest", acceptance.share), ("evaluation", acceptance.expected)):
            if share is not None:
                self._first_share.labels(of).set(share)

    def collect(self) -> Iterable[Metric]:
        return self._registry.collect()


def _drafting_state(scheduler: Scheduler) -> str:
    if scheduler.budgets.is_paused(max(scheduler.running, 1)):
        return "paused"
    # The method `suffix` needs no drafter.
    drafts = scheduler.backend.drafter is not None or scheduler.budgets.by_method
    return "on" if drafts else "no_drafter"


class _LabelledMetrics(Collector):
    """The metrics of all models of a server, each with the model's name in the label `model`."""

    def __init__(self, models: Mapping[str, Metrics]) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for name, metrics in self._models.items():
            for family in metrics.collect():
                samples = families.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                ).samples
                samples += (x._replace(labels={"model": name, **x.labels}) for x in family.samples)
        yield from families.values()


def metrics_text(models: Mapping[str, Metrics]) -> bytes:
    """Return the metrics of models by their names, as Prometheus reads them."""
    registry = CollectorRegistry()
    registry.register(_LabelledMetrics(models))
    return generate_latest(registry)
