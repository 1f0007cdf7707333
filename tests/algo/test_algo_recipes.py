"""Algorithms as values."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st

from rlhf_dist.algo.aggregation import sequence_mean, sequence_sum, token_mean
from rlhf_dist.algo.algorithm import Algorithm, GroupCredit, TokenCredit
from rlhf_dist.algo.recipes import ALGORITHMS, _recipe
from rlhf_dist.config.methods import METHODS, Method
from rlhf_dist.config.schema import AlgoConfig, CorrectionConfig, KLConfig
from rlhf_dist.errors import ConfigError

NAMES = sorted(ALGORITHMS)
CLIPPED = [name for name, method in METHODS.items() if "dual_clip" in method.keys]
UNCLIPPED = [name for name, method in METHODS.items() if not method.ratio]
SCORES, GROUPS, LENGTHS = torch.tensor([0.0, 2.0, 5.0, 5.0]), torch.tensor([0, 0, 1, 1]), torch.tensor([1, 3, 2, 2])


def made(name: str, config: AlgoConfig | None = None) -> Algorithm:
    return ALGORITHMS[name](config or AlgoConfig())


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_what_its_row_says(name: str) -> None:
    algorithm, method = made(name), METHODS[name]
    assert algorithm.name == name
    assert algorithm.needs_critic == (method.baseline == "critic")
    assert algorithm.greedy_baseline == (name == "remax")
    assert algorithm.credit_by_token == (method.baseline in ("critic", "none"))
    assert algorithm.correction is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("grpo", [-math.sqrt(0.5), math.sqrt(0.5), 0.0, 0.0]),
        ("dapo", [-math.sqrt(0.5), math.sqrt(0.5), 0.0, 0.0]),
        ("gspo", [-math.sqrt(0.5), math.sqrt(0.5), 0.0, 0.0]),
        ("cispo", [-math.sqrt(0.5), math.sqrt(0.5), 0.0, 0.0]),
        ("dr_grpo", [-1.0, 1.0, 0.0, 0.0]),
        ("rloo", [-2.0, 2.0, 0.0, 0.0]),
        ("reinforce", [-3.0, -1.0, 2.0, 2.0]),
        # The first group's baseline is (1 x 0 + 3 x 2) / 4.
        ("opo", [-1.5, 0.5, 0.0, 0.0]),
        # Less the group's mean: -1, 1, 0, 0, whose deviation over the step is sqrt(2 / 4).
        ("reinforce_pp_baseline", [-math.sqrt(2), math.sqrt(2), 0.0, 0.0]),
    ],
)
def test_credit_by_hand(name: str, expected: list[float]) -> None:
    credit = made(name).credit
    assert isinstance(credit, GroupCredit)
    torch.testing.assert_close(credit.advantages(SCORES, GROUPS, LENGTHS), torch.tensor(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [name for name in NAMES if METHODS[name].baseline in ("group", "step")])
def test_the_kl_is_compared_in_its_own_unit(name: str) -> None:
    """Twice the KL, twice the penalty: no division by a deviation."""
    credit = made(name).credit
    assert isinstance(credit, GroupCredit)
    once, twice = (credit.centered(x * SCORES, GROUPS, LENGTHS) for x in (1.0, 2.0))
    torch.testing.assert_close(twice, 2 * once)
    assert once.abs().max() >= 1.0


def test_credit_by_token_by_hand() -> None:
    """Rewards 0, 0, 4 with gamma 1/2: to come are 1, 2, 4; a critic's values are taken off, and 0 without one."""
    rewards, values = torch.tensor([[0.0, 0.0, 4.0]]), torch.tensor([[1.0, 1.0, 1.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    for name, expected in (("reinforce_pp", [1.0, 2.0, 4.0]), ("a2c", [0.0, 1.0, 3.0])):
        credit = made(name, AlgoConfig(gamma=0.5, lam=1.0, advantage_clip=7.0)).credit
        assert isinstance(credit, TokenCredit)
        found, _ = credit.estimate(rewards, values * made(name).needs_critic, mask)
        torch.testing.assert_close(found, torch.tensor([expected]))
        assert credit.whiten and credit.clip == 7.0


@pytest.mark.parametrize("name", CLIPPED)
def test_the_loss_uses_the_configs_clips(name: str) -> None:
    logprobs, old = torch.tensor([1.0, -1.0, 1.5]), torch.zeros(3)
    advantages, offsets = torch.tensor([1.0, -1.0, -1.0]), torch.tensor([0, 2, 3])
    loss, _ = made(name, AlgoConfig(clip_low=0.1, clip_high=0.3)).loss(logprobs, old, advantages, offsets)
    torch.testing.assert_close(loss, torch.tensor([-1.3, 0.9, math.exp(1.5)]))
    config = AlgoConfig(clip_low=0.1, clip_high=0.3, dual_clip=3.0)
    loss, _ = made(name, config).loss(logprobs, old, advantages, offsets)
    torch.testing.assert_close(loss, torch.tensor([-1.3, 0.9, 3.0]))


def test_the_other_losses_by_hand() -> None:
    logprobs, old = torch.tensor([1.0, -1.0, 1.5]), torch.zeros(3)
    advantages, offsets = torch.tensor([1.0, 1.0, -1.0]), torch.tensor([0, 2, 3])
    for name in UNCLIPPED:
        loss, _ = made(name).loss(logprobs, old, advantages, offsets)
        torch.testing.assert_close(loss, torch.tensor([-1.0, 1.0, 1.5]))
    config = AlgoConfig(clip_low=0.5, clip_high=1.0)
    loss, _ = made("cispo", config).loss(logprobs, old, advantages, offsets)
    torch.testing.assert_close(loss, torch.tensor([-2.0, 0.5, 3.0]))  # ratios 2.7, 0.37, 4.5 cut to 0.5 and 2
    loss, _ = made("gspo", config).loss(logprobs, old, advantages, offsets)
    torch.testing.assert_close(loss, torch.tensor([-1.0, -1.0, math.exp(1.5)]))  # ratios e^0 twice, and e^1.5


def test_token_weights_are_the_configs() -> None:
    for name, function in (
        ("token_mean", token_mean),
        ("sequence_mean", sequence_mean),
        ("sequence_sum", sequence_sum),
    ):
        assert made("grpo", AlgoConfig(aggregation=name)).token_weights is function  # type: ignore[arg-type]
    assert made("gspo").token_weights is sequence_mean


def test_a_correction_by_hand() -> None:
    algorithm = made("grpo", AlgoConfig(correction=CorrectionConfig(level="token", mode="truncate", high=2.0)))
    assert algorithm.correction is not None
    weight, _ = algorithm.correction(torch.tensor([0.0, -1.0]), torch.tensor([-1.0, 0.0]), torch.tensor([0, 2]))
    torch.testing.assert_close(weight, torch.tensor([2.0, math.exp(-1)]))


def test_rows_without_credit_are_idle_only_where_nothing_else_moves_them() -> None:
    assert made("rloo").idle_without_credit
    assert not made("ppo").idle_without_credit
    assert not made("rloo", AlgoConfig(entropy_coef=0.1)).idle_without_credit
    assert not made("rloo", AlgoConfig(kl=KLConfig(place="loss", coef=0.1))).idle_without_credit


@pytest.mark.parametrize("name", NAMES)
def test_an_algorithm_survives_pickling(name: str) -> None:
    correction = CorrectionConfig(level="geometric", mode="mask", low=0.5)
    algorithm = made(name, AlgoConfig(clip_high=0.28, dual_clip=3.0, correction=correction))
    copy = pickle.loads(pickle.dumps(algorithm))
    offsets = torch.tensor([0, 1, 3])
    inputs = torch.tensor([0.4, -0.4, 1.2]), torch.zeros(3), torch.tensor([1.0, -1.0, -2.0]), offsets
    assert torch.equal(copy.loss(*inputs)[0], algorithm.loss(*inputs)[0])
    assert torch.equal(
        copy.correction(*inputs[:2], offsets)[0],
        algorithm.correction(*inputs[:2], offsets)[0],  # type: ignore[misc]
    )
    assert copy.token_weights is algorithm.token_weights


@pytest.mark.parametrize("name", ["grpo", "gspo", "cispo", "rloo"])
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=8), data=st.data())
def test_the_cut_into_micro_batches_never_changes_the_gradient(name: str, lengths: list[int], data) -> None:
    """By whole responses, as the learner cuts."""
    algorithm = made(name, AlgoConfig(correction=CorrectionConfig(level="sequence")))
    assert algorithm.correction is not None
    weights = algorithm.token_weights(torch.tensor(lengths), 6)
    rows = [slice(stop - length, stop) for length, stop in zip(lengths, torch.tensor(lengths).cumsum(0), strict=True)]
    tokens = sum(lengths)
    old, sampled = (-torch.rand(tokens, dtype=torch.float64) for _ in range(2))
    advantages = torch.randn(len(lengths), dtype=torch.float64)
    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def gradient(chosen: list[int]) -> torch.Tensor:
        if not chosen:
            return torch.zeros(())
        before, engine = (torch.cat([x[rows[i]] for i in chosen]) for x in (old, sampled))
        count = torch.tensor([lengths[i] for i in chosen])
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), count.cumsum(0)])
        spread = advantages[chosen].repeat_interleave(count)
        loss, _ = algorithm.loss(before * (1 + shift), before, spread, offsets)
        factor, _ = algorithm.correction(before, engine, offsets)  # type: ignore[misc]
        return torch.autograd.grad((weights[chosen].repeat_interleave(count) * factor * loss).sum(), shift)[0]

    place = data.draw(st.lists(st.integers(0, 2), min_size=len(lengths), max_size=len(lengths)))
    pieces = sum(gradient([i for i, piece in enumerate(place) if piece == chosen]) for chosen in range(3))
    torch.testing.assert_close(pieces, gradient(list(range(len(lengths)))), check_dtype=False)


