"""Installs jaxext when the program imports JAX: not before, so that the JAX_* variables a program sets still count."""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _NotifyingLoader(Loader):
    """The module's own loader, with a word to the watcher before and after the module runs."""

    def __init__(self, loader: Loader, watcher: "_ImportWatcher") -> None:
        self._loader = loader
        self._watcher = watcher

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        # The module sees its own loader, for its resources and its source.
        module.__loader__ = module.__spec__.loader = self._loader
        with self._watcher:
            self._loader.exec_module(module)


class _ImportWatcher(MetaPathFinder):
    """Calls `ready` once, when JAX is imported and none of jaxext's own modules is half-way through its import."""

    def __init__(self, ready: Callable[[], None]) -> None:
        self._ready = ready
        self._depth = 0

    def __enter__(self) -> None:
        self._depth += 1

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._depth -= 1
        if kind is None and self._depth == 0 and "jax" in sys.modules and self in sys.meta_path:
            sys.meta_path.remove(self)
            self._ready()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "jax" and not fullname.startswith("jaxext."):
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec = find(fullname, path, target) if find is not None else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _NotifyingLoader(spec.loader, self)
                return spec
        return None


def _put_in_force(memory: str, kernels: bool) -> None:
    try:
        from jaxext import _install, _settings

        if kernels:
            _install.install(memory=memory)
        elif _settings.from_environment() is not None:
            _install.use_memory(memory)
    except ImportError as error:  # a JAX that jaxext does not fit
        print(f"jaxext run: {error} The program runs on plain JAX.", file=sys.stderr)
    except ValueError as error:  # a JAXEXT_* variable that cannot be read
        print(f"jaxext run: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def install_with_jax(memory: str, kernels: bool = True, then: Callable[[], None] = lambda: None) -> None:
    """Arranges that jaxext is installed by the time `import jax` returns, here and in spawned child processes.

    Args:
      memory: as of `jaxext.install`.
      kernels: False: only `memory` is put in force.
      then: called after the installation.
    """

    def ready() -> None:
        _put_in_force(memory, kernels)
        then()

    if "jax" in sys.modules:
        ready()
    else:
        sys.meta_path.insert(0, _ImportWatcher(ready))
    _install_in_spawned_children(memory, kernels)


class _ChildSetup:
    """Unpickled by a child process of multiprocessing before it imports the program's `__main__`."""

    def __init__(self, memory: str, kernels: bool) -> None:
        self._arguments = memory, kernels

    def __reduce__(self) -> tuple[Callable[[str, bool], None], tuple[str, bool]]:
        return install_with_jax, self._arguments


def _install_in_spawned_children(memory: str, kernels: bool) -> None:
    from multiprocessing import spawn

    prepare = spawn.get_preparation_data

    def get_preparation_data(name: str) -> dict[str, Any]:
        return {"jaxext": _ChildSetup(memory, kernels), **prepare(name)}

    spawn.get_preparation_data = get_preparation_data
