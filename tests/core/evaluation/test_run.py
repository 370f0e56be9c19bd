"""Prompts decoded in every case: runs, figures by depth, records and reasons, tables and plots."""

import base64
import io
import re
import sys
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from failures import failing
from fake_models import FakeBackend
from recordings import recording
from rich.console import Console

import treeflash
from treeflash.decoding.interfaces import Prefill
from treeflash.decoding.loop import Step
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.transitions import TransitionTable
from treeflash.decoding.tree import DraftTree
from treeflash.errors import ConfigError, PromptError
from treeflash.evaluation import report
from treeflash.evaluation import run as evaluation_run
from treeflash.evaluation.records import compute_records, interval, resamples
from treeflash.evaluation.report import check_report, tables, write_report
from treeflash.evaluation.run import (
    BEST,
    METRICS,
    BestDraft,
    Case,
    CaseRun,
    DepthMetrics,
    Evaluation,
    Sample,
    best_drafts,
    encode_rows,
    list_cases,
    measure_depth_metrics,
    rejection_reason,
)
from treeflash.text.prompt import Row

CASES = list_cases(["ar", "dflash", "ddtree", "treeflash", "treeflash-chain"], [4, 16])

PROMPTS = [[3, 1, 4], [2, 7, 1, 8], [1, 6, 1]]


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
    assert list_cases(["treeflash", "ar", "dflash", "ar"], [64, 16, 64]) == [
        ("treeflash", 16),
        ("treeflash", 64),
        ("ar", 1),
        ("dflash", 64),
    ]
    assert list_cases(["suffix"], [16, 64]) == [("suffix", 16), ("suffix", 64)]
    with pytest.raises(ConfigError, match="unknown method 'beam'"):
        list_cases(["beam"], [16])


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
    sets = {"a": PROMPTS, "b": [[9, 9], [8, 1]]}
    one = run(model.backend, sets, configs)
    lengths = {own.runs[CASES[0]].tokens for samples in one.samples.values() for own in samples}
    assert len(lengths) > 1, "texts never ended at different times"
    records = compute_records(one.samples, 5)
    for parallel in (2, "auto"):
        assert compute_records(run(model.backend, sets, configs, parallel).samples, 5) == records


def test_cases_of_a_prompt_that_run_together_share_its_prefill(model, configs, monkeypatch):
    drafting = {case: config for case, config in configs.items() if config.drafts}
    prompt = {"a": [list(range(4, 30))]}
    monkeypatch.setattr(evaluation_run, "measure_depth_metrics", lambda *_: None)
    with recording(type(model.backend.verifier), "run") as passes:
        run(model.backend, prompt, drafting, parallel=len(drafting))
    extended = [len(x.token_ids) for _, work in passes for x in work if isinstance(x, Prefill)]
    assert sorted(extended) == [1] * (len(drafting) - 1) + [26]


def test_every_iteration_but_the_cut_last_has_a_reason(model, configs):
    (sample,) = run(model.backend, {"a": PROMPTS[:1]}, configs).samples["a"]
    for case, own in sample.runs.items():
        forwards = len(own.accepted_lengths)
        assert own.rejections.total() in ((0,) if case.method == "ar" else (forwards - 1, forwards))
    assert sample.runs["ddtree", 4].rejections["candidate"] == 0


def test_copies_of_the_text_are_measured(model):
    cases = list_cases(["ar", "ddtree", "treeflash", "suffix"], [16])
    configs = {
        case: model.decode_config({"method": case.method, "budget": case.budget, "max_tokens": 24})
        for case in cases
    }
    text = model.generate(PROMPTS[0], method="ar", max_tokens=24).token_ids
    prompt = [*PROMPTS[0], *text, *PROMPTS[0]]  # its own continuation is likely to be copied
    evaluation = run(model.backend, {"a": [prompt]}, configs)
    found = compute_records(evaluation.samples, 0)
    efficiency = {row["method"]: row["block_efficiency"] for row in found["rows"]}
    assert efficiency["suffix"] > efficiency["ar"] == 1
    assert {row["method"] for row in found["lost"]} == {"ddtree", "treeflash"}
    assert {row["method"] for row in found["accepted"]} == {"ddtree", "treeflash", "suffix"}


