"""A ResNet in flax.linen with batch normalisation, momentum SGD and weight decay, on noisy gratings of ten classes.

Run it with `python resnet_linen.py --steps 10`; sizes can also come from RESNET_BLOCKS, RESNET_WIDTH, RESNET_IMAGE
and RESNET_BATCH.
"""

import argparse
import functools
import os
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training import train_state
from vit_linen import CLASSES, gratings


class TrainState(train_state.TrainState):
    batch_stats: Any


class Block(nn.Module):
    features: int
    stride: int

    @nn.compact
    def __call__(self, x, train):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        strides = (self.stride, self.stride)
        y = nn.relu(norm()(nn.Conv(self.features, (3, 3), strides, use_bias=False)(x)))
        y = norm(scale_init=nn.initializers.zeros)(nn.Conv(self.features, (3, 3), use_bias=False)(y))
        if x.shape != y.shape:
            x = norm()(nn.Conv(self.features, (1, 1), strides, use_bias=False)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    stages: tuple[int, ...]
    width: int

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Conv(self.width, (7, 7), (2, 2), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for stage, blocks in enumerate(self.stages):
            for block in range(blocks):
                x = Block(self.width * 2**stage, 2 if stage and not block else 1)(x, train)
        return nn.Dense(CLASSES)(jnp.mean(x, axis=(1, 2)))


@jax.jit
def train_step(state, images, labels):
    def loss_fn(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updates = state.apply_fn(variables, images, mutable=["batch_stats"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, updates["batch_stats"]

    (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=batch_stats), loss


def parse_arguments(argv=None):
    def setting(name, default):
        return type(default)(os.environ.get(f"RESNET_{name}", default))

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=setting("BLOCKS", 2))
    parser.add_argument("--width", type=int, default=setting("WIDTH", 64))
    parser.add_argument("--image", type=int, default=setting("IMAGE", 64))
    parser.add_argument("--batch", type=int, default=setting("BATCH", 8))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def build(options):
    model = ResNet((options.blocks,) * 4, options.width)
    images = jnp.zeros((options.batch, options.image, options.image, 3))
    variables = jax.jit(model.init)(jax.random.key(options.seed), images)
    tx = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.05, momentum=0.9, nesterov=True))
    return TrainState.create(apply_fn=model.apply, tx=tx, **variables)


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
