"""The doctor on pairs that truly draft: a tiny one, trained here, and the default pair."""

import json

import numpy as np
import pytest
from byte_tokens import save_tokenizer
from recordings import recording

from treeflash.commands.doctor import PROMPTS, main
from treeflash.config import DecodeConfig, LoadConfig
from treeflash.decoding import Request
from treeflash.diagnosis import diagnose
from treeflash.hub.models import resolve_drafter
from treeflash.testing import require
from treeflash.testing.models import edit_config, write_target
from treeflash.text.prompt import Prompting
from treeflash.text.tokenizer import Tokenizer
from treeflash.training.config import TrainConfig
from treeflash.training.distillation import Response, respond

require("torch")
require("accelerate")

from treeflash_cuda import backend as loading
from treeflash_cuda.backend import CudaBackend
from treeflash_cuda.backend import load as load_cuda
from treeflash_cuda.drafter_loading import read_drafter
from treeflash_cuda.target_loading import load_target
from treeflash_cuda.training.entry import train

CPU = LoadConfig(device="cpu", dtype="float32")
WORDS = ("why", "is", "the", "sea", "so", "blue", "how", "many", "birds", "fly", "in", "winter")
MASK = 2
TRAINING = TrainConfig(
    layers=2,
    block_size=6,
    head_size=48,
    target_layer_ids=(1, 3),
    mask_token_id=MASK,
    loss="ce",
    steps=250,
    sequences=4,
    anchors=8,
    learning_rate=3e-3,
    validation_sequences=0,
)


def questions(count, seed):
    rng = np.random.default_rng(seed)
    return [[{"role": "user", "content": " ".join(rng.choice(WORDS, 4))}] for _ in range(count)]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    write_target(folder, "llama", seed=18, vocab_size=259, layers=6)
    edit_config(folder, lambda config: config.pop("eos_token_id"))
    return save_tokenizer(folder)


@pytest.fixture(scope="module")
def tokenizer(target):
    return Tokenizer.from_folder(target)


@pytest.fixture(scope="module")
def trained(target, tokenizer, tmp_path_factory):
    """A drafter that was trained, for some seconds, on answers through the chat template."""
    config = DecodeConfig(method="ar", max_tokens=48)
    requests = [
        Request(prompt_ids=tuple(tokenizer.chat(question)), config=config)
        for question in questions(128, seed=0)
    ]
    answers = dict(respond(load_cuda(target, None, CPU), requests, 16))
    responses = [
        Response(prompt_ids=request.prompt_ids, response_ids=tuple(answers[n]))
        for n, request in enumerate(requests)
    ]
    folder = tmp_path_factory.mktemp("drafter")
    for _ in train(target, responses, folder, TRAINING, CPU):
        pass
    return folder


def broken(drafter, folder, **settings):
    """A copy of a drafter with other settings."""
    for file in drafter.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    edit_config(folder, lambda config: config["dflash_config"].update(settings))
    return folder


def problems(diagnosis):
    return {finding.check: finding.message for finding in diagnosis.findings if not finding.ok}


# The checks are tested in `tests/core/diagnosis`, and the drafter takes ten seconds to train.
@pytest.mark.nightly
@pytest.mark.parametrize(
    ("settings", "check", "message"),
    [
        ({}, None, None),
        ({"target_layer_ids": [2, 4]}, "target layers", "target_layer_ids [1, 3]: the target's"),
        ({"mask_token_id": 0}, "mask token", "mask_token_id 2 (<|stop|>): the target's tokens"),
    ],
)
def test_a_trained_drafter(target, tokenizer, trained, tmp_path, settings, check, message):
    """Is found sound; and what is wrong with it otherwise."""
    drafter = broken(trained, tmp_path, **settings)
    asked = questions(6, seed=1)
    found = diagnose(
        lambda folder: load_cuda(target, folder, CPU),
        *(drafter, tokenizer, asked),
        prompting=Prompting(),
        max_tokens=24,
    )
    if check is None:
        assert problems(found) == {}
        assert found.marginal[0] > 0.5
        assert all(c > m for c, m in zip(found.corrected, found.marginal, strict=True))
    else:
        assert problems(found).keys() == {check}
        assert problems(found)[check].startswith(message)


# `test_hybrid_commands.py` runs the command, and `tests/core/test_doctor.py` looks at its lines.
@pytest.mark.nightly
def test_command_line(target, trained, tmp_path, capsys):
    """The target is loaded once, with other drafters later."""
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"id": n, "messages": messages} for n, messages in enumerate(questions(4, seed=2))]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    options = ["--backend", "cuda", "--device", "cpu", "--prompts", str(prompts)]
    with recording(loading, "load_target") as loads:
        code = main([*options, "--target", str(target), "--drafter", str(trained)])
    lines = capsys.readouterr().out.splitlines()
    assert code == 0
    assert len(loads) == 1
    assert len(lines) == 11
    assert all(line.startswith("ok ") for line in lines[2:-1])
    assert lines[-1].startswith("can draft, best first: ")


# The tiny pair passes the same checks.
@pytest.mark.nightly
@pytest.mark.parametrize("settings", [{}, {"mask_token_id": 500}])
def test_the_default_pair(smollm2, tmp_path, settings):
    """Is found sound, and a word in the place of the mask token is not."""
    default_target = load_target(smollm2, CPU, pack=True)

    def load(folder):
        drafter, head = read_drafter(folder, default_target)
        default_target.capture(drafter.config.target_layer_ids)
        return CudaBackend(default_target, drafter, head)

    drafter = broken(resolve_drafter(None, None), tmp_path, **settings)
    prompts = [[{"role": "user", "content": text}] for text in PROMPTS[1:2]]
    given = drafter, Tokenizer.from_folder(smollm2), prompts
    found = problems(diagnose(load, *given, prompting=Prompting(), max_tokens=16))
    if settings:
        assert found["mask token"].startswith("mask_token_id ")
        assert found.keys() <= {"mask token", "depths"}
    else:
        assert found == {}
