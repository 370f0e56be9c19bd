"""One prompt on the command line: source, text, draft trees, comparison with plain decoding."""

from __future__ import annotations

import io
import json
import math
import os
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import TextIO

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from treeflash.cli.console import LONG_PROMPT, progress, reading
from treeflash.config import AUTO, SEEDS, Parallel, SamplingConfig
from treeflash.decoding import interfaces
from treeflash.decoding.loop import Step
from treeflash.decoding.sampling import noisy_logits, position_keys
from treeflash.decoding.tree import DraftTree
from treeflash.errors import PromptError
from treeflash.interruption import EXIT_INTERRUPTED
from treeflash.language_model import LanguageModel
from treeflash.text.generation import Comparison, Generation, TokenLogProb, mean
from treeflash.text.input_file import read_text
from treeflash.text.options import Options
from treeflash.text.prompt import Prompt
from treeflash.text.stream import Chunk, Stream
from treeflash.text.tokenizer import Tokenizer

WARM_UP_TOKENS = 8
WARM_UP_PROMPT = 32
WARM_UP_BUDGET = 16
NEAR_TIE = 2.0
"""Largest margin that rounding explains, in spacings of the model's dtype: each of the two passes
may be off by one. The margins of 16 differences with SmolLM2-135M in bfloat16, greedy and sampled,
were at most 1.3."""
MANTISSA_BITS = {"float32": 23, "bfloat16": 7, "float16": 10}


def warm_up(stream: Stream) -> None:
    """Prepare the backend, and run a stream's method and plain decoding briefly.

    Both are then measured warm. The end of the prompt is enough, without images. A fixed budget
    replaces `auto`, which would learn from these runs.
    """
    interfaces.warm_up(stream.assembler.backend, 1)
    images = stream.assembler.images
    last_text = 0 if images is None else images.images[-1].end
    prompt_ids = stream.assembler.prompt_ids[last_text:][-WARM_UP_PROMPT:]
    config = replace(stream.assembler.config, max_tokens=WARM_UP_TOKENS, stop_token_ids=frozenset())
    if config.budget == AUTO:
        config = replace(config, budget=WARM_UP_BUDGET)
    for method in {config.method, "ar"}:
        stream.restart(replace(config, method=method), prompt_ids).run()


def compare(generation: Generation, stream: Stream) -> Comparison:
    """Decode the prompt of a finished stream without drafting, and compare the results."""
    plain = stream.restart(replace(stream.assembler.config, method="ar")).run()
    speedup = None
    if generation.tokens_per_s and plain.tokens_per_s:
        speedup = generation.tokens_per_s / plain.tokens_per_s
    pairs = list(zip_longest(generation.token_ids, plain.token_ids))
    first = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
    comparison = Comparison(equal=first is None, first_difference=first, speedup=speedup)
    if first is None or None in pairs[first]:
        return comparison
    logits = stream.next_logits(plain.token_ids[:first])
    sampling = stream.assembler.config.sampling
    margin = decision_margin(
        logits, pairs[first], sampling, len(stream.assembler.prompt_ids) + first
    )
    rounding = spacing(float(np.abs(logits[list(pairs[first])]).max()), generation.dtype)
    rounds = generation.dtype != "float32" and generation.inexact is not None
    near_tie = rounds and margin <= NEAR_TIE * rounding
    return replace(comparison, margin=margin, spacing=rounding, near_tie=near_tie)


def decision_margin(
    logits: NDArray[np.float32], tokens: Sequence[int], sampling: SamplingConfig, position: int
) -> float:
    """Return how far (vocab,) raw logits would have to move for each token to be sampled.

    It is the distance of a token's logit from the largest, with the noise of sampling at an
    absolute position. For a token that the filters dropped, it is the distance of its logit from
    the smallest kept logit.
    """
    if sampling.greedy:
        return float(logits.max() - logits[list(tokens)].min())
    keys = position_keys(sampling.seed, np.array([position], np.int32))
    noisy = noisy_logits(logits[None], sampling, keys)[0]
    smallest_kept = logits[np.isfinite(noisy)].min()
    margins = np.where(np.isfinite(noisy), noisy.max() - noisy, smallest_kept - logits)
    return float(margins[list(tokens)].max())


