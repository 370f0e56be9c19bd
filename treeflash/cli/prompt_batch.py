"""Batches of prompts: read from one file, answered into another, resumable at any moment."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console

from treeflash.cli.exit_status import BAD_INPUT, INTERRUPTED
from treeflash.cli.progress import progress
from treeflash.decoding.statistics import mean
from treeflash.errors import ConfigError, PromptError, TreeflashError, is_out_of_memory
from treeflash.language_model import LanguageModel
from treeflash.text.assembler import Assembler
from treeflash.text.many_texts import ManyTexts, Parallel
from treeflash.text.options import Options
from treeflash.text.output_file import OutputFile, finished_records, locked
from treeflash.text.prompt import Message, Prompt
from treeflash.text.prompt_file import Key, Row, read_rows

Record: TypeAlias = dict[str, Any]
LINE_START = b'{"id": '
INTERRUPTED_TURN = "interrupted"
"""The finish reason of a turn that the next run decodes again."""


@dataclass(frozen=True, eq=False)
class Turn:
    """A turn to decode.

    Attributes:
        key: of its record.
        prompt: the conversation up to its answer.
        settings: of the record.
    """

    key: Key
    prompt: Prompt
    settings: Record


@dataclass
class Batch:
    """A file of prompts, and the turns that its output file already has.

    Attributes:
        rows: what to decode.
        output: JSON lines of `id`, `turn` and the generation, or the `error` that prevented it;
            if a turn has two, the later counts.
        records: finished turns.
        output_bytes: size of `output` up to the end of the last finished turn.
    """

    rows: Sequence[Row]
    output: Path
    records: dict[Key, Record] = field(default_factory=dict)
    output_bytes: int = 0

    @classmethod
    def resume(cls, rows: Sequence[Row], output: Path) -> Batch:
        """Resume from what an earlier run left in `output`, which need not exist yet.

        A last line that an interruption tore, and last lines that hold interrupted turns, do not
        count: those turns are decoded again.

        Raises:
            ConfigError: the file cannot be written, or another program wrote it.
        """
        found = finished_records(output, LINE_START, _checked)
        while found and found[-1][0].get("finish_reason") == INTERRUPTED_TURN:
            found.pop()
        records = {(record["id"], record["turn"]): record for record, _ in found}
        return cls(rows, output, records, sum(size for _, size in found))

    def run(
        self, model: LanguageModel, options: Options, parallel: Parallel, console: Console
    ) -> None:
        """Decode the missing turns, with a progress bar; each is on disk as soon as it is done.

        Several conversations are decoded at once, each turn by turn. A turn that cannot be decoded
        is recorded as an error, and ends its conversation; the next run tries it again. If the run
        is interrupted, the texts so far of unfinished turns are recorded as interrupted.

        Raises:
            ConfigError: the output holds turns of other settings or prompts, a row needs the
                chat template, or `parallel` is below 1.
        """
        settings = _settings(model, options)
        self._check(settings, raw=bool(options.get("raw")))
        texts = model.many_texts(parallel, model.decode_config(options))
        with OutputFile(self.output, self.output_bytes) as file, progress(console) as bar:
            task = bar.add_task("turns", total=sum(len(row.turns) for row in self.rows))
            advance = partial(bar.advance, task)
            conversations = (self._converse(row, options, settings, advance) for row in self.rows)
            self._decode(conversations, texts, partial(model.assembler, options=options), file)

    def report(self) -> str:
        """One line: the numbers of turns decoded and failed, and the block efficiency."""
        records, errors = self._found(), self.errors
        wanted = sum(len(row.turns) for row in self.rows)
        lengths = [n for record in records for n in record.get("accepted_lengths", ())]
        return (
            f"{self.output}: {len(records) - errors} of {wanted} turns decoded, "
            f"{errors} with errors, block efficiency {mean(lengths):.2f}"
        )

    @property
    def errors(self) -> int:
        """The number of turns that could not be decoded."""
        return sum("error" in record for record in self._found())

    def _found(self) -> list[Record]:
        """Records of the turns of `rows`; the output may have others."""
        wanted = ((row.id, turn) for row in self.rows for turn in range(len(row.turns)))
        return [self.records[key] for key in wanted if key in self.records]

    def _check(self, settings: Record, raw: bool) -> None:
        # Turns decoded with different settings do not belong in one file.
        for record in self.records.values():
            if "error" in record:
                continue
            for name, value in settings.items():
                if record.get(name, value) != value:
                    raise ConfigError(
                        f"{self.output} has turns decoded with {name} {record[name]}, not {value}; "
                        "use the same settings, or another --output"
                    )
        if raw:
            for row in self.rows:
                if len(row.turns) > 1 or len(row.turns[0]) > 1:
                    raise ConfigError(
                        f"the row {row.id!r} has several messages, which need the chat template; "
                        "leave out --raw"
                    )

    def _converse(
        self, row: Row, options: Options, settings: Record, advance: Callable[[], None]
    ) -> Iterator[Turn]:
        """The turns of a row that are missing; each must be in `records` before the next."""
        messages: list[Message] = []
        for number, new in enumerate(row.turns):
            messages += new
            prompt: Prompt = new[0]["content"] if options.get("raw") else messages
            digest = hashlib.sha256(json.dumps(prompt).encode()).hexdigest()[:16]
            key = row.id, number
            found = self.records.get(key)
            if found is None or "error" in found:
                yield Turn(key, prompt, settings | {"prompt_digest": digest})
            elif found["prompt_digest"] != digest:
                raise ConfigError(
                    f"{self.output} has an answer to another prompt with the id {row.id!r}; use "
                    "another --output, or give the changed row another id"
                )
            advance()
            if "error" in self.records[key]:
                return
            messages.append({"role": "assistant", "content": self.records[key]["text"]})

    def _decode(
        self,
        conversations: Iterator[Iterator[Turn]],
        texts: ManyTexts,
        assembler: Callable[[Prompt], Assembler],
        file: OutputFile,
    ) -> None:
        """Decode all turns, those of several conversations at once, in the order of the rows."""
        running: dict[Assembler, tuple[Turn, Iterator[Turn]]] = {}

        def resume(conversation: Iterator[Turn]) -> None:
            """Submit the conversation's next turn that can be decoded, if there is one."""
            for turn in conversation:
                try:
                    text = assembler(turn.prompt)
                    texts.submit([text])
                except PromptError as error:
                    self._record(turn, {"error": str(error)}, file)
                else:
                    running[text] = turn, conversation
                    return

        try:
            while True:
                while texts.has_room and (conversation := next(conversations, None)):
                    resume(conversation)
                if not texts.busy:
                    return
                for text, error in texts.step():
                    turn, conversation = running[text]
                    self._record(turn, _outcome(text, error), file)
                    del running[text]
                    resume(conversation)
        except KeyboardInterrupt:
            # Interrupted turns come last: only there does the next run drop them.
            for text in sorted(running, key=lambda text: text.finish_reason is None):
                if text.chunks:
                    self._record(running[text][0], text.generation().to_dict(), file)
            raise
        finally:
            texts.close()

    def _record(self, turn: Turn, outcome: Record, file: OutputFile) -> None:
        """Append a turn to the output, unless it is an error that is already there."""
        record = Record(id=turn.key[0], turn=turn.key[1]) | outcome | turn.settings
        if record != self.records.get(turn.key):
            file.append(json.dumps(record, ensure_ascii=False))
        if record.get("finish_reason") != INTERRUPTED_TURN:
            self.records[turn.key] = record


