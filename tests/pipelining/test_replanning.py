"""A pipelined step goes on by a schedule made for measured costs, with the same results and nothing compiled anew."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import BATCH, WIDTH, dense, normal
from test_pipeline_parity import difference, gradient_step, leaves

import jaxext
from jaxext.pipelining import schedules
from jaxext.pipelining.simulate import Costs, simulate

FOUR = {"num_stages": 4, "num_microbatches": 8}
UNEVEN = Costs((1.0, 2.0, 3.0, 1.0), (1.0,) * 4, (0.2, 1.0, 2.0, 3.0), 0.5, (400.0,) * 4, 1000.0)


def loss_fn(params, x):
    for w in params:
        x = jnp.tanh(x @ w)
    return jnp.mean(x**2)


@pytest.fixture(scope="module")
def args():
    return [dense(n, WIDTH, WIDTH) for n in range(8)], normal(1, BATCH, WIDTH)


def test_a_step_goes_on_by_what_it_measured(args):
    step = gradient_step(loss_fn)
    pipelined = jaxext.pipeline(step, schedule="auto", **FOUR)
    pipelined(*args)
    before, costs = pipelined.measure(*args)
    assert all(cost > 0 for cost in (*costs.forward, *costs.backward_input))
    pipelined.replan(costs)
    plan = pipelined.plan(*args)
    assert plan.measured and "predicted from measured costs" in str(plan) and '"costs": "measured"' in plan.to_json()
    assert plan.timeline.makespan == simulate(plan.schedule, costs).makespan
    # Microbatches come to each stage in their order, whatever the schedule.
    jax.tree.map(np.testing.assert_array_equal, before, pipelined(*args))
    assert difference(leaves(jax.jit(step)(*args)), leaves(before)) <= 1e-5


def test_another_order_compiles_no_stage_anew(args):
    pipelined = jaxext.pipeline(gradient_step(loss_fn), schedule="auto", **FOUR)
    want = pipelined(*args)
    order = pipelined.plan(*args).schedule
    pipelined.replan(UNEVEN)
    found = pipelined.plan(*args).schedule
    assert found.actions != order.actions
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **of: compiled.append(of.get("fun_name")))
    try:
        got = pipelined(*args)
    finally:
        jax.monitoring.clear_event_listeners()
    assert not [name for name in compiled if name and "stage" in name]
    jax.tree.map(np.testing.assert_array_equal, want, got)


def test_costs_known_before_the_first_step_are_planned_for_and_other_schedules_keep_their_order(args):
    auto = jaxext.pipeline(gradient_step(loss_fn), schedule="auto", **FOUR)
    auto.replan(UNEVEN)
    assert auto.plan(*args).schedule == schedules.make("auto", 4, 8, costs=UNEVEN)
    fixed = jaxext.pipeline(gradient_step(loss_fn), schedule="zb_h1", **FOUR)
    fixed.replan(UNEVEN)
    plan = fixed.plan(*args)
    assert plan.schedule == schedules.make("zb_h1", 4, 8)
    assert plan.timeline.makespan == simulate(plan.schedule, UNEVEN).makespan


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        (Costs.even(3), "costs.forward has 3 values, the schedule 4 stages; give one value a stage"),
        (Costs((1, 1, 1, -1), (1,) * 4, (1,) * 4), r"costs.forward=\(1, 1, 1, -1\): expected finite"),
    ],
)
def test_costs_that_do_not_fit_are_an_error(costs, message):
    with pytest.raises(ValueError, match=message):
        jaxext.pipeline(gradient_step(loss_fn), **FOUR).replan(costs)
