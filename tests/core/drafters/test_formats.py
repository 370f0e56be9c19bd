"""Each dialect: what its settings mean, which are refused, and what its drafters compute."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from treeflash.config import LoadConfig
from treeflash.decoding.session import SequenceSession
from treeflash.drafters.config import DrafterConfig
from treeflash.drafters.folder import read_config, read_file, read_tensors
from treeflash.drafters.formats import (
    detect_format,
    drafter_config,
    parse_drafter_config,
    replace_settings,
    unknown_keys,
)
from treeflash.drafters.loading import load_tensors, refuse_extensions
from treeflash.errors import CheckpointError, UnsupportedModelError
from treeflash.registry import loader
from treeflash.testing.models import DIALECTS, edit_config, save, write_dialect, write_target

Config = dict[str, Any]
Edit = Callable[[Config], object]


TARGET = {"hidden_size": 32, "vocab_size": 24, "num_hidden_layers": 4}
# The format, the head, the first slot that predicts, the layers read. A dialect that differs from
# another by its head alone needs no entry.
MEANINGS = {
    "dflash": ("DFlash", None, 1, (0, 2)),
    "dflash2": ("DFlash2", "selector", 1, (0, 2)),
    "deepspec": ("DeepSpec", "vanilla", 0, (-1, 2)),
    "deepspec-gated": ("DeepSpec", "gated", 0, (-1, 2)),
    "deepspec-rnn": ("DeepSpec", "rnn", 0, (-1, 2)),
    "deepspec-dflash": ("DeepSpec", None, 0, (-1, 2)),
    "deepspec-gemma4": ("DeepSpec for Gemma 4", "vanilla", 0, (-1, 2)),
    "deepspec-sinks": ("DeepSpec", "vanilla", 1, (-1, 2)),
    "specforge": ("SpecForge DSpark", "vanilla", 0, (0, 2)),
    "specforge-domino": ("SpecForge Domino", "domino", 1, (0, 2)),
    "speculators-dflash": ("speculators", None, 1, (0, 2)),
    "speculators-dflash2": ("speculators", "selector", 1, (0, 2)),
    "speculators-dspark": ("speculators", "gated", 0, (0, 2)),
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    write_target(tmp_path / "target", "qwen3", seed=0)

    def write(dialect: str) -> Path:
        write_dialect(tmp_path / "dialect", tmp_path / "target", dialect, seed=1)
        return tmp_path / "dialect"

    return write


def edited(folder: Path, **settings: Any) -> DrafterConfig:
    def edit(config: dict[str, Any]) -> None:
        for key, value in settings.items():
            config.pop(key, None)
            if value is not ...:
                config[key] = value

    edit_config(folder, edit)
    return drafter_config(folder)


@pytest.mark.parametrize("dialect", MEANINGS)
def test_meaning(write: Callable[[str], Path], dialect: str) -> None:
    folder = write(dialect)
    config = drafter_config(folder)
    name, head, first_slot, layers = MEANINGS[dialect]
    assert detect_format(read_config(folder)).name == name
    assert config.head == head
    assert config.first_slot == first_slot
    assert config.depths == 6 - first_slot
    assert config.target_layer_ids == layers
    assert config.confidence_head == (head in ("vanilla", "gated", "rnn"))
    assert (config.head_state_size > 0) == (head in ("rnn", "domino"))
    if name == "speculators":  # which has no such factors
        assert (config.input_scale, config.output_multiplier) == (1, 1)
    assert unknown_keys(read_config(folder)) == []
    load_tensors(folder, read_file, **TARGET)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_no_dialect_passes_for_dflash(write: Callable[[str], Path], dialect: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"^a test does not support a drafter with \w"):
        refuse_extensions(drafter_config(write(dialect)), "a test")


def test_a_backend_names_what_it_has_beyond_dflash(write: Callable[[str], Path]) -> None:
    config = drafter_config(write("deepspec"))
    own = {"heads": ("vanilla",), "supported": ("first_slot", "own_vocabulary")}
    with pytest.raises(UnsupportedModelError, match="with features of the embeddings"):
        refuse_extensions(config, "a test", **own)
    own["supported"] += ("target_layer_ids",)
    refuse_extensions(config, "a test", **own)
    with pytest.raises(UnsupportedModelError, match="with a factor on its embeddings"):
        refuse_extensions(replace(config, input_scale=2.0), "a test", **own)


def test_copies_of_the_target_may_be_left_out(write: Callable[[str], Path]) -> None:
    folder = write("deepspec-dflash")
    assert load_tensors(folder, read_file, **TARGET).vocabulary.keys() == {
        "embed_tokens.weight",
        "lm_head.weight",
    }
    tensors = read_tensors(folder)
    del tensors["embed_tokens.weight"], tensors["lm_head.weight"]
    save(folder, read_config(folder), tensors)
    loaded = load_tensors(folder, read_file, **TARGET)
    assert loaded.vocabulary == {}
    assert loaded.config.first_slot == 0  # though it looks like z-lab's DFlash


@pytest.mark.parametrize("name", ["d2t", "lm_head.weight", "markov_head.markov_w1.weight"])
def test_a_missing_tensor_is_named(write: Callable[[str], Path], name: str) -> None:
    folder = write("speculators-dspark")
    tensors = read_tensors(folder)
    del tensors[name]
    save(folder, read_config(folder), tensors)
    with pytest.raises(CheckpointError, match=f"lacks the tensor {name} of shape"):
        load_tensors(folder, read_file, **TARGET)


@pytest.mark.parametrize("rank", [-1, 10**18])
def test_a_size_that_no_tensor_has_is_a_misfit(write: Callable[[str], Path], rank: int) -> None:
    folder = write("deepspec")
    edited(folder, markov_rank=rank)
    with pytest.raises(CheckpointError, match=rf"markov_w1\.weight has shape .*, {rank}\)"):
        load_tensors(folder, read_file, **TARGET)


def test_older_names_of_a_markov_head(write: Callable[[str], Path]) -> None:
    folder = write("specforge")
    renamed = {
        name.replace("markov_head.", "logit_head."): tensor
        for name, tensor in read_tensors(folder).items()
    }
    expected = load_tensors(folder, read_file, **TARGET)
    save(folder, read_config(folder), renamed)
    loaded = load_tensors(folder, read_file, **TARGET)
    assert loaded.head.keys() == expected.head.keys()
    np.testing.assert_array_equal(
        loaded.head["markov_w2.weight"], expected.head["markov_w2.weight"]
    )


def test_a_specforge_file_with_the_architecture_of_deepspec(write: Callable[[str], Path]) -> None:
    """Some are published so for vLLM, with the head's settings at top level or where they were."""
    folder = write("specforge")
    expected = drafter_config(folder)
    edit_config(folder, lambda c: c["dflash_config"].pop("projector_type"))
    assert edited(folder, architectures=["Qwen3DSparkModel"]) == expected
    edit_config(folder, lambda c: c.update(markov_rank=c["dflash_config"].pop("markov_rank")))
    assert drafter_config(folder) == expected


