"""Batches of prompts: read from one file, answered into another, resumable at any moment."""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from treeflash.cli.console import EXIT_BAD_INPUT, progress
from treeflash.config import AUTO, Parallel
from treeflash.decoding.suffix import SuffixCache
from treeflash.errors import ConfigError, PromptError, TreeflashError, is_out_of_memory
from treeflash.hub.published import DEFAULT_TARGET, model_name
from treeflash.interruption import EXIT_INTERRUPTED
from treeflash.language_model import LanguageModel
from treeflash.text.generation import mean
from treeflash.text.options import GRAMMAR_OPTIONS, Options, parse_options
from treeflash.text.output_file import OutputFile, Record, has_fields
from treeflash.text.prompt import (
    Message,
    Row,
    TurnKey,
    find_images,
    images_of,
    read_rows,
)
from treeflash.text.stream import Assembler, BatchStream


def run_batch(
    args: argparse.Namespace,
    options: Options,
    load: Callable[[], LanguageModel],
    console: Console,
    suffix_cache: SuffixCache | None,
) -> int:
    """Decode the file `--prompts` into `--output`, and return the exit status.

    The model is loaded once both files are known to be usable and a turn is missing. With a
    `suffix_cache`, answers may copy earlier ones.
    """
    prompts, output = args.prompts, args.output
    rows = read_rows(prompts, images=True)
    if output.exists() and output.samefile(prompts):
        raise ConfigError("--output is the file of prompts; give another one")
    with OutputFile(output, _is_turn) as file:
        batch = PromptBatch(rows, file, prompts.parent)
        batch.check(options)
        if not batch.is_finished(options, args):
            model = load()
            try:
                batch.run(model, options, args.parallel or AUTO, console, suffix_cache)
            except KeyboardInterrupt:
                report = batch.report()
                resume = "run the same command again to resume"
                console.print(f"interrupted; {report}; {resume}")
                return EXIT_INTERRUPTED
    console.print(batch.report())
    return EXIT_BAD_INPUT if batch.errors else 0


def _is_turn(record: Record) -> bool:
    return has_fields(record, id=str | int, turn=int, prompt_digest=str) and (
        "error" in record or has_fields(record, text=str, accepted_lengths=list)
    )


class Turn(NamedTuple):
    """A turn to decode: the key and the settings of its record, and the conversation before it."""

    key: TurnKey
    prompt: str | Sequence[Message]
    settings: Record


