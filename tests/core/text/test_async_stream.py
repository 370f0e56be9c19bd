"""Texts of event loops: equal to `generate`'s, decoded together, ended by whoever waits."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from contextlib import aclosing

import pytest
from failures import failing
from recordings import recording

from treeflash.config import METHODS
from treeflash.decoding import Scheduler
from treeflash.decoding.iteration import RunningSequence
from treeflash.errors import ConfigError, PromptError
from treeflash.language_model import load

TEXT = "The quick brown fox, ünd 👋🏽 so on; the end of it."
FOREVER = {"max_tokens": 380, "stop_token_ids": (), "method": "ar"}
PROMPTS = ["one", "two and three", [{"role": "user", "content": "four"}], [5, 6, 7]]


def join_thread() -> None:
    """Wait until no sequence is decoded for an event loop any more."""
    for thread in threading.enumerate():
        if thread.name == "treeflash-scheduler":
            thread.join(30)
            assert not thread.is_alive()


@pytest.fixture(autouse=True)
def no_thread_stays():
    yield
    join_thread()


@pytest.fixture
def model(tiny_pair):
    """A model whose texts never end by themselves."""
    return load(*tiny_pair, backend="reference")


class Gate:
    """Lets a number of forward passes of a model through, and counts them."""

    def __init__(self, verifier) -> None:
        self.passes = 0
        self.reached = threading.Event()  # is set when a forward pass is about to run
        self._permits = threading.Semaphore(0)
        run = verifier.run

        def gated(work):
            self.reached.set()
            assert self._permits.acquire(timeout=60)
            self.passes += 1
            return run(work)

        verifier.run = gated

    def allow(self, passes: int = 1000) -> None:
        self._permits.release(passes)


@pytest.fixture
def gate(model):
    return Gate(model.backend.verifier)


@pytest.fixture
def closed(monkeypatch):
    """Is set when the state of a sequence is closed."""
    event = threading.Event()
    close = RunningSequence.close
    monkeypatch.setattr(RunningSequence, "close", lambda self: (close(self), event.set()))
    return event


@pytest.mark.parametrize("method", METHODS)
def test_an_asynchronous_stream_has_the_chunks_of_a_stream(scripted, method):
    options = {"method": method, "budget": 5, "log_probs": None}
    expected = list(scripted(TEXT).stream("hi", **options))

    async def collect():
        stream = scripted(TEXT).astream("hi", **options)
        return [chunk async for chunk in stream], stream.generation()

    chunks, generation = asyncio.run(collect())
    assert [chunk.text for chunk in chunks] == [chunk.text for chunk in expected]
    assert [chunk.token_ids for chunk in chunks] == [chunk.token_ids for chunk in expected]
    assert chunks[-1].finish_reason == generation.finish_reason == "stop"
    assert generation.text == TEXT


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3}])
def test_texts_of_one_event_loop_are_decoded_together_and_equal_to_those_alone(model, sampling):
    options = {"max_tokens": 20, "budget": 6, **sampling}
    alone = [model.generate(prompt, **options) for prompt in PROMPTS]

    async def gather():
        return await asyncio.gather(*(model.agenerate(x, **options) for x in PROMPTS))

    with recording(model.backend.verifier, "run") as passes:
        found = asyncio.run(gather())
    assert [x.token_ids for x in found] == [x.token_ids for x in alone]
    assert [x.text for x in found] == [x.text for x in alone]
    assert [x.accepted_lengths for x in found] == [x.accepted_lengths for x in alone]
    assert max(len(work) for (work,) in passes) == len(PROMPTS)


def test_event_loops_of_several_threads_share_a_model(model):
    expected = [model.generate(prompt, max_tokens=20).token_ids for prompt in PROMPTS]
    found = {}

    def run(number):
        found[number] = asyncio.run(model.agenerate(PROMPTS[number], max_tokens=20)).token_ids

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(len(PROMPTS))] == expected


def test_the_event_loop_runs_while_a_text_is_decoded(model):
    """Chunks arrive while later ones are decoded."""

    async def race():
        chunks, others = [], 0
        stream = model.astream("hi", **FOREVER)
        reader = asyncio.ensure_future(anext(stream))
        while not reader.done():
            others += 1
            await asyncio.sleep(0)
        async for chunk in stream:
            chunks.append(chunk)
        return others, len(chunks)

    others, chunks = asyncio.run(race())
    assert others > 1
    assert chunks == FOREVER["max_tokens"] - 1


def test_a_stop_string_ends_text_and_sequence(model, closed):
    whole = model.generate("hi", max_tokens=40)
    closed.clear()
    options = {"stop": whole.text[5:8]}
    text = asyncio.run(model.agenerate("hi", max_tokens=380, **options))
    assert text.token_ids == model.generate("hi", max_tokens=380, **options).token_ids
    assert text.finish_reason == "stop"
    assert closed.is_set()


async def leave_block(stream):
    async with stream:
        await anext(stream)


async def close(stream):
    await anext(stream)
    await stream.aclose()


async def close_later(stream):
    async with aclosing(stream):
        async for _ in stream:
            break


async def cancel(stream):
    await anext(stream)
    task = asyncio.ensure_future(stream.run())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.sample(2)
@pytest.mark.parametrize("end", [leave_block, close, close_later, cancel])
def test_whoever_waits_can_end_a_text(model, gate, closed, end):
    """The pass that is being computed is the last one."""
    gate.allow(3)

    async def run():
        stream = model.astream("hi", **FOREVER)
        await end(stream)
        gate.allow()
        assert await asyncio.to_thread(closed.wait, 30)
        assert [chunk async for chunk in stream] == []
        return stream.generation()

    generation = asyncio.run(run())
    assert generation.finish_reason == "interrupted"
    assert 1 <= len(generation.token_ids) <= 3
    assert gate.passes <= 4
    expected = model.generate("hi", **FOREVER).token_ids
    assert generation.token_ids == expected[: len(generation.token_ids)]


def test_a_stream_that_nobody_keeps_ends(model, gate, closed):
    gate.allow(1)

    async def run():
        async for _ in model.astream("hi", **FOREVER):
            break
        gc.collect()
        gate.allow()
        assert await asyncio.to_thread(closed.wait, 30)

    asyncio.run(run())
    assert gate.passes <= 2


def test_a_client_that_disconnects_ends_its_text(model, gate, closed):
    responses = pytest.importorskip("starlette.responses")
    from asgi import ask_async

    async def app(scope, receive, send):
        chunks = model.astream("hi", **FOREVER)
        await responses.StreamingResponse(chunk.text async for chunk in chunks)(
            scope, receive, send
        )

    async def run():
        disconnect = asyncio.Event()
        asking = asyncio.ensure_future(ask_async(app, "GET", "/", disconnect=disconnect))
        assert await asyncio.to_thread(gate.reached.wait, 30)
        disconnect.set()
        await asking
        gate.allow()
        assert await asyncio.to_thread(closed.wait, 30)

    asyncio.run(run())
    assert gate.passes == 1


def test_a_timeout_ends_a_text_and_not_the_others(model, gate):
    options = {"max_tokens": 30, "method": "ar"}

    async def run():
        other = asyncio.ensure_future(model.agenerate("other", **options))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(model.agenerate("hi", **FOREVER), 0.01)
        gate.allow()
        return await other

    found = asyncio.run(run())
    assert found.token_ids == model.generate("other", **options).token_ids


def test_a_text_ends_with_its_event_loop(model, gate, closed):
    kept = []
    gate.allow(1)

    async def run():
        stream = model.astream("hi", **FOREVER)
        kept.append(stream)
        await anext(stream)

    asyncio.run(run())
    gate.allow()
    assert closed.wait(30)
    assert gate.passes <= 2


def test_a_model_whose_texts_are_complete_is_freed(tiny_pair):
    model = load(*tiny_pair, backend="reference")
    asyncio.run(model.agenerate("hi", max_tokens=3))
    backend = weakref.ref(model.backend)
    del model
    join_thread()
    gc.collect()
    assert backend() is None


@pytest.mark.parametrize(
    ("prompt", "options", "error", "message"),
    [
        ("hi", {"budget": 0}, ConfigError, "budget must be"),
        ("hi", {"tempature": 1}, ConfigError, "unknown option 'tempature'"),
        ("hi", {"stop": [""]}, ConfigError, "stop string is empty"),
        ("", {}, PromptError, "empty"),
        ("a" * 500, {}, PromptError, "limit"),
    ],
)
def test_bad_input_is_raised(scripted, prompt, options, error, message):
    model = scripted(TEXT)
    with pytest.raises(error, match=message):
        asyncio.run(model.agenerate(prompt, **options))
    assert not model.backend.opened


def test_bad_options_are_refused_at_once(scripted):
    with pytest.raises(ConfigError, match="budget must be"):
        scripted(TEXT).astream("hi", budget=0)


def test_a_stream_without_a_chunk_has_no_generation(scripted):
    with pytest.raises(RuntimeError, match="no chunk yet"):
        scripted(TEXT).astream("hi").generation()


def test_an_error_of_one_text_leaves_the_others(scripted):
    model = scripted("one", "two", "a third text", fails=1)

    async def gather():
        texts = (model.agenerate(prompt) for prompt in "xyz")
        return await asyncio.gather(*texts, return_exceptions=True)

    found = asyncio.run(gather())
    (error,) = (x for x in found if isinstance(x, Exception))
    assert str(error) == "not finite"
    assert {x.text for x in found if x is not error} == {"one", "a third text"}


def test_an_iteration_that_fails_is_raised_by_all_texts(scripted):
    model = scripted(TEXT)

    async def gather():
        texts = (model.agenerate(prompt) for prompt in "xyz")
        return await asyncio.gather(*texts, return_exceptions=True)

    with failing(Scheduler, "step", ZeroDivisionError):
        assert all(isinstance(x, ZeroDivisionError) for x in asyncio.run(gather()))
    assert [x.text for x in asyncio.run(gather())] == [TEXT] * 3
