"""Single primitives against stock JAX: sort, argmax, running sums, searches, rows by number, random bits, windows.

    python tests/bench/bench_primitives.py

Prints milliseconds, the ratio stock / jaxext, and whether jaxext's rule takes the shape.
"""

import interleaved
import jax
import jax.numpy as jnp
import numpy as np

import jaxext
from jaxext.kernels._arg_reduce import ARG_REDUCE, arg_reduce_gains
from jaxext.kernels._cumulative import CUMULATIVE, cumulative_gains
from jaxext.kernels._indexed_rows import GATHER, SCATTER, gather_gains, scatter_gains
from jaxext.kernels._max_pool import MAX_POOL, MAX_POOL_GRADIENT, max_pool_gains
from jaxext.kernels._random_bits import RANDOM_BITS, random_bits_gains
from jaxext.kernels._searchsorted import SEARCHSORTED, searchsorted_gains
from jaxext.kernels._sort import SORT, sort_gains

NHWC = ("NHWC", "HWIO", "NHWC")


def report(name, native, stock, taken, *args):
    # Only the outermost jitted function is exchanged in.
    native, stock = native if hasattr(native, "lower") else jax.jit(native), jax.jit(stock)
    t = interleaved.medians({"jaxext": lambda: native(*args), "stock": lambda: stock(*args)}, repeats=15)
    left = "" if taken else "  left to stock"
    times = f"{t['stock'] * 1e3:9.3f} / {t['jaxext'] * 1e3:8.3f} ms = {t['stock'] / t['jaxext']:6.2f}x"
    print(f"{name:42} {times}{left}", flush=True)


def array(shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape) * 1000).astype(dtype)


def sorts():
    for shape in ((1, 64), (16, 64), (4096, 16), (1024, 1024), (1, 1024), (1, 16384), (1, 1 << 20)):
        for dtype in ("float32", "bfloat16"):
            x = array(shape, dtype)
            places = jnp.broadcast_to(jnp.arange(shape[-1], dtype=jnp.int32), shape)
            report(f"sort {shape} {dtype}", SORT, lambda x: jnp.sort(x), sort_gains(x), x)
            stock = lambda x, p: jax.lax.sort((x, p), num_keys=1)  # noqa: E731
            report(f"argsort {shape} {dtype}", SORT, stock, sort_gains(x), x, places)


def arg_reductions():
    for shape, axis in (((8, 64), -1), ((128, 64), -1), ((1024, 8), -1), ((2048, 32000), -1), ((20000, 256), -1),
                        ((256, 8192), -2), ((1, 1 << 20), -1)):  # fmt: skip
        for dtype in ("float32", "bfloat16"):
            x = array(shape, dtype)
            native = lambda x, axis=axis: ARG_REDUCE(x, axis=axis, largest=True)  # noqa: E731
            stock = lambda x, axis=axis: jnp.argmax(x, axis)  # noqa: E731
            report(f"argmax {shape} axis {axis} {dtype}", native, stock, arg_reduce_gains(x, axis), x)


def running_sums():
    for shape, axis in (((1, 512), -1), ((8, 512), -1), ((512, 8), -1), ((4096, 4096), -1), ((4096, 4096), -2),
                        ((1, 100000), -1), ((1, 1 << 20), -1)):  # fmt: skip
        for dtype in ("float32", "bfloat16"):
            x = array(shape, dtype)
            native = lambda x, axis=axis: CUMULATIVE(x, axis=axis, kind="cumsum", reverse=False)  # noqa: E731
            stock = lambda x, axis=axis: jnp.cumsum(x, axis)  # noqa: E731
            report(f"cumsum {shape} axis {axis} {dtype}", native, stock, cumulative_gains(x, axis, "cumsum"), x)
    for shape, axis in (((1, 512), -1), ((8, 512), -1), ((8, 1024, 256), -2), ((64, 8192), -1), ((64, 65536), -1)):
        for kind, dtype in (("cumlogsumexp", "float32"), ("cumlogsumexp", "bfloat16"), ("cumsum", "int32")):
            x, params = array(shape, dtype), {"axis": axis, "kind": kind, "reverse": False}
            runs = [lambda x, f=f, p=params: f(x, **p) for f in (CUMULATIVE, CUMULATIVE.reference)]
            report(f"{kind} {shape} axis {axis} {dtype}", *runs, cumulative_gains(x, axis, kind), x)


