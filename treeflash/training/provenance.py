"""Which model generated the lines of an output file, and with which settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from treeflash.errors import ConfigError
from treeflash.training.interfaces import Responder


def provenance(responder: Responder) -> dict[str, str]:
    """The settings of a responder that change its texts; every line records them."""
    return {"target": responder.target, "backend": responder.backend, "dtype": responder.dtype}


def check_settings(output: Path, record: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Check that a line of an output file was generated with these settings.

    Raises:
        ConfigError: it was generated with others, which do not belong in the same file.
    """
    for name, value in settings.items():
        if record[name] != value:
            raise ConfigError(
                f"{output} has lines generated with {name} {record[name]}, not {value}; use the "
                "same settings and the same order of prompts, or another --output"
            )
