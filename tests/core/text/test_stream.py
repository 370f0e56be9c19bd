"""The Python API for streams: of one text, of many at once, and of event loops.

Penalties and log probabilities are options of each.
"""

import asyncio
import gc
import json
import threading
import weakref
from contextlib import aclosing

import numpy as np
import pytest
from failures import failing
from recordings import recording

from treeflash.config import AUTO_BYTES, DecodeConfig
from treeflash.decoding import Scheduler
from treeflash.decoding.interfaces import Prefill
from treeflash.decoding.iteration import RunningSequence
from treeflash.decoding.suffix import SuffixCache
from treeflash.errors import ConfigError, NumericalError
from treeflash.language_model import load
from treeflash.text.stream import Assembler

PROMPTS = ["one", "two and three", [{"role": "user", "content": "four"}], [5, 6, 7]]


@pytest.fixture
def model(tiny_pair):
    """A model whose texts never end by themselves."""
    return load(*tiny_pair, backend="reference")


def test_many_texts_are_those_of_one_at_a_time(model):
    options = {"max_tokens": 20, "temperature": 1.0, "seed": 3, "budget": 6}
    stop = model.generate("one", **options).text[7:9]
    options["stop"] = [stop, stop[0]]
    alone = [model.generate(prompt, **options) for prompt in PROMPTS]
    assert len({len(generation.token_ids) for generation in alone}) > 1
    for parallel in (1, 3, "auto"):
        found = dict(model.generate_many(PROMPTS, parallel=parallel, **options))
        assert [found[i].text for i in range(4)] == [generation.text for generation in alone]
        for i, generation in enumerate(alone):
            assert found[i].token_ids == generation.token_ids
            assert found[i].accepted_lengths == generation.accepted_lengths
            assert found[i].finish_reason == generation.finish_reason


def test_many_texts_come_in_the_order_in_which_they_end(scripted):
    model = scripted("a long text that ends last", "short", "of middle length")
    found = list(model.generate_many(["x", "y", "z"], method="ar"))
    assert [i for i, _ in found] == [1, 2, 0]
    assert [text.text for _, text in found] == [
        "short",
        "of middle length",
        "a long text that ends last",
    ]


def test_a_text_that_a_stop_string_ends_can_be_copied(scripted):
    model, copied = scripted("a long text that stops here, and goes on"), SuffixCache(1 << 20)
    config = DecodeConfig(method="ar", max_tokens=60)
    prompt_ids = tuple(model.tokenizer.encode("x"))
    stream = model.batch_stream(1, config, copied)
    stream.submit([Assembler(model.backend, model.tokenizer, prompt_ids, config, stop=("here",))])
    while stream.busy:
        stream.step()
    assert copied.nbytes


def test_a_text_that_a_stop_string_ends_makes_room(scripted):
    model = scripted("stop here and no further", "other")
    found = dict(model.generate_many(["x", "y"], parallel=1, method="ar", stop="here"))
    assert [found[0].text, found[1].text] == ["stop ", "other"]
    assert found[0].finish_reason == "stop"
    assert model.backend.verified < len("stop here and") + len("other") + 2


def test_answers_to_one_prompt_have_consecutive_seeds_and_share_the_prefill(model):
    options = {"max_tokens": 12, "temperature": 1.0, "budget": 4}
    alone = {seed: model.generate("hi", seed=seed, **options) for seed in (5, 6, 7)}
    with recording(model.backend.verifier, "run") as passes:
        found = list(model.generate_many(["hi"], n=3, seed=5, **options))
    assert [i for i, _ in found] == [0, 0, 0]
    assert {text.seed: text.token_ids for _, text in found} == {
        seed: text.token_ids for seed, text in alone.items()
    }
    assert len({tuple(text.token_ids) for _, text in found}) == 3
    extended = [len(x.token_ids) for (work,) in passes for x in work if isinstance(x, Prefill)]
    assert sorted(extended) == [1, 1, alone[5].prompt_tokens]


def test_the_first_error_of_many_texts_comes_after_the_others(scripted):
    model = scripted("one", "two", "a third text", "two", fails=1)
    model.backend.scripts[3] = model.backend.failing
    texts = model.generate_many(["x", "y", "z", "more"])
    assert {next(texts)[1].text, next(texts)[1].text} == {"one", "a third text"}
    with pytest.raises(NumericalError, match="not finite") as raised:
        next(texts)
    assert raised.value.__notes__ == ["while decoding prompt 1"]


