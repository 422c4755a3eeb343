"""From a call of a wrapped function to an eager run, a bind, or a staged program."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray, Tracer
from jax.extend.core import set_current_trace

from jpyfunc import _compat
from jpyfunc._arguments import (
    Arguments,
    has_value,
    is_array,
    is_float0,
    misfit,
    signature_of,
    static_leaf,
    unsharded_aval,
    with_arrays_traced,
)
from jpyfunc._bodies.primal import Primal
from jpyfunc._bodies.user_function import KeyLeaf, UserFunction, physical_aval, read_only
from jpyfunc._conversion import is_key_dtype, is_weak
from jpyfunc._errors import (
    InferenceError,
    ResultError,
    add_inner_jit_remedy,
    not_differentiable,
    refuse_partial,
    see,
)
from jpyfunc._hashable import ById, unwrapped
from jpyfunc._interpreters.eager_trace import runs_now
from jpyfunc._interpreters.tape_tracer import is_tape_tracer
from jpyfunc._limits import MAX_ABSTRACT_RUNS
from jpyfunc._mesh import align
from jpyfunc._options import Callee, not_by_branch, not_staged
from jpyfunc._primitive.primitive import Params, bind
from jpyfunc._runtime.configuration import current_config
from jpyfunc._runtime.context import Context, current, running_batch
from jpyfunc._runtime.profile import measured
from jpyfunc._runtime.transfers import allowed_transfers
from jpyfunc._staging.branch_tree import BranchTree
from jpyfunc._staging.closure import refuse_traced_closure
from jpyfunc._staging.emission import emit
from jpyfunc._staging.exploration import current_exploration, once_per_exploration
from jpyfunc._staging.fingerprint import fingerprint
from jpyfunc._staging.inference import infer
from jpyfunc._staging.staging import stage, warn_if_large
from jpyfunc._tout import Leaf, Template, check_x64, parse

# Exactly these types: subclasses, such as np.float64, have dtypes of their own.
_NUMBERS = (bool, int, float, complex)


def call(callee: Callee, arguments: Arguments) -> Any:
    """Call a function: eagerly if all its arguments have values, else by a bind."""
    leaves = arguments.leaves
    by_rule = callee.rules and any(map(is_tape_tracer, leaves))
    if runs_now() and not by_rule and all(map(has_value, leaves)):
        return _call_eagerly(callee, arguments)
    return _stage_out(callee, arguments)


def _call_eagerly(callee: Callee, arguments: Arguments) -> Any:
    """Call the function at once, with the checks that a bind makes."""
    if callee.is_host_function and any(map(is_tape_tracer, arguments.leaves)):
        raise not_differentiable(callee.label)
    batch = running_batch()
    if batch and callee.stateful:
        batch.refuse(f"{callee.label}, which is stateful")
    if callee.ordered:
        jax.effects_barrier()  # earlier ordered calls may be in flight
    arguments = arguments.converted(callee.label)
    row = (callee.name, callee.function, "forward")
    execute = functools.partial(_run, callee, arguments)
    return measured(row, current(), arguments.leaves, execute)


def _run(callee: Callee, arguments: Arguments, context: Context, _: object) -> Any:
    """Run the function on values, and return the results as `Tout` declares them."""
    label = callee.label
    template = _declared(callee, arguments)
    if callee.is_host_function:
        refuse_partial(arguments.leaves, label)
        # NumPy has no PRNG keys: they remain arrays of JAX.
        arguments = arguments.with_leaves(
            [
                read_only(x)
                if isinstance(x, jax.Array) and not is_key_dtype(x.dtype)
                else x
                for x in arguments.leaves
            ]
        )
    args, kwargs = arguments.unflatten()
    batch = running_batch()
    if batch and template is not None and not template.leaves:
        batch.refuse(f"{label}, which returns nothing")
    context.count(runs=1, elements=context.elements - 1)
    workers = callee.workers
    try:
        if workers is None or workers.are_around:
            result = context.timed(callee.name, callee.function, *args, **kwargs)
        else:
            context.count(elements=1)
            result = workers.call((callee.function, args, kwargs), label)
    except jax.errors.JAXTypeError as error:
        add_inner_jit_remedy(error, label)
        raise
    if template is None:
        template = Template.undeclared(result, label)
        if any(type(x) in _NUMBERS for x in jax.tree.leaves(result)):
            # Another branch may return an array there, whose dtype the number takes.
            template = _joined_over_branches(callee, arguments, template, result)
    if not template.leaves and batch:
        batch.refuse(f"{label}, which returns nothing")
    with allowed_transfers():
        outputs = [
            _to_result(x, leaf)
            for x, leaf in zip(template.check(result, label), template.leaves, strict=True)
        ]
    return jax.tree.unflatten(template.tree, outputs)


def _to_result(x: jax.Array | np.ndarray, leaf: Leaf) -> jax.Array:
    """Return a result as an array on the caller's device, strong if `leaf` is."""
    if is_weak(x) and not leaf.weak_type:
        return jnp.asarray(x, leaf.dtype)
    # `asarray` returns an array of JAX as it is, but takes 5 us, a third of an eager call.
    return x if isinstance(x, jax.Array) else jnp.asarray(x)


