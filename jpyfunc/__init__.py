"""Ordinary Python, run eagerly and differentiably from inside compiled JAX."""

from jpyfunc._errors import ExecutorError as ExecutorError
from jpyfunc._errors import GradientCutWarning as GradientCutWarning
from jpyfunc._errors import InferenceError as InferenceError
from jpyfunc._errors import NotDifferentiableError as NotDifferentiableError
from jpyfunc._errors import PyFuncError as PyFuncError
from jpyfunc._errors import ResultError as ResultError
from jpyfunc._errors import TapeLostError as TapeLostError
from jpyfunc._errors import UnsupportedError as UnsupportedError
from jpyfunc._explain import explain as explain
from jpyfunc._py_func import numpy_func as numpy_func
from jpyfunc._py_func import py_func as py_func
from jpyfunc._range import range as range
from jpyfunc._runtime.profile import profile as profile
from jpyfunc._runtime.progress import progress as progress
from jpyfunc._runtime.raise_original import raise_original as raise_original
from jpyfunc._runtime.tape_cache import set_tape_limit as set_tape_limit
from jpyfunc._runtime.tape_cache import tape_bytes as tape_bytes

__version__ = "0.4.1"