@dataclass
class PromptBatch:
    """Conversations to decode, and the file of the turns that are decoded.

    The `output` has records of `id`, `turn` and the generation, or the `error` that prevented it.
    `folder` is where images are that the rows name. `tokens` and `seconds` count this run.
    """

    rows: Sequence[Row]
    output: OutputFile
    folder: Path
    tokens: int = 0
    seconds: float = 0.0

    def check(self, options: Options, **settings: Any) -> None:
        """Raise a ConfigError if the output has turns of other settings, or a row has no text.

        `settings` are more of them, which are known only after loading.
        """
        settings = _settings(options) | settings
        for record in self.output.records.values():
            if "error" not in record:
                self.output.check_settings(record, settings)
        for row in self.rows if options.get("raw") else ():
            if len(row.turns) > 1 or len(row.turns[0]) > 1 or images_of(row.turns[0][0]):
                raise ConfigError(
                    f"the row {row.id!r} has several messages or images, which need the chat "
                    "template; leave out --raw"
                )

    def is_finished(self, options: Options, args: argparse.Namespace) -> bool:
        """Return whether the output has every turn, from the chosen models, backend and dtype."""
        if not all(is_from_chosen(record, args) for record in self._records()):
            return False
        turns = (
            turn for row in self.rows for turn in self._converse(row, options, {}, lambda: None)
        )
        return next(turns, None) is None

    def run(
        self,
        model: LanguageModel,
        options: Options,
        parallel: Parallel,
        console: Console,
        suffix_cache: SuffixCache | None = None,
    ) -> None:
        """Decode the missing turns, with a progress bar; each is on disk as soon as it is done.

        Several conversations are decoded at once, each turn by turn. A turn that cannot be decoded
        is recorded as an error, and ends its conversation; the next run tries it again. If the run
        is interrupted, the unfinished texts are recorded as interrupted. A ConfigError is raised if
        the output holds turns of other settings or prompts, a row needs the chat template, or
        `parallel` is below 1.
        """
        config = model.configure(options)
        settings = {**provenance(model), "method": config.decode.method} | _settings(options)
        self.check(options, **settings)
        settings["drafter"] = model.names["drafter"]
        stream = model.batch_stream(parallel, config.decode, suffix_cache)

        def make_assembler(prompt: str | Sequence[Message]) -> Assembler:
            if not isinstance(prompt, str):
                prompt = find_images(prompt, self.folder)
            return model.assembler(prompt, config)

        self.output.resume()
        with progress(console) as bar:
            task = bar.add_task("turns", total=len(self._keys))
            advance = partial(bar.advance, task)
            conversations = (self._converse(row, options, settings, advance) for row in self.rows)
            started = time.perf_counter()
            try:
                self._decode(conversations, stream, make_assembler)
            finally:
                self.seconds = time.perf_counter() - started

    def report(self) -> str:
        """Format the numbers of turns decoded and failed, block efficiency, speed and an error."""
        records = self._records()
        failed = [record for record in records if "error" in record]
        lengths = [n for record in records for n in record.get("accepted_lengths", ())]
        parts = [
            f"{len(records) - len(failed)} of {len(self._keys)} turns decoded",
            f"{len(failed)} with errors",
            *([f"block efficiency {mean(lengths):.2f}"] if lengths else []),
            *([f"{self.tokens / self.seconds:.1f} tokens/s"] if self.tokens else []),
        ]
        first = "; first error, id {id!r}: {error}".format(**failed[0]) if failed else ""
        return f"{self.output.path}: {', '.join(parts)}{first}"

    @property
    def _keys(self) -> list[TurnKey]:
        return [key for row in self.rows for key in row.keys]

    @property
    def errors(self) -> int:
        """The number of turns that could not be decoded."""
        return sum("error" in record for record in self._records())

    def _records(self) -> list[Record]:
        return self.output.select(self._keys)

    def _converse(
        self, row: Row, options: Options, settings: Record, advance: Callable[[], None]
    ) -> Iterator[Turn]:
        """Yield a row's missing turns; each is written before the next is asked for."""
        records, messages = self.output.records, list[Message]()
        for number, new_messages in enumerate(row.turns):
            messages += new_messages
            prompt = new_messages[0]["content"] if options.get("raw") else messages
            digest = hashlib.sha256(json.dumps(prompt).encode()).hexdigest()[:16]
            key = row.id, number
            if key not in records or "error" in records[key]:
                first = new_messages[0]["content"]
                asked = {
                    "prompt_digest": digest,
                    "prompt": new_messages if len(new_messages) > 1 else first,
                }
                yield Turn(key, prompt, settings | asked)
            elif records[key]["prompt_digest"] != digest:
                raise ConfigError(
                    f"{self.output.path} has an answer to another prompt with the id {row.id!r}; "
                    "give another --output, or give the changed row another id"
                )
            advance()
            if "error" in records[key]:
                return
            messages.append({"role": "assistant", "content": records[key]["text"]})

    def _decode(
        self,
        conversations: Iterator[Iterator[Turn]],
        stream: BatchStream,
        make_assembler: Callable[[str | Sequence[Message]], Assembler],
    ) -> None:
        """Decode the turns of several conversations at once, in the order of the rows."""
        running: dict[Assembler, tuple[Turn, Iterator[Turn]]] = {}

        def submit_next_turn(conversation: Iterator[Turn]) -> None:
            """Submit the conversation's next turn that can be decoded, if there is one."""
            for turn in conversation:
                try:
                    assembler = make_assembler(turn.prompt)
                    stream.submit([assembler])
                except PromptError as error:
                    self._record(turn, {"error": str(error)})
                else:
                    running[assembler] = turn, conversation
                    return

        try:
            while True:
                while stream.has_room and (conversation := next(conversations, None)):
                    submit_next_turn(conversation)
                if not stream.busy:
                    return
                for assembler, error in stream.step():
                    turn, conversation = running[assembler]
                    self._record(turn, _outcome(assembler, error))
                    del running[assembler]
                    submit_next_turn(conversation)
        except KeyboardInterrupt:
            # Interrupted turns come last: only there does the next run drop them.
            for assembler in sorted(running, key=lambda x: x.finish_reason is None):
                if assembler.chunks:
                    self._record(running[assembler][0], assembler.generation().to_dict())
            raise
        finally:
            stream.close()

    def _record(self, turn: Turn, outcome: Record) -> None:
        """Append a turn to the output, unless it is an error that is already there."""
        self.tokens += len(outcome.get("token_ids", ()))
        record = Record(id=turn.key[0], turn=turn.key[1]) | outcome | turn.settings
        if record != self.output.records.get(turn.key):
            self.output.append(record)


