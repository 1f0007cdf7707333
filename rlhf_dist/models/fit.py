"""Whether a directory's weights are those of the model that its config.json describes, from names and shapes alone."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as hf_logging

from rlhf_dist.errors import ModelError
from rlhf_dist.models.model_config import CONFIG, unloadable
from rlhf_dist.models.weight_files import Stored, read_headers

HARMLESS = (
    # Heads of another use than this one, beside the same trunk.
    r"(^|\.)(lm_head|embed_out|score|v_head|value_head|reward_head|classifier)\.",
    # Constants that old versions of transformers saved.
    r"(^|\.)inv_freq$",
    r"(^|\.)masked_bias$",
    r"(^|\.)position_ids$",
)
"""Names of weights that a model may leave out without being another model."""
CAUSAL_CONSTANT = re.compile(r"(attn|attention)\.bias$")
"""GPT-2's way to keep its triangle of ones; told from a real bias by its shape [1, 1, T, T]."""
LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")
PLAIN = "eager"
"""Attention that every kind has; nothing is computed with it. config.json may ask for one that is not installed."""
NARROW = ("F8", "F6", "F4")
"""Beginnings of the dtypes of quantised weights."""


def check_fit(path: Path, config: Any, kind: Any) -> None:
    """Compare the headers of the weights with a model of `config` that has no memory; `kind` is an Auto class.

    transformers itself compares, with all its renaming of older names, its fused experts and its tied weights.

    Raises ModelError: damaged files, missing weights, weights that the model does not have, other shapes, quantised
    weights, a config that no model can be built of.
    """
    stored = read_headers(path)
    narrow = sorted(name for name, tensor in stored.items() if tensor.dtype.startswith(NARROW))
    if narrow:
        raise ModelError(
            f"{path}: stores {narrow[0]} as {stored[narrow[0]].dtype}, and quantised weights cannot be trained; give "
            "the model in float32, bfloat16 or float16"
        )
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if layers > len(stored):  # building so many, even without memory, might take for ever
        raise ModelError(
            f"{path / CONFIG}: says {layers} layers, and the weights are {len(stored)} tensors in all. Use "
            f"{CONFIG} and weights that were saved together"
        )
    shell = empty_model(path, config, kind)
    try:
        with quiet():
            loaded: Any = type(shell).from_pretrained(
                None,
                config=deepcopy(config),
                state_dict={name: torch.empty(tensor.shape, device="meta") for name, tensor in stored.items()},
                device_map="meta",
                dtype=torch.float32,
                attn_implementation=PLAIN,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:
        raise unloadable(path, "model", error) from error
    info: dict[str, Any] = loaded[1]
    strangers = {name for name in unknown(info["unexpected_keys"]) if not _constant(name, stored.get(name))}
    _refuse(
        path, shell, set(info["missing_keys"]), strangers, {name: shapes for name, *shapes in info["mismatched_keys"]}
    )


def empty_model(path: str | Path, config: Any, kind: Any) -> PreTrainedModel:
    """A model of `config` without memory. Raises ModelError when there can be none."""
    try:
        with torch.device("meta"), quiet():
            return kind.from_config(deepcopy(config), dtype=torch.float32, attn_implementation=PLAIN)
    except Exception as error:
        raise unloadable(path, "model", error) from error


def unknown(names: Collection[str]) -> set[str]:
    """Those of `names`, which a model does not have, that it matters to leave out."""
    return {name for name in names if not any(re.search(pattern, name) for pattern in HARMLESS)}


def refuse_unknown(path: str | Path, names: Collection[str]) -> None:
    """Refuse weights that loading left out; `names` are transformers' own unexpected keys. Raises ModelError."""
    left_out = {name for name in unknown(names) if not CAUSAL_CONSTANT.search(name)}
    if left_out:
        raise ModelError(f"{path}: {_strangers(left_out)}")


def _refuse(
    path: Path,
    shell: PreTrainedModel,
    missing: set[str],
    strangers: set[str],
    mismatched: dict[str, Any],
) -> None:
    problems = []
    if missing:
        problems.append(f"{len(missing)} weights of the model are missing, the first is {_first(missing)}")
    if strangers:
        problems.append(_strangers(strangers))
    if mismatched:
        name = _first(mismatched)
        here, there = (tuple(shape) for shape in mismatched[name])
        problems.append(f"{len(mismatched)} weights have another shape: {name} is {here}, by {CONFIG} {there}")
    if not problems:
        return
    layers = getattr(shell.config.get_text_config(), "num_hidden_layers", None)
    numbers = [int(found[1]) for name in strangers if (found := LAYER.search(name))]
    more = f" ({CONFIG} says {layers} layers, the weights have {max(numbers) + 1})" if _beyond(numbers, layers) else ""
    raise ModelError(
        f"{path}: its weights are not those of the model that {CONFIG} describes ({type(shell).__name__}): "
        f"{'; '.join(problems)}{more}. Use {CONFIG} and weights that were saved together"
    )


def _beyond(numbers: list[int], layers: Any) -> bool:
    return bool(numbers) and isinstance(layers, int) and max(numbers) >= layers


def _strangers(names: Collection[str]) -> str:
    return f"{len(names)} weights in its files are none of the model's, the first is {_first(names)}"


def _first(names: Collection[str]) -> str:
    """The first as one counts: layer 2 before layer 10."""
    return min(names, key=lambda name: [int(part) if part.isdigit() else -1 for part in name.split(".")] + [0])


def _constant(name: str, stored: Stored | None) -> bool:
    return CAUSAL_CONSTANT.search(name) is not None and stored is not None and stored.shape[:2] == (1, 1)


@contextmanager
def quiet() -> Iterator[None]:
    """Neither transformers' bars nor its report, which would print over the run's display; both come as messages."""
    level, shown = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if shown:
            hf_logging.enable_progress_bar()