class TestSlotsOfSpeculators:
    """`sample_from_anchor`, or in older files the number of proposed tokens."""

    @pytest.mark.parametrize(
        ("dialect", "given", "proposed", "first_slot"),
        [
            ("speculators-dspark", True, 6, 0),
            ("speculators-dspark", False, 5, 1),
            ("speculators-dspark", ..., 6, 0),
            ("speculators-dspark", ..., 5, 1),
            ("speculators-dspark", ..., None, 1),
            ("speculators-dflash", ..., 6, 1),
            ("speculators-dflash", False, 6, 1),
            ("speculators-dflash", True, 6, 0),
            ("speculators-dflash2", ..., 5, 1),
        ],
    )
    def test_first_slot(
        self,
        write: Callable[[str], Path],
        dialect: str,
        given: object,
        proposed: int | None,
        first_slot: int,
    ) -> None:
        section = {"proposal_methods": [{"speculative_tokens": proposed}]}
        config = edited(write(dialect), sample_from_anchor=given, speculators_config=section)
        assert config.first_slot == first_slot

    def test_a_recurrence_over_a_slot_that_predicts_nothing(
        self, write: Callable[[str], Path]
    ) -> None:
        with pytest.raises(CheckpointError, match="'rnn' needs sample_from_anchor, which is false"):
            edited(write("speculators-dspark"), markov_head_type="rnn", sample_from_anchor=False)

    def test_a_contradiction(self, write: Callable[[str], Path]) -> None:
        section = {"proposal_methods": [{"speculative_tokens": 6}]}
        folder = write("speculators-dspark")
        with pytest.raises(CheckpointError, match="sample_from_anchor is false, but"):
            edited(folder, sample_from_anchor=False, speculators_config=section)


