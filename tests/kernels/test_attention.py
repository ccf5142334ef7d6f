"""The attention kernels: results and gradients against float64, promises about memory and order, errors."""

import concurrent.futures
import os
import re
import subprocess
import sys
from pathlib import Path

import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import Case

from jaxext import kernels
from jaxext.kernels import _attention
from jaxext.kernels._op import native_status

native = pytest.mark.skipif(bool(native_status()), reason="no native kernels here: " + native_status())

BNTH = ("bnth",) * 4
CAUSAL = {"band": (None, 0), "scale": 0.25}
SEGMENTS = {"query_segment_ids": (2, 70), "key_value_segment_ids": (2, 70)}
CASES = {
    "plain": Case(),
    "causal over several blocks": Case((), lengths=(230, 230), options=CAUSAL),
    "causal, fewer keys": Case(lengths=(150, 40), options=CAUSAL),
    "causal, more keys": Case(lengths=(40, 150), options=CAUSAL),
    "window": Case((), lengths=(330, 330), options={"band": (-64, 0)}),
    "window either side": Case((), lengths=(200, 300), options={"band": (-40, 25)}),
    "window away from the diagonal": Case((), lengths=(90, 300), options={"band": (70, 170)}),
    "one query": Case(lengths=(1, 200)),
    "one key": Case(lengths=(20, 1)),
    "heads of 1": Case(sizes=(1, 1)),
    "heads of 32": Case(sizes=(32, 32), options=CAUSAL),
    "odd heads": Case(sizes=(37, 19), options=CAUSAL),
    "heads of 80": Case(sizes=(80, 80), options=CAUSAL),
    "wide heads": Case((), sizes=(256, 136), options={"scale": 1 / 16}),
    "grouped": Case(heads=(6, 2), options=CAUSAL),
    "one kv head": Case(heads=(5, 1), options=CAUSAL),
    "no batch": Case(()),
    "many leading dimensions": Case((2, 1, 3, 1, 2), lengths=(20, 20)),
    "heads first": Case(layout=BNTH, options=CAUSAL),
    "mixed layouts": Case(layout=("bnth", "btnh", "bnth", "btnh"), heads=(4, 2), lengths=(33, 65)),
    "mask": Case(extras={"mask": (2, 2, 70, 70)}),
    "mask of keys": Case(extras={"mask": (2, 1, 1, 70)}, options=CAUSAL),
    "mask of queries": Case(extras={"mask": (1, 2, 70, 1)}, options={"fill": "uniform"}),
    "mask over leading dimensions": Case((2, 3), extras={"mask": (1, 3, 1, 70, 70)}),
    "bias": Case(extras={"bias": (2, 2, 70, 70)}),
    "bias shared by the batch": Case(extras={"bias": (1, 2, 70, 70)}, options=CAUSAL),
    "bias of keys": Case(extras={"bias": (2, 1, 1, 70)}),
    "bias of queries": Case(extras={"bias": (1, 2, 70, 1)}),
    "one bias for all": Case(extras={"bias": (1, 1, 1, 1)}),
    "bias over leading dimensions": Case((2, 3), heads=(4, 2), extras={"bias": (2, 1, 4, 70, 70)}),
    "bias of another dtype": Case(extras={"bias": (1, 2, 70, 70)}, bias_dtype="float32"),
    "segments": Case(extras=SEGMENTS, options=CAUSAL),
    "segments over several blocks": Case(
        (1,), lengths=(400, 400), extras={"query_segment_ids": (1, 400), "key_value_segment_ids": (1, 400)}
    ),
    "soft cap": Case(options={"soft_cap": 2.0}),
    "soft cap, bias": Case(extras={"bias": (2, 2, 70, 70)}, options={"soft_cap": 5.0, "band": (None, 0)}),
    "dropout": Case(extras={"keep": (2, 2, 70, 70)}, options={"keep_scale": 1.25, "band": (None, 0)}),
    "dropout shared by heads": Case(heads=(4, 2), extras={"keep": (2, 1, 70, 70)}, options={"keep_scale": 1.25}),
    "negative scale": Case(options={"scale": -0.5}),
    "scale 0": Case(options={"scale": 0.0}),
    "no keys": Case(lengths=(5, 0)),
    "no queries": Case(lengths=(0, 5)),
    "no batch entries": Case((0,), extras={"bias": (1, 2, 70, 70)}),
    "empty rows": Case(lengths=(150, 40), options={"band": (None, -100)}),
    "empty rows, uniform": Case(lengths=(150, 40), options={"band": (None, -100), "fill": "uniform"}),
    "empty rows, nan": Case(lengths=(150, 40), options={"band": (None, -100), "fill": "nan"}),
    "empty rows, uniform, dropout": Case(
        lengths=(150, 40), extras={"keep": (2, 2, 150, 40)}, options={"band": (None, -100), "fill": "uniform"}
    ),
    "everything": Case(
        (2, 2),
        (4, 2),
        (150, 190),
        (24, 40),
        ("btnh", "bnth", "btnh", "bnth"),
        {
            "bias": (2, 1, 4, 1, 190),
            "mask": (1, 2, 1, 150, 190),
            "query_segment_ids": (1, 1, 150),
            "key_value_segment_ids": (2, 1, 190),
            "keep": (2, 2, 4, 150, 190),
        },
        {"band": (-60, 90), "soft_cap": 3.0, "keep_scale": 1.25, "fill": "uniform", "scale": 0.3},
    ),
}


