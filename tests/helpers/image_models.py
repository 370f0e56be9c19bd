"""Tiny random vision-language models, as transformers and as an engine run them, and processors."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from treeflash.config import DecodeConfig, SamplingConfig
from treeflash.decoding import Request, Scheduler, SchedulerConfig
from treeflash.decoding.adaptive_budget import AdaptiveBudgets
from treeflash.decoding.verify_costs import SIZES, VerifyCosts

REPLACED = (
    (hf.AutoProcessor, "from_pretrained"),
    (hf.Lfm2VlProcessor, "from_pretrained"),
    (hf.Lfm2VlProcessor, "__call__"),
)
"""What mlx-vlm replaces in transformers, so that folders without a processor have one."""

VOCAB, IMAGE, START, END = 320, 300, 302, 303
PATCH = 4
TABLES = json.loads((Path(__file__).parent / "image_models.json").read_text("utf-8"))
"""The settings of families, and the parts that they use.

Gemma 4 embeds tokens of video and audio, which are outside of the vocabulary, as padding, also in
answers.
"""


def completed(settings: Any) -> Any:
    """Return settings with the parts that they use."""
    if not isinstance(settings, dict):
        return settings
    found: dict[str, Any] = {}
    for name in filter(None, settings.get("use", "").split(", ")):
        found |= completed(TABLES["parts"][name])
    return found | {key: completed(x) for key, x in settings.items() if key != "use"}


def configuration(settings: dict[str, Any]) -> Any:
    """Make a configuration of transformers."""
    own = completed(settings)
    return getattr(hf, f"{own.pop('kind')}Config")(**own)


CONFIGS: dict[str, Callable[[], Any]] = {
    family: partial(configuration, settings) for family, settings in TABLES["families"].items()
}
GRIDS = ("glm4v", "glm46v", *(family for family in CONFIGS if family.startswith("qwen")))
"""Families whose pictures are grids of patches."""


def random_model(family: str) -> Any:
    """A model of random weights in float32, whose text depends on what it sees."""
    torch.manual_seed(0)
    model = hf.AutoModelForImageTextToText.from_config(
        CONFIGS[family](), dtype=torch.float32
    ).eval()
    wide = 0.03 if family.startswith("gemma") else 0.5
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            weight.data.normal_(0, wide if "embed" in name else 0.15)
    return model


def save_published(family: str, model: Any, folder: Path) -> None:
    """Save a model as published checkpoints are, which mlx-lm and mlx-vlm read."""
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    config["vocab_size"] = VOCAB
    text["tie_word_embeddings"] = config.get("tie_word_embeddings", False)
    if family == "gemma3":
        text |= {
            "mm_tokens_per_image": 4,
            "sliding_window_pattern": 3,
            "rope_local_base_freq": 1e4,
            "rope_theta": 1e6,
        }
    elif family.startswith("gemma4"):
        wide = text.pop("per_layer_config", {})
        text["global_head_dim"] = next(iter(wide.values()), text)["head_dim"]
    elif family == "lfm2_vl":
        text["block_dim"] = text["hidden_size"]
    elif family == "pixtral":
        config["model_type"] = family
    elif "rope_parameters" in text and "mrope_section" in text["rope_parameters"]:
        rope = text["rope_parameters"]
        text |= {"rope_theta": 1e4, "rope_scaling": {**rope, "type": "mrope"}}
        config["vision_config"]["model_type"] = family
        if "linear_num_key_heads" in text:
            text["full_attention_interval"] = 2
        if family in ("qwen2_vl", "qwen2_5_vl"):
            config = config.pop("text_config") | config
    if family in ("gemma3", "pixtral"):
        weights = load_file(folder / "model.safetensors")
        names = {x: x.replace("vision_tower.", "vision_tower.vision_model.") for x in weights}
        weights = {names[name]: x for name, x in weights.items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def picture(seed: int, height: int = 16, width: int = 24) -> Any:
    """(height, width, 3) uint8 noise."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


