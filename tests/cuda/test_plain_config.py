"""Configurations that are read without transformers, of which a command imports no models then."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import pytest
from byte_tokens import SPECIAL, save_tokenizer

from treeflash.testing import require, write_drafter, write_target

require("torch")

import torch
from transformers import AutoConfig
from treeflash_cuda.decoder.facts import DecoderFacts, decoder_facts
from treeflash_cuda.decoder.plain_config import (
    NO_BIASES,
    SETTINGS,
    SIZES,
    PlainConfig,
    plain_config,
    target_config,
)
from treeflash_cuda.target import max_positions, read_model_config

SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "dtype": "bfloat16",
}
CASES = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("llama", {"head_dim": 12, "rope_parameters": {"rope_type": "default", "rope_theta": 99.0}}),
    ("mistral", {}),
    ("mistral", {"sliding_window": None, "max_position_embeddings": 100}),
    ("qwen2", {"sliding_window": 8}),
    ("qwen3", {"head_dim": 16, "attention_bias": True}),
    ("smollm3", {"no_rope_layers": [1, 0, 1, 1], "mlp_bias": True}),
    ("smollm3", {}),
]


def write(folder, family, settings):
    """Save a configuration as transformers does, and return the file's settings."""
    AutoConfig.for_model(family, **SMALL | settings).save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def facts_of(config):
    """What layers of our own read of a configuration."""
    facts = decoder_facts(config)
    assert isinstance(facts, DecoderFacts)
    found = {field.name: getattr(facts, field.name) for field in fields(facts)}
    found["ropes"] = [(rope.frequencies.tolist(), rope.scale) for rope in facts.ropes]
    names = "model_type", "num_attention_heads", "num_key_value_heads", "dtype"
    return found, max_positions(config), [getattr(config, name) for name in names]


@pytest.mark.parametrize(("family", "settings"), CASES)
def test_a_plain_file_gives_the_facts_that_transformers_gives(tmp_path, family, settings):
    write(tmp_path, family, settings)
    config = target_config(tmp_path)
    assert isinstance(config, PlainConfig)
    assert config.dtype == torch.bfloat16
    assert facts_of(config) == facts_of(read_model_config(tmp_path))


def test_a_file_that_names_no_biases_has_none(tmp_path):
    saved = write(tmp_path, "llama", {})
    less = {key: value for key, value in saved.items() if key not in NO_BIASES}
    (tmp_path / "config.json").write_text(json.dumps(less))
    config = target_config(tmp_path)
    assert isinstance(config, PlainConfig)
    assert facts_of(config) == facts_of(read_model_config(tmp_path))


def test_a_list_that_is_null_is_left_to_transformers(tmp_path):
    assert plain_config(write(tmp_path, "smollm3", {}) | {"no_rope_layers": None}) is None


@pytest.mark.parametrize("family", SETTINGS)
def test_what_a_file_leaves_out_is_left_to_transformers(tmp_path, family):
    saved = write(tmp_path, family, {})
    assert plain_config(saved) is not None
    named = [*SIZES, "rms_norm_eps", "hidden_act", "tie_word_embeddings", *SETTINGS[family]]
    for name in (*named, "rope_parameters"):
        less = {key: value for key, value in saved.items() if key != name}
        assert plain_config(less) is None, name


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 9.0, "factor": 2.0}}),
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}),
        ("llama", {"partial_rotary_factor": 0.5}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8}),
        ("qwen3", {"layer_types": ["sliding_attention", *["full_attention"] * 3]}),
        ("granite", {}),
    ],
)
def test_other_forms_are_left_to_transformers(tmp_path, family, settings):
    write(tmp_path, family, settings)
    assert not isinstance(target_config(tmp_path), PlainConfig)


MODELS = {
    *("accelerate", "sympy", "torch._dynamo", "torch.distributed.tensor", "torchvision"),
    *("transformers.masking_utils", "transformers.modeling_utils"),
}
"""What transformers imports with its first model, which takes most of the time of a short run."""
RUN = """
import json, sys
from treeflash.__main__ import main

for command in json.loads(sys.argv[1]):
    sys.argv = ["treeflash", *command]
    try:
        assert main() == 0
    except SystemExit as end:  # of `--help`
        assert not end.code
print("imported:", *sys.modules)
"""


def modules_of(*commands: Sequence[str]) -> set[str]:
    """Run commands in a process of their own, and return the modules that it has imported."""
    told = [sys.executable, "-c", RUN, json.dumps(commands)]
    done = subprocess.run(told, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("imported:")[2].split())


def modules_of_generate(family: str, folder: Path, *dtypes: str) -> set[str]:
    """Return the modules that `generate` imports for a tiny pair, in these dtypes."""
    target, drafter = folder / "target", folder / "drafter"
    write_target(target, family, seed=3, vocab_size=len(SPECIAL) + 256)
    write_drafter(drafter, target, seed=4)
    save_tokenizer(target)
    given = "generate", "Hi", "--target", str(target), "--drafter", str(drafter)
    given += "--max-tokens", "4", "--budget", "4"  # a number, for which no costs are measured
    given += "--device", "cpu", "--backend", "cuda", "--dtype"
    return modules_of(*((*given, dtype) for dtype in dtypes))


def test_layers_of_our_own_import_no_model_of_transformers(tmp_path):
    found = modules_of_generate("llama", tmp_path, "float32", "bfloat16")
    assert "treeflash_cuda.decoder.model" in found
    assert not found & MODELS


# Six seconds; a target that ran without them would fail in every other test.
@pytest.mark.nightly
def test_another_target_imports_the_models_of_transformers(tmp_path):
    """The names above are still names of what transformers imports."""
    found = modules_of_generate("granitemoehybrid", tmp_path, "float32")
    assert MODELS - {"accelerate", "torchvision"} <= found  # these two may not be installed


def test_the_help_of_a_command_imports_no_framework():
    assert not modules_of(("generate", "--help")) & {"torch", "transformers"}
