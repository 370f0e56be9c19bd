"""Rotary positions of images are those that transformers computes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Glm4vConfig, Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3_5Config, Qwen3VLConfig
from transformers.models.glm4v.modeling_glm4v import Glm4vModel
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5Model
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

from treeflash.decoding.images import rotary_positions
from treeflash.testing.pairs import EXAMPLES, repeated

MODELS = {
    Qwen2VLModel: Qwen2VLConfig,
    Qwen2_5_VLModel: Qwen2_5_VLConfig,
    Qwen3VLModel: Qwen3VLConfig,
    Qwen3_5Model: Qwen3_5Config,
    Glm4vModel: Glm4vConfig,
}


@pytest.fixture(scope="module", params=MODELS, ids=lambda x: x.__name__)
def model(request):
    with torch.device("meta"):  # positions depend on the configuration alone
        kind, config = request.param, MODELS[request.param]()
        model = kind.__new__(kind)
        torch.nn.Module.__init__(model)
    model.config = config
    return model


@settings(repeated, max_examples=EXAMPLES or 25)
@given(
    st.lists(
        st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=3
    ),
    st.integers(0, 3),
)
def test_positions_are_those_of_transformers(model, images, end):
    merge = model.config.vision_config.spatial_merge_size
    is_feature = []
    for text, height, width in images:
        is_feature += [False] * text + [True] * (height * width)
    is_feature = np.array(is_feature + [False] * end)
    grids = np.array([(1, height * merge, width * merge) for _, height, width in images])
    expected, deltas = model.get_rope_index(
        torch.zeros(1, len(is_feature), dtype=torch.long),
        torch.tensor(is_feature).int()[None],
        torch.tensor(grids),
    )
    actual = rotary_positions(is_feature, grids, merge)
    assert (actual == expected[:, 0].numpy()).all()
    assert actual.max() + 1 - len(is_feature) == deltas.item()
