"""Custom derivative rules that run on the host, for functions that JAX cannot trace."""

import ctypes
import ctypes.util
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import scipy.optimize
import scipy.sparse
import scipy.sparse.linalg
from jax.test_util import check_grads

import jpyfunc as jpf
import jpyfunc.tf1 as tf
from jpyfunc import NotDifferentiableError, ResultError, numpy_func, profile, py_func

Struct = jax.ShapeDtypeStruct
F32 = Struct((), jnp.float32)
rng = np.random.default_rng(0)
A = jnp.asarray(rng.normal(size=(4, 4)) + 4 * np.eye(4), jnp.float32)
B = jnp.asarray(rng.normal(size=4), jnp.float32)


class Counted:
    """`solve` with its rules, which count how often they run."""

    def __init__(self, **options):
        self.runs = {"body": 0, "fwd": 0, "bwd": 0, "jvp": 0}

        def body(a, b):
            self.runs["body"] += 1
            return scipy.linalg.lu_solve(scipy.linalg.lu_factor(a), b)

        def forward(a, b):
            self.runs["fwd"] += 1
            factors = scipy.linalg.lu_factor(a)
            x = scipy.linalg.lu_solve(factors, b)
            return x, (factors, x)

        def backward(residuals, x_bar):
            self.runs["bwd"] += 1
            factors, x = residuals
            b_bar = scipy.linalg.lu_solve(factors, x_bar, trans=1)
            return -np.outer(b_bar, x), b_bar

        def jvp(primals, tangents):
            self.runs["jvp"] += 1
            (a, b), (da, db) = primals, tangents
            factors = scipy.linalg.lu_factor(a)
            x = scipy.linalg.lu_solve(factors, b)
            return x, scipy.linalg.lu_solve(factors, db - da @ x)

        self.f = numpy_func(body, Tout=lambda a, b: b, **options)
        self.f.defvjp(forward, backward)
        self.f.defjvp(jvp)


def loss(f):
    return lambda a, b: jnp.sin(f(a, b)).sum()


plain = loss(jnp.linalg.solve)


def close(got, want, rtol=1e-4, atol=1e-5):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol, atol), got, want)


def test_both_modes(transform):
    solve = Counted().f
    close(transform(jax.value_and_grad(loss(solve), (0, 1)))(A, B),
          jax.value_and_grad(plain, (0, 1))(A, B))  # fmt: skip
    close(
        transform(jax.jacfwd(solve, (0, 1)))(A, B),
        jax.jacfwd(jnp.linalg.solve, (0, 1))(A, B),
    )
    close(
        transform(jax.jacrev(solve, (0, 1)))(A, B),
        jax.jacrev(jnp.linalg.solve, (0, 1))(A, B),
    )
    check_grads(
        transform(solve), (A, B), order=1, modes=("fwd", "rev"), rtol=2e-2, atol=2e-2
    )


def test_forward_runs_once_and_the_body_not(transform):
    counted = Counted()
    program = transform(jax.value_and_grad(loss(counted.f), (0, 1)))
    for times in (1, 2):
        jax.block_until_ready(program(A, B))
        assert counted.runs == {"body": 0, "fwd": times, "bwd": times, "jvp": 0}


def test_evicted_residuals_are_computed_again(transform):
    counted = Counted()
    before = jpf.set_tape_limit(0)
    try:
        got = jax.block_until_ready(transform(jax.grad(loss(counted.f)))(A, B))
    finally:
        jpf.set_tape_limit(before)
    close(got, jax.grad(plain)(A, B))
    assert counted.runs == {"body": 0, "fwd": 2, "bwd": 1, "jvp": 0}
    stateful = Counted(stateful=True)
    jpf.set_tape_limit(0)
    try:
        with pytest.raises(jpf.TapeLostError), jpf.raise_original():
            jax.block_until_ready(transform(jax.grad(loss(stateful.f)))(A, B))
    finally:
        jpf.set_tape_limit(before)


