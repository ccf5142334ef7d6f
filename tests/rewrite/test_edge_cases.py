"""Rewriting under every transformation and next to everything that JAX programs do: right results, kernels used."""

# Bound before jaxext hooks anything, as user code does.
from jax import grad as early_grad  # isort: skip
from jax import value_and_grad as early_value_and_grad  # isort: skip
from jax import vjp as early_vjp  # isort: skip

import functools
import traceback

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_attention as toy
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from toy_attention import attend

import jaxext
from jaxext import _settings
from jaxext._jax_compat import user_line
from jaxext.rewrite.report import FallbackError, collecting

B, T, D = 2, 5, 4
KEY = jax.random.key(0)
Q, K, V = (jax.random.normal(jax.random.fold_in(KEY, i), (B, T, D)) for i in range(3))


@pytest.fixture(autouse=True)
def _toy(monkeypatch):
    toy.use(monkeypatch)


def loss(q, k=K, v=V):
    return jnp.sum(jnp.sin(attend(q, k, v)))


def both(run):
    """Result without and with jaxext, and how many replacements were traced."""
    with jax.default_matmul_precision("highest"):
        plain = run()
        assert not toy.calls, "plain JAX must not be rewritten"
        with _settings.use(_settings.Settings()):
            rewritten = run()
    return plain, rewritten, len(toy.calls)


def assert_same(plain, rewritten):
    assert jax.tree.structure(plain) == jax.tree.structure(rewritten)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(rewritten)):
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=2e-5, atol=2e-5)


def hvp():
    return jax.jvp(jax.grad(loss), (Q,), (Q,))


def grad_under_scan():
    return jax.lax.scan(lambda c, q: (c + jax.grad(loss)(q), None), jnp.zeros_like(Q), jnp.stack([Q, 2 * Q]))[0]


def grad_of_scan():
    return jax.grad(lambda q: jax.lax.scan(lambda c, _: (attend(c, K, V), None), q, None, length=3)[0].sum())(Q)


def grad_of_cond():
    return jax.grad(lambda q: jax.lax.cond(q[0, 0, 0] < 9, lambda q: attend(q, K, V), lambda q: q * 2, q).sum())(Q)


def grad_of_switch():
    branches = [lambda q: attend(q, K, V), lambda q: q, lambda q: attend(q, V, K)]
    return jax.grad(lambda q: jax.lax.switch(2, branches, q).sum())(Q)


def forward_while():
    def body(carry):
        return carry[0] + 1, attend(carry[1], K, V)

    return jax.lax.while_loop(lambda carry: carry[0] < 3, body, (0, Q))[1]


def remat_names():
    policy = jax.checkpoint_policies.save_only_these_names("out")
    block = jax.checkpoint(lambda q: jnp.sin(checkpoint_name(attend(q, K, V), "out")), policy=policy)
    return jax.grad(lambda q: block(q).sum())(Q)


def remat_dots():
    block = jax.checkpoint(lambda q: jnp.sin(attend(q, K, V)), policy=jax.checkpoint_policies.dots_saveable)
    return jax.grad(lambda q: block(block(q)).sum())(Q)


def custom_jvp_neighbours():
    return jax.grad(lambda q: jax.nn.relu(attend(jax.nn.relu6(q), K, V)).sum())(Q)


def inner_jit():
    return jax.grad(lambda q: jax.jit(lambda q: attend(q, K, V))(q).sum())(Q)


def nested_grad():
    def outer(k):
        inner = jax.grad(lambda q: loss(q, k))(Q)
        return jnp.sum((Q - 0.1 * inner) ** 2)

    return jax.grad(outer)(K)


def probabilities_also_used():
    def objective(q):
        p = jax.nn.softmax(jnp.einsum("...qd,...kd->...qk", q, K), axis=-1)
        return jnp.einsum("...qk,...kd->...qd", p, V).sum() + (p**2).sum()

    return jax.grad(objective)(Q)


def aux_outputs():
    def objective(q):
        out = loss(q)
        return out, {"n": 3, "name": "x", "none": None, "z": q.sum(), "array": np.arange(3)}

    (value, aux), gradient = jax.value_and_grad(objective, has_aux=True)(Q)
    assert aux["n"] == 3 and aux["name"] == "x" and aux["none"] is None and isinstance(aux["array"], np.ndarray)
    return value, gradient, aux["z"]


def vmapped_with_axis_name():
    def one(q):
        value, gradient = jax.value_and_grad(lambda q: loss(q) / jax.lax.psum(1, "i"))(q)
        return value, jax.lax.pmean(gradient, "i")

    return jax.vmap(one, axis_name="i")(jnp.stack([Q, 2 * Q]))


