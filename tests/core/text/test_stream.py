"""The Python API for many texts at once, and the options of penalties and log probabilities."""

from __future__ import annotations

import json

import numpy as np
import pytest
from recordings import recording

from treeflash.config import AUTO_BYTES, METHODS
from treeflash.decoding import Scheduler
from treeflash.decoding.interfaces import Prefill
from treeflash.errors import ConfigError, NumericalError, PromptError
from treeflash.language_model import load

TEXT = "The quick brown fox."


def test_many_texts_are_those_of_one_at_a_time(tiny_pair):
    model = load(*tiny_pair, backend="reference")
    prompts = ["one", "two and three", [{"role": "user", "content": "four"}], [5, 6, 7]]
    options = {"max_tokens": 20, "temperature": 1.0, "seed": 3, "budget": 6}
    stop = model.generate("one", **options).text[7:9]
    options["stop"] = [stop, stop[0]]
    alone = [model.generate(prompt, **options) for prompt in prompts]
    assert len({len(generation.token_ids) for generation in alone}) > 1
    for parallel in (1, 2, 4, "auto"):
        found = dict(model.generate_many(prompts, parallel=parallel, **options))
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


def test_a_text_that_a_stop_string_ends_makes_room(scripted, monkeypatch):
    model = scripted("stop here and no further", "other")
    closed = []
    cancel = Scheduler.cancel
    monkeypatch.setattr(
        Scheduler, "cancel", lambda self, x: closed.append(self.running) or cancel(self, x)
    )
    found = dict(model.generate_many(["x", "y"], parallel=1, method="ar", stop="here"))
    assert [found[0].text, found[1].text] == ["stop ", "other"]
    assert found[0].finish_reason == "stop"
    assert closed[0] == 1, "it still ran when the stop string ended it"
    assert model.backend.verified < len("stop here and") + len("other") + 2


def test_answers_to_one_prompt_have_consecutive_seeds_and_share_the_prefill(tiny_pair):
    model = load(*tiny_pair, backend="reference")
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


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("hi", {}, "prompts must be a list"),
        (["hi", ""], {}, "prompt 1: the prompt is empty"),
        (["hi", "x" * 500], {}, "prompt 1: the prompt has"),
        (["hi"], {"n": 0}, "n must be 1 or more, got 0"),
        (["hi"], {"parallel": 0}, "parallel must be auto, or 1 or more, got 0"),
        (["hi"], {"parallel": 1.5}, "parallel must be auto, or 1 or more, got 1.5"),
        (["hi"], {"budget": 0}, "budget must be"),
        (["hi"], {"colour": 1}, "unknown option 'colour'"),
    ],
)
def test_bad_input_for_many_texts_is_refused_at_once(scripted, prompts, options, message):
    model = scripted(TEXT)
    with pytest.raises((PromptError, ConfigError), match=message):
        model.generate_many(prompts, **options)
    assert not model.backend.opened


def test_many_texts_that_are_given_up_leave_no_state(tiny_pair, closed):
    model = load(*tiny_pair, backend="reference")
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


def test_penalties_and_biases_are_options(tiny_pair):
    model = load(*tiny_pair, backend="reference")
    plain = model.generate("hi", max_tokens=24, stop_token_ids=())
    first = plain.token_ids[0]
    assert len(set(plain.token_ids)) < 24
    for options in (
        {"logit_bias": {first: -1e9}},
        {"logit_bias": {first: float("-inf"), 9: 1}},
        {"presence_penalty": 1e6},
        {"frequency_penalty": 1e6},
        {"repetition_penalty": 1e6},
    ):
        for method in METHODS:
            text = model.generate(
                "hi", max_tokens=24, stop_token_ids=(), method=method, budget=6, **options
            )
            if "logit_bias" in options:
                assert first not in text.token_ids
            else:
                assert len(set(text.token_ids)) == 24


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repetition_penalty": 0}, "repetition penalty must be above 0"),
        ({"presence_penalty": "x"}, "presence penalty must be a finite number"),
        ({"frequency_penalty": float("inf")}, "frequency penalty must be a finite number"),
        ({"logit_bias": [(1, 2)]}, "logit_bias must be a mapping of token ids"),
        ({"logit_bias": {"1": 2}}, "logit_bias must be a mapping of token ids"),
        ({"logit_bias": {-1: 2}}, "logit_bias must give one number per token id"),
        ({"logit_bias": {1: "x"}}, "logit_bias must give one number per token id"),
        ({"logit_bias": {5: float("nan")}}, "one number per token id, neither inf nor NaN, got"),
        ({"logit_bias": {5: float("inf")}}, "one number per token id, neither inf nor NaN, got"),
        ({"logit_bias": {1000: 1}}, "logit_bias has the token id 1000"),
        ({"presence_penalty": 10**400}, "presence penalty must be a finite number"),
        ({"logit_bias": {5: -(10**400)}}, "one number per token id, neither inf nor NaN, got"),
        ({"top_p": 10**400}, "top_p must be above 0 and at most 1"),
        ({"log_probs": -1}, "log_probs must be 0 or more"),
        ({"max_tokens": 2.5}, r"max_tokens must be a whole number, 1 or more, got 2\.5"),
    ],
)
def test_bad_numbers_are_refused_before_decoding(scripted, options, message):
    model = scripted(TEXT)
    with pytest.raises(ConfigError, match=message):
        model.stream("hi", **options)
    assert not model.backend.opened


@pytest.mark.parametrize("method", METHODS)
def test_log_probs_are_plain_and_those_of_the_target(tiny_pair, method):
    model = load(*tiny_pair, backend="reference")
    options = {"max_tokens": 12, "temperature": 1.0, "seed": 1, "stop_token_ids": ()}
    stream = model.stream("hi", method=method, budget=6, log_probs=2, **options)
    text = stream.run()
    assert model.generate("hi", method=method, **options).log_probs is None
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


def test_log_probs_end_with_the_tokens_of_a_text_that_a_stop_string_cut(tiny_pair):
    model = load(*tiny_pair, backend="reference")
    options = {"max_tokens": 40, "budget": 8, "log_probs": 0, "temperature": 1.0}
    whole = model.generate("hi", **options)
    text = model.generate("hi", stop=whole.text[4:6], **options)
    assert len(text.token_ids) < len(whole.token_ids)
    assert [token.token_id for token in text.log_probs] == text.token_ids
