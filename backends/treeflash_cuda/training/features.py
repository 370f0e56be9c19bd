"""What training needs from the target: context features and top tokens, cached on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from treeflash.training.interfaces import Response
from treeflash_cuda.attention import AttentionContext, attention_context
from treeflash_cuda.target import Target
from treeflash_cuda.topk import topk
from treeflash_cuda.training.files import replacing

SHARD_TEXTS = 64
FORWARD_TOKENS = 2048
"""Maximum number of tokens in one forward pass, padding included."""
OUTPUT_ROWS = 1024
"""Maximum number of rows of logits in memory."""
NAMES = ("features", "top_tokens", "top_log_probs")


@dataclass(frozen=True, eq=False)
class TextFeatures:
    """The features of one text; on the CPU if they were cached, else on the target's device.

    Attributes:
        features: (length, layers * hidden_size).
        top_tokens: (response, K) int32; row i predicts token i of the response.
        top_log_probs: (response, K) float16 nats.
    """

    features: Tensor
    top_tokens: Tensor
    top_log_probs: Tensor


class FeatureStore:
    """The features of texts by number, computed by the target when they are first needed.

    They are cached in shards of consecutive texts. Texts beyond the size limit are computed anew
    each time.
    """

    def __init__(
        self,
        target: Target,
        layer_ids: Sequence[int],
        texts: Sequence[Response],
        top_tokens: int,
        folder: Path | None,
        max_bytes: float,
    ) -> None:
        """Take the texts and a target that captures `layer_ids`; no `folder` means no cache."""
        self.target = target
        self.layer_ids = layer_ids
        self.texts = texts
        self.top_tokens = top_tokens
        self.folder = folder
        self.max_bytes = max_bytes

    def get(self, numbers: Sequence[int]) -> list[TextFeatures]:
        """The features of some texts; those that are not cached are computed together."""
        found = {n: self._read(n) for n in numbers}
        missing = [n for n in numbers if found[n] is None]
        found |= dict(zip(missing, self._compute(missing), strict=True))
        return [text for n in numbers if (text := found[n]) is not None]

    def fill(self, shard: int) -> None:
        """Compute and cache a shard, unless it is cached or the cache is full."""
        if self.folder is None or self._path(shard).exists():
            return
        if sum(path.stat().st_size for path in self.folder.glob("*.safetensors")) > self.max_bytes:
            return
        numbers = range(len(self.texts))[shard * SHARD_TEXTS : (shard + 1) * SHARD_TEXTS]
        tensors = {
            f"{n}.{name}": getattr(text, name).cpu().contiguous()
            for n, text in zip(numbers, self._compute(numbers), strict=True)
            for name in NAMES
        }
        with replacing(self._path(shard)) as scratch:
            save_file(tensors, scratch)

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-len(self.texts) // SHARD_TEXTS)

    def _path(self, shard: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{shard:05d}.safetensors"

    def _read(self, number: int) -> TextFeatures | None:
        if self.folder is None or not self._path(number // SHARD_TEXTS).exists():
            return None
        with safe_open(self._path(number // SHARD_TEXTS), "pt") as file:
            return TextFeatures(*(file.get_tensor(f"{number}.{name}") for name in NAMES))

    def _compute(self, numbers: Sequence[int]) -> list[TextFeatures]:
        """Run the target on texts of similar length together."""
        done: dict[int, TextFeatures] = {}
        left = sorted(numbers, key=lambda n: len(self.texts[n]))
        while left:
            width = len(self.texts[left[-1]])
            size = max(1, FORWARD_TOKENS // width)
            part, left = left[-size:], left[:-size]
            done |= zip(part, self._forward([self.texts[n] for n in part]), strict=True)
        return [done[n] for n in numbers]

    @torch.inference_mode()
    def _forward(self, texts: Sequence[Response]) -> list[TextFeatures]:
        device = self.target.device
        width = max(map(len, texts))
        tokens = torch.zeros(len(texts), width, dtype=torch.long)
        for row, text in zip(tokens, texts, strict=True):
            row[: len(text)] = torch.tensor(text.token_ids)
        positions = torch.arange(width, device=device)
        with attention_context(AttentionContext.whole_text(width, device)) as captured:
            output = self.target.model.get_decoder()(
                input_ids=tokens.to(device),
                position_ids=positions.expand(len(texts), -1),
                use_cache=False,
            )
        features = torch.cat([captured[i] for i in self.layer_ids], -1)
        results = []
        for row, text in enumerate(texts):
            first, end = len(text.prompt_ids) - 1, len(text) - 1
            hidden = output.last_hidden_state[row, first:end]
            best, top_tokens = top_log_probs(self.target, hidden, self.top_tokens)
            # A copy: a view would keep the padding of all texts.
            own = features[row, : len(text)].clone()
            results.append(TextFeatures(own, top_tokens.int(), best.half()))
        return results


def top_log_probs(target: Target, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(n, k) log probabilities and tokens that the target finds most probable.

    Args:
        target: the model.
        hidden: (n, hidden_size) outputs of its decoder.
        k: number of tokens.
    """
    parts = []
    for chunk in hidden.split(OUTPUT_ROWS):
        logits = target.logits(chunk).float()
        best, tokens = topk(logits, k)
        parts.append((best - logits.logsumexp(-1, keepdim=True), tokens))
    return torch.cat([best for best, _ in parts]), torch.cat([tokens for _, tokens in parts])


def fingerprint(texts: Sequence[Response], **settings: object) -> str:
    """A name for the texts and settings that features were computed from."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for text in texts:
        digest.update(json.dumps(text.token_ids).encode())
    return digest.hexdigest()[:16]
