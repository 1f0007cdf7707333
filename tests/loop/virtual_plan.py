"""What a run in virtual time is made of: everything is drawn from its seed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from random import Random

import numpy as np

from rlhf_dist.loop.controller_rules import Rules
from rlhf_dist.loop.requests import greedy
from rlhf_dist.types import Message, NonFinite, Prompt, Sampling, Scores

SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=64, stop=())
GREEDY = greedy(SAMPLING)
MISSING = 10_000
"""The first seed of runs in which workers miss many pushes."""
EPOCH = 1_000
"""Prompts in one epoch: far more than a run needs, so that no run ends for want of hope."""


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong; shares are between 0 and 1."""

    twice: float = 0.0
    """Of events that come a second time, some time later."""
    stray: float = 0.0
    """Of messages that are long on their way."""
    late: float = 0.0
    """Of cancelled requests that are answered all the same."""
    deaths: int = 0
    """Workers that die."""
    wedges: int = 0
    """Workers that fall silent."""
    failed_loads: float = 0.0
    """Of loads that fail at first."""
    lies: float = 0.0
    """Of loads that are proved, while the worker goes on with the version before for a time."""
    farewells: float = 0.0
    """Of hand-overs after which the worker dies."""
    from_makers: bool = False
    """Servers read tokens from the worker that made them, and cannot once it is dead, whatever the collator has."""
    refused: float = 0.0
    """Of prompts that no worker samples."""
    non_finite: float = 0.0
    """Of responses whose reward is not finite."""
    no_signal: float = 0.0
    """Of groups whose samples all score the same."""
    crash: bool = False
    """The run ends in the middle, and is resumed from its last checkpoint."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A run."""

    seed: int
    rules: Rules
    faults: Faults
    workers: tuple[str, ...]
    scorers: tuple[str, ...]
    references: tuple[str, ...]
    capacity: int
    train_s: float
    """Mean seconds of a training step; a group takes about 10, some far longer."""
    evaluate_every: int
    """Steps; 0: never."""
    held_out: int
    """Prompts of an evaluation."""
    held_out_samples: int

    @property
    def harmed(self) -> bool:
        """Whether a group can come late: a worker dies, falls silent, or keeps old weights."""
        faults = self.faults
        return bool(faults.deaths or faults.wedges or faults.failed_loads or faults.lies or faults.farewells)

    @property
    def requests_of_one(self) -> int:
        """Samples of the largest unit that goes to one worker."""
        rules = self.rules
        return max(rules.group_size + rules.greedy_baseline, self.held_out_samples, 1)


def plan_of(seed: int) -> Plan:
    """The run with this seed; from `MISSING` on one with a policy lag, in which workers miss many pushes."""
    if seed >= MISSING:
        return missing(plan_of(seed - MISSING))
    random = Random(seed)
    rules, faults = draw_rules(random), draw_faults(random)
    return Plan(
        seed=seed,
        rules=rules,
        faults=faults,
        workers=tuple(f"worker {n}" for n in range(random.randint(1, 6))),
        scorers=tuple(f"scorer {n}" for n in range(random.randint(1, 3))),
        references=tuple(f"reference {n}" for n in range(random.randint(1, 2))) if rules.compares else (),
        capacity=random.randint(1, 4 * rules.group_size),
        train_s=random.choice((1.0, 10.0, 60.0)),
        evaluate_every=0 if faults.lies else random.choice((0, 0, 1, 2)),
        held_out=random.randint(1, 3),
        held_out_samples=random.randint(0, 2),
    )


def missing(plan: Plan) -> Plan:
    """The run as it would be if many pushes failed."""
    random, rules = Random(plan.seed), plan.rules
    if rules.max_lag == 0:
        rules = replace(rules, max_lag=1, target_lag=1, window=1, extra_groups=0)
    farewells = random.choice((0.0, 0.0, 0.5))
    return replace(
        plan,
        seed=plan.seed + MISSING,
        rules=rules,
        faults=replace(plan.faults, failed_loads=random.choice((0.2, 0.6)), farewells=farewells),
        workers=tuple(f"worker {n}" for n in range(random.randint(2, 6))),
        train_s=random.choice((1.0, 10.0)),
    )


