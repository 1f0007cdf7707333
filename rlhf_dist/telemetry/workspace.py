"""A saved wandb workspace for runs of this package: the panels worth watching, in the order in which to look."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from rlhf_dist.errors import InputError, RunError
from rlhf_dist.telemetry import names
from rlhf_dist.telemetry.fault_tally import LOSSES, REBUILDS, RECOVER, RESPAWNS, RESTARTS
from rlhf_dist.telemetry.goodput import (
    LEARNER_CAUSES,
    RECOVER as RECOVERING,
    ROLLOUT_CAUSES,
    SCORING_CAUSES,
    WITH_CRITIC,
)
from rlhf_dist.telemetry.sinks import one_line
from rlhf_dist.telemetry.wandb_key import has_wandb_key, unreachable

NAME = "rlhf-dist"


@dataclass(frozen=True, slots=True)
class Plot:
    """One panel: lines over the training step."""

    title: str
    metrics: tuple[str, ...]
    log: bool = False
    """Logarithmic vertical axis."""
    stacked: bool = False
    """Shares that sum to 1, one upon the other."""


@dataclass(frozen=True, slots=True)
class Section:
    """Panels that are looked at together."""

    title: str
    plots: tuple[Plot, ...]


def spread(kind: str) -> tuple[str, ...]:
    """Mean, largest and smallest of the engines."""
    return tuple(f"rollout/engine_{kind}_{which}" for which in ("mean", "max", "min"))


def shares_of(side: str, causes: Collection[str]) -> tuple[str, ...]:
    """All that a side's seconds are booked to."""
    return tuple(f"goodput/{side}_{cause}" for cause in (*causes, *WITH_CRITIC.get(side, ()), RECOVERING))


SECTIONS = (
    Section(
        "What it learns",
        (
            Plot("Reward", (names.REWARD_MEAN, names.REWARD_GOLD)),
            Plot("Held out", (names.EVAL_GREEDY, "eval/sampled_accuracy")),
            Plot("Held-out reward", (names.EVAL_REWARD, names.EVAL_GOLD)),
            Plot("Response length", (names.RESPONSE_LENGTH, "rollout/response_length_max")),
            Plot("Loss", (names.SFT_LOSS, names.SFT_HELD_OUT_LOSS)),
            Plot("Reward model loss", (names.REWARD_MODEL_LOSS, names.REWARD_MODEL_HELD_OUT_LOSS)),
            Plot("Reward model accuracy", (names.REWARD_MODEL_ACCURACY,)),
            Plot("Preference loss", (names.PREFER_LOSS, names.PREFER_HELD_OUT_LOSS)),
            Plot("Preference accuracy", (names.PREFER_ACCURACY,)),
        ),
    ),
    Section(
        "Whether it is sound",
        (
            Plot("KL to the reference", (names.KL_REFERENCE, names.EVAL_KL)),
            Plot("Entropy", (names.ENTROPY,)),
            Plot("Rollout and learner logprobs", (names.LOGPROB_DIFF_MAX, names.LOGPROB_DIFF_MEAN), log=True),
            Plot("Gradient norm", ("learner/grad_norm", "critic/grad_norm"), log=True),
            Plot("Clipped tokens", ("policy/clipped_low", "policy/clipped_high")),
            Plot("Signs of collapse", (names.DISTINCT_RESPONSES, names.CUT_SHARE, "reward/groups_without_signal")),
            Plot("Critic", (names.CRITIC_EXPLAINED_VARIANCE,)),
        ),
    ),
    Section(
        "Where the time goes",
        (
            Plot("Rollout workers", shares_of("rollout", ROLLOUT_CAUSES), stacked=True),
            Plot("Learner", shares_of("learner", LEARNER_CAUSES), stacked=True),
            Plot("Scoring servers", shares_of("scoring", SCORING_CAUSES), stacked=True),
            Plot("Speed", (names.TOKENS_PER_S,)),
            Plot("Step", (names.STEP_TIME, "time/generate", "time/train", "time/sync")),
        ),
    ),
    Section(
        "Faults",
        (
            Plot("Lost, and started again", (LOSSES, RESPAWNS, REBUILDS, RESTARTS)),
            Plot("Seconds without training", (RECOVER,)),
        ),
    ),
    Section(
        "Engines: mean, fastest, slowest",
        (
            Plot("Tokens per second", spread("tokens_per_s")),
            Plot("Running responses", spread("running")),
            Plot("Cache in use", spread("kv_use")),
            Plot("Policy lag", ("rollout/policy_lag_max",)),
        ),
    ),
)


def sections_of(logged: Collection[str]) -> tuple[Section, ...]:
    """The sections with what a run has logged; what is empty is left out."""
    found = []
    for section in SECTIONS:
        plots = [
            Plot(plot.title, kept, plot.log, plot.stacked)
            for plot in section.plots
            if (kept := tuple(name for name in plot.metrics if name in logged))
        ]
        if plots:
            found.append(Section(section.title, tuple(plots)))
    return tuple(found)


def build(entity: str, project: str, sections: Collection[Section]) -> Any:
    """The workspace as wandb-workspaces has it; what has no panel here (histograms, samples) gets one by itself."""
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces

    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=[
            workspaces.Section(
                name=section.title,
                is_open=True,
                panels=[
                    reports.LinePlot(
                        title=plot.title,
                        x="step",
                        y=list(plot.metrics),
                        log_y=plot.log,
                        plot_type="stacked-area" if plot.stacked else "line",
                    )
                    for plot in section.plots
                ],
            )
            for section in sections
        ],
        settings=workspaces.WorkspaceSettings(x_axis="step", group_by_prefix="first"),
        auto_generate_panels=True,
    )


def require_wandb() -> None:
    """Refuse where a workspace cannot be saved from here. Raises InputError; RunError without a network."""
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise InputError(
            "the package wandb-workspaces is not installed: `pip install wandb-workspaces==0.4.13`; `--dry-run` shows "
            "the panels without it"
        )
    if not has_wandb_key():
        raise InputError("there is no wandb key: run `wandb login`, or set WANDB_API_KEY")
    if why := unreachable():
        raise RunError(f"wandb's server: {why}")


def save(entity: str, project: str, sections: Collection[Section]) -> str:
    """Save it as a new workspace of the project; returns its address. Raises RunError with what wandb says."""
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    try:
        workspace = build(entity or wandb.Api().default_entity or "", project, sections)
        workspace.save()
    except Exception as error:
        raise RunError(f"wandb did not save the workspace ({one_line(error)})") from None
    return workspace.url
