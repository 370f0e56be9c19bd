"""Laws of the conformance suite with every Metal kernel in its place.

The kernels run under one schedule here; their own tests run them under all.
"""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import settings
from safetensors.numpy import load_file

from treeflash.config import DecodeConfig
from treeflash.testing import BackendSuite, require
from treeflash.testing.comparisons import generate, prompt_of
from treeflash.testing.models import save, write_target
from treeflash.testing.pairs import repeated

require("mlx_lm")

from laws import LAWS
from metal_executor import DESCENDING, MetalExecutor, install, require_compiler
from stand_ins import stand_in
from treeflash_mlx.backend import load as load_mlx
from treeflash_mlx.metal_kernels import attention

from treeflash.decoding.backend_base import UNQUANTISED_BITS

require_compiler()

OTHERS = {name for name in dir(BackendSuite) if name.startswith("test_")} - LAWS
KERNELS = {
    "treeflash_products_quantised",
    "treeflash_attention_parts",
    "treeflash_attention_merge",
    "treeflash_gated_delta_nodes_by_head",
    "treeflash_gated_delta_replay_by_head",
}
SLOW = {
    "test_iterations_of_each_family_match_reference",
    "test_settings_of_the_tree_match_reference",
    "test_pieces_equal_one_prefill",
    "test_logits_of_a_batch_equal_those_alone",
    "test_texts_of_a_schedule_equal_texts_alone",
    "test_states_equal_prefills_after_forks_and_truncations",
    "test_new_tokens_beside_trees_equal_each_alone",
    "test_a_pass_that_fails_changes_no_sequence",
}
"""Laws that are left to the nightly run, as a pass takes a second.

What they show of batches `test_two_prompts_in_one_pass` shows, too; what they show of texts follows
from logits and states; or they are about arrays that the kernels only read.
"""
GROUP, BITS = 32, 8
EXAMPLES = 1


def write_wide_target(folder, family, **options):
    """Write a target whose shapes the kernels run.

    The weights of a Qwen3 come from a second folder, `quantised`, as numbers of 32 bits.
    """
    size = 128 if family == "mistral" else 64
    shape = {"hidden_size": size, "key_dim": 32, "layers": 3}
    write_target(folder, family, **(shape | options))
    if family != "qwen3":
        return
    config = json.loads((folder / "config.json").read_text())
    tensors, stored = load_file(folder / "model.safetensors"), {}
    for name, tensor in tensors.items():
        stored[name] = tensor
        if tensor.ndim == 2:
            parts = mx.quantize(mx.array(tensor), GROUP, BITS)
            tensors[name] = np.array(mx.dequantize(*parts, GROUP, BITS))
            names = (name, *(name.replace("weight", x) for x in ("scales", "biases")))
            stored |= {n: np.array(part) for n, part in zip(names, parts, strict=True)}
    save(folder, config, tensors)
    save(
        folder.with_name("quantised"),
        config | {"quantization": {"group_size": GROUP, "bits": BITS}},
        stored,
    )


def load_quantised(target, drafter, config):
    """Load with the weights of the drafter's files, as the reference does."""
    config = replace(config, draft_bits=UNQUANTISED_BITS)
    quantised = target.with_name("quantised")
    return load_mlx(quantised if quantised.exists() else target, drafter, config)


@pytest.fixture(scope="module", autouse=True)
def kernels(kept_folder):
    folder = kept_folder("metal_kernels")
    executor = MetalExecutor(folder, schedules=(DESCENDING,), speedup=lambda *_: 2)
    with pytest.MonkeyPatch.context() as patch:
        install(executor, patch)
        stand_in(patch, attention, SPANS={0: 16}, TIMED_COLUMNS=(attention.TIMED_NODES + 1,))
        few = settings(repeated, max_examples=EXAMPLES)
        for name in dir(BackendSuite):
            if hasattr(law := getattr(BackendSuite, name), "hypothesis"):
                stand_in(patch, law, _hypothesis_internal_use_settings=few)
        yield executor


@pytest.mark.sample(1, test_logits_match_reference=None)
class TestConformance(BackendSuite):
    laws = (LAWS - SLOW) | {"test_every_kernel_is_launched"}
    families = ("qwen3", "mistral")
    hybrids = ("qwen3_5",)
    mask_nodes, rounds = 8, 2
    write_target = staticmethod(write_wide_target)
    vars().update(dict.fromkeys(OTHERS))  # not collected

    @pytest.fixture
    def load(self):
        return load_quantised

    def test_every_kernel_is_launched(self, kernels, pair):
        kernels.launches.clear()
        for family in ("qwen3", "qwen3_5"):
            backend = pair(family).tested
            generate(backend, prompt_of(backend), DecodeConfig(budget=16, max_tokens=6))
        assert kernels.launches.keys() >= KERNELS
