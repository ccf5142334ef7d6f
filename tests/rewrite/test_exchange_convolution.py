"""Convolutions that XLA computes slowly, written another way: as exact as stock JAX."""

import jax
import jax.numpy as jnp
import pytest
from exchanged import arrays, assert_exact, details

import jaxext
from jaxext.rewrite.patterns import dense

NHWC = ("NHWC", "HWIO", "NHWC")


@pytest.fixture(autouse=True)
def no_kernel(monkeypatch):
    """As where there is none, or for other layouts: with channels last, a kernel takes all of these."""
    monkeypatch.setattr(dense, "choose", lambda *_: None)


def assert_replaced(function, detail, *args, times=1):
    """Written as `detail` says, `times`, and exact."""
    assert details("convolution", function, *args) == [detail] * times
    assert_exact(function, *args)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("padding", ["SAME", "VALID", [(2, 2), (2, 1)]])
@pytest.mark.parametrize("strides", [(2, 2), (2, 3)])
def test_the_kernels_gradient_of_a_transposed_convolution(strides, padding, dtype):
    x, w = arrays((4, 9, 8, 32), (4, 5, 32, 48), dtype=dtype)

    def forward(w):
        return jax.lax.conv_transpose(x.astype(w.dtype), w, strides, padding, dimension_numbers=NHWC)

    (cotangent,) = arrays(forward(w).shape, dtype=dtype)
    assert_replaced(lambda w, c: jax.vjp(forward, w)[1](c)[0], "operands exchanged", w, cotangent)


@pytest.mark.parametrize(
    ("image", "window", "stride", "padding", "dilation"),
    [
        ((2, 2), (3, 3), 1, "SAME", 1),
        ((2, 2), (3, 3), 2, "SAME", 1),
        ((1, 1), (3, 3), 1, "SAME", 1),
        ((2, 3), (5, 5), 1, [(2, 2), (1, 3)], 1),
        ((2, 2), (3, 3), 1, "SAME", 2),
        ((3, 2), (3, 3), 1, [(2, 1), (1, 1)], 1),
    ],
)
def test_a_window_larger_than_the_image(image, window, stride, padding, dilation):
    x, w = arrays((32, *image, 128), (*window, 128, 160))

    def forward(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (stride,) * 2, padding, rhs_dilation=(dilation,) * 2, dimension_numbers=NHWC
        )

    assert_replaced(forward, "patches and products", x, w)


def test_its_input_gradient_and_another_layout():
    x, w = arrays((32, 128, 2, 2), (160, 128, 3, 3))
    forward = lambda x, w: jax.lax.conv(x, w, (1, 1), "SAME")  # noqa: E731
    assert_replaced(forward, "patches and products", x, w)
    (cotangent,) = arrays((32, 160, 2, 2))

    def input_gradient(x, c):
        return jax.linear_transpose(lambda x: forward(x, w.astype(x.dtype)), x)(c)[0]

    assert_replaced(input_gradient, "patches and products", x, cotangent)


def test_one_dimension():
    x, w = arrays((64, 2, 256), (3, 256, 128))
    forward = lambda x, w: jax.lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))  # noqa: E731
    assert_replaced(forward, "patches and products", x, w)


@pytest.mark.parametrize(
    ("x", "w", "options"),
    [
        ((4, 16, 16, 32), (3, 3, 32, 32), {}),
        ((32, 2, 2, 128), (3, 3, 64, 128), {"feature_group_count": 2}),
        ((1, 2, 2, 4), (3, 3, 4, 4), {}),
        ((9, 64, 64, 16), (9, 128, 128, 16), {"lhs_dilation": (2, 2), "padding": [(1, 1), (1, 1)]}),
    ],
    ids=["an ordinary one", "groups", "a small one", "a gradient of few features"],
)
def test_others_stay_with_stock(x, w, options):
    numbers = NHWC if "lhs_dilation" not in options else ("CHWN", "IHWO", "HWNC")
    options = {"padding": "SAME"} | options
    function = lambda x, w: jax.lax.conv_general_dilated(x, w, (1, 1), dimension_numbers=numbers, **options)  # noqa: E731
    assert not jaxext.explain(function)(*arrays(x, w)).to_dict()["replaced"]


def test_a_trace_under_disable_jit_exchanges_operations_too():
    """Found by the summaries of haiku, which trace a model under it: an exchange by an expression had no call."""
    image, kernel = jnp.ones((8, 2, 2, 512)), jnp.ones((3, 3, 512, 64))

    def convolve(image, kernel):
        return jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    jaxext.install(memory="system")
    try:
        with jax.disable_jit(), jaxext.collect() as report:
            assert jax.eval_shape(convolve, image, kernel).shape == (8, 2, 2, 64)
    finally:
        jaxext.uninstall()
    assert [entry.kernel for entry in report.replaced] == ["convolution"]