def _outcome(assembler: Assembler, error: Exception | None) -> Record:
    """Return the part of a turn's record that describes its text, or the error that ended it."""
    if error is None:
        return assembler.generation().to_dict()
    if isinstance(error, TreeflashError) or is_out_of_memory(error):
        return {"error": str(error)}
    raise error


def _settings(options: Options) -> Record:
    """List what determines a text besides its prompt, as far as the options say."""
    text = parse_options(options)
    config = text.decode
    penalties = asdict(config.penalties)
    biases = [list(pair) for pair in penalties.pop("logit_bias")]
    return {
        **({"method": config.method} if "method" in options else {}),
        **{name: getattr(config, name) for name in ("budget", "max_tokens")},
        **asdict(config.sampling),
        **{f"{name}_penalty": value for name, value in penalties.items()},
        "logit_bias": biases,
        **{name: getattr(text, name) for name in GRAMMAR_OPTIONS},
        "stop": list(text.stop_strings),
        **{name: getattr(text, name) for name in ("system", "raw", "template_args")},
    }


NUMBER_OPTIONS = "bits", "kv_bits", "exact"
"""Options of a load that change the numbers of a model, beside its dtype."""


def is_from_chosen(record: Record, args: argparse.Namespace) -> bool:
    """Return whether a record is from the models that were chosen, the backend and the dtype."""
    name = model_name(Path(args.target or DEFAULT_TARGET)).rpartition("/")[2].lower()
    adapter = getattr(args, "adapter", None)
    # The backend `cuda` has the name `cpu` on a CPU.
    backend = "cpu" if (args.backend, args.device) == ("cuda", "cpu") else args.backend
    chosen = {"adapter": adapter and Path(adapter).name}
    chosen |= {k: x for k, x in (("backend", backend), ("dtype", args.dtype)) if x is not None}
    target = str(record.get("target")).rpartition("/")[2].lower()
    numbers = {k: getattr(args, k, None) for k in NUMBER_OPTIONS}  # earlier records have none
    return (
        target == name
        and all(record.get(key) == value for key, value in chosen.items())
        and all(record.get(key, value) == value for key, value in numbers.items())
    )


def provenance(model: LanguageModel) -> Record:
    """Describe what determines a loaded model's texts, for the records of an output file."""
    return {
        "target": model.names["target"],
        "backend": model.backend.name,
        "dtype": model.backend.dtype,
        "adapter": model.loaded.adapter and Path(model.loaded.adapter).name,
        **{name: getattr(model.loaded, name) for name in NUMBER_OPTIONS},
    }
