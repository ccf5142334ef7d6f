"""The lifted transformations of flax.linen and flax.nnx over blocks with attention and norms."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from fidelity_program import assert_close, kernels_in
from flax import nnx

X = jax.random.normal(jax.random.key(1), (2, 128, 64))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        normed = nn.LayerNorm()(x)
        return x + nn.MultiHeadDotProductAttention(4)(normed, normed), None


def linen_model(transform):
    if transform == "scan":
        scanned = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return scanned()
    if transform == "remat scan":
        return nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)()
    return {"jit": nn.jit, "remat": nn.remat}[transform](Block)()


@pytest.mark.parametrize("transform", ["jit", "remat", "scan", "remat scan"])
def test_linen_transformations(sides, transform):
    model = linen_model(transform)
    with sides["stock"]():
        variables = jax.jit(model.init)(jax.random.key(0), X)

    @jax.jit
    def gradients(variables, x):
        return jax.value_and_grad(lambda v: jnp.mean(jnp.square(model.apply(v, x)[0])))(variables)

    with sides["stock"]():
        expected = gradients(variables, X)
    found = kernels_in(gradients.lower(variables, X))
    assert found["jaxext_attention_backward"] and found["jaxext_layer_norm_backward"]
    assert_close(gradients(variables, X), expected)


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(64, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 64, decode=False, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        self.calls[...] += 1
        return x + self.attention(self.norm(x))


def plain(block, x):
    return block(x)


def rematerialised(block, x):
    return nnx.remat(plain)(block, x)


def scanned(block, x):
    @nnx.scan(length=2, in_axes=(nnx.StateAxes({...: None}), nnx.Carry), out_axes=nnx.Carry)
    def run(block, x):
        return x + block.attention(block.norm(x))

    block.calls[...] += 1
    return run(block, x)


@pytest.mark.parametrize("forward", [plain, rematerialised, scanned], ids=lambda f: f.__name__)
def test_nnx_transformations_compute_and_update_as_in_stock(sides, forward):
    def stepped(block, x):
        return nnx.value_and_grad(lambda block: jnp.mean(jnp.square(forward(block, x))))(block)

    results = {}
    for name, side in sides.items():
        with side():
            block = NnxBlock(nnx.Rngs(0))
            value, gradients = nnx.jit(stepped)(block, X)
            results[name] = value, nnx.to_pure_dict(gradients), nnx.to_pure_dict(nnx.state(block))
    assert_close(results["jaxext"], results["stock"])
    assert results["stock"][2]["calls"] == 1
    lowered = nnx.jit(stepped).lower(NnxBlock(nnx.Rngs(0)), X)
    assert kernels_in(lowered.lowered if hasattr(lowered, "lowered") else lowered)["jaxext_attention_backward"]
