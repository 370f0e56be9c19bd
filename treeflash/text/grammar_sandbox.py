"""A process that compiles each grammar first, and may die of it in the server's place.

llguidance recurses once per reference, so that a chain of some thousand references in a JSON
schema or between rules overflows the stack and ends the process, and grammars of 2 kB make it
compile for hours or allocate all memory. The text of a grammar does not tell these cases apart:
the depth depends on the order in which references are met, and the time on what regular
expressions have in common. So each grammar is compiled twice: here, with limits on the stack, the
time and the memory, and then in the server, with a larger stack.

The process runs this file as a script, and imports nothing that takes long.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import llguidance
from llguidance.gbnf_to_lark import any_to_lark

STACK = 8 << 20
"""Bytes of stack for compiling a grammar. The server compiles with twice as many."""
COMPILE_SECONDS = 0.5
"""Seconds of CPU time for compiling a grammar."""
MEMORY = 1 << 30
"""Bytes of memory for compiling a grammar, on systems that can limit it."""
ANY_FORM = "lark_or_gbnf"
"""The key of a grammar whose format is not known yet."""
NO_MATCH = "no text matches it"
"""Our words for llguidance's NoExtensionBias."""
LIMITS = llguidance.LLParserLimits(verbose_errors=False)
"""Errors do not show the parser's state, because clients read them."""


class SandboxError(ValueError):
    """A grammar is invalid, or compiling it takes too much."""


class GrammarSandbox:
    """A process that compiles grammars, one at a time, and is replaced if it dies.

    Any thread may call it.
    """

    def __init__(self, vocabulary: Mapping[str, Any]) -> None:
        """Start the process, which needs a second; `vocabulary` has arguments of `LLTokenizer`."""
        self._vocabulary = json.dumps(vocabulary)
        self._lock = threading.Lock()
        self._ready = False
        self._start()

    def run(self, grammars: Sequence[Mapping[str, Any]], patience: float = 30.0) -> str:
        """Compile grammars, which may have the key `ANY_FORM`; returns llguidance's form of them.

        The objects of JSON schemas are closed, as `close_objects` says. A process that does not
        answer in `patience` seconds is killed.

        A SandboxError is raised if a grammar is invalid, or compiling it takes too much, an OSError
        if no process can be started.
        """
        try:
            text = json.dumps({"grammars": list(grammars)})
        except RecursionError as error:
            raise SandboxError("it is nested too deep") from error
        with self._lock:
            if self.process.poll() is not None:
                self._end()
                self._start()
            if not self._ready and not self._read(patience):
                raise OSError(f"the process for grammars ended with {self.process.wait()}")
            self._ready = True
            self._write(text)
            reply = self._read(patience)
            if not reply:
                reason = self._cause_of_death()
                self._start()  # now, so that the next grammar need not wait
                raise SandboxError(reason)
        verdict = json.loads(reply)
        if verdict["error"] is not None:
            raise SandboxError(verdict["error"])
        return str(verdict["converted"])

    def _start(self) -> None:
        # The process has its own session: an interruption at the keyboard is for the server.
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        self._end = weakref.finalize(self, _end, self.process)
        self._ready = False
        self._write(self._vocabulary)

    def _write(self, line: str) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then there will be nothing to read either
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()

    def _read(self, patience: float) -> str:
        """Read a line, or nothing if the process dies or does not answer in time."""
        assert self.process.stdout is not None
        timer = threading.Timer(patience, self.process.kill)
        timer.start()
        try:
            return self.process.stdout.readline()
        finally:
            timer.cancel()

    def _cause_of_death(self) -> str:
        status = self.process.wait()
        self._end()
        names = {-number: number.name for number in signal.Signals}  # Windows has few
        if names.get(status) in ("SIGSEGV", "SIGBUS"):
            return "its references are nested too deep"
        if names.get(status) == "SIGPROF":
            return f"it takes more than {COMPILE_SECONDS:g} s to compile"
        return "it takes too much memory or time to compile"


def _end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(OSError), process:  # it does not read its input any more
        process.kill()


def _serve() -> None:
    """Compile the grammars of the standard input; answer on the standard output."""
    vocabulary = llguidance.LLTokenizer(**json.loads(sys.stdin.readline()))
    print(flush=True)
    _limit_memory()
    for line in sys.stdin:
        if sys.platform != "win32":
            signal.setitimer(signal.ITIMER_PROF, COMPILE_SECONDS)  # the signal ends the process
        verdict = _verdict(vocabulary, line)
        if sys.platform != "win32":
            signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(verdict), flush=True)


def _verdict(vocabulary: llguidance.LLTokenizer, text: str) -> dict[str, str | None]:
    try:
        converted = _convert(text)
        matcher = llguidance.LLMatcher(vocabulary, converted, log_level=0, limits=LIMITS)
        matcher.compute_bitmask()  # some regular expressions are cheap until they are used
    except BaseException as error:  # a panic of llguidance is not an Exception
        return {"error": str(error) or type(error).__name__}
    if matcher.is_error():
        return {"error": matcher.get_error().replace("NoExtensionBias", NO_MATCH)}
    return {"error": None, "converted": converted}


def _convert(text: str) -> str:
    """Convert the grammars with each `ANY_FORM` in the Lark format, and with closed objects."""
    from treeflash.text.json_schema import close_objects  # the process finds it since it began

    grammars = json.loads(text)["grammars"]
    for grammar in grammars:
        if ANY_FORM in grammar:
            grammar["lark_grammar"] = any_to_lark(grammar.pop(ANY_FORM))
        close_objects(grammar.get("json_schema"))
    return json.dumps({"grammars": grammars})


def _limit_memory() -> None:
    if sys.platform == "win32":
        return
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sizes = Path("/proc/self/statm")
    if sizes.exists():  # else what the process uses already is not known
        used = int(sizes.read_text().split()[0]) * resource.getpagesize()
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        limit = used + MEMORY if most == resource.RLIM_INFINITY else min(used + MEMORY, most)
        resource.setrlimit(resource.RLIMIT_AS, (limit, most))


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[2]))  # the package may be in a folder of sources
    threading.stack_size(STACK)
    threading.Thread(target=_serve).start()