def run(case, dtype):
    """({name: native result}, ({name: exact result}, {name: size})) of one case, forward and backward."""
    q, k, v, g, named = case.operands(jnp.dtype(dtype))
    floats = {"query": q, "key": k, "value": v} | ({"bias": named["bias"]} if "bias" in named else {})
    fixed = {name: jnp.asarray(x) for name, x in named.items() if name != "bias"}

    def loss_and_out(floats, g):
        out, pull = jax.vjp(lambda f: kernels.attention_op(**f, **fixed, **case.options, layout=case.layout), floats)
        return {"out": out} | pull(g)[0]

    found = jax.jit(loss_and_out)(jax.tree.map(jnp.asarray, floats), jnp.asarray(g))
    return found, oracle.attention(case, q, k, v, g, named)


def assert_close(found, expected, dtype):
    """Values are rounded to `dtype` a few times: the result, probabilities, score gradients; sums are in float32.

    Tolerance, in units of what was summed: 2 roundings of 8 bits (bf16); 16 of 24 bits (f32: scores of up to 8 units,
    whose rounding the exponential multiplies).
    """
    exact, sizes = expected
    assert found.keys() == exact.keys()
    for name, x in found.items():
        e, x = exact[name], np.asarray(x, np.float64)
        assert x.shape == e.shape, name
        tolerance = (2 if dtype == "bfloat16" else 16) * float(jnp.finfo(dtype).eps) * sizes[name] + 1e-30
        np.testing.assert_allclose(x, e, rtol=0, atol=tolerance, err_msg=name, equal_nan=True)


@native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_match_float64(name, dtype):
    assert_close(*run(CASES[name], dtype), dtype)


ISA_CASES = ("causal over several blocks", "odd heads", "everything", "empty rows, nan", "bias shared by the batch")
ISAS = ("v2", "v3", "v4")


