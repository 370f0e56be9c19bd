"""What lists of models tell of a model, whether it is in memory or not."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from treeflash.drafters.folder import read_config
from treeflash.drafters.mtp_formats import text_config
from treeflash.errors import TreeflashError
from treeflash.hub.sizes import parameter_count, weights_bytes
from treeflash.low_bits import StoredWeight
from treeflash.serving.message_parser import ResponseTemplate
from treeflash.serving.service import Service
from treeflash.text.infill import Infill
from treeflash.text.tokenizer import Tokenizer

CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
"""The keys of a configuration, one of which has the number of positions."""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Facts about a target; some are exact only once the model has been loaded."""

    folder: Path | None  # the target's folder; None if it was not loaded from one
    family: str  # the type of the model, as its configuration names it
    context: int  # the most tokens of a prompt and its answer together
    takes_images: bool
    precision: str  # the format of most weights, or their data type; empty if it is not known
    parser: str | None  # the name of the form of tool calls; None for the model's own form
    read_tokenizer: Callable[[], Tokenizer]

    @classmethod
    def of_service(cls, service: Service) -> ModelFacts:
        """Return the facts of a loaded model."""
        model = service.engine.model
        tokenizer = model.tokenizer  # the model itself must not stay in memory for its facts
        config = {} if model.folder is None else read_config(model.folder)
        return cls(
            folder=model.folder,
            family=_family(config),
            context=model.backend.max_positions,
            takes_images=service.takes_images,
            precision=_format(config) or model.backend.dtype,
            parser=service.engine.settings.tool_call_parser,
            read_tokenizer=lambda: tokenizer,
        )

    @classmethod
    def of_folder(cls, folder: Path, parser: str | None, *, images: bool) -> ModelFacts:
        """Return the facts of a target that is not loaded; `images` says whether its tower will be.

        Raises a CheckpointError if the folder has no configuration.
        """
        whole = read_config(folder)
        config = text_config(whole)
        return cls(
            folder=folder,
            family=_family(whole),
            context=int(next((config[key] for key in CONTEXT if config.get(key)), sys.maxsize)),
            takes_images=images and "vision_config" in config,
            precision=_format(whole) or str(config.get("dtype") or config.get("torch_dtype") or ""),
            parser=parser,
            read_tokenizer=partial(Tokenizer.from_folder, folder),
        )

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The target's tokenizer; None if it cannot be read."""
        try:
            return self.read_tokenizer()
        except TreeflashError:
            return None

    @property
    def chat_template(self) -> str:
        return "" if self.tokenizer is None else self.tokenizer.chat_template

    @property
    def capabilities(self) -> list[str]:
        """What the model can do, by Ollama's names."""
        tokenizer = self.tokenizer
        if tokenizer is None:
            return ["completion"]
        template = ResponseTemplate.find(tokenizer, self.folder, self.parser)
        capabilities = {
            "completion": True,
            "tools": template is not None and tokenizer.knows_tools,
            "thinking": tokenizer.knows_thinking,
            "vision": self.takes_images,
            "insert": Infill.find(tokenizer) is not None,
        }
        return [name for name, known in capabilities.items() if known]

    @cached_property
    def parameters(self) -> int | None:
        """The number of weights; None if it is not known."""
        return None if self.folder is None else parameter_count(self.folder)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights; 0 if they are not known."""
        return 0 if self.folder is None else weights_bytes(str(self.folder))


def _family(config: Mapping[str, Any]) -> str:
    return str(config.get("model_type", "unknown"))


def _format(config: Mapping[str, Any]) -> str:
    """Return the format of most weights, such as Q4_1, or the method that quantised them."""
    settings = config.get("quantization_config") or {}
    sizes: Counter[str] = Counter()
    for module in StoredWeight.of(settings).values():
        sizes[module.name] += math.prod(module.shape)
    return max(sizes, key=sizes.__getitem__, default=str(settings.get("quant_method") or ""))
