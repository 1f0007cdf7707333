"""All rewards of a prompt group, each on its own and their weighted sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Protocol

import numpy as np

from rlhf_dist.config.reward_kinds import KINDS
from rlhf_dist.config.schema import Config, RewardSpec, ScoringConfig
from rlhf_dist.data.describe import gold
from rlhf_dist.errors import ConfigError, DataError, RewardError
from rlhf_dist.scoring.answers import unreadable_answer
from rlhf_dist.scoring.diversity import distinct_pairs, text_hashes
from rlhf_dist.scoring.function import Asked, FunctionReward
from rlhf_dist.scoring.http_client import HttpReward
from rlhf_dist.scoring.judge import Judge
from rlhf_dist.scoring.length import length_rewards
from rlhf_dist.scoring.non_finite import find_non_finite, refusal, zeroed
from rlhf_dist.scoring.number import NumberReward
from rlhf_dist.scoring.one_by_one import Given, TextReward, one_by_one
from rlhf_dist.scoring.pattern import PatternReward
from rlhf_dist.scoring.rules import exact_match
from rlhf_dist.scoring.sandbox import require_sandbox
from rlhf_dist.scoring.score_list import short
from rlhf_dist.scoring.texts import Texts, texts_of
from rlhf_dist.scoring.time_limits import Limit, Turn
from rlhf_dist.types import Group, Scores


class Closable(Protocol):
    def close(self) -> None: ...


class TokenReward(Protocol):
    """A reward model: reads the policy's own tokens where there are any. See `reward_model.RewardModel`."""

    def score(self, group: Group) -> np.ndarray: ...

    def score_texts(self, texts: Texts) -> np.ndarray: ...

    def close(self) -> None: ...


MakeModel = Callable[[str, RewardSpec], TokenReward]
"""(name, spec) of a reward of kind model -> the loaded model."""

CheckModel = Callable[[str, RewardSpec], object]
"""The same, without loading: raises when it could not be."""


class Scorer:
    """Scores by the rewards of the `scoring` section. Its methods may be called from several threads."""

    policy: str
    """`scoring.non_finite`."""

    def __init__(self, config: ScoringConfig, make_model: MakeModel | None = None, asked: Asked | None = None) -> None:
        """`make_model` is needed for rewards of kind model, `asked` for kind reasoning_gym. Raises ConfigError for a
        pattern that does not compile or a function that cannot be imported, and what `make_model` raises."""
        _require_some(config)
        self._specs = dict(config.rewards)
        self.policy, self._masks = config.non_finite, config.on_failure == "mask"
        self._models: dict[str, TokenReward] = {}
        self._texts: dict[str, TextReward] = {}
        self._turns = {name: Turn() for name, spec in config.rewards.items() if KINDS[spec.kind].process}
        self._timeout_s = config.timeout_s
        self._owned: list[Closable] = []
        for name, spec in config.rewards.items():
            if spec.kind == "model":
                assert make_model is not None, f"the reward {name} is a model, and nobody makes models here"
                self._models[name] = make_model(name, spec)
            else:
                self._texts[name], owned = _text_reward(name, spec, config.timeout_s, asked)
                self._owned += owned

    def score(self, group: Group) -> Scores:
        """The group's rewards, float32 [n] each; functions see the last user turn as the prompt.

        Raises RewardError, also for a reward that is not finite where `scoring.non_finite` is fail, and ActorTimeout
        where a model does not answer. With `scoring.on_failure: mask` a reward that failed is NaN."""
        limit = Limit.of_group(self._timeout_s)
        texts, prompt = texts_of(group), group.prompt
        for name in self._comparing() if not prompt.answer else ():
            raise RewardError(
                f"the reward {name} compares with an answer and prompt {prompt.uid} of {prompt.source} has none; "
                "set data.answer_key or use a reward of another kind"
            )
        special = texts_of(group, special=True) if group.trajectories[0].special_texts else texts
        by_models = {name: model.score(group) for name, model in self._models.items()}
        return self._scores(texts, special, limit, by_models, prompt.uid)

    def score_texts(self, texts: Texts) -> Scores:
        """The same for responses that come as text, each with a prompt of its own. Raises DataError too, for a missing
        answer."""
        limit = Limit.of_group(self._timeout_s)
        for name in self._comparing() if not all(texts.answers) else ():
            raise DataError(
                f"the reward {name} compares with an answer, and response {texts.answers.index('')} has an empty one"
            )
        by_models = {name: model.score_texts(texts) for name, model in self._models.items()}
        return self._scores(texts, texts, limit, by_models)

    def close(self) -> None:
        """End the threads of models, the connections of clients and the processes of functions."""
        for closable in (*self._models.values(), *self._owned):
            closable.close()

    def _comparing(self) -> list[str]:
        return [name for name, spec in self._specs.items() if KINDS[spec.kind].compares]

    def _scores(
        self, texts: Texts, special: Texts, limit: Limit, by_models: Mapping[str, np.ndarray], uid: str = ""
    ) -> Scores:
        """`special`: `texts` with the special tokens inside, for the rewards that ask for them."""
        given = {
            name: Given(by_models[name], {})
            if name in by_models
            else self._given(name, special if spec.keep_special_tokens else texts, limit)
            for name, spec in self._specs.items()
        }
        components, failed = (
            {name: g.values for name, g in given.items()},
            {name: g.failed for name, g in given.items()},
        )
        found = find_non_finite(components, texts.responses, uid, failed)
        came = next((bad for bad in found if bad.rewards), None)
        if came and self.policy == "fail":
            name = next(iter(came.rewards))
            raise RewardError(refusal(_label(name, self._specs[name]), came))
        if came and self.policy == "zero":
            components = zeroed(components, failed)
        distinct, hashes = distinct_pairs(texts.responses), text_hashes(texts.responses)
        again = max(g.again for g in given.values())
        return Scores(self._total(components), components, distinct, hashes, found, again)

    def _given(self, name: str, texts: Texts, limit: Limit) -> Given:
        """Raises RewardError where `scoring.on_failure` is fail."""
        reward = self._texts[name]
        if not self._masks:
            return Given(reward(texts, limit), {})
        if isinstance(reward, Judge):  # it asks for each response by itself anyway
            return reward.each(texts, limit, go_on=True)
        return one_by_one(reward, texts, limit, self._turns.get(name), _label(name, self._specs[name]))

    def _total(self, components: Mapping[str, np.ndarray]) -> np.ndarray:
        """float32 [n]; NaN where a component is not finite. Raises RewardError for a sum beyond float32."""
        finite = np.logical_and.reduce([np.isfinite(values) for values in components.values()])
        total = np.zeros(len(finite), np.float64)
        for name, spec in self._specs.items():
            total += spec.weight * np.where(finite, components[name], 0.0).astype(np.float64)
        with np.errstate(over="ignore"):
            rounded = total.astype(np.float32)
        if not np.isfinite(rounded).all():
            raise RewardError(
                f"the weighted sum of {', '.join(self._specs)} is {total[~np.isfinite(rounded)][0]:g} for a response, "
                "beyond float32; lower the weights under scoring.rewards"
            )
        return np.where(finite, rounded, np.float32(np.nan))


