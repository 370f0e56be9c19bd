"""Laws of the conformance suite with every Metal kernel in its place.

The kernels run under one schedule here; their own tests run them under all.
"""

import json

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import settings
from safetensors.numpy import load_file

from treeflash.testing import BackendSuite, require
from treeflash.testing.models import save, write_target
from treeflash.testing.pairs import repeated

require("mlx_lm")

from metal_executor import DESCENDING, MetalExecutor, install, require_compiler
from treeflash_mlx.backend import load as load_mlx
from treeflash_mlx.metal_kernels import attention

require_compiler()

LAWS = {
    # Trees, paths, windows
    "test_logits_match_reference",
    "test_depth_beyond_the_window",
    "test_verifier_cache_equals_prefill",
    "test_verifying_again_replaces_the_tree",
    "test_a_tree_that_is_not_committed_leaves_no_trace",
    "test_settings_of_the_tree_match_reference",
    "test_iterations_of_each_family_match_reference",
    # Recurrent states: commits, snapshots, forks
    "test_states_match_reference",
    "test_part_of_a_chain_can_be_committed",
    "test_texts_shorter_than_a_convolution",
    "test_a_state_is_restored_where_a_snapshot_was_taken",
    "test_snapshots_of_dropped_tokens_are_dropped",
    "test_two_prompts_in_one_pass",
    "test_a_prompt_that_was_run_before_is_forked",
    # Batches, chunks and schedules
    "test_logits_of_a_batch_equal_those_alone",
    "test_states_equal_prefills_after_forks_and_truncations",
    "test_texts_of_a_schedule_equal_texts_alone",
    "test_pieces_equal_one_prefill",
}
OTHERS = {name for name in dir(BackendSuite) if name.startswith("test_")} - LAWS
KERNELS = {
    "treeflash_products",
    "treeflash_attention_parts",
    "treeflash_attention_merge",
    "treeflash_gated_delta_nodes_by_head",
    "treeflash_gated_delta_replay_by_head",
}
GROUP, BITS = 32, 8
EXAMPLES = 1


def write_wide_target(folder, family, **options):
    """Write a target whose shapes the kernels run.

    The weights of a Qwen3 come from a second folder, `quantised`, as numbers of 32 bits.
    """
    size = 128 if family == "mistral" else 64
    write_target(folder, family, **({"hidden_size": size, "key_dim": 32} | options))
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
    quantised = target.with_name("quantised")
    return load_mlx(quantised if quantised.exists() else target, drafter, config)


@pytest.fixture(scope="module", autouse=True)
def _kernels(metal_kernels_folder):
    executor = MetalExecutor(metal_kernels_folder, schedules=(DESCENDING,))
    with pytest.MonkeyPatch.context() as patch:
        install(executor, patch, speedup=2)
        patch.setattr(attention, "SPAN", 16)
        patch.setattr(attention, "RACED_COLUMNS", (attention.RACED_NODES + 1,))
        patch.setattr("treeflash.testing.pairs.write_target", write_wide_target)
        patch.setattr("treeflash.testing.trees.MASK_NODES", 16)
        patch.setattr("treeflash.testing.states.ROUNDS", 3)
        few = settings(repeated, max_examples=EXAMPLES)
        for name in dir(BackendSuite):
            if hasattr(law := getattr(BackendSuite, name), "hypothesis"):
                patch.setattr(law, "_hypothesis_internal_use_settings", few)
        yield
    assert executor.launches.keys() >= KERNELS


@pytest.mark.filterwarnings("ignore:MLX was imported before treeflash_mlx")  # of TF32, on GPUs
class TestConformance(BackendSuite):
    families = ("qwen3", "mistral")
    hybrids = ("qwen3_5",)
    vars().update(dict.fromkeys(OTHERS))  # not collected

    @pytest.fixture
    def load(self):
        return load_quantised
