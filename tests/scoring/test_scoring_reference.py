"""The reference model: logprobs against a plain forward pass, the sums by hand, and how it moves."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from judges import make_rollout
from safetensors.torch import load_file, save_file
from sample_groups import flat_logprobs, group_of, two_turns
from transformers import AutoModelForCausalLM

from rlhf_dist.algo import logprobs as module
from rlhf_dist.config.schema import ModelConfig
from rlhf_dist.errors import ConfigError, DataError, RewardError, WeightSyncError
from rlhf_dist.scoring.reference import ReferenceModel, ReferenceServer, distance
from rlhf_dist.scoring.reference_files import MASTERS_FILE
from rlhf_dist.types import Group
from rlhf_dist.weights.buckets import make_plan
from rlhf_dist.weights.receipts import Announcement, receipt_problem
from rlhf_dist.weights.shared_memory import WeightWriter


def open_reference(path: Path, budget: int = 200, chunk: int = 7, dtype: Any = "float32") -> ReferenceModel:
    return ReferenceModel(
        str(path), ModelConfig(dtype=dtype), device="cpu", batch_tokens=budget, chunk_tokens=chunk, name="reference 0"
    )


@pytest.fixture
def rollouts(tiny_model: Path) -> list[Group]:
    return [
        make_rollout(tiny_model, ("hi", "hello there", "go"), (True, False, True)),
        make_rollout(tiny_model, ("x",), (False,)),
        two_turns(),
    ]


def plain_logprobs(path: Path, group: Group, temperature: float) -> np.ndarray:
    model: Any = AutoModelForCausalLM.from_pretrained(path).eval()
    found = []
    for sample in group.trajectories:
        row = torch.from_numpy(sample.tokens.astype(np.int64))
        with torch.inference_mode():
            logits = model(input_ids=row[None]).logits[0, :-1]
        logprobs = (logits / temperature).log_softmax(-1).gather(1, row[1:, None])[:, 0]
        found.append(logprobs[torch.from_numpy(sample.loss_mask[1:])])
    return torch.cat(found).numpy()


@pytest.mark.parametrize("budget", [1, 100, 100_000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_a_plain_forward_pass(
    tiny_model: Path, rollouts: list[Group], budget: int, temperature: float
) -> None:
    got = open_reference(tiny_model, budget).logprobs(rollouts, temperature)
    for (head, found), group in zip(got, rollouts, strict=True):
        expected = plain_logprobs(tiny_model, group, temperature)
        assert found.dtype == head.kl.dtype == head.logprob.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-5)
        sums = [part.sum() for part in group.sampled(expected)]
        np.testing.assert_allclose(head.logprob, sums, atol=1e-4)
        ours = [part.sum() for part in group.sampled(flat_logprobs(group))]
        np.testing.assert_allclose(head.kl, np.array(ours) - sums, atol=1e-4)


def test_no_entropy_is_computed(tiny_model: Path, rollouts: list[Group], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    values = module._values

    def noting(*words: Any) -> Any:
        asked.append(words[3])
        return values(*words)

    monkeypatch.setattr(module, "_values", noting)
    open_reference(tiny_model).logprobs(rollouts, 1.0)
    assert asked and not any(asked)


def test_the_sums_by_hand() -> None:
    group = group_of([1], [0, 0, 0], [2, 1], logprobs=np.array([-1.0, -2.0, -0.5]))
    head, flat = distance(group, [np.array([-1.5, -2.5], np.float32), np.array([-0.25], np.float32)])
    assert head.kl.tolist() == [1.0, -0.25]
    assert head.logprob.tolist() == [-4.0, -0.25]
    assert flat.tolist() == [-1.5, -2.5, -0.25]


def test_groups_of_many_threads_are_kept_apart(tiny_model: Path) -> None:
    model = open_reference(tiny_model)
    groups = [make_rollout(tiny_model, [f"{i}", "x" * i], [True, True]) for i in range(1, 9)]
    temperatures = [1.0, 0.5] * 4
    alone = [model.logprobs([group], t)[0] for group, t in zip(groups, temperatures, strict=True)]
    server = ReferenceServer(model, batch_tokens=200, timeout_s=60, name="reference 0")
    with closing(server), ThreadPoolExecutor(8) as pool:
        together = list(pool.map(server.logprobs, groups, temperatures))
    for (head, logprobs), (alone_head, alone_logprobs) in zip(together, alone, strict=True):
        np.testing.assert_allclose(logprobs, alone_logprobs, atol=1e-5)
        np.testing.assert_allclose(head.kl, alone_head.kl, atol=1e-4)


def test_what_cannot_be_computed_is_told(tiny_model: Path, rollouts: list[Group]) -> None:
    model = open_reference(tiny_model)
    with pytest.raises(ConfigError, match="temperature"):
        model.logprobs(rollouts, 0.0)
    rollouts[1].trajectories[0].tokens[-1] = 5000
    with pytest.raises(RewardError, match=r"reference 0 \(.*\) has rows for 102 tokens, .* sampled token 5000"):
        model.logprobs(rollouts, 1.0)


@contextmanager
def published(model: Path, change: float) -> Iterator[tuple[WeightWriter, Announcement, dict[str, torch.Tensor]]]:
    """The model's weights, each moved by `change`, as a learner would publish them."""
    plain: Any = AutoModelForCausalLM.from_pretrained(model)
    weights = {name: tensor.detach() + change for name, tensor in plain.named_parameters()}
    shapes = [(name, tuple(tensor.shape), "float32") for name, tensor in weights.items()]
    with closing(WeightWriter(make_plan(shapes, bucket_bytes=50_000))) as writer:
        yield writer, writer.write(3, weights.items()), weights


def held(model: ReferenceModel) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model._policy.model.named_parameters()}


