"""Reports, and `explain`: what is replaced, missed and left to stock JAX, with the user's lines, nothing being run."""

import functools
import json
import threading

import jax
import jax.numpy as jnp
import optax
import pytest
import toy_attention as toy
from flax import nnx
from toy_attention import attend

import jaxext
from jaxext.rewrite.report import Entry, Report, RequirementError, check_required

X = jax.random.normal(jax.random.key(0), (3, 4))


@pytest.fixture(autouse=True)
def _toy(monkeypatch):
    toy.use(monkeypatch)


def loss(x):
    def body(carry, _):
        return jax.checkpoint(lambda c: attend(c, x, x))(carry), None

    return jax.lax.scan(body, x, None, length=2)[0].sum()


def test_an_entry_says_where():
    (entry,) = jaxext.explain(jax.grad(loss))(X).replaced
    assert entry.kernel == "attention" and entry.detail == "toy" and entry.dtype == "float32"
    assert entry.shapes == ("f32[3,4]",) * 3
    assert entry.location == "loss/scan/remat"
    assert "toy_attention.py" in entry.source and entry.source.endswith("(attend)")
    assert entry.reason == ""


def missing(x):
    return jax.nn.softmax(jnp.sin(x @ x.T), axis=-1) @ x


def test_near_misses_name_the_operation():
    (entry,) = jaxext.explain(missing)(X).missed
    assert entry.reason == "sin between the scores and the softmax"
    assert entry.source.startswith("tests/rewrite/test_report.py:") or "test_report.py:" in entry.source
    assert entry.source.endswith("(missing)")


def test_refusals_are_fall_backs():
    report = jaxext.explain(attend)(*[X.astype(jnp.float16)] * 3)
    (entry,) = report.fallbacks
    assert entry.reason == "float16 is left to stock JAX" and not report.replaced


def test_what_is_used_elsewhere_too_is_missed_in_a_forward_program():
    def forward(x):
        weights = jax.nn.softmax(jnp.einsum("qd,kd->qk", x, x), axis=-1)
        return weights @ x, weights

    report = jaxext.explain(forward)(X)
    assert not report.replaced
    assert report.missed[0].reason == (
        "values inside it are used elsewhere, so that stock JAX would have to compute them too"
    )


def test_a_matcher_that_fails_is_a_fall_back_and_no_crash(monkeypatch):
    def fails(root, graph):
        raise KeyError("axis")

    monkeypatch.setattr("jaxext.rewrite.hooks.PATTERNS", (type(toy.PATTERN)("attention", toy.PATTERN.roots, fails),))
    report = jaxext.explain(attend)(X, X, X)
    assert report.fallbacks[0].reason == "the matcher failed: KeyError: 'axis'"
    assert jnp.allclose(jaxext.accelerate(attend)(X, X, X), attend(X, X, X))


def nnx_step():
    model = nnx.Linear(4, 12, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(1e-2), wrt=nnx.Param)

    def objective(model, x):
        return attend(*jnp.split(model(x), 3, -1)).sum()

    def step(model, optimizer, x):
        value, gradients = nnx.value_and_grad(objective)(model, x)
        optimizer.update(model, gradients)
        return value

    return step, model, optimizer


@pytest.mark.parametrize("wrap", [lambda f: f, nnx.jit, lambda f: jaxext.accelerate(nnx.jit(f))])
def test_an_nnx_step_is_explained_without_taking_it(wrap):
    step, model, optimizer = nnx_step()
    before = model.kernel[...]
    (entry,) = jaxext.explain(wrap(step))(model, optimizer, X).replaced
    assert entry.location == "objective"
    assert (model.kernel[...] == before).all() and optimizer.step[...] == 0


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jaxext.accelerate])
def test_functions_plain_jitted_and_accelerated(wrap):
    function = wrap(lambda x: loss(x))
    for _ in range(2):
        assert [entry.kernel for entry in jaxext.explain(function)(X).replaced] == ["attention"]
    function(X)
    assert len(jaxext.explain(function)(X).replaced) == 1


def test_nothing_is_donated():
    step = functools.partial(jax.jit, donate_argnums=0)(lambda x: attend(x, x, x))
    jaxext.explain(step)(X)
    assert not X.is_deleted()


def test_arguments_that_are_no_arrays_are_passed_as_they_are():
    def step(state, mode, *, scale):
        assert mode == "train" and scale == 2 and state["name"] == "x"
        return attend(state["q"], state["q"], scale * state["q"])

    assert len(jaxext.explain(step)({"q": X, "name": "x"}, "train", scale=2).replaced) == 1


