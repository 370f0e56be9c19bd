"""The NumPy backend passes the suite that it is the oracle of."""

import numpy as np
import pytest
from laws import DRAFTING, LAWS, VARIANT_SAMPLE

from treeflash.decoding.session import SequenceSession
from treeflash.decoding.tree import DraftTree
from treeflash.drafters.folder import read_config, read_tensors
from treeflash.errors import CheckpointError, UnsupportedModelError
from treeflash.reference.backend import load as load_reference
from treeflash.reference.target import Target
from treeflash.testing import DIALECTS, HYBRID_FAMILIES, BackendSuite
from treeflash.testing.models import EXPERTS, edit_config, save, write_target
from treeflash.testing.pairs import LOAD

TREE = DraftTree.chain(np.arange(5, dtype=np.int32))


@VARIANT_SAMPLE
class TestConformance(BackendSuite):
    """The laws: it is itself what the other tests of the suite compare with."""

    laws = LAWS | DRAFTING | {"test_tokens_have_the_targets_distribution"}
    families = (*BackendSuite.families, "qwen3_sliding")
    hybrids = HYBRID_FAMILIES
    dialects = tuple(DIALECTS)

    @pytest.fixture
    def load(self):
        return load_reference


@pytest.mark.parametrize(
    ("family", "changes", "error", "message"),
    [
        ("llama", {"model_type": "phi3"}, UnsupportedModelError, r"supports llama, .* not 'phi3'"),
        ("llama", {"hidden_act": "gelu"}, UnsupportedModelError, "not this variant of llama; use"),
        ("qwen3", {"hidden_size": None}, CheckpointError, r"config\.json lacks 'hidden_size'$"),
    ],
)
def test_other_configurations_are_refused_in_one_line(tmp_path, family, changes, error, message):
    write_target(tmp_path, family, seed=0)
    config = {key: x for key, x in (read_config(tmp_path) | changes).items() if x is not None}
    save(tmp_path, config, read_tensors(tmp_path))
    with pytest.raises(error, match=message):
        Target(tmp_path)


def test_layers_of_qwen3_5_follow_from_the_interval(tmp_path):
    """Files from before `layer_types`."""
    write_target(tmp_path, "qwen3_5", seed=0)
    expected = Target(tmp_path)
    edit_config(tmp_path, lambda config: config.get("text_config", config).pop("layer_types"))
    assert Target(tmp_path).recurrent.keys() == expected.recurrent.keys() == {0, 2}


def test_weights_of_experts_are_normalised_only_if_they_are_meant_to_be(tmp_path):
    """The weights of all experts have the sum 1."""

    def logits(chosen, normalised):
        settings = {"num_experts_per_tok": chosen, "norm_topk_prob": normalised}
        edit_config(tmp_path, lambda config: config.update(settings))
        return SequenceSession(load_reference(tmp_path, None, LOAD)).logits(TREE)

    write_target(tmp_path, "qwen3_moe", seed=0)
    np.testing.assert_allclose(logits(EXPERTS, False), logits(EXPERTS, True), atol=1e-5)
    assert np.abs(logits(2, False) - logits(2, True)).max() > 0.1


def test_a_missing_tensor_of_a_recurrent_layer_is_named(tmp_path):
    write_target(tmp_path, "granitemoehybrid", seed=0)
    tensors = read_tensors(tmp_path)
    del tensors["model.layers.0.mamba.A_log"]
    save(tmp_path, read_config(tmp_path), tensors)
    with pytest.raises(CheckpointError, match=r"lacks the tensor model\.layers\.0\.mamba\.A_log$"):
        Target(tmp_path)
