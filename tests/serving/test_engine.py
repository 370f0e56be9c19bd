"""The engine's thread: errors of one text and of all, and the end of the server."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from copy import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from failures import failing
from recordings import recording
from servers import PATIENCE, Gate, check_error, parse, post_bytes, serving, wait_until
from stand_ins import stand_in

from treeflash.config import GIB, DecodeConfig
from treeflash.decoding.interfaces import DeviceReport
from treeflash.decoding.loop import Step
from treeflash.errors import CheckpointError, ConfigError, MemoryShortError, NumericalError
from treeflash.serving import application
from treeflash.serving.engine import AnswerUpdate, Completion, Engine
from treeflash.serving.models import ModelPool, ModelSpec
from treeflash.serving.settings import Settings
from treeflash.serving.streaming import speculative_decoding
from treeflash.text.stream import Assembler


def test_loading_fails():
    def load():
        raise CheckpointError("no such model")

    engine = Engine(load, Settings())
    with pytest.raises(CheckpointError, match="no such model"):
        engine.start()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"prefix_cache_dir": "new", "prefix_cache_gb": 0}, "raise prefix_cache_gb"),
        ({"prefix_cache_dir": "new", "max_memory_gb": 1e-10}, "raise max_memory_gb"),
        ({"prefix_cache_dir": "file"}, "file cannot be written: Not a directory"),
        ({"prefix_cache_dir": ""}, "must be the path of a folder, got ''"),
        ({"prefix_cache_dir": 7}, "must be the path of a folder, got 7"),
        ({"prefix_cache_disk_gb": 0}, "prefix_cache_disk_gb must be above 0, got 0"),
    ],
)
def test_settings_of_the_disk_tier(model, tmp_path, monkeypatch, settings, says):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(ConfigError, match=says):
        Engine(lambda: model, Settings(**settings)).start()


def test_the_models_are_loaded_in_the_thread_that_runs_them(model):
    """Frameworks bind streams and thread pools to threads."""
    threads = []

    def load():
        threads.append(threading.current_thread())
        return model

    engine = Engine(load, Settings())
    engine.start()
    engine.stop()
    assert threads == [engine.thread]
    assert not engine.ready


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (NumericalError("logits are not finite"), 500, "logits are not finite"),
        (MemoryError("out of memory"), 503, "out of memory"),
        (KeyError("a fault"), 500, "its log has the reason"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_ends_its_texts_alone(serve, caplog, error, status, says, stream):
    server = serve()
    with failing(server.engine.model.backend.verifier, "run", error, call=1):
        response = server.complete("A", stream=stream)
    if stream:
        assert says in response.text
        assert "[DONE]" not in response.text, "the answer would seem complete"
    else:
        check_error(response, status, says)
    assert server.engine.unfinished == 0
    metrics = server.client.get("/metrics").text
    assert 'treeflash:request_failure_total{model="tiny"} 1.0' in metrics
    assert "request_success_total{" not in metrics
    assert server.complete("A", max_tokens=3, ignore_eos=True).status_code == 200
    tracebacks = [record for record in caplog.records if record.exc_info]
    assert bool(tracebacks) == isinstance(error, KeyError)


@pytest.mark.parametrize("part", ["decoding", "text"])
def test_a_failure_ends_all_answers_to_its_request_alone(serve, caplog, part):
    server = serve()
    options = {"max_tokens": 60, "ignore_eos": True}
    alone = server.complete("B", **options).json()["choices"]
    scheduler, failed = server.engine.scheduler, []
    step = scheduler.step

    def fail_first():
        events = step()
        if len(events) == 4 and not failed:  # three answers to A, then one to B
            failed.append(events[0][0])
            if part == "decoding":
                events[0] = events[0][0], NumericalError("logits are not finite")
            else:
                server.engine.running_answers[events[0][0]].assembler.add = fail
        return events

    def fail(step):
        raise NumericalError("its numbers are not finite")

    scheduler.step = fail_first
    with ThreadPoolExecutor() as pool, Gate(server.engine) as gate:
        first = pool.submit(server.complete, "A", n=3, max_tokens=400, ignore_eos=True)
        wait_until(lambda: server.engine.unfinished == 3)
        second = pool.submit(server.complete, "B", **options)
        wait_until(lambda: server.engine.unfinished == 4)
        gate.open()
        assert second.result().json()["choices"] == alone
        check_error(first.result(), 500, "not finite")
    wait_until(lambda: server.engine.unfinished == 0)
    assert not scheduler.busy
    assert 'treeflash:request_failure_total{model="tiny"} 3.0' in server.client.get("/metrics").text
    assert not [record for record in caplog.records if record.exc_info]


def test_an_answer_that_cannot_be_added_fails_alone(serve):
    """No part of it is decoded."""
    server = serve()
    scheduler = server.engine.scheduler
    submit = scheduler.submit_group
    first = list(server.engine.model.tokenizer.encode("A"))

    def fail(requests):
        if list(requests[0].prompt_ids) != first:
            raise KeyError("a fault")
        return submit(requests)

    scheduler.submit_group = fail
    check_error(server.complete(["A", "B"], n=2), 500, "its log has the reason")
    assert not scheduler.busy
    assert server.engine.unfinished == 0
    assert server.complete("A", max_tokens=3).status_code == 200


def test_a_failure_while_a_client_leaves_ends_all_texts_and_not_the_server(serve, caplog):
    server, path = serve(), "/v1/completions"
    scheduler, options = server.engine.scheduler, {"max_tokens": 400, "ignore_eos": True}
    caplog.set_level("INFO", "treeflash.serving")
    with failing(scheduler, "cancel", KeyError("a fault"), call=1), ThreadPoolExecutor() as pool:
        with Gate(server.engine) as gate:
            other = pool.submit(server.complete, "B", **options)
            body = {"prompt": "A", "stream": True, **options}
            with server.client.stream("POST", path, json=body):
                wait_until(lambda: server.engine.unfinished == 2)
                gate.allow(1)
            wait_until(lambda: "unfinished" in caplog.text)
        check_error(other.result(), 500, "its log has the reason")
    wait_until(lambda: server.engine.unfinished == 0)
    assert not scheduler.busy
    assert server.complete("A", max_tokens=3).status_code == 200


def test_a_failure_of_an_idle_server_does_not_end_it(serve, caplog):
    server = serve()
    server.engine.thread.call(lambda: {}["a fault"])
    assert server.complete("A", max_tokens=3).status_code == 200
    assert "KeyError: 'a fault'" in caplog.text


@pytest.fixture
def running():
    """A function that waits for the first server of `application.serve`, and its socket."""
    with recording(application.Server, "startup") as begun:

        def first():
            wait_until(lambda: begun and begun[0][0].started)
            (server,) = begun[0]
            return server, server.servers[0].sockets[0]

        yield first


def serve_until_it_ends(models, client, folder=None, **limits):
    """Run a server of its own, and the client in a thread; returns the exit status."""
    where = {"host": "127.0.0.1", "port": 0, "log_level": "info"}
    settings = Settings()
    specs = [
        ModelSpec(names=(name,), load=load, settings=settings, defaults={}, folder=folder)
        for name, load in models.items()
    ]
    with ThreadPoolExecutor(1) as clients:
        asked = clients.submit(client)
        status = application.serve(specs, settings, **where, **limits)
        return status, asked.result()


@pytest.mark.parametrize("lost", [False, True])
def test_the_status_tells_whether_the_device_was_lost(model, running, lost):
    """No thread of a framework is left, beside which the interpreter would abort."""

    def post():
        server, listening = running()
        if lost:
            url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1/completions"
            with suppress(httpx.TransportError):  # the server ends
                httpx.post(url, json={"prompt": "A"})
        else:
            server.handle_exit(signal.SIGTERM, None)
        return server.pool.models[0].service.engine

    error = RuntimeError("[METAL] ... Caused GPU Timeout Error")
    with failing(model.backend.verifier, "run", error) if lost else nullcontext():
        status, engine = serve_until_it_ends({"tiny": lambda: model}, post)
    assert bool(status) == lost
    assert not engine.thread.is_alive()


def test_a_client_that_does_not_read_its_answer_cannot_hold_the_server(model, running):
    body = {"prompt": "A", "stream": True, "max_tokens": 400, "ignore_eos": True, "logprobs": 20}

    def ask():
        server, listening = running()
        engine = server.pool.models[0].service.engine
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(listening.getsockname())
            connection.sendall(post_bytes("/v1/completions", body))
            wait_until(lambda: engine.unfinished == 1)
            server.handle_exit(signal.SIGTERM, None)
            wait_until(lambda: not engine.thread.is_alive())
        return "it has not waited"

    status, said = serve_until_it_ends({"tiny": lambda: model}, ask, reading_seconds=0)
    assert (status, said) == (0, "it has not waited")


@pytest.fixture
def exits(monkeypatch):
    """Raise SystemExit where the process ends at once."""
    stand_in(monkeypatch, application.os, _exit=sys.exit)
    stand_in(monkeypatch, application.logging, shutdown=lambda: None)


@pytest.mark.usefixtures("exits")
def test_a_second_signal_ends_the_process_at_once(serve, caplog):
    server = serve()
    body = {"prompt": "A", "stream": True, "n": 16, "ignore_eos": True}
    caplog.set_level("INFO")
    with Gate(server.engine) as gate, server.client.stream("POST", "/v1/completions", json=body):
        gate.allow(1)
        server.server.handle_exit(signal.SIGTERM, None)
        with pytest.raises(SystemExit, match="143"):
            server.server.handle_exit(signal.SIGTERM, None)
        gate.open()
    assert "SIGTERM: finishing 16 answers" in caplog.text
    assert "stopped before 16 answers were finished" in caplog.text


@pytest.mark.usefixtures("exits")
def test_an_interruption_while_the_only_model_is_loaded(capsys):
    with failing(ModelPool, "start", KeyboardInterrupt), pytest.raises(SystemExit, match="130"):
        serve_until_it_ends({"tiny": None}, lambda: None)
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.usefixtures("exits")
def test_the_end_does_not_wait_for_a_model_that_is_loaded(model, running):
    begun, given_up = threading.Event(), threading.Event()

    def load():
        begun.set()
        given_up.wait(PATIENCE)
        raise CheckpointError("nobody waits for it")

    def post():
        server, listening = running()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1/completions"
        with ThreadPoolExecutor(1) as clients:
            asked = clients.submit(httpx.post, url, json={"model": "two", "prompt": "A"})
            assert begun.wait(PATIENCE)
            server.handle_exit(signal.SIGTERM, None)
            assert asked.result().json()["error"]["code"] == "shutting_down"

    with pytest.raises(SystemExit, match="0"):
        serve_until_it_ends({"one": load, "two": load}, post, model.folder)
    given_up.set()


@pytest.mark.parametrize(
    "message",
    [
        "[METAL] ... Caused GPU Timeout Error",
        "CUDA error: an illegal memory access was encountered",
    ],
)
def test_a_gpu_that_refuses_further_work_ends_the_server(serve, message):
    """With a status other than 0, so that whoever started it starts it again."""
    server = serve()
    with failing(server.engine.model.backend.verifier, "run", RuntimeError(message)):
        check_error(server.complete("A"), 500, "the GPU refuses further work")
    wait_until(lambda: server.server.should_exit)
    assert server.engine.device_lost
    assert not server.engine.ready


def test_memory_is_sized_from_the_device(model, caplog):
    assert Settings().memory(None) == (4 * GIB, 2 * GIB)
    assert Settings().memory(20 * GIB) == (20 * GIB, 10 * GIB)
    assert Settings().memory(2**28) == (2**28, 2**27)
    with pytest.raises(ConfigError, match="leave the device no memory for KV caches; use"):
        Settings().memory(0)
    assert Settings(max_memory_gb=1).memory(0) == (GIB, GIB // 2)
    assert Settings(max_memory_gb=2, prefix_cache_gb=0).memory(9 * GIB) == (2 * GIB, 0)
    assert Settings(max_memory_gb=0.5).memory(None) == (2**29, 2**28)
    assert Settings(prefix_cache_gb=0.25).memory(2**31) == (2**31, 2**28)
    # What a backend has set aside is neither more nor less.
    assert Settings().memory(2**29, 2**29) == (2**29, 2**28)
    assert Settings(max_memory_gb=9, prefix_cache_gb=8).memory(2**31, 2**31) == (2**31, 2**31)
    assert Settings(max_memory_gb=1).memory(2**31, 2**31) == (GIB, GIB // 2)
    for limit in (None, 1):
        with pytest.raises(MemoryShortError, match=r"smaller target or one in fewer bits$"):
            Settings(max_memory_gb=limit).memory(0, 0)
    assert DeviceReport(available_bytes=9 * GIB, reserved_bytes=GIB).free_bytes == GIB
    report = DeviceReport(
        available_bytes=10 * GIB,
        weights_bytes=3 * GIB,
        batches=False,
        kernels={"products": {"5 rows": "used, 1.30 times as fast", "9 rows": "not used, slower"}},
    )
    backend = copy(model.backend)
    backend.device_report, backend.captures = lambda: report, 7
    with caplog.at_level("INFO"), serving(replace(model, backend=backend)) as server:
        scheduler = server.engine.scheduler
        assert scheduler.config.max_bytes == 6 * GIB
        assert scheduler.prefix_cache.max_bytes == 3 * GIB
        told = server.client.get("/metrics").text
        assert 'treeflash:batches{model="tiny"} 0.0' in told
        assert 'treeflash:captures{model="tiny"} 7.0' in told
        assert [x for x in caplog.messages if "products" in x] == [
            "products, 9 rows: not used, slower"
        ]
        for size, reason, value in (("5 rows", "", 1.0), ("9 rows", "not used, slower", 0.0)):
            labels = f'kernel="products",model="tiny",reason="{reason}",size="{size}"'
            assert f"treeflash:kernel{{{labels}}} {value}" in told


def test_a_signal_may_come_while_a_request_is_added(model, monkeypatch):
    """Its handler counts the unfinished answers, in the thread of the event loop."""
    engine, counts = Engine(lambda: model, Settings()), []
    engine.start()

    def interrupted(completion):
        counts.append(engine.unfinished)
        return id(completion)

    async def answer():
        config = DecodeConfig(method="ar", max_tokens=1)
        one = Assembler(model.backend, model.tokenizer, (5,), config)
        await engine.submit([one], prompts=1).wait()

    stand_in(monkeypatch, Completion, __hash__=interrupted)
    loop = threading.Thread(target=lambda: asyncio.run(answer()), daemon=True)
    loop.start()
    loop.join(PATIENCE)
    engine.stop()
    assert not loop.is_alive()
    assert counts[0] == 0


def test_the_end_waits_for_running_answers(model):
    with serving(model) as server, Gate(server.engine) as gate:
        body = {"prompt": "A", "stream": True, "max_tokens": 30, "ignore_eos": True}
        with server.client.stream("POST", "/v1/completions", json=body) as response:
            gate.allow(1)
            assert server.client.get("/health").json() == {"status": "ok"}
            server.server.handle_exit(15, None)
            assert server.client.get("/health").status_code == 503
            check_error(server.chat(), 503, "shutting down")
            gate.open()
            *_, last = parse(response)
        assert last["choices"][0]["finish_reason"] == "length"
        wait_until(lambda: server.server.should_exit)


def test_a_request_while_the_thread_ends_is_refused(serve, monkeypatch):
    """Nobody would answer it."""
    server = serve(timeout=2)
    engine, reserve = server.engine, server.engine._reserve

    def end_before(completion):
        engine.thread.stop()
        reserve(completion)

    stand_in(monkeypatch, engine, _reserve=end_before)
    check_error(server.chat(), 503, "shutting down")
    assert engine.unfinished == 0


def test_counts_of_a_stream_are_those_of_what_it_has_read():
    """A stream may send them with each chunk, after the engine has generated others."""

    class Tree:
        looks = 0

        def __init__(self, nodes):
            self.nodes = nodes

        def __len__(self):
            return self.nodes

        @property
        def depths(self):
            Tree.looks += 1
            return np.arange(self.nodes)

    def chunk(number):
        tree = None if number == 0 else Tree(1 + number % 4)
        path = None if tree is None else range(1 + number % 2 * (len(tree) > 1))
        tokens = (1, 2)
        if number == 99:  # the first draft ends the text, and two more would have been right
            tokens, path = (1,), range(4)
        step = Step(tokens, tree=tree, path=path, cached_tokens=5, disk_tokens=2)
        return SimpleNamespace(token_ids=(1, 2), step=step, finish_reason=None)

    async def count(prompts, answers):
        texts = [SimpleNamespace(chunks=[], prompt_ids=(1, 2, 3)) for _ in range(answers)]
        completion = Completion(texts, prompts, lambda _: None, 1.0)
        for number in range(100):
            for index, text in enumerate(texts):
                text.chunks.append(chunk(number))
                completion.deliver([AnswerUpdate(index, number, text.chunks[-1])])
        for number in range(100 * answers):
            await anext(completion)
            assert completion.usage.completion_tokens == 2 * (number + 1)
            speculative_decoding(completion)
        return completion.usage, speculative_decoding(completion)

    usage, drafts = asyncio.run(count(1, 1))
    assert Tree.looks <= 100
    expected = {
        "prompt_tokens": 3,
        "cached_tokens": 5,
        "disk_tokens": 2,
        "completion_tokens": 200,
        "drafted_tokens": 150,
        "accepted_tokens": 50,
        "iterations": 99,
    }
    assert vars(usage).items() >= expected.items()
    assert drafts["acceptance_histogram"] == [25, 50, 0, 0]
    usage, _ = asyncio.run(count(2, 4))
    each = ("prompt_tokens", "cached_tokens", "disk_tokens")
    for field, value in expected.items():
        assert getattr(usage, field) == value * (2 if field in each else 4)
