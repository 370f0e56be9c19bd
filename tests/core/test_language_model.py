"""The Python API: loading, prompts in three forms, streams, stops, interruptions."""

import copy
import gc
import json
import pickle
import shutil
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from failures import failing
from recordings import recording

import treeflash
from treeflash.config import METHODS, LoadConfig
from treeflash.decoding import Request, SchedulerConfig, Step
from treeflash.decoding.adaptive_budget import AdaptiveBudgets
from treeflash.decoding.verify_costs import VerifyCosts
from treeflash.errors import BackendError, ConfigError, UnsupportedModelError
from treeflash.language_model import LanguageModel, load, locate
from treeflash.reference.backend import ReferenceBackend
from treeflash.text.stream import Chunk, Stream

TEXT = "The quick brown fox, ünd 👋🏽 so on; the end of it."
NAMES = ["text", "token_ids", "prompt_tokens", "accepted_lengths", "block_efficiency"]
NAMES += ["tokens_per_s", "prefill_s", "decode_s", "method", "budget", "backend", "device"]
NAMES += ["dtype", "inexact", "seed", "finish_reason", "paused_iterations"]


def prompt_text(model: LanguageModel, prompt, **options) -> str:
    """The prompt that a model was given, as text."""
    model.generate(prompt, **options)
    ids = model.backend.prompts[-1]
    return "".join(map(model.tokenizer.token_text, ids))


def collect(stream: Iterator[Chunk], chunks: list[Chunk]) -> None:
    """Keep each chunk as it arrives, until an exception."""
    for chunk in stream:
        chunks.append(chunk)


def test_thinking_is_by_default_as_the_drafter_was_trained(tiny_pair, tmp_path):
    target, drafter = tiny_pair
    trained = tmp_path / "models--z-lab--Qwen3.5-4B-DFlash/snapshots/0a1b"
    shutil.copytree(drafter, trained)
    found = [locate(target, x, backend="reference").thinking for x in (trained, drafter, False)]
    assert found == [True, False, False]
    assert load(target, trained, backend="reference").tokenizer.thinking


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [1, 2, 5, 64])
def test_streaming_equals_generate_for_every_method(scripted, method, budget):
    stream = scripted(TEXT).stream("hi", method=method, budget=budget)
    chunks = list(stream)
    generation = scripted(TEXT).generate("hi", method=method, budget=budget)
    assert generation.text == TEXT
    assert "".join(chunk.text for chunk in chunks) == TEXT
    assert [token for chunk in chunks for token in chunk.token_ids] == generation.token_ids
    assert stream.generation().token_ids == generation.token_ids
    assert 1 + sum(generation.accepted_lengths) == len(generation.token_ids)
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert stream.finish_reason == "stop"
    if method != "suffix":  # the text does not repeat
        assert (generation.block_efficiency > 1) == (method != "ar" and budget > 1)


def test_a_stream_keeps_trees_but_no_tables(scripted):
    stream = scripted(TEXT).stream("hi", budget=5)
    stream.run()
    assert all(len(step.tree) > 1 for step in stream.steps[1:-1])
    assert all(step.table is None for step in stream.steps)


def test_a_finished_stream_keeps_no_keys_and_values(tiny_pair):
    model = load(*tiny_pair, backend="reference")
    made = []
    opened = model.backend.open

    def noted(capacity, **settings):
        state = opened(capacity, **settings)
        made.append(weakref.ref(state))
        return state

    model.backend.open = noted
    stream = model.stream("hi", budget=5, max_tokens=6)
    next(stream)
    assert made[0]() is not None
    stream.run()
    gc.collect()
    assert made[0]() is None


@pytest.mark.parametrize("close", [Stream.close, lambda stream: stream.__exit__(None, None, None)])
def test_a_closed_stream_ends_and_frees_its_sequence(scripted, closed, close):
    stream = scripted(TEXT).stream("hi")
    text = next(stream).text + next(stream).text
    assert not closed
    close(stream)
    assert len(closed) == 1
    assert list(stream) == []
    assert (stream.generation().text, stream.generation().finish_reason) == (text, "interrupted")


def test_the_end_of_a_with_block_ends_a_stream(scripted):
    with scripted(TEXT).stream("hi") as stream:
        for _ in stream:
            break
    assert next(stream, None) is None
    with scripted(TEXT).stream("hi") as stream:
        assert stream.run().text == TEXT


def test_a_stream_can_be_closed_before_its_first_chunk(scripted):
    model = scripted(TEXT)
    model.stream("hi").close()
    assert not model.backend.opened


@pytest.mark.parametrize("stop", ["brown", "👋", ["zzz", "fox", "brown"], ["the end", "d of"]])
def test_a_stop_string_ends_text_tokens_and_lengths(scripted, stop):
    strings = [stop] if isinstance(stop, str) else stop
    expected = TEXT[: min(TEXT.find(string) for string in strings if string in TEXT)]
    for method in METHODS:
        model = scripted(TEXT)
        generation = model.generate("hi", method=method, stop=stop)
        assert generation.text == expected
        assert generation.finish_reason == "stop"
        text = model.tokenizer.decode(generation.token_ids)
        assert any(text.endswith(string) for string in strings)
        assert 1 + sum(generation.accepted_lengths) == len(generation.token_ids)


