"""Small processors of transformers, with a token for each byte."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as hf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

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
GEMMA_4 = {300: "<|image|>", 301: "<|video|>", 302: "<|image>", 303: "<image|>", 305: "<|audio|>"}
GEMMA = {300: "<image_soft_token>", 302: "<start_of_image>", 303: "<end_of_image>"}
IDEFICS = {300: "<image>", 302: "<fake_token_around_image>", 303: "<global-img>"}
GRID = {"patch_size": 4, "temporal_patch_size": 1, "merge_size": 2}
PIXELS = {"size": {"shortest_edge": 64, "longest_edge": 64 * 64}}
TILES = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}


def tokenizer(tokens: dict[int, str], **names: str) -> Any:
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


def qwen(kind: str, video: str) -> Any:
    return getattr(hf, f"{kind}Processor")(
        image_processor=hf.Qwen2VLImageProcessor(**GRID, min_pixels=64, max_pixels=4096),
        tokenizer=tokenizer(QWEN),
        video_processor=getattr(hf, f"{video}VideoProcessor")(),
    )


def glm(kind: str) -> Any:
    return getattr(hf, f"{kind}Processor")(
        image_processor=getattr(hf, f"{kind}ImageProcessor")(**GRID, **PIXELS),
        tokenizer=tokenizer(GLM),
        video_processor=getattr(hf, f"{kind}VideoProcessor")(),
    )


PROCESSORS: dict[str, Callable[[], Any]] = {
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
    "gemma4": lambda: hf.Gemma4Processor(
        hf.Gemma4AudioFeatureExtractor(),
        hf.Gemma4ImageProcessor(patch_size=4, pooling_kernel_size=2, max_soft_tokens=70),
        tokenizer(
            GEMMA_4,
            image_token=GEMMA_4[300],
            boi_token=GEMMA_4[302],
            eoi_token=GEMMA_4[303],
            audio_token=GEMMA_4[305],
            boa_token="<unused306>",
            eoa_token="<unused307>",
        ),
        hf.Gemma4VideoProcessor(),
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
