"""Talk to a model in the terminal: `treeflash chat`."""

from __future__ import annotations

import json
import secrets
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Event
from types import FrameType
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.console import Console
from rich.text import Text

from treeflash.cli import options as cli
from treeflash.cli.console import Parser, guarded
from treeflash.cli.single_prompt import explain, summarise
from treeflash.decoding import Scheduler, SchedulerConfig
from treeflash.decoding.interfaces import device_report
from treeflash.decoding.prefix_cache import PrefixCache
from treeflash.errors import ConfigError, PromptError, TreeflashError
from treeflash.hub.models import cache_folder
from treeflash.language_model import LanguageModel
from treeflash.text.options import Options
from treeflash.text.prompt import Message
from treeflash.text.stream import Assembler

CACHE_BYTES = 1 << 30
"""Device memory that may keep the conversation so far, so that only new messages are prefilled, on
a device that does not tell its memory; else half of what the models leave free."""
STYLES = ("cyan", "green", "yellow", "magenta", "blue", "red")
"""The text of iteration n has style n, in turn."""
COMMANDS = {
    "/system": "/system TEXT sets the system message and begins anew; without TEXT it is removed",
    "/reset": "/reset begins a new conversation",
    "/save": "/save FILE writes the conversation as one line of JSON, which train can read",
    "/tree": "/tree [N] draws the draft trees of the last N iterations",
    "/speed": "/speed shows tokens per second and accepted lengths of the last answer",
    "/color": "/color colours the text by the iteration that brought it, or stops to",
    "/help": "/help shows this list",
    "/exit": "/exit ends the program, as Ctrl-D does",
}
HELP = "\n".join(
    [
        *COMMANDS.values(),
        "Enter sends a message, and Alt-Enter begins a new line. Ctrl-C stops an answer.",
    ]
)


