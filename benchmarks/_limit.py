"""The limit: what vLLM alone and PyTorch alone need for one step's work. `python _limit.py generate|train WORK.json`.

Each half runs in a process of its own, with nothing else at work: no Ray, no DeepSpeed, no weight push. What a
synchronous trainer on these two libraries could reach at best is the sum of the two.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Work:
    """What both halves are given."""

    model: str
    """Hugging Face directory of the policy; PPO's critic and reference start there too."""
    reward: str
    """That of PPO's reward model; empty: GRPO, which trains the policy and nothing else."""
    dtype: str
    prompts: list[list[list[int]]]
    """Step -> prompts -> token ids: what our run samples from in that step."""
    seeds: list[list[list[int]]]
    """Step -> prompts -> the seed of each response: our run's, so that both sides sample the same tokens."""
    max_prompt_tokens: int
    max_response_tokens: int
    temperature: float
    max_concurrent: int
    kv_cache_bytes: int
    enforce_eager: bool
    generate_threads: int
    train_threads: int
    micro_batch_tokens: int
    learning_rate: float
    """Of policy and critic: it costs nothing."""
    max_grad_norm: float
    rollouts: str
    """JSON file that `generate` writes and `train` reads."""
    timings: str
    """JSON file that `train` writes."""


def generate(work: Work) -> None:
    """Sample every step's responses by vLLM, in this process; writes rows and seconds of each step."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    if work.enforce_eager:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # as in the product
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = LLM(
        model=work.model,
        dtype=work.dtype,  # pyright: ignore[reportArgumentType]
        max_model_len=work.max_prompt_tokens + work.max_response_tokens,
        max_num_seqs=work.max_concurrent,
        enforce_eager=work.enforce_eager,
        kv_cache_memory_bytes=work.kv_cache_bytes,
        logprobs_mode="processed_logprobs",
        disable_log_stats=True,
        enable_chunked_prefill=False,  # a request with a seed fails on a CPU where its prefill is cut
    )

    def params(seed: int) -> SamplingParams:
        """No text and nothing but the sampled token's logprob: what GRPO needs of a rollout."""
        return SamplingParams(
            temperature=work.temperature,
            max_tokens=work.max_response_tokens,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            seed=seed,
        )

    steps = []
    for prompts, seeds in zip(work.prompts, work.seeds, strict=True):
        begun = time.perf_counter()
        asked = [(prompt, seed) for prompt, those in zip(prompts, seeds, strict=True) for seed in those]
        each = [params(seed) for _, seed in asked]
        outputs = engine.generate([{"prompt_token_ids": prompt} for prompt, _ in asked], each, use_tqdm=False)
        seconds = time.perf_counter() - begun
        rows = [[len(p), *p, *o.outputs[0].token_ids] for (p, _), o in zip(asked, outputs, strict=True)]
        steps.append({"seconds": seconds, "rows": rows})
    Path(work.rollouts).write_text(json.dumps(steps), encoding="utf-8")


def train(work: Work) -> None:
    """Each model's passes over the rows that `generate` sampled; writes seconds and tokens of each step."""
    import torch

    from rlhf_dist.models.attention import register_attention

    torch.set_num_threads(work.train_threads)
    register_attention()
    policy, policy_optimizer = trained(work, causal(work))
    others = Others(work) if work.reward else None
    timings = []
    for batch in json.loads(Path(work.rollouts).read_text(encoding="utf-8")):
        rows = batch["rows"]
        timing = {"generate": batch["seconds"]}
        begun = time.perf_counter()
        if others is not None:
            timing |= others.read(rows, work)
            begun = time.perf_counter()
            update(others.critic, others.critic_optimizer, value_losses, rows, work)
        update(policy, policy_optimizer, policy_losses, rows, work)
        timing["train"] = time.perf_counter() - begun
        timings.append(timing | {"tokens": response_tokens(rows)})
    Path(work.timings).write_text(json.dumps(timings), encoding="utf-8")


class Others:
    """The models of PPO beside the policy."""

    def __init__(self, work: Work) -> None:
        self.reference = causal(work)
        self.reward = scalar(work, work.reward)
        # Values are read for GAE before they are learnt; the policy's own old logprobs are those of its one update.
        self.critic, self.critic_optimizer = trained(work, scalar(work, work.model))

    def read(self, rows: list[list[int]], work: Work) -> dict[str, float]:
        """The passes without gradients: seconds of reference and reward (`score`), and of the critic (`value`)."""
        import torch

        begun = time.perf_counter()
        with torch.inference_mode():
            for micro in micro_batches(rows, work.micro_batch_tokens):
                logprobs(self.reference, micro)
            for micro in micro_batches(rows, work.micro_batch_tokens):
                numbers(self.reward, micro, micro.last)
            scored = time.perf_counter()
            for micro in micro_batches(rows, work.micro_batch_tokens):
                numbers(self.critic, micro, micro.predict)
        return {"score": scored - begun, "value": time.perf_counter() - scored}


