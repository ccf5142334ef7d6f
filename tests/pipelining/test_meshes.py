"""Stages on slices of a mesh: the results of one device, with the user's shardings over the inner axes kept."""

import contextlib
import subprocess
import sys
from pathlib import Path

import jax
import meshed
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from meshed import mesh_of, put
from programs import BATCH, WIDTH, dense, normal
from test_pipeline_parity import difference, leaves, plainly, run, types

import jaxext
from jaxext.pipelining import placement, places
from jaxext.pipelining.refusal import Refusal

PROCESSES = Path(__file__).parent / "meshed_processes.py"
PROGRAMS = {"plain": meshed.plain, "linen": meshed.linen, "nnx": meshed.flax_nnx, "scanned": meshed.scanned}
# Stages, data, model.
SHAPES = {"data": (2, 2, 1), "model": (2, 1, 2), "both": (2, 2, 2), "four": (4, 2, 1)}


def pipelined(make, mesh, steps=3, **options):
    """The results of steps over the mesh, called as the program expects it."""
    step, args, state = make(mesh)
    run_it = jaxext.pipeline(step, mesh=mesh, **options)
    with jax.set_mesh(mesh) if make is meshed.linen else contextlib.nullcontext():
        return run(run_it, args, state, steps)


def on_one_device(make, steps=3):
    step, args, state = make(None)
    return run(plainly(step), args, state, steps)


@pytest.mark.parametrize(
    ("name", "shape", "schedule"),
    [("linen", "both", "zb_h1"), ("nnx", "data", "1f1b"), ("scanned", "both", "1f1b")],
)
def test_three_steps_over_a_mesh_agree_with_one_device(name, shape, schedule):
    make = PROGRAMS[name]
    want = on_one_device(make)
    got = pipelined(make, mesh_of(*SHAPES[shape]), num_microbatches=4, schedule=schedule)
    assert types(got) == types(want)
    assert max(map(difference, want, got)) <= 1e-5


@pytest.mark.parametrize(("shape", "schedule"), [("data", "zb_v"), ("model", "1f1b"), ("four", "zb_h1")])
def test_every_gradient_leaf_agrees_to_1e_5(shape, schedule):
    (want,) = on_one_device(meshed.plain, 1)
    (got,) = pipelined(meshed.plain, mesh_of(*SHAPES[shape]), 1, num_microbatches=4, schedule=schedule)
    assert len([name for name in want if name.startswith("[0][4]")]) == 13
    assert difference(want, got) <= 1e-5


@pytest.fixture(scope="module")
def three_steps():
    """Of plain over 2 x 2 x 2: mesh, results, what went to slices and was compiled in the third step, a plain step."""
    crossed, compiled = [], []

    def watched(self, arrays, bring=places.Slice.bring):
        found = bring(self, arrays)
        crossed.extend((leaf.shape, leaf.sharding.spec[:1]) for leaf in found if leaf.ndim)
        return found

    mesh = mesh_of(2, 2, 2)
    step, args, _ = meshed.plain(mesh)
    run_it = jaxext.pipeline(step, mesh=mesh, num_microbatches=4, check=True)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        # As if the parameters were large: what is small is on every stage.
        patch.setattr(placement, "SMALL", 1 << 10)
        for number in range(3):
            if number == 2:
                patch.setattr(places.Slice, "bring", watched)
                jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))
            found.append(run_it(*args))
            args = (*found[-1][:2], *args[2:])
    jax.monitoring.clear_event_listeners()
    with jaxext.disabled():
        plain = run_it(*args)
    return mesh, found, crossed, compiled, plain


def test_results_of_optimised_steps_agree_with_one_device(three_steps):
    _, found, *_ = three_steps
    assert max(map(difference, on_one_device(meshed.plain), [leaves((one, [])) for one in found])) <= 1e-5


