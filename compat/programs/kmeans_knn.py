"""k-means and k nearest neighbours in plain JAX: distances by a product, argmin, segment sums, top_k.

A step moves the centroids (Lloyd) and classifies queries by their ten nearest points. The loss is the mean squared
distance to the nearest centroid. Run it with `python kmeans_knn.py --steps 10`; sizes can also come from
KMEANS_POINTS, KMEANS_QUERIES, KMEANS_SIZE and KMEANS_CLUSTERS.
"""

import argparse
import os
import time

import jax
import jax.numpy as jnp
import numpy as np

NEIGHBOURS, CLASSES = 10, 16


def squared_distances(x, y):
    """[n, m] from x [n, d] and y [m, d]."""
    return jnp.sum(x * x, axis=1)[:, None] - 2 * x @ y.T + jnp.sum(y * y, axis=1)


@jax.jit
def step(centroids, points, classes, queries):
    distances = squared_distances(points, centroids)
    nearest = jnp.argmin(distances, axis=1)
    sums = jax.ops.segment_sum(points, nearest, centroids.shape[0])
    counts = jax.ops.segment_sum(jnp.ones(points.shape[0]), nearest, centroids.shape[0])
    moved = jnp.where(counts[:, None] > 0, sums / jnp.maximum(counts, 1)[:, None], centroids)
    _, neighbours = jax.lax.top_k(-squared_distances(queries, points), NEIGHBOURS)
    votes = jax.nn.one_hot(classes[neighbours], CLASSES).sum(axis=1)
    return moved, jnp.mean(jnp.min(distances, axis=1)), jnp.argmax(votes, axis=1)


def blobs(count, size, seed):
    """Points [count, size] around sixteen centres, and the centre [count] of each."""
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, CLASSES, count)
    points = rng.normal(size=(CLASSES, size))[classes] * 2 + rng.normal(size=(count, size))
    return jnp.asarray(points, jnp.float32), jnp.asarray(classes, jnp.int32)


def parse_arguments(argv=None):
    def setting(name, default):
        return type(default)(os.environ.get(f"KMEANS_{name}", default))

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=setting("POINTS", 20_000))
    parser.add_argument("--queries", type=int, default=setting("QUERIES", 1000))
    parser.add_argument("--size", type=int, default=setting("SIZE", 64))
    parser.add_argument("--clusters", type=int, default=setting("CLUSTERS", 256))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def build(options):
    """Centroids, points, their classes, and queries."""
    points, classes = blobs(options.points + options.queries, options.size, options.seed)
    queries, points, classes = points[: options.queries], points[options.queries :], classes[options.queries :]
    return points[: options.clusters], points, classes, queries


def factory():
    """The step and its arguments: centroids, points, classes and queries."""
    return step, build(parse_arguments([]))


def main():
    options = parse_arguments()
    centroids, *data = build(options)
    for index in range(options.steps):
        start = time.perf_counter()
        centroids, loss, _ = step(centroids, *data)
        loss = float(loss)
        print(f"step {index} loss {loss:.6f} ms {(time.perf_counter() - start) * 1e3:.1f}", flush=True)


if __name__ == "__main__":
    main()