@pytest.mark.parametrize(
    ("dialect", "settings", "problem"),
    [
        (
            "speculators-dflash",
            {"mask_token_id": None},
            "lacks 'mask_token_id'; speculators drafters need it; set it to the value used in "
            "training$",
        ),
        ("speculators-dflash", {"aux_hidden_state_layer_ids": None}, "lacks 'aux_hidden_state"),
        ("speculators-dflash", {"target_hidden_size": 64}, "target_hidden_size unlike"),
        ("speculators-dflash2", {"draft_vocab_size": 16}, "DFlash2 with a vocabulary of its own"),
        ("deepspec", {"markov_head_type": "lstm"}, "Markov head 'lstm' is not supported"),
        ("deepspec", {"markov_rank": 0}, "a confidence head without a Markov head"),
        ("deepspec", {"target_layer_ids": ...}, "lacks 'target_layer_ids'"),
        ("deepspec", {"draft_vocab_size": 16}, "draft_vocab_size = 16 is not supported"),
        ("dflash2", {"conv_kernel_size": 0}, "the settings of DFlash2 must be 1 or more, got "),
        ("dflash2", {"conv_group_size": 5}, "hidden_size 32 is not a multiple of conv_group_size"),
        ("specforge-domino", {"emb_dim": 0}, "emb_dim must be 1 or more, got 0"),
        (
            "speculators-dspark",
            {"speculators_model_type": "xpress"},
            "speculators of type 'xpress' are not supported; supported are dflash, dflash2, dspark",
        ),
        (
            "dflash2",
            {"architectures": ["LiLiCorrDraftModel"]},
            r"the layout LiLiCorrDraftModel \(LiLiCorr\) is not supported",
        ),
        ("specforge", {"projector_type": "lilicorr"}, "projector_type = 'lilicorr' is not supp"),
    ],
)
def test_refusals(
    write: Callable[[str], Path], dialect: str, settings: dict[str, Any], problem: str
) -> None:
    folder = write(dialect)
    if settings.keys() <= read_config(folder).get("dflash_config", {}).keys():
        edit_config(folder, lambda c: c["dflash_config"].update(settings))
    with pytest.raises(CheckpointError, match=problem):
        edited(folder, **settings)


@pytest.mark.parametrize(("shift", "prefix", "first_slot"), [(True, 0, 0), (False, 2, 1)])
def test_slots_of_domino(
    write: Callable[[str], Path], shift: bool, prefix: int, first_slot: int
) -> None:
    folder = write("specforge-domino")
    settings = {"shift_label": shift, "pure_draft_prefix_len": prefix}
    edit_config(folder, lambda c: c["dflash_config"].update(settings))
    config = drafter_config(folder)
    assert config.first_slot == first_slot
    assert config.head_from_depth == 1 + prefix


