"""Log probabilities in OpenAI's form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from treeflash.text.assembler import Chunk
from treeflash.text.tokenizer import Tokenizer


def token_log_probs(tokenizer: Tokenizer, chunks: Sequence[Chunk]) -> list[dict[str, Any]]:
    """For each token of the chunks: its log probability, and those of the best tokens."""
    found = []
    for chunk in chunks:
        log_probs = chunk.step.log_probs
        assert log_probs is not None
        for i, token_id in enumerate(chunk.token_ids):
            best = zip(log_probs.tokens[i].tolist(), log_probs.values[i].tolist(), strict=True)
            found.append(
                {
                    **_entry(tokenizer, token_id, float(log_probs.chosen[i])),
                    "top_logprobs": [_entry(tokenizer, *pair) for pair in best],
                }
            )
    return found


def _entry(tokenizer: Tokenizer, token_id: int, log_prob: float) -> dict[str, Any]:
    text = tokenizer.token_text(token_id)
    return {"token": text, "logprob": log_prob, "bytes": list(text.encode())}
