"""Products of a loop's steps that are taken out of the loop: which, as exact as stock JAX, and which stay."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exchanged import arrays, assert_exact, details
from flax import nnx

import jaxext
from jaxext import _jax_compat as compat

BATCH, STEPS, FEATURES = 4, 12, 16


def before_and_after(before, after):
    parts = [f"{count} {place}" for count, place in ((before, "before"), (after, "after")) if count]
    return f"{STEPS} steps, products outside the loop: {' and '.join(parts)} it"


def products_in_loops(function, *args):
    """How many products the loops of a lowered program hold."""

    def count(jaxpr, inside):
        jaxpr, _ = compat.open_jaxpr(jaxpr)
        total = 0
        for eqn in jaxpr.eqns:
            total += inside and eqn.primitive.name == "dot_general"
            inner = [eqn.params[name] for name in ("jaxpr", "call_jaxpr", "written") if name in eqn.params]
            total += sum(count(x, inside or eqn.primitive.name == "scan") for x in inner)
        return total

    return count(function.trace(*args).jaxpr, False)


def simple(params, x, h):
    """The states [steps, batch, features] of tanh(x W + h U + b)."""

    def step(h, x):
        h = jnp.tanh(x @ params["w"] + h @ params["u"] + params["b"])
        return h, h

    return jax.lax.scan(step, h, x)[1]


def simple_arguments(dtype="float32"):
    w, u, b, x, h = arrays(
        (FEATURES, FEATURES),
        (FEATURES, FEATURES),
        (FEATURES,),
        (STEPS, BATCH, FEATURES),
        (BATCH, FEATURES),
        dtype=dtype,
    )
    return {"w": w / 4, "u": u / 4, "b": b}, x, h


def gradients(forward):
    def loss(params, *args):
        return jnp.sum(jnp.square(forward(params, *args)))

    return jax.value_and_grad(loss)


LINEN = {
    "LSTM": (nn.LSTMCell, {}),
    "optimized LSTM": (nn.OptimizedLSTMCell, {}),
    "GRU": (nn.GRUCell, {}),
    "minimal gated unit": (nn.MGUCell, {}),
    "simple": (nn.SimpleCell, {}),
    "LSTM from the end": (nn.OptimizedLSTMCell, {"reverse": True, "keep_order": True}),
    "LSTM, steps first": (nn.OptimizedLSTMCell, {"time_major": True}),
}


@pytest.mark.parametrize("name", LINEN)
def test_the_cells_of_linen(name):
    cell, options = LINEN[name]
    model, wide = (nn.RNN(cell(FEATURES, dtype=d, param_dtype=d), **options) for d in (jnp.float32, np.float64))
    (x,) = arrays((BATCH, STEPS, FEATURES) if "first" not in name else (STEPS, BATCH, FEATURES))
    params = model.init(jax.random.key(0), x)
    step = gradients(model.apply)
    assert len(details("recurrence", step, params, x)) == 2
    # What waits for its turn: the state's product, and its cotangent's.
    waiting = {"LSTM": 8, "GRU": 6, "minimal gated unit": 4}.get(name, 2)
    assert products_in_loops(jaxext.accelerate(step), params, x) == waiting
    assert products_in_loops(jax.jit(step), params, x) == 5 * waiting // 2
    assert_exact(step, params, x, in_float64=gradients(wide.apply))


@pytest.mark.parametrize("cell", [nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.GRUCell, nnx.SimpleCell])
def test_the_cells_of_nnx(cell):
    (x,) = arrays((BATCH, STEPS, FEATURES))

    @nnx.jit
    def step(model, x):
        return nnx.value_and_grad(lambda model: jnp.sum(jnp.square(model(x))))(model)

    def run():
        loss, grads = step(nnx.RNN(cell(FEATURES, FEATURES, rngs=nnx.Rngs(0))), x)
        return loss, nnx.to_pure_dict(nnx.state(grads))

    stock = run()
    jaxext.install(memory="system")
    try:
        with jaxext.collect() as report:
            ours = run()
    finally:
        jaxext.uninstall()
    assert [entry.kernel for entry in report.replaced].count("recurrence") == 2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max()), ours, stock)


def test_linen_with_lengths_and_in_both_directions():
    def bidirectional(dtype):
        cells = (nn.RNN(nn.GRUCell(FEATURES, dtype=dtype, param_dtype=dtype)) for _ in range(2))
        return nn.Bidirectional(*cells)

    (x,) = arrays((BATCH, STEPS, FEATURES))
    lengths = jnp.array([STEPS, 1, 5, 0])
    params = bidirectional(jnp.float32).init(jax.random.key(0), x)
    step, wide = (
        gradients(lambda params, x, dtype=dtype: bidirectional(dtype).apply(params, x, seq_lengths=lengths))
        for dtype in (jnp.float32, np.float64)
    )
    assert len(details("recurrence", step, params, x)) == 4
    assert_exact(step, params, x, in_float64=wide)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_loop_by_hand(dtype):
    args = simple_arguments(dtype)
    step = gradients(simple)
    assert details("recurrence", step, *args) == [before_and_after(1, 0), before_and_after(0, 2)]
    assert_exact(step, *args)


def test_sums_in_float32_of_products_in_bfloat16_are_not_rounded_in_between():
    params, x, h = simple_arguments()

    def narrow(dtype):
        def forward(params, x, h):
            def step(h, x):
                p = jax.tree.map(lambda p: p.astype(dtype), params)
                h = jnp.tanh(x.astype(dtype) @ p["w"] + h @ p["u"] + p["b"])
                return h, h.astype(x.dtype)

            return jax.lax.scan(step, h.astype(dtype), x)[1]

        return gradients(forward)

    assert details("recurrence", narrow(jnp.bfloat16), params, x, h) == [before_and_after(1, 0), before_and_after(0, 2)]
    assert_exact(narrow(jnp.bfloat16), params, x, h, in_float64=narrow(np.float64))


def test_in_vmap_checkpoint_and_another_loop():
    params, x, h = simple_arguments()
    step = jax.vmap(gradients(jax.checkpoint(simple)), in_axes=(None, 0, 0))
    assert len(details("recurrence", step, params, x[None], h[None])) >= 1
    assert_exact(step, params, x[None], h[None])

    def twice(params, x, h):
        return jax.lax.scan(lambda h, _: (simple(params, x, h)[-1], None), h, None, length=2)[0]

    assert len(details("recurrence", gradients(twice), params, x, h)) == 2
    assert_exact(gradients(twice), params, x, h)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("unroll", [1, 5])
def test_order_and_unrolling_are_kept(reverse, unroll):
    w, x, start = arrays((FEATURES, FEATURES), (STEPS, BATCH, FEATURES), (BATCH, FEATURES))

    def forward(w, x, start):
        def step(carry, x):
            state, total = carry
            state = 0.5 * state + jnp.sin(x @ w)
            return (state, total + x.T @ state), (state, state @ w)

        zeros = jnp.ones((FEATURES, FEATURES))
        return jax.lax.scan(step, (start, zeros), x, reverse=reverse, unroll=unroll)

    assert details("recurrence", forward, w, x, start) == [before_and_after(1, 2)]
    assert_exact(forward, w, x, start)


def test_a_product_of_a_state_that_comes_as_a_slice_is_taken_from_the_slices():
    a, x = arrays((FEATURES, FEATURES), (STEPS, BATCH, FEATURES))

    def forward(a, x):
        def step(total, x):
            return total + x.T @ x, None

        return jax.lax.scan(step, a, x)[0]

    assert details("recurrence", forward, a, x) == [before_and_after(0, 1)]
    assert_exact(forward, a, x)


def test_operations_inside_what_is_left_of_a_loop_are_exchanged_too():
    params, x, h = simple_arguments()

    def forward(params, x, h):
        def step(h, x):
            h = jnp.tanh(x @ params["w"] + h @ params["u"])
            return h, jnp.argmax(jnp.tile(h, (8, 32)), axis=-1)

        return jax.lax.scan(step, h, x)

    kernels = [entry.kernel for entry in jaxext.explain(forward)(params, x, h).replaced]
    assert sorted(kernels) == ["argmax", "recurrence"]


def sums_that_are_seen(a, x):
    def step(total, x):
        total = total + x.T @ x
        return total, total[0]

    return jax.lax.scan(step, a, x)


def sums_that_are_used(a, x):
    def step(total, x):
        return total + (x @ total).T @ x, None

    return jax.lax.scan(step, a, x)


def sums_with_a_factor_each_step(a, x):
    def step(total, x):
        return 0.9 * total + x.T @ x, None

    return jax.lax.scan(step, a, x)


def a_printing_loop(a, x):
    def step(total, x):
        jax.debug.print("{}", x[0, 0])
        return total + x.T @ x, x @ a

    return jax.lax.scan(step, a, x)


@pytest.mark.parametrize(
    "function", [sums_that_are_seen, sums_that_are_used, sums_with_a_factor_each_step, a_printing_loop]
)
def test_what_has_to_wait_stays(function):
    a, x = arrays((FEATURES, FEATURES), (STEPS, BATCH, FEATURES))
    assert details("recurrence", function, a, x) == []


@pytest.mark.parametrize(("steps", "rows"), [(7, 4), (12, 1024)], ids=["few steps", "many rows a step"])
def test_what_is_as_fast_in_the_loop_stays(steps, rows):
    params, _, _ = simple_arguments()
    x, h = arrays((steps, rows, FEATURES), (rows, FEATURES))
    assert details("recurrence", gradients(simple), params, x, h) == []


def test_accumulated_gradients_of_large_batches_stay_so_that_memory_does():
    w, x = arrays((64, 64), (STEPS, 512, 64))

    def accumulated(w, x):
        def step(total, x):
            return total + jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w)))(w), None

        return jax.lax.scan(step, jnp.zeros_like(w), x)[0]

    assert details("recurrence", accumulated, w, x) == []


def test_a_product_that_would_stack_far_more_than_the_loop_does_stays():
    w, x = arrays((2, 1 << 16), (300, 4, 2))

    def forward(w, x):
        def step(total, x):
            return total + jnp.sum(jnp.sin(x @ w + total)), None

        return jax.lax.scan(step, jnp.zeros(()), x)[0]

    assert details("recurrence", forward, w, x) == []


def test_a_layer_scan_keeps_its_own_weights_inside():
    ws, x = arrays((STEPS, FEATURES, FEATURES), (BATCH, FEATURES))

    def forward(ws, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]

    assert details("recurrence", gradients(forward), ws, x) == []


def test_it_is_switched_off_by_name():
    args = simple_arguments()
    step = jaxext.accelerate(gradients(simple), exclude="recurrence")
    assert products_in_loops(step, *args) == products_in_loops(jax.jit(gradients(simple)), *args)
    assert products_in_loops(jaxext.accelerate(gradients(simple)), *args) == 2
