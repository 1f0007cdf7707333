"""What a seed stands for: the settings of a run, and a list of faults."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from random import Random
from typing import Literal

from rlhf_dist.config.learning import (
    AlgoConfig,
    CriticConfig,
    KLConfig,
    LearnerConfig,
    OptimizerConfig,
    ReferenceConfig,
    ShapingConfig,
)
from rlhf_dist.config.numbers_keys import NumbersConfig
from rlhf_dist.config.schema import (
    Config,
    DataConfig,
    EvalConfig,
    LoopConfig,
    RolloutConfig,
    ScoringConfig,
    TaskConfig,
    TelemetryConfig,
    WeightsConfig,
)

Kind = Literal[
    "die",
    "ghost",
    "wedge",
    "stall",
    "no start",
    "cut",
    "slow",
    "late",
    "twice",
    "undone",
    "lie",
    "tear",
    "farewell",
    "nan",
    "far",
    "poison",
    "end",
    "stop",
    "power",
    "back",
    "crash before",
    "crash after",
    "torn",
    "full",
]
"""die: a process is gone, which is told of `seconds` later. ghost: the same, and what it had under way is answered all
the same, with bodies that nobody can get. wedge: it gives no sign any more. stall: it lives, and does nothing any more.
no start: it cannot be started again, once. cut: no message to or from it arrives for `seconds`.
slow: its next answer takes `seconds` longer. late: its next answer does, and is overtaken by those after it. twice: its
next answer comes a second time, `seconds` later. undone: nobody can get at the body of its next answer, or at the
logprobs. lie: the next weights arrive flipped. tear: an engine loads a part of the next weights.
farewell: a worker dies when it has handed something over, a reference server when it has answered, `seconds` later.
nan: a rank refuses its next optimizer step for its numbers, and the next `seconds` ones. far: a reference server's next
answer is far beyond `numbers.max_kl`. poison: after its next step the learner refuses all until it goes back behind it.
end: the run is told to end.
stop: the run is killed. power: the machine fails, and what was written and not flushed is lost, too. back: a start from
an earlier checkpoint, as with --resume-from, `seconds` before the newest.
crash before, crash after, torn: it is killed before, after or in the middle of a durable write. full: a durable write
fails for want of disk, and so do the next `seconds` ones.
"""
WRITES: tuple[Kind, ...] = ("crash before", "crash after", "torn", "full")
"""Kinds of which `who` is a durable write, and `at` says which one of its name, from 1."""
NUMBERS: tuple[Kind, ...] = ("nan", "far", "poison")
"""Kinds for which a step is not learnt from."""
ANY_WRITE = "any write"
NAMED_WRITES = (
    *("line metrics.jsonl", "line events.jsonl", "commit ledger", "ledger tables", "ledger format"),
    *("mkdir checkpoints", "mkdir logs", "mkdir run", "sync config.yaml", "replace config.yaml"),
    *("write weights", "write optimizer", "write critic", "mkdir unfinished", "sync state.json", "replace state.json"),
    *("sync weights", "sync optimizer", "sync folder", "rename step", "sync LATEST", "replace LATEST"),
    *("memory: write weights", "memory: mkdir unfinished", "memory: rename step"),
    *("remove", "sync summary.json", "replace summary.json", "sync metrics.jsonl", "sync aside", "set aside"),
)
"""Names of durable writes that a run has."""
WORKER, SCORER, REFERENCE, COLLATOR, LEARNER, CRITIC = (
    "rollout worker",
    "scoring server",
    "reference server",
    "collator",
    "learner rank 0",
    "critic rank 0",
)

OF_WORKERS: tuple[tuple[Kind, float], ...] = (
    *(("die", 10.0), ("die", 0.0), ("ghost", 30.0), ("wedge", 0.0), ("stall", 0.0), ("no start", 0.0), ("cut", 60.0)),
    *(("slow", 60.0), ("late", 60.0), ("twice", 60.0), ("twice", 5.0), ("undone", 0.0)),
    *(("lie", 0.0), ("lie", 0.0), ("tear", 0.0), ("farewell", 1.0)),
)
"""What goes wrong with rollout workers, and the longest `seconds` of it."""
OF_SERVERS: tuple[tuple[Kind, float], ...] = (
    *(("die", 5.0), ("wedge", 0.0), ("stall", 0.0), ("no start", 0.0), ("cut", 30.0), ("slow", 30.0), ("late", 30.0)),
    *(("twice", 60.0), ("twice", 5.0)),
)
"""The same of servers and the collator."""
OF_RANKS: tuple[tuple[Kind, float], ...] = (
    *(("die", 0.0), ("die", 0.0), ("die", 10.0), ("wedge", 0.0), ("stall", 0.0), ("no start", 0.0)),
)
"""The same of ranks."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong, once."""

    life: int
    """Which start of the run, from 0; its clock begins at 0."""
    kind: Kind
    who: str = ""
    """A process, or the name of a durable write."""
    at: float = 0.0
    """Seconds, from which on the first occasion is taken."""
    seconds: float = 0.0

    def __str__(self) -> str:
        if self.kind in WRITES:
            more = f", and the next {self.seconds:.0f}" if self.seconds else ""
            return f"life {self.life}: {self.kind} `{self.who}`, number {self.at:.0f}{more}"
        more = f" ({self.seconds:.1f} s)" if self.seconds else ""
        return f"life {self.life}, {self.at:6.1f} s: {self.kind} {self.who}{more}"


