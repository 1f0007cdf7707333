"""A reward model on packed rows against transformers' own, one sequence at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from judges import (
    MESSAGES,
    SCALE,
    judge_spec,
    make_judge,
    make_rollout,
    make_texts,
    open_judge,
    set_other_tokenizer,
    setting,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from rlhf_dist.config.schema import ScoringConfig
from rlhf_dist.errors import ModelError, RewardError
from rlhf_dist.models.hf import load_tokenizer
from rlhf_dist.scoring.reward_model import RewardModel, reward_source

RESPONSES = ("hi", "hello there, you", "go away", "h")
ENDED = (True, True, False, True)


@pytest.fixture(scope="module")
def judge(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_judge(tiny_model, tmp_path_factory.mktemp("judges") / "judge")


@pytest.fixture
def copied(judge: Path, tmp_path: Path) -> Path:
    """A reward model that the test may change."""
    return Path(shutil.copytree(judge, tmp_path / "judge"))


@pytest.fixture(scope="module")
def model(judge: Path, tiny_model: Path) -> Iterator[RewardModel]:
    with closing(open_judge(judge, tiny_model)) as opened:
        yield opened


def plain_scores(judge: Path, rows: list[Any]) -> np.ndarray:
    """The model as anybody would load it, each row alone, normalised by hand."""
    plain = AutoModelForSequenceClassification.from_pretrained(judge).eval()
    with torch.inference_mode():
        raw = [float(plain(input_ids=torch.tensor([list(map(int, row))])).logits[0, 0]) for row in rows]
    return (np.array(raw) - SCALE.score_mean) / SCALE.score_std


def test_scores_are_those_of_the_plain_model(judge: Path, tiny_model: Path, model: RewardModel) -> None:
    rollout = make_rollout(tiny_model, RESPONSES, ENDED)
    rows = [sample.tokens for sample in rollout.trajectories]
    expected = plain_scores(judge, rows)
    got = model.score(rollout)
    assert got.dtype == np.float32 and np.ptp(expected) > 0.1
    np.testing.assert_allclose(got, expected, atol=1e-5)
    with closing(open_judge(judge, tiny_model, normalize=False)) as raw:
        np.testing.assert_allclose(raw.score(rollout), expected * SCALE.score_std + SCALE.score_mean, atol=1e-5)


@pytest.mark.parametrize("budget", [1, 70, 100_000])
def test_how_rows_are_cut_into_passes_changes_nothing(
    judge: Path, tiny_model: Path, model: RewardModel, budget: int
) -> None:
    rollout = make_rollout(tiny_model, RESPONSES, ENDED)
    with closing(open_judge(judge, tiny_model, budget=budget)) as other:
        np.testing.assert_allclose(other.score(rollout), model.score(rollout), atol=1e-5)


def test_threads_get_their_own_groups(tiny_model: Path, model: RewardModel) -> None:
    rollouts = [make_rollout(tiny_model, [f"{i} hi", "x" * i], [True, False]) for i in range(1, 13)]
    alone = [model.score(rollout) for rollout in rollouts]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(model.score, rollouts))
    np.testing.assert_allclose(np.stack(together), np.stack(alone), atol=1e-5)
    assert len({float(scores[0]) for scores in alone}) == 12


def test_another_tokenizer_reads_the_text_through_its_own_template(copied: Path, tiny_model: Path) -> None:
    other = set_other_tokenizer(copied)
    turns = [{"role": m.role, "content": m.content} for m in MESSAGES]
    prompt = other.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert prompt == "<|user|>be kind<|end|><|user|>say hi<|end|><|assistant|>"
    rows = [
        other.encode(prompt + response) + ([other.eos_token_id] if end else [])
        for response, end in zip(RESPONSES, ENDED, strict=True)
    ]
    rollout = make_rollout(tiny_model, RESPONSES, ENDED)
    start = rollout.trajectories[0].segments[1].start
    assert rollout.trajectories[0].tokens[:start].tolist() != other.encode(prompt)
    with closing(open_judge(copied, tiny_model)) as model:
        np.testing.assert_allclose(model.score(rollout), plain_scores(copied, rows), atol=1e-5)


def test_text_alone_gives_the_scores_of_the_tokens(judge: Path, tiny_model: Path, model: RewardModel) -> None:
    rollout = make_rollout(tiny_model, RESPONSES[:2], (True, True))
    with closing(open_judge(judge, None)) as server:
        np.testing.assert_allclose(server.score_texts(make_texts(RESPONSES[:2])), model.score(rollout), atol=1e-5)


def test_without_chat_the_text_is_read_as_it_is(copied: Path, tiny_model: Path) -> None:
    other = set_other_tokenizer(copied)
    (copied / "chat_template.jinja").unlink()
    plain = setting(tiny_model, chat=False)
    assert reward_source("judge", judge_spec(copied), plain).through_text
    rows = [[*other.encode("be kind\nsay hi"), *other.encode(text), other.eos_token_id] for text in RESPONSES[:2]]
    with closing(RewardModel("judge", judge_spec(copied), ScoringConfig(), plain)) as model:
        rollout = make_rollout(tiny_model, RESPONSES[:2], (True, True))
        np.testing.assert_allclose(model.score(rollout), plain_scores(copied, rows), atol=1e-5)


def test_a_token_without_a_row_goes_through_text(tiny_model: Path, model: RewardModel) -> None:
    rollout = make_rollout(tiny_model, ("hi",), (True,))
    expected = model.score(rollout)
    rollout.trajectories[0].tokens[-1] = 100_000  # a row of the policy beyond every tokenizer
    np.testing.assert_allclose(model.score(rollout), expected, atol=1e-5)


def test_what_does_not_fit_is_told(judge: Path, tiny_model: Path, model: RewardModel) -> None:
    with pytest.raises(RewardError, match=r"judge \(.*\) has 128 positions, and response 1 with its prompt takes 219"):
        model.score_texts(make_texts(["hi", "x" * 200]))
    with pytest.raises(ModelError, match="is 129 tokens, and the model has 128 positions"):
        reward_source("judge", judge_spec(judge), setting(tiny_model, max_tokens=129))
    assert reward_source("judge", judge_spec(judge), setting(tiny_model, max_tokens=128)).through_text is False


def test_scores_that_are_not_numbers_come_as_they_are(
    copied: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(open_judge(copied, tiny_model)) as model:
        weight: Any = model._scalar.model.get_submodule("score").weight
        with torch.no_grad():
            weight.fill_(float("nan"))
        assert np.isnan(model.score(make_rollout(tiny_model, RESPONSES, ENDED))).all()


def no_template(judge: Path) -> None:
    set_other_tokenizer(judge)
    (judge / "chat_template.jinja").unlink()


def no_end(judge: Path) -> None:
    path = judge / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": None}))


def more_tokens(judge: Path) -> None:
    own: Any = load_tokenizer(judge)
    own.add_tokens(["<one more>", "<and another>"])
    own.save_pretrained(judge)


def three_labels(judge: Path) -> None:
    path = judge / "config.json"
    labels = {str(i): f"LABEL_{i}" for i in range(3)}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"id2label": labels, "label2id": {}}))
    weights = load_file(judge / "model.safetensors")
    save_file(weights | {"score.weight": torch.zeros(3, 64)}, judge / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (no_template, "its vocabulary is not that of .*, and its tokenizer has no chat template"),
        (no_end, "no end token"),
        (more_tokens, "its tokenizer has 10[0-9] tokens, its model embeds only 102"),
        (three_labels, "has 3 labels; a reward model has exactly 1"),
        (lambda judge: (judge / "model.safetensors").unlink(), "has no weights"),
    ],
)
def test_a_model_that_cannot_be_used_is_refused_before_the_start(
    copied: Path, tiny_model: Path, damage: Any, words: str
) -> None:
    damage(copied)
    with pytest.raises(ModelError, match=words):
        reward_source("judge", judge_spec(copied), setting(tiny_model))


def test_a_language_model_is_no_reward_model(tiny_model: Path) -> None:
    with pytest.raises(ModelError, match=r"scoring\.rewards\.judge\.path = .*: is Qwen2ForCausalLM, not a rew"):
        reward_source("judge", judge_spec(tiny_model), setting(tiny_model))
    with pytest.raises(ModelError, match=r"scoring\.rewards\.judge\.path = '\./nowhere': there is no such directory"):
        reward_source("judge", judge_spec("./nowhere"), setting(tiny_model))


def test_a_run_directory_stands_for_its_newest_checkpoint(judge: Path, tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(judge, tmp_path / "run" / "checkpoints" / "step-7" / "hf")
    (tmp_path / "run" / "checkpoints" / "LATEST").write_text("step-7\n")
    source = reward_source("judge", judge_spec(tmp_path / "run"), setting(tiny_model))
    assert source.path == str(tmp_path / "run" / "checkpoints" / "step-7" / "hf")
    assert load_tokenizer(source.path).get_vocab() == source.tokenizer.get_vocab()
