"""What a user sees of a pipelined step: its plan, where arrays live, memory, kernels, checks."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from programs import BATCH, LENGTH, PROGRAMS, WIDTH, dense, normal

import jaxext
from jaxext.pipelining import places
from jaxext.pipelining.refusal import Refusal

BY_NAME = {program.name: program for program in PROGRAMS}


def made(name="multilayer_perceptron", **options):
    step, args, _ = BY_NAME[name].make()
    return jaxext.pipeline(step, **{"num_stages": 4, "num_microbatches": 8} | options), args


def last_run(pipelined):
    (built,) = pipelined._built.values()
    return built.executor().last_run


@pytest.mark.parametrize("microbatches", [4, 8])
def test_1f1b_holds_as_many_microbatches_as_there_are_stages_left_and_gpipe_holds_all(microbatches):
    for schedule, expected in (("1f1b", [4, 3, 2, 1]), ("gpipe", [microbatches] * 4)):
        pipelined, args = made(schedule=schedule, num_microbatches=microbatches)
        pipelined(*args)
        assert last_run(pipelined).peak_live == [min(peak, microbatches) for peak in expected]


def test_every_parameter_its_moments_and_its_gradients_live_on_one_stages_device():
    pipelined, args = made()
    params, state, *_ = pipelined(*args)
    adam = state[1][0]
    for w, mu, nu in zip(*map(jax.tree.leaves, (params, adam.mu, adam.nu)), strict=True):
        assert w.devices() == mu.devices() == nu.devices()
    used = set().union(*(w.devices() for w in jax.tree.leaves(params)))
    assert used == set(jax.devices()[:4])


def test_the_second_step_moves_no_parameter(monkeypatch):
    pipelined, args = made()
    params, state, *_ = pipelined(*args)
    moved = []
    put = jax.device_put

    def watching(x, device=None, **options):
        moved.extend(leaf.shape for leaf in jax.tree.leaves(x) if leaf.devices() != {device})
        return put(x, device, **options)

    def bringing(self, arrays, bring=places.Single.bring):
        moved.extend(array.shape for array in arrays)
        return bring(self, arrays)

    monkeypatch.setattr(jax, "device_put", watching)
    monkeypatch.setattr(places.Single, "bring", bringing)
    pipelined(params, state, *args[2:])
    assert (WIDTH, WIDTH) not in moved and (2, WIDTH) in moved


def test_the_plan_says_what_runs_where():
    pipelined, args = made()
    plan = pipelined.plan(*args)
    text = str(plan)
    assert "batch 16 in 8 microbatches, 4 stages on 4 devices, schedule 1f1b" in text
    assert "programs.py:" in text and "rank 3" in text
    assert [stage.peak_live for stage in plan.stages] == [4, 3, 2, 1]
    assert sum(stage.share for stage in plan.stages) == pytest.approx(1)
    # Four equal stages would gain 4 · 8 / 11; the last one has the head and the loss besides its layer.
    busy = [plan.timeline.makespan - idle for idle in plan.timeline.idle]
    assert 0.2 < plan.bubble < 0.35 and 2.4 < plan.speedup < 32 / 11
    assert plan.speedup == pytest.approx((1 - plan.bubble) * sum(busy) / max(busy))
    assert json.loads(plan.to_json())["stages"][0]["device"] == plan.stages[0].device


def test_the_plan_is_drawn_and_traced(tmp_path):
    pipelined, args = made(schedule="zb_v", num_stages=2)
    plan = pipelined.plan(*args)
    plan.plot(tmp_path / "plan.svg")
    plan.trace(tmp_path / "plan.json")
    assert "<svg" in (tmp_path / "plan.svg").read_text()
    events = json.loads((tmp_path / "plan.json").read_text())["traceEvents"]
    assert sum(event["ph"] == "X" for event in events) == 8 * 3 * 4


def test_planning_runs_nothing_and_leaves_nnx_objects_alone():
    step, args, _ = BY_NAME["nnx_dropout"].make()
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(args[0].head)]
    jaxext.pipeline(step, num_stages=2).plan(*args)
    for leaf, was in zip(jax.tree.leaves(args[0].head), before, strict=True):
        np.testing.assert_array_equal(np.asarray(leaf), was)


def test_what_is_left_out_is_chosen():
    step, args, _ = BY_NAME["multilayer_perceptron"].make()
    plan = jaxext.pipeline(step, devices=jax.devices()[:2]).plan(*args)
    assert plan.schedule.num_ranks == 2 and plan.num_microbatches == 8


def test_parameters_that_several_stages_use_are_named_and_counted():
    pipelined, args = made("tied_embedding_masked_mean", num_stages=2, num_microbatches=4)
    plan = pipelined.plan(*args)
    assert plan.stages[-1].shared_bytes == args[0]["table"].nbytes
    assert any("used by several stages" in note for note in plan.notes)


def test_kernels_run_inside_the_stages():
    pipelined, args = made("linen_dropout", num_stages=2, num_microbatches=4)
    plan = pipelined.plan(*args)
    assert {"attention", "layer_norm"} <= plan.report.kernels()
    (built,) = pipelined._built.values()
    program = built.step.programs[1]
    shapes = [v.aval for v in program.stage.parameters + program.stage.receives]
    prepare = built.step.prepare[1]
    shapes += jax.eval_shape(prepare.run, *(value.aval for value in prepare.inputs))[: len(program.stage.data)]
    shapes.append(jnp.int32(0))
    lowered = program.forward.lower(*(jax.ShapeDtypeStruct(s.shape, s.dtype) for s in shapes)).as_text()
    assert lowered.count("custom_call @jaxext_attention_forward") == 2


def test_check_compares_the_first_step_and_passes():
    step, args, _ = BY_NAME["multilayer_perceptron"].make()
    checked = jaxext.pipeline(step, num_stages=2, num_microbatches=4, check=True)
    loss = checked(*args)[2]
    np.testing.assert_allclose(loss, jax.jit(step)(*args)[2], rtol=1e-5)


def test_disabled_runs_the_plain_step():
    pipelined, args = made()
    with jaxext.disabled():
        plain = pipelined(*args)
    np.testing.assert_allclose(plain[2], pipelined(*args)[2], rtol=1e-5)
    assert plain[2].devices() == {jax.devices()[0]}


def test_arguments_by_name_and_static_ones():
    def step(params, x, *, power, use_sum=False):
        def loss_fn(params):
            y = x
            for w in params:
                y = jnp.tanh(y @ w)
            return (jnp.sum if use_sum else jnp.mean)(y**power)

        loss, gradients = jax.value_and_grad(loss_fn)(params)
        return gradients, loss

    params, x = [dense(n, WIDTH, WIDTH) for n in range(4)], normal(9, BATCH, WIDTH)
    pipelined = jaxext.pipeline(step, num_stages=2, num_microbatches=2, static_argnames=("power", "use_sum"))
    for options in ({"power": 2}, {"power": 4, "use_sum": True}):
        np.testing.assert_allclose(pipelined(params, x=x, **options)[1], step(params, x, **options)[1], rtol=1e-5)


def test_an_argument_that_is_no_array_is_an_error_that_names_the_remedy():
    pipelined, args = made()
    with pytest.raises(
        TypeError, match=r"argument 'labels' holds a str, which is no array\. Name it in static_argnames"
    ):
        pipelined(*args[:3], "labels")


def test_another_batch_size_is_compiled_anew():
    pipelined, args = made(num_stages=2, num_microbatches=4)
    params, state, x, labels = args
    pipelined(params, state, x, labels)
    loss = pipelined(params, state, x[:8], labels[:8])[2]
    assert np.isfinite(loss)
    with pytest.raises(Refusal, match="num_microbatches=4 does not divide the batch of 6"):
        pipelined(params, state, x[:6], labels[:6])


def test_donated_state_is_used_up():
    step, args, _ = BY_NAME["scan_over_layers"].make()
    pipelined = jaxext.pipeline(step, num_stages=2, num_microbatches=4)
    params, state, _ = pipelined(*args)
    again = pipelined(params, state, args[2])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state[0].mu))
    assert np.isfinite(again[2])


def test_a_state_saved_by_plain_steps_goes_on_over_any_number_of_stages_bit_for_bit():
    """The tree is the user's own: leaves can be taken to the host and back at any time."""
    step, args, _ = BY_NAME["multilayer_perceptron"].make()
    params, state, *_ = jax.jit(step)(*args)
    host = jax.tree.map(np.asarray, (params, state))
    for stages in (2, 4):
        pipelined = jaxext.pipeline(step, num_stages=stages, num_microbatches=4)
        first = pipelined(*host, *args[2:])
        saved = jax.tree.map(np.asarray, first[:2])
        second = pipelined(*first[:2], *args[2:])
        restored = pipelined(*saved, *args[2:])
        jax.tree.map(np.testing.assert_array_equal, second, restored)


