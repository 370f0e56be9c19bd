"""Each published dialect is recognised and means the right thing; trees and chains in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from treeflash.drafter_config import DrafterConfig
from treeflash.drafters.folder import read_config, read_file, read_tensors
from treeflash.drafters.formats import drafter_config, format_of, unknown_keys
from treeflash.drafters.loading import load_tensors, refuse_extensions
from treeflash.errors import CheckpointError, UnsupportedModelError
from treeflash.testing.dialects import DIALECTS, write_dialect
from treeflash.testing.models import edit_config, save, write_target

TARGET = {"hidden_size": 32, "vocab_size": 24, "num_hidden_layers": 4}
# The format, the head, the first slot that predicts, the layers read.
MEANINGS = {
    "dflash": ("DFlash", None, 1, (0, 2)),
    "dflash2": ("DFlash2", "selector", 1, (0, 2)),
    "deepspec": ("DeepSpec", "vanilla", 0, (-1, 2)),
    "deepspec-gated": ("DeepSpec", "gated", 0, (-1, 2)),
    "deepspec-rnn": ("DeepSpec", "rnn", 0, (-1, 2)),
    "deepspec-dflash": ("DeepSpec", None, 0, (-1, 2)),
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


@pytest.mark.parametrize("dialect", DIALECTS)
def test_meaning(write: Callable[[str], Path], dialect: str) -> None:
    folder = write(dialect)
    config = drafter_config(folder)
    name, head, first_slot, layers = MEANINGS[dialect]
    assert format_of(read_config(folder)).name == name
    assert config.head == head
    assert config.first_slot == first_slot
    assert config.depths == 6 - first_slot
    assert config.target_layer_ids == layers
    assert config.confidence_head == (head in ("vanilla", "gated", "rnn"))
    assert (config.head_state_size > 0) == (head in ("rnn", "domino"))
    assert unknown_keys(read_config(folder)) == []
    load_tensors(folder, read_file, **TARGET)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_no_dialect_passes_for_dflash(write: Callable[[str], Path], dialect: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"^a test does not support a drafter with \w"):
        refuse_extensions(drafter_config(write(dialect)), "a test")


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
            "lacks 'mask_token_id'; speculators drafters need it: set it as this one was trained$",
        ),
        ("speculators-dflash", {"aux_hidden_state_layer_ids": None}, "lacks 'aux_hidden_state"),
        ("speculators-dflash", {"target_hidden_size": 64}, "target_hidden_size unlike"),
        ("speculators-dflash2", {"draft_vocab_size": 16}, "DFlash2 with a vocabulary of its own"),
        ("deepspec", {"markov_head_type": "lstm"}, "Markov head 'lstm' is not supported"),
        ("deepspec", {"markov_rank": 0}, "a confidence head without a Markov head"),
        ("deepspec", {"target_layer_ids": ...}, "lacks 'target_layer_ids'"),
        ("deepspec", {"draft_vocab_size": 16}, "draft_vocab_size = 16 is not supported"),
    ],
)
def test_refusals(
    write: Callable[[str], Path], dialect: str, settings: dict[str, Any], problem: str
) -> None:
    folder = write(dialect)
    with pytest.raises(CheckpointError, match=problem):
        edited(folder, **settings)


def test_a_selector_has_whole_groups(write: Callable[[str], Path]) -> None:
    folder = write("dflash2")
    edit_config(folder, lambda c: c["dflash_config"].update(conv_group_size=5))
    with pytest.raises(CheckpointError, match="hidden_size 32 is not a multiple of"):
        drafter_config(folder)


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
