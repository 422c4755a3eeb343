"""Ordinary Python, run eagerly and differentiably from inside compiled JAX."""

from jpyfunc import _rules as _rules
from jpyfunc import numpy as numpy
from jpyfunc._api import numpy_func as numpy_func
from jpyfunc._api import py_func as py_func
from jpyfunc._errors import InferenceError as InferenceError
from jpyfunc._errors import NotDifferentiableError as NotDifferentiableError
from jpyfunc._errors import PyFuncError as PyFuncError
from jpyfunc._errors import ResultError as ResultError
from jpyfunc._errors import UnsupportedError as UnsupportedError
from jpyfunc._errors import raise_original as raise_original
from jpyfunc._profile import profile as profile
from jpyfunc._session._gradients import gradients as gradients
from jpyfunc._session._graph import Graph as Graph
from jpyfunc._session._graph import get_default_graph as get_default_graph
from jpyfunc._session._graph import name_scope as name_scope
from jpyfunc._session._graph import reset_default_graph as reset_default_graph
from jpyfunc._session._nodes import Operation as Operation
from jpyfunc._session._nodes import Tensor as Tensor
from jpyfunc._session._ops import constant as constant
from jpyfunc._session._ops import lift as lift
from jpyfunc._session._ops import placeholder as placeholder
from jpyfunc._session._ops import placeholder_with_default as placeholder_with_default
from jpyfunc._session._run import InteractiveSession as InteractiveSession
from jpyfunc._session._run import Session as Session
from jpyfunc._session._stacks import get_default_session as get_default_session

__version__ = "0.1.0"
