"""Prompts: strings, messages, token ids and files of them, encoded into token ids and images."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from treeflash.decoding.images import PromptImages
from treeflash.decoding.interfaces import ImageProcessor
from treeflash.errors import ConfigError, PromptError
from treeflash.hub.published import DEEPSPEC_SYSTEM
from treeflash.text.images import ImageSource, is_path, read_images
from treeflash.text.input_file import read_json_lines
from treeflash.text.options import MAX_IMAGES
from treeflash.text.tokenizer import Tokenizer, check_unicode

Content: TypeAlias = str | list[Mapping[str, Any]]
"""What a message says: a text or, if it has images, parts.

A part is `{"type": "text", "text": str}` or `{"type": "image", "image": ImageSource}`.
"""
Message: TypeAlias = Mapping[str, Any]
"""One turn of a conversation: `role` and `content`."""
Prompt: TypeAlias = str | Sequence[Message] | Sequence[int]
INVALID_PROMPT = "a prompt is a string, a list of messages, or a list of token ids"
TEXT_ONLY = "this command takes no images"


class EncodedPrompt(NamedTuple):
    """What a target gets of a prompt, and the text that a chat template made of it, if one did."""

    token_ids: list[int]
    images: PromptImages | None = None
    text: str | None = None


def encode(
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    system: str | None = None,
    raw: bool = False,
    template_args: Mapping[str, Any] | None = None,
    processor: ImageProcessor | str = TEXT_ONLY,
    max_images: int = MAX_IMAGES,
) -> EncodedPrompt:
    """Encode a prompt into token ids, which are plain ints, and images.

    A string, unless `raw`, and messages go through the chat template, after the message `system`;
    token ids are used unchanged. See `encode_chat` for `processor` and `max_images`. Raises a
    PromptError if the prompt is empty, malformed, or rejected by the template, and a ConfigError if
    an argument does not fit this kind of prompt.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise PromptError("the prompt is empty; give some text")
        check_unicode(prompt)
        if not raw:
            prompt = [{"role": "user", "content": prompt}]
        else:
            return EncodedPrompt(tokenizer.encode(prompt))
    if not isinstance(prompt, Iterable) or isinstance(prompt, bytes):
        raise PromptError(f"{INVALID_PROMPT}, got {type(prompt).__name__}")
    items: list[Any] = list(prompt)
    if items and all(isinstance(item, Mapping) for item in items):
        if raw:
            raise ConfigError("messages need the chat template; remove raw, or give a string")
        check_messages(items)
        if system is not None:
            if items[0]["role"] == "system":
                raise PromptError("the messages begin with a system message; remove system")
            items.insert(0, {"role": "system", "content": system})
        return encode_chat(
            tokenizer, items, template_args, processor=processor, max_images=max_images
        )
    if system is not None or template_args:
        raise ConfigError(
            "token ids do not use the chat template; remove the system message and the template "
            "arguments"
        )
    try:
        return EncodedPrompt([operator.index(item) for item in items])
    except TypeError:
        raise PromptError(INVALID_PROMPT) from None


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    template_args: Mapping[str, Any] | None = None,
    *,
    continues: bool = False,
    processor: ImageProcessor | str = TEXT_ONLY,
    max_images: int = MAX_IMAGES,
) -> EncodedPrompt:
    """Encode a conversation up to the assistant's next response: the way of every interface.

    Args:
        tokenizer: has the chat template, unless the processor of images has its own.
        messages: with roles and contents that were checked.
        template_args: extra variables for the chat template.
        continues: whether the response continues the last message.
        processor: of the target, or why there are to be no images, as a sentence.
        max_images: most images of the conversation.

    Raises:
        PromptError: see `Tokenizer.render`; or an image is not usable, not in a message of the user
            or of a tool, or one too many.
        ConfigError: images cannot be read here.
    """
    messages = _place_images(messages)
    sources = [image for message in messages for image in images_of(message)]
    if not sources:
        shown = _for_template(messages, tokenizer, None)
        text = tokenizer.render(shown, template_args, continues=continues)
        return EncodedPrompt(tokenizer.encode_continuation(text), text=text)
    if isinstance(processor, str):
        raise PromptError(processor)
    if len(sources) > max_images:
        raise PromptError(f"the prompt has {len(sources)} images, and the limit is {max_images}")
    if any(images_of(message) for message in messages if message["role"] != "user"):
        raise PromptError("only messages of the user and of tools can have images")
    template = processor.chat_template
    shown = _for_template(messages, tokenizer, template)
    text = tokenizer.render(shown, template_args, continues=continues, chat_template=template)
    return EncodedPrompt(*processor.encode(text, read_images(sources)), text)


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def image_part(source: ImageSource) -> dict[str, Any]:
    return {"type": "image", "image": source}


