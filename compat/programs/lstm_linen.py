"""A two-layer LSTM language model in flax.linen over bytes, with clipped Adam.

Run it with `python lstm_linen.py --steps 10`; sizes can also come from LSTM_LAYERS, LSTM_WIDTH, LSTM_SEQUENCE and
LSTM_BATCH.
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

VOCABULARY = 256


class LanguageModel(nn.Module):
    layers: int
    width: int

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCABULARY, self.width)(tokens)
        for _ in range(self.layers):
            x = nn.RNN(nn.OptimizedLSTMCell(self.width))(x)
        return nn.Dense(VOCABULARY)(x)


@jax.jit
def train_step(state, batch):
    def loss_fn(params):
        logits = state.apply_fn({"params": params}, batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


def parse_arguments(argv=None):
    def setting(name, default):
        return type(default)(os.environ.get(f"LSTM_{name}", default))

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=setting("LAYERS", 2))
    parser.add_argument("--width", type=int, default=setting("WIDTH", 256))
    parser.add_argument("--sequence", type=int, default=setting("SEQUENCE", 64))
    parser.add_argument("--batch", type=int, default=setting("BATCH", 16))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def build(options):
    model = LanguageModel(options.layers, options.width)
    tokens = jnp.zeros((options.batch, options.sequence), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(options.seed), tokens)["params"]
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    return train_state.TrainState.create(apply_fn=model.apply, params=params, tx=tx)


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
