"""The hosts of policy and critic, as the actors run them: a step, a checkpoint, and the step after it once more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from forks import ForkServer
from safetensors.torch import load_file

pytestmark = [pytest.mark.engines, pytest.mark.timeout(400)]
KINDS = ("turns", "shared", "beside")


@pytest.fixture(scope="module")
def results(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, forks: ForkServer) -> dict[str, Any]:
    """Kind -> what `host_rank.py` found; `folder` is where it wrote."""
    folder = tmp_path_factory.mktemp("hosts")
    for kind in KINDS:
        (folder / kind).mkdir()
    forks.run(Path(__file__).with_name("host_rank.py"), folder, {k: (tiny_model, folder / k, k) for k in KINDS})
    found = {kind: torch.load(folder / kind / f"{kind}.pt", weights_only=False) for kind in KINDS}
    return found | {"folder": folder}


def read(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by file and name."""
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{file.relative_to(folder)}:{name}": t for file in files for name, t in load_file(file).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_has_everything_and_makes_the_same_step_after_it(results: dict[str, Any], kind: str) -> None:
    """Policy, critic, both optimizers and the moving average, bit for bit; the pre-training mix goes on."""
    folder = results["folder"] / kind
    second, restored, third, again = (read(folder / f"{kind}-{name}") for name in ("2", "restored", "3", "again"))
    assert second.keys() == restored.keys() == third.keys() == again.keys()
    for name, tensor in second.items():
        assert torch.equal(restored[name], tensor), name
        assert torch.equal(again[name], third[name]), name
    moved = sum(float((third[name] - tensor).abs().max()) > 1e-3 for name, tensor in second.items())
    assert moved > len(second) / 2
    metrics = results[kind]
    assert metrics["again"] == metrics["third"]
    assert metrics["second"] != pytest.approx(metrics["third"], rel=1e-2)
    assert {"critic/loss", "policy/loss", "ptx/loss", "learner/updates"} <= metrics["third"].keys()


@pytest.mark.parametrize("kind", KINDS)
def test_publishing_weights_leaves_their_average_alone(results: dict[str, Any], kind: str) -> None:
    """A resume publishes the weights of the checkpoint once more, which is no training step."""
    kept, restored = (
        load_file(results["folder"] / kind / f"{kind}-{name}" / "hf_ema" / "model.safetensors")
        for name in ("2", "restored")
    )
    policy = load_file(results["folder"] / kind / f"{kind}-2" / "hf" / "model.safetensors")
    assert all(torch.equal(restored[name], tensor) for name, tensor in kept.items())
    assert not any(torch.equal(policy[name], tensor) for name, tensor in kept.items()), "another step would be seen"


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_holds_policy_average_and_critic(results: dict[str, Any], kind: str) -> None:
    folder = results["folder"] / kind / f"{kind}-2"
    found = {str(path.relative_to(folder)) for path in folder.rglob("*.safetensors")}
    policy = {"hf/model.safetensors", "hf_ema/model.safetensors", "optimizer-0.safetensors"}
    apart = {"critic/hf/model.safetensors", "critic/optimizer-0.safetensors"}
    assert found == policy | ({"value_head.safetensors"} if kind == "shared" else apart)


def test_side_by_side_is_the_same_as_in_turn(results: dict[str, Any]) -> None:
    assert results["beside"]["third"] == pytest.approx(results["turns"]["third"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_is_no_number_is_found_in_the_next_step(results: dict[str, Any], kind: str) -> None:
    """No optimizer step of the policy is taken."""
    metrics, fault = results[kind]["spoilt"]
    assert metrics["policy_fault_max"] == 1.0 and metrics["learner/updates"] == 0
    # On one trunk the values are spoilt before, and with them the credit.
    assert (fault.what, fault.update) == ("advantage" if kind == "shared" else "learner's logprobs", 0)
    assert fault.origin is not None and fault.value != fault.value
