"""`rlhf-dist bench gpu`: the list over processes that fail in every way, the learner's part for real, wrong input."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import _gpu_machine  # noqa: E402
import _gpu_run  # noqa: E402
import gpu as bench  # noqa: E402
from _gpu_side import LeftOut, Told, Verdict, Work, told_of  # noqa: E402

from rlhf_dist.config.load import load, to_yaml  # noqa: E402
from rlhf_dist.config.schema import Config, WeightsConfig  # noqa: E402
from rlhf_dist.errors import ConfigError, InputError  # noqa: E402

SIDE = f"""
import os, subprocess, sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
from _gpu_side import LeftOut, Verdict, run_side

def error():
    raise ValueError("no such kernel")

def dies():
    print("Segmentation fault", flush=True)
    os._exit(3)

def hangs():
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)
    Path({{folder!r}}, "child").write_text(str(child.pid))
    time.sleep(600)

def left_out():
    raise LeftOut("needs a GPU")

def good():
    return Verdict({{{{"0.3 of a limit (at least 0.25)": True}}}}, {{{{"pid": os.getpid()}}}})

def missed():
    return Verdict({{{{"this is so": True, "0.1 of a limit (at least 0.25)": False}}}})

run_side(lambda work: {{{{f.__name__: f for f in (error, dies, hangs, left_out, good, missed)}}}})
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    """A side of all kinds of checks, in place of the real ones."""
    (tmp_path / "_gpu_fake.py").write_text(SIDE.format(folder=str(tmp_path)).replace("{{", "{").replace("}}", "}"))
    monkeypatch.setattr(bench, "HERE", tmp_path)
    monkeypatch.setattr(bench, "END_S", 0.5)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return Work("none.yaml", "cpu", str(tmp_path), str(tmp_path / "told.jsonl"))


def run_fake(work: Work, names: list[str], seconds: float = 60.0, limit_s: float = 20.0) -> dict[str, Told]:
    found: dict[str, Told] = {}
    checks = [bench.Check(name, "fake", 3.0 if name == "hangs" else limit_s, "") for name in names]
    bench.run_part(
        work, "fake", checks, time.monotonic() + seconds, lambda one, told, _: found.update({one.name: told})
    )
    return found