def content_of(parts: Sequence[Mapping[str, Any]]) -> Content:
    """Return the content of a message: its parts if it has images, else one text."""
    if any(map(_is_image, parts)):
        return list(parts)
    return "".join(part["text"] for part in parts)


def with_images(text: str, sources: Sequence[ImageSource]) -> Content:
    """Return the content of a message: a text after images, if there are any."""
    return content_of([*map(image_part, sources), text_part(text)])


def images_of(message: Message) -> list[ImageSource]:
    return [part["image"] for part in _parts(message) if _is_image(part)]


def find_images(messages: Sequence[Message], folder: Path) -> list[Message]:
    """Return messages in which images that are named relative to a folder have their paths."""

    def find(part: Mapping[str, Any]) -> Mapping[str, Any]:
        if not _is_image(part) or not is_path(part["image"]):
            return part
        return image_part(folder / part["image"])

    return [{**x, "content": list(map(find, _parts(x)))} if images_of(x) else x for x in messages]


def _parts(message: Message) -> list[Mapping[str, Any]]:
    content: Any = message.get("content")
    return content if isinstance(content, list) else [text_part(content)]


def _is_image(part: Mapping[str, Any]) -> bool:
    return part.get("type") == "image"


def _place_images(messages: Sequence[Message]) -> list[Message]:
    """Move images in results of tools into the user's message after them.

    Chat templates show no images in other places. The results of one turn stay together.
    """
    placed: list[Message] = []
    waiting: list[Mapping[str, Any]] = []
    for message in messages:
        if message["role"] == "tool":
            waiting += filter(_is_image, _parts(message))
            texts = [part for part in _parts(message) if not _is_image(part)]
            message = {**message, "content": content_of(texts)}
        elif waiting:
            if message["role"] == "user":
                message = {**message, "content": [*waiting, *_parts(message)]}
            else:
                placed.append({"role": "user", "content": waiting})
            waiting = []
        placed.append(message)
    if waiting:
        placed.append({"role": "user", "content": waiting})
    return placed


def _place_system(messages: Sequence[Message]) -> list[Message]:
    """Move system messages to where every chat template shows them.

    The ones at the beginning become one message. A later one becomes the user's, and one with the
    user's messages beside it, because turns may have to alternate. It stays in its place: in the
    first message it would change the beginning of the prompt, which may be cached.
    """
    placed: list[Message] = []
    joins = False  # whether the last message takes in the next one if both have one role
    for message in messages:
        is_system = message["role"] == "system"
        if is_system and placed and placed[-1]["role"] != "system":
            message = {**message, "role": "user"}
        if placed and placed[-1]["role"] == message["role"] and (joins or is_system):
            parts = [*_parts(placed[-1]), text_part("\n\n"), *_parts(message)]
            placed[-1] = {**placed[-1], "content": content_of(parts)}
            joins = True
        else:
            placed.append(message)
            joins = is_system
    return placed


def _for_template(
    messages: Sequence[Message], tokenizer: Tokenizer, chat_template: str | None
) -> list[Message]:
    """Return messages as a chat template reads them, which shows a placeholder for an image."""
    later = any(message["role"] == "system" for message in messages[1:])
    if later and not tokenizer.shows_system_anywhere(chat_template):
        messages = _place_system(messages)
    shown: list[Message] = []
    for message in messages:
        parts = [{"type": "image"} if _is_image(part) else part for part in _parts(message)]
        shown.append({**message, "content": content_of(parts)})
    return shown


def check_messages(messages: Sequence[Any]) -> None:
    """Raise a PromptError unless every message has a `role`, and a text or parts as `content`."""
    for number, message in enumerate(messages, 1):
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, str | list) or not isinstance(message.get("role"), str):
            raise PromptError(f"message {number} needs the strings 'role' and 'content'")
        for part in _parts(message):
            _check_part(part)


