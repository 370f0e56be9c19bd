"""The MLX backend; see the package."""

import itertools

import mlx.core as mx
import numpy as np
from families import mlx as families  # noqa: F401 - a part of the engine
from mlx import nn
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model
from treeflash_mlx import backend, images  # noqa: F401 - a part of the engine
from treeflash_mlx.target import Target, compatible_settings

from treeflash.config import LoadConfig
from treeflash.decoding import image_processor
from treeflash.drafters.folder import read_config

FLOAT32 = {"device": "cpu", "dtype": "float32"}


def load(target, drafter=None, **settings):
    return backend.load(target, drafter, LoadConfig(**FLOAT32 | settings))


def plain_model(folder):
    """The model as mlx-lm loads it, without hooks."""
    return load_model(folder, model_config=compatible_settings(read_config(folder)))[0]


def plain_text(folder, prompt, length):
    steps = generate_step(mx.array(prompt), plain_model(folder), max_tokens=length)
    return [int(token) for token, _ in itertools.islice(steps, length)]


def outputs_of_layers(folder, layer_ids, texts):
    target, features = Target(folder, mx.float32, None), []
    target.capture(layer_ids)
    for text in texts:
        kv_cache = target.new_kv_cache(len(text))
        outputs = target.forward(mx.array([text.token_ids]), [kv_cache], tuple(layer_ids))[1]
        features.append(np.array(outputs[0]))
    weights = (np.array(x.weight) for x in (target.embedding, target.output_module))
    return features, *weights, len(target.layers)


def set_chunks(pair, size):
    pair.verifier.chunk = size


def quantised_parts(pair):
    parts = pair.drafter_model, getattr(pair.head, "module", None)
    modules = [module for part in parts if part is not None for module in part.named_modules()]
    kinds = nn.QuantizedLinear | nn.QuantizedEmbedding
    return {name for name, module in modules if isinstance(module, kinds)}


def save_with_images(family, model, folder):
    from image_models import save_published  # which needs PyTorch

    save_published(family, model, folder)


def image_samples(pair):
    return image_processor.image_samples(pair.images)


def tower_nbytes(pair):
    return sum(x.nbytes for x in pair.target.tower.arrays)


def repeated_norms_nbytes(pair):
    return 0
