"""Small processors of transformers: their ids, the inputs of images, and the text after them."""

import pytest

pytest.importorskip("torchvision")

import numpy as np
import torch
import transformers as hf
from image_models import CONFIGS, picture, random_model
from image_processors import PROCESSORS
from PIL import Image as Picture
from treeflash_cuda.backend import load
from treeflash_cuda.images import read_processor

from treeflash.config import DecodeConfig, LoadConfig
from treeflash.decoding import Request, Scheduler
from treeflash.decoding.families import FAMILIES
from treeflash.decoding.image_processor import Processor, load_processor
from treeflash.drafters.folder import read_config
from treeflash.errors import PromptError

PICTURES = [picture(1, 40, 56), picture(2, 64, 32)]


@pytest.fixture(params=[x for x in PROCESSORS if "cuda" in FAMILIES[x].images.backends])
def folder(request, tmp_path):
    hf.logging.set_verbosity_error()
    CONFIGS[request.param]().save_pretrained(tmp_path)
    PROCESSORS[request.param]().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.sample(4)
def test_ids_and_inputs_are_those_of_one_call(folder):
    processor = load_processor(folder, read_config(folder), "cuda", read_processor)
    assert isinstance(processor, Processor), processor
    text = f"ab{processor.placeholder}cd{processor.placeholder}ef"
    ids, images = processor.encode(text, PICTURES)
    pictures = [Picture.fromarray(x) for x in PICTURES]
    own = hf.AutoProcessor.from_pretrained(folder)
    whole = own(text=[text], images=pictures, return_tensors="pt")
    assert whole["input_ids"][0].tolist() == ids
    assert (images.is_feature == (np.array(ids) == 300)).all()
    for name in images.images[0].inputs:
        arrays = [image.inputs[name] for image in images.images]
        if all(x.shape[1:] == whole[name].shape[1:] for x in arrays):  # else they are padded
            assert (np.concatenate(arrays) == whole[name].numpy()).all()
    again, same = processor.encode(text, PICTURES)
    assert (again, same.digests) == (ids, images.digests)
    with pytest.raises(PromptError, match="for 2 images"):
        processor.encode(f"ab{processor.placeholder}", PICTURES)


@pytest.mark.sample(1)
@pytest.mark.parametrize("folder", ["qwen3_5", "gemma3", "lfm2_vl"], indirect=True)
def test_text_is_that_of_generate_with_the_processors_inputs(folder):
    family = hf.AutoConfig.from_pretrained(folder).model_type
    model = random_model(family)
    model.save_pretrained(folder)
    backend = load(folder, None, LoadConfig(device="cpu", dtype="float32"))
    assert not isinstance(backend.images, str), backend.images
    processor = hf.AutoProcessor.from_pretrained(folder)
    text = f"ab{processor.image_token}cd{processor.image_token}ef"
    inputs = processor(
        text=[text], images=[Picture.fromarray(x) for x in PICTURES], return_tensors="pt"
    )
    with torch.inference_mode():
        made = model.generate(
            **inputs, do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0
        )
    ids, images = backend.images.encode(text, PICTURES)
    request = Request(
        prompt_ids=ids, images=images, config=DecodeConfig(method="suffix", max_tokens=12)
    )
    tokens = [token for _, step in Scheduler(backend).decode([request]) for token in step.tokens]
    assert tokens == made[0, len(ids) :].tolist()


def test_a_picture_that_the_target_does_not_take_is_refused(tmp_path):
    CONFIGS["qwen3_vl"]().save_pretrained(tmp_path)
    PROCESSORS["qwen3_vl"]().save_pretrained(tmp_path)
    processor = load_processor(tmp_path, read_config(tmp_path), "cuda", read_processor)
    with pytest.raises(PromptError, match="cannot take this image: absolute aspect ratio"):
        processor.encode(processor.placeholder, [picture(1, 1, 2000)])
