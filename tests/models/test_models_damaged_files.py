"""Damaged, foreign and half-downloaded files of a model directory: one message that names the file."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from rlhf_dist.config.schema import TinyConfig
from rlhf_dist.errors import ModelError
from rlhf_dist.models.inspect import inspect
from rlhf_dist.models.model_files import LIBRARY_TEXT, reason_of
from rlhf_dist.models.tiny import make_tiny
from rlhf_dist.models.weight_files import read_headers

SMALL = TinyConfig(hidden_size=64, intermediate_size=96, layers=2, heads=2, kv_heads=1, max_positions=64)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
Spoil = Callable[[Path], Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(SMALL, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def sharded(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(whole, tmp_path_factory.mktemp("sharded") / "model"))
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    places = {name: SHARDS[number % 2] for number, name in enumerate(sorted(tensors))}
    for shard in SHARDS:
        part = {name: tensor for name, tensor in tensors.items() if places[name] == shard}
        save_file(part, folder / shard, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def write(name: str, content: bytes | str) -> Spoil:
    return lambda path: (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def edit(name: str, **changes: Any) -> Spoil:
    return lambda path: (path / name).write_text(json.dumps({**json.loads((path / name).read_text()), **changes}))


def place(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    """Change the index's weight_map."""
    return lambda path: edit(INDEX, weight_map=change(json.loads((path / INDEX).read_text())["weight_map"]))(path)


def shorten(name: str, size: int) -> Spoil:
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:size])


def dead_link(name: str) -> Spoil:
    def spoil(path: Path) -> None:
        (path / name).unlink(missing_ok=True)
        (path / name).symlink_to("../blobs/gone")

    return spoil


def directory(name: str) -> Spoil:
    def spoil(path: Path) -> None:
        (path / name).unlink()
        (path / name).mkdir()

    return spoil


def header(content: str, data: bytes = b"") -> Spoil:
    return write(WEIGHTS, struct.pack("<Q", len(content)) + content.encode() + data)