def test_residuals_that_a_linearized_pullback_uses_twice(transform):
    """The calls are stateful, so nothing can compute their residuals again."""
    f = numpy_func(np.sin, Tout=lambda x: x, stateful=True)
    f.defvjp(lambda x: (np.sin(x), np.cos(x)), lambda cos, bar: (cos * bar,))

    def program(f, x, bar):
        pullback = jax.vjp(lambda x: f(f(x)), x)[1]
        value, jvp = jax.linearize(lambda bar: pullback(bar)[0], bar)
        return value, jvp(bar)

    x, bar = jnp.array([0.5, 0.7]), jnp.ones(2)
    before = jpf.set_tape_limit(2**16)  # room for only the last of the spent ones
    try:
        got = jax.block_until_ready(transform(lambda *xs: program(f, *xs))(x, bar))
    finally:
        jpf.set_tape_limit(before)
    close(got, program(jnp.sin, x, bar))


@pytest.mark.parametrize("rules", ["defvjp", "defjvp"])
def test_no_rule_runs_for_a_branch_that_is_not_taken(rules, transform):
    """Under `vmap`, the derivative of a `cond` selects between both, one of them zeros."""
    seen = []

    def noting(kind, function):
        def rule(*args):
            seen.append((kind, float(jax.tree.leaves(args)[0])))
            return function(*args)

        return rule

    f = numpy_func(lambda x: x**2, Tout=F32)
    if rules == "defvjp":
        take = jax.grad
        f.defvjp(
            noting("fwd", lambda x: (x**2, x)), noting("bwd", lambda x, bar: (2 * x * bar,))
        )
    else:
        take = lambda f: lambda x: jax.linearize(f, x)[1](1.0)  # noqa: E731
        f.defjvp(noting("jvp", lambda x, dot: (x[0] ** 2, 2 * x[0] * dot[0])))
    program = jax.vmap(take(lambda x: jax.lax.cond(x > 0, f, jnp.sin, x)))
    got = jax.block_until_ready(transform(program)(jnp.array([1.0, -2.0, 3.0])))
    close(got, jnp.array([2.0, np.cos(-2.0), 6.0]))
    assert {value for kind, value in seen if kind != "fwd"} == {1.0, 3.0}


def test_profile_tells_where_residuals_came_from():
    counted = Counted()
    with profile() as prof:
        jax.block_until_ready(
            jax.jit(jax.vmap(jax.grad(loss(counted.f)), (None, 0)))(A, B * jnp.ones((3, 1)))
        )
    rows = prof.as_dict()["body"]
    assert (rows["forward"]["calls"], rows["forward"]["runs"]) == (1, 0)
    assert (rows["vjp"]["from_tape"], rows["vjp"]["elements"]) == (3, 3)


@pytest.mark.parametrize("axes", [(None, 0), (0, None), (0, 0)], ids=str)
def test_vmap_runs_rules_per_element(axes, transform):
    solve = Counted().f
    a = A if axes[0] is None else jnp.stack([A, A + 1, A * 2])
    b = B if axes[1] is None else jnp.stack([B, B + 1, B * 2])
    for take in (lambda f: jax.grad(f, (0, 1)), jax.jacfwd):
        got = transform(jax.vmap(take(loss(solve)), axes))(a, b)
        close(got, jax.vmap(take(plain), axes)(a, b))
    got = transform(jax.grad(lambda a, b: jax.vmap(loss(solve), axes)(a, b).sum(), (0, 1)))(
        a, b
    )
    close(got, jax.grad(lambda a, b: jax.vmap(plain, axes)(a, b).sum(), (0, 1))(a, b))


@pytest.mark.parametrize("vmap_method", ["expand_dims", "broadcast_all"])
def test_rules_may_see_whole_batches(vmap_method, transform):
    shapes = []
    f = numpy_func(lambda x: x**3, Tout=lambda x: x, vmap_method=vmap_method)
    f.defvjp(lambda x: (x**3, x), lambda x, g: (shapes.append(g.shape) or 3 * x**2 * g,))
    xs = jnp.arange(1.0, 4.0)
    close(transform(jax.vmap(jax.grad(f)))(xs), 3 * xs**2)
    assert shapes == [(3,)]


