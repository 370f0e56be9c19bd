"""Talk to a model in the terminal: `treeflash chat`."""

from __future__ import annotations

import json
import os
import secrets
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from threading import Event
from types import FrameType
from typing import Any, cast

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.console import Console
from rich.text import Text

from treeflash.cli import options as cli
from treeflash.cli.answer_view import AnswerView
from treeflash.cli.console import LONG_PROMPT, Parser, guarded, reading
from treeflash.cli.single_prompt import explain, summarise
from treeflash.config import GIB, cache_folder, write_whole
from treeflash.decoding import Scheduler, SchedulerConfig
from treeflash.decoding.disk_cache import DiskCache
from treeflash.decoding.interfaces import device_report
from treeflash.decoding.iteration import concerns_few
from treeflash.decoding.prefix_cache import PrefixCache
from treeflash.errors import ConfigError, PromptError, first_line
from treeflash.language_model import LanguageModel
from treeflash.serving.settings import ANSWER_TOKENS, DISK_OPTIONS, Settings
from treeflash.text.images import data_url
from treeflash.text.input_file import read_text
from treeflash.text.options import Options, parse_options
from treeflash.text.prompt import Content, Message, check_messages, with_images
from treeflash.text.stream import Assembler

try:
    import termios
except ImportError:  # Windows
    termios = None  # type: ignore[assignment]

CACHE_BYTES = GIB
"""Device memory that may keep the conversation so far, so that only new messages are prefilled, on
a device that does not report its memory; else half of what the models leave free."""
SETTABLE = [name for name in cli.DECODE_OPTIONS if name not in ("raw", "log_probs", "system")]
"""The options of decoding that `/set` changes."""
STYLES = ("cyan", "green", "yellow", "magenta", "blue", "red")
"""The text of iteration n has style n, in turn."""
COMMANDS = {
    "/system": "/system TEXT sets the system message and begins a new conversation; without TEXT, "
    "removes it",
    "/reset": "/reset or /new begins a new conversation",
    "/file": "/file FILE puts the text of a file before the next message; may be repeated",
    "/image": "/image FILE shows the model an image with the next message; may be repeated",
    "/retry": "/retry answers the last message again",
    "/set": "/set NAME VALUE changes an option, as in `/set temperature 0.7`; without VALUE, "
    "restores the default; /set alone lists the options",
    "/save": "/save FILE writes the conversation as a line of JSON, for /load and for `treeflash "
    "train`, which trains on its last answer",
    "/load": "/load FILE continues a saved conversation",
    "/tree": "/tree [N] draws the draft trees of the last N iterations",
    "/speed": "/speed shows tokens per second and accepted lengths of the last answer",
    "/markdown": "/markdown turns the formatting of Markdown on or off",
    "/color": "/color turns colouring by iteration on or off; coloured text is not formatted",
    "/help": "/help shows this list",
    "/exit": "/exit ends the program, as Ctrl-D does",
}
HELP = "\n".join(
    [
        *COMMANDS.values(),
        "Enter sends a message, and Alt-Enter begins a new line. Ctrl-C stops an answer, and "
        "Ctrl-Z suspends the program.",
    ]
)


