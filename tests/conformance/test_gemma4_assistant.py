"""Gemma 4's assistant on MLX against transformers, on random checkpoints that transformers writes.

`test_published_drafters` compares it with published numbers.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from image_models import picture, random_model, random_processors, save_published
from mtp_pairs import assert_rows_are_paths
from published_drafters import FLOAT32
from scheduled_texts import assert_plain_texts

from treeflash.decoding.interfaces import TableOptions
from treeflash.decoding.session import SequenceSession
from treeflash.errors import CheckpointError, ConfigError, UnsupportedModelError
from treeflash.registry import loader
from treeflash.testing.models import edit_config, write_target

torch = pytest.importorskip("torch")
pytest.importorskip("mlx_lm")
from transformers import (
    Gemma4AssistantConfig,
    Gemma4AssistantForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
)
from treeflash_mlx import assistant
from treeflash_mlx.drafter import OutputStage

PROMPTS = ([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8], [2, 7, 1, 8], [1, 1, 2, 3, 5, 8, 13, 21])
WINDOW = 5
SHAPE = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "attention_k_eq_v": True,
    "sliding_window": WINDOW,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "use_double_wide_mlp": False,
    "max_position_embeddings": 256,
    "rope_parameters": {
        "full_attention": {
            "partial_rotary_factor": 0.25,
            "rope_theta": 1000.0,
            "rope_type": "proportional",
        },
        "sliding_attention": {"rope_theta": 100.0, "rope_type": "default"},
    },
}


WIDE = {"global_head_dim": 64, "num_global_key_value_heads": 1}
"""Settings of published files, which transformers writes as `per_layer_config`."""


def layers(kinds, **settings):
    """The settings of layers, by the first letters of their types."""
    types = ["sliding_attention" if kind == "s" else "full_attention" for kind in kinds]
    return {**SHAPE, **WIDE, "num_hidden_layers": len(types), "layer_types": types, **settings}


def publish(settings, wide=WIDE):
    del settings["per_layer_config"]
    settings.update(wide)


def randomise(model, folder, scale):
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name)))
        is_factor = "norm" in name or "scalar" in name
        weight.data = 1 + 0.1 * noise if is_factor else scale * noise
    model.eval().save_pretrained(folder)


@pytest.fixture(scope="module", params=[False, True], ids=["all tokens", "clusters"])
def pair(request, tmp_path_factory):
    """The folder of a target and its assistant, and both in transformers."""
    folder = tmp_path_factory.mktemp("gemma4")
    target = Gemma4ForCausalLM(
        Gemma4TextConfig(**layers("sfsf", num_kv_shared_layers=0 if request.param else 1))
    )
    config = Gemma4AssistantConfig(
        text_config=layers("ssf", hidden_size=16, intermediate_size=24, num_kv_shared_layers=3),
        backbone_hidden_size=32,
        use_ordered_embeddings=request.param,
        num_centroids=12,
        centroid_intermediate_top_k=7,
    )
    drafter = Gemma4AssistantForCausalLM(config)
    if request.param:
        order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
        drafter.masked_embedding.token_ordering.copy_(order)
    randomise(target, folder / "target", 0.15)
    randomise(drafter, folder / "assistant", 0.25)
    edit_config(folder / "target", publish)
    edit_config(folder / "assistant", lambda config: publish(config["text_config"]))
    return folder, target, drafter


def load_pair(folder, config=FLOAT32):
    return loader("mlx")(folder / "target", folder / "assistant", config)


@torch.inference_mode()
def published(target, drafter, prompt, path, **inputs):
    """(depths, vocab) log probabilities after each token of a path, which begins with the root."""
    outputs = target(
        torch.tensor([prompt]),
        **inputs,
        use_cache=True,
        output_hidden_states=True,
        return_shared_kv_states=True,
    )
    state, rows = outputs.hidden_states[-1][:, -1:], []
    for token in path:
        embedded = target.get_input_embeddings()(torch.tensor([[token]]))
        out = drafter(
            inputs_embeds=torch.cat([embedded, state], -1),
            position_ids=torch.tensor([[len(prompt)]]),
            shared_kv_states=outputs.shared_kv_states,
        )
        logits, state = out.logits[0, 0], out.last_hidden_state
        if drafter.config.use_ordered_embeddings:  # least - 1 stands for no probability
            logits = torch.where(logits > logits.min(), logits, -torch.inf)
        rows.append(logits.log_softmax(-1))
    return torch.stack(rows).numpy()


@pytest.mark.sample(2)
@pytest.mark.parametrize("prompt", PROMPTS[:2], ids=["beyond the window", "within the window"])
def test_log_probs_equal_those_of_transformers(pair, prompt):
    folder, target, drafter = pair
    mlx = load_pair(folder)
    with SequenceSession(mlx, drafts=True) as sequence:
        sequence.extend(prompt)
        block = sequence.draft(7)
        for path in ([7, 3, 9, 30], [7, 41, 7, 7]):
            actual = mlx.head.log_probs(block, np.array(path, np.int32))
            expected = published(target, drafter, prompt, path)
            np.testing.assert_allclose(actual, expected, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma4", "gemma4 small"])
def test_drafts_after_an_image_equal_those_of_transformers(family, tmp_path):
    pytest.importorskip("mlx_vlm")
    from treeflash_mlx import images as mlx_images

    target = random_model(family)
    save_published(family, target, tmp_path / "target")
    wide = {"global_head_dim": 16 if family == "gemma4" else 32}
    heads = {"head_dim": 16, "vocab_size": 320, "attention_k_eq_v": False, "sliding_window": 9}
    small = {"hidden_size": 16, "intermediate_size": 24, "num_kv_shared_layers": 3}
    config = Gemma4AssistantConfig(
        text_config={**layers("ssf", **small, **heads, **wide)}, backbone_hidden_size=64
    )
    drafter = Gemma4AssistantForCausalLM(config)
    randomise(drafter, tmp_path / "assistant", 0.25)
    edit_config(tmp_path / "assistant", lambda config: publish(config["text_config"], wide))
    with random_processors(family, mlx_images):
        mlx, path = load_pair(tmp_path), [7, 3, 9]
    ids, images = mlx.images.encode("ab<image>cd", [picture(1)])
    with SequenceSession(mlx, drafts=True) as sequence:
        sequence.extend(ids, images=images)
        actual = mlx.head.log_probs(sequence.draft(7), np.array(path, np.int32))
    inputs = {name: torch.from_numpy(x) for name, x in images.images[0].inputs.items()}
    kinds = torch.from_numpy(images.is_feature.astype(np.int64))[None]
    expected = published(target, drafter, ids, path, **inputs, mm_token_type_ids=kinds)
    np.testing.assert_allclose(actual, expected, atol=1e-3)


def one_position_high(self, attention, y, positions, caches, source):
    return ATTEND(self, attention, y, positions + 1, caches, source)


ATTEND = assistant.AssistantModel._attend
FAULTS = {
    "embeddings without their factor": (assistant.AssistantOutput, "embed", OutputStage.embed),
    "fed back before the norm": (
        assistant.AssistantModel,
        "feedback",
        lambda self, x: self.post_projection(x),
    ),
    "one position high": (assistant.AssistantModel, "_attend", one_position_high),
    "the keys of the first layers": (None, "_sources", [0, 0, 1]),
    "a window around the root": (None, "window", WINDOW - 2),
}
"""Class, attribute and value; without a class the attribute of the one model."""


@pytest.mark.parametrize("fault", FAULTS)
def test_usual_mistakes(pair, fault, monkeypatch):
    folder, target, drafter = pair
    mlx = load_pair(folder)
    owner, *replacement = FAULTS[fault]
    monkeypatch.setattr(owner or mlx.drafter_model, *replacement)
    with SequenceSession(mlx, drafts=True) as sequence:
        sequence.extend(PROMPTS[0])
        path = [7, 3, 9, 30]
        actual = mlx.head.log_probs(sequence.draft(7), np.array(path, np.int32))
    expected = published(target, drafter, PROMPTS[0], path)
    with np.errstate(invalid="ignore"):
        difference = np.nan_to_num(np.abs(actual - expected))
    assert difference.max() > 0.05


def test_rows_of_a_table_are_the_log_probs_of_their_paths(pair):
    """In a batch of sequences, after forks, and after other tokens."""
    folder, target, drafter = pair
    mlx = load_pair(folder)
    sequences = [SequenceSession(mlx, drafts=True) for _ in range(2)]
    sequences[0].extend(PROMPTS[0])
    sequences[0].draft(1)
    sequences[1].state = sequences[0].state.fork(6, 64)
    sequences[0].state.truncate(3)
    prompts = [[*PROMPTS[0][:3], 9, 9], [*PROMPTS[0][:6], 8]]
    for sequence, prompt, kept in zip(sequences, prompts, (3, 6), strict=True):
        sequence.extend(prompt[kept:])
    blocks = mlx.drafter.draft([(sequence.state, 5) for sequence in sequences], 3)
    for table, prompt in zip(
        mlx.head.transitions(blocks, TableOptions(m=3, k=4)), prompts, strict=True
    ):
        assert_rows_are_paths(table, 5, partial(published, target, drafter, prompt))
        assert len(table.tokens) == 3


@pytest.mark.sample(1)
@pytest.mark.parametrize(("temperature", "bits"), [(0.0, None), (1.0, 8)])
def test_texts_equal_plain_decoding(pair, temperature, bits):
    folder, target, _ = pair
    shares = target.config.num_kv_shared_layers > 0  # mlx-lm does not quantise the keys then
    mlx = load_pair(folder, replace(FLOAT32, kv_bits=None if shares else bits))
    drafting = ("treeflash", 12), ("treeflash", "auto")
    options = {"temperature": temperature, "max_tokens": 8, "suffix": False}
    assert_plain_texts(mlx, PROMPTS, *drafting, **options)


def test_refusals(pair, tmp_path):
    folder = pair[0]
    write_target(tmp_path / "other", "qwen3", seed=0, vocab_size=48)
    other, drafter = tmp_path / "other", folder / "assistant"
    with pytest.raises(UnsupportedModelError, match="reads keys that this qwen3 target does not"):
        loader("mlx")(other, drafter, FLOAT32)
    for backend in ("reference", "cuda"):
        with pytest.raises(UnsupportedModelError, match=f"not supported by the {backend} backend"):
            loader(backend)(other, drafter, FLOAT32)
    with pytest.raises(ConfigError, match="draft_window is not supported"):
        load_pair(folder, replace(FLOAT32, draft_window=8))


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        (None, "slot_gain", 2, "slot_gain = 2 is not supported"),
        ("text_config", "norm_power", 2, "norm_power = 2 is not supported"),
        ("text_config", "hidden_activation", "relu", "hidden_activation = 'relu' is not supported"),
        ("text_config", "enable_moe_block", True, "enable_moe_block = True is not supported"),
        ("text_config", "layer_types", ["full_attention"], "is not supported with 3 layers"),
        (None, "num_centroids", 7, "clusters of 48 tokens are not valid"),
    ],
)
def test_settings_that_nothing_reads_are_refused(pair, section, key, value, message, tmp_path):
    folder = pair[0]
    for file in (folder / "assistant").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())

    def edit(config):
        config["use_ordered_embeddings"] = True
        (config[section] if section else config)[key] = value

    edit_config(tmp_path, edit)
    with pytest.raises(CheckpointError, match=message):
        loader("mlx")(folder / "target", tmp_path, FLOAT32)
