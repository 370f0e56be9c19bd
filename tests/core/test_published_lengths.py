"""Expected rounds of speculative sampling against runs of it, and the verdicts about a drafter."""

import json
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from byte_tokens import save_tokenizer
from failures import failing
from mtp_pairs import write_mtp_pair

import treeflash
from benchmarks import published
from benchmarks.published import (
    ROWS,
    SETS,
    Lengths,
    acceptance_ratios,
    expected_rounds,
    list_differences,
    published_row,
    verdict,
)
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.errors import ConfigError

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


@pytest.mark.sample(1)
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
        names={"target": "Qwen/Qwen3-4B"}, backend=backend, loaded=model.loaded, tokenizer=tokenizer
    )
    config = replace(config, max_tokens=2048)
    assert not list(list_differences(like, row, config))
    like.loaded, tokenizer.thinking = replace(model.loaded, adapter="lora", kv_bits=8), True
    assert list(list_differences(like, row, config)) == [
        "adapter is set",
        "kv bits is set",
        "the prompts are without the chat template, or thinking is on",
    ]


DSPARK = ("--drafter", "deepseek-ai/dspark_qwen3_4b_block7")


@pytest.fixture
def run(prompt_sets, capsys):
    """Run the command on both sets: exit code, standard output, standard error."""

    def run(*args):
        capsys.readouterr()
        code = published.main([*prompt_sets, "--limit", "2", "--max-tokens", "9", *args])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def use(monkeypatch):
    """Let the command load a model that is at hand."""
    return lambda model: monkeypatch.setattr(published, "load_model", lambda *_: model)


def test_published_figures_beside_those_measured(use, run, model, tmp_path):
    use(model)
    path = tmp_path / "out.json"
    found = []
    for parallel in ("1", "3"):
        options = ("--json", str(path), "--parallel", parallel, *DSPARK)
        code, out, err = run(*options)
        found.append(json.loads(path.read_text(encoding="utf-8")))
        assert (code, "4/4" in err) == (0, True)
    assert found[0] == found[1]
    assert [list(record) for record in found[0]["published"]] == [
        ["set", "published", "measured", "low", "high", "prompts", "verdict"]
    ] * 2
    assert all(record["measured"] >= 1 for record in found[0]["published"])
    assert "not comparable, because the dtype is float32, not bfloat16" in out


def test_an_interrupted_comparison_keeps_what_was_measured(use, run, model):
    use(model)
    with failing(model.backend.drafter, "draft", KeyboardInterrupt, call=12):  # second prompt
        code, out, err = run(*DSPARK)
    assert (code, err.strip().splitlines()[-1]) == (130, "interrupted")
    assert "| one |" in out
    assert "| two |" not in out


def test_a_figure_that_is_too_low_names_the_doctor(capsys):
    record = {"set": "gsm8k", "published": 6.11, "measured": 5.7, "verdict": "too low"}
    published.report([record], [])
    assert "too low: `treeflash doctor` finds the settings" in capsys.readouterr().out
    published.report([record | {"verdict": "faithful"}], [])
    assert "doctor" not in capsys.readouterr().out


def test_what_cannot_be_compared_is_one_line(use, run, scripted):
    def refused(*args):
        code, out, err = run(*args)
        assert (code, out, err.count("\n")) == (2, "", 1)
        return err

    use(scripted("x", drafter=False))
    assert "no drafter was loaded, so there is nothing to compare" in refused(*DSPARK)
    assert "no published figures are known for the drafter" in refused()
    assert "max_tokens must be 2 or more" in refused(*DSPARK, "--max-tokens", "1")
    use(scripted("", head=False))
    assert "every text was too short for a round" in run(*DSPARK)[2]
