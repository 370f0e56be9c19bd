"""Small processors of transformers: their ids, the inputs of images, and the text after them."""

import pytest

pytest.importorskip("torchvision")

import numpy as np
import torch
import transformers as hf
from PIL import Image as Picture
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from treeflash_cuda.backend import load
from treeflash_cuda.images import load_processor

from tests.helpers.image_models import CONFIGS, picture, random_model
from treeflash.config import DecodeConfig, LoadConfig
from treeflash.decoding import Request, Scheduler
from treeflash.decoding.image_processor import Processor
from treeflash.errors import PromptError

QWEN = {300: "<|image_pad|>", 301: "<|video_pad|>", 302: "<|vision_start|>", 303: "<|vision_end|>"}
GLM = {
    300: "<|image|>",
    301: "<|video|>",
    302: "<|begin_of_image|>",
    303: "<|end_of_image|>",
    304: "<|begin_of_video|>",
    305: "<|end_of_video|>",
}
LFM2 = {300: "<image>", 302: "<|image_start|>", 303: "<|image_end|>", 304: "<|img_thumbnail|>"}
GEMMA = {300: "<image_soft_token>", 302: "<start_of_image>", 303: "<end_of_image>"}
IDEFICS = {300: "<image>", 302: "<fake_token_around_image>", 303: "<global-img>"}
GRID = {"patch_size": 4, "temporal_patch_size": 1, "merge_size": 2}
PIXELS = {"size": {"shortest_edge": 64, "longest_edge": 64 * 64}}
TILES = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}


def tokenizer(tokens, **names):
    """A token for each byte, and special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    special = [tokens.get(i, f"<unused{i}>") for i in range(256, 320)]
    made.add_special_tokens([AddedToken(x, special=True, normalized=False) for x in special])
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<unused310>", extra_special_tokens=names
    )


def qwen(kind, video):
    return getattr(hf, f"{kind}Processor")(
        image_processor=hf.Qwen2VLImageProcessor(**GRID, min_pixels=64, max_pixels=4096),
        tokenizer=tokenizer(QWEN),
        video_processor=getattr(hf, f"{video}VideoProcessor")(),
    )


def glm(kind):
    return getattr(hf, f"{kind}Processor")(
        image_processor=getattr(hf, f"{kind}ImageProcessor")(**GRID, **PIXELS),
        tokenizer=tokenizer(GLM),
        video_processor=getattr(hf, f"{kind}VideoProcessor")(),
    )


PROCESSORS = {
    "qwen2_vl": lambda: qwen("Qwen2VL", "Qwen2VL"),
    "qwen2_5_vl": lambda: qwen("Qwen2_5_VL", "Qwen2VL"),
    "qwen3_vl": lambda: qwen("Qwen3VL", "Qwen3VL"),
    "qwen3_5": lambda: qwen("Qwen3VL", "Qwen3VL"),
    "glm4v": lambda: glm("Glm4v"),
    "glm46v": lambda: glm("Glm46V"),
    "gemma3": lambda: hf.Gemma3Processor(
        hf.Gemma3ImageProcessor(size={"height": 32, "width": 32}),
        tokenizer(GEMMA, image_token=GEMMA[300], boi_token=GEMMA[302], eoi_token=GEMMA[303]),
        image_seq_length=4,
    ),
    "lfm2_vl": lambda: hf.Lfm2VlProcessor(
        hf.Lfm2VlImageProcessor(
            tile_size=32,
            encoder_patch_size=4,
            downsample_factor=2,
            min_image_tokens=4,
            max_image_tokens=16,
            max_num_patches=64,
            do_image_splitting=False,
        ),
        tokenizer(
            LFM2,
            image_token=LFM2[300],
            image_start_token=LFM2[302],
            image_end_token=LFM2[303],
            image_thumbnail=LFM2[304],
        ),
    ),
    "idefics3": lambda: hf.Idefics3Processor(
        hf.Idefics3ImageProcessor(**TILES), tokenizer(IDEFICS), image_seq_len=4
    ),
    "llava": lambda: hf.LlavaProcessor(
        hf.CLIPImageProcessor(
            size={"height": 32, "width": 32}, crop_size={"height": 32, "width": 32}
        ),
        tokenizer({300: "<image>"}, image_token="<image>"),
        patch_size=8,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
    ),
    "mistral3": lambda: hf.PixtralProcessor(
        hf.PixtralImageProcessor(patch_size=4, size={"longest_edge": 64}),
        tokenizer({300: "[IMG]", 302: "[IMG_BREAK]", 303: "[IMG_END]"}),
        patch_size=4,
        spatial_merge_size=2,
    ),
}
PICTURES = [picture(1, 40, 56), picture(2, 64, 32)]


@pytest.fixture(params=PROCESSORS)
def folder(request, tmp_path):
    hf.logging.set_verbosity_error()
    CONFIGS[request.param]().save_pretrained(tmp_path)
    PROCESSORS[request.param]().save_pretrained(tmp_path)
    return tmp_path


def test_ids_and_inputs_are_those_of_one_call(folder):
    processor = load_processor(folder, hf.AutoConfig.from_pretrained(folder))
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
    processor = load_processor(tmp_path, hf.AutoConfig.from_pretrained(tmp_path))
    with pytest.raises(PromptError, match="the target takes no such image: absolute aspect ratio"):
        processor.encode(processor.placeholder, [picture(1, 1, 2000)])