def test_many_texts_that_are_given_up_leave_no_state(model, closed):
    texts = model.generate_many(
        ["one", "two", "three"], stop_token_ids=(), max_tokens=9, method="ar"
    )
    next(texts)
    texts.close()
    assert len(closed) == 3


def test_auto_bounds_the_memory_of_many_texts(scripted):
    model = scripted(*["some text"] * 6)
    each = AUTO_BYTES // 2 - 1
    for nbytes, most in ((each, 2), (3 * AUTO_BYTES, 1), (0, 6)):
        model.backend.state_nbytes = lambda *a, n=nbytes, **k: n
        with recording(model.backend, "run") as passes:
            assert len(list(model.generate_many(["x"] * 6))) == 6
        assert max(len(work) for (work,) in passes) == most


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty", "repetition_penalty"])
def test_penalties_are_options(model, name):
    options = {"max_tokens": 24, "stop_token_ids": (), "budget": 6}
    assert len(set(model.generate("hi", **options).token_ids)) < 24
    assert len(set(model.generate("hi", **options, **{name: 1e6}).token_ids)) == 24


@pytest.mark.parametrize("bias", [-1e9, float("-inf")])
def test_biases_are_options(model, bias):
    options = {"max_tokens": 24, "stop_token_ids": (), "budget": 6}
    first, *_ = model.generate("hi", **options).token_ids
    biases = {first: bias, 9: 1}
    assert first not in model.generate("hi", **options, logit_bias=biases).token_ids


def test_log_probs_are_plain_and_those_of_the_target(model):
    options = {"max_tokens": 12, "temperature": 1.0, "seed": 1, "stop_token_ids": ()}
    stream = model.stream("hi", budget=6, log_probs=2, **options)
    text = stream.run()
    assert model.generate("hi", **options).log_probs is None
    assert [token.token_id for token in text.log_probs] == text.token_ids
    for i, token in enumerate(text.log_probs):
        logits = stream.next_logits(text.token_ids[:i]).astype(np.float64)
        expected = logits - np.logaddexp.reduce(logits)
        assert token.log_prob == pytest.approx(expected[token.token_id], abs=1e-4)
        best = np.argsort(-expected)[:2]
        assert [token_id for token_id, _ in token.top] == best.tolist()
        assert [value for _, value in token.top] == pytest.approx(expected[best], abs=1e-4)
    values = json.loads(json.dumps(text.to_dict()))["log_probs"]
    assert values[0]["top"][0] == list(text.log_probs[0].top[0])
    assert model.generate("hi", log_probs=0, **options).log_probs[0].top == []


def test_log_probs_end_with_the_tokens_of_a_text_that_a_stop_string_cut(model):
    options = {"max_tokens": 40, "budget": 8, "log_probs": 0, "temperature": 1.0}
    whole = model.generate("hi", **options)
    text = model.generate("hi", stop=whole.text[4:6], **options)
    assert len(text.token_ids) < len(whole.token_ids)
    assert [token.token_id for token in text.log_probs] == text.token_ids


TEXT = "The quick brown fox, ünd 👋🏽 so on; the end of it."

FOREVER = {"max_tokens": 380, "stop_token_ids": (), "method": "ar"}


@pytest.fixture(autouse=True)
def join_threads():
    """Waits until no sequence is decoded any more for an event loop of the test."""
    others = threading.enumerate()  # such as the threads of a server that later tests use

    def join() -> None:
        for thread in threading.enumerate():
            if thread.name == "treeflash-scheduler" and thread not in others:
                thread.join(30)
                assert not thread.is_alive()

    yield join
    join()


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
def closing(monkeypatch):
    """Is set when the state of a sequence is closed."""
    event = threading.Event()
    close = RunningSequence.close
    monkeypatch.setattr(RunningSequence, "close", lambda self: (close(self), event.set()))
    return event


def test_an_asynchronous_stream_has_the_chunks_of_a_stream(scripted):
    expected = list(scripted(TEXT).stream("hi", budget=5))

    async def collect():
        stream = scripted(TEXT).astream("hi", budget=5)
        return [chunk async for chunk in stream], stream.generation()

    chunks, generation = asyncio.run(collect())
    assert [chunk.text for chunk in chunks] == [chunk.text for chunk in expected]
    assert [chunk.token_ids for chunk in chunks] == [chunk.token_ids for chunk in expected]
    assert chunks[-1].finish_reason == generation.finish_reason == "stop"
    assert generation.text == TEXT