@pytest.mark.parametrize(("shift", "first_slot"), [(True, 0), (False, 1)])
def test_slots_of_nvidias_dspark(
    write: Callable[[str], Path], shift: bool, first_slot: int
) -> None:
    folder = write("specforge")
    settings = {"shift_label": shift, "attention_mode": "mha"}
    edit_config(folder, lambda c: c["dflash_config"].update(settings))
    assert drafter_config(folder).first_slot == first_slot


@pytest.mark.parametrize("kind", ["gated", "rnn"])
def test_names_of_nvidias_dspark(write: Callable[[str], Path], kind: str) -> None:
    """The parts of its head have no prefix, and a key of its own tells of a confidence head."""
    folder = write(f"deepspec-{kind}")

    def edit(config: Config) -> None:
        head = {key: config.pop(key) for key in ("markov_rank", "markov_head_type")}
        config["architectures"] = ["DSparkDraftModel"]
        own = {"projector_type": "dspark", "shift_label": True, "use_confidence_head": True}
        ids = {key: config.pop(key) for key in ("mask_token_id", "target_layer_ids")}
        config["dflash_config"] = {**head, **own, **ids}
        del config["enable_confidence_head"]

    expected, tensors = load_tensors(folder, read_file, **TARGET), read_tensors(folder)
    edit_config(folder, edit)
    renamed = {
        name.removeprefix("markov_head.").replace("confidence_head.proj", "confidence_proj"): x
        for name, x in tensors.items()
    }
    assert renamed.keys() != tensors.keys()
    save(folder, read_config(folder), renamed)
    found = load_tensors(folder, read_file, **TARGET)
    assert found.config == expected.config
    assert found.head.keys() == expected.head.keys()
    assert unknown_keys(read_config(folder)) == []


@pytest.mark.parametrize("key", ["emb_dim", "gru_hidden_dim"])
def test_domino_needs_its_sizes(write: Callable[[str], Path], key: str) -> None:
    folder = write("specforge-domino")
    edit_config(folder, lambda c: c["dflash_config"].pop(key))
    with pytest.raises(CheckpointError, match=f"lacks '{key}'"):
        drafter_config(folder)