def test_a_text_of_one_token_is_left_out(model):
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


def test_an_interruption_keeps_finished_prompts(model, configs):
    evaluation = Evaluation()
    last = 2 * (len(CASES) + 1)  # in the depth metrics of the second prompt
    with (
        failing(model.backend, "open", KeyboardInterrupt, call=last),
        pytest.raises(KeyboardInterrupt),
    ):
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
        case: CaseRun(1 + sum(own), own, Counter(child=len(own) - 1, block=1))
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


def test_trees_are_compared_with_chains_of_as_many_nodes():
    chain, other = Case("treeflash-chain", 8), Case("treeflash-chain", 16)
    found = compute_records({"a": [sample({TREE: (4,), chain: (2, 2), other: (1,) * 4})]}, seed=0)
    pairs = {(row["set"], row["baseline"], row["budget"]): row["ratio"] for row in found["ratios"]}
    assert pairs == {(name, "treeflash-chain", 8): 2 for name in ("a", "mean")}


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


ROOT = 9

# Depth 1 offers 1, 2 and 3; after 1 come 4 and 5, after 2 come 6 and 4; depth 3 knows 4 alone.
TABLE = TransitionTable.from_candidates(
    np.array([[1, 2], [4, 7]], np.int32),
    np.array([[[1, 2, 3], [0, 0, 0]], [[4, 5, 0], [6, 4, 0]], [[7, 8, 0], [1, 2, 0]]], np.int32),
    np.log([[[0.5, 0.3, 0.2]] * 2, [[0.6, 0.4, 1e-9]] * 2, [[0.6, 0.4, 1e-9]] * 2]).astype(
        np.float32
    ),
)

ABSENT = np.where(TABLE.tokens == 0, -np.inf, TABLE.log_probs).astype(np.float32)

TABLE = TransitionTable(TABLE.tokens, ABSENT, TABLE.next_row)


def step(*tokens: int, accepted: int | None = None, table=TABLE, finish_reason=None) -> Step:
    """An iteration that accepted all tokens but the last, unless it accepted more."""
    drafted = np.array([ROOT, *tokens], np.int32)
    tree = DraftTree.chain(drafted, np.zeros(len(drafted)))
    path = np.arange(len(tokens) if accepted is None else accepted + 1, dtype=np.int32)
    return Step(tokens, {}, tree, path, finish_reason, table)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ((8,), [(1, True, False)]),  # not drafted
        ((1, 5, 7), [(1, True, True), (2, True, False)]),  # no row of depth 3 follows 5
        ((1, 4, 7), [(1, True, True), (2, True, True), (3, True, True)]),
        ((2, 6, 7), [(1, True, False), (2, False, True)]),
        ((2, 4, 7), [(1, True, False), (2, False, False), (3, False, True)]),
        ((2, 4, 8, 1), [(1, True, False), (2, False, False), (3, False, False)]),
        ((1, 0), [(1, True, True), (2, True, False)]),  # 0 fills the row, but is impossible
    ],
)
def test_best_drafts(tokens, expected):
    assert list(best_drafts(step(*tokens))) == expected


def test_plain_decoding_has_no_best_drafts():
    assert list(best_drafts(step(1, table=None))) == []


def test_shares_of_best_drafts_by_hand():
    def counted(*drafts):
        runs = {TREE: CaseRun(3, (2,), Counter(), Counter(BestDraft(*draft) for draft in drafts))}
        return Sample(runs, None)

    right, wrong = (1, True, True), (1, True, False)
    first = counted(right, right, wrong, (2, False, True))
    second = counted(right, (2, False, False), (2, False, False), (2, False, False))
    names = ("method", "budget", "depth", "spine", "spine_drafts", "sibling", "sibling_drafts")
    rows = ("treeflash", 8, 1, 0.75, 4, None, 0), ("treeflash", 8, 2, None, 0, 0.25, 4)
    expected = [dict(zip(names, row, strict=True)) for row in rows]
    assert compute_records({"a": [first], "b": [second]}, 0)["branches"] == expected


MARGINALS = {
    "table": TransitionTable.from_marginals(
        np.array([[1, 2], [3, 4]], np.int32), np.log(np.full((2, 2), 0.5, np.float32))
    )
}
CUT = {"table": TABLE.truncate(2), "finish_reason": "length"}