def searches():
    rng = np.random.default_rng(2)
    for n, count in (
        (16, 100_000),
        (1000, 1000),
        (1000, 100_000),
        (100_000, 100_000),
        (100_000, 256),
        (1 << 20, 1 << 18),
    ):
        a, v = np.sort(rng.random(n)).astype(np.float32), rng.random(count).astype(np.float32)
        for name, query in (("any order", v), ("ascending", np.sort(v))):
            native = lambda a, v: SEARCHSORTED(a, v, side="left")  # noqa: E731
            report(f"searchsorted {n} by {count}, {name}", native, jnp.searchsorted, searchsorted_gains(a, v), a, query)


def rows_by_number():
    for n, count, width in ((10_000, 100_000, 64), (4000, 20_000, 64), (4000, 1000, 64), (10_000, 100_000, 16),
                            (4000, 20_000, 128), (520_000, 53_248, 16), (1000, 4000, 768), (32_000, 2048, 768),
                            (32_000, 8192, 1024)):  # fmt: skip
        chosen = jnp.asarray(np.random.default_rng(1).integers(0, n, (count, 1)), jnp.int32)
        for dtype in ("float32", "bfloat16"):
            x, u, name = array((n, width), dtype), array((count, width), dtype), f"{(n, width)} by {count} {dtype}"
            stock = lambda x, i: GATHER.reference(x, i, fill=None)  # noqa: E731
            report(f"gather {name}", lambda x, i: GATHER(x, i, fill=None), stock, gather_gains(x, chosen), x, chosen)
            for order, i in (("", chosen), (", ascending", jnp.sort(chosen, 0))):
                runs = [
                    lambda i, u, f=f, x=x: f(jnp.zeros(x.shape, x.dtype), i, u, kind="add", clips=False)
                    for f in (SCATTER, SCATTER.reference)
                ]
                report(f"scatter {name}{order}", *runs, scatter_gains(x, u, i), i, u)


def random_numbers():
    key = jax.random.key(0)
    for n in (64, 256, 1024, 16384, 1 << 18, 4 << 20):
        words = jax.random.key_data(key)
        native = lambda w, n=n: RANDOM_BITS(w, bit_width=32, shape=(n,))  # noqa: E731
        stock = lambda w, n=n: RANDOM_BITS.reference(w, bit_width=32, shape=(n,))  # noqa: E731
        report(f"bits {n}", native, stock, random_bits_gains((), (n,)), words)
    for name in ("uniform", "normal"):
        draw = lambda k, name=name: getattr(jax.random, name)(k, (4 << 20,))  # noqa: E731
        report(f"{name} {4 << 20}", jaxext.accelerate(draw), draw, True, key)


def convolutions():
    for batch, image, c, o, k in ((8, 2, 512, 512, 3), (8, 2, 64, 64, 3), (8, 1, 512, 512, 3), (8, 3, 256, 256, 5)):
        x, w = array((batch, image, image, c)), array((k, k, c, o))
        run = lambda x, w: jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=NHWC)  # noqa: E731
        report(f"window {k} on {(batch, image, image, c)} to {o}", jaxext.accelerate(run), run, True, x, w)


def dense_convolutions():
    sizes = (
        (8, 32, 64, 64, 3, 1), (8, 32, 128, 64, 3, 1), (8, 16, 128, 128, 3, 1), (8, 8, 128, 128, 3, 1),
        (8, 32, 64, 64, 3, 2), (8, 32, 3, 64, 3, 1), (8, 32, 64, 3, 3, 1), (32, 64, 3, 64, 7, 2),
        (32, 16, 64, 256, 1, 1), (32, 8, 128, 256, 1, 2), (32, 4, 256, 256, 3, 1), (32, 2, 512, 512, 3, 1),
        (8, 14, 512, 512, 3, 1), (8, 56, 3, 96, 4, 4), (1, 224, 3, 64, 7, 2), (128, 28, 1, 32, 3, 1),
        (128, 14, 32, 64, 3, 1), (1, 8, 32, 32, 3, 1), (1, 8, 8, 8, 3, 1), (1, 4, 8, 8, 3, 1), (1, 4, 4, 4, 3, 1),
    )  # fmt: skip
    for batch, image, c, o, k, stride in sizes:
        for dtype in ("float32", "bfloat16") if (image, c, o) == (16, 128, 128) else ("float32",):
            x, w = array((batch, image, image, c), dtype), array((k, k, c, o), dtype)

            def forward(x, w, strides=(stride, stride)):
                return jax.lax.conv_general_dilated(x, w, strides, "SAME", dimension_numbers=NHWC)

            name = f"{k} by {stride} on {(batch, image, image, c)} to {o} {dtype}"
            each_gradient(name, forward, x, w)


