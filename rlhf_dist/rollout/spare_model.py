"""A second set of a vLLM model's weights: loaded while the first is in use, and exchanged with it in no time.

vLLM takes a model apart to load it, so no step can run meanwhile. On a CPU the kernels look a layer's weights up each
time they run: layers that are loaded elsewhere can take the place of those in use.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class SpareModel:
    """`model` is loaded like the one that it was made from, of which it has a copy of the weights and all else."""

    def __init__(self, live: nn.Module) -> None:
        """Costs the memory of the weights once more."""
        modules: dict[int, nn.Module] = {}
        self.model: Any = twin(live, modules, {})
        self._pairs = [(module, modules[id(module)]) for module in live.modules()]
        for module, spare in self._pairs:
            share_loading(module, spare)

    def exchange(self) -> None:
        """Put the loaded weights into use; the others are the spare ones from now on."""
        for live, spare in self._pairs:
            if not any(tensor is not None for tensor in live._parameters.values()):
                continue  # attention, above all: its cache of keys and values stays where it is
            used, loaded = live.__dict__, spare.__dict__
            used["_modules"], loaded["_modules"] = loaded["_modules"], used["_modules"]
            object.__setattr__(live, "__dict__", loaded)
            object.__setattr__(spare, "__dict__", used)


def twin(module: nn.Module, modules: dict[int, nn.Module], tensors: dict[int, Tensor]) -> nn.Module:
    """A module of the same kind with submodules, parameters and buffers of its own; what two shared they share again.

    Everything else is the same object. `modules` and `tensors` are filled with what was made, by the id of its source.
    """
    if id(module) in modules:
        return modules[id(module)]
    made = modules[id(module)] = object.__new__(type(module))
    given = module.__dict__
    own: dict[str, Any] = dict(given)
    for kind in ("_parameters", "_buffers"):
        own[kind] = {name: None if old is None else tensor_twin(old, tensors) for name, old in given[kind].items()}
    own["_non_persistent_buffers_set"] = set(given["_non_persistent_buffers_set"])
    object.__setattr__(made, "__dict__", own)
    own["_modules"] = {
        name: None if child is None else twin(child, modules, tensors) for name, child in given["_modules"].items()
    }
    return made


def tensor_twin(tensor: Tensor, tensors: dict[int, Tensor]) -> Tensor:
    """A copy with the same class and attributes, which is how vLLM's parameters know their loaders."""
    if id(tensor) not in tensors:
        made: Any = tensor.data.clone()
        made.__class__ = tensor.__class__
        made.__dict__ = tensor.__dict__.copy()
        tensors[id(tensor)] = made
    return tensors[id(tensor)]


def share_loading(module: nn.Module, spare: nn.Module) -> None:
    """What vLLM noted of a module when it made it, and needs to load it again; of its own for the spare one."""
    from vllm.model_executor.model_loader.reload.layerwise import (
        LAYERWISE_INFO,
        _get_original_loader,
        get_layerwise_info,
    )
    from vllm.model_executor.model_loader.reload.meta import to_meta_tensor
    from vllm.model_executor.model_loader.reload.types import LayerReloadingInfo

    info = get_layerwise_info(module)
    noted = []
    for tensors in info.restore_metadata:
        copies: dict[str, Any] = {name: to_meta_tensor(tensor) for name, tensor in tensors.items()}
        for copied in copies.values():
            if hasattr(copied, "weight_loader"):
                # After a first load it is wrapped by one that counts for the other module.
                copied.weight_loader = _get_original_loader(copied)
        noted.append(copies)
    LAYERWISE_INFO[spare] = LayerReloadingInfo(restore_metadata=tuple(noted), restore_device=info.restore_device)