def test_scan_checkpoint_and_graphs(transform):
    solve = Counted().f

    def program(f):
        return lambda a, b: jax.lax.scan(
            lambda b, _: (jnp.tanh(f(a, b)), b), b, None, length=3
        )[0].sum()

    want = jax.grad(program(jnp.linalg.solve), (0, 1))(A, B)
    close(transform(jax.grad(program(solve), (0, 1)))(A, B), want)
    close(transform(jax.grad(jax.checkpoint(program(solve)), (0, 1)))(A, B), want)
    with tf.Graph().as_default(), tf.Session() as session:
        b = tf.placeholder(jnp.float32, (4,))
        (slope,) = tf.gradients(tf.numpy.sum(solve(A, b)), b)
        close(session.run(slope, {b: B}), np.linalg.solve(np.asarray(A).T, np.ones(4)))


def test_several_devices(transform):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("i",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("i"))
    solve = Counted().f
    got = jax.jit(jax.grad(loss(solve), (0, 1)))(A, jax.device_put(B, sharding))
    close(got, jax.grad(plain, (0, 1))(A, B))


def test_inside_a_body_that_is_differentiated(transform):
    solve = Counted().f

    def body(a, b, f=solve):
        x = f(a, b) * 2
        return (x * jnp.cos(x)).sum() if x.sum() > 0 else x.sum()

    reference = lambda a, b: body(a, b, jnp.linalg.solve)  # noqa: E731
    outer = py_func(body, Tout=F32)
    want = jax.value_and_grad(reference, (0, 1))(A, B)
    close(transform(jax.value_and_grad(outer, (0, 1)))(A, B), want)
    batch = jnp.stack([B, -B])
    got = transform(jax.vmap(jax.grad(outer, 1), (None, 0)))(A, batch)
    close(got, jnp.stack([jax.grad(reference, 1)(A, b) for b in batch]))
    close(transform(jax.jacfwd(outer, 1))(A, B), jax.grad(reference, 1)(A, B))


def test_pytrees_keywords_and_integers(transform):
    def body(p, n, *, scale, mode):
        return {"y": p["w"] * n * scale[0], "n": n + 1}

    f = numpy_func(body, Tout=lambda p, n, **_: {"y": p["w"], "n": Struct((), jnp.int32)})

    def forward(p, n, *, scale, mode):
        assert mode == "fast"
        return body(p, n, scale=scale, mode=mode), (p["w"], n, scale[0])

    def backward(residuals, bar):
        w, n, s = residuals
        assert bar["n"].dtype == jax.dtypes.float0
        return (
            {"w": bar["y"] * n * s, "unused": None},
            None,
            [(bar["y"] * w * n).sum()],
            None,
        )

    def jvp(primals, tangents):
        (p, n, scale, _), (dp, dn, dscale, _) = primals, tangents
        assert dn.dtype == jax.dtypes.float0
        return None, {"y": n * (dp["w"] * scale[0] + p["w"] * dscale[0]), "n": None}

    f.defvjp(forward, backward)
    f.defjvp(jvp)
    w = jnp.arange(3.0)

    def program(f):
        return lambda w, s: jnp.sin(
            f({"w": w, "unused": jnp.ones(2)}, 2, mode="fast", scale=[s])["y"]
        ).sum()

    want = jax.grad(program(body), (0, 1))(w, 3.0)
    close(transform(jax.grad(program(f), (0, 1)))(w, 3.0), want)
    close(transform(jax.jacfwd(program(f), (0, 1)))(w, 3.0), want)


def test_a_second_wrap_is_without_rules():
    f = numpy_func(np.sin, Tout=F32)
    f.defvjp(lambda x: (np.sin(x), x), lambda x, g: (g * np.cos(x),))
    assert numpy_func(np.sin, Tout=F32) != f
    with pytest.raises(NotDifferentiableError):
        jax.grad(numpy_func(np.sin, Tout=F32))(1.0)


def reverse_only():
    f = numpy_func(np.sin, Tout=F32)
    f.defvjp(lambda x: (np.sin(x), x), lambda x, g: (g * np.cos(x),))
    return f


def forward_only():
    f = numpy_func(np.sin, Tout=F32)
    f.defjvp(lambda p, t: (np.sin(p[0]), t[0] * np.cos(p[0])))
    return f


