"""Findings of the checks, and when a change to a pair counts as an improvement."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from treeflash.diagnosis.scores import Gain


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The outcome of one check.

    Attributes:
        check: its name.
        ok: whether it found no problem.
        message: what it measured and, if there is a problem, what to change.
    """

    check: str
    ok: bool
    message: str


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Alternatives of one kind, each tried alone.

    Attributes:
        check: the name of the finding.
        gains: by name of the alternative; None if the pair cannot run with it.
        least: smallest gain that matters, nats.
        advice: what to do if an alternative is better.
    """

    check: str
    gains: Mapping[str, Gain | None]
    least: float
    advice: str

    def best(self) -> tuple[str, Gain] | None:
        """The alternative with the largest gain; None if there is none."""
        gains = {name: gain for name, gain in self.gains.items() if gain is not None}
        return max(gains.items(), key=lambda item: item[1].nats, default=None)

    def finding(self, least: float) -> Finding:
        """The outcome, if a gain must be at least `least` nats to count."""
        best = self.best()
        if best is None:
            return Finding(check=self.check, ok=True, message="no alternative to try")
        name, gain = best
        if gain.is_clear(least):
            message = f"{name}: the target's tokens are {gain} as probable; {self.advice}"
            return Finding(check=self.check, ok=False, message=message)
        noise = ", within noise" if gain.nats > 0 and not gain.is_clear(-math.inf) else ""
        message = f"no significant improvement (best alternative: {name}, {gain}{noise})"
        return Finding(check=self.check, ok=True, message=message)


def judge(trials: Sequence[Trial]) -> list[Finding]:
    """One finding per trial: whether an alternative is clearly better than the pair as it is.

    If one setting is badly wrong, changes of other settings help a little by accident. So a gain
    does not count next to one of more than twice as many nats.
    """
    bests = [(trial, best[1]) for trial in trials if (best := trial.best())]
    largest = max((gain.nats for trial, gain in bests if gain.is_clear(trial.least)), default=0.0)
    return [trial.finding(max(trial.least, largest / 2)) for trial in trials]
