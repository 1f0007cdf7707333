"""Every key of a config, with its type, default and meaning. Imports without torch.

A section is a frozen dataclass; a class of the package gets its own section and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rlhf_dist.config import effects
from rlhf_dist.config.compare_keys import CompareConfig as CompareConfig
from rlhf_dist.config.keys import (
    ANY,
    COUNT,
    LIMIT_S,
    LIMIT_S_OR_0,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    SHARE_ABOVE_0,
    Range,
    key,
    used_by,
)
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
from rlhf_dist.config.numbers_keys import NumbersConfig as NumbersConfig
from rlhf_dist.config.prefer_keys import PreferConfig as PreferConfig
from rlhf_dist.config.reward_keys import (
    JudgeConfig as JudgeConfig,
    LengthConfig as LengthConfig,
    RewardSpec as RewardSpec,
)


@dataclass(frozen=True)
class TinyConfig:
    """The tiny Qwen2-shaped model that is made from a seed when `model.path` is `tiny`."""

    hidden_size: int = key(256, COUNT)
    """A multiple of `heads`."""
    intermediate_size: int = key(768, COUNT)
    """Width of the feed-forward layers."""
    layers: int = key(4, COUNT)
    """Transformer layers."""
    heads: int = key(8, COUNT)
    """Attention heads."""
    kv_heads: int = key(4, COUNT)
    """head_dim = hidden_size / heads; the CPU engine accepts 32, 64, 80, 96, 112, 128 and larger."""
    max_positions: int = key(512, COUNT)
    """Longest prompt plus response, tokens."""
    seed: int = key(0, NOT_NEGATIVE)
    """Of the starting weights."""


@dataclass(frozen=True)
class ModelConfig:
    path: str = key("tiny", effects.needed("give `tiny`, a model directory, a hub name or a run directory"))
    """`tiny`, a Hugging Face directory or hub name, a run directory (its newest checkpoint), or a checkpoint in one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights on both sides; bfloat16 needs learner.zero_stage 1 or more and keeps float32 masters."""
    attention: Literal["auto", "segmented", "varlen"] = "auto"
    """Both are PyTorch's own. segmented: sequence by sequence. varlen: flash attention over all of them, on a GPU in
    bfloat16. auto: varlen where it can run."""
    gradient_checkpointing: bool = False
    """Compute layers again in the backward pass: less memory, more time."""
    tiny: TinyConfig = field(default_factory=TinyConfig)


@dataclass(frozen=True)
class TaskConfig:
    """A built-in procedural task: endless, seeded, with checkable answers."""

    name: str = key("reverse", effects.a_task, effects.needs_gym, effects.TURNS_NEED_CHAT)
    """arithmetic: sums and differences; sums: a sum asked in words, for models that can be asked; reverse, sort: a
    word's letters; count: a letter in a word; describe: a few words about a thing, kind or harsh, with human-like
    comparisons and a gold reward in place of an answer; guess: which of three words is meant, in two turns with a hint
    between them; reasoning_gym:NAME: a task of that library, as in reasoning_gym:spell_backward."""
    settings: list[str] = field(default_factory=list)
    """NAME=VALUE, as in max_word_len=5: settings of a task of reasoning_gym, as it has them."""
    min_length: int = key(
        3, COUNT, effects.OF_BUILT_IN, effects.at_most("data.task.max_length", lambda c: c.data.source == "task")
    )
    """Letters in a word (all others), digits of a number (arithmetic, sums) or words of a response (describe)."""
    max_length: int = key(6, COUNT, effects.OF_BUILT_IN)
    """The same unit as `min_length`."""
    in_order: bool = key(False, effects.DESCRIBING)
    """describe: demonstrations say different words, in the order of the alphabet; false: any words."""
    train_size: int = key(20000, COUNT)
    """Prompts in one epoch."""


@dataclass(frozen=True)
class DataConfig:
    source: Literal["task", "jsonl", "parquet", "dataset", "gsm8k"] = "task"
    """task: built in; jsonl, parquet: a file; dataset: a directory; gsm8k: JSONL as GSM8K has it."""
    path: str = key("", effects.file_of("data"), effects.DATA_PATH, effects.a_file, shown=repr)
    """Training prompts: a file, or a directory written by `datasets.save_to_disk`. Unused by `task`."""
    eval_path: str = key("", effects.file_of("data"), effects.a_file, shown=repr)
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
    workers: int = key(1, COUNT)
    """vLLM engines."""
    cpus: int = key(0, NOT_NEGATIVE)
    """CPU threads of a worker; 0: an equal share."""
    tensor_parallel: int = key(1, COUNT)
    """GPUs of a worker, over which its model is cut by heads; on a CPU processes, each with at least one of its
    threads."""
    temperature: float = key(1.0, NOT_NEGATIVE)
    """Of sampling; 0 is greedy, and refused by `train`."""
    top_p: float = key(1.0, SHARE_ABOVE_0)
    """Sample among the likeliest tokens that make up this probability; 1: off."""
    top_k: int = key(0, NOT_NEGATIVE)
    """0: off."""
    stop: list[str] = field(default_factory=list)
    """Texts that end a response."""
    max_prompt_tokens: int = key(256, COUNT)
    """Longer prompts are dropped, counted as data/dropped_prompt_too_long."""
    max_response_tokens: int = key(128, COUNT)
    """Longer responses are cut, shown as rollout/cut_share."""
    max_concurrent: int = key(256, COUNT)
    """Sequences decoded at once by a worker."""
    kv_cache_gib: float = key(1.0, POSITIVE)
    """Memory for the key-value cache of a worker on a CPU."""
    gpu_memory_utilization: float = key(0.85, SHARE_ABOVE_0)
    """Share of a GPU's memory for weights and cache."""
    kv_after_push: Literal["recompute", "keep"] = key("recompute", effects.RUNS_AT_A_PUSH)
    """What becomes of the cached keys and values of responses that are being sampled when new weights arrive.
    recompute: they are computed again, so that later tokens are the new policy's; keep: later tokens mix new weights
    with old keys and values, generation pauses for less, and on a CPU a worker holds the weights twice."""
    enforce_eager: bool = True
    """false: compiled decoding, faster per token, slower to start."""
    timeout_s: float = key(600.0, LIMIT_S)
    """Longest time without a decoding step of a worker that has requests."""


