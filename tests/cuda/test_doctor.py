"""The doctor on pairs that truly draft: a tiny one, trained here, and the default pair."""

import json

import numpy as np
import pytest
from byte_tokens import save_tokenizer

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


@pytest.fixture
def drafter(trained, tmp_path):
    """A copy of it to break."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    return tmp_path


@pytest.fixture
def diagnosis(target, tokenizer, drafter):
    """Examine the pair, each time with the drafter that `wrap` makes of the loaded one."""

    def run(prompting=Prompting(), wrap=lambda drafter: drafter, count=3):  # noqa: B008
        def load(folder):
            backend = load_cuda(target, folder, CPU)
            backend.drafter = wrap(backend.drafter)
            return backend

        return diagnose(
            load, drafter, tokenizer, questions(count, seed=1), prompting=prompting, max_tokens=24
        )

    return run


def problems(diagnosis):
    return {finding.check: finding.message for finding in diagnosis.findings if not finding.ok}


# `test_command_line` examines the same pair.
@pytest.mark.nightly
def test_a_sound_pair(diagnosis):
    found = diagnosis(count=6)
    assert problems(found) == {}
    assert found.marginal[0] > 0.5
    assert all(c > m for c, m in zip(found.corrected, found.marginal, strict=True))


# Likewise; and the drafter takes ten seconds to train.
@pytest.mark.nightly
def test_layers_off_by_one(diagnosis, drafter):
    edit_config(drafter, lambda config: config["dflash_config"].update(target_layer_ids=[2, 4]))
    found = problems(diagnosis())
    assert found.keys() == {"target layers"}
    assert found["target layers"].startswith("target_layer_ids [1, 3]: the target's tokens are")


# Likewise.
@pytest.mark.nightly
def test_mask_token(diagnosis, drafter):
    edit_config(drafter, lambda config: config["dflash_config"].update(mask_token_id=0))
    found = problems(diagnosis())
    assert found.keys() == {"mask token"}
    assert found["mask token"].startswith("mask_token_id 2 (<|stop|>): the target's tokens are")


# The checks themselves are tested in `tests/core/diagnosis`.
@pytest.mark.nightly
def test_chat_template(diagnosis):
    found = problems(diagnosis(Prompting(raw=True)))
    assert found["prompting"].startswith("with the chat template, thinking")


class Wrapped:
    """A drafter whose log probabilities are changed."""

    def __init__(self, drafter):
        self.drafter = drafter

    def draft(self, roots, depths=None):
        return self.drafter.draft(roots, depths)

    def marginals(self, blocks, options):
        return self.drafter.marginals(blocks, options)

    def log_probs(self, block):
        return self.change(self.drafter.log_probs(block))


class Late(Wrapped):
    """Row i is what row i - 1 should be, as where a block is taken to predict the next token."""

    def change(self, rows):
        return np.roll(rows, 1, axis=0)


class Collapsing(Wrapped):
    """From depth 4 on, the rows are of other tokens."""

    def change(self, rows):
        return np.concatenate([rows[:3], np.roll(rows[3:], 7, axis=1)])


# Likewise.
@pytest.mark.nightly
def test_block_offset(diagnosis):
    found = problems(diagnosis(wrap=Late))
    assert "row i of the block taken for depth i - 1" in found["block offset"]


# Likewise.
@pytest.mark.nightly
def test_depths_that_collapse(diagnosis):
    found = problems(diagnosis(wrap=Collapsing))
    assert found.keys() == {"depths"}
    assert "at depth 4; if the drafter was trained with block_size 4" in found["depths"]


# `test_hybrid_commands.py` runs the command, and `tests/core/test_doctor.py` looks at its lines.
@pytest.mark.nightly
def test_command_line(target, trained, tmp_path, capsys, monkeypatch):
    """The target is loaded once, with other drafters later."""
    loads, read = [], loading.load_target
    monkeypatch.setattr(
        loading, "load_target", lambda *args, **more: loads.append(args) or read(*args, **more)
    )
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"id": n, "messages": messages} for n, messages in enumerate(questions(4, seed=2))]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    options = ["--backend", "cuda", "--device", "cpu", "--prompts", str(prompts)]
    code = main([*options, "--target", str(target), "--drafter", str(trained)])
    lines = capsys.readouterr().out.splitlines()
    assert code == 0
    assert len(loads) == 1
    assert len(lines) == 11
    assert all(line.startswith("ok ") for line in lines[2:-1])
    assert lines[-1].startswith("can draft, best first: ")


@pytest.fixture(scope="module")
def default_target(smollm2):
    return load_target(smollm2, LoadConfig(device="cpu", dtype="float32"), pack=True)


@pytest.fixture
def default_drafter(tmp_path):
    """A copy of the drafter of the default target to break."""
    for file in resolve_drafter(None, None).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.fixture
def default_problems(default_target, default_drafter, smollm2):
    """Examine the default pair: problems by check. The target is loaded once."""

    def load(folder):
        drafter, head = read_drafter(folder, default_target)
        default_target.capture(drafter.config.target_layer_ids)
        return CudaBackend(default_target, drafter, head)

    tokenizer = Tokenizer.from_folder(smollm2)
    prompts = [[{"role": "user", "content": text}] for text in PROMPTS[1:2]]
    return lambda: problems(
        diagnose(load, default_drafter, tokenizer, prompts, prompting=Prompting(), max_tokens=16)
    )


# The tiny pair passes the same checks.
@pytest.mark.nightly
def test_the_default_pair(default_problems):
    assert default_problems() == {}


@pytest.mark.nightly
def test_the_default_pair_with_a_word_as_mask_token(default_problems, default_drafter):
    edit_config(default_drafter, lambda config: config["dflash_config"].update(mask_token_id=500))
    found = default_problems()
    assert found["mask token"].startswith("mask_token_id ")
    assert found.keys() <= {"mask token", "depths"}
