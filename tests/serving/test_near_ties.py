"""Only rounding may explain an answer that is not the Python API's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from treeflash.config import SamplingConfig
from treeflash.decoding.sampling import position_keys, vocabulary_noise

SAMPLED = SamplingConfig(temperature=1.0)


@pytest.fixture
def near_ties(module):
    return module("serving.near_ties")


@pytest.fixture
def job(module):
    return module("serving.servers").Job("Name a river.", max_tokens=12, temperature=1.0, seed=3)


def test_a_sampled_token_is_near_if_two_roundings_can_make_it_the_best(near_ties):
    row = np.zeros((1, 4), np.float32)
    positions = np.array([9], np.int32)
    noise = vocabulary_noise(position_keys(SAMPLED.seed, positions), 4)[0]
    best, second, *_ = np.argsort(-noise)
    row[0, second] = noise[best] - noise[second] - 1.5e-3
    (found,) = near_ties.near_best(row, SAMPLED, positions, 1e-3)
    assert found == pytest.approx({best: 0, second: 1.5e-3}, abs=1e-5)
    (found,) = near_ties.near_best(row, SAMPLED, positions, 0.7e-3)
    assert found == {best: 0}
    (found,) = near_ties.near_best(row, replace(SAMPLED, top_k=1), positions, 1e-3)
    assert len(found) == 1


def test_a_greedy_token_is_near_if_two_roundings_can_make_it_the_best(near_ties):
    row = np.array([[1.0, 0.9985, 0.9975]], np.float32)
    (found,) = near_ties.near_best(row, SamplingConfig(), np.array([3], np.int32), 1e-3)
    assert found == pytest.approx({0: 0, 1: 1.5e-3}, rel=1e-3)


def test_rounding_is_small_and_measured(near_ties, model, job):
    judge = near_ties.Judge.measure(model, [job, replace(job, temperature=0.0)])
    assert 0 < judge.rounding < 1e-3


def test_the_same_answer_needs_no_explanation(near_ties, model, job):
    result = model.generate([{"role": "user", "content": job.question}], **job.options)
    judge = near_ties.Judge(model)
    assert judge.near_ties(job, result.text, len(result.token_ids)) == []
    assert judge.near_ties(job, result.text + "x", len(result.token_ids)) is None
    assert judge.near_ties(job, result.text, len(result.token_ids) - 1) is None
    assert judge.near_ties(replace(job, seed=4), result.text, len(result.token_ids)) is None


def answer_after_a_near_tie(near_ties, model, job):
    """The tokens of an answer that takes another token first, and the margin there."""
    prompt = model.tokenizer.chat([{"role": "user", "content": job.question}])
    tokens = model.generate(prompt, **job.options).token_ids
    rows = near_ties.one_by_one(model, prompt, tokens)[:1]
    sampling, positions = replace(SAMPLED, seed=job.seed), np.array([len(prompt)], np.int32)
    (near,) = near_ties.near_best(rows, sampling, positions, 100.0)
    margin, neighbour = min((margin, x) for x, margin in near.items() if x != tokens[0])
    rest = {**job.options, "max_tokens": job.max_tokens - 1}
    return [neighbour, *model.generate([*prompt, neighbour], **rest).token_ids], margin


def test_after_a_near_tie_the_answer_must_go_on_as_the_api_does(near_ties, model, job):
    # Broken characters look the same, so other tokens would explain them too.
    for seed in range(200):
        short = replace(job, max_tokens=4, seed=seed)
        tokens, margin = answer_after_a_near_tie(near_ties, model, short)
        text = model.tokenizer.decode(tokens)
        if text.isascii() and len(text) == len(tokens) == 4:
            break
    narrow, enough = (x * margin / 2 for x in (0.99, 1.01))
    assert near_ties.Judge(model, narrow).near_ties(short, text, 4) is None
    judge = near_ties.Judge(model, enough)
    assert judge.near_ties(short, text, 4) == [pytest.approx(margin)]
    far = "~" if text[-1] < "@" else "!"
    assert judge.near_ties(short, text[:-1] + far, 4) is None
