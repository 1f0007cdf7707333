"""The sections about learning: algorithm, learner, critic, reference, supervised and preference training.

Part of the schema (`schema.py` joins it); a section is a frozen dataclass. Imports without torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rlhf_dist.config import effects
from rlhf_dist.config.keys import (
    ANY,
    COUNT,
    LIMIT_S,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    SHARE_ABOVE_0,
    SHARE_BELOW_1,
    Range,
    key,
)


@dataclass(frozen=True)
class OptimizerConfig:
    lr: float = key(1e-6, POSITIVE)
    """Peak learning rate of AdamW."""
    beta1: float = key(0.9, SHARE_BELOW_1)
    """Decay of the mean of gradients."""
    beta2: float = key(0.95, SHARE_BELOW_1)
    """Decay of the mean of their squares."""
    eps: float = key(1e-8, POSITIVE)
    """Added to the root of the latter."""
    weight_decay: float = key(0.0, NOT_NEGATIVE)
    """Decoupled, as AdamW has it."""
    warmup_steps: int = key(10, NOT_NEGATIVE)
    """Optimizer steps of linear rise to lr."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After warm-up; linear and cosine fall to `final_lr_share` of lr at the last step."""
    final_lr_share: float = key(0.0, SHARE)
    """0: fall to nothing."""
    max_grad_norm: float = key(1.0, POSITIVE)
    """Gradients of a larger global norm are scaled down to it."""


@dataclass(frozen=True)
class KLConfig:
    """The leash to the reference model."""

    place: Literal["reward", "loss"] = key(
        "reward", effects.where("algo.kl.coef", bool, "set that above 0, as 0.001, or take it out")
    )
    """reward: taken off the reward of each token, with the estimator k1 (where credit is by response: that of the whole
    response, less its group's mean, off the advantage); loss: added to the loss with `estimator`."""
    coef: float = key(0.0, NOT_NEGATIVE)
    """0: no reference model is run, unless `measure`. Usual: 0.05 in the reward, 0.001 to 0.04 in the loss."""
    estimator: Literal["k1", "k2", "k3", "k3+", "abs"] = key("k3", effects.KL_IN_LOSS)
    """Of place loss; k3+ has the value of k3 and the gradient of the true KL."""
    controller: Literal["fixed", "adaptive"] = "fixed"
    """adaptive: `coef` is only the start, then moved so that the KL of a response comes to `target`."""
    target: float = key(6.0, POSITIVE, effects.ADAPTIVE_KL)
    """adaptive: nats per response."""
    horizon: int = key(10000, COUNT, effects.ADAPTIVE_KL)
    """adaptive: responses over which the coefficient moves by its full rate."""
    measure: bool = False
    """Run the reference although `coef` is 0, to show kl/*."""


@dataclass(frozen=True)
class ShapingConfig:
    """What is done to the scores of a step before they become rewards, in this order."""

    length_normalize: bool = key(False, effects.SHAPED_GREEDY)
    """Divide each score by its response's tokens."""
    overlong_buffer: int = key(0, NOT_NEGATIVE, effects.SHAPED_GREEDY)
    """Tokens before the longest response allowed in which a penalty grows from 0 to `overlong_penalty`; 0: off."""
    overlong_penalty: float = key(
        1.0, NOT_NEGATIVE, effects.where("algo.shaping.overlong_buffer", bool, "set both or none")
    )
    """Taken off the score of a response as long as is allowed."""
    repetition_penalty: float = key(0.0, NOT_NEGATIVE, effects.SHAPED_GREEDY)
    """Times the share of a response's word pairs that it had before, taken off its score; 0: off."""
    missing_end_penalty: float = key(0.0, NOT_NEGATIVE, effects.SHAPED_GREEDY)
    """Taken off the score of a response that was cut before its end token; 0: off."""
    normalize: Literal["off", "scale", "running", "batch"] = "off"
    """scale: divide by the running deviation; running: running mean and deviation; batch: those of the step."""
    clip: float = key(0.0, NOT_NEGATIVE)
    """Scores are cut to +-clip; 0: off."""


@dataclass(frozen=True)
class CorrectionConfig:
    """Weights for the distance between the policy that sampled and the learner before its update."""

    level: Literal["off", "token", "sequence", "geometric"] = "off"
    """Whose ratio: each token's; the product over the response; the geometric mean over the response."""
    mode: Literal["truncate", "mask"] = key("truncate", effects.CORRECTING)
    """What is done to a ratio beyond the bounds: truncate, cut to them; mask, the weight is 0."""
    low: float = key(0.0, SHARE, effects.CORRECTING)
    """Lower bound, at most 1."""
    high: float = key(2.0, COUNT, effects.CORRECTING)
    """Upper bound, at least 1."""


