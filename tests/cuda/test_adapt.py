"""`treeflash adapt` on a tiny pair: cost, measurements, training within limits, and resuming."""

import json
import shutil

import numpy as np
import pytest
from failures import failing
from small_training import ON_CPU, VOCAB, write_predictable_target, write_prompts

from treeflash.commands import adapt
from treeflash.drafters.folder import read_tensors
from treeflash.drafters.loading import drafter_config
from treeflash.errors import PromptError
from treeflash.testing import require
from treeflash.testing.models import write_drafter
from treeflash.text.prompt import Row

require("torch")

import torch
from treeflash_cuda.training import loop

SMALL = ["--max-tokens", "24", "--measured", "3", "--sequences", "4", "--anchors", "8"]
SMALL += ["--validation-sequences", "2", "--top-tokens", "8", "--learning-rate", "4e-3"]


def tensors(folder):
    return {name.removeprefix("model."): x for name, x in read_tensors(folder).items()}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return write_predictable_target(tmp_path_factory.mktemp("target"), "llama")


@pytest.fixture
def run(target, tmp_path, capsys):
    """Adapt a random drafter to the target: exit status, standard output and standard error."""

    def run(*options, format="treeflash", device=ON_CPU):
        drafter = tmp_path / format
        if not drafter.exists():
            write_drafter(drafter, target, seed=2, format=format, block_size=6, layers=2)
        words = ("".join(chr(97 + n * k % 26) for k in range(1, 6)) for n in range(14))
        prompts = write_prompts(tmp_path / "prompts.jsonl", words)
        arguments = ["--target", str(target), "--drafter", str(drafter), "--prompts", str(prompts)]
        arguments += ["--output", str(tmp_path / "out"), *device, *SMALL, *options]
        capsys.readouterr()
        return adapt.main(arguments), *capsys.readouterr()

    return run


# A command in a process of its own, for a line.
@pytest.mark.nightly
@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_the_missing_gpu_is_told_once(run, caplog):
    assert run("--steps", "2", device=["--dtype", "float32"])[0] == 0
    assert caplog.text.count("running on the CPU") == 1


def test_too_few_prompts_to_train_on_are_refused_before_anything_is_answered(run, tmp_path):
    code, _, error = run("--steps", "2", "--validation-sequences", "11")
    assert code == 2
    assert error == (
        "error: 11 answers leave nothing to train on after 11 are held out for validation; add "
        "prompts, or lower --validation-sequences\n"
    )
    assert not (tmp_path / "out").exists()


def test_a_drafter_gains_and_its_card_says_how_much(run, tmp_path):
    out = tmp_path / "out"
    with failing(adapt, "show_records", KeyboardInterrupt):
        code, _, error = run("--steps", "24")
    assert code == 130
    assert "run the same command again to resume" in error
    assert "answers: at most 264 tokens to 11 prompts, in 24 passes" in error
    assert "block efficiency: at most 144 tokens, 3 prompts before and after" in error
    assert "10 minutes or 24 steps at most; a step runs the target over 4 answers" in error
    count = sum(tensor.size for tensor in read_tensors(tmp_path / "treeflash").values())
    assert f"for {count:,} trained parameters" in error
    before = json.loads((out / "before.json").read_text())
    answers = (out / "answers.jsonl").read_text()
    trained = {json.loads(line)["id"] for line in answers.splitlines()}
    assert len(trained) == 11
    assert not trained & set(before["prompts"])

    code, table, error = run("--steps", "24")
    assert code == 0
    assert (out / "answers.jsonl").read_text() == answers
    lines = table.splitlines()
    ratio = float(lines[-1].split("|")[3].split()[0])
    assert ratio > 1.2, table
    card = (out / "README.md").read_text()
    assert card.endswith("\n".join(lines) + "\n")
    assert "After 24 of 24 steps" in card

    with (  # a finished run is only reported
        failing(adapt.Evaluation, "run", KeyboardInterrupt),
        failing(loop, "load_target", KeyboardInterrupt),
    ):
        assert run("--steps", "24")[1] == table
    assert (out / "README.md").read_text() == card
    code, _, error = run("--steps", "24", "--temperature", "0", "1")
    assert code == 2
    assert "answers.jsonl has lines generated with temperature 0.0, not 1" in error


def test_a_prompt_that_measures_is_not_trained_on_under_another_id():
    turns = [(({"role": "user", "content": text},),) for text in "abacadae"]
    rows = [Row(id=n, turns=turn) for n, turn in enumerate(turns)]
    measured, others = adapt.divide_prompts(rows, 9)
    assert [row.id for row in measured] == [0, 1]
    assert [row.id for row in others] == [3, 5, 7]
    with pytest.raises(PromptError, match="4 prompts or more, and not all of them equal; got 4"):
        adapt.divide_prompts([rows[0]] * 4, 1)


def test_what_cannot_be_adapted_is_one_line(run, target, tmp_path):
    for options, message in (
        (["--measured", "0"], "measured must be 1 or more, got 0"),
        (["--max-tokens", "1"], "max_tokens must be 2 or more"),
        (["--output", str(tmp_path / "treeflash")], "has the drafter itself; give another"),
    ):
        code, _, error = run(*options)
        assert (code, error.count("\n"), message in error) == (2, 1, True)
    (tmp_path / "out").mkdir()
    for text, message in (
        ('{"target', "before.json cannot be read as JSON"),
        ("{}", "before.json was measured with target None, not "),
    ):
        (tmp_path / "out" / "before.json").write_text(text)
        code, _, error = run()
        assert (code, message in error) == (2, True)
    shutil.copytree(target, tmp_path / "ends")
    ends = json.dumps({"eos_token_id": list(range(VOCAB))})
    (tmp_path / "ends" / "generation_config.json").write_text(ends)
    options = ["--target", str(tmp_path / "ends"), "--output", str(tmp_path / "other")]
    code, _, error = run(*options, "--head", "none")
    assert (code, "every answer ended with its first token" in error) == (2, True)
    kept = [x for name, x in tensors(tmp_path / "treeflash").items() if "ar_approx" not in name]
    assert f"for {sum(tensor.size for tensor in kept):,} trained parameters" in error


# Likewise in `test_training.py`, without the command.
@pytest.mark.nightly
def test_a_new_head_is_trained_alone(run, tmp_path):
    code, _, error = run("--steps", "2", "--head", "swiglu", format="dflash")
    assert code == 0, error
    assert drafter_config(tmp_path / "out").head == "swiglu"
    before, after = tensors(tmp_path / "dflash"), tensors(tmp_path / "out")
    frozen = sum(tensor.size for tensor in before.values())
    head = sum(tensor.size for name, tensor in after.items() if name not in before)
    assert f"for {head:,} trained parameters" in error
    assert f"for {frozen:,} frozen ones" in error
    name = "layers.0.self_attn.q_proj.weight"
    assert np.allclose(before[name], after[name], rtol=1e-2)
