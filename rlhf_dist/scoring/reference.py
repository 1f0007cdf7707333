"""The reference model: how likely a frozen model finds the policy's responses. KL is measured to it."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_dist.config.schema import ModelConfig
from rlhf_dist.errors import DataError, RewardError, WeightSyncError
from rlhf_dist.models.attention import choose_attention
from rlhf_dist.models.hf import load_model, own_memory, read_companions, save_hf
from rlhf_dist.models.packed_policy import PackedPolicy, check_head
from rlhf_dist.models.tensors import WAY_OUT, read_tensors, write_tensors
from rlhf_dist.scoring.batching import TokenBatcher
from rlhf_dist.scoring.packed_rows import boundaries, laid, passes
from rlhf_dist.scoring.reference_files import MASTERS_FILE
from rlhf_dist.types import Group, Receipt, ReferenceHead, Trajectory
from rlhf_dist.weights.receipts import Announcement
from rlhf_dist.weights.shared_memory import WeightReader

Distance = tuple[ReferenceHead, np.ndarray]
"""A group's sums, and the reference's logprob of each of its sampled tokens, float32 [sum of N]."""


class ReferenceModel:
    """A causal LM without gradients. Its methods may be called from several threads; one runs at a time."""

    def __init__(
        self, source: str, model: ModelConfig, *, device: str, batch_tokens: int, chunk_tokens: int, name: str
    ) -> None:
        """Load the Hugging Face directory or hub name `source`, in `model`'s dtype and attention.

        `batch_tokens`: of one pass (a longer sequence goes alone); `chunk_tokens`: whose logits are held at once;
        `name`: of this server, for messages and receipts. A directory that `save` wrote goes on as it was. Raises
        ModelError, and DataError for a damaged moving average.
        """
        loaded = load_model(source, model.dtype, choose_attention(model.attention, device, model.dtype))
        self._policy = PackedPolicy(loaded.to(device))  # pyright: ignore[reportArgumentType]
        self._policy.requires_grad_(False)
        own_memory(self._policy)
        check_head(self._policy)
        self._device = torch.device(device)
        self._source = source
        self._companions = read_companions(source)
        self._vocabulary: int = loaded.config.get_text_config().vocab_size
        self._batch_tokens = batch_tokens
        self._chunk = chunk_tokens
        self._name = name
        self._reader = WeightReader()
        self._masters = read_masters(Path(source), dict(self._policy.model.named_parameters()))
        self._using_weights = threading.Lock()

    def logprobs(self, groups: Sequence[Group], temperature: float) -> list[Distance]:
        """For each group its `ReferenceHead` and the logprobs of its sampled tokens, at the sampler's temperature.

        Raises RewardError for a token that the reference has no row for, ConfigError for a temperature of 0.
        """
        samples = [sample for group in groups for sample in group.trajectories]
        rows = [sample.tokens for sample in samples]
        self._check(rows)
        found = [np.empty(0, np.float32)] * len(rows)
        with self._using_weights:
            for chosen in passes(rows, self._batch_tokens):
                part = self._pass([samples[i] for i in chosen], temperature)
                for i, values in zip(chosen, part, strict=True):
                    found[i] = values
        ends = np.cumsum([len(group.trajectories) for group in groups])
        return [
            distance(group, found[end - len(group.trajectories) : end]) for group, end in zip(groups, ends, strict=True)
        ]

    def update(self, announcement: Announcement, keep: float) -> Receipt:
        """Move to the published weights: reference = keep x reference + (1 - keep) x published; 0 takes them whole.

        The announced version has to be the newest, as when rollout workers load it. Nothing changes unless every bucket
        arrived as it was announced. Raises WeightSyncError: another hash, other parameters than the reference's.
        """
        assert 0 <= keep < 1, keep
        try:
            lease = self._reader.take(announcement)
        except WeightSyncError as error:
            raise WeightSyncError(f"{self._name}: {error}") from None
        with closing(lease):
            loaded = self._take(announcement.version, dict(lease.tensors()), keep)
        return Receipt(self._name, announcement.version, lease.hashes, loaded)

    def save(self, folder: Path) -> None:
        """A Hugging Face directory of the reference as it stands, with its float32 average. Raises `DiskError`."""
        with self._using_weights:
            save_hf(self._policy.model, self._companions, folder)
            if self._masters:
                write_tensors({name: master.cpu() for name, master in self._masters.items()}, folder / MASTERS_FILE)

    def _take(self, version: int, arrived: Mapping[str, torch.Tensor], keep: float) -> dict[str, int]:
        """Move every parameter; returns how many elements were taken, by name."""
        parameters = dict(self._policy.model.named_parameters())
        wrong = {
            name for name in arrived.keys() | parameters.keys() if _shape(arrived, name) != _shape(parameters, name)
        }
        if wrong:
            raise WeightSyncError(
                f"{self._name}: version {version} does not fit {self._source}: {min(wrong)} is "
                f"{_shape(arrived, min(wrong))} there and {_shape(parameters, min(wrong))} here; a reference that "
                "takes the policy's weights has to have its shape (reference.update_every, reference.path)"
            )
        loaded = {}
        with self._using_weights, torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(self._moved(name, parameter, arrived[name], keep) if keep else arrived[name])
                loaded[name] = parameter.numel()
            if not keep:
                self._masters.clear()
        return loaded

    def _moved(self, name: str, parameter: torch.Tensor, new: torch.Tensor, keep: float) -> torch.Tensor:
        """The moving average, in float32: steps of (1 - keep) are lost among bfloat16's 8 bits."""
        if parameter.dtype != torch.float32 and name not in self._masters:
            self._masters[name] = parameter.float()
        return self._masters.get(name, parameter).lerp_(new.to(self._device, torch.float32), 1 - keep)

    def _check(self, rows: Sequence[np.ndarray]) -> None:
        highest = max((int(row.max(initial=0)) for row in rows), default=0)
        if highest >= self._vocabulary:
            raise RewardError(
                f"{self._name} ({self._source}) has rows for {self._vocabulary} tokens, and the policy sampled token "
                f"{highest}; the reference needs the policy's vocabulary (reference.path)"
            )

    @torch.inference_mode()
    def _pass(self, samples: Sequence[Trajectory], temperature: float) -> list[np.ndarray]:
        """float32 [N] of the sampled tokens, for each sample."""
        rows = [sample.tokens for sample in samples]
        tokens, cu_seqlens = laid(rows, self._device)
        asked = [
            start + np.flatnonzero(sample.loss_mask) - 1
            for sample, start in zip(samples, boundaries(rows)[:-1], strict=True)
        ]
        predict = torch.from_numpy(np.concatenate(asked)).to(self._device)
        where = (tokens, cu_seqlens, predict)
        logprobs, _ = self._policy(*where, tokens[predict + 1], temperature, self._chunk, "none")
        return np.split(logprobs.cpu().numpy(), np.cumsum([len(positions) for positions in asked])[:-1])


