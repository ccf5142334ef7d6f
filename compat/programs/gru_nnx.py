"""A GRU language model in flax.nnx over bytes.

Run it with `python gru_nnx.py --steps 10`; sizes can also come from GRU_LAYERS, GRU_WIDTH, GRU_SEQUENCE and
GRU_BATCH.
"""

import argparse
import os
import time

import jax.numpy as jnp
import optax
import stdlib_text
from flax import nnx

VOCABULARY = 256


class LanguageModel(nnx.Module):
    def __init__(self, layers, width, rngs):
        self.embed = nnx.Embed(VOCABULARY, width, rngs=rngs)
        self.layers = nnx.List([nnx.RNN(nnx.GRUCell(width, width, rngs=rngs)) for _ in range(layers)])
        self.head = nnx.Linear(width, VOCABULARY, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@nnx.jit
def train_step(model, optimizer, batch):
    def loss_fn(model):
        logits = model(batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss


def parse_arguments(argv=None):
    def setting(name, default):
        return type(default)(os.environ.get(f"GRU_{name}", default))

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=setting("LAYERS", 2))
    parser.add_argument("--width", type=int, default=setting("WIDTH", 256))
    parser.add_argument("--sequence", type=int, default=setting("SEQUENCE", 64))
    parser.add_argument("--batch", type=int, default=setting("BATCH", 16))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def build(options):
    model = LanguageModel(options.layers, options.width, nnx.Rngs(options.seed))
    return model, nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)


def factory():
    """The train step and its arguments: the model, the optimizer and one batch."""
    options = parse_arguments([])
    batch = next(stdlib_text.batches(stdlib_text.load(), options.batch, options.sequence, options.seed))
    return train_step, (*build(options), jnp.asarray(batch))


def main():
    options = parse_arguments()
    model, optimizer = build(options)
    batches = stdlib_text.batches(stdlib_text.load(), options.batch, options.sequence, options.seed)
    for step in range(options.steps):
        start = time.perf_counter()
        loss = float(train_step(model, optimizer, jnp.asarray(next(batches))))
        print(f"step {step} loss {loss:.6f} ms {(time.perf_counter() - start) * 1e3:.1f}", flush=True)


if __name__ == "__main__":
    main()