def test_a_stop_string_in_the_first_token(scripted):
    generation = scripted(TEXT).generate("hi", stop="T")
    assert (generation.text, len(generation.token_ids)) == ("", 1)
    assert generation.accepted_lengths == []
    assert generation.block_efficiency == generation.tokens_per_s == 0


@pytest.mark.parametrize("end", [1, 2])
def test_every_end_token_of_the_target_ends_a_text(scripted, end):
    model = scripted(TEXT)
    model.backend.scripts[0][9] = end
    generation = model.generate("hi")
    assert generation.text == TEXT[:9]
    assert generation.token_ids[-1] == end
    assert generation.finish_reason == "stop"


def test_other_end_tokens_may_be_given(scripted):
    model = scripted(TEXT)
    (comma,) = model.tokenizer.encode(",")
    assert model.generate("hi", stop_token_ids=[comma]).text == "The quick brown fox,"
    generation = model.generate("hi", stop_token_ids=(), max_tokens=70)
    assert generation.token_ids[-5:] == [1] * 5
    assert generation.finish_reason == "length"


def test_a_limit_inside_a_character_shows_it_as_broken(scripted):
    generation = scripted("ab👋").generate("hi", max_tokens=4)
    assert generation.text == "ab\ufffd"


def test_to_dict_has_exactly_the_published_names_and_plain_values(scripted):
    generation = scripted(TEXT).generate("hi", budget=5, seed=3)
    values = generation.to_dict()
    assert list(values) == NAMES
    assert {type(token) for token in values["token_ids"]} == {int}
    assert {type(length) for length in values["accepted_lengths"]} == {int}
    assert (values["method"], values["budget"], values["seed"]) == ("treeflash", 5, 3)
    assert (values["backend"], values["device"], values["dtype"]) == ("scripted", "cpu", "float32")
    assert generation.prompt_tokens > 2
    assert list(generation.seconds) == ["prefill", "draft", "tree", "verify", "commit"]
    assert sum(n * count for n, count in generation.histogram.items()) == sum(
        generation.accepted_lengths
    )


def test_numbers_of_numpy_are_plain_in_the_result(scripted):
    generation = scripted(TEXT).generate(
        "hi", budget=np.int64(5), seed=np.uint64(3), temperature=np.float32(0.5)
    )
    values = json.loads(json.dumps(generation.to_dict()))
    assert (values["budget"], values["seed"]) == (5, 3)
    assert type(generation.seed) is int


