"""`jaxext run program` is `python program`, but for jaxext being installed."""

import os
import signal
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

from jaxext import _memory

RUN = [sys.executable, "-m", "jaxext", "run"]


def run(command, folder, **options):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAXEXT_")} | {"JAX_PLATFORMS": "cpu"}
    options.setdefault("stdin", subprocess.DEVNULL)
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, **options)


def write(folder: Path, name: str, source: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(source))
    return path


def assert_same(folder, arguments, **options):
    """The program prints and exits under `jaxext run` as under Python."""
    plain = run([sys.executable, *arguments], folder, **options)
    ours = run([*RUN, *arguments], folder, **options)
    assert (ours.returncode, ours.stdout, ours.stderr) == (plain.returncode, plain.stdout, plain.stderr)
    return ours


FACTS = """
    import sys
    print(sys.argv, sys.path[0], __name__, sorted(globals()), __package__, globals().get("__file__"))
    print(__spec__ and __spec__.name, sys.modules["__main__"].__dict__ is globals(), type(__builtins__))
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["train.py", "--steps", "3", "-m", "--report", "--", "-c"],
        ["sub/train.py"],
        ["-m", "package.train", "x"],
        ["-m", "package", "-c"],
        ["folder", "x"],
        ["archive.zip", "x"],
        ["-c", textwrap.dedent(FACTS), "x", "-c"],
        ["link.py"],
    ],
    ids=lambda a: " ".join(a).strip().splitlines()[0],
)
def test_a_program_sees_what_it_sees_under_python(tmp_path, arguments):
    for name in ("train.py", "sub/train.py", "package/train.py", "package/__main__.py", "folder/__main__.py"):
        write(tmp_path, name, FACTS)
    write(tmp_path, "package/__init__.py", "import sys; print(sys.argv)")
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr("__main__.py", textwrap.dedent(FACTS))
    (tmp_path / "link.py").symlink_to("sub/train.py")
    assert assert_same(tmp_path, arguments).returncode == 0


def test_a_program_is_read_from_standard_input(tmp_path):
    assert "['-', 'x']" in assert_same(tmp_path, ["-", "x"], stdin=None, input=textwrap.dedent(FACTS)).stdout


@pytest.mark.parametrize("statement", ["sys.exit()", "sys.exit(3)", "sys.exit('no data')", "raise SystemExit(None)"])
def test_exit_codes(tmp_path, statement):
    write(tmp_path, "p.py", f"import sys, atexit\natexit.register(print, 'bye')\n{statement}")
    assert_same(tmp_path, ["p.py"])


@pytest.mark.parametrize(
    "source",
    [
        "def f():\n    raise ValueError('bad')\nf()",
        "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise RuntimeError('later') from e",
        "import sys\nsys.excepthook = lambda *a: print('mine', a[0])\n1 / 0",
        "import threading\nthreading.Thread(target=lambda: 1 / 0).start()",
        "raise ExceptionGroup('several', [ValueError('one')])",
        "def f(:\n    pass",
        "import no_such_module",
    ],
)
@pytest.mark.parametrize("as_module", [False, True])
def test_tracebacks_show_the_program_only(tmp_path, source, as_module):
    write(tmp_path, "p.py", source)
    ours = run([*RUN, *(["-m", "p"] if as_module else ["p.py"])], tmp_path)
    plain = run([sys.executable, "p.py"], tmp_path)  # under -m Python shows frames of its own runpy
    hide = (lambda text: text.replace(" at 0x", "").split("Thread-")[0]) if "threading" in source else str
    assert (ours.returncode, hide(ours.stderr)) == (plain.returncode, hide(plain.stderr))
    assert ours.stdout == plain.stdout


def test_a_package_that_raises_shows_its_own_frames(tmp_path):
    write(tmp_path, "package/__init__.py", "1 / 0")
    ours = run([*RUN, "-m", "package.train"], tmp_path)
    assert ours.returncode == 1
    assert ours.stderr.splitlines()[1].strip().startswith(f'File "{tmp_path}/package/__init__.py", line 1')


def test_ctrl_c_ends_the_program_as_python_does(tmp_path):
    write(
        tmp_path,
        "p.py",
        """
        import atexit, os, signal
        # A job started in the background of a script inherits SIGINT ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        atexit.register(print, 'bye')
        os.kill(os.getpid(), signal.SIGINT)
        input()
        """,
    )
    ours = assert_same(tmp_path, ["p.py"])
    assert ours.returncode == -signal.SIGINT
    assert ours.stdout == "bye\n"


def test_classes_of_main_pickle_also_at_exit(tmp_path):
    write(
        tmp_path,
        "p.py",
        """
        import atexit, pickle
        class A: pass
        atexit.register(lambda: print(type(pickle.loads(pickle.dumps(A())))))
        print(type(pickle.loads(pickle.dumps(A()))))
        """,
    )
    assert assert_same(tmp_path, ["p.py"]).stdout == "<class '__main__.A'>\n" * 2


@pytest.mark.parametrize("first", ["import jaxext", "import jaxext.kernels", "from jaxext import numpy", "import jax"])
def test_jaxext_is_installed_before_the_program_uses_jax(tmp_path, first):
    write(tmp_path, "p.py", f"import sys\nassert 'jax' not in sys.modules\n{first}\nimport jaxext\n"
                            "print(jaxext.is_installed(), jaxext.numpy.ones(2).sum())")  # fmt: skip
    assert run([*RUN, "p.py"], tmp_path).stdout == "True 2.0\n"


def test_jax_variables_that_the_program_sets_count(tmp_path):
    write(tmp_path, "p.py", "import os\nos.environ['JAX_ENABLE_X64'] = '1'\nimport jax\nprint(jax.numpy.ones(2).dtype)")
    assert run([*RUN, "p.py"], tmp_path).stdout == "float64\n"


NO_KERNELS = """
    import concurrent.futures, multiprocessing

    def in_force():
        import jax, jaxext._memory
        return jaxext.is_installed(), jaxext._memory.state().memory

    if __name__ == "__main__":
        spawning = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawning) as children:
            print(in_force(), children.submit(in_force).result())
