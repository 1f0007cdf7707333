"""The sections about learning: algorithm, learner, critic, reference, supervised and preference training.

Part of the schema (`schema.py` joins it); a section is a frozen dataclass. Imports without torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class OptimizerConfig:
    lr: float = 1e-6
    """Peak learning rate of AdamW."""
    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.95
    """Decay of the mean of their squares."""
    eps: float = 1e-8
    """Added to the root of the latter."""
    weight_decay: float = 0.0
    """Decoupled, as AdamW has it."""
    warmup_steps: int = 10
    """Optimizer steps of linear rise to lr."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After warm-up; linear and cosine fall to `final_lr_share` of lr at the last step."""
    final_lr_share: float = 0.0
    """0: fall to nothing."""
    max_grad_norm: float = 1.0
    """Gradients of a larger global norm are scaled down to it."""


@dataclass(frozen=True)
class KLConfig:
    """The leash to the reference model."""

    place: Literal["reward", "loss"] = "reward"
    """reward: taken off the reward of each token, with the estimator k1 (where credit is by response: that of the whole
    response, less its group's mean, off the advantage); loss: added to the loss with `estimator`."""
    coef: float = 0.0
    """0: no reference model is run, unless `measure`. Usual: 0.05 in the reward, 0.001 to 0.04 in the loss."""
    estimator: Literal["k1", "k2", "k3", "k3+", "abs"] = "k3"
    """Of place loss; k3+ has the value of k3 and the gradient of the true KL."""
    controller: Literal["fixed", "adaptive"] = "fixed"
    """adaptive: `coef` is only the start, then moved so that the KL of a response comes to `target`."""
    target: float = 6.0
    """adaptive: nats per response."""
    horizon: int = 10000
    """adaptive: responses over which the coefficient moves by its full rate."""
    measure: bool = False
    """Run the reference although `coef` is 0, to show kl/*."""


@dataclass(frozen=True)
class ShapingConfig:
    """What is done to the scores of a step before they become rewards, in this order."""

    length_normalize: bool = False
    """Divide each score by its response's tokens."""
    overlong_buffer: int = 0
    """Tokens before the longest response allowed in which a penalty grows from 0 to `overlong_penalty`; 0: off."""
    overlong_penalty: float = 1.0
    """Taken off the score of a response as long as is allowed."""
    repetition_penalty: float = 0.0
    """Times the share of a response's word pairs that it had before, taken off its score; 0: off."""
    missing_end_penalty: float = 0.0
    """Taken off the score of a response that was cut before its end token; 0: off."""
    normalize: Literal["off", "scale", "running", "batch"] = "off"
    """scale: divide by the running deviation; running: running mean and deviation; batch: those of the step."""
    clip: float = 0.0
    """Scores are cut to +-clip; 0: off."""


@dataclass(frozen=True)
class CorrectionConfig:
    """Weights for the distance between the policy that sampled and the learner before its update."""

    level: Literal["off", "token", "sequence", "geometric"] = "off"
    """Whose ratio: each token's; the product over the response; the geometric mean over the response."""
    mode: Literal["truncate", "mask"] = "truncate"
    """What is done to a ratio beyond the bounds: truncate, cut to them; mask, the weight is 0."""
    low: float = 0.0
    """Lower bound, at most 1."""
    high: float = 2.0
    """Upper bound, at least 1."""


