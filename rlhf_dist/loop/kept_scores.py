"""An RL run's scores-before.json and scores-after.json: what the judge gave each held-out response, for win rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf_dist.algo.head_to_head import Contest, contest, outcomes
from rlhf_dist.config.compare_keys import judge_of
from rlhf_dist.config.schema import Config
from rlhf_dist.errors import DataError
from rlhf_dist.loop.comparing import scored
from rlhf_dist.loop.run_directory import write_json
from rlhf_dist.loop.state import fits
from rlhf_dist.models.guarded_files import read_json
from rlhf_dist.types import Experience

BEFORE, AFTER = "scores-before.json", "scores-after.json"


@dataclass(frozen=True, slots=True)
class KeptScores:
    """What one of the files holds."""

    judge: str
    responses: dict[tuple[str, str], tuple[float, float]]
    """(uid of a prompt, number of the sample) -> (score, length in tokens)."""


def keep_scores(run: Path, config: Config, step: int, experiences: Sequence[Experience]) -> None:
    """Write those of the first evaluation, or replace those of the one before. Raises DiskError."""
    judge = judge_of(config)
    found: dict[str, dict[str, list[float]]] = {}
    for one in experiences:
        lengths = dict(zip(one.samples.tolist(), one.head.lengths.tolist(), strict=True))
        found[one.prompt.uid] = {str(sample): [score, lengths[sample]] for sample, score in scored(one, judge).items()}
    write_json(run / (AFTER if step else BEFORE), {"step": step, "judge": judge, "scores": found})


def won_against_start(run: Path, tie_margin: float) -> tuple[str, Contest] | None:
    """Who judged, and how often the run's last evaluation beat its first, response by response with the same seeds.

    None where one of the files is missing, as in a run of an older version, or where they have no response by the same
    judge in common. Raises DataError naming a file that is damaged.
    """
    if not all((run / name).is_file() for name in (BEFORE, AFTER)):
        return None
    before, after = _read(run / BEFORE), _read(run / AFTER)
    keys = [key for key in after.responses if key in before.responses]
    if before.judge != after.judge or not keys:
        return None
    first, second = (torch.tensor([one.responses[key] for key in keys], dtype=torch.float64) for one in (after, before))
    prompts = {uid: place for place, uid in enumerate(dict.fromkeys(uid for uid, _ in keys))}
    prompt = torch.tensor([prompts[uid] for uid, _ in keys])
    outcome = outcomes(first[:, 0], second[:, 0], tie_margin)
    return after.judge, contest(outcome, first[:, 1] - second[:, 1], prompt)


def _read(path: Path) -> KeptScores:
    raw: Any = read_json(path)
    try:
        judge, scores = raw["judge"], raw["scores"]
        if not isinstance(judge, str) or not fits(scores, dict[str, dict[str, list[float]]]):
            raise TypeError
        pairs = {(uid, sample): pair for uid, one in scores.items() for sample, pair in one.items()}
        return KeptScores(judge, {key: (score, length) for key, (score, length) in pairs.items()})
    except (KeyError, TypeError, ValueError) as error:
        why = "does not hold the scores of an evaluation; delete it to do without the win rate"
        raise DataError(f"{path}: {why}") from error