def causal(work: Work) -> Any:
    """A causal LM that takes packed rows."""
    import torch
    from transformers import AutoModelForCausalLM

    from rlhf_dist.models.attention import SEGMENTED

    return AutoModelForCausalLM.from_pretrained(
        work.model, dtype=getattr(torch, work.dtype), attn_implementation=SEGMENTED
    )


def scalar(work: Work, path: str) -> Any:
    """A model with one number per position; the head is new where `path` has none."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from rlhf_dist.models.attention import SEGMENTED

    return AutoModelForSequenceClassification.from_pretrained(
        path, num_labels=1, dtype=getattr(torch, work.dtype), attn_implementation=SEGMENTED
    )


def trained(work: Work, model: Any) -> tuple[Any, Any]:
    """The model and its optimizer."""
    import torch

    return model, torch.optim.AdamW(model.parameters(), lr=work.learning_rate, weight_decay=0.0, fused=True)


@dataclass(frozen=True, slots=True)
class Micro:
    """Rows laid end to end."""

    tokens: Tensor
    """int64 [T]."""
    cuts: Tensor
    """int32 [S + 1]; the rows' boundaries."""
    positions: Tensor
    """int64 [T]; each token's own in its row."""
    predict: Tensor
    """int64 [N]; where the next token is a response token."""
    last: Tensor
    """int64 [S]; each row's last token."""
    signs: Tensor
    """float32 [N]; stands for advantages and returns, since any cost the same. Rows alternate between 1 and -1, as half
    of a group is better than its mean."""


def micro_batches(rows: list[list[int]], budget: int) -> Iterator[Micro]:
    """Rows of [prompt length, tokens ...] packed into at most `budget` tokens at a time."""
    import numpy as np
    import torch

    from rlhf_dist.data.packing import pack

    lengths = np.array([len(row) - 1 for row in rows])
    for chosen in pack(lengths, budget):
        ends = np.cumsum(lengths[chosen])
        starts = ends - lengths[chosen]
        asked = [torch.arange(s + rows[i][0] - 1, e - 1) for i, s, e in zip(chosen, starts, ends, strict=True)]
        yield Micro(
            tokens=torch.tensor([token for i in chosen for token in rows[i][1:]]),
            cuts=torch.tensor([0, *ends.tolist()], dtype=torch.int32),
            positions=torch.cat([torch.arange(length) for length in lengths[chosen].tolist()]),
            predict=torch.cat(asked),
            last=torch.from_numpy(ends - 1),
            signs=torch.cat(
                [torch.full((len(a),), 1.0 if i % 2 else -1.0) for i, a in zip(chosen, asked, strict=True)]
            ),
        )


def hidden(model: Any, micro: Micro) -> Tensor:
    """Last hidden states [T, hidden]."""
    return model.model(
        input_ids=micro.tokens[None],
        position_ids=micro.positions[None],
        use_cache=False,
        cu_seq_lens_q=micro.cuts,
        cu_seq_lens_k=micro.cuts,
    ).last_hidden_state[0]


def logprobs(model: Any, micro: Micro) -> Tensor:
    """Of each response token, float32 [N]."""
    logits = model.lm_head(hidden(model, micro).index_select(0, micro.predict)).float()
    return logits.log_softmax(-1).gather(1, micro.tokens[micro.predict + 1, None])[:, 0]


def numbers(model: Any, micro: Micro, at: Tensor) -> Tensor:
    """A scalar model's, float32 [M], at these positions of the packed row."""
    return model.score(hidden(model, micro).index_select(0, at))[:, 0].float()


def policy_losses(model: Any, micro: Micro) -> Tensor:
    """By token [N]; the gradient of GRPO and PPO where rollouts are on-policy: advantage x grad logprob."""
    return -micro.signs * logprobs(model, micro)


def value_losses(model: Any, micro: Micro) -> Tensor:
    """By token [N]: half the squared error."""
    return 0.5 * (numbers(model, micro, micro.predict) - micro.signs).square()


def update(
    model: Any, optimizer: Any, losses: Callable[[Any, Micro], Tensor], rows: list[list[int]], work: Work
) -> None:
    """One optimizer step on the mean of `losses` over the batch's response tokens: forward, backward, clip, step."""
    import torch

    total = response_tokens(rows)
    for micro in micro_batches(rows, work.micro_batch_tokens):
        (losses(model, micro).sum() / total).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), work.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def response_tokens(rows: list[list[int]]) -> int:
    """Without those of the prompts."""
    return sum(len(row) - 1 - row[0] for row in rows)


def write_work(work: Work, path: Path) -> None:
    """For the two processes."""
    path.write_text(json.dumps(asdict(work)), encoding="utf-8")


def main(argv: list[str]) -> None:
    """`generate` or `train`, and the work's file."""
    half, path = argv
    work = Work(**json.loads(Path(path).read_text(encoding="utf-8")))
    {"generate": generate, "train": train}[half](work)


if __name__ == "__main__":
    main(sys.argv[1:])
