"""A mixture-of-experts language model in flax.linen: two of eight experts a token, by capacity, in bfloat16.

Tokens are sorted by expert, gathered, and scattered back (as in MegaBlocks and MaxText); a loss keeps the experts
balanced (Switch Transformer). Run it with `python moe_linen.py --steps 10`; sizes can also come from MOE_LAYERS,
MOE_WIDTH, MOE_HEADS, MOE_EXPERTS, MOE_SEQUENCE, MOE_BATCH and MOE_DTYPE.
"""

import argparse
import os
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import stdlib_text
from flax.training import train_state

VOCABULARY, CHOSEN = 256, 2


class Experts(nn.Module):
    experts: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        tokens, width = x.shape
        capacity = 5 * CHOSEN * tokens // (4 * self.experts)
        shares = jax.nn.softmax(nn.Dense(self.experts, use_bias=False)(x.astype(jnp.float32)))
        weights, chosen = jax.lax.top_k(shares, CHOSEN)
        weights = weights / weights.sum(-1, keepdims=True)
        # Places of the assignments, grouped by expert; those beyond an expert's capacity are dropped.
        order = jnp.argsort(chosen.reshape(-1))
        expert = chosen.reshape(-1)[order]
        place = jnp.arange(order.size) - jnp.searchsorted(expert, jnp.arange(self.experts))[expert]
        slot = jnp.where(place < capacity, expert * capacity + place, self.experts * capacity)
        inputs = jnp.zeros((self.experts * capacity + 1, width), x.dtype).at[slot].set(x[order // CHOSEN])
        inputs = inputs[:-1].reshape(self.experts, capacity, width)
        initial = nn.initializers.lecun_normal(batch_axis=0)
        up = self.param("up", initial, (self.experts, width, 4 * width)).astype(self.dtype)
        down = self.param("down", initial, (self.experts, 4 * width, width)).astype(self.dtype)
        outputs = jnp.einsum("ech,ehw->ecw", nn.gelu(jnp.einsum("ecw,ewh->ech", inputs, up)), down)
        outputs = jnp.concatenate([outputs.reshape(-1, width), jnp.zeros((1, width), x.dtype)])
        scaled = outputs[slot] * weights.reshape(-1)[order][:, None].astype(x.dtype)
        mixed = jnp.zeros_like(x).at[order // CHOSEN].add(scaled)
        used = jnp.mean(jax.nn.one_hot(chosen[:, 0], self.experts), axis=0)
        return mixed, self.experts * jnp.sum(used * shares.mean(0))


class MoE(nn.Module):
    layers: int
    width: int
    heads: int
    experts: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCABULARY, self.width, dtype=self.dtype)(tokens)
        x = x + nn.Embed(tokens.shape[1], self.width, dtype=self.dtype)(jnp.arange(tokens.shape[1]))
        balance = 0.0
        for _ in range(self.layers):
            normed = nn.RMSNorm(dtype=self.dtype)(x)
            x = x + nn.MultiHeadDotProductAttention(self.heads, dtype=self.dtype)(
                normed, normed, mask=nn.make_causal_mask(tokens)
            )
            mixed, loss = Experts(self.experts, self.dtype)(nn.RMSNorm(dtype=self.dtype)(x).reshape(-1, self.width))
            x, balance = x + mixed.reshape(x.shape), balance + loss
        logits = nn.Dense(VOCABULARY, dtype=self.dtype)(nn.RMSNorm(dtype=self.dtype)(x))
        return logits.astype(jnp.float32), balance / self.layers


@jax.jit
def train_step(state, batch):
    def loss_fn(params):
        logits, balance = state.apply_fn({"params": params}, batch[:, :-1])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()
        return loss + 0.01 * balance, loss

    (_, loss), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads), loss


def parse_arguments(argv=None):
    def setting(name, default):
        return type(default)(os.environ.get(f"MOE_{name}", default))

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=setting("LAYERS", 2))
    parser.add_argument("--width", type=int, default=setting("WIDTH", 256))
    parser.add_argument("--heads", type=int, default=setting("HEADS", 4))
    parser.add_argument("--experts", type=int, default=setting("EXPERTS", 8))
    parser.add_argument("--sequence", type=int, default=setting("SEQUENCE", 512))
    parser.add_argument("--batch", type=int, default=setting("BATCH", 2))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=setting("DTYPE", "bfloat16"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def build(options):
    model = MoE(options.layers, options.width, options.heads, options.experts, jnp.dtype(options.dtype))
    tokens = jnp.zeros((options.batch, options.sequence), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(options.seed), tokens)["params"]
    return train_state.TrainState.create(apply_fn=model.apply, params=params, tx=optax.adamw(3e-4))


def factory():
    """The train step and its arguments: the train state and one batch."""
    options = parse_arguments([])
    batch = next(stdlib_text.batches(stdlib_text.load(), options.batch, options.sequence, options.seed))
    return train_step, (build(options), jnp.asarray(batch))


def main():
    options = parse_arguments()
    state = build(options)
    batches = stdlib_text.batches(stdlib_text.load(), options.batch, options.sequence, options.seed)
    for step in range(options.steps):
        start = time.perf_counter()
        state, loss = train_step(state, jnp.asarray(next(batches)))
        loss = float(loss)
        print(f"step {step} loss {loss:.6f} ms {(time.perf_counter() - start) * 1e3:.1f}", flush=True)


if __name__ == "__main__":
    main()
