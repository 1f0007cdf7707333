"""A model that no rank ever holds whole: its weights are read one by one, and each is given away before the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from rlhf_dist.models.fit import quiet
from rlhf_dist.models.weight_files import INDEX, SINGLE, SUFFIX, is_there, read_headers, read_index

PATTERNS = ["*.json", f"*{SUFFIX}"]
"""Of the files of a hub name: what a model is loaded from."""


class Scatter:
    """Where the parts of a model's parameters go: over ranks, of which one reads them."""

    def __init__(self, give: Callable[[nn.Parameter], None], reads: bool) -> None:
        """`give` takes a parameter over, and leaves this rank its part; every rank calls it, with those of `reads`."""
        self.give = give
        self.reads = reads


def load_by_parameter(
    kind: Any, path: str | Path, config: Any, dtype: str, attention: str, scatter: Scatter
) -> tuple[PreTrainedModel, set[str], set[str]] | None:
    """(a model of one of transformers' Auto classes, weights that `path` lacks, those that it has beyond the model's).

    What is lacking is 0. None where the files have other names than the model, as older ones or those of experts that
    transformers joins, or a weight that the model ties to another: it has to be loaded whole.
    """
    folder = Path(path) if Path(path).is_dir() else Path(snapshot_download(str(path), allow_patterns=PATTERNS))
    with init_empty_weights(), quiet():
        model = kind.from_config(deepcopy(config), dtype=getattr(torch, dtype), attn_implementation=attention)
    stored = read_headers(folder)
    wanted = {name: p for name, p in model.named_parameters() if name not in model.all_tied_weights_keys}
    if stored_names(model.all_tied_weights_keys, stored, model.base_model_prefix):
        return None  # Which of the two counts, or whether they are tied at all, transformers knows.
    names = stored_names(wanted, stored, model.base_model_prefix)
    missing = wanted.keys() - names.keys()
    if len(missing) > 1 or any(stored[names[name]].shape != tuple(wanted[name].shape) for name in names):
        return None
    places = read_index(folder / INDEX) if is_there(folder / INDEX) else dict.fromkeys(stored, SINGLE)
    # All take turns in the same memory: what is left of each would else lie between holes as large as the whole was.
    room = torch.zeros(max(p.numel() for p in wanted.values()), dtype=getattr(torch, dtype))
    for name, parameter in wanted.items():
        whole = room[: parameter.numel()].view(parameter.shape)
        if name in missing:
            whole.zero_()
        elif scatter.reads:
            with safe_open(folder / places[names[name]], framework="pt") as file:
                whole.copy_(file.get_tensor(names[name]))
        module, _, own = name.rpartition(".")
        kept = nn.Parameter(whole, requires_grad=parameter.requires_grad)
        setattr(model.get_submodule(module), own, kept)
        scatter.give(kept)
    model.tie_weights()
    return model.eval(), missing, stored.keys() - set(names.values())


def stored_names(wanted: Mapping[str, Any], stored: Mapping[str, Any], prefix: str) -> dict[str, str]:
    """The model's name of a weight -> the file's, which may be that of the trunk alone."""
    found = {}
    for name in wanted:
        for other in (name, name.removeprefix(f"{prefix}.")):
            if other in stored:
                found[name] = other
                break
    return found