@native
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_matches_float64(isa):
    from jaxext import _native

    if isa not in _native.compiled_isas() or _native.active_isa() < isa:
        pytest.skip(f"{isa} is not compiled, or this CPU lacks it")
    code = (
        "import test_attention as t\nfrom jaxext import _native\n"
        f"assert _native.active_isa() == {isa!r}, _native.active_isa()\n"
        f"for name in {ISA_CASES!r}:\n"
        "    for dtype in ('float32', 'bfloat16'):\n"
        "        t.assert_close(*t.run(t.CASES[name], dtype), dtype)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"JAXEXT_ISA": isa},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def qkv(shape=(2, 24, 4, 16), kv_heads=None, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    kv_shape = (*shape[:-2], kv_heads or shape[-2], shape[-1])
    return [jnp.asarray(rng.standard_normal(s), dtype) for s in (shape, kv_shape, kv_shape)]


PUBLIC = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.7},
    "window": {"local_window_size": 5},
    "window pair": {"local_window_size": (3, 6), "is_causal": True},
    "key lengths": {"key_value_seq_lengths": jnp.asarray([24, 7])},
    "query lengths": {"query_seq_lengths": jnp.asarray([3, 24])},
    "lengths": {"query_seq_lengths": jnp.asarray([3, 24]), "key_value_seq_lengths": jnp.asarray([0, 7])},
    "mask": {"mask": np.random.default_rng(1).random((2, 1, 24, 24)) < 0.4},
    "mask and lengths": {
        "mask": np.random.default_rng(1).random((1, 4, 24, 24)) < 0.4,
        "key_value_seq_lengths": jnp.asarray([20, 7]),
    },
    "bias": {"bias": np.random.default_rng(1).standard_normal((1, 4, 24, 24)).astype(np.float32)},
}


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_public_function_equals_jax(name, kv_heads):
    xs, options = qkv(kv_heads=kv_heads), PUBLIC[name]
    found = jax.jit(lambda *xs: kernels.attention(*xs, **options))(*xs)
    exact = jax.nn.dot_product_attention(*xs, **options)
    np.testing.assert_allclose(found, exact, rtol=0, atol=2e-6)


def test_unbatched_arguments_equal_jax():
    xs = qkv((24, 4, 16))
    exact = jax.nn.dot_product_attention(*xs, is_causal=True)
    np.testing.assert_allclose(kernels.attention(*xs, is_causal=True), exact, rtol=0, atol=2e-6)


def test_half_precision_runs_by_reference():
    xs = qkv(dtype="float16")
    text = jax.jit(kernels.attention).lower(*xs).as_text()
    assert "@jaxext_attention" not in text
    np.testing.assert_allclose(
        np.asarray(kernels.attention(*xs), np.float32),
        np.asarray(jax.nn.dot_product_attention(*xs), np.float32),
        atol=4e-3,
    )


@native
def test_lowered_programs_hold_one_call_each_way():
    xs = qkv()
    gradient = jax.jit(jax.grad(lambda *xs: kernels.attention(*xs, is_causal=True).sum(), (0, 1, 2)))
    text = gradient.lower(*xs).as_text()
    assert text.count("@jaxext_attention_forward(") == 1
    assert text.count("@jaxext_attention_backward(") == 1


@native
def test_memory_is_linear_in_the_sequence_length():
    xs = qkv((1, 2048, 2, 16))
    gradient = jax.jit(jax.grad(lambda *xs: kernels.attention(*xs, is_causal=True).sum(), (0, 1, 2)))
    memory = gradient.lower(*xs).compile().memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < 2048 * 2048 * 2


@native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_repeated_and_concurrent_calls_give_the_same_bits(dtype):
    case = Case((1,), heads=(4, 2), lengths=(300, 300), extras={"bias": (1, 1, 300, 300)}, options=CAUSAL)
    first = run(case, dtype)[0]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        others = list(pool.map(lambda _: run(case, dtype)[0], range(12)))
    for other in others:
        for name, x in first.items():
            np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(other[name], np.float32), err_msg=name)


@native
def test_a_nan_reaches_every_row_that_sees_it():
    q, k, v = (np.asarray(x) for x in qkv((1, 40, 1, 16)))
    rows = np.arange(40)
    bad = np.where(np.reshape(rows == 10, (40, 1, 1)), np.nan, 0).astype(np.float32)

    def nan_rows(*xs):
        return np.asarray(jnp.isnan(kernels.attention(*xs, is_causal=True)).any(-1)[0, :, 0])

    np.testing.assert_array_equal(nan_rows(q + bad, k, v), rows == 10)
    np.testing.assert_array_equal(nan_rows(q, k + bad, v), rows >= 10)
    # Hidden values are multiplied by 0, here as in stock JAX: rows above may be NaN too.
    assert nan_rows(q, k, v + bad)[10:].all()