@dataclass(frozen=True)
class ScoringConfig:
    rewards: dict[str, RewardSpec] = field(default_factory=lambda: {"exact": RewardSpec()})
    """Name -> reward; the total is their weighted sum."""
    gold: str = ""
    """Name of the reward that is the truth (its weight may be 0), to watch for over-optimisation of the others."""
    non_finite: Literal["fail", "mask", "zero"] = "fail"
    """A reward that is NaN or infinite: ends the run; or leaves its response out of training (mask); or counts as 0
    before its weight (zero)."""
    on_failure: Literal["fail", "mask"] = key("fail", effects.CAN_FAIL)
    """A reward that runs in a process of its own, asks a server, or is number with math-verify, and fails: ends the
    run; or is asked for each response of the group by itself, and those for which it fails again are left out of
    training (mask), whatever `non_finite` says."""
    max_failed_share: float = key(0.1, SHARE, effects.MASKED_FAILURES)
    """Largest share of a step's or an evaluation's responses without a reward (`on_failure: mask`); above it the run
    ends. 0: none."""
    replicas: int = key(1, COUNT)
    """Scoring servers; each holds every reward."""
    hedge_s: float = key(0.0, NOT_NEGATIVE, effects.SEVERAL_SERVERS)
    """A group that a scoring or reference server has had for so long is given to another one, too, if one has nothing
    to do; the first answer counts. 0: off. A reward that costs money or has side effects is then called twice."""
    batch_tokens: int = key(8192, COUNT)
    """Tokens that a reward or reference model takes at once: groups that wait are put together up to it."""
    timeout_s: float = key(120.0, LIMIT_S)
    """Limit for scoring one prompt group, from when a server begins; a group that waits for others is not charged."""


@dataclass(frozen=True)
class StageConfig:
    command: Literal["sft", "reward", "prefer", "train"] = "train"
    """What the stage runs."""
    set: list[str] = field(default_factory=list)
    """Overrides as on the command line; {NAME} stands for the run directory of the earlier stage NAME."""


@dataclass(frozen=True)
class PipelineConfig:
    stages: dict[str, StageConfig] = field(default_factory=dict)
    """Name -> stage, in order; its run directory is `output/name/NAME`."""