@pytest.mark.parametrize("keep", [0.0, 0.75])
def test_a_moving_reference_takes_its_share_of_the_policy(tiny_model: Path, rollouts: list[Group], keep: float) -> None:
    model = open_reference(tiny_model)
    before = held(model)
    with published(tiny_model, 0.01) as (_, announcement, weights):
        assert len(announcement.hashes) > 1
        receipt = model.update(announcement, keep)
    assert receipt_problem(announcement, receipt) is None
    for name, tensor in held(model).items():
        torch.testing.assert_close(tensor, keep * before[name] + (1 - keep) * weights[name], atol=1e-6, rtol=0)
    assert abs(model.logprobs(rollouts, 1.0)[0][1] - plain_logprobs(tiny_model, rollouts[0], 1.0)).max() > 1e-4


def test_an_average_in_bfloat16_loses_no_small_steps(tiny_model: Path) -> None:
    """200 updates that keep 255/256, towards weights 0.5 off: each step is smaller than what bfloat16 tells apart."""
    model = open_reference(tiny_model, dtype="bfloat16")
    name = "model.norm.weight"  # ones, whose upper neighbour in bfloat16 is 0.0078 away
    with published(tiny_model, 0.5) as (_, announcement, _):
        for _ in range(200):
            model.update(announcement, 255 / 256)
    moved = held(model)[name].float() - 1
    assert float(moved.min()) == pytest.approx(0.5 * (1 - (255 / 256) ** 200), abs=0.008)


def run_on(model: ReferenceModel, updates: int, start: Path) -> None:
    """Each update is smaller than what bfloat16 tells apart."""
    with published(start, 0.5) as (_, announcement, _):
        for _ in range(updates):
            model.update(announcement, 255 / 256)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_restored_average_goes_on_bit_for_bit(tiny_model: Path, tmp_path: Path, dtype: str) -> None:
    """Saved after 3 updates and restored, it is after 3 more what it is without: model, and float32 average."""
    whole = open_reference(tiny_model, dtype=dtype)
    run_on(whole, 3, tiny_model)
    whole.save(tmp_path / "reference")
    again = open_reference(tmp_path / "reference", dtype=dtype)
    run_on(whole, 3, tiny_model)
    run_on(again, 3, tiny_model)
    expected, found = held(whole) | masters(whole), held(again) | masters(again)
    assert expected.keys() == found.keys() and bool(masters(whole)) == (dtype == "bfloat16")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert (tmp_path / "reference" / MASTERS_FILE).exists() == (dtype == "bfloat16")
    # float32 of its own has no rounded model to compare with: an average beside it belongs to another run.
    assert not masters(open_reference(tmp_path / "reference", dtype="float32"))


def masters(model: ReferenceModel) -> dict[str, torch.Tensor]:
    return {f"{name} in float32": tensor.clone() for name, tensor in model._masters.items()}


def test_one_that_takes_the_weights_whole_has_no_average(tiny_model: Path, tmp_path: Path) -> None:
    model = open_reference(tiny_model, dtype="bfloat16")
    run_on(model, 1, tiny_model)
    with published(tiny_model, 0.5) as (_, announcement, _):
        model.update(announcement, 0.0)
    model.save(tmp_path / "reference")
    assert not (tmp_path / "reference" / MASTERS_FILE).exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("bit", r"float32_masters\.safetensors: model\.norm\.weight is not that of the reference beside it"),
        ("name", r"float32_masters\.safetensors: model\.norm\.weight is not that of the reference beside it"),
        ("shape", r"float32_masters\.safetensors: model\.norm\.weight is not that of the reference beside it"),
        ("cut", r"float32_masters\.safetensors: cannot be read: .*; resume from another checkpoint with --resume-from"),
    ],
)
def test_a_damaged_average_is_refused(tiny_model: Path, tmp_path: Path, damage: str, message: str) -> None:
    model = open_reference(tiny_model, dtype="bfloat16")
    run_on(model, 1, tiny_model)
    model.save(tmp_path / "reference")
    path = tmp_path / "reference" / MASTERS_FILE
    tensors = load_file(path)
    norm = tensors.pop("model.norm.weight")
    if damage == "bit":
        norm[3] += 0.1
    if damage != "name":
        tensors["model.norm.weight"] = norm[1:].clone() if damage == "shape" else norm
    save_file(tensors, path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match=message):
        open_reference(tmp_path / "reference", dtype="bfloat16")


def test_a_wrong_hash_leaves_the_old_weights(tiny_model: Path) -> None:
    model = open_reference(tiny_model)
    before = held(model)
    with published(tiny_model, 0.01) as (writer, announcement, _):
        last = announcement.plan.buckets[-1]
        writer._map[announcement.offset + last.offset] ^= 1
        with pytest.raises(WeightSyncError, match=r"reference 0: version 3: bucket \d+ arrived as"):
            model.update(announcement, 0.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in held(model).items())


def test_weights_of_another_shape_and_lost_files_are_refused(tiny_model: Path) -> None:
    model = open_reference(tiny_model)
    before = held(model)
    with published(tiny_model, 0.01) as (_, announcement, weights):
        fewer = {name: tensor for name, tensor in weights.items() if name != "model.norm.weight"}
        plan = make_plan([(n, tuple(t.shape), "float32") for n, t in fewer.items()], 50_000)
        with (
            closing(WeightWriter(plan)) as other,
            pytest.raises(
                WeightSyncError,
                match=r"version 4 does not fit .*: model\.norm\.weight is missing there and \(64,\) here",
            ),
        ):
            model.update(other.write(4, fewer.items()), 0.0)
    with pytest.raises(WeightSyncError, match=r"reference 0: version 3: /dev/shm/.* cannot be read: No such file"):
        model.update(announcement, 0.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in held(model).items())
