"""`rlhf-dist bench push`: how long generation pauses when new weights arrive, by `rollout.kv_after_push`.

Requests run in the engine of a rollout worker all the time. A pause is the time between the two decoding steps that a
push lies between. With `recompute` the steps after it compute the cached keys and values of all requests again; that
is its prefill, and told apart. With `keep` most of a load is prepared while steps go on. The limit is what hashing and
copying the same bytes takes, without an engine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from _arguments import canonical_arguments
from _canonical import canonical_config, write_config
from step import HERE, OPENMP, machine_facts, run_process, save, work_folder

from rlhf_dist.planning.placement import local_machine, place

MODES = ("keep", "recompute")
COLUMNS = ("publish_s", "slowed_s", "slowest_s", "pause_s", "resume_s", "step_s")
TARGET_PAUSE_S, TARGET_PARITY = 0.1, 1e-5
"""At most: the pause of `keep`; the logprobs' difference of `recompute`, on both sides of a push, in float32."""


def main(argv: Sequence[str]) -> int:
    """Measure, print the table, save the JSON; returns 0 also where a target is missed. Raises `RlhfError`."""
    args = parse(argv)
    with work_folder() as folder:
        words = [f"rollout.max_concurrent={args.requests}", *args.words]
        config = canonical_config(folder, "grpo", words, 1)
        path, log = write_config(config, folder), folder / "push.log"
        run_process([sys.executable, str(HERE / "_canonical.py"), str(path)], folder / "models.log", {})
        threads = {"OMP_NUM_THREADS": str(place(config, local_machine(), "train").rollout_threads)}
        command = [sys.executable, HERE / "_push_side.py", path, args.requests, args.pushes]
        run_process([str(word) for word in command], log, OPENMP | threads)
        found: dict[str, Any] = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
    result = summary(found)
    print(table(result))
    save(args.out, result | {"config": args.words, "machine": machine_facts()})
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line. Raises `InputError`."""
    return canonical_arguments(
        argv,
        "push",
        "The pause of generation at a push of new weights, by rollout.kv_after_push.",
        {
            "requests": (1, 64, "under way at each push"),
            "pushes": (1, 10, "measured with each setting"),
        },
        own={"rollout.kv_after_push": "take it out; both settings are measured"},
    )


def summary(found: Mapping[str, Any]) -> dict[str, Any]:
    """Of each setting the medians over its pushes; what was asked."""
    sides = {}
    for mode in MODES:
        pushes = [one for one in found["pushes"] if one["mode"] == mode]
        medians = {name: statistics.median(one[name] for one in pushes) for name in (*COLUMNS, "running", "cached")}
        longest = max(one["pause_s"] for one in pushes)
        sides[mode] = medians | {"longest_pause_s": longest, "parity": found["parity"][mode]}
    agree = sides["recompute"]["parity"]
    reached = {
        "pause": sides["keep"]["pause_s"] <= TARGET_PAUSE_S,
        "parity": max(agree["before"], agree["after"]) <= TARGET_PARITY,
    }
    return {**found, "sides": sides, "reached": reached}


def table(result: Mapping[str, Any]) -> str:
    """What the command prints."""
    sides, limit = result["sides"], result["limit"]
    keep, agree = sides["keep"], sides["recompute"]["parity"]
    heads = ("pause ms", "longest ms", "prefill ms", "step ms", "slowed ms", "slowest ms", "before", "after")
    lines = [
        f"{keep['running']:.0f} requests under way with {keep['cached']:,.0f} cached tokens; {result['threads']} "
        f"threads; {result['parameters'] / 1e6:.1f}M parameters, {result['bytes'] / 2**20:,.0f} MiB",
        "medians".ljust(11) + "".join(f"{name:>12}" for name in heads),
    ]
    for mode, side in sides.items():
        names = ("pause_s", "longest_pause_s", "resume_s", "step_s", "slowed_s", "slowest_s")
        row = "".join(f"{1e3 * side[name]:12.1f}" for name in names)
        lines.append(mode.ljust(11) + row + "".join(f"{side['parity'][name]:12.1e}" for name in ("before", "after")))
    lines += [
        f"limit      {1e3 * (limit['hash_s'] + limit['copy_s']):12.1f}: hash {1e3 * limit['hash_s']:.1f}, copy "
        f"{1e3 * limit['copy_s']:.1f}",
        "prefill: what the requests' next tokens took beyond a step",
        "slowed: what the steps took longer, together, while the load was prepared beside them; slowest: one of these",
        "before, after: of tokens on either side of a push, the largest difference between the sampler's logprobs and "
        "those of the weights that their version names",
        f"the learner's copy and hashes: {1e3 * keep['publish_s']:.1f} ms",
        f"pause of keep: {1e3 * keep['pause_s']:.1f} ms (at most {1e3 * TARGET_PAUSE_S:.0f} asked); logprobs of "
        f"recompute agree to {max(agree['before'], agree['after']):.1e} (at most {TARGET_PARITY:.0e} asked)",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
