"""`Tout`: what a call declares that its body returns, and the check of what it did."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpyfunc._errors import ResultError

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
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

    def __repr__(self) -> str:
        dtype = dtype_source(self.dtype)
        return (
            dtype if self.shape is None else f"jax.ShapeDtypeStruct({self.shape}, {dtype})"
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Template:
    """A parsed `Tout`: the structure of the results and what is declared of each."""

    tree: Any  # PyTreeDef
    leaves: tuple[Leaf, ...]

    @classmethod
    def undeclared(cls, result: Any, name: str) -> Template:
        """The structure of `result`, with nothing declared of its leaves."""
        tree = _flatten(result, name)[1]
        return cls(tree, (Leaf(None, None),) * tree.num_leaves)

    def __str__(self) -> str:
        try:
            return repr(jax.tree.unflatten(self.tree, self.leaves))
        except Exception:  # noqa: BLE001 - a user's class may read what no leaf has here
            return str(self.tree)

    @property
    def complete(self) -> bool:
        """Whether every shape and dtype is declared, so that nothing is inferred."""
        return all(
            leaf.shape is not None and leaf.dtype is not None for leaf in self.leaves
        )

    def path(self, index: int) -> str:
        """How to reach result `index` in what the body returns, as `result[0]['a']`."""
        return f"result{jax.tree_util.keystr(key_path(self.tree, index))}"

    def match(self, result: Any, name: str) -> list[Any]:
        """The leaves of `result`, which must have this structure.

        Lists and tuples stand for each other, as in `tf.py_function`.

        Raises:
            ResultError: the structures differ.
        """
        if _is_leaf(self.tree):
            return [result]
        leaves, tree = _flatten(result, name)
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

    def replace_shapes(self, shapes: Sequence[Shape | None]) -> Template:
        """The same template with other shapes, one per leaf."""
        return Template(
            self.tree,
            tuple(
                dataclasses.replace(leaf, shape=shape)
                for leaf, shape in zip(self.leaves, shapes, strict=True)
            ),
        )


def _flatten(result: Any, name: str) -> tuple[list[Any], Any]:
    try:
        return jax.tree.flatten(result)
    except ValueError as error:
        raise ResultError(
            f"{name}: JAX does not take its result apart: {why_no_pytree(error)}."
        ) from error


def why_no_pytree(error: ValueError) -> str:
    """What is wrong with a pytree that JAX does not flatten, and what to write."""
    if "dictionary keys" in str(error):
        return (
            "the keys of a dict are not of one kind, and have no order. Use strings, or "
            "integers, alone"
        )
    return str(error).rstrip(".")


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


def key_path(tree: Any, index: int) -> tuple[Any, ...]:
    """The keys that lead to leaf `index` of a tree."""
    try:
        numbered = jax.tree.unflatten(tree, range(tree.num_leaves))
        return jax.tree_util.tree_flatten_with_path(numbered)[0][index][0]
    except Exception:  # noqa: BLE001 - a user's class may refuse what is no array
        return (jax.tree_util.FlattenedIndexKey(index),)


def is_function(tout: Any) -> bool:
    """Whether a `Tout` is a function of the arguments, which is to be called.

    A callable pytree, such as an equinox module, declares results like itself if it has a
    leaf that declares one. JAX takes some functions for pytrees, too: partials, methods and
    wrapped functions of equinox. Their arrays are bound arguments.
    """
    # A class is no such function: it is a dtype, or a mistake.
    if not callable(tout) or isinstance(tout, type) or is_dtype(tout):
        return False
    if isinstance(tout, functools.partial) or jax.tree_util.all_leaves([tout]):
        return True
    if hasattr(tout, "__func__") or hasattr(tout, "__wrapped__"):
        return True
    return not any(is_dtype(x) or _is_like_array(x) for x in jax.tree.leaves(tout))


def _is_like_array(leaf: Any) -> bool:
    """Whether a leaf declares a shape and a dtype."""
    shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
    return not isinstance(leaf, type) and shape is not None and dtype is not None


def is_dtype(value: Any) -> bool:
    """Whether `value` names a dtype."""
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
        )
    return Leaf(
        _parse_shape(leaf.shape, where), _parse_dtype(leaf.dtype, where), is_weak(leaf)
    )


_NO_SIZES = (type(None), str, float, np.inexact, np.ndarray, jax.Array)


def _parse_shape(shape: Any, where: str) -> Shape:
    sizes = tuple(shape) if isinstance(shape, list | tuple) else (shape,)
    for size in sizes:
        is_negative = isinstance(size, int | np.integer) and size < 0
        # Not all but integers, because `jax.export` has symbolic sizes.
        if is_negative or isinstance(size, _NO_SIZES):
            raise TypeError(
                f"{where}: expected a shape of integers that are 0 or more, got {shape!r}; "
                "write jax.ShapeDtypeStruct((3,), jnp.float32), for example, or a dtype, "
                "if the shape is to be inferred."
            )
    return sizes


def _parse_dtype(dtype: Any, where: str) -> Any:
    if is_key_dtype(dtype):
        return dtype
    if dtype is int or dtype is float or dtype is complex:  # as jnp.zeros reads them
        return jax.dtypes.canonicalize_dtype(dtype)
    dtype = np.dtype(dtype)
    if kind_of(dtype) is None or dtype in _NUMPY_ONLY:
        raise TypeError(
            f"{where}: expected a dtype that JAX has arrays of, got {dtype}; "
            "write jnp.float32, jnp.int32 or jnp.bool_, for example."
        )
    return dtype


def check_x64(template: Template, name: str) -> None:
    """Refuse 64-bit results while they are off, as `jax.pure_callback` does.

    Raises:
        ValueError: a dtype needs `jax_enable_x64`.
    """
    for i, leaf in enumerate(template.leaves):
        if leaf.dtype is None or leaf.is_key:
            continue
        available = jax.dtypes.canonicalize_dtype(leaf.dtype)
        if available != leaf.dtype:
            raise ValueError(
                f"{name}: {template.path(i)} is declared {leaf.dtype}, which needs 64-bit "
                f"types, and jax_enable_x64 is off; declare {dtype_source(available)} in "
                "Tout, or call it under jax.enable_x64(True)."
            )


def is_key_dtype(dtype: Any) -> bool:
    """Whether `dtype` is that of typed PRNG keys."""
    # `jnp.issubdtype` would raise for what is no dtype, and is on the way of every call.
    return getattr(dtype, "type", None) is jax.dtypes.prng_key


def is_weak(array: Any) -> bool:
    """Whether an array, or what stands for one, is weakly typed; PRNG keys never are."""
    return bool(getattr(array, "weak_type", False))


def dtype_source(dtype: Any) -> str:
    """How to write `dtype` in a program, for errors."""
    return "jax.random.key(0).dtype" if is_key_dtype(dtype) else f"jnp.{dtype}"


_KINDS = (
    (np.bool_, "b"),
    (np.unsignedinteger, "u"),
    (np.signedinteger, "i"),
    (np.floating, "f"),
    (np.complexfloating, "c"),
)
# Wider than any dtype of JAX, except where they are names of the same width.
_NUMPY_ONLY = {np.dtype(t) for t in "gG"} - {np.dtype(t) for t in "dD"}


def kind_of(dtype: Any) -> str | None:
    """`'b'`, `'u'`, `'i'`, `'f'` or `'c'`; None for what JAX has no arrays of.

    `np.dtype.kind` is `'V'` for bfloat16, the float8s and int4.
    """
    for parent, kind in _KINDS:
        if jnp.issubdtype(dtype, parent):
            return kind
    return None


def castable(array: Any, weak: bool, target_dtype: Any) -> bool:
    """NumPy's `same_kind` rule, for ml_dtypes too, and for what Python has no types of."""
    source, target = kind_of(array.dtype), kind_of(target_dtype)
    if source is None or target is None:
        return False
    # A Python int has no sign as a type, and an empty list no type at all.
    if weak and ((source, target) == ("i", "u") or not array.size):
        return True
    return is_same_kind(source, target)


