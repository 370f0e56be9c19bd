"""Costs of passes that a test gives, whatever the passes of its tiny models take."""

from treeflash.decoding.verify_costs import VerifyCosts


class SteadyCosts(VerifyCosts):
    """Costs that no pass corrects."""

    def observe(self, rows: int, reads: float, sequences: int, seconds: float) -> None:
        """Learn nothing."""
