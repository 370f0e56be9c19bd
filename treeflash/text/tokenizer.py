"""Between text and token ids: the tokenizer and its chat template."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from treeflash.errors import CheckpointError, PromptError

REPLACEMENT = "\ufffd"
PRIVATE = "\ue000"  # a private-use character, which no template contains


class Tokenizer:
    """A model folder's tokenizer, chat template and end tokens."""

    def __init__(
        self, tokenizer: Any, stop_token_ids: frozenset[int], *, thinking: bool = False
    ) -> None:
        """Wrap a transformers tokenizer; `from_folder` is the usual way to get one."""
        self._tokenizer = tokenizer
        self.thinking = thinking
        """Whether thinking is on in a conversation that does not say."""
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        names = (f"<0x{byte:02X}>" for byte in range(256))
        self.stop_token_ids = stop_token_ids
        """Ids that end a text, from the tokenizer and both configuration files."""
        self.special_token_ids = frozenset(
            token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
        )
        """Ids that `decode` skips."""
        self.byte_token_ids = frozenset(vocabulary[name] for name in names if name in vocabulary)
        """Ids of the byte-fallback tokens ``<0x00>`` to ``<0xFF>``, if the tokenizer has any."""

    @classmethod
    def from_folder(cls, path: str | Path, *, thinking: bool = False) -> Tokenizer:
        """Load the tokenizer of a local model folder; no code from the folder is run.

        Args:
            path: The folder.
            thinking: Whether thinking is on in a conversation that does not say.

        Raises:
            CheckpointError: The folder has no tokenizer, or a damaged one.
        """
        folder = Path(path)
        # First, because transformers reads the configuration too and would blame the tokenizer.
        stop_token_ids = frozenset[int]().union(
            *(_eos_token_ids(folder / name) for name in ("generation_config.json", "config.json"))
        )
        logging.getLogger("transformers").addFilter(_is_not_torch_advice)
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(
                str(folder), trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # tokenizers raises a bare Exception for a damaged file
            _check_config(folder)
            raise CheckpointError(
                f"{folder} has no usable tokenizer ({_reason(error)}); "
                "it needs a valid tokenizer.json or tokenizer.model"
            ) from error
        stop_token_ids |= {tokenizer.eos_token_id} - {None}
        return cls(tokenizer, stop_token_ids, thinking=thinking)

    @property
    def size(self) -> int:
        """The number of tokens in the tokenizer; a model's vocabulary is often padded beyond it."""
        return len(self._tokenizer)

    @property
    def transformers(self) -> Any:
        """The tokenizer of transformers that this one wraps."""
        return self._tokenizer

    @property
    def knows_tools(self) -> bool:
        """Whether the chat template has the variable ``tools``."""
        return "tools" in str(self._tokenizer.chat_template)

    @property
    def has_chat_template(self) -> bool:
        """Whether there is a chat template, which `chat` needs."""
        return bool(self._tokenizer.chat_template)

    @property
    def knows_thinking(self) -> bool:
        """Whether the chat template has the variable ``enable_thinking``."""
        return "enable_thinking" in str(self._tokenizer.chat_template)

    def encode(self, text: str) -> list[int]:
        """Return the ids of raw text, with a begin token only if the tokenizer adds one."""
        return list(self._tokenizer.encode(text, verbose=False))

    def user_header(self) -> list[int]:
        """Return the ids of a conversation up to where the user's first message begins.

        Raises:
            PromptError: There is no chat template, or it puts nothing before the message.
        """
        header, _ = self._around({"role": "user", "content": PRIVATE})
        if not header:
            raise PromptError("the chat template puts nothing before the user's message")
        return header

    def answer(self, text: str) -> list[int]:
        """Return the ids of an assistant's response, with the end token that closes it.

        Raises:
            PromptError: There is no chat template.
        """
        question = {"role": "user", "content": "-"}
        _, after = self._around(question, {"role": "assistant", "content": PRIVATE})
        end = [token_id for token_id in after if token_id in self.stop_token_ids][:1]
        return self._ids(text) + end

    def _around(self, *messages: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Ids of what the chat template puts before and after the content `PRIVATE`."""
        if not self.has_chat_template:
            raise PromptError("the tokenizer has no chat template")
        text = str(self._tokenizer.apply_chat_template(list(messages), tokenize=False))
        before, _, after = text.rpartition(PRIVATE)
        return self._ids(before), self._ids(after)

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        template_args: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the ids of a conversation up to the start of the assistant's next response.

        Args:
            messages: Each with ``role`` and ``content``.
            template_args: Extra variables for the chat template. ``enable_thinking`` is
                ``thinking`` by default.

        Raises:
            PromptError: There is no chat template, or it rejects the conversation; or the text
                is not valid Unicode.
        """
        if not self.has_chat_template:
            raise PromptError("the tokenizer has no chat template; pass --raw to send plain text")
        variables = {"enable_thinking": self.thinking} if self.knows_thinking else {}
        own = inspect.signature(self._tokenizer.apply_chat_template).parameters
        settings = own.keys() - {"tools", "documents"}  # these two reach the template
        if taken := sorted(settings & (template_args or {}).keys()):
            raise PromptError(
                f"{taken[0]!r} is reserved and cannot be set with --chat-template-args"
            )
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=True,
                tokenize=False,
                **{**variables, **(template_args or {})},
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise PromptError(
                f"the chat template rejects these messages or arguments: {_reason(error)}"
            ) from error
        check_unicode(str(text))
        return self._ids(str(text))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens and with spaces unchanged."""
        text = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)

    @cached_property
    def verbatim(self) -> Tokenizer:
        """The same tokenizer, whose `decode` keeps special tokens."""
        return _Verbatim(self._tokenizer, self.stop_token_ids)

    def token_text(self, token_id: int) -> str:
        """Return one token for display: special tokens by name, partial characters as stored."""
        text = str(self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False))
        if text and REPLACEMENT not in text:
            return text
        return self._tokenizer.convert_ids_to_tokens(token_id) or f"<{token_id}>"


def check_unicode(text: str) -> None:
    """Reject lone surrogates, which stand for bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PromptError("the text is not valid Unicode; was it saved as UTF-8?") from None


class _Verbatim(Tokenizer):
    """Special tokens are text."""

    def __init__(self, tokenizer: Any, stop_token_ids: frozenset[int]) -> None:
        super().__init__(tokenizer, stop_token_ids)
        self.special_token_ids = frozenset()

    def decode(self, token_ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return str(text)


def _is_not_torch_advice(record: logging.LogRecord) -> bool:
    """Drop the advice to install torch, which a tokenizer does not need."""
    return "PyTorch was not found" not in record.getMessage()


def _reason(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).partition("\n")[0]


def _check_config(folder: Path) -> None:
    """Raise a CheckpointError if transformers cannot read a folder's configuration."""
    from transformers import AutoConfig

    if not (folder / "config.json").is_file() or not (folder / "tokenizer.json").is_file():
        return
    try:
        AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a validation error of another library, among others
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder / 'config.json'} is not usable: {reason}") from error


def _eos_token_ids(path: Path) -> set[int]:
    """The end tokens that a configuration file names, if it exists."""
    if not path.is_file():
        return set()
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    value = config.get("eos_token_id")
    token_ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token_id) is int for token_id in token_ids):
        raise CheckpointError(f"{path}: eos_token_id must be a token id or a list of them")
    return set(token_ids)
