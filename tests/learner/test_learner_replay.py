"""A step's batch as a file, and replayed row by row, on a tiny model in this process."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import SAMPLING, batch_of, cut, rollouts
from sample_groups import rows_of
from torch import Tensor

from rlhf_dist.cli.main import main
from rlhf_dist.config.load import to_yaml
from rlhf_dist.config.schema import AlgoConfig, Config, LearnerConfig, ModelConfig
from rlhf_dist.errors import DataError, DiskError
from rlhf_dist.learner.micro_batch_rows import pack_rows
from rlhf_dist.learner.rank_batch import RankBatch, rank_batch
from rlhf_dist.learner.step_file import ARRAYS, read_step, write_step
from rlhf_dist.learner.token_sums import Estimate
from rlhf_dist.loop.run_directory import open_run_directory
from rlhf_dist.models.hf import load_model
from rlhf_dist.models.packed_policy import PackedPolicy

LEARNER = LearnerConfig(micro_batch_tokens=100)
UIDS = {"train/0/0/0": "0/0", "train/0/1/0": "0/1", "train/0/2/0": "0/2", "train/0/3/0": "0/3"}
Facts = dict[str, Any]


def batches(world: int = 2) -> list[RankBatch]:
    return [rank_batch(shard, rollouts(1), ()) for shard in cut(rollouts(1), LEARNER, 1, world)]


def facts_of(model: Path, run: Path, step: int = 1, **more: Any) -> Facts:
    config = Config(model=ModelConfig(path=str(model)), algo=AlgoConfig(), output=str(run.parent))
    return {
        "step": step,
        "fault": "the loss is nan",
        "run": str(run),
        "checkpoint": "",
        "config": to_yaml(config),
        "updates": 0,
        "uids": UIDS,
        "whitening": {"mean": 0.0, "deviation": 1.0},
    } | more


def replayed(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[str], str]:
    capsys.readouterr()
    code = main(["replay", *words])
    found = capsys.readouterr()
    return code, found.out.splitlines(), found.err


def losses(model: Path) -> dict[tuple[str, int], tuple[float, float]]:
    """(uid, sample) -> loss and norm of its gradient, by hand: at ratio 1 a token's loss is -advantage, its gradient
    that of -advantage x logprob; all divided by the tokens of the batch."""
    policy = PackedPolicy(load_model(model, "float32", "segmented"))
    batch, credit = batch_of(rollouts(1))
    total, found = int(batch.lengths.sum()), {}
    for i, (g, s) in enumerate(zip(batch.groups, batch.samples, strict=True)):
        packed = pack_rows([rows_of(rollouts(1)[g])[s]], torch.device("cpu"))
        logprobs: Tensor = policy(
            packed.tokens, packed.cu_seqlens, packed.predict, packed.targets, SAMPLING.temperature, 1024
        )[0]
        policy.zero_grad()
        advantage = float(credit.advantages[i])
        (-advantage * logprobs.sum() / total).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in policy.parameters() if p.grad is not None])
        found[batch.uids[g], int(s)] = (-advantage * len(logprobs) / total, float(norm))
    return found


def test_every_row_comes_to_what_it_does_by_hand(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run" / "faults" / "step-1.safetensors"
    file.parent.mkdir(parents=True)
    write_step(file, batches(), (), facts_of(tiny_model, tmp_path / "run"))
    code, out, _ = replayed(capsys, str(file))
    assert code == 0 and out[0] == f"step 1 of {tmp_path / 'run'}: the loss is nan"
    assert out[1] == f"weights: {tiny_model}, that the run began with: those of the step"
    rows = [line.split() for line in out[3:-1]]
    found = {(row[0], int(row[1])): (float(row[3]), float(row[4])) for row in rows}
    expected = losses(tiny_model)
    assert found.keys() == expected.keys() and len(rows) == 12
    for key, (loss, norm) in expected.items():
        assert found[key] == pytest.approx((loss, norm), rel=1e-4)
    norms = [float(row[4]) for row in rows]
    assert norms == sorted(norms, reverse=True)
    total = sum(loss for loss, _ in expected.values())
    assert out[-1].startswith("12 rows, 0 with numbers that are not finite; their losses add up to ")
    assert float(out[-1].split()[-1]) == pytest.approx(total, rel=1e-4)


def test_rows_that_are_not_finite_come_first_with_the_cause(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = batches()
    advantages, sampled = second.advantages.copy(), first.sampled.copy()
    advantages[1], sampled[first.offsets[2] + 1] = np.inf, np.nan
    file = tmp_path / "step-1.safetensors"
    parts = [replace(first, sampled=sampled), replace(second, advantages=advantages)]
    write_step(file, parts, (), facts_of(tiny_model, tmp_path / "run"))
    code, out, _ = replayed(capsys, str(file))
    assert code == 0 and out[-1].startswith("12 rows, 2 with numbers that are not finite; their losses add up to nan")
    bad = {(line.split()[0], int(line.split()[1])): line for line in out[3:5]}
    one, other = (UIDS[part.origins[row][0]] for part, row in ((first, 2), (second, 1)))
    assert bad[one, first.origins[2][1]].endswith("  rollout logprob")
    assert bad[one, first.origins[2][1]].split()[5] == "1", "the token"
    assert "advantage, loss, gradient" in bad[other, second.origins[1][1]]


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    parts = batches()
    credit = [Estimate(b.sampled * 1, b.sampled * 2, b.sampled * 3) for b in parts]
    write_step(tmp_path / "a", parts, credit, {**facts_of(tmp_path, tmp_path), "updates": 3})
    found = read_step(tmp_path / "a")
    for batch, part, own, made in zip(found.batches, parts, found.credit, credit, strict=True):
        assert all(np.array_equal(getattr(batch, name), getattr(part, name)) for name in ARRAYS)
        others = [one.name for one in fields(RankBatch) if one.name not in (*ARRAYS, "updates")]
        assert all(getattr(batch, name) == getattr(part, name) for name in others)
        assert [[rows.tolist() for rows in each] for each in batch.updates] == [
            [rows.tolist() for rows in each] for each in part.updates
        ]
        assert all(np.array_equal(own[name], getattr(made, name)) for name in own) and len(own) == 3
    assert found.facts["updates"] == 3 and list(tmp_path.iterdir()) == [tmp_path / "a"]


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(DiskError, match="a: cannot be written"):
        write_step(tmp_path / "a", batches(), (), facts_of(tmp_path, tmp_path))
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


def changed(text: str, new: str) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        assert text.encode() in content and len(text) == len(new)
        return content.replace(text.encode(), new.encode())

    return change


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda content: content[:-100],
    "empty": lambda content: b"",
    "no such format": lambda content: b"a" * 5000,
    "another header": changed("rlhf_dist", "rlhf_dust"),
    "another kind of fact": changed(r"\"step\": 1", r"\"step\": {"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_one_message(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    file = tmp_path / "step-1.safetensors"
    write_step(file, batches(), (), facts_of(tiny_model, tmp_path / "run"))
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    code, out, error = replayed(capsys, str(file))
    assert (code, out) == (2, []) and f"{file}: is damaged, or not the batch of a step" in error


@pytest.mark.parametrize(
    "change",
    [
        {"updates": ((np.array([0, 99]),),)},
        {"offsets": np.array([0, 1])},
        {"temperature": 0.0},
        {"tokens": np.array([1, 2, 3], np.int32)},
        {"advantages": np.zeros(1, np.float32)},
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    first, *others = batches()
    write_step(tmp_path / "a", [replace(first, **change), *others], (), facts_of(tmp_path, tmp_path))
    with pytest.raises(DataError, match="is damaged, or not the batch of a step"):
        read_step(tmp_path / "a")


def test_bad_input_is_refused_by_name(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run" / "faults" / "step-4.safetensors"
    file.parent.mkdir(parents=True)
    parts = batches()
    write_step(file, parts, (), facts_of(tiny_model, tmp_path / "run", 4))

    def refused(*words: str) -> str:
        code, out, error = replayed(capsys, *words)
        assert (code, out) == (2, [])
        return error

    assert "replay needs a file first" in refused()
    assert "there is no such file" in refused(str(tmp_path / "none"))
    assert "is a directory, not a file" in refused(str(tmp_path))
    assert "is from before step 4; name a model with model.path=DIRECTORY" in refused(str(file))
    assert "there is no such directory" in refused(str(file), "model.path=./nothing")
    assert "did you mean" in refused(str(file), "model.pth=x")
    tokens = parts[0].tokens.copy()
    tokens[-1] = 10**6
    write_step(file, [replace(parts[0], tokens=tokens)], (), facts_of(tiny_model, tmp_path / "run", 1))
    assert "has token 1000000, and " in refused(str(file)) and "it is another model" in refused(str(file))


def test_the_weights_of_the_checkpoint_before_are_taken_and_their_age_is_told(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = open_run_directory(str(tmp_path), "run", "name: run\n", False)
    for step in (2, 6):
        folder = directory.begin_checkpoint(step)
        shutil.copytree(tiny_model, folder / "hf")
        directory.commit_checkpoint(step, 5, {"step": step})
    directory.close()
    run = tmp_path / "run"
    file = run / "faults" / "step-4.safetensors"
    file.parent.mkdir()
    told = []
    for step, updates in ((3, 0), (4, 2)):
        write_step(file, batches(), (), facts_of(tiny_model, run, step, updates=updates))
        told.append(replayed(capsys, str(file), "seed=1")[1][1])
    assert told == [
        f"weights: {run}/checkpoints/step-2: those that the step began with",
        f"weights: {run}/checkpoints/step-2: 1 step older than those of the step, so its losses were others; the step "
        "had taken 2 of its optimizer steps before",
    ]
    code, out, _ = replayed(capsys, str(file), f"model.path={tiny_model}")
    assert code == 0 and out[1] == f"weights: {tiny_model} (model.path); those of the step were of version 3"
    weights = run / "checkpoints" / "step-2" / "hf" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code, _, error = replayed(capsys, str(file))
    assert code == 2 and "model.safetensors: was changed after it was written; name another model" in error


def test_credit_by_token_is_that_of_the_file(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same advantages by token as by response, from a mean and a deviation: the same losses."""
    file, parts = tmp_path / "a", batches()
    facts = facts_of(tiny_model, tmp_path / "run")
    write_step(file, parts, (), facts)
    _, by_response, _ = replayed(capsys, str(file))
    advantages = [np.repeat(batch.advantages, batch.lengths) * 2 + 1 for batch in parts]
    credit = [Estimate(one.astype(np.float32), one, one) for one in advantages]
    facts["whitening"] = {"mean": 1.0, "deviation": 2.0}
    facts["config"] = facts["config"].replace("name: grpo", "name: ppo")
    write_step(file, [replace(batch, advantages=batch.advantages * 0) for batch in parts], credit, facts)
    _, by_token, _ = replayed(capsys, str(file))
    assert by_token[2] == "the critic's loss is not computed"
    found = [float(line.split()[3]) for line in by_token[4:16]]
    assert found == pytest.approx([float(line.split()[3]) for line in by_response[3:15]], rel=1e-4)