@dataclass(frozen=True, slots=True)
class Settings:
    """Of a run; each is an ordinary key of its config, or the number of its processes."""

    steps: int = 3
    more: int = 0
    """That the run is given once it has come to its end, and goes on with."""
    groups: int = 2
    """A step."""
    lag: int = 0
    window: int = 0
    extra: int = 0
    """Groups issued beyond those of a step."""
    age: Literal["oldest", "mean", "first"] = "oldest"
    greedy: bool = False
    critic: int = 0
    """1: there is one; 2: and the policy stands still in the first step."""
    reference: int = 0
    """Reference servers; 0: the run has no reference."""
    moves: int = 0
    """Steps between two moves of the reference."""
    shaping: bool = False
    """Scores by their running mean and deviation."""
    filter: int = 0
    """Rounds of sampling in which groups without a signal are dropped."""
    evaluate: int = 0
    """Steps between evaluations; each run has one before and after."""
    samples: int = 0
    """Of each held-out prompt, beside the greedy response."""
    checkpoint: int = 1
    """Steps between checkpoints; 0: only at the end."""
    keep: int = 2
    workers: int = 1
    scorers: int = 1
    hedge: float = 0.0
    """Seconds after which what a server has is given to an idle one, too; 0: never."""
    room: int = 8
    """Samples that a worker is given at once."""
    prompts: int = 9
    """In an epoch."""
    gather: float = 0.0
    """See `clock.Inbox`."""
    best: int = 0
    """Checkpoints that are kept for their evaluations."""
    background: bool = False
    """Checkpoints are written beside the steps."""
    kept: int = 0
    """`learner.keep_state_every`."""
    witness: bool = False
    """`loop.witness`."""
    on_fault: Literal["stop", "skip", "roll_back"] = "stop"
    """`numbers.on_fault`."""

    @property
    def goes_back(self) -> bool:
        """Whether a config may say `roll_back`."""
        return not self.moves and bool(self.checkpoint or self.kept)

    def __str__(self) -> str:
        default = Settings()
        changed = (field.name for field in fields(self) if getattr(self, field.name) != getattr(default, field.name))
        return ", ".join(f"{name} {getattr(self, name)}" for name in changed) or "all by default"


@dataclass(frozen=True, slots=True)
class Plan:
    """One run, from its first start to its end."""

    seed: int
    settings: Settings
    faults: tuple[Fault, ...]

    @property
    def settled(self) -> bool:
        """Whether what the run comes to depends on nothing but the settings.

        Where it goes back from behind its first end, that step is not its last any more, and not evaluated.
        """
        over = self.settings.more and any(fault.kind == "back" for fault in self.faults)
        less = self.settings.on_fault != "stop" and any(fault.kind in NUMBERS for fault in self.faults)
        return self.settings.lag == 0 and self.settings.extra == 0 and not over and not less

    def __str__(self) -> str:
        return "\n".join([f"seed {self.seed}: {self.settings}", *(f"  {fault}" for fault in self.faults)])


