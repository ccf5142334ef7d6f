"""Threads, forked and spawned processes, and functions that are sent between them."""

import copy
import os
import pickle
import socket
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from fidelity_program import HERE, arguments, assert_close, kernels_in, loss, output, step

import jaxext


def test_many_threads_jit_while_the_switch_is_thrown(sides):
    with sides["stock"]():
        expected = jax.jit(loss)(*arguments())
    stop, errors = threading.Event(), []

    def work(number):
        try:
            for turn in range(2):
                function = jax.jit(lambda weights, x: loss(weights, x) * (1 + number + turn))  # noqa: B023
                np.testing.assert_allclose(function(*arguments()), expected * (1 + number + turn), rtol=1e-5)
        except BaseException as error:
            errors.append(error)

    def throw():
        while not stop.wait(0.005):
            jaxext.uninstall()
            jaxext.install(memory="system")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    thrower = threading.Thread(target=throw)
    for thread in (*threads, thrower):
        thread.start()
    for thread in threads:
        thread.join(120)
    stop.set()
    thrower.join(10)
    assert not errors
    jaxext.install(memory="system")
    assert kernels_in(jax.jit(step).lower(*arguments()))


def test_one_function_is_called_from_many_threads_at_once(installed):
    function = jax.jit(step)
    expected = function(*arguments())
    results = [None] * 8

    def call(number):
        results[number] = function(*arguments())

    threads = [threading.Thread(target=call, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for result in results:
        assert_close(result, expected)


FORKED = """
import os, sys, warnings
import jaxext
if sys.argv[1] == "accelerate":
    import jax
    from fidelity_program import arguments, step
    function = jaxext.accelerate(step)
else:
    jaxext.install()
    import jax
    from fidelity_program import arguments, step
    function = jax.jit(step)
child = os.fork()
if not child:  # ahead of the first computation: a child of a process whose threads run deadlocks under stock JAX too
    print(float(function(*arguments())[0]), flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print(float(function(*arguments())[0]))
"""


@pytest.mark.parametrize("form", ["accelerate", "install"])
def test_a_forked_child_computes_as_its_parent_does(form):
    child, parent = output(FORKED, form).split()
    assert child == parent
    np.testing.assert_allclose(float(parent), jax.jit(loss)(*arguments()), rtol=1e-5)


SPAWNED = """
import multiprocessing
import jaxext
from worker import work
jaxext.install()
if __name__ == "__main__":
    from fidelity_program import arguments, step
    import jax
    print(float(jax.jit(step)(*arguments())[0]))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.apply(work))
"""
WORKER = """
import jaxext
def work():
    from fidelity_program import arguments, step
    return float(jaxext.accelerate(step, require=("attention", "layer_norm"))(*arguments())[0])
"""


def test_a_spawned_worker_accelerates(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "main.py").write_text(SPAWNED)
    code = "import runpy, sys; sys.path.insert(0, sys.argv[1]); sys.argv[0] = sys.argv[1] + '/main.py'; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    first, second = output(code, str(tmp_path)).split()
    np.testing.assert_allclose(float(second), float(first), rtol=1e-6)


def test_functions_are_pickled_where_stocks_are(installed):
    assert pickle.loads(pickle.dumps(step)) is step
    outcomes = []
    for jitted in (jax.jit(step), jaxext.accelerate(step)):
        try:
            pickle.loads(pickle.dumps(jitted))
            outcomes.append("pickled")
        except (pickle.PicklingError, AttributeError, TypeError):
            outcomes.append("refused")
    assert outcomes[0] == outcomes[1]


def test_cloudpickle_takes_an_accelerated_function_to_a_new_process(tmp_path):
    cloudpickle = pytest.importorskip("cloudpickle")
    factor = 2.0

    def scaled(weights, x):
        return loss(weights, x) * factor

    file = tmp_path / "function"
    file.write_bytes(cloudpickle.dumps(jaxext.accelerate(scaled)))
    code = """
    import pathlib, pickle, sys
    from fidelity_program import arguments
    print(float(pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())(*arguments())))
    """
    value = output(code, str(file), JAX_DUMP_IR_TO=str(tmp_path / "programs"))
    np.testing.assert_allclose(float(value), factor * jax.jit(loss)(*arguments()), rtol=1e-5)
    (program,) = (tmp_path / "programs").glob("*scaled*")
    assert kernels_in(program.read_text()).keys() == {"jaxext_attention_forward", "jaxext_layer_norm"}


def test_copies_and_trees_of_accelerated_functions():
    function = jaxext.accelerate(step)
    stock = jax.jit(step)
    for copied in (copy.copy, copy.deepcopy):
        assert (copied(function) is function) == (copied(stock) is stock)
        assert_close(copied(function)(*arguments()), function(*arguments()))
    assert jax.tree.leaves({"step": function}) == [function]
    partial = jax.tree_util.Partial(function, arguments()[0])
    again = jax.tree.map(lambda leaf: leaf, partial)
    assert_close(again(arguments()[1]), function(*arguments()))


ONE = """
import jax, sys
jax.config.update("jax_cpu_collectives_implementation", "gloo")
import jaxext
jaxext.install()
rank, count, port = map(int, sys.argv[1:])
jax.distributed.initialize(f"localhost:{port}", count, rank)
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from fidelity_program import arguments, kernels_in, step
weights, x = arguments()
mesh = jax.make_mesh((count,), ("data",))
rows = len(x) // count
x = jax.make_array_from_process_local_data(NamedSharding(mesh, P("data")), x[rank * rows : (rank + 1) * rows])
weights = jax.device_put(weights, NamedSharding(mesh, P()))
function = jax.jit(step)
assert "jaxext_attention" in str(function.trace(weights, x).jaxpr)
value, weights = function(weights, x)
print(jax.process_count(), float(value), float(abs(np.asarray(weights["scale"].addressable_data(0))).sum()))
jax.distributed.shutdown()
"""


@pytest.mark.parametrize("count", [1, 2])
def test_distributed_processes(count):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(HERE)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ONE, str(rank), str(count), port],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(count)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=120) for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs[0][1] + outputs[-1][1]
    with jaxext.disabled():
        value, weights = jax.jit(step)(*arguments())
    for text, _ in outputs:
        processes_seen, found, scales = text.splitlines()[-1].split()  # gloo prints lines of its own
        assert int(processes_seen) == count
        np.testing.assert_allclose(float(found), value, rtol=1e-5)
        np.testing.assert_allclose(float(scales), np.abs(weights["scale"]).sum(), rtol=1e-5)
