"""A denoising diffusion model (DDPM) in flax.nnx: a U-Net with group norm, transposed convolutions and attention.

The step draws times and noise itself and keeps an average of the parameters. Pictures are noisy gratings. Run it with
`python unet_diffusion.py --steps 10`; sizes can also come from UNET_WIDTH, UNET_IMAGE and UNET_BATCH.
"""

import argparse
import os
import time

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from vit_linen import gratings

TIMES = 1000


class Block(nnx.Module):
    def __init__(self, before, after, embedding, rngs):
        self.norm1 = nnx.GroupNorm(before, num_groups=8, rngs=rngs)
        self.conv1 = nnx.Conv(before, after, (3, 3), rngs=rngs)
        self.time = nnx.Linear(embedding, after, rngs=rngs)
        self.norm2 = nnx.GroupNorm(after, num_groups=8, rngs=rngs)
        self.conv2 = nnx.Conv(after, after, (3, 3), rngs=rngs)
        self.skip = nnx.Linear(before, after, rngs=rngs)

    def __call__(self, x, embedding):
        y = self.conv1(nnx.silu(self.norm1(x))) + self.time(embedding)[:, None, None, :]
        return self.skip(x) + self.conv2(nnx.silu(self.norm2(y)))


class UNet(nnx.Module):
    def __init__(self, width, rngs):
        embedding = 4 * width
        self.width = width
        self.time1 = nnx.Linear(width, embedding, rngs=rngs)
        self.time2 = nnx.Linear(embedding, embedding, rngs=rngs)
        self.first = nnx.Conv(3, width, (3, 3), rngs=rngs)
        self.down1 = Block(width, width, embedding, rngs)
        self.shrink1 = nnx.Conv(width, width, (3, 3), strides=(2, 2), rngs=rngs)
        self.down2 = Block(width, 2 * width, embedding, rngs)
        self.shrink2 = nnx.Conv(2 * width, 2 * width, (3, 3), strides=(2, 2), rngs=rngs)
        self.middle = Block(2 * width, 2 * width, embedding, rngs)
        self.norm = nnx.GroupNorm(2 * width, num_groups=8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 2 * width, decode=False, rngs=rngs)
        self.grow2 = nnx.ConvTranspose(2 * width, 2 * width, (4, 4), strides=(2, 2), rngs=rngs)
        self.up2 = Block(4 * width, width, embedding, rngs)
        self.grow1 = nnx.ConvTranspose(width, width, (4, 4), strides=(2, 2), rngs=rngs)
        self.up1 = Block(2 * width, width, embedding, rngs)
        self.last = nnx.Conv(width, 3, (3, 3), rngs=rngs)

    def __call__(self, x, times):
        angles = times[:, None] * 10000.0 ** (-jnp.arange(self.width // 2) / (self.width // 2))
        embedding = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        embedding = nnx.silu(self.time2(nnx.silu(self.time1(embedding))))
        high = self.down1(self.first(x), embedding)
        low = self.down2(self.shrink1(high), embedding)
        x = self.middle(self.shrink2(low), embedding)
        batch, rows, columns, width = x.shape
        x = x + self.attention(self.norm(x).reshape(batch, rows * columns, width)).reshape(x.shape)
        x = self.up2(jnp.concatenate([self.grow2(x), low], axis=-1), embedding)
        x = self.up1(jnp.concatenate([self.grow1(x), high], axis=-1), embedding)
        return self.last(nnx.silu(x))


@nnx.jit
def train_step(model, optimizer, average, key, images):
    key, for_times, for_noise = jax.random.split(key, 3)
    times = jax.random.randint(for_times, images.shape[:1], 0, TIMES)
    noise = jax.random.normal(for_noise, images.shape)
    kept = jnp.cos(0.5 * jnp.pi * times / TIMES)[:, None, None, None]
    noisy = kept * images + jnp.sqrt(1 - kept**2) * noise

    def loss_fn(model):
        return jnp.mean((model(noisy, times) - noise) ** 2)

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    average = optax.incremental_update(nnx.state(model, nnx.Param), average, 0.001)
    return average, key, loss


def parse_arguments(argv=None):
    def setting(name, default):
        return type(default)(os.environ.get(f"UNET_{name}", default))

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=setting("WIDTH", 64))
    parser.add_argument("--image", type=int, default=setting("IMAGE", 32))
    parser.add_argument("--batch", type=int, default=setting("BATCH", 8))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def build(options):
    """The model, its optimizer, the average of its parameters, and the key of times and noise."""
    model = UNet(options.width, nnx.Rngs(options.seed))
    optimizer = nnx.Optimizer(model, optax.adamw(2e-4), wrt=nnx.Param)
    average = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    return model, optimizer, average, jax.random.key(options.seed)


def factory():
    """The train step and its arguments: model, optimizer, average, key, images. Average and key come back."""
    options = parse_arguments([])
    images, _ = next(gratings(options.batch, options.image, options.seed))
    model, optimizer, average, key = build(options)

    def advance(args, outputs):
        return (*args[:2], *outputs[:2], args[4])

    return train_step, (model, optimizer, average, key, jnp.asarray(images)), advance


def main():
    options = parse_arguments()
    model, optimizer, average, key = build(options)
    pictures = gratings(options.batch, options.image, options.seed)
    for step in range(options.steps):
        images = jnp.asarray(next(pictures)[0])
        start = time.perf_counter()
        average, key, loss = train_step(model, optimizer, average, key, images)
        loss = float(loss)
        print(f"step {step} loss {loss:.6f} ms {(time.perf_counter() - start) * 1e3:.1f}", flush=True)


if __name__ == "__main__":
    main()
