"""One real run, Ray + vLLM + DeepSpeed (2 workers, 2 ranks, ZeRO-2), read by many tests; they change nothing in it."""

from __future__ import annotations

import itertools
import json
import sqlite3
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from conftest import SharedRun
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_dist.cli.main import main
from rlhf_dist.config.load import from_yaml
from rlhf_dist.data.stream import PromptStream

pytestmark = pytest.mark.timeout(900)
PROMPTS, GROUP, STEPS = 6, 4, 4


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that training steps wrote."""
    return [line for line in lines(run / "metrics.jsonl") if "reward/mean" in line]


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def test_one_metrics_object_a_step(shared_run: SharedRun) -> None:
    assert [line["step"] for line in lines(shared_run.path / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    found = steps(shared_run.path)
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    names = {
        "reward/mean", "reward/exact", "reward/letters", "policy/loss", "policy/entropy", "policy/ratio",
        "learner/grad_norm", "learner/lr", "learner/tokens", "learner/trained_share",
        "rollout/response_length", "rollout/logprob_diff_max", "rollout/logprob_diff_mean",
        "rollout/policy_lag_max", "sync/changed_share", "time/step", "time/generate", "time/train",
        "time/sync", "goodput/rollout_generate", "goodput/tokens_per_s",
    }  # fmt: skip
    for line in found:
        assert names <= line.keys(), names - line.keys()
        assert all(isinstance(value, int | float) for value in line.values()), "no NaN among them"


def test_speed_counts_what_is_between_steps(shared_run: SharedRun) -> None:
    found = steps(shared_run.path)
    for before, line in itertools.pairwise(found):
        seconds = line["time/elapsed"] - before["time/elapsed"]
        assert line["goodput/tokens_per_s"] * seconds == pytest.approx(line["rollout/response_tokens"], rel=0.05)
    evaluated = found[2]  # the evaluation at step 2 is between
    assert evaluated["goodput/tokens_per_s"] * evaluated["time/step"] < evaluated["rollout/response_tokens"]


def test_total_reward_is_the_weighted_sum_of_its_parts(shared_run: SharedRun) -> None:
    for line in steps(shared_run.path):
        assert line["reward/mean"] == pytest.approx(line["reward/exact"] + 0.5 * line["reward/letters"], abs=1e-5)


def test_every_step_learns_from_the_weights_it_published_last(shared_run: SharedRun) -> None:
    assert [line["rollout/policy_lag_max"] for line in steps(shared_run.path)] == [0.0] * STEPS
    with sqlite3.connect(f"file:{shared_run.path / 'ledger.sqlite'}?mode=ro", uri=True) as ledger:
        issued = ledger.execute("SELECT version, step, COUNT(*) FROM groups GROUP BY version, step").fetchall()
    assert sorted(issued) == [(step - 1, step, PROMPTS) for step in range(1, STEPS + 1)]


def test_rollout_and_learner_agree_on_logprobs_at_every_step(shared_run: SharedRun) -> None:
    found = [line["rollout/logprob_diff_max"] for line in steps(shared_run.path)]
    assert all(0 <= value <= 1e-4 for value in found), found
    assert max(found) > 0, "two programs never agree to the last bit: a 0 was not measured"


def test_every_push_changed_the_weights(shared_run: SharedRun) -> None:
    assert all(line["sync/changed_share"] > 0 for line in steps(shared_run.path))
    assert all(line["learner/grad_norm"] > 0 for line in steps(shared_run.path))


def test_warm_up_is_seen_in_the_rates(shared_run: SharedRun) -> None:
    assert [line["learner/lr"] for line in steps(shared_run.path)] == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3])


def test_evaluation_before_during_and_after(shared_run: SharedRun) -> None:
    found = [line for line in lines(shared_run.path / "metrics.jsonl") if "eval/greedy_accuracy" in line]
    assert [line["step"] for line in found] == [0, 2, 4]
    for line in found:
        assert 0 <= line["eval/greedy_accuracy"] <= 1 and 0 <= line["eval/pass_at_2"] <= 1


def test_the_ledger_proves_that_nothing_was_lost_or_used_twice(shared_run: SharedRun) -> None:
    sentence = "24 groups issued: 24 trained once, 0 dropped, 0 in flight, 0 lost, 0 used twice"
    assert json.loads((shared_run.path / "summary.json").read_text())["ledger"].startswith(sentence)
    assert sentence in shared_run.train.stdout


def test_the_optimizer_itself_says_that_it_took_what_the_ledger_says(
    shared_run: SharedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two ranks under ZeRO-2: all samples but those that the plan left out, which have no advantage."""
    assert main(["ledger", str(shared_run.path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    trained = sum(round(line["learner/trained_share"] * PROMPTS * GROUP) for line in steps(shared_run.path))
    assert told["outcome"] == "finished" and told["step"] == STEPS and told["adds_up"]
    assert told["groups"]["trained_once"] == told["witness"]["groups"] == STEPS * PROMPTS
    assert (told["witness"]["steps"], told["witness"]["agrees"]) == (STEPS, True)
    assert told["witness"]["samples_seen"] == trained > 0
    assert told["witness"]["samples_left_out"] == STEPS * PROMPTS * GROUP - trained
    assert main(["ledger", str(shared_run.path)]) == 0
    said = capsys.readouterr().out.splitlines()[1:]
    assert len(said) == 3 and all(line in shared_run.train.stdout.splitlines() for line in said)


def test_the_prompts_are_the_first_of_the_stream(shared_run: SharedRun) -> None:
    config = from_yaml((shared_run.path / "config.yaml").read_text())
    stream = PromptStream(config.data, config.seed, config.eval.prompts)
    with sqlite3.connect(f"file:{shared_run.path / 'ledger.sqlite'}?mode=ro", uri=True) as ledger:
        used = {uid for (uid,) in ledger.execute("SELECT uid FROM uses")}
    assert used == {prompt.uid for prompt in stream.take(PROMPTS * STEPS)}


def test_checkpoints_load_with_transformers_and_have_moved(shared_run: SharedRun) -> None:
    folder = shared_run.path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["LATEST", "step-2", "step-4"]
    assert (folder / "LATEST").read_text().strip() == "step-4"
    start = loaded(shared_run.workplace.output / "sft" / "checkpoints" / "step-40" / "hf")
    middle, last = loaded(folder / "step-2" / "hf"), loaded(folder / "step-4" / "hf")
    for name in start:
        assert not torch.equal(start[name], middle[name]) and not torch.equal(middle[name], last[name]), name
    tokenizer = AutoTokenizer.from_pretrained(folder / "step-4" / "hf")
    turn = tokenizer.apply_chat_template([{"role": "user", "content": "reverse: abc"}], tokenize=False)
    assert "reverse: abc" in turn


def test_supervised_start_was_learnt(shared_run: SharedRun) -> None:
    summary = json.loads((shared_run.workplace.output / "sft" / "summary.json").read_text())
    assert summary["command"] == "sft"
    assert summary["after"]["sft/held_out_loss"] < summary["before"]["sft/held_out_loss"] - 1


def test_a_checkpoint_says_how_to_go_on(shared_run: SharedRun) -> None:
    folder = shared_run.path / "checkpoints" / "step-4"
    state = json.loads((folder / "state.json").read_text())
    assert (state["step"], state["steps"]) == (4, STEPS)
    assert (state["cursor"]["epoch"], state["cursor"]["position"]) == (0, PROMPTS * STEPS)
    summary = json.loads((shared_run.path / "summary.json").read_text())
    assert (state["before"], state["results"]) == (summary["before"], summary["after"])
    assert sorted(path.name for path in folder.glob("optimizer-*")) == [f"optimizer-{i}.safetensors" for i in (0, 1)]


def test_the_resolved_config_is_kept_whole(shared_run: SharedRun) -> None:
    config = from_yaml((shared_run.path / "config.yaml").read_text())
    assert config.name == "grpo" and config.model.path == str(shared_run.workplace.output / "sft")
    assert (config.learner.ranks, config.learner.zero_stage, config.rollout.workers) == (2, 2, 2)
    assert config.weights.bucket_mib == 64, "defaults are written out too"


def test_samples_are_kept_as_a_table(shared_run: SharedRun) -> None:
    files = sorted(path.name for path in (shared_run.path / "rollouts").iterdir())
    assert files == ["step-000001.parquet", "step-000002.parquet", "step-000004.parquet"]
    rows = pq.read_table(shared_run.path / "rollouts" / files[0]).to_pylist()
    assert len(rows) == 3
    for row in rows:
        assert row["prompt"] and row["answer"] and isinstance(row["response"], str)
        assert row["uid"].startswith("0/") and isinstance(row["reward"], float)


def test_wandb_is_offline_and_there(shared_run: SharedRun) -> None:
    (run,) = (shared_run.path / "wandb").glob("offline-run-*")
    assert list(run.glob("*.wandb"))


def test_curves_are_a_picture(shared_run: SharedRun) -> None:
    data = (shared_run.path / "curves.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and 5_000 < len(data) < 2_000_000


def test_the_summary_has_before_and_after(shared_run: SharedRun) -> None:
    summary = json.loads((shared_run.path / "summary.json").read_text())
    found = [line for line in lines(shared_run.path / "metrics.jsonl") if "eval/greedy_accuracy" in line]
    assert summary["command"] == "train" and summary["seconds"] > 0
    assert summary["before"] == {name: value for name, value in found[0].items() if name != "step"}
    assert summary["after"] == {name: value for name, value in found[-1].items() if name.startswith("eval/")}
    assert list(summary["forecast"]) == ["step", "generate", "train", "push"]
    assert "forecast, and (measured), s: step " in shared_run.train.stdout


def test_every_actor_has_its_log(shared_run: SharedRun) -> None:
    logs = {path.name: path.stat().st_size for path in (shared_run.path / "logs").iterdir()}
    expected = [
        "collator",
        "learner-rank-0",
        "learner-rank-1",
        "rollout-worker-0",
        "rollout-worker-1",
        "scoring-server-0",
    ]
    assert sorted(logs) == [f"{name}.{kind}" for name in expected for kind in ("log", "pid")]
    rollout = (shared_run.path / "logs" / "rollout-worker-1.log").read_text()
    assert "vLLM" in rollout and "Failed to load weights" not in rollout


def test_events_tell_of_checkpoints_and_of_no_warning(shared_run: SharedRun) -> None:
    events = lines(shared_run.path / "events.jsonl")
    assert [event["facts"]["step"] for event in events if event["kind"] == "checkpoint"] == [2, 4]
    assert [event for event in events if event["kind"] == "warning"] == []


def test_the_screen_is_ours(shared_run: SharedRun) -> None:
    """stdout has the table and two lines; no engine writes to stdout or stderr."""
    for command in (shared_run.sft, shared_run.train):
        table, *_ = command.stdout.splitlines()
        assert table.split() == ["held", "out", "before", "after", "change"]
        assert command.stdout.splitlines()[-1].startswith("run directory: ")
        for word in ("vllm", "INFO", "WARNING", "pid=", "deepspeed]", "ray::", "wandb:", "it/s"):
            assert word not in command.stdout + command.stderr, word
    shown = [line for line in shared_run.train.stderr.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in shown] == ["1/4", "2/4", "3/4", "4/4"]


def test_nothing_listens_beyond_loopback(shared_run: SharedRun) -> None:
    listening = shared_run.workplace.listening
    names = {name.split(".")[0] for name, _ in listening}
    assert {"gcs_server", "raylet"} <= names and any(name.startswith("ray::PolicyHost") for name in names)
    assert {pair for pair in listening if pair[1] not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")} == set()


def test_shared_memory_is_given_back(shared_run: SharedRun) -> None:
    assert shared_run.workplace.weights, "the files were seen while the run was there"
    assert [path for path in shared_run.workplace.weights if Path(path).exists()] == []