def test_a_mask_embedding_is_refused(write: Callable[[str], Path]) -> None:
    folder = write("dflash")
    (folder / "mask_embedding.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"mask_embedding\.pt, which is not supported"):
        drafter_config(folder)


BACKBONE_KEYS = (
    "head_dim hidden_act layer_types rope_parameters rope_theta sliding_window vocab_size"
)
PUBLISHED_KEYS = {
    "dflash": "block_size causal causal_head final_logit_softcapping input_embedding_scale "
    "is_causal is_neox_style mask_token_id num_target_layers "
    "output_multiplier target_layer_ids use_swa",
    "dflash2": "conv_group_size conv_kernel_size selector_rank selector_top_k use_sliding_window",
    "deepspec": "confidence_head_with_markov confidence_temperatures enable_confidence_head "
    "enable_qwen35_gated_q_proj markov_head_type markov_rank num_anchors rope_is_neox_style",
    "specforge": "attention_mode confidence_head_alpha markov_rank projector_type shift_label",
    "specforge-domino": "emb_dim gru_hidden_dim pure_draft_prefix_len shift_label",
    "speculators-dflash": "aux_hidden_state_layer_ids draft_vocab_size max_anchors "
    "sample_from_anchor sliding_window_non_causal speculators_config target_hidden_size "
    "tie_word_embeddings",
    "speculators-dflash2": "conv_group_size conv_kernel_size selector_rank selector_top_k",
    "speculators-dspark": "confidence_head_with_markov enable_confidence_head markov_head_type",
}
"""By dialect, settings that its publishers write, from their code."""


@pytest.mark.parametrize("dialect", PUBLISHED_KEYS)
def test_every_published_setting_is_known(write: Callable[[str], Path], dialect: str) -> None:
    config = read_config(write(dialect))
    keys = f"{BACKBONE_KEYS} {PUBLISHED_KEYS[dialect]}".split()
    assert unknown_keys({**dict.fromkeys(keys), **config}) == []


@pytest.mark.parametrize("key", ["norm_power", "rotary_shift", "slot_gain"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_an_unknown_setting_of_a_drafter_is_refused_by_name(
    write: Callable[[str], Path], dialect: str, key: str
) -> None:
    """At the top level too if the file is no copy of the target's."""
    folder = write(dialect)
    own = dialect.startswith("speculators")

    def add(config: Config) -> None:
        (config if own else config.setdefault("dflash_config", {}))[key] = 0.5

    edit_config(folder, add)
    name = key if own else f"dflash_config.{key}"
    with pytest.raises(CheckpointError, match=f"{name} = 0.5 is not supported; remove it if"):
        drafter_config(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [("dflash_query_causal", True), ("log_snr_conditioning", True), ("logits_start", 1)],
)
def test_settings_that_change_the_arithmetic_are_refused_in_copies_of_the_target(
    write: Callable[[str], Path], key: str, value: object
) -> None:
    folder = write("deepspec")
    with pytest.raises(CheckpointError, match=f"{key} = {value} is not supported"):
        edited(folder, **{key: value})


def test_the_first_slot_of_deepspec_may_be_the_anchors_alone(write: Callable[[str], Path]) -> None:
    assert edited(write("deepspec"), sample_from_anchor=False).first_slot == 1


def test_the_anchor_of_nvidias_dspark(write: Callable[[str], Path]) -> None:
    folder = write("deepspec")
    config = edited(folder, dspark_bonus_anchor=True, dspark_markov_rank=4)
    assert (config.first_slot, config.depths) == (1, config.block_size - 1)
    assert edited(folder, dspark_bonus_anchor=False).first_slot == 0
    assert edited(write("deepspec-gemma4"), dspark_bonus_anchor=True).first_slot == 1
    folder = write("deepspec")
    with pytest.raises(CheckpointError, match="dspark_bonus_anchor exclude each other"):
        edited(folder, dspark_bonus_anchor=True, sample_from_anchor=True)


def test_gemma4_of_deepspec(write: Callable[[str], Path]) -> None:
    """Frequencies are of whole heads; only some of the pairs turn."""
    folder = write("deepspec-gemma4")
    config = drafter_config(folder)
    assert (config.head_dim, config.num_key_value_heads, config.keys_are_values) == (16, 1, True)
    assert config.inv_freq == (1.0, *[0.0] * 7)
    assert config.input_scale == 32**0.5
    assert config.num_attention_heads == 4
    other = edited(folder, attention_k_eq_v=False)
    assert (other.num_key_value_heads, other.keys_are_values) == (2, False)
    edited(folder, attention_k_eq_v=True, num_global_key_value_heads=None)
    assert drafter_config(folder).num_key_value_heads == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("enable_moe_block", True),
        ("hidden_activation", "silu"),
        ("hidden_size_per_layer_input", 8),
        ("layer_types", ["sliding_attention", "full_attention"]),
        ("num_kv_shared_layers", 1),
    ],
)
def test_other_layers_of_gemma4_are_refused(
    write: Callable[[str], Path], key: str, value: object
) -> None:
    with pytest.raises(CheckpointError, match=f"{key} = .* is not supported"):
        edited(write("deepspec-gemma4"), **{key: value})


@pytest.mark.parametrize("section", ["dflash_config", None])
def test_sinks_and_a_window_for_all_layers(write: Callable[[str], Path], section: str) -> None:
    folder = write("dflash")
    config = read_config(folder)
    del config["layer_types"], config["sliding_window"]

    def parsed(**settings: Any) -> DrafterConfig:
        changed = {**config, "dflash_config": dict(config["dflash_config"])}
        (changed[section] if section else changed).update(settings)
        (folder / "config.json").write_text(json.dumps(changed))
        assert unknown_keys(changed) == []
        return drafter_config(folder)

    assert parsed(attention_sink_bias=True).attention_sinks
    assert not parsed(attention_sink_bias=False).attention_sinks
    windows = {"use_swa": True, "swa_window_size": 4}
    found = parsed(**windows)
    assert (found.sliding_windows, found.causal) == ((4, 4), (False, False))
    assert parsed(**windows, causal=True).causal == (True, True)
    with pytest.raises(CheckpointError, match="lacks 'swa_window_size'"):
        parsed(use_swa=True)
    config |= {"layer_types": ["full_attention"] * 2, "sliding_window": None}
    assert parsed(**windows).sliding_windows == (4, 4)
    config |= {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 9}
    found = parsed(**windows)
    assert (found.sliding_windows, found.causal) == ((4, None), (True, False))


def test_sinks_of_mimo_at_the_top_level(write: Callable[[str], Path]) -> None:
    assert edited(write("dflash"), add_swa_attention_sink_bias=True).attention_sinks


@pytest.mark.parametrize("backend", ["reference", "cuda", "mlx"])
def test_interleaved_rotary_embeddings_of_lfm2(backend: str, tmp_path: Path) -> None:
    """The same drafter with the channels of its heads in the other order drafts the same."""
    pytest.importorskip({"reference": "numpy", "cuda": "torch", "mlx": "mlx_lm"}[backend])
    write_target(tmp_path / "target", "qwen3", seed=0)
    write_dialect(tmp_path / "halves", tmp_path / "target", "deepspec", seed=1)
    config, tensors = read_config(tmp_path / "halves"), read_tensors(tmp_path / "halves")
    d = config["head_dim"]
    for name, tensor in tensors.items():
        if re.search(r"\.[qk]_(proj|norm)\.", name):
            halves = tensor.reshape(-1, 2, d // 2, *tensor.shape[1:])
            tensors[name] = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(tensor.shape))
    config |= {"architectures": ["Lfm2DSparkDraftModel"], "rope_is_neox_style": False}
    save(tmp_path / "pairs", config, tensors)
    log_probs = []
    for name in ("halves", "pairs"):
        options = LoadConfig(device="cpu", dtype="float32")
        pair = loader(backend)(tmp_path / "target", tmp_path / name, options)
        with SequenceSession(pair, drafts=True) as sequence:
            sequence.extend([1, 2, 3, 4, 5])
            log_probs.append(pair.drafter.log_probs(sequence.draft(6)))
    np.testing.assert_allclose(*log_probs, atol=1e-5)


def test_the_window_of_muse_glimmers_assistant(folder: Path) -> None:
    settings = {
        "architectures": ["MuseGlimmerAssistantModel"],
        "mask_token_id": 3,
        "target_layer_ids": [0, 2],
        "sliding_window": 7,
    }
    config = {k: x for k, x in read_config(folder).items() if not k.endswith("flash_config")}
    found = parse_drafter_config(config | settings)
    assert (found.causal, found.sliding_windows) == ((False, False), (8, 8))
    kinds = ["full_attention", "sliding_attention"]
    found = parse_drafter_config(config | settings | {"layer_types": kinds})
    assert found.sliding_windows == (None, 8)
    changed = replace_settings(config | settings, {"is_causal": True, "mask_token_id": 4})
    found = parse_drafter_config(changed)
    assert (found.causal, found.mask_token_id) == ((True, True), 4)


@pytest.mark.parametrize("causal", [True, False])
def test_causal_windows_of_speculators_are_replaced(
    write: Callable[[str], Path], causal: bool
) -> None:
    config = read_config(write("speculators-dflash"))
    windows = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 7}
    config["transformer_layer_config"] |= windows
    found = parse_drafter_config(replace_settings(config, {"is_causal": causal}))
    assert found.causal == (causal, causal)


