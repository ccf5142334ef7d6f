"""precision="fp8": which products multiply in eight bits, why others do not, and how exact those are that do.

They are lowered for CUDA and run on the CPU, where XLA rounds to the same eight bits and sums in float32 too.
"""

import functools
import importlib.util
import re
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import jaxext
from jaxext.kernels import _fp8, _native_module, _platform

NOT_HERE = "fp8 products are for GPUs of compute capability 8.9 or later; this program is for cpu"
HALF = jnp.bfloat16


def linear(x, w):
    return x @ w


def types(*shapes, dtype="bfloat16"):
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


def normal(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), HALF) for shape in shapes]


@pytest.fixture
def every_size(monkeypatch):
    """What is too small to pay is exchanged as well, so that tests can be small."""
    monkeypatch.setattr(_fp8, "fp8_pays", lambda m, k, n: True)


def exported(fn, *args, platform="cuda"):
    with _platform.assuming("cuda"):
        anywhere = [jax.export.DisabledSafetyCheck.platform()]
        step = jaxext.accelerate(fn, precision="fp8")
        return jax.export.export(step, platforms=[platform], disabled_checks=anywhere)(*args)


def in_eight_bits(fn, *args):
    return exported(fn, *args).call(*args)


def explained(fn, *args, platform="cuda", **options):
    return jaxext.explain(jaxext.accelerate(fn, precision="fp8", **options), platform=platform)(*args)


def details(report):
    return [entry.detail for entry in report.replaced]


def reasons(report):
    return [entry.reason for entry in report.missed]


FORWARD, BACKWARD = "float8_e4m3fn x float8_e4m3fn", "float8_e5m2 x float8_e4m3fn"

# ---------------------------------------------------------------- what is exchanged


@pytest.mark.parametrize(
    ("rows", "features", "columns"), [(16384, 4096, 4096), (8192, 2048, 8192), (4096, 16384, 4096), (65536, 1024, 4096)]
)
def test_large_products_of_bfloat16_are_exchanged(rows, features, columns):
    report = explained(linear, *types((rows, features), (features, columns)))
    assert details(report) == [FORWARD] and not report.missed


@pytest.mark.parametrize("sizes", [(16384, 768, 768), (1024, 1024, 1024), (128, 4096, 4096), (16384, 128, 16384)])
def test_what_rounding_would_slow_down_is_not(sizes):
    rows, features, columns = sizes
    report = explained(linear, *types((rows, features), (features, columns)))
    expected = f"{rows} x {features} x {columns}: scaling and rounding would take longer than eight bits save"
    assert not report.replaced and reasons(report) == [expected]


def with_batch(x, w):
    return jnp.einsum("bij,bjk->bik", x, w)


REASONS = {
    "float32": (linear, types((64, 32), (32, 48), dtype="float32"), "operands of float32 and float32; eight bits"),
    "float16": (linear, types((64, 32), (32, 48), dtype="float16"), "operands of float16 and float16; eight bits"),
    "a float32 result": (
        functools.partial(jnp.matmul, preferred_element_type=jnp.float32),
        types((64, 32), (32, 48)),
        "a result of float32 asks for more than eight bits give",
    ),
    "batched": (with_batch, types((4, 64, 32), (4, 32, 48)), "it has batch dimensions, as attention's products"),
    "twelve": (linear, types((64, 12), (12, 48)), "a dimension of 12 is no multiple of 16"),
    "a vector": (linear, types((64, 32), (32,)), "a dimension of 1 is no multiple of 16"),
    "nothing summed": (
        lambda x, w: jnp.tensordot(x, w, 0),
        types((16,), (16,)),
        "it sums over nothing",
    ),
    "precision": (
        functools.partial(jnp.matmul, precision="highest"),
        types((64, 32), (32, 48)),
        "it asks for a precision of its own",
    ),
    "logits": (
        lambda x, w: jax.nn.log_softmax((x @ w).astype(jnp.float32) + 1),
        types((64, 32), (32, 48)),
        "its result goes into a softmax",
    ),
}


@pytest.mark.usefixtures("every_size")
@pytest.mark.parametrize("name", REASONS)
def test_the_reason_is_in_the_report(name):
    fn, operands, reason = REASONS[name]
    report = explained(fn, *operands)
    assert not report.replaced
    (found,) = reasons(report)
    assert found.startswith(reason)


