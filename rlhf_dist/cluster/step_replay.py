"""`rlhf-dist replay`: a saved batch, the model that it was learnt by, and what each row comes to, as lines."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_dist.cluster.learner_hosts import algorithm
from rlhf_dist.cluster.sources import device, model_path
from rlhf_dist.config.load import from_yaml
from rlhf_dist.config.paths import with_homes
from rlhf_dist.config.schema import Config
from rlhf_dist.errors import DataError, ModelError
from rlhf_dist.learner.replay_learner import ReplayEngine, ReplayLearner, RowReplay
from rlhf_dist.learner.step_file import StepFile, read_step
from rlhf_dist.learner.token_sums import Estimate, Whitening
from rlhf_dist.models.attention import choose_attention
from rlhf_dist.models.checkpoints import CHECKPOINT_PREFIX, HF_FOLDER, checkpoint_steps, problems
from rlhf_dist.models.hf import load_model
from rlhf_dist.models.packed_policy import PackedPolicy

SHOWN = 20
"""Rows that are printed."""


@dataclass(frozen=True, slots=True)
class Weights:
    """What a batch is replayed with."""

    source: str
    """A Hugging Face directory, or a hub name."""
    told: str
    """What they are, and how they differ from those of the step."""


def replay(path: Path, overrides: Sequence[str] = ()) -> list[str]:
    """What was wrong with a step, and its rows, the worst first. Raises `InputError`."""
    found = read_step(path)
    config = with_homes(from_yaml(found.facts["config"], str(path), overrides))
    weights = weights_of(path, found, config, any(word.startswith("model.path=") for word in overrides))
    rows = list(rows_of(path, found, config, weights.source))
    return [
        f"step {found.facts['step']} of {found.facts['run']}: {found.facts['fault']}",
        f"weights: {weights.told}",
        *remarks(found, config),
        *table(rows, found.facts["uids"]),
    ]


def weights_of(path: Path, found: StepFile, config: Config, given: bool) -> Weights:
    """Those of the newest checkpoint up to the step; `given`: those of `model.path`, which the user has set."""
    version, made = found.facts["step"] - 1, found.facts["updates"]
    later = f"; the step had taken {made} of its optimizer steps before" if made else ""
    if given:
        source = model_path(config, config.model.path, "model.path")
        return Weights(source, f"{source} (model.path); those of the step were of version {version}")
    moved = path.absolute().parent.parent  # a run directory that was copied or renamed
    run = next((one for one in (Path(found.facts["run"]), moved) if (one / "checkpoints").is_dir()), moved)
    steps = [step for step in checkpoint_steps(run / "checkpoints") if step <= version]
    if not steps and version:
        raise DataError(
            f"{path}: no checkpoint in {run / 'checkpoints'} is from before step {version + 1}; name a model with "
            "model.path=DIRECTORY, or let a run keep more: loop.checkpoint_every, loop.keep_checkpoints"
        )
    if not steps:
        source = model_path(config, config.model.path, "model.path")
        return Weights(source, f"{source}, that the run began with: those of the step{later}")
    folder = run / "checkpoints" / f"{CHECKPOINT_PREFIX}{steps[-1]}"
    if wrong := problems(folder, f"{HF_FOLDER}/"):
        raise DataError(f"{wrong[0]}; name another model with model.path=DIRECTORY")
    behind = version - steps[-1]
    old = f"{behind} step{'s' if behind > 1 else ''} older than those of the step, so its losses were others"
    return Weights(str(folder / HF_FOLDER), f"{folder}: {old if behind else 'those that the step began with'}{later}")


def rows_of(path: Path, found: StepFile, config: Config, source: str) -> Iterator[RowReplay]:
    """The rows of all ranks. Raises ModelError for a model that cannot have been the step's."""
    where = device(config)
    attention = choose_attention(config.model.attention, where, config.model.dtype)
    model = load_model(source, config.model.dtype, attention)
    words = len(model.get_input_embeddings().weight)  # pyright: ignore[reportArgumentType]
    most = max((int(batch.tokens.max()) for batch in found.batches if len(batch.tokens)), default=0)
    if most >= words:
        raise ModelError(
            f"{path}: has token {most}, and {source} knows {words} tokens: it is another model; name the one that was "
            "trained with model.path=DIRECTORY"
        )
    engine = ReplayEngine(PackedPolicy(model), where, config.learner.logprob_chunk_tokens)
    learner = ReplayLearner(engine, algorithm(config.algo))
    whitening = Whitening(**found.facts["whitening"])
    for i, batch in enumerate(found.batches):
        credit = Estimate(**found.credit[i]) if found.credit else None
        yield from learner.rows(batch, credit, whitening)


def remarks(found: StepFile, config: Config) -> Iterator[str]:
    """What is computed otherwise than in the step."""
    recipe = algorithm(config.algo)
    if recipe.credit_by_token and not found.credit:
        yield "without credit by token, which was not made any more: advantages are 0"
    if recipe.needs_critic:
        yield "the critic's loss is not computed"
    if config.ptx.coef:
        yield "the pre-training mix is not computed"
    if recipe.mask is not None:
        yield "without the mask on what may be drawn: logprobs are of the whole distribution"
    if recipe.entropy_share < 1 and len(found.batches) > 1:
        yield "tokens of high entropy are chosen among those of each rank"


def table(rows: Sequence[RowReplay], uids: dict[str, str]) -> list[str]:
    """Rows with what is not finite first, then by the norm of their gradient."""
    worst = sorted(rows, key=lambda row: (not row.wrong, -row.norm if math.isfinite(row.norm) else -math.inf))
    head = ("group", "sample", "tokens", "loss", "gradient", "token", "id", "logprob", "rollout", "not finite")
    cells: list[tuple[str, ...]] = [head]
    for row in worst[:SHOWN]:
        key, sample = row.origin
        numbers = (f"{row.loss:.6g}", f"{row.norm:.6g}", str(row.token), str(row.token_id))
        logprobs = (f"{row.logprob:.6g}", f"{row.sampled:.6g}")
        cells.append(
            (uids.get(key, key), str(sample), str(row.tokens), *numbers, *logprobs, ", ".join(row.wrong) or "-")
        )
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    more = [f"and {len(rows) - SHOWN} more rows"] if len(rows) > SHOWN else []
    bad = sum(bool(row.wrong) for row in rows)
    whole = math.fsum(row.loss for row in rows) if all(math.isfinite(row.loss) for row in rows) else math.nan
    return [
        *lines,
        *more,
        f"{len(rows)} rows, {bad} with numbers that are not finite; their losses add up to {whole:.6g}",
    ]