def _joined_over_branches(
    callee: Callee, arguments: Arguments, template: Template, result: Any
) -> Template:
    """Return `template` with the dtypes of results that are Python numbers.

    Under `jax.jit`, the dtype of a result is inferred from all branches of the body. An
    eager call takes one branch, and has to return the same dtype.
    """

    def inferred(traced: Arguments) -> Template:
        avals = [unsharded_aval(x) for x in traced.leaves if is_array(x)]
        try:
            return infer(_on_abstract_values(callee, traced), avals, None, callee.label)
        except (InferenceError, ResultError):
            return template

    found = with_arrays_traced(arguments, inferred)
    if found.tree != template.tree:
        return template
    joined = [
        b if type(x) in _NUMBERS and b.dtype not in (None, jnp.result_type(x)) else a
        for a, b, x in zip(
            template.leaves, found.leaves, jax.tree.leaves(result), strict=True
        )
    ]
    return replace(template, leaves=tuple(joined))


def _stage_out(callee: Callee, arguments: Arguments) -> Any:
    """Bind the primitive, or emit the operations of a body that is staged."""
    refuse_traced_closure(callee.function, callee.label)
    # The program runs later, and the caller may write to a NumPy array until then.
    arguments = arguments.copied()
    exploration = current_exploration()
    if callee.max_runs and not (exploration and exploration.shapes_only):
        template, results = _emit_tree(callee, arguments, is_nested=bool(exploration))
    else:
        operands = arguments.operands(callee.label)
        _check_signature(callee, arguments)
        template = _complete_template(callee, arguments, operands)
        results = _bind(callee, arguments, template, operands)
    return jax.tree.unflatten(template.tree, results)


def _complete_template(
    callee: Callee, arguments: Arguments, operands: Sequence[jax.Array]
) -> Template:
    """Return `Tout` for these arguments, with what it leaves open inferred."""
    template = _declared(callee, arguments)
    if template is not None and template.complete:
        return template
    template = once_per_exploration(
        lambda: _call_key(callee, arguments, template),
        lambda: infer(
            _on_abstract_values(callee, arguments),
            [*map(unsharded_aval, operands)],
            template,
            callee.label,
        ),
    )
    check_x64(template, callee.label)
    return template


def _emit_tree(
    callee: Callee, arguments: Arguments, is_nested: bool
) -> tuple[Template, list[jax.Array]]:
    """Emit the branches of a body, with calls on the paths that cannot be traced.

    Args:
        callee: what is called.
        arguments: of the call.
        is_nested: whether a body that is being explored makes the call.

    Returns:
        The structure of the results, and the results, flat.
    """
    tree, operands = _explore(callee, arguments)
    template = tree.result
    if not isinstance(template, Template):
        raise template
    check_x64(template, callee.label)
    if not template.leaves:
        raise not_staged(callee.label, "returns nothing, which makes it stateful")
    warn_if_large(tree, callee.label)

    def program(*operands: jax.Array) -> list[jax.Array]:
        return emit(
            tree,
            template,
            operands,
            lambda needed: _bind(callee, arguments, template, operands, needed),
        )

    if is_nested:  # one operation, traced once for all paths of the calling body
        program = once_per_exploration(lambda: ById(tree), lambda: jax.jit(program))
    return template, program(*operands)


def branch_tree(callee: Callee, arguments: Arguments) -> BranchTree:
    """Return the tree of branches of a body, on arguments that need not have data.

    Args:
        callee: the function.
        arguments: a `jax.ShapeDtypeStruct` among them stands for an array.
    """
    return with_arrays_traced(arguments, lambda traced: _explore(callee, traced)[0])


def _explore(
    callee: Callee, arguments: Arguments
) -> tuple[BranchTree, Sequence[jax.Array]]:
    """Trace the branches of a body.

    Operands that vary over different mesh axes are aligned before the body is traced, not
    where it uses them. The alignment is `pvary`, whose transpose is a sum over shards, in
    which all shards have to take part: inside a branch, the sum would miss the shards that
    take the other one, or wait for them forever.

    Returns:
        The tree, and the operands to emit it with.
    """
    _check_signature(callee, arguments)
    operands = align(arguments.operands(callee.label))
    template = _declared(callee, arguments)
    tree = once_per_exploration(
        lambda: _call_key(callee, arguments, template),
        lambda: stage(
            _on_abstract_values(callee, arguments),
            [jax.typeof(x) for x in operands],
            template,
            callee.label,
            callee.max_runs or MAX_ABSTRACT_RUNS,
        ),
    )
    return tree, operands