def run_batch(
    prompts: Path,
    output: Path,
    options: Options,
    parallel: Parallel,
    load: Callable[[], LanguageModel],
    console: Console,
) -> int:
    """Decode a file of prompts into another, and return the exit status.

    Args:
        prompts: see `treeflash.text.prompt_file.read_rows`.
        output: see `Batch`.
        options: how to decode.
        parallel: how many conversations to decode at once.
        load: gives the model, once both files are known to be usable.
        console: for the progress bar and the report.
    """
    rows = read_rows(prompts)
    if output.exists() and output.samefile(prompts):
        raise ConfigError("--output is the file of prompts; give another one")
    with locked(output):
        batch = Batch.resume(rows, output)
        model = load()
        try:
            batch.run(model, options, parallel, console)
        except KeyboardInterrupt:
            console.print(f"interrupted; {batch.report()}; run the same command again to resume")
            return INTERRUPTED
    console.print(batch.report())
    return BAD_INPUT if batch.errors else 0


def _settings(model: LanguageModel, options: Options) -> Record:
    """Everything that determines a text besides its prompt."""
    config = model.decode_config(options)
    sampling = config.sampling
    stop = options.get("stop", ())
    return {
        "target": model.folder.name if model.folder else None,
        "backend": model.backend.name,
        "dtype": model.backend.dtype,
        "method": config.method,
        "budget": config.budget,
        "max_tokens": config.max_tokens,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "seed": sampling.seed,
        "stop": [stop] if isinstance(stop, str) else list(stop),
        "system": options.get("system"),
        "raw": options.get("raw", False),
        "template_args": options.get("template_args"),
    }


def _outcome(text: Assembler, error: Exception | None) -> Record:
    """What the record of a turn says about its text."""
    if error is None:
        return text.generation().to_dict()
    if isinstance(error, TreeflashError) or is_out_of_memory(error):
        return {"error": str(error)}
    raise error


def _checked(record: Any) -> Record:
    """The record, if this module wrote it."""
    kinds = {"id": str | int, "turn": int, "prompt_digest": str}
    if not all(isinstance(record[name], kind) for name, kind in kinds.items()):
        raise TypeError
    if "error" not in record and not (
        isinstance(record["text"], str) and isinstance(record["accepted_lengths"], list)
    ):
        raise TypeError
    return dict(record)
