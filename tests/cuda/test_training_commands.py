"""The command lines as a user runs them: from prompts to a trained drafter."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
from small_training import CPU, ON_CPU, SMALL, write_predictable_target, write_prompts

from treeflash.commands import distill, train
from treeflash.config import DecodeConfig, SamplingConfig
from treeflash.decoding import Request, decode
from treeflash.drafters.folder import read_tensors
from treeflash.testing import require

require("torch")

import psutil
from treeflash_cuda.backend import load


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return write_predictable_target(tmp_path_factory.mktemp("target"), "llama")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    random = np.random.default_rng(1)
    words = ("".join(map(chr, 97 + row)) for row in random.integers(0, 26, (160, 5)))
    return write_prompts(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", words)


@pytest.fixture(scope="module")
def responses(target, prompts, tmp_path_factory):
    output = tmp_path_factory.mktemp("responses") / "responses.jsonl"
    options = ["--prompts", str(prompts), "--output", str(output), "--max-tokens", "48"]
    options += ["--temperature", "1"]
    assert distill.main([*options, "--target", str(target), *ON_CPU]) == 0
    return output


def efficiency(target, drafter, prompts, **settings):
    """Block efficiency on held-out prompts."""
    backend = load(target, drafter, CPU)
    lengths = []
    for prompt in prompts:
        sampling = SamplingConfig(temperature=1.0, seed=1)
        config = DecodeConfig(max_tokens=40, sampling=sampling, suffix=False, **settings)
        lengths += [
            len(step.tokens) for step in decode(backend, Request(prompt_ids=prompt, config=config))
        ][1:]
    return float(np.mean(lengths))


# `test_hybrid_commands.py` goes the same way with another target.
@pytest.mark.nightly
@pytest.mark.parametrize("steps", [60, 600])
def test_from_prompts_to_a_drafter(steps, target, responses, tmp_path, capsys):
    records = [json.loads(line) for line in responses.read_text().splitlines()]
    kept, held_out = tmp_path / "kept.jsonl", tmp_path / "held_out.jsonl"
    for path, part in ((kept, records[:150]), (held_out, records[150:])):
        path.write_text("".join(json.dumps(record) + "\n" for record in part))
    config, output = tmp_path / "train.toml", tmp_path / "drafter"
    config.write_text(SMALL)
    options = ["--responses", str(kept), "--validation", str(held_out)]
    options += ["--config", str(config), "--output", str(output)]
    assert train.main([*options, "--target", str(target), "--steps", str(steps), *ON_CPU]) == 0
    assert "pass it as --drafter" in capsys.readouterr().err
    fresh = [record["prompt_ids"] for record in records[150:]]
    # With more nodes both trees have nearly everything that the block allows.
    tree = efficiency(target, output, fresh, method="treeflash", budget=8)
    assert tree > 5
    assert tree > efficiency(target, output, fresh, method="ddtree", budget=8)
    assert efficiency(target, output, fresh, method="dflash", budget=16) > 4
    assert len((output / "log.jsonl").read_text().splitlines()) == steps
    assert list((output / "tensorboard").iterdir())


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
def test_two_processes_train_one_drafter(kind, target, responses, tmp_path, run_processes):
    """One process with twice the sequences gives the same result."""
    config = tmp_path / "train.toml"
    # All positions are anchors, as each process samples its own.
    config.write_text(SMALL.replace("anchors = 16", "anchors = 99") + "steps = 4\nsave_every = 2\n")
    launch = tmp_path / "accelerate.yaml"
    launch.write_text(FSDP)
    uneven = tmp_path / "uneven.jsonl"
    records = [json.loads(line) for line in responses.read_text().splitlines()]
    for n, record in enumerate(records):
        record["response_ids"] = record["response_ids"][: 2 + 5 * n % 47]
    uneven.write_text("".join(json.dumps(record) + "\n" for record in records))
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
    done = run_processes(command, 600)
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


# For a fixture of nightly tests.
@pytest.mark.nightly
def test_processes_that_hang_are_all_killed(run_processes, tmp_path, monkeypatch):
    """Processes in their own session, as launchers start them, are killed too."""
    started = tmp_path / "started"
    code = f"""
import os, pathlib, subprocess, sys, time
worker = [sys.executable, "-c", "import time; time.sleep(600)"]
child = subprocess.Popen(worker, start_new_session=True)
file = pathlib.Path({str(started)!r})
file.with_suffix(".new").write_text(f"{{os.getpid()}} {{child.pid}}")
file.with_suffix(".new").rename(file)
time.sleep(600)
"""
    found = []

    def hang(process, timeout):
        while not started.exists():
            time.sleep(0.05)
        found.extend(psutil.Process(int(pid)) for pid in started.read_text().split())
        raise subprocess.TimeoutExpired(process.args, timeout)

    monkeypatch.setattr(subprocess.Popen, "communicate", hang)
    with pytest.raises(subprocess.TimeoutExpired):
        run_processes([sys.executable, "-c", code], 60)
    assert len(found) == 2
    _, alive = psutil.wait_procs(found, timeout=120)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