def _call_key(callee: Callee, arguments: Arguments, template: Template | None) -> Hashable:
    """Return the key of a call, by value, or None if the function holds too much.

    A function that is defined in a body is another object in each run of the body.
    """
    values = fingerprint([callee.function, *arguments.leaves])
    if values is None:
        return None
    config = current_config()
    return values, arguments.tree, template, callee.max_runs, callee.label, config


def _bind(
    callee: Callee,
    arguments: Arguments,
    template: Template,
    arrays: Sequence[jax.Array],
    needed: jax.Array | None = None,
) -> list[jax.Array]:
    """Bind the primitive.

    Args:
        callee: what is called.
        arguments: of the call.
        template: the structure of the results, complete.
        arrays: the arrays among the arguments.
        needed: None, or a boolean array that says which elements of a batch need the call.

    Returns:
        The results, flat.
    """
    avals = [jax.typeof(x) for x in arrays]
    keys = [KeyLeaf(a.dtype) if is_key_dtype(a.dtype) else None for a in avals]
    operands = [
        jax.random.key_data(x) if key else x for x, key in zip(arrays, keys, strict=True)
    ]
    in_avals = [physical_aval(a.shape, a.dtype, a.weak_type) for a in avals]
    if needed is not None:
        operands.insert(0, needed)
        in_avals.insert(0, ShapedArray((), np.bool_))
    of_arrays = iter(keys)
    function = UserFunction(
        callee.func,
        callee.name,
        arguments.tree,
        tuple(next(of_arrays) if is_array(x) else static_leaf(x) for x in arguments.leaves),
        template,
        tuple(in_avals),
        callee.is_host_function,
        needed is not None,
        callee.rules,
        callee.workers,
    )
    stateful = callee.stateful or not template.leaves
    if stateful and callee.vmap_method == "by_branch":
        raise not_by_branch(callee.label, "returns nothing, which makes it stateful")
    default = "sequential" if stateful or callee.is_host_function else "by_branch"
    params = Params(
        Primal(function),
        stateful,
        callee.ordered,
        callee.vmap_method or default,
        current_config(),
    )
    return [
        jax.random.wrap_key_data(x, dtype=leaf.dtype) if leaf.is_key else x
        for x, leaf in zip(bind(operands, params), template.leaves, strict=True)
    ]


def _declared(callee: Callee, arguments: Arguments) -> Template | None:
    """Return `Tout` for these arguments, or None if it is left out."""
    template = callee.template
    if callee.tout is not None:
        tout = _call_tout(callee, *arguments.structs().unflatten())
        template = parse(tout, callee.label)
    if template is not None:
        check_x64(template, callee.label)
    return template


def _call_tout(callee: Callee, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tout = unwrapped(callee.tout)
    try:
        return tout(*args, **kwargs)
    except Exception as error:
        problem = misfit(tout, args, kwargs)
        if problem:
            _refuse_misfit(callee, args, kwargs)
            own = signature_of(callee.function)
            expected = own or f"of {len(args) + len(kwargs)} arguments"
            raise TypeError(
                f"{callee.label}: Tout is called with the arguments of the function, "
                f"and {problem}: expected the parameters {expected}, got "
                f"{signature_of(tout)}. Write a Tout that takes them, such as "
                "Tout=lambda *args: args[0]." + see("Arguments that do not match")
            ) from None
        error.add_note(
            f"{callee.label}: this was raised by Tout, which is called with a "
            "jax.ShapeDtypeStruct for each array, not with data."
        )
        raise


def _check_signature(callee: Callee, arguments: Arguments) -> None:
    """Raise now, and not later on the host, if the function cannot take the arguments."""
    _refuse_misfit(callee, *arguments.unflatten())


def _refuse_misfit(callee: Callee, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    problem = misfit(callee.function, args, kwargs)
    if problem:
        raise TypeError(
            f"{callee.label}: {problem}; call it with the arguments of "
            f"{signature_of(callee.function)}." + see("Arguments that do not match")
        )


def _on_abstract_values(
    callee: Callee, arguments: Arguments
) -> Callable[[list[jax.Array]], Any]:
    """Return the function of one abstract value for each array.

    Arrays that are not traced keep their values, which the body may branch on.
    """
    with set_current_trace(_compat.eval_trace):
        known = [
            jnp.asarray(x) if is_array(x) and not isinstance(x, Tracer) else x
            for x in (static_leaf(x).value if is_float0(x) else x for x in arguments.leaves)
        ]

    def on_values(values: list[jax.Array]) -> Any:
        rest = iter(values)
        of_arrays = [next(rest) if is_array(x) else None for x in arguments.leaves]
        args, kwargs = arguments.with_leaves(
            [
                value if isinstance(x, Tracer) else x
                for x, value in zip(known, of_arrays, strict=True)
            ]
        ).unflatten()
        return callee.function(*args, **kwargs)

    # A search for loops asks for the code of the body.
    return functools.update_wrapper(on_values, callee.function, (), ())
