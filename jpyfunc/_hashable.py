"""Any object as part of a key: by its value where it can be hashed, else by itself."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class ById:
    """Makes any object hashable, equal to itself alone."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ById) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def hashable(value: Any) -> Any:
    """`value` if it can be hashed, else a `ById` of it."""
    try:
        hash(value)
    except TypeError:
        return ById(value)
    return value


def unwrapped(value: Any) -> Any:
    """Undo `hashable`."""
    return value.value if isinstance(value, ById) else value
