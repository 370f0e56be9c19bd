"""Commands on pairs that draft: `adapt`, those of training, several processes, and the doctor."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from failures import failing
from small_training import (
    ON_CPU,
    SMALL,
    VOCAB,
    tensors,
    texts_of,
    write_predictable_target,
    write_prompts,
)

from treeflash.commands import adapt, distill, doctor, evaluate, generate, train
from treeflash.commands.doctor import PROMPTS
from treeflash.config import LoadConfig
from treeflash.diagnosis import diagnose, write_changed
from treeflash.drafters.folder import read_tensors
from treeflash.drafters.loading import drafter_config
from treeflash.errors import PromptError
from treeflash.hub.models import resolve_drafter
from treeflash.testing import require
from treeflash.testing.models import write_drafter
from treeflash.text.prompt import Prompting, Row
from treeflash.text.tokenizer import Tokenizer

require("torch")

import torch
from treeflash_cuda.backend import CudaBackend
from treeflash_cuda.drafter_loading import read_drafter
from treeflash_cuda.target_loading import load_target
from treeflash_cuda.training import loop

FEW = ["--max-tokens", "24", "--measured", "3", "--sequences", "4", "--anchors", "8"]
FEW += ["--validation-sequences", "2", "--top-tokens", "8", "--learning-rate", "4e-3"]


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
        arguments += ["--output", str(tmp_path / "out"), *device, *FEW, *options]
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
        failing(adapt.cli, "load_model", KeyboardInterrupt),
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
        (["--output", str(target)], "has the target itself; give another"),
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


TOKENS = "12"
"""New tokens of a text."""


def test_a_hybrid_target_from_prompts_to_drafted_text(tmp_path, capsys):
    target = write_predictable_target(tmp_path / "target", "qwen3_5")
    pair = ["--target", str(target), *ON_CPU]
    prompts = write_prompts(tmp_path / "prompts.jsonl", (f"word {n}" for n in range(10)))
    responses = tmp_path / "responses.jsonl"
    writing = ["--prompts", str(prompts), "--output", str(responses), "--max-tokens", TOKENS]
    assert distill.main([*writing, "--temperature", "1", *pair]) == 0
    records = responses.read_text().splitlines()
    assert len(records) == 10

    kept, held_out = tmp_path / "kept.jsonl", tmp_path / "held_out.jsonl"
    kept.write_text("\n".join(records[:6]) + "\n")
    held_out.write_text("\n".join(records[6:]) + "\n")
    config, drafter = tmp_path / "train.toml", tmp_path / "drafter"
    config.write_text(SMALL)
    learning = ["--responses", str(kept), "--validation", str(held_out), "--config", str(config)]
    learning += ["--output", str(drafter), "--steps", "8", "--init", "random"]
    assert train.main([*learning, *pair]) == 0
    capsys.readouterr()

    pair += ["--drafter", str(drafter)]
    few = write_prompts(tmp_path / "few.jsonl", ["new 0", "new 1"])
    measuring = ["--prompts", str(few), "--max-tokens", TOKENS]
    measuring += ["--budgets", "16", "--methods", "treeflash"]
    assert evaluate.main([*measuring, *pair]) == 0
    capsys.readouterr()
    texts = []
    for method in ("ar", "treeflash"):
        options = ["hello", "--max-tokens", TOKENS, "--method", method, "--budget", "8", *pair]
        assert generate.main(options) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert doctor.main([*pair, "--max-tokens", TOKENS]) in (0, 1)


FSDP = """\
compute_environment: LOCAL_MACHINE
use_cpu: true
num_processes: 2
distributed_type: FSDP
fsdp_config:
  fsdp_version: 2
  fsdp_reshard_after_forward: true
  fsdp_state_dict_type: FULL_STATE_DICT
  fsdp_auto_wrap_policy: NO_WRAP
"""


# Three processes import PyTorch.
@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_one_drafter(kind, tmp_path):
    """One process with twice the sequences gives the same result."""
    config = tmp_path / "train.toml"
    # All positions are anchors, as each process samples its own.
    config.write_text(SMALL.replace("anchors = 16", "anchors = 99") + "steps = 4\nsave_every = 2\n")
    launch = tmp_path / "accelerate.yaml"
    launch.write_text(FSDP)
    target = write_predictable_target(tmp_path / "target", "llama")
    uneven = tmp_path / "uneven.jsonl"
    texts = texts_of(*[(9, 2 + 5 * n % 47) for n in range(160)], vocab_size=VOCAB)
    rows = ({"prompt_ids": x.prompt_ids, "response_ids": x.response_ids} for x in texts)
    uneven.write_text("".join(json.dumps(row) + "\n" for row in rows))
    launchers = {
        "ddp": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
        # `accelerate launch` starts several processes on CPUs for FSDP alone.
        "fsdp": ["accelerate.commands.launch", "--config_file", str(launch)],
    }

    cache = ["--cache-gb", "1"]

    def start(output, *options):
        return [
            "--responses", str(uneven), "--config", str(config), "--output", str(output),
            "--target", str(target), *ON_CPU, "--learning-rate", "1e-3", *cache, *options,
        ]  # fmt: skip

    together = tmp_path / "together"
    command = [sys.executable, "-m", *launchers[kind], "-m", "treeflash.train", *start(together)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = tmp_path / "alone"
    assert train.main(start(alone, "--sequences", "8")) == 0
    state = json.loads((together / "state" / "run.json").read_text())
    assert state["processes"] == 2
    expected, found = (
        [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        for folder in (alone, together)
    )
    for left, right in zip(expected, found, strict=True):
        # The gradient and the loss are means over the tokens of both processes.
        assert right["gradient_norm"] == pytest.approx(left["gradient_norm"], rel=1e-3)
        assert right["loss"] == pytest.approx(left["loss"], rel=1e-3)
    validation = found[-1]["validation"]["kl_corrected"]
    assert validation == pytest.approx(expected[-1]["validation"]["kl_corrected"], rel=1e-2)
    shapes = [{n: t.shape for n, t in read_tensors(f).items()} for f in (alone, together)]
    assert shapes[0] == shapes[1]


# The tiny pair passes the same checks.
@pytest.mark.nightly
@pytest.mark.parametrize("settings", [{}, {"mask_token_id": 500}])
def test_the_default_pair(smollm2, tmp_path, settings):
    """Is found sound, and a word in the place of the mask token is not."""
    target = load_target(smollm2, LoadConfig(device="cpu", dtype="float32"), pack=True)

    def load(folder):
        drafter, head = read_drafter(folder, target)
        target.capture(drafter.config.target_layer_ids)
        return CudaBackend(target, drafter, head)

    write_changed(resolve_drafter(None, None), tmp_path, settings)
    prompts = [[{"role": "user", "content": text}] for text in PROMPTS[1:2]]
    given = tmp_path, Tokenizer.from_folder(smollm2), prompts
    diagnosis = diagnose(load, *given, prompting=Prompting(), max_tokens=16)
    found = {x.check: x.message for x in diagnosis.findings if not x.ok}
    if settings:
        assert found["mask token"].startswith("mask_token_id ")
        assert found.keys() <= {"mask token", "depths"}
    else:
        assert found == {}