MINE = """
from rlhf_dist.algo.recipes import rloo, ppo
mine, critical = rloo, ppo
def nothing(config): pass
"""


@pytest.mark.parametrize(
    ("recipe", "baseline", "parts"),
    [
        ("own_method:mien", "group", ["own_method has no function 'mien'"]),
        ("own_methods:mine", "group", ["cannot be imported: No module named 'own_methods'"]),
        ("broken_method:mine", "group", ["broken_method.py:1: ", "'('"]),
        ("own_method:nothing", "group", ["returned NoneType", "as make(...) does"]),
        ("own_method:mine", "critic", ["credit is by response", "baseline is critic", "goes with group, step, greedy"]),
        ("own_method:critical", "group", ["credit is by token", "baseline is group", "goes with critic, none"]),
    ],
)
def test_what_is_wrong_with_a_method_of_ones_own_is_told(
    recipe: str, baseline: Any, parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_method.py").write_text(MINE)
    (tmp_path / "broken_method.py").write_text("def mine(config:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError) as caught:
        _recipe("own", Method(recipe, baseline, ()), AlgoConfig())
    message = str(caught.value)
    assert message.startswith(f"the method own ({recipe}, its row in rlhf_dist/config/methods.py)")
    assert all(part in message for part in parts), message


def test_an_algorithm_has_the_name_of_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_method.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    assert _recipe("own", Method("own_method:mine", "group", ()), AlgoConfig()).name == "own"
