"""One rank of the recorded trace, in a process of its own: `python trace_ranks.py RANK WORLD PORT FOLDER`.

Three training steps of `loop.step.train_step` for each of `METHODS`, on real DeepSpeed. Weights, trajectories, scores
and reference logprobs come from numpy's RandomState, whose streams are frozen: nothing depends on an engine, on
sampling or on torch's generators. Leaves FOLDER/WORLD-RANK.pt. `python trace_ranks.py record` writes `trace.json`; when
to do that says `test_learner_trace.py`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from forks import ForkServer
from rank_processes import run_ranks
from safetensors.torch import save_file
from sample_groups import group_of
from torch import Tensor

from rlhf_dist.algo.recipes import ALGORITHMS
from rlhf_dist.config.schema import (
    AlgoConfig,
    CorrectionConfig,
    CriticConfig,
    KLConfig,
    LearnerConfig,
    ModelConfig,
    OptimizerConfig,
)
from rlhf_dist.learner.collator import Collator
from rlhf_dist.learner.critic import CriticLearner
from rlhf_dist.learner.deepspeed_engine import init_process_group
from rlhf_dist.learner.model_engine import Engine, ModelEngine
from rlhf_dist.learner.policy_learner import PolicyLearner
from rlhf_dist.learner.rank_batch import RankBatch
from rlhf_dist.learner.scalar_engine import ScalarEngine
from rlhf_dist.learner.shard import Shard
from rlhf_dist.learner.token_sums import Estimate, EstimateSums
from rlhf_dist.learner.witness import Seen
from rlhf_dist.loop.ports import Batches, Estimates
from rlhf_dist.loop.shaper import Shaper
from rlhf_dist.loop.step import Learning, train_step
from rlhf_dist.models.tokenizer import character_tokenizer
from rlhf_dist.rollout.trajectories import head_of
from rlhf_dist.telemetry.metrics import MetricSums
from rlhf_dist.telemetry.timeline import Stopwatch
from rlhf_dist.types import Experience, Handle, Message, Prompt, ReferenceHead, Sampling, Scores
from rlhf_dist.weights.receipts import Announcement
from rlhf_dist.weights.sync import WeightSync

TRACE = Path(__file__).with_name("trace.json")
RECORDED = ("metrics", "grad_norms", "moved")
STEPS = 3
SEED = 170
"""No ratio and no value comes nearer than 6e-5 to a bound at which it is clipped: rounding decides nothing."""
VOCABULARY, HIDDEN, LAYERS, HEADS, INNER = 80, 64, 2, 2, 128
LONGEST = 24
SAMPLING = Sampling(temperature=0.9, top_p=1.0, top_k=0, max_tokens=LONGEST, stop=())
# eps is of the size of a gradient's root mean square: with a much smaller one Adam would blow the rounding of small
# gradients up to steps of full size, with a much larger one beta2 would not be seen.
OPTIMIZER = OptimizerConfig(
    lr=1.5e-3, eps=5e-3, weight_decay=0.05, warmup_steps=3, schedule="cosine", final_lr_share=0.1, max_grad_norm=2.5
)


@dataclass(frozen=True)
class Method:
    """What is trained."""

    algo: AlgoConfig
    zero_stage: int
    """Of two ranks; one rank has 0."""
    epochs: int = 1


METHODS = {
    "grpo": Method(
        AlgoConfig(clip_low=0.02, clip_high=0.03, correction=CorrectionConfig(level="token", high=1.5)),
        zero_stage=2,
    ),
    "grpo, KL and entropy in the loss": Method(
        AlgoConfig(
            clip_low=0.02,
            clip_high=0.03,
            aggregation="sequence_mean",
            entropy_coef=0.02,
            kl=KLConfig(place="loss", coef=0.05),
        ),
        zero_stage=3,
    ),
    "ppo with critic": Method(
        AlgoConfig(name="ppo", clip_low=0.02, clip_high=0.03, gamma=0.98, lam=0.9, kl=KLConfig(coef=0.1)),
        zero_stage=2,
        epochs=2,
    ),
}
METRICS = (
    "policy/loss", "policy/ratio", "policy/ratio_max", "policy/approx_kl", "policy/clipped_low", "policy/clipped_high",
    "policy/behaviour_kl", "policy/entropy", "policy/advantage_mean", "policy/advantage_std", "correction/weight",
    "kl/loss", "kl/coef", "critic/loss", "critic/value_clipped", "critic/value_mean", "critic/return_mean",
    "critic/explained_variance", "learner/lr", "learner/updates", "learner/trained_share", "rollout/logprob_diff_mean",
)  # fmt: skip
"""What is recorded of a step's report, where the method has it."""
SCORES = (
    (((0.1, 0.9, 0.4, 0.4), (1.0, 1.0, 1.0), (0.0, 1.0), (2.5, -1.0, 0.3, 0.7), (0.6, 0.6), (0.2, 0.8, 0.5))),
    (((0.5, 0.5), (0.3, 0.3, 0.3, 0.3), (1.0, 1.0), (0.0, 0.0, 1.0), (3.0, 1.0, 2.0, 2.0), (-0.4, 0.9))),
    (((0.0, 1.0, 0.0, 0.0), (0.7, 0.1), (0.2, 0.2), (0.4, 0.4, 0.4), (0.9, 0.1, 0.5), (1.0, 1.0))),
)
"""[steps][groups][samples]. Groups of equal scores are idle in GRPO: among others the first half of step 2, which is an
optimizer step of its own, and all but one group of the second half of step 3, where a rank has an empty micro-batch."""