@dataclass(frozen=True)
class AlgoConfig:
    name: str = "grpo"
    """The method: a row of `config/methods.py`; docs/algorithms.md compares them."""
    group_size: int = 8
    """Samples per prompt; 1 is usual with a critic and with reinforce_pp."""
    gamma: float = 1.0
    """With a critic, and reinforce_pp: discount of a token's future."""
    lam: float = 0.95
    """With a critic: lambda of GAE."""
    whiten_advantages: bool = True
    """With a critic, and reinforce_pp: advantages of a step to mean 0 and deviation 1, over all its tokens."""
    advantage_clip: float = 0.0
    """With a critic, and reinforce_pp: advantages are cut to +-advantage_clip, after whitening; 0: off."""
    mask_top_p: float = 0.9
    """nlpo: only the likeliest tokens of the mask policy that make up this probability can be sampled; below 1."""
    mask_every: int = 20
    """nlpo: training steps after which the mask policy takes the policy's weights; at first both are the same."""
    filter_groups: bool = False
    """Drop prompts whose samples all score the same (before shaping and KL), and make up for them by others (DAPO's
    dynamic sampling)."""
    filter_rounds: int = 4
    """filter_groups: after so many rounds of sampling a step takes such prompts, too."""
    aggregation: Literal["token_mean", "sequence_mean", "sequence_sum"] = "token_mean"
    """How losses by token become one: token_mean, over all tokens of an optimizer step; sequence_mean, the mean over
    responses of their token means; sequence_sum, the sum over tokens by (responses x longest response allowed)."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus in the loss."""
    kl_stop: float = 0.0
    """The rest of a batch's optimizer steps is left out once the approximate KL to the policy before them, mean per
    token, passes this; 0: off."""
    entropy_share: float = 1.0
    """Only this share of the tokens, those of the highest entropy, has a policy gradient; 1: all. Usual: 0.2."""
    off_policy_limit: float = 0.0
    """No policy gradient for a response with a negative advantage once its tokens are less likely than for the sampler
    by more than this, mean in nats; 0: off."""
    kl: KLConfig = field(default_factory=KLConfig)
    shaping: ShapingConfig = field(default_factory=ShapingConfig)
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    clip_low: float = 0.2
    """The probability ratio is clipped at 1 - clip_low."""
    clip_high: float = 0.2
    """... and at 1 + clip_high. DAPO's clip-higher uses 0.28; gspo bounds the ratio of whole responses: 3e-4, 4e-4."""
    dual_clip: float = 0.0
    """0: off; usual value 3."""


@dataclass(frozen=True)
class LearnerConfig:
    ranks: int = 1
    """DeepSpeed processes."""
    cpus: int = 0
    """CPU threads of a rank; 0: an equal share."""
    zero_stage: int = 0
    """DeepSpeed ZeRO 0, 1, 2 or 3."""
    micro_batch_tokens: int = 2048
    """Tokens packed into one forward pass; a longer sequence goes alone."""
    updates_per_batch: int = 1
    """Optimizer steps in each pass over a batch of rollouts: its groups are cut into so many mini-batches."""
    epochs: int = 1
    """Passes over each batch of rollouts."""
    ema_decay: float = 0.0
    """Keep an exponential moving average of the policy with this decay a step, saved as `hf_ema`; 0: off."""
    logprob_chunk_tokens: int = 1024
    """Tokens whose logits are held at once."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    timeout_s: float = 600.0
    """Limit for one update."""


@dataclass(frozen=True)
class CriticConfig:
    """The value model, of methods that have one."""

    start: str = "policy"
    """Where it comes from: `policy`, the policy's own start with a new head; `shared`, a value head on the policy's
    trunk; or a reward model: a Hugging Face directory or a run directory."""
    side_by_side: bool = False
    """false: critic and policy take turns on the same ranks; true: the critic has as many ranks of its own."""
    warmup_steps: int = 0
    """Training steps at the start in which only the critic learns."""
    clip: float = 0.2
    """Values are kept this close to those before the update; 0: off."""
    coef: float = 0.1
    """start shared: weight of the value loss beside the policy's."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=9e-6))
    """Unused by start shared."""


@dataclass(frozen=True)
class ReferenceConfig:
    """The frozen model that KL is measured to."""

    path: str = ""
    """Empty: the policy's own start."""
    replicas: int = 0
    """Reference servers of their own; 0: the scoring servers hold it too."""
    update_every: int = 0
    """Take the policy's weights every so many training steps; 0: never."""
    ema: float = 0.0
    """Keep this share of the reference at such an update; 0: take the policy's weights whole."""


