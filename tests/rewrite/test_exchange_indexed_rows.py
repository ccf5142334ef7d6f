"""`gather` and `scatter` of whole rows on their kernels: the very results of stock JAX."""

import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exchanged import DTYPES, any_bits, assert_exchanged, assert_same, bits, calls, needs_kernels

import jaxext
from jaxext.kernels._indexed_rows import GATHER, SCATTER, filler

pytestmark = needs_kernels
MODES = ["clip", "fill", "promise_in_bounds"]
ORDERS = ["as they come", "ascending"]


def rows(seed, shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) * 8).astype(dtype)


def stored_bits(seed, shape, dtype):
    """Any bits; but no bfloat16 denormals, which XLA in JAX 0.12 turns to zero where it fills, and the kernel keeps."""
    x = any_bits(np.random.default_rng(seed), shape, dtype)
    return jnp.where(jnp.abs(x) < jnp.finfo(dtype).tiny, 0, x) if dtype == "bfloat16" else x


def numbers(seed, n, shape, *, outside=0, order="as they come"):
    chosen = np.random.default_rng(seed).integers(-outside, n + outside, shape).astype(np.int32)
    return jnp.asarray(np.sort(chosen, axis=None).reshape(shape) if order == "ascending" else chosen)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_any_bits_are_read_as_they_are(dtype, mode):
    table = stored_bits(0, (70, 64), dtype)
    indices = numbers(1, 70, 400, outside=0 if mode == "promise_in_bounds" else 9)
    assert_exchanged("gather_rows", lambda x, i: x.at[i].get(mode=mode), table, indices)


@pytest.mark.parametrize("fill", [0, -3, None])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "uint16", "int32"])
def test_rows_that_are_not_there_hold_the_fill_value(dtype, fill):
    fill = 3 if dtype == "uint16" and fill else fill
    table, indices = rows(0, (9, 48), dtype), numbers(1, 9, (20, 30), outside=9)
    assert_exchanged("gather_rows", lambda x, i: x.at[i].get(mode="fill", fill_value=fill), table, indices)


@pytest.mark.parametrize(
    "read",
    [
        lambda x, i: x[i],
        lambda x, i: jnp.take(x, i, axis=0),
        lambda x, i: jnp.take(x, i.reshape(20, 25), axis=0, mode="clip"),
        lambda x, i: x.reshape(50, 8, 8)[i],
        lambda x, i: x.reshape(5, 10, 64)[i % 5, i % 10],
        lambda x, i: x.reshape(2, 5, 5, 64)[i % 2, i % 5, i % 3],
    ],
    ids=["brackets", "take", "take of a matrix", "rows of matrices", "two dimensions", "three dimensions"],
)
def test_every_spelling_of_whole_rows_is_found(read):
    assert_exchanged("gather_rows", read, rows(0, (50, 64)), numbers(1, 50, 500, outside=20))


@pytest.mark.parametrize("width", [1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 129, 1000])
@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "float32"])
def test_rows_of_every_length_are_copied_whole(dtype, width):
    table, indices = stored_bits(width, (31, width), dtype), numbers(1, 31, (300, 1), outside=3)
    for fill in (None, filler(dtype, None)):
        assert_same(GATHER(table, indices, fill=fill), GATHER.reference(table, indices, fill=fill))


def test_results_past_the_caches_are_stocks():
    assert_exchanged("gather_rows", lambda x, i: x[i], rows(0, (999, 64)), numbers(1, 999, 70_000, outside=99))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mode", ["clip", "drop", "promise_in_bounds"])
@pytest.mark.parametrize("kind", ["add", "max", "min"])
@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_rows_take_in_their_updates_in_the_order_of_the_indices(dtype, kind, mode, order):
    table, updates = rows(0, (800, 70), dtype), rows(1, (3000, 70), dtype)
    indices = numbers(2, 800, 3000, outside=0 if mode == "promise_in_bounds" else 7, order=order)
    function = lambda x, i, u: getattr(x.at[i], kind)(u, mode=mode)  # noqa: E731
    assert_exchanged("scatter_rows", function, table, indices, updates)