def grad_of_vmap():
    keys, values = jnp.stack([K, 2 * K]), jnp.stack([V, 3 * V])
    return jax.grad(lambda q: jnp.sin(jax.vmap(attend)(q, keys, values)).sum())(jnp.stack([Q, 2 * Q]))


def mutable_array():
    seen = jax.new_ref(jnp.zeros(()))

    def objective(q):
        out = loss(q)
        seen[...] += jax.lax.stop_gradient(out)
        return out

    gradient = jax.grad(objective)(Q)
    return gradient, seen[...]


def bfloat16():
    q, k, v = (x.astype(jnp.bfloat16) for x in (Q, K, V))
    return jax.grad(lambda q: attend(q, k, v).astype(jnp.float32).sum())(q).astype(jnp.float32)


def random_inside():
    def objective(q, key):
        keep = jax.random.bernoulli(key, 0.5, q.shape)
        return jnp.where(keep, attend(q, K, V), 0).sum()

    return jax.grad(objective)(Q, jax.random.key(3))


CASES = {
    "eager grad": (lambda: early_grad(loss, (0, 1, 2))(Q, K, V), 1),
    "early-bound vjp": (lambda: early_vjp(loss, Q, K, V)[1](1.0), 1),
    "early-bound value_and_grad": (lambda: early_value_and_grad(loss)(Q), 1),
    "jacrev": (lambda: jax.jacrev(lambda q: attend(q, K, V)[0, 0])(Q), 1),
    "hvp, forward over reverse": (hvp, 1),
    "hvp, reverse over reverse": (lambda: jax.grad(lambda q: jax.grad(loss)(q).sum())(Q), 1),
    "hessian": (lambda: jax.hessian(lambda s: loss(Q * s))(jnp.float32(1.0)), 1),
    "vmap of grad": (lambda: jax.vmap(jax.grad(loss))(jnp.stack([Q, 2 * Q])), 1),
    "grad of vmap": (grad_of_vmap, 1),
    "vmap with a named axis": (vmapped_with_axis_name, 1),
    "gradient accumulation in scan": (grad_under_scan, 1),
    "grad of scan": (grad_of_scan, 1),
    "grad of cond": (grad_of_cond, 1),
    "grad of switch": (grad_of_switch, 1),
    "remat, saved by name": (remat_names, 1),
    "remat, dots saved": (remat_dots, 2),
    "custom_jvp neighbours": (custom_jvp_neighbours, 1),
    "inner jit": (inner_jit, 1),
    "grad inside grad": (nested_grad, 1),
    "probabilities also used": (probabilities_also_used, 1),
    "aux outputs that are no arrays": (aux_outputs, 1),
    "mutable array": (mutable_array, 1),
    "random numbers inside": (random_inside, 1),
}


EAGER = ("eager grad", "early-bound vjp", "jacrev", "vmap of grad", "grad of scan", "mutable array", "inner jit")


@pytest.mark.parametrize(("case", "jitted"), [(c, True) for c in CASES] + [(c, False) for c in EAGER])
def test_result_is_that_of_plain_jax_and_the_kernel_is_used(case, jitted):
    run, at_least = CASES[case]
    plain, rewritten, calls = both(jax.jit(lambda: run()) if jitted else run)
    assert_same(plain, rewritten)
    assert calls >= at_least


def test_while_loop_in_a_forward_program():
    plain, rewritten, calls = both(jax.jit(forward_while))
    assert_same(plain, rewritten)
    assert calls == 1


def test_bfloat16_is_close():
    plain, rewritten, calls = both(jax.jit(bfloat16))
    np.testing.assert_allclose(plain, rewritten, atol=3e-2)
    assert calls == 1


def test_jvp_alone_is_left_to_jax():
    plain, rewritten, _ = both(lambda: jax.jvp(loss, (Q,), (Q,)))
    assert_same(plain, rewritten)


def test_custom_vjp_around_the_pattern_keeps_the_users_rule():
    @jax.custom_vjp
    def scaled(q):
        return attend(q, K, V)

    scaled.defvjp(lambda q: (attend(q, K, V), q), lambda q, g: (7 * g,))
    plain, rewritten, _ = both(jax.jit(lambda: jax.grad(lambda q: scaled(q).sum())(Q)))
    assert_same(plain, rewritten)


def test_custom_jvp_around_the_pattern_keeps_the_users_rule():
    @jax.custom_jvp
    def tripled(q):
        return attend(q, K, V)

    tripled.defjvp(lambda primals, tangents: (tripled(*primals), 3 * tangents[0]))
    plain, rewritten, _ = both(jax.jit(lambda: jax.grad(lambda q: tripled(q).sum())(Q)))
    assert_same(plain, rewritten)


