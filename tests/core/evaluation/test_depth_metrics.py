"""Drafter and target by depth, against forward passes over plain text."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

import treeflash
from treeflash.decoding.interfaces import Pass
from treeflash.decoding.sampling import SampledTokens
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.evaluation.run import BEST, DepthMetrics, measure_depth_metrics

DEPTHS = 5  # of the tiny pair


@pytest.fixture(scope="module")
def model(tiny_pair):
    return treeflash.load(*tiny_pair, backend="reference")


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


class Oracle:
    """A target whose next token depends on the last one alone, and a drafter that knows it."""

    drafter_config = SimpleNamespace(block_size=4, depths=3, has_marginals=True)

    def __init__(self, logits: np.ndarray) -> None:
        self.table = logits
        self.verifier = self.drafter = self.head = self

    def open(self, capacity, *, drafts):
        return SimpleNamespace(length=0, close=lambda: None)

    def run(self, work):
        return Pass([SampledTokens(np.zeros(1, np.int32))])

    def logits(self, trees):
        return Pass(logits=[self.table[tree.tokens] for _, tree in trees])

    def commit(self, verified, paths):
        pass

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
