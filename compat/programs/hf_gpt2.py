"""Hugging Face's Flax GPT-2, unmodified, trained from random weights on the bytes of Python's standard library.

Needs `pip install "transformers==4.49.*"` (later versions have no Flax models). Run it with
`python hf_gpt2.py --steps 10`; sizes can also come from GPT2_LAYERS, GPT2_WIDTH, GPT2_HEADS, GPT2_SEQUENCE,
GPT2_BATCH and GPT2_DTYPE.
"""

import argparse
import functools
import os
import time

import jax
import jax.numpy as jnp
import optax
import stdlib_text
from flax.training import train_state

VOCABULARY = 256


def make_model(options):
    try:
        from transformers import FlaxGPT2LMHeadModel, GPT2Config
    except ImportError as error:
        raise SystemExit(
            'hf_gpt2.py needs the Flax models of transformers 4.49: pip install "transformers==4.49.*"'
        ) from error
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=options.sequence,
        n_embd=options.width,
        n_layer=options.layers,
        n_head=options.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return FlaxGPT2LMHeadModel(config, input_shape=(1, 8), seed=options.seed, dtype=jnp.dtype(options.dtype))


@functools.partial(jax.jit, donate_argnums=0)
def train_step(state, batch):
    def loss_fn(params):
        logits = state.apply_fn(input_ids=batch[:, :-1], params=params, train=True).logits
        labels = batch[:, 1:]
        return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


def parse_arguments(argv=None):
    def setting(name, default):
        return type(default)(os.environ.get(f"GPT2_{name}", default))

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
    model = make_model(options)
    return train_state.TrainState.create(
        apply_fn=model.__call__, params=model.params, tx=optax.adamw(options.learning_rate, weight_decay=0.1)
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
