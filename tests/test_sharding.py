"""Four devices: once per shard in shard_map and pmap, once in total in a sharded jit."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import SCALAR, assert_close
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from programs import run_program, xla_flags

from jpyfunc import UnsupportedError, py_func, raise_original

P = PartitionSpec
X = jnp.arange(8.0) + 1
W = jnp.float32(3.0)


def body(x, w):
    return (jnp.sin(x) * w, x.sum() * w) if x.sum() > 0 else (x * w, w)


def per_shard(x, w):
    """Compute in plain JAX what a shard_map over four devices computes."""
    parts = [body(part, w) for part in jnp.split(x, 4)]
    return jnp.concatenate([p[0] for p in parts]), jnp.stack([p[1] for p in parts])


@pytest.fixture
def calls():
    return []


@pytest.fixture(params=[{}, {"stateful": True}, {"ordered": True}], ids=str)
def options(request):
    return request.param


@pytest.fixture
def wrapped(calls, options):
    def counted(x, w):
        calls.append(x.shape)
        return body(x, w)

    return py_func(counted, Tout=lambda x, w: (x, w), **options)


def count(calls):
    jax.effects_barrier()
    shapes = list(calls)
    calls.clear()
    return shapes


def mesh_of(axis_type):
    return jax.make_mesh((4,), ("d",), axis_types=(axis_type,))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_sharded_jit_runs_once_and_the_result_goes_on(axis_type, wrapped, calls):
    x = jax.device_put(X, NamedSharding(mesh_of(axis_type), P("d")))
    got = jax.jit(wrapped)(x, W)
    assert_close(
        jax.tree.map(lambda y: y + 1, got), jax.tree.map(lambda y: y + 1, body(X, W))
    )
    assert count(calls) == [(8,)]
    mixed = jax.jit(lambda x, w: wrapped(x * 2, w)[0] * x + jnp.cos(x))(x, W)
    assert_close(mixed + x, body(X * 2, W)[0] * X + jnp.cos(X) + X)
    assert count(calls) == [(8,)]


def test_two_of_the_devices(wrapped, calls):
    mesh = jax.make_mesh((2,), ("d",), (AxisType.Auto,), devices=jax.devices()[1:3])
    x = jax.device_put(X, NamedSharding(mesh, P("d")))
    got = jax.jit(wrapped)(x, W)
    assert got[0].devices() == x.devices()
    assert_close((got[0] + x, got[1]), (body(X, W)[0] + X, body(X, W)[1]))
    assert count(calls) == [(8,)]


def test_sharded_jit_of_a_gradient_runs_once(wrapped, calls):
    x = jax.device_put(X, NamedSharding(mesh_of(AxisType.Auto), P("d")))
    loss = lambda f: lambda x, w: f(x, w)[0].sum() + f(x, w)[1] ** 2  # noqa: E731
    got = jax.jit(jax.grad(lambda x, w: wrapped(x, w)[0].sum(), (0, 1)))(x, W)
    assert_close(got, jax.grad(lambda x, w: body(x, w)[0].sum(), (0, 1))(X, W))
    got = jax.jit(jax.hessian(loss(wrapped), (0, 1)))(x, W)
    assert_close(got, jax.hessian(loss(body), (0, 1))(X, W), rtol=1e-3)


def test_a_gradient_with_several_results_runs_its_body_once():
    """Left to choose, XLA of jaxlib 0.12 runs it on every device."""
    runs = []

    def counted(x, w):
        runs.append(1)
        return x * w

    f = py_func(counted, Tout=lambda x, w: x)
    x = jax.device_put(X, NamedSharding(mesh_of(AxisType.Auto), P("d")))
    got = jax.jit(jax.grad(lambda x, w: f(x, w).sum(), (0, 1)))(x, W)
    assert_close(jax.tree.map(lambda y: y * 2, got), (jnp.full(8, 6.0), jnp.float32(72)))
    assert len(runs) == 1


def test_eager_on_sharded_arrays(wrapped, calls):
    x = jax.device_put(X, NamedSharding(mesh_of(AxisType.Auto), P("d")))
    assert_close(wrapped(x, W), body(X, W))
    assert count(calls) == [(8,)]


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma, wrapped, calls, transform):
    sharded = functools.partial(
        jax.shard_map,
        mesh=mesh_of(AxisType.Auto),
        in_specs=(P("d"), P()),
        out_specs=(P("d"), P("d")),
        check_vma=check_vma,
    )
    f = sharded(lambda x, w: (wrapped(x, w)[0], wrapped(x, w)[1][None]))
    assert_close(transform(f)(X, W), per_shard(X, W))
    assert set(count(calls)) == {(2,)}
    one = sharded(lambda x, w: wrapped(x, w)[0], out_specs=P("d"))
    assert_close(transform(one)(X, W), per_shard(X, W)[0])
    assert count(calls) == [(2,)] * 4
    loss = lambda f: lambda x, w: jnp.sum(f(x, w)[0] ** 2)  # noqa: E731
    got = transform(jax.grad(loss(f), (0, 1)))(X, W)
    assert_close(got, jax.grad(loss(per_shard), (0, 1))(X, W))


def test_vmap_and_grad_in_shard_map():
    """The gradient with respect to `w`, shared by every shard, is summed over them."""

    def sharded(function):
        inner = jax.vmap(jax.grad(function, (0, 1)), (0, None))
        return jax.shard_map(
            inner, mesh=mesh_of(AxisType.Auto), in_specs=(P("d"), P()), out_specs=P("d")
        )

    f = py_func(lambda x, w: jnp.sin(x) * w if x > 2 else x * w, Tout=jnp.float32)
    plain = lambda x, w: jnp.where(x > 2, jnp.sin(x) * w, x * w)  # noqa: E731
    assert_close(jax.jit(sharded(f))(X, W), jax.jit(sharded(plain))(X, W))


@pytest.mark.parametrize("mode", ["one axis", "two axes", "check_vma=False"])
def test_staged_branches_in_shard_map(mode):
    """Shards that take different branches wait for each other if one has a psum in it.

    `w` is the same on all shards, or on those along one of two axes, so that its
    gradient is summed over them.
    """
    run_program(
        f"""
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import PartitionSpec as P
        from cases import assert_close
        from jpyfunc import py_func

        mode = {mode!r}
        names = ("d", "e") if mode == "two axes" else ("d",)
        devices = np.array(jax.devices())
        mesh = jax.sharding.Mesh(devices.reshape(2, 2) if names[1:] else devices, names)
        x = jnp.array([0.5, -1.0, 2.0, -2.0])
        w = jnp.array([0.7, 0.9] if mode == "two axes" else [0.7])

        def slope(x, w):
            return jax.grad(lambda x: jnp.sin(x * w))(x)

        def body(x, w):
            table = jnp.linspace(0, 1, 100)
            x = x + 0 * (x * table).sum()
            if x > 0:
                return (x * table).sum() / 50 * w * table[2] + slope(x, w)
            y = jax.lax.scan(lambda c, t: (c * t + jnp.sin(w), None), x, np.arange(3.0))[0]
            if w > 100:
                return jnp.float32(3)
            return jax.nn.softplus(y * table[-1]) + 0 * (x * table).sum()

        def plain(x, w):
            other = jax.nn.softplus(5 * jnp.sin(w) + x * 0)
            return jnp.where(x > 0, x * w * 2 / 99 + jnp.cos(x * w) * w, other)

        def mapped(take, f):
            def shard(x, w):
                return jax.tree.map(lambda y: y[None] + 0 * x[0], take(f)(x[0], w[0]))

            return jax.jit(jax.shard_map(
                shard, mesh=mesh, in_specs=(P(names), P(names[1:])), out_specs=P(names),
                check_vma="vma" not in mode,
            ))

        pair = jnp.array([1.0, -1.0])
        for take in (
            lambda f: f,
            lambda f: jax.grad(f, (0, 1)),
            lambda f: lambda x, w: jax.jvp(f, (x, w), (x, w * 2)),
            lambda f: jax.hessian(f, (0, 1)),
            lambda f: lambda x, w: jax.vmap(f, (0, None))(x * pair, w),
            lambda f: lambda x, w: jax.vmap(jax.grad(f, (0, 1)), (0, None))(x * pair, w),
            lambda f: jax.grad(lambda x, w: jax.vmap(f)(x * pair, w * pair).sum(), (0, 1)),
            lambda f: jax.jacfwd(
                lambda x, w: jax.lax.map(lambda c: f(c * x, w), pair).sum(), (0, 1)
            ),
        ):
            got = mapped(take, py_func(body, staged=True))(x, w)
            assert_close(got, mapped(take, plain)(x, w), rtol=1e-4)
        """,
        limit=100,
        XLA_FLAGS=xla_flags(devices=4),
    )


def test_keys_of_shards_in_a_staged_body():
    def body(key, x):
        return x + jax.random.uniform(key) if x > 2 else x

    def plain(key, x):
        return jnp.where(x > 2, x + jax.random.uniform(key), x)

    mesh, key = mesh_of(AxisType.Auto), jax.random.key(1)
    for specs, x in (((P(), P("d")), jnp.arange(4.0)), ((P("d"), P()), jnp.ones(1) * 3)):
        keys = key[None] if specs[0] == P() else jax.random.split(key, 4)
        got, want = (
            jax.jit(
                jax.shard_map(
                    lambda k, x, f=f: f(k[0], x[0])[None],
                    mesh=mesh,
                    in_specs=specs,
                    out_specs=P("d"),
                )
            )(keys, x)
            for f in (py_func(body, staged=True), plain)
        )
        assert_close(got, want)


def test_staged_over_explicit_axes_gives_what_the_call_gives():
    def body(x, w):
        return jnp.sin(x) * w if x[0] > 0 else x

    x = jax.device_put(X, NamedSharding(mesh_of(AxisType.Explicit), P("d")))
    for take in (lambda f: f, lambda f: jax.grad(lambda x, w: f(x, w).sum(), (0, 1))):
        want = take(lambda x, w: jnp.sin(x) * w)(X, W)
        called, staged = (
            jax.jit(take(py_func(body, staged=staged)))(x, W) for staged in (False, True)
        )
        assert_close(staged, want)
        for a, b in zip(jax.tree.leaves(called), jax.tree.leaves(staged), strict=True):
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


def test_pmap(wrapped, calls):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        x = X.reshape(4, 2)
        got = jax.pmap(wrapped, in_axes=(0, None))(x, W)
        want = per_shard(X, W)
        assert_close(got, (want[0].reshape(4, 2), want[1]))
        assert count(calls) == [(2,)] * 4
        loss = lambda x: wrapped(x, W)[0].sum()  # noqa: E731
        got = jax.pmap(jax.grad(loss))(x)
    assert_close(got, jax.grad(lambda x: per_shard(x, W)[0].sum())(X).reshape(4, 2))


def test_a_call_on_a_reduction_of_all_that_is_returned():
    """On one device, too, XLA fails on it, but for `_xla_bugs` (`test_effects`)."""
    calls = []

    @py_func(Tout=[], stateful=True)
    def log(value):
        calls.append(np.asarray(value))

    def program(x):
        y = x * 2
        log(y.sum(0))
        return y

    mesh, x = mesh_of(AxisType.Auto), jnp.linspace(0, 1, 160_000).reshape(400, 400)
    sharded = jax.device_put(x, NamedSharding(mesh, P("d")))
    shards = jax.shard_map(program, mesh=mesh, in_specs=P("d"), out_specs=P("d"))
    for run, operand, parts in (
        (jax.jit(program), sharded, x[None]),
        (jax.jit(shards), sharded, x.reshape(4, 100, 400)),
        (jax.pmap(program), x.reshape(4, 100, 400), x.reshape(4, 100, 400)),
    ):
        calls.clear()
        result = run(operand)
        jax.effects_barrier()
        np.testing.assert_allclose(result, operand * 2)
        expected = np.sum(2 * np.asarray(parts), axis=1)
        np.testing.assert_allclose(sorted(calls, key=sum), expected, rtol=1e-4)


def test_partly_automatic_shard_map_is_refused():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))
    f = py_func(lambda x: x * 2, Tout=lambda x: x, name="double")
    sharded = jax.shard_map(
        f, mesh=mesh, in_specs=P("a"), out_specs=P("a"), axis_names={"a"}
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match=r"'double'.*axes \['b'\] automatic"):
        jax.jit(sharded)(X)


@pytest.mark.parametrize("count", [1, 4])
def test_a_mesh_that_the_caller_set_is_not_in_force_in_the_body(count):
    """Afterwards it is in force again; on one device, the caller's thread runs the body."""
    mesh = jax.make_mesh((count,), ("d",), axis_types=(AxisType.Explicit,))

    def body(x):
        if x[0] < 0:
            raise ValueError("negative")
        return jnp.sin(x) @ jax.jit(jnp.cos)(x)

    def in_force():
        return jax.sharding.get_mesh(), jax.sharding.get_abstract_mesh()

    with jax.set_mesh(mesh):
        before = in_force()
        f = jax.jit(py_func(body, Tout=SCALAR))
        assert_close(f(X) + 1, jnp.sin(X) @ jnp.cos(X) + 1)
        assert in_force() == before
        if count == 1:
            with pytest.raises(ValueError, match="negative"), raise_original():
                jax.block_until_ready(f(-X))
            assert in_force() == before
        split = jax.device_put(X, P("d"))
        assert jax.typeof(split).sharding.spec == P("d")
        assert jnp.sin(split).sharding.mesh.axis_names == ("d",)
