"""A BERT-like masked language model in flax.linen: padded rows, dropout, tied embeddings, clipped AdamW on a schedule.

Run it with `python bert_linen.py --steps 10`; sizes can also come from BERT_LAYERS, BERT_WIDTH, BERT_HEADS,
BERT_SEQUENCE and BERT_BATCH.
"""

import argparse
import os
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import stdlib_text
from flax.training import train_state

MASK, VOCABULARY = 256, 257


class TrainState(train_state.TrainState):
    key: jax.Array


class Block(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x, mask, deterministic):
        width = x.shape[-1]
        attended = nn.MultiHeadDotProductAttention(self.heads, dropout_rate=0.1)(
            x, x, mask=mask, deterministic=deterministic
        )
        x = nn.LayerNorm()(x + nn.Dropout(0.1)(attended, deterministic))
        hidden = nn.Dense(width)(nn.gelu(nn.Dense(4 * width)(x), approximate=False))
        return nn.LayerNorm()(x + nn.Dropout(0.1)(hidden, deterministic))


class BERT(nn.Module):
    layers: int
    width: int
    heads: int

    @nn.compact
    def __call__(self, tokens, padding, deterministic=False):
        embed = nn.Embed(VOCABULARY, self.width)
        positions = nn.Embed(tokens.shape[1], self.width)(jnp.arange(tokens.shape[1]))
        x = nn.Dropout(0.1)(nn.LayerNorm()(embed(tokens) + positions), deterministic)
        mask = nn.make_attention_mask(padding, padding)
        for _ in range(self.layers):
            x = Block(self.heads)(x, mask, deterministic)
        x = nn.LayerNorm()(nn.gelu(nn.Dense(self.width)(x), approximate=False))
        return embed.attend(x) + self.param("bias", nn.initializers.zeros, (VOCABULARY,))


@jax.jit
def train_step(state, tokens, lengths):
    masking, dropout = jax.random.split(jax.random.fold_in(state.key, state.step))
    padding = jnp.arange(tokens.shape[1]) < lengths[:, None]
    masked = jax.random.bernoulli(masking, 0.15, tokens.shape) & padding

    def loss_fn(params):
        seen = jnp.where(masked, MASK, tokens)
        logits = state.apply_fn({"params": params}, seen, padding, rngs={"dropout": dropout})
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
        return jnp.sum(losses * masked) / jnp.maximum(jnp.sum(masked), 1)

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


def batches(options):
    """Yield (tokens [batch, sequence] int32, lengths [batch] int32) without end."""
    rng = np.random.default_rng(options.seed)
    for batch in stdlib_text.batches(stdlib_text.load(), options.batch, options.sequence, options.seed):
        yield batch[:, :-1], rng.integers(options.sequence // 2, options.sequence + 1, options.batch).astype(np.int32)


def parse_arguments(argv=None):
    def setting(name, default):
        return type(default)(os.environ.get(f"BERT_{name}", default))

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=setting("LAYERS", 4))
    parser.add_argument("--width", type=int, default=setting("WIDTH", 256))
    parser.add_argument("--heads", type=int, default=setting("HEADS", 4))
    parser.add_argument("--sequence", type=int, default=setting("SEQUENCE", 256))
    parser.add_argument("--batch", type=int, default=setting("BATCH", 4))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def build(options):
    model = BERT(options.layers, options.width, options.heads)
    tokens = jnp.zeros((1, options.sequence), jnp.int32)
    key, initial = jax.random.split(jax.random.key(options.seed))
    params = jax.jit(lambda k: model.init(k, tokens, tokens == 0, deterministic=True))(initial)["params"]
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-4, 100, 10_000)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))
    return TrainState.create(apply_fn=model.apply, params=params, tx=tx, key=key)


def factory():
    """The train step and its arguments: the train state, tokens and row lengths."""
    options = parse_arguments([])
    tokens, lengths = next(batches(options))
    return train_step, (build(options), jnp.asarray(tokens), jnp.asarray(lengths))


def main():
    options = parse_arguments()
    state = build(options)
    for step, (tokens, lengths) in zip(range(options.steps), batches(options)):
        start = time.perf_counter()
        state, loss = train_step(state, jnp.asarray(tokens), jnp.asarray(lengths))
        loss = float(loss)
        print(f"step {step} loss {loss:.6f} ms {(time.perf_counter() - start) * 1e3:.1f}", flush=True)


if __name__ == "__main__":
    main()
