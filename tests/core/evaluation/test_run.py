"""Prompts decoded in every case, and the records of the results."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

import treeflash
from treeflash.decoding.interfaces import Extension
from treeflash.errors import ConfigError, PromptError
from treeflash.evaluation import run as evaluation_run
from treeflash.evaluation.bootstrap import interval, resamples
from treeflash.evaluation.depth_metrics import DepthMetrics, measure_depth_metrics
from treeflash.evaluation.records import compute_records
from treeflash.evaluation.run import Case, Evaluation, Run, Sample, cases, encode_rows
from treeflash.text.prompt_file import Row

CASES = cases(["ar", "dflash", "ddtree", "treeflash", "treeflash-chain"], [4, 16])
PROMPTS = [[3, 1, 4], [2, 7, 1, 8], [1, 6, 1]]


@pytest.fixture(scope="module")
def model(tiny_pair):
    return treeflash.load(*tiny_pair, backend="reference")


@pytest.fixture(scope="module")
def configs(model):
    return {
        case: model.decode_config({"method": case.method, "budget": case.budget, "max_tokens": 20})
        for case in CASES
    }


def run(backend, sets, configs, parallel=1) -> Evaluation:
    evaluation = Evaluation()
    evaluation.run(backend, sets, configs, Console(file=io.StringIO()), parallel)
    return evaluation


def measure(backend, prompt_ids, configs) -> Sample:
    """The sample of a single prompt."""
    (sample,) = run(backend, {"a": [prompt_ids]}, configs).samples["a"]
    return sample


def test_cases_are_those_that_differ():
    assert cases(["treeflash", "ar", "dflash", "ar"], [64, 16, 64]) == [
        ("treeflash", 16),
        ("treeflash", 64),
        ("ar", 1),
        ("dflash", 64),
    ]
    with pytest.raises(ConfigError, match="unknown method 'beam'"):
        cases(["beam"], [16])


def test_runs_equal_generations(model, configs):
    evaluation = run(model.backend, {"a": PROMPTS}, configs)
    assert len(evaluation.samples["a"]) == len(PROMPTS)
    rows = compute_records(evaluation.samples, 0)["rows"]
    for case in CASES:
        generations = [
            model.generate(ids, method=case.method, budget=case.budget, max_tokens=20)
            for ids in PROMPTS
        ]
        runs = [sample.runs[case] for sample in evaluation.samples["a"]]
        lengths = [own.accepted_lengths for own in generations]
        assert [list(own.accepted_lengths) for own in runs] == lengths
        (row,) = [row for row in rows if (row["set"], row["method"], row["budget"]) == ("a", *case)]
        pooled = [length for own in lengths for length in own]
        assert row["block_efficiency"] == pytest.approx(sum(pooled) / len(pooled))
        assert row["low"] <= row["block_efficiency"] <= row["high"]
        assert (row["prompts"], row["tokens"]) == (3, 60)


def test_texts_decoded_together_give_the_same_records(model, configs):
    stop = frozenset(model.generate(PROMPTS[1], max_tokens=7).token_ids[-1:])
    configs = {case: replace(config, stop_token_ids=stop) for case, config in configs.items()}
    sets = {"a": PROMPTS, "b": PROMPTS[::-1], "c": [[9, 9], [8, 1]]}
    one = run(model.backend, sets, configs)
    lengths = {own.runs[CASES[0]].tokens for samples in one.samples.values() for own in samples}
    assert len(lengths) > 1, "texts never ended at different times"
    records = compute_records(one.samples, 5)
    for parallel in (2, 7, "auto"):
        assert compute_records(run(model.backend, sets, configs, parallel).samples, 5) == records


def test_cases_of_a_prompt_that_run_together_share_its_prefill(model, configs, monkeypatch):
    extended = []
    run_target = type(model.backend.verifier).run

    def noted(self, work):
        extended.extend(len(x.token_ids) for x in work if isinstance(x, Extension))
        return run_target(self, work)

    monkeypatch.setattr(type(model.backend.verifier), "run", noted)
    drafting = {case: config for case, config in configs.items() if config.drafts}
    prompt = {"a": [list(range(4, 30))]}
    monkeypatch.setattr(evaluation_run, "measure_depth_metrics", lambda *_: None)
    run(model.backend, prompt, drafting, parallel=len(drafting))
    assert sorted(extended) == [1] * (len(drafting) - 1) + [26]


def test_every_iteration_but_the_cut_last_has_a_reason(model, configs):
    (sample,) = run(model.backend, {"a": PROMPTS[:1]}, configs).samples["a"]
    for case, own in sample.runs.items():
        forwards = len(own.accepted_lengths)
        assert own.rejections.total() in ((0,) if case.method == "ar" else (forwards - 1, forwards))
    assert sample.runs["ddtree", 4].rejections["candidate"] == 0


def test_a_text_of_one_token_is_left_out(model, configs):
    stop = frozenset({model.generate(PROMPTS[0], max_tokens=1).token_ids[0]})
    case = Case("treeflash", 16)
    config = model.decode_config({"max_tokens": 9, "stop_token_ids": stop})
    assert run(model.backend, {"a": PROMPTS[:1]}, {case: config}).samples == {}


def test_depth_metrics_need_a_drafter(tiny_pair):
    model = treeflash.load(tiny_pair[0], False, backend="reference")
    config = model.decode_config({"max_tokens": 5})
    assert measure(model.backend, [1, 2], {Case("ar", 1): config}).depth_metrics is None


def test_depth_metrics_compare_with_the_distribution_that_was_sampled_from(model):
    config = model.decode_config({"method": "dflash", "max_tokens": 20, "temperature": 0.7})
    found = measure(model.backend, PROMPTS[0], {Case("dflash", 16): config})
    text_ids = model.generate(PROMPTS[0], method="dflash", max_tokens=20, temperature=0.7).token_ids
    same, other = (
        list(measure_depth_metrics(model.backend, PROMPTS[0], text_ids, temperature).records())
        for temperature in (0.7, 0.0)
    )
    assert list(found.depth_metrics.records()) == same != other


def test_an_interruption_keeps_finished_prompts(model, configs, monkeypatch):
    opened = model.backend.open
    calls = [0]

    def interrupted(capacity, **settings):
        calls[0] += 1
        if calls[0] == 2 * (len(CASES) + 1):  # in the depth metrics of the second prompt
            raise KeyboardInterrupt
        return opened(capacity, **settings)

    monkeypatch.setattr(model.backend, "open", interrupted)
    evaluation = Evaluation()
    with pytest.raises(KeyboardInterrupt):
        evaluation.run(model.backend, {"a": PROMPTS}, configs, Console(file=io.StringIO()))
    assert len(evaluation.samples["a"]) == 1


def test_rows_are_encoded_by_their_first_turn(model, configs):
    turns = tuple(({"role": "user", "content": text},) for text in ("hi", "there"))
    (ids,) = encode_rows(model, [Row(id=1, turns=turns)], configs)
    assert model.tokenizer.decode(ids) == "user: hiassistant: "
    long = Row(id="b", turns=(({"role": "user", "content": "x" * 5000},),))
    with pytest.raises(PromptError, match=r"row 'b': the prompt has 50\d\d tokens"):
        encode_rows(model, [long], configs)


def sample(lengths: dict[Case, tuple[int, ...]], tvd: float = 0.5, anchors: int = 1) -> Sample:
    """One prompt's accepted lengths by case; a distance at depth 1."""
    figures = np.zeros((2, 7))
    figures[0, 0] = tvd * anchors
    runs = {
        case: Run(1 + sum(own), own, Counter(child=len(own) - 1, block=1))
        for case, own in lengths.items()
    }
    depths = DepthMetrics(np.array([anchors, 0]), {"marginal": figures, "corrected": figures / 2})
    return Sample(runs, depths)


