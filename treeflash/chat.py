"""Talk to a model in the terminal: `treeflash chat`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from rich.console import Console

from treeflash.cli import options as cli
from treeflash.cli.console import guarded
from treeflash.cli.conversation import Conversation, make_session
from treeflash.cli.parser import Parser
from treeflash.errors import ConfigError
from treeflash.hub.models import cache_folder
from treeflash.text.options import Options

MAX_TOKENS = 2048
"""New tokens of an answer unless the user sets a limit."""


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, load the models, and talk until the user ends the input."""
    args = make_parser().parse(argv)
    options: Options = {"max_tokens": MAX_TOKENS, **cli.decode_options(args)}
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigError("chat needs a terminal; give prompts in a pipe to `treeflash generate`")
    model = cli.load_model(args, [options["method"]] if "method" in options else [])
    console = Console(highlight=False)
    conversation = Conversation(model, options, console, color=args.color)
    console.print("Ask something; /help lists the commands, and Ctrl-D ends.", style="dim")
    conversation.run(make_session(_history(args.no_history)))
    return 0


def make_parser() -> Parser:
    """The options of the command."""
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