@pytest.mark.parametrize("check_vma", [True, False])
def test_grad_of_shard_map(check_vma):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("a",))
    mapped = jax.shard_map(attend, mesh=mesh, in_specs=(P("a"), P("a"), P("a")), out_specs=P("a"), check_vma=check_vma)

    def run():
        return jax.jit(jax.grad(lambda q, k, v: jnp.sin(mapped(q, k, v)).sum(), (0, 1, 2)))(Q, K, V)

    plain, rewritten, calls = both(run)
    assert_same(plain, rewritten)
    assert calls == 1


def test_operands_that_vary_over_different_axes_are_brought_together():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("a",))
    mapped = jax.shard_map(attend, mesh=mesh, in_specs=(P("a"), P(), P()), out_specs=P("a"))

    def run():
        return jax.jit(jax.grad(lambda q, k, v: jnp.sin(mapped(q, k, v)).sum(), (0, 1, 2)))(Q, K[0], V[0])

    plain, rewritten, calls = both(run)
    assert_same(plain, rewritten)
    assert calls == 1


def test_data_parallel_step_in_shard_map():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("a",))

    def device_step(q, k, v):
        value, gradients = jax.value_and_grad(loss, (0, 1, 2))(q, k, v)
        return jax.lax.psum(value, "a"), gradients

    step = jax.shard_map(device_step, mesh=mesh, in_specs=(P("a"),) * 3, out_specs=(P(), (P("a"),) * 3))
    plain, rewritten, calls = both(lambda: jax.jit(step)(Q, K, V))
    assert_same(plain, rewritten)
    assert calls == 1


def test_scan_with_a_collective_inside_shard_map():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("a",))

    def layers(q, k, v):
        def body(carry, _):
            return attend(carry, k, v) + jax.lax.pmean(carry, "a"), None

        return jax.lax.scan(body, q, None, length=2)[0]

    mapped = jax.shard_map(layers, mesh=mesh, in_specs=(P("a"),) * 3, out_specs=P("a"))
    plain, rewritten, calls = both(lambda: jax.jit(jax.grad(lambda q: mapped(q, K, V).sum()))(Q))
    assert_same(plain, rewritten)
    assert calls >= 1


def test_python_that_looks_at_values_falls_back_and_says_so():
    def objective(q):
        return loss(q) if q.max() > -1e9 else 0.0

    plain, rewritten, calls = both(lambda: jax.grad(objective)(Q))
    assert_same(plain, rewritten)
    assert calls == 0
    with collecting(jaxext.Report()) as report, _settings.use(_settings.Settings()):
        jax.grad(objective)(Q)
    assert "Python control flow on array values" in report.fallbacks[0].reason
    assert report.fallbacks[0].location == "objective"


def test_strict_makes_the_fall_back_an_error():
    def objective(q):
        return loss(q) if q.max() > -1e9 else 0.0

    expected = r"JAXEXT_STRICT: .*objective.*Python control flow on array values"
    with _settings.use(_settings.Settings(strict=True)), pytest.raises(FallbackError, match=expected):
        jax.grad(objective)(Q)


def test_users_error_surfaces_unchanged_with_the_users_frames():
    def wrong(q):
        return attend(q, K[:, :, :3], V).sum()

    def raised():
        try:
            jax.jit(jax.grad(wrong))(Q)
        except Exception as error:
            names = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
            files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
            return type(error), str(error).splitlines()[0], names, files

    plain = raised()
    with _settings.use(_settings.Settings()):
        rewritten = raised()
    assert rewritten[:2] == plain[:2]
    assert rewritten[2] == plain[2]
    assert not any("/jaxext/" in name and "/tests/" not in name for name in rewritten[3])


def test_the_users_function_runs_once_a_trace():
    runs = []

    def objective(q):
        runs.append(1)
        return loss(q)

    with _settings.use(_settings.Settings()):
        jax.grad(objective)(Q)
    assert len(runs) == 1


def test_callbacks_keep_their_order():
    seen = []

    def objective(q):
        jax.debug.callback(lambda: seen.append("before"), ordered=True)
        out = attend(q, K, V)
        jax.debug.callback(lambda x: seen.append("after"), out.sum(), ordered=True)
        return out.sum()

    with _settings.use(_settings.Settings()):
        jax.block_until_ready(jax.jit(lambda q: objective(q))(Q))
        jax.effects_barrier()
    assert seen == ["before", "after"]
    assert len(toy.calls) == 1


