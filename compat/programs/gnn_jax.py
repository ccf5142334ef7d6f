"""A message-passing graph network in plain JAX: messages of sums and maxima over random edges, layer norm, Adam.

Nodes lie in a square; an edge goes to a random one of the nearby nodes; a node's class is its quarter of the square.
Run it with `python gnn_jax.py --steps 10`; sizes can also come from GNN_NODES, GNN_EDGES, GNN_WIDTH and GNN_LAYERS.
"""

import argparse
import functools
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

CLASSES = 4


def layer_norm(x, scale, bias):
    mean = jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.var(x, axis=-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-6) * scale + bias


def forward(params, nodes, senders, receivers):
    x = nodes @ params["first"]
    count = x.shape[0]
    for layer in params["layers"]:
        pairs = jnp.concatenate([x[senders], x[receivers]], axis=-1)
        messages = jax.nn.relu(pairs @ layer["message"] + layer["message_bias"])
        sums = jax.ops.segment_sum(messages, receivers, count)
        largest = jax.ops.segment_max(messages, receivers, count)
        largest = jnp.where(jnp.isfinite(largest), largest, 0)
        update = jnp.concatenate([x, sums, largest], axis=-1) @ layer["update"]
        x = layer_norm(x + jax.nn.relu(update), layer["scale"], layer["bias"])
    return x @ params["last"]


def initialise(key, features, width, layers):
    keys = iter(jax.random.split(key, 2 + 2 * layers))

    def matrix(*shape):
        return jax.random.normal(next(keys), shape) * shape[0] ** -0.5

    blocks = [
        {
            "message": matrix(2 * width, width),
            "message_bias": jnp.zeros(width),
            "update": matrix(3 * width, width),
            "scale": jnp.ones(width),
            "bias": jnp.zeros(width),
        }
        for _ in range(layers)
    ]
    return {"first": matrix(features, width), "layers": blocks, "last": matrix(width, CLASSES)}


def make_train_step(optimizer):
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, opt_state, graph):
        def loss_fn(params):
            logits = forward(params, graph["nodes"], graph["senders"], graph["receivers"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, graph["classes"]).mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, loss

    return train_step


def make_graph(nodes, edges, features, seed):
    """Noisy features [nodes, features], senders and receivers [edges], classes [nodes]."""
    rng = np.random.default_rng(seed)
    places = rng.random((nodes, 2))
    places = places[np.argsort(places[:, 0])]
    receivers = rng.integers(0, nodes, edges)
    senders = np.clip(receivers + rng.integers(-50, 51, edges), 0, nodes - 1)
    signal = np.concatenate([places, 1 - places], axis=1) @ rng.normal(size=(4, features))
    return {
        "nodes": jnp.asarray(signal + rng.normal(size=(nodes, features)), jnp.float32),
        "senders": jnp.asarray(senders, jnp.int32),
        "receivers": jnp.asarray(receivers, jnp.int32),
        "classes": jnp.asarray((places[:, 0] > 0.5) * 2 + (places[:, 1] > 0.5), jnp.int32),
    }


def parse_arguments(argv=None):
    def setting(name, default):
        return type(default)(os.environ.get(f"GNN_{name}", default))

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=setting("NODES", 10_000))
    parser.add_argument("--edges", type=int, default=setting("EDGES", 100_000))
    parser.add_argument("--width", type=int, default=setting("WIDTH", 64))
    parser.add_argument("--layers", type=int, default=setting("LAYERS", 3))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def build(options):
    optimizer = optax.adam(1e-3)
    params = initialise(jax.random.key(options.seed), 16, options.width, options.layers)
    graph = make_graph(options.nodes, options.edges, 16, options.seed)
    return make_train_step(optimizer), params, optimizer.init(params), graph


def factory():
    """The train step and its arguments: parameters, optimizer state and the graph."""
    step, *args = build(parse_arguments([]))
    return step, tuple(args)


def main():
    options = parse_arguments()
    train_step, params, opt_state, graph = build(options)
    for step in range(options.steps):
        start = time.perf_counter()
        params, opt_state, loss = train_step(params, opt_state, graph)
        loss = float(loss)
        print(f"step {step} loss {loss:.6f} ms {(time.perf_counter() - start) * 1e3:.1f}", flush=True)


if __name__ == "__main__":
    main()