@dataclass(frozen=True)
class AlgoConfig:
    name: str = "grpo"
    """The method: a row of `config/methods.py`; docs/algorithms.md compares them."""
    group_size: int = key(8, COUNT)
    """Samples per prompt; 1 is usual with a critic and with reinforce_pp."""
    gamma: float = key(1.0, SHARE, effects.of_method)
    """With a critic, and reinforce_pp: discount of a token's future."""
    lam: float = key(0.95, SHARE, effects.of_method)
    """With a critic: lambda of GAE."""
    whiten_advantages: bool = key(True, effects.of_method)
    """With a critic, and reinforce_pp: advantages of a step to mean 0 and deviation 1, over all its tokens."""
    advantage_clip: float = key(0.0, NOT_NEGATIVE, effects.of_method)
    """With a critic, and reinforce_pp: advantages are cut to +-advantage_clip, after whitening; 0: off."""
    mask_top_p: float = key(0.9, Range("greater than 0 and less than 1", lambda x: 0 < x < 1), effects.of_method)
    """nlpo: only the likeliest tokens of the mask policy that make up this probability can be sampled; below 1."""
    mask_every: int = key(20, COUNT, effects.of_method)
    """nlpo: training steps after which the mask policy takes the policy's weights; at first both are the same."""
    filter_groups: bool = key(False, effects.of_method)
    """Drop prompts whose samples all score the same (before shaping and KL), and make up for them by others (DAPO's
    dynamic sampling)."""
    filter_rounds: int = key(4, COUNT, effects.where("algo.filter_groups", bool, "set that to true, or take it out"))
    """filter_groups: after so many rounds of sampling a step takes such prompts, too."""
    aggregation: Literal["token_mean", "sequence_mean", "sequence_sum"] = key("token_mean", effects.of_method)
    """How losses by token become one: token_mean, over all tokens of an optimizer step; sequence_mean, the mean over
    responses of their token means; sequence_sum, the sum over tokens by (responses x longest response allowed)."""
    entropy_coef: float = key(0.0, NOT_NEGATIVE)
    """Weight of the entropy bonus in the loss."""
    kl_stop: float = key(0.0, NOT_NEGATIVE, effects.SEVERAL_UPDATES)
    """The rest of a batch's optimizer steps is left out once the approximate KL to the policy that the ratio is taken
    to, mean per token, passes this; groups that were in none of the policy's are dropped as `kl_stop`. 0: off."""
    entropy_share: float = key(1.0, SHARE_ABOVE_0)
    """Only this share of the tokens, those of the highest entropy, has a policy gradient; 1: all. Usual: 0.2."""
    off_policy_limit: float = key(0.0, NOT_NEGATIVE)
    """No policy gradient for a response with a negative advantage once its tokens are less likely than for the sampler
    by more than this, mean in nats; 0: off."""
    kl: KLConfig = field(default_factory=KLConfig)
    shaping: ShapingConfig = field(default_factory=ShapingConfig)
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    clip_low: float = key(0.2, SHARE_ABOVE_0, effects.of_method)
    """The probability ratio is clipped at 1 - clip_low."""
    clip_high: float = key(0.2, POSITIVE, effects.of_method)
    """... and at 1 + clip_high. DAPO's clip-higher uses 0.28; gspo bounds the ratio of whole responses: 3e-4, 4e-4."""
    ratio_to: Literal["proximal", "behaviour"] = key(
        "proximal", effects.WITH_RATIO, effects.RATIO_OF_METHOD, effects.COUNTED_ONCE
    )
    """What the probability ratio compares with: proximal, the learner before the batch's first update; behaviour, the
    policy that sampled, so that the bounds also hold for tokens of older weights."""
    dual_clip: float = key(0.0, Range("0 (off) or greater than 1", lambda x: x == 0 or x > 1), effects.of_method)
    """0: off; usual value 3."""