@pytest.mark.parametrize("backend", ["reference", "cuda", "mlx"])
def test_a_mask_beyond_the_targets_vocabulary(backend: str, tmp_path: Path) -> None:
    """Its embedding is used, and other tokens that the target lacks change nothing."""
    pytest.importorskip({"reference": "numpy", "cuda": "torch", "mlx": "mlx_lm"}[backend])
    write_target(tmp_path / "target", "qwen3", seed=0)
    write_dialect(tmp_path / "same", tmp_path / "target", "deepspec", seed=1)
    config, tensors = read_config(tmp_path / "same"), read_tensors(tmp_path / "same")
    vocab_size, mask = config["vocab_size"], config["mask_token_id"]
    rng = np.random.default_rng(2)
    for name, tensor in tensors.items():
        if len(tensor) == vocab_size:
            rows = rng.normal(size=(3, tensor.shape[1])).astype(np.float32)
            tensors[name] = np.concatenate([tensor, rows])
    embeddings = tensors["embed_tokens.weight"]
    embeddings[vocab_size + 1] = embeddings[mask]
    config |= {"vocab_size": vocab_size + 3, "mask_token_id": vocab_size + 1}
    save(tmp_path / "wide", config, tensors)
    options = LoadConfig(device="cpu", dtype="float32")
    found = []
    for name in ("same", "wide"):
        pair = loader(backend)(tmp_path / "target", tmp_path / name, options)
        with SequenceSession(pair, drafts=True) as sequence:
            sequence.extend([1, 2, 3, 4, 5])
            block = sequence.draft(6)
            previous = np.full(pair.drafter_config.depths, 7, np.int32)
            found.append((pair.drafter.log_probs(block), pair.head.log_probs(block, previous)))
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)
    del tensors["embed_tokens.weight"]
    save(tmp_path / "wide", config, tensors)
    with pytest.raises(CheckpointError, match="its vocabulary has 27 tokens, the target's has 24"):
        loader(backend)(tmp_path / "target", tmp_path / "wide", options)