def plan_of(seed: int) -> Plan:
    """Draw it."""
    random = Random(seed)
    settings = draw_settings(random)
    count = random.choice((0, 1, 1, 2, 2, 3, 4, 6, 9))
    faults = [draw_fault(random, settings) for _ in range(count)]
    if faults and random.random() < 0.15:
        faults += again_and_again(random, faults[0])
    settings = replace(settings, best=random.choice((0, 0, 1)), background=random.random() < 0.5)
    if settings.reference and random.random() < 0.25:
        faults += [lost_logprobs(random, settings) for _ in range(random.choice((1, 1, 1, 2, 4)))]
    if random.random() < 0.2:
        settings = replace(
            settings, on_fault=random.choice(("stop", "skip", *(("roll_back",) * 2 * settings.goes_back)))
        )
        faults += [wrong_numbers(random, settings) for _ in range(random.choice((1, 1, 2, 3)))]
    return Plan(seed, settings, tuple(sorted(faults, key=lambda fault: (fault.life, fault.kind in WRITES, fault.at))))


def again_and_again(random: Random, fault: Fault) -> list[Fault]:
    """A process dies once more after each time that it is back."""
    if not fault.who.startswith((WORKER, SCORER, REFERENCE, LEARNER, CRITIC)):
        return []
    later = [round(fault.at + 12.0 * number + random.random() * 20.0, 1) for number in range(random.randint(1, 5))]
    return [replace(fault, kind="die", at=at, seconds=0.0) for at in later]


def lost_logprobs(random: Random, settings: Settings) -> Fault:
    """A reference server's answer is lost before the collator has fetched it, alone or with the server."""
    who, kind = f"{REFERENCE} {random.randrange(settings.reference)}", random.choice(("undone", "farewell"))
    return Fault(random.choice((0, 0, 0, 1)), kind, who, round(random.random() ** 2 * 60.0, 1), random.random())


def wrong_numbers(random: Random, settings: Settings) -> Fault:
    """A step that may not be learnt from, once or some more times."""
    life, at = random.choice((0, 0, 0, 1)), round(random.random() * 90.0, 1)
    if settings.reference and random.random() < 0.3:
        return Fault(life, "far", f"{REFERENCE} {random.randrange(settings.reference)}", at)
    if random.random() < 0.3:
        return Fault(life, "poison", LEARNER, at)
    who = CRITIC if settings.critic and random.random() < 0.4 else LEARNER
    return Fault(life, "nan", who, at, random.choice((0, 0, 0, 1, 2, 5)))


def draw_settings(random: Random) -> Settings:
    """Small runs: what goes wrong in a long one goes wrong in a short one."""
    lag, groups = random.choice((0, 0, 1, 2, 3)), random.randint(1, 3)
    reference, critic = random.choice((0, 0, 1, 2)), random.choice((0, 0, 0, 1, 2))
    kept = random.choice((0, 0, 1, 1, 2))
    return Settings(
        steps=random.randint(2 if kept else 1, 4),
        more=random.choice((0, 0, 0, 0, 1, 2)),
        groups=groups,
        lag=lag,
        window=random.randint(0, 1 + groups * lag),
        extra=random.choice((0, 0, 1)) if lag == 0 else 0,
        age=random.choice(("oldest", "mean", "first")) if lag else "oldest",
        greedy=random.random() < 0.25,
        critic=critic,
        reference=reference,
        moves=random.choice((0, 0, 1, 2)) if reference else 0,
        shaping=random.random() < 0.3,
        filter=random.choice((0, 0, 1, 2)),
        evaluate=random.choice((0, 0, 1, 2)),
        samples=random.choice((0, 0, 1)),
        checkpoint=random.choice((0, 0, 1, 2) if kept else (0, 1, 1, 2)),
        keep=random.choice((1, 2)),
        workers=random.randint(1, 4),
        scorers=random.randint(1, 2),
        hedge=random.choice((0.0, 0.0, 1.0, 4.0)),
        room=random.choice((2, 4, 100)),
        prompts=random.randint(6, 30),
        gather=random.choice((0.0, 0.0, 0.1, 1.0)),
        kept=kept,
        witness=critic < 2 and random.random() < 0.4,
    )


