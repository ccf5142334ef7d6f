"""Small train steps in plain JAX, linen, nnx, Haiku and Equinox, none of which knows of pipelines."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState

BATCH, LENGTH, WIDTH, VOCABULARY = 16, 8, 32, 64


@dataclasses.dataclass(frozen=True)
class Program:
    """`make()` gives a step and its arguments, of which the first `state` come back first. `options` of pipeline()."""

    name: str
    make: Callable[[], tuple[Callable[..., Any], tuple[Any, ...], int]]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


PROGRAMS: list[Program] = []


def program(make=None, **options):
    if make is None:
        return functools.partial(program, **options)
    PROGRAMS.append(Program(make.__name__, make, options))
    return make


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def tokens(seed=0, length=LENGTH):
    return jnp.asarray(np.random.default_rng(seed).integers(0, VOCABULARY, (BATCH, length)), jnp.int32)


def dense(seed, *shape, dtype=jnp.float32):
    return normal(seed, *shape, dtype=dtype) / shape[-2] ** 0.5


def picked(logits, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32)), labels[..., None], axis=-1)[..., 0]


def update(optimizer, gradients, state, params):
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state


# ---------------------------------------------------------------- plain JAX


@program
def multilayer_perceptron():
    """Clipping by global norm, an L2 term, aux outputs of each kind, examples picked by number."""
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-3))

    def loss_fn(params, x, labels):
        for w, b in params["hidden"]:
            x = jax.nn.relu(x @ w + b)
        logits = x @ params["out"]
        nll = -jax.nn.log_softmax(logits)[jnp.arange(x.shape[0]), labels]
        decay = 1e-3 * jnp.sum(params["out"] ** 2)
        accuracy = jnp.mean(jnp.argmax(logits, -1) == labels)
        return nll.mean() + decay, {
            "accuracy": accuracy,
            "nll": nll,
            "perplexity": jnp.exp(nll.mean()),
            "n": labels.max(),
        }

    def step(params, state, x, labels):
        (loss, aux), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params, x, labels)
        return *update(optimizer, gradients, state, params), loss, aux

    hidden = [(dense(n, WIDTH, WIDTH), normal(n + 10, WIDTH)) for n in range(8)]
    params = {"hidden": hidden, "out": dense(20, WIDTH, 10)}
    labels = jnp.asarray(np.random.default_rng(1).integers(0, 10, BATCH))
    return step, (params, optimizer.init(params), normal(30, BATCH, WIDTH), labels), 2


def attention(x, w):
    q, k, v = jnp.split(x @ w["qkv"], 3, -1)
    q, k, v = (y.reshape(*y.shape[:2], 4, -1) for y in (q, k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -1e9)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores.astype(jnp.float32)).astype(x.dtype), v)
    return mixed.reshape(x.shape) @ w["out"]


def layer(x, w):
    def norm(y):
        y = y.astype(jnp.float32)
        return ((y - y.mean(-1, keepdims=True)) * jax.lax.rsqrt(y.var(-1, keepdims=True) + 1e-5)).astype(x.dtype)

    x = x + attention(norm(x), w)
    return x + jax.nn.gelu(norm(x) @ w["up"]) @ w["down"]


def layer_weights(seed, *stack, dtype=jnp.float32):
    shapes = {"qkv": (WIDTH, 3 * WIDTH), "out": (WIDTH, WIDTH), "up": (WIDTH, 4 * WIDTH), "down": (4 * WIDTH, WIDTH)}
    return {name: dense(seed + n, *stack, *shape, dtype=dtype) for n, (name, shape) in enumerate(shapes.items())}


def _scanned(dtype, remat):
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-3, 4, 100), weight_decay=0.1)
    body = jax.checkpoint(layer) if remat else layer

    def loss_fn(params, batch):
        x = params["embedding"][batch[:, :-1]]
        x, _ = jax.lax.scan(lambda x, w: (body(x, w), None), x, params["layers"])
        return picked(x @ params["head"], batch[:, 1:]).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch):
        loss, gradients = jax.value_and_grad(loss_fn)(params, batch)
        return *update(optimizer, gradients, state, params), loss

    params = {
        "embedding": normal(1, VOCABULARY, WIDTH, dtype=dtype),
        "layers": layer_weights(2, 8, dtype=dtype),
        "head": dense(9, WIDTH, VOCABULARY, dtype=dtype),
    }
    return step, (params, optimizer.init(params), tokens(length=LENGTH + 1)), 2


@program
def scan_over_layers():
    return _scanned(jnp.float32, remat=False)


@program
def scan_over_layers_remat_bf16():
    return _scanned(jnp.bfloat16, remat=True)


@program
def tied_embedding_masked_mean():
    """One table in and out, a loss averaged over the tokens that count, decay of matrices only, MultiSteps."""
    decayed = optax.masked(optax.add_decayed_weights(0.1), lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree))
    optimizer = optax.MultiSteps(optax.chain(decayed, optax.sgd(1e-2, momentum=0.9)), every_k_schedule=2)

    def loss_fn(params, batch):
        mask = batch["mask"].astype(jnp.float32)
        x = params["table"][batch["inputs"]] * WIDTH**0.5 + params["scale"]
        for weights in params["layers"]:
            x = layer(x, weights)
        nll = picked(x @ params["table"].T, batch["targets"])
        return jnp.sum(nll * mask) / jnp.maximum(mask.sum(), 1), mask.sum()

    def step(params, state, batch):
        (loss, count), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params, batch)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss, count

    params = {
        "table": dense(1, VOCABULARY, WIDTH),
        "scale": normal(3, WIDTH),
        "layers": [layer_weights(10 * n) for n in range(1, 5)],
    }
    mask = np.random.default_rng(5).random((BATCH, LENGTH)) < 0.7
    batch = {"inputs": tokens(1), "targets": tokens(2), "mask": jnp.asarray(mask)}
    return step, (params, optimizer.init(params), batch), 2


@program
def encoder_decoder():
    """The encoder's result goes to every layer of the decoder."""
    optimizer = optax.lion(1e-4)

    def loss_fn(params, source, target):
        memory = params["source"][source]
        for weights in params["encoder"]:
            memory = layer(memory, weights)
        x = params["target"][target[:, :-1]]
        for weights in params["decoder"]:
            x = layer(x, weights)
            scores = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", x @ weights["cross"], memory) / WIDTH**0.5)
            x = x + jnp.einsum("bqk,bkd->bqd", scores, memory)
        return picked(x @ params["head"], target[:, 1:]).mean()

    def step(params, state, source, target):
        loss, gradients = jax.value_and_grad(loss_fn)(params, source, target)
        return *update(optimizer, gradients, state, params), loss

    decoder = [layer_weights(50 * n) | {"cross": dense(n, WIDTH, WIDTH)} for n in range(2, 5)]
    params = {
        "source": normal(1, VOCABULARY, WIDTH),
        "target": normal(2, VOCABULARY, WIDTH),
        "encoder": [layer_weights(40 + n) for n in range(3)],
        "decoder": decoder,
        "head": dense(3, WIDTH, VOCABULARY),
    }
    return step, (params, optimizer.init(params), tokens(3), tokens(4, LENGTH + 1)), 2


