"""A ConvNeXt in flax.linen (depthwise 7x7 convolutions, layer norm, GELU), AdamW, on noisy gratings of ten classes.

Run it with `python convnext_linen.py --steps 10`; sizes can also come from CONVNEXT_BLOCKS, CONVNEXT_WIDTH,
CONVNEXT_IMAGE and CONVNEXT_BATCH.
"""

import argparse
import os
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training import train_state
from vit_linen import CLASSES, gratings


class Block(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(self.features, (7, 7), feature_group_count=self.features)(x)
        y = nn.LayerNorm(epsilon=1e-6)(y)
        y = nn.Dense(self.features)(nn.gelu(nn.Dense(4 * self.features)(y)))
        return x + self.param("scale", nn.initializers.constant(1e-2), (self.features,)) * y


class ConvNeXt(nn.Module):
    stages: tuple[int, ...]
    width: int

    @nn.compact
    def __call__(self, x):
        for stage, blocks in enumerate(self.stages):
            features, patch = self.width * 2**stage, 2 if stage else 4
            if stage:
                x = nn.LayerNorm(epsilon=1e-6)(x)
            x = nn.Conv(features, (patch, patch), (patch, patch))(x)
            if not stage:
                x = nn.LayerNorm(epsilon=1e-6)(x)
            for _ in range(blocks):
                x = Block(features)(x)
        return nn.Dense(CLASSES)(nn.LayerNorm(epsilon=1e-6)(jnp.mean(x, axis=(1, 2))))


@jax.jit
def train_step(state, images, labels):
    def loss_fn(params):
        logits = state.apply_fn({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


def parse_arguments(argv=None):
    def setting(name, default):
        return type(default)(os.environ.get(f"CONVNEXT_{name}", default))

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=setting("BLOCKS", 2))
    parser.add_argument("--width", type=int, default=setting("WIDTH", 64))
    parser.add_argument("--image", type=int, default=setting("IMAGE", 128))
    parser.add_argument("--batch", type=int, default=setting("BATCH", 8))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def build(options):
    model = ConvNeXt((options.blocks,) * 4, options.width)
    images = jnp.zeros((options.batch, options.image, options.image, 3))
    params = jax.jit(model.init)(jax.random.key(options.seed), images)["params"]
    return train_state.TrainState.create(apply_fn=model.apply, params=params, tx=optax.adamw(1e-3, weight_decay=0.05))


def factory():
    """The train step and its arguments: the train state, images and labels."""
    options = parse_arguments([])
    images, labels = next(gratings(options.batch, options.image, options.seed))
    return train_step, (build(options), jnp.asarray(images), jnp.asarray(labels))


def main():
    options = parse_arguments()
    state = build(options)
    pictures = gratings(options.batch, options.image, options.seed)
    for step in range(options.steps):
        images, labels = (jnp.asarray(x) for x in next(pictures))
        start = time.perf_counter()
        state, loss = train_step(state, images, labels)
        loss = float(loss)
        print(f"step {step} loss {loss:.6f} ms {(time.perf_counter() - start) * 1e3:.1f}", flush=True)


if __name__ == "__main__":
    main()
