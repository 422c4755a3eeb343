"""TensorFlow 1's names for programs of graphs and sessions: `import jpyfunc.tf1 as tf`.

A graph records calls. A session lowers the part of it that a run needs to one function of
the feeds, which it compiles with `jax.jit` and caches. Functions such as `tf.abs` add nodes
when they are called on tensors; called on arrays, as in the body of a
`tf.contrib.eager.py_func`, they are functions of JAX. `tf.lift` makes any function of JAX
accept tensors, and `tf.numpy` is all of `jax.numpy`.
"""

from typing import NoReturn as _NoReturn

from jpyfunc._errors import see as _see
from jpyfunc.tf1 import contrib as contrib
from jpyfunc.tf1 import math as math
from jpyfunc.tf1 import nn as nn
from jpyfunc.tf1 import numpy as numpy
from jpyfunc.tf1._arrays import broadcast_to as broadcast_to
from jpyfunc.tf1._arrays import cast as cast
from jpyfunc.tf1._arrays import concat as concat
from jpyfunc.tf1._arrays import convert_to_tensor as convert_to_tensor
from jpyfunc.tf1._arrays import expand_dims as expand_dims
from jpyfunc.tf1._arrays import eye as eye
from jpyfunc.tf1._arrays import fill as fill
from jpyfunc.tf1._arrays import gather as gather
from jpyfunc.tf1._arrays import gather_nd as gather_nd
from jpyfunc.tf1._arrays import identity as identity
from jpyfunc.tf1._arrays import linspace as linspace
from jpyfunc.tf1._arrays import meshgrid as meshgrid
from jpyfunc.tf1._arrays import one_hot as one_hot
from jpyfunc.tf1._arrays import ones as ones
from jpyfunc.tf1._arrays import ones_like as ones_like
from jpyfunc.tf1._arrays import pad as pad
from jpyfunc.tf1._arrays import range as range
from jpyfunc.tf1._arrays import rank as rank
from jpyfunc.tf1._arrays import reshape as reshape
from jpyfunc.tf1._arrays import reverse as reverse
from jpyfunc.tf1._arrays import shape as shape
from jpyfunc.tf1._arrays import size as size
from jpyfunc.tf1._arrays import slice as slice
from jpyfunc.tf1._arrays import split as split
from jpyfunc.tf1._arrays import squeeze as squeeze
from jpyfunc.tf1._arrays import stack as stack
from jpyfunc.tf1._arrays import stop_gradient as stop_gradient
from jpyfunc.tf1._arrays import tile as tile
from jpyfunc.tf1._arrays import to_float as to_float
from jpyfunc.tf1._arrays import to_int32 as to_int32
from jpyfunc.tf1._arrays import transpose as transpose
from jpyfunc.tf1._arrays import unstack as unstack
from jpyfunc.tf1._arrays import where as where
from jpyfunc.tf1._arrays import zeros as zeros
from jpyfunc.tf1._arrays import zeros_like as zeros_like
from jpyfunc.tf1._defaults import get_default_session as get_default_session
from jpyfunc.tf1._dtypes import bfloat16 as bfloat16
from jpyfunc.tf1._dtypes import bool as bool
from jpyfunc.tf1._dtypes import complex64 as complex64
from jpyfunc.tf1._dtypes import complex128 as complex128
from jpyfunc.tf1._dtypes import double as double
from jpyfunc.tf1._dtypes import float16 as float16
from jpyfunc.tf1._dtypes import float32 as float32
from jpyfunc.tf1._dtypes import float64 as float64
from jpyfunc.tf1._dtypes import half as half
from jpyfunc.tf1._dtypes import int8 as int8
from jpyfunc.tf1._dtypes import int16 as int16
from jpyfunc.tf1._dtypes import int32 as int32
from jpyfunc.tf1._dtypes import int64 as int64
from jpyfunc.tf1._dtypes import uint8 as uint8
from jpyfunc.tf1._dtypes import uint16 as uint16
from jpyfunc.tf1._dtypes import uint32 as uint32
from jpyfunc.tf1._dtypes import uint64 as uint64
from jpyfunc.tf1._gradients import gradients as gradients
from jpyfunc.tf1._graph import Graph as Graph
from jpyfunc.tf1._graph import get_default_graph as get_default_graph
from jpyfunc.tf1._graph import name_scope as name_scope
from jpyfunc.tf1._graph import reset_default_graph as reset_default_graph
from jpyfunc.tf1._lift import lift as lift
from jpyfunc.tf1._nodes import Operation as Operation
from jpyfunc.tf1._nodes import Tensor as Tensor
from jpyfunc.tf1._script_ops import py_func as py_func
from jpyfunc.tf1._session import InteractiveSession as InteractiveSession
from jpyfunc.tf1._session import Session as Session
from jpyfunc.tf1._sources import constant as constant
from jpyfunc.tf1._sources import placeholder as placeholder
from jpyfunc.tf1._sources import placeholder_with_default as placeholder_with_default
from jpyfunc.tf1.math import abs as abs
from jpyfunc.tf1.math import acos as acos
from jpyfunc.tf1.math import acosh as acosh
from jpyfunc.tf1.math import add as add
from jpyfunc.tf1.math import add_n as add_n
from jpyfunc.tf1.math import angle as angle
from jpyfunc.tf1.math import argmax as argmax
from jpyfunc.tf1.math import argmin as argmin
from jpyfunc.tf1.math import asin as asin
from jpyfunc.tf1.math import asinh as asinh
from jpyfunc.tf1.math import atan as atan
from jpyfunc.tf1.math import atan2 as atan2
from jpyfunc.tf1.math import atanh as atanh
from jpyfunc.tf1.math import ceil as ceil
from jpyfunc.tf1.math import clip_by_value as clip_by_value
from jpyfunc.tf1.math import complex as complex
from jpyfunc.tf1.math import conj as conj
from jpyfunc.tf1.math import cos as cos
from jpyfunc.tf1.math import cosh as cosh
from jpyfunc.tf1.math import cumprod as cumprod
from jpyfunc.tf1.math import cumsum as cumsum
from jpyfunc.tf1.math import digamma as digamma
from jpyfunc.tf1.math import div as div
from jpyfunc.tf1.math import divide as divide
from jpyfunc.tf1.math import einsum as einsum
from jpyfunc.tf1.math import equal as equal
from jpyfunc.tf1.math import erf as erf
from jpyfunc.tf1.math import erfc as erfc
from jpyfunc.tf1.math import exp as exp
from jpyfunc.tf1.math import expm1 as expm1
from jpyfunc.tf1.math import floor as floor
from jpyfunc.tf1.math import floordiv as floordiv
from jpyfunc.tf1.math import floormod as floormod
from jpyfunc.tf1.math import greater as greater
from jpyfunc.tf1.math import greater_equal as greater_equal
from jpyfunc.tf1.math import imag as imag
from jpyfunc.tf1.math import is_finite as is_finite
from jpyfunc.tf1.math import is_inf as is_inf
from jpyfunc.tf1.math import is_nan as is_nan
from jpyfunc.tf1.math import less as less
from jpyfunc.tf1.math import less_equal as less_equal
from jpyfunc.tf1.math import lgamma as lgamma
from jpyfunc.tf1.math import log as log
from jpyfunc.tf1.math import log1p as log1p
from jpyfunc.tf1.math import log_sigmoid as log_sigmoid
from jpyfunc.tf1.math import logical_and as logical_and
from jpyfunc.tf1.math import logical_not as logical_not
from jpyfunc.tf1.math import logical_or as logical_or
from jpyfunc.tf1.math import logical_xor as logical_xor
from jpyfunc.tf1.math import matmul as matmul
from jpyfunc.tf1.math import maximum as maximum
from jpyfunc.tf1.math import minimum as minimum
from jpyfunc.tf1.math import mod as mod
from jpyfunc.tf1.math import multiply as multiply
from jpyfunc.tf1.math import negative as negative
from jpyfunc.tf1.math import norm as norm
from jpyfunc.tf1.math import not_equal as not_equal
from jpyfunc.tf1.math import pow as pow
from jpyfunc.tf1.math import real as real
from jpyfunc.tf1.math import reciprocal as reciprocal
from jpyfunc.tf1.math import reduce_all as reduce_all
from jpyfunc.tf1.math import reduce_any as reduce_any
from jpyfunc.tf1.math import reduce_logsumexp as reduce_logsumexp
from jpyfunc.tf1.math import reduce_max as reduce_max
from jpyfunc.tf1.math import reduce_mean as reduce_mean
from jpyfunc.tf1.math import reduce_min as reduce_min
from jpyfunc.tf1.math import reduce_prod as reduce_prod
from jpyfunc.tf1.math import reduce_sum as reduce_sum
from jpyfunc.tf1.math import rint as rint
from jpyfunc.tf1.math import round as round
from jpyfunc.tf1.math import rsqrt as rsqrt
from jpyfunc.tf1.math import sigmoid as sigmoid
from jpyfunc.tf1.math import sign as sign
from jpyfunc.tf1.math import sin as sin
from jpyfunc.tf1.math import sinh as sinh
from jpyfunc.tf1.math import softplus as softplus
from jpyfunc.tf1.math import softsign as softsign
from jpyfunc.tf1.math import sqrt as sqrt
from jpyfunc.tf1.math import square as square
from jpyfunc.tf1.math import squared_difference as squared_difference
from jpyfunc.tf1.math import subtract as subtract
from jpyfunc.tf1.math import tan as tan
from jpyfunc.tf1.math import tanh as tanh
from jpyfunc.tf1.math import tensordot as tensordot
from jpyfunc.tf1.math import truediv as truediv


def __getattr__(name: str) -> _NoReturn:
    raise AttributeError(
        f"jpyfunc.tf1 has no {name!r}. tf.numpy has all of jax.numpy, and tf.lift(func) "
        "makes a function of JAX accept tensors. State, such as variables, is fed."
        + _see("A name that jpyfunc.tf1 lacks")
    )
