"""The swap-in import: `import jaxext as jax`, `import jaxext.numpy as jnp`, `from jaxext import nn, lax`.

Attributes and submodules that jaxext does not own are the installed JAX's, the very same objects. JAX itself is
imported when the first of them is touched, never by `import jaxext`: what must happen ahead of JAX's threads and
ahead of its configuration (memory reuse, JAX_* variables set by the program) still can.
"""

import functools
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import InspectLoader, Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any

_PACKAGE = "jaxext"
_ORIGINAL = "jax"
# The only special name that is JAX's to answer; any other is a probe (pickle, inspect) that must not import JAX.
_FORWARDED_SPECIAL = frozenset({"__version_info__"})


class _AliasLoader(Loader):
    """Loads `jaxext.numpy` by putting the module `jax.numpy` itself under that name."""

    def __init__(self, original: ModuleSpec) -> None:
        self._original = original

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        assert spec is not None
        target = importlib.import_module(self._original.name)
        # The import system takes what it finds under the name afterwards, so JAX's module keeps its own __spec__.
        sys.modules[spec.name] = target
        _alias_loaded_children(spec.name, self._original.name)

    def get_code(self, fullname: str) -> CodeType | None:
        """Code for `python -m jaxext.tools.…`, which runs JAX's module as `__main__`."""
        loader = self._original.loader
        return loader.get_code(self._original.name) if isinstance(loader, InspectLoader) else None


def _alias_loaded_children(alias: str, original: str) -> None:
    """Names the submodules that a package loaded itself: importing them later would rebind the package's attributes."""
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{original}.") and module is not None:
            sys.modules.setdefault(alias + name.removeprefix(original), module)


class _AliasFinder(MetaPathFinder):
    """Answers for `jaxext.*` alone, and there only for what jaxext does not own."""

    def _is_alias(self, name: str) -> bool:
        package, _, rest = name.partition(".")
        first = rest.partition(".")[0]
        return package == _PACKAGE and bool(rest) and not first.startswith("_") and first not in _own_modules()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not self._is_alias(fullname):
            return None
        original = importlib.util.find_spec(_ORIGINAL + fullname.removeprefix(_PACKAGE))
        if original is None:
            return None
        package = original.submodule_search_locations is not None
        spec = ModuleSpec(fullname, _AliasLoader(original), origin=original.origin, is_package=package)
        if package:
            spec.submodule_search_locations = list(original.submodule_search_locations or ())
        return spec


@functools.cache
def _own_modules() -> frozenset[str]:
    return frozenset(module.name for module in pkgutil.iter_modules(sys.modules[_PACKAGE].__path__))


def install_finder() -> None:
    """Puts the finder of `jaxext.*` aliases first, once: JAX's files lie on the path of an aliased package, and the
    ordinary finder would load a second copy of them."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__qualname__ != _AliasFinder.__qualname__]
    sys.meta_path.insert(0, _AliasFinder())


def _public_names(module: ModuleType) -> list[str]:
    return [name for name in vars(module) if not name.startswith("_")]


def _from_jax(name: str) -> Any:
    jax = importlib.import_module(_ORIGINAL)
    try:
        return getattr(jax, name)
    except AttributeError as error:
        text = str(error).replace(f"module {_ORIGINAL!r}", f"module {_PACKAGE!r}")
        raise AttributeError(text, name=name, obj=sys.modules[_PACKAGE]) from None


def namespace(
    own: Mapping[str, str], module_globals: dict[str, Any]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of the package.

    own: where each name of jaxext's own lives, `{"install": "jaxext._install"}`; they win over JAX's and are kept in
    `module_globals` once loaded. JAX's are looked up each time, so that a patched `jax.X` is seen as `jaxext.X` too.
    """

    def __getattr__(name: str) -> Any:
        if name == "__all__":
            return sorted({*own, *_public_names(importlib.import_module(_ORIGINAL))})
        if name.startswith("__") and name.endswith("__") and name not in _FORWARDED_SPECIAL:
            raise AttributeError(f"module {_PACKAGE!r} has no attribute {name!r}", name=name, obj=sys.modules[_PACKAGE])
        if name in own:
            module_globals[name] = getattr(importlib.import_module(own[name]), name)
            return module_globals[name]
        # `from jaxext import cli` asks for the attribute before it imports the module.
        return importlib.import_module(f"{_PACKAGE}.{name}") if name in _own_modules() else _from_jax(name)

    def __dir__() -> list[str]:
        return sorted({*module_globals, *own, *dir(importlib.import_module(_ORIGINAL))})

    return __getattr__, __dir__
