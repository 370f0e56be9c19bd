"""Blocks that the drafter drafts itself, and what the target says of them (arXiv 2605.29343).

After a text's token the drafter's chain of best tokens follows the text for a while, then leaves
it. The target scores all of the chain, the tokens after the first wrong one too: at inference the
drafter's head sees such tokens, but never in a text.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from treeflash_cuda.attention import AttentionContext, attention_context
from treeflash_cuda.target import Target
from treeflash_cuda.training.batch import Batch, Drafts
from treeflash_cuda.training.block_attention import GROUP
from treeflash_cuda.training.features import top_log_probs


def with_drafts(
    batch: Batch, blocks: nn.Module, target: Target, share: float, generator: torch.Generator
) -> Batch:
    """Let the drafter draft after some of the anchors.

    Args:
        batch: anchors in texts.
        blocks: the drafter, `Blocks` or a wrapper of it.
        target: scores the drafts.
        share: of the anchors, rounded up to a multiple of `GROUP`.
        generator: chooses them; on the CPU, so that a run is the same on every device.
    """
    total = batch.anchors.shape[1]
    count = min(-(-round(share * total) // GROUP) * GROUP, total)
    if not count:
        return batch
    chosen = torch.randperm(total, generator=generator)[:count].sort().values
    columns = chosen.to(batch.anchors.device)
    part = replace(batch, anchors=batch.anchors[:, columns], valid=batch.valid[:, columns])
    with torch.no_grad():
        tokens: Tensor = blocks(part)
    scored = [
        score_drafts(target, *row, batch.top_tokens.shape[2])
        for row in zip(batch.tokens, part.anchors, tokens, strict=True)
    ]
    top_tokens, log_probs = (torch.stack(parts) for parts in zip(*scored, strict=True))
    return replace(batch, drafts=Drafts(columns, tokens, top_tokens, log_probs))


@torch.no_grad()
def score_drafts(
    target: Target, text: Tensor, anchors: Tensor, drafts: Tensor, top_tokens: int
) -> tuple[Tensor, Tensor]:
    """The target's distributions at every token of many drafts after one text.

    Args:
        target: the model.
        text: (length,) tokens.
        anchors: (C,) positions of the roots.
        drafts: (C, D) tokens after them.
        top_tokens: K.

    Returns:
        (C, D, K) top tokens and their log probabilities: element d is given those before it.
    """
    device, length, (count, depths) = text.device, len(text), drafts.shape
    depth = torch.arange(depths, device=device)
    # The last token of a draft is given to nothing.
    own = (anchors[:, None] + 1 + depth[:-1]).flatten()
    columns = torch.arange(length, device=device)
    block = torch.arange(count, device=device).repeat_interleave(depths - 1)
    ancestors = torch.ones(length + len(own), length + len(own), dtype=torch.bool, device=device)
    ancestors[:length, length:] = False
    ancestors[length:, :length] = columns <= anchors.repeat_interleave(depths - 1)[:, None]
    ancestors[length:, length:] = block[:, None] == block
    context = AttentionContext(0, torch.cat([columns, own]), ancestors)
    with attention_context(context):
        output = target.model.get_decoder()(
            input_ids=torch.cat([text, drafts[:, :-1].flatten()])[None],
            position_ids=context.positions[None],
            use_cache=False,
        )
    states = output.last_hidden_state[0]
    drafted = states[length:].unflatten(0, (count, depths - 1))
    wanted = torch.cat([states[anchors][:, None], drafted], 1)
    log_probs, tokens = top_log_probs(target, wanted.flatten(0, 1), top_tokens)
    return tokens.unflatten(0, (count, depths)), log_probs.unflatten(0, (count, depths))
