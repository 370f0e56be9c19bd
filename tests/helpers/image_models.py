"""Tiny random vision-language models, and a processor that needs no tokenizer."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from safetensors.torch import load_file, save_file

REPLACED = (
    (hf.AutoProcessor, "from_pretrained"),
    (hf.Lfm2VlProcessor, "from_pretrained"),
    (hf.Lfm2VlProcessor, "__call__"),
)
"""What mlx-vlm replaces in transformers, so that folders without a processor have one."""

VOCAB, IMAGE, START, END = 320, 300, 302, 303
PATCH, MERGE = 4, 2
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
}
QWEN = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": PATCH,
    "temporal_patch_size": 1,
    "spatial_merge_size": MERGE,
    "out_hidden_size": 64,
}
TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": 301,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
SECTIONS = ROPE | {"mrope_section": [4, 2, 2]}
INTERLEAVED = TEXT | {"rope_parameters": SECTIONS | {"mrope_interleaved": True}}
DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "rope_parameters": ROPE
    | {"mrope_section": [2, 1, 1], "mrope_interleaved": True, "partial_rotary_factor": 0.5},
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "decoder_sparse_step": 1,
}
DEEP = QWEN | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
GLM = QWEN | {"num_hidden_layers": 2, "image_size": 32, "attention_bias": False}
GLM_TEXT = TEXT | {"rope_parameters": SECTIONS | {"partial_rotary_factor": 1.0}}
GLM_TOKENS = {
    "image_start_token_id": START,
    "image_end_token_id": END,
    "image_token_id": IMAGE,
    "video_token_id": 301,
}
LLAMA = TEXT | {"model_type": "llama"}
SQUARES = VISION | {"image_size": 32, "patch_size": 8}
TILES = {"text_config": LLAMA, "vision_config": SQUARES, "image_token_id": IMAGE, "scale_factor": 2}
PIXTRAL = VISION | {
    "model_type": "pixtral",
    "image_size": 64,
    "patch_size": PATCH,
    "head_dim": 16,
    "hidden_act": "silu",
}
MISTRAL = {
    "text_config": TEXT | {"model_type": "mistral", "sliding_window": None},
    "vision_config": PIXTRAL,
    "image_token_index": IMAGE,
}
GEMMA_4 = TEXT | {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "sliding_window": 9,
    "vocab_size_per_layer_input": VOCAB,
}


def _gemma4(**text: Any) -> Any:
    return hf.Gemma4Config(
        text_config=GEMMA_4 | text,
        vision_config=VISION
        | {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "patch_size": PATCH,
            "pooling_kernel_size": MERGE,
            "position_embedding_size": 32,
        },
        image_token_id=IMAGE,
        boi_token_id=START,
        eoi_token_id=END,
        # Outside of the vocabulary: transformers embeds them as padding, also in answers.
        video_token_id=VOCAB,
        audio_token_id=VOCAB + 1,
    )


def _qwen(kind: str, text: dict[str, Any], vision: dict[str, Any]) -> Any:
    return getattr(hf, f"{kind}Config")(text_config=text, vision_config=vision, **TOKENS)


CONFIGS: dict[str, Callable[[], Any]] = {
    "qwen2_vl": lambda: _qwen(
        "Qwen2VL",
        TEXT | {"rope_parameters": SECTIONS},
        {
            "depth": 2,
            "embed_dim": 32,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": PATCH,
            "temporal_patch_size": 1,
            "hidden_size": 64,
        },
    ),
    "qwen2_5_vl": lambda: _qwen(
        "Qwen2_5_VL",
        TEXT | {"rope_parameters": SECTIONS},
        QWEN | {"window_size": 16, "fullatt_block_indexes": [1]},
    ),
    "qwen3_vl": lambda: _qwen("Qwen3VL", INTERLEAVED, DEEP),
    "qwen3_vl_moe": lambda: _qwen("Qwen3VLMoe", INTERLEAVED | EXPERTS, DEEP),
    "qwen3_5": lambda: _qwen("Qwen3_5", TEXT | DELTA_NET, QWEN | {"num_position_embeddings": 64}),
    "qwen3_5_moe": lambda: _qwen(
        "Qwen3_5Moe", TEXT | DELTA_NET | EXPERTS, QWEN | {"num_position_embeddings": 64}
    ),
    "lfm2_vl": lambda: hf.Lfm2VlConfig(
        text_config=TEXT
        | {
            "model_type": "lfm2",
            "layer_types": ["conv", "full_attention"] * 2,
            "conv_L_cache": 3,
            "block_auto_adjust_ff_dim": False,
        },
        vision_config=VISION
        | {
            "model_type": "siglip2_vision_model",
            "patch_size": PATCH,
            "num_patches": 64,
            "vision_use_head": False,
        },
        image_token_id=IMAGE,
        downsample_factor=2,
        projector_hidden_size=48,
    ),
    "gemma3": lambda: hf.Gemma3Config(
        text_config=TEXT
        | {
            "num_hidden_layers": 6,
            "sliding_window": 9,
            "sliding_window_pattern": 3,
            "query_pre_attn_scalar": 16,
        },
        vision_config=SQUARES | {"vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    ),
    "gemma4": lambda: _gemma4(
        use_bidirectional_attention="vision", hidden_size_per_layer_input=0, global_head_dim=16
    ),
    "gemma4 small": lambda: _gemma4(
        hidden_size_per_layer_input=8, num_kv_shared_layers=2, global_head_dim=32
    ),
    "smolvlm": lambda: hf.SmolVLMConfig(**TILES, pad_token_id=0),
    "idefics3": lambda: hf.Idefics3Config(**TILES, pad_token_id=0),
    "llava": lambda: hf.LlavaConfig(
        text_config=LLAMA,
        vision_config=SQUARES | {"model_type": "siglip_vision_model", "vision_use_head": False},
        image_token_index=IMAGE,
        vision_feature_select_strategy="full",
        image_seq_length=16,
    ),
    "mistral3": lambda: hf.Mistral3Config(**MISTRAL, spatial_merge_size=2, vision_feature_layer=-1),
    "pixtral": lambda: hf.LlavaConfig(
        **MISTRAL, vision_feature_select_strategy="full", vision_feature_layer=-1
    ),
    "glm4v": lambda: hf.Glm4vConfig(text_config=GLM_TEXT, vision_config=GLM, **GLM_TOKENS),
    "glm46v": lambda: hf.Glm46VConfig(
        text_config=GLM_TEXT | {"model_type": "glm4v_text"},
        vision_config=GLM | {"model_type": "glm4v_vision"},
        **GLM_TOKENS,
    ),
}
GRIDS = (
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_5",
    "qwen3_5_moe",
    "glm4v",
    "glm46v",
)


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
