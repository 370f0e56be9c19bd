"""Recorded runs of the published TreeFlash code: its iterations end at the same tokens.

Each file in `published_runs` has prompts, token ids and accepted lengths of the authors'
`spec_generate` in float32, with the default target and an early drafter of this project, which lies
in the repository's history. Trees are as published with calibration and copies off and with a head
that scores the whole vocabulary after all M previous tokens.
"""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from treeflash.config import DecodeConfig, LoadConfig
from treeflash.decoding import Request, decode
from treeflash.decoding.backend_base import BaseBackend
from treeflash.registry import loader
from treeflash.testing import require
from treeflash.testing.comparisons import tokens_of
from treeflash.testing.pairs import EXAMPLES
from treeflash.text.tokenizer import Tokenizer

require("torch")
require("mlx_lm")

HERE = Path(__file__).parent
DRAFTER = "227d986867f5f9e9b1ff9b5931737164b9620d18"
"""The weights of the recorded runs, as git names them."""
CONFIG = {
    "architectures": ["TreeFlashDraftModel"],
    "block_size": 8,
    "dflash_config": {"mask_token_id": 0, "target_layer_ids": [1, 7, 14, 20, 27]},
    "dtype": "bfloat16",
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "layer_types": ["full_attention"] * 3,
    "max_position_embeddings": 8192,
    "model_type": "qwen3",
    "num_attention_heads": 9,
    "num_hidden_layers": 3,
    "num_key_value_heads": 3,
    "num_target_layers": 30,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
    "treeflash_config": {"ar_approximation": "swiglu"},
    "vocab_size": 49152,
}
TOKENS = 32  # tokens that are decoded of the recorded runs, which have 48
RUNS = {
    f"{path.stem}-{i}": run
    for path in sorted((HERE / "published_runs").glob("*.json"))
    for i, run in enumerate(json.loads(path.read_text()))
}
FIRST_RUN = "treeflash-16-16-0"
# Other runs have larger trees, and trees without the head. MLX takes three minutes for one on a
# CPU, for scores of the whole vocabulary, so it has one, and all with `TREEFLASH_EXAMPLES`.
CASES = [
    pytest.param(
        name,
        RUNS[run],
        id=f"{name}-{run}",
        marks=[] if (name, run) == ("cuda", FIRST_RUN) else [pytest.mark.nightly],
    )
    for name, runs in (("cuda", RUNS), ("mlx", RUNS if EXAMPLES else (FIRST_RUN,)))
    for run in runs
]


@pytest.fixture(scope="module")
def drafter(tmp_path_factory):
    """The folder of the early drafter, from the repository's history."""
    weights = subprocess.run(["git", "cat-file", "blob", DRAFTER], cwd=HERE, capture_output=True)
    if weights.returncode:
        pytest.skip("the weights of the recorded runs need the repository's whole history")
    folder = tmp_path_factory.mktemp("published")
    (folder / "model.safetensors").write_bytes(weights.stdout)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture(scope="module")
def backend(request, smollm2, drafter):
    """A backend with the pair of the recorded runs."""
    with pytest.MonkeyPatch.context() as patch:
        # The check at load takes as long as the runs, which show more.
        patch.setattr(BaseBackend, "check_trees", lambda _: None)
        return loader(request.param)(smollm2, drafter, LoadConfig(device="cpu", dtype="float32"))


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    """The tokenizer of the default target."""
    return Tokenizer.from_folder(smollm2)


def ends(lengths):
    """Where iterations end, as far as no tree was cut at the token limit."""
    found = np.cumsum([1, *lengths])  # the prefill emits the first token
    return found[found <= TOKENS - CONFIG["block_size"]].tolist()


@pytest.mark.parametrize(("backend", "run"), CASES, indirect=["backend"])
def test_iterations_end_where_they_ended_in_the_published_code(backend, tokenizer, run):
    config = DecodeConfig(
        method=run["method"],
        budget=run["budget"],
        top_m=run["top_m"],
        head_vocab=None,
        head_rows=None,
        calibration=False,
        suffix=False,
        max_tokens=TOKENS,
    )
    prompt_ids = tokenizer.chat([{"role": "user", "content": run["prompt"]}])
    prefill, *steps = decode(backend, Request(prompt_ids=prompt_ids, config=config))
    tokens = [*prefill.tokens, *tokens_of(steps)]
    assert tokens == run["token_ids"][:TOKENS]
    expected = ends(run["accepted_lengths"])
    assert len(expected) > 8
    assert ends([len(step.tokens) for step in steps]) == expected