@dataclass(eq=False)
class ChatSession:
    """A conversation with a loaded model: the messages so far, without the system message.

    A random seed is chosen for each answer unless the `options` have one. `markdown` lays out the
    Markdown of answers. `color` colours the text by the iteration that brought it instead. The
    states of conversations are stored in the `disk` cache.
    """

    model: LanguageModel
    options: Options
    console: Console
    markdown: bool = True
    color: bool = False
    disk: DiskCache | None = None
    messages: list[Message] = field(default_factory=list)
    # images before the next message, as `data:` URLs
    images: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)  # texts before the next message
    answer: Assembler | None = None
    interrupted: Event = field(default_factory=Event)  # set by Ctrl-C since the last input

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
                with _interruption() as self.interrupted:
                    if text.startswith("/"):
                        self.run_command(*text.strip().split(maxsplit=1))
                    elif text.strip():
                        self.reply(with_images("\n\n".join([*self.files, text]), self.images))
                        self.images, self.files = [], []
            except Exception as error:
                if not concerns_few(error):
                    raise
                self.console.print(Text(f"error: {first_line(error)}", "red"))

    def reply(self, content: Content) -> None:
        """Stream the answer to a message. If it fails, the message is dropped."""
        options = self.options
        if "seed" not in options:
            options = options | {"seed": secrets.randbits(32)}
        messages = [*self.messages, {"role": "user", "content": content}]
        assembler = self.model.assembler(messages, self.model.configure(options))
        try:
            self._decode(assembler)
        except PromptError as error:
            raise PromptError(f"{error}; /reset begins a new conversation") from None
        if not assembler.chunks:
            self._note("interrupted before the answer; the message is dropped")
            return
        generation = assembler.generation()
        self.answer = assembler
        self.messages = [*messages, {"role": "assistant", "content": generation.text}]
        self.console.print(
            f"[{len(generation.token_ids)} tokens, {generation.tokens_per_s:.1f} tokens/s, "
            f"block efficiency {generation.block_efficiency:.2f}, {generation.finish_reason}]",
            style="dim",
        )

    def run_command(self, command: str, argument: str = "") -> None:
        """Carry out a command; a ConfigError says why it cannot be."""
        match command:
            case "/system":
                self.options = self.options | {"system": argument or None}
                self._begin_anew()
            case "/reset" | "/new":
                self._begin_anew()
            case "/file":
                self.files.append(read_text(_path("/file", argument, "read")).removesuffix("\n"))
                self._note(f"files before the next message: {len(self.files)}")
            case "/image":
                self._show(argument)
            case "/retry":
                self._retry()
            case "/set":
                self._set(*argument.split(maxsplit=1))
            case "/save":
                self._save(argument)
            case "/load":
                self._load(argument)
            case "/tree":
                self._draw(argument or "1")
            case "/speed":
                generation = self._answer().generation()
                self.console.print(summarise(generation, self.console.width))
            case "/markdown":
                self.markdown = not self.markdown
                self._note(f"Markdown is {'on' if self.markdown else 'off'}")
            case "/color":
                self.color = not self.color
                self._note(f"colours are {'on' if self.color else 'off'}")
            case "/help":
                self.console.print(HELP)
            case _:
                raise ConfigError(
                    f"unknown command {command}{_suggestion(command, argument)}; /help lists the "
                    "commands, and a message that begins with / needs a space before it"
                )

    def _note(self, text: str) -> None:
        self.console.print(text, style="dim")

    def _show(self, name: str) -> None:
        """Read an image now, so that the conversation keeps it whatever becomes of the file."""
        if isinstance(reason := self.model.image_processor, str):
            raise ConfigError(reason)
        self.images.append(data_url(_path("/image", name, "read")))
        self._note(f"images of the next message: {len(self.images)}")

    def _begin_anew(self) -> None:
        self.messages, self.images, self.files = [], [], []
        self._note("a new conversation begins")

    def _retry(self) -> None:
        kept = list(self.messages)
        if kept and kept[-1]["role"] == "assistant":
            kept.pop()
        if not kept or kept[-1]["role"] != "user":
            raise ConfigError("there is no message to answer yet")
        before, message, self.messages = self.messages, kept.pop(), kept
        try:
            self.reply(message["content"])
        finally:
            if self.messages is kept:  # there is no new answer
                self.messages = before

    def _set(self, name: str = "", value: str | None = None) -> None:
        flags = _settable()
        if not name:
            self._list_options(flags)
            return
        name = name.removeprefix("--").replace("_", "-")
        if name not in flags:
            raise ConfigError(f"unknown option {name}; /set lists the options")
        options: dict[str, Any] = dict(self.options)
        if value is None:
            options.pop(flags[name], None)
            options.setdefault("max_tokens", ANSWER_TOKENS)
        else:
            parser = Parser("chat", "")
            cli.add_decode_options(parser, [flags[name]])
            try:
                options |= vars(parser.parse([f"--{name}={value}"]))
            except ConfigError as error:
                raise ConfigError(str(error).removesuffix("; see --help")) from None
        parse_options(cast(Options, options))
        self.options = cast(Options, options)
        self._note(f"{name} has its default" if value is None else f"{name} is {value}")

    def _list_options(self, options: dict[str, str]) -> None:
        """Print the options by the names that `/set` takes, and the values that are set."""
        values = {name: self.options.get(option) for name, option in options.items()}
        lines = [f"  {name} {value}" for name, value in values.items() if value is not None]
        text = "\n".join([f"{', '.join(options)}; set are:", *lines])
        self.console.print(text)

    def _decode(self, assembler: Assembler) -> None:
        """Show the text of a sequence while it is decoded, until Ctrl-C is pressed."""
        scheduler, prompt_tokens = self.scheduler, len(assembler.prompt_ids)
        shown = 0
        view = AnswerView(self.console, markdown=self.markdown and not self.color)
        with view, _without_echo():
            request = scheduler.submit(assembler.request())
            try:
                while assembler.finish_reason is None and not self.interrupted.is_set():
                    if not assembler.chunks and prompt_tokens > LONG_PROMPT:
                        progress = scheduler.prompts.get(request)
                        view.report(reading(progress.done if progress else 0, prompt_tokens))
                    for _, step in scheduler.step():
                        if isinstance(step, Exception):
                            raise step
                        style = STYLES[len(assembler.chunks) % len(STYLES)] if self.color else ""
                        chunk = assembler.add(step)
                        view.add(chunk.text, style)
                        shown += len(chunk.text)
            except BaseException:
                scheduler.cancel(request)
                raise
            scheduler.cancel(request, keep=True)  # also if interrupted: the next prompt has it
            view.add(assembler.generation().text[shown:])

    @cached_property
    def scheduler(self) -> Scheduler:
        config = SchedulerConfig(max_parallel=1)
        free = device_report(self.model.backend).free_bytes
        nbytes = CACHE_BYTES if free is None else free // 2
        return self.model.scheduler(config, PrefixCache(nbytes, self.disk))

    def close(self) -> None:
        """Store what is not stored yet, if there is a disk cache."""
        if self.disk is not None:
            cache = self.scheduler.prefix_cache
            assert cache is not None
            cache.close()

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
        path = _path("/save", name, "written")
        if not self.messages:
            raise ConfigError("there is no message to save yet")
        system = self.options.get("system")
        first = [] if system is None else [{"role": "system", "content": system}]
        line = json.dumps({"id": name, "messages": first + self.messages}, ensure_ascii=False)
        try:
            if path.exists():
                raise ConfigError(
                    f"{name} cannot be written: File exists already; choose another name"
                )
            write_whole(path, line + "\n")
        except OSError as error:
            raise ConfigError(f"{name} cannot be written: {error.strerror}") from None
        self.console.print(f"saved {len(self.messages)} messages in {name}")

    def _load(self, name: str) -> None:
        path = _path("/load", name, "read")
        text = read_text(path)
        try:
            messages = json.loads(text)["messages"]
            check_messages(messages)
        except (ValueError, TypeError, KeyError, RecursionError):
            messages = []
        options: dict[str, Any] = {key: x for key, x in self.options.items() if key != "system"}
        if messages and messages[0]["role"] == "system":
            options["system"] = messages.pop(0)["content"]
        if not messages or not isinstance(options.get("system", ""), str):
            raise ConfigError(f"{name} is not a conversation that /save wrote")
        self.options = cast(Options, options)
        self.messages = [{"role": x["role"], "content": x["content"]} for x in messages]
        self._note(f"{len(messages)} messages; the next one continues the conversation")


