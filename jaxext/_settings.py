"""What is switched on, in one value that is part of JAX's jit cache key.

The switch is a JAX user context: a function traced under one setting is never taken from the cache for another, so
turning jaxext on, off and on again gives no stale program.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import jax

KERNELS = (
    "attention",
    "layer_norm",
    "rms_norm",
    "group_norm",
    "linear_recurrence",
    "softmax_cross_entropy",
    "linear_cross_entropy",
    "matmul",
    "top_k",
    "sort",
    "argmax",
    "cumsum",
    "gather",
    "scatter",
    "random_bits",
    "convolution",
    "max_pool",
    "recurrence",
    "elementwise",
)


PRECISIONS = ("fp8",)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of one scope.

    `exclude`: kernels not to use. `require`: kernels whose absence is an error. `strict`: any fall-back is an error.
    `precision`: "fp8" for matrix products in eight bits, None as the program says.
    `probe` keeps the traces of one `explain` apart from all others; it reports, so it enforces nothing.
    """

    exclude: frozenset[str] = frozenset()
    require: tuple[str, ...] = ()
    strict: bool = False
    probe: int = 0
    precision: str | None = None

    def __hash__(self) -> int:
        return self._hash

    def __post_init__(self) -> None:
        # Hashed on every dispatch of a jitted function: once is enough.
        object.__setattr__(self, "_hash", hash(self._key()))

    _hash: int = dataclasses.field(default=0, init=False, repr=False, compare=False)

    def _key(self) -> tuple[Any, ...]:
        return self.exclude, self.require, self.strict, self.probe, self.precision

    def __reduce__(self) -> tuple[Any, ...]:
        # Hashes of names differ from process to process.
        return Settings, self._key()

    def inside(self, outer: Settings | None) -> Settings:
        """These settings in the scope of `outer`: what either switches off is off, and a precision holds inside too."""
        if outer is None:
            return self
        probe = self.probe or outer.probe
        return Settings(
            exclude=self.exclude | outer.exclude,
            require=() if probe else self.require,
            strict=not probe and (self.strict or outer.strict),
            probe=probe,
            precision=self.precision or outer.precision,
        )


class _Off:
    """The setting of `disabled`: unlike no setting at all, it also keeps an accelerated function from switching on."""

    def __repr__(self) -> str:
        return "off"


OFF = _Off()
SCOPE_OFF = "jaxext.off"
SCOPE_FP8 = "jaxext.fp8"


def scope_without(kernels: Iterable[str]) -> str:
    """The name scope of code in which `kernels` are not to be used."""
    return ".".join(("jaxext.without", *sorted(kernels)))


class _InForce:
    """Settings as the context holds them: a call of a jitted function compares them by identity, without Python."""

    __slots__ = ("settings",)

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def __repr__(self) -> str:
        return repr(self.settings)


@functools.lru_cache(maxsize=1024)
def _in_force(settings: Settings) -> _InForce:
    return _InForce(settings)


_context = jax.make_user_context(None)


def current() -> Settings | None:
    """The settings in force in this thread, None where jaxext is off."""
    value = _context.value
    return value.settings if isinstance(value, _InForce) else None


def is_unset() -> bool:
    """True where neither settings nor `disabled` are in force."""
    return _context.value is None


def is_off() -> bool:
    """True inside `disabled`."""
    return _context.value is OFF


@contextmanager
def use(settings: Settings | None) -> Iterator[None]:
    """`settings` are in force inside, None: jaxext is off, accelerated functions included."""
    with _context(OFF if settings is None else _in_force(settings)):
        yield


def entering(settings: Settings) -> Any:
    """`use(settings)` for a hot path: no generator, no checks."""
    return _context(_in_force(settings))


@contextmanager
def within(settings: Settings, outer: Settings | None) -> Iterator[None]:
    """`settings` in a function that may be traced as part of another one, which has `outer`.

    The name scopes tell the rewriting of the whole what this part of it leaves out, and what it multiplies in.
    """
    merged = settings.inside(outer)
    left_out = merged.exclude - outer.exclude if outer is not None else frozenset()
    in_eight_bits = outer is not None and merged.precision != outer.precision
    without = jax.named_scope(scope_without(left_out)) if left_out else nullcontext()
    with entering(merged), without, jax.named_scope(SCOPE_FP8) if in_eight_bits else nullcontext():
        yield


def set_everywhere(settings: Settings | None) -> None:
    """The settings of all threads, where no `use` is in force."""
    _context.set_global(None if settings is None else _in_force(settings))


def everywhere() -> Settings | None:
    value = _context.get_global()
    return value.settings if isinstance(value, _InForce) else None


def checked_kernels(names: str | Iterable[str], argument: str) -> tuple[str, ...]:
    """`names` as a tuple.

    Raises:
      ValueError: a name that is no kernel, with the kernels there are.
    """
    listed = (names,) if isinstance(names, str) else tuple(names)
    for name in listed:
        if name not in KERNELS:
            raise ValueError(f"{argument}: unknown kernel {name!r}. The kernels are {', '.join(KERNELS)}.")
    return listed


def checked_precision(value: str | None, argument: str) -> str | None:
    """
    Raises:
      ValueError: a precision that there is not.
    """
    if value is not None and value not in PRECISIONS:
        raise ValueError(
            f"{argument}: unknown precision {value!r}, expected 'fp8' (matrix products in eight bits on GPUs) or None. "
            "Leave it out to multiply as the program says."
        )
    return value


_FLAGS = {"": False, "0": False, "false": False, "no": False, "off": False,
          "1": True, "true": True, "yes": True, "on": True}  # fmt: skip


def _flag(environment: Mapping[str, str], name: str) -> bool:
    text = environment.get(name, "").strip().lower()
    if text not in _FLAGS:
        raise ValueError(f"{name}={environment[name]!r}: expected 1 or 0. Unset it to use the default, 0.")
    return _FLAGS[text]


def _excluded(environment: Mapping[str, str]) -> frozenset[str]:
    entries = [entry.strip() for entry in environment.get("JAXEXT_KERNELS", "").split(",") if entry.strip()]
    for entry in entries:
        if not entry.startswith("-"):
            raise ValueError(
                f"JAXEXT_KERNELS: {entry!r} does not start with '-'. List the kernels to switch off, "
                "as in JAXEXT_KERNELS=-attention,-layer_norm; all others are on."
            )
    return frozenset(checked_kernels((entry[1:].strip() for entry in entries), "JAXEXT_KERNELS"))


def from_environment(environment: Mapping[str, str] | None = None) -> Settings | None:
    """Settings of JAXEXT_DISABLE, JAXEXT_KERNELS, JAXEXT_PRECISION and JAXEXT_STRICT; None: jaxext is switched off.

    Raises:
      ValueError: a variable that cannot be read, an unknown kernel or precision, with the remedy.
    """
    environment = os.environ if environment is None else environment
    exclude = _excluded(environment)
    strict = _flag(environment, "JAXEXT_STRICT")
    precision = checked_precision(environment.get("JAXEXT_PRECISION", "").strip().lower() or None, "JAXEXT_PRECISION")
    if _flag(environment, "JAXEXT_DISABLE"):
        return None
    return Settings(exclude=exclude, strict=strict, precision=precision)
