"""Attention on CUDA: when cuDNN takes a call, what is lowered then, and that its pieces fit together.

The numbers are those of the calls' emulation on the CPU; tests/gpu runs them on a card.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cudnn_emulated import emulated, found  # noqa: F401

import jaxext
from jaxext.kernels import _attention_cudnn, attention_op
from jaxext.kernels._attention import ATTENTION, ATTENTION_BACKWARD, _bind
from jaxext.kernels._attention_cudnn import cudnn_refusal

FORWARD, BACKWARD = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"
WITH_BIAS = "__cudnn$fmhaScaleBiasSoftmax"


def shapes(queries=128, keys=None, heads=4, kv_heads=2, depth=64, value=None, dtype="bfloat16", batch=(2,)):
    keys = keys or queries
    made = ((queries, heads, depth), (keys, kv_heads, depth), (keys, kv_heads, value or depth))
    return [jax.ShapeDtypeStruct((*batch, *shape), dtype) for shape in made]


def refusal(*operands, capability=(9, 0), **options):
    given, params = _bind(*operands, **options)
    return cudnn_refusal(*given, **params, capability=capability)


def array(*shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({}, {}),
        ({}, {"band": (None, 0)}),
        ({}, {"band": (-31, 0)}),
        ({"keys": 200}, {}),
        ({"dtype": "float16", "depth": 128}, {"band": (None, 0)}),
        ({"depth": 256}, {}),
        ({"batch": ()}, {}),
        ({}, {"bias": array(1, 4, 128, 128)}),
        ({}, {"bias": array(2, 4, 128, 128), "band": (None, 0)}),
        ({}, {"bias": array(2, 1, 1, 128)}),
        ({}, {"mask": array(1, 1, 128, 128, dtype="bool")}),
        ({}, {"mask": array(2, 1, 1, 128, dtype="bool"), "prefix": True, "band": (None, 0)}),
        ({"queries": 129}, {"mask": array(2, 1, 1, 129, dtype="bool"), "prefix": True}),
        ({}, {f"{side}_segment_ids": array(2, 128, dtype="int32") for side in ("query", "key_value")}),
    ],
)
def test_calls_that_cudnn_takes(sizes, options):
    assert refusal(*shapes(**sizes), **options) is None


@pytest.mark.parametrize(
    ("sizes", "options", "reason"),
    [
        ({}, {"keep": array(2, 4, 128, 128, dtype="bool")}, "cuDNN has no place for it: dropout with given"),
        ({}, {"soft_cap": 30.0}, "cuDNN has no place for it: soft-capped scores"),
        ({"dtype": "float32"}, {}, "dtype float32; cuDNN takes bfloat16 and float16"),
        ({"value": 32}, {}, "values of size 32 with queries of size 64"),
        ({"depth": 60}, {}, "head size 60; cuDNN takes multiples of 8 up to 256 on this device"),
        ({"depth": 264}, {}, "head size 264; cuDNN takes multiples of 8 up to 256"),
        ({"queries": 1, "keys": 128}, {}, "1 queries and 128 keys; below 64"),
        ({"batch": (0,)}, {}, "128 queries and 128 keys; below 64"),
        ({}, {"band": (None, 5)}, "keys None to 5 from the query; cuDNN takes causal masks and windows"),
        ({}, {"band": (-7, None)}, "keys -7 to None from the query"),
        ({"keys": 256}, {"band": (None, 0)}, "a causal mask over 128 queries and 256 keys"),
        ({}, {"bias": array(1, 4, 128, 128, dtype="float32")}, "a bias of dtype float32; cuDNN takes the queries'"),
        ({"queries": 129}, {"bias": array(1, 4, 129, 129)}, "a bias or a mask over 129 queries and 129 keys"),
        ({}, {"bias": array(1, 4, 128, 1)}, "a bias that does not vary along the keys"),
    ],
)
def test_refusals_name_the_limit(sizes, options, reason):
    assert re.match(reason, refusal(*shapes(**sizes), **options) or "taken")


@pytest.mark.parametrize("capability", [None, (8, 0), (8, 9)])
def test_head_sizes_before_hopper(capability):
    assert refusal(*shapes(depth=128), capability=capability) is None
    assert "multiples of 8 up to 128" in (refusal(*shapes(depth=136), capability=capability) or "")


def lowered(fn, *operands):
    return jax.jit(fn).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()


def calls(text):
    return re.findall(r"custom_call @(__cudnn[\w$.]*|jaxext_\w+)", text)


def test_without_cudnn_the_reference_is_lowered_with_a_reason():
    _attention_cudnn._jax_refuses.cache_clear()
    operands, params = _bind(*shapes(), band=(None, 0))
    reason = ATTENTION.refusal(*operands, **params, platform="cuda")
    if reason is None:
        pytest.skip("cuDNN is installed here")
    assert reason == "JAX's cuDNN attention refuses: cuDNN is not detected."
    assert calls(lowered(lambda *a: attention_op(*a, band=(None, 0)), *operands)) == []


def test_an_old_cudnn_is_a_reason_too(found, monkeypatch):  # noqa: F811
    import jax._src.cudnn.fused_attention_stablehlo as cudnn

    def too_old(*_, **__):
        raise NotImplementedError("Compute capability 10.3 requires cuDNN version >= 9.11.")

    monkeypatch.setattr(cudnn, "check_is_flash_attention", too_old)
    operands, params = _bind(*shapes())
    assert ATTENTION.refusal(*operands, **params, platform="cuda") == (
        "JAX's cuDNN attention refuses: Compute capability 10.3 requires cuDNN version >= 9.11."
    )
    assert calls(lowered(lambda *a: attention_op(*a), *operands)) == []


def test_forward_and_backward_are_one_call_each(found):  # noqa: F811
    def loss(*operands):
        return attention_op(*operands, band=(None, 0)).astype(jnp.float32).sum()

    assert calls(lowered(loss, *shapes())) == [FORWARD]
    assert calls(lowered(jax.grad(loss, (0, 1, 2)), *shapes())) == [FORWARD, BACKWARD]


MASKED = {
    "": ({}, FORWARD, BACKWARD),
    "lengths": ({"mask": (2, 1, 1, 128), "prefix": True}, FORWARD, BACKWARD),
    "mask": ({"mask": (2, 4, 128, 128)}, WITH_BIAS, WITH_BIAS + "Backward"),
    "bias": ({"bias": (1, 4, 128, 128), "mask": (2, 1, 1, 128)}, WITH_BIAS, WITH_BIAS + "Backward"),
}


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("manual", [True, False])
def test_several_devices_keep_their_rows(found, manual, name):  # noqa: F811
    mesh = jax.make_mesh((2,), ("rows",), devices=jax.devices()[:2])
    rows = jax.sharding.PartitionSpec("rows")
    options, *expected = MASKED[name]
    extras = {
        key: jax.ShapeDtypeStruct(x, "bool" if key == "mask" else "bfloat16")
        for key, x in options.items()
        if key in ("bias", "mask")
    }
    given, params = _bind(*shapes(), **{**options, **extras}, band=(None, 0))
    specs = tuple(rows if x.shape[0] > 1 else jax.sharding.PartitionSpec() for x in given)
    given = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.NamedSharding(mesh, spec))
        for x, spec in zip(given, specs)
    ]

    def attend(*xs):
        return ATTENTION(*xs, **params)[0]

    per_device = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=rows) if manual else attend
    text = lowered(jax.grad(lambda *xs: per_device(*xs).astype(jnp.float32).sum(), (0, 1, 2)), *given)
    # What XLA partitions it asks of this process, for each device's rows, once it compiles.
    assert calls(text) == (expected if manual else [])
    assert text.count("@CustomSPMDPartitioning(") == (0 if manual else 2)


def test_a_model_that_is_traced_for_cuda_gets_cudnn_and_explain_says_so(found):  # noqa: F811
    def attend(q, k, v):
        scores = jnp.einsum("btnh,bsnh->bnts", q, k) / 8
        scores = jnp.where(jnp.tril(jnp.ones((128, 128), bool)), scores, -jnp.inf)
        return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v)

    report = jaxext.explain(attend, platform="cuda")(*shapes(kv_heads=4))
    (entry,) = report.replaced
    assert entry.kernel == "attention"
    assert entry.detail.endswith("cuDNN through jax.nn.dot_product_attention")


def test_a_jax_that_keeps_something_else_is_refused(found, monkeypatch):  # noqa: F811
    plain = _attention_cudnn._attend
    monkeypatch.setattr(_attention_cudnn, "_attend", lambda *xs, **o: jax.checkpoint(lambda *ys: plain(*ys, **o))(*xs))
    operands, params = _bind(*shapes())
    assert ATTENTION.refusal(*operands, **params, platform="cuda") == (
        "JAX's cuDNN attention refuses: its pullback holds other arrays than the statistics and the result"
    )


CASES = {
    "all": ({}, {}),
    "causal": ({}, {"band": (None, 0)}),
    "window": ({}, {"band": (-20, 0), "scale": 0.3}),
    "cross": ({"keys": 72}, {}),
    "grouped": ({"heads": 6}, {"band": (None, 0)}),
    "heads first": ({}, {"band": (None, 0), "layout": ("bnth", "btnh", "bnth", "bnth")}),
    "no batch": ({"batch": ()}, {"band": (None, 0)}),
    "two batches": ({"batch": (2, 3)}, {}),
    "bias": ({"kv_heads": 4}, {"bias": (1, 4, 64, 64)}),
    "bias of each": ({}, {"bias": (2, 4, 64, 64), "band": (None, 0)}),
    "bias of keys": ({}, {"bias": (2, 1, 1, 64)}),
    "bias of keys and heads": ({"batch": (2, 3)}, {"bias": (1, 3, 4, 1, 64), "mask": (2, 1, 1, 64, 64)}),
    "lengths": ({"keys": 72}, {"mask": (2, 1, 1, 72), "prefix": True}),
    "lengths, causal": ({"batch": (2, 3)}, {"mask": (2, 3, 1, 1, 64), "prefix": True, "band": (None, 0)}),
    "lengths for all": ({"batch": (4,)}, {"mask": (1, 1, 1, 64), "prefix": True}),
    "lengths, window": ({}, {"mask": (2, 1, 1, 64), "prefix": True, "band": (-9, 0)}),
    "lengths and a bias": ({}, {"mask": (2, 1, 1, 64), "prefix": True, "bias": (1, 4, 64, 64)}),
    "keys": ({}, {"mask": (2, 1, 1, 64), "layout": ("bnth", "btnh", "bnth", "bnth")}),
    "mask": ({"heads": 6}, {"mask": (2, 6, 64, 64)}),
    "mask, window": ({}, {"mask": (1, 1, 64, 64), "band": (-20, 0)}),
    "no batch, mask": ({"batch": ()}, {"mask": (4, 64, 64)}),
    "segments": ({}, {"segments": (1, 64), "band": (None, 0)}),
    "segments and a mask": ({"keys": 72}, {"segments": (2, 64), "mask": (1, 4, 1, 72), "bias": (1, 4, 64, 72)}),
}


def drawn(rng, options, dtype, keys):
    """The operands whose shapes `options` give; the first sequence has no key, the first row neither."""
    options = dict(options)
    if "bias" in options:
        options["bias"] = rng.standard_normal(options["bias"]).astype(dtype)
    if "mask" in options:
        shape = options["mask"]
        mask = rng.random(shape) < 0.4
        if options.get("prefix"):
            mask = np.arange(keys) < rng.integers(1, keys, shape[:-1])[..., None]
        mask.reshape(-1, *shape[-2:])[0, 0] = False
        options["mask"] = mask
    if "segments" in options:
        shape = options.pop("segments")
        options["query_segment_ids"] = np.sort(rng.integers(0, 4, shape)).astype(np.int32)
        options["key_value_segment_ids"] = np.sort(rng.integers(1, 5, (*shape[:-1], keys))).astype(np.int32)
    return options


IN_FLOAT16 = ("causal", "lengths", "mask", "bias of each", "segments and a mask")


@pytest.mark.parametrize(
    ("case", "dtype"), [(name, "bfloat16") for name in CASES] + [(name, "float16") for name in IN_FLOAT16]
)
def test_forward_and_backward_fit_together(emulated, case, dtype):  # noqa: F811
    sizes, options = CASES[case]
    rng = np.random.default_rng(0)
    operands = [rng.standard_normal(x.shape).astype(dtype) for x in shapes(64, **{"depth": 16, **sizes})]
    options = drawn(rng, options, dtype, operands[1].shape[-3])
    for i, order in enumerate(options.get("layout", ("btnh",) * 4)[:3]):
        operands[i] = operands[i] if order == "btnh" else operands[i].swapaxes(-2, -3)
    given, params = _bind(*operands, **options, fill="uniform" if dtype == "bfloat16" else "zeros")
    wrt = tuple(i for i, x in enumerate(given) if jnp.issubdtype(x.dtype, jnp.floating))
    out, lse, low = jax.jit(lambda *xs: _attention_cudnn._forward(*xs, **params))(*given)
    expected, exact_lse, exact_low = jax.jit(lambda *xs: ATTENTION.reference(*xs, **params))(*given)
    assert [x.shape for x in (out, lse, low)] == [x.shape for x in (expected, exact_lse, exact_low)]
    assert [x.dtype for x in (out, lse, low)] == [x.dtype for x in (expected, exact_lse, exact_low)]
    np.testing.assert_allclose(lse.sum(-2), exact_lse.sum(-2), rtol=0, atol=1e-4)
    cotangent = rng.standard_normal(out.shape).astype(dtype)
    saved = (out, lse, low, cotangent)
    ours = jax.jit(lambda *xs: _attention_cudnn._backward(*xs, wrt=wrt, **params))(*given, *saved)
    backward = jax.jit(lambda *xs: ATTENTION_BACKWARD.reference(*xs, wrt=wrt, **params))
    plain = backward(*given, *saved)
    wide = [np.asarray(x, np.float32) if i in wrt else x for i, x in enumerate(given)]
    exact = jax.jit(lambda *xs: ATTENTION.reference(*xs, **params)[0])(*wide)
    exact_gradients = backward(*wide, *saved[:3], cotangent.astype(np.float32))
    for o, p, e in zip((out, *ours), (expected, *plain), (exact, *exact_gradients), strict=True):
        assert (o.shape, o.dtype) == (p.shape, p.dtype)
        o, p, e = (np.asarray(x, np.float64) for x in (o, p, e))
        floor = 4 * float(jnp.finfo(dtype).eps) * np.abs(e).max()
        assert np.abs(o - e).max() <= 2 * np.abs(p - e).max() + floor


@pytest.mark.parametrize("options", [{"mask": (2, 1, 1, 64), "prefix": True}, {"mask": (2, 4, 64, 64)}], ids=str)
def test_rows_without_a_key_that_are_nan(emulated, options):  # noqa: F811
    rng = np.random.default_rng(0)
    operands = [rng.standard_normal(x.shape).astype(x.dtype) for x in shapes(64, depth=16)]
    given, params = _bind(*operands, **drawn(rng, options, "bfloat16", 64), fill="nan")
    saved = jax.jit(lambda *xs: _attention_cudnn._forward(*xs, **params))(*given)
    cotangent = rng.standard_normal(saved[0].shape).astype(saved[0].dtype)
    ours = _attention_cudnn._backward(*given, *saved, cotangent, wrt=(0, 1, 2), **params)
    plain = ATTENTION_BACKWARD.reference(*given, *saved, cotangent, wrt=(0, 1, 2), **params)
    expected = ATTENTION.reference(*given, **params)[0]
    for o, p in zip((saved[0], *ours), (expected, *plain), strict=True):
        o, p = np.asarray(o, np.float32), np.asarray(p, np.float32)
        assert (np.isnan(o) == np.isnan(p)).all()
        np.testing.assert_allclose(np.nan_to_num(o), np.nan_to_num(p), rtol=0, atol=4 * 2**-8 * np.nanmax(np.abs(p)))


def test_residuals_of_either_platform_serve_the_other(emulated):  # noqa: F811
    rng = np.random.default_rng(0)
    operands = [rng.standard_normal(x.shape).astype(x.dtype) for x in shapes(64, depth=16)]
    given, params = _bind(*operands, band=(None, 0))
    cotangent = rng.standard_normal(given[0].shape).astype(given[0].dtype)

    def gradients(saved):
        return _attention_cudnn._backward(*given, *saved, cotangent, wrt=(0, 1, 2), **params)

    own, others = jax.jit(lambda *xs: _attention_cudnn._forward(*xs, **params))(*given), ATTENTION(*given, **params)
    for a, b in zip(gradients(own), gradients(others)):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=0, atol=4 * 2**-8 * np.abs(b).max())
