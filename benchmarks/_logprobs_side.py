"""One side of `bench logprobs` in a process of its own: SIDE TOKENS VOCABULARY HIDDEN CHUNK. Prints a line of JSON."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from rlhf_dist.algo.logprobs import chunked_logprobs


def main() -> None:
    side, *numbers = sys.argv[1:]
    tokens, vocabulary, hidden_size, chunk = map(int, numbers)
    torch.manual_seed(0)
    head = nn.Linear(hidden_size, vocabulary, bias=False)
    hidden, targets = torch.randn(tokens, hidden_size, requires_grad=True), torch.randint(vocabulary, (tokens,))
    passes(side, head, hidden[:2].detach().requires_grad_(), targets[:2], 1)  # what only the first call pays
    head.zero_grad()
    resting = reset_peak()
    cpu, begun = time.process_time(), time.perf_counter()
    logprobs, entropy, forward_s = passes(side, head, hidden, targets, chunk)
    both_s, cpu_s = time.perf_counter() - begun, time.process_time() - cpu
    peak = memory("VmHWM") - resting
    gradient = head.weight.grad
    assert gradient is not None and hidden.grad is not None
    sums = {
        "logprobs": float(logprobs.detach().double().sum()),
        "entropy": float(entropy.double().sum()),
        "head gradient": float(gradient.norm()),
        "hidden gradient": float(hidden.grad.norm()),
    }
    found = {"forward_s": forward_s, "backward_s": both_s - forward_s, "cpu_s": cpu_s, "peak_mib": peak, "sums": sums}
    print(json.dumps(found))


def passes(side: str, head: nn.Linear, hidden: Tensor, targets: Tensor, chunk: int) -> tuple[Tensor, Tensor, float]:
    """(logprobs, entropy, seconds of the forward pass), the gradients made."""
    begun = time.perf_counter()
    if side == "held":
        logprobs, entropy = held(head, hidden, targets)
    else:
        logprobs, entropy = chunked_logprobs(hidden, head, targets, 1.0, chunk)
        assert entropy is not None
    forward_s = time.perf_counter() - begun
    logprobs.sum().backward()
    return logprobs, entropy, forward_s


def held(head: nn.Linear, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Plain PyTorch; the log-softmax is held for backward, and the logits are gone by then."""
    log_softmax = torch.log_softmax(head(hidden), dim=-1)
    with torch.no_grad():
        entropy = -log_softmax.exp().mul_(log_softmax).sum(dim=-1)
    return log_softmax.gather(-1, targets[:, None])[:, 0], entropy


def reset_peak() -> float:
    """MiB of resident memory now, from which the peak is counted on."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return memory("VmRSS")


def memory(name: str) -> float:
    """MiB; VmRSS: resident now, VmHWM: its peak."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # a kernel that does not tell


if __name__ == "__main__":
    main()