@pytest.mark.parametrize(
    ("f", "take", "words"),
    [
        (reverse_only, lambda f: lambda x: jax.jvp(f, (x,), (x,)), "forward mode.*defjvp"),
        (reverse_only, jax.jacfwd, "forward mode.*defjvp"),
        (forward_only, jax.grad, "reverse mode.*defvjp"),
        (reverse_only, lambda f: jax.grad(jax.grad(f)), "twice.*jax.custom_jvp"),
        (forward_only, lambda f: jax.jacfwd(jax.jacfwd(f)), "twice.*jax.custom_jvp"),
        (lambda: numpy_func(np.sin, Tout=F32), jax.grad,
         "defvjp or defjvp.*custom_jvp.*py_func.*stop_gradient"),
    ],
)  # fmt: skip
def test_a_missing_rule_says_what_to_write(f, take, words, transform):
    with pytest.raises(NotDifferentiableError, match=f"numpy_func 'sin' .*{words}"):
        transform(take(f()))(1.0)


def bad(fwd=lambda x: (np.sin(x), x), bwd=lambda x, g: (g * np.cos(x),)):
    f = numpy_func(np.sin, Tout=lambda x: x)
    f.defvjp(fwd, bwd)
    return f


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"fwd": np.sin}, r"fwd to return a pair \(result, residuals\), got"),
        ({"fwd": lambda x: (x.sum(), x)}, r"fwd: result: expected shape \(3,\), got \(\)"),
        ({"bwd": lambda x, g: g}, "expected a tuple of 1 cotangents.*got ndarray"),
        ({"bwd": lambda x, g: (g, g)}, "expected a tuple of 1 cotangents.*got tuple of 2"),
        ({"bwd": lambda x, g: ([g, g],)}, r"expected result\[0\] to have the structure"),
        (
            {"bwd": lambda x, g: (g.sum(),)},
            r"operand 0: expected float32\[3\], got float32\[\]",
        ),
        (
            {"bwd": lambda x, g: (g * 1j,)},
            r"operand 0: expected float32\[3\], got complex64",
        ),
    ],
)
def test_errors_about_bad_rules_say_what_is_wrong(rules, words, transform):
    with (
        pytest.raises(ResultError, match=f"numpy_func 'sin'.*{words}"),
        jpf.raise_original(),
    ):
        jax.block_until_ready(
            transform(jax.grad(lambda x: bad(**rules)(x).sum()))(jnp.ones(3))
        )


def test_a_rule_that_raises_and_rules_that_are_no_functions(transform):
    f = bad(bwd=lambda x, g: 1 / 0)
    with pytest.raises(ZeroDivisionError), jpf.raise_original():
        jax.block_until_ready(transform(jax.grad(lambda x: f(x).sum()))(jnp.ones(3)))
    with pytest.raises(
        TypeError, match=r"defvjp: expected a function, got 3; write defvjp\(fwd"
    ):
        bad(fwd=3)
    with pytest.raises(TypeError, match="defjvp is for functions wrapped by numpy_func"):
        py_func(jnp.sin).defjvp(jnp.cos)


def test_residuals_die_with_the_function():
    class Factors:
        pass

    alive = []

    def forward(x):
        factors = Factors()
        alive.append(weakref.ref(factors))
        return x**2, (x, factors)

    def body(x):
        return x**2

    f = numpy_func(body, Tout=F32)
    f.defvjp(forward, lambda r, g: (2 * r[0] * g,))
    _, pullback = jax.vjp(f, 3.0)
    assert alive[0]() is not None
    del f, body, forward, pullback
    jax.clear_caches()
    gc.collect()
    assert alive[0]() is None


def test_a_root_of_scipy(transform):
    """dx/da of f(x, a) = 0 is -f_a / f_x."""

    def root(a):
        return scipy.optimize.brentq(lambda x: x**3 + a * x - 1, 0, 1)

    f = numpy_func(root, Tout=F32)
    f.defvjp(
        lambda a: ((x := root(a)), (a, x)),
        lambda r, g: (-g * r[1] / (3 * r[1] ** 2 + r[0]),),
    )
    x = float(f(2.0))
    assert abs(x**3 + 2 * x - 1) < 1e-5
    close(transform(jax.grad(f))(2.0), -x / (3 * x**2 + 2))


