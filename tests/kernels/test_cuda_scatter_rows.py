"""Rows added to by number on CUDA, without a card: the kernel on the host, and what is lowered for CUDA calls it."""

import ctypes

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulated import BF16, buffers, calls, filled, library, pretend_built

import jaxext
from jaxext.kernels import _indexed_rows_cuda, _native_module
from jaxext.kernels._indexed_rows import SCATTER
from jaxext.kernels._platform import assuming


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    return library("scatter_rows", tmp_path_factory.mktemp("emulated"))


def added(loaded, table, numbers, updates):
    order = np.argsort(numbers, kind="stable").astype(np.int32)
    ordered, out = numbers[order], table.copy()
    chunks = -(-numbers.size // loaded.chunk())
    data, _ = buffers([out, ordered, order, updates, filled((chunks, 2, table.shape[1]), np.float32)])
    loaded.run(data, *(ctypes.c_int64(n) for n in (*table.shape, numbers.size)))
    return out


# How often rows are named: the chunks of 32 begin and end anywhere among them.
NUMBERS = {
    "each once": lambda rng: rng.permutation(60),
    "some often": lambda rng: np.concatenate([np.full(70, 3), rng.integers(0, 60, 130)]),
    "one row": lambda rng: np.full(200, 7),
    "whole chunks": lambda rng: np.repeat(np.arange(6), 32),
    "one more than a chunk": lambda rng: np.repeat(np.arange(6), 33),
    "outside": lambda rng: rng.integers(-40, 100, 300),
    "one update": lambda rng: np.array([5]),
}


@pytest.mark.parametrize("width", [8, 40, 37, 2056])
@pytest.mark.parametrize("name", NUMBERS)
def test_rows_are_added_up_in_float32_and_rounded_once(emulated, name, width):
    rng = np.random.default_rng(0)
    numbers = NUMBERS[name](rng).astype(np.int32)
    table = rng.standard_normal((60, width)).astype(BF16)
    updates = rng.standard_normal((numbers.size, width)).astype(BF16)
    found = added(emulated, table, numbers, updates)
    exact = table.astype(np.float64)
    known = (numbers >= 0) & (numbers < 60)
    np.add.at(exact, numbers[known], updates[known].astype(np.float64))
    magnitude = np.abs(table).astype(np.float64)
    np.add.at(magnitude, numbers[known], np.abs(updates[known]).astype(np.float64))
    # Half a unit of bfloat16's last place, and float32's rounding of each addition.
    bound = np.abs(exact) * 2.0**-8 + magnitude * numbers.size * 2.0**-24
    assert (np.abs(found.astype(np.float64) - exact) <= bound).all()


def test_what_bfloat16_would_lose_is_kept(emulated):
    numbers, ones = np.zeros(4096, np.int32), np.ones((4096, 8), BF16)
    found = added(emulated, np.zeros((4, 8), BF16), numbers, ones)
    assert (found[0].astype(np.float32) == 4096).all()
    one_by_one = np.zeros(8, BF16)
    for row in ones:
        one_by_one = (one_by_one + row).astype(BF16)
    assert (one_by_one.astype(np.float32) == 256).all()


def test_chunks_are_those_that_python_makes_room_for(emulated):
    assert emulated.chunk() == _indexed_rows_cuda.CHUNK


# ---------------------------------------------------------------- what is lowered


@pytest.fixture
def built(monkeypatch):
    pretend_built(monkeypatch, "jaxext_scatter_rows")


def loss(table, tokens):
    return jnp.tanh(table[tokens]).sum()


def step(dtype="bfloat16", tokens=(4, 512), width=1024):
    return jax.grad(loss), jax.ShapeDtypeStruct((3000, width), dtype), jax.ShapeDtypeStruct(tokens, "int32")


def lowered(fn, *operands):
    with assuming("cuda"):
        return calls(jaxext.accelerate(fn), *operands)


def test_the_gradient_of_an_embedding_calls_the_kernel(built):
    names, text = lowered(*step())
    assert names == ["jaxext_scatter_rows"]
    assert "tensor<64x2x1024xf32>" in text  # the scratch of rows that chunks share
    fn, *operands = step()
    assert "scatter" in jaxext.explain(fn, platform="cuda")(*operands).kernels()


@pytest.mark.parametrize("other", [{"dtype": "float32"}, {"width": 64}], ids=str)
def test_other_sums_stay_with_xla(built, other):
    assert lowered(*step(**other))[0] == []


def test_each_refusal_says_why(built):
    table, indices, updates = (
        jax.ShapeDtypeStruct(*one)
        for one in (((3000, 1024), "bfloat16"), ((2048, 1), "int32"), ((2048, 1024), "bfloat16"))
    )
    with assuming("cuda"):
        assert SCATTER.refusal(table, indices, updates, kind="add", clips=False) is None
        assert SCATTER.refusal(table, indices, updates, kind="max", clips=False) == (
            "max of bfloat16 rows; the kernel adds bfloat16, XLA's own does the others as well"
        )
        few = jax.ShapeDtypeStruct((4, 1), "int32"), jax.ShapeDtypeStruct((4, 1024), "bfloat16")
        assert SCATTER.refusal(table, *few, kind="add", clips=False) == (
            "4096 elements are fewer than 1048576; XLA's own is as fast"
        )


def test_a_build_without_cuda_leaves_the_program_alone(monkeypatch):
    monkeypatch.setattr(_native_module, "load_cuda", lambda: (None, "not here"))
    fn, *operands = step()
    assert not jaxext.explain(fn, platform="cuda")(*operands).replaced
    assert lowered(fn, *operands)[0] == []