def test_texts_of_one_event_loop_are_decoded_together_and_equal_to_those_alone(model):
    options = {"max_tokens": 20, "budget": 6, "temperature": 1.0, "seed": 3}
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


def test_a_stop_string_ends_text_and_sequence(model, closing):
    whole = model.generate("hi", max_tokens=40)
    closing.clear()
    options = {"stop": whole.text[5:8]}
    text = asyncio.run(model.agenerate("hi", max_tokens=380, **options))
    assert text.token_ids == model.generate("hi", max_tokens=380, **options).token_ids
    assert text.finish_reason == "stop"
    assert closing.is_set()


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
def test_whoever_waits_can_end_a_text(model, gate, closing, end):
    """The pass that is being computed is the last one."""
    gate.allow(3)

    async def run():
        stream = model.astream("hi", **FOREVER)
        await end(stream)
        gate.allow()
        assert await asyncio.to_thread(closing.wait, 30)
        assert [chunk async for chunk in stream] == []
        return stream.generation()

    generation = asyncio.run(run())
    assert generation.finish_reason == "interrupted"
    assert 1 <= len(generation.token_ids) <= 3
    assert gate.passes <= 4
    expected = model.generate("hi", **FOREVER).token_ids
    assert generation.token_ids == expected[: len(generation.token_ids)]


async def collect(stream):
    return [chunk async for chunk in stream]


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("passes", [0, 2])
def test_all_tasks_that_read_a_stream_end_with_it(model, gate, passes, prepared):
    """Also before its prompt is read, before its first chunk, and where no chunk follows."""

    async def run():
        stream = model.astream("hi", **FOREVER)
        if passes:
            gate.allow(passes)
            await anext(stream)
        readers = [asyncio.ensure_future(collect(stream)) for _ in range(2)]
        await asyncio.sleep(0)
        while prepared and stream._mailbox is None:
            await asyncio.sleep(0.002)
        await stream.aclose()
        found = await asyncio.wait_for(asyncio.gather(*readers), 30)
        gate.allow()
        return found

    assert sum(len(chunks) for chunks in asyncio.run(run())) <= passes


def test_a_stream_that_nobody_keeps_ends(model, gate, closing):
    gate.allow(1)

    async def run():
        async for _ in model.astream("hi", **FOREVER):
            break
        gc.collect()
        gate.allow()
        assert await asyncio.to_thread(closing.wait, 30)

    asyncio.run(run())
    assert gate.passes <= 2


def test_a_timeout_ends_a_text_and_not_the_others(model, gate):
    options = {"max_tokens": 30, "method": "ar"}

    async def run():
        stream = model.astream("hi", **FOREVER)
        gate.allow(3)
        await anext(stream)  # before another text takes its passes
        other = asyncio.ensure_future(model.agenerate("other", **options))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(stream.run(), 0.01)
        assert [chunk async for chunk in stream] == []
        gate.allow()
        return await asyncio.wait_for(other, 30)

    found = asyncio.run(run())
    assert found.token_ids == model.generate("other", **options).token_ids


def test_a_closed_text_ends_alone(model, gate):
    async def run():
        kept, closed = (model.astream(prompt, **FOREVER) for prompt in ("hi", "other"))
        gate.allow(1)
        await anext(kept)
        begun = asyncio.ensure_future(anext(closed))
        while not begun.done():  # each pass decodes the first text further
            gate.allow(1)
            await asyncio.sleep(0.002)
        await closed.aclose()
        gate.allow()
        return await asyncio.wait_for(kept.run(), 30), closed.generation()

    kept, closed = asyncio.run(run())
    assert kept.finish_reason == "length"
    assert kept.token_ids == model.generate("hi", **FOREVER).token_ids
    assert closed.finish_reason == "interrupted"


def test_a_text_ends_with_its_event_loop(model, gate, closing):
    kept = []
    gate.allow(1)

    async def run():
        stream = model.astream("hi", **FOREVER)
        kept.append(stream)
        await anext(stream)

    asyncio.run(run())
    gate.allow()
    assert closing.wait(30)
    assert gate.passes <= 2


def test_a_model_whose_texts_are_complete_is_freed(tiny_pair, join_threads):
    model = load(*tiny_pair, backend="reference")
    asyncio.run(model.agenerate("hi", max_tokens=3))
    backend = weakref.ref(model.backend)
    del model
    join_threads()
    gc.collect()
    assert backend() is None


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
