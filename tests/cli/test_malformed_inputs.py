"""Malformed inputs through the command line: exit code 2, one message with the way out, no start, nothing written."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import ray
from malformed_inputs import INPUTS, Bad

from rlhf_dist.cli.main import main
from rlhf_dist.config.load import load, to_yaml
from rlhf_dist.data.stream import PromptStream
from rlhf_dist.loop.ledger import Ledger
from rlhf_dist.loop.run_directory import open_run_directory
from rlhf_dist.loop.train_state import State

BASE = """
output: runs
model: {path: MODEL}
data: {source: task, task: {name: TASK, min_length: 2, max_length: 3, train_size: 200}}
sft: {steps: 2, batch_size: 2, max_tokens: 48}
algo: {group_size: 4}
rollout: {workers: 1, cpus: 1, max_prompt_tokens: 40, max_response_tokens: 8, kv_cache_gib: 0.1}
learner: {cpus: 1, micro_batch_tokens: 200}
preferences: {max_tokens: 48, held_out: 4}
reward: {batch_size: 4}
loop: {steps: 4, prompts_per_step: 2}
eval: {prompts: 4, every: 0, samples: 0}
cluster: {address: local, device: cpu}
telemetry: {wandb: "off"}
"""


def lay_out(bad: Bad, folder: Path, tiny_model: Path) -> None:
    """Everything that the input is made of, in the working directory `folder`."""
    model = tiny_model
    if bad.model is not None:
        model = Path("model")
        shutil.copytree(tiny_model, folder / model)
        bad.model(folder / model)
    base = BASE.replace("MODEL", str(model)).replace("TASK", "describe" if bad.command == "reward" else "reverse")
    (folder / "base.yaml").write_text(base)
    for name, content in bad.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    if bad.run is not None:
        make_run(folder)
        bad.run(folder / "runs" / "run")


def make_run(folder: Path) -> None:
    """A run of two steps with a checkpoint."""
    config = load(folder / "base.yaml", [])
    run = open_run_directory(str(folder / "runs"), "run", to_yaml(config), resume=False)
    ledger = Ledger(run.ledger)
    checkpoint = run.begin_checkpoint(2)
    for name, content in {"hf/model.safetensors": "weights", "optimizer-0.safetensors": "step 2."}.items():
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_text(content)
    cursor = PromptStream(config.data, config.seed, config.eval.prompts).cursor()
    state = State(2, config.loop.steps, cursor, before={}, results={}, ledger=ledger.totals(2))
    run.commit_checkpoint(2, 2, asdict(state))
    ledger.close()
    run.close()


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below the folder, but for Python's own."""
    paths = (path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in paths}


@pytest.mark.parametrize("what", INPUTS)
def test_malformed_input(
    what: str, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    bad = INPUTS[what]
    lay_out(bad, tmp_path, tiny_model)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
    for name, value in bad.environment.items():
        monkeypatch.setenv(name, value)
    before = snapshot(tmp_path)
    code = main([bad.command, bad.config, *bad.words])
    captured = capfd.readouterr()
    assert code == 2, captured.err
    assert captured.out == "" and "Traceback" not in captured.err
    assert captured.err.startswith("rlhf-dist: ") and captured.err.count("rlhf-dist: ") == 1
    for part in bad.told:
        assert part in captured.err
    assert len(captured.err) < 1500
    assert snapshot(tmp_path) == before, "nothing is written"