def test_an_initial_value_problem_by_its_adjoint(transform):
    """y' = -k y, whose adjoint runs backward from the end."""

    def solution(k, y0):
        def slope(t, y):
            return -k * y

        return scipy.integrate.solve_ivp(slope, (0, 1), y0, rtol=1e-8, dense_output=True)

    def backward(residuals, bar):
        k, y = residuals

        def slope(t, z):
            n = len(bar)
            return np.concatenate([k * z[:n], [-(z[:n] * -y(t)).sum()]])

        z = scipy.integrate.solve_ivp(slope, (1, 0), np.append(bar, 0.0), rtol=1e-8).y[
            :, -1
        ]
        return z[-1], z[:-1]

    f = numpy_func(
        lambda k, y0: solution(k, y0).y[:, -1].astype(np.float32), Tout=lambda k, y: y
    )
    f.defvjp(lambda k, y0: ((s := solution(k, y0)).y[:, -1], (k, s.sol)), backward)
    y0 = jnp.array([1.0, 2.0])
    got = transform(jax.grad(lambda k, y0: (f(k, y0) ** 2).sum(), (0, 1)))(0.7, y0)
    decay = np.exp(-0.7)
    close(got, (-2 * decay**2 * 5.0, 2 * decay**2 * y0), rtol=1e-3)


def test_a_sparse_solve_reuses_its_factorisation(transform):
    matrix = scipy.sparse.diags([np.full(5, -1.0), np.full(6, 4.0)], [-1, 0]).tocsc()
    factorised = []

    def factors(scale):
        factorised.append(1)
        return scipy.sparse.linalg.splu(matrix * float(scale))

    f = numpy_func(lambda s, b: factors(s).solve(np.asarray(b, float)), Tout=lambda s, b: b)

    def forward(s, b):
        lu = factors(s)
        x = lu.solve(np.asarray(b, float))
        return x, (lu, x)

    def backward(residuals, bar):
        lu, x = residuals
        b_bar = lu.solve(np.asarray(bar, float), "T")
        return -(b_bar @ (matrix @ x)), b_bar

    f.defvjp(forward, backward)
    b = jnp.arange(6.0)
    dense = jnp.asarray(matrix.todense(), jnp.float32)
    plain = lambda s, b: jnp.sin(jnp.linalg.solve(dense * s, b)).sum()  # noqa: E731
    got = transform(jax.value_and_grad(lambda s, b: jnp.sin(f(s, b)).sum(), (0, 1)))(2.0, b)
    close(got, jax.value_and_grad(plain, (0, 1))(2.0, b))
    assert len(factorised) == 1


def test_a_call_into_the_c_library(transform):
    name = ctypes.util.find_library("m")
    if name is None:
        pytest.skip("this platform has no libm to load")
    j0, j1 = (getattr(ctypes.CDLL(name), n) for n in ("j0", "j1"))
    for function in (j0, j1):
        function.restype, function.argtypes = ctypes.c_double, [ctypes.c_double]
    f = numpy_func(lambda x: j0(float(x)), Tout=F32)
    f.defvjp(lambda x: (j0(float(x)), float(x)), lambda x, g: (-g * j1(x),))
    h = 1e-3
    close(transform(jax.grad(f))(1.5), (j0(1.5 + h) - j0(1.5 - h)) / (2 * h), rtol=1e-3)


