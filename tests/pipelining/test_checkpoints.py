"""A state goes through an orbax checkpoint between plain JAX and any number of stages, in one process or several."""

import itertools
import re
import types
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from programs import PROGRAMS
from test_several_processes import launch, run_here

import jaxext
from jaxext.pipelining import gathering
from jaxext.pipelining.transport import Received

PROGRAM = Path(__file__).parent / "checkpointed.py"
BY_NAME = {program.name: program for program in PROGRAMS}


def through_orbax(state, like, folder):
    """`state`, saved and restored to where `like` is."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder, jax.tree.map(ocp.utils.to_shape_dtype_struct, like))


def assert_same_bits(want, got):
    for expected, found in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        assert expected.dtype == found.dtype
        np.testing.assert_array_equal(np.asarray(expected), np.asarray(found))


@pytest.mark.parametrize(
    ("name", "numbers"), [("tied_embedding_masked_mean", [4]), ("scan_over_layers_remat_bf16", [3])]
)
def test_a_plain_run_goes_on_over_any_number_of_stages_and_back_bit_for_bit(name, numbers, tmp_path):
    step, args, count = BY_NAME[name].make()
    plain = jax.jit(getattr(step, "__wrapped__", step))
    state, batch = plain(*args)[:count], args[count:]
    for stages in numbers:
        pipelined = jaxext.pipeline(
            getattr(step, "__wrapped__", step), num_stages=stages, num_microbatches=4, schedule="zb_h1"
        )
        restored = through_orbax(state, args[:count], tmp_path / f"to_{stages}")
        assert_same_bits(state, restored)
        # What came from a file and what did not go on alike.
        after = pipelined(*restored, *batch)[:count]
        assert_same_bits(pipelined(*state, *batch)[:count], after)
        state = through_orbax(after, args[:count], tmp_path / f"from_{stages}")
        assert_same_bits(after, state)
    assert all(leaf.devices() == {jax.devices()[0]} for leaf in jax.tree.leaves(state))
    plain(*state, *batch)


def losses_in(text):
    """By step; all processes print the same."""
    found = re.findall(r"step (\d+): loss (\S+)", text)
    losses = dict(found)
    assert all(losses[step] == loss for step, loss in found)
    return {int(step): float.fromhex(loss) for step, loss in losses.items()}


def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint_with_the_same_losses(tmp_path):
    name = "multilayer_perceptron"
    before = launch(tmp_path / "saved", 2, name, 4, 6, 3, program=PROGRAM)
    assert before.returncode != 0 and sorted(losses_in(before.stdout)) == [0, 1, 2], before.stdout + before.stderr
    after = launch(tmp_path / "saved", 2, name, 4, 6, -1, program=PROGRAM)
    assert after.returncode == 0 and sorted(losses_in(after.stdout)) == [3, 4, 5], after.stdout + after.stderr
    assert list((losses_in(before.stdout) | losses_in(after.stdout)).values()) == run_here(name, "1f1b", 2, 6)[0]


def test_gathering_in_one_process_brings_leaves_to_the_host():
    step, args, count = BY_NAME["multilayer_perceptron"].make()
    pipelined = jaxext.pipeline(step, num_stages=2, num_microbatches=4)
    state = pipelined(*args)[:count]
    gathered = pipelined.gather(state)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(gathered))
    assert_same_bits(state, gathered)


def test_a_leaf_that_no_process_has_is_an_error():
    missing = {0: np.array([0, 1], np.uint8), 1: np.array([1, 1], np.uint8)}
    transport = types.SimpleNamespace(rank=1, moves=itertools.count(), exchange=lambda *_: missing, send=None)
    transport.receive = lambda *_: [Received("", np.zeros(2))]
    with pytest.raises(ValueError, match=r"no process has leaf 1\. Give each process the same state"):
        gathering.gather([np.zeros(2), np.zeros(3)], transport, {0, 1}, 1.0)
