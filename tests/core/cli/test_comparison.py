"""How far a token was from being chosen, against the spacing of the model's type."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from treeflash.cli.single_prompt import compare, decision_margin, spacing, summarise
from treeflash.config import SamplingConfig
from treeflash.decoding.sampling import position_keys, sample_tokens
from treeflash.language_model import load

LOGITS = np.array([1.0, 3.0, 2.75, -1.0], np.float32)


@pytest.mark.parametrize(
    ("value", "dtype", "expected"),
    [
        (1.0, "bfloat16", 2**-7),
        (1.99, "bfloat16", 2**-7),
        (20.5, "bfloat16", 0.125),
        (20.5, "float16", 2**-6),
        (20.5, "float32", float(np.spacing(np.float32(20.5)))),
        (0.3, "float16", float(np.spacing(np.float16(0.3)))),
    ],
)
def test_spacing_is_the_distance_to_the_next_number_of_the_type(value, dtype, expected):
    assert spacing(value, dtype) == expected


def test_the_greedy_margin_is_that_of_the_best_two_logits():
    assert decision_margin(LOGITS, (2, 1), SamplingConfig(), 0) == 0.25


def test_the_greedy_margin_counts_the_tokens_that_differ_not_the_best_two():
    assert decision_margin(LOGITS, (1, 3), SamplingConfig(), 0) == 4.0


@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_moving_a_logit_by_a_sampled_margin_is_just_enough(position, temperature):
    sampling = SamplingConfig(temperature=temperature)
    keys = position_keys(sampling.seed, np.array([position], np.int32))
    ours = int(sample_tokens(LOGITS[None], sampling, keys)[0])
    for theirs in {0, 1, 2, 3} - {ours}:
        margin = decision_margin(LOGITS, (ours, theirs), sampling, position)
        for factor in (0.99, 1.01):
            moved = LOGITS.copy()
            moved[theirs] += factor * margin
            chosen = int(sample_tokens(moved[None], sampling, keys)[0])
            assert chosen == (theirs if factor > 1 else ours)


def test_a_token_that_a_filter_dropped_is_as_far_as_from_those_kept():
    sampling = SamplingConfig(temperature=1.0, top_k=1)
    assert decision_margin(LOGITS, (1, 2), sampling, 0) == 0.25


def test_a_text_that_is_a_part_of_the_plain_one_is_not_equal(scripted):
    stream = scripted("Some text.").stream("hi", budget=5)
    generation = stream.run()
    assert compare(generation, stream).equal
    shorter = replace(generation, token_ids=generation.token_ids[:-1])
    comparison = compare(shorter, stream)
    assert (comparison.equal, comparison.explained) == (False, False)
    assert comparison.first_difference == len(shorter.token_ids)
    line = (
        f"plain decoding: NOT EQUAL: the texts differ from new token {len(shorter.token_ids)} on,"
    )
    assert line in summarise(replace(shorter, compare=comparison))


def test_logits_of_a_stream_are_those_that_chose_the_plain_tokens(tiny_pair):
    model = load(*tiny_pair, backend="reference")
    for options in ({}, {"temperature": 1.0, "seed": 5}):
        stream = model.stream("hi", method="ar", max_tokens=6, **options)
        tokens = stream.run().token_ids
        assert len(tokens) > 1
        sampling = stream.assembler.config.sampling
        for n, token in enumerate(tokens):
            position = len(stream.assembler.prompt_ids) + n
            keys = position_keys(sampling.seed, np.array([position], np.int32))
            logits = stream.next_logits(tokens[:n])
            assert sample_tokens(logits[None], sampling, keys) == [token]
            assert decision_margin(logits, (token,), sampling, position) == 0
    stream = model.stream([5], method="ar", max_tokens=1)
    assert stream.run().token_ids == [stream.next_logits([]).argmax()]
