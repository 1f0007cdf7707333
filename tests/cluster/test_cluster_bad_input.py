"""Bad input through the command line: exit code 2 and one message, before any engine is started or directory made."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from conftest import SharedRun, Workplace, make_workplace
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from rlhf_dist.cli.main import main
from rlhf_dist.config.schema import TinyConfig
from rlhf_dist.models.tiny import make_tiny
from rlhf_dist.planning.placement import local_machine

pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    """A folder with a config, which is the current directory."""
    made = make_workplace(tmp_path / "here")
    monkeypatch.chdir(made.folder)
    return made


def refused(capsys: pytest.CaptureFixture[str], place: Workplace, *words: str) -> str:
    """Run a command that has to be refused: nothing is started and no run directory is made. Returns the message."""
    assert main([words[0], "run.yaml", *words[1:]]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    assert captured.err.startswith("rlhf-dist: ") and captured.err.count("rlhf-dist: ") == 1
    assert not ray.is_initialized()
    assert not (place.output / "run").exists()
    return captured.err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "data.jsonl:2: "),
        ('{"question": "2+2", "answer": "4"}', "data.jsonl:2: "),
        ('{"prompt": "", "answer": "4"}', "data.jsonl:2: "),
    ],
    ids=["not JSON", "no prompt", "empty prompt"],
)
def test_a_bad_line_of_data(place: Workplace, capsys: pytest.CaptureFixture[str], line: str, message: str) -> None:
    good = [json.dumps({"prompt": f"{i}+1", "answer": str(i + 1)}) for i in range(40)]
    (place.folder / "data.jsonl").write_text("\n".join([good[0], line, *good[1:]]) + "\n")
    found = refused(capsys, place, "train", "data.source=jsonl", "data.path=data.jsonl")
    assert message in found and found.count("\n") == 1


@pytest.mark.parametrize("command", ["train", "sft", "reward", "prefer", "eval"])
@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("RAY_ADDRESS", "foo", "RAY_ADDRESS=foo: not an address; the address of a cluster is HOST:PORT"),
        ("TMPDIR", "/no/such/folder", "TMPDIR=/no/such/folder: does not exist; TMPDIR has to name a folder"),
    ],
)
def test_an_environment_in_which_no_ray_can_run(
    place: Workplace,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    variable: str,
    value: str,
    message: str,
) -> None:
    monkeypatch.setenv(variable, value)
    source = ["preferences.max_tokens=48", "data.task.name=describe"] if command in ("reward", "prefer") else []
    found = refused(capsys, place, command, "cluster.address=auto", *source)
    assert message in found and found.count("\n") == 1


def test_shared_memory_without_room_for_the_weights(
    place: Workplace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs

    def little(path: object) -> object:
        return SimpleNamespace(f_bavail=3, f_frsize=4096) if str(path) == "/dev/shm" else real(path)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "statvfs", little)
    found = refused(capsys, place, "train")
    assert re.search(r"/dev/shm: pushes need \d{3} KiB for two copies of .*, and 12 KiB are free; .*--shm-size", found)


def test_a_malformed_wandb_key(
    place: Workplace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "not-a-key")
    found = refused(capsys, place, "train", "telemetry.wandb=online")
    assert "WANDB_API_KEY invalid: " in found and "not-a-key" not in found


def test_a_missing_data_file(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    found = refused(capsys, place, "train", "data.source=jsonl", "data.path=no.jsonl")
    assert "data.path is 'no.jsonl', which does not exist" in found


def test_a_missing_model_directory(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    found = refused(capsys, place, "train", "model.path=./models/mine")
    assert "model.path = './models/mine': there is no such directory" in found


@pytest.mark.parametrize(
    ("lost", "message"),
    [("tokenizer.json", "tokenizer"), ("model.safetensors", "safetensors"), ("chat_template.jinja", "chat template")],
)
def test_a_model_directory_that_lacks_something(
    place: Workplace, capsys: pytest.CaptureFixture[str], tiny_model: Path, lost: str, message: str
) -> None:
    shutil.copytree(tiny_model, place.folder / "model")
    assert (place.folder / "model" / lost).exists()
    (place.folder / "model" / lost).unlink()
    found = refused(capsys, place, "train", "model.path=model")
    assert message in found and "model" in found


def test_a_model_whose_head_dim_the_engine_refuses(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    narrow = TinyConfig(hidden_size=32, intermediate_size=64, layers=1, heads=2, kv_heads=1, max_positions=64)
    found = refused(capsys, place, "train", f"model.path={make_tiny(narrow, place.folder)}")
    assert "its head_dim is 16; on a CPU the engine supports 32, 64" in found
    found = refused(capsys, place, "train", "model.tiny.heads=4")
    assert "head_dim 16, which the CPU engine refuses" in found


def test_more_actors_than_cpus(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    cpus = local_machine().cpus
    found = refused(capsys, place, "train", f"rollout.workers={cpus + 1}")
    assert f"rollout.workers {cpus + 1} x 1 CPU each = {cpus + 1} CPUs" in found
    apart = refused(capsys, place, "train", f"learner.ranks={cpus}", "cluster.colocate=false")
    assert "cluster.colocate=true" in apart


def test_a_gpu_that_is_not_there(
    place: Workplace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = refused(capsys, place, "train", "cluster.device=cuda")
    assert "cluster.device is cuda, but there is no GPU here" in found


def test_a_reward_that_cannot_be_imported(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    found = refused(capsys, place, "train", "scoring.rewards.letters.function=no_such_module:reward")
    assert "no module named 'no_such_module'" in found
    found = refused(capsys, place, "train", "scoring.rewards.letters.function=run_rewards:letter")
    assert "has no function 'letter'; it has letters" in found


@pytest.fixture
def other_tokens(place: Workplace, tiny_model: Path) -> Path:
    """A model whose tokenizer has one token more than the policy's."""
    target = place.folder / "other"
    shutil.copytree(tiny_model, target)
    tokenizer = AutoTokenizer.from_pretrained(target)
    tokenizer.add_tokens(["zzz"])
    tokenizer.save_pretrained(target)
    return target