def test_a_step_decorated_with_options_reads_as_the_step():
    @jaxext.pipeline(num_stages=2, num_microbatches=2)
    def train_step(params, x):
        """Doc."""
        return jax.grad(lambda p: jnp.mean(jnp.tanh(jnp.tanh(x @ p[0]) @ p[1]) ** 2))(params)

    assert train_step.__name__ == "train_step" and train_step.__doc__ == "Doc."
    gradients = train_step([dense(1, WIDTH, WIDTH), dense(2, WIDTH, WIDTH)], normal(0, BATCH, WIDTH))
    assert gradients[0].shape == (WIDTH, WIDTH)


def test_length_and_batch_of_the_same_size_are_not_confused():
    """Both sizes are 16: the batch is what the loss sums over example by example."""
    table = normal(3, 16, WIDTH)
    params = [dense(n, WIDTH, WIDTH) for n in range(4)]
    optimizer = optax.sgd(0.1)

    def step(params, state, positions, x):
        def loss_fn(params):
            y = x + positions[:LENGTH]
            for w in params:
                y = jnp.tanh(y @ w)
            return jnp.mean(y**2)

        loss, gradients = jax.value_and_grad(loss_fn)(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, loss

    args = (params, optimizer.init(params), table, normal(4, BATCH, LENGTH, WIDTH))
    got = jaxext.pipeline(step, num_stages=2, num_microbatches=4)(*args)
    np.testing.assert_allclose(got[2], jax.jit(step)(*args)[2], rtol=1e-5)
