"""Counts of what calls do, which profiles add up."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(slots=True)
class Counts:
    """Totals over the calls of one function and kind; the keys of `profile.as_dict`."""

    calls: int = 0
    elements: int = 0
    runs: int = 0
    body_seconds: float = 0.0
    overhead_seconds: float = 0.0
    wait_seconds: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0
    exceptions: int = 0
    from_tape: int = 0
    reran: int = 0
    compile_seconds: float = 0.0
    one_by_one: str = ""

    def count(self, **amounts: float | str) -> None:
        """Add to the counts named; a text replaces the one before."""
        for name, amount in amounts.items():
            before = getattr(self, name)
            setattr(self, name, amount if isinstance(amount, str) else before + amount)

    def add(self, other: Counts) -> None:
        """Add all counts of `other`; a text of these stays where `other` has none."""
        amounts = dataclasses.asdict(other)
        self.count(**{name: amount for name, amount in amounts.items() if amount})
