"""Hugging Face models: find, check, load and save them. Safetensors only, and no code from the model's repository."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from rlhf_dist.config.paths import expanded
from rlhf_dist.config.schema import ModelConfig
from rlhf_dist.errors import ModelError
from rlhf_dist.models.attention import register_attention
from rlhf_dist.models.by_parameter import Scatter, load_by_parameter
from rlhf_dist.models.directory import atomic_directory
from rlhf_dist.models.falcon import FALCON, teach_falcon
from rlhf_dist.models.fit import quiet, refuse_unknown
from rlhf_dist.models.inspect import inspect as inspect
from rlhf_dist.models.model_config import load_config, unloadable
from rlhf_dist.models.run_model import run_model
from rlhf_dist.models.tiny import make_tiny
from rlhf_dist.models.tokenizer_files import load_tokenizer as load_tokenizer
from rlhf_dist.models.weight_files import read_headers


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model is loaded from."""

    path: str
    """A Hugging Face directory, or a hub name; goes to every `from_pretrained` and to vLLM."""
    kind: Literal["tiny", "run", "directory", "hub"]
    """run: a checkpoint of a run directory."""


def resolve(config: ModelConfig, cache: Path, key: str = "model.path") -> ModelSource:
    """Find the model that `config.path` names; `tiny` is made below `cache` if it is not there yet.

    `key` is the config key that the path stands in, for messages.

    Raises ModelError for a path that does not exist and for a run directory without a whole checkpoint.
    """
    if config.path == "tiny":
        return ModelSource(str(make_tiny(config.tiny, cache)), "tiny")
    path = expanded(config.path)
    if (model := run_model(path, key)) is not None:
        return ModelSource(str(model), "run")
    if path.is_dir():
        return ModelSource(str(path), "directory")
    if path.exists():
        raise ModelError(f"{key} = {config.path}: is a file; name the directory with config.json in it")
    looks_like_path = config.path.startswith((".", "/", "~")) or config.path.count("/") > 1 or not config.path
    if looks_like_path or ("/" in config.path and path.parent.is_dir()):
        raise ModelError(
            f"{key} = {config.path!r}: there is no such directory{_close_names(path)}. Give {_right_for(key)}"
        )
    return ModelSource(config.path, "hub")


def _right_for(key: str) -> str:
    """What a config key that names a model takes, for messages."""
    reward_model = "a reward model: its Hugging Face directory, its run directory or its hub name"
    if key.startswith("scoring.rewards."):
        return reward_model
    if key == "critic.start":
        return f"policy, shared, or {reward_model}"
    return "`tiny`, a Hugging Face directory, a run directory, or a hub name such as Qwen/Qwen2.5-0.5B-Instruct"


def _close_names(path: Path) -> str:
    if not path.parent.is_dir():
        return f" ({path.parent} does not exist either)"
    names = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    close = difflib.get_close_matches(path.name, names, n=3)
    return f"; did you mean {' or '.join(str(path.parent / name) for name in close)}?" if close else ""


def load_model(path: str | Path, dtype: str, attention: str, scatter: Scatter | None = None) -> PreTrainedModel:
    """A causal LM with its weights on the CPU, in evaluation mode; with `scatter` each goes there as it is read.

    `dtype` is `float32` or `bfloat16`, `attention` what `choose_attention` gave. Raises ModelError when the directory
    or hub name has no such model, has only pickled weights, or lacks some of the weights.
    """
    model, missing = load_weights(AutoModelForCausalLM, path, load_config(path), dtype, attention, scatter)
    refuse_missing(path, missing)
    return model