@pytest.mark.usefixtures("every_size")
@pytest.mark.parametrize("kernel", [True, False], ids=["softmax's kernel", "XLA's softmax"])
def test_logits_stay_as_they_are_and_so_do_their_gradients(kernel, monkeypatch):
    if kernel:
        monkeypatch.setattr(_native_module, "cuda_lacks", lambda target: None)

    def loss(w, head, x, labels):
        logits = (jax.nn.relu(x @ w) @ head).astype(jnp.float32)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], -1).mean()

    labels = jax.ShapeDtypeStruct((64,), "int32")
    report = explained(jax.grad(loss, (0, 1)), *types((32, 64), (64, 512), (64, 32)), labels)
    assert ("softmax_cross_entropy" in report.kernels()) == kernel
    assert [entry.detail for entry in report.replaced if entry.kernel == "matmul"] == [FORWARD, BACKWARD]
    assert reasons(report) == ["its result goes into a softmax"] * 3


@pytest.mark.usefixtures("every_size")
def test_a_maximum_over_the_sequence_is_no_softmax():
    report = explained(lambda x, w: (x @ w).max(1), *types((4, 64, 32), (32, 48)))
    assert details(report) == [FORWARD]


# ---------------------------------------------------------------- where, and at whose wish


@pytest.mark.usefixtures("every_size")
def test_without_being_asked_for_nothing_changes():
    operands = types((64, 32), (32, 48))
    with _platform.assuming("cuda"):
        text = jaxext.accelerate(linear).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    assert "f8E" not in text
    assert not jaxext.explain(linear, platform="cuda")(*operands).replaced


@pytest.mark.usefixtures("every_size")
def test_on_a_cpu_the_report_says_why_and_the_program_is_the_same():
    operands = normal((64, 32), (32, 48))
    report = explained(linear, *operands, platform=None)
    assert [entry.reason for entry in report.fallbacks] == [NOT_HERE]
    asked, plain = (jaxext.accelerate(linear, precision=p).lower(*operands).as_text() for p in ("fp8", None))
    assert asked == plain


@pytest.mark.usefixtures("every_size")
def test_strict_makes_it_an_error_on_a_cpu(monkeypatch):
    monkeypatch.setenv("JAXEXT_STRICT", "1")
    with pytest.raises(RuntimeError, match=f"JAXEXT_STRICT: matmul in linear: {NOT_HERE}"):
        jaxext.accelerate(linear, precision="fp8")(*normal((64, 32), (32, 48)))


@pytest.mark.usefixtures("every_size")
@pytest.mark.parametrize(("capability", "runs"), [((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_older_cards_are_left_alone(capability, runs, monkeypatch):
    monkeypatch.setattr(_platform, "compute_capability", lambda: capability)
    report = explained(linear, *types((64, 32), (32, 48)))
    assert bool(report.replaced) == runs
    major, minor = capability
    reason = f"fp8 products are for GPUs of compute capability 8.9 or later; this one has {major}.{minor}"
    assert [entry.reason for entry in report.fallbacks] == [reason] * (not runs)


@pytest.mark.usefixtures("every_size")
def test_lowered_for_another_platform_it_is_the_users_product():
    operands = types((64, 32), (32, 48))
    for platform in ("cpu", "tpu"):
        assert "f8E" not in exported(linear, *operands, platform=platform).mlir_module()


@pytest.mark.usefixtures("every_size")
def test_kernels_are_switched_off_and_parts_left_out_as_ever():
    operands = types((64, 32), (32, 48))
    assert not explained(linear, *operands, exclude="matmul").replaced

    def half(x, w):
        with jaxext.disabled():
            first = x @ w
        return first + (x @ (w + 1))

    assert details(explained(half, *operands)) == [FORWARD]


@pytest.mark.usefixtures("every_size")
def test_asked_for_inside_another_function_it_holds_there_alone():
    inner = jaxext.accelerate(lambda x, w: jax.lax.scan(lambda c, v: (c, x @ v), 0.0, w)[1], precision="fp8")
    outer = jaxext.accelerate(lambda x, w, v: inner(x, w).sum(0) + x @ v)
    report = jaxext.explain(outer, platform="cuda")(*types((64, 32), (3, 32, 48), (32, 48)))
    assert [entry.location for entry in report.replaced] == ["<lambda>/<lambda>/scan"]


@pytest.mark.usefixtures("every_size")
def test_the_environment_asks_for_it(monkeypatch):
    monkeypatch.setenv("JAXEXT_PRECISION", "FP8")
    report = jaxext.explain(jaxext.accelerate(linear), platform="cuda")(*types((64, 32), (32, 48)))
    assert details(report) == [FORWARD]


# ---------------------------------------------------------------- the form, and derivatives


def dots(fn, *args):
    """Types of the operands and the result of each eight-bit product in the program for CUDA."""
    text = exported(fn, *args).mlir_module()
    found = re.findall(r"dot_general.*: \(tensor<[\dx]*x(\w+)>, tensor<[\dx]*x(\w+)>\) -> tensor<[\dx]*x(\w+)>", text)
    return sorted(each for each in found if each[0].startswith("f8"))


def pulled(x, w, cotangent):
    result, pull = jax.vjp(linear, x, w)
    return result, *pull(cotangent)


@pytest.mark.usefixtures("every_size")
def test_the_products_have_eight_bit_operands_and_the_cotangent_has_more_range():
    args = types((8, 64, 32), (32, 48), (8, 64, 48))
    forward, backward = ("f8E4M3FN", "f8E4M3FN", "bf16"), ("f8E5M2", "f8E4M3FN", "bf16")
    assert dots(pulled, *args) == [forward, backward, backward]


def layers(x, ws):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]


def again(x, ws):
    return jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(jnp.tanh(x @ w) @ w), None)), x, ws)[0]


