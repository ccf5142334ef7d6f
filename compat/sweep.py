"""The sweep: Flax architectures nobody here wrote, with random weights, on stock JAX and on jaxext.

Losses and every gradient have to agree, with dropout and without, and each attention and norm layer should run on a
kernel. `python compat/sweep.py --only GPT-2`; it needs `pip install "transformers==4.49.*"`.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence

import architectures
import flax_modules
import generation
import jax
import sweep_agreement
from architectures import Architecture
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sweep_agreement import Outcome

_DEFAULT_JSON = pathlib.Path(__file__).parent / "records" / "sweep.json"


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="NAME", help="this architecture alone; may be repeated")
    parser.add_argument("--resume", action="store_true", help="keep what the JSON file has already")
    parser.add_argument("--list", action="store_true", help="print the names of all architectures")
    parser.add_argument("--json", type=pathlib.Path, default=_DEFAULT_JSON, metavar="PATH", help="where results go")
    return parser.parse_args(argv)


def chosen(names: Sequence[str] | None) -> list[Architecture]:
    """The architectures of these names, all where None."""
    everything = (*flax_modules.all_of_them(), *architectures.all_of_them(), *generation.all_of_them())
    known = {found.name: found for found in everything}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise SystemExit(f"sweep: --only {unknown[0]!r} is not one of {', '.join(known)}.")
    return [known[name] for name in names] if names else list(known.values())


def table(outcomes: Sequence[Outcome]) -> Table:
    result = Table(title="Flax architectures on jaxext, against stock JAX")
    for column in ("architecture", "attention", "norms", "other", "loss", "gradients", "missed"):
        result.add_column(column, justify="right" if column in ("loss", "gradients") else "left")
    for outcome in outcomes:
        kernels = outcome.kernels
        norms = [kernels[name] for name in ("layer_norm", "rms_norm") if name in kernels]
        others = [name for name in kernels if name not in ("attention", "layer_norm", "rms_norm")]
        result.add_row(
            outcome.architecture,
            _counts([kernels["attention"]] if "attention" in kernels else []),
            _counts(norms),
            ", ".join(others),
            f"{outcome.loss_difference:.1e}",
            f"{outcome.gradient_difference:.1e}",
            "\n".join(dict.fromkeys((*outcome.disagreements[:3], *outcome.missed))),
            style=None if outcome.agree else "red",
        )
    return result


def _counts(pairs: Sequence[tuple[int, int]]) -> str:
    if not pairs:
        return "none"
    found, expected = (sum(side) for side in zip(*pairs))
    return f"[{'green' if found >= expected else 'yellow'}]{found} of {expected}[/]"


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    selected = chosen(options.only)
    if options.list:
        print("\n".join(architecture.name for architecture in selected))
        return 0
    architectures.require_transformers(selected)
    # Compiling is nearly all that the sweep does.
    jax.config.update("jax_disable_most_optimizations", True)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(options.json.read_text()) if options.resume and options.json.exists() else []
    outcomes = [Outcome.from_dict(entry) for entry in known]
    selected = [found for found in selected if found.name not in {outcome.architecture for outcome in outcomes}]
    for architecture in track(selected, "architectures", console=Console(stderr=True)):
        of = generation if architecture.name in generation.names() else sweep_agreement
        outcomes.append(of.measure(architecture))
        options.json.write_text(json.dumps([outcome.to_dict() for outcome in outcomes], indent=1) + "\n")
        jax.clear_caches()
    Console(width=None if sys.stdout.isatty() else 160).print(table(outcomes))
    return 0 if all(outcome.agree for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