@pytest.mark.parametrize(
    ("tokens", "settings", "reason"),
    [
        ((8,), {}, "child"),  # not among the three of depth 1
        ((3,), {}, "budget_limit"),
        ((3, 1), {}, "candidate"),  # no row of depth 2 follows 3
        ((1, 6), {}, "child"),  # 6 follows 2, not 1
        ((2, 6), {}, "budget_limit"),
        ((1, 0), {}, "child"),  # 0 fills the row, but is impossible
        ((1, 5, 7), {}, "candidate"),
        ((2, 4, 8), {}, "budget_limit"),  # 4 is found after 2 too
        ((2, 4, 3), {}, "child"),
        ((1, 4, 7, 1), {}, "block"),
        # Marginals have every parent.
        ((2, 4), MARGINALS, "budget_limit"),
        ((2, 5), MARGINALS, "child"),
        ((2, 4, 1), MARGINALS, "block"),
        # Nothing was drafted, or the text ended before.
        ((1,), {"table": None}, None),
        ((1, 4), {"accepted": 2}, None),
        # The limit kept the tree from going deeper.
        ((1, 4, 7), CUT, None),
        ((1, 5), CUT, "budget_limit"),
        # The table lacks what was copied.
        ((8, 1), {}, None),  # 8 is no child of the root
        ((0, 1), {}, None),
        ((1, 0, 1), {}, None),  # 0 fills the row, but is impossible
        ((3, 1, 7), {}, None),  # no row of the table follows 3
        ((8, 9, 9, 9), {}, "block"),
        ((1, 4, 7, 1, 1), {}, "block"),  # deeper than the table
    ],
)
def test_reasons(tokens, settings, reason):
    assert rejection_reason(step(*tokens, **settings)) == reason


@pytest.mark.parametrize("fact", ["table", "tree", "path"])
def test_a_step_without_a_draft_rejects_nothing(fact):
    assert rejection_reason(step(8)) == "child"
    assert rejection_reason(replace(step(8), **{fact: None})) is None
    assert rejection_reason(Step((1,), {})) is None


DEPTHS = 5  # of the tiny pair


def softmax(logits: np.ndarray) -> np.ndarray:
    exps = np.exp(logits.astype(np.float64) - logits.max())
    return exps / exps.sum()


def expected(backend, prompt, text, temperature):
    """Figures of every anchor and depth by source, from texts opened anew."""
    found = {}
    for start in range(0, len(text) - 1, 4):
        before = [*prompt, *text[:start]]
        whole = SequenceSession(backend, drafts=True)
        whole.extend(before)
        block = whole.draft(text[start])
        known = [*text[start : start + DEPTHS], *[text[-1]] * DEPTHS][:DEPTHS]
        drafted = {
            "marginal": backend.drafter.log_probs(block),
            "corrected": backend.head.log_probs(block, np.array(known, np.int32)),
        }
        for depth in range(1, min(DEPTHS, len(text) - 1 - start) + 1):
            alone = SequenceSession(backend)
            alone.extend([*before, *text[start : start + depth - 1]])
            logits = alone.logits(DraftTree.root_only(text[start + depth - 1]))[0]
            target = softmax(logits / temperature)
            for source, log_probs in drafted.items():
                probs = np.exp(log_probs[depth - 1].astype(np.float64))
                figures = {"tvd": np.maximum(target - probs, 0).sum()}
                for k in BEST:
                    best = np.argsort(-probs)[:k]
                    figures[f"top{k}"] = float(text[start + depth] in best)
                    figures[f"cover{k}"] = target[best].sum()
                for name, value in figures.items():
                    found.setdefault((depth, f"{name}_{source}"), []).append(value)
    return found