def draw_fault(random: Random, settings: Settings) -> Fault:
    """Of any kind, in one of the first lives."""
    life = random.choice((0, 0, 0, 1, 1, 2))
    if random.random() < 0.4:
        kind = random.choice(WRITES)
        if random.random() < 0.3:
            return Fault(life, kind, ANY_WRITE, random.randint(1, 150), random.choice((0, 0, 1, 1000)))
        return Fault(life, kind, random.choice(NAMED_WRITES), random.randint(1, 6), random.choice((0, 0, 1, 1000)))
    if random.random() < 0.04:
        return Fault(max(life, 1), "back", "", 0.0, random.randint(1, 2))
    workers = [f"{WORKER} {number}" for number in range(settings.workers)]
    servers = [f"{SCORER} {number}" for number in range(settings.scorers)]
    servers += [f"{REFERENCE} {number}" for number in range(settings.reference)]
    at = random.random() ** 2 * 60.0
    if random.random() < 0.05:
        return Fault(life, random.choice(("stop", "power")), "", round(at, 1))
    if random.random() < 0.05:
        return Fault(life, "end", "", round(random.random() * 90.0, 1))
    if random.random() < 0.25:
        who, (kind, longest) = CRITIC if settings.critic and random.random() < 0.5 else LEARNER, random.choice(OF_RANKS)
        return Fault(life, kind, who, round(random.random() * 90.0, 1), round(random.random() ** 3 * longest, 1))
    if random.random() < 0.65:
        who, (kind, longest) = random.choice(workers), random.choice(OF_WORKERS)
    else:
        who, (kind, longest) = random.choice([*servers, COLLATOR]), random.choice(OF_SERVERS)
    # More short ones: what comes twice or late is to meet what it is about.
    return Fault(life, kind, who, round(at, 1), round(random.random() ** 3 * longest, 1))


def config_of(plan: Plan, output: str, name: str, steps: int) -> Config:
    """The run's config for so many steps. Limits are short, so that virtual time is."""
    settings = plan.settings
    coef = 0.1 if settings.reference else 0.0
    kl = KLConfig(coef=coef, controller="adaptive" if settings.reference else "fixed", target=1.0, horizon=20)
    shaping = ShapingConfig(normalize="running" if settings.shaping else "off")
    name_of = "ppo" if settings.critic else "remax" if settings.greedy else "grpo"
    optimizer = OptimizerConfig(schedule="linear", warmup_steps=1)
    rounds = max(1, settings.filter)
    return Config(
        name=name,
        output=output,
        seed=plan.seed % 2**32,
        data=DataConfig(task=TaskConfig(train_size=settings.prompts)),
        rollout=RolloutConfig(timeout_s=40.0, max_concurrent=settings.room, max_response_tokens=LONGEST),
        scoring=ScoringConfig(timeout_s=40.0, hedge_s=settings.hedge, non_finite="mask"),
        algo=AlgoConfig(
            name=name_of,
            group_size=2,
            kl=kl,
            shaping=shaping,
            filter_groups=settings.filter > 0,
            filter_rounds=rounds,
        ),
        learner=LearnerConfig(timeout_s=40.0, optimizer=optimizer, keep_state_every=settings.kept),
        critic=CriticConfig(warmup_steps=max(0, settings.critic - 1), optimizer=optimizer),
        reference=ReferenceConfig(update_every=settings.moves, ema=0.5 if settings.moves else 0.0),
        weights=WeightsConfig(timeout_s=20.0),
        numbers=NumbersConfig(on_fault=settings.on_fault, max_kl=100.0 if settings.reference else 0.0),
        loop=LoopConfig(
            steps=steps,
            prompts_per_step=settings.groups,
            max_policy_lag=settings.lag,
            window=settings.window,
            oversample=1.0 + settings.extra / settings.groups,
            age=settings.age,
            checkpoint_every=settings.checkpoint,
            keep_checkpoints=settings.keep,
            keep_best=settings.best,
            witness=settings.witness,
        ),
        eval=EvalConfig(prompts=2, every=settings.evaluate, samples=settings.samples),
        telemetry=TelemetryConfig(wandb="off", samples_every=0),
    )


LONGEST = 12
"""Tokens of a response, at most."""
