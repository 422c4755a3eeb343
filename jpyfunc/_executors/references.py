"""A function by its name, for a worker that does not share memory with this process.

`pickle` takes functions by name, but a decorator leaves another object under the name of
the function that it decorates: the wrapped function. The worker finds that one, and goes on
along `__wrapped__` as often as this process had to.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable
from typing import Any

from jpyfunc._frames import is_called_from
from jpyfunc._limits import MAX_DECORATORS


@dataclasses.dataclass(frozen=True, slots=True)
class NamedFunction:
    """A function by its name.

    Attributes:
        module: where it is defined.
        qualname: its name there.
        depth: of how many decorators it is inside.
    """

    module: str
    qualname: str
    depth: int

    def __str__(self) -> str:
        return f"{self.module}.{self.qualname}"

    def load(self) -> Callable[..., Any]:
        """Import the function."""
        found: Any = importlib.import_module(self.module)
        for part in self.qualname.split("."):
            found = getattr(found, part)
        for _ in range(self.depth):
            found = found.__wrapped__
        return found


def reference_to(function: Callable[..., Any]) -> NamedFunction | Callable[..., Any]:
    """The name of a function; itself if it has none, or is to be pickled by value."""
    module = getattr(function, "__module__", None)
    qualname = getattr(function, "__qualname__", None)
    if not (isinstance(module, str) and isinstance(qualname, str)):
        return function
    if is_called_from("cloudpickle") and _is_by_value(module):
        return function
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    for depth in range(MAX_DECORATORS):
        if found is function:
            return NamedFunction(module, qualname, depth)
        found = getattr(found, "__wrapped__", None)
    return function


def _is_by_value(module: str) -> bool:
    """Whether cloudpickle takes the functions of a module by value."""
    registered: Any = getattr(
        sys.modules.get("cloudpickle"), "list_registry_pickle_by_value", set
    )
    return module == "__main__" or module in registered()