def spacing(value: float, dtype: str) -> float:
    """Return the distance between neighbouring numbers of a dtype around a value."""
    _, exponent = math.frexp(value)
    return math.ldexp(1.0, exponent - 1 - MANTISSA_BITS[dtype])


STANDARD_INPUT = "-"
BYTE_ORDER_MARK = "\ufeff"
IMAGE_PROMPT = "What does the image show?"
SAMPLE_PROMPT = "Write a short story about a lighthouse keeper who finds a message in a bottle."
SHOWN_NODES = 20
BAR_WIDTH = 40
NOT_EQUAL = 1


def read_prompt(prompt: str | None, file: Path | None, console: Console, sample: str) -> str:
    """Read the given prompt, else the file's text, else standard input if piped, else a sample.

    A final newline is dropped. A text that is empty or cannot be read raises a PromptError.
    """
    if prompt is not None and prompt != STANDARD_INPUT:
        if not prompt.strip():
            raise PromptError("the prompt is empty; give some text")
        return prompt
    source = "standard input" if file is None else str(file)
    if file is not None:
        text = read_text(file)
    elif prompt == STANDARD_INPUT or _is_piped(sys.stdin):
        try:
            text = (sys.stdin or io.StringIO()).read().removeprefix(BYTE_ORDER_MARK)
        except UnicodeDecodeError as error:
            raise PromptError(f"standard input is not text: {error.reason}") from error
    else:
        console.print(f"no prompt given; using a sample: {sample}\n")
        return sample
    if not text.strip():
        raise PromptError(f"{source} is empty; give a prompt")
    return text.removesuffix("\n")


