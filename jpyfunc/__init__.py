"""Ordinary Python, run eagerly and differentiably from inside compiled JAX."""

from jpyfunc import numpy as numpy
from jpyfunc._api import numpy_func as numpy_func
from jpyfunc._api import py_func as py_func
from jpyfunc._errors import GradientCutWarning as GradientCutWarning
from jpyfunc._errors import InferenceError as InferenceError
from jpyfunc._errors import NotDifferentiableError as NotDifferentiableError
from jpyfunc._errors import PyFuncError as PyFuncError
from jpyfunc._errors import ResultError as ResultError
from jpyfunc._errors import TapeLostError as TapeLostError
from jpyfunc._errors import UnsupportedError as UnsupportedError
from jpyfunc._explain import explain as explain
from jpyfunc._failures import raise_original as raise_original
from jpyfunc._host.kept import set_tape_limit as set_tape_limit
from jpyfunc._host.kept import tape_bytes as tape_bytes
from jpyfunc._host.profile import profile as profile
from jpyfunc._session.gradients import gradients as gradients
from jpyfunc._session.graph import Graph as Graph
from jpyfunc._session.graph import get_default_graph as get_default_graph
from jpyfunc._session.graph import name_scope as name_scope
from jpyfunc._session.graph import reset_default_graph as reset_default_graph
from jpyfunc._session.nodes import Operation as Operation
from jpyfunc._session.nodes import Tensor as Tensor
from jpyfunc._session.ops import constant as constant
from jpyfunc._session.ops import lift as lift
from jpyfunc._session.ops import placeholder as placeholder
from jpyfunc._session.ops import placeholder_with_default as placeholder_with_default
from jpyfunc._session.run import InteractiveSession as InteractiveSession
from jpyfunc._session.run import Session as Session
from jpyfunc._session.stacks import get_default_session as get_default_session

__version__ = "0.4.1"
