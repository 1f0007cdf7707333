"""Every key of a config, with its type, default and meaning. Imports without torch.

A section is a frozen dataclass; a class of the package gets its own section and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rlhf_dist.config.learning import (
    AlgoConfig as AlgoConfig,
    CorrectionConfig as CorrectionConfig,
    CriticConfig as CriticConfig,
    KLConfig as KLConfig,
    LearnerConfig as LearnerConfig,
    OptimizerConfig as OptimizerConfig,
    PreferencesConfig as PreferencesConfig,
    PtxConfig as PtxConfig,
    ReferenceConfig as ReferenceConfig,
    RewardConfig as RewardConfig,
    SftConfig as SftConfig,
    ShapingConfig as ShapingConfig,
)


@dataclass(frozen=True)
class TinyConfig:
    """The tiny Qwen2-shaped model that is made from a seed when `model.path` is `tiny`."""

    hidden_size: int = 256
    """A multiple of `heads`."""
    intermediate_size: int = 768
    """Width of the feed-forward layers."""
    layers: int = 4
    """Transformer layers."""
    heads: int = 8
    """Attention heads."""
    kv_heads: int = 4
    """head_dim = hidden_size / heads; the CPU engine accepts 32, 64, 80, 96, 112, 128 and larger."""
    max_positions: int = 512
    """Longest prompt plus response, tokens."""
    seed: int = 0
    """Of the starting weights."""


@dataclass(frozen=True)
class ModelConfig:
    path: str = "tiny"
    """`tiny`, a Hugging Face directory or hub name, or a run directory (its newest checkpoint)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights on both sides; bfloat16 needs learner.zero_stage 1 or more and keeps float32 masters."""
    attention: Literal["auto", "segmented", "flash_attention_2"] = "auto"
    """auto: flash_attention_2 on a GPU that has it, else segmented (PyTorch's own attention, sequence by sequence)."""
    gradient_checkpointing: bool = False
    """Compute layers again in the backward pass: less memory, more time."""
    tiny: TinyConfig = field(default_factory=TinyConfig)


@dataclass(frozen=True)
class TaskConfig:
    """A built-in procedural task: endless, seeded, with checkable answers."""

    name: Literal["arithmetic", "reverse", "sort", "count", "describe"] = "reverse"
    """arithmetic: sums and differences; reverse, sort: a word's letters; count: a letter in a word; describe: a few
    words about a thing, kind or harsh, with human-like comparisons and a gold reward in place of an answer."""
    min_length: int = 3
    """Letters in a word (reverse, sort, count), digits of a number (arithmetic) or words of a response (describe)."""
    max_length: int = 6
    """The same unit as `min_length`."""
    train_size: int = 20000
    """Prompts in one epoch."""


@dataclass(frozen=True)
class DataConfig:
    source: Literal["task", "jsonl", "parquet", "dataset", "gsm8k"] = "task"
    """task: built in; jsonl, parquet: a file; dataset: a directory; gsm8k: JSONL as GSM8K has it."""
    path: str = ""
    """Training prompts: a file, or a directory written by `datasets.save_to_disk`. Unused by `task`."""
    eval_path: str = ""
    """Held-out prompts, the same format. Empty: the last `eval.prompts` rows of `path` are held out."""
    prompt_key: str = "prompt"
    """Column with the question's text; ignored when a row has `messages_key`."""
    messages_key: str = "messages"
    """Column with a list of {role, content}."""
    answer_key: str = "answer"
    """Column with the answer; empty: the data has none."""
    response_key: str = "response"
    """Column with the demonstration, for `sft`."""
    system: str = ""
    """A system turn put before every prompt."""
    chat: bool = True
    """Render with the model's chat template; false: the prompt's text as it is."""
    shuffle: bool = True
    """A new order in each epoch, of prompts, demonstrations, judgements and the pre-training mix; false: the file's
    own."""
    task: TaskConfig = field(default_factory=TaskConfig)


@dataclass(frozen=True)
class RolloutConfig:
    workers: int = 1
    """vLLM engines."""
    cpus: int = 0
    """CPU threads of a worker; 0: an equal share."""
    tensor_parallel: int = 1
    """GPUs of a worker."""
    temperature: float = 1.0
    """Of sampling; 0 is greedy, and refused by `train`."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that make up this probability; 1: off."""
    top_k: int = 0
    """0: off."""
    stop: list[str] = field(default_factory=list)
    """Texts that end a response."""
    max_prompt_tokens: int = 256
    """Longer prompts are dropped, counted as data/dropped_prompt_too_long."""
    max_response_tokens: int = 128
    """Longer responses are cut, shown as rollout/cut_share."""
    max_concurrent: int = 256
    """Sequences decoded at once by a worker."""
    kv_cache_gib: float = 1.0
    """Memory for the key-value cache on a CPU."""
    gpu_memory_utilization: float = 0.85
    """Share of a GPU's memory for weights and cache."""
    enforce_eager: bool = True
    """false: compiled decoding, faster per token, slower to start."""
    timeout_s: float = 600.0
    """Limit for one batch of rollouts."""


@dataclass(frozen=True)
class RewardSpec:
    kind: Literal["exact", "number", "regex", "function", "model", "http", "gold"] = "exact"
    """exact: the answer itself; number: its value; regex, function, model, http: see `pattern`, `function`, `path`,
    `url`; gold: the true reward of the built-in task `describe`."""
    weight: float = 1.0
    """Factor in the total; 0: measured and shown only."""
    pattern: str = ""
    """kind regex: reward 1 where it matches the whole response (Python syntax, dot matches newlines)."""
    function: str = ""
    """kind function: `package.module:function`, called with (prompts, responses, answers), lists of strings; returns as
    many numbers."""
    path: str = ""
    """kind model: a reward model with one label: a Hugging Face directory or hub name, or a run directory."""
    normalize: bool = True
    """kind model: centre and scale by the held-out mean and deviation stored with the model, where there are any."""
    url: str = ""
    """kind http: address of a reward server (`rlhf-dist serve-reward`), as in http://127.0.0.1:8070/score."""
    token_env: str = ""
    """kind http: environment variable that holds the server's token; the token itself never stands in a config."""
    retries: int = 3
    """kind http: further tries after one that failed."""
    timeout_s: float = 30.0
    """kind regex, function, http, and number with math-verify: limit for the responses of one prompt group.
    `scoring.timeout_s` is the limit for all rewards together, kind model included."""
    keep_special_tokens: bool = False
    """Show the special tokens inside a response, as in <think>, to a reward that reads text; never its end token."""


@dataclass(frozen=True)
class ScoringConfig:
    rewards: dict[str, RewardSpec] = field(default_factory=lambda: {"exact": RewardSpec()})
    """Name -> reward; the total is their weighted sum."""
    gold: str = ""
    """Name of the reward that is the truth (its weight may be 0), to watch for over-optimisation of the others."""
    non_finite: Literal["fail", "mask", "zero"] = "fail"
    """A reward that is NaN or infinite: ends the run; or leaves its response out of training (mask); or counts as 0
    before its weight (zero)."""
    replicas: int = 1
    """Scoring servers; each holds every reward."""
    batch_tokens: int = 8192
    """Tokens that a reward or reference model takes at once: groups that wait are put together up to it."""
    timeout_s: float = 120.0
    """Limit for scoring one prompt group."""


@dataclass(frozen=True)
class StageConfig:
    command: Literal["sft", "reward", "train"] = "train"
    """What the stage runs."""
    set: list[str] = field(default_factory=list)
    """Overrides as on the command line; {NAME} stands for the run directory of the earlier stage NAME."""


@dataclass(frozen=True)
class PipelineConfig:
    stages: dict[str, StageConfig] = field(default_factory=dict)
    """Name -> stage, in order; its run directory is `output/name/NAME`."""


@dataclass(frozen=True)
class WeightsConfig:
    transport: Literal["shared_memory"] = "shared_memory"
    """How weights reach the rollout workers: through the node's shared memory."""
    bucket_mib: int = 64
    """Weights hashed and loaded at once."""
    timeout_s: float = 120.0
    """Limit for one push to all workers. A worker that did not answer in time is not waited for in later pushes."""
    give_up_after: int = 3
    """Pushes that a worker may miss in a row before it is killed and the run goes on without it."""


@dataclass(frozen=True)
class LoopConfig:
    steps: int = 100
    """Training steps (batches of rollouts)."""
    prompts_per_step: int = 16
    """Prompt groups; times algo.group_size: responses."""
    max_policy_lag: int = 0
    """Published versions by which generation may run ahead; 0: generate and learn in turn."""
    logprob_diff_limit: float = 1e-3
    """Largest difference between rollout and learner logprobs before a warning."""
    checkpoint_every: int = 50
    """Steps; 0: only at the end."""
    keep_checkpoints: int = 2
    """The newest so many stay."""


@dataclass(frozen=True)
class EvalConfig:
    prompts: int = 128
    """Held-out prompts."""
    every: int = 20
    """Steps; 0: only before and after."""
    samples: int = 4
    """Sampled responses per prompt for pass@k, k = samples; 0: greedy only."""
    solved_at: float = 1.0
    """A response counts as solved when the rewards that say what is right come to at least this: kinds exact, number,
    regex and function, or `scoring.gold`."""


@dataclass(frozen=True)
class ClusterConfig:
    address: Literal["auto", "local"] = "auto"
    """auto: the cluster in RAY_ADDRESS (set inside a Ray job), else a local one; local: always a local one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda when there is a GPU."""
    colocate: bool = True
    """Rollout workers and learner ranks take turns on the same CPUs or GPUs; false: each has its own."""
    start_timeout_s: float = 300.0
    """Limit for a cluster to answer, and for engines to be ready."""


@dataclass(frozen=True)
class TelemetryConfig:
    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """auto: online when a wandb key is present, else offline."""
    project: str = "rlhf-dist"
    """Of wandb."""
    entity: str = ""
    """Of wandb; empty: the account's own."""
    samples: int = 8
    """Rows of the sample table (prompt, response, rewards)."""
    samples_every: int = 10
    """Steps between sample tables, of which the first is at step 1; 0: none."""
    progress: Literal["auto", "rich", "plain"] = "auto"
    """auto: a live display in a terminal, plain lines elsewhere."""


@dataclass(frozen=True)
class Config:
    name: str = "run"
    """The run directory is `output/name`."""
    output: str = "runs"
    """Folder of the run directories."""
    seed: int = 0
    """Of data order, demonstrations and sampling."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    algo: AlgoConfig = field(default_factory=AlgoConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    ptx: PtxConfig = field(default_factory=PtxConfig)
    preferences: PreferencesConfig = field(default_factory=PreferencesConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