NO_FILES = {
    "brace": ("{", "is not JSON: line 1, column 2"),
    "empty": ("", "is empty"),
    "blank": (" \n", "is blank"),
    "latin 1": (b'{"a": "\xe9"}', r"is not UTF-8 text \(byte 0xe9 at position 7\)"),
    "list": ("[]", "holds a list; it must hold a JSON object"),
    "null": ("null", "holds null; it must"),
    "deep": ('{"a":' * 3000 + "1" + "}" * 3000, "nested too deeply"),
    "long number": ('{"a": ' + "9" * 5000 + "}", "has a whole number of thousands of digits; download"),
    "git lfs": ("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 1\n", "Git LFS pointer.*git lfs pull"),
    "web page": ("<!DOCTYPE html><html></html>", "is a web page"),
}
"""Content -> what is said of it, in any of the JSON files."""
JSON_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.mark.parametrize("content", NO_FILES)
@pytest.mark.parametrize("name", [*JSON_FILES, "special_tokens_map.json", INDEX])
def test_a_json_file_that_is_none(name: str, content: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    source: Path = request.getfixturevalue("sharded" if name == INDEX else "whole")
    path = Path(shutil.copytree(source, tmp_path / "model"))
    text, message = NO_FILES[content]
    write(name, text)(path)
    with pytest.raises(ModelError, match=f"^{path / name}: .*{message}") as caught:
        inspect(path, True, "cpu", 40)
    assert "\n" not in str(caught.value)


BAD_INDEX: dict[str, tuple[Spoil, str]] = {
    "no map": (write(INDEX, "{}"), f"{INDEX}: has no weight_map"),
    "list": (write(INDEX, '{"weight_map": []}'), "weight_map is a list"),
    "empty map": (write(INDEX, '{"weight_map": {}}'), "weight_map is empty"),
    "number": (place(lambda map: {**map, "a": 3}), "places a in 3; it must be the name of a .safetensors file"),
    "parent": (place(lambda map: {**map, "a": "../x.safetensors"}), r"places a in '\.\./x.safetensors'; it must be"),
    "absolute": (place(lambda map: {**map, "a": "/etc/passwd"}), "places a in '/etc/passwd'; it must be"),
    "pickle": (place(lambda map: {**map, "a": "x.bin"}), "places a in 'x.bin'; it must be"),
    "zero byte": (place(lambda map: {**map, "a": "x\0.safetensors"}), "files that are not there"),
    "long name": (place(lambda map: {**map, "a": "x" * 300 + ".safetensors"}), "files that are not there: xxx"),
    "lost shard": (lambda path: (path / SHARDS[1]).unlink(), f"files that are not there: {SHARDS[1]}"),
    "dead shard": (dead_link(SHARDS[1]), r"\(a link to \.\./blobs/gone, which is not there\)"),
    "too much": (place(lambda map: {**map, "ghost": SHARDS[0]}), f"places ghost in {SHARDS[0]}, which lacks it"),
    "too little": (
        place(lambda map: {name: shard for name, shard in map.items() if name != "model.norm.weight"}),
        "has model.norm.weight, which the index does not place there",
    ),
    "short shard": (lambda path: shorten(SHARDS[0], -8)(path), f"{SHARDS[0]}: is damaged or truncated"),
    "pointer": (write(SHARDS[1], "version https://git-lfs.github.com/spec/v1\n"), f"{SHARDS[1]}: is a Git LFS pointer"),
    "both": (lambda path: shutil.copy(path / SHARDS[0], path / WEIGHTS), "has both .* and .*Delete the one"),
    "no index": (lambda path: (path / INDEX).unlink(), f"has no weights .*; it has {SHARDS[0]}, .*no index"),
    "a directory": (directory(INDEX), f"{INDEX}: is a directory"),
    "a dead link": (dead_link(INDEX), f"{INDEX}: cannot be read .*blobs/gone"),
}


@pytest.mark.parametrize("case", BAD_INDEX)
def test_an_index_that_is_wrong(case: str, sharded: Path, tmp_path: Path) -> None:
    assert read_headers(sharded)
    path = Path(shutil.copytree(sharded, tmp_path / "model"))
    spoil, message = BAD_INDEX[case]
    spoil(path)
    with pytest.raises(ModelError, match=message) as caught:
        read_headers(path)
    assert str(path) in str(caught.value)


BAD_WEIGHTS: dict[str, tuple[Spoil, str]] = {
    "empty": (write(WEIGHTS, ""), "is empty"),
    "seven bytes": (shorten(WEIGHTS, 7), "is truncated"),
    "half a header": (shorten(WEIGHTS, 500), "is truncated, .* the whole file has 500"),
    "no data": (shorten(WEIGHTS, 4000), "is damaged or truncated: .*not fully covered"),
    "absurd length": (write(WEIGHTS, struct.pack("<Q", 2**60) + b"{}"), "header should have 1,152,921,504,606,846,976"),
    "no JSON": (header("not json", b"0000"), "invalid JSON in header"),
    "a list": (header("[]      "), "invalid JSON in header"),
    "beyond the end": (
        header('{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}', b"0000"),
        "is damaged or truncated",
    ),
    "zeros": (write(WEIGHTS, bytes(5000)), "is damaged or truncated"),
    "git lfs": (write(WEIGHTS, "version https://git-lfs.github.com/spec/v1\n"), "is a Git LFS pointer"),
    "web page": (write(WEIGHTS, "\n<html>please log in</html>"), "is a web page"),
    "pickle": (write(WEIGHTS, b"PK\x03\x04" + bytes(range(100))), "is a pickle of PyTorch"),
    "gguf": (write(WEIGHTS, b"GGUF\x03\0\0\0" + bytes(100)), "is a GGUF file"),
    "a directory": (directory(WEIGHTS), "is a directory"),
    "a dead link": (dead_link(WEIGHTS), "cannot be read .*blobs/gone"),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_weights_that_are_none(case: str, whole: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(whole, tmp_path / "model"))
    spoil, message = BAD_WEIGHTS[case]
    spoil(path)
    with pytest.raises(ModelError, match=f"^{path / WEIGHTS}: .*{message}"):
        read_headers(path)


OTHERS: dict[str, tuple[Spoil, str]] = {
    "no heads": (edit("config.json", num_attention_heads=0), r"config\.json: num_attention_heads is 0; it must be an"),
    "negative": (edit("config.json", hidden_size=-64), "hidden_size is -64; it must be"),
    "no layers": (edit("config.json", num_hidden_layers=0), "num_hidden_layers is 0; it must be"),
    "no tokens": (edit("config.json", vocab_size=0), "vocab_size is 0; it must be"),
    "no width": (edit("config.json", head_dim=0), "head_dim is 0; it must be"),
    "text": (edit("config.json", num_hidden_layers="2"), "num_hidden_layers is '2'; it must be"),
    "true": (edit("config.json", num_key_value_heads=True), "num_key_value_heads is True; it must be"),
    "absurd": (edit("config.json", num_hidden_layers=10**30), "num_hidden_layers is 1000.*; it must be"),
    "too many": (edit("config.json", num_hidden_layers=2_000_000), "num_hidden_layers is 2000000; it must be .* 10000"),
    "null": (edit("config.json", hidden_size=None), "config cannot be loaded: .*'hidden_size' expected int"),
    "not a multiple": (edit("config.json", hidden_size=65), r"65\D.*multiple of"),
    "no divisor": (edit("config.json", num_key_value_heads=3), "num_key_value_heads is 3; it must divide num_att"),
    "unknown activation": (edit("config.json", hidden_act="no"), "model cannot be loaded: unknown or missing: 'no'"),
    "no kind": (edit("config.json", model_type=None), "model_type is None; it must name"),
    "unknown kind": (edit("config.json", model_type="x1"), "model type `x1`.*You can update Transformers"),
    "own code": (edit("config.json", model_type="x1", auto_map={"AutoConfig": "evil.C"}), "such code is never run"),
    "no language model": (edit("config.json", model_type="t5"), "of kind t5, which is no causal language model"),
    "dtype": (edit("config.json", dtype="float99"), "dtype is 'float99'; it must name a dtype of torch"),
    "architectures": (edit("config.json", architectures="Qwen2ForCausalLM"), "architectures is .*; it must be a list"),
    "no architecture": (edit("config.json", architectures=None), "architectures is None.*such as Qwen2ForCausalLM"),
    "quantised": (edit("config.json", quantization_config={"quant_method": "gptq"}), r"quantised \(gptq\)"),
    "other weights": (edit("config.json", transformers_weights="../x.safetensors"), "transformers_weights is"),
    "adapter": (write("adapter_config.json", "{}"), r"adapter_config\.json: .*merge it into the model"),
    "only an adapter": (
        lambda path: (write("adapter_config.json", "{}")(path), (path / "config.json").unlink()),
        r"is an adapter \(LoRA\) without its base model",
    ),
    "float8": (
        header('{"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}', b"0000"),
        "stores a as F8_E4M3, and quantised weights cannot be trained",
    ),
    "tokenizer model": (edit("tokenizer.json", model={"type": "x"}), "tokenizer cannot be loaded: .*did not match any"),
    "end token": (edit("tokenizer_config.json", eos_token=3), "tokenizer cannot be loaded: .*eos_token"),
    "longest": (edit("tokenizer_config.json", model_max_length="x"), "model_max_length is 'x'; it must be a number"),
    "template": (write("chat_template.jinja", b"\xff"), r"chat_template\.jinja: is not UTF-8"),
    "a dead tokenizer": (dead_link("tokenizer.json"), r"tokenizer\.json: cannot be read .*blobs/gone"),
    "end of generation": (edit("generation_config.json", eos_token_id="x"), "eos_token_id is 'x'; it must be"),
    "watermark": (edit("generation_config.json", watermarking_config=3), r"generation_config\.json: cannot be read: "),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_files_that_are_wrong(case: str, whole: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(whole, tmp_path / "model"))
    spoil, message = OTHERS[case]
    spoil(path)
    with pytest.raises(ModelError, match=message) as caught:
        inspect(path, True, "cpu", 40)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_an_attention_that_is_not_installed_here_does_not_matter(whole: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(whole, tmp_path / "model"))
    edit("config.json", attn_implementation="flash_attention_2")(path)
    inspect(path, True, "cpu", 40)


def test_a_librarys_reason_is_told_whole() -> None:
    assert reason_of(ValueError("first line\n\n  what matters: the second")) == "first line what matters: the second"
    assert reason_of(ValueError("")) == "ValueError"
    long = reason_of(ValueError("x" * 5000))
    assert long == "x" * LIBRARY_TEXT + " ... (shortened)"
