"""What Prometheus reads adds up."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest
from failures import failing
from prometheus_client.parser import text_string_to_metric_families
from servers import Gate, wait_until

from treeflash.config import DecodeConfig
from treeflash.decoding.adaptive_budget import AdaptiveBudgets
from treeflash.decoding.interfaces import DeviceReport
from treeflash.decoding.loop import Step
from treeflash.decoding.tree import DraftTree
from treeflash.decoding.verify_costs import VerifyCosts
from treeflash.errors import NumericalError
from treeflash.serving.engine import Engine
from treeflash.serving.metrics import Metrics, metrics_text
from treeflash.serving.settings import Settings
from treeflash.text.stream import Assembler, Chunk


def samples(text):
    """Each sample by its name, with its labels if it has any besides the model's name."""
    return {
        sample.name.removeprefix("treeflash:")
        + "".join(value for label, value in sample.labels.items() if label != "model"): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def values(server):
    return samples(server.client.get("/metrics").text)


def test_counts_are_those_of_the_usage(serve):
    server = serve()
    usages = [
        server.complete(prompt, max_tokens=12, ignore_eos=True, budget=6, n=n).json()["usage"]
        for prompt, n in (("Hello, world", 1), ("Hello, moon", 2))
    ]
    # An answer is sent before the iteration ends that made its last token.
    wait_until(lambda: values(server)["num_requests_running"] == 0)
    found = values(server)
    assert found["generation_tokens_total"] == sum(u["completion_tokens"] for u in usages) == 36
    drafts = [usage["draft_tokens_details"] for usage in usages]
    iterations = sum(d["iterations"] for d in drafts)  # some of which draft nothing
    assert 0 < found["spec_decode_num_drafts_total"] <= iterations
    assert found["spec_decode_num_draft_tokens_total"] == sum(d["drafted_tokens"] for d in drafts)
    accepted = sum(d["accepted_tokens"] for d in drafts)
    assert found["spec_decode_num_accepted_tokens_total"] == accepted > 0
    assert found["request_success_totallength"] == 3
    assert found["prompt_tokens_total"] == 12 + 2 * 11
    assert found["prefix_cache_hits_total"] > 0
    assert found["prefix_cache_bytes"] > 0
    for name, count in (
        ("time_to_first_token_seconds", 3),
        ("request_queue_time_seconds", 3),
        ("inter_token_latency_seconds", 33),
        ("e2e_request_latency_seconds", 3),
    ):
        assert found[f"{name}_count"] == count
        assert found[f"{name}_sum"] >= 0
    first, between = (
        found[f"{name}_seconds_sum"] for name in ("time_to_first_token", "inter_token_latency")
    )
    assert min(first, between) > 0
    assert found["e2e_request_latency_seconds_sum"] == pytest.approx(first + between)
    assert found["num_requests_running"] == found["num_requests_waiting"] == 0
    assert found["exactequal to plain decoding, except at ties of float32 rounding"] == 0
    assert found["batches"] == 1


def test_running_and_waiting(serve):
    server = serve(max_parallel=1)
    with Gate(server.engine) as gate:
        body = {"prompt": "A", "n": 3, "max_tokens": 300, "ignore_eos": True, "stream": True}
        with server.client.stream("POST", "/v1/completions", json=body):
            gate.allow(2)
            wait_until(lambda: values(server)["num_requests_running"] == 1)
            assert values(server)["num_requests_waiting"] == 2
            assert values(server)["kv_cache_bytes"] > 0
    wait_until(lambda: values(server)["num_requests_running"] == 0)


def test_drafts_are_counted_under_the_names_of_others(serve):
    server = serve()
    settings = {"max_tokens": 12, "ignore_eos": True, "budget": 6}
    body = server.complete("Hello, world", **settings).json()
    details = body["usage"]["draft_tokens_details"]
    found = dict(body["metrics"]["speculative_decoding"])
    histogram = found.pop("acceptance_histogram")
    steps, accepted, drafted = (
        found["num_spec_steps"],
        *(details[name] for name in ("accepted_tokens", "drafted_tokens")),
    )
    assert 0 < steps == sum(histogram) <= details["iterations"]
    assert sum(n * count for n, count in enumerate(histogram)) == accepted > 0
    assert found == {
        "mean_acceptance_length": 1 + accepted / steps,
        "draft_acceptance_rate": accepted / drafted,
        "num_spec_steps": steps,
        "num_accepted_draft_tokens": accepted,
        "num_draft_tokens": drafted,
        "num_spec_tokens": len(histogram) - 1,
    }
    assert body["timings"] == {"draft_n": drafted, "draft_n_accepted": accepted}
    several = server.complete("Hello, world", n=2, **settings).json()
    assert several["metrics"] == {"speculative_decoding": None}
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *_, last = server.frames("/v1/completions", prompt="Hello, world", **settings, **options)
    assert last["timings"] == body["timings"]
    assert last["metrics"] == body["metrics"]


def chunk(tokens, **fields):
    step = Step(tuple(range(tokens)), **fields)
    return Chunk("", step.tokens, step, None)


def test_tokens_and_seconds():
    """A prompt waits and is run; an iteration drafts, and another one verifies its root alone."""
    metrics = Metrics()
    metrics.count_prefill(chunk(1, cached_tokens=4, seconds={"prefill": 0.5}), 10, 2.0)
    tree = DraftTree.chain(np.arange(6, dtype=np.int32))
    # The path went on after the end of the text.
    metrics.count_iteration(chunk(3, tree=tree, path=np.arange(6)), 0.6)
    metrics.count_iteration(chunk(1, tree=tree.subset(np.arange(1)), path=np.arange(1)), 0.2)
    metrics.count_finish("stop", 5.0)
    metrics.count_failures(3)
    expected = {
        "prompt_tokens_total": 10,
        "prefix_cache_queries_total": 10,
        "prefix_cache_hits_total": 4,
        "generation_tokens_total": 5,
        "time_to_first_token_seconds_sum": 2.0,
        "request_queue_time_seconds_sum": 1.5,
        "inter_token_latency_seconds_count": 4,
        "inter_token_latency_seconds_sum": 0.8,
        "spec_decode_num_drafts_total": 1,
        "spec_decode_num_draft_tokens_total": 5,
        "spec_decode_num_accepted_tokens_total": 3,
        "request_success_totalstop": 1,
        "e2e_request_latency_seconds_sum": 5.0,
        "request_failure_total": 3,
    }
    found = samples(metrics_text({"tiny": metrics}).decode())
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_an_answer_that_finished_before_a_failure_has_not_failed(model):
    engine = Engine(lambda: model, Settings())
    engine.start()
    short, long = (
        Assembler(model.backend, model.tokenizer, (5,), DecodeConfig(method="ar", max_tokens=n))
        for n in (1, 9)
    )
    fault = NumericalError("logits are not finite")

    async def answer():
        with failing(long, "add", fault), pytest.raises(NumericalError):
            await engine.submit([short, long], prompts=1).wait()

    try:
        asyncio.run(answer())
    finally:
        engine.stop()
    found = samples(metrics_text({"tiny": engine.metrics}).decode())
    assert found["request_success_totallength"] == found["request_failure_total"] == 1


def test_a_later_load_leaves_no_kernel_of_an_earlier_one():
    """A verdict may be timed at the first load, and kept for the next."""
    metrics = Metrics()
    for verdict in ("not used, slower", "not used, slower, timed on Monday"):
        report = DeviceReport(kernels={"products": {"5": verdict}})
        metrics.set_device(report)
    found = samples(metrics_text({"tiny": metrics}).decode())
    kernels = {name: value for name, value in found.items() if name.startswith("kernel")}
    assert kernels == {"kernelproductsnot used, slower, timed on Monday5": 0}


def test_nothing_is_drafted_without_a_drafter():
    """Only the method `suffix` drafts copies of the text. A backend may be exact."""
    budgets = AdaptiveBudgets(VerifyCosts({1: 1.0}))
    backend = SimpleNamespace(drafter=None, inexact=None)
    scheduler = SimpleNamespace(
        running=1, waiting=2, nbytes=3, backend=backend, budgets=budgets, prefix_cache=None
    )
    metrics = Metrics()
    for states in ((0, 0, 1), (1, 0, 0)):
        metrics.update_gauges(scheduler)
        found = samples(metrics_text({"tiny": metrics}).decode())
        names = ("on", "paused", "no_drafter")
        assert tuple(found[f"drafting{name}"] for name in names) == states
        budgets.get("suffix", backend)
    sizes = {"num_requests_running": 1, "num_requests_waiting": 2, "kv_cache_bytes": 3}
    assert {name: found[name] for name in sizes} == sizes
    assert (found["exact"], found["prefix_cache_bytes"]) == (1, 0)
