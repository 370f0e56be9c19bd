"""One prompt on the command line: its source, its text, its draft trees and a summary."""

from __future__ import annotations

import io
import json
import math
import os
import stat
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from treeflash.cli.comparison import compare, warm_up
from treeflash.cli.console import INTERRUPTED
from treeflash.config import AUTO
from treeflash.decoding.loop import Step
from treeflash.decoding.tree import DraftTree
from treeflash.errors import PromptError
from treeflash.language_model import LanguageModel
from treeflash.text.generation import Comparison, Generation, TokenLogProb, mean
from treeflash.text.options import Options
from treeflash.text.prompt import read_text
from treeflash.text.stream import Parallel, Stream
from treeflash.text.tokenizer import Tokenizer

STANDARD_INPUT = "-"
BYTE_ORDER_MARK = "\ufeff"
SAMPLE_PROMPT = "Write a short story about a lighthouse keeper who finds a message in a bottle."
SHOWN_NODES = 20
BAR_WIDTH = 40
NOT_EQUAL = 1


def read_prompt(prompt: str | None, file: Path | None, console: Console) -> str:
    """The given prompt, else the file's text, else standard input if piped, else a sample.

    A final newline is dropped. A text that is empty or cannot be read raises a PromptError.
    """
    if prompt is not None and prompt != STANDARD_INPUT:
        if not prompt.strip():
            raise PromptError("the prompt is empty; give some text")
        return prompt
    if file is not None:
        source, text = str(file), read_text(file)
    elif prompt == STANDARD_INPUT or _is_piped(sys.stdin):
        try:
            source, text = (
                "standard input",
                (sys.stdin or io.StringIO()).read().removeprefix(BYTE_ORDER_MARK),
            )
        except UnicodeDecodeError as error:
            raise PromptError(f"standard input is not text: {error.reason}") from error
    else:
        console.print(f"no prompt given; using a sample: {SAMPLE_PROMPT}\n")
        return SAMPLE_PROMPT
    if not text.strip():
        raise PromptError(f"{source} is empty; give a prompt")
    return text.removesuffix("\n")


def _is_piped(stream: TextIO | None) -> bool:
    """Whether a stream is neither a terminal nor the null device."""
    if stream is None or stream.closed:
        return False
    try:
        return not stat.S_ISCHR(os.fstat(stream.fileno()).st_mode)
    except OSError:  # in memory, without a file
        return True


def explain(step: Step, number: int, tokenizer: Tokenizer) -> Tree:
    """Draw the tree of one iteration, if large only its most probable nodes and accepted path."""
    tree, path = step.tree, step.path
    assert tree is not None
    assert path is not None
    accepted = set(path.tolist())
    # A parent is at least as probable as its children and precedes them: these nodes are a tree.
    likeliest = (-tree.log_probs).argsort(kind="stable")[:SHOWN_NODES].tolist()
    nodes = sorted(accepted | set(likeliest))
    parents = tree.parents.tolist()
    title = f"iteration {number}: {_count(len(tree), 'node')}, {len(path) - 1} accepted + bonus"
    if hidden := len(tree) - len(nodes):
        title += f" ({_count(hidden, 'less probable node')} not shown)"
    drawing = Tree(Text(title, style="bold"))
    branches: dict[int, Tree] = {-1: drawing}
    for node in nodes:
        label = _label(tokenizer, int(tree.tokens[node]), node in accepted)
        label.append(f"  {_probability(tree, node)}" if node else "  root", style="dim")
        branches[node] = branches[parents[node]].add(label)
    bonus = Text("(the text ended on this path)", style="dim")
    if len(step.tokens) == len(path):
        bonus = _label(tokenizer, step.tokens[-1], True)
        bonus.append("  bonus: the target's own choice", style="dim")
    branches[int(path[-1])].add(bonus)
    return drawing


def _label(tokenizer: Tokenizer, token: int, accepted: bool) -> Text:
    text = Text("✓ " if accepted else "  ", style="bold green" if accepted else "")
    return text.append(repr(tokenizer.token_text(token)))


def _probability(tree: DraftTree, node: int) -> str:
    """The drafter's probability of the path to a node and, after depth 1, of its last token."""
    path = tree.log_probs[node]
    text = f"{math.exp(path):.1%}"
    if tree.depths[node] > 1:
        text += f" ({math.exp(path - tree.log_probs[tree.parents[node]]):.1%} after its parent)"
    return text


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def summarise(generation: Generation) -> str:
    """Tokens, speed, block efficiency, accepted lengths and time by phase, in several lines."""
    forwards = len(generation.accepted_lengths)
    lines = [
        f"{len(generation.token_ids)} tokens after a prompt of {generation.prompt_tokens}, "
        f"{generation.tokens_per_s:.1f} tokens/s, "
        f"block efficiency {generation.block_efficiency:.2f} "
        f"({forwards} target forward{'s'[: forwards != 1]} after the prefill)",
        f"method {generation.method}, budget {generation.budget}, backend {generation.backend} on "
        f"{generation.device}, {generation.dtype}, seed {generation.seed}, "
        f"{generation.inexact or 'exact'}, "
        f"finish reason: {generation.finish_reason}",
        *_histogram(generation.histogram),
        "time: "
        + ", ".join(f"{phase} {seconds:.3f} s" for phase, seconds in generation.seconds.items()),
    ]
    if comparison := generation.compare:
        speedup = "unknown" if comparison.speedup is None else f"{comparison.speedup:.2f}x"
        verdict = _verdict(comparison, generation.dtype)
        lines += [
            f"compared with plain decoding: {verdict}, speedup {speedup}",
            "  (same loaded model, prompt and seed; tokens/s of the iterations, without the "
            "prefill; both after a short warm-up)",
        ]
    return "\n".join(lines)