def make_models(folder: Path) -> None:
    """`FOLDER/policy` and `FOLDER/critic`: the config written out here, so that no other default has a part in it."""
    config: dict[str, Any] = {
        "model_type": "qwen2", "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": 1, "hidden_act": "silu",
        "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "attention_dropout": 0.0,
        "use_sliding_window": False, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        "dtype": "float32", "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
    }  # fmt: skip
    shared = shapes()
    for name, seed, kind, own, extra in (
        ("policy", 1, "Qwen2ForCausalLM", {"lm_head.weight": (VOCABULARY, HIDDEN)}, {}),
        ("critic", 2, "Qwen2ForSequenceClassification", {"score.weight": (1, HIDDEN)}, {"num_labels": 1}),
    ):
        chance = np.random.RandomState(seed)
        weights = {}
        for key, shape in (shared | own).items():
            drawn = 0.12 * chance.standard_normal(shape)
            weights[key] = torch.from_numpy((1.0 + drawn if "norm" in key else drawn).astype(np.float32))
        (folder / name).mkdir()
        save_file(weights, folder / name / "model.safetensors", metadata={"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(config | extra | {"architectures": [kind]}))
        character_tokenizer().save_pretrained(folder / name)


def shapes() -> dict[str, tuple[int, ...]]:
    """Those of the trunk, by name."""
    width = HIDDEN // HEADS
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        for part, size in (("q", HIDDEN), ("k", width), ("v", width)):
            found[f"{at}self_attn.{part}_proj.weight"] = (size, HIDDEN)
            found[f"{at}self_attn.{part}_proj.bias"] = (size,)
        found[f"{at}self_attn.o_proj.weight"] = (HIDDEN, HIDDEN)
        found |= {f"{at}mlp.{part}_proj.weight": (INNER, HIDDEN) for part in ("gate", "up")}
        found[f"{at}mlp.down_proj.weight"] = (HIDDEN, INNER)
        found |= {f"{at}{part}_layernorm.weight": (HIDDEN,) for part in ("input", "post_attention")}
    return found | {"model.norm.weight": (HIDDEN,)}


def experiences(step: int, bodies: Bodies) -> list[Experience]:
    """The trajectories of a training step: groups of 2 to 4 samples, prompts of 2 to 9 tokens, responses of 1 to 24.

    Their tokens go to `bodies`.
    """
    chance = np.random.RandomState(SEED + step)
    made = []
    for group, scores in enumerate(SCORES[step - 1]):
        lengths = chance.randint(1, LONGEST + 1, size=len(scores))
        total = int(lengths.sum())
        prompt = Prompt(f"{step}/{group}", (Message("user", "x"),), "", "test")
        start = chance.randint(0, VOCABULARY, size=chance.randint(2, 10))
        tokens = chance.randint(0, VOCABULARY, size=total)
        sampled = (-4.7 + 0.5 * chance.standard_normal(total)).astype(np.float32)
        body = group_of(
            start,
            tokens,
            lengths,
            prompt=prompt,
            logprobs=sampled,
            version=step - 1,
            reasons=["length" if length == LONGEST else "stop" for length in lengths],
        )
        reference = (sampled + 0.3 * chance.standard_normal(total)).astype(np.float32)
        kl = np.add.reduceat(sampled - reference, np.concatenate([[0], np.cumsum(lengths)[:-1]]))
        none = np.zeros(len(scores))
        bodies.collator.keep(body.request.key, body)
        bodies.collator.keep_reference(body.request.key, reference)
        made.append(
            Experience(
                prompt,
                head_of(body),
                Scores(np.array(scores, np.float32), {}, none, none),
                body.request.key,
                ReferenceHead(kl, none),
            )
        )
    return made


class Unasked:
    """What no trace asks for."""

    def _never(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError

    faults = keep = keep_copy = keep_references = recall = forget = forget_all = save = save_step = texts = _never


class Bodies(Unasked):
    """`loop.ports.Bodies` of a process alone: a collator, and handles that hold what they stand for."""

    def __init__(self) -> None:
        self.collator = Collator()

    def batches(self, shards: Sequence[Shard], keys: Sequence[str], compared: bool) -> list[Handle[RankBatch]]:
        return [Handle(batch) for batch in self.collator.batches(shards, keys, compared)]


def everyone(mine: Any) -> list[Any]:
    """What each rank has, by rank."""
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, mine)
    return found


class Noting(Engine):
    """Notes the gradient norm of each optimizer step."""

    norms: list[float]

    def step(self, lr: float) -> float:
        self.norms = [*getattr(self, "norms", []), super().step(lr)]
        return self.norms[-1]


class NotingPolicy(Noting, ModelEngine):
    pass


class NotingCritic(Noting, ScalarEngine):
    pass


class PolicyRanks(Unasked):
    """`loop.ports.Policy`, as each of the ranks sees it."""

    def __init__(self, learner: PolicyLearner, ranks: int) -> None:
        self._learner = learner
        self.ranks = ranks
        self.rows: list[list[int]] = []
        """[optimizer steps of first passes][micro-batches of all ranks]: rows."""

    def update(self, batches: Batches, estimates: Estimates) -> MetricSums:
        rank = self._learner.engine.rank
        for cuts in zip(*(batch.place.updates for batch in batches), strict=True):
            self.rows.append([len(chosen) for micro_batches in cuts for chosen in micro_batches])
        own = estimates.handles[rank].place if estimates.handles else None
        return MetricSums.merge(everyone(self._learner.update(batches[rank].place, own, estimates.whitening)))

    def witnessed(self) -> list[Seen]:
        return everyone(self._learner.witness and self._learner.witness.seen())

    def publish(self, version: int) -> Announcement:
        return everyone(self._learner.engine.publish(version))[0]


class CriticRanks(Unasked):
    """`loop.ports.Critic`, likewise."""

    def __init__(self, learner: CriticLearner) -> None:
        self._learner = learner
        self._rank = learner.engine.rank

    def estimate(self, batches: Batches) -> tuple[Sequence[Handle[Estimate]], EstimateSums]:
        sums, own = self._learner.estimate(batches[self._rank].place)
        return [Handle(found) for found in everyone(own)], EstimateSums.merge(everyone(sums))

    def begin_update(self, batches: Batches, estimates: Estimates) -> Handle[MetricSums]:
        own = estimates.handles[self._rank].place
        return Handle(self._learner.update(batches[self._rank].place, own))

    def finish_update(self, pending: Handle[MetricSums]) -> MetricSums:
        return MetricSums.merge(everyone(pending.place))


class NoWorkers:
    """`weights.sync.Receivers` where the trajectories are given."""

    def make_room(self) -> list[str]:
        return []

    def load_weights(self, announcement: Announcement) -> list[str]:
        return []


def run(method: Method, world: int, folder: Path) -> dict[str, Any]:
    """The trace of one method."""
    algorithm = ALGORITHMS[method.algo.name](method.algo)
    learner = LearnerConfig(
        ranks=world,
        zero_stage=method.zero_stage if world > 1 else 0,
        # Two ranks with a row or two in a micro-batch: with an odd number of rows one of them has an empty one.
        micro_batch_tokens=40 if world == 1 else 24,
        logprob_chunk_tokens=32,
        updates_per_batch=2,
        epochs=method.epochs,
        optimizer=OPTIMIZER,
    )
    critic = CriticConfig(clip=0.03, optimizer=OPTIMIZER)
    policy_engine = NotingPolicy(folder / "policy", ModelConfig(), learner, OPTIMIZER, device="cpu", bucket_mib=1)
    engines: dict[str, Any] = {"policy": policy_engine}
    critics = None
    if algorithm.needs_critic:
        engines["critic"] = NotingCritic(folder / "critic", ModelConfig(), learner, OPTIMIZER, device="cpu")
        critics = CriticRanks(CriticLearner(engines["critic"], algorithm, critic, kl_in_reward=True))
    start = {name: weights(engine) for name, engine in engines.items()}
    policy = PolicyRanks(PolicyLearner(policy_engine, algorithm, witness=policy_engine.witness()), world)
    sync = WeightSync(policy, NoWorkers())
    shaper, metrics, bodies = Shaper(method.algo, LONGEST), [], Bodies()
    for step in range(1, STEPS + 1):
        report, push = train_step(
            experiences(step, bodies),
            policy=policy,
            critic=critics,
            bodies=bodies,
            sync=sync,
            shaper=shaper,
            learning=Learning(algorithm, learner, critic, SAMPLING, STEPS, witness=True),
            step=step,
            watch=Stopwatch(),
        )
        assert not push.problems and report.witnessed is not None and report.witnessed.problems == ()
        metrics.append({name: float(report.metrics[name]) for name in METRICS if name in report.metrics})
    policy_engine.close()
    return {
        "rows": policy.rows,
        "metrics": metrics,
        "grad_norms": {name: engine.norms for name, engine in engines.items()},
        "moved": {name: moved(start[name], weights(engine)) for name, engine in engines.items()},
    }


def weights(engine: Engine) -> dict[str, Tensor]:
    return {name: tensor.double().clone() for name, tensor in engine.weights()}


def moved(start: Mapping[str, Tensor], end: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """How far each parameter has gone: its length, its sum, and two projections, in float64.

    Projections go on vectors of cosines: two elements that changed places, or another sign, would be seen.
    """
    found = {}
    for name, tensor in end.items():
        gone = (tensor - start[name]).flatten()
        place = torch.arange(len(gone), dtype=torch.float64)
        along = [float(gone @ (pace * place + pace).cos()) for pace in (1.3, 2.9)]
        found[name] = [float(gone.norm()), float(gone.sum()), *along]
    return found


def record() -> None:
    """Write `trace.json`, of one rank alone."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_models(folder)
        forks = ForkServer()
        alone = run_ranks(forks, "trace_ranks.py", folder, folder)[1, 0]
        forks.close()
    kept = {name: {part: found[part] for part in RECORDED} for name, found in alone.items()}
    TRACE.write_text(json.dumps(rounded(kept), indent=1) + "\n")


def rounded(found: Any) -> Any:
    """Nine digits are all that float32 can have."""
    if isinstance(found, dict):
        return {name: rounded(value) for name, value in found.items()}
    if isinstance(found, list):
        return [rounded(value) for value in found]
    return float(f"{found:.9g}")


def main() -> None:
    rank, world, port = (int(word) for word in sys.argv[1:4])
    folder = Path(sys.argv[4])
    init_process_group(rank, world, "127.0.0.1", port, device="cpu", threads=1, timeout_s=120.0)
    torch.save({name: run(method, world, folder) for name, method in METHODS.items()}, folder / f"{world}-{rank}.pt")


if __name__ == "__main__":
    record() if sys.argv[1:] == ["record"] else main()
