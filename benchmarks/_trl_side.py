"""TRL's GRPOTrainer at the canonical work. `python _trl_side.py CONFIG.yaml TIMINGS.json`, in a process of its own.

The trainer as its users run it on a CPU: generation by transformers, no reference model (`beta` 0), one optimizer step
a batch. Micro-batches of 16 responses: with one of 64, rows are padded to the longest of all and the step is longer.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from rlhf_dist.config.schema import Config

MICRO_BATCH = 16
"""Responses of a forward pass."""


def main(argv: list[str]) -> None:
    """Train as many steps as the config says; writes seconds and response tokens of each."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import import_utils

    # Its module for vLLM, which is not used here, cannot be imported beside a newer vLLM.
    import_utils.is_vllm_available = lambda *_, **__: False
    from trl.trainer.grpo_trainer import GRPOTrainer

    from rlhf_dist.config.load import from_yaml
    from rlhf_dist.planning.placement import local_machine, place

    config = from_yaml(Path(argv[0]).read_text(encoding="utf-8"))
    torch.set_num_threads(place(config, local_machine(), "train").learner_threads)
    rows = [json.loads(line) for line in Path(config.data.path).read_text(encoding="utf-8").splitlines()]
    tokens: list[int] = []
    marks: list[float] = []

    def shorter_is_better(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        tokens.append(sum(len(ids) for ids in completion_ids))
        return [-float(len(ids)) for ids in completion_ids]

    class Clock(TrainerCallback):
        """Notes when training begins and when each step ends."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            marks.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append(time.perf_counter())

    trainer = GRPOTrainer(
        model=config.model.path,
        reward_funcs=shorter_is_better,
        args=settings(config, Path(argv[1]).parent / "trl"),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
        callbacks=[Clock()],
    )
    trainer.train()
    assert len(tokens) == config.loop.steps == len(marks) - 1, (len(tokens), len(marks))
    seconds = [after - before for before, after in pairwise(marks)]
    steps = [{"seconds": s, "tokens": n} for s, n in zip(seconds, tokens, strict=True)]
    Path(argv[1]).write_text(json.dumps(steps), encoding="utf-8")


def settings(config: Config, folder: Path) -> Any:
    """TRL's own config for the same work."""
    from trl.trainer.grpo_config import GRPOConfig

    return GRPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=config.loop.prompts_per_step * config.algo.group_size // MICRO_BATCH,
        num_generations=config.algo.group_size,
        max_completion_length=config.rollout.max_response_tokens,
        temperature=config.rollout.temperature,
        beta=0.0,
        learning_rate=config.learner.optimizer.lr,
        max_grad_norm=config.learner.optimizer.max_grad_norm,
        max_steps=config.loop.steps,
        seed=config.seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
