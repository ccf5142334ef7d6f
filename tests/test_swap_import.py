"""`import jaxext as jax`: JAX's own objects under another name, but for `jit`."""

import importlib
import importlib.util
import inspect
import os
import pickle
import pkgutil
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy
import pytest

import jaxext

OWN = {
    "Report", "ab", "abtest", "accelerate", "cli", "collect", "disabled", "explain", "install", "is_installed",
    "kernels", "pipeline", "pipelining", "release_memory", "rewrite", "uninstall",
}  # fmt: skip


def fresh(source):
    """What `source` prints in a process of its own."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def public_submodules():
    """Names of all public submodules of the installed JAX, such as `numpy.linalg`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in pkgutil.walk_packages(jax.__path__, "jax.", onerror=lambda name: None):
            name = module.name.removeprefix("jax.")
            if not any(part.startswith("_") for part in name.split(".")):
                yield name


SUBMODULES = sorted(public_submodules())


def import_or_error(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name), None
        except Exception as error:  # an optional dependency that is not there
            return None, error


def test_every_public_name_is_jaxs_own_object():
    names = [name for name in dir(jax) if not name.startswith("_")]
    assert len(names) > 100
    different = [name for name in names if getattr(jaxext, name) is not getattr(jax, name)]
    assert different == ["jit"]
    assert set(names) <= set(dir(jaxext))


@pytest.mark.parametrize("name", SUBMODULES)
def test_every_public_submodule_is_jaxs_own_module(name):
    original, error = import_or_error(f"jax.{name}")
    alias, alias_error = import_or_error(f"jaxext.{name}")
    assert (type(alias_error), str(alias_error)) == (type(error), str(error))
    assert alias is original
    if original is not None:
        assert original.__spec__ is not None and original.__spec__.name == f"jax.{name}"


def test_submodules_are_found_at_all():
    assert len(SUBMODULES) > 100
    assert {"numpy.linalg", "experimental.sparse", "scipy.special", "nn.initializers", "sharding"} <= set(SUBMODULES)


def test_jaxexts_own_names_hide_none_of_jaxs():
    jaxs = {name for name in dir(jax) if not name.startswith("_")} | {name.split(".")[0] for name in SUBMODULES}
    assert not jaxs & OWN
    own = {m.name for m in pkgutil.iter_modules(jaxext.__path__)} | set(vars(jaxext)["_OWN"])
    assert {name for name in own if not name.startswith("_")} == OWN | {"jit"}


def test_import_alone_neither_imports_nor_changes_jax():
    assert fresh("import sys, jaxext; print([m for m in sys.modules if m.split('.')[0] in ('jax', 'jaxlib')])") == "[]"
    changed = fresh(
        "import jax; vjp = jax.vjp.__closure__; before = dict(vars(jax)), [c.cell_contents for c in vjp];"
        "import jaxext; print((dict(vars(jax)), [c.cell_contents for c in vjp]) == before)"
    )
    assert changed == "True"


@pytest.mark.parametrize("probe", ["__wrapped__", "__file__", "__path__", "__signature__", "__len__"])
def test_probing_for_special_names_does_not_import_jax(probe):
    assert fresh(f"import sys, jaxext; hasattr(jaxext, {probe!r}); print('jax' in sys.modules)") == "False"


@pytest.mark.parametrize("own", ["cli", "_memory"])
def test_jaxexts_own_modules_come_without_jax(own):
    assert fresh(f"import sys; from jaxext import {own}; print('jax' in sys.modules, {own}.__name__)") == (
        f"False jaxext.{own}"
    )


STATEMENTS = {
    "import jaxext as j; print(j.numpy is jax.numpy)",
    "import jaxext.numpy as j; print(j is jax.numpy)",
    "import jaxext.numpy.linalg as j; print(j is jax.numpy.linalg)",
    "from jaxext import nn, lax, random; print(nn is jax.nn and lax is jax.lax and random is jax.random)",
    "from jaxext import grad, vmap as v; print(grad is jax.grad and v is jax.vmap)",
    "from jaxext.experimental import sparse; import jax.experimental.sparse; print(sparse is jax.experimental.sparse)",
    "import jaxext.experimental.pjit as j; import jax.experimental.pjit; print(j is jax.experimental.pjit)",
    "import jaxext.scipy.special as j; import jax.scipy.special; print(j is jax.scipy.special)",
    "from jaxext.sharding import PartitionSpec as P; print(P is jax.sharding.PartitionSpec)",
    "from jaxext.nn.initializers import zeros as z; import jax.nn; print(z is jax.nn.initializers.zeros)",
    "from jaxext import *; print(vmap is jax.vmap and callable(accelerate) and jit is not jax.jit)",
    "import jaxext; print(jaxext.numpy.ones(2).sum() == 2 and jaxext.tree.map(lambda x: -x, [1]) == [-1])",
}


@pytest.mark.parametrize("statement", sorted(STATEMENTS))
@pytest.mark.parametrize("jax_first", [True, False])
def test_import_statements(statement, jax_first):
    first, second = ("import jax", "0") if jax_first else ("0", "import jax")
    lines = statement.split("; ", 1)
    assert fresh(f"{first}\n{lines[0]}\n{second}\n{lines[1]}") == "True"


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("import jaxext.nope", "No module named 'jaxext.nope'"),
        ("import jaxext.numpy.nope", "No module named 'jaxext.numpy.nope'"),
        ("import jaxext.random.nope", "No module named 'jaxext.random.nope'; 'jaxext.random' is not a package"),
        ("from jaxext import nope", f"cannot import name 'nope' from 'jaxext' ({jaxext.__file__})"),
    ],
)
def test_what_jax_does_not_have_cannot_be_imported(statement, message):
    with pytest.raises(ImportError) as caught:
        exec(statement, {})
    assert str(caught.value) == message