def transposed_convolutions():
    for batch, image, c, o, k in ((8, 16, 64, 64, 4), (8, 8, 128, 128, 4), (2, 64, 32, 32, 2), (16, 4, 100, 256, 4)):
        x, w = array((batch, image, image, c)), array((k, k, c, o))

        def forward(x, w):
            return jax.lax.conv_transpose(x, w, (2, 2), "SAME", dimension_numbers=NHWC)

        each_gradient(f"transposed {k} on {(batch, image, image, c)} to {o}", forward, x, w)


def each_gradient(name, forward, x, w):
    d = jax.jit(forward)(x, w)
    of_image = lambda x, w, d: jax.linear_transpose(lambda x: forward(x, w), x)(d)[0]  # noqa: E731
    of_kernel = lambda x, w, d: jax.linear_transpose(lambda w: forward(x, w), w)(d)[0]  # noqa: E731
    report(name, jaxext.accelerate(forward), forward, True, x, w)
    report(f"{name}, dx", jaxext.accelerate(of_image), of_image, True, x, w, d)
    report(f"{name}, dW", jaxext.accelerate(of_kernel), of_kernel, True, x, w, d)


def depthwise_convolutions():
    sizes = (8, 56, 96, 3), (8, 56, 96, 7), (8, 14, 384, 7), (8, 112, 32, 3), (1, 8, 64, 3), (1, 8, 8, 3)
    for batch, image, c, k in sizes:
        for dtype in ("float32", "bfloat16"):
            x, w = array((batch, image, image, c), dtype), array((k, k, 1, c), dtype)

            def forward(x, w, c=c):
                return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=NHWC, feature_group_count=c)

            gradient = lambda x, w, d, f=forward: jax.linear_transpose(lambda w: f(x, w), w)(d)[0]  # noqa: E731
            name = f"depthwise {k} on {(batch, image, image, c)} {dtype}"
            report(name, jaxext.accelerate(forward), forward, True, x, w)
            report(f"{name}, dW", jaxext.accelerate(gradient), gradient, True, x, w, x)


def windows():
    for shape, size, stride in (((16, 64, 64, 64), 3, 2), ((16, 64, 64, 64), 2, 2), ((128, 28, 28, 32), 2, 2),
                                ((1, 112, 112, 64), 3, 2), ((16, 32, 32, 64), 3, 1), ((16, 64, 64, 4), 3, 2),
                                ((1, 8, 8, 16), 3, 2), ((16, 64, 64, 1), 2, 2)):  # fmt: skip
        window, strides = (size, size), (stride, stride)
        pads = tuple(jax.lax.padtype_to_pads(shape[1:3], window, strides, "SAME"))
        params = {"window": window, "strides": strides, "padding": pads, "trailing": 1}
        for dtype in ("float32", "bfloat16"):
            x = array(shape, dtype)
            pooled = array(jax.eval_shape(lambda x, p=params: MAX_POOL.reference(x, **p), x)[0].shape, dtype)
            for op, args in ((MAX_POOL, (x,)), (MAX_POOL_GRADIENT, (pooled, x))):
                runs = [lambda *xs, f=f, p=params: f(*xs, **p) for f in (op, op.reference)]
                taken = max_pool_gains(op, x, window, strides, 1)
                report(f"{op.name} {size} by {stride} of {shape} {dtype}", *runs, taken, *args)


if __name__ == "__main__":
    for group in (
        sorts,
        arg_reductions,
        running_sums,
        searches,
        rows_by_number,
        random_numbers,
        convolutions,
        dense_convolutions,
        transposed_convolutions,
        depthwise_convolutions,
        windows,
    ):
        group()