TREE, BASE, PLAIN = Case("treeflash", 8), Case("ddtree", 8), Case("ar", 1)


def test_figures_by_hand():
    found = compute_records(
        {
            "a": [
                sample({TREE: (4, 2), BASE: (2, 2, 2), PLAIN: (1,) * 6}, 0.2, 3),
                sample({TREE: (3,), BASE: (1, 2), PLAIN: (1,) * 3}, 0.6, 1),
            ],
            "b": [sample({TREE: (1, 1), BASE: (1, 1), PLAIN: (1, 1)}, 0.9, 2)],
        },
        seed=1,
    )
    rows = {(row["set"], row["method"]): row for row in found["rows"]}
    assert rows["a", "treeflash"]["block_efficiency"] == 3
    assert rows["a", "ddtree"]["block_efficiency"] == pytest.approx(9 / 5)
    assert rows["mean", "treeflash"]["block_efficiency"] == 2
    assert rows["mean", "ddtree"]["block_efficiency"] == pytest.approx((9 / 5 + 1) / 2)
    assert (rows["a", "ar"]["low"], rows["a", "ar"]["high"]) == (1, 1)
    assert (rows["mean", "ar"]["prompts"], rows["mean", "ar"]["tokens"]) == (3, 14)
    # Two prompts give three mixtures, of which the middle one is as likely as the others together.
    ends = rows["a", "ddtree"]["low"], rows["a", "ddtree"]["high"]
    assert ends == (pytest.approx(3 / 2), pytest.approx(2))
    ratios = {row["set"]: row["ratio"] for row in found["ratios"]}
    assert ratios == {
        "a": pytest.approx(5 / 3),
        "b": pytest.approx(1),
        "mean": pytest.approx(2 / 1.4),
    }
    depths = {row["set"]: row for row in found["depths"]}
    assert [row["depth"] for row in found["depths"]] == [1, 1, 1]
    assert depths["a"]["tvd_marginal"] == pytest.approx((0.2 * 3 + 0.6) / 4)
    assert depths["mean"]["tvd_marginal"] == pytest.approx((0.3 + 0.9) / 2)
    assert depths["mean"]["tvd_corrected"] == pytest.approx(0.3)
    assert depths["mean"]["anchors"] == 6
    assert found["lost"][0] == {
        "set": "a",
        "method": "treeflash",
        "budget": 8,
        "candidate": 0,
        "child": 1,
        "budget_limit": 0,
        "block": 2,
    }
    assert found["accepted"][0]["iterations"] == [0, 1, 1, 1]
    assert all(row["method"] != "ar" for row in found["lost"] + found["accepted"])


