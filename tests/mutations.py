"""Mutation testing: change the code in small ways, one at a time, and report what no test notices.

    python -m tests.mutations treeflash/decoding/scheduler.py --sample 40

The changes are cosmic-ray's operators, and statements that are left out. They are made in
a copy of the packages, which the tests import instead of the source tree. A change survives if the
tests of its area pass: either the change has no effect, or a behaviour has no test.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import cache_from_source
from pathlib import Path

ROOT = Path(__file__).parents[1]
OPERATORS = (
    "AddNot",
    "NumberReplacer",
    "RemoveDecorator",
    "ReplaceAndWithOr",
    "ReplaceBinaryOperator_Add_Sub",
    "ReplaceBinaryOperator_FloorDiv_Mul",
    "ReplaceBinaryOperator_Mul_Div",
    "ReplaceBinaryOperator_Sub_Add",
    "ReplaceBreakWithContinue",
    "ReplaceComparisonOperator_Eq_NotEq",
    "ReplaceComparisonOperator_GtE_Gt",
    "ReplaceComparisonOperator_Gt_GtE",
    "ReplaceComparisonOperator_IsNot_Is",
    "ReplaceComparisonOperator_Is_IsNot",
    "ReplaceComparisonOperator_LtE_Lt",
    "ReplaceComparisonOperator_Lt_LtE",
    "ReplaceComparisonOperator_NotEq_Eq",
    "ReplaceContinueWithBreak",
    "ReplaceFalseWithTrue",
    "ReplaceOrWithAnd",
    "ReplaceTrueWithFalse",
    "ReplaceUnaryOperator_Delete_Not",
    "ReplaceUnaryOperator_Delete_USub",
    "ZeroIterationForLoop",
)
MIN_SECONDS, FACTOR = 60.0, 4.0
"""Tests of a mutant that take longer than this, or than this many times the time that they take on
the whole code, hang: the mutant is killed."""
MAX_NBYTES = 32 << 30
"""Address space of the tests; a mutant that asks for more is killed too."""


@dataclass(frozen=True)
class Mutation:
    """A file with one change."""

    file: Path  # below the root
    operator: str
    code: str

    def diff(self) -> str:
        """The changed lines."""
        before = (ROOT / self.file).read_text(encoding="utf-8").splitlines()
        lines = list(difflib.unified_diff(before, self.code.splitlines(), n=0, lineterm=""))
        return "\n".join(lines[2:])


def mutations(file: Path) -> Iterator[Mutation]:
    """All changes of a file that change more than annotations and docstrings."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    code = (ROOT / file).read_text(encoding="utf-8")
    whole = meaning(code)
    for name in OPERATORS:
        operator = get_operator(f"core/{name}")()
        occurrence = 0
        while (mutant := mutate_code(code, operator, occurrence)) is not None:
            if meaning(mutant) not in (whole, None):
                yield Mutation(file, name, mutant)
            occurrence += 1
    for mutant in without_statements(code):
        yield Mutation(file, "RemoveStatement", mutant)


def meaning(code: str) -> str | None:
    """The syntax tree without annotations and docstrings; None if the code is not Python."""
    try:
        tree = ast.parse(code)
    except SyntaxError:  # cosmic-ray negates an assignment expression without its parentheses
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign):
            node.annotation = ast.Constant(None)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else []:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                statement.value = ast.Constant(None)
    return ast.dump(tree)


def without_statements(code: str) -> Iterator[str]:
    """The code without one of its calls, changes of variables, or deletions."""
    lines = code.splitlines(keepends=True)
    for node in ast.walk(ast.parse(code)):
        is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        if is_call or isinstance(node, ast.AugAssign | ast.Delete | ast.Raise):
            assert isinstance(node, ast.stmt)
            assert node.end_lineno is not None
            indent = lines[node.lineno - 1][: node.col_offset]
            if indent.isspace():
                rest = lines[node.end_lineno :]
                yield "".join([*lines[: node.lineno - 1], f"{indent}pass\n", *rest])