@native
def test_infinite_and_lowest_biases_behave_as_in_jax():
    xs, bias = qkv((1, 24, 2, 16)), np.zeros((1, 1, 24, 24), np.float32)
    bias[..., 5:] = -np.inf
    bias[..., 3, :] = np.finfo(np.float32).min
    bias[..., 7, :] = -np.inf
    bias[..., 9, 20:] = -1e9
    found, exact = (f(*xs, bias=jnp.asarray(bias)) for f in (kernels.attention, jax.nn.dot_product_attention))
    assert np.isnan(np.asarray(exact)[0, 7]).all()
    np.testing.assert_allclose(found, exact, rtol=0, atol=2e-6)


@native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_a_row_that_an_added_mask_hides_altogether_equal_jax(dtype):
    rng = np.random.default_rng(5)
    q, k, v, g = (jnp.asarray(rng.standard_normal((2, 33, 2, 16)), dtype) for _ in range(4))
    bias = jnp.zeros((2, 1, 1, 33)).at[1].set(-1e9)  # the second sequence is padding

    def gradients(attend):
        return jax.vjp(lambda q, k, v, b: attend(q, k, v, bias=b), q, k, v, bias)[1](g)

    stock = gradients(jax.nn.dot_product_attention)
    for ours, theirs in zip(gradients(kernels.attention), stock):
        ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
        tolerance = 16 * float(jnp.finfo(dtype).eps) * max(1, np.abs(theirs).max())
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)


def test_large_scores_do_not_overflow():
    q, k, v = qkv((1, 64, 1, 16))
    found, exact = (f(q * 100, k * 100, v, is_causal=True) for f in (kernels.attention, jax.nn.dot_product_attention))
    np.testing.assert_allclose(found, exact, rtol=0, atol=2e-3)


def shaped(*shape, dtype="float32"):
    return jnp.zeros(shape, dtype)


