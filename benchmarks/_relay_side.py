"""The learner's node of `bench relay` in a process of its own: MIB. For each line of input a line of JSON.

It publishes a new version and says where: the announcement, the offer's address, and that of a plain server which sends
the same bytes to whoever connects.
"""

from __future__ import annotations

import json
import socket
import sys
import threading

import torch

from rlhf_dist.weights.buckets import WeightPlan, make_plan
from rlhf_dist.weights.receipts import Announcement
from rlhf_dist.weights.relay import Offer
from rlhf_dist.weights.shared_memory import WeightWriter

HERE, SECRET, LIMIT_S = "127.0.0.1", b"bench relay", 60.0
TENSOR_MIB, BUCKET_MIB = 16, 64


def plan_of(mib: int) -> WeightPlan:
    """So many MiB in float32 tensors."""
    shapes = [(str(i), (TENSOR_MIB * 2**18,), "float32") for i in range(mib // TENSOR_MIB)]
    return make_plan(shapes, BUCKET_MIB * 2**20)


class Plain:
    """Sends the announced bytes to whoever connects: a socket and nothing else."""

    def __init__(self) -> None:
        self.announcement: Announcement | None = None
        self._listening = socket.create_server((HERE, 0))
        self.address = self._listening.getsockname()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listening.accept()
            found = self.announcement
            assert found is not None
            with connection, open(found.path, "rb") as file:
                connection.sendfile(file, found.offset, found.plan.nbytes)


def main() -> None:
    plan = plan_of(int(sys.argv[1]))
    writer, offer, plain = WeightWriter(plan), Offer(HERE, SECRET, timeout_s=LIMIT_S), Plain()
    tensors = [(slot.name, torch.rand(slot.shape)) for slot in plan.slots]
    for version, _ in enumerate(sys.stdin):
        for _, tensor in tensors:
            tensor[0] += 1.0
        plain.announcement = found = writer.write(version, tensors)
        offer.offer(found)
        where = {"path": found.path, "offset": found.offset, "hashes": found.hashes, "version": version}
        print(json.dumps(where | {"offer": offer.address, "plain": plain.address}), flush=True)
    offer.close()
    writer.close()


if __name__ == "__main__":
    main()
