"""`Tout`: what a call declares that its body returns, and the check of what it did."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpyfunc._errors import ResultError

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Leaf:
    """What is declared of one result; `None` stands for what is inferred."""

    shape: Shape | None
    dtype: Any
    weak_type: bool = False

    @property
    def is_key(self) -> bool:
        return is_key_dtype(self.dtype)

    def __str__(self) -> str:
        name = "array" if self.dtype is None else str(self.dtype)
        return name if self.shape is None else f"{name}{list(self.shape)}"


@dataclasses.dataclass(frozen=True, slots=True)
class Template:
    """A parsed `Tout`: the structure of the results and what is declared of each."""

    tree: Any  # PyTreeDef
    leaves: tuple[Leaf, ...]

    @property
    def complete(self) -> bool:
        """Whether every shape and dtype is declared, so that nothing is inferred."""
        return all(
            leaf.shape is not None and leaf.dtype is not None for leaf in self.leaves
        )

    def path(self, index: int) -> str:
        """How to reach result `index` in what the body returns, as `result[0]['a']`."""
        numbered = jax.tree.unflatten(self.tree, range(len(self.leaves)))
        path, _ = jax.tree_util.tree_flatten_with_path(numbered)[0][index]
        return f"result{jax.tree_util.keystr(path)}"

    def match(self, result: Any, name: str) -> list[Any]:
        """The leaves of `result`, which must have this structure.

        Lists and tuples stand for each other, as in `tf.py_function`.

        Raises:
            ResultError: the structures differ.
        """
        if jax.tree_util.treedef_is_leaf(self.tree):
            return [result]
        leaves, tree = jax.tree.flatten(result)
        return leaves if tree == self.tree else list(_match(self.tree, result, "", name))

    def check(self, result: Any, name: str) -> list[Any]:
        """The results of a body, flat, each an array of the declared shape and dtype.

        Works on concrete arrays and under any transform, where it is differentiable.

        Args:
            result: what the body returned.
            name: the name of the function, for errors.

        Returns:
            One NumPy or JAX array per leaf.

        Raises:
            ResultError: wrong structure, shape or dtype, or not an array.
        """
        values = self.match(result, name)
        return [
            value
            # The common case, on the way of every call.
            if isinstance(value, jax.Array)
            and value.dtype == leaf.dtype
            and value.shape == leaf.shape
            else _convert(value, leaf, lambda i=i: f"{name}: {self.path(i)}")
            for i, (value, leaf) in enumerate(zip(values, self.leaves, strict=True))
        ]

    def replace_shapes(self, shapes: Sequence[Shape]) -> Template:
        """The same template with other shapes, one per leaf."""
        return Template(
            self.tree,
            tuple(
                dataclasses.replace(leaf, shape=shape)
                for leaf, shape in zip(self.leaves, shapes, strict=True)
            ),
        )


def parse(tout: Any, name: str) -> Template:
    """Read a `Tout` that is not callable.

    Args:
        tout: pytree whose leaves are dtypes or have `.shape` and `.dtype`.
        name: the name of the function, for errors.

    Raises:
        TypeError: a leaf is neither.
    """
    paths, tree = jax.tree_util.tree_flatten_with_path(tout)
    return Template(
        tree,
        tuple(
            _parse_leaf(leaf, f"{name}: Tout{jax.tree_util.keystr(path)}")
            for path, leaf in paths
        ),
    )


def is_dtype(value: Any) -> bool:
    """Whether `value` names a dtype, and so is a Tout leaf rather than a callable."""
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
    shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
    if shape is None or dtype is None:
        raise TypeError(
            f"{where}: expected a dtype such as jnp.float32, or something with .shape "
            f"and .dtype such as jax.ShapeDtypeStruct((3,), jnp.float32), got {leaf!r}."
        )
    weak = isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and bool(leaf.weak_type)
    return Leaf(tuple(shape), _parse_dtype(dtype, where), weak)


def _parse_dtype(dtype: Any, where: str) -> Any:
    if is_key_dtype(dtype):
        return dtype
    if dtype is int or dtype is float or dtype is complex:  # as jnp.zeros reads them
        return jax.dtypes.canonicalize_dtype(dtype)
    dtype = np.dtype(dtype)
    if kind_of(dtype) is None:
        raise TypeError(
            f"{where}: expected a dtype that JAX has arrays of, got {dtype}; "
            "write jnp.float32, jnp.int32 or jnp.bool_, say."
        )
    return dtype


def check_x64(template: Template, name: str) -> None:
    """Refuse 64-bit results while they are off, as `jax.pure_callback` does.

    Raises:
        ValueError: a declared dtype needs `jax_enable_x64`.
    """
    for i, leaf in enumerate(template.leaves):
        if leaf.dtype is None or leaf.is_key:
            continue
        available = jax.dtypes.canonicalize_dtype(leaf.dtype)
        if available != leaf.dtype:
            raise ValueError(
                f"{name}: Tout{template.path(i)[len('result') :]} is {leaf.dtype}, which "
                f"needs 64-bit types, and jax_enable_x64 is off; write {available}, or "
                "call it under jax.enable_x64(True)."
            )


def is_key_dtype(dtype: Any) -> bool:
    """Whether `dtype` is that of typed PRNG keys."""
    try:
        return jnp.issubdtype(dtype, jax.dtypes.prng_key)
    except TypeError:
        return False


_KINDS = (
    (np.bool_, "b"),
    (np.unsignedinteger, "u"),
    (np.signedinteger, "i"),
    (np.floating, "f"),
    (np.complexfloating, "c"),
)


def kind_of(dtype: Any) -> str | None:
    """`'b'`, `'u'`, `'i'`, `'f'` or `'c'`; None for what JAX has no arrays of.

    `np.dtype.kind` is `'V'` for bfloat16, the float8s and int4.
    """
    for parent, kind in _KINDS:
        if jnp.issubdtype(dtype, parent):
            return kind
    return None


def _castable(source: Any, target: Any) -> bool:
    """NumPy's `same_kind` rule, for ml_dtypes too."""
    source_kind, target_kind = kind_of(source), kind_of(target)
    if source_kind is None or target_kind is None:
        return False
    order = "buifc"
    return order.index(source_kind) <= order.index(target_kind)