@dataclass(frozen=True)
class PtxConfig:
    """Pre-training mix: a language-model loss beside the policy's, against forgetting."""

    coef: float = 0.0
    """Weight of the loss, nats per token; 0: off."""
    source: Literal["task", "jsonl", "parquet"] = "task"
    """task: demonstrations of data.task."""
    path: str = ""
    """A file with columns as `data` names them."""
    objective: Literal["response", "text"] = "response"
    """As `sft.objective`."""
    batch_size: int = 16
    """Sequences per optimizer step, over all ranks."""
    max_tokens: int = 512
    """Longer sequences are dropped and counted."""


@dataclass(frozen=True)
class SftConfig:
    """Supervised start on demonstrations (response-only loss) or plain text (language modelling)."""

    steps: int = 300
    """Optimizer steps."""
    batch_size: int = 64
    """Sequences per optimizer step, over all ranks."""
    objective: Literal["response", "text"] = "response"
    """response: loss on the demonstration's tokens only; text: on every token of `data.response_key`."""
    wrong_share: float = 0.0
    """Built-in tasks: share of demonstrations that show the task's shortcut (for `reverse`, the word as it is), which
    is wrong, so that RL has something to teach."""
    max_tokens: int = 512
    """Longer demonstrations are dropped and counted."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-3))
    log_every: int = 10
    """Steps."""
    eval_every: int = 100
    """Steps between passes over the held-out demonstrations; 0: only at the end."""
    checkpoint_every: int = 0
    """Steps; 0: only at the end."""


@dataclass(frozen=True)
class PreferencesConfig:
    """Human judgements that a reward model learns from."""

    source: Literal["task", "jsonl", "parquet"] = "task"
    """task: comparisons of the built-in task `describe`; jsonl also reads .jsonl.gz."""
    path: str = ""
    """Training file."""
    eval_path: str = ""
    """Held-out file. Empty: the last `held_out` rows of `path`."""
    held_out: int = 256
    """Judgements that are kept back."""
    form: Literal["pair", "transcripts", "ranking", "battles", "rating", "thumbs"] = "pair"
    """pair: prompt, chosen, rejected; transcripts: two whole conversations that share a beginning (HH-RLHF); ranking:
    responses with their ranks; battles: two responses and who won, made into Elo ratings; rating: a number; thumbs: up
    or down."""
    prompt_key: str = "prompt"
    """Column with the prompt's text, or a list of {role, content}."""
    chosen_key: str = "chosen"
    """pair, transcripts: the better side."""
    rejected_key: str = "rejected"
    """pair, transcripts: the worse side."""
    margin_key: str = ""
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
    rating_min: float = 0.0
    """rating: lowest that the scale allows."""
    rating_max: float = 5.0
    """rating: highest."""
    unusable: Literal["refuse", "drop"] = "refuse"
    """Rows that nothing can be learnt from (an empty response, equal sides, no shared prompt, ties): drop leaves them
    out and counts them."""
    train_size: int = 20000
    """task: comparisons in one epoch."""
    responses: int = 2
    """task: responses to one prompt that are compared; 2: a pair, more: a ranking, all of whose pairs count."""
    noise: float = 1.0
    """task: temperature of the labels: the better side is chosen with probability sigmoid(gold difference / noise)."""
    max_tokens: int = 512
    """Judgements with a longer prompt plus response are dropped and counted."""


@dataclass(frozen=True)
class RewardConfig:
    """Training of a reward model by `rlhf-dist reward`."""

    steps: int = 300
    """Optimizer steps at most."""
    batch_size: int = 64
    """Judgements per optimizer step, over all ranks: comparisons, rankings or ratings."""
    lm_coef: float = 0.0
    """Weight of a language-model loss on the better response beside the ranking loss; 0: off."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=9e-6))
    log_every: int = 10
    """Steps."""
    eval_every: int = 50
    """Steps between passes over the held-out judgements; a model is kept whenever its held-out loss is the lowest. 0:
    only at the end, whose model is kept."""
    patience: int = 3
    """Stop after so many such passes without a lower loss; 0: never."""
