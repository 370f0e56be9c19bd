"""The bundled drafter after images: the default target's text model behind a random tower."""

import numpy as np
import pytest
import torch
import transformers
import treeflash_cuda.images as cuda_images
from image_models import VISION, RandomProcessor, picture
from transformers import AutoConfig, AutoModelForCausalLM, LlavaConfig
from treeflash_cuda.backend import load

from treeflash.config import DecodeConfig, LoadConfig
from treeflash.decoding import Request, decode
from treeflash.hub.models import resolve_drafter
from treeflash.testing.comparisons import tokens_of
from treeflash.text.tokenizer import Tokenizer

IMAGE = 4  # a token that texts do not have
QUESTION = "Explain what an API is to a child."


class TextProcessor(RandomProcessor):
    """Encodes text by the default target's tokenizer."""

    def __init__(self, tokenizer):
        super().__init__("llava")
        self._text = tokenizer

    def __call__(self, text, images, **_):
        arrays, tokens = self.inputs(np.asarray(images[0]))
        before, after = (self._text.encode(part) for part in text[0].split(self.image_token))
        return {"input_ids": np.array([[*before, *[IMAGE] * len(tokens), *after]]), **arrays}


@pytest.fixture(scope="module")
def folder(smollm2, tmp_path_factory):
    """A LLaVA checkpoint whose tower is random, with features as large as embeddings."""
    transformers.logging.set_verbosity_error()
    folder = tmp_path_factory.mktemp("llava")
    config = LlavaConfig(
        text_config=AutoConfig.from_pretrained(smollm2),
        vision_config=VISION
        | {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8},
        image_token_index=IMAGE,
        vision_feature_select_strategy="full",
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    text = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16)
    model.get_decoder().load_state_dict(text.get_decoder().state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    pixels = torch.randn(1, 3, 32, 32, dtype=torch.bfloat16)
    features = model.get_image_features(pixels, return_dict=True).pooler_output[0]
    scale = model.get_input_embeddings().weight.std() / features.std()
    model.model.multi_modal_projector.linear_2.weight.data *= scale
    model.model.multi_modal_projector.linear_2.bias.data *= scale
    model.save_pretrained(folder)
    return folder


# The default target. Tiny pairs draft after images in `test_images.py`.
@pytest.mark.nightly
def test_the_bundled_drafter_beats_plain_decoding_after_an_image(folder, smollm2, monkeypatch):
    tokenizer = Tokenizer.from_folder(smollm2)
    monkeypatch.setattr(cuda_images, "read_processor", lambda _: TextProcessor(tokenizer))
    drafter = resolve_drafter(None, None)
    backend = load(folder, drafter, LoadConfig(device="cpu", dtype="float32"))
    assert not isinstance(backend.images, str), backend.images
    message = f"{backend.images.placeholder}{QUESTION}"
    text = f"<|im_start|>user\n{message}<|im_end|>\n<|im_start|>assistant\n"
    ids, images = backend.images.encode(text, [picture(1)])

    def run(method):
        config = DecodeConfig(method=method, budget=16, max_tokens=24)
        return list(decode(backend, Request(prompt_ids=ids, images=images, config=config)))

    plain, drafted = run("ar"), run("treeflash")
    assert tokens_of(drafted) == tokens_of(plain)
    assert sum(len(step.tokens) for step in drafted[1:]) > 1.5 * len(drafted[1:])