@pytest.mark.usefixtures("every_size")
@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (layers, [FORWARD, BACKWARD, BACKWARD]),
        # What is computed again, among the derivatives, has the forward pass's formats.
        (again, [FORWARD] * 4 + [BACKWARD] * 4),
        (lambda x, ws: jax.vmap(lambda x: x @ ws[0])(x[None]), [FORWARD, BACKWARD, BACKWARD]),
        (lambda x, ws: jax.lax.cond(x[0, 0] > 0, lambda: x @ ws[0], lambda: x), [FORWARD, BACKWARD, BACKWARD]),
        (lambda x, ws: jax.jit(linear)(x, ws[0]), [FORWARD, BACKWARD, BACKWARD]),
    ],
    ids=["scan", "remat in scan", "vmap", "cond", "jit"],
)
def test_loops_branches_and_calls_are_gone_into(fn, expected):
    gradients = jax.grad(lambda x, ws: fn(x, ws).astype(jnp.float32).sum(), (0, 1))
    x, ws = types((64, 32), (3, 32, 32))
    assert sorted(details(explained(gradients, x, ws))) == sorted(expected)
    x, ws = normal((64, 32), (3, 32, 32))
    found, plain = (run(gradients, x, ws / 16) for run in (in_eight_bits, lambda f, *xs: jax.jit(f)(*xs)))
    for ours, theirs in zip(found, plain, strict=True):
        # At most three layers of two products, each of two operands whose roundings, 2^-3 at most, are independent.
        ours, theirs = (np.asarray(each, np.float64) for each in (ours, theirs))
        assert np.linalg.norm(ours - theirs) <= np.sqrt(2 * 2 * 3) * 2**-3 * np.linalg.norm(theirs)


# ---------------------------------------------------------------- how exact


def rounding(x, cotangent):
    """Of each element, at most: half a step of the format, whose steps no longer shrink below its normal numbers."""
    largest = np.abs(x).max()
    # The scale takes the largest value into the upper half of the range.
    relative, smallest = (2**-3, 2**-17 / (57344 / 2)) if cotangent else (2**-4, 2**-10 / (448 / 2))
    return np.maximum(relative * np.abs(x), smallest * largest)


def allowed(a, b, cotangent=False):
    """The error of a @ b, from those of its operands, the sum in float32 and the result in bfloat16."""
    own, other = rounding(a, cotangent), rounding(b, False)
    operands = own @ np.abs(b) + np.abs(a) @ other + own @ other
    exact = np.abs(a @ b)
    return operands + a.shape[1] * 2**-24 * (np.abs(a) @ np.abs(b) + operands) + 2**-8 * (exact + operands)


def wide(*arrays):
    return [np.asarray(array, np.float64) for array in arrays]