def _check_part(part: Any) -> None:
    """Raise a PromptError unless a part of a message's content is a text or an image."""
    kind = part.get("type", "text") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        check_unicode(part["text"])
    elif kind != "image" or part.get("image") is None:
        raise PromptError(
            "a part of a message's content is not a text; only texts are supported, and images in "
            'the form {"type": "image", "image": FILE}'
        )


TurnKey: TypeAlias = tuple[str | int, int]
"""The id of a row and the index of a turn."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One conversation to answer, turn by turn; each has new messages, usually one of the user."""

    id: str | int
    turns: tuple[tuple[Message, ...], ...]

    @property
    def keys(self) -> list[TurnKey]:
        return [(self.id, turn) for turn in range(len(self.turns))]


def read_rows(path: Path, *, images: bool = False) -> list[Row]:
    """Read a file of prompts, one JSON object per line.

    An object has one of these keys, and may have an `id`, by default the line's number; other keys
    are ignored:

    - `turns`: a list of user messages as strings, answered one after the other;
    - `prompt`: one user message as a string, after the `images` beside it if there are any;
    - `messages`: the conversation so far, dicts with `role` and `content`.

    Raises:
        PromptError: a line is not such an object, repeats an id, or has images and there are to be
            no `images`; the message names the line.
    """
    lines: dict[str | int, int] = {}
    rows = read_json_lines(path, "prompts", partial(_row, images=images))
    for number, row in rows:
        if row.id in lines:
            raise PromptError(
                f"{path}:{number}: the id {row.id!r} is already used on line {lines[row.id]}"
            )
        lines[row.id] = number
    return [row for _, row in rows]


def _row(value: Any, number: int, *, images: bool) -> Row:
    if not isinstance(value, dict):
        raise PromptError("each line must be a JSON object")
    name = value.get("id", number)
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise PromptError("the row's 'id' must be a string or an integer")
    check_unicode(str(name))
    forms = [key for key in ("turns", "prompt", "messages") if key in value]
    if len(forms) != 1:
        raise PromptError("the row needs exactly one of 'turns', 'prompt' and 'messages'")
    form, content = forms[0], value[forms[0]]
    if form == "messages":
        if not isinstance(content, list) or not content:
            raise PromptError("'messages' must be a non-empty list")
        turns = [content]
    else:
        texts = [content] if form == "prompt" else content
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
            kind = "a string" if form == "prompt" else "a non-empty list of strings"
            raise PromptError(f"'{form}' must be {kind}")
        sources = value.get("images", [])
        if not isinstance(sources, list) or (sources and form != "prompt"):
            raise PromptError("'images' must be a list of files beside 'prompt'")
        turns = [[{"role": "user", "content": with_images(text, sources)}] for text in texts]
    for turn in turns:
        check_messages(turn)
    if not images and any(images_of(message) for turn in turns for message in turn):
        raise PromptError("the row has images, which only treeflash generate takes")
    plain = [[{**x, "content": content_of(_parts(x))} for x in turn] for turn in turns]
    return Row(id=name, turns=tuple(map(tuple, plain)))


@dataclass(frozen=True, kw_only=True)
class Prompting:
    """A way to turn messages into a prompt."""

    raw: bool = False
    thinking: bool = False  # whether thinking is on, if the chat template has a switch for it
    system: str | None = None

    def encode(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
        """Encode a conversation up to the response; raises what `encode` of this module does."""
        if self.raw:
            text = "\n\n".join(message["content"] for message in messages)
            return encode(tokenizer, text, raw=True).token_ids
        args = {"enable_thinking": self.thinking}
        return encode(tokenizer, messages, system=self.system, template_args=args).token_ids

    def alternatives(self, tokenizer: Tokenizer) -> list[Prompting]:
        """Return other ways to prompt that the tokenizer supports."""
        ways = [Prompting(raw=True)]
        if tokenizer.has_chat_template:
            ways += [Prompting(), Prompting(thinking=self.thinking, system=DEEPSPEC_SYSTEM)]
        if tokenizer.knows_thinking:
            ways.append(Prompting(thinking=True))
        return [way for way in ways if way != self]

    def __str__(self) -> str:
        if self.raw:
            return "without the chat template"
        thinking = f"thinking {'on' if self.thinking else 'off'}"
        system = "" if self.system is None else f", the system message {self.system!r}"
        return f"with the chat template, {thinking}{system}"
