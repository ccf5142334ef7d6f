"""Tables of which only the rows with a gradient are updated: what all of stock's passes over them give."""

import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from exchanged import assert_same, calls, details, needs_kernels

import jaxext
from jaxext.kernels._distinct_rows import DISTINCT

pytestmark = needs_kernels
HELD, WIDTH, LOOKED_UP = 9000, 16, 700


def table(seed=0, held=HELD):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((held, WIDTH)), jnp.float32)


def numbers(seed=1, held=HELD, outside=0):
    chosen = np.random.default_rng(seed).zipf(1.2, LOOKED_UP) % held
    chosen[:outside] = held + 5
    return jnp.asarray(chosen, jnp.int32)


def loss_of(x, rows):
    return jnp.sum(jnp.sin(x[rows]) * jnp.arange(1.0, WIDTH + 1))


def donating(step, operands=2):
    """Jitted; it may write over the table and its state."""
    return jax.jit(step, donate_argnums=tuple(range(operands)))


def copies(*args):
    return jax.tree.map(lambda x: x + 0, args)


def assert_updated_by_rows(step, *args, operands=2, times=1):
    """Rows alone are updated, and the results are stock's bit for bit."""
    function = donating(step, operands)
    assert calls("distinct_rows", function, *args) == times
    assert_same(jaxext.accelerate(function)(*copies(*args)), jax.jit(step)(*args))


def found(step, *args, operands=2):
    return calls("distinct_rows", donating(step, operands), *args)


def step_of(optimizer):
    def step(x, state, rows):
        gradient = jax.grad(loss_of)(x, rows)
        updates, state = optimizer.update(gradient, state, x)
        return optax.apply_updates(x, updates), state

    return step


OPTIMIZERS = {
    "adagrad": optax.adagrad(0.02),
    "adagrad from zero": optax.adagrad(0.5, initial_accumulator_value=0.0),
    "sgd": optax.sgd(0.1),
}
DENSE = {
    "adam": optax.adam(1e-3),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "rmsprop": optax.rmsprop(1e-3),
    "weight decay": optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1)),
    "norm": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
    "schedule": optax.sgd(optax.linear_schedule(0.1, 0.0, 100)),
}


def after(step, optimizer, steps=4, x=None):
    x = table() if x is None else x
    state = optimizer.init(x)
    for n in range(steps):
        x, state = step(x, state, numbers(seed=n))
    return x, state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_and_state_are_stocks_bit_for_bit(name):
    optimizer = OPTIMIZERS[name]
    step, x = step_of(optimizer), table()
    assert found(step, x, optimizer.init(x), numbers()) == 1
    assert_same(after(jaxext.accelerate(donating(step)), optimizer), after(jax.jit(step), optimizer))


@pytest.mark.parametrize("name", DENSE)
def test_an_update_that_changes_other_rows_or_may_is_left_dense(name):
    optimizer, x = DENSE[name], table()
    assert found(step_of(optimizer), x, optimizer.init(x), numbers()) == 0


def adagrad_by_hand(x, total, rows, scale):
    gradient = jax.grad(loss_of)(x, rows)
    total = total + jnp.square(gradient)
    return x - scale(gradient, total), total


@pytest.mark.parametrize(
    "scale",
    [
        lambda g, total: g / jnp.sqrt(total),
        lambda g, total: g * jax.lax.rsqrt(total + 1e-7),
        lambda g, total: g * jnp.where(total > -1.0, jax.lax.rsqrt(total + 1e-7), 0.0),
        lambda g, total: g * jnp.where(total > 0, jax.lax.rsqrt(total), jnp.inf),
        lambda g, total: g / jnp.maximum(total, 0.0),
    ],
    ids=["square root", "no condition", "a weaker condition", "infinite otherwise", "a zero divisor"],
)
def test_what_could_be_nan_without_a_gradient_is_left_dense(scale):
    x = table()
    assert found(lambda x, t, r: adagrad_by_hand(x, t, r, scale), x, jnp.abs(x), numbers()) == 0


