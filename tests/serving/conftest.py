"""A tiny random pair of the reference backend, and servers of it."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path

import pytest
from byte_tokens import byte_pair
from scripted_model import reference_model
from servers import MAX_POSITIONS, serving, serving_pool
from several_models import Loads, make_pool, write_pairs
from stub_images import StubProcessor
from tool_models import tool_model

from treeflash.language_model import LanguageModel
from treeflash.text.grammar import GrammarCompiler


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """Of a target and a drafter: one token per byte; texts end by chance or by their length."""
    return byte_pair(tmp_path_factory.mktemp("tiny"), max_positions=MAX_POSITIONS)


@pytest.fixture(scope="session")
def model(folders) -> LanguageModel:
    return reference_model(*folders)


@pytest.fixture(scope="session")
def server(model):
    """A server with the default settings."""
    with serving(model) as running:
        yield running


@pytest.fixture(scope="module")
def compiler(model):
    """Compiles grammars for the tiny target."""
    return GrammarCompiler(model.tokenizer, model.backend.vocab_size)


@pytest.fixture(scope="session")
def tool_pair(tmp_path_factory) -> LanguageModel:
    """A pair of random weights that knows tools and reasoning; a token has one byte."""
    return tool_model(tmp_path_factory.mktemp("tools"))


@pytest.fixture(scope="session")
def tool_server(tool_pair):
    """A server of the pair that knows tools, which samples with the same seed always."""
    with serving(tool_pair, {"temperature": 1.0, "seed": 3}) as running:
        yield running


@pytest.fixture(scope="module")
def image_model(folders) -> LanguageModel:
    """The tiny pair, with a processor whose tokens depend on the colours of an image."""
    model = reference_model(*folders)
    model.backend.images = StubProcessor(model.tokenizer)
    return model


@pytest.fixture
def serve(model):
    """Start a server with other settings."""
    with ExitStack() as servers:
        yield lambda **settings: servers.enter_context(serving(model, **settings))


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """The folders of three random pairs, by name."""
    return write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture
def loads(pairs) -> Loads:
    return Loads(pairs)


@pytest.fixture
def serve_models(pairs, loads):
    """Start a server of the three models, with some settings."""
    with ExitStack() as servers:
        yield lambda **settings: servers.enter_context(
            serving_pool(make_pool(pairs, loads, **settings))
        )


@pytest.fixture
def no_traceback(caplog):
    """Check that errors of clients leave no traceback in the log."""
    with caplog.at_level(logging.INFO):
        yield
    assert not [record for record in caplog.records if record.exc_info]
