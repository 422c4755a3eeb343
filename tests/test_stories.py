"""CONTRIBUTING's three stories are what calls really go through."""

import functools
import json
import re
from pathlib import Path

import pytest
from programs import run_program

ROOT = Path(__file__).parent.parent

# Prints every function of the package that a call runs, in order of its first frame, with
# the function that called it where that is of the package, too. JAX's caches are emptied
# first, so that the call is traced, compiled and run; what our own caches know is known.
TRACED = """
import json, sys, threading
import jax, jax.numpy as jnp
import jpyfunc

@jpyfunc.py_func(Tout=jax.ShapeDtypeStruct((), jnp.float32))
def log_huber(x, m):
    if jnp.abs(x) <= m:
        return x**2
    return m**2 * (1 - 2 * jnp.log(m) + jnp.log(x**2))

xs = jnp.linspace(-3.0, 3.0, 10)
call = {
    "forward": lambda: jax.jit(log_huber)(1.0, 2.0),
    "gradient": lambda: jax.jit(jax.grad(log_huber))(1.0, 2.0),
    "batch": lambda: jax.jit(jax.vmap(log_huber, (0, None)))(xs, 2.0),
}[STORY]
root = jpyfunc.__path__[0] + "/"
met = {}

def name(frame):
    file = frame.f_code.co_filename
    if not file.startswith(root):
        return None
    return file.removeprefix(root).removesuffix(".py"), frame.f_code.co_qualname

def hook(frame, event, arg):
    function = name(frame) if event == "call" else None
    if function and "<" not in function[1].replace("<locals>", ""):
        met.setdefault(function, set()).add(name(frame.f_back))

jax.block_until_ready(call())
jax.clear_caches()
threading.setprofile(hook)
sys.setprofile(hook)
jax.block_until_ready(call())
sys.setprofile(None)
threading.setprofile(None)
print(json.dumps([[*f, [c[0] for c in callers if c]] for f, callers in met.items()]))
"""


def rows_below(heading: str) -> list[list[str]]:
    """The rows of the first code block below a heading of CONTRIBUTING, in two cells."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = re.search(rf"\n#+ {re.escape(heading)}\n.*?```\n(.*?)```", text, re.DOTALL)
    assert block, heading
    return [line.split(maxsplit=1) for line in block[1].splitlines() if line.strip()]


def subpackage(module: str) -> str:
    """The subpackage of a module, or the module itself if it is in none."""
    return module.partition("/")[0]


STORIES = {
    "forward": "A forward call",
    "gradient": "A gradient",
    "batch": "A batch that splits",
}


@functools.cache
def traced(name: str) -> list[tuple[str, str, list[str]]]:
    """Each module and function that the call of a story goes through, and its callers."""
    out = run_program(f"STORY = {name!r}\n{TRACED}", limit=120)
    return json.loads(out.splitlines()[-1])


@pytest.fixture(params=STORIES)
def story(request):
    """What a story tells, and what the call went through."""
    return rows_below(STORIES[request.param]), traced(request.param)


def test_functions_are_met_in_the_order_told(story):
    rows, met = story
    places = {(module, function): i for i, (module, function, _) in enumerate(met)}
    told = [(module, name) for module, names in rows for name in names.split(", ")]
    assert [each for each in told if each not in places] == []
    assert told == sorted(told, key=places.__getitem__)


def test_no_module_is_left_out(story):
    rows, met = story
    told = {module for module, _ in rows}
    asked = {module for (module,) in rows_below("Asked along the way")}
    assert {module for module, _, _ in met} <= told | asked


# Where a function is given down to be called there.
GIVEN_DOWN = {
    ("_compat", "_primitive"),  # the rules of the primitive
    ("_runtime", "_primitive"),  # a host call, measured for profiles
    ("_runtime", "_bodies"),  # a body, timed for profiles
    ("_runtime", "_interpreters"),  # a tape, which knows its arrays
    ("_interpreters", "_bodies"),  # a body, run on a tape or by branch
}


def test_calls_go_down(story):
    _, met = story
    above = [row[0] for row in rows_below("Layout")]
    climbs = {
        (subpackage(caller), subpackage(module))
        for module, _, callers in met
        for caller in callers
        if above.index(subpackage(caller)) > above.index(subpackage(module))
    }
    assert climbs <= GIVEN_DOWN


def test_every_module_that_is_asked_is_met():
    met = {module for name in STORIES for module, _, _ in traced(name)}
    assert {module for (module,) in rows_below("Asked along the way")} <= met
