"""Which cases of a test run every time, where its mark `sample` leaves others to the nightly run.

Each change needs every law once for each engine. That a law holds for every family, dialect, dtype
and option together is the same code again, nearly always, and takes hours: the nightly run.
"""

from collections.abc import Sequence
from itertools import combinations
from zlib import crc32


def choose(cases: Sequence[Sequence[str]], count: int | None, name: str) -> set[int]:
    """Choose cases that differ as much as possible; a case is a list of values. None is all.

    The first case is one of them, and the next always has the most values that no chosen one has
    in its place, then the most pairs of values. Among equals, the name of the test decides: so
    tests of a suite that have the same parameters together meet all values.
    """
    parts = [set(enumerate(case)) for case in cases]
    pairs = [set(combinations(sorted(values), 2)) for values in parts]
    start = crc32(name.encode()) % len(cases)
    order = [*range(start, len(cases)), *range(start)]
    chosen = [0]
    while len(chosen) < min(count or len(cases), len(cases)):
        seen = set().union(*(parts[i] for i in chosen))
        seen_pairs = set().union(*(pairs[i] for i in chosen))
        chosen.append(
            max(
                (i for i in order if i not in chosen),
                key=lambda i: (len(parts[i] - seen), len(pairs[i] - seen_pairs)),
            )
        )
    return set(chosen)
