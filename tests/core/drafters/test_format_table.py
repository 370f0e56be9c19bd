"""The table of formats in the documentation has all formats, and says how they are recognised."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from treeflash.drafters import formats, mtp_formats
from treeflash.drafters.format import Format
from treeflash.hub import gguf

PAGE = Path(__file__).parents[3] / "docs" / "drafters.md"
TENSORS = {
    "mtp.fc.weight": ("mtp.pre_fc_norm_hidden.weight", {"model_type": "qwen3_5"}),
    "model.layers.N.eh_proj.weight": ("", {"model_type": "glm4_moe", "num_hidden_layers": 3}),
}
"""By a tensor that tells a format, another one and the settings beside them."""
SETTINGS = {"dflash_config": {}, "ar_approximation": "swiglu", "selector_top_k": 16}


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def rows() -> list[list[str]]:
    """The cells of the rows of the page's first table."""
    table = re.search(r"^\| format .*?\n\n", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    lines = table[0].strip().splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def recognised(title: str, cell: str) -> Iterator[tuple[dict[str, Any], set[str]]]:
    """A configuration and tensors for everything by which a row says that it is recognised."""
    names = quoted(cell)
    for name, following in zip(names, [*names[1:], ""], strict=True):
        if re.search(r"Model$|Eagle3$", name):
            yield {"architectures": [name]}, set()
        elif name == "projector_type":
            yield {"dflash_config": {name: following}}, set()
        elif name == "model_type":
            yield {name: following}, {"pre_fc_norm_hidden.weight"}
        elif name == "speculators_model_type":
            layers = {"transformer_layer_config": {"model_type": "qwen3_5"}}
            for kind in quoted(title):
                yield {name: kind, **layers}, set()
        elif name in SETTINGS:
            yield {name: SETTINGS[name]}, set()
        elif name in TENSORS:
            other, config = TENSORS[name]
            yield config, {name.replace("N", "3"), other}


def test_the_table_has_every_format():
    found: list[Format] = []
    for title, _, cell, _, _ in rows():
        for config, stored in recognised(title, cell):
            format_ = mtp_formats.detect(config, stored) or formats.detect_format(config)
            assert format_ is not formats.DFLASH or title == "DFlash", f"{title}: {config}"
            found.append(format_)
    registry = (*formats.BLOCK_FORMATS, *mtp_formats.MTP_FORMATS)
    missing = [format_.name for format_ in registry if not any(x is format_ for x in found)]
    assert not missing


def test_the_table_has_methods_and_backends():
    for title, _, _, methods, backends in rows():
        known = {"dflash", "ddtree", "treeflash", "treeflash-chain", "markov_rank"}
        assert set(quoted(methods)) <= known, title
        assert set(quoted(backends)) <= {"cuda", "mlx", "reference"}, title
        assert backends.startswith("all") or quoted(backends), title


def test_the_page_names_the_layouts_that_are_refused():
    section = PAGE.read_text("utf-8").partition("## Unsupported drafters")[2].partition("\n## ")[0]
    for name in (*formats.REFUSED, *mtp_formats.REFUSED_TENSORS.values()):
        assert name.removesuffix("-V2") in section


def test_the_table_has_gguf_files():
    assert any(quoted(cell) == ["general.architecture", gguf.DRAFTER] for _, _, cell, *_ in rows())