def test_any_order_by_a_rule_around_the_call(transform):
    """The rule of `solve` calls `solve`, and that of a root differentiates its equation."""
    host = numpy_func(np.linalg.solve, Tout=lambda a, b: b)

    @jax.custom_jvp
    def solve(a, b):
        return host(a, b)

    @solve.defjvp
    def _(primals, tangents):
        (a, b), (da, db) = primals, tangents
        x = solve(a, b)
        return x, solve(a, db - da @ x)

    got = transform(jax.jacfwd(jax.jacfwd(loss(solve), 1), 0))(A, B)
    close(got, jax.jacfwd(jax.jacfwd(plain, 1), 0)(A, B), rtol=1e-3)

    equation = lambda x, a: x**3 + a * x - 1  # noqa: E731
    found = numpy_func(
        lambda a: scipy.optimize.brentq(equation, 0, 1, (float(a),)), Tout=F32
    )

    @jax.custom_jvp
    def root(a):
        return found(a)

    @root.defjvp
    def _(primals, tangents):
        (a,), (da,) = primals, tangents
        x = root(a)
        f_x, f_a = jax.grad(equation, (0, 1))(x, a)
        return x, -f_a / f_x * da

    h = 1e-2
    by_hand = (jax.grad(root)(2.0 + h) - jax.grad(root)(2.0 - h)) / (2 * h)
    close(transform(jax.grad(jax.grad(root)))(2.0), by_hand, rtol=1e-2)


# Linear functions, which are transposed


def host_product(**options):
    """`a @ v` of one matrix and vector or of whole batches, with its rules."""

    def product(a, v):
        return np.einsum("...ij,...j->...i", a, v)

    f = numpy_func(product, Tout=lambda a, v: v, **options)
    f.defvjp(
        lambda a, v: (product(a, v), (a, v)),
        lambda r, c: (
            np.einsum("...i,...j->...ij", c, r[1]),
            np.einsum("...ij,...i->...j", r[0], c),
        ),
    )
    return f


def tangent_by_call(f):
    """`f`, whose JVP calls it on the tangent of the vector."""
    g = jax.custom_jvp(lambda a, v: f(a, v))
    g.defjvp(lambda primals, tangents: (f(*primals), f(primals[0], tangents[1])))
    return g


def transposed(f, a, c):
    return jax.linear_transpose(lambda v: f(a, v), c)(c)[0]


def twice(f, a, c):
    return jax.linear_transpose(lambda c: transposed(f, a, c), c)(c)[0]


def by_hand(f, a, b):
    return jax.lax.custom_linear_solve(
        lambda v: f(a, v), b, lambda _, b: jnp.linalg.solve(jax.lax.stop_gradient(a), b),
        lambda _, b: jnp.linalg.solve(a.T, b),
    )  # fmt: skip


def iterative(solve):
    return lambda f, a, b: solve(lambda v: f(a, v), b, tol=1e-7)[0]


def gradient_of_square(function, argnums=1):
    return lambda f, a, b: jax.grad(lambda a, b: (function(f, a, b) ** 2).sum(), argnums)(
        a, b
    )


gmres = iterative(jax.scipy.sparse.linalg.gmres)
TRANSPOSED = {
    "linear_transpose": transposed,
    "of the transpose": twice,
    "of that": lambda f, a, b: jax.linear_transpose(lambda v: twice(f, a, v), b)(b)[0],
    "by the matrix": lambda f, a, b: jax.linear_transpose(lambda a: f(a, b), a)(b)[0],
    "jvp of the transpose": lambda f, a, b: jax.jacfwd(lambda c: transposed(f, a, c))(b),
    "custom_jvp": gradient_of_square(lambda f, a, b: tangent_by_call(f)(a, b)),
    "custom_linear_solve": gradient_of_square(by_hand),
    "gmres": gradient_of_square(gmres),
    "gmres by the matrix": gradient_of_square(gmres, 0),
    "bicgstab": gradient_of_square(iterative(jax.scipy.sparse.linalg.bicgstab)),
    "gmres, twice": lambda f, a, b: jax.jacrev(
        lambda b: gradient_of_square(gmres)(f, a, b)
    )(b),
    "scan": lambda f, a, b: jax.linear_transpose(
        lambda b: jax.lax.scan(lambda x, _: (f(a, x), None), b, None, length=3)[0], b
    )(b)[0],
    "of vmap": lambda f, a, b: jax.linear_transpose(
        jax.vmap(lambda v: f(a, v)), jnp.stack([b, b])
    )(jnp.stack([b, 2 * b]))[0],
    "vmap": lambda f, a, b: jax.vmap(lambda c: transposed(f, a, c))(jnp.stack([b, 2 * b])),
    "vmap of both": lambda f, a, b: jax.vmap(lambda a, c: transposed(f, a, c))(
        jnp.stack([a, 2 * a]), jnp.stack([b, -b])
    ),
}


