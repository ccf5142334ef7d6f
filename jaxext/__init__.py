"""jaxext: JAX on faster kernels, without changing the program.

`jaxext.accelerate` is used in place of `jax.jit`; `jaxext.install()` and `jaxext run` switch a whole process;
`import jaxext as jax` swaps the import. Importing this package changes nothing in JAX and does not import it.
"""

from typing import TYPE_CHECKING

from jaxext import _swap

if TYPE_CHECKING:
    # Editors complete JAX's names under `import jaxext as jax`.
    from jax import *  # noqa: F403  # pyright: ignore[reportWildcardImportFromLibrary]

    from jaxext import kernels as kernels
    from jaxext._accelerate import accelerate as accelerate
    from jaxext._explain import explain as explain
    from jaxext._install import disabled as disabled
    from jaxext._install import install as install
    from jaxext._install import is_installed as is_installed
    from jaxext._install import uninstall as uninstall
    from jaxext._memory import release_memory as release_memory
    from jaxext._pipeline import pipeline as pipeline
    from jaxext.abtest import ab as ab
    from jaxext.rewrite.report import Report as Report
    from jaxext.rewrite.report import collect as collect

__version__ = "0.1.0"

_OWN = {
    "Report": "jaxext.rewrite.report",
    "ab": "jaxext.abtest",
    "accelerate": "jaxext._accelerate",
    "collect": "jaxext.rewrite.report",
    "disabled": "jaxext._install",
    "explain": "jaxext._explain",
    "install": "jaxext._install",
    "is_installed": "jaxext._install",
    "jit": "jaxext._jit",
    "pipeline": "jaxext._pipeline",
    "release_memory": "jaxext._memory",
    "uninstall": "jaxext._install",
}

_swap.install_finder()
__getattr__, __dir__ = _swap.namespace(_OWN, globals())
