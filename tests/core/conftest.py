"""A fast scripted model, and a tiny real pair for the reference backend."""

from __future__ import annotations

import gc
import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from byte_tokens import END, SPECIAL, save_tokenizer
from failures import failing
from recordings import recording

from treeflash.cli import options
from treeflash.commands.generate import main
from treeflash.decoding.adaptive_budget import AdaptiveBudgets
from treeflash.decoding.interfaces import Pass, Verify
from treeflash.decoding.iteration import RunningSequence
from treeflash.decoding.sampling import SampledTokens
from treeflash.decoding.transitions import TransitionTable
from treeflash.decoding.verify_costs import SIZES
from treeflash.errors import NumericalError
from treeflash.language_model import LanguageModel, load
from treeflash.testing.costs import SteadyCosts
from treeflash.testing.models import edit_config, write_drafter, write_target
from treeflash.text.tokenizer import Tokenizer

DEPTHS, CHILDREN = 4, 3
OTHER = 5


class ScriptedText:
    """The state of a scripted text: its script, its prompt, and how much of it is committed."""

    nbytes = shared_nbytes = 0
    needs_snapshots = False
    length = 0

    def __init__(self, script: Sequence[int], prompt: Sequence[int] = (), length: int = 0) -> None:
        self.script = script
        self.prompt = list(prompt)
        self.length = length

    def token(self, position: int) -> int:
        index = position - len(self.prompt)
        return self.script[index] if index < len(self.script) else END

    def fork(self, length: int, capacity: int) -> ScriptedText:
        assert length <= len(self.prompt)
        return ScriptedText(self.script, self.prompt[:length], length)

    def restorable(self, length):
        return min(length, self.length)

    def close(self) -> None:
        pass


class ScriptedBackend:
    """A target that generates scripts, and a drafter that is wrong at every fifth position.

    Each text gets the next script; the last script is repeated.
    `differ_at` makes verified trees, unlike plain decoding, give another token there;
    Its logits are 4 for the script's token, and less by `margin` for the other one there.
    `interrupt_at` raises KeyboardInterrupt in that call of `verify`, counted over all texts.
    `fails` is the number of a script whose trees cannot be verified.
    """

    name, device, device_name, dtype = "scripted", "cpu", "none", "float32"
    inexact: str | None = "rounding may differ"
    images = "it only repeats a script"
    vocab_size = len(SPECIAL) + 256
    max_positions = 400

    def __init__(
        self,
        scripts: Sequence[Sequence[int]],
        *,
        drafter: bool = True,
        head: bool = True,
        differ_at: int | None = None,
        interrupt_at: int | None = None,
        margin: float = 1.0,
        fails: int | None = None,
    ) -> None:
        self.scripts = list(scripts)
        self.drafter_config = (
            SimpleNamespace(block_size=DEPTHS + 1, depths=DEPTHS, has_marginals=True)
            if drafter
            else None
        )
        self.verifier = self
        self.drafter = self if drafter else None
        self.head = self if drafter and head else None
        self.differ_at = differ_at
        self.interrupt_at = interrupt_at
        self.margin = margin
        self.failing = None if fails is None else self.scripts[fails]
        self.verified = 0
        self.opened = 0
        self.prompts: list[list[int]] = []

    def open(self, capacity: int, *, drafts: bool) -> ScriptedText:
        self.opened += 1
        return ScriptedText(self.scripts[min(self.opened, len(self.scripts)) - 1])

    def state_nbytes(self, capacity: int, *, drafts: bool) -> int:
        return 0

    def check_trees(self) -> None:
        pass

    def run(self, work):
        return Pass([self.run_one(item) for item in work])

    def run_one(self, item):
        if isinstance(item, Verify):
            return self.verify(item.state, item.tree)
        sampled = self.extend(item.state, item.token_ids)
        return None if item.params is None else sampled

    def extend(self, text, token_ids):
        if not text.prompt:
            self.prompts.append(text.prompt)
        text.prompt += token_ids
        text.length += len(token_ids)
        return SampledTokens(np.array([text.token(text.length)], np.int32))

    def verify(self, text, tree):
        self.verified += 1
        if self.verified == self.interrupt_at:
            raise KeyboardInterrupt
        if text.script is self.failing:
            raise NumericalError("not finite")
        positions = [text.length + 1 + int(depth) for depth in tree.depths]
        chosen = [text.token(position) for position in positions]
        if self.differ_at is not None and len(tree) > 1:
            odd = len(text.prompt) + self.differ_at
            chosen = [OTHER if p == odd else t for p, t in zip(positions, chosen, strict=True)]
        return SampledTokens(np.array(chosen, np.int32))

    def logits(self, trees):
        return Pass(logits=[self.logits_of(text, tree) for text, tree in trees])

    def logits_of(self, text, tree):
        # Of a text that was run anew, whose own prompt is the prompt and what follows it.
        logits = np.zeros((len(tree), self.vocab_size), np.float32)
        first = len(self.prompts[-2])
        for row, depth in enumerate(tree.depths):
            index = text.length + 1 + int(depth) - first
            logits[row, OTHER] = 4 - self.margin
            logits[row, text.script[index] if index < len(text.script) else END] = 4
        return logits

    def commit(self, verified, paths):
        for text, path in paths:
            text.length += len(path)

    def draft(self, roots, depths=None):
        return [text for text, _ in roots]

    def marginals(self, blocks, options):
        return [self.table(text, options.k) for text in blocks]

    def transitions(self, blocks, options):
        return self.marginals(blocks, options)

    def table(self, text, k):
        tokens = np.empty((DEPTHS, CHILDREN), np.int32)
        for depth in range(DEPTHS):
            position = text.length + depth + 1
            first = 7 if position % 5 == 0 else text.token(position)
            tokens[depth] = [first, 8 + first % 2, 10 + first % 2]
        log_probs = np.log(np.tile(np.float32([0.6, 0.3, 0.1]), (DEPTHS, 1)))
        return TransitionTable.from_marginals(tokens[:, :k], log_probs[:, :k])


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One token per byte; 1 and 2 end a text."""
    folder = save_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="session")
def scripted(byte_tokenizer: Tokenizer) -> Callable[..., LanguageModel]:
    """Make a model that generates these texts, one after the other, each with an end token."""

    def make(*texts: str, **settings) -> LanguageModel:
        scripts = [[*byte_tokenizer.encode(text), END] for text in texts]
        # Measuring costs would use up scripts; here every size costs the same, and drafts nothing.
        adaptive_budgets = AdaptiveBudgets(SteadyCosts(dict.fromkeys(SIZES, 1000.0)))
        return LanguageModel(
            ScriptedBackend(scripts, **settings), byte_tokenizer, adaptive_budgets=adaptive_budgets
        )

    return make


@pytest.fixture(scope="module")
def quick_collections() -> None:
    """Spare the garbage collector what earlier tests left: a diagnosis calls it for each check."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a random target whose texts never end, and of a drafter for it."""
    folder = tmp_path_factory.mktemp("tiny")
    target, drafter = folder / "target", folder / "drafter"
    write_target(target, "llama", seed=3, vocab_size=ScriptedBackend.vocab_size)
    edit_config(target, lambda config: config.pop("eos_token_id"))
    save_tokenizer(target)
    write_drafter(drafter, target, seed=4)
    return target, drafter


