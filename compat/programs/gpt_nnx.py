"""A GPT of real size in plain flax.nnx and optax, trained on the bytes of Python's standard library.

Run it with `python gpt_nnx.py --steps 10`. Every size can be given as an option or as an environment
variable (GPT_LAYERS, GPT_WIDTH, GPT_HEADS, GPT_SEQUENCE, GPT_BATCH, GPT_DTYPE).
"""

import argparse
import os
import time

import jax
import jax.numpy as jnp
import optax
import stdlib_text
from flax import nnx

VOCABULARY = 256


class Block(nnx.Module):
    def __init__(self, width, heads, dtype, rngs):
        self.norm1 = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, dtype=dtype, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class GPT(nnx.Module):
    def __init__(self, layers, width, heads, sequence, dtype, rngs):
        self.tokens = nnx.Embed(VOCABULARY, width, dtype=dtype, rngs=rngs)
        self.positions = nnx.Embed(sequence, width, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, dtype, rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(width, VOCABULARY, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, tokens):
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        mask = nnx.make_causal_mask(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


@nnx.jit
def train_step(model, optimizer, batch):
    def loss_fn(model):
        logits = model(batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), batch[:, 1:]).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss


def parse_arguments(argv=None):
    def setting(name, default):
        return type(default)(os.environ.get(f"GPT_{name}", default))

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=setting("LAYERS", 6))
    parser.add_argument("--width", type=int, default=setting("WIDTH", 768))
    parser.add_argument("--heads", type=int, default=setting("HEADS", 12))
    parser.add_argument("--sequence", type=int, default=setting("SEQUENCE", 1024))
    parser.add_argument("--batch", type=int, default=setting("BATCH", 1))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=setting("DTYPE", "float32"))
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def build(options):
    dtype = jnp.dtype(options.dtype)
    rngs = nnx.Rngs(options.seed)
    model = GPT(options.layers, options.width, options.heads, options.sequence, dtype, rngs)
    schedule = optax.warmup_constant_schedule(0.0, options.learning_rate, warmup_steps=10)
    transform = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.1))
    return model, nnx.Optimizer(model, transform, wrt=nnx.Param)


def factory():
    """The train step and its arguments: model, optimizer and one batch."""
    options = parse_arguments([])
    model, optimizer = build(options)
    batch = next(stdlib_text.batches(stdlib_text.load(), options.batch, options.sequence, options.seed))
    return train_step, (model, optimizer, jnp.asarray(batch))


def main():
    options = parse_arguments()
    model, optimizer = build(options)
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    print(f"{count / 1e6:.1f} M parameters, sequence {options.sequence}, batch {options.batch}, {options.dtype}")
    batches = stdlib_text.batches(stdlib_text.load(), options.batch, options.sequence, options.seed)
    for step in range(options.steps):
        start = time.perf_counter()
        loss = float(train_step(model, optimizer, jnp.asarray(next(batches))))
        print(f"step {step} loss {loss:.6f} ms {(time.perf_counter() - start) * 1e3:.1f}", flush=True)


if __name__ == "__main__":
    main()