@pytest.mark.usefixtures("every_size")
@pytest.mark.parametrize("spread", [1, 2**30, 2**-30])
def test_the_error_is_that_of_rounding_the_operands(spread):
    x, w, cotangent = normal((64, 96), (96, 48), (64, 48))
    # Rows of very different sizes: what is far below the largest is rounded to steps that no longer shrink.
    x = (x * spread * jnp.exp2(-jnp.arange(64) % 16)[:, None]).astype(HALF)
    cotangent = cotangent / spread
    found = in_eight_bits(pulled, x, w, cotangent)
    a, b, g = wide(x, w, cotangent)
    result, of_x, of_w = wide(*found)
    assert {each.dtype for each in found} == {jnp.dtype(HALF)}
    assert (np.abs(result - a @ b) <= allowed(a, b)).all()
    assert (np.abs(of_x - g @ b.T) <= allowed(g, b.T, cotangent=True)).all()
    assert (np.abs(of_w.T - g.T @ a) <= allowed(g.T, a, cotangent=True)).all()


@pytest.mark.usefixtures("every_size")
def test_zeros_give_zeros():
    x, w = jnp.zeros((64, 32), HALF), normal((32, 48))[0]
    assert not np.asarray(in_eight_bits(linear, x, w), np.float32).any()
    assert not np.asarray(in_eight_bits(linear, x, jnp.zeros((32, 48), HALF)), np.float32).any()


@pytest.mark.usefixtures("every_size")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_where_it_is(value):
    x, w = normal((64, 32), (32, 48))
    spoilt = np.asarray(in_eight_bits(linear, x.at[5, 7].set(value), w), np.float32)
    clean = np.asarray(in_eight_bits(linear, x.at[5, 7].set(0), w), np.float32)
    stock = np.asarray(jax.jit(linear)(x.at[5, 7].set(value), w), np.float32)
    np.testing.assert_array_equal(np.isfinite(spoilt), np.isfinite(stock))
    rows = np.arange(64) != 5
    np.testing.assert_array_equal(spoilt[rows], clean[rows])


@pytest.mark.usefixtures("every_size")
@pytest.mark.parametrize("sizes", [(2.0**100, 2.0**40), (2.0**-90, 2.0**-90), (2.0**-120, 1.0), (2.0**120, 2.0**-120)])
def test_overflow_and_underflow_are_stocks(sizes):
    x, w = (jnp.full(shape, size, HALF) for shape, size in zip(((64, 32), (32, 48)), sizes))
    ours, stock = (np.asarray(run(linear, x, w), np.float64) for run in (in_eight_bits, lambda f, *a: jax.jit(f)(*a)))
    np.testing.assert_allclose(ours, stock, rtol=2 * 2**-4 + 2**-8)


@pytest.mark.usefixtures("every_size")
def test_over_several_devices_the_largest_value_is_the_whole_arrays():
    x, w = normal((64, 32), (32, 48))
    x = (x * jnp.exp2(-jnp.arange(64) % 16)[:, None]).astype(HALF)
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    spread = jax.device_put(x, jax.NamedSharding(mesh, jax.P("rows")))
    whole = jax.device_put(w, jax.NamedSharding(mesh, jax.P()))
    program = exported(linear, spread, whole)
    assert program.nr_devices == 2 and "f8E4M3FN" in program.mlir_module()
    np.testing.assert_array_equal(
        *(np.asarray(each, np.float32) for each in (jax.jit(program.call)(spread, whole), in_eight_bits(linear, x, w)))
    )


# ---------------------------------------------------------------- losses


def test_a_language_model_learns_as_in_bfloat16():
    path = Path(__file__).parents[1] / "bench" / "bench_fp8.py"
    spec = importlib.util.spec_from_file_location("bench_fp8", path)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    data, size = bench.batches(40), {"layers": 2, "width": 64}
    starts = [bench.parameters(seed, **size) for seed in range(3)]
    step, report = bench.in_eight_bits(starts[0], bench.OPTIMIZER.init(starts[0]), data[0])
    assert len(report.replaced) == 3 * 4 * 2
    stock = [bench.losses(bench.stock(), start, data)[-10:].mean() for start in starts]
    ours = bench.losses(step, starts[0], data)[-10:].mean()
    # No further off than another start is.
    assert stock[0] < 4 and abs(ours - stock[0]) <= max(stock) - min(stock)
