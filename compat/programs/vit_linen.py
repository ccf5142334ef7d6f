"""A Vision Transformer in flax.linen that learns to tell the orientation of noisy gratings (ten classes).

The pictures are made on the spot, so nothing is downloaded. Run it with `python vit_linen.py --steps 10`;
sizes can also come from VIT_LAYERS, VIT_WIDTH, VIT_HEADS, VIT_IMAGE, VIT_PATCH, VIT_BATCH and VIT_DTYPE.
"""

import argparse
import functools
import os
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state

CLASSES = 10


class Block(nn.Module):
    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        normed = nn.LayerNorm(dtype=self.dtype)(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, dtype=self.dtype)(normed, normed)
        hidden = nn.gelu(nn.Dense(4 * width, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x)))
        return x + nn.Dense(width, dtype=self.dtype)(hidden)


class ViT(nn.Module):
    layers: int
    width: int
    heads: int
    patch: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images):
        patch = (self.patch, self.patch)
        x = nn.Conv(self.width, patch, strides=patch, padding="VALID", dtype=self.dtype)(images)
        x = x.reshape(x.shape[0], -1, self.width)
        label = self.param("class_token", nn.initializers.zeros, (1, 1, self.width)).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(label, (x.shape[0], 1, self.width)), x], axis=1)
        x = x + self.param("positions", nn.initializers.normal(0.02), x.shape[1:]).astype(self.dtype)
        for _ in range(self.layers):
            x = Block(self.heads, self.dtype)(x)
        return nn.Dense(CLASSES, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x)[:, 0])


@functools.partial(jax.jit, donate_argnums=0)
def train_step(state, images, labels):
    def loss_fn(params):
        logits = state.apply_fn({"params": params}, images).astype(jnp.float32)
        targets = optax.smooth_labels(jax.nn.one_hot(labels, CLASSES), 0.1)
        return optax.softmax_cross_entropy(logits, targets).mean(), jnp.mean(logits.argmax(-1) == labels)

    (loss, accuracy), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads), {"accuracy": accuracy, "loss": loss}


def gratings(batch, size, seed):
    """Yield (images [batch, size, size, 3] float32, labels [batch] int32) without end."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:size, 0:size] / size
    while True:
        labels = rng.integers(0, CLASSES, size=batch)
        angle = (labels * np.pi / CLASSES)[:, None, None]
        phase = rng.uniform(0, 2 * np.pi, size=(batch, 1, 1))
        wave = np.sin(2 * np.pi * 6 * (np.cos(angle) * rows + np.sin(angle) * columns) + phase)
        images = wave[..., None] + rng.normal(0, 0.5, size=(batch, size, size, 3))
        yield images.astype(np.float32), labels.astype(np.int32)


def parse_arguments(argv=None):
    def setting(name, default):
        return type(default)(os.environ.get(f"VIT_{name}", default))

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=setting("LAYERS", 6))
    parser.add_argument("--width", type=int, default=setting("WIDTH", 384))
    parser.add_argument("--heads", type=int, default=setting("HEADS", 6))
    parser.add_argument("--image", type=int, default=setting("IMAGE", 224))
    parser.add_argument("--patch", type=int, default=setting("PATCH", 16))
    parser.add_argument("--batch", type=int, default=setting("BATCH", 4))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=setting("DTYPE", "float32"))
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def build(options):
    model = ViT(options.layers, options.width, options.heads, options.patch, jnp.dtype(options.dtype))
    images = jnp.zeros((options.batch, options.image, options.image, 3))
    params = jax.jit(model.init)(jax.random.key(options.seed), images)["params"]
    return train_state.TrainState.create(apply_fn=model.apply, params=params, tx=optax.adamw(options.learning_rate))


def factory():
    """The train step and its arguments: the train state, images and labels."""
    options = parse_arguments([])
    images, labels = next(gratings(options.batch, options.image, options.seed))
    return train_step, (build(options), jnp.asarray(images), jnp.asarray(labels))


def main():
    options = parse_arguments()
    state = build(options)
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    print(f"{count / 1e6:.1f} M parameters, image {options.image}, batch {options.batch}, {options.dtype}")
    pictures = gratings(options.batch, options.image, options.seed)
    for step in range(options.steps):
        start = time.perf_counter()
        images, labels = next(pictures)
        state, metrics = train_step(state, jnp.asarray(images), jnp.asarray(labels))
        loss = float(metrics["loss"])
        print(f"step {step} loss {loss:.6f} ms {(time.perf_counter() - start) * 1e3:.1f}", flush=True)


if __name__ == "__main__":
    main()
