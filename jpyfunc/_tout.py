"""`Tout`: the declared structure, shapes and dtypes of results, and their check."""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jpyfunc._conversion import (
    Array,
    as_declared,
    describe,
    dtype_source,
    is_key_dtype,
    is_weak,
    kind_of,
)
from jpyfunc._errors import ResultError, see
from jpyfunc._types import PyTreeDef

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class Leaf:
    """The declaration of one result.

    Attributes:
        shape: None if it is to be inferred.
        dtype: None if it is to be inferred.
        weak_type: whether the dtype is that of a Python number.
    """

    shape: Shape | None
    dtype: Any
    weak_type: bool = False

    @property
    def is_key(self) -> bool:
        return is_key_dtype(self.dtype)

    def __str__(self) -> str:
        name = "array" if self.dtype is None else str(self.dtype)
        return name if self.shape is None else f"{name}{list(self.shape)}"

    def __repr__(self) -> str:
        dtype = dtype_source(self.dtype)
        return (
            dtype if self.shape is None else f"jax.ShapeDtypeStruct({self.shape}, {dtype})"
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Template:
    """A parsed `Tout`.

    Attributes:
        tree: the structure of the results.
        leaves: the declaration of each.
    """

    tree: PyTreeDef
    leaves: tuple[Leaf, ...]

    @classmethod
    def undeclared(cls, result: object, label: str) -> Template:
        """Make a template that declares the structure of `result`, and nothing else."""
        tree = _flatten(result, label)[1]
        return cls(tree, (Leaf(None, None),) * tree.num_leaves)

    def __str__(self) -> str:
        try:
            return repr(jax.tree.unflatten(self.tree, self.leaves))
        except Exception:  # noqa: BLE001 - a user's class may use its leaves as arrays
            return str(self.tree)

    @property
    def complete(self) -> bool:
        """Whether every shape and dtype is declared, so that nothing is inferred."""
        return all(
            leaf.shape is not None and leaf.dtype is not None for leaf in self.leaves
        )

    def path(self, index: int) -> str:
        """Name result `index` by its place in what the body returns: `result[0]['a']`."""
        return f"result{jax.tree_util.keystr(key_path(self.tree, index))}"

    def match(self, result: object, label: str) -> list[object]:
        """Flatten `result`, which must have this structure.

        Lists and tuples stand for each other, as in `tf.py_function`.

        Raises:
            ResultError: the structures differ.
        """
        if _is_leaf(self.tree):
            return [result]
        leaves, tree = _flatten(result, label)
        return leaves if tree == self.tree else list(_match(self.tree, result, "", label))

    def check(self, result: object, label: str) -> list[Array]:
        """Flatten what a body returned to arrays of the declared shapes and dtypes.

        Works on concrete arrays, and on tracers, where it is differentiable.

        Args:
            result: what the body returned.
            label: what errors call the function.

        Returns:
            One NumPy or JAX array per leaf.

        Raises:
            ResultError: wrong structure, shape or dtype, or not an array.
        """
        values = self.match(result, label)
        return [
            value  # the common case, and every call comes here
            if isinstance(value, jax.Array)
            and value.dtype == leaf.dtype
            and value.shape == leaf.shape
            else as_declared(
                value, leaf.shape, leaf.dtype, lambda i=i: f"{label}: {self.path(i)}"
            )
            for i, (value, leaf) in enumerate(zip(values, self.leaves, strict=True))
        ]

    def replace_shapes(self, shapes: Sequence[Shape | None]) -> Template:
        """Replace the shapes, one per leaf."""
        return Template(
            self.tree,
            tuple(
                dataclasses.replace(leaf, shape=shape)
                for leaf, shape in zip(self.leaves, shapes, strict=True)
            ),
        )


def _flatten(result: object, label: str) -> tuple[list[object], PyTreeDef]:
    try:
        return jax.tree.flatten(result)
    except ValueError as error:
        raise ResultError(
            f"{label}: JAX cannot flatten its result: {why_no_pytree(error)}."
            + see("A dict whose keys cannot be sorted")
        ) from error


def why_no_pytree(error: ValueError) -> str:
    """Say why JAX cannot flatten a pytree, and what to write instead."""
    if "dictionary keys" in str(error):
        return (
            "the keys of a dict are of types that cannot be sorted together. Use only "
            "strings, or only integers"
        )
    return str(error).rstrip(".")


def parse(tout: object, label: str) -> Template:
    """Parse a `Tout` that is not a function.

    Args:
        tout: a pytree whose leaves are dtypes or have `.shape` and `.dtype`.
        label: what errors call the function.

    Raises:
        TypeError: a leaf is neither.
    """
    paths, tree = jax.tree_util.tree_flatten_with_path(tout)
    return Template(
        tree,
        tuple(
            _parse_leaf(leaf, f"{label}: Tout{jax.tree_util.keystr(path)}")
            for path, leaf in paths
        ),
    )


def key_path(tree: PyTreeDef, index: int) -> tuple[object, ...]:
    """Return the keys that lead to leaf `index` of a tree."""
    try:
        numbered = jax.tree.unflatten(tree, range(tree.num_leaves))
        return jax.tree_util.tree_flatten_with_path(numbered)[0][index][0]
    except Exception:  # noqa: BLE001 - a user's class may refuse other leaves than arrays
        return (jax.tree_util.FlattenedIndexKey(index),)


def is_function(tout: object) -> bool:
    """Tell whether a `Tout` is a function, which is called with the arguments.

    A callable pytree, such as an equinox module, declares results like itself if it has a
    leaf that declares one. JAX takes some functions for pytrees, too: partials, methods and
    wrapped functions of equinox. Their arrays are bound arguments.
    """
    # A class is a dtype, or a mistake.
    if not callable(tout) or isinstance(tout, type) or is_dtype(tout):
        return False
    if isinstance(tout, functools.partial) or jax.tree_util.all_leaves([tout]):
        return True
    if hasattr(tout, "__func__") or hasattr(tout, "__wrapped__"):
        return True
    return not any(is_dtype(x) or _is_like_array(x) for x in jax.tree.leaves(tout))


def _is_like_array(leaf: object) -> bool:
    """Tell whether a leaf declares a shape and a dtype."""
    shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
    return not isinstance(leaf, type) and shape is not None and dtype is not None


def is_dtype(value: Any) -> bool:
    """Tell whether `value` names a dtype."""
    if isinstance(value, np.dtype) or is_key_dtype(value):
        return True
    if isinstance(value, str | type):
        try:
            return np.dtype(value) != np.dtype(object)
        except TypeError:
            return False
    return False


def _parse_leaf(leaf: Any, where: str) -> Leaf:
    if is_dtype(leaf):
        return Leaf(None, _parse_dtype(leaf, where))
    if not _is_like_array(leaf):
        raise TypeError(
            f"{where}: expected a dtype such as jnp.float32, or something with .shape "
            f"and .dtype such as jax.ShapeDtypeStruct((3,), jnp.float32), got {leaf!r}."
            + see("An invalid option")
        )
    return Leaf(
        _parse_shape(leaf.shape, where), _parse_dtype(leaf.dtype, where), is_weak(leaf)
    )


_NO_SIZES = (type(None), str, float, np.inexact, np.ndarray, jax.Array)


def _parse_shape(shape: Any, where: str) -> Shape:
    sizes = tuple(shape) if isinstance(shape, list | tuple) else (shape,)
    for size in sizes:
        is_negative = isinstance(size, int | np.integer) and size < 0
        # Symbolic sizes of `jax.export` pass, so this lists what does not.
        if is_negative or isinstance(size, _NO_SIZES):
            raise TypeError(
                f"{where}: expected a shape of integers that are 0 or more, got {shape!r}; "
                "write jax.ShapeDtypeStruct((3,), jnp.float32), for example, or a dtype, "
                "if the shape is to be inferred." + see("An invalid option")
            )
    return sizes


def _parse_dtype(dtype: Any, where: str) -> Any:
    if is_key_dtype(dtype):
        return dtype
    if dtype is int or dtype is float or dtype is complex:  # as in jnp.zeros(3, int)
        return jax.dtypes.canonicalize_dtype(dtype)
    dtype = np.dtype(dtype)
    if kind_of(dtype) is None or dtype in _NUMPY_ONLY:
        raise TypeError(
            f"{where}: expected a dtype that JAX has arrays of, got {dtype}; "
            "write jnp.float32, jnp.int32 or jnp.bool_, for example."
            + see("An invalid option")
        )
    return dtype


def check_x64(template: Template, label: str) -> None:
    """Refuse 64-bit results while 64-bit types are off, as `jax.pure_callback` does.

    Raises:
        ValueError: a dtype needs `jax_enable_x64`.
    """
    for i, leaf in enumerate(template.leaves):
        if leaf.dtype is None or leaf.is_key:
            continue
        available = jax.dtypes.canonicalize_dtype(leaf.dtype)
        if available != leaf.dtype:
            raise ValueError(
                f"{label}: {template.path(i)} is declared {leaf.dtype}, which needs 64-bit "
                f"types, and jax_enable_x64 is off; declare {dtype_source(available)} in "
                "Tout, or call it under jax.enable_x64(True)." + see("64-bit results")
            )


# `longdouble` and `clongdouble`: JAX has none, unless they are names of 64-bit types.
_NUMPY_ONLY = {np.dtype(t) for t in "gG"} - {np.dtype(t) for t in "dD"}


def _is_leaf(tree: PyTreeDef) -> bool:
    # `jax.tree_util.treedef_is_leaf` takes an empty list for a leaf.
    return tree.num_nodes == 1 and tree.num_leaves == 1


def _is_nothing(tree: PyTreeDef) -> bool:
    """Tell whether a tree is None or an empty container, not an object without leaves."""
    if tree.num_nodes != 1 or tree.num_leaves:
        return False
    kind, _ = tree.node_data()
    return issubclass(kind, type(None) | list | tuple | dict)


def _match(tree: PyTreeDef, result: object, path: str, label: str) -> list[object]:
    """Flatten `result`, the part at `path` of what a body returned, as `tree` says."""
    if _is_leaf(tree):
        return [result]
    if _is_nothing(tree):
        if _is_nothing(jax.tree.structure(result)):
            return []
        raise _structure_error(label, path, "nothing", describe(result))
    kind, children = tree.node_data(), tree.children()
    parts, top = jax.tree_util.tree_flatten_with_path(
        result, is_leaf=lambda x: x is not result
    )
    got = describe(result)
    if kind[0] in (list, tuple):
        if len(children) == 1 and _is_one(result):
            return _match(children[0], result, path, label)  # as TensorFlow takes it
        same = isinstance(result, list | tuple) and len(parts) == len(children)
        expected = f"{kind[0].__name__} of {len(children)}"
    elif issubclass(kind[0], dict) and isinstance(result, dict):
        same = set(result) == set(_keys(kind))
        parts = [((jax.tree_util.DictKey(k),), result.get(k)) for k in _keys(kind)]
        expected = f"{kind[0].__name__} with keys {_keys(kind)}"
    else:
        same = top.node_data() == kind and len(parts) == len(children)
        keys = f" with keys {_keys(kind)}" if issubclass(kind[0], dict) else ""
        expected = f"{kind[0].__name__}{keys}"
        if not same and top.node_data() and top.node_data()[0] is kind[0]:
            # The program rebuilds results with the static fields that are declared, so a
            # result with others would silently become another object.
            expected, got = _static_differences(tree, result, top)
        elif not same and type(result).__name__ == kind[0].__name__:
            got = f"another class named {kind[0].__name__}, as if it were defined again"
    if not same:
        raise _structure_error(label, path, expected, got)
    return [
        leaf
        for (key, part), child in zip(parts, children, strict=True)
        for leaf in _match(child, part, path + jax.tree_util.keystr(key), label)
    ]


def _static_differences(tree: PyTreeDef, result: object, top: PyTreeDef) -> tuple[str, str]:
    """Say in which static fields the declared object and a result differ, and how."""
    name = type(result).__name__
    dynamic = object()
    try:
        declared = jax.tree.unflatten(tree, [dynamic] * tree.num_leaves)
        fields = {}
        for key in _field_names(result):
            pair = getattr(declared, key), getattr(result, key)
            if dynamic not in jax.tree.leaves(pair[0]) and bool(pair[0] != pair[1]):
                fields[key] = pair
    except Exception:  # noqa: BLE001 - a user's class may refuse other leaves than arrays
        fields = {}
    if not fields:
        fields = {"static data": (tree.node_data()[1], top.node_data()[1])}
    expected, got = (
        ", ".join(f"{key}={pair[i]!r}" for key, pair in fields.items()) for i in (0, 1)
    )
    return f"{name} with {expected}", f"{name} with {got}"


def _field_names(value: object) -> list[str]:
    if dataclasses.is_dataclass(value):
        return [field.name for field in dataclasses.fields(value)]
    slots = [
        name for base in type(value).__mro__ for name in vars(base).get("__slots__", ())
    ]
    return [*slots, *getattr(value, "__dict__", {})]


def _is_one(result: object) -> bool:
    """Tell whether a result is an array or a Python number, and not a list of them."""
    return isinstance(result, bool | int | float | complex) or hasattr(result, "dtype")


def _keys(kind: Any) -> list[object]:
    """Return the keys of a `dict` or a subclass, in the order of its leaves."""
    if issubclass(kind[0], defaultdict):
        return list(kind[1][1])  # after the factory of defaults
    return list(kind[1])


def _structure_error(label: str, path: str, expected: str, got: str) -> ResultError:
    inferred = ", or leave Tout out to have it inferred" if expected == "nothing" else ""
    return ResultError(
        f"{label}: result{path}: expected {expected}, got {got}. Return what Tout "
        f"declares, or declare in Tout what the body returns{inferred}."
        + see("A result that Tout does not declare")
    )
