"""Checkpoints of `ranks.py` in other layouts: `python layout_ranks.py RANK WORLD PORT FOLDER PLACE PAIRS`.

FOLDER has the checkpoints, and PLACE/WORLD-RANK.pt what the tests compare. PAIRS: JSON, [[ranks and ZeRO stage of the
checkpoint, ranks and stage that it is restored in, dtype], ...]; those that are for other numbers of ranks than WORLD
are left out. Each is restored, saved again beside the first, and trained for a step.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from ranks import LEARNER, Trainer, budget

from rlhf_dist.learner.deepspeed_engine import init_process_group


def main() -> None:
    rank, world, port = (int(word) for word in sys.argv[1:4])
    folder, place, pairs = Path(sys.argv[4]), Path(sys.argv[5]), json.loads(sys.argv[6])
    init_process_group(rank, world, "127.0.0.1", port, device="cpu", threads=1, timeout_s=120.0)
    found = {}
    for (ranks, before), (_, stage), dtype in [pair for pair in pairs if pair[1][0] == world]:
        checkpoint = folder / f"{'checkpoint' if dtype == 'float32' else dtype}-{ranks}-{before}"
        target = folder / f"{checkpoint.name}-in-{world}-{stage}"
        learner = replace(LEARNER, zero_stage=stage, ranks=world, micro_batch_tokens=budget(world))
        trainer = Trainer(checkpoint / "hf", learner, dtype, world)
        trainer.engine.restore(checkpoint)
        target.mkdir(exist_ok=True)
        trainer.engine.save(target)
        torch.distributed.barrier()
        trainer.step(3)
        found[target.name] = trainer.weights()
        trainer.engine.close()
    torch.save(found, place / f"{world}-{rank}.pt")


if __name__ == "__main__":
    main()
