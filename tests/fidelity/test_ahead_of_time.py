"""Ahead of time: lower, compile, their analyses, serialized executables and the persistent compilation cache."""

import pickle

import jax
import numpy as np
import pytest
from fidelity_program import arguments, assert_close, kernels_in, output, step
from jax.experimental import serialize_executable

import jaxext


def test_lowered_and_compiled_programs_have_all_that_stocks_have(sides):
    found = {}
    for name, side in sides.items():
        with side():
            lowered = jax.jit(step).lower(*arguments())
            compiled = lowered.compile()
            found[name] = lowered, compiled
    (stock_lowered, stock), (lowered, compiled) = found["stock"], found["jaxext"]
    assert kernels_in(lowered) and kernels_in(lowered) == kernels_in(compiled)
    assert not kernels_in(stock_lowered) and not kernels_in(stock)
    assert lowered.args_info == stock_lowered.args_info
    assert lowered.out_info == stock_lowered.out_info
    assert lowered.in_tree == stock_lowered.in_tree
    for dialect in ("stablehlo", "hlo"):
        assert set(kernels_in(lowered.as_text(dialect))) == set(kernels_in(lowered))
    assert "rsqrt" in stock_lowered.as_text() and "rsqrt" not in lowered.as_text()
    assert compiled.cost_analysis().keys() >= {"flops", "bytes accessed"}
    ours, theirs = compiled.memory_analysis(), stock.memory_analysis()
    assert ours.argument_size_in_bytes == theirs.argument_size_in_bytes
    assert ours.output_size_in_bytes == theirs.output_size_in_bytes
    assert ours.temp_size_in_bytes > 0
    assert compiled.input_shardings == stock.input_shardings
    assert compiled.output_shardings == stock.output_shardings
    assert_close(compiled(*arguments()), stock(*arguments()))


def test_a_compiled_program_refuses_other_arguments_as_stock_does(sides):
    weights, x = arguments()
    errors = []
    for side in sides.values():
        with side():
            compiled = jax.jit(step).lower(weights, x).compile()
            with pytest.raises(TypeError) as error:
                compiled(weights, x[:1])
            errors.append(str(error.value))
    assert errors[0] == errors[1]


def test_a_serialized_executable_runs_in_a_new_process(tmp_path):
    compiled = jaxext.accelerate(step).lower(*arguments()).compile()
    (tmp_path / "program").write_bytes(pickle.dumps(serialize_executable.serialize(compiled)))
    value = output(
        """
        import jax, jaxext.kernels, pickle, pathlib, sys
        from jax.experimental import serialize_executable
        from fidelity_program import arguments
        parts = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())
        program = serialize_executable.deserialize_and_load(*parts, execution_devices=jax.devices()[:1])
        print(float(program(*arguments())[0]))
        """,
        str(tmp_path / "program"),
    )
    np.testing.assert_allclose(float(value), compiled(*arguments())[0], rtol=1e-6)


CACHED = """
import jax, sys
import jaxext
from fidelity_program import arguments, kernels_in, step
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
if sys.argv[2] == "jaxext":
    jaxext.install()
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
arguments = jax.device_put(arguments())
before = len(events)
value = float(jax.jit(step)(*arguments)[0])
hits = events[before:].count("/jax/compilation_cache/cache_hits")
misses = events[before:].count("/jax/compilation_cache/cache_misses")
print(hits, misses, len(kernels_in(jax.jit(step).lower(*arguments))), value)
"""


def test_a_second_process_takes_the_program_from_the_persistent_cache(tmp_path):
    rows = [output(CACHED, str(tmp_path), side).split() for side in ("stock", "jaxext", "jaxext")]
    assert [row[:3] for row in rows] == [["0", "1", "0"], ["0", "1", "4"], ["1", "0", "4"]]
    np.testing.assert_allclose([float(row[3]) for row in rows], float(rows[0][3]), rtol=1e-5)
