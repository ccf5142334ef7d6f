"""Attention is found in every spelling, says what stock JAX says, and near misses say why."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_agrees, assert_matched, assert_missed, normals, report_of
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

import jaxext

B, H, T, D = 2, 4, 8, 16
SCALE = D**-0.5
CAUSAL = np.tril(np.ones((T, T), bool))
CAUSAL_DETAIL = "heads=4, band=(None, 0)"


def heads_first() -> list[jax.Array]:
    return normals(0, (B, H, T, D), (B, H, T, D), (B, H, T, D))


def heads_last(kv_heads: int = H) -> list[jax.Array]:
    return normals(1, (B, T, H, D), (B, T, kv_heads, D), (B, T, kv_heads, D))


def product(q: Any, k: Any) -> Any:
    return jnp.einsum("bhqd,bhkd->bhqk", q, k)


def weighted(p: Any, v: Any) -> Any:
    return jnp.einsum("bhqk,bhkd->bhqd", p, v)


def softmax(s: Any) -> Any:
    return jax.nn.softmax(s, axis=-1)


def tril_where_inf(q, k, v):
    s = product(q, k) / jnp.sqrt(D)
    return weighted(softmax(jnp.where(jnp.tril(jnp.ones((T, T), bool)), s, -jnp.inf)), v)


def arange_finfo_scaled_query(q, k, v):
    i = jnp.arange(T)
    s = (q * SCALE) @ k.swapaxes(-1, -2)
    return softmax(jnp.where((i[:, None] >= i)[None, None], s, jnp.finfo(s.dtype).min)) @ v


def additive_bias_hand_softmax(q, k, v):
    s = product(q, k) * SCALE + (1 - jnp.tril(jnp.ones((T, T)))) * -1e9
    e = jnp.exp(s - s.max(-1, keepdims=True))
    return weighted(e / e.sum(-1, keepdims=True), v)


def constant_where(q, k, v):
    return weighted(softmax(jnp.where(CAUSAL, product(q, k) * SCALE, -1e9)), v)


def transposed_heads_last(q, k, v):
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    s = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(D)
    s = jnp.where(jnp.tril(jnp.ones((T, T))) == 0, -1e9, s)
    return jnp.einsum("bhts,bshd->bthd", softmax(s), v).transpose(0, 2, 1, 3)


def softmax_where(q, k, v):
    return weighted(jax.nn.softmax(product(q, k) * SCALE, -1, where=CAUSAL), v)


def multiplicative(q, k, v):
    m = jnp.tril(jnp.ones((T, T)))
    return weighted(softmax(product(q, k) * SCALE * m - 1e4 * (1 - m)), v)


def vmapped(q, k, v):
    def one(q, k, v):
        return softmax(jnp.where(CAUSAL, q @ k.T * SCALE, -1e9)) @ v

    return jax.vmap(jax.vmap(one))(q, k, v)


def merged_batch_and_heads(q, k, v):
    q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
    s = jnp.where(CAUSAL, (q @ k.swapaxes(1, 2) * SCALE).reshape(B, H, T, T), -1e9)
    return (softmax(s).reshape(B * H, T, T) @ v).reshape(B, H, T, D)


def operands_swapped(q, k, v):
    s = jnp.einsum("bhkd,bhqd->bhkq", k, q).swapaxes(-1, -2) * SCALE
    return jnp.einsum("bhkd,bhqk->bhqd", v, softmax(jnp.where(CAUSAL, s, -1e9)))


def masked_exponentials(q, k, v):
    s = product(q, k) * SCALE
    e = jnp.where(CAUSAL, jnp.exp(s - s.max(-1, keepdims=True)), 0.0)
    return weighted(e / e.sum(-1, keepdims=True), v)


@pytest.mark.parametrize(
    "spelling",
    [
        tril_where_inf,
        arange_finfo_scaled_query,
        additive_bias_hand_softmax,
        constant_where,
        transposed_heads_last,
        softmax_where,
        multiplicative,
        vmapped,
        merged_batch_and_heads,
        operands_swapped,
        masked_exponentials,
    ],
)
def test_a_causal_mask_becomes_a_band(spelling):
    assert_matched(spelling, *heads_first(), kernel="attention", detail=CAUSAL_DETAIL)


UNMASKED = {
    "late division": lambda q, k, v: (lambda e: weighted(e, v) / jnp.sum(e, -1, keepdims=True))(
        jnp.exp(product(q, k) * SCALE - lax.stop_gradient(jnp.max(product(q, k) * SCALE, -1, keepdims=True)))
    ),
    "exp of scores less logsumexp": lambda q, k, v: weighted(
        jnp.exp(product(q, k) - jax.nn.logsumexp(product(q, k), -1, keepdims=True)), v
    ),
    "exp of log_softmax": lambda q, k, v: weighted(jnp.exp(jax.nn.log_softmax(product(q, k) * SCALE)), v),
    "no maximum": lambda q, k, v: (lambda e: weighted(e / e.sum(-1, keepdims=True), v))(jnp.exp(product(q, k) * SCALE)),
    "times the inverse sum": lambda q, k, v: (lambda e: weighted(e * (1 / e.sum(-1, keepdims=True)), v))(
        jnp.exp(product(q, k) * SCALE)
    ),
    "scale on both": lambda q, k, v: weighted(softmax(product(q * D**-0.25, k * D**-0.25)), v),
    "negated twice": lambda q, k, v: weighted(softmax(-(product(-q, k) * SCALE)), v),
    "fused projection": lambda q, k, v: (lambda a, b, c: weighted(softmax(product(a, b) * SCALE), c))(
        *jnp.split(jnp.concatenate([q, k, v], -1), 3, -1)
    ),
    "constant added": lambda q, k, v: weighted(softmax(product(q, k) * SCALE + 3.0), v),
    "per-head temperature": lambda q, k, v: weighted(
        softmax(product(q, k) * jnp.linspace(0.1, 0.4, H)[:, None, None]), v
    ),
}


@pytest.mark.parametrize("name", UNMASKED)
def test_a_softmax_between_two_products_is_attention(name):
    assert_matched(UNMASKED[name], *heads_first(), kernel="attention", detail="heads=4")


@pytest.mark.parametrize(
    ("queries", "value_size"), [(T, 7), (3, D)], ids=["values of another size", "fewer queries than keys"]
)
def test_shapes_that_differ(queries, value_size):
    q, k, v = heads_first()
    assert_matched(
        lambda q, k, v: weighted(softmax(product(q, k) * SCALE), v),
        q[:, :, :queries],
        k,
        v[..., :value_size],
        kernel="attention",
        detail="heads=4",
    )


def repeated(q, k, v):
    k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
    return grouped_by_name(q, k, v)


def broadcast_groups(q, k, v):
    k, v = (jnp.broadcast_to(x[:, :, :, None], (B, T, 2, 2, D)).reshape(B, T, 4, D) for x in (k, v))
    return grouped_by_name(q, k, v)


def grouped_by_name(q, k, v):
    s = jnp.einsum("bthd,bshd->bhts", q, k) * SCALE
    s = jnp.where(jnp.tril(jnp.ones((T, T), bool)), s, -1e30)
    return jnp.einsum("bhts,bshd->bthd", softmax(s), v)


def reshaped_groups(q, k, v):
    s = jnp.einsum("btghd,bsgd->bghts", q.reshape(B, T, 2, 2, D), k) * SCALE
    s = jnp.where(jnp.tril(jnp.ones((T, T), bool)), s, -1e30)
    return jnp.einsum("bghts,bsgd->btghd", softmax(s), v).reshape(B, T, 4, D)


def library(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize("spelling", [repeated, broadcast_groups, reshaped_groups, library])
def test_repeated_key_and_value_heads_are_not_repeated(spelling):
    assert_matched(spelling, *heads_last(2), kernel="attention", detail="heads=4/2, band=(None, 0)")


def test_one_key_head_for_all_query_heads():
    q, k, v = heads_first()

    def shared(q, k, v):
        s = jnp.einsum("bhqd,bkd->bhqk", q, k) * SCALE
        return jnp.einsum("bhqk,bkd->bhqd", softmax(jnp.where(CAUSAL, s, -1e9)), v)

    assert_matched(shared, q, k[:, 0], v[:, 0], kernel="attention", count=1)


def test_dropout_on_probabilities_is_an_operand():
    key = jax.random.key(3)

    def dropped(q, k, v):
        p = softmax(product(q, k) * SCALE) * jax.random.bernoulli(key, 0.9, (B, H, T, T)) / 0.9
        return weighted(p, v)

    def selected(q, k, v):
        keep = jax.random.bernoulli(key, 0.9, (B, 1, T, T))
        return weighted(jnp.where(keep, softmax(product(q, k) * SCALE) / 0.9, 0.0), v)

    for spelling in (dropped, selected):
        assert_matched(spelling, *heads_first(), kernel="attention", detail="heads=4, dropout")


def test_factors_of_the_probabilities_that_keys_share_go_to_the_result():
    key = jax.random.key(3)

    def head_mask(q, k, v, heads):
        p = jnp.einsum("bhqk,h->bhqk", softmax(product(q, k) * SCALE), heads)
        return weighted(p, v)

    def gate(q, k, v, rows):
        p = softmax(product(q, k) * SCALE) * jax.random.bernoulli(key, 0.9, (B, H, T, T)) / 0.9
        return weighted(rows[..., None] * p, v)

    def number(q, k, v):
        return weighted(softmax(product(q, k) * SCALE) * 0.5, v)

    arrays = heads_first()
    heads, rows = normals(4, (H,), (B, 1, T))
    assert_matched(head_mask, *arrays, heads, kernel="attention", detail="heads=4")
    assert_matched(gate, *arrays, rows, kernel="attention", detail="heads=4, dropout")
    assert_matched(number, *arrays, kernel="attention", detail="heads=4")


def test_a_factor_that_varies_along_the_keys_is_left_to_stock_jax():
    def weights(q, k, v, weights):
        return weighted(softmax(product(q, k) * SCALE) * weights, v)

    arrays = (*heads_first(), *normals(4, (T,)))
    assert "attention" not in report_of(weights, *arrays).kernels()
    assert_agrees(weights, *arrays)


def test_soft_cap_and_bias():
    slopes = -jnp.abs(jnp.arange(T)[:, None] - jnp.arange(T)) * jnp.arange(1.0, H + 1)[:, None, None]

    def capped(q, k, v):
        return weighted(softmax(jnp.where(CAUSAL, 30 * jnp.tanh(product(q, k) * SCALE / 30), -1e30)), v)

    def biased(q, k, v, bias):
        return weighted(softmax(jnp.where(CAUSAL, (product(q, k) + bias) * SCALE, -1e30)), v)

    arrays = heads_first()
    assert_matched(capped, *arrays, kernel="attention", detail=f"{CAUSAL_DETAIL}, soft_cap=30")
    assert_matched(biased, *arrays, slopes, kernel="attention", detail=f"{CAUSAL_DETAIL}, bias")


LIBRARY = {
    "window": ({"is_causal": True, "local_window_size": (3, 0)}, "heads=4, band=(-3, 0)"),
    "lengths": ({"key_value_seq_lengths": np.array([3, 5])}, "heads=4, mask"),
    "query lengths": ({"query_seq_lengths": np.array([3, 5])}, "heads=4, mask"),
    "scale": ({"scale": 0.3}, "heads=4"),
}


@pytest.mark.parametrize("name", LIBRARY)
def test_options_of_jax_nn_dot_product_attention(name):
    options, detail = LIBRARY[name]
    assert_matched(
        lambda q, k, v: jax.nn.dot_product_attention(q, k, v, **options),
        *heads_last(),
        kernel="attention",
        detail=detail,
    )


def test_bias_and_mask_of_jax_nn_dot_product_attention():
    bias, mask = normals(5, (1, H, T, T), (B, 1, T, T))
    assert_matched(
        lambda q, k, v, bias: jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask > -1),
        *heads_last(),
        bias,
        kernel="attention",
        detail="heads=4, bias, mask",
    )


def test_bfloat16_with_a_float32_softmax():
    arrays = [x.astype(jnp.bfloat16) for x in heads_first()]

    def mixed(q, k, v):
        s = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32) * SCALE
        return weighted(softmax(s).astype(jnp.bfloat16), v)

    assert_matched(mixed, *arrays, kernel="attention", detail="heads=4", tolerance=2e-2)


# ---------------------------------------------------------------- rows that see nothing


@pytest.mark.parametrize("fill", [-1e9, float(np.finfo(np.float32).min)])
def test_a_row_that_sees_nothing_is_the_mean_as_in_stock_jax(fill):
    mask = CAUSAL & (np.arange(T) > 1)
    q, k, v = heads_first()
    assert_matched(
        lambda q, k, v, m: weighted(softmax(jnp.where(m, product(q, k) * SCALE, fill)), v),
        q,
        k,
        v,
        jnp.asarray(mask),
        kernel="attention",
        detail="heads=4, mask",
    )


def test_a_row_that_sees_nothing_is_nan_or_zero_as_in_stock_jax():
    mask = jnp.asarray(CAUSAL & (np.arange(T) > 1))
    arrays = heads_first()
    assert_matched(
        lambda q, k, v, m: weighted(softmax(jnp.where(m, product(q, k) * SCALE, -jnp.inf)), v)[:, :, 2:],
        *arrays,
        mask,
        kernel="attention",
    )
    assert_matched(
        lambda q, k, v, m: weighted(jax.nn.softmax(product(q, k) * SCALE, where=m), v),
        *arrays,
        mask,
        kernel="attention",
    )
    with_nan = jax.jit(lambda q, k, v: weighted(softmax(jnp.where(mask, product(q, k), -jnp.inf)), v))
    assert np.isnan(np.asarray(jaxext.accelerate(with_nan)(*arrays))[:, :, :2]).all()


# ---------------------------------------------------------------- frameworks and transformations


def test_flax_linen_attention():
    (x,) = normals(7, (B, T, H * D))
    module = nn.MultiHeadDotProductAttention(num_heads=H)
    params = jax.tree.map(np.asarray, module.init(jax.random.key(0), x))
    lengths = jnp.array([5, 8])
    padding = jnp.arange(T)[None] < lengths[:, None]

    def causal(x):
        return module.apply(params, x, mask=nn.make_causal_mask(x[..., 0]))

    def padded(x):
        pad = nn.make_attention_mask(jnp.ones((B, T), bool), padding)
        return module.apply(params, x, mask=nn.combine_masks(nn.make_causal_mask(x[..., 0]), pad))

    assert_matched(causal, x, kernel="attention", detail=CAUSAL_DETAIL)
    assert_matched(padded, x, kernel="attention", detail=f"{CAUSAL_DETAIL}, mask")


def test_flax_nnx_attention():
    (x,) = normals(8, (B, T, H * D))
    module = nnx.MultiHeadAttention(num_heads=H, in_features=H * D, decode=False, rngs=nnx.Rngs(0))
    graph, state = nnx.split(module)

    def causal(x):
        return nnx.merge(graph, state)(x, mask=nnx.make_causal_mask(x[..., 0]))

    assert_matched(causal, x, kernel="attention", detail=CAUSAL_DETAIL)


def through_scan(q, k, v):
    mask = nn.make_causal_mask(jnp.ones((B, T)))
    return lax.scan(lambda c, _: (masked(c, k, v, mask), None), q, None, length=2)[0]


def masked(q, k, v, mask):
    return weighted(softmax(jnp.where(mask, product(q, k) * SCALE, -1e9)), v)


def through_scan_and_remat(q, k, v):
    mask = jnp.asarray(CAUSAL)
    body = jax.checkpoint(lambda c, m: masked(c, k, v, m), policy=jax.checkpoint_policies.dots_saveable)
    return lax.scan(lambda c, _: (body(c, mask), None), q, None, length=2)[0]


def through_cond(q, k, v):
    return lax.cond(q[0, 0, 0, 0] > 0, lambda: masked(q, k, v, CAUSAL), lambda: masked(k, q, v, CAUSAL))


def through_vmap(q, k, v):
    return jax.vmap(functools.partial(masked, mask=CAUSAL), in_axes=1, out_axes=1)(
        q[:, :, None], k[:, :, None], v[:, :, None]
    )


def through_shard_map(q, k, v):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    run = jax.shard_map(functools.partial(masked, mask=CAUSAL), mesh=mesh, in_specs=(P("x"),) * 3, out_specs=P("x"))
    return run(q, k, v)


@pytest.mark.parametrize(
    ("spelling", "count"),
    [
        (through_scan, 1),
        (through_scan_and_remat, 1),
        (through_cond, 2),
        (through_vmap, 1),
        (through_shard_map, 1),
    ],
)
def test_inside_transformations_the_mask_is_still_known(spelling, count):
    report = report_of(spelling, *heads_first())
    entries = [entry for entry in report.replaced if entry.kernel == "attention"]
    assert len(entries) == count, str(report)
    assert all("band=(None, 0)" in entry.detail and "mask" not in entry.detail for entry in entries)
    assert_agrees(spelling, *heads_first())


# ---------------------------------------------------------------- near misses

MISSES = {
    "masked scores are -5, which softmax does not ignore": lambda q, k, v: weighted(
        softmax(jnp.where(CAUSAL, product(q, k), -5.0)), v
    ),
    "scores are masked before the soft cap, which makes the mask finite": lambda q, k, v: weighted(
        softmax(30 * jnp.tanh(jnp.where(CAUSAL, product(q, k), -1e9) / 30)), v
    ),
    "something is added to the scores before the soft cap": lambda q, k, v: weighted(
        softmax(30 * jnp.tanh((product(q, k) + jnp.arange(T) / T) / 30)), v
    ),
    "max stands between query times key and softmax": lambda q, k, v: weighted(
        softmax(jnp.maximum(product(q, k), -1.0)), v
    ),
    "the denominator is not the sum of the exponentials": lambda q, k, v: (
        lambda e, z: weighted(e / z.sum(-1, keepdims=True), v)
    )(jnp.exp(product(q, k) * SCALE), jnp.exp(product(k, q))),
    "0.5 is added to the sum of the exponentials": lambda q, k, v: (
        lambda e: weighted(e / (e.sum(-1, keepdims=True) + 0.5), v)
    )(jnp.exp(product(q, k) * SCALE)),
}


@pytest.mark.parametrize("reason", MISSES)
def test_a_near_miss_names_the_operation_that_broke_it(reason):
    assert_missed(MISSES[reason], *heads_first(), kernel="attention", reason=reason)


def test_a_product_without_a_softmax_is_not_reported():
    report = report_of(lambda q, k, v: weighted(jnp.tanh(product(q, k)), v), *heads_first())
    assert not report.replaced
    assert not report.missed


def test_float16_is_left_to_stock_jax_with_its_reason():
    arrays = [x.astype(jnp.float16) for x in heads_first()]
    report = report_of(constant_where, *arrays)
    assert [entry.kernel for entry in report.fallbacks] == ["attention"]
    assert "float16" in report.fallbacks[0].reason
    assert_agrees(constant_where, *arrays, tolerance=1e-2)