@pytest.mark.parametrize("temperature", [0, 0.7])
@pytest.mark.parametrize("length", [2, 6, 24])
def test_figures_equal_those_of_plain_text(model, temperature, length):
    prompt = [3, 1, 4, 1, 5]
    text = model.generate(prompt, max_tokens=length).token_ids
    metrics = measure_depth_metrics(model.backend, prompt, text, temperature)
    wanted = expected(model.backend, prompt, text, temperature or 1)
    records = list(metrics.records())
    assert [record["depth"] for record in records] == list(range(1, min(DEPTHS, length - 1) + 1))
    for record in records:
        depth = record.pop("depth")
        assert record.pop("anchors") == len(wanted[depth, "tvd_marginal"])
        for key, value in record.items():
            assert value == pytest.approx(np.mean(wanted[depth, key]), abs=1e-5), key


@pytest.mark.parametrize("head", [None, SimpleNamespace(transitions=None)])
def test_without_log_probs_of_a_head_nothing_is_corrected(tiny_pair, model, head):
    backend = treeflash.load(*tiny_pair, backend="reference").backend
    backend.head = head
    (record, *_) = measure_depth_metrics(backend, [3, 1], [4, 1, 5], 0).records()
    assert record["tvd_corrected"] is None
    (whole, *_) = measure_depth_metrics(model.backend, [3, 1], [4, 1, 5], 0).records()
    assert record["tvd_marginal"] == whole["tvd_marginal"]


class Oracle(FakeBackend):
    """A target whose next token depends on the last one alone, and a drafter that knows it."""

    def __init__(self, logits: np.ndarray) -> None:
        super().__init__(lambda sequence: logits[sequence[-1]], None, len(logits))
        self.table = logits
        self.drafter = self.head = self
        self.drafter_config.depths = 3

    def draft(self, roots, depths=None):
        return [root for _, root in roots]

    def log_probs(self, block, previous=None):
        if previous is None:
            return np.log(np.full((3, len(self.table)), 1 / len(self.table), np.float32))
        assert previous[0] == block
        return np.log([softmax(row) for row in self.table[previous]]).astype(np.float32)


def test_a_perfect_head_is_at_no_distance():
    logits = np.random.default_rng(1).normal(0, 3, (8, 8)).astype(np.float32)
    text = [0]
    for _ in range(20):
        text.append(int(logits[text[-1]].argmax()))
    records = list(measure_depth_metrics(Oracle(logits), [1], text, 0).records())
    assert records
    for record in records:
        assert record["tvd_corrected"] == pytest.approx(0, abs=1e-6)
        assert record["top1_corrected"] == 1
        assert record["tvd_marginal"] > 0.1


def test_a_vocabulary_may_be_smaller_than_the_best():
    logits = np.zeros((3, 3), np.float32)
    (record, *_) = measure_depth_metrics(Oracle(logits), [1], [0, 1, 2], 0).records()
    assert record["cover5_marginal"] == pytest.approx(1)
    assert record["cover2_marginal"] == pytest.approx(2 / 3)
    assert record["top5_marginal"] == 1


def test_metrics_add_up():
    ones = np.ones((2, 7))
    first = DepthMetrics(np.array([1, 0]), {"marginal": ones})
    both = first + DepthMetrics(np.array([3, 0]), {"marginal": 3 * ones})
    (record,) = both.records()
    assert (record["depth"], record["anchors"], record["tvd_marginal"]) == (1, 4, 1)


PNG = b"\x89PNG\r\n"


def found(head: bool = True, depths: bool = True, drafts: bool = True):
    """Records of one prompt."""
    sums = np.full((3, len(METRICS)), 0.25)
    sources = {"marginal": sums} | ({"corrected": sums} if head else {})
    cases = [Case("dflash", 16), Case("ddtree", 4), Case("ddtree", 16)] * drafts
    cases = [Case("ar", 1), *cases, *[Case("treeflash", 16)] * head]
    best = Counter([BestDraft(1, True, True), BestDraft(1, True, False)])
    runs = {case: CaseRun(4, (1, 2), Counter(child=2), best) for case in cases}
    metrics = DepthMetrics(np.ones(3, np.int64), sources) if depths else None
    return compute_records({"a<b": [Sample(runs, metrics)]}, 0)


