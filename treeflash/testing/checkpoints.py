"""Folders in every published form load, and mean the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from treeflash.config import DecodeConfig
from treeflash.decoding import decode
from treeflash.decoding.interfaces import Backend, Loader
from treeflash.decoding.text_session import TextSession
from treeflash.decoding.tree import DraftTree
from treeflash.drafters.folder import read_tensors
from treeflash.errors import ConfigError
from treeflash.testing.comparisons import assert_close, assert_equal_tables, tokens_of
from treeflash.testing.generations import check_generation, prompt_of
from treeflash.testing.models import (
    HYBRID_FAMILIES,
    edit_config,
    save,
    write_drafter,
    write_target,
)
from treeflash.testing.pairs import DRAFTER_SEED, LOAD, TARGET_SEED, Pair, PairMaker
from treeflash.testing.transitions import (
    check_transitions,
    marginals,
    settled_prompt,
    transitions,
)

Config = dict[str, Any]


class CheckpointTests:
    """Mixin of `BackendSuite`."""

    families: ClassVar[tuple[str, ...]]

    def test_dflash_folder_has_no_head(self, pair: PairMaker) -> None:
        dflash, treeflash = pair(drafter={"format": "dflash"}), pair()
        assert dflash.tested.head is None
        prompt = settled_prompt(treeflash.reference)
        assert_equal_tables(
            marginals(dflash.tested, prompt, 16), marginals(treeflash.reference, prompt, 16)
        )
        with pytest.raises(ConfigError, match="no AR head"):
            decode(dflash.tested, prompt, DecodeConfig(method="treeflash"))

    @pytest.mark.parametrize("format", ["dflash", "treeflash"])
    def test_sharded_folder(self, pair: PairMaker, format: str) -> None:
        check_generation(
            pair(drafter={"format": format, "sharded": True}),
            DecodeConfig(method="ddtree", budget=12, max_tokens=6),
        )

    def test_sharded_target(self, load: Loader, tmp_path: Path) -> None:
        target, drafter = write_pair(tmp_path, self.families[0])
        logits = logits_of(load(target, drafter, LOAD))
        tensors = read_tensors(target)
        config = (target / "config.json").read_bytes()
        (target / "model.safetensors").unlink()
        save(target, {}, tensors, sharded=True)
        (target / "config.json").write_bytes(config)
        assert_close(logits_of(load(target, drafter, LOAD)), logits)

    def test_default_target_layer_ids(self, pair: PairMaker) -> None:
        models = pair(target={"layers": 6}, drafter={"target_layer_ids": None})
        assert models.tested.drafter_config is not None
        assert models.tested.drafter_config.target_layer_ids == (1, 3)
        check_transitions(models)

    def test_default_target_layer_id_of_one_layer(self, pair: PairMaker) -> None:
        models = pair(drafter={"target_layer_ids": None, "layers": 1})
        assert models.tested.drafter_config is not None
        assert models.tested.drafter_config.target_layer_ids == (2,)
        check_transitions(models)

    def test_order_of_target_layer_ids(self, pair: PairMaker) -> None:
        check_transitions(pair(drafter={"target_layer_ids": (2, 0, 1)}))

    def test_tied_embeddings(self, pair: PairMaker, family: str) -> None:
        models = pair(family, target={"tied": True})
        check_transitions(models)
        assert_close(logits_of(models.tested), logits_of(models.reference))

    @pytest.mark.parametrize("absent", ["rope_theta", "rope_parameters"])
    def test_rope_settings_in_either_form(
        self, load: Loader, tmp_path: Path, family: str, absent: str
    ) -> None:
        """A folder has one form or the other; a loader that misses it answers nonsense."""
        if family in HYBRID_FAMILIES:
            pytest.skip("these families have one form")
        target, drafter = write_pair(tmp_path, family)
        both = load(target, drafter, LOAD)
        edit_config(target, lambda config: config.pop(absent))
        edit_config(drafter, lambda config: config.pop(absent))
        one = load(target, drafter, LOAD)
        assert_close(logits_of(one), logits_of(both))
        assert one.drafter_config == both.drafter_config

    @pytest.mark.parametrize(
        "rewrite",
        [
            lambda config: config.update(config.pop("treeflash_config")),
            lambda config: config["dflash_config"].update(block_size=config.pop("block_size")),
            lambda config: config.update(layer_types=["full_attention"] * 2),
        ],
        ids=["head at top level", "block size inside", "layer types"],
    )
    def test_forms_of_drafter_configs(
        self, load: Loader, tmp_path: Path, rewrite: Callable[[Config], object]
    ) -> None:
        target, drafter = write_pair(tmp_path, self.families[0])
        prompt = settled_prompt(Pair.load(load, target, drafter).reference)
        expected = transitions(load(target, drafter, LOAD), prompt, 16, 16)
        edit_config(drafter, rewrite)
        assert_equal_tables(transitions(load(target, drafter, LOAD), prompt, 16, 16), expected)

    def test_target_alone(self, load: Loader, pair: PairMaker) -> None:
        models = pair()
        backend = load(models.target, None, LOAD)
        assert backend.drafter_config is None
        assert backend.head is None
        prompt, config = prompt_of(backend, 0), DecodeConfig(method="ar", max_tokens=8)
        assert tokens_of(list(decode(backend, prompt, config))) == tokens_of(
            list(decode(models.tested, prompt, config))
        )
        with pytest.raises(ConfigError, match="needs a drafter"):
            decode(backend, prompt, DecodeConfig(method="ddtree"))

    def test_description(self, pair: PairMaker) -> None:
        models = pair()
        assert models.tested.vocab_size == models.reference.vocab_size
        assert models.tested.max_positions == models.reference.max_positions
        assert models.tested.drafter_config == models.reference.drafter_config
        assert models.tested.dtype == "float32"
        assert models.tested.name
        assert models.tested.device
        assert models.tested.memory_bytes() >= 0


def write_pair(folder: Path, family: str, *, vocab_size: int = 24) -> tuple[Path, Path]:
    """Write a pair that a test may change; returns the folders of the target and the drafter."""
    write_target(folder / "target", family, seed=TARGET_SEED, vocab_size=vocab_size)
    write_drafter(folder / "drafter", folder / "target", seed=DRAFTER_SEED)
    return folder / "target", folder / "drafter"


def logits_of(backend: Backend) -> NDArray[np.float32]:
    """Logits after a prompt that is long enough for positions to matter."""
    text = TextSession(backend)
    text.extend(prompt_of(backend, 0) * 3)
    return text.logits(DraftTree.root_only(1))
