"""mlx-vlm's processors and towers against transformers', on the same pictures."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

for package in ("mlx_vlm", "torchvision"):
    pytest.importorskip(package)

import mlx_processors
import numpy as np
import torch
import transformers
from image_models import PROCESSORS, random_model, save_published
from treeflash_cuda.images import Features, device_inputs

from treeflash.decoding.families import FAMILIES, ImageFamily
from treeflash.decoding.image_processor import Processor, placeholder_id
from treeflash.drafters.folder import read_config

pytestmark = pytest.mark.nightly

SIZES = {
    "gemma3": [(32, 32), (32, 32)],
    "gemma4": [(64, 64), (56, 72)],
    "lfm2_vl": [(32, 32), (16, 32)],
}
"""Sizes of pictures that a processor does not change."""


@pytest.fixture(scope="module")
def process():
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize(
    "family", [name for name in PROCESSORS if "mlx" in FAMILIES[name].images.backends]
)
def test_tokens_and_features_are_those_of_transformers(family, process, tmp_path):
    transformers.logging.set_verbosity_error()
    model, own = random_model(family), PROCESSORS[family]()
    save_published(family, model, tmp_path)
    own.save_pretrained(tmp_path)
    sizes = SIZES.get(family, [(40, 56), (64, 32)])
    running = process.submit(mlx_processors.run, tmp_path, sizes)
    record = FAMILIES[family].images
    assert isinstance(record, ImageFamily)
    processor = Processor(own, record, placeholder_id(read_config(tmp_path)), 2)
    expected, found = mlx_processors.encode(processor, sizes), running.result()
    assert found["ids"] == expected["ids"]
    assert found["counts"] == expected["counts"]
    scale = 8 if family.startswith("gemma") else 1  # mlx-lm's decoder multiplies by it
    for image, features in zip(expected["images"].images, found["features"], strict=True):
        inputs = device_inputs(image, model.device, torch.float32)
        with torch.inference_mode():
            output = model.get_image_features(**inputs, return_dict=True)
        rows = Features.of(output).rows.numpy()
        np.testing.assert_allclose(features * scale, rows, atol=1e-4 * np.abs(rows).max())
    for found_of, expected_of in zip(
        found["extremes"].values(), expected["extremes"].values(), strict=True
    ):
        assert isinstance(found_of, type(expected_of)), (found_of, expected_of)