def test_missing_attributes_are_named_as_jaxexts():
    with pytest.raises(AttributeError) as caught:
        jaxext.nump  # noqa: B018
    assert str(caught.value) == "module 'jaxext' has no attribute 'nump'"
    assert caught.value.obj is jaxext and caught.value.name == "nump"  # Python's "Did you mean" needs them


def test_what_is_patched_in_jax_is_seen(monkeypatch):
    marker = object()
    monkeypatch.setattr(jax, "vmap", marker)
    assert jaxext.vmap is marker


def test_an_alias_does_not_rebind_what_a_package_made_of_its_submodule(tmp_path, monkeypatch):
    """A package may replace its submodule's name by a function, `from .shard import shard`."""
    package = tmp_path / "shadowing"
    package.mkdir()
    (package / "__init__.py").write_text("from jax.shadowing.inner import inner\n")
    (package / "inner.py").write_text("def inner(): return 1\n")
    monkeypatch.setattr(jax, "__path__", [*jax.__path__, str(tmp_path)])
    importlib.import_module("jaxext.shadowing.inner")
    assert callable(sys.modules["jax.shadowing"].inner)


def test_special_names():
    assert jaxext.__name__ == "jaxext" and jaxext.__version_info__ == jax.__version_info__
    pyproject = Path(jaxext.__file__).parents[1] / "pyproject.toml"
    if pyproject.exists():
        assert f'version = "{jaxext.__version__}"' in pyproject.read_text()


def test_find_spec_and_reload():
    import jaxext.image as image

    assert importlib.util.find_spec("jaxext.image") is jax.image.__spec__
    spec = importlib.util.find_spec("jaxext.experimental.ode")
    assert spec is not None and spec.origin == importlib.util.find_spec("jax.experimental.ode").origin
    assert importlib.util.find_spec("jaxext.nope") is None
    assert importlib.reload(image) is jax.image and jax.image.__spec__.name == "jax.image"
    finders = len(sys.meta_path)
    assert importlib.reload(jaxext) is jaxext and len(sys.meta_path) == finders
    assert jaxext.numpy is jax.numpy


def test_pkgutil_lists_and_imports_aliased_packages():
    import jaxext.scipy

    names = [m.name for m in pkgutil.iter_modules(jaxext.scipy.__path__, "jaxext.scipy.")]
    assert "jaxext.scipy.special" in names
    assert importlib.import_module("jaxext.scipy.special") is jax.scipy.special


def test_pickle_and_isinstance():
    import jaxext.numpy as jnp

    x = jnp.arange(3)
    assert isinstance(x, jaxext.Array) and isinstance(x, jax.Array)
    assert (pickle.loads(pickle.dumps(x)) == x).all()
    for name in ("jit", "accelerate", "ShapeDtypeStruct"):
        assert pickle.loads(pickle.dumps(getattr(jaxext, name))) is getattr(jaxext, name)
    assert b"jaxext" not in pickle.dumps(jaxext.sharding.PartitionSpec("x"))


def test_a_module_of_jax_runs_as_main():
    done = subprocess.run([sys.executable, "-m", "jaxext.version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


STUBS = Path(__file__).parent.parent / "jaxext-stubs"


@pytest.mark.parametrize("stub", sorted(STUBS.rglob("*.pyi")), ids=lambda stub: str(stub.relative_to(STUBS)))
def test_a_stub_names_the_module_that_the_import_gives(stub):
    name = ".".join(stub.relative_to(STUBS).with_suffix("").parts).removesuffix(".__init__")
    assert stub.read_text() == f"from jax.{name} import *\n"
    assert importlib.import_module(f"jaxext.{name}") is importlib.import_module(f"jax.{name}")


def test_every_public_module_of_jaxs_top_level_has_a_stub():
    unlisted = {"cloud_tpu_init", "collect_profile", "example_libraries", "experimental", "extend", "interpreters"}
    unlisted |= {"lib", "monitoring", "test_util", "tools", "version"}
    public = {module.name for module in pkgutil.iter_modules(jax.__path__) if not module.name.startswith("_")}
    assert {path.stem for path in STUBS.iterdir()} - {"py"} >= public - unlisted


# ---------------------------------------------------------------- jit


def test_jit_is_used_as_jax_jit_is():
    @jaxext.jit
    def plain(x):
        return x + 1

    @jaxext.jit(static_argnums=1, donate_argnums=0)
    def with_options(x, n):
        return x * n

    assert plain(1.0) == 2.0 and with_options(jax.numpy.ones(()), 3) == 3.0
    assert jaxext.jit(lambda x, n: x * n, static_argnames="n")(2.0, n=3) == 6.0
    assert plain.lower(1.0).compile()(1.0) == 2.0


def test_jit_has_jax_jits_signature_and_name():
    assert inspect.signature(jaxext.jit) == inspect.signature(jax.jit)
    assert (jaxext.jit.__module__, jaxext.jit.__qualname__) == ("jaxext", "jit")


@pytest.mark.parametrize(("args", "options"), [((None,), {}), ((3,), {}), ((len, 1), {}), ((len,), {"require": ()})])
def test_jit_refuses_what_jax_jit_refuses_in_its_words(args, options):
    with pytest.raises(Exception) as expected:  # noqa: PT011
        jax.jit(*args, **options)
    with pytest.raises(type(expected.value)) as caught:
        jaxext.jit(*args, **options)
    assert str(caught.value) == str(expected.value)
