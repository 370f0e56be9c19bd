"""Sequences whose pages do not follow one another, and that share pages, decode as on a CPU."""

import pytest
from mtp_pairs import write_mtp_pair, write_peagle_pair
from parts import load_with_parts

from treeflash.config import DecodeConfig, LoadConfig
from treeflash.decoding import Request, Scheduler
from treeflash.decoding.prefix_cache import PrefixCache
from treeflash.testing import require
from treeflash.testing.models import write_pair

require("torch")

from treeflash_cuda.backend import load
from treeflash_cuda.cache import Slab

PROMPT = [3 + n * n % 20 for n in range(80)]
"""More than a page of 64 columns."""


def decoded(backend, method):
    """The tokens of prompts that share beginnings, of which some come from the prefix cache."""
    scheduler, found = Scheduler(backend, prefix_cache=PrefixCache(1 << 24)), []
    config = DecodeConfig(method=method, max_tokens=4)
    full_page = PROMPT[:64]
    for prompts in ([PROMPT], [[*PROMPT[:70], 5, 6], [*PROMPT, 7]], [PROMPT, PROMPT, full_page]):
        requests = [Request(prompt_ids=prompt, config=config) for prompt in prompts]
        texts = {request: [] for request in requests}
        for request, step in scheduler.decode(requests):
            texts[request] += map(int, step.tokens)
        found += [texts[request] for request in requests]
    return found


WRITERS = {
    "a drafter": (write_pair, "qwen3"),
    "an EAGLE-3 head": (write_mtp_pair, "eagle3"),
    "P-EAGLE": (write_peagle_pair,),
}


@pytest.mark.parametrize(
    ("kind", "in_rows"),
    [("a drafter", True), ("a drafter", False), ("an EAGLE-3 head", True), ("P-EAGLE", True)],
)
def test_tokens_do_not_depend_on_pages(tmp_path, monkeypatch, kind, in_rows):
    """With masks, as long prompts run, and without."""
    write, *args = WRITERS[kind]
    pair, method = write(tmp_path, *args), "ddtree" if kind == "P-EAGLE" else "treeflash"
    expected = decoded(load(*pair, LoadConfig(device="cpu", dtype="float32")), method)
    backend = load_with_parts(monkeypatch, *pair, models=not in_rows)
    take, copies, copy = Slab.take, [], Slab.copy

    def take_backwards(slab, count):
        pages = take(slab, count)
        return None if pages is None else pages[::-1].copy()

    monkeypatch.setattr(Slab, "take", take_backwards)
    monkeypatch.setattr(Slab, "copy", lambda *given: copies.append(given) or copy(*given))
    if not in_rows:
        backend.target.passes.has_row_pass = False
    assert decoded(backend, method) == expected
    assert copies  # the beginnings end inside of pages