def load_weights(
    kind: Any, path: str | Path, config: Any, dtype: str, attention: str, scatter: Scatter | None = None
) -> tuple[PreTrainedModel, set[str]]:
    """A model of one of transformers' Auto classes, and the names of the weights that `path` lacks.

    `scatter`: see `load_model`. Safetensors only, no code from the model's repository. Raises ModelError when it cannot
    be loaded.
    """
    register_attention()
    if config.model_type == FALCON:
        teach_falcon()
    if Path(path).is_dir():
        read_headers(Path(path))
    try:
        if scatter and (found := load_by_parameter(kind, path, config, dtype, attention, scatter)):
            model, missing, strangers = found
            refuse_unknown(path, strangers)
            return model, missing
        with quiet():
            model, info = kind.from_pretrained(
                path,
                config=config,
                dtype=getattr(torch, dtype),
                attn_implementation=attention,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except ModelError:
        raise
    except Exception as error:
        # Here only transformers runs, and what it raises on a damaged file has no common type.
        raise unloadable(path, "model", error) from error
    refuse_unknown(path, info["unexpected_keys"])
    return model, set(info["missing_keys"])


def own_memory(module: nn.Module) -> None:
    """Move weights on the CPU out of the file that they were read from, to memory as torch itself lays it out.

    transformers maps the file, and where in it a weight lies depends on the file's header. So does the rounding of
    matrix products, as their kernels go by the alignment: a resumed run, whose weights come from another file than
    those of the run before it, would differ from that one in the last bits. Tied weights stay tied.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def refuse_missing(path: str | Path, missing: set[str]) -> None:
    """Raises ModelError when there are any."""
    if missing:
        raise ModelError(
            f"{path}: {len(missing)} weights of the model are missing, the first is {min(missing)}; "
            "transformers would fill them with random numbers"
        )


@dataclass(frozen=True, slots=True)
class Companions:
    """What lies beside the weights in a Hugging Face directory, read at once: a run may remove where it came from."""

    source: str
    """The directory or hub name."""
    config: Any
    """Of transformers; to be copied before it is changed."""
    tokenizer: PreTrainedTokenizerBase
    generation: bytes | None
    """generation_config.json, where there is one."""


def read_companions(source: str | Path) -> Companions:
    """All but the weights. Raises ModelError when config or tokenizer cannot be read."""
    generation = cached_file(str(source), "generation_config.json", _raise_exceptions_for_missing_entries=False)
    return Companions(
        str(source),
        load_config(source),
        load_tokenizer(source),
        None if generation is None else Path(generation).read_bytes(),
    )


@torch.no_grad()
def copy_weights(model: PreTrainedModel, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Overwrite all of the model's parameters by those of one of the same shape, by name, on any device."""
    parameters = dict(model.named_parameters())
    for name, tensor in weights:
        parameters.pop(name).copy_(tensor)
    assert not parameters, f"weights that did not come: {sorted(parameters)[:3]}"


def save_hf(
    weights: PreTrainedModel | Iterator[tuple[str, torch.Tensor]], source: str | Path | Companions, target: Path
) -> Path:
    """Write a whole Hugging Face directory at `target`, in the place of what was there; returns `target`.

    `weights`: a model, or (name, tensor) pairs with the names of the model's own `state_dict`, all of one dtype, on
    any device; tied weights may be named once or twice. Config, generation config and tokenizer are those of `source`.
    Written beside `target`, flushed and renamed: a crash leaves no half directory.

    Raises DiskError when the disk refuses; ModelError when `source` cannot be read.
    """
    state = collect(weights)
    beside = source if isinstance(source, Companions) else read_companions(source)
    with torch.device("meta"):
        dtype = next(iter(state.values())).dtype
        shell: PreTrainedModel = AutoModelForCausalLM.from_config(deepcopy(beside.config), dtype=dtype)
    with new_model_directory(shell, state, beside.tokenizer, target) as directory:
        if beside.generation is not None:
            (directory / "generation_config.json").write_bytes(beside.generation)
    return target


def collect(weights: PreTrainedModel | Iterator[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Weights by name, on the CPU; one by one, so that parameters gathered on a GPU are let go before the next is."""
    pairs = weights.state_dict().items() if isinstance(weights, PreTrainedModel) else weights
    return {name: tensor.detach().cpu() for name, tensor in pairs}


@contextmanager
def new_model_directory(
    shell: PreTrainedModel, state: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerBase, target: Path
) -> Iterator[Path]:
    """Write the weights `state` of a model of `shell`'s shape, its config and the tokenizer as `target`.

    Yields the directory for what else belongs there; at the end it is put in the place of `target`, whole.
    """
    _check_complete(shell, state)
    with atomic_directory(target, replace=True) as directory, quiet():
        shell.save_pretrained(directory, state_dict=state)
        tokenizer.save_pretrained(directory)
        yield directory


def _check_complete(shell: PreTrainedModel, state: dict[str, torch.Tensor]) -> None:
    """Drop the second name of tied weights from `state`; what is left must be what the model has, name by name."""
    tied = {name: owner for name, owner in shell.all_tied_weights_keys.items() if owner in state}
    for name in tied:
        state.pop(name, None)
    shapes = {name: tuple(tensor.shape) for name, tensor in shell.state_dict().items() if name not in tied}
    wrong = {
        name for name in shapes.keys() | state.keys() if name not in state or shapes.get(name) != state[name].shape
    }
    assert not wrong, f"weights to save do not fit the model: {sorted(wrong)[:3]}"