"""


@pytest.mark.skipif(bool(_memory.impossible()), reason=_memory.impossible())
def test_memory_can_be_reused_without_any_kernel_here_and_in_spawned_processes(tmp_path):
    write(tmp_path, "p.py", NO_KERNELS)
    assert run([*RUN, "--no-kernels", "p.py"], tmp_path).stdout == "(False, 'reuse') (False, 'reuse')\n"
    switched_off = run(["env", "JAXEXT_DISABLE=1", *RUN, "--no-kernels", "p.py"], tmp_path)
    assert switched_off.stdout == "(False, 'system') (False, 'system')\n"


def test_spawned_processes_have_it_installed_too(tmp_path):
    write(
        tmp_path,
        "p.py",
        """
        import multiprocessing, sys

        def child():
            import jax, jaxext
            return __name__, jaxext.is_installed(), sys.argv

        if __name__ == "__main__":
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(pool.apply(child))
        """,
    )
    assert run([*RUN, "p.py", "x"], tmp_path).stdout == "('__mp_main__', True, ['p.py', 'x'])\n"


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (
            ["nope.py"],
            2,
            "jaxext run: can't open file '{folder}/nope.py': [Errno 2] No such file or directory. "
            "Give the path of a script, -m module or -c code.",
        ),
        (
            ["-m", "nope"],
            1,
            "jaxext run: No module named nope. Give the name of a module as after import, without .py.",
        ),
        (
            ["-m", "nope.sub"],
            1,
            "jaxext run: No module named nope.sub. Give the name of a module as after import, without .py.",
        ),
        (
            ["-m", "email"],
            1,
            "jaxext run: No module named email.__main__. 'email' is a package without a __main__ to run.",
        ),
        (
            ["-m", "math"],
            1,
            "jaxext run: No code for module 'math': it is not written in Python.",
        ),
        (
            ["."],
            1,
            "jaxext run: can't find '__main__' module in '{folder}'. Give a script, or a folder with a __main__.py.",
        ),
        (
            [],
            2,
            "jaxext run: error: no program given: name a script, -m module, -c code, or - to read it from standard "
            "input",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_named_with_the_remedy(tmp_path, arguments, exit_code, message):
    ours = run([*RUN, *arguments], tmp_path)
    assert ours.stderr.splitlines()[-1] == message.format(folder=tmp_path)
    assert ours.returncode == exit_code
    if arguments:
        assert run([sys.executable, *arguments], tmp_path).returncode == exit_code


def test_an_unreadable_variable_ends_the_program_with_the_remedy(tmp_path):
    ours = subprocess.run(
        [*RUN, "-c", "import jax"],
        env=os.environ | {"JAXEXT_KERNELS": "-attentoin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ours.returncode == 2
    assert ours.stderr == (
        "jaxext run: JAXEXT_KERNELS: unknown kernel 'attentoin'. The kernels are attention, layer_norm, rms_norm, "
        "group_norm, linear_recurrence, softmax_cross_entropy, linear_cross_entropy, matmul, top_k, sort, argmax, "
        "cumsum, gather, scatter, random_bits, convolution, max_pool, recurrence, elementwise.\n"
    )