@program
def recurrent():
    """A scan over time with the examples in its carry, a frozen table, gradients by jax.grad alone."""
    optimizer = optax.rmsprop(1e-3)
    frozen = normal(7, VOCABULARY, WIDTH)

    def loss_fn(params, table, batch):
        x = table[batch]
        for weights in params:

            def cell(h, x_t, weights=weights):
                h = jnp.tanh(x_t @ weights["in"] + h @ weights["hidden"])
                return h, h

            _, x = jax.lax.scan(cell, jnp.zeros((x.shape[0], WIDTH)), x.swapaxes(0, 1))
            x = x.swapaxes(0, 1)
        return jnp.mean((x - 0.1) ** 2)

    def step(params, state, table, batch):
        gradients = jax.grad(loss_fn)(params, table, batch)
        return update(optimizer, gradients, state, params)

    params = [{"in": dense(n, WIDTH, WIDTH), "hidden": dense(n + 9, WIDTH, WIDTH)} for n in range(4)]
    return step, (params, optimizer.init(params), frozen, tokens(6)), 2


@program
def per_example_vmap():
    """A loss of one example under vmap, with a derivative written by hand."""
    optimizer = optax.adam(1e-3)

    @jax.custom_vjp
    def swish(x):
        return x * jax.nn.sigmoid(x)

    swish.defvjp(lambda x: (swish(x), x), lambda x, ct: (ct * (jax.nn.sigmoid(x) * (1 + x * (1 - jax.nn.sigmoid(x)))),))

    def loss_of_one(params, x, y):
        for w in params:
            x = swish(w @ x)
        return jnp.sum((x - y) ** 2)

    def step(params, state, x, y):
        def loss_fn(params):
            return jax.vmap(loss_of_one, in_axes=(None, 0, 0))(params, x, y).mean()

        loss, gradients = jax.value_and_grad(loss_fn)(params)
        return *update(optimizer, gradients, state, params), loss

    params = [dense(n, WIDTH, WIDTH) for n in range(8)]
    return step, (params, optimizer.init(params), normal(1, BATCH, WIDTH), normal(2, BATCH, WIDTH)), 2


