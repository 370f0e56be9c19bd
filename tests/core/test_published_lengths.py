"""Expected rounds of speculative sampling against runs of it, and the verdicts about a drafter."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from byte_tokens import save_tokenizer
from mtp_pairs import write_mtp_pair

import treeflash
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.errors import ConfigError
from treeflash.evaluation import published
from treeflash.evaluation.published import (
    ROWS,
    SETS,
    Lengths,
    acceptance_ratios,
    expected_rounds,
    list_differences,
    published_row,
    verdict,
)

VOCAB, DEPTHS, STOP = 6, 3, 0


class Chances:
    """A target and a conditional drafter whose distributions depend on the token before alone."""

    def __init__(self, seed: int = 3) -> None:
        rng = np.random.default_rng(seed)
        self.target = rng.dirichlet(np.full(VOCAB, 0.6), VOCAB)
        # Worse with every depth, so that depths cannot be confused.
        shares = 0.25 * np.arange(1, DEPTHS + 1)[:, None, None]
        other = rng.dirichlet(np.full(VOCAB, 0.6), (DEPTHS, VOCAB))
        self.drafter = (1 - shares) * self.target + shares * other
        self.rng = rng

    def sample(self, probs: np.ndarray) -> int:
        return min(int(np.searchsorted(probs.cumsum(), self.rng.random())), VOCAB - 1)

    def text(self, root: int, length: int, *, stops: bool) -> list[int]:
        """Sample a text that begins with a root, and ends with the first stop token if it stops."""
        text = [root]
        while len(text) < length:
            text.append(self.sample(self.target[text[-1]]))
            if stops and text[-1] == STOP:
                break
        return text

    def ratios(self, text: list[int]) -> np.ndarray:
        """Return r after every root of a text."""
        found = np.zeros((len(text) - 1, DEPTHS))
        for start in range(len(text) - 1):
            for depth in range(min(DEPTHS, len(text) - 1 - start)):
                before, token = text[start + depth : start + depth + 2]
                share = self.drafter[depth, before, token] / self.target[before, token]
                found[start, depth] = min(1.0, share)
        return found

    def round(self, root: int, *, stops: bool) -> list[int]:
        """Run a round of speculative sampling; returns its tokens."""
        drafts = [root]
        for depth in range(DEPTHS):
            drafts.append(self.sample(self.drafter[depth, drafts[-1]]))
        tokens: list[int] = []
        for depth, (before, draft) in enumerate(pairwise(drafts)):
            p, q = self.target[before], self.drafter[depth, before]
            if self.rng.random() >= min(1.0, p[draft] / q[draft]):
                rest = np.maximum(p - q, 0)
                return [*tokens, self.sample(rest / rest.sum())]
            tokens.append(draft)
            if stops and draft == STOP:
                return tokens
        return [*tokens, self.sample(self.target[tokens[-1]])]


def ratio_of_sums(pairs: list[tuple[float, float]]) -> float:
    tokens, rounds = np.array(pairs).sum(0)
    return tokens / rounds


@pytest.mark.parametrize("stops", [False, True], ids=["cut at the limit", "stopped"])
def test_the_expected_length_is_that_of_speculative_sampling(stops):
    chances = Chances()
    runs = []
    for _ in range(8000 if stops else 600):
        root, tokens, rounds = 1, 0, 0
        while rounds < (10**6 if stops else 40) and (root != STOP or not rounds or not stops):
            new = chances.round(root, stops=stops)
            root, tokens, rounds = new[-1], tokens + len(new), rounds + 1
        runs.append((tokens, rounds))
    texts = [chances.text(1, 10**6 if stops else 90, stops=stops) for _ in range(len(runs) // 2)]
    found = [expected_rounds(chances.ratios(text), complete=stops) for text in texts]
    # The standard errors of both are about 0.01.
    assert ratio_of_sums(found) == pytest.approx(ratio_of_sums(runs), abs=0.035)


def test_neighbouring_readings_of_the_protocol_give_other_lengths():
    """The test above can tell them apart."""
    chances = Chances()
    texts = [chances.text(1, 40, stops=False) for _ in range(300)]
    ratios = [chances.ratios(text) for text in texts]
    length = ratio_of_sums([expected_rounds(r, complete=False) for r in ratios])
    shifted = [expected_rounds(np.roll(r, 1, axis=0), complete=False) for r in ratios]
    deeper = [expected_rounds(np.roll(r, 1, axis=1), complete=False) for r in ratios]
    cut = [expected_rounds(r, complete=True) for r in ratios]
    for pairs in (shifted, deeper, cut):
        assert abs(ratio_of_sums(pairs) - length) > 0.035


@pytest.mark.parametrize(
    ("length", "depths", "ratio", "complete", "tokens", "rounds"),
    [
        (8, 2, 1.0, True, 7, 3),  # roots 0, 3 and 6; the last round has one token
        (8, 2, 1.0, False, 6, 2),  # the block after 6 passes the end
        (8, 2, 0.0, True, 7, 7),
        (8, 2, 0.0, False, 5, 5),
        (2, 2, 1.0, True, 1, 1),
        (2, 2, 1.0, False, 0, 0),
        (1, 2, 1.0, True, 0, 0),
        (3, 1, 0.5, False, 1.5, 1),
    ],
)
def test_texts_that_can_be_counted_by_hand(length, depths, ratio, complete, tokens, rounds):
    ratios = np.full((length - 1, depths), ratio)
    assert expected_rounds(ratios, complete=complete) == pytest.approx((tokens, rounds))


def test_the_example_of_the_module():
    tokens, rounds = expected_rounds(np.full((3000, 1), 0.5), complete=True)
    assert tokens == 3000
    assert rounds / tokens == pytest.approx(2 / 3, abs=1e-3)


@pytest.mark.parametrize("kind", ["treeflash", "marginals", "eagle3"])
def test_ratios_are_of_the_pair_s_distributions(tiny_pair, tmp_path, kind):
    pair = tiny_pair
    if kind == "eagle3":
        pair = write_mtp_pair(tmp_path, "eagle3", vocab_size=300)
        save_tokenizer(pair[0])
    backend = treeflash.load(*pair, backend="reference").backend
    if kind == "marginals":
        backend.head = None
    prompt, text = [3, 1, 4], [5, 2, 7, 1, 6, 1, 9, 8, 2, 4]
    found = acceptance_ratios(backend, prompt, text)
    depths = min(published.DEPTHS, backend.drafter_config.depths)
    assert found.shape == (len(text) - 1, depths)
    with SequenceSession(backend) as session:
        session.extend(prompt)
        logits = session.logits(DraftTree.chain(np.array(text[:-1], np.int32))).astype(np.float64)
    target = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for start in (0, 1, 5, 8):
        with SequenceSession(backend, drafts=True) as session:
            session.extend([*prompt, *text[:start]])
            block = session.draft(text[start], depths)
            known = [*text[start:], *[text[-1]] * depths][:depths]
            if backend.head is None:
                drafted = backend.drafter.log_probs(block)
            else:
                drafted = backend.head.log_probs(block, np.array(known, np.int32))
        for depth in range(min(depths, len(text) - 1 - start)):
            token = text[start + depth + 1]
            share = np.exp(drafted[depth, token] - target[start + depth, token])
            assert found[start, depth] == pytest.approx(min(1.0, share), rel=1e-4)


@pytest.mark.parametrize(
    ("low", "high", "prompts", "differences", "expected"),
    [
        (5.95, 6.17, 80, [], "faithful"),
        (5.80, 5.95, 80, [], "faithful"),  # reaches 3 % below
        (5.60, 5.90, 80, [], "too low"),
        (5.40, 6.30, 80, [], "undecided"),
        (5.95, 6.17, 4, [], "undecided"),
        (6.40, 6.60, 80, [], "not comparable"),
        (5.60, 5.90, 80, ["the dtype is float32"], "not comparable"),
    ],
)
def test_verdicts(low, high, prompts, differences, expected):
    record = {"published": 6.11, "low": low, "high": high, "prompts": prompts}
    assert verdict(record, differences) == expected
    assert verdict(record | {"published": None}, differences) == "not comparable"


def test_a_figure_is_tokens_over_rounds_of_a_set_beside_that_of_its_column():
    row = ROWS["dspark_qwen3_4b_block7"]
    prompts = {number: (60.0 + number, 10.0) for number in range(20)}
    lengths = Lengths({"mt-bench": dict(reversed(prompts.items())), "mine": prompts})
    mt_bench, mine = lengths.records(row, [], seed=0)
    assert mt_bench["published"] == 3.64
    assert mt_bench["measured"] == pytest.approx((60 * 20 + 190) / 200)
    assert mt_bench["low"] < mt_bench["measured"] < mt_bench["high"]
    assert (mine["published"], mine["verdict"]) == (None, "not comparable")
    again = Lengths({"mt-bench": prompts}).records(row, [], seed=0)
    assert again == [mt_bench]  # whatever order the prompts finished in


def test_every_row_has_a_figure_for_every_set():
    assert all(len(row.lengths) == len(SETS) for row in ROWS.values())
    # DSpark is the best drafter of each target, on every set.
    for target in {row.target for row in ROWS.values()}:
        kinds = {n.partition("_")[0]: r.lengths for n, r in ROWS.items() if r.target == target}
        best = kinds.pop("dspark")
        assert all(np.less(other, best).all() for other in kinds.values())


def test_rows_are_found_by_the_names_of_the_command_line():
    assert published_row("deepseek-ai/DSpark_Qwen3_8B_block7", None).target == "Qwen3-8B"
    assert published_row(None, "Qwen/Qwen3-14B-8bit").target == "Qwen3-14B"
    with pytest.raises(ConfigError, match="no published figures are known for the drafter a/b"):
        published_row("a/b", None)


def test_what_differs_from_the_protocol_is_named(tiny_pair):
    model = treeflash.load(*tiny_pair, backend="reference")
    row = ROWS["dspark_qwen3_4b_block7"]
    config = model.decode_config({"max_tokens": 100})
    found = "\n".join(list_differences(model, row, config))
    for part in ("not Qwen3-4B", "float32, not bfloat16", "not 7", "100 new tokens at most"):
        assert part in found
    backend = SimpleNamespace(dtype="bfloat16", name="", drafter_config=SimpleNamespace(depths=7))
    tokenizer = SimpleNamespace(has_chat_template=True, thinking=False)
    like = SimpleNamespace(
        names={"target": "Qwen/Qwen3-4B"},
        backend=backend,
        loaded=model.loaded,
        tokenizer=tokenizer,
    )
    config = replace(config, max_tokens=2048)
    assert not list(list_differences(like, row, config))
    like.loaded, tokenizer.thinking = replace(model.loaded, adapter="lora", kv_bits=8), True
    assert list(list_differences(like, row, config)) == [
        "adapter is set",
        "kv bits is set",
        "the prompts are without the chat template, or thinking is on",
    ]