ERRORS = {
    "rank": (
        (shaped(4, 8), shaped(4, 8), shaped(4, 8)),
        {},
        ValueError,
        "attention: argument 'query' must have at least 3 dimensions [..., length, heads, head size], but is of shape "
        "(4, 8); add the missing dimensions",
    ),
    "ranks": (
        (shaped(1, 4, 2, 8), shaped(4, 2, 8), shaped(4, 2, 8)),
        {},
        ValueError,
        "attention: argument 'key' must have query's 4 dimensions, but is of shape (4, 2, 8); reshape it",
    ),
    "batch": (
        (shaped(2, 4, 2, 8), shaped(1, 4, 2, 8), shaped(2, 4, 2, 8)),
        {},
        ValueError,
        "attention: argument 'key' must have query's leading dimensions (2,), but is of shape (1, 4, 2, 8); "
        "broadcast it",
    ),
    "head size": (
        (shaped(4, 2, 8), shaped(4, 2, 6), shaped(4, 2, 8)),
        {},
        ValueError,
        "attention: argument 'key' must have query's head size 8, but is of shape (4, 2, 6); project it",
    ),
    "heads": (
        (shaped(4, 3, 8), shaped(4, 2, 8), shaped(4, 2, 8)),
        {},
        ValueError,
        "attention: argument 'key' must have a number of heads that divides query's 3, but is of 2 heads; repeat its "
        "heads",
    ),
    "value length": (
        (shaped(4, 2, 8), shaped(5, 2, 8), shaped(6, 2, 8)),
        {},
        ValueError,
        "attention: argument 'value' must have key's 2 heads and length 5, but is of shape (6, 2, 8); repeat or slice "
        "it",
    ),
    "integers": (
        (shaped(4, 2, 8, dtype="int32"), shaped(4, 2, 8), shaped(4, 2, 8)),
        {},
        TypeError,
        "attention: argument 'query' must be a floating-point array, but is int32; cast it with .astype",
    ),
    "dtypes": (
        (shaped(4, 2, 8), shaped(4, 2, 8, dtype="bfloat16"), shaped(4, 2, 8)),
        {},
        TypeError,
        "attention: argument 'key' must have query's dtype float32, but is bfloat16; cast one of them",
    ),
    "mask of floats": (
        (shaped(4, 2, 8),) * 3,
        {"mask": np.full((2, 4, 4), np.nan, np.float32)},
        TypeError,
        "attention: argument 'mask' must be boolean (True: attend), but is float32; compare it with 0, or pass "
        "additive values as 'bias'",
    ),
    "mask shape": (
        (shaped(4, 2, 8),) * 3,
        {"mask": np.ones((2, 4, 5), bool)},
        ValueError,
        "attention: argument 'mask' must have shape (2, 4, 4), 1 for a broadcast dimension, but is of shape (2, 4, 5); "
        "broadcast it",
    ),
    "bias rank": (
        (shaped(4, 2, 8),) * 3,
        {"bias": shaped(3, 2, 4, 4)},
        ValueError,
        "attention: argument 'bias' must have at most 3 dimensions [..., N, T, S], but is of shape (3, 2, 4, 4); "
        "reshape it",
    ),
    "window": (
        (shaped(4, 2, 8),) * 3,
        {"local_window_size": -1},
        ValueError,
        "attention: argument 'local_window_size' must be a non-negative integer or a pair (left, right) of them, but "
        "is -1; pass None for no window",
    ),
    "lengths": (
        (shaped(2, 4, 2, 8),) * 3,
        {"key_value_seq_lengths": np.ones(3, np.int32)},
        ValueError,
        "attention: argument 'key_value_seq_lengths' must be an integer array of shape (2,), one length per sequence, "
        "but is int32 of shape (3,); broadcast or cast it",
    ),
    "one kind of segments": (
        (shaped(4, 2, 8),) * 3,
        {"query_segment_ids": np.zeros(4, np.int32)},
        ValueError,
        "attention: argument 'key_value_segment_ids' must be given with the other segment ids; pass both or none",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_wrong_arguments_are_named_with_the_remedy(name):
    xs, options, kind, text = ERRORS[name]
    with pytest.raises(kind) as caught:
        kernels.attention(*xs, **options)
    assert str(caught.value) == text


def test_lengths_are_a_mask_of_keys():
    q = shaped(4, 2, 8)
    text = "attention: argument 'prefix' needs a mask of shape [..., 1, 1, S], but is given one of shape (1, 4, 4)"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}; leave it out"):
        kernels.attention_op(q, q, q, mask=np.ones((1, 4, 4), bool), prefix=True)


@native
def test_the_handler_refuses_what_it_cannot_read():
    q = shaped(1, 4, 2, 8)
    params = _attention._bind(q, q, q)[1]
    results = [jax.ShapeDtypeStruct(shape, "float32") for shape in ((1, 4, 2, 8), (1, 2, 4), (1, 0))]

    def call(k, results=results):
        return jax.ffi.ffi_call("jaxext_attention_forward", results)(q, k, k, **_attention._attributes(**params))

    with pytest.raises(jax.errors.JaxRuntimeError, match="jaxext attention: argument 'key' must be of query's dtype"):
        call(shaped(3, 4, 2, 8))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"jaxext attention: argument 'out' must be .* shape"):
        call(q, [jax.ShapeDtypeStruct((1, 4, 2, 7), "float32"), *results[1:]])


def test_refusals_name_the_reason():
    q = shaped(1, 4096, 2, 64)
    assert native_status() or kernels.attention_refusal(q, q, q) is None
    half = q.astype("float16")
    reason = kernels.attention_refusal(half, half, half)
    assert native_status() or reason == "dtype float16 has no kernel (float32 and bfloat16 have)"