def test_source_lines_and_name_scopes_survive_the_replay():
    def objective(q):
        with jax.named_scope("encoder"):
            out = attend(q, K, V)
        return jnp.tanh(out).sum()

    with _settings.use(_settings.Settings()):
        jaxpr = jax.jit(jax.grad(objective)).trace(Q).jaxpr
    tanh = next(eqn for eqn in jaxpr.eqns if eqn.primitive.name == "tanh")
    assert "test_edge_cases.py" in user_line(tanh) and "(objective)" in user_line(tanh)
    scopes = {str(eqn.source_info.name_stack) for eqn in jaxpr.eqns}
    assert any("encoder" in scope and "jaxext.attention" in scope for scope in scopes)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        q, k, v = jnp.split(nn.Dense(3 * D)(x), 3, -1)
        return x + attend(q, k, v), None


class Linen(nn.Module):
    scan: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block) if self.remat else Block
        if self.scan:
            return nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()(x, None)[0]
        for _ in range(3):
            x, _ = block()(x)
        return x


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])
@pytest.mark.parametrize("remat", [False, True], ids=["stored", "remat"])
def test_linen_train_step_with_donation_and_static_arguments(scan, remat):
    model = Linen(scan, remat)
    optimizer = optax.sgd(1e-3, momentum=0.9)

    def run():
        params = model.init(jax.random.key(1), Q)
        state = optimizer.init(params)

        @functools.partial(jax.jit, donate_argnums=(0, 1), static_argnames=("flag",))
        def step(params, state, batch, flag="a"):
            value, gradients = early_value_and_grad(lambda p: jnp.mean(model.apply(p, batch) ** 2))(params)
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state, value

        first = jax.tree.leaves(params)[0]
        for _ in range(2):
            params, state, value = step(params, state, Q, flag="b")
        assert first.is_deleted()
        return params, value

    plain, rewritten, calls = both(run)
    assert_same(plain, rewritten)
    assert calls >= (1 if scan else 3)


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.qkv = nnx.Linear(D, 3 * D, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        q, k, v = jnp.split(self.qkv(x), 3, -1)
        return x + self.drop(attend(q, k, v))


@pytest.mark.parametrize("remat", [False, True], ids=["stored", "remat"])
def test_nnx_train_step_with_one_shot_state(remat):
    def run():
        model = NnxBlock(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.sgd(1e-3, momentum=0.9), wrt=nnx.Param)

        def objective(model, x):
            forward = nnx.remat(lambda m, x: m(x)) if remat else (lambda m, x: m(x))
            return jnp.mean(forward(model, x) ** 2)

        @nnx.jit
        def step(model, optimizer, x):
            value, gradients = nnx.value_and_grad(objective)(model, x)
            optimizer.update(model, gradients)
            return value

        losses = [step(model, optimizer, Q) for _ in range(2)]
        return losses, nnx.to_pure_dict(nnx.state(model, nnx.Param))

    plain, rewritten, calls = both(run)
    assert_same(plain, rewritten)
    assert calls >= 1


@pytest.mark.parametrize("constant", [2, 2.5, True])
def test_a_constant_result_is_an_array_of_stocks_type(constant):
    """A function's traced constants are numbers in its jaxpr, and must not reach the user as such."""

    def loss(x):
        return jnp.sum(x**2), {"array": jnp.array(constant), "full": jnp.full((), constant)}

    x = jnp.arange(3.0)
    step = jax.value_and_grad(loss, has_aux=True)
    stock = step(x)
    jaxext.install(memory="system")
    try:
        ours = step(x)
    finally:
        jaxext.uninstall()
    for mine, theirs in zip(jax.tree.leaves(ours), jax.tree.leaves(stock), strict=True):
        assert isinstance(mine, jax.Array)
        assert (mine.dtype, mine.shape, mine.weak_type) == (theirs.dtype, theirs.shape, theirs.weak_type)
        np.testing.assert_array_equal(mine, theirs)


def test_a_derivative_rule_that_is_given_an_array_outside_of_differentiation_is_left_to_stock():
    """`nondiff_argnums` with a random key, as samplers have it: such a rule works outside of a trace only."""

    @functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
    def sample(scale, key):
        return scale * jax.random.normal(key, (4,))

    @sample.defjvp
    def _(key, primals, tangents):
        return sample(primals[0], key), tangents[0] * jax.random.normal(key, (4,))

    @functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
    def scaled(x, key):
        return x

    scaled.defvjp(lambda x, key: (x, None), lambda key, _, ct: (ct * jax.random.uniform(key, ct.shape),))

    for function in (sample, scaled):

        def loss(scale, function=function):
            return jnp.sum(function(scale, jax.random.fold_in(jax.random.PRNGKey(0), 1)))

        expected = jax.grad(loss)(jnp.float32(2.0))
        with jaxext.collect() as report:
            jaxext.install()
            try:
                found = jax.grad(loss)(jnp.float32(2.0))
            finally:
                jaxext.uninstall()
        assert found == expected
        assert "nondiff_argnums" in report.fallbacks[0].reason
