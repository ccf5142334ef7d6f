"""Masks become bands, segments, small arrays or, last, whole arrays; combined ones are split."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_agrees, assert_matched, assert_missed, normals, report_of
from jax import lax

import jaxext

B, H, T, D = 2, 2, 8, 4
ROW, COLUMN = np.arange(T)[:, None], np.arange(T)[None]
MIN = float(np.finfo(np.float32).min)


def qkv():
    return normals(0, (B, H, T, D), (B, H, T, D), (B, H, T, D))


def attend(q, k, v, mask, fill=-1e9):
    s = jnp.einsum("bhqd,bhkd->bhqk", q, k)
    return jnp.einsum("bhqk,bhkd->bhqd", jax.nn.softmax(jnp.where(mask, s, fill), -1), v)


def attend_biased(q, k, v, bias):
    s = jnp.einsum("bhqd,bhkd->bhqk", q, k) + bias
    return jnp.einsum("bhqk,bhkd->bhqd", jax.nn.softmax(s, -1), v)


def i():
    return jnp.arange(T)[:, None]


def j():
    return jnp.arange(T)[None]


BANDS = {
    "tril": (lambda: jnp.tril(jnp.ones((T, T), bool)), (None, 0)),
    "tril of float": (lambda: jnp.tril(jnp.ones((T, T))) > 0, (None, 0)),
    "not triu": (lambda: ~jnp.triu(jnp.ones((T, T), bool), 1), (None, 0)),
    "triu is anticausal": (lambda: jnp.triu(jnp.ones((T, T), bool)), (0, None)),
    "swapped comparison": (lambda: j() <= i(), (None, 0)),
    "difference": (lambda: i() - j() >= 0, (None, 0)),
    "strictly less": (lambda: j() < i() + 1, (None, 0)),
    "window": (lambda: (i() >= j()) & (i() - j() < 3), (-2, 0)),
    "window by distance": (lambda: jnp.abs(i() - j()) <= 2, (-2, 2)),
    "window strictly": (lambda: jnp.abs(i() - j()) < 2, (-1, 1)),
    "product of floats": (lambda: (i() >= j()).astype(jnp.float32) * (j() > i() - 3) != 0, (-2, 0)),
    "minimum": (lambda: jnp.minimum(i() >= j(), j() >= i() - 1), (-1, 0)),
    "one minus": (lambda: 1 - (j() > i()).astype(jnp.int32) == 1, (None, 0)),
    "shifted positions": (lambda: (jnp.arange(T) + 5)[:, None] >= jnp.arange(T) + 5, (None, 0)),
    "integer comparison with one": (lambda: jnp.tril(jnp.ones((T, T), jnp.int32)) == 1, (None, 0)),
    "larger one, sliced": (lambda: jnp.tril(jnp.ones((1, 1, 32, 32), bool))[:, :, :T, :T], (None, 0)),
    "larger one, at an offset": (
        lambda: lax.dynamic_slice(jnp.tril(jnp.ones((32, 32), bool)), (4, 0), (T, T)),
        (None, 4),
    ),
    "constant": (lambda: np.tril(np.ones((T, T), bool)), (None, 0)),
    "constant window": (lambda: (ROW >= COLUMN) & (ROW - COLUMN < 4), (-3, 0)),
    "constant and iota": (lambda: np.tril(np.ones((1, 1, T, T))) * (j() > i() - 2), (-1, 0)),
    "constant, sliced": (lambda: jnp.asarray(np.tril(np.ones((1, 1, 16, 16), bool)))[:, :, :T, :T], (None, 0)),
    "reversed rows and columns": (lambda: jnp.flip(jnp.triu(jnp.ones((T, T), bool)), (0, 1)), (None, 0)),
    "flax": (lambda: nn.make_causal_mask(jnp.ones((B, T))), (None, 0)),
    "or with nothing": (lambda: (i() >= j()) | jnp.zeros((T, T), bool), (None, 0)),
    "and with everything": (lambda: jnp.logical_and(i() >= j(), jnp.ones((B, 1, 1, T), bool)), (None, 0)),
}


@pytest.mark.parametrize("name", BANDS)
def test_a_mask_of_positions_is_a_band(name):
    mask, band = BANDS[name]
    detail = f"heads=2, band=({band[0]}, {band[1]})"
    assert_matched(lambda q, k, v: attend(q, k, v, mask()), *qkv(), kernel="attention", detail=detail)


ADDITIVE = {
    "where": lambda: jnp.where(i() >= j(), 0.0, -1e9),
    "one minus mask": lambda: (1 - jnp.tril(jnp.ones((T, T)))) * -1e9,
    "triu times minus infinity's stand-in": lambda: jnp.triu(jnp.ones((T, T)), 1) * MIN,
    "constant": lambda: np.where(ROW >= COLUMN, 0.0, -1e4).astype(np.float32),
    "minus infinity": lambda: jnp.where(i() >= j(), 0.0, -jnp.inf),
    "full and select": lambda: lax.select(
        jnp.broadcast_to(i() >= j(), (B, 1, T, T)), jnp.full((B, 1, T, T), 0.0), jnp.full((B, 1, T, T), MIN)
    ),
}


@pytest.mark.parametrize("name", ADDITIVE)
def test_an_additive_mask_of_positions_is_a_band(name):
    assert_matched(
        lambda q, k, v: attend_biased(q, k, v, ADDITIVE[name]()),
        *qkv(),
        kernel="attention",
        detail="heads=2, band=(None, 0)",
    )


def test_segment_ids_are_two_vectors():
    segments = jnp.asarray([[0, 0, 0, 1, 1, 1, 2, 2], [0, 0, 0, 0, 0, 1, 1, 1]])

    def packed(q, k, v):
        same = segments[:, None, :, None] == segments[:, None, None, :]
        return attend(q, k, v, same & (i() >= j()))

    def by_flax(q, k, v):
        same = nn.make_attention_mask(segments, segments, jnp.equal)
        return attend(q, k, v, nn.combine_masks(same, nn.make_causal_mask(segments)) > 0)

    for spelling in (packed, by_flax):
        assert_matched(spelling, *qkv(), kernel="attention", detail="heads=2, band=(None, 0), segments")


def _mask_shape(spelling, *args) -> tuple[str, ...]:
    (entry,) = [entry for entry in report_of(spelling, *args).replaced if entry.kernel == "attention"]
    return entry.shapes[3:]


def test_padding_beside_a_band_stays_a_vector_of_keys():
    lengths = jnp.array([8, 5])

    def padded(q, k, v, lengths):
        keys = jnp.arange(T) < lengths[:, None]
        causal = jnp.tril(jnp.ones((T, T), bool))
        return attend(q, k, v, jnp.logical_and(causal[None, None], keys[:, None, None, :]))

    assert_matched(padded, *qkv(), lengths, kernel="attention", detail="heads=2, band=(None, 0), mask")
    (shape,) = _mask_shape(padded, *qkv(), lengths)
    assert shape == "bool[2,8]"


def test_padding_in_the_style_of_hugging_face():
    attention_mask = jnp.asarray([[1] * 8, [1] * 5 + [0] * 3])

    def combined(q, k, v, attention_mask):
        causal = nn.make_causal_mask(jnp.ones((1, 32), bool), dtype="bool")[:, :, :T, :T]
        causal = jnp.broadcast_to(causal, (B, 1, T, T))
        keys = jnp.broadcast_to(jnp.expand_dims(attention_mask, (-3, -2)), causal.shape)
        mask = nn.combine_masks(keys, causal)
        bias = lax.select(mask > 0, jnp.full(mask.shape, 0.0), jnp.full(mask.shape, MIN))
        return attend_biased(q, k, v, bias)

    assert_matched(combined, *qkv(), attention_mask, kernel="attention", detail="heads=2, band=(None, 0), mask")
    (shape,) = _mask_shape(combined, *qkv(), attention_mask)
    assert shape == "i32[2,8]"


def test_left_padding_hides_whole_rows_as_in_stock_jax():
    keys = jnp.asarray([[False] * 3 + [True] * 5, [True] * 8])

    def padded(q, k, v, keys):
        return attend(q, k, v, (i() >= j()) & keys[:, None, None, :], MIN)

    assert_matched(padded, *qkv(), keys, kernel="attention", detail="heads=2, band=(None, 0), mask")


def test_two_masks_that_stock_jax_mixes_are_a_near_miss():
    keys = jnp.asarray([[0.0] * 3 + [1.0] * 5, [1.0] * 8])

    def mixed(q, k, v, keys):
        s = jnp.einsum("bhqd,bhkd->bhqk", q, k)
        s = jnp.where(keys[:, None, None, :] > 0, jnp.where(i() >= j(), s, -1e9), -1e30)
        return jnp.einsum("bhqk,bhkd->bhqd", jax.nn.softmax(s, -1), v)

    reason = "two masks of different fill values can hide a row together"
    assert_missed(mixed, *qkv(), keys, kernel="attention", reason=reason)


def test_a_mild_additive_padding_beside_a_band_stays_additive():
    hidden = jnp.asarray([[False] * 5 + [True] * 3, [False] * 8])

    def both(q, k, v, hidden):
        s = jnp.einsum("bhqd,bhkd->bhqk", q, k) + jnp.where(hidden, -1e4, 0.0)[:, None, None, :]
        s = jnp.where(i() >= j(), s, MIN)
        return jnp.einsum("bhqk,bhkd->bhqd", jax.nn.softmax(s, -1), v)

    assert_matched(both, *qkv(), hidden, kernel="attention", detail="heads=2, band=(None, 0), bias")


def test_a_mask_that_arrives_as_an_argument_is_an_operand():
    mask = jnp.asarray(np.random.default_rng(0).random((B, 1, T, T)) > 0.3)
    assert_matched(attend, *qkv(), mask, kernel="attention", detail="heads=2, mask")


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["scan", "scan of remat"])
def test_a_combined_mask_made_outside_a_loop_keeps_its_band_and_its_padding(wrap):
    def looped(q, k, v, lengths):
        keys = jnp.arange(T) < lengths[:, None]
        mask = jnp.logical_and(i() >= j(), keys[:, None, None, :])
        body = wrap(lambda c, mask: attend(c, k, v, mask))
        return lax.scan(lambda c, _: (body(c, mask), None), q, None, length=2)[0]

    lengths = jnp.array([8, 5])
    assert_matched(looped, *qkv(), lengths, kernel="attention", detail="heads=2, band=(None, 0), mask")


def test_a_mask_that_compares_other_positions_is_exact():
    def blocks(q, k, v):
        return attend(q, k, v, i() // 4 == j() // 4)

    def alternating(q, k, v):
        return attend(q, k, v, (i() + j()) % 2 == 0)

    for spelling in (blocks, alternating):
        assert_agrees(spelling, *qkv())
        assert report_of(spelling, *qkv()).kernels() == {"attention"}


UNLIKE_NUMBERS = {
    "bits of flags": lambda flags: (flags[:, None, None, :] & 2) != 0,
    "bits turned over": lambda flags: ~flags[:, None, None, :],
    "bits joined": lambda flags: ((flags[:, None, :, None] | 4) & flags[:, None, None, :]) != 0,
    "unsigned difference": lambda flags: jnp.arange(T, dtype=jnp.uint32)[:, None] - jnp.arange(T).astype("uint32") >= 0,
    "wrapped": lambda flags: (jnp.arange(T, dtype=jnp.int8) * 100)[:, None] >= (jnp.arange(T, dtype=jnp.int8) * 100),
    "rounded": lambda flags: (
        (jnp.arange(T, dtype=jnp.bfloat16) + 300)[:, None] > (jnp.arange(T, dtype=jnp.bfloat16) + 300)
    ),
    "a segment is a fraction": lambda flags: (flags / 4)[:, None, :, None] == (flags / 4)[:, None, None, :],
    "bits of one number": lambda flags: jnp.full((T, T), 6) & jnp.full((T, T), 1),
}


@pytest.mark.parametrize("name", UNLIKE_NUMBERS)
def test_integer_masks_count_bits_and_wrap_around_as_in_stock_jax(name):
    flags = jnp.asarray(np.random.default_rng(1).integers(0, 8, (B, T)), jnp.int32)
    assert_agrees(lambda q, k, v, flags: attend(q, k, v, UNLIKE_NUMBERS[name](flags)), *qkv(), flags)


def test_a_scale_computed_from_the_bits_of_integers_is_exact():
    assert_agrees(lambda q, k, v: attend(q * (jnp.int32(6) & jnp.int32(3)), k, v, i() >= j()), *qkv())


def _causal_outside(wrt_argument):
    """A train step that makes its mask ahead of the differentiation."""

    def step(q, k, v, lengths):
        mask = jnp.tril(jnp.ones((T, T), bool))
        padded = jnp.logical_and(mask, (jnp.arange(T) < lengths[:, None])[:, None, None, :])

        def loss(q, mask, padded):
            return jnp.sin(attend(q, k, v, mask)).sum() + attend(q, 2 * k, v, padded).sum()

        if wrt_argument:
            return jax.grad(loss)(q, mask, padded)
        return jax.grad(lambda q: loss(q, mask, padded))(q)

    return step


@pytest.mark.parametrize("wrt_argument", [True, False], ids=["argument", "closure"])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["plain", "jit inside"])
def test_a_mask_made_ahead_of_the_differentiation_is_a_band_still(wrt_argument, wrap):
    step = wrap(_causal_outside(wrt_argument))
    lengths = jnp.array([8, 5])
    report = jaxext.explain(jax.jit(lambda *args: step(*args)))(*qkv(), lengths)
    assert sorted(entry.detail for entry in report.replaced) == [
        "heads=2, band=(None, 0)",
        "heads=2, band=(None, 0), mask",
    ]
    with jaxext.disabled():
        expected = jax.jit(step)(*qkv(), lengths)
    found = jaxext.accelerate(lambda *args: step(*args))(*qkv(), lengths)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_a_scale_made_ahead_of_the_differentiation_is_a_number():
    def step(q, k, v):
        scale = jnp.sqrt(jnp.float32(D))
        hidden = jnp.where(jnp.tril(jnp.ones((T, T))) > 0, 0.0, -1e9)
        return jax.grad(lambda q: attend_biased(q / scale, k, v, hidden).sum())(q)

    (entry,) = jaxext.explain(jax.jit(step))(*qkv()).replaced
    assert entry.detail == "heads=2, band=(None, 0)" and len(entry.shapes) == 3
