"""Text that follows from the options of configurations and is checked in.

`python -m tests.tables` writes it: the keywords of the Python API in `treeflash/`, which editors
read, and tables of options in `docs/`. `tests/core/test_tables.py` checks that it is up to date.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from treeflash.config import LoadConfig, Penalties, SamplingConfig
from treeflash.option import Option, options_of
from treeflash.serving.settings import Settings
from treeflash.text.options import OPTIONS

ROOT = Path(__file__).parents[1]
POWERS = {-(2**63): "-2**63", 2**64 - 1: "2**64 - 1"}
"""The limits that are better written as powers of two."""


def typed_dict(name: str, summary: str, options: Collection[Option]) -> str:
    """Write a class of keywords."""
    keys = "\n".join(f"    {one.name}: {one.annotation}".replace("'", '"') for one in options)
    return f'class {name}(TypedDict, total=False):\n    """{summary}"""\n\n{keys}'


def flag(option: Option) -> str:
    """Write an option as on the command line."""
    value = "" if bool in option.kinds and option.parse is None else option.placeholder or ""
    name = option.flag or f"--{option.name.replace('_', '-')}"
    return f"`{name} {value}".rstrip().replace("|", "\\|") + "`"


def default(option: Option) -> str:
    """Write the default of an option."""
    is_number = isinstance(option.default, float) and option.shown is None
    return f"{option.default:g}" if is_number else option.default_text.strip('"')


def in_requests(option: Option) -> str:
    """Return the numbers that requests may have, in words; empty if they have no limits."""
    if option.request_limits is None:
        has_limits = option.minimum is not None or option.above is not None
        return option.accepted_values if has_limits else ""
    least, most = option.request_limits
    return f"between {POWERS.get(least, least)} and {POWERS.get(most, most)}"


def table(head: str, rows: Collection[Collection[str]]) -> str:
    """Write a table in Markdown."""
    lines = [head, *(f"| {' | '.join(row)} |" for row in rows)]
    lines.insert(1, "| " + " | ".join(["---"] * (head.count("|") - 1)) + " |")
    return "\n".join(lines)


def sampling_table() -> str:
    """Write the options of sampling."""
    return table(
        "| option | flag | default | in requests | |",
        [
            (f"`{name}`", flag(one), default(one), in_requests(one), one.doc or one.help)
            for name, one in (options_of(SamplingConfig) | options_of(Penalties)).items()  # type: ignore[operator]
        ],
    )


def limits_table() -> str:
    """Write the limits of a server."""
    return table(
        "| option | default | |",
        [(flag(one), default(one), one.help) for one in options_of(Settings).values()],
    )


def fields_table() -> str:
    """Write the decoding options that requests may set."""
    return table(
        "| field | accepted | |",
        [
            (
                f"`{name}`",
                in_requests(one) or ", ".join(one.choices) or str(one.rule),
                one.doc or one.help,
            )
            for name, one in OPTIONS.items()
            if one.requests
        ],
    )


PARTS = {
    "treeflash/text/options.py": {
        "Options": lambda: typed_dict(
            "Options", "Keywords of `generate`, `stream` and `generate_many`.", OPTIONS.values()
        )
    },
    "treeflash/language_model.py": {
        "LoadOptions": lambda: typed_dict(
            "LoadOptions", "Keywords of `load`.", options_of(LoadConfig).values()
        )
    },
    "docs/sampling.md": {"options": sampling_table},
    "docs/serving.md": {"limits": limits_table, "fields": fields_table},
}
"""What is written, by file and by the name of the marks around it."""


def write(path: str) -> str:
    """Return the text of a file with all of its parts as they should be."""
    text = (ROOT / path).read_text(encoding="utf-8")
    for name, make in PARTS[path].items():
        begin, end = f"# begin {name}\n", f"\n\n# end {name}\n"
        if path.endswith(".md"):
            begin, end = (
                f"<!-- begin {name}: python -m tests.tables -->\n",
                f"<!-- end {name} -->\n",
            )
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        assert after, f"{path} has no marks of {name}"
        text = f"{before}{begin}{make()}\n{end}{after}"
    return text


def main() -> None:
    """Write all parts, and print the files that changed."""
    for path in PARTS:
        text = write(path)
        if text != (ROOT / path).read_text(encoding="utf-8"):
            (ROOT / path).write_text(text, encoding="utf-8")
            print(path)


if __name__ == "__main__":
    main()
