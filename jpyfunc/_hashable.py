"""Make any object part of a key: by its value if it can be hashed, else by its identity."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class ById:
    """Wrap an object to make it hashable, equal to nothing but itself."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ById) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def hashable(value: Any) -> Any:
    """Return `value` if it can be hashed, else wrap it in `ById`."""
    try:
        hash(value)
    except TypeError:
        return ById(value)
    return value


def unwrapped(value: Any) -> Any:
    """Undo `hashable`."""
    return value.value if isinstance(value, ById) else value