def test_tables_hold_every_figure():
    rows, ratios, depths, lost, branches = tables(found())
    names = ["set", "method", "budget", "block efficiency", "low", "high", "prompts", "tokens"]
    assert rows.columns == names
    assert rows.rows[0] == ["a<b", "ar", "1", "1.500", "1.500", "1.500", "1", "4"]
    assert {row[0] for row in rows.rows} == {"a<b", "mean"}
    assert ratios.rows[0] == ["a<b", "treeflash", "ddtree", "16", "1.000", "1.000", "1.000"]
    assert depths.columns == ["depth", "anchors", "drafter", *METRICS]
    assert [row[:3] for row in depths.rows[:2]] == [["1", "1", "marginal"], ["1", "1", "corrected"]]
    assert lost.rows[0] == ["a<b", "dflash", "16", "0", "2", "0", "0"]
    assert branches.rows[0] == ["dflash", "16", "1", "0.500", "2", "", "0"]


def test_tables_without_rows_are_left_out():
    assert len(tables(found(head=False, depths=False))) == 4
    (depths,) = [table for table in tables(found(head=False)) if "Depth" in table.title]
    assert {row[2] for row in depths.rows} == {"marginal"}


@pytest.mark.sample(1)
@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("depths", [True, False])
def test_a_page_needs_no_other_file(tmp_path, recwarn, head, depths):
    pytest.importorskip("matplotlib")
    path = tmp_path / "r.html"
    write_report(path, found(head, depths), "dtype <x>")
    page = path.read_text(encoding="utf-8")
    (image,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert base64.b64decode(image).startswith(PNG)
    assert "http" not in page
    assert "<h1>dtype &lt;x&gt;</h1>" in page
    assert "<td>a&lt;b</td><td>ddtree</td><td>16</td>" in page
    assert page.count("<table>") == len(tables(found(head, depths)))
    assert not recwarn.list


@pytest.fixture
def figures():
    """Collect the calls that write figures, each with its figure."""
    figure = pytest.importorskip("matplotlib.figure")
    with recording(figure.Figure, "savefig") as written:
        yield written


def test_settings_are_told_once_and_legends_hide_no_line(tmp_path, figures):
    write_report(tmp_path / "r.html", found(), "title", "the settings")
    assert (tmp_path / "r.html").read_text(encoding="utf-8").count("the settings") == 1
    ((drawn, *_),) = figures
    assert drawn.get_suptitle() == ""
    legends = [(axis, axis.get_legend()) for axis in drawn.axes if axis.get_legend()]
    assert legends
    for axis, legend in legends:
        assert legend.get_window_extent().x0 >= axis.get_window_extent().x1


def test_joined_records_have_a_line_and_a_color_for_each_name(tmp_path, figures):
    names = "ddtree, greedy", "ddtree, sampled"
    joined = {
        key: [
            {**record, "method": name}
            for name in names
            for record in found()[key]
            if record["method"] == "ddtree"
        ]
        for key in ("rows", "accepted")
    }
    for path in (tmp_path / "r.png", tmp_path / "r.html"):
        write_report(path, joined, "joined")
    for drawn, *_ in figures:
        efficiencies, lengths = drawn.axes  # and no empty plots of depth metrics
        for axis in (efficiencies, lengths):
            labels = axis.get_legend_handles_labels()[1]
            assert [label.removesuffix(", 16") for label in labels] == list(names)
        first, second = (line[0].get_color() for line in efficiencies.containers)
        assert first != second


def test_an_image_of_plain_decoding(tmp_path):
    pytest.importorskip("matplotlib")
    write_report(tmp_path / "r.png", found(head=False, depths=False, drafts=False), "x")
    assert (tmp_path / "r.png").read_bytes().startswith(PNG)


def test_a_narrow_terminal_loses_no_figure(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    report.publish(found(), {}, "", None, None)
    lines = [re.split("  +", line.strip()) for line in capsys.readouterr().out.splitlines()]
    for table in tables(found()):
        for row in table.rows:
            assert [cell for cell in row if cell] in lines


def test_what_cannot_be_written_is_known_before(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", SimpleNamespace(__spec__=object()))
    check_report(tmp_path / "r.png")
    with pytest.raises(ConfigError, match=r"FILE\.html or FILE\.png, not .*r\.pdf"):
        check_report(tmp_path / "r.pdf")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError) as raised:
        check_report(tmp_path / "r.html")
    assert (
        str(raised.value)
        == "--report needs matplotlib; pip install '.[report]' in a clone of treeflash"
    )
