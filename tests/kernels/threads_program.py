"""Every kernel, forward and backward, from many threads at once: run by test_threads.py in a process of its own.

Sizes are such that each kernel shares its work among XLA's threads. Arguments: threads, rounds.
"""

import faulthandler
import functools
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np

from jaxext import _native, kernels
from jaxext.kernels._arg_reduce import ARG_REDUCE
from jaxext.kernels._convolution import CONVOLUTION, CONVOLUTION_GRADIENT
from jaxext.kernels._cumulative import CUMULATIVE
from jaxext.kernels._depthwise import DEPTHWISE, DEPTHWISE_GRADIENT, Window
from jaxext.kernels._distinct_rows import DISTINCT
from jaxext.kernels._indexed_rows import GATHER, SCATTER
from jaxext.kernels._linear_recurrence import LINEAR_RECURRENCE
from jaxext.kernels._max_pool import MAX_POOL, MAX_POOL_GRADIENT
from jaxext.kernels._product import PRODUCT
from jaxext.kernels._random_bits import RANDOM_BITS
from jaxext.kernels._searchsorted import SEARCHSORTED
from jaxext.kernels._sort import SORT
from jaxext.kernels._top_k import TOP_K

ROWS, COLUMNS = 192, 256  # more than one task of every kernel
LABELS = np.random.default_rng(1).integers(0, COLUMNS, ROWS).astype(np.int32)
SECONDS = 150
FEW = {"a_turned": False, "rounds": False}
TURNED = {"a_turned": True, "rounds": False}


def through_gradient(loss):
    return lambda x: jax.value_and_grad(lambda y: jnp.sum(jnp.sin(loss(y))))(x)


