"""What the checks of a pair find, and how changes to it are judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from treeflash.diagnosis.scores import Gain


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The outcome of one check.

    Attributes:
        check: its name.
        ok: whether nothing is wrong.
        message: what was seen; where something is wrong, what to change.
    """

    check: str
    ok: bool
    message: str


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Changes of one kind, each tried alone.

    Attributes:
        check: the name of the finding.
        gains: by what each change is called; None where the pair cannot run with it.
        least: nats that matter.
        advice: what to do where a change is clearly better.
    """

    check: str
    gains: Mapping[str, Gain | None]
    least: float
    advice: str

    def best(self) -> tuple[str, Gain] | None:
        """The change that gains most; None where there was none to try."""
        gains = {name: gain for name, gain in self.gains.items() if gain is not None}
        return max(gains.items(), key=lambda item: item[1].nats, default=None)

    def finding(self, least: float) -> Finding:
        """The outcome, where a gain must be at least so many nats to count."""
        best = self.best()
        if best is None:
            return Finding(check=self.check, ok=True, message="there is nothing else to try")
        name, gain = best
        seen = f"{name} the true tokens are {gain}"
        if gain.is_clear(least):
            return Finding(check=self.check, ok=False, message=f"{seen}; {self.advice}")
        return Finding(check=self.check, ok=True, message=f"nothing is clearly better; {seen}")


def judge(trials: Sequence[Trial]) -> list[Finding]:
    """One finding a trial: whether a change is clearly better than the pair as it is.

    Where one thing is badly wrong, changes of other things help a little by accident. So a gain
    does not count beside one of more than twice as many nats.
    """
    bests = [(trial, best[1]) for trial in trials if (best := trial.best())]
    largest = max((gain.nats for trial, gain in bests if gain.is_clear(trial.least)), default=0.0)
    return [trial.finding(max(trial.least, largest / 2)) for trial in trials]
