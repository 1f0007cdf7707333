"""Supervised training: what of a batch is learnt, and checkpoint files that fail."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_dist.config.schema import SftConfig
from rlhf_dist.data.rows import Demonstration
from rlhf_dist.errors import ConfigError, DataError, DiskError, NumbersError
from rlhf_dist.learner.changed_words import Part, Run
from rlhf_dist.learner.micro_batch_rows import Packed
from rlhf_dist.learner.model_engine import ModelEngine
from rlhf_dist.learner.supervised import SupervisedLearner
from rlhf_dist.models.hf import load_tokenizer
from rlhf_dist.models.tensors import read_tensors, write_tensors


class Engine:
    """Gives every response token a logprob of -2."""

    share = 0
    device = torch.device("cpu")

    def logprobs(self, packed: Packed, temperature: float) -> torch.Tensor:
        return torch.full((len(packed.targets),), -2.0, requires_grad=True)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        loss.backward()

    def step(self, lr: float) -> float:
        return 1.0


def learner(model: Path, texts: list[str], max_tokens: int) -> SupervisedLearner:
    demonstrations = [Demonstration((), text) for text in texts]
    config = SftConfig(batch_size=len(texts), max_tokens=max_tokens, objective="text")
    engine: Any = Engine()
    return SupervisedLearner(
        engine, config, demonstrations, demonstrations, load_tokenizer(model), chat=True, seed=0, shares=1,
        micro_batch_tokens=1000,
    )  # fmt: skip


def test_every_token_but_the_first_is_learnt_and_what_does_not_fit_is_counted(tiny_model: Path) -> None:
    found = learner(tiny_model, ["abc", "ab", "a" * 30], max_tokens=10).train_step(1).values()
    assert found["data/tokens"] == 3 + 2, "the letters after the first, and the end token"
    assert found["data/dropped_demonstrations"] == 1 and found["sft/loss"] == 2.0


def test_an_empty_text_is_left_out(tiny_model: Path) -> None:
    found = learner(tiny_model, ["abc", ""], max_tokens=10).train_step(1).values()
    assert (found["data/tokens"], found["data/dropped_demonstrations"]) == (3, 1)


@pytest.mark.parametrize("texts", [["a" * 30, "b" * 30], ["", ""]])
def test_a_batch_without_anything_to_learn_is_an_error(tiny_model: Path, texts: list[str]) -> None:
    nothing = learner(tiny_model, texts, max_tokens=10)
    for call in (lambda: nothing.train_step(1), nothing.evaluate):
        with pytest.raises(DataError, match=r"none of 2 demonstrations has a token to learn within sft\.max_tokens 10"):
            call()


@pytest.fixture
def engine() -> ModelEngine:
    """Rank 0 of an engine, with nothing behind it but an optimizer."""
    made = object.__new__(ModelEngine)
    made.rank, made._mask = 0, None
    master = torch.ones(4, requires_grad=True)
    optimizer = torch.optim.AdamW([master])
    optimizer.state[master] = {"exp_avg": torch.full((4,), 2.0), "step": torch.tensor(3.0)}
    made._deepspeed = SimpleNamespace(  # type: ignore[assignment]
        zero_stage=2,
        world_size=1,
        dtype=torch.float32,
        optimizer=optimizer,
        parts=lambda: [Part(master, master.detach(), (Run("w", 0, 0, 4),))],
        named_weights=lambda: iter([]),
        of_all_ranks=lambda held: [held],
        master=master,
    )
    return made


def test_an_optimizer_that_cannot_be_written_is_a_disk_error(engine: ModelEngine, tmp_path: Path) -> None:
    with pytest.raises(DiskError, match=r"optimizer-0\.safetensors: cannot be written: .*No such file"):
        engine.save_optimizer(tmp_path / "gone")


def test_an_optimizer_that_cannot_be_read_is_a_data_error(engine: ModelEngine, tmp_path: Path) -> None:
    engine.save_optimizer(tmp_path)
    engine._deepspeed.optimizer.state.clear()
    engine.restore(tmp_path)
    assert engine._deepspeed.optimizer.state[engine._deepspeed.master]["exp_avg"].tolist() == [2.0] * 4  # type: ignore[attr-defined]
    path = tmp_path / "optimizer-0.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(
        DataError, match=r"optimizer-0\.safetensors: cannot be read: .*; resume from another checkpoint"
    ):
        engine.restore(tmp_path)
    write_tensors({"0.weights": torch.ones(4)}, path)
    with pytest.raises(ConfigError, match=r"optimizer-0\.safetensors: was written by an older version of rlhf-dist"):
        engine.restore(tmp_path)
    write_tensors({"w.weights": torch.ones(4)}, path, {"optimizer": '{"ranks": 1}'})
    with pytest.raises(DataError, match=r"optimizer-0\.safetensors: cannot be read: 'parts'"):
        engine.restore(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=r"optimizer-0\.safetensors: is missing; resume from another checkpoint"):
        engine.restore(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_saved_and_not_called_damaged(
    engine: ModelEngine, tmp_path: Path, value: float
) -> None:
    weights = torch.tensor([1.0, value, 1.0, 1.0])
    engine.save_optimizer(tmp_path)
    path = tmp_path / "optimizer-0.safetensors"
    sound = path.read_bytes()
    write_tensors(read_tensors(path) | {"w.weights": weights}, path, {"optimizer": '{"ranks": 1, "parts": {"w": 0}}'})
    with pytest.raises(DataError, match=r"optimizer-0\.safetensors \(1 of 4 differ\) are not those in hf"):
        engine.restore(tmp_path)
    with torch.no_grad():
        engine._deepspeed.master.copy_(weights)  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"weights in optimizer-0\.safetensors \(1 of 4\) are NaN or infinite, as they"):
        engine.restore(tmp_path)
    path.write_bytes(sound)
    with pytest.raises(NumbersError, match=r"optimizer-0\.safetensors: is not written: 1 of 4 weights of w are NaN or"):
        engine.save_optimizer(tmp_path)
    assert path.read_bytes() == sound


@pytest.mark.parametrize(("name", "count"), [("another", 4), ("w", 5)])
def test_an_optimizer_of_another_model_is_refused(engine: ModelEngine, tmp_path: Path, name: str, count: int) -> None:
    engine.save_optimizer(tmp_path)
    part = Part(torch.ones(count), torch.ones(count), (Run(name, 0, 0, count),))
    engine._deepspeed.parts = lambda: [part]  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match=rf"has no optimizer state of {name} from element \d on; resume with"):
        engine.restore(tmp_path)


def test_rows_come_in_the_files_own_order_without_shuffle(tiny_model: Path) -> None:
    texts = [letter * length for length, letter in enumerate("abcdefgh", start=2)]
    demos = [Demonstration((), text) for text in texts]
    engine: Any = Engine()

    def tokens(shuffle: bool, steps: range) -> list[int]:
        made = SupervisedLearner(
            engine, SftConfig(batch_size=1, objective="text"), demos, demos, load_tokenizer(tiny_model), chat=True,
            seed=0, shares=1, micro_batch_tokens=1000, shuffle=shuffle,
        )  # fmt: skip
        return [int(made.train_step(step).values()["data/tokens"]) for step in steps]

    in_order = [len(text) for text in texts]
    assert tokens(False, range(1, 17)) == in_order * 2
    shuffled = tokens(True, range(1, 17))
    assert sorted(shuffled[:8]) == sorted(shuffled[8:]) == in_order
    assert shuffled[:8] != in_order and shuffled[8:] != shuffled[:8]
    assert tokens(True, range(6, 17)) == shuffled[5:], "a resume"