def attend(x):
    q = x.reshape(1, ROWS, 4, COLUMNS // 4)
    return kernels.attention(q, q, q, bias=jnp.zeros((1, 1, ROWS, ROWS)), is_causal=True)


def columns_scanned(x):
    return CUMULATIVE(x, axis=-2, kind="cumsum", reverse=True) + CUMULATIVE(
        jnp.tile(x.reshape(1, -1), (1, 2)), axis=-1, kind="cumsum", reverse=False
    )


def bits(x):
    keys = jax.lax.bitcast_convert_type(x[:4, :2], jnp.uint32)
    return RANDOM_BITS(keys, bit_width=32, shape=(20000,))


def rows_by_number(x):
    numbers = jnp.asarray(LABELS[:, None] % ROWS)
    taken = GATHER(jnp.tile(x, (8, 1)), jnp.tile(numbers, (8, 1)), fill=None)
    added = SCATTER(x, jnp.tile(numbers, (8, 1)), jnp.tile(x, (8, 1)), kind="add", clips=False)
    return taken, added, DISTINCT(jnp.tile(numbers, (8, 1)), held=COLUMNS, clips=False)


def depthwise(x):
    images, kernel = x.reshape(4, 8, 12, 128), x[:9].reshape(-1, 128)[:9].reshape(3, 3, 128)
    result = DEPTHWISE(images, kernel, window=Window((8, 12), low=(1, 1)))
    return result, DEPTHWISE_GRADIENT(images, images, window=Window((3, 3), low=(1, 1)))


def dense(x):
    images, kernel = x.reshape(6, 16, 16, 32), x[:36].reshape(3, 3, 32, 32)
    (result,) = CONVOLUTION(images, kernel, window=Window((16, 16), low=(1, 1)))
    return result, CONVOLUTION_GRADIENT(images, images, window=Window((3, 3), low=(1, 1)))


def pooled(x):
    images = x.reshape(8, 6, 8, 128)
    params = {"window": (3, 3), "strides": (2, 2), "padding": ((0, 1), (0, 1)), "trailing": 1}
    (result,) = MAX_POOL(images, **params)
    return result, MAX_POOL_GRADIENT(result, images, **params)


def recurrent(x):
    steps = x.reshape(3, 16, 1024)
    return LINEAR_RECURRENCE(jnp.tanh(steps), steps)[0]


def grouped(x):
    images = jnp.tile(x.reshape(1, -1, 64), (3, 1, 1))  # of more than one task each
    return kernels.group_norm(images, x[0, :64], x[1, :64], groups=8)


def many(x):
    return (x.reshape(48, 32, 32),) * 2  # of more than one task


CALLS = {
    "attention": through_gradient(attend),
    "layer_norm": through_gradient(lambda x: kernels.layer_norm(x, x[0], x[1])),
    "rms_norm": through_gradient(lambda x: kernels.rms_norm(x, x[0], residual=x)[0]),
    "group_norm": through_gradient(grouped),
    "linear_recurrence": through_gradient(recurrent),
    "cross_entropy": through_gradient(lambda x: kernels.softmax_cross_entropy(x, LABELS)),
    "target_cross_entropy": through_gradient(lambda x: kernels.softmax_cross_entropy(x, jax.nn.softmax(x))),
    "linear_cross_entropy": through_gradient(lambda x: kernels.linear_cross_entropy(x, x.T, LABELS % ROWS)),
    "product": lambda x: PRODUCT(x, x, a_turned=True, b_turned=False, rounds=False),
    "few_rows": lambda x: (PRODUCT(x[:24], x, **FEW, b_turned=True), PRODUCT(x[:24, :ROWS], x, **FEW, b_turned=False)),
    "few_columns": lambda x: PRODUCT(*(jnp.tile(x[:, :n], (6, 1)) for n in (48, 20)), **TURNED, b_turned=False),
    "small_products": lambda x: (PRODUCT(*many(x), **FEW, b_turned=True), PRODUCT(*many(x), **TURNED, b_turned=False)),
    "top_k": lambda x: TOP_K(x, k=20),
    "sort": lambda x: SORT(x, jnp.broadcast_to(jnp.arange(COLUMNS), x.shape)),
    "searchsorted": lambda x: SEARCHSORTED(jnp.sort(x.reshape(-1)), x, side="left"),
    "arg_reduce": lambda x: ARG_REDUCE(x, axis=-1, largest=True) + ARG_REDUCE(x, axis=-2, largest=False),
    "cumulative": columns_scanned,
    "random_bits": bits,
    "rows_by_number": rows_by_number,
    "convolution": dense,
    "depthwise": depthwise,
    "max_pool": pooled,
}


def everything(x):
    return {name: call(x) for name, call in CALLS.items()}


def scanned(x):
    return jax.lax.scan(lambda carry, _: (carry * 0.5, everything(carry)), x, None, length=3)


def programs():
    """{name: a call without arguments}: each kernel alone, all in one program, and that one nested in vmap and scan."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((ROWS, COLUMNS)), jnp.float32)
    alone = {name: functools.partial(jax.jit(call), x) for name, call in CALLS.items()}
    nested = {
        "everything": functools.partial(jax.jit(everything), x),
        "vmap": functools.partial(jax.jit(jax.vmap(everything)), jnp.stack([x, -x])),
        "scan of vmap": functools.partial(jax.jit(jax.vmap(scanned)), jnp.stack([x, -x])),
    }
    return alone | nested


def bytes_of(results):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(results)]


def main(threads, rounds):
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    calls = programs()
    text = calls["everything"].func.lower(*calls["everything"].args).as_text()
    missing = [target for target in _native.targets() if f"@{target}(" not in text]
    assert not missing, f"not called: {missing}"
    expected = {name: bytes_of(call()) for name, call in calls.items()}
    wrong, start = [], threading.Barrier(threads)

    def work(number):
        names = [*calls][number % len(calls) :] + [*calls][: number % len(calls)]
        start.wait()
        for turn in range(rounds):
            # All are started before one is waited for: more kernels at once than XLA has threads.
            results = {name: calls[name]() for name in names}
            wrong.extend((number, turn, name) for name in names if bytes_of(results[name]) != expected[name])

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong, f"other bits than from one thread: {wrong[:9]}"
    print(f"{threads * rounds * len(calls)} calls agree")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
