"""Ordinary Python, run eagerly and differentiably from inside compiled JAX."""

from jpyfunc import _rules as _rules
from jpyfunc._api import numpy_func as numpy_func
from jpyfunc._api import py_func as py_func
from jpyfunc._errors import InferenceError as InferenceError
from jpyfunc._errors import NotDifferentiableError as NotDifferentiableError
from jpyfunc._errors import PyFuncError as PyFuncError
from jpyfunc._errors import ResultError as ResultError
from jpyfunc._errors import UnsupportedError as UnsupportedError
from jpyfunc._errors import raise_original as raise_original

__version__ = "0.1.0"
