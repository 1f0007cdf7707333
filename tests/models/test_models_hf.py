"""Finding, checking, loading and saving Hugging Face directories; each bad one gives its own message."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, StableLmConfig

from rlhf_dist.config.schema import ModelConfig, TinyConfig
from rlhf_dist.errors import DiskError, ModelError
from rlhf_dist.models.capabilities import check_heads, check_shared_rows
from rlhf_dist.models.hf import ModelSource, load_model, load_tokenizer, own_memory, resolve, save_hf
from rlhf_dist.models.inspect import inspect
from rlhf_dist.models.tiny import make_tiny

SMALL = TinyConfig(hidden_size=64, intermediate_size=96, layers=2, heads=2, kv_heads=1, max_positions=64)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(SMALL, tmp_path_factory.mktemp("cache"))


@pytest.fixture
def copy(small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("padding", [8, 16, 40])
def test_weights_lie_in_memory_as_torch_puts_them_whatever_file_they_come_from(copy: Path, padding: int) -> None:
    """Other words in the header move all tensors of the file, which is mapped into memory."""
    file = copy / "model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", "note": "x" * padding})
    model = load_model(copy, "float32", "segmented")
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    own_memory(model)
    after = dict(model.named_parameters())
    assert {tensor.data_ptr() % 64 for tensor in after.values()} == {0}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight, "still tied"


def test_resolve_tiny_and_a_directory(small: Path) -> None:
    assert resolve(ModelConfig(tiny=SMALL), small.parent) == ModelSource(str(small), "tiny")
    assert resolve(ModelConfig(path=str(small)), small.parent) == ModelSource(str(small), "directory")


def test_resolve_takes_the_newest_checkpoint_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "run/checkpoints/step-350/hf").mkdir(parents=True)
    (tmp_path / "run/checkpoints/step-400").mkdir()
    latest = tmp_path / "run/checkpoints/LATEST"
    latest.write_text("step-350\n")
    run = ModelConfig(path=str(tmp_path / "run"))
    assert resolve(run, tmp_path) == ModelSource(str(tmp_path / "run/checkpoints/step-350/hf"), "run")
    latest.write_text("step-400")
    with pytest.raises(ModelError, match=r"step-400/hf is not there; give another run"):
        resolve(run, tmp_path)
    latest.unlink()
    with pytest.raises(ModelError, match=r"LATEST: is missing, and .* holds step-350, step-400: .*or write one"):
        resolve(run, tmp_path)
    shutil.rmtree(latest.parent)
    latest.parent.mkdir()
    with pytest.raises(ModelError, match="no finished checkpoint"):
        resolve(run, tmp_path)


def test_resolve_names_what_is_close_to_a_missing_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs/reverse-sft").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for path in ("runs/revers-sft", "./runs/revers-sft", str(tmp_path / "runs/revers-sft")):
        with pytest.raises(ModelError, match=r"revers-sft'.*did you mean .*runs/reverse-sft\?"):
            resolve(ModelConfig(path=path), tmp_path)
    with pytest.raises(ModelError, match=r"no such directory .*nowhere/a does not exist either"):
        resolve(ModelConfig(path="nowhere/a/b"), tmp_path)
    (tmp_path / "a-file").write_text("")
    with pytest.raises(ModelError, match="is a file"):
        resolve(ModelConfig(path="a-file"), tmp_path)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("model.path", "Give `tiny`, a Hugging Face directory, a run directory, or a hub name"),
        ("scoring.rewards.judge.path", "Give a reward model: its Hugging Face directory, its run directory or its hub"),
        ("critic.start", "Give policy, shared, or a reward model: its Hugging Face directory"),
    ],
)
def test_a_missing_path_is_told_what_its_key_takes(tmp_path: Path, key: str, words: str) -> None:
    with pytest.raises(ModelError, match=words) as raised:
        resolve(ModelConfig(path="./nowhere"), tmp_path, key)
    assert ("tiny" in str(raised.value)) == (key == "model.path")


def test_the_home_of_a_user_that_is_not_known_is_a_missing_path(tmp_path: Path) -> None:
    for path in ("~nobody-of-this-name/model", "~nobody-of-this-name"):
        with pytest.raises(ModelError, match=f"model.path = '{path}': there is no such directory"):
            resolve(ModelConfig(path=path), tmp_path)


def test_a_latest_that_names_nothing_is_told_with_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "LATEST").write_text("step-999\n")
    run = ModelConfig(path=str(tmp_path))
    with pytest.raises(ModelError, match=r"names 'step-999', which is not there; the folder holds nothing"):
        resolve(run, tmp_path)
    for step in (24, 12, 100):
        (tmp_path / "checkpoints" / f"step-{step}" / "hf").mkdir(parents=True)
    with pytest.raises(
        ModelError,
        match=r"holds step-12, step-24, step-100: .*or write one of those into LATEST$",
    ):
        resolve(run, tmp_path)


def test_a_hub_name_is_passed_on_and_a_failing_look_up_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = resolve(ModelConfig(path="nobody/no-such-model"), tmp_path)
    assert source == ModelSource("nobody/no-such-model", "hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for call in (lambda: inspect(source.path, True, "cpu", 8), lambda: load_model(source.path, "float32", "segmented")):
        with pytest.raises(ModelError, match=r"model\.path = nobody/no-such-model: .*hub.*Check the name, or download"):
            call()


def test_inspect_accepts_the_tiny_model(small: Path) -> None:
    inspect(small, True, "cpu", 64)


def drop(*names: str) -> Callable[[Path], None]:
    return lambda path: [(path / name).unlink() for name in names] and None


def only_pickle(path: Path) -> None:
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


def lost_shard(path: Path) -> None:
    (path / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def many_tokens(path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens([f"token{i}" for i in range(400)])
    tokenizer.save_pretrained(path)


BAD = {
    "no config": (drop("config.json"), "has no config.json"),
    "broken config": (
        lambda path: (path / "config.json").write_text("{"),
        r"config\.json: is not JSON: line 1, column 2",
    ),
    "unknown type": (lambda path: edit(path / "config.json", model_type="x1"), "its config cannot be loaded"),
    "no weights": (drop("model.safetensors"), "has no weights"),
    "pickled weights": (only_pickle, r"\.bin files only"),
    "lost shard": (lost_shard, "files that are not there: model-00001-of-00002.safetensors"),
    "no tokenizer": (drop("tokenizer.json"), "has no tokenizer"),
    "broken tokenizer": (
        lambda path: (path / "tokenizer.json").write_text("{"),
        r"tokenizer\.json: is not JSON: line 1, column 2",
    ),
    "no chat template": (drop("chat_template.jinja"), "no chat template; set data.chat=false"),
    "no end token": (lambda path: edit(path / "tokenizer_config.json", eos_token=None), "no end token"),
    "few embeddings": (many_tokens, "502 tokens, its model embeds only "),
    "head_dim": (lambda path: edit(path / "config.json", num_attention_heads=4), "its head_dim is 16.*32, 64, 80"),
    "few positions": (
        lambda path: edit(path / "config.json", max_position_embeddings=39),
        "max_response_tokens is 40 tokens, and the model has 39 positions",
    ),
    "state space": (
        lambda path: edit(path / "config.json", layer_types=["full_attention", "linear_attention"]),
        "layers of type linear_attention",
    ),
    "sliding window": (
        lambda path: edit(
            path / "config.json",
            use_sliding_window=True,
            sliding_window=8,
            layer_types=["sliding_attention"] * 2,
        ),
        r"sliding window of 8 tokens, and rollout.* is 40",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_inspect_refuses_a_bad_directory(name: str, copy: Path) -> None:
    spoil, message = BAD[name]
    spoil(copy)
    with pytest.raises(ModelError, match=message) as caught:
        inspect(copy, True, "cpu", 40)
    assert str(copy) in str(caught.value)


@pytest.mark.parametrize(
    ("heads", "shared", "parts", "right"),
    [(14, 2, 4, "1, 2, 14"), (8, 4, 16, "1, 2, 4, 8"), (6, 2, 3, "1, 2, 6"), (3, None, 2, "1, 3")],
)
def test_heads_that_cannot_be_shared_out_are_refused(heads: int, shared: int | None, parts: int, right: str) -> None:
    config = Qwen2Config(num_attention_heads=heads, num_key_value_heads=shared)
    with pytest.raises(ModelError) as caught:
        check_heads("m", config, parts, "rollout.tensor_parallel")
    assert str(caught.value).startswith(f"m: rollout.tensor_parallel is {parts}, and the model has {heads} attention")
    assert str(caught.value).endswith(f"set rollout.tensor_parallel to one of {right}")
    for good in map(int, right.split(", ")):
        check_heads("m", config, good, "rollout.tensor_parallel")


def test_kinds_whose_attention_knows_positions_only_cannot_share_rows() -> None:
    config = StableLmConfig(num_attention_heads=4, num_key_value_heads=4)
    check_shared_rows("m", config, 1)
    with pytest.raises(ModelError, match=r"m: learner\.sequence_parallel is 2, .* of a stablelm model"):
        check_shared_rows("m", config, 2)
    check_shared_rows("m", Qwen2Config(num_attention_heads=4, num_key_value_heads=4), 2)


def test_inspect_lets_pass_what_does_not_matter(copy: Path) -> None:
    (copy / "chat_template.jinja").unlink()
    inspect(copy, False, "cpu", 40)
    edit(copy / "config.json", use_sliding_window=True, sliding_window=8, layer_types=["sliding_attention"] * 2)
    inspect(copy, False, "cuda", 40, "varlen")


def test_load_model_refuses_pickles_and_missing_weights(copy: Path, tmp_path: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights .* missing, the first is model\.norm\.weight"):
        load_model(copy, "float32", "segmented")
    only_pickle(copy)
    with pytest.raises(ModelError, match=r"\.bin files only"):
        load_model(copy, "float32", "segmented")


def test_a_truncated_weight_file_is_a_model_error(copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"model\.safetensors: is truncated"):
        load_model(copy, "float32", "segmented")


def test_saved_model_loads_with_the_saved_weights_and_files(small: Path, tmp_path: Path) -> None:
    model = load_model(small, "float32", "segmented")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    target = tmp_path / "step-1" / "hf"
    assert save_hf(model, small, target) == target
    loaded = AutoModelForCausalLM.from_pretrained(target)
    assert loaded.config._attn_implementation == "sdpa"
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert loaded.generation_config.eos_token_id == 2
    assert AutoTokenizer.from_pretrained(target).get_vocab() == load_tokenizer(small).get_vocab()
    inspect(target, True, "cpu", 40)
    assert [entry.name for entry in target.parent.iterdir()] == ["hf"]


def test_saving_pairs_again_replaces_the_directory_and_keeps_their_dtype(small: Path, tmp_path: Path) -> None:
    state = {name: tensor.bfloat16() for name, tensor in load_file(small / "model.safetensors").items()}
    target = tmp_path / "hf"
    save_hf(iter(state.items()), small, target)
    (target / "old").write_text("")
    state["model.norm.weight"] = state["model.norm.weight"] + 1
    save_hf(iter(state.items()), small, target)
    assert not (target / "old").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["hf"]
    loaded = AutoModelForCausalLM.from_pretrained(target)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.model.norm.weight, state["model.norm.weight"])


def test_what_a_gathered_parameter_holds_is_let_go_before_the_next_is_asked_for(small: Path, tmp_path: Path) -> None:
    """Under ZeRO-3 on a GPU each of them is a whole parameter that only its turn gathers."""
    alive: weakref.WeakSet[Gathered] = weakref.WeakSet()
    most = 0

    class Gathered:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor
            alive.add(self)

        def detach(self) -> Gathered:
            return self

        def cpu(self) -> torch.Tensor:
            return self.tensor

    def gathered() -> Iterator[tuple[str, Any]]:
        nonlocal most
        for name, tensor in load_file(small / "model.safetensors").items():
            yield name, Gathered(tensor)
            most = max(most, len(alive))

    save_hf(gathered(), small, tmp_path / "hf")
    assert most == 1


@pytest.mark.parametrize("named_twice", [False, True])
def test_tied_embeddings_are_saved_once_and_load_tied(small: Path, tmp_path: Path, named_twice: bool) -> None:
    source = Path(shutil.copytree(small, tmp_path / "source"))
    edit(source / "config.json", tie_word_embeddings=True)
    model = Qwen2ForCausalLM(Qwen2Config.from_pretrained(source))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if not named_twice:
        del state["lm_head.weight"]
    save_hf(iter(state.items()), source, tmp_path / "hf")
    assert "lm_head.weight" not in load_file(tmp_path / "hf/model.safetensors")
    loaded = load_model(tmp_path / "hf", "float32", "segmented")
    assert torch.equal(loaded.lm_head.weight, model.model.embed_tokens.weight)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_weights_that_do_not_fit_are_never_written(small: Path, tmp_path: Path) -> None:
    state = load_file(small / "model.safetensors")
    del state["model.norm.weight"]
    with pytest.raises(AssertionError, match=r"model\.norm\.weight"):
        save_hf(iter(state.items()), small, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_full_disk_is_a_disk_error_and_leaves_the_old_directory(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(small, "float32", "segmented")
    target = save_hf(model, small, tmp_path / "hf")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DiskError, match=r"hf: cannot be written: .*No space left on device"):
        save_hf(model, small, target)
    assert [entry.name for entry in tmp_path.iterdir()] == ["hf"]
    AutoModelForCausalLM.from_pretrained(target)