def asked_by(config: Config) -> Asked:
    """Whose prompts the run of this config has."""
    return Asked(config.data.task, config.seed)


def preflight(config: ScoringConfig, check_model: CheckModel | None = None, asked: Asked | None = None) -> None:
    """Try every reward cheaply, so that a bad one is told before anything starts: models are looked at and not loaded,
    servers asked for a sign of life, and a sandbox is made where one is needed. Raises ConfigError, ModelError,
    ResourceError."""
    _require_some(config)
    require_sandbox(config.rewards)
    for name, spec in config.rewards.items():
        if spec.kind == "model":
            assert check_model is not None, f"the reward {name} is a model, and nobody looks at models here"
            check_model(name, spec)
        elif KINDS[spec.kind].remote:
            with closing(_client(name, spec, config.timeout_s)) as client:
                client.check()
        else:
            for owned in _text_reward(name, spec, config.timeout_s, asked)[1]:
                owned.close()


def _require_some(config: ScoringConfig) -> None:
    if not config.rewards:
        raise ConfigError("scoring.rewards is empty; name at least one reward, such as exact: {kind: exact}")


def _label(name: str, spec: RewardSpec) -> str:
    """A reward in a message, as its own messages have it."""
    if KINDS[spec.kind].remote:
        return f"the {'judge' if spec.kind == 'judge' else 'reward server'} {name} ({spec.url.partition('?')[0]})"
    if spec.kind == "model":
        return f"the reward model {name} ({spec.path})"
    code = spec.function or (spec.kind if KINDS[spec.kind].library else "")
    return f"the reward {name} ({code})" if code else f"the reward {name}"


def _require_readable(name: str, spec: RewardSpec, answers: Sequence[str]) -> None:
    """For kinds that a library computes. Raises RewardError for an answer that it would give 0 to, whatever comes."""
    for answer in set(answers) if spec.kind != "function" else ():
        reason = unreadable_answer(spec.kind, answer)
        if reason:
            raise RewardError(f"{_label(name, spec)} cannot compare with the prompt's answer {short(answer)}: {reason}")


def _client(name: str, spec: RewardSpec, timeout_s: float) -> HttpReward | Judge:
    return (Judge if spec.kind == "judge" else HttpReward)(name, spec, timeout_s)


def _text_reward(
    name: str, spec: RewardSpec, timeout_s: float, asked: Asked | None
) -> tuple[TextReward, list[Closable]]:
    """(the reward, what it owns)."""
    if KINDS[spec.kind].remote:
        client = _client(name, spec, timeout_s)
        return client, [client]
    if spec.kind == "function" or KINDS[spec.kind].library:
        function = FunctionReward(name, spec, asked)

        def called(texts: Texts, limit: Limit) -> np.ndarray:
            _require_readable(name, spec, texts.answers)
            return function(texts.prompts, texts.responses, texts.answers, limit)

        def by_uid(texts: Texts, limit: Limit) -> np.ndarray:
            if not texts.uids:
                raise RewardError(f"{_label(name, spec)} has no prompts of a run to score")
            return function(texts.prompts, texts.responses, texts.uids, limit)

        return by_uid if spec.kind == "reasoning_gym" else called, [function]
    if spec.kind == "regex":
        pattern = PatternReward(name, spec)
        return lambda texts, limit: pattern(texts.responses, limit), [pattern]
    if spec.kind == "length":
        return lambda texts, limit: length_rewards(spec.length, texts.responses), []
    if spec.kind == "gold":
        return lambda texts, limit: gold(texts.prompts, texts.responses), []
    if spec.kind == "number":
        number = NumberReward(name, spec)
        return lambda texts, limit: number(texts.responses, texts.answers, limit), [number]
    return lambda texts, limit: exact_match(texts.responses, texts.answers), []