def test_a_critic_that_cannot_read_the_policys_tokens(
    place: Workplace, capsys: pytest.CaptureFixture[str], other_tokens: Path
) -> None:
    words = ["train", "algo.name=ppo", "learner.ranks=1", "learner.zero_stage=0"]
    found = refused(capsys, place, *words, f"critic.start={other_tokens}")
    assert f"critic.start = {other_tokens}: its vocabulary is not that of the policy, tiny" in found
    assert "set critic.start=policy" in found
    assert "critic.start = './no': there is no such directory" in refused(capsys, place, *words, "critic.start=./no")


def test_a_critic_beside_the_policy_that_finds_no_room(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    ranks = local_machine().cpus
    words = ["algo.name=ppo", "critic.side_by_side=true", f"learner.ranks={ranks}"]
    found = refused(capsys, place, "train", *words, "loop.prompts_per_step=64")
    assert f"= {2 * ranks} CPUs" in found


def test_a_reference_that_cannot_read_the_policys_tokens(
    place: Workplace, capsys: pytest.CaptureFixture[str], other_tokens: Path
) -> None:
    found = refused(capsys, place, "train", "algo.kl.coef=0.1", f"reference.path={other_tokens}")
    assert f"reference.path = {other_tokens}: its vocabulary is not that of the policy, tiny" in found
    missing = refused(capsys, place, "train", "algo.kl.coef=0.1", "reference.path=./no")
    assert "reference.path = './no': there is no such directory" in missing
    judgements = ("data.task.name=describe", "preferences.max_tokens=48")
    found = refused(capsys, place, "prefer", *judgements, f"prefer.reference={other_tokens}")
    assert f"prefer.reference = {other_tokens}: its vocabulary is not that of the policy, tiny" in found
    missing = refused(capsys, place, "prefer", *judgements, "prefer.reference=./no")
    assert "prefer.reference = './no': there is no such directory" in missing


def test_models_that_lack_rows_for_tokens_of_the_policy(
    place: Workplace, capsys: pytest.CaptureFixture[str], tiny_model: Path
) -> None:
    """The same tokenizer, and an embedding that is cut short."""
    target = place.folder / "short"
    shutil.copytree(tiny_model, target)
    config = json.loads((target / "config.json").read_text())
    rows = config["vocab_size"]
    (target / "config.json").write_text(json.dumps(config | {"vocab_size": rows - 1}))
    weights = load_file(target / "model.safetensors")
    short = {name: tensor[: rows - 1] if tensor.shape[0] == rows else tensor for name, tensor in weights.items()}
    save_file({name: tensor.clone() for name, tensor in short.items()}, target / "model.safetensors", {"format": "pt"})
    message = f": has rows for {rows - 1} tokens, the policy for {rows}"
    found = refused(capsys, place, "train", "algo.kl.coef=0.1", f"reference.path={target}")
    assert f"reference.path = {target}{message}" in found
    words = ["train", "algo.name=ppo", "learner.ranks=1", "learner.zero_stage=0"]
    assert f"critic.start = {target}{message}" in refused(capsys, place, *words, f"critic.start={target}")


def test_resuming_what_is_not_there(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such run to resume" in refused(capsys, place, "train", "--resume")


def test_a_disk_that_is_full(
    place: Workplace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(place.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "MiB of disk are needed and 0 MiB are free" in refused(capsys, place, "train")


# In a process of its own, as a person would see it:


def test_a_run_that_exists_is_not_overwritten(shared_run: SharedRun) -> None:
    before = (shared_run.path / "metrics.jsonl").read_bytes()
    result = shared_run.workplace.run("train", "name=grpo", f"model.path={shared_run.workplace.output / 'sft'}")
    assert (result.code, result.stdout) == (2, "")
    message = f"rlhf-dist: {shared_run.path}: this run exists; continue it with --resume, or give another name=\n"
    assert result.stderr.endswith(message) and result.stderr.count("rlhf-dist:") == 1
    assert (shared_run.path / "metrics.jsonl").read_bytes() == before


def test_a_resume_with_another_budget_of_tokens_is_refused(shared_run: SharedRun) -> None:
    words = ["train", "--resume", "name=grpo", f"model.path={shared_run.workplace.output / 'sft'}"]
    result = shared_run.workplace.run(*words, "learner.micro_batch_tokens=77", "loop.steps=9")
    assert (result.code, result.stdout) == (2, "")
    assert "a resume cannot change learner.micro_batch_tokens from" in result.stderr
    assert result.stderr.count("rlhf-dist:") == 1
    assert "micro_batch_tokens: 77" not in (shared_run.path / "config.yaml").read_text(), "and it is not written over"


POSITIONS = TinyConfig(hidden_size=64, intermediate_size=64, layers=1, heads=2, kv_heads=1, max_positions=40)
FITS = ("rollout.max_prompt_tokens=20", "rollout.max_response_tokens=12", "eval.samples=0")
PPO = ("algo.name=ppo", "learner.ranks=1", "learner.zero_stage=0")


@pytest.mark.parametrize(
    ("command", "words", "keys", "tokens"),
    [
        ("train", ("rollout.max_prompt_tokens=30",), "rollout.max_prompt_tokens + rollout.max_response_tokens", 42),
        ("eval", ("rollout.max_prompt_tokens=30",), "rollout.max_prompt_tokens + rollout.max_response_tokens", 42),
        ("sft", ("sft.max_tokens=41",), "sft.max_tokens", 41),
        ("reward", ("preferences.source=task", "data.task.name=describe", "preferences.max_tokens=41"),
         "preferences.max_tokens", 41),
        ("train", ("ptx.coef=0.1", "ptx.source=task", "ptx.max_tokens=41"), "ptx.max_tokens", 41),
    ],
    ids=["train", "eval", "sft", "reward", "ptx"],
)  # fmt: skip
def test_more_tokens_than_positions(
    place: Workplace, capsys: pytest.CaptureFixture[str], command: str, words: tuple[str, ...], keys: str, tokens: int
) -> None:
    model = make_tiny(POSITIONS, place.folder)
    found = refused(capsys, place, command, f"model.path={model}", *FITS, "learner.ranks=1", *words)
    assert f"{model}: {keys} is {tokens} tokens, and the model has 40 positions (max_position_embeddings" in found
    assert f"Lower {keys} to at most 40" in found


@pytest.mark.parametrize("which", ["reference.path", "critic.start"])
def test_a_model_beside_the_policy_with_fewer_positions(
    place: Workplace, capsys: pytest.CaptureFixture[str], which: str
) -> None:
    model = make_tiny(POSITIONS, place.folder)
    words = ("algo.kl.coef=0.1",) if which == "reference.path" else PPO
    found = refused(capsys, place, "train", *FITS, "rollout.max_response_tokens=21", *words, f"{which}={model}")
    assert "rollout.max_response_tokens is 41 tokens, and the model has 40 positions" in found and str(model) in found


def test_a_config_with_fewer_layers_than_the_weights_have(
    place: Workplace, capsys: pytest.CaptureFixture[str], tiny_model: Path
) -> None:
    """Everywhere a model is named: none is trained, sampled from or read without a part of its layers."""
    target = place.folder / "less"
    shutil.copytree(tiny_model, target)
    config = json.loads((target / "config.json").read_text())
    layers = config["num_hidden_layers"] - 1
    less = {"num_hidden_layers": layers, "layer_types": config["layer_types"][:layers]}
    (target / "config.json").write_text(json.dumps(config | less))
    for words in (
        ("sft", f"model.path={target}", "sft.max_tokens=20"),
        ("eval", f"model.path={target}"),
        ("train", f"model.path={target}"),
        ("train", "algo.kl.coef=0.1", f"reference.path={target}"),
        ("train", *PPO, f"critic.start={target}"),
    ):
        found = refused(capsys, place, *words)
        assert f"config.json says {layers} layers, the weights have {layers + 1}" in found and str(target) in found
