"""Faulty folders and settings are refused by an error that names the fault."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from treeflash.config import DecodeConfig, SamplingConfig
from treeflash.decoding import decode
from treeflash.decoding.interfaces import Loader
from treeflash.decoding.text_session import TextSession
from treeflash.decoding.tree import DraftTree
from treeflash.drafters.folder import read_config, read_tensors
from treeflash.errors import CheckpointError, NumericalError, PromptError
from treeflash.testing.checkpoints import write_pair
from treeflash.testing.models import edit_config, save, write_target
from treeflash.testing.pairs import LOAD, TARGET_SEED, PairMaker
from treeflash.testing.samplings import SAMPLINGS
from treeflash.testing.weights import Tensors

MISFITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "hidden size": (lambda config: config.update(hidden_size=64), "hidden size is 64.* is 32"),
    "vocabulary": (lambda config: config.update(vocab_size=25), "vocabulary has 25.* has 24"),
    "layers": (lambda config: config.update(num_target_layers=9), "9 layers.* has 4"),
    "layer ids": (
        lambda config: config["dflash_config"].update(target_layer_ids=[0, 4]),
        r"layers \[0, 4\].* has 4",
    ),
    "mask token": (
        lambda config: config["dflash_config"].update(mask_token_id=24),
        "mask token 24 .*vocabulary of 24",
    ),
}


class ErrorTests:
    """Mixin of `BackendSuite`."""

    families: ClassVar[tuple[str, ...]]

    def test_missing_tensor_is_named(self, load: Loader, tmp_path: Path) -> None:
        target, drafter = write_pair(tmp_path, self.families[0])
        edit_tensors(drafter, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
        with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight"):
            load(target, drafter, LOAD)

    def test_misshapen_tensor_is_named(self, load: Loader, tmp_path: Path) -> None:
        target, drafter = write_pair(tmp_path, self.families[0])
        edit_tensors(
            drafter,
            lambda tensors: tensors.update({"model.fc.weight": np.zeros((32, 32), np.float32)}),
        )
        with pytest.raises(CheckpointError, match=r"fc\.weight.*\(32, 32\).*\(32, 64\)"):
            load(target, drafter, LOAD)

    def test_missing_tensor_of_the_target_is_named(self, load: Loader, tmp_path: Path) -> None:
        target, drafter = write_pair(tmp_path, self.families[0])
        edit_tensors(target, lambda tensors: tensors.pop("model.layers.1.self_attn.o_proj.weight"))
        with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.o_proj"):
            decode_something(load, target, drafter)

    @pytest.mark.parametrize(("edit", "message"), MISFITS.values(), ids=MISFITS)
    def test_pair_that_does_not_fit(
        self,
        load: Loader,
        tmp_path: Path,
        edit: Callable[[dict[str, Any]], object],
        message: str,
    ) -> None:
        target, drafter = write_pair(tmp_path, self.families[0])
        edit_config(drafter, edit)
        with pytest.raises(CheckpointError, match=message):
            load(target, drafter, LOAD)

    @pytest.mark.parametrize("which", ["target", "drafter"])
    def test_truncated_file(self, load: Loader, tmp_path: Path, which: str) -> None:
        target, drafter = write_pair(tmp_path, self.families[0])
        file = tmp_path / which / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1000])
        with pytest.raises(CheckpointError, match=which):
            load(target, drafter, LOAD)

    @pytest.mark.parametrize("which", ["target", "drafter"])
    @pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
    def test_missing_file(self, load: Loader, tmp_path: Path, which: str, file: str) -> None:
        target, drafter = write_pair(tmp_path, self.families[0])
        (tmp_path / which / file).unlink()
        with pytest.raises(CheckpointError, match=which):
            load(target, drafter, LOAD)

    def test_broken_config(self, load: Loader, tmp_path: Path) -> None:
        target, drafter = write_pair(tmp_path, self.families[0])
        (drafter / "config.json").write_text("{", encoding="utf-8")
        with pytest.raises(CheckpointError, match=r"config\.json"):
            load(target, drafter, LOAD)

    @pytest.mark.parametrize("method", ["ar", "treeflash"])
    def test_target_that_is_not_a_number(self, load: Loader, tmp_path: Path, method: str) -> None:
        target, drafter = write_pair(tmp_path, self.families[0])
        edit_tensors(
            target, lambda tensors: tensors["model.layers.1.input_layernorm.weight"].fill(np.nan)
        )
        with pytest.raises(NumericalError, match="not finite"):
            decode_something(load, target, drafter, method)

    @pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
    def test_one_node_that_is_not_a_number(
        self, load: Loader, tmp_path: Path, sampling: SamplingConfig
    ) -> None:
        # Among so many tokens, one that is broken is not met before the tree.
        write_target(tmp_path, self.families[0], seed=TARGET_SEED, vocab_size=4096)
        edit_tensors(tmp_path, lambda tensors: tensors["model.embed_tokens.weight"][7].fill(np.nan))
        text = TextSession(load(tmp_path, None, LOAD))
        text.extend([1, 2, 3])
        tokens, order = np.array([4, 5, 7], np.int32), np.arange(3, dtype=np.int32)
        tree = DraftTree(tokens, order - 1, order, np.zeros(3))
        with pytest.raises(NumericalError, match="not finite"):
            text.verify(tree, sampling)

    @pytest.mark.parametrize("method", ["dflash", "ddtree", "treeflash", "treeflash-chain"])
    @pytest.mark.parametrize("value", [np.nan, np.inf], ids=["nan", "infinity"])
    @pytest.mark.parametrize("vocab_size", [24, 2048])
    def test_drafter_that_is_not_finite(
        self, load: Loader, tmp_path: Path, method: str, vocab_size: int, value: float
    ) -> None:
        """In the larger vocabulary the AR head scores a shortlist, which is searched for."""
        assert DecodeConfig().head_vocab in range(24, 2048)
        target, drafter = write_pair(tmp_path, self.families[0], vocab_size=vocab_size)
        edit_tensors(drafter, lambda tensors: tensors["model.fc.weight"].put(0, value))
        with pytest.raises(NumericalError, match="the drafter's output is not finite"):
            decode_something(load, target, drafter, method)

    def test_prompts_that_cannot_be_decoded(self, pair: PairMaker) -> None:
        backend = pair(target={"max_positions": 32}).tested
        for prompt, message in (
            ([], "empty"),
            ([1] * 32, "limit is 32"),
            ([1, 24], "vocabulary of 24"),
            ([-1], "vocabulary of 24"),
        ):
            with pytest.raises(PromptError, match=message):
                decode(backend, prompt, DecodeConfig())


def edit_tensors(folder: Path, edit: Callable[[Tensors], object]) -> None:
    """Change the tensors of a folder in place."""
    tensors = {name: np.array(tensor) for name, tensor in read_tensors(folder).items()}
    edit(tensors)
    save(folder, read_config(folder), tensors)


def decode_something(load: Loader, target: Path, drafter: Path, method: str = "ar") -> None:
    """Load a pair and decode a few tokens."""
    backend = load(target, drafter, LOAD)
    list(decode(backend, [1, 2, 3], DecodeConfig(method=method, max_tokens=4)))  # type: ignore[arg-type]
