"""Small checkpoints in published formats, against what the published code computes from them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from numpy.typing import NDArray
from published_drafters import BACKENDS, FIXTURES, TOLERANCE, needs_fixtures

from treeflash.config import DecodeConfig, LoadConfig, Method
from treeflash.decoding import Request, decode
from treeflash.decoding.interfaces import TableOptions
from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import build_chain
from treeflash.reference.numerics import log_softmax
from treeflash.registry import loader
from treeflash.testing.comparisons import steps_of, tokens_of

ROOT = FIXTURES / "drafters"
FOLDERS = sorted(p.parent for p in ROOT.glob("*/expected.json") if p.parent.name != "target")
Given: TypeAlias = tuple[NDArray[np.int32], int, list[float]]
pytestmark = needs_fixtures


class Published:
    """A pair, and what the published code computes."""

    def __init__(self, backend: str, folder: Path) -> None:
        self.expected = json.loads((folder / "expected.json").read_text())
        self.texts = json.loads((ROOT / "target/expected.json").read_text())["texts"]
        load = loader(backend)
        self.backend = load(ROOT / "target", folder, LoadConfig(device="cpu", dtype="float32"))
        self.blocks = self.expected.get("texts") or self.expected.get("blocks")

    def block(self, case: dict[str, Any]) -> Any:
        """The block after a context that the published code drafted after too."""
        text = self.texts[case["text"]]
        tokens = [*text["prompt"], *text["greedy"]]
        text = SequenceSession(self.backend, drafts=True)
        text.extend(tokens[: case["context_length"]])
        assert tokens[case["context_length"]] == case["root"]
        return text.draft(case["root"])


@pytest.fixture(
    params=[(b, f) for b in BACKENDS for f in FOLDERS], ids=lambda x: f"{x[0]}-{x[1].name}"
)
def published(request: pytest.FixtureRequest) -> Published:
    backend, folder = request.param
    pytest.importorskip(BACKENDS[backend])
    published = Published(backend, folder)
    assert published.blocks, "most tests go through its blocks"
    return published


def test_marginals(published):
    for case in published.blocks:
        actual = published.backend.drafter.log_probs(published.block(case))
        logits = np.array(case.get("base_logits", case.get("logits")))
        expected = log_softmax(logits[len(logits) - len(actual) :])
        kept = np.isfinite(actual)
        assert (kept.sum(-1) == expected.shape[-1]).all()
        np.testing.assert_allclose(actual[kept].reshape(expected.shape), expected, atol=TOLERANCE)


def given_rows(case: dict[str, Any], first_slot: int, depths: int) -> Iterator[Given]:
    """Tokens before each depth, a depth, and the published logits after them."""

    def path(previous: list[int], logits: list[list[float]], first: int) -> Iterator[Given]:
        for i, row in enumerate(logits):
            yield np.resize(np.array(previous, np.int32), depths), first + i, row

    for given in case.get("conditional", ()):
        yield np.full(depths, given["previous"], np.int32), given["depth"], given["logits"]
    if case.get("draft_logits"):
        yield from path([case["root"], *case["draft"][:-1]], case["draft_logits"], 1)
    if steps := case.get("steps"):
        logits = [step["logits"] for step in steps]
        first = steps[0]["slot"] + 1 - first_slot
        yield from path([step["previous"] for step in steps], logits, first)
    for given in case.get("given", ()):
        first = given["first_slot"] + 1 - first_slot
        yield from path(given["previous"], given["logits"], first)
    for given in case.get("paths", ()):
        rows = given["logits"][-depths:]
        yield from path(given["previous"][-depths:], rows, 1)


def test_conditional_scores(published):
    head, config = published.backend.head, published.backend.drafter_config
    if head is None:
        pytest.skip("marginals alone")
    compared = 0
    for case in published.blocks:
        block = published.block(case)
        for previous, depth, logits in given_rows(case, config.first_slot, config.depths):
            actual = head.log_probs(block, previous)[depth - 1]
            expected = log_softmax(np.array(logits))
            np.testing.assert_allclose(actual[np.isfinite(actual)], expected, atol=TOLERANCE)
            compared += 1
        for slot, row in enumerate(case.get("selector", ())):
            mass = log_softmax(np.array(case["logits"])[slot])[row["candidates"]]
            for after in row["after"]:
                previous = np.full(config.depths, after["previous"], np.int32)
                actual = head.log_probs(block, previous)[slot]
                assert set(np.flatnonzero(np.isfinite(actual))) == set(row["candidates"])
                expected = log_softmax(np.array(after["scores"])) + np.log(np.exp(mass).sum())
                np.testing.assert_allclose(actual[row["candidates"]], expected, atol=TOLERANCE)
                compared += 1
    assert compared


def test_greedy_drafts(published):
    backend = published.backend
    for case in published.blocks:
        block = published.block(case)
        if backend.head is None:
            (table,) = backend.drafter.marginals([block], TableOptions(k=1))
        else:
            (table,) = backend.head.transitions([block], TableOptions(m=16, k=4))
        chain = build_chain(table, case["root"], 100)
        assert chain.tokens[1:].tolist() == case["draft"]
        steps = [step.get("confidence_logit") for step in case.get("steps", ())]
        confidences = case.get("draft_confidence_logits") or steps
        if confidences and confidences[0] is not None:
            expected = 1 / (1 + np.exp(-np.array(confidences)))
            np.testing.assert_allclose(chain.confidences[1:], expected, atol=TOLERANCE)


def test_accepted_lengths_of_the_published_loop(published):
    backend = published.backend
    chain = "dflash" if backend.head is None else "treeflash-chain"
    if "generation" not in published.blocks[0]:
        pytest.skip("the published code has no loop")
    for case in published.blocks:
        expected = case["generation"]
        prompt = published.texts[case["text"]]["prompt"]
        config = DecodeConfig(method=chain, budget=100, max_tokens=len(expected["tokens"]))
        prefill, *steps = decode(backend, Request(prompt_ids=prompt, config=config))
        assert [*prefill.tokens, *tokens_of(steps)] == expected["tokens"]
        lengths = [len(step.tokens) for step in steps]
        # The published loops may go past the limit, in their last iteration or by one more.
        assert lengths[:-1] == expected["acceptance_lengths"][: len(lengths) - 1]
        assert len(expected["acceptance_lengths"]) - len(lengths) in (0, 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_jetspec_is_causal(backend):
    """Read without `causal_head`, its log probabilities are up to 1.6 nats off."""
    pytest.importorskip(BACKENDS[backend])
    folder = ROOT.parent / "more-drafters"
    if not folder.exists():
        pytest.skip(f"{folder} does not exist")
    expected = json.loads((folder / "jetspec/expected.json").read_text())["texts"]
    assert expected
    arrays = np.load(folder / "jetspec/expected.npz")
    options = LoadConfig(device="cpu", dtype="float32")
    pair = loader(backend)(folder / "block-target", folder / "jetspec", options)
    for i, case in enumerate(expected):
        sequence = SequenceSession(pair, drafts=True)
        sequence.extend(case["prompt"])
        block = sequence.draft(case["root"])
        actual = pair.drafter.log_probs(block)
        np.testing.assert_allclose(actual, arrays[f"log_probs.{i}"], atol=TOLERANCE)
        (table,) = pair.drafter.marginals([block], TableOptions(k=1))
        assert build_chain(table, case["root"], 100).tokens[1:].tolist() == case["draft"]


def test_trees_need_no_more_forwards_than_chains(published):
    backend = published.backend

    def forwards(method: Method, budget: int) -> int:
        config = DecodeConfig(method=method, budget=budget, max_tokens=40)
        prompts = [text["prompt"] for text in published.texts]
        return sum(len(steps_of(backend, prompt, config)) - 1 for prompt in prompts)

    assert forwards("ddtree", 32) <= forwards("dflash", 100)
    if backend.head is not None:
        assert forwards("treeflash", 32) <= forwards("treeflash-chain", 100)