@contextmanager
def random_processors(family: str, *modules: Any) -> Iterator[pytest.MonkeyPatch]:
    """Let modules of images read a `RandomProcessor`; transformers is then as it was before."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in REPLACED:
            patch.setattr(owner, name, getattr(owner, name))
        for module in modules:
            patch.setattr(module, "read_processor", lambda _: RandomProcessor(family))
        yield patch


class RandomProcessor:
    """Is called like a processor of transformers: a token for each letter, patches of pictures."""

    image_token = boi_token = "<image>"
    chat_template = None

    def __init__(self, family: str) -> None:
        self.family = family
        self.tokenizer = SimpleNamespace(bos_token=None)

    def __call__(self, text: list[str], images: list[Any], **_: Any) -> dict[str, Any]:
        parts = [self.inputs(np.asarray(image)) for image in images]
        first, *rest = text[0].split(self.image_token)
        ids = [1, *map(ord, first)]
        for (_, tokens), words in zip(parts, rest, strict=True):
            ids += [START, *tokens, END, *map(ord, words)]
        arrays = parts[0][0] if len(parts) == 1 else {}
        return {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids))), **arrays}

    def inputs(self, image: Any) -> tuple[dict[str, Any], list[int]]:
        """The inputs of one picture, and the tokens between its start and its end."""
        pixels = (image.astype(np.float32) / 127.5 - 1).transpose(2, 0, 1)
        if self.family in GRIDS:
            rows, columns = (size // PATCH for size in image.shape[:2])
            patches = pixels.reshape(3, rows // 2, 2, PATCH, columns // 2, 2, PATCH)
            patches = patches.transpose(1, 4, 2, 5, 0, 3, 6).reshape(rows * columns, -1)
            grid = np.array([[1, rows, columns]])
            return {"pixel_values": patches, "image_grid_thw": grid}, [IMAGE] * (
                rows * columns // 4
            )
        if self.family.startswith(("lfm2_vl", "gemma4")):
            rows, columns = (size // PATCH for size in image.shape[:2])
            patches = pixels.reshape(3, rows, PATCH, columns, PATCH).transpose(1, 3, 2, 4, 0)
            patches = patches.reshape(1, rows * columns, -1)
            if self.family == "lfm2_vl":
                arrays = {
                    "pixel_values": patches,
                    "spatial_shapes": np.array([[rows, columns]]),
                    "pixel_attention_mask": np.ones((1, rows * columns), np.int64),
                }
            else:
                places = np.stack(np.divmod(np.arange(rows * columns), columns)[::-1], -1)
                arrays = {"pixel_values": patches / 2 + 0.5, "image_position_ids": places[None]}
            return arrays, [IMAGE] * (rows * columns // 4)
        if self.family in ("mistral3", "pixtral"):
            patches = PATCH if self.family == "pixtral" else 2 * PATCH
            rows, columns = (size // patches for size in image.shape[:2])
            arrays = {"pixel_values": pixels[None], "image_sizes": np.array([image.shape[:2]])}
            return arrays, ([IMAGE] * columns + [304]) * rows  # with ends of lines
        rows, columns = (np.arange(32) * size // 32 for size in image.shape[:2])
        whole = pixels[:, rows][:, :, columns]
        if self.family in ("smolvlm", "idefics3"):  # two tiles
            tiles = np.stack([whole, whole[:, ::-1]])[None]
            mask = np.ones((1, 2, 32, 32), np.int64)
            return {"pixel_values": tiles, "pixel_attention_mask": mask}, ([304] + [IMAGE] * 4) * 2
        return {"pixel_values": whole[None]}, [IMAGE] * (4 if self.family == "gemma3" else 16)


def reference(model: Any, ids: list[int], images: Any, length: int) -> list[int]:
    """The greedy tokens of transformers' own `generate`."""
    tokens = torch.tensor([ids])
    inputs = {}
    for name in images.images[0].inputs if images is not None else ():
        arrays = [torch.from_numpy(image.inputs[name]) for image in images.images]
        if len({x.shape[1:] for x in arrays}) > 1:  # pictures of other sizes are padded
            height, width = (max(x.shape[axis] for x in arrays) for axis in (2, 3))
            arrays = [F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2])) for x in arrays]
        inputs[name] = torch.cat(arrays)
    parameters = inspect.signature(type(model).forward).parameters
    kinds = {
        x: (tokens == IMAGE).int()
        for x in ("token_type_ids", "mm_token_type_ids")
        if x in parameters
    }
    made = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        **inputs,
        **kinds,
        do_sample=False,
        max_new_tokens=length,
        eos_token_id=None,
        pad_token_id=0,
    )
    return made[0, len(ids) :].tolist()


TOKENS = 10
LIMITS = SchedulerConfig(snapshot_interval=4)
TEXTS = (
    ("ab<image>cd", [picture(1)]),
    ("<image>ef<image>gh", [picture(1), picture(2, 24, 16)]),
    ("ab<image>cd", [picture(3)]),
)


class Vision:
    """A model of transformers, and the same model as an engine's target."""

    def __init__(self, engine, family, folder, **settings):
        self.engine, self.family, self.folder = engine, family, folder
        self.model = random_model(family)
        engine.save_with_images(family, self.model, folder)
        self.backend = self.load(**settings)
        assert not isinstance(self.backend.images, str), self.backend.images
        self.prompts = [self.encode(*text) for text in TEXTS]

    def load(self, drafter=None, load=None, **settings):
        """Load the target with the engine's settings, or by a function."""
        with random_processors(self.family, self.engine.images):
            return (load or self.engine.load)(self.folder, drafter, **settings)

    def encode(self, text, pictures=()):
        if not pictures:
            return [1, *map(ord, text)], None
        return self.backend.images.encode(text, pictures)

    def reference(self, prompt, tokens=TOKENS):
        return reference(self.model, *prompt, tokens)

    @cached_property
    def expected(self):
        """The tokens after `prompts`."""
        return [self.reference(prompt) for prompt in self.prompts]

    def decode(self, prompts, size=1000, cache=None, method="suffix", tokens=TOKENS, **sampling):
        """The tokens after prompts, decoded together in chunks of a size."""
        config = replace(LIMITS, prefill_chunk=size, lone_prefill_chunk=size)
        scheduler = steady_scheduler(self.backend, config, cache)
        texts = {request(prompt, method, tokens, **sampling): [] for prompt in prompts}
        for one, step in scheduler.decode(texts):
            texts[one] += step.tokens
        return list(texts.values())

    def decode_alone(self, prompt, cache):
        """The steps after a prompt."""
        scheduler = steady_scheduler(self.backend, cache=cache)
        return [step for _, step in scheduler.decode([request(prompt)])]


def steady_scheduler(backend, config=LIMITS, cache=None):
    """A scheduler that need not time forward passes for its adaptive budget."""
    budgets = AdaptiveBudgets(VerifyCosts({size: 1 + 0.01 * size for size in SIZES}))
    return Scheduler(backend, config, budgets=budgets, prefix_cache=cache)


def request(prompt, method="suffix", tokens=TOKENS, **sampling):
    decode = DecodeConfig(method=method, max_tokens=tokens, sampling=SamplingConfig(**sampling))
    return Request(prompt_ids=prompt[0], images=prompt[1], config=decode)


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