@pytest.mark.parametrize(
    "scale",
    [
        lambda g, total: 0.1 * g,
        lambda g, total: jnp.where(total > 0, g * jax.lax.rsqrt(total + 1e-7), 0.0) * 3.0,
        lambda g, total: jnp.where(total > 2.0, g / jnp.sqrt(total), 0.5 * g),
    ],
    ids=["descent", "product within the condition", "quotient within the condition"],
)
def test_updates_by_hand_are_stocks_bit_for_bit_beside_any_numbers(scale):
    step = lambda x, t, r: adagrad_by_hand(x, t, r, scale)  # noqa: E731
    x, total = table(), jnp.abs(table(3))
    special = jnp.array([0.0, jnp.inf, jnp.nan, -1.0, 3e38, 1e-30], jnp.float32)
    total = total.at[jnp.arange(0, HELD, 7)].set(jnp.resize(special, WIDTH))
    assert_updated_by_rows(step, x, total, numbers())


@pytest.mark.parametrize("mode", ["drop", "clip"])
def test_numbers_of_no_row_are_dropped_or_mean_the_nearest_one(mode):
    def step(x, rows, updates):
        return x - 0.1 * jnp.zeros_like(x).at[rows].add(updates, mode=mode)

    rows = numbers(outside=50)
    updates = jnp.ones((LOOKED_UP, WIDTH)) * jnp.arange(LOOKED_UP)[:, None]
    assert_updated_by_rows(step, table(), rows, updates, operands=1)


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
@pytest.mark.parametrize(
    "results",
    [
        lambda x, g: (x - 0.1 * g, g),
        lambda x, g: (x - 0.1 * g, jnp.sum(g)),
        lambda x, g: (x - 0.1 * g, x + g),
        lambda x, g: (x - 0.1 * g)[:5],
        lambda x, g: x - 0.1 * (g + jnp.ones(WIDTH)),
        lambda x, g: jnp.where(x > 0, x - g, 0.0),
    ],
    ids=["gradient", "sum", "one operand twice", "slice", "a row added", "cut off"],
)
def test_other_uses_of_the_gradient_leave_the_update_dense(results):
    def step(x, rows):
        return results(x, jax.grad(loss_of)(x, rows))

    assert found(step, table(), numbers(), operands=1) == 0
    assert_same(jaxext.accelerate(step)(table(), numbers()), jax.jit(step)(table(), numbers()))


def test_rows_may_be_written_over_what_a_pass_over_the_table_has_made():
    step = lambda x, rows: 0.99 * x - 0.1 * jax.grad(loss_of)(x, rows)  # noqa: E731
    # What is made in the program need not be donated.
    assert calls("distinct_rows", step, table(), numbers()) == 1
    ours, stock = jaxext.accelerate(step)(table(), numbers()), jax.jit(step)(table(), numbers())
    # Stock may leave out the rounding of a product that it adds.
    np.testing.assert_allclose(ours, stock, rtol=0, atol=float(jnp.finfo(jnp.float32).eps) * np.abs(stock).max())


def test_small_tables_and_many_updates_stay_with_stock():
    step, optimizer = step_of(optax.sgd(0.1)), optax.sgd(0.1)
    for held in (500, 2000):
        x = table(held=held)
        assert found(step, x, optimizer.init(x), numbers(held=held)) == 0


def test_tables_with_several_dimensions_a_row_and_matrices_of_numbers_are_found():
    def step(x, rows):
        return x - 0.1 * jax.grad(lambda x: jnp.sum(jnp.cos(x[rows.reshape(7, 100)])))(x)

    x = table().reshape(HELD, 4, 4)
    assert_updated_by_rows(step, x, numbers(), operands=1)


def test_steps_in_a_scan_and_two_tables_are_updated_by_rows():
    optimizer = optax.adagrad(0.1)

    def run(tables, state, rows):
        def step(carry, rows):
            tables, state = carry
            gradients = jax.grad(lambda t: loss_of(t["a"], rows) * loss_of(t["b"], rows[:500]))(tables)
            updates, state = optimizer.update(gradients, state, tables)
            return (optax.apply_updates(tables, updates), state), None

        return jax.lax.scan(step, (tables, state), rows)[0]

    tables = {"a": table(), "b": table(5)}
    args = tables, optimizer.init(tables), jnp.stack([numbers(n) for n in range(3)])
    assert calls("distinct_rows", run, *args) == 2
    assert_same(jaxext.accelerate(run)(*args), jax.jit(run)(*args))


