"""Greedy generation with a cache, jitted: the decode half of an architecture, token for token as on stock JAX."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

import architectures
import jax
import numpy as np
from architectures import Architecture
from sweep_agreement import Outcome

import jaxext

NEW_TOKENS = 8
_SUFFIX = " generate"
# A decoder alone, one with grouped heads, one with cross-attention; their layers, of the prompt's pass and the loop's.
_OF = {
    "GPT-2": {"attention": 4, "layer_norm": 10},
    "Llama": {"attention": 4, "rms_norm": 10},
    "BART": {"attention": 6, "layer_norm": 12},
}


def names() -> list[str]:
    """What can be measured here: `GPT-2 generate`, …"""
    return [name + _SUFFIX for name in _OF]


def all_of_them() -> Iterator[Architecture]:
    """The same architectures, under those names."""
    for found in architectures.all_of_them():
        if found.name in _OF:
            yield dataclasses.replace(found, name=found.name + _SUFFIX)


def measure(architecture: Architecture) -> Outcome:
    """Generate after a padded prompt on stock JAX and on jaxext; every token has to be the same."""
    name = architecture.name.removesuffix(_SUFFIX)
    model, batch = architectures.model_of(name)
    prompt = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"][:, ::-1]}

    def generate(params: Any, prompt: Any) -> Any:
        options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "num_beams": 1}
        return model.generate(**prompt, params=params, eos_token_id=None, pad_token_id=0, **options).sequences

    params = architectures.spread(model.params)
    stock, ours = (np.asarray(jit(generate)(params, prompt)) for jit in (jax.jit, jaxext.accelerate))
    report = jaxext.explain(generate)(params, prompt)
    found = Counter(entry.kernel for entry in report.replaced)
    differing = float((stock != ours).mean())
    return Outcome(
        architecture=architecture.name,
        class_name=architecture.class_name,
        loss_difference=differing,
        gradient_difference=0.0,
        agree=differing == 0.0,
        disagreements=[f"{differing:.0%} of the tokens differ"] if differing else [],
        kernels={kernel: (found[kernel], count) for kernel, count in _OF[name].items()},
        missed=[str(entry) for entry in report.missed],
        fallbacks=[str(entry) for entry in report.fallbacks],
    )