def _is_piped(stream: TextIO | None) -> bool:
    """Return whether a stream is neither a terminal nor the null device."""
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
        label.append(
            f"  {_probability(tree, node)}" if node else "  root: the last token so far",
            style="dim",
        )
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
    """Return the drafter's probability of a node's path and, after depth 1, of its token."""
    path = tree.log_probs[node]
    text = f"{math.exp(path):.1%}"
    if tree.depths[node] > 1:
        text += f" ({math.exp(path - tree.log_probs[tree.parents[node]]):.1%} after its parent)"
    return text


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def summarise(generation: Generation, width: int = 80) -> str:
    """Summarise tokens, speed, block efficiency, accepted lengths and time by phase.

    Bars fit into `width` columns.
    """
    lines = [
        f"{len(generation.token_ids)} tokens after a prompt of {generation.prompt_tokens}, "
        f"{generation.tokens_per_s:.1f} tokens/s, "
        f"block efficiency {generation.block_efficiency:.2f} "
        f"({_count(len(generation.accepted_lengths), 'target forward')} after the prefill)",
        f"method {generation.method}, budget {generation.budget}, backend {generation.backend} on "
        f"{generation.device}, {generation.dtype}, seed {generation.seed}, "
        f"{generation.inexact or 'exact'}, "
        f"finish reason: {generation.finish_reason}",
        *_pauses(generation),
        *_histogram(generation.histogram, width),
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


def _pauses(generation: Generation) -> list[str]:
    """One line if drafting was paused."""
    if not generation.paused_iterations:
        return []
    iterations = _count(len(generation.accepted_lengths), "iteration")
    return [
        f"drafting was paused in {generation.paused_iterations} of {iterations}: drafts cost more "
        "than they gained"
    ]


def _histogram(histogram: dict[int, int], width: int) -> list[str]:
    """Format a line per accepted length, with its number of iterations."""
    longest = max(histogram.values(), default=0)
    bar = min(BAR_WIDTH, width - len(f"{'':>15}:  {longest}"))
    lines = [
        f"{length:>15}: {'█' * max(1, round(bar * count / longest))} {count}"
        for length, count in histogram.items()
    ]
    return ["tokens gained per forward pass, and how often", *lines] if lines else []


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
        for chunk in _chunks(stream, console):
            if not as_json:
                print(chunk.text, end="", flush=True)
                printed += len(chunk.text)
    except KeyboardInterrupt:
        pass  # the generation has the text so far and the finish reason `interrupted`
    except Exception:
        if printed:
            print(flush=True)  # the error begins on a new line
        raise
    generation = stream.generation()
    if not as_json:
        print(generation.text[printed:], flush=True)
    for number, step in enumerate(stream.steps[1 : explained + 1], 1):
        console.print(explain(step, number, stream.assembler.tokenizer))
    code = EXIT_INTERRUPTED if generation.finish_reason == "interrupted" else 0
    if compared and code == 0:
        try:
            generation = replace(generation, compare=compare(generation, stream))
        except KeyboardInterrupt:
            console.print("interrupted while decoding without drafting; not compared")
            code = EXIT_INTERRUPTED
    if as_json:
        print(json.dumps({**names, **generation.to_dict()}))
    elif generation.log_probs is not None:
        console.print(list_log_probs(generation.log_probs, stream.assembler.tokenizer))
    console.print(summarise(generation, console.width))
    if captures := interfaces.count_captures(stream.assembler.backend):
        console.print(
            f"{_count(captures, 'graph')} captured or compiled, in the times above or before"
        )
    if generation.compare is not None and not generation.compare.explained:
        code = NOT_EQUAL
    return code


def _chunks(stream: Stream, console: Console) -> Iterator[Chunk]:
    """Yield the chunks of a stream; a terminal shows how much of a long prompt has run."""
    total = len(stream.assembler.prompt_ids)
    if total > LONG_PROMPT:
        with console.status(reading(0, total)) as status:
            stream.on_progress = lambda progress: status.update(reading(progress.done, total))
            first = next(stream)
        yield first
    yield from stream


def list_log_probs(log_probs: Sequence[TokenLogProb], tokenizer: Tokenizer) -> str:
    """Format a line per token: its log probability, itself, and the most probable tokens."""
    lines = []
    for token in log_probs:
        top = (f"{tokenizer.token_text(i)!r} {log_prob:.3f}" for i, log_prob in token.top)
        best = f"  ({', '.join(top)})" if token.top else ""
        lines.append(f"{token.log_prob:>9.3f}  {tokenizer.token_text(token.token_id)!r}{best}")
    return "\n".join(lines)


def run_answers(
    model: LanguageModel,
    prompt: Prompt,
    options: Options,
    n: int,
    console: Console,
    *,
    parallel: Parallel | None,
    as_json: bool,
) -> int:
    """Decode several answers to a prompt, print them by seed, and return the exit status.

    Answers that ended before an interruption or an error are printed too.
    """
    answers: list[Generation] = []
    code = 0
    try:
        found = model.generate_many([prompt], n=n, parallel=parallel or AUTO, **options)
        with progress(console) as bar:
            for _, answer in bar.track(found, total=n, description="answers"):
                answers.append(answer)
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    finally:
        first = options.get("seed", 0)
        answers.sort(key=lambda answer: (answer.seed - first) % SEEDS)
        for answer in answers:
            if as_json:
                print(json.dumps({**model.names, **answer.to_dict()}))
                continue
            number = (answer.seed - first) % SEEDS + 1  # seeds begin again at 0 after the largest
            console.print(f"answer {number} of {n}, seed {answer.seed}:", style="bold")
            print(answer.text, flush=True)
            if answer.log_probs is not None:
                console.print(list_log_probs(answer.log_probs, model.tokenizer))
    tokens = sum(len(answer.token_ids) for answer in answers)
    lengths = [length for answer in answers for length in answer.accepted_lengths]
    interrupted = f"interrupted; {n - len(answers)} did not end; " if code else ""
    console.print(
        f"{interrupted}{_count(len(answers), 'answer')}, {tokens} tokens, "
        f"block efficiency {mean(lengths):.2f}"
    )
    return code