class ReferenceServer:
    """A reference model for callers on many threads: groups that wait are put into one pass."""

    def __init__(self, model: ReferenceModel, *, batch_tokens: int, timeout_s: float, name: str) -> None:
        self._model = model
        self._timeout_s = timeout_s
        self._batcher: TokenBatcher[tuple[Group, float], Distance] = TokenBatcher(self._run, batch_tokens, name)

    def logprobs(self, group: Group, temperature: float) -> Distance:
        """See `ReferenceModel.logprobs`; for one group. Raises `ActorTimeout` too."""
        tokens = sum(len(sample.tokens) for sample in group.trajectories)
        return self._batcher.submit((group, temperature), tokens, self._timeout_s)

    def update(self, announcement: Announcement, keep: float) -> Receipt:
        """See `ReferenceModel.update`; waits for the pass that runs."""
        return self._model.update(announcement, keep)

    def save(self, folder: Path) -> None:
        """See `ReferenceModel.save`."""
        self._model.save(folder)

    def close(self) -> None:
        """End the thread that computes."""
        self._batcher.close()

    def _run(self, items: list[tuple[Group, float]]) -> list[Distance]:
        found: dict[int, Distance] = {}
        for temperature in {temperature for _, temperature in items}:
            chosen = [i for i, item in enumerate(items) if item[1] == temperature]
            found |= zip(chosen, self._model.logprobs([items[i][0] for i in chosen], temperature), strict=True)
        return [found[i] for i in range(len(items))]


def distance(group: Group, logprobs: Sequence[np.ndarray]) -> Distance:
    """The sums of a group whose n samples have these reference logprobs, float32 [N] each. Pure."""
    flat = np.concatenate(logprobs)
    sampled = [sample.logprobs[sample.loss_mask] for sample in group.trajectories]
    kl = [float((ours.astype(np.float64) - theirs).sum()) for ours, theirs in zip(sampled, logprobs, strict=True)]
    total = [float(values.sum(dtype=np.float64)) for values in logprobs]
    return ReferenceHead(np.array(kl, np.float32), np.array(total, np.float32)), flat


def read_masters(source: Path, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The moving average that `ReferenceModel.save` left in the directory `source`, on the device of `parameters`.

    None where it left none, or where the model itself is float32. Raises DataError where it is not that of the model
    beside it.
    """
    path = source / MASTERS_FILE
    if not path.exists() or all(parameter.dtype == torch.float32 for parameter in parameters.values()):
        return {}
    masters = read_tensors(path)
    for name in sorted(parameters.keys() | masters.keys()):
        master, parameter = masters.get(name), parameters.get(name)
        if master is None or parameter is None or not torch.equal(master.to(parameter.dtype), parameter.detach().cpu()):
            raise DataError(
                f"{path}: {name} is not that of the reference beside it; the files are damaged or of different steps; "
                f"{WAY_OUT}"
            )
    return {name: master.to(parameters[name].device) for name, master in masters.items()}


def _shape(tensors: Mapping[str, Any], name: str) -> str:
    return str(tuple(tensors[name].shape)) if name in tensors else "missing"