def is_same_kind(source: str, target: str) -> bool:
    """Whether NumPy's `same_kind` rule converts one result of `kind_of` to another."""
    order = "buifc"
    return order.index(source) <= order.index(target)


def _is_leaf(tree: Any) -> bool:
    # `jax.tree_util.treedef_is_leaf` takes an empty list for one.
    return tree.num_nodes == 1 and tree.num_leaves == 1


def _is_nothing(tree: Any) -> bool:
    """Whether a tree is None or an empty container; an object may have static fields."""
    if tree.num_nodes != 1 or tree.num_leaves:
        return False
    kind, _ = tree.node_data()
    return issubclass(kind, type(None) | list | tuple | dict)


def _match(tree: Any, result: Any, path: str, name: str) -> list[Any]:
    if _is_leaf(tree):
        return [result]
    if _is_nothing(tree):
        if _is_nothing(jax.tree.structure(result)):
            return []
        raise _structure_error(name, path, "nothing", _describe(result))
    kind, children = tree.node_data(), tree.children()
    parts, top = jax.tree_util.tree_flatten_with_path(
        result, is_leaf=lambda x: x is not result
    )
    got = _describe(result)
    if kind[0] in (list, tuple):
        if len(children) == 1 and _is_one(result):
            return _match(children[0], result, path, name)  # as TensorFlow takes it
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
            got = f"one of another class {kind[0].__name__}, such as one defined again"
    if not same:
        raise _structure_error(name, path, expected, got)
    return [
        leaf
        for (key, part), child in zip(parts, children, strict=True)
        for leaf in _match(child, part, path + jax.tree_util.keystr(key), name)
    ]


