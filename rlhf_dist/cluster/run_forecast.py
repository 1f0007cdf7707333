"""At the end of a run: what the plan's arithmetic gives for the lengths that were measured, beside the time it took."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhf_dist.cluster.address import joins_cluster
from rlhf_dist.config.schema import Config
from rlhf_dist.errors import DataError, ModelError
from rlhf_dist.planning.budget_lines import too_large, too_large_for_hosts
from rlhf_dist.planning.device_memory import devices, engine_memory
from rlhf_dist.planning.forecast import Forecast, Lengths, Rates, forecast, gpu_rates
from rlhf_dist.planning.hardware import KINDS, Kind, kind_of
from rlhf_dist.planning.host_memory import hosts, memory_here
from rlhf_dist.planning.placement import Placement, local_machine, place
from rlhf_dist.planning.shape import ModelShape, shape_of
from rlhf_dist.telemetry import names
from rlhf_dist.telemetry.report import Series, read_metrics

WARM_UP = 0.2
"""Share of the steps that is left out at the start."""
PHASES = {
    "generate": ("time/generate",),
    "wait": ("time/generate",),
    "train": ("time/train", "time/value"),
    "push": ("time/sync",),
}
"""Phase of the forecast -> the metrics that measure it."""


@dataclass(frozen=True, slots=True)
class Basis:
    """What a forecast of this run rests on; found before it starts, while the machine is quiet."""

    shape: ModelShape
    rates: Rates
    device: str
    """What the rates are of, in words."""
    gpu: Kind | None = None
    """None on a CPU."""

    @property
    def capacity(self) -> int:
        """Bytes of one GPU; 0 on a CPU."""
        return self.gpu.memory if self.gpu else 0


def basis(config: Config, placement: Placement, source: str) -> Basis | None:
    """None where the model's sizes or the GPU's are not known."""
    try:
        shape = shape_of(replace(config.model, path=source))
    except ModelError:
        return None
    if placement.device == "cpu":
        from rlhf_dist.cluster.device_rates import cpu_rates

        threads = placement.learner_threads
        rates = cpu_rates(shape.hidden, shape.intermediate, config.model.dtype, threads)
        return Basis(shape, rates, f"{threads} CPU threads, measured")
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    kind = kind_of(properties.name, properties.total_memory)
    if kind is None:
        return None
    rates = gpu_rates(KINDS[kind], config.model.dtype, config.rollout.enforce_eager)
    return Basis(shape, rates, f"the data sheet of {kind}", KINDS[kind])


def basis_before(config: Config, source: str) -> Basis | None:
    """`basis` of a run that starts its own Ray, whose processes are busy for seconds once they are there.

    None where it joins a cluster: who is placed where is not known before.
    """
    if joins_cluster(config.cluster):
        return None
    return basis(config, place(config, local_machine(), "train"), source)


def does_not_fit(config: Config, placement: Placement, found: Basis | None) -> str:
    """What the plan says against the memory of the GPUs here and of this machine, with keys that would help.

    Empty: nothing. It is arithmetic, so a run is warned and not ended. Of a cluster the nodes' own memory is not known.
    """
    if found is None:
        return ""
    problems = []
    if placement.device == "cuda":
        problems.append(too_large(config, devices(config, placement, found.shape, found.capacity)))
    if not joins_cluster(config.cluster):
        here = hosts(config, placement, found.shape, memory_here())
        problems.append(too_large_for_hosts(config, here, assumed=False))
    return "; ".join(filter(None, problems))


def compared(config: Config, placement: Placement, found: Basis, metrics: Path) -> tuple[str, dict[str, Any]]:
    """A line, and the same for `summary.json`; an empty line where no step was measured.

    A run that has ended is not lost for arithmetic: the line then says what was wrong with it.
    """
    try:
        return _compared(config, placement, found, metrics)
    except Exception as error:
        return f"there is no forecast beside the measured times: {type(error).__name__}: {error}", {}


def _compared(config: Config, placement: Placement, found: Basis, metrics: Path) -> tuple[str, dict[str, Any]]:
    try:
        series = read_metrics(metrics)
    except DataError:
        return "", {}
    measured = steady(series)
    if names.STEP_TIME not in measured or names.RESPONSE_LENGTH not in measured:
        return "", {}
    cache = engine_memory(config, placement, found.shape, found.capacity).cache_tokens
    planned = forecast(config, placement, found.shape, found.rates, lengths(config, measured), cache)
    both = {"step": (planned.step, measured[names.STEP_TIME])}
    for phase, forecasted in phases(planned, config.loop.max_policy_lag).items():
        both[phase] = (forecasted, sum(measured.get(name, 0.0) for name in PHASES[phase]))
    parts = [f"{phase} {ours:.3g} ({took:.3g})" for phase, (ours, took) in both.items()]
    line = f"forecast, and (measured), s: {', '.join(parts)}; for the lengths of this run, from {found.device}"
    return line, {
        phase: {"forecast": round(ours, 4), "measured": round(took, 4)} for phase, (ours, took) in both.items()
    }


def phases(planned: Forecast, lag: int) -> dict[str, float]:
    """Phase -> its seconds, of those that can be measured.

    At once the learner's wait is measured in place of sampling. Where both sides work on the same threads with a lag,
    each is slowed down by the other: the step alone can be compared.
    """
    learner = {"train": planned.train, "push": planned.sync}
    if planned.at_once:
        return {"wait": max(0.0, planned.generate - planned.train - planned.sync), **learner}
    return {} if lag else {"generate": planned.generate, **learner}


def steady(series: Series) -> dict[str, float]:
    """Metric -> its median over the steps after the warm-up."""
    return {
        name: statistics.median(values[int(len(values) * WARM_UP) :]) for name, (_, values) in series.items() if values
    }


def lengths(config: Config, measured: Mapping[str, float]) -> Lengths:
    """Those of the run."""
    response = measured[names.RESPONSE_LENGTH]
    responses = config.loop.prompts_per_step * config.algo.group_size
    prompt = max(1.0, measured.get("learner/tokens", 0.0) / responses - response)
    longest, trained = measured.get("rollout/response_length_max", response), measured.get("learner/trained_share", 1.0)
    return Lengths(prompt, response, longest, trained)
