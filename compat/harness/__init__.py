"""Upstream test suites on stock JAX and on jaxext, compared test by test."""
