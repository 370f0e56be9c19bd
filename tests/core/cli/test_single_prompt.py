"""A text for one prompt: drawings of draft trees, progress, and how near a difference was a tie."""

import io
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from treeflash.cli.single_prompt import (
    SHOWN_NODES,
    compare,
    decision_margin,
    explain,
    run_text,
    spacing,
    summarise,
)
from treeflash.config import SamplingConfig
from treeflash.decoding.loop import Step
from treeflash.decoding.sampling import position_keys, sample_tokens
from treeflash.decoding.tree import DraftTree
from treeflash.language_model import load


@pytest.fixture
def draw(byte_tokenizer):
    """Draw a tree given by its letters, parents and probabilities, as plain lines."""

    def draw(letters, parents, probs, path, bonus="z") -> list[str]:
        ids = [byte_tokenizer.encode(letter)[0] for letter in letters]
        depths = [0]
        for parent in parents[1:]:
            depths.append(depths[parent] + 1)
        tree = DraftTree(
            np.array(ids, np.int32),
            np.array(parents, np.int32),
            np.array(depths, np.int32),
            np.log(np.array(probs, np.float64)),
        )
        tokens = [ids[node] for node in path[1:]]
        if bonus:
            tokens += byte_tokenizer.encode(bonus)
        step = Step(tuple(tokens), {}, tree, np.array(path, np.int32))
        file = io.StringIO()
        Console(file=file, width=200).print(explain(step, 3, byte_tokenizer))
        return file.getvalue().splitlines()

    return draw


def test_tokens_probabilities_path_and_bonus(draw):
    assert [line.rstrip() for line in draw("rab[", [-1, 0, 0, 1], [1, 0.5, 0.3, 0.2], [0, 1])] == [
        "iteration 3: 4 nodes, 1 accepted + bonus",
        "└── ✓ 'r'  root: the last token so far",
        "    ├── ✓ 'a'  50.0%",
        "    │   ├──   '['  20.0% (40.0% after its parent)",
        "    │   └── ✓ 'z'  bonus: the target's own choice",
        "    └──   'b'  30.0%",
    ]


def test_a_root_alone(draw):
    assert draw("r", [-1], [1], [0])[0] == "iteration 3: 1 node, 0 accepted + bonus"


def test_a_large_tree_keeps_the_most_probable_nodes_and_the_accepted_path(draw):
    n = 60
    probs = [1.0, *np.linspace(0.9, 0.02, n - 2), 0.01]
    lines = draw(
        "r" + "a" * (n - 2) + "q", [-1] + [0] * (n - 2) + [n - 2], probs, [0, n - 2, n - 1]
    )
    text = "\n".join(lines)
    shown = SHOWN_NODES + 2
    assert f"60 nodes, 2 accepted + bonus ({n - shown} less probable nodes not shown)" in lines[0]
    assert len(lines) == 1 + shown + 1
    assert "✓ 'q'  1.0% (50.0% after its parent)" in text


def test_no_bonus_if_the_text_ended_on_the_path(draw):
    lines = draw("rab", [-1, 0, 1], [1, 0.5, 0.4], [0, 1, 2], bonus="")
    assert lines[-1].strip() == "└── (the text ended on this path)"


def test_square_brackets_are_not_markup(draw):
    assert "'['" in "".join(draw("r[", [-1, 0], [1, 0.5], [0]))


class RecordedConsole(Console):
    """A console that keeps what its status says."""

    def __init__(self) -> None:
        super().__init__(file=io.StringIO(), markup=False)
        self.said: list[str] = []

    @contextmanager
    def status(self, text: str):
        self.said.append(text)
        yield SimpleNamespace(update=self.said.append)


@pytest.mark.parametrize(("length", "said"), [(512, []), (2500, [0, 2048])])
def test_a_status_says_how_much_of_a_long_prompt_has_run(scripted, capsys, length, said):
    model, console = scripted("An answer."), RecordedConsole()
    model.backend.max_positions = 4000
    stream = model.stream([1] * length, max_tokens=100)
    assert run_text(stream, {}, console, as_json=False, compared=False, explained=0) == 0
    assert capsys.readouterr().out == "An answer.\n"
    assert console.said == [f"reading the prompt: {done:,} of 2,500 tokens" for done in said]


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
