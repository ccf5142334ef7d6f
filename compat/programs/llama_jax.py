"""A Llama-style language model in plain JAX: RMSNorm, rotary positions, SwiGLU, grouped-query attention, bf16.

Parameters are a dictionary of float32 arrays; the forward pass computes in bfloat16. Run it with
`python llama_jax.py --steps 10`; sizes can also come from LLAMA_LAYERS, LLAMA_WIDTH, LLAMA_HEADS,
LLAMA_KV_HEADS, LLAMA_SEQUENCE, LLAMA_BATCH and LLAMA_DTYPE.
"""

import argparse
import functools
import os
import time

import jax
import jax.numpy as jnp
import optax
import stdlib_text

VOCABULARY = 256


def rms_norm(x, scale):
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + 1e-5)
    return (normed * scale).astype(x.dtype)


def rotate(x):
    """Rotary position embedding over [batch, sequence, heads, size]."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] * 10000.0 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :]
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attention(x, layer, heads, kv_heads):
    batch, sequence, width = x.shape
    size = width // heads
    q = rotate((x @ layer["q"].astype(x.dtype)).reshape(batch, sequence, heads, size))
    k = rotate((x @ layer["k"].astype(x.dtype)).reshape(batch, sequence, kv_heads, size))
    v = (x @ layer["v"].astype(x.dtype)).reshape(batch, sequence, kv_heads, size)
    out = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    return out.reshape(batch, sequence, width) @ layer["o"].astype(x.dtype)


def swiglu(x, layer):
    gate = jax.nn.silu(x @ layer["gate"].astype(x.dtype))
    return (gate * (x @ layer["up"].astype(x.dtype))) @ layer["down"].astype(x.dtype)


def forward(params, tokens, heads, kv_heads, dtype):
    x = params["tokens"].astype(dtype)[tokens]
    for layer in params["layers"]:
        x = x + attention(rms_norm(x, layer["norm1"]), layer, heads, kv_heads)
        x = x + swiglu(rms_norm(x, layer["norm2"]), layer)
    return rms_norm(x, params["norm"]) @ params["head"].astype(dtype)


def initialise(key, layers, width, heads, kv_heads):
    hidden, kv_width = 8 * width // 3 // 64 * 64 or 64, width // heads * kv_heads
    shapes = {
        "q": (width, width),
        "k": (width, kv_width),
        "v": (width, kv_width),
        "o": (width, width),
        "gate": (width, hidden),
        "up": (width, hidden),
        "down": (hidden, width),
    }
    keys = iter(jax.random.split(key, layers * len(shapes) + 2))

    def matrix(shape):
        return jax.random.normal(next(keys), shape) * shape[0] ** -0.5

    blocks = [
        {name: matrix(shape) for name, shape in shapes.items()} | {"norm1": jnp.ones(width), "norm2": jnp.ones(width)}
        for _ in range(layers)
    ]
    return {
        "tokens": matrix((VOCABULARY, width)),
        "layers": blocks,
        "norm": jnp.ones(width),
        "head": matrix((width, VOCABULARY)),
    }


def make_train_step(options, optimizer):
    dtype = jnp.dtype(options.dtype)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, opt_state, batch):
        def loss_fn(params):
            logits = forward(params, batch[:, :-1], options.heads, options.kv_heads, dtype).astype(jnp.float32)
            picked = jnp.take_along_axis(logits, batch[:, 1:, None], axis=-1)[..., 0]
            return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return train_step


def parse_arguments(argv=None):
    def setting(name, default):
        return type(default)(os.environ.get(f"LLAMA_{name}", default))

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=setting("LAYERS", 4))
    parser.add_argument("--width", type=int, default=setting("WIDTH", 512))
    parser.add_argument("--heads", type=int, default=setting("HEADS", 8))
    parser.add_argument("--kv-heads", type=int, default=setting("KV_HEADS", 2))
    parser.add_argument("--sequence", type=int, default=setting("SEQUENCE", 1024))
    parser.add_argument("--batch", type=int, default=setting("BATCH", 1))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=setting("DTYPE", "bfloat16"))
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def build(options):
    """Return the train step, the parameters and the optimizer state."""
    optimizer = optax.adamw(options.learning_rate, b2=0.95, weight_decay=0.1)
    params = initialise(jax.random.key(options.seed), options.layers, options.width, options.heads, options.kv_heads)
    return make_train_step(options, optimizer), params, optimizer.init(params)


def factory():
    """The train step and its arguments: parameters, optimizer state and one batch."""
    options = parse_arguments([])
    step, params, opt_state = build(options)
    batch = next(stdlib_text.batches(stdlib_text.load(), options.batch, options.sequence, options.seed))
    return step, (params, opt_state, jnp.asarray(batch))


def main():
    options = parse_arguments()
    train_step, params, opt_state = build(options)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{count / 1e6:.1f} M parameters, sequence {options.sequence}, batch {options.batch}, {options.dtype}")
    batches = stdlib_text.batches(stdlib_text.load(), options.batch, options.sequence, options.seed)
    for step in range(options.steps):
        start = time.perf_counter()
        params, opt_state, loss = train_step(params, opt_state, jnp.asarray(next(batches)))
        loss = float(loss)
        print(f"step {step} loss {loss:.6f} ms {(time.perf_counter() - start) * 1e3:.1f}", flush=True)


if __name__ == "__main__":
    main()