def _match(tree: Any, result: Any, path: str, name: str) -> list[Any]:
    if jax.tree_util.treedef_is_leaf(tree):
        return [result]
    kind, children = tree.node_data(), tree.children()
    if kind is None:  # None, which has no leaves
        if result is not None and result != () and result != []:
            raise _structure_error(name, path, "None", result)
        return []
    sequence = (list, tuple)
    if kind[0] in sequence:
        if not children and result is None:
            return []
        if type(result) not in sequence or len(result) != len(children):
            expected = f"a {kind[0].__name__} of {len(children)}"
            raise _structure_error(name, path, expected, result)
        parts = [(f"{path}[{i}]", part) for i, part in enumerate(result)]
    else:
        one_level = jax.tree_util.default_registry.flatten_one_level(result)
        got = jax.tree.structure(result, is_leaf=lambda x: x is not result)
        if one_level is None or got.node_data() != kind:
            expected = f"a {kind[0].__name__}" + (
                f" with keys {kind[1]}" if kind[0] is dict else ""
            )
            raise _structure_error(name, path, expected, result)
        keyed, _ = jax.tree_util.tree_flatten_with_path(
            result, is_leaf=lambda x: x is not result
        )
        parts = [(path + jax.tree_util.keystr(key), part) for key, part in keyed]
    return [
        leaf
        for (part_path, part), child in zip(parts, children, strict=True)
        for leaf in _match(child, part, part_path, name)
    ]


def _structure_error(name: str, path: str, expected: str, got: Any) -> ResultError:
    size = f" of {len(got)}" if isinstance(got, list | tuple) else ""
    keys = f" with keys {sorted(map(str, got))}" if isinstance(got, dict) else ""
    return ResultError(
        f"{name}: result{path}: expected {expected}, as Tout declares, got "
        f"{_type_name(got)}{size}{keys}. Return that, or change Tout."
    )


def _type_name(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _convert(value: Any, leaf: Leaf, where: Callable[[], str]) -> Any:
    """`value` as an array of the declared shape and dtype, if casting allows."""
    array, weak = as_array(value, where)
    if leaf.shape is not None and tuple(array.shape) != leaf.shape:
        raise ResultError(
            f"{where()}: expected shape {leaf.shape}, got {tuple(array.shape)}. Return an "
            "array of that shape, or declare the other one in Tout."
        )
    if leaf.dtype is None:
        return jnp.asarray(value if weak else array)
    if array.dtype == leaf.dtype:
        return array
    # A weakly typed integer, such as a Python int, has no sign to lose as a type.
    unsigned = weak and kind_of(array.dtype) == "i" and kind_of(leaf.dtype) == "u"
    if leaf.is_key or not (unsigned or _castable(array.dtype, leaf.dtype)):
        raise ResultError(
            f"{where()}: expected {leaf.dtype}, got {array.dtype}, which casting of the "
            "same kind does not convert. Convert it in the body with "
            f".astype({leaf.dtype}), or declare {array.dtype} in Tout."
        )
    if isinstance(array, jax.Array):
        return array.astype(leaf.dtype)
    if kind_of(array.dtype) == "i" and kind_of(leaf.dtype) in "ui" and array.size:
        limits = jnp.iinfo(leaf.dtype)
        if weak and (array.min() < int(limits.min) or array.max() > int(limits.max)):
            raise ResultError(
                f"{where()}: {array.tolist()} does not fit in {leaf.dtype}. Declare a "
                "wider dtype in Tout."
            )
    return array.astype(leaf.dtype)


def as_array(value: Any, where: Callable[[], str]) -> tuple[Any, bool]:
    """`value` as a NumPy or JAX array, and whether its dtype is weak.

    Raises:
        ResultError: it is not an array of numbers, booleans or PRNG keys.
    """
    if hasattr(value, "__jax_array__") and not isinstance(value, jax.Array):
        value = value.__jax_array__()
    if isinstance(value, jax.Array):
        return value, value.weak_type
    weak = isinstance(value, bool | int | float | complex) and not isinstance(
        value, np.generic
    )
    array: Any = None
    if isinstance(value, list | tuple):
        leaves = jax.tree.leaves(value)
        weak = all(type(x) in (bool, int, float, complex) for x in leaves)
        convert = (
            jnp.asarray if any(isinstance(x, jax.Array) for x in leaves) else (np.asarray)
        )
        try:
            array = convert(value)
        except (TypeError, ValueError) as error:
            raise ResultError(
                f"{where()}: expected an array, got a {type(value).__name__} that does "
                f"not make one ({error})."
            ) from error
    elif weak or isinstance(value, np.ndarray | np.generic) or hasattr(value, "__array__"):
        array = np.asarray(value)
    if array is None or kind_of(array.dtype) is None:
        got = _type_name(value)
        if array is not None:
            got += f" of dtype {array.dtype}"
        raise ResultError(
            f"{where()}: expected an array of numbers or booleans, got {got}. Return "
            "arrays, Python scalars or lists of them."
        )
    return array, weak