@dataclass(frozen=True)
class WeightsConfig:
    transport: Literal["shared_memory", "broadcast", "ipc"] = "shared_memory"
    """How weights reach the rollout workers. shared_memory: through the node's shared memory, and from node to node by
    relays. broadcast: learner rank 0 sends them to all engines, by nccl between GPUs, by gloo between CPUs. ipc: from
    learner ranks to engines on the same GPU (`cluster.colocate`) or CPUs, through a bucket that both see.
    An engine that dies in the middle of a transfer by broadcast takes along all that have not got everything; where
    none is left, the run ends. By the others it costs them some time at most."""
    bucket_mib: int = key(64, COUNT)
    """Weights hashed as one, and sent as one."""
    timeout_s: float = key(120.0, LIMIT_S)
    """Limit for one push to all workers. A worker that did not answer in time is not waited for in later pushes.
    Transports other than shared_memory wait half of it for workers to be ready, seven eighths for them to be connected,
    and then once more without the missing, who are not waited for again. The transfer has the rest, at least half."""
    give_up_after: int = key(3, COUNT)
    """Pushes that a worker may miss in a row before it is killed and the run goes on without it."""


@dataclass(frozen=True)
class LoopConfig:
    steps: int = key(100, COUNT)
    """Training steps (batches of rollouts)."""
    prompts_per_step: int = key(16, COUNT)
    """Prompt groups; times algo.group_size: responses."""
    max_policy_lag: int = key(0, NOT_NEGATIVE)
    """Most versions between a response's oldest token and the weights that learn from it; 0: generate and learn in
    turn, above it both at once."""
    window: int = key(0, NOT_NEGATIVE, effects.window_fits)
    """Groups, from the oldest that is under way on, which may be trained on before it; 1: in the order of issue; 0: as
    `max_policy_lag` allows. A wider window waits less for slow groups, and leaves less of the lag for running ahead."""
    oversample: float = key(1.0, Range("between 1 and 100", lambda x: 1 <= x <= 100), effects.OVERSAMPLED)
    """Groups issued for each one that a step needs; the slowest are cancelled once there are enough."""
    age: Literal["oldest", "mean", "first"] = key("oldest", effects.LAGGING)
    """Which token's version says how old a group is: its oldest, the mean of all, or the oldest first one."""
    stale: Literal["drop", "keep"] = key("drop", effects.LAGGING)
    """A group that a fault made older than `max_policy_lag`: another takes its place, or it is trained on."""
    logprob_diff_limit: float = key(1e-3, POSITIVE)
    """Largest difference between rollout and learner logprobs before a warning."""
    witness: bool = False
    """Ask the optimizer itself which samples it took, and compare each step with the ledger; changes no weight."""
    checkpoint_every: int = key(50, NOT_NEGATIVE)
    """Steps; 0: only at the end."""
    keep_checkpoints: int = key(2, COUNT)
    """The newest so many stay."""
    keep_best: int = key(0, NOT_NEGATIVE)
    """Beside them the best so many stay, of those that were evaluated at their own step; `checkpoints/BEST` names the
    best. 0: none does for that."""
    best_metric: str = key("eval/reward", effects.KEEPING_BEST)
    """What is best: a metric of evaluations."""
    best_is: Literal["highest", "lowest"] = key("highest", effects.KEEPING_BEST)
    """Which of two values of `best_metric` is better; of equal ones the earlier."""


@dataclass(frozen=True)
class EvalConfig:
    prompts: int = key(128, COUNT)
    """Held-out prompts."""
    every: int = key(20, NOT_NEGATIVE)
    """Steps; 0: only before and after."""
    samples: int = key(4, NOT_NEGATIVE)
    """Sampled responses per prompt for pass@k, k = samples; 0: greedy only."""
    solved_at: float = key(1.0, ANY)
    """A response counts as solved when the rewards that say what is right come to at least this: kinds exact, number,
    regex, function and reasoning_gym, or `scoring.gold`."""


@dataclass(frozen=True)
class ClusterConfig:
    address: Literal["auto", "local"] = "auto"
    """auto: the cluster in RAY_ADDRESS (set inside a Ray job), else a local one; local: always a local one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda when there is a GPU."""
    colocate: bool = True
    """Rollout workers and learner ranks take turns on the same CPUs or GPUs; false: each has its own."""
    server_gpu_share: float = key(0.1, SHARE_ABOVE_0, effects.GPU_SHARE)
    """Share of a GPU, and of its memory, that each scoring or reference server with a model books, beside a rollout
    worker (or a learner rank, where workers span GPUs); 1: a GPU of its own."""
    start_timeout_s: float = key(300.0, LIMIT_S)
    """Limit for a cluster to answer, and for engines to be ready."""