def _histogram(histogram: dict[int, int]) -> list[str]:
    """One line per accepted length, with its number of iterations."""
    longest = max(histogram.values(), default=0)
    lines = [
        f"{length:>15}: {'█' * max(1, round(BAR_WIDTH * count / longest))} {count}"
        for length, count in histogram.items()
    ]
    return ["accepted length: iterations", *lines] if lines else []


def _verdict(comparison: Comparison, dtype: str) -> str:
    if comparison.equal:
        return "equal"
    differ = f"the texts differ from new token {comparison.first_difference} on"
    if comparison.margin is None:
        return f"NOT EQUAL: {differ}"
    margin = (
        f"the margin between the best two logits there is {comparison.margin:.3g}, "
        f"the spacing of {dtype} {comparison.spacing:.3g}"
    )
    if comparison.near_tie:
        return f"{differ}, at a near-tie: {margin}"
    advice = "" if dtype == "float32" else "; check with --dtype float32"
    return f"NOT EQUAL: {differ}; {margin}{advice}"


def run_text(
    stream: Stream,
    names: Mapping[str, str | None],
    console: Console,
    *,
    as_json: bool,
    compared: bool,
    explained: int,
) -> int:
    """Decode a text that is not started, print it, and return the exit status.

    `names` are the names of the target and of the drafter. `compared` asks for a comparison with
    decoding without drafting; `explained` is the number of iterations whose trees are drawn.
    """
    if compared:
        warm_up(stream)
    printed = 0
    try:
        for chunk in stream:
            if not as_json:
                print(chunk.text, end="", flush=True)
                printed += len(chunk.text)
    except KeyboardInterrupt:
        pass  # the generation has the text so far and the finish reason `interrupted`
    except Exception:
        if printed:
            print(flush=True)  # the error gets a line of its own
        raise
    generation = stream.generation()
    if not as_json:
        print(generation.text[printed:], flush=True)
    for number, step in enumerate(stream.steps[1 : explained + 1], 1):
        console.print(explain(step, number, stream.assembler.tokenizer))
    code = INTERRUPTED if generation.finish_reason == "interrupted" else 0
    if compared and code == 0:
        try:
            generation = replace(generation, compare=compare(generation, stream))
        except KeyboardInterrupt:
            console.print("interrupted while decoding without drafting; not compared")
            code = INTERRUPTED
    if as_json:
        print(json.dumps({**names, **generation.to_dict()}))
    elif generation.log_probs is not None:
        console.print(
            list_log_probs(generation.log_probs, stream.assembler.tokenizer), markup=False
        )
    console.print(summarise(generation), markup=False)
    if generation.compare is not None and not generation.compare.explained:
        code = NOT_EQUAL
    return code


def list_log_probs(log_probs: Sequence[TokenLogProb], tokenizer: Tokenizer) -> str:
    """One line per token: its log probability, itself, and the most probable tokens."""
    lines = []
    for token in log_probs:
        top = (f"{tokenizer.token_text(i)!r} {log_prob:.3f}" for i, log_prob in token.top)
        best = f"  ({', '.join(top)})" if token.top else ""
        lines.append(f"{token.log_prob:>9.3f}  {tokenizer.token_text(token.token_id)!r}{best}")
    return "\n".join(lines)


def run_answers(
    model: LanguageModel,
    prompt: str,
    options: Options,
    n: int,
    console: Console,
    *,
    parallel: Parallel | None,
    as_json: bool,
) -> int:
    """Decode and print several answers to a prompt, and return the exit status."""
    many = model.generate_many([prompt], n=n, parallel=parallel or AUTO, **options)
    answers = sorted((generation for _, generation in many), key=lambda answer: answer.seed)
    for number, answer in enumerate(answers, 1):
        if as_json:
            print(json.dumps({**model.names, **answer.to_dict()}))
            continue
        console.print(f"answer {number} of {n}, seed {answer.seed}:", style="bold")
        print(answer.text, flush=True)
        if answer.log_probs is not None:
            console.print(list_log_probs(answer.log_probs, model.tokenizer), markup=False)
    tokens = sum(len(answer.token_ids) for answer in answers)
    lengths = [length for answer in answers for length in answer.accepted_lengths]
    console.print(f"{n} answers, {tokens} tokens, block efficiency {mean(lengths):.2f}")
    return 0