# ---------------------------------------------------------------- flax


class Encoder(nn.Module):
    """Attention, dropout and layer norm of linen, rematerialised."""

    @nn.compact
    def __call__(self, ids, train):
        x = nn.Embed(VOCABULARY, WIDTH)(ids)
        for _ in range(4):
            y = nn.LayerNorm()(x)
            attend = nn.remat(nn.MultiHeadDotProductAttention)(num_heads=4, use_bias=False)
            x = x + nn.Dropout(0.2, deterministic=not train)(attend(y, y))
            x = x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x))))
        return nn.Dense(VOCABULARY)(x)


@program
def linen_dropout():
    model = Encoder()
    batch = tokens(8)
    variables = model.init(jax.random.key(0), batch, False)
    state = TrainState.create(apply_fn=model.apply, params=variables["params"], tx=optax.adamw(1e-3))

    def train_step(state, batch, key):
        dropout = jax.random.fold_in(key, state.step)

        def loss_fn(params):
            logits = state.apply_fn({"params": params}, batch, True, rngs={"dropout": dropout})
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch).mean()

        loss, gradients = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=gradients), loss

    return train_step, (state, batch, jax.random.key(3)), 1


class ConvNet(nn.Module):
    """A U-Net: convolutions down and up, with a skip over the middle."""

    @nn.compact
    def __call__(self, x):
        first = nn.relu(nn.Conv(8, (3, 3))(x))
        second = nn.relu(nn.Conv(16, (3, 3), strides=2)(first))
        middle = nn.relu(nn.Conv(16, (3, 3))(nn.GroupNorm(4)(second)))
        up = jax.image.resize(middle, (*first.shape[:3], 16), "nearest")
        x = jnp.concatenate([first, nn.Conv(8, (3, 3))(up)], -1)
        return nn.Conv(3, (3, 3))(nn.max_pool(x, (3, 3), padding="SAME"))


@program
def convolutions_with_skips():
    model = ConvNet()
    images = normal(3, BATCH, 8, 8, 3)
    params = model.init(jax.random.key(0), images)["params"]
    optimizer = optax.adam(1e-3)

    def step(params, state, images):
        def loss_fn(params):
            return jnp.mean((model.apply({"params": params}, images) - images) ** 2)

        loss, gradients = jax.value_and_grad(loss_fn)(params)
        return *update(optimizer, gradients, state, params), loss

    return step, (params, optimizer.init(params), images), 2


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        return x + self.dropout(self.down(nnx.silu(self.up(self.norm(x)))))


class Language(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(4)])
        self.head = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@program
