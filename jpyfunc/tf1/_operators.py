"""Python operators of graph tensors, and the conversions that raise."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NoReturn

from jpyfunc._errors import see
from jpyfunc._graph_tensor import GraphTensor
from jpyfunc.tf1._apply import apply


def _binary(func: Callable[[Any, Any], Any], name: str) -> Any:
    def method(self: Any, other: Any) -> Any:
        return apply(func, (self, other), {}, name)

    return method


def _reflected(func: Callable[[Any, Any], Any], name: str) -> Any:
    def method(self: Any, other: Any) -> Any:
        return apply(func, (other, self), {}, name)

    return method


def _unary(func: Callable[[Any], Any], name: str) -> Any:
    def method(self: Any) -> Any:
        return apply(func, (self,), {}, name)

    return method


def _refused(conversion: str) -> Any:
    def method(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(
            f"{conversion} of graph tensor {self.name!r}: it has no value while the graph "
            "is built. Do this in a py_func, which is called with values, or compute the "
            "value first: session.run(tensor)." + see("A tensor that is used as a value")
        )

    return method


class Operators(GraphTensor):
    """Mixin with the operators of `jax.Array`, except that `==` and `!=` compare identity.

    Identity, because tensors are keys of feed dictionaries; `tf.equal` compares values.
    """

    __slots__ = ()

    # NumPy's operators then leave `array + tensor` to the tensor.
    __array_ufunc__ = None

    __add__ = _binary(operator.add, "add")
    __sub__ = _binary(operator.sub, "sub")
    __mul__ = _binary(operator.mul, "mul")
    __truediv__ = _binary(operator.truediv, "truediv")
    __floordiv__ = _binary(operator.floordiv, "floordiv")
    __mod__ = _binary(operator.mod, "mod")
    __pow__ = _binary(operator.pow, "pow")
    __matmul__ = _binary(operator.matmul, "matmul")
    __and__ = _binary(operator.and_, "and")
    __or__ = _binary(operator.or_, "or")
    __xor__ = _binary(operator.xor, "xor")
    __lshift__ = _binary(operator.lshift, "lshift")
    __rshift__ = _binary(operator.rshift, "rshift")
    __divmod__ = _binary(divmod, "divmod")

    __radd__ = _reflected(operator.add, "add")
    __rsub__ = _reflected(operator.sub, "sub")
    __rmul__ = _reflected(operator.mul, "mul")
    __rtruediv__ = _reflected(operator.truediv, "truediv")
    __rfloordiv__ = _reflected(operator.floordiv, "floordiv")
    __rmod__ = _reflected(operator.mod, "mod")
    __rpow__ = _reflected(operator.pow, "pow")
    __rmatmul__ = _reflected(operator.matmul, "matmul")
    __rand__ = _reflected(operator.and_, "and")
    __ror__ = _reflected(operator.or_, "or")
    __rxor__ = _reflected(operator.xor, "xor")
    __rlshift__ = _reflected(operator.lshift, "lshift")
    __rrshift__ = _reflected(operator.rshift, "rshift")
    __rdivmod__ = _reflected(divmod, "divmod")

    __lt__ = _binary(operator.lt, "less")
    __le__ = _binary(operator.le, "less_equal")
    __gt__ = _binary(operator.gt, "greater")
    __ge__ = _binary(operator.ge, "greater_equal")

    __neg__ = _unary(operator.neg, "neg")
    __pos__ = _unary(operator.pos, "pos")
    __abs__ = _unary(operator.abs, "abs")
    __invert__ = _unary(operator.invert, "invert")
    __getitem__ = _binary(operator.getitem, "getitem")

    __bool__ = _refused("bool()")
    __float__ = _refused("float()")
    __int__ = _refused("int()")
    __complex__ = _refused("complex()")
    __index__ = _refused("use as an index or a size")
    __len__ = _refused("len()")
    __iter__ = _refused("iteration")
    __contains__ = _refused("`in`")
    __array__ = _refused("conversion to NumPy")
