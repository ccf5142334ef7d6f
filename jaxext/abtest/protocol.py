"""What is put to the test: a step and its arguments, found by `file.py:factory`.

The protocol is one function without parameters in an ordinary Python file:

    def factory():
        return step, args                # or: step, args, advance

`step` is the user's own train step, jitted or plain; `args` is the tuple (or list) of its arguments. The step is
called again and again. An output that equals a leading argument in tree structure, shapes and dtypes is the next
call's argument (`params, opt_state, loss = step(params, opt_state, batch)`), flax.nnx modules among the arguments
change in place, and the first remaining scalar float is the loss. Where that does not fit, `advance(args, outputs)`
returns the next call's arguments.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, cast

Advance = Callable[[tuple[Any, ...], Any], tuple[Any, ...]]

EXPECTED = "expected (step, args) or (step, args, advance), args a tuple of the step's arguments"


class TargetError(ValueError):
    """The thing to test cannot be loaded or does not keep to the protocol. The message says how to mend it."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """A step and its first arguments. `name` is what reports call it."""

    step: Callable[..., Any]
    args: tuple[Any, ...]
    advance: Advance | None = None
    name: str = "step"


def parse_target(target: str) -> tuple[Path, str | None]:
    """Split `file.py:factory` into an existing file and a name; a bare `file.py` has no name.

    Raises:
      TargetError: no such file, or an empty factory name.
    """
    text, separator, factory = target.rpartition(":")
    if not separator:
        text, factory = target, None
    elif not factory.isidentifier():
        raise TargetError(
            f"target {target!r}: {factory!r} is not the name of a function. Write file.py:factory to test a step, "
            "file.py to test the whole program."
        )
    path = Path(text)
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise TargetError(f"target {target!r}: the file {text!r} {kind}. Give the path of a Python file.")
    return path.resolve(), factory


def load(path: Path, factory: str) -> Workload:
    """Import `path` as a script would be (its folder first on sys.path) and call `factory()`.

    Raises:
      TargetError: no such function, or one that returns something else than the protocol says.
      Exception: whatever the user's file or factory raises, unchanged.
    """
    function = getattr(load_module(path), factory, None)
    if function is None:
        raise TargetError(
            f"factory {factory!r}: {path.name} has no such function. "
            "Define it at the top level: def factory(): return step, args"
        )
    if not callable(function):
        raise TargetError(
            f"factory {factory!r} in {path.name} is of type {type(function).__name__}, expected a function without "
            "parameters that returns (step, args)."
        )
    return check(function(), f"{path.name}:{factory}")


def check(returned: Any, name: str) -> Workload:
    """Turn what a factory returned into a Workload.

    Raises:
      TargetError: it is not (step, args) or (step, args, advance).
    """
    if not isinstance(returned, tuple) or len(returned) not in (2, 3):
        got = type(returned).__name__
        if isinstance(returned, tuple):
            got = f"a tuple of {len(returned)}"
        raise TargetError(f"{name} returned {got}, {EXPECTED}.")
    step, args = returned[:2]
    advance = returned[2] if len(returned) == 3 else None
    if not callable(step):
        raise TargetError(f"{name}: the step is of type {type(step).__name__}, not callable; {EXPECTED}.")
    if not isinstance(args, (tuple, list)):
        raise TargetError(
            f"{name}: args is of type {type(args).__name__}, {EXPECTED}. A single argument is written (argument,)."
        )
    if advance is not None and not callable(advance):
        raise TargetError(f"{name}: advance is of type {type(advance).__name__}, not callable; {EXPECTED}.")
    return Workload(step, tuple(args), cast("Advance | None", advance), name)


def load_module(path: Path) -> ModuleType:
    """Run a file as a module of its name, its folder first on sys.path.

    Raises:
      TargetError: not a Python file.
    """
    folder = str(path.parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise TargetError(f"target {str(path)!r}: not a Python file. Give a path that ends in .py.")
    module = importlib.util.module_from_spec(spec)
    # Classes of the file are looked up by module name (dataclasses, pickle), so it must be findable while it runs.
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