@pytest.mark.parametrize("program", TRANSPOSED)
def test_a_linear_function_is_transposed_by_its_rule(program, transform):
    take = TRANSPOSED[program]
    want = jax.jit(lambda a, b: take(jnp.matmul, a, b))(A, B)
    methods = (None, "expand_dims", "broadcast_all") if "vmap" in program else (None,)
    for method in methods:
        f = host_product(vmap_method=method)
        close(transform(lambda a, b, f=f: take(f, a, b))(A, B), want, rtol=1e-3, atol=1e-4)


def test_a_linear_function_is_transposed_in_a_body(transform):
    def body(a, b, f):
        y = transposed(f, a, b) * b.sum() + gmres(f, a, b)
        return y if b.sum() > 0 else -2 * y

    batch = jnp.stack([B, -B, 2 * B])
    f = host_product()
    outer = py_func(lambda a, b: body(a, b, f), Tout=lambda a, b: b)
    plain = lambda a, b: body(a, b, jnp.matmul)  # noqa: E731
    close(transform(jax.vmap(outer, (None, 0)))(A, batch),
          jnp.stack([plain(A, b) for b in batch]), rtol=1e-3)  # fmt: skip
    for b in (B, -B):
        got = transform(jax.grad(lambda a, b: outer(a, b).sum(), 1))(A, b)
        close(got, jax.grad(lambda a, b: plain(a, b).sum(), 1)(A, b), rtol=1e-3, atol=1e-4)


def test_a_transpose_with_respect_to_a_nonlinear_operand_is_refused(transform):
    f = host_product()
    for program in (
        lambda a: jax.linear_transpose(lambda a: transposed(f, a, B), a)(B)[0],
        lambda a: jax.jacrev(lambda a: transposed(f, a, B))(a),
    ):
        with pytest.raises(NotDifferentiableError, match=r"differentiated twice"):
            transform(program)(A)


NOT_LINEAR = {
    "sin": (np.sin, lambda v, c: c * np.cos(v)),
    "square": (np.square, lambda v, c: 2 * v * c),
    "affine": (lambda v: v + 1, lambda v, c: c),
    "abs": (np.abs, lambda v, c: c * np.sign(v)),
    "relu": (lambda v: np.maximum(v, 0), lambda v, c: c * (v > 0)),
    "round": (np.round, lambda v, c: c),
    "sort": (np.sort, lambda v, c: c[np.argsort(np.argsort(v))]),
}


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_a_function_that_is_not_linear_is_not_transposed(name, transform):
    """The rule gives the derivative at a point, which a transpose does not have."""
    function, vjp = NOT_LINEAR[name]
    f = numpy_func(function, Tout=lambda v: v, name=name)
    f.defvjp(lambda v: (function(v), v), lambda v, c: (vjp(v, c),))
    words = f"'{name}' is transposed.*-2 \\* f.v.*jax.custom_vjp.*linear_call"
    with pytest.raises(NotDifferentiableError, match=words), jpf.raise_original():
        jax.block_until_ready(transform(lambda c: jax.linear_transpose(f, c)(c)[0])(B))


@pytest.mark.parametrize("rules", [False, True])
@pytest.mark.parametrize("program", ["linear_transpose", "custom_jvp", "gmres", "vmap"])
def test_a_transpose_without_a_rule_is_refused_when_traced(rules, program):
    f = numpy_func(lambda a, v: 1 / 0, Tout=lambda a, v: v, name="f")
    if rules:
        f.defjvp(lambda primals, tangents: 1 / 0)
    words = "'f' is transposed.*defvjp.*jax.custom_vjp"
    with pytest.raises(NotDifferentiableError, match=words):
        jax.make_jaxpr(lambda a, b: TRANSPOSED[program](f, a, b))(A, B)


# What residuals may be


@jax.tree_util.register_pytree_node_class
class Made:
    """Its leaves are created again whenever JAX flattens it."""

    def __init__(self, x):
        self.x = x

    def tree_flatten(self):
        return (self.x * 1.0,), None

    @classmethod
    def tree_unflatten(cls, _, leaves):
        return cls(*leaves)