def nnx_dropout():
    model = Language(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)), wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer, batch):
        def loss_fn(model):
            logits = model(batch[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

        loss, gradients = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, gradients)
        return loss

    return train_step, (model, optimizer, tokens(9, LENGTH + 1)), 0


# ---------------------------------------------------------------- Haiku


def transformer_of_haiku(ids):
    x = hk.Embed(VOCABULARY, WIDTH)(ids)
    causal = np.tril(np.ones((1, 1, LENGTH, LENGTH), bool))
    for _ in range(3):
        y = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
        # A bias of the keys would have no gradient but rounding, which Adam blows up.
        attend = hk.MultiHeadAttention(4, WIDTH // 4, w_init=hk.initializers.VarianceScaling(), with_bias=False)
        x = x + hk.dropout(hk.next_rng_key(), 0.1, attend(y, y, y, causal))
        y = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
        x = x + hk.nets.MLP([4 * WIDTH, WIDTH], activation=jax.nn.gelu)(y)
    return hk.Linear(VOCABULARY)(x)


@program
def haiku_dropout():
    """A key of the old kind, split inside the loss by the modules themselves."""
    network = hk.transform(transformer_of_haiku)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))

    @jax.jit
    def train_step(params, state, key, batch):
        def loss_fn(params):
            return picked(network.apply(params, key, batch[:, :-1]), batch[:, 1:]).mean()

        loss, gradients = jax.value_and_grad(loss_fn)(params)
        return *update(optimizer, gradients, state, params), loss

    batch = tokens(10, LENGTH + 1)
    params = network.init(jax.random.PRNGKey(0), batch[:, :-1])
    return train_step, (params, optimizer.init(params), jax.random.PRNGKey(1), batch), 2


# ---------------------------------------------------------------- Equinox


class Layer(eqx.Module):
    """One example of shape (length, width). Activations, rates and flags are leaves that are no arrays."""

    first: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    second: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP
    dropout: eqx.nn.Dropout

    def __init__(self, key):
        one, two = jax.random.split(key)
        self.first, self.second = eqx.nn.LayerNorm(WIDTH), eqx.nn.LayerNorm(WIDTH)
        self.attention = eqx.nn.MultiheadAttention(4, WIDTH, key=one)
        self.mlp = eqx.nn.MLP(WIDTH, WIDTH, 4 * WIDTH, 1, activation=jax.nn.gelu, key=two)
        self.dropout = eqx.nn.Dropout(0.1)

    def __call__(self, x, key):
        y = jax.vmap(self.first)(x)
        x = x + self.dropout(self.attention(y, y, y), key=key)
        return x + jax.vmap(self.mlp)(jax.vmap(self.second)(x))


class Transformer(eqx.Module):
    embedding: eqx.nn.Embedding
    layers: list
    head: eqx.nn.Linear

    def __init__(self, key):
        first, last, *keys = jax.random.split(key, 6)
        self.embedding = eqx.nn.Embedding(VOCABULARY, WIDTH, key=first)
        self.layers = [Layer(key) for key in keys]
        self.head = eqx.nn.Linear(WIDTH, VOCABULARY, key=last)

    def __call__(self, ids, key):
        x = jax.vmap(self.embedding)(ids)
        for number, layer in enumerate(self.layers):
            x = layer(x, jax.random.fold_in(key, number))
        return jax.vmap(self.head)(x)


@program
def equinox_dropout():
    """A model of one example under vmap, a key for each example."""
    optimizer = optax.adamw(1e-3)

    @eqx.filter_jit
    def train_step(model, state, batch, key):
        @eqx.filter_value_and_grad
        def loss_fn(model):
            keys = jax.random.split(key, batch.shape[0])
            return picked(jax.vmap(model)(batch[:, :-1], keys), batch[:, 1:]).mean()

        loss, gradients = loss_fn(model)
        updates, state = optimizer.update(gradients, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, loss

    model = Transformer(jax.random.key(2))
    state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    return train_step, (model, state, tokens(11, LENGTH + 1), jax.random.key(5)), 2
