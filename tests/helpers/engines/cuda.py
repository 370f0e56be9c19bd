"""The PyTorch backend; see the package."""

import torch
from families import cuda as families  # noqa: F401 - a part of the engine
from transformers import AutoModelForCausalLM
from treeflash_cuda import backend, images  # noqa: F401 - a part of the engine
from treeflash_cuda.decoder.model import AttentionMixer
from treeflash_cuda.low_bit_linear import LowBitLinear
from treeflash_cuda.target_loading import load_target
from treeflash_cuda.training.data import FeatureStore

from treeflash.config import LoadConfig

FLOAT32 = {"device": "cpu", "dtype": "float32"}


def load(target, drafter=None, **settings):
    return backend.load(target, drafter, LoadConfig(**FLOAT32 | settings))


@torch.inference_mode()
def plain_text(folder, prompt, length):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # The cache of transformers would forget what is before windows that the model does not have.
    for name in ("layer_types", "sliding_window"):
        if not hasattr(type(model.config)(), name):
            vars(model.config).pop(name, None)
    limits = {"max_new_tokens": length, "min_new_tokens": length, "eos_token_id": None}
    tokens = model.generate(torch.tensor([prompt]), do_sample=False, pad_token_id=0, **limits)
    return tokens[0, len(prompt) :].tolist()


def outputs_of_layers(folder, layer_ids, texts):
    target = load_target(folder, LoadConfig(**FLOAT32), pack=False)
    target.capture(layer_ids)
    store = FeatureStore(target, layer_ids, texts, 1, None, 0)
    features = [text.features.numpy() for text in store.get(range(len(texts)))]
    weights = (x.detach().numpy() for x in (target.embeddings, target.lm_head_weight))
    return features, *weights, len(target.layers)


def set_chunks(pair, size):
    pair.verifier.first_chunk = pair.verifier.next_chunk = size


def quantised_parts(pair):
    parts = pair.drafter_model, getattr(pair.head, "module", None)
    modules = [module for part in parts if part is not None for module in part.named_modules()]
    return {name for name, module in modules if isinstance(module, LowBitLinear)}


def save_with_images(family, model, folder):
    model.save_pretrained(folder)


def image_samples(pair):
    return pair.target.samples


def tower_nbytes(pair):
    return sum(x.nbytes for x in pair.target.tower.parameters)


def repeated_norms_nbytes(pair):
    mixers = [x for x in pair.target.model.modules() if isinstance(x, AttentionMixer)]
    return sum(x.head_norms[2:].nbytes for x in mixers if x.head_norms is not None)