def test_tables_that_are_not_donated_stay_as_they_were_and_are_copied_where_that_pays():
    x = table()
    for (name, optimizer), times in zip(OPTIMIZERS.items(), (1, 1, 0), strict=True):
        step, state = step_of(optimizer), optimizer.init(x)
        before = jax.tree.map(np.array, (x, state))
        assert calls("distinct_rows", step, x, state, numbers()) == times, name
        jaxext.accelerate(step)(x, state, numbers())
        assert_same((x, state), before)


def test_a_table_that_is_read_later_counts_as_copied():
    def step(x, rows):
        return x - 0.1 * jax.grad(loss_of)(x, rows), jnp.sum(x)

    assert found(step, table(), numbers(), operands=1) == 0


def test_one_function_jitted_with_and_without_donation_is_judged_each_time():
    step, x = step_of(optax.sgd(0.1)), table()
    args = x, optax.sgd(0.1).init(x), numbers()
    for _ in range(2):
        assert calls("distinct_rows", jax.jit(step), *args) == 0
        assert calls("distinct_rows", donating(step), *args) == 1


def test_it_is_reported_and_can_be_excluded_with_scatter():
    step, x, optimizer = step_of(optax.sgd(0.1)), table(), optax.sgd(0.1)
    args = x, optimizer.init(x), numbers()
    assert "updates only rows that have a gradient" in details("scatter", donating(step), *args)
    assert "distinct_rows" not in jaxext.accelerate(donating(step), exclude="scatter").lower(*args).as_text()


def test_differentiated_through_it_is_what_was_written():
    def after_two(x, rows):
        x = x - 0.1 * jax.grad(loss_of)(x, rows)
        return loss_of(x, rows)

    gradient = jax.grad(after_two)
    assert found(gradient, table(), numbers(), operands=1) == 1
    ours, stock = jaxext.accelerate(donating(gradient, 1))(table(), numbers()), jax.jit(gradient)(table(), numbers())
    # Stock may leave out the rounding of a product that it adds.
    np.testing.assert_allclose(ours, stock, rtol=0, atol=float(jnp.finfo(jnp.float32).eps) * np.abs(stock).max())


@pytest.mark.parametrize(("n", "held"), [(1, 1), (5000, 3), (40, 100_000), (3000, 3000)])
@pytest.mark.parametrize("clips", [False, True])
def test_each_row_comes_once_in_the_order_of_the_numbers(n, held, clips):
    chosen = jnp.asarray(np.random.default_rng(n).integers(-3, held + 3, (n, 1)), jnp.int32)
    assert_same(DISTINCT(chosen, held=held, clips=clips), DISTINCT.reference(chosen, held=held, clips=clips))


def test_numbers_of_another_shape_are_refused_by_name():
    with pytest.raises(ValueError, match=r"'indices' has shape \(4,\); expected \[n, 1\], so reshape it"):
        DISTINCT(jnp.zeros(4, jnp.int32), held=3, clips=False)
    with pytest.raises(ValueError, match="'held' is 0; expected the number of a table's rows"):
        DISTINCT(jnp.zeros((4, 1), jnp.int32), held=0, clips=False)


def test_a_recommenders_losses_agree_over_steps(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "compat" / "programs")
    recommender = importlib.import_module("recommender_jax")

    def losses(wrap):
        options = recommender.parse_arguments(["--rows", "2000", "--batch", "128"])
        step, *state = recommender.build(options)
        step, batches, found = wrap(step), recommender.clicks(options.batch, options.rows, 0), []
        for _ in range(6):
            batch = jax.tree.map(jnp.asarray, next(batches))
            text = step.lower(*state, batch).as_text() if not found else text  # noqa: F821
            *state, loss = step(*state, batch)
            found.append(float(loss))
        return text.count("@jaxext_distinct_rows("), found

    (count, ours), (none, stock) = losses(jaxext.accelerate), losses(lambda step: step)
    assert (count, none) == (1, 0)
    np.testing.assert_allclose(ours, stock, rtol=1e-5)