@dataclass(frozen=True)
class LearnerConfig:
    ranks: int = key(1, COUNT)
    """DeepSpeed processes."""
    cpus: int = key(0, NOT_NEGATIVE)
    """CPU threads of a rank; 0: an equal share."""
    sequence_parallel: int = key(1, COUNT, effects.DIVIDES_RANKS)
    """Ranks that share the tokens of each micro-batch and the heads of its attention (DeepSpeed-Ulysses), for sequences
    too long for one; 1: each rank has sequences of its own."""
    zero_stage: int = key(0, Range("0, 1, 2 or 3", lambda x: x in (0, 1, 2, 3)))
    """DeepSpeed ZeRO 0, 1, 2 or 3."""
    offload: Literal["none", "optimizer"] = key("none", effects.SPARES_GPUS, effects.WITH_ZERO_2)
    """optimizer: the float32 weights, the moments of Adam and the sums of gradients lie in the host's memory, whose
    processor steps them: a GPU holds 16 bytes less for each of its parameters, and waits longer for a step."""
    micro_batch_tokens: int = key(2048, COUNT)
    """Tokens packed into one forward pass; a longer sequence goes alone."""
    updates_per_batch: int = key(1, COUNT)
    """Optimizer steps in each pass over a batch of rollouts: its groups are cut into so many mini-batches."""
    epochs: int = key(1, COUNT)
    """Passes over each batch of rollouts."""
    ema_decay: float = key(0.0, SHARE_BELOW_1)
    """Keep an exponential moving average of the policy with this decay a step, saved as `hf_ema`; 0: off."""
    delta_push: bool = key(False, effects.IN_BFLOAT16)
    """Mark the 16-bit words that an optimizer step changes, and send only those to nodes that have the version before;
    the whole where more than a quarter changed. Saves network where weights go to other nodes, and gathering under
    ZeRO 3; pays at small learning rates."""
    logprob_chunk_tokens: int = key(1024, COUNT)
    """Tokens whose logits are held at once."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    keep_state_every: int = key(0, NOT_NEGATIVE, effects.RANKS_START_AGAIN, effects.FIXED_REFERENCE)
    """Every so many training steps of `train` the ranks also write what a checkpoint has into `/dev/shm`, so that ranks
    that are lost and started again repeat so many steps at most; 0: they go on from the newest checkpoint. All ranks
    have to be on the command's node. Takes the memory of two checkpoints."""
    timeout_s: float = key(600.0, LIMIT_S)
    """`train`: longest time without a micro-batch of any rank in an update, and limit for whatever else ranks are asked
    for. `sft`, `reward` and `prefer`: limit for one update."""

    @property
    def shares(self) -> int:
        """Parts that the rows of a batch are dealt into: one for each group of ranks that share their tokens."""
        return self.ranks // max(1, self.sequence_parallel)


@dataclass(frozen=True)
class CriticConfig:
    """The value model, of methods that have one."""

    start: str = key("policy", effects.WITH_CRITIC, effects.needed("give `policy`, `shared` or a reward model"))
    """Where it comes from: `policy`, the policy's own start with a new head; `shared`, a value head on the policy's
    trunk; or a reward model: a Hugging Face directory or a run directory."""
    side_by_side: bool = key(False, effects.WITH_CRITIC, effects.OWN_TRUNK)
    """false: critic and policy take turns on the same ranks; true: the critic has as many ranks of its own."""
    warmup_steps: int = key(0, NOT_NEGATIVE, effects.WITH_CRITIC, effects.FROZEN_POLICY)
    """Training steps at the start in which only the critic learns."""
    clip: float = key(0.2, NOT_NEGATIVE, effects.WITH_CRITIC)
    """Values are kept this close to those before the update; 0: off."""
    coef: float = key(0.1, NOT_NEGATIVE, effects.WITH_CRITIC, effects.SHARED_TRUNK)
    """start shared: weight of the value loss beside the policy's."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=9e-6))
    """Unused by start shared."""


@dataclass(frozen=True)
class ReferenceConfig:
    """The frozen model that KL is measured to."""

    path: str = key("", effects.WITH_REFERENCE)
    """Empty: the policy's own start."""
    replicas: int = key(0, NOT_NEGATIVE, effects.WITH_REFERENCE)
    """Reference servers of their own; 0: the scoring servers hold it too."""
    update_every: int = key(0, NOT_NEGATIVE, effects.WITH_REFERENCE)
    """Take the policy's weights every so many training steps; 0: never."""
    ema: float = key(0.0, SHARE_BELOW_1, effects.where("reference.update_every", bool, "set both or none"))
    """Keep this share of the reference at such an update; 0: take the policy's weights whole."""


@dataclass(frozen=True)
class PtxConfig:
    """Pre-training mix: a language-model loss beside the policy's, against forgetting."""

    coef: float = key(0.0, NOT_NEGATIVE)
    """Weight of the loss, nats per token; 0: off."""
    source: Literal["task", "jsonl", "parquet"] = "task"
    """task: demonstrations of data.task."""
    path: str = key("", effects.PTX_WEIGHT, effects.file_of("ptx"), effects.PTX_PATH, effects.a_file, shown=repr)
    """A file with columns as `data` names them."""
    objective: Literal["response", "text"] = key("response", effects.A_FILES_TEXT)
    """As `sft.objective`."""
    batch_size: int = key(16, COUNT)
    """Sequences per optimizer step, over all ranks."""
    max_tokens: int = key(512, COUNT, effects.PTX_FITS)
    """Longer sequences are dropped and counted."""