def _settable() -> dict[str, str]:
    """Return the options of `/set` by the names that it takes."""
    return {cli.flag_of(cli.DECODE_OPTIONS[x]).removeprefix("--"): x for x in SETTABLE}


def _suggestion(command: str, argument: str) -> str:
    """Return the end of a sentence that names the command which an unknown one resembles."""
    forms = {name: name for name in COMMANDS} | {f"/{x}": f"/set {x}" for x in _settable()}
    found = get_close_matches(command.lower().replace("_", "-"), forms, 1)
    return f", write {f'{forms[found[0]]} {argument}'.rstrip()}" if found else ""


def _path(command: str, name: str, done: str) -> Path:
    """Return the file that the user names; raises a ConfigError if there is no name or home."""
    if not name:
        raise ConfigError(f"{command} needs the name of a file")
    try:
        return Path(name).expanduser()
    except RuntimeError as error:  # the home of an unknown user
        raise ConfigError(f"{name} cannot be {done}: {error}") from None


@contextmanager
def _without_echo() -> Iterator[None]:
    """Keep what is typed meanwhile for the next prompt, without showing it in the answer."""
    if termios is None or not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    quiet = list(before)
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


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
    """Make a prompt: Alt-Enter begins a new line, Tab completes commands, Ctrl-Z suspends."""
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
        enable_suspend=True,
        prompt_continuation="  ",
        **settings,
    )


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, load the models, and talk until the user ends the input."""
    args = make_parser().parse(argv)
    Settings(**{one.name: getattr(args, one.name) for one in DISK_OPTIONS})  # checks them
    options: Options = {"max_tokens": ANSWER_TOKENS, **cli.decode_options(args)}
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigError("chat needs a terminal; pipe prompts into `treeflash generate`")
    model = cli.load_model(args, [options.get("method")])
    console = Console(highlight=False, markup=False)
    disk = None
    if args.prefix_cache_dir is not None:
        disk_bytes = int(args.prefix_cache_disk_gb * GIB)
        disk = model.disk_cache(Path(args.prefix_cache_dir), disk_bytes)
    conversation = ChatSession(model, options, console, not args.no_markdown, args.color, disk)
    console.print("Ask something; /help lists the commands, and Ctrl-D ends.", style="dim")
    with closing(conversation):
        conversation.run(make_session(message_history(args.no_history)))
    return 0


def make_parser() -> Parser:
    parser = Parser("chat", "Talk to a model in the terminal, with draft trees.")
    parser.add_config_option()
    parser.add_argument(
        "--color", action="store_true", help="colour the text by the iteration that added it"
    )
    parser.add_argument(
        "--no-markdown", action="store_true", help="show Markdown source as the model writes it"
    )
    parser.add_argument(
        "--no-history",
        action="store_true",
        help="do not store the messages that you type for later sessions",
    )
    for one in DISK_OPTIONS:
        cli.add_option(parser, one, default=one.default)
    note = {"seed": "random", "max_tokens": str(ANSWER_TOKENS)}
    cli.add_decode_options(parser, [*SETTABLE, "system"], note)
    cli.add_model_options(parser)
    return parser


def message_history(forget: bool) -> History:
    """Open the messages that the arrow keys recall, a file that only its owner can read."""
    if forget:
        return InMemoryHistory()
    file = cache_folder() / "chat_history"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as error:
        reason = f"{error.filename} cannot be written ({error.strerror})"
        warnings.warn(f"messages will not be remembered: {reason}", stacklevel=2)
        return InMemoryHistory()
    return FileHistory(file)