def test_costs_are_measured_once_for_all_methods_and_threads(scripted):
    measured = []
    together = threading.Barrier(2)

    def measure(backend):
        measured.append(backend)
        with suppress(threading.BrokenBarrierError):
            together.wait(1)  # a second measurement that is let in meets the first
        return VerifyCosts({1: 1.0, 2: 1.0})

    model = replace(scripted(TEXT), adaptive_budgets=AdaptiveBudgets(measure=measure))
    threads = [
        threading.Thread(target=model.stream, args=("hi",), kwargs={"method": method})
        for method in ("treeflash", "treeflash", "ddtree")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(measured) == 1
    assert set(model.adaptive_budgets.by_method) == {"treeflash", "ddtree"}
    treeflash_, ddtree = (
        model.adaptive_budgets.by_method[name] for name in ("treeflash", "ddtree")
    )
    assert treeflash_.costs is ddtree.costs


def test_kept_costs_serve_methods_that_are_not_the_default(tiny_pair, tmp_path, monkeypatch):
    """No costs are needed before a request asks for such a method."""
    monkeypatch.setenv("TREEFLASH_CACHE", str(tmp_path))
    costs = []
    with recording(VerifyCosts, "measure") as measured:
        for _ in range(2):  # processes
            model = load(tiny_pair[0], False, backend="reference")
            scheduler = model.scheduler(SchedulerConfig(), None)
            config = model.decode_config({"method": "suffix", "max_tokens": 2})
            scheduler.submit(Request(prompt_ids=[5, 6], config=config))
            assert model.adaptive_budgets.costs is None
            assert all(isinstance(event, Step) for _, event in scheduler.run())
            costs.append(model.adaptive_budgets.costs.seconds)
    assert len(measured) == 1
    assert costs[0] == costs[1]


def test_the_default_method_is_the_best_that_was_loaded(scripted):
    assert scripted(TEXT).generate("hi").method == "treeflash"
    assert scripted(TEXT, head=False).generate("hi").method == "ddtree"
    assert scripted(TEXT, drafter=False).generate("hi").method == "ar"
    with pytest.raises(ConfigError, match="--drafter"):
        scripted(TEXT, drafter=False).generate("hi", method="dflash")


def test_forms_of_a_prompt(scripted):
    model = scripted(TEXT)
    chat = "<|start|>user: hi<|end|><|start|>assistant: "
    assert prompt_text(model, "hi") == chat
    assert prompt_text(model, [{"role": "user", "content": "hi"}]) == chat
    assert prompt_text(model, "hi", raw=True) == "hi"
    assert prompt_text(model, model.tokenizer.encode("hi")) == "hi"
    assert prompt_text(model, "hi", system="Be.") == f"<|start|>system: Be.<|end|>{chat}"
    assert prompt_text(model, "hi", template_args={"enable_thinking": True}) == chat + "<think>"


@pytest.mark.parametrize("interrupt_at", [1, 2, 5])
def test_an_interruption_loses_nothing(scripted, interrupt_at):
    whole = list(scripted(TEXT).stream("hi"))
    stream = scripted(TEXT, interrupt_at=interrupt_at).stream("hi")
    chunks = []
    with pytest.raises(KeyboardInterrupt):
        collect(stream, chunks)
    generation = stream.generation()
    assert len(chunks) == interrupt_at
    assert generation.finish_reason == "interrupted"
    assert generation.token_ids == [t for c in whole[:interrupt_at] for t in c.token_ids]
    assert 1 + sum(generation.accepted_lengths) == len(generation.token_ids)
    assert TEXT.startswith(generation.text)


def test_an_interrupted_text_includes_what_was_held_back_for_a_stop_string(scripted):
    stream = scripted("abcdefgh", interrupt_at=3).stream("hi", method="ar", stop="bcdx")
    shown = []
    with pytest.raises(KeyboardInterrupt):
        collect(stream, shown)
    assert "".join(chunk.text for chunk in shown) == "a"
    assert stream.generation().text == "abc"


def test_load_without_a_drafter_decodes_plainly(tiny_pair):
    model = load(tiny_pair[0], False, backend="reference")
    assert model.backend.drafter_config is None
    assert model.generate("hi", max_tokens=3).method == "ar"


def test_without_a_published_drafter_the_text_is_copied(tiny_pair, caplog):
    model = load(tiny_pair[0], backend="reference")
    assert caplog.messages == [
        f"no published drafter is known for {tiny_pair[0].name}; the default method is suffix, "
        "which copies what the text repeats"
    ]
    generation = model.generate("hi", max_tokens=30)
    assert generation.method == "suffix"
    assert generation.token_ids == model.generate("hi", max_tokens=30, method="ar").token_ids


def test_a_target_that_runs_no_trees_is_decoded_plainly(tiny_pair, caplog):
    unlike = UnsupportedModelError("tree attention changes this model's logits")
    with failing(ReferenceBackend, "check_trees", unlike):
        model = load(tiny_pair[0], backend="reference")
        (message,) = caplog.messages
        assert message.endswith(f"is ar, without drafts: {unlike}")
        assert model.generate("hi", max_tokens=3).method == "ar"
        with pytest.raises(UnsupportedModelError):
            model.generate("hi", max_tokens=3, method="suffix")


def test_only_an_automatic_choice_falls_back_to_the_cpu(tiny_pair):
    devices = []

    def loader(target, drafter, config):
        devices.append(config.device)
        if config.device != "cpu":
            raise BackendError("no accelerator; pass --device cpu")
        return object()

    replace(locate(*tiny_pair), loader=loader).load()
    assert devices == [None, "cpu"]
    named = locate(*tiny_pair, backend="reference")
    assert named.named
    assert locate(*tiny_pair, device="cpu").named
    with pytest.raises(BackendError, match="no accelerator"):
        replace(named, loader=loader).load()


def test_exact_mode_is_an_error_where_a_backend_lacks_it(tiny_pair, scripted):
    pair, exact = scripted(TEXT).backend, LoadConfig(exact=True)
    located = replace(locate(*tiny_pair), loader=lambda *_: pair, config=exact)
    with pytest.raises(ConfigError, match="scripted backend has no exact mode; rounding may diff"):
        located.load()


def test_states_of_a_model_without_a_folder_are_not_stored(scripted, tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be stored on a disk.*remove prefix_cache_dir"):
        scripted(TEXT).disk_cache(tmp_path, 1)


def test_the_form_of_a_text_needs_llguidance(scripted, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigError, match="needs llguidance; pip install llguidance"):
        scripted(TEXT).generate("hi", regex="a+")


def test_a_model_says_what_it_is_in_one_line(tiny_pair, scripted):
    target, drafter = tiny_pair
    assert repr(load(target, drafter, backend="reference")) == (
        "LanguageModel(target='target', drafter='drafter', backend='reference', device='cpu', "
        "dtype='float32')"
    )
    assert repr(scripted(TEXT)).startswith("LanguageModel(target=None, drafter=None, ")


@pytest.mark.parametrize("take", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_model_says_why_it_cannot_be_pickled(scripted, take):
    with pytest.raises(
        TypeError, match=r"cannot be pickled or copied; call treeflash\.load in each"
    ):
        take(scripted(TEXT))


def test_public_names():
    for name in treeflash.__all__:
        assert getattr(treeflash, name)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = treeflash.nonsense
    assert dir(treeflash) == sorted(treeflash.__all__)
