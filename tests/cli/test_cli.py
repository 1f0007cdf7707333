"""The command line: exit codes, one message for bad input, nothing heavy before a config has parsed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import rlhf_dist.cluster
from rlhf_dist import __version__
from rlhf_dist.cli import arguments, bench
from rlhf_dist.cli.arguments import PAGES
from rlhf_dist.cli.main import COMMANDS, main
from rlhf_dist.config.load import from_yaml
from rlhf_dist.config.schema import Config
from rlhf_dist.errors import ActorLost, DiskError, InputError, RayLost, RewardError, RlhfError

ROOT = Path(__file__).parents[2]
ONWARD = (
    "; go on from the newest checkpoint, or from the beginning if there is none yet, with "
    "`rlhf-dist train small.yaml --resume`"
)
ANEW = "; nothing of the run was written yet: start it again with `rlhf-dist train small.yaml`"


def cli(*words: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, from the root of the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "rlhf_dist", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)


def install(monkeypatch: pytest.MonkeyPatch, **functions: object) -> None:
    """Put functions in the place of `cluster/build.py` and `cluster/supervised_build.py`."""
    found = SimpleNamespace(**functions)
    for name in ("build", "supervised_build"):
        monkeypatch.setitem(sys.modules, f"rlhf_dist.cluster.{name}", found)
        monkeypatch.setattr(rlhf_dist.cluster, name, found, raising=False)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text("loop: {steps: 3}\n", encoding="utf-8")
    return "small.yaml"


@pytest.fixture
def begun(config: str, tmp_path: Path) -> str:
    """The config, of a run whose directory is there."""
    (tmp_path / "runs" / "run").mkdir(parents=True)
    return config


def test_help_lists_the_commands() -> None:
    result = cli("--help")
    assert result.returncode == 0 and result.stderr == ""
    assert all(command in result.stdout for command in COMMANDS)


def test_version() -> None:
    result = cli("--version")
    assert (result.returncode, result.stdout) == (0, f"rlhf-dist {__version__}\n")


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_each_command_has_help(command: str) -> None:
    result = cli(command, "--help")
    assert result.returncode == 0 and f"rlhf-dist {command}" in result.stdout


@pytest.mark.parametrize("command", sorted(PAGES))
def test_help_ends_with_where_the_keys_are_told(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    last = capsys.readouterr().out.splitlines()[-1]
    shown = "" if command == "pipeline" else f"; rlhf-dist {command} CONFIG.yaml --dry-run shows them resolved"
    assert last == f"Keys: {PAGES[command]}{shown}"
    assert all((ROOT / page).is_file() for page in PAGES[command].split(", "))
    assert len(last) <= 140


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, importlib, rlhf_dist.cli.main as m\n"
        "for module, _ in m.COMMANDS.values(): importlib.import_module(f'rlhf_dist.cli.{module}')\n"
        "print([name for name in ('torch', 'ray', 'vllm', 'omegaconf', 'numpy') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["name a command", "usage:"]),
        (["tran"], ["`tran` is no command", "did you mean `train`?"]),
        (["xyz"], ["the commands are train"]),
        (["train"], ["train needs a config file", "configs/local.yaml"]),
        (["train", "loop.steps=3"], ["train needs a config file first"]),
        (["train", "configs/locl.yaml"], ["configs/locl.yaml does not exist", "did you mean configs/local.yaml?"]),
        (["train", "configs/local.yaml", "loop.stepss=3"], ["unknown key `loop.stepss`", "`loop.steps`"]),
        (["train", "configs/local.yaml", "algo.group_size=1"], ["algo.group_size is 1", "no baseline"]),
        (["train", "configs/local.yaml", "--dryrun"], ["unrecognized arguments: --dryrun", "usage:"]),
        (["train", "configs/local.yaml", "other.yaml"], ["override `other.yaml`", "key=value"]),
        (
            ["plan", "configs/reverse.yaml", "rollout.workers=9", "--cpus", "4"],
            ["rollout.workers 9", "there are 4 CPUs"],
        ),
        (["plan", "configs/local.yaml", "--cpus", "many"], ["'many'"]),
        (["plan", "configs/reverse.yaml", "--cluster", "4x8xH1"], ["--cluster 4x8xH1: H1 is not known", "H100-80G"]),
        (["plan", "configs/reverse.yaml", "--cluster", "2xL4-24G", "--gpus", "2"], ["take --cpus and --gpus out"]),
        (
            ["plan", "configs/reverse.yaml", "learner.ranks=3", "learner.sequence_parallel=3", "--cpus", "8"],
            ["learner.sequence_parallel is 3, and the model has ", "set learner.sequence_parallel to one of 1, 2"],
        ),
        (["bench"], ["bench needs the name"]),
        (["bench", "no-such"], ["no benchmark `no-such`"]),
    ],
)
def test_bad_input_is_one_message_and_code_2(words: list[str], parts: list[str]) -> None:
    result = cli(*words)
    assert result.returncode == 2
    assert result.stderr.startswith("rlhf-dist: ") and "Traceback" not in result.stderr
    assert result.stdout == ""
    assert all(part in result.stderr for part in parts), result.stderr


@pytest.mark.parametrize("command", ["train", "sft", "eval"])
def test_dry_run_prints_the_resolved_config_and_the_plan(command: str) -> None:
    result = cli(command, "--dry-run", "configs/reverse.yaml", "seed=5")
    assert result.returncode == 0, result.stderr
    assert from_yaml(result.stdout).seed == 5
    assert "# device: " in result.stdout
    assert ("# run directory: runs/run" in result.stdout) == (command != "eval"), "an evaluation makes none"
    assert "# checked only at the start: that the model" in result.stdout and "data files" in result.stdout


def test_plan_for_another_machine() -> None:
    result = cli("plan", "configs/reverse.yaml", "--cpus", "32", "--gpus", "4", "learner.ranks=4")
    assert result.returncode == 0, result.stderr
    assert "machine: 32 CPUs, 4 GPUs\ndevice: cuda\n" in result.stdout


def test_plan_of_a_cluster_tells_memory_and_time() -> None:
    words = ["configs/reverse.yaml", "model.path=meta-llama/Llama-3.1-70B", "model.dtype=bfloat16"]
    words += ["rollout.workers=64", "rollout.tensor_parallel=4", "learner.ranks=256", "learner.zero_stage=3"]
    words += ["model.gradient_checkpointing=true"]
    result = cli("plan", *words, "cluster.colocate=false", "--cluster", "64x8xH100-80G")
    assert result.returncode == 0, result.stderr
    assert "cluster: 64 nodes, each with 8 H100-80G and 64 CPUs" in result.stdout
    assert "nodes: rollout workers 2 on each of 32 nodes; learner ranks 8 on each of 32 nodes" in result.stdout
    assert re.search(r"memory of each learner rank's GPU \(256\): [\d.]+ of 80 GB: weights 0\.551, ", result.stdout)
    assert "forecast of the phases, in turn: generate " in result.stdout


def test_plan_of_gpus_that_are_too_small_says_what_would_help() -> None:
    words = ["configs/reverse.yaml", "model.path=Qwen/Qwen2.5-7B", "cluster.colocate=false", "learner.zero_stage=1"]
    result = cli("plan", *words, "--cluster", "2xL4-24G")
    assert result.returncode == 2
    assert "a learner rank needs " in result.stderr and "set model.gradient_checkpointing to true" in result.stderr
    assert "memory of each learner rank's GPU (1): " in result.stdout, "the plan is shown all the same"


def test_options_and_overrides_in_any_order(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Config, bool]] = []
    install(monkeypatch, train=lambda config, resume, resume_from: calls.append((config, resume, resume_from)))
    assert main(["train", config, "--resume", "seed=4", "loop.steps=7"]) == 0
    assert main(["train", "--resume", config, "seed=4"]) == 0
    assert main(["train", config]) == 0
    assert main(["train", config, "--resume-from", "step-2"]) == 0
    assert main(["train", config, "--resume-from=12", "--resume"]) == 0
    assert [(c.seed, c.loop.steps, *rest) for c, *rest in calls] == [
        (4, 7, True, None),
        (4, 3, True, None),
        (0, 3, False, None),
        (0, 3, True, 2),
        (0, 3, True, 12),
    ]


def test_each_command_calls_its_own_function(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    install(
        monkeypatch,
        sft=lambda config, resume, resume_from: calls.append(f"sft {resume}"),
        evaluate=lambda _: calls.append("eval"),
    )
    assert [main(["sft", config]), main(["sft", config, "--resume"]), main(["eval", config])] == [0, 0, 0]
    assert calls == ["sft False", "sft True", "eval"]


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("bad line"), 2, "rlhf-dist: bad line\n"),
        (RewardError("it raised"), 1, "rlhf-dist: it raised\n"),
        (RlhfError("something"), 1, "rlhf-dist: something\n"),
        (DiskError("full; see --resume"), 1, "rlhf-dist: full; see --resume\n"),
        *((kind("it died"), 1, f"rlhf-dist: it died{ONWARD}\n") for kind in (ActorLost, DiskError, RayLost)),
    ],
)
def test_errors_of_a_run(
    begun: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    code: int,
    message: str,
) -> None:
    def train(config: Config, resume: bool, resume_from: int | None) -> None:
        raise error

    install(monkeypatch, train=train)
    assert main(["train", begun]) == code
    assert capsys.readouterr().err == message


def test_a_run_that_has_no_directory_yet_is_not_resumed(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(config: Config, resume: bool, resume_from: int | None) -> None:
        raise DiskError("there is no room")

    install(monkeypatch, train=train)
    assert main(["train", config]) == 1
    assert capsys.readouterr().err == f"rlhf-dist: there is no room{ANEW}\n"


def test_unexpected_errors_keep_their_traceback(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(config: Config, resume: bool, resume_from: int | None) -> None:
        raise ZeroDivisionError("a bug")

    install(monkeypatch, train=train)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        main(["train", config])


def test_loading_that_takes_long_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with arguments.loading():
        pass
    monkeypatch.setattr(arguments, "SILENT_S", 0.01)
    said, deadline = "", time.monotonic() + 30
    with arguments.loading():
        while not said and time.monotonic() < deadline:
            time.sleep(0.01)
            said += capsys.readouterr().err
    assert said == "loading torch, Ray and other libraries ...\n", "and nothing of a load that was quick"


def test_keyboard_interrupt_says_how_to_go_on(
    begun: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(config: Config, resume: bool, resume_from: int | None) -> None:
        raise KeyboardInterrupt

    install(monkeypatch, train=train)
    assert main(["train", begun, "seed=4"]) == 130
    said = capsys.readouterr().err
    assert "`rlhf-dist train small.yaml seed=4 --resume`" in said
    assert "from the newest checkpoint, or from the beginning if there is none yet" in said
    assert "saved" not in said, "nothing may have been"
    for again in (["--resume"], ["--resume-from", "step-2"], ["--resume-from=step-2", "--resume"]):
        assert main(["train", *again, begun, "seed=4"]) == 130
        assert "`rlhf-dist train small.yaml seed=4 --resume`" in capsys.readouterr().err, "not back to step 2 again"


@pytest.mark.parametrize(
    "value", ["", "step-", "../step-2", "step--1", "2.5", "\N{DEVANAGARI DIGIT TWO}", "step-" + "9" * 400]
)
def test_a_checkpoint_is_named_by_its_step(config: str, capsys: pytest.CaptureFixture[str], value: str) -> None:
    assert main(["train", config, f"--resume-from={value}"]) == 2
    assert "is not a checkpoint's name, as in step-100" in capsys.readouterr().err


def test_bench_runs_the_named_file_with_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "neighbour_of_probe.py").write_text("CODE = 7\n", encoding="utf-8")
    text = "import neighbour_of_probe as n\ndef main(argv): return n.CODE if argv == ['--out', 'x', 'a=1'] else 3\n"
    (tmp_path / "probe.py").write_text(text, encoding="utf-8")
    assert bench.run_in(tmp_path, ["probe", "--out", "x", "a=1"]) == 7


def test_bench_says_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "step.py").touch()
    (tmp_path / "_shared.py").touch()
    with pytest.raises(InputError, match=r"there is no benchmark `stp` in .*; there is step$"):
        bench.run_in(tmp_path, ["stp"])
    assert bench.run(["--help"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "  step              one synchronous step of `rlhf-dist train` beside the limit of vLLM and PyTorch" in said
    assert all(len(line) > 40 for line in said if line.startswith("  ")), "each has a sentence"
    with pytest.raises(InputError, match="there is no folder"):
        bench.run_in(tmp_path / "none", ["step"])