@dataclass(frozen=True)
class FaultsConfig:
    respawns: int = key(3, COUNT)
    """A rollout worker or server that is lost is started again, so many times within `window_s` and so many times until
    a new step is made. So are all ranks of the learner and the critic together. One more loss ends the run."""
    window_s: float = key(600.0, POSITIVE)
    """Losses further back do not count."""
    heartbeat_s: float = key(15.0, Range("at least 5", lambda x: x >= 5))
    """A process without a sign of life for so long counts as lost."""
    copy_every_s: float = key(10.0, NOT_NEGATIVE, effects.LAGGING)
    """Seconds between copies of what rollout workers have sampled so far; more where copies would take over 1% of the
    time. A group whose worker is lost goes on from its last copy. 0: it begins again, as it does without a lag."""
    step_s: float = key(14400.0, LIMIT_S_OR_0)
    """`train`: most seconds without the end of a step, an evaluation or a start of training, whatever the other limits
    say; 0: no limit. The process that has made no progress for longest then counts as lost; where all go on, or none
    has work, the run ends."""
    save_on_stop_s: float = key(120.0, LIMIT_S_OR_0)
    """Most seconds that a run which is told to end (Ctrl-C, SIGTERM, SIGHUP) takes to finish its step and to save; 0:
    it ends at once and saves nothing. `train`, `sft` and `prefer`. Preemption gives notice of 30 to 120 s."""
    restarts: int = key(3, NOT_NEGATIVE)
    """With `train --supervise`: restarts in a row that bring no new step, before it gives up; 0: none."""
    backoff_s: float = key(1.0, LIMIT_S)
    """With `train --supervise`: seconds before a restart; twice as many with each that brought no new step, 60 at most
    (or this, where it is more)."""


@dataclass(frozen=True)
class TelemetryConfig:
    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """auto: online with a wandb key and a network, else offline."""
    project: str = "rlhf-dist"
    """Of wandb."""
    entity: str = ""
    """Of wandb; empty: the account's own."""
    tensorboard: bool = False
    """Event files for TensorBoard, too, in `tensorboard/` of the run directory."""
    prometheus_port: int = key(0, Range("between 0 and 65535", lambda x: 0 <= x <= 65535))
    """Port of this machine (127.0.0.1 only) at which Prometheus can ask for the last step's metrics; 0: none."""
    samples: int = key(8, NOT_NEGATIVE)
    """Rows of the sample table (prompt, response, rewards)."""
    samples_every: int = key(10, NOT_NEGATIVE)
    """Steps between sample tables, of which the first is at step 1; 0: none."""
    progress: Literal["auto", "rich", "plain"] = "auto"
    """auto: a live display in a terminal, plain lines elsewhere."""


@dataclass(frozen=True)
class Config:
    name: str = "run"
    """The run directory is `output/name`."""
    output: str = key("runs", effects.needed("name the directory that holds the runs, as in output: runs"))
    """Folder of the run directories."""
    seed: int = key(0, Range("between 0 and 4294967295", lambda x: 0 <= x < 2**32))
    """Of data order, demonstrations and sampling."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig, metadata=used_by("train", "eval"))
    algo: AlgoConfig = field(default_factory=AlgoConfig, metadata=used_by("train"))
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    critic: CriticConfig = field(default_factory=CriticConfig, metadata=used_by("train"))
    reference: ReferenceConfig = field(default_factory=ReferenceConfig, metadata=used_by("train"))
    ptx: PtxConfig = field(default_factory=PtxConfig, metadata=used_by("train"))
    preferences: PreferencesConfig = field(default_factory=PreferencesConfig, metadata=used_by("reward", "prefer"))
    reward: RewardConfig = field(default_factory=RewardConfig, metadata=used_by("reward"))
    prefer: PreferConfig = field(default_factory=PreferConfig, metadata=used_by("prefer"))
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    compare: CompareConfig = field(default_factory=CompareConfig, metadata=used_by("train", "eval"))
    sft: SftConfig = field(default_factory=SftConfig, metadata=used_by("sft"))
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig, metadata=used_by("train", "eval", "sft", "prefer"))
    numbers: NumbersConfig = field(default_factory=NumbersConfig, metadata=used_by("train"))
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