def draw_rules(random: Random) -> Rules:
    """Rules that a config could have."""
    groups, lag = random.randint(1, 8), random.choice((0, 0, 1, 1, 2, 3, 4, 5))
    window = random.choice((1, 1 + groups * (lag // 2), 1 + random.randint(0, groups * lag)))
    most = lag - math.ceil((window - 1) / groups)
    return Rules(
        groups_per_step=groups,
        steps=min(lag + random.randint(2, 3), max(3, 24 // groups)),
        max_lag=lag,
        target_lag=random.choice((most, most, random.randint(0, most))),
        window=window,
        extra_groups=random.randint(1, groups) if lag == 0 and random.random() < 0.4 else 0,
        age=random.choice(("oldest", "oldest", "mean", "first")),
        drop_stale=random.random() < 0.7,
        filter_groups=random.random() < 0.3,
        filtered=random.randint(1, 3) * groups,
        group_size=random.randint(1, 4),
        sampling=SAMPLING,
        seed=random.randrange(1000),
        greedy_baseline=random.random() < 0.25,
        compares=random.random() < 0.4,
        max_failed_share=0.0,
    )


def draw_faults(random: Random) -> Faults:
    """A third of the runs have none, a third only trouble with data and messages, a third all kinds."""
    kind = random.randrange(3)
    if not kind:
        return Faults()

    def sometimes(share: float) -> float:
        return share if random.random() < 0.5 else 0.0

    mild = Faults(
        twice=sometimes(0.1),
        stray=sometimes(0.1),
        late=sometimes(0.5),
        refused=sometimes(0.08),
        non_finite=sometimes(0.15),
        no_signal=sometimes(0.3),
        crash=random.random() < 0.3,
    )
    if kind == 1:
        return mild
    return replace(
        mild,
        deaths=random.choice((0, 1, 1, 2, 4)),
        wedges=random.choice((0, 0, 1)),
        failed_loads=sometimes(0.3),
        from_makers=random.random() < 0.5,
        lies=0.3 if random.random() < 0.2 else 0.0,
    )


@dataclass(frozen=True, slots=True)
class Truth:
    """What sampling and scoring a request gives, in whatever attempt."""

    refused: bool
    lengths: tuple[int, ...]
    """n."""
    total: np.ndarray
    """float32 [n]; NaN where the reward is not finite."""
    scores: Scores

    @property
    def tokens(self) -> int:
        """Sampled."""
        return sum(self.lengths)

    @property
    def trained(self) -> int:
        """Sampled tokens of the responses that have a reward."""
        return sum(length for length, score in zip(self.lengths, self.total, strict=True) if score == score)

    @property
    def finite(self) -> list[float]:
        """The scores that there are."""
        return self.total[self.total == self.total].tolist()

    @property
    def hopeless(self) -> bool:
        """No response has a reward."""
        return self.trained == 0


@dataclass(slots=True)
class Truths:
    """By purpose and uid; drawn when first asked for, and the same in whatever order."""

    plan: Plan
    known: dict[tuple[str, str], Truth] = field(default_factory=dict)

    def of(self, purpose: str, uid: str, n: int) -> Truth:
        """For n samples."""
        found = self.known.get((purpose, uid))
        if found is None:
            found = self.known[purpose, uid] = self._draw(purpose, uid, n)
        return found

    def _draw(self, purpose: str, uid: str, n: int) -> Truth:
        faults = self.plan.faults
        refused = faults.refused and Random(f"{self.plan.seed} {uid}").random() < faults.refused
        random = Random(f"{self.plan.seed} {purpose} {uid}")
        refused = refused or (faults.refused and purpose == "baseline" and random.random() < faults.refused)
        lengths = tuple(random.randint(1, 64) for _ in range(n))
        same = random.random() < faults.no_signal
        values = [0.5 if same else random.random() for _ in range(n)]
        bad = tuple(i for i in range(n) if faults.non_finite and random.random() < faults.non_finite)
        for i in bad:
            values[i] = math.nan
        total = np.array(values, np.float32)
        non_finite = tuple(NonFinite(uid, i, {"reward": math.nan}, "...") for i in bad)
        scores = Scores(total, {}, np.ones(n, np.float32), np.arange(n, dtype=np.uint64), non_finite)
        return Truth(bool(refused), lengths, total, scores)


class Stream:
    """Prompts without end, and before them the groups that a resumed run had open."""

    def __init__(self, position: int = 0, again: tuple[tuple[str, int], ...] = ()) -> None:
        self.position = position
        self._again = list(again)

    def __len__(self) -> int:
        return EPOCH

    def take(self, n: int) -> list[tuple[Prompt, int]]:
        """See `rules.Prompts`."""
        first, self._again = self._again[:n], self._again[n:]
        found = [(prompt_of(uid), attempt) for uid, attempt in first]
        while len(found) < n:
            found.append((prompt_of(f"0/{self.position}"), 0))
            self.position += 1
        return found


def prompt_of(uid: str) -> Prompt:
    return Prompt(uid, (Message("user", uid),), "", "virtual")
