"""`python tests/faults/matrix_table.py`: the table of docs/reliability.md, from what the fault matrix measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
PHASES = ("idle", "generating", "scoring", "push", "checkpoint")
HEAD = "| lost | how | noticed | ready again | " + " | ".join(f"step done: {phase}" for phase in PHASES) + " |"


def rows(found: list[dict[str, Any]]) -> list[str]:
    """One for each process and signal: the longest until it was noticed and ready, and until the next step by phase."""
    made = []
    for who, how in dict.fromkeys((one["who"], one["how"]) for one in found):
        those = [one for one in found if (one["who"], one["how"]) == (who, how)]
        noticed, healed = (max(one[key] for one in those) for key in ("noticed_s", "healed_s"))
        steps = {one["phase"]: one["step_s"] for one in those}
        cells = [f"{steps[phase]:.1f}" if phase in steps else "" for phase in PHASES]
        made.append(f"| {who.removesuffix(' 0')} | {how} | {noticed:.1f} | {healed:.1f} | {' | '.join(cells)} |")
    return made


def main() -> None:
    found = [one for path in sorted(RESULTS.glob("faults-*.json")) for one in json.loads(path.read_text())
             if path.name != "faults-nodes.json"]  # fmt: skip
    print("\n".join([HEAD, "|---" * HEAD.count(" | ") + "|---|", *rows(found)]))


if __name__ == "__main__":
    main()