def test_dspark_for_qwen3_5_is_deepspec_unless_its_queries_are_gated(
    write: Callable[[str], Path],
) -> None:
    folder = write("deepspec")
    expected = drafter_config(folder)
    rope = {"rope_theta": 1000.0, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}
    edit_config(folder, lambda c: c.update(rope_parameters=rope))
    for architecture, gated in (("Qwen3DSparkModel", True), ("Qwen35DSparkModel", False)):
        settings = {"architectures": [architecture], "enable_qwen35_gated_q_proj": gated}
        edit_config(folder, lambda c, settings=settings: c.update(settings))
        assert drafter_config(folder) == expected  # the keys are the target's
    edit_config(folder, lambda c: c.update(enable_qwen35_gated_q_proj=True))
    found = drafter_config(folder)
    assert found.gated
    assert found.norm_offset == 1
    assert found.inv_freq == pytest.approx((1, 1000**-0.5, 0, 0))
    with pytest.raises(CheckpointError, match=r"q_proj.weight has shape \(32, 32\), .* \(64, 32\)"):
        load_tensors(folder, read_file, **TARGET)
    yarn = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0}
    edit_config(folder, lambda c: c.update(rope_parameters=yarn))
    with pytest.raises(CheckpointError, match="'yarn' is not supported with gated queries"):
        drafter_config(folder)


def write_gated(folder: Path) -> tuple[Config, dict[str, np.ndarray[Any, Any]]]:
    """Write a small target, and a random drafter whose layers are Qwen3.5's."""
    write_target(folder / "target", "qwen3", seed=0)
    write_dialect(folder / "drafter", folder / "target", "deepspec", seed=1)
    config, tensors = read_config(folder / "drafter"), read_tensors(folder / "drafter")
    config |= {
        "architectures": ["Qwen35DSparkModel"],
        "enable_qwen35_gated_q_proj": True,
        "rope_parameters": {"rope_theta": 1000.0, "partial_rotary_factor": 0.5},
    }
    rng = np.random.default_rng(2)
    for name, x in tensors.items():
        if name.endswith("q_proj.weight"):
            size = 2 * len(x), x.shape[1]
            tensors[name] = rng.normal(scale=0.5, size=size).astype(np.float32)
        if name.endswith("norm.weight"):
            tensors[name] = rng.normal(scale=0.3, size=x.shape).astype(np.float32)
    save(folder / "drafter", config, tensors)
    return config, tensors