def test_a_check_that_fails_does_not_keep_the_next_from_running(work: Work) -> None:
    found = run_fake(work, ["left_out", "error", "dies", "hangs", "missed", "good"])
    assert {name: told.status for name, told in found.items()} == {
        "left_out": "SKIPPED",
        "error": "FAIL",
        "dies": "FAIL",
        "hangs": "FAIL",
        "missed": "FAIL",
        "good": "PASS",
    }
    assert found["left_out"].why == "needs a GPU"
    assert found["error"].why == "ValueError: no such kernel"
    assert found["dies"].why == "its process ended with exit code 3: Segmentation fault"
    assert found["hangs"].why.startswith("not done in 3 s: ")
    assert found["missed"].why == "0.1 of a limit (at least 0.25)"
    child = int(Path(work.folder, "child").read_text())
    # It was in a session of its own, and is ended all the same; where nobody waits for orphans it stays as a zombie.
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_a_process_that_cannot_be_ended_is_told_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is in the driver; the list goes on."""
    monkeypatch.setattr(bench, "END_S", 0.1)
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as process:
        monkeypatch.setattr(bench.os, "killpg", lambda pid, signal: None)
        bench.end(process, "RLHF_DIST_BENCH=of no process")
        process.kill()
    assert capsys.readouterr().out == (
        f"process {process.pid} was killed and has not ended in 0.1 s; it may hold a GPU\n"
    )


def test_the_first_check_in_a_process_has_time_for_the_start() -> None:
    """Of an engine, say, where `parity` is asked for alone or `engine` failed."""
    limits = {check.name: (check.limit_s, bench.with_start(check).limit_s) for check in bench.CHECKS}
    assert limits["engine"] == (180, 180) and limits["parity"] == (45, 180)


def test_the_run_that_needs_two_gpus_comes_last() -> None:
    *_, before, last = bench.CHECKS
    assert (before.name, last.name) == ("run ipc", "run broadcast")


def test_what_nvidia_smi_does_not_know_is_left_out(run_work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["NVIDIA H200, 580.95.05, Default, 143000 MiB, 143771 MiB", "NVIDIA H200, 570.1, Default, [N/A], [N/A]"]
    monkeypatch.setattr(_gpu_machine, "asked_of_driver", lambda: lines)
    found = _gpu_machine.machine(replace(run_work, device="cuda"))
    assert {text: met for text, met in found.asked.items() if text.startswith("GPU")} == {
        "GPU 0: driver 580.95.05 (at least 580)": True,
        "GPU 0: compute mode Default (Default)": True,
        "GPU 0: 99% of 143771 MiB free (at least 95%)": True,
        "GPU 1: driver 570.1 (at least 580)": False,
        "GPU 1: compute mode Default (Default)": True,
    }
    assert found.without == tuple(f"GPU 1: memory.{what}, of which nvidia-smi says [N/A]" for what in ("free", "total"))


def test_a_compiled_part_that_did_not_load_is_seen(tmp_path: Path) -> None:
    """vLLM itself only warns, and its Python parts import."""
    (tmp_path / "vllm").mkdir()
    for name in ("__init__", "_custom_ops"):
        (tmp_path / "vllm" / f"{name}.py").touch()
    script = f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import _gpu_machine"
    done = subprocess.run(
        [sys.executable, "-c", f"{script}; print(_gpu_machine.loaded_kernels())"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == str({"vLLM's compiled part could not be loaded": False}) + "\n"


def test_what_does_not_fit_is_skipped_and_named(work: Work) -> None:
    found = run_fake(work, ["good", "missed"], seconds=30.0, limit_s=61.0)
    assert {told.status for told in found.values()} == {"SKIPPED"}
    assert found["good"].why == "takes up to 61 s, and 30 s are left of --minutes"
    assert run_fake(work, ["hangs"], seconds=1.6)["hangs"].why == "the time of --minutes ended while it ran"


def test_a_cut_off_list_keeps_what_it_had(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found.json"
    (tmp_path / "learner.log").write_text("Traceback\n\nValueError: no\n")
    listed = bench.Listed(argparse.Namespace(out=out, device="cuda", model=None, words=[], minutes=10), tmp_path)
    check = bench.Check("memory", "learner", 60, "as planned")
    listed.add(check, told_of("memory", Verdict({"held": True, "peak": True}, {"held": 1}, ("context: a GPU",))), 1.5)
    found = json.loads(out.read_text())
    assert (found["complete"], [row["status"] for row in found["checks"]]) == (False, ["PASS"])
    listed.add(check, told_of("memory", Verdict({"held": True, "peak": False})), 1.5)
    listed.write(complete=True)
    found = json.loads(out.read_text())
    assert (found["complete"], [row["why"] for row in found["checks"]]) == (True, ["held; peak", "peak"])
    assert found["checks"][1]["log"] == ["Traceback", "ValueError: no"] and "log" not in found["checks"][0]
    assert listed.counts() == {"PASS": 1, "FAIL": 1}
    assert "not here: context: a GPU" in capsys.readouterr().out


def without_vllm_and_ray(tmp_path: Path, *command: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit code and checks of the benchmark, with both unimportable."""
    for name in ("vllm", "ray"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is not installed')\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    words = ["--device", "cpu", "--out", str(tmp_path / "found.json"), "model.tiny.layers=2"]
    result = subprocess.run(
        [sys.executable, *command, *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert (tmp_path / "found.json").exists(), result.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    return result.returncode, {row["check"]: row for row in found["checks"]}


@pytest.mark.engines
def test_the_learner_part_runs_without_vllm_and_ray(tmp_path: Path) -> None:
    code, found = without_vllm_and_ray(tmp_path, "benchmarks/gpu.py", "--only", "learner")
    assert {name: row["status"] for name, row in found.items()} == {
        "attention": "PASS",
        "varlen": "SKIPPED",
        "bfloat16": "PASS",
        "step": "PASS",
        "memory": "PASS",
    }, found
    assert code == 0
    losses = found["step"]["figures"]["losses"]
    assert losses[-1] < losses[0] and found["step"]["figures"]["attention"] == "segmented"
    assert found["memory"]["figures"]["measured"]["weights"] == found["memory"]["figures"]["plan"]["weights"]


def test_the_command_needs_neither_too(tmp_path: Path) -> None:
    words = ["-m", "rlhf_dist", "bench", "gpu", "--only", "imports,varlen"]
    code, found = without_vllm_and_ray(tmp_path, *words)
    assert found["varlen"]["status"] == "SKIPPED"
    assert found["imports"]["why"] in ("ImportError: ray is not installed", "ImportError: vllm is not installed")
    assert code == 1


def test_wrong_words_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no part or check 'lerner'; parts: machine, learner, engine, run; checks: "):
        bench.parse(["--only", "lerner"])
    with pytest.raises(InputError, match=r"--model .*: has no config.json"):
        bench.parse(["--model", str(tmp_path)])
    with pytest.raises(InputError, match="not of the form"):
        bench.parse(["grpo.yaml"])
    assert [check.name for check in bench.parse(["--only", "memory,machine"]).only] == [
        "machine",
        "imports",
        "compile",
        "memory",
    ]


def test_cuda_where_there_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(InputError, match="nvidia-smi lists no GPU"):
        bench.parse(["--device", "cuda"])
    assert bench.parse([]).device == "cpu"


@pytest.fixture
def run_work(tmp_path: Path) -> Work:
    (tmp_path / "run.yaml").write_text(to_yaml(load(ROOT / "configs" / "reverse.yaml")))
    return Work(str(tmp_path / "run.yaml"), "cpu", str(tmp_path), str(tmp_path / "told.jsonl"))


def test_a_transport_that_the_config_refuses_is_left_out(run_work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(config: Config, command: str) -> None:
        raise ConfigError(f"weights.transport: it needs a GPU (colocate {config.cluster.colocate})")

    assert _gpu_run.accepted(run_work, WeightsConfig().transport).cluster.colocate
    monkeypatch.setattr(_gpu_run, "check", refuse)
    with pytest.raises(LeftOut, match=r"weights\.transport: it needs a GPU \(colocate True\)"):
        _gpu_run.accepted(run_work, "another")
    with pytest.raises(ConfigError):  # what is there by default has to be accepted
        _gpu_run.accepted(run_work, WeightsConfig().transport)


def test_a_run_is_judged_by_its_metrics(run_work: Work) -> None:
    config = load(ROOT / "configs" / "reverse.yaml", ["loop.steps=2", "loop.logprob_diff_limit=0.5"])
    step = {
        "time/step": 4.0,
        "time/sync": 0.5,
        "sync/changed_share": 1.0,
        "rollout/logprob_diff_mean": 0.002,
        "rollout/logprob_diff_max": 0.1,
    }
    good = _gpu_run.judged(config, 30.0, [step, step], [], True)
    assert all(good.asked.values()) and good.figures["first_step_s"] == 34.0
    worse = step | {"sync/changed_share": 0.5, "rollout/logprob_diff_mean": 0.02, "time/sync": 4.0}
    found = _gpu_run.judged(config, 200.0, [step, worse], ["rollout worker 0: no receipt"], True)
    assert [text.split(" ")[0] for text, met in found.asked.items() if not met] == [
        *("first", "changed_share", "logprob_diff_mean", "push", "pushes:"),
    ]
