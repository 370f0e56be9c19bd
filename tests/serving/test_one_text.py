"""The same tokens are the same characters in Python, in the command and in every API."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from fake_models import FakeBackend
from protocols import PROTOCOLS, Ask
from servers import Running, serving
from stand_ins import stand_in
from tiny_tokenizers import BUILDERS, save_folder
from tokenizers import AddedToken

from treeflash.cli import options as cli
from treeflash.commands.generate import main
from treeflash.decoding.adaptive_budget import AdaptiveBudgets
from treeflash.decoding.transitions import TransitionTable
from treeflash.decoding.verify_costs import SIZES, VerifyCosts
from treeflash.language_model import LanguageModel
from treeflash.testing.pairs import each_value
from treeflash.text.tokenizer import Tokenizer

pytestmark = pytest.mark.sample(8)

BEGIN, NOTE, OPEN, CLOSE = "<|begin|>", "<|note|>", "<think>", "</think>"
SPECIAL = [BEGIN, NOTE, OPEN, CLOSE]
"""The response template names all but the note."""
END = "<|done|>"
"""The end token, which is not special: some tokenizers have such ones."""
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}" + BEGIN
FORM = {
    "start_anchor": BEGIN,
    "fields": {"reasoning_content": {"open": OPEN, "close": CLOSE}, "content": {}},
}
DECODING: dict[str, Any] = {
    "ar": {"method": "ar"},
    "ddtree": {"method": "ddtree", "budget": 6, "draft_temperature": 0.5},
}
USER = [{"role": "user", "content": "end"}]


class Writer(FakeBackend):
    """A target that writes a script after the token `BEGIN`, and a drafter that knows it."""

    images, stores_states, device_name = "it takes none", False, "none"

    def __init__(self, begin: int, end: int, vocab_size: int) -> None:
        self.script: Sequence[int] = ()
        self._begin, self._end = begin, end
        super().__init__(self._logits, self._table, vocab_size)

    def _token(self, sequence: Sequence[int], after: int = 0) -> int:
        index = len(sequence) - list(sequence).index(self._begin) - 1 + after
        return self.script[index] if index < len(self.script) else self._end

    def _logits(self, sequence: Sequence[int]) -> np.ndarray:
        return np.eye(self.vocab_size)[self._token(sequence)]

    def _table(self, sequence: Sequence[int], m: int, k: int) -> TransitionTable:
        tokens = np.array([[self._token(sequence, i), 0] for i in range(5)], np.int32)
        log_probs = np.tile(np.array([[-0.1, -3]], np.float32), (5, 1))
        return TransitionTable.from_marginals(tokens[:, :k], log_probs[:, :k])


@pytest.fixture(scope="module", params=each_value(BUILDERS, DECODING), ids="-".join)
def case(request) -> tuple[str, str]:
    """A kind of tokenizer, and a way of decoding."""
    return request.param


@pytest.fixture(scope="module")
def model(case, tmp_path_factory) -> LanguageModel:
    raw = BUILDERS[case[0]]()
    raw.add_special_tokens(SPECIAL)
    raw.add_tokens([AddedToken(END, normalized=False)])
    folder = save_folder(
        tmp_path_factory.mktemp(case[0]),
        raw,
        eos_token="<unk>",
        chat_template=TEMPLATE,
        response_template=FORM,
    )
    end = raw.token_to_id(END)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    tokenizer = Tokenizer.from_folder(folder)
    writer = Writer(raw.token_to_id(BEGIN), end, tokenizer.size)
    budgets = AdaptiveBudgets(VerifyCosts(dict.fromkeys(SIZES, 1000.0)))
    return LanguageModel(writer, tokenizer, adaptive_budgets=budgets)


@pytest.fixture(scope="module")
def decoding(case) -> dict[str, Any]:
    return DECODING[case[1]]


@pytest.fixture(scope="module")
def server(model, decoding) -> Iterator[Running]:
    with serving(model, decoding, prefix_cache_gb=0.0) as running:
        yield running


def python_texts(model: LanguageModel, **options: Any) -> Iterator[str]:
    yield model.generate(USER, **options).text
    yield "".join(chunk.text for chunk in model.stream(USER, **options))
    ((_, answer),) = model.generate_many([USER], **options)
    yield answer.text


def command_texts(capsys, **options: Any) -> Iterator[str]:
    stop = options.pop("stop")
    flags = [
        part for name, x in options.items() for part in (f"--{name.replace('_', '-')}", str(x))
    ]
    flags += [part for text in stop for part in ("--stop", text)]
    for form in ([], ["--json"]):
        capsys.readouterr()
        assert main(["end", *flags, *form]) == 0
        out = capsys.readouterr().out
        yield json.loads(out)["text"] if form else out.removesuffix("\n")


def api_texts(server: Running, max_tokens: int, stop: list[str]) -> Iterator[str]:
    """The reasoning and the content of each API that can stop so, whole and as a stream."""
    for api in PROTOCOLS:
        if stop and "stop" not in api.can:
            continue
        text = "end" if "messages" in api.can else BEGIN
        for stream in (False, True):
            asked = Ask(text, max_tokens=max_tokens, stop=stop)
            found = api.ask(server.url, asked, stream=stream)
            yield found.thinking + found.text


TEXTS = {
    "a space before the first word": ([" the end"], []),
    "a special token without a meaning": (["the", NOTE, " end"], []),
    "special tokens first": ([OPEN, " the", CLOSE, " end"], []),
    "special tokens in the middle": ([OPEN, "the", CLOSE, NOTE, " the", NOTE, " end"], []),
    "a character that a special token cuts": ([OPEN, b"\xe2\x82", CLOSE, b"\xac", "end"], []),
    "a character before a special token": ([OPEN, "the é", CLOSE, "é the"], []),
    "an incomplete character at the end": (["the ", b"\xe2\x82"], []),
    "a stop string": (["the ", "end", " the"], ["d t"]),
    "a stop string around a special token": ([OPEN, "e", CLOSE, "nd the"], ["en"]),
    "a stop string in the name of a special token": ([OPEN, "the", CLOSE, "end"], ["think"]),
    "a special token as a stop string": ([OPEN, "the", CLOSE, "end"], [CLOSE]),
    "the beginning of a stop string": ([OPEN, "th", CLOSE, "e en"], ["the end", "end"]),
}


def encode(model: LanguageModel, parts: Sequence[str | bytes]) -> list[int]:
    """The ids of texts and of single bytes, which need not be a character."""
    ids: list[int] = []
    byte_ids = {model.tokenizer.token_bytes(i): i for i in range(model.tokenizer.size)}
    for part in parts:
        if isinstance(part, bytes):
            ids += [byte_ids[part[i : i + 1]] for i in range(len(part))]
        else:
            spaces = "▁" if model.tokenizer.byte_token_ids else " "
            ids += model.tokenizer.encode_continuation(part.replace(" ", spaces))
    return ids


@pytest.mark.parametrize("name", TEXTS)
def test_every_interface_has_the_characters_of_python(
    model, decoding, server, name, monkeypatch, capsys
):
    parts, stop = TEXTS[name]
    model.backend.script = encode(model, parts)
    size = len(model.backend.script)
    stand_in(monkeypatch, cli, load_model=lambda *args, **kwargs: model)
    for max_tokens in (size, size + 5):  # cut off, or ended by the end token
        limits = {"max_tokens": max_tokens, "stop": stop}
        options = {**decoding, **limits}
        expected, *others = python_texts(model, **options)
        assert END not in expected
        assert others == [expected] * 2
        assert list(command_texts(capsys, **options)) == [expected] * 2
        assert set(api_texts(server, **limits)) == {expected}