@dataclass(eq=False)
class Conversation:
    """A conversation with a loaded model: the messages so far, without the system message.

    A random seed is chosen for each answer unless the `options` have one. `color` colours the text
    by the iteration that brought it.
    """

    model: LanguageModel
    options: Options
    console: Console
    color: bool = False
    messages: list[Message] = field(default_factory=list)
    answer: Assembler | None = None

    def run(self, session: PromptSession[str]) -> None:
        """Read messages and commands until the user ends the input or enters `/exit`."""
        while True:
            try:
                text = session.prompt("> ")
            except KeyboardInterrupt:  # drops the line
                continue
            except EOFError:
                return
            if text.strip() == "/exit":
                return
            try:
                if text.startswith("/"):
                    self.obey(*text.split(maxsplit=1))
                elif text.strip():
                    self.reply(text)
            except TreeflashError as error:
                self.console.print(Text(f"error: {error}", "red"))

    def reply(self, text: str) -> None:
        """Stream the answer to a message. If it fails, the message is dropped."""
        options = self.options
        if "seed" not in options:
            options = options | {"seed": secrets.randbits(32)}
        messages = [*self.messages, {"role": "user", "content": text}]
        assembler = self.model.assembler(messages, options)
        try:
            self._decode(assembler)
        except PromptError as error:
            raise PromptError(f"{error}; /reset begins a new conversation") from None
        finally:
            self.console.print()
        generation = assembler.generation()
        self.answer = assembler
        self.messages = [*messages, {"role": "assistant", "content": generation.text}]
        self.console.print(
            f"[{len(generation.token_ids)} tokens, {generation.tokens_per_s:.1f} tokens/s, "
            f"block efficiency {generation.block_efficiency:.2f}, {generation.finish_reason}]",
            style="dim",
            markup=False,
        )

    def obey(self, command: str, argument: str = "") -> None:
        """Carry out a command; a ConfigError says why it cannot be."""
        match command:
            case "/system":
                self.options = self.options | {"system": argument or None}
                self._begin_anew()
            case "/reset":
                self._begin_anew()
            case "/save":
                self._save(argument)
            case "/tree":
                self._draw(argument or "1")
            case "/speed":
                self.console.print(summarise(self._answer().generation()), markup=False)
            case "/color":
                self.color = not self.color
                self.console.print(f"colours are {'on' if self.color else 'off'}", style="dim")
            case "/help":
                self.console.print(HELP, markup=False)
            case _:
                raise ConfigError(
                    f"unknown command {command}; /help lists the commands, and a message that "
                    "begins with / needs a space before it"
                )

    def _begin_anew(self) -> None:
        self.messages = []
        self.console.print("a new conversation begins", style="dim")

    def _decode(self, assembler: Assembler) -> None:
        """Print the text of a sequence as it is decoded, until Ctrl-C is pressed."""
        request = assembler.request()
        printed = 0
        with _interruption() as interrupted, closing(self._scheduler.decode([request])) as steps:
            for iteration, (_, step) in enumerate(steps):
                chunk = assembler.add(step)
                style = STYLES[iteration % len(STYLES)] if self.color else ""
                self._print(chunk.text, style)
                printed += len(chunk.text)
                if chunk.finish_reason is not None or interrupted.is_set():
                    break
        self._print(assembler.generation().text[printed:])

    def _print(self, text: str, style: str = "") -> None:
        self.console.print(Text(text, style), end="", soft_wrap=True)

    @cached_property
    def _scheduler(self) -> Scheduler:
        config = SchedulerConfig(max_parallel=1)
        free = device_report(self.model.backend).free_bytes
        return self.model.scheduler(config, PrefixCache(CACHE_BYTES if free is None else free // 2))

    def _answer(self) -> Assembler:
        if self.answer is None:
            raise ConfigError("there is no answer yet")
        return self.answer

    def _draw(self, count: str) -> None:
        if not count.isdecimal() or not int(count):
            raise ConfigError(f"/tree takes a number of iterations, not {count!r}")
        steps = [chunk.step for chunk in self._answer().chunks]
        drawn = [(n, step) for n, step in enumerate(steps) if step.tree is not None]
        if not drawn:
            raise ConfigError("the answer ended with its first token, so nothing was drafted")
        for number, step in drawn[-int(count) :]:
            self.console.print(explain(step, number, self.model.tokenizer))

    def _save(self, name: str) -> None:
        if not name:
            raise ConfigError("/save needs the name of a file")
        system = self.options.get("system")
        first = [] if system is None else [{"role": "system", "content": system}]
        line = json.dumps({"id": name, "messages": first + self.messages}, ensure_ascii=False)
        try:
            with Path(name).expanduser().open("x", encoding="utf-8") as file:
                file.write(line + "\n")
        except (OSError, RuntimeError) as error:  # a RuntimeError for the home of an unknown user
            reason = getattr(error, "strerror", error)
            raise ConfigError(f"{name} cannot be written: {reason}") from None
        self.console.print(f"saved {len(self.messages)} messages in {name}", markup=False)


@contextmanager
def _interruption() -> Iterator[Event]:
    """Take note of Ctrl-C once, so that no iteration is left half done; the second one raises."""
    interrupted = Event()

    def note(number: int, frame: FrameType | None) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def make_session(history: History | None, **settings: Any) -> PromptSession[str]:
    """Lines of input, where Alt-Enter begins a new line and Tab completes commands."""
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return PromptSession(
        multiline=True,
        key_bindings=keys,
        history=history,
        completer=WordCompleter(list(COMMANDS), sentence=True),
        complete_while_typing=False,
        prompt_continuation="  ",
        **settings,
    )


MAX_TOKENS = 2048
"""New tokens of an answer unless the user sets a limit."""


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, load the models, and talk until the user ends the input."""
    args = make_parser().parse(argv)
    options: Options = {"max_tokens": MAX_TOKENS, **cli.decode_options(args)}
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigError("chat needs a terminal; give prompts in a pipe to `treeflash generate`")
    model = cli.load_model(args, [options.get("method")])
    console = Console(highlight=False)
    conversation = Conversation(model, options, console, color=args.color)
    console.print("Ask something; /help lists the commands, and Ctrl-D ends.", style="dim")
    conversation.run(make_session(_history(args.no_history)))
    return 0


def make_parser() -> Parser:
    parser = Parser("chat", "Talk to a model in the terminal, with draft trees.")
    parser.add_config_option()
    parser.add_argument(
        "--color", action="store_true", help="colour the text by the iteration that brought it"
    )
    parser.add_argument(
        "--no-history", action="store_true", help="do not remember messages for the next time"
    )
    names = [name for name in cli.DECODE_FLAGS if name not in ("raw", "log_probs")]
    note = {"seed": "random", "max_tokens": str(MAX_TOKENS)}
    cli.add_decode_options(parser, names, note)
    cli.add_model_options(parser)
    return parser


def _history(forget: bool) -> History:
    """The messages that the arrow keys recall; a file that only its owner can read."""
    if forget:
        return InMemoryHistory()
    file = cache_folder() / "chat_history"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch(mode=0o600)
    return FileHistory(file)


if __name__ == "__main__":
    sys.exit(main())
