"""Which setting a side runs under, and how `--vs` names one."""

from __future__ import annotations

import dataclasses

MEMORY = ("reuse", "system")
# What a user's environment may say of jaxext, and a side of a test decides for itself.
VARIABLES = ("JAXEXT_DISABLE", "JAXEXT_KERNELS", "JAXEXT_PRECISION", "JAXEXT_STRICT")
_HELP = (
    "stock, jaxext, exclude=KERNEL[,KERNEL], precision=fp8, memory=reuse or system, isa=v2, v3, v4 or v4bf16, "
    "joined by + (as in stock+memory=system)"
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One side. `kernels` False: stock JAX. `exclude`: kernels not used. `precision`: as of `accelerate`, or "".

    `memory` ("reuse" or "system") and `isa` ("" = the machine's best) hold for a whole process, so sides that differ
    in them run in processes of their own.
    """

    kernels: bool = True
    exclude: tuple[str, ...] = ()
    memory: str = "reuse"
    isa: str = ""
    precision: str = ""

    @property
    def process(self) -> tuple[str, str]:
        """What a process must be started with; sides that agree here can share one."""
        return (self.memory, self.isa)

    def environment(self) -> dict[str, str]:
        return {"JAXEXT_ISA": self.isa} if self.isa else {}

    def to_dict(self) -> dict[str, object]:
        return {**dataclasses.asdict(self), "exclude": list(self.exclude)}

    @classmethod
    def from_dict(cls, values: dict[str, object]) -> Setting:
        return cls(**{**values, "exclude": tuple(values["exclude"])})  # type: ignore[arg-type]


def label(setting: Setting, other: Setting) -> str:
    """What to call `setting` beside `other`: only what sets it apart is mentioned."""
    words = ["jaxext" if setting.kernels else "stock"]
    if setting.exclude:
        words.append("without " + ", ".join(setting.exclude))
    if setting.precision != other.precision:
        words.append(f"in {setting.precision}" if setting.precision else "as the program multiplies")
    if setting.isa != other.isa:
        words.append(f"on {setting.isa or 'the best instruction set'}")
    if setting.memory != other.memory:
        words.append("with memory reuse" if setting.memory == "reuse" else "with system memory")
    return " ".join(words)


def parse_versus(text: str, memory: str) -> Setting:
    """The setting that `--vs` names; what it does not mention is as on the jaxext side.

    Raises:
      ValueError: an unknown name, with those that exist.
    """
    setting = Setting(memory=memory)
    for part in text.split("+"):
        name, separator, value = part.strip().partition("=")
        values = tuple(word.strip() for word in value.split(",") if word.strip())
        if name in ("stock", "jaxext") and not separator:
            setting = dataclasses.replace(setting, kernels=name == "jaxext")
        elif name == "exclude" and values:
            setting = dataclasses.replace(setting, exclude=_kernels(values))
        elif name == "precision" and value in _precisions():
            setting = dataclasses.replace(setting, precision=value)
        elif name == "memory" and value in MEMORY:
            setting = dataclasses.replace(setting, memory=value)
        elif name == "isa" and value in ("v2", "v3", "v4", "v4bf16"):
            setting = dataclasses.replace(setting, isa=value)
        else:
            raise ValueError(f"--vs {text!r}: {part.strip()!r} is no setting. Expected one of {_HELP}.")
    return setting


def _precisions() -> tuple[str, ...]:
    from jaxext._settings import PRECISIONS

    return PRECISIONS


def _kernels(names: tuple[str, ...]) -> tuple[str, ...]:
    from jaxext._settings import checked_kernels

    return checked_kernels(names, "--vs exclude")
