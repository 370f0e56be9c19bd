"""Fill in the middle: the prompt from which a model of code writes what fits between two texts.

Models that were trained for it have special tokens, and no two families have the same ones. The
tokenizer declares them, so it tells the family:

    Qwen     <|fim_prefix|> before <|fim_suffix|> after <|fim_middle|>     then what is between
    Mistral  [SUFFIX] after [PREFIX] before                                then what is between
"""

from __future__ import annotations

from dataclasses import dataclass

from treeflash.errors import PromptError
from treeflash.text.tokenizer import Tokenizer, check_unicode


@dataclass(frozen=True)
class GapTokens:
    """The special tokens of a family, each put before a part of the prompt."""

    before: str
    after: str
    middle: str | None  # None if the model writes on after the text before the gap, the last part
    ends: tuple[str, ...] = ()  # further tokens that end what is between


GAP_TOKENS = (
    # Qwen2.5-Coder and all later models of Qwen, CodeGemma, Granite
    GapTokens(
        *("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
        ends=(
            *("<|endoftext|>", "<|fim_pad|>", "<|repo_name|>"),
            *("<|file_sep|>", "<|file_separator|>"),
        ),
    ),
    # StarCoder, StarCoder2, and many models after them
    GapTokens(
        *("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
        ends=("<|endoftext|>", "<fim_pad>", "<file_sep>", "<repo_name>"),
    ),
    # SantaCoder
    GapTokens("<fim-prefix>", "<fim-suffix>", "<fim-middle>", ends=("<|endoftext|>", "<fim-pad>")),
    # CodeLlama
    GapTokens("▁<PRE>", "▁<SUF>", "▁<MID>", ends=("▁<EOT>",)),
    # DeepSeek-Coder
    GapTokens("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    # Codestral
    GapTokens("[PREFIX]", "[SUFFIX]", None),
)


@dataclass(frozen=True)
class Infill:
    """Makes prompts that ask for the text of a gap, with the tokens of one tokenizer."""

    tokenizer: Tokenizer
    before: int
    after: int
    middle: int | None
    stop_token_ids: frozenset[int]  # tokens that end the text of a gap

    @classmethod
    def find(cls, tokenizer: Tokenizer) -> Infill | None:
        """Return what a tokenizer has for it; None if it declares no such tokens."""
        ids: dict[str, int] = tokenizer.transformers.get_added_vocab()
        for family in GAP_TOKENS:
            tokens = [x for x in (family.before, family.after, family.middle) if x is not None]
            if ids.keys() >= set(tokens):
                middle = None if family.middle is None else ids[family.middle]
                ends = {ids[token] for token in (*tokens, *family.ends) if token in ids}
                stops = tokenizer.stop_token_ids | ends
                return cls(tokenizer, ids[family.before], ids[family.after], middle, stops)
        return None

    def encode(self, before: str, after: str) -> list[int]:
        """Return the ids of the prompt; a PromptError if a text is not valid Unicode."""
        for text in (before, after):
            check_unicode(text)
        parts = [self.before, *self.tokenizer.encode_continuation(before)]
        suffix = [self.after, *self.tokenizer.encode_continuation(after)]
        parts = [*suffix, *parts] if self.middle is None else [*parts, *suffix, self.middle]
        return [*self.tokenizer.encode(""), *parts]


def infill_of(tokenizer: Tokenizer) -> Infill:
    """Return what a tokenizer has to fill gaps; a PromptError if it has nothing."""
    if (found := Infill.find(tokenizer)) is None:
        raise PromptError(
            "suffix needs a model whose tokenizer has tokens to fill a gap, such as "
            "<|fim_prefix|>; remove suffix, or choose another model"
        )
    return found