def tests_of(file: Path) -> list[str]:
    """The tests of a file's area: its own first, then by how much of what it defines they name."""
    package, *parts = file.parts
    area = Path("tests", "serving") if parts[0] == "serving" else Path("tests", "core")
    if package == "backends":
        area = Path("tests", parts[0].removeprefix("treeflash_"))
    elif len(parts) > 1 and (ROOT / area / parts[0]).is_dir():
        area /= parts[0]
    code = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    defined = {x.name for x in ast.walk(code) if isinstance(x, ast.ClassDef | ast.FunctionDef)}

    def relevance(path: Path) -> tuple[bool, int]:
        words = set(re.findall(r"\w+", path.read_text(encoding="utf-8")))
        return path.stem.startswith(f"test_{file.stem}"), len(words & defined)

    folders = [area, Path("tests", "engines")] if package == "backends" else [area]
    files = sorted(file for folder in folders for file in (ROOT / folder).rglob("test_*.py"))
    files.sort(key=relevance, reverse=True)
    return [str(path.relative_to(ROOT)) for path in files]


class Copy:
    """A copy of the packages in a temporary folder, which the tests import."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for package in ("treeflash", "backends"):
            shutil.copytree(ROOT / package, folder / package)
        paths = [str(folder), str(folder / "backends"), os.environ.get("PYTHONPATH", "")]
        # To compile everything anew takes longer than most tests that notice a change.
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONDONTWRITEBYTECODE": "",
        }

    def write(self, file: Path, code: str) -> None:
        """Replace a file, and forget what was compiled of it, whatever its time and size are."""
        (self.folder / file).write_text(code, encoding="utf-8")
        Path(cache_from_source(str(self.folder / file))).unlink(missing_ok=True)

    def failure(self, tests: Sequence[str], seconds: float | None = None) -> str | None:
        """What the tests printed if one fails, and a line if they hang; None if all pass."""
        options = "-x", "-q", "-p", "no:cacheprovider"
        # Without `-m pytest`, which would find the source tree in the working directory first.
        command = "import sys, pytest; sys.path.remove(''); sys.exit(pytest.main(sys.argv[1:]))"
        try:
            run = subprocess.run(
                [sys.executable, "-c", command, *options, *tests],
                cwd=ROOT,
                env=self.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=seconds,
                check=False,
                preexec_fn=partial(resource.setrlimit, resource.RLIMIT_AS, (MAX_NBYTES,) * 2),
            )
        except subprocess.TimeoutExpired:
            return f"they took longer than {seconds:.0f} s"
        return run.stdout if run.returncode else None

    def survives(self, mutation: Mutation, tests: Sequence[str], seconds: float) -> bool:
        whole = (self.folder / mutation.file).read_text(encoding="utf-8")
        self.write(mutation.file, mutation.code)
        try:
            return self.failure(tests, seconds) is None
        finally:
            self.write(mutation.file, whole)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if a mutant survived, and 2 if the tests fail on the code as it is."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--sample", type=int, help="number of mutants of each file; all by default")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--tests", nargs="+", help="tests to run; by default the tests of the area")
    options = parser.parse_args(arguments)
    survivors = killed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Copy(Path(folder))
        for path in options.files:
            file = path.resolve().relative_to(ROOT)
            tests = options.tests or tests_of(file)
            started = time.monotonic()
            if (failure := copy.failure(tests)) is not None:
                print(f"{failure}\nthe tests of {file} fail without a mutation; mend them first")
                return 2
            limit = max(FACTOR * (time.monotonic() - started), MIN_SECONDS)
            chosen = list(mutations(file))
            if options.sample is not None and options.sample < len(chosen):
                chosen = random.Random(options.seed).sample(chosen, options.sample)
            for mutation in chosen:
                if copy.survives(mutation, tests, limit):
                    survivors += 1
                    print(f"survived: {file} {mutation.operator}\n{mutation.diff()}\n", flush=True)
                else:
                    killed += 1
                print(f"{killed} killed, {survivors} survived", file=sys.stderr, end="\r")
    print(f"{killed} killed, {survivors} survived")
    return 1 if survivors else 0


if __name__ == "__main__":
    raise SystemExit(main())
