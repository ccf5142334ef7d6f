"""Memory reuse: what it sets, when it says so, and what it costs."""

import json
import os
import subprocess
import sys

import pytest

from jaxext import _memory

LATE = (
    "memory reuse came too late to take full effect: JAX's CPU threads were already running. "
    "Call jaxext.install() before the first computation, or start the program with `jaxext run`."
)
glibc = pytest.mark.skipif(_memory.state().allocator.split()[0] != "glibc", reason="needs glibc")


def fresh(source, **environment):
    """The last line that `source` prints in a process of its own, as JSON."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"import json, jaxext._memory as m\n{source}"],
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("memory", ["resue", "", None])
def test_an_unknown_setting_names_the_known_ones(memory):
    with pytest.raises(ValueError, match=f"^memory must be 'reuse' or 'system', not {memory!r}\\.$"):
        _memory.apply(memory)


@glibc
def test_reuse_before_jax_has_nothing_to_say():
    assert fresh("print(json.dumps([m.apply('reuse'), m.apply('reuse'), m.state().memory]))") == ["", "", "reuse"]


@glibc
def test_reuse_after_import_but_before_the_first_computation_has_nothing_to_say():
    assert fresh("import jax; print(json.dumps(m.apply('reuse')))") == ""


@glibc
def test_late_reuse_says_so():
    late = "import jax; jax.numpy.ones(2); print(json.dumps([m.apply('reuse'), str(m.state())]))"
    note, text = fresh(late)
    assert note == LATE and text.endswith(LATE)


@glibc
def test_reuse_switched_off_and_on_again_is_not_late():
    source = "m.apply('reuse'); import jax; jax.numpy.ones(2); print(json.dumps([m.apply('system'), m.apply('reuse')]))"
    assert fresh(source) == ["", ""]


# Buffers of changing sizes, written and dropped: 100 MB a step. Enough steps that the few in which a buffer is still
# held while the next is made (the heap grows then, once) do not decide.
STEPS = """
import resource, jax, numpy as np
add = jax.jit(lambda x: x + 1)
sizes = np.random.default_rng(0).choice([4, 6, 8, 12], 48) << 20
for n in {*sizes.tolist()}: add(np.ones(n, np.float32)).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for n in sizes: add(jax.numpy.ones(n)).block_until_ready()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
"""


@glibc
def test_reuse_saves_page_faults_and_release_gives_memory_back():
    stock = fresh(f"{STEPS}\nprint(json.dumps(faults))")
    faults, kept, released, left = fresh(
        f"m.apply('reuse')\n{STEPS}\n"
        "kept = m.state().kept; print(json.dumps([faults, kept, m.release_memory(), m.state().resident]))"
    )
    # Each step of stock JAX faults its two buffers in again; reused ones are there.
    assert faults < stock / 4
    assert kept > 20 << 20 and released > kept / 2
    assert left < 600 << 20


@glibc
def test_system_restores_returning_memory():
    freed = fresh(
        "m.apply('reuse'); m.apply('system')\nimport jax, numpy as np\n"
        "x = jax.numpy.ones(1 << 26).block_until_ready(); full = m.state().resident; x.delete(); del x\n"
        "print(json.dumps(full - m.state().resident))"
    )
    assert freed > 200 << 20


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (
            "import sys; sys.platform = 'darwin'",
            "memory reuse needs Linux with glibc; the system's own behaviour is kept",
        ),
        (
            "import ctypes, types; m.ctypes = types.SimpleNamespace(CDLL=lambda name: object())",
            "memory reuse needs glibc; the system's own behaviour is kept",
        ),
    ],
    ids=["not Linux", "not glibc"],
)
def test_where_it_cannot_work_it_says_so_and_does_nothing(break_it, reason):
    source = f"{break_it}\nprint(json.dumps([m.apply('reuse'), m.state().memory, m.state().note, m.release_memory()]))"
    assert fresh(source) == [reason, "system", reason, 0]


def test_another_allocator_is_noticed(tmp_path):
    source = tmp_path / "malloc.c"
    source.write_text(
        "#include <stddef.h>\nvoid* __libc_malloc(size_t);\nvoid* malloc(size_t n){return __libc_malloc(n);}"
    )
    library = tmp_path / "other.so"
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs a C compiler")
    reason = f"malloc comes from {library}, which memory reuse does not tune"
    assert fresh("print(json.dumps(m.apply('reuse')))", LD_PRELOAD=str(library)) == reason


@pytest.mark.parametrize(
    ("tunables", "asks"),
    [("", False), ("glibc.malloc.hugetlb=1", True), ("glibc.malloc.check=0:glibc.malloc.hugetlb=2", True)],
)
def test_huge_page_tunables_are_read(tunables, asks):
    assert fresh("print(json.dumps(m.state().huge_pages_tunable))", GLIBC_TUNABLES=tunables) is asks