def test_ratios_pair_the_prompts():
    """Prompts differ a lot, yet one method is always twice as good: that is certain."""
    own = [sample({TREE: (2 * n,), BASE: (n, n)}) for n in (1, 3, 8, 20)]
    found = compute_records({"a": own}, seed=0)
    ratio = found["ratios"][0]
    assert ratio["ratio"] == ratio["low"] == ratio["high"] == pytest.approx(2)
    row = found["rows"][0]
    assert row["low"] < row["block_efficiency"] < row["high"]


def test_a_seed_gives_the_same_intervals():
    own = [sample({TREE: (n,)}) for n in (1, 2, 3, 4, 5, 9)]
    one, same, other = (compute_records({"a": own}, seed)["rows"] for seed in (1, 1, 2))
    assert one == same
    assert [row["block_efficiency"] for row in one] == [row["block_efficiency"] for row in other]


def test_the_bootstrap_covers_a_mean():
    """The interval of a mean of many is near the normal one."""
    rng = np.random.default_rng(5)
    data = rng.normal(10, 2, 400)
    drawn = resamples(len(data), rng)
    assert (drawn[0] == np.arange(400)).all()
    low, high = interval(data[drawn].mean(1))
    assert high - low == pytest.approx(2 * 1.96 * data.std() / 20, rel=0.15)
    assert low < data.mean() < high
