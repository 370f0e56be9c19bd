"""Text to token ids and back: tokenizer, chat template, and incremental detokenising."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from treeflash.errors import CheckpointError, ConfigError, PromptError, first_line

REPLACEMENT = "\ufffd"
PRIVATE = "\ue000"  # a private-use character, which no template contains
WINDOW_TOKENS = 8
FAST_CLASS = "PreTrainedTokenizerFast"
"""The class of transformers for a tokenizer that `tokenizer.json` describes in full."""
TRUSTED_TYPES = "llama", "mistral", "qwen3", "smollm3"
"""Types of models for which `AutoTokenizer` takes `FAST_CLASS` where a folder names it."""
VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken", "tekken.json")
"""Names of files that hold a tokenizer's vocabulary."""
TOKENIZER_SETTINGS = "tokenizer_config.json"
NO_VOCABULARY = (
    "{folder} has no usable tokenizer (its vocabulary is missing); "
    "it needs a valid tokenizer.json or tokenizer.model"
)


class Tokenizer:
    """A tokenizer of transformers with a chat template and end tokens.

    Attributes:
        transformers: the wrapped tokenizer.
        stop_token_ids: ids that end a text, from the tokenizer and both configuration files.
        thinking: whether thinking is on in a conversation that does not set it.
        special_token_ids: ids that `decode` skips.
        byte_token_ids: ids of the byte-fallback tokens `<0x00>` to `<0xFF>`, if there are any.
    """

    def __init__(
        self, tokenizer: Any, stop_token_ids: frozenset[int], *, thinking: bool = False
    ) -> None:
        self.transformers = tokenizer
        self.stop_token_ids = stop_token_ids
        self.thinking = thinking
        self.special_token_ids = frozenset(
            token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
        )
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        names = (f"<0x{byte:02X}>" for byte in range(256))
        self.byte_token_ids = frozenset(vocabulary[name] for name in names if name in vocabulary)
        self._needs_parts: dict[str | None, bool] = {}  # answers by chat template
        self._shows_system: dict[str | None, bool] = {}  # answers by chat template

    @classmethod
    def from_folder(cls, path: str | Path, *, thinking: bool = False) -> Tokenizer:
        """Load a local model folder's tokenizer without its code.

        Raises a CheckpointError for a folder from which answers would silently be others than the
        model's: without a usable tokenizer or its vocabulary, or without the file that has the end
        token of its chat template.
        """
        folder = Path(path)
        # Both files are read first: transformers reads the configuration too, and would blame the
        # tokenizer.
        files = folder / "generation_config.json", folder / "config.json"
        stop_token_ids = frozenset[int]().union(*map(_eos_token_ids, files))
        for name in ("transformers", "transformers.configuration_utils"):
            logging.getLogger(name).addFilter(_is_helpful)
        try:
            tokenizer = _class_of(folder).from_pretrained(
                str(folder), trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # tokenizers raises a bare Exception for a damaged file
            _check_config(folder)
            raise CheckpointError(
                f"{folder} has no usable tokenizer ({first_line(error)}); "
                "it needs a valid tokenizer.json or tokenizer.model"
            ) from error
        if not tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys():
            # Without the file of the vocabulary, transformers makes one of special tokens alone.
            raise CheckpointError(NO_VOCABULARY.format(folder=folder))
        stop_token_ids |= {tokenizer.eos_token_id} - {None}
        loaded = cls(tokenizer, stop_token_ids, thinking=thinking)
        end = loaded._end_of_answer()
        if end is not None and end not in stop_token_ids and not files[0].is_file():
            raise CheckpointError(
                f"{folder} has no generation_config.json, and answers would run on: its chat "
                f"template ends them with {loaded.token_text(end)!r}, which is not an end token in "
                "config.json; copy the file from the original model, or write "
                f'{{"eos_token_id": {end}}} into it'
            )
        return loaded

    @property
    def size(self) -> int:
        """Number of tokens; the vocabulary of a model is often padded to more."""
        return len(self.transformers)

    @property
    def knows_tools(self) -> bool:
        """Whether the chat template has the variable `tools`."""
        return "tools" in self.chat_template

    @property
    def chat_template(self) -> str:
        """The chat template, or all of them; empty if there is none."""
        return str(self.transformers.chat_template or "")

    @property
    def has_chat_template(self) -> bool:
        return bool(self.transformers.chat_template)

    @property
    def knows_thinking(self) -> bool:
        """Whether the chat template has the variable `enable_thinking`."""
        return "enable_thinking" in self.chat_template

    def shows_system_anywhere(self, chat_template: str | None = None) -> bool:
        """Return whether a chat template shows system messages that are not the first message.

        Some templates reject them, and others leave them out without a word.
        """
        if chat_template not in self._shows_system:
            roles = "system", "system", "user", "system"
            probe = [{"role": role, "content": PRIVATE} for role in roles]
            found = any(
                self._shows(messages, chat_template)
                for messages in (probe, list(map(_as_parts, probe)))
            )
            self._shows_system[chat_template] = found
        return self._shows_system[chat_template]

    def encode(self, text: str) -> list[int]:
        """Encode raw text, with a begin token only if the tokenizer adds one.

        Raises a PromptError if the tokenizer has no token for some of the text.
        """
        return self._ids(text, add_special_tokens=True)

    def encode_continuation(self, text: str) -> list[int]:
        """Encode raw text that follows other tokens; raises what `encode` does."""
        return self._ids(text)

    def user_header(self) -> list[int]:
        """Return the ids up to a first message of the user; a PromptError if there are none."""
        header, _ = self._surroundings({"role": "user", "content": PRIVATE})
        if not header:
            raise PromptError("the chat template puts nothing before the user's message")
        return header

    def answer(self, text: str) -> list[int]:
        """Return the ids of a response and its end token; a PromptError without a chat template."""
        question = {"role": "user", "content": "-"}
        _, after = self._surroundings(question, {"role": "assistant", "content": PRIVATE})
        end = [token_id for token_id in after if token_id in self.stop_token_ids][:1]
        return self._ids(text) + end

    def _end_of_answer(self) -> int | None:
        """Return the special token after an answer in the chat template, if there is one."""
        question = {"role": "user", "content": "-"}
        try:
            _, after = self._surroundings(question, {"role": "assistant", "content": PRIVATE})
        except PromptError:
            return None
        return next((token_id for token_id in after if token_id in self.special_token_ids), None)

    def _surroundings(self, *messages: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Return the ids that the chat template puts before and after the content `PRIVATE`.

        Both are empty if the template does not show the content. Raises a PromptError without a
        chat template, or if it rejects the messages.
        """
        if not self.has_chat_template:
            raise PromptError("the tokenizer has no chat template")
        before, shown, after = self._render(messages).rpartition(PRIVATE)
        return (self._ids(before), self._ids(after)) if shown else ([], [])

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        chat_template: str | None = None,
        **variables: Any,
    ) -> str:
        """Run a chat template, by default the tokenizer's; a PromptError says why it fails."""
        if chat_template not in self._needs_parts:
            probe = {"role": "user", "content": PRIVATE}
            shows_strings, shows_parts = (
                self._shows([message], chat_template) for message in (probe, _as_parts(probe))
            )
            self._needs_parts[chat_template] = shows_parts and not shows_strings
        if self._needs_parts[chat_template]:
            messages = list(map(_as_parts, messages))
        return self._apply(messages, chat_template=chat_template, **variables)

    def _shows(self, messages: Sequence[Mapping[str, Any]], chat_template: str | None) -> bool:
        """Return whether a template shows each of some messages, whose texts are `PRIVATE`."""
        try:
            text = self._apply(messages, chat_template=chat_template)
        except PromptError:
            return False
        return text.count(PRIVATE) >= len(messages)

    def _apply(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        try:
            text = self.transformers.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, **variables
            )
        except Exception as error:  # a template is a program, which can fail in any way
            raise PromptError(
                f"the chat template rejects these messages or arguments: {first_line(error)}"
            ) from error
        return str(text)

    def _ids(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        try:
            ids = self.transformers.encode(
                text, add_special_tokens=add_special_tokens, verbose=False
            )
        except Exception as error:  # tokenizers raises a bare Exception
            raise PromptError(
                f"the tokenizer cannot encode the text: {first_line(error)}"
            ) from error
        return list(ids)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        template_args: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the ids of a conversation up to the start of the assistant's next response.

        See `render` for the arguments and errors.
        """
        return self._ids(self.render(messages, template_args))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        template_args: Mapping[str, Any] | None = None,
        *,
        continues: bool = False,
        chat_template: str | None = None,
    ) -> str:
        """Return the text of a conversation up to the start of the assistant's next response.

        The content of a message is a text, or a list of parts where it has images. `template_args`
        are extra variables for the chat template, which is the tokenizer's unless another is given.
        If the response `continues` the last message, the text ends with that message. A PromptError
        is raised if there is no chat template, or it rejects the conversation; or the text is not
        valid Unicode.
        """
        if not self.has_chat_template and chat_template is None:
            raise PromptError("the tokenizer has no chat template; use raw for plain text")
        variables = {"enable_thinking": self.thinking} if self.knows_thinking else {}
        variables |= template_args or {}
        check_template_args(variables)
        text = self._render(
            messages,
            add_generation_prompt=not continues,
            continue_final_message=continues,
            chat_template=chat_template,
            **variables,
        )
        check_unicode(text)
        return text

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens and with unchanged spaces."""
        text = self.transformers.decode(
            list(token_ids),
            skip_special_tokens=bool(self.special_token_ids),
            clean_up_tokenization_spaces=False,
        )
        return str(text)

    def decode_verbatim(self, token_ids: Sequence[int]) -> str:
        """Return the text of ids with special tokens by name, and with unchanged spaces."""
        text = self.transformers.decode(list(token_ids), clean_up_tokenization_spaces=False)
        return str(text)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token, which may be a part of a character."""
        text = self._text_inside(token_id)
        if REPLACEMENT not in text:
            return text.encode()
        token = str(self.transformers.convert_ids_to_tokens(token_id))
        if token_id in self.byte_token_ids:
            return bytes([int(token[3:5], 16)])
        alphabet = _byte_alphabet()
        return bytes(alphabet[x] for x in token) if alphabet.keys() >= set(token) else text.encode()

    def token_text(self, token_id: int) -> str:
        """Return one token for display: special tokens by name, partial characters as stored."""
        text = self._text_inside(token_id)
        if text and REPLACEMENT not in text:
            return text
        return self.transformers.convert_ids_to_tokens(token_id) or f"<{token_id}>"

    def _text_inside(self, token_id: int) -> str:
        """Return the text that a token adds to a text.

        Some decoders strip a space from the first token, so the second of two has its whole text.
        """
        first, both = (
            str(self.transformers.decode([token_id] * n, clean_up_tokenization_spaces=False))
            for n in (1, 2)
        )
        return both[len(first) :]


@cache
def _byte_alphabet() -> dict[str, int]:
    """Return the byte of each character with which byte-level BPE writes its tokens."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}


def _class_of(folder: Path) -> Any:
    """Return the class of transformers that reads a folder's tokenizer.

    To choose it, `AutoTokenizer` reads the configuration of the model, for which it imports seconds
    of code. Where the choice is known, it is left out.
    """
    model, settings = (_json_object(folder / name) for name in ("config.json", TOKENIZER_SETTINGS))
    if (
        settings.get("tokenizer_class") == FAST_CLASS
        and model.get("model_type") in TRUSTED_TYPES
        and not (model.keys() | settings.keys()) & {"auto_map"}
        and (folder / "tokenizer.json").is_file()
        and not (folder / "tekken.json").is_file()
    ):
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def _json_object(path: Path) -> dict[str, Any]:
    """Return the object of a file; an empty one if there is none, which transformers reports."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _as_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message whose content is a list of parts, as some chat templates need it."""
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return {**message, "content": parts}


def check_unicode(text: str, what: str = "the text") -> None:
    """Raise a PromptError for lone surrogates, which stand for bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PromptError(f"{what} is not valid Unicode; was it saved as UTF-8?") from None


def check_template_args(names: Collection[str]) -> None:
    """Raise a PromptError for a variable of the chat template that transformers sets itself."""
    from transformers import PreTrainedTokenizerBase

    parameters = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
    parameters -= {"tools", "documents"}  # these two reach the template
    parameters |= {"messages"}
    if reserved := sorted(parameters.intersection(names)):
        raise PromptError(
            f"{reserved[0]!r} is reserved; remove it from the chat template's arguments"
        )


def check_vocabulary(folder: Path) -> None:
    """Raise a CheckpointError for a folder with a tokenizer's settings but no vocabulary.

    transformers loads such a tokenizer without an error: it knows special tokens alone.
    """
    if (folder / "tokenizer_config.json").is_file() and not any(
        any(folder.glob(pattern)) for pattern in VOCABULARIES
    ):
        raise CheckpointError(NO_VOCABULARY.format(folder=folder))


def _is_helpful(record: logging.LogRecord) -> bool:
    """Drop two warnings of transformers.

    One advises to install torch, which a tokenizer does not need. The other precedes the error for
    an unknown type of model, and says less.
    """
    message = record.getMessage()
    return (
        "PyTorch was not found" not in message and "instantiate a model of type ``" not in message
    )


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
        raise CheckpointError(f"{path}: eos_token_id must be a token id or a list of token ids")
    return set(token_ids)


class SpecialToken(NamedTuple):
    """A special token of a text, which has no characters there."""

    position: int  # number of the text's characters before the token
    token_id: int


class TextStream:
    """The text of a growing sequence of ids, piece by piece.

    All text that Python, the commands and the server show of tokens comes from here. The joined
    pieces are exactly `Tokenizer.decode` of all ids or, if a string of `stop` occurs, the text
    before the first one. A piece never ends inside a character, nor in characters that may begin a
    stop string. Special tokens have no text, but one whose name is a stop string ends the text.
    Only a short window of ids is decoded at a time. An empty stop string raises a ConfigError.

    Attributes:
        special_tokens: the special tokens before the end of the pieces so far, in order.
        stopped_by: the stop string that ended the text, if one did; later ids are ignored.
        tokens_used: number of ids so far, up to the id that completed a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        if "" in stop:
            raise ConfigError("a stop string is empty; remove it")
        self._tokenizer = tokenizer
        self._stops = tuple(stop)
        self._window: list[int] = []
        self._consumed = 0  # characters of the window's text that moved to _held or were returned
        self._held = ""  # settled characters that may begin a stop string
        self._pieces: list[str] = []
        self._length = 0  # characters of the pieces
        self._waiting: list[SpecialToken] = []  # special tokens after the pieces
        self.special_tokens: list[SpecialToken] = []
        self.stopped_by: str | None = None
        self.tokens_used = 0

    def _rest(self) -> str:
        """Return the text after the pieces so far, if no ids follow."""
        if self.stopped_by is not None:
            return ""
        return self._held + self._tokenizer.decode(self._window)[self._consumed :]

    def push(self, token_ids: Sequence[int]) -> str:
        """Append ids; returns the text that became final."""
        first_new = len(self._pieces)
        for token_id in token_ids:
            if self.stopped_by is not None:
                break
            self.tokens_used += 1
            if token_id not in self._tokenizer.special_token_ids:
                self._push_one(token_id)
            else:
                self._push_special(token_id)
        return "".join(self._pieces[first_new:])

    def finish(self) -> str:
        """Return the rest of the text; no ids follow."""
        rest = self._rest()
        self._window, self._consumed, self._held = [], 0, ""
        self._add(rest)
        # A character of several tokens may have become shorter than it looked.
        self.special_tokens += [x._replace(position=self._length) for x in self._waiting]
        self._waiting = []
        return rest

    def _add(self, piece: str) -> None:
        """Add a piece, and the special tokens before its end."""
        self._pieces.append(piece)
        self._length += len(piece)
        while self._waiting and self._waiting[0].position <= self._length:
            self.special_tokens.append(self._waiting.pop(0))

    def _push_special(self, token_id: int) -> None:
        name = self._tokenizer.token_text(token_id)
        if name in self._stops:
            self.finish()
            self.stopped_by = name
            return
        # The bytes of a character that is still incomplete belong to the text after the token.
        position = self._length + len(self._rest().rstrip(REPLACEMENT))
        self._waiting.append(SpecialToken(position, token_id))
        self._add("")

    def _push_one(self, token_id: int) -> None:
        self._window.append(token_id)
        window_text = self._tokenizer.decode(self._window)
        settled = self._settled_length(window_text)
        candidate = self._held + window_text[self._consumed :]
        certain = self._held + window_text[self._consumed : settled]
        # A replacement character that is not certain may be part of a character still to come.
        texts = {stop: certain if REPLACEMENT in stop else candidate for stop in self._stops}
        found = [stop for stop, text in texts.items() if stop in text]
        if found:
            self.stopped_by = min(found, key=candidate.find)
            self._add(candidate[: candidate.find(self.stopped_by)])
            self._waiting = []  # they are behind the end
            return
        self._held += window_text[self._consumed : settled]
        self._consumed = settled
        sure = self._held[: len(self._held) - self._stop_overlap()].rstrip(REPLACEMENT)
        if sure:
            self._held = self._held[len(sure) :]
            self._add(sure)
        if len(self._window) > 2 * WINDOW_TOKENS:
            self._shrink_window(window_text)

    def _settled_length(self, window_text: str) -> int:
        """Count the characters of the window's text that no later id can change."""
        end = len(self._window)
        while end and self._window[end - 1] in self._tokenizer.byte_token_ids:
            end -= 1  # byte-fallback decoders read a whole run of bytes as valid or as broken
        whole = end == len(self._window)
        text = window_text if whole else self._tokenizer.decode(self._window[:end])
        return len(text) - text.endswith(REPLACEMENT)

    def _stop_overlap(self) -> int:
        """Return the length of the longest suffix of the held text that begins a stop string."""
        longest = len(self._held)
        beginnings = (x[:n] for x in self._stops for n in range(1, min(len(x), longest + 1)))
        return max((len(text) for text in beginnings if self._held.endswith(text)), default=0)

    def _shrink_window(self, window_text: str) -> None:
        """Drop the window's older ids if the newer ids alone decode to the same end.

        A cut inside a character garbles at most three bytes, and a cut before a token that
        decoders strip a space from garbles its first character. So four equal characters prove
        that the rest is equal too. They may have four ids each, as emoji and rare scripts do.
        """
        for count in (WINDOW_TOKENS, 2 * WINDOW_TOKENS):
            start = len(self._window) - count
            while start and self._window[start] in self._tokenizer.byte_token_ids:
                start -= 1
            tail = self._tokenizer.decode(self._window[start:])
            dropped = len(window_text) - len(tail)
            if len(tail) >= 4 and window_text.endswith(tail) and dropped <= self._consumed:
                self._window = self._window[start:]
                self._consumed -= dropped
                return
