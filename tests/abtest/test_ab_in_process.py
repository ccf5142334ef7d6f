"""`jaxext.ab`: one process, both sides; the jaxext side is a stand-in that is right or wrong on purpose."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_step import OPTIMIZER, loss_fn, make_args, train_step

import jaxext
from jaxext.abtest.host import LocalHost, StepError
from jaxext.abtest.protocol import TargetError, Workload
from jaxext.abtest.settings import Setting

DONATING = jax.jit(train_step, donate_argnums=(0, 1))
QUICK = {"steps": 4, "repeats": 3, "budget": 30.0}


def wrong_by(factor):
    """The same train step with wrong gradients."""

    @jax.jit
    def step(params, opt_state, x, y):
        loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
        grads["w1"] = grads["w1"] * factor
        updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
        return jax.tree.map(jnp.add, params, updates), opt_state, loss

    return step


def test_equal_sides_agree_and_user_arguments_stay_alive(stand_in):
    stand_in()
    args = make_args()
    before = jax.tree.map(np.asarray, args)
    result = jaxext.ab(DONATING, *args, **QUICK)
    assert result.agrees
    assert result.losses_agree
    assert result.exit_code == 0
    assert 0.2 < result.ratio < 5
    assert result.interval[0] <= result.ratio <= result.interval[1]
    assert len(result.parity.reference_losses) >= 4
    assert result.parity.reference_losses[0] > result.parity.reference_losses[-1], "state was not fed back"
    assert {leaf.name for leaf in result.parity.leaves} >= {"params['w1']", "opt_state[0].mu['w1']"}
    jax.tree.map(np.testing.assert_array_equal, before, args)


@pytest.mark.parametrize("factor", [1.02, 0.0])
def test_a_wrong_gradient_fails_and_names_the_leaf(stand_in, factor):
    stand_in(lambda function: wrong_by(factor))
    result = jaxext.ab(DONATING, *make_args(), **QUICK, contributions=False)
    assert not result.agrees
    assert result.exit_code == 1
    assert any("leaf opt_state[0].mu['w1'] after step 1" in failure for failure in result.parity.failures)
    assert not any("['w2'] after step 1:" in failure for failure in result.parity.failures), "only the wrong leaf"
    assert "the results DIFFER" in str(result)


def test_a_gradient_summed_in_another_order_passes(stand_in):
    def reordered(params, opt_state, x, y):
        return train_step(params, opt_state, x[::-1], y[::-1])

    stand_in(lambda function: jax.jit(reordered))
    result = jaxext.ab(DONATING, *make_args(), **QUICK, contributions=False)
    assert result.agrees, result.parity.failures
    assert any(leaf.error > 0 for leaf in result.parity.leaves), "the sides should not be bit-identical here"


def test_a_plain_step_and_gradients_as_outputs(stand_in):
    stand_in()
    params, _, x, y = make_args()
    result = jaxext.ab(jax.value_and_grad(loss_fn), params, x, y, **QUICK)
    assert result.wiring.startswith("state: none, every step starts alike; loss: output[0]")
    assert {leaf.name for leaf in result.parity.leaves} == {f"output[1]['{name}']" for name in ("w1", "b1", "w2")}


def test_modules_step_in_place_on_equal_copies(stand_in):
    @nnx.jit
    def step(model, x):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - 1) ** 2))(model)
        nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(model), grads))
        return loss

    stand_in()
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    kernel = np.array(model.kernel[...])
    result = jaxext.ab(step, model, jnp.ones((4, 3)), **QUICK)
    assert result.agrees
    losses = result.parity.candidate_losses
    assert losses[1] < losses[0]
    np.testing.assert_array_equal(kernel, model.kernel[...])


def test_donated_arguments_that_are_not_fed_back_are_renewed(stand_in):
    stand_in()
    params, _, x, y = make_args()
    gradients = jax.jit(jax.value_and_grad(loss_fn), donate_argnums=0)
    host = LocalHost(Workload(gradients, (params, x, y)), seed=0, cold_traces=False)
    for side, kernels in (("reference", False), ("candidate", True)):
        host.open(side, Setting(kernels=kernels))
    bounds = []
    for _ in range(3):
        losses = [host.run(side)[1] for side in ("reference", "candidate")]
        assert losses[0] == losses[1]
        if not bounds:
            host.open_probe("probe", of="reference")
        host.run("probe")
        bounds.append([leaf.bound for leaf in host.compare("reference", "candidate", "probe")])
    assert bounds[0] == bounds[1] == bounds[2], "the probe starts from its own disturbed state every time"


def test_advance_makes_the_next_arguments(stand_in):
    stand_in()

    def advance(args, outputs):
        return (outputs["new"], args[1])

    @jax.jit
    def step(value, rate):
        return {"new": value * rate, "loss": jnp.sum(value)}

    result = jaxext.ab(step, jnp.ones(2), 0.5, **QUICK, advance=advance)
    assert result.parity.reference_losses[:3] == [2.0, 1.0, 0.5]


def test_contributions_leave_out_what_was_replaced(stand_in, monkeypatch):
    stand_in()
    excluded = []
    monkeypatch.setitem(
        vars(jaxext), "accelerate", lambda f, exclude=(), precision=None: excluded.append(tuple(exclude)) or f
    )
    result = jaxext.ab(DONATING, *make_args(), **QUICK)
    assert [row.name for row in result.contributions] == ["layer_norm"]
    assert ("layer_norm",) in excluded
    assert result.contributions[0].ratio is not None


def test_everything_is_json(stand_in):
    stand_in()
    found = json.loads(json.dumps(jaxext.ab(DONATING, *make_args(), **QUICK).to_dict()))
    assert found["agrees"] is True
    assert found["replacements"]["missed"][0]["reason"] == "the scores are used twice"
    assert found["reference"]["flops"] == 3 * 2 * 8 * 16 * 24 - 2 * 8 * 16 * 24 + 3 * 2 * 8 * 24 * 4


def test_settings_of_a_process_need_the_command(stand_in):
    stand_in()
    with pytest.raises(ValueError, match=r"Test them with the command: jaxext ab file\.py:factory --vs isa=v3"):
        jaxext.ab(DONATING, *make_args(), vs="isa=v3")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0: expected at least 1"),
        ({"repeats": 2}, "repeats=2: expected at least 3"),
        ({"budget": 0}, "budget=0: expected a positive number of seconds"),
        ({"vs": "fast"}, "--vs 'fast': 'fast' is no setting. Expected one of stock, jaxext, exclude=KERNEL"),
        ({"vs": "exclude=sorting"}, "unknown kernel 'sorting'. The kernels are attention"),
    ],
)
def test_bad_options_are_named(stand_in, options, message):
    stand_in()
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        jaxext.ab(DONATING, *make_args(), **options)


def test_a_step_that_is_no_function():
    with pytest.raises(TargetError, match="the step is of type int, not callable"):
        jaxext.ab(3)


def test_a_step_that_fails_on_stock_jax_is_the_users(stand_in):
    stand_in()
    with pytest.raises(StepError, match=r"fails on stock JAX: TypeError: .*Call step\(\*args\) yourself until it runs"):
        jaxext.ab(jax.jit(lambda x: x @ jnp.ones((5, 5))), jnp.ones(3), **QUICK)


def test_a_step_that_fails_under_jaxext_only_is_jaxexts(stand_in):
    def broken(function):
        @functools.wraps(function)
        @jax.jit
        def step(*args):
            raise RuntimeError("no such kernel")

        return step

    stand_in(broken)
    with pytest.raises(
        StepError, match="runs on stock JAX but fails under jaxext: RuntimeError: no such kernel"
    ) as info:
        jaxext.ab(DONATING, *make_args(), **QUICK)
    assert info.value.kernels