@pytest.mark.parametrize("kind", ["max", "min"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_extremes_with_nans_infinities_and_zeros_of_both_signs_are_stocks(dtype, kind):
    special = np.array([0.0, -0.0, np.inf, -np.inf, 1.0, -1.0], np.float32)
    rng = np.random.default_rng(3)
    updates = special[rng.integers(0, 6, (900, 65))]
    updates[5, 6] = updates[50, 60] = np.nan
    table = jnp.asarray(special[rng.integers(0, 6, (300, 65))], dtype)
    function = lambda x, i, u: getattr(x.at[i], kind)(u)  # noqa: E731
    assert_exchanged("scatter_rows", function, table, numbers(4, 300, 900), jnp.asarray(updates, dtype))


@pytest.mark.parametrize("order", ORDERS)
def test_bfloat16_sums_are_rounded_once(order):
    table, updates = rows(0, (40, 96), "bfloat16"), rows(1, (5000, 96), "bfloat16")
    indices = numbers(2, 40, 5000, outside=5, order=order)
    function = lambda x, i, u: x.at[i].add(u, mode="drop")  # noqa: E731
    assert calls("scatter_rows", function, table, indices, updates) == 1
    exact = np.zeros((50, 96), np.float32)
    exact[:40] = table
    place = np.where(np.asarray(indices) < 0, np.asarray(indices) + 40, indices)
    np.add.at(exact, np.where((place >= 0) & (place < 40), place, 49), np.asarray(updates, np.float32))
    np.testing.assert_array_equal(
        bits(jaxext.accelerate(function)(table, indices, updates)), bits(jnp.asarray(exact[:40], jnp.bfloat16))
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
@pytest.mark.parametrize(
    ("n", "count", "width"), [(1, 3000, 64), (5000, 300, 65), (7, 1, 20000), (300, 300, 1), (4, 0, 9)]
)
def test_one_row_many_rows_and_no_updates_agree_with_stock(n, count, width, dtype):
    # Small integers: no sum of them is rounded.
    rng = np.random.default_rng(n)
    table, updates = (jnp.asarray(rng.integers(0, 2, (k, width))).astype(dtype) for k in (n, count))
    updates = updates * (jnp.arange(count) < 100)[:, None].astype(dtype)
    indices = numbers(1, n, (count, 1), outside=1)
    params = {"kind": "add", "clips": False}
    assert_same(SCATTER(table, indices, updates, **params), SCATTER.reference(table, indices, updates, **params))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_runs_are_equal_bit_for_bit(dtype, order):
    updates, indices = rows(0, (20_000, 64), dtype), numbers(1, 5000, 20_000, order=order)
    run = jaxext.accelerate(lambda u, i: jax.ops.segment_sum(u, i, 5000))
    first = bits(run(updates, indices))
    for _ in range(5):
        np.testing.assert_array_equal(bits(run(updates, indices)), first)


def test_the_table_that_is_added_to_stays_as_it_was():
    table, indices = rows(0, (200, 64)), numbers(1, 200, 500)
    before = np.array(table)
    jaxext.accelerate(lambda x, i: x.at[i].add(1.0))(table, indices)
    np.testing.assert_array_equal(table, before)


def test_message_passing_and_its_gradient_run_on_the_kernels():
    nodes, (senders, receivers) = rows(0, (300, 64)), (numbers(s, 300, 1000) for s in (1, 2))

    def loss(x):
        messages = jnp.sin(x[senders])
        sums = jax.ops.segment_sum(messages, receivers, 300)
        return jnp.sum(sums * jax.ops.segment_max(messages, receivers, 300))

    gradient = jax.value_and_grad(loss)
    assert calls("gather_rows", gradient, nodes) >= 3 and calls("scatter_rows", gradient, nodes) >= 3
    with jaxext.disabled():
        stock = jax.jit(gradient)(nodes)
    for ours, theirs in zip(jaxext.accelerate(gradient)(nodes), stock):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4 * np.abs(theirs).max())


def test_a_graph_networks_losses_agree_over_steps(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "compat" / "programs")
    gnn = importlib.import_module("gnn_jax")

    def losses(wrap):
        step, *state, graph = gnn.build(gnn.parse_arguments(["--nodes", "500", "--edges", "1900", "--layers", "2"]))
        step, found = wrap(step), []
        for _ in range(5):
            *state, loss = step(*state, graph)
            found.append(float(loss))
        return step, (*state, graph), found

    (step, args, ours), (_, _, stock) = losses(jaxext.accelerate), losses(lambda step: step)
    text = step.lower(*args).as_text()
    assert text.count("@jaxext_gather_rows(") >= 8 and text.count("@jaxext_scatter_rows(") >= 8
    np.testing.assert_allclose(ours, stock, rtol=1e-4)


@pytest.mark.parametrize(
    "read",
    [
        lambda x, i: x[:, i % 64],
        lambda x, i: x[i, 3],
        lambda x, i: jnp.take_along_axis(x, (i % 64)[: len(x), None], axis=1),
        lambda x, i: GATHER.reference(x, i[:, None].astype(jnp.int16), fill=None)[0],
        lambda x, i: jax.vmap(lambda row, j: row[j])(x[:40].reshape(40, 1, 64), jnp.zeros((40, 90), jnp.int32)),
        lambda x, i: x[i[:9]],
        lambda x, i: jnp.tile(x, (1, 2))[i],
        lambda x, i: x[i, :16],
        lambda x, i: x.astype(bool)[i],
    ],
    ids=["columns", "elements", "along an axis", "other indices", "mapped", "few", "long rows", "short rows", "bools"],
)
def test_what_the_kernel_does_not_gain_on_or_take_stays_with_stock(read):
    assert calls("gather_rows", read, rows(0, (50, 64)), numbers(1, 50, 500)) == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda x, i, u: x.at[i, 3].add(u[:, 0]),
        lambda x, i, u: x.at[i].set(u),
        lambda x, i, u: x.at[i].multiply(u),
        lambda x, i, u: x.at[i[:9]].add(u[:9]),
        lambda x, i, u: x[:, :16].at[i].add(u[:, :16]),
        lambda x, i, u: x[:30].at[i].add(u),
        lambda x, i, u: x.astype(jnp.float16).at[i].add(u.astype(jnp.float16)),
    ],
    ids=["elements", "set", "multiply", "few", "short rows", "many updates", "float16"],
)
def test_changes_that_the_kernel_does_not_gain_on_or_take_stay_with_stock(change):
    assert calls("scatter_rows", change, rows(0, (50, 64)), numbers(1, 50, 500), rows(2, (500, 64))) == 0


def test_both_can_be_excluded_by_name():
    table, indices = rows(0, (200, 64)), numbers(1, 200, 500)
    for name, function in (("gather", lambda x, i: x[i]), ("scatter", lambda x, i: x.at[i].add(1.0))):
        text = jaxext.accelerate(function, exclude=name).lower(table, indices).as_text()
        assert "@jaxext_" not in text
        report = jaxext.explain(jax.jit(function))(table, indices)
        assert report.kernels() == {name}
