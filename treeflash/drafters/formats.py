"""Which published format a drafter's folder has, and what it says in that format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from treeflash.config import DrafterConfig
from treeflash.drafters import dflash, treeflash
from treeflash.drafters.folder import read_config
from treeflash.errors import CheckpointError


def drafter_config(folder: Path) -> DrafterConfig:
    """The drafter that the `config.json` of a folder describes.

    Raises:
        CheckpointError: a key is missing, has a wrong type, or asks for what is not supported.
    """
    path = folder / "config.json"
    config = read_config(folder)
    try:
        return parse_drafter_config(config)
    except KeyError as error:
        raise CheckpointError(
            f"{path} lacks {error}; is it a DFlash or TreeFlash drafter?"
        ) from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path} is not valid: {error}") from error


def parse_drafter_config(config: Mapping[str, Any]) -> DrafterConfig:
    """The drafter that a configuration describes; raises what `dflash.parse_config` does."""
    return dflash.parse_config(config, head=treeflash.head_name(config))


def drafter_shapes(config: DrafterConfig, head_size: int = 0) -> dict[str, tuple[int, ...]]:
    """The shapes of a drafter's tensors, by canonical name.

    Args:
        config: of the drafter.
        head_size: I, the inner width of the AR head; ignored if there is none.
    """
    head = treeflash.head_shapes(config.head, config.hidden_size, head_size)
    return dflash.backbone_shapes(config) | head


def canonical_name(name: str) -> str:
    """A tensor's name, the same in every format."""
    return name.removeprefix(treeflash.BACKBONE_PREFIX)
