"""A GPT in flax.linen: attention written out with einsum, one scanned and rematerialised block.

Run it with `python gpt_linen.py --steps 10`; sizes can also come from GPT_LAYERS, GPT_WIDTH, GPT_HEADS,
GPT_SEQUENCE, GPT_BATCH and GPT_DTYPE.
"""

import argparse
import functools
import os
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import stdlib_text
from flax.training import train_state

VOCABULARY = 256


class Attention(nn.Module):
    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        batch, sequence, width = x.shape
        size = width // self.heads
        qkv = nn.Dense(3 * width, dtype=self.dtype, name="qkv")(x)
        q, k, v = (part.reshape(batch, sequence, self.heads, size) for part in jnp.split(qkv, 3, axis=-1))
        scores = jnp.einsum("bthd,bshd->bhts", q, k).astype(jnp.float32) / size**0.5
        causal = jnp.tril(jnp.ones((sequence, sequence), dtype=bool))
        weights = jax.nn.softmax(jnp.where(causal, scores, -1e30), axis=-1).astype(self.dtype)
        out = jnp.einsum("bhts,bshd->bthd", weights, v)
        return nn.Dense(width, dtype=self.dtype, name="out")(out.reshape(batch, sequence, width))


class Block(nn.Module):
    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, _):
        width = x.shape[-1]
        x = x + Attention(self.heads, self.dtype)(nn.LayerNorm(dtype=self.dtype)(x))
        hidden = nn.gelu(nn.Dense(4 * width, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x)))
        return x + nn.Dense(width, dtype=self.dtype)(hidden), None


class GPT(nn.Module):
    layers: int
    width: int
    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCABULARY, self.width, dtype=self.dtype, name="tokens")
        positions = self.param("positions", nn.initializers.normal(0.02), (tokens.shape[1], self.width))
        x = embed(tokens) + positions.astype(self.dtype)
        stack = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.layers,
        )
        x, _ = stack(self.heads, self.dtype, name="blocks")(x, None)
        return embed.attend(nn.LayerNorm(dtype=self.dtype)(x))


@functools.partial(jax.jit, donate_argnums=0)
def train_step(state, batch):
    def loss_fn(params):
        logits = state.apply_fn({"params": params}, batch[:, :-1])
        log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
        return -jnp.take_along_axis(log_probabilities, batch[:, 1:, None], axis=-1).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


def parse_arguments(argv=None):
    def setting(name, default):
        return type(default)(os.environ.get(f"GPT_{name}", default))

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=setting("LAYERS", 4))
    parser.add_argument("--width", type=int, default=setting("WIDTH", 512))
    parser.add_argument("--heads", type=int, default=setting("HEADS", 8))
    parser.add_argument("--sequence", type=int, default=setting("SEQUENCE", 512))
    parser.add_argument("--batch", type=int, default=setting("BATCH", 2))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=setting("DTYPE", "float32"))
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def build(options):
    model = GPT(options.layers, options.width, options.heads, jnp.dtype(options.dtype))
    tokens = jnp.zeros((options.batch, options.sequence), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(options.seed), tokens)["params"]
    return train_state.TrainState.create(
        apply_fn=model.apply, params=params, tx=optax.adamw(options.learning_rate, weight_decay=0.1)
    )


def factory():
    """The train step and its arguments: the train state and one batch."""
    options = parse_arguments([])
    batch = next(stdlib_text.batches(stdlib_text.load(), options.batch, options.sequence, options.seed))
    return train_step, (build(options), jnp.asarray(batch))


def main():
    options = parse_arguments()
    state = build(options)
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    print(f"{count / 1e6:.1f} M parameters, sequence {options.sequence}, batch {options.batch}, {options.dtype}")
    batches = stdlib_text.batches(stdlib_text.load(), options.batch, options.sequence, options.seed)
    for step in range(options.steps):
        start = time.perf_counter()
        state, loss = train_step(state, jnp.asarray(next(batches)))
        loss = float(loss)
        print(f"step {step} loss {loss:.6f} ms {(time.perf_counter() - start) * 1e3:.1f}", flush=True)


if __name__ == "__main__":
    main()