def test_state_gradients_and_moments_keep_their_specs_on_the_slices_of_their_stages(three_steps):
    mesh, found, *_ = three_steps
    params, state, *_, gradients = found[-1]
    for number, groups in enumerate(zip(params["hidden"], state[1][0].trace["hidden"], gradients["hidden"])):
        for weights in groups:
            for name, spec in (("up", P(None, "model")), ("down", P("model"))):
                array = weights[name]
                assert array.devices() == set(mesh.devices[number // 3].flat)
                assert array.sharding.is_equivalent_to(NamedSharding(array.sharding.mesh, spec), 2)


def test_what_crosses_between_slices_is_spread_over_the_data_axis(three_steps):
    moved = [spec for shape, spec in three_steps[2] if shape == (BATCH // 4, WIDTH)]
    # Activations and cotangents of four microbatches.
    assert moved == [("data",)] * 8


def test_a_later_step_compiles_nothing(three_steps):
    compiled = three_steps[3]
    assert not [name for name in compiled if "backend_compile" in name]


def test_disabled_runs_the_step_over_the_whole_mesh(three_steps):
    mesh, *_, plain = three_steps
    assert plain[2].devices() == set(mesh.devices.flat)


def test_meshes_of_explicit_axes_and_numpy_batches_are_taken():
    mesh = mesh_of(2, 2, 2, axis_types=(AxisType.Explicit,) * 3)
    params = [dense(n, WIDTH, WIDTH) for n in range(4)]

    def step(params, x):
        def loss_fn(params):
            y = x
            for w in params:
                y = jax.numpy.tanh(y @ w)
            return (y**2).mean()

        return jax.grad(loss_fn)(params)

    x = normal(9, BATCH, WIDTH)
    want = leaves(jax.jit(step)(params, x))
    run_it = jaxext.pipeline(step, mesh=mesh, num_microbatches=4)
    sharded = put(mesh, params, lambda w: P(None, "model"))
    with jax.set_mesh(mesh):
        for batch in (put(mesh, x, lambda x: P(("stage", "data"))), np.asarray(x)):
            assert difference(want, leaves(run_it(sharded, batch))) <= 1e-5


def test_processes_that_each_own_a_slice_give_the_bits_of_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    command = [sys.executable, "-P", "-m", "jaxext", "launch", "-n", "2", str(PROCESSES), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    step, args, _ = meshed.plain(mesh_of(2, 2, 1))
    run_it = jaxext.pipeline(step, mesh=mesh_of(2, 2, 1), num_microbatches=4)
    losses = []
    for _ in range(3):
        params, state, loss, *_ = run_it(*args)
        args = (params, state, *args[2:])
        losses.append(float(loss))
    found = {}
    for rank in range(2):
        saved = dict(np.load(tmp_path / f"{rank}.npz"))
        np.testing.assert_array_equal(saved.pop("losses"), losses)
        found |= saved
    for name, leaf in leaves(params).items():
        np.testing.assert_array_equal(found[name], leaf)


def test_the_plan_names_the_devices_of_each_slice():
    mesh = mesh_of(2, 2, 2)
    step, args, _ = meshed.plain(mesh)
    plan = jaxext.pipeline(step, mesh=mesh, num_microbatches=4).plan(*args)
    assert [stage.device for stage in plan.stages] == ["cpu:0,1,2,3", "cpu:4,5,6,7"]


def test_a_mesh_of_stages_alone_is_a_list_of_devices():
    mesh = Mesh(np.array(jax.devices()[:4]), ("pipe",))
    step, args, _ = meshed.plain(None)
    plan = jaxext.pipeline(step, mesh=mesh, axis="pipe", num_microbatches=4).plan(*args)
    assert [stage.device for stage in plan.stages] == ["cpu:0", "cpu:1", "cpu:2", "cpu:3"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"axis": "pipe"},
            ValueError,
            r"pipeline\(axis='pipe'\): expected an axis of the mesh, which has 'stage', 'data'",
        ),
        (
            {"num_stages": 3},
            ValueError,
            r"pipeline\(num_stages=3\): expected 2, as the mesh has along 'stage'. Leave it",
        ),
        ({"devices": []}, ValueError, r"pipeline\(devices=…, mesh=…\): each says where the stages run. Give one"),
        ({"mesh": "stage"}, TypeError, r"pipeline\(mesh='stage'\): expected a jax.sharding.Mesh of devices"),
        ({"mesh": None, "axis": "x"}, ValueError, r"pipeline\(axis='x'\): there is no mesh. Give it: mesh="),
    ],
    ids=str,
)
def test_a_wrong_mesh_is_an_error_that_names_the_argument(options, error, message):
    with pytest.raises(error, match=message):
        jaxext.pipeline(lambda x: x, **{"mesh": mesh_of(2, 2, 2)} | options)


def test_microbatches_that_the_data_axis_does_not_divide_are_refused_with_what_it_does():
    mesh = mesh_of(2, 2, 2)
    step, args, _ = meshed.plain(mesh)
    with pytest.raises(
        Refusal,
        match=r"num_microbatches=16 does not divide the batch of 16 over 2 devices along data. Use one of 1, 2, 4, 8",
    ):
        jaxext.pipeline(step, mesh=mesh, num_microbatches=16)(*args)


def test_an_argument_over_an_axis_that_the_mesh_lacks_is_an_error_that_names_both():
    mesh, other = mesh_of(2, 2, 2), Mesh(np.array(jax.devices()), ("fsdp",))
    step, (params, *rest), _ = meshed.plain(mesh)
    params = put(other, params, lambda w: P("fsdp"))
    with pytest.raises(
        ValueError, match=r"argument 'params' .* the axis 'fsdp', but the mesh has 'stage', 'data', 'model'"
    ):
        jaxext.pipeline(step, mesh=mesh, num_microbatches=4)(params, *rest)


def test_constraints_in_the_step_without_a_mesh_are_refused_with_the_line():
    step, args, _ = meshed.plain(mesh_of(2, 2, 2))
    with pytest.raises(
        Refusal, match=r"shards its values over a mesh .*meshed\.py:\d+ .*pipeline\(mesh=mesh, axis='stage'\)"
    ):
        jaxext.pipeline(step, num_stages=2, num_microbatches=4)(*args)


def test_a_step_jitted_with_shardings_is_an_error_that_says_where_to_put_them():
    mesh = mesh_of(2, 2, 2)
    jitted = jax.jit(lambda x: x, in_shardings=NamedSharding(mesh, P("data")))
    with pytest.raises(ValueError, match=r"jitted with in_shardings, .* Leave it out, and put the arguments where"):
        jaxext.pipeline(jitted, mesh=mesh)