def test_shapes_will_do_for_arrays():
    shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
    assert len(jaxext.explain(attend)(shape, shape, shape).replaced) == 1


def test_python_that_looks_at_values_is_run_once_and_said_so():
    runs = []

    def step(x):
        gradient = jax.grad(lambda x: attend(x, x, x).sum())(x)
        runs.append(float(gradient.sum()))

    report = jaxext.explain(step)(X)
    assert len(runs) == 1 and len(report.replaced) >= 1
    assert "its Python looks at array values, so it was run once, on copies of the arguments" in report.notes


def test_requirements_and_strictness_do_not_stop_an_explanation(monkeypatch):
    required = jaxext.accelerate(missing, require="attention")
    assert len(jaxext.explain(required)(X).missed) == 1
    monkeypatch.setenv("JAXEXT_STRICT", "1")
    assert len(jaxext.explain(attend)(*[X.astype(jnp.float16)] * 3).fallbacks) == 1


def test_disabled_by_the_environment(monkeypatch):
    monkeypatch.setenv("JAXEXT_DISABLE", "1")
    report = jaxext.explain(attend)(X, X, X)
    assert report.notes == ["JAXEXT_DISABLE=1: everything runs on plain JAX"] and not report.replaced


def test_users_errors_come_through():
    with pytest.raises(ZeroDivisionError, match="mine"):
        jaxext.explain(lambda x: exec("raise ZeroDivisionError('mine')"))(X)
    with pytest.raises(TypeError, match=r"explain: fn is 3, expected a callable. Call it as jaxext.explain\(step\)\("):
        jaxext.explain(3)  # pyright: ignore


ENTRY = Entry("attention", ("f32[2,3]", "bf16[2,3]"), "float32", "train.py:7 (loss)", "loss/scan", detail="causal")


def test_a_report_reads_well():
    report = Report()
    assert str(report) == "nothing replaced"
    report.replaced += [ENTRY, ENTRY]
    report.fallbacks.append(Entry("", location="loss", reason="Python control flow"))
    report.notes.append("memory=system")
    assert str(report) == (
        "replaced (2):\n"
        "  2 x attention causal f32[2,3], bf16[2,3] in loss/scan at train.py:7 (loss)\n"
        "fell back to stock JAX (1):\n"
        "  whole function in loss: Python control flow\n"
        "note: memory=system"
    )
    assert repr(report) == "<Report: 2 replaced, 0 missed, 1 fell back>"


def test_a_report_as_plain_data():
    report = Report()
    report.replaced.append(ENTRY)
    data = json.loads(json.dumps(report.to_dict()))
    assert data["replaced"] == [
        {
            "kernel": "attention",
            "shapes": ["f32[2,3]", "bf16[2,3]"],
            "dtype": "float32",
            "source": "train.py:7 (loss)",
            "location": "loss/scan",
            "reason": "",
            "detail": "causal",
        }
    ]
    assert data["missed"] == data["fallbacks"] == data["notes"] == []


def test_a_requirement_holds_everywhere():
    report = Report()
    report.replaced.append(ENTRY)
    check_required(report, ("attention",))
    report.missed.append(Entry("attention", reason="tanh"))
    with pytest.raises(RequirementError, match="attention was not replaced everywhere:\n  attention: tanh"):
        check_required(report, ("attention",))


def test_collect_has_what_is_traced_inside_and_nothing_else():
    step = jaxext.accelerate(jax.grad(loss))
    with jaxext.collect() as outer:
        with jaxext.collect() as inner:
            step(X)
        jaxext.accelerate(missing)(X)
    jaxext.accelerate(lambda x: attend(x, x, x))(X)
    assert inner.kernels() == {"attention"} and not inner.missed
    assert len(outer.replaced) == len(inner.replaced) == 1 and len(outer.missed) == 1


def test_collect_leaves_out_what_is_compiled_already():
    step = jaxext.accelerate(jax.grad(loss))
    step(X)
    with jaxext.collect() as report:
        step(X)
        jax.jit(jax.grad(loss))(X)
    assert not report


def test_collect_has_what_other_threads_trace():
    with jaxext.collect() as report:
        thread = threading.Thread(target=jaxext.accelerate(jax.grad(loss)), args=(X,))
        thread.start()
        thread.join()
    assert report.kernels() == {"attention"}
