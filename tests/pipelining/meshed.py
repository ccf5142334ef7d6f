"""Train steps as they are written for a mesh: sharded state and batch, constraints in the model; None: on one device.

Each function gives a step, its arguments, and how many of these come back first.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from programs import BATCH, WIDTH, dense, normal, picked, tokens, update

VOCABULARY = 64
# No optimizer that divides by a gradient's size and so blows up its rounding.
OPTIMIZER = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1, momentum=0.9))


def mesh_of(stages, data, model, devices=None, axis_types=None):
    found = np.array(jax.devices() if devices is None else devices)[: stages * data * model]
    return Mesh(found.reshape(stages, data, model), ("stage", "data", "model"), axis_types)


def put(mesh, tree, spec):
    """`tree` with each leaf sharded as `spec(leaf)` says."""
    if mesh is None:
        return tree
    return jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, spec(leaf))), tree)


def by_columns(leaf):
    return P(*[None] * (leaf.ndim - 1), "model") if leaf.ndim > 1 else P()


def by_example(leaf):
    return P("data")


def plain(mesh, own=None):
    """Column and row parallel products, constrained by the mesh's NamedShardings; dropout, aux of each example.

    own: of several processes, each one's mesh of inner axes, where its copies of the arguments are.
    """
    own = mesh if own is None else own

    def loss_fn(params, x, y, key):
        for number, w in enumerate(params["hidden"]):
            h = jax.nn.gelu(x @ w["up"])
            if mesh is not None:
                h = jax.lax.with_sharding_constraint(h, NamedSharding(mesh, P("data", "model")))
            kept = jax.random.bernoulli(jax.random.fold_in(key, number), 0.8, x.shape)
            x = x + jnp.where(kept, h @ w["down"], 0)
        error = jnp.mean((x @ params["out"] - y) ** 2, -1)
        return error.mean(), error

    def step(params, state, x, y, key):
        (loss, error), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params, x, y, key)
        return *update(OPTIMIZER, gradients, state, params), loss, error, gradients

    hidden = [{"up": dense(n, WIDTH, 4 * WIDTH), "down": dense(n + 9, 4 * WIDTH, WIDTH)} for n in range(6)]
    params = {"hidden": put(own, hidden, lambda w: P(None, "model") if w.shape[0] == WIDTH else P("model"))}
    params["out"] = put(own, dense(20, WIDTH, 16), lambda w: P())
    x, y = put(own, (normal(30, BATCH, WIDTH), normal(31, BATCH, 16)), by_example)
    return step, (params, OPTIMIZER.init(params), x, y, jax.random.key(5)), 2


class Mlp(nn.Module):
    spec: P | None

    @nn.compact
    def __call__(self, x):
        h = nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x)))
        if self.spec is not None:
            h = jax.lax.with_sharding_constraint(h, self.spec)
        return nn.Dense(WIDTH)(h)


class Model(nn.Module):
    spec: P | None

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(VOCABULARY, WIDTH)(ids)
        for number in range(2):
            x = x + nn.Dropout(0.1, deterministic=False)(nn.remat(Mlp)(self.spec, name=f"mlp{number}")(x))
        return nn.Dense(VOCABULARY)(x)


def linen(mesh):
    """Constraints by bare specs, for which the caller is in `jax.set_mesh`, inside rematerialised blocks too."""
    model = Model(None if mesh is None else P("data", None, "model"))
    params = put(
        mesh, Model(None).init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, tokens(8)), by_columns
    )
    state = TrainState.create(apply_fn=model.apply, params=params, tx=OPTIMIZER)

    def step(state, batch, key):
        def loss_fn(params):
            rngs = {"dropout": jax.random.fold_in(key, state.step)}
            return picked(state.apply_fn(params, batch, rngs=rngs), batch).mean()

        loss, gradients = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=gradients), loss

    return step, (state, put(mesh, tokens(8), by_example), jax.random.key(3)), 1


class Block(nnx.Module):
    def __init__(self, mesh, rngs):
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.mesh = mesh

    def __call__(self, x):
        h = nnx.silu(self.up(self.norm(x)))
        if self.mesh is not None:
            h = jax.lax.with_sharding_constraint(h, NamedSharding(self.mesh, P("data", None, "model")))
        return x + self.dropout(self.down(h))


class Language(nnx.Module):
    def __init__(self, mesh, rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(mesh, rngs) for _ in range(2)])
        self.head = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def flax_nnx(mesh):
    model = Language(mesh, nnx.Rngs(0))
    nnx.update(model, put(mesh, nnx.state(model, nnx.Param), by_columns))
    optimizer = nnx.Optimizer(model, OPTIMIZER, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch):
        def loss_fn(model):
            return picked(model(batch[:, :-1]), batch[:, 1:]).mean()

        loss, gradients = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, gradients)
        return loss

    return step, (model, optimizer, put(mesh, tokens(9), by_example)), 0


def scanned(mesh):
    """A scan over layers that are stacked along the stages' axis, with a constraint in its body."""

    def loss_fn(params, x):
        def body(x, w):
            h = jnp.tanh(x @ w["up"])
            if mesh is not None:
                h = jax.lax.with_sharding_constraint(h, NamedSharding(mesh, P("data", "model")))
            return x + h @ w["down"], None

        return jnp.mean(jax.lax.scan(jax.checkpoint(body), x, params)[0] ** 2)

    def step(params, x):
        loss, gradients = jax.value_and_grad(loss_fn)(params, x)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), loss

    params = {"up": dense(1, 4, WIDTH, 4 * WIDTH), "down": dense(2, 4, 4 * WIDTH, WIDTH)}
    return (
        step,
        (put(mesh, params, lambda w: P("stage", None, "model")), put(mesh, normal(3, BATCH, WIDTH), by_example)),
        1,
    )