def gated_block(
    config: Config, stored: dict[str, Any], features: np.ndarray[Any, Any], root: int
) -> np.ndarray[Any, Any]:
    """(S, vocab) log probabilities of a block, by the published formula on the stored tensors."""
    t = {name.removeprefix("model."): x.astype(np.float64) for name, x in stored.items()}
    d, kv_heads, p = config["head_dim"], config["num_key_value_heads"], len(features)

    def norm(name: str, x: Any) -> Any:
        scale = np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"])
        return x / scale * (1 + t[f"{name}.weight"])

    def linear(name: str, x: Any) -> Any:
        return x @ t[f"{name}.weight"].T

    def rotated(x: Any, first: int) -> Any:
        turned = d // 2
        angles = (first + np.arange(len(x)))[:, None, None] * 1000.0 ** -(
            np.arange(0, turned, 2) / turned
        )
        a, b, rest = x[..., : turned // 2], x[..., turned // 2 : turned], x[..., turned:]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)

    def sigmoid(x: Any) -> Any:
        return 1 / (1 + np.exp(-x))

    context = norm("hidden_norm", linear("fc", features))
    tokens = [root] + [config["mask_token_id"]] * (config["block_size"] - 1)
    x = t["embed_tokens.weight"][tokens]
    for n in range(config["num_hidden_layers"]):
        layer, own = f"layers.{n}.", f"layers.{n}.self_attn."
        y = norm(layer + "input_layernorm", x)
        rows = np.concatenate([context, y])
        both = linear(own + "q_proj", y).reshape(len(y), -1, 2 * d)
        q = rotated(norm(own + "q_norm", both[..., :d]), p)
        keys = linear(own + "k_proj", rows).reshape(len(rows), kv_heads, d)
        k = rotated(norm(own + "k_norm", keys), 0)
        v = linear(own + "v_proj", rows).reshape(len(rows), kv_heads, d)
        k, v = (z.repeat(q.shape[1] // kv_heads, 1) for z in (k, v))
        scores = np.exp(np.einsum("ihd,jhd->hij", q, k) * d**-0.5)
        out = np.einsum("hij,jhd->ihd", scores / scores.sum(-1, keepdims=True), v)
        out = out * sigmoid(both[..., d:])
        x = x + linear(own + "o_proj", out.reshape(len(y), -1))
        y = norm(layer + "post_attention_layernorm", x)
        gate = linear(layer + "mlp.gate_proj", y)
        x = x + linear(
            layer + "mlp.down_proj", gate * sigmoid(gate) * linear(layer + "mlp.up_proj", y)
        )
    logits = linear("lm_head", norm("norm", x))
    return np.asarray(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))


@pytest.mark.parametrize("backend", ["reference", "cuda", "mlx"])
def test_gated_queries_follow_the_published_formula(backend: str, tmp_path: Path) -> None:
    pytest.importorskip({"reference": "numpy", "cuda": "torch", "mlx": "mlx_lm"}[backend])
    config, tensors = write_gated(tmp_path)
    features, paths = [], (tmp_path / "target", tmp_path / "drafter")
    reference = loader("reference")(*paths, LoadConfig(device="cpu", dtype="float32"))
    with SequenceSession(reference, drafts=True) as sequence:
        sequence.extend([1, 2, 3, 4, 5])
        features = np.concatenate(sequence.state.context)
    expected = gated_block(config, tensors, features, 6)
    pair = loader(backend)(*paths, LoadConfig(device="cpu", dtype="float32"))
    with SequenceSession(pair, drafts=True) as sequence:
        sequence.extend([1, 2, 3, 4, 5])
        actual = pair.drafter.log_probs(sequence.draft(6))
    np.testing.assert_allclose(actual, expected, atol=1e-5)
