"""A tiny pair whose target writes given answers: each token of an answer is followed by the next.

It is a Llama whose layers add nothing, so that the output depends on the last token alone. The chat
template ends the prompt with the token that begins an answer, so a test decides by the template
which answer is written. It shows what a client and the server make of a call, not that a model
would make one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer

from treeflash.config import LoadConfig
from treeflash.decoding.adaptive_budget import AdaptiveBudgets
from treeflash.decoding.verify_costs import SIZES
from treeflash.drafters.folder import read_config, read_tensors
from treeflash.language_model import LanguageModel
from treeflash.reference import backend as reference
from treeflash.testing.costs import SteadyCosts
from treeflash.testing.models import save, write_drafter, write_target
from treeflash.text.tokenizer import Tokenizer

END = 1


def scripted_model(
    folder: Path,
    answers: Mapping[str, Sequence[str]],
    chat_template: str,
    response_template: Mapping[str, object] | None = None,
    *,
    max_positions: int = 65536,
) -> LanguageModel:
    """Write and load the pair.

    Args:
        folder: for its files.
        answers: the tokens of each answer, all different, by the token that begins the answer.
        chat_template: ends with one of the tokens that begin answers.
        response_template: the tokenizer's.
        max_positions: of the target.
    """
    target, drafter = folder / "target", folder / "drafter"
    texts = [token for start, answer in answers.items() for token in (start, *answer)]
    assert len(set(texts)) == len(texts), "each token is followed by one other"
    _write_tokenizer(target, answers, chat_template, response_template)
    tokenizer = Tokenizer.from_folder(target)
    size = tokenizer.size
    write_target(
        target, "llama", seed=3, vocab_size=size, hidden_size=8 * -(-size // 8), layers=1,
        max_positions=max_positions,
    )  # fmt: skip
    tensors = {name: np.zeros_like(x) for name, x in read_tensors(target).items()}
    for name in [name for name in tensors if name.endswith("norm.weight")]:
        tensors[name] += 1
    tensors["model.embed_tokens.weight"] += np.eye(*tensors["model.embed_tokens.weight"].shape)
    head = tensors["lm_head.weight"]
    # The scores of one-hot rows: far apart, so that a sampled answer is the scripted one, too.
    head[END] = 10  # what is not in an answer is followed by the end
    for start, answer in answers.items():
        ids = tokenizer.transformers.convert_tokens_to_ids([start, *answer])
        head[[*ids[1:], END], ids] = 20
    save(target, read_config(target), tensors)
    write_drafter(drafter, target, seed=4, target_layer_ids=(0,))
    return reference_model(target, drafter)


def reference_model(target: Path, drafter: Path) -> LanguageModel:
    """Load a pair in NumPy; trees of all sizes cost the same, whatever the machine."""
    budgets = AdaptiveBudgets(SteadyCosts(dict.fromkeys(SIZES, 1000.0)))
    pair = reference.load(target, drafter, LoadConfig())
    return LanguageModel(pair, Tokenizer.from_folder(target), target, adaptive_budgets=budgets)


def _write_tokenizer(
    folder: Path,
    answers: Mapping[str, Sequence[str]],
    chat_template: str,
    response_template: Mapping[str, object] | None,
) -> None:
    """A token for each line, whatever it says, and for each part of an answer."""
    special = ["<|unknown|>", "<|end|>"]
    raw = RawTokenizer(
        models.WordLevel({text: i for i, text in enumerate([*special, "\n"])}, special[0])
    )
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("\n"), "isolated")
    raw.decoder = decoders.Fuse()
    raw.add_special_tokens([*special, *answers])
    parts = [part for answer in answers.values() for part in answer]
    raw.add_tokens([AddedToken(part, normalized=False) for part in parts])
    folder.mkdir(parents=True)
    raw.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": special[END],
        "chat_template": chat_template,
    }
    if response_template is not None:
        config["response_template"] = response_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": END}))
