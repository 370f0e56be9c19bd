"""Near the last position that a model has, drafting changes nothing either."""

import pytest

from treeflash.config import DecodeConfig, LoadConfig
from treeflash.decoding import Request, decode
from treeflash.errors import PromptError
from treeflash.testing import require
from treeflash.testing.comparisons import generate
from treeflash.testing.models import write_drafter

require("torch")

import torch
import transformers
from treeflash_cuda.backend import load

pytestmark = pytest.mark.sample(1)

CPU = LoadConfig(device="cpu", dtype="float32")
POSITIONS = 32
SHAPE = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": POSITIONS,
}


def write(folder, config):
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder / "target")
    write_drafter(folder / "drafter", folder / "target", seed=2)
    return load(folder / "target", folder / "drafter", CPU)


@pytest.fixture(scope="module", params=["a table of positions", "frequencies by the last position"])
def backend(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    if request.param.startswith("a table"):
        positions = {"max_position_embeddings": POSITIONS, "word_embed_proj_dim": 32}
        return write(folder, transformers.OPTConfig(**SHAPE, **positions, ffn_dim=64))
    positions = {"original_max_position_embeddings": POSITIONS, "rope_parameters": LONGROPE}
    shape = {**SHAPE, "max_position_embeddings": 4 * POSITIONS, "intermediate_size": 64}
    return write(folder, transformers.Phi3Config(**shape, **positions, eos_token_id=1))


def test_texts_that_reach_the_last_position_are_those_of_plain_decoding(backend):
    assert backend.max_positions == POSITIONS
    for first in (3, 5):
        prompt = list(range(first, first + 5))
        plain = generate(backend, prompt, DecodeConfig(method="ar"))
        assert len(plain) == POSITIONS - len(prompt)
        for method in ("dflash", "ddtree", "treeflash"):
            config = DecodeConfig(method=method, budget=32)
            assert generate(backend, prompt, config) == plain, method


def test_longer_prompts_are_refused(backend):
    with pytest.raises(PromptError, match=f"the target's limit is {POSITIONS}"):
        decode(backend, Request(prompt_ids=[5] * POSITIONS, config=DecodeConfig(method="ar")))