def _static_differences(tree: Any, result: Any, top: Any) -> tuple[str, str]:
    """What the static fields are in which the declared object and a result differ."""
    name = type(result).__name__
    dynamic = object()
    try:
        declared = jax.tree.unflatten(tree, [dynamic] * tree.num_leaves)
        fields = {}
        for key in _field_names(result):
            pair = getattr(declared, key), getattr(result, key)
            if dynamic not in jax.tree.leaves(pair[0]) and bool(pair[0] != pair[1]):
                fields[key] = pair
    except Exception:  # noqa: BLE001 - a user's class may refuse what is no array
        fields = {}
    if not fields:
        fields = {"static data": (tree.node_data()[1], top.node_data()[1])}
    expected, got = (
        ", ".join(f"{key}={pair[i]!r}" for key, pair in fields.items()) for i in (0, 1)
    )
    return f"{name} with {expected}", f"{name} with {got}"


def _field_names(value: Any) -> list[str]:
    if dataclasses.is_dataclass(value):
        return [field.name for field in dataclasses.fields(value)]
    slots = [
        name for base in type(value).__mro__ for name in vars(base).get("__slots__", ())
    ]
    return [*slots, *getattr(value, "__dict__", {})]


def _is_one(result: Any) -> bool:
    """Whether a result is an array, or what stands for one that is no list."""
    return isinstance(result, bool | int | float | complex) or hasattr(result, "dtype")


def _keys(kind: Any) -> list[Any]:
    """The keys of a `dict` or a class derived of it, in the order of its leaves."""
    if issubclass(kind[0], defaultdict):
        return list(kind[1][1])  # what makes the default comes first
    return list(kind[1])


def _structure_error(name: str, path: str, expected: str, got: str) -> ResultError:
    inferred = ", or leave Tout out, to infer it" if expected == "nothing" else ""
    return ResultError(
        f"{name}: result{path}: expected {expected}, got {got}. Return the "
        f"one, or declare the other in Tout{inferred}."
    )


def _describe(value: Any) -> str:
    """What `value` is, for errors."""
    if value is None:
        return "None"
    text = type(value).__name__
    if isinstance(value, dict):
        return f"{text} with keys {list(value)}"
    if isinstance(value, list | tuple):
        return f"{text} of {len(value)}"
    is_leaf = jax.tree_util.all_leaves([value])  # and no sparse array
    return f"array of dtype {value.dtype}" if is_leaf and hasattr(value, "dtype") else text


def _convert(value: Any, leaf: Leaf, where: Callable[[], str]) -> Any:
    """`value` as an array of the declared shape and dtype, if casting allows."""
    array, weak = as_array(value, where)
    if leaf.shape is not None and tuple(array.shape) != leaf.shape:
        parts = isinstance(value, list | tuple) and any(hasattr(x, "dtype") for x in value)
        made = f", of a {_describe(value)} arrays" if parts else ""
        raise ResultError(
            f"{where()}: expected shape {leaf.shape}, got {tuple(array.shape)}{made}. "
            "Return an array of that shape, or declare what is returned in Tout."
        )
    if leaf.dtype is None:
        return jnp.asarray(value if weak else array)
    if array.dtype == leaf.dtype:
        return array
    if not castable(array, weak, leaf.dtype):
        remedy = "" if leaf.is_key else f" with .astype({dtype_source(leaf.dtype)})"
        got = f"{array.dtype}, which casting of the same kind does not convert"
        if type(value) in (int, float, complex, bool):
            remedy, got = "", f"a Python {type(value).__name__}"
        raise ResultError(
            f"{where()}: expected {leaf.dtype}, got {got}. Convert it in the body{remedy}, "
            f"or declare {_available_source(array.dtype)} in Tout."
        )
    if isinstance(array, np.ndarray):
        _check_range(array, leaf.dtype, where)
    if isinstance(array, np.ndarray) and not np.can_cast(array.dtype, leaf.dtype, "unsafe"):
        array = jnp.asarray(array)  # NumPy lacks some casts between ml_dtypes
    return array.astype(leaf.dtype)