@dataclass(frozen=True)
class SftConfig:
    """Supervised start on demonstrations (response-only loss) or plain text (language modelling)."""

    steps: int = key(300, COUNT)
    """Optimizer steps."""
    batch_size: int = key(64, COUNT, effects.one_a_rank("sequence"))
    """Sequences per optimizer step, over all ranks."""
    objective: Literal["response", "text"] = "response"
    """response: loss on the demonstration's tokens only; text: on every token of `data.response_key`."""
    wrong_share: float = key(0.0, SHARE, effects.BUILT_IN, effects.WITH_WRONG_ANSWERS)
    """Built-in tasks: share of demonstrations that show the task's shortcut (for `reverse`, the word as it is), which
    is wrong, so that RL has something to teach."""
    max_tokens: int = key(512, COUNT, effects.TINY_FITS)
    """Longer demonstrations are dropped and counted."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-3))
    log_every: int = key(10, COUNT)
    """Steps."""
    eval_every: int = key(100, NOT_NEGATIVE)
    """Steps between passes over the held-out demonstrations; 0: only at the end."""
    checkpoint_every: int = key(0, NOT_NEGATIVE)
    """Steps; 0: only at the end."""


@dataclass(frozen=True)
class PreferencesConfig:
    """Human judgements that a reward model learns from (`reward`), or the policy itself (`prefer`)."""

    source: Literal["task", "jsonl", "parquet"] = "task"
    """task: comparisons of the built-in task `describe`; jsonl also reads .jsonl.gz."""
    path: str = key("", effects.file_of("preferences"), effects.PREFERENCES_PATH, effects.a_file, shown=repr)
    """Training file."""
    eval_path: str = key("", effects.file_of("preferences"), effects.a_file, shown=repr)
    """Held-out file. Empty: the last `held_out` rows of `path`."""
    held_out: int = key(256, COUNT)
    """Judgements that are kept back."""
    form: Literal["pair", "transcripts", "ranking", "battles", "rating", "thumbs"] = key("pair", effects.A_FILES_FORM)
    """pair: prompt, chosen, rejected; transcripts: two whole conversations that share a beginning (HH-RLHF); ranking:
    responses with their ranks; battles: two responses and who won, made into Elo ratings; rating: a number; thumbs: up
    or down."""
    prompt_key: str = "prompt"
    """Column with the prompt's text, or a list of {role, content}."""
    chosen_key: str = "chosen"
    """pair, transcripts: the better side."""
    rejected_key: str = "rejected"
    """pair, transcripts: the worse side."""
    margin_key: str = key(
        "", effects.where("preferences.source", effects.but("task"), "take it out"), effects.MARGIN, shown=repr
    )
    """pair: column with how much better, in the unit of scores; empty: none."""
    responses_key: str = "responses"
    """ranking, battles: list of response texts (battles: of two)."""
    ranks_key: str = "ranks"
    """ranking: a list of ranks, 1 the best."""
    winner_key: str = "winner"
    """battles: 0 or 1, the place of the winner, or `tie`."""
    response_key: str = "response"
    """rating, thumbs: the response's text."""
    rating_key: str = "rating"
    """rating: a number; thumbs: true or false, 1 or 0, up or down."""
    rating_min: float = key(0.0, ANY)
    """rating: lowest that the scale allows."""
    rating_max: float = key(5.0, ANY)
    """rating: highest."""
    unusable: Literal["refuse", "drop"] = "refuse"
    """Rows that nothing can be learnt from (an empty response, equal sides, no shared prompt, ties): drop leaves them
    out and counts them."""
    train_size: int = key(20000, COUNT)
    """task: comparisons in one epoch."""
    responses: int = key(2, Range("between 2 and 16", lambda x: 2 <= x <= 16))
    """task: responses to one prompt that are compared; 2: a pair, more: a ranking, all of whose pairs count."""
    noise: float = key(1.0, POSITIVE)
    """task: temperature of the labels: the better side is chosen with probability sigmoid(gold difference / noise)."""
    max_tokens: int = key(512, COUNT, effects.TINY_FITS)
    """Judgements with a longer prompt plus response are dropped and counted."""


@dataclass(frozen=True)
class RewardConfig:
    """Training of a reward model by `rlhf-dist reward`."""

    steps: int = key(300, COUNT)
    """Optimizer steps at most."""
    batch_size: int = key(64, COUNT, effects.one_a_rank("judgement"))
    """Judgements per optimizer step, over all ranks: comparisons, rankings or ratings."""
    lm_coef: float = key(0.0, NOT_NEGATIVE, effects.BETTER_RESPONSE, shown="{:g}".format)
    """Weight of a language-model loss on the better response beside the ranking loss; 0: off."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=9e-6))
    log_every: int = key(10, COUNT)
    """Steps."""
    eval_every: int = key(50, NOT_NEGATIVE)
    """Steps between passes over the held-out judgements; a model is kept whenever its held-out loss is the lowest. 0:
    only at the end, whose model is kept."""
    patience: int = key(3, NOT_NEGATIVE)
    """Stop after so many such passes without a lower loss; 0: never."""
