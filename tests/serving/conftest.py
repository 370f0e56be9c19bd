"""A tiny random pair of the reference backend, and servers of it."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from byte_tokens import SPECIAL, save_tokenizer
from servers import MAX_POSITIONS, serving

from treeflash.config import LoadConfig
from treeflash.decoding.adaptive_budget import SIZES, AdaptiveBudgets, VerifyCosts
from treeflash.language_model import LanguageModel
from treeflash.reference import backend as reference
from treeflash.testing.models import write_drafter, write_target
from treeflash.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> LanguageModel:
    """One token per byte; texts end by chance or by their length."""
    folder = tmp_path_factory.mktemp("tiny")
    target, drafter = folder / "target", folder / "drafter"
    write_target(
        target, "llama", seed=3, vocab_size=len(SPECIAL) + 256, max_positions=MAX_POSITIONS
    )
    save_tokenizer(target)
    write_drafter(drafter, target, seed=4)
    budgets = AdaptiveBudgets(VerifyCosts(dict.fromkeys(SIZES, 1.0)))
    pair = reference.load(target, drafter, LoadConfig())
    return LanguageModel(pair, Tokenizer.from_folder(target), target, adaptive_budgets=budgets)


@pytest.fixture(scope="session")
def server(model):
    """A server with the default settings."""
    with serving(model) as running:
        yield running


@pytest.fixture
def serve(model):
    """Start a server with other settings."""
    with ExitStack() as servers:
        yield lambda **settings: servers.enter_context(serving(model, **settings))