def _available_source(dtype: Any) -> str:
    """How to write `dtype`, or what JAX has for it while 64-bit types are off."""
    known = kind_of(dtype) is not None
    return dtype_source(jax.dtypes.canonicalize_dtype(dtype) if known else dtype)


def _check_range(array: np.ndarray, dtype: Any, where: Callable[[], str]) -> None:
    """Refuse integers that `dtype` has no room for, where NumPy would wrap its own."""
    for value in misfits(array, dtype):
        raise ResultError(
            f"{where()}: {value} does not fit in {dtype}. Declare a wider dtype in Tout."
        )


def misfits(array: Any, dtype: Any) -> list[int]:
    """The least and the greatest integer of an array that `dtype` has no room for."""
    if kind_of(dtype) not in ("u", "i") or array.dtype == np.bool_ or not array.size:
        return []
    limits = jnp.iinfo(dtype)
    ends = int(array.min()), int(array.max())
    return [n for n in ends if not int(limits.min) <= n <= int(limits.max)]


def _is_buffer(value: Any) -> bool:
    """Whether NumPy can read the memory of `value`, which is no array."""
    if isinstance(value, bytes | np.ndarray | np.generic) or hasattr(value, "__array__"):
        return False
    try:
        memoryview(value)
    except TypeError:
        return False
    return True


def _instead_of(value: Any) -> str:
    """What a body returns in place of what is no array."""
    if inspect.iscoroutine(value):
        value.close()  # or Python warns that nobody awaited it
        return "Run it in the body with asyncio.run, and return what it gives"
    if isinstance(value, Iterator):
        return "Return list(...) of it"
    return (
        "Return arrays, Python scalars or lists of them, or declare the structure that is "
        "returned in Tout"
    )


def as_array(value: Any, where: Callable[[], str]) -> tuple[Any, bool]:
    """`value` as a NumPy or JAX array, and whether its dtype is weak.

    Raises:
        ResultError: it is not an array of numbers, booleans or PRNG keys.
    """
    if not isinstance(value, jax.Array) and hasattr(value, "__jax_array__"):
        value = value.__jax_array__()
    if isinstance(value, jax.Array):
        return value, is_weak(value)
    if isinstance(value, np.ma.MaskedArray):
        raise ResultError(
            f"{where()}: expected an array, got a masked array, which JAX does not "
            "support. Return x.filled(value), or np.ma.getdata(x) and "
            "np.ma.getmaskarray(x)."
        )
    array, weak = None, False
    if isinstance(value, list | tuple):
        items = jax.tree.leaves(value, is_leaf=lambda x: x is None)
        weak = all(type(x) in (bool, int, float, complex) for x in items)
        stack = jnp.asarray if any(isinstance(x, jax.Array) for x in items) else np.asarray
        try:
            array = stack(value)
        except (TypeError, ValueError) as error:
            raise ResultError(
                f"{where()}: expected an array, got a {type(value).__name__} that does "
                f"not form one ({error}). Return arrays of one shape, or declare a list of "
                "results in Tout."
            ) from error
    elif isinstance(value, jax.Ref):
        raise ResultError(
            f"{where()}: expected an array, got a jax.Ref, valid only inside the body. "
            "Return what it holds: ref[...]."
        )
    elif _is_buffer(value):
        array = np.asarray(memoryview(value))
    elif isinstance(value, bool | int | float | complex) or hasattr(value, "__array__"):
        weak = not hasattr(value, "__array__")  # np.float64 is a float too
        array = np.asarray(value)
    if array is None or (kind_of(array.dtype) is None and not is_key_dtype(array.dtype)):
        if isinstance(value, int):
            raise ResultError(
                f"{where()}: expected an integer of at most 64 bits, got {value}. Return a "
                "float, or several integers."
            )
        if dataclasses.is_dataclass(value):
            raise ResultError(
                f"{where()}: expected an array, got the dataclass {_describe(value)}, "
                "which JAX does not take apart. Decorate it with "
                "jax.tree_util.register_dataclass."
            )
        raise ResultError(
            f"{where()}: expected an array of numbers or booleans, got {_describe(value)}. "
            f"{_instead_of(value)}."
        )
    return array, weak
