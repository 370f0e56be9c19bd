"""Serve a model over HTTP: `python -m treeflash.serve`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from treeflash.cli.exit_status import guarded
from treeflash.cli.options import (
    Parser,
    add_decode_options,
    add_model_options,
    decode_options,
    load_model,
)
from treeflash.errors import ConfigError
from treeflash.serving.options import add_server_options, read_settings, with_config_file

NEEDED = ("fastapi", "uvicorn", "prometheus_client", "llguidance")


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, load the models, and serve until a signal ends it.

    0: ended by a signal, after the running answers; 2: invalid input, or the port is taken.
    """
    parser = Parser("treeflash.serve", "Serve a model over HTTP, with draft trees, losslessly.")
    add_server_options(parser)
    add_decode_options(parser)
    add_model_options(parser)
    args = parser.parse_args(with_config_file(sys.argv[1:] if argv is None else argv))
    settings = read_settings(args)
    options = decode_options(args)
    if options.pop("raw", False):
        raise ConfigError("--raw is not for a server; send plain text to /v1/completions")
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ConfigError(f"the server needs {missing[0]}; pip install 'treeflash[serve]'")
    from treeflash.serving.run import serve

    return serve(
        partial(load_model, args, [options["method"]] if "method" in options else []),
        settings,
        options,
        model_names(args),
        host=args.host,
        port=args.port,
        log_level=args.log_level,
    )


def model_names(args: argparse.Namespace) -> tuple[str, ...]:
    """What clients may call the model: the first name is reported."""
    if args.model_name:
        return tuple(args.model_name)
    if args.target is None:
        return ("SmolLM2-135M-Instruct",)
    path = Path(args.target)
    return (path.resolve().name,) if path.is_dir() else (args.target,)


if __name__ == "__main__":
    sys.exit(main())