def growing(r, bar):
    r.append(np.ones(3))
    return (2 * r[0] * bar,)


RESIDUALS = {
    "leaves created again": (Made, lambda r, bar: (2 * r.x * bar,)),
    "changed by bwd": (lambda x: [x], growing),
    "keys without order": (lambda x: {"x": x, 0: 1}, lambda r, bar: (2 * r["x"] * bar,)),
}


@pytest.mark.parametrize("kind", RESIDUALS)
def test_residuals_of_every_kind_come_and_go(kind, transform):
    make, backward = RESIDUALS[kind]
    f = numpy_func(lambda x: x * x, Tout=lambda x: x)
    f.defvjp(lambda x: (x * x, make(x)), backward)
    innocent = numpy_func(lambda x: x * x, Tout=lambda x: x)
    innocent.defvjp(lambda x: (x * x, x), lambda x, bar: (2 * x * bar,))
    before = jpf.set_tape_limit(2**16)
    try:
        for function in (f, innocent):
            gradient = transform(jax.grad(lambda x, f=function: f(x).sum()))
            for i in range(12):
                np.testing.assert_allclose(gradient(jnp.full(1000, i + 0.0)), 2.0 * i)
    finally:
        jpf.set_tape_limit(before)


class Opaque:
    __slots__ = ("__weakref__", "data")


class Told(Opaque):
    nbytes = 2**10


@pytest.mark.parametrize(
    ("kind", "least", "most", "spent"), [(Opaque, 200, 256, 4), (Told, 600, 616, 16)]
)
def test_objects_of_unknown_size_are_bounded_in_number(kind, least, most, spent, transform):
    living = weakref.WeakSet()

    def forward(x):
        living.add(residual := kind())
        return x, residual

    f = numpy_func(lambda x: x, Tout=F32)
    f.defvjp(forward, lambda r, bar: (bar,))
    before = jpf.set_tape_limit(2**22)
    try:
        for _ in range(600):
            transform(jax.grad(f))(1.0)
        gc.collect()
        assert len(living) <= spent
        for _ in range(600):
            pullback = transform(lambda x: jax.vjp(f, x)[1])(1.0)
        gc.collect()
        assert least <= len(living) <= most
        assert pullback(1.0) == (1.0,)
    finally:
        jpf.set_tape_limit(before)


def test_a_residual_that_a_rule_writes_to_again_keeps_its_value(transform):
    """All iterations of a loop use one buffer, and the pullbacks run after the last."""
    buffer = np.zeros((), np.float32)

    def forward(x):
        buffer[...] = x
        return x**2, {"at": [buffer, 2.0]}

    f = numpy_func(lambda x: x**2, Tout=F32)
    f.defvjp(forward, lambda r, bar: (r["at"][1] * r["at"][0] * bar,))

    def program(f, x):
        return jax.lax.scan(lambda c, _: (f(c) + 0.5, None), x, None, length=3)[0]

    got = transform(jax.grad(lambda x: program(f, x)))(0.3)
    want = jax.grad(lambda x: program(jnp.square, x))(0.3)
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("size", [1024, 2**16])
def test_a_buffer_that_a_rule_reuses_does_not_change_earlier_results(size, transform):
    raw = np.zeros(4 * size + 64, np.uint8)
    start = -raw.ctypes.data % 64  # the alignment with which XLA shares memory
    buffer = raw[start : start + 4 * size].view(np.float32)

    def own(x):
        buffer[:] = x * 2
        return buffer

    f = numpy_func(own, Tout=lambda x: x)
    f.defvjp(lambda x: (own(x), None), lambda r, bar: (own(bar),))
    f.defjvp(lambda primals, tangents: (own(primals[0]), own(tangents[0])))
    x = jnp.ones(size)
    value = transform(lambda x: jax.vjp(f, x)[0])
    bar = transform(lambda bar: jax.vjp(f, x)[1](bar)[0])
    dot = transform(lambda dot: jax.jvp(f, (x,), (dot,))[1])
    for function in (value, bar, dot):
        first, second = function(x), function(5 * x)
        np.testing.assert_array_equal(first, np.full(size, 2))
        np.testing.assert_array_equal(second, np.full(size, 10))