@pytest.fixture(scope="module")
def model(tiny_pair) -> LanguageModel:
    """Load the tiny pair in NumPy."""
    return load(*tiny_pair, backend="reference")


@pytest.fixture
def pair_options(tiny_pair):
    """Options of the command line that choose the tiny pair, on the reference backend."""
    target, drafter = map(str, tiny_pair)
    return ["--backend", "reference", "--target", target, "--drafter", drafter]


@pytest.fixture
def use(monkeypatch):
    """Make the command line load a given model."""

    def use(model):
        monkeypatch.setattr(options, "load_model", lambda *args, **kwargs: model)
        return model

    return use


@pytest.fixture
def closed():
    """Collect the sequences whose states are closed."""
    with recording(RunningSequence, "close") as sequences:
        yield sequences


@pytest.fixture
def nothing_loads():
    """Fail where the command line loads a model."""
    with failing(options, "load_model", pytest.fail.Exception("loaded")):
        yield


class Keyboard(io.StringIO):
    """A text that is typed in a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def stdin(monkeypatch):
    """Replace standard input by a text, or by another stream."""

    def stdin(content):
        stream = io.StringIO(content) if isinstance(content, str) else content
        monkeypatch.setattr(sys, "stdin", stream)

    return stdin


@pytest.fixture
def typed(stdin):
    """Replace standard input by a text that is typed in a terminal."""
    return lambda text: stdin(Keyboard(text))


@pytest.fixture
def run(capsys):
    """Run the command line: exit code, standard output, standard error."""

    def run(*args: str) -> tuple[int, str, str]:
        capsys.readouterr()
        return main(list(args)), *capsys.readouterr()

    return run


@pytest.fixture
def prompt_sets(tmp_path):
    """Two sets of prompts."""
    paths = []
    for name in ("one", "two"):
        path = tmp_path / f"{name}.jsonl"
        rows = [{"id": n, "turns": [f"{name} {n}", "never asked"]} for n in range(3)]
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        paths.append(str(path))
    return paths
