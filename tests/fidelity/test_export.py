"""jax.export: stock exports stay portable, kernels.export carries the kernels, and both survive a new process."""

import jax
import jax.export
import numpy as np
import pytest
from fidelity_program import arguments, assert_close, kernels_in, output, run, step

import jaxext
from jaxext import kernels

pytest.importorskip("flatbuffers", reason="jax.export serializes with it")

CALL = """
import sys, jax, jax.export, pathlib
{imports}
from fidelity_program import arguments
exported = jax.export.deserialize(bytearray(pathlib.Path(sys.argv[1]).read_bytes()))
print("jaxext" in sys.modules, float(jax.jit(exported.call)(*arguments())[0]))
"""


@pytest.fixture(params=["install", "accelerate"])
def accelerated(request):
    """The step, on kernels, and the function that exports it."""
    if request.param == "accelerate":
        yield jaxext.accelerate(step)
        return
    jaxext.install(memory="system")
    yield jax.jit(step)
    jaxext.uninstall()


@pytest.fixture
def expected():
    with jaxext.disabled():
        return jax.jit(step)(*arguments())


def test_a_stock_export_is_portable(accelerated, expected, tmp_path):
    assert kernels_in(accelerated.lower(*arguments()))
    exported = jax.export.export(accelerated)(*arguments())
    assert not kernels_in(exported.mlir_module())
    assert_close(exported.call(*arguments()), expected)
    file = tmp_path / "exported"
    file.write_bytes(exported.serialize())
    shown, value = output(CALL.format(imports=""), str(file)).split()
    assert shown == "False"
    np.testing.assert_allclose(float(value), expected[0], rtol=1e-5)


def test_an_export_with_kernels_runs_where_jaxext_is_imported(accelerated, expected, tmp_path):
    exported = kernels.export(accelerated)(*arguments())
    assert kernels_in(exported.mlir_module()) == kernels_in(accelerated.lower(*arguments()))
    file = tmp_path / "exported"
    file.write_bytes(exported.serialize())
    again = jax.export.deserialize(bytearray(file.read_bytes()))
    assert_close(again.call(*arguments()), expected)
    _, value = output(CALL.format(imports="import jaxext.kernels"), str(file)).split()
    np.testing.assert_allclose(float(value), expected[0], rtol=1e-5)
    without = run(CALL.format(imports=""), str(file))
    assert "No FFI handler registered for jaxext_layer_norm" in without.stderr


def test_neither_kind_of_export_gets_the_others_program(accelerated):
    counts = [
        bool(kernels_in(export(accelerated)(*arguments()).mlir_module()))
        for export in (kernels.export, jax.export.export, kernels.export)
    ]
    assert counts == [True, False, True]
    assert kernels_in(accelerated.lower(*arguments()))


@pytest.mark.parametrize("export", [kernels.export, jax.export.export])
def test_an_export_for_several_platforms_runs_here(accelerated, expected, export):
    exported = export(accelerated, platforms=("cpu", "cuda"))(*arguments())
    assert exported.platforms == ("cpu", "cuda")
    assert_close(exported.call(*arguments()), expected)


def test_an_export_for_another_platform_holds_no_kernel(accelerated):
    exported = kernels.export(accelerated, platforms=["cuda"])(*arguments())
    assert not kernels_in(exported.mlir_module())
    with pytest.raises(ValueError, match=r"(?i)platform"):
        exported.call(*arguments())


def test_an_export_has_symbolic_shapes_and_its_derivative(installed, expected):
    (batch,) = jax.export.symbolic_shape("b")
    weights, x = arguments()

    def loss_of(x):
        return step(weights, x)[0]

    exported = jax.export.export(jax.jit(loss_of))(jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype))
    again = jax.export.deserialize(exported.serialize(vjp_order=1))
    np.testing.assert_allclose(again.call(x), expected[0], rtol=1e-5)
    with jaxext.disabled():
        stock = jax.grad(loss_of)(x)
    assert_close(jax.grad(again.call)(x), stock)
