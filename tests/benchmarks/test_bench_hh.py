"""`rlhf-dist bench hh_reward`: the split, the tokenizer, figures, wrong input, a tiny run of the whole."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import _hh  # noqa: E402
import hh_reward as bench  # noqa: E402

from rlhf_dist.config.schema import DataConfig, PreferencesConfig, TinyConfig  # noqa: E402
from rlhf_dist.data.files import read_rows  # noqa: E402
from rlhf_dist.data.judgement_rows import Comparison, Pair  # noqa: E402
from rlhf_dist.errors import DataError, InputError  # noqa: E402
from rlhf_dist.types import Message  # noqa: E402

TINY_WORDS = [
    *("model.tiny.hidden_size=64", "model.tiny.intermediate_size=64", "model.tiny.layers=1"),
    *("model.tiny.heads=2", "model.tiny.kv_heads=1", "preferences.held_out=6"),
    *("sft.steps=4", "sft.batch_size=8", "sft.eval_every=0", "learner.cpus=1"),
    *("reward.steps=4", "reward.batch_size=8", "reward.eval_every=2", "cluster.address=local"),
]
PREFERENCES = PreferencesConfig(source="jsonl", form="transcripts", held_out=2)


def hh_file(path: Path, pairs: int, bad: tuple[int, ...] = ()) -> Path:
    """Pairs in the form of HH-RLHF, of harmless text: the better side thanks; those at `bad` have an empty side."""
    chance = random.Random(0)
    things = ("garden", "bicycle", "library", "kitchen", "mountain", "river")
    lines = []
    for number in range(pairs):
        thing, other = chance.sample(things, 2)
        asked = f"\n\nHuman: Tell me about the {thing} number {number}.\n\nAssistant: Which one?\n\nHuman: The {other}."
        better = "" if number in bad else f" Thank you for asking, the {other} is fine."
        lines.append({"chosen": f"{asked}\n\nAssistant:{better}", "rejected": f"{asked}\n\nAssistant: The {other}."})
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return path


def test_the_split_is_by_rows_and_counts_what_it_leaves_out(tmp_path: Path) -> None:
    rows = read_rows("jsonl", str(hh_file(tmp_path / "hh.jsonl.gz", 12, bad=(1, 10))), "--data")
    found = _hh.split(rows, 8, PREFERENCES)
    assert (found.train, found.test) == ((rows[0], *rows[2:8]), (*rows[8:10], rows[11]))
    assert [place.rsplit(":", 1)[1] for place in found.unusable] == ["2", "11"]
    with pytest.raises(DataError, match="12 pairs; with --train 12 none is left"):
        _hh.split(rows, 12, PREFERENCES)
    with pytest.raises(DataError, match=r"2 pairs to train on.*preferences\.held_out=2"):
        _hh.split(rows, 3, PREFERENCES)


def test_the_language_model_reads_the_tokens_of_the_reward_model(tmp_path: Path) -> None:
    from rlhf_dist.learner.preference_learner import tokenize_judgement
    from rlhf_dist.models.hf import load_tokenizer

    rows = read_rows("jsonl", str(hh_file(tmp_path / "hh.jsonl.gz", 20)), "--data")
    folder = tmp_path / "work"
    folder.mkdir()
    config = bench.config_of(folder, TINY_WORDS, seed=1)
    _hh.write_split(_hh.split(rows, 15, config.preferences), folder)
    made = _hh.make(config, folder)
    assert made["pairs"] == {"train": 15, "test": 5} and made["too_long"] == {"train": 0, "test": 0}
    tokenizer = load_tokenizer(folder / _hh.MODEL_FOLDER)
    assert type(tokenizer).__name__ == "Qwen2Tokenizer" and len(tokenizer) == made["vocabulary"]
    texts = [json.loads(line)["text"] for line in (folder / _hh.TEXT_FILE).read_text().splitlines()]
    for text, comparison in zip(texts, _hh.read_side(config, folder / _hh.TRAIN_FILE), strict=True):
        row = tokenize_judgement(tokenizer, comparison, chat=True).rows[0]
        assert [*tokenizer.encode(text), tokenizer.eos_token_id] == row.tokens.tolist()
        assert tokenizer.decode(row.tokens, skip_special_tokens=False) == text + "<|end|>"
        assert len(row.tokens) < len(text) / 2  # merges were learnt, and are used by the loaded tokenizer


def test_merges_come_from_the_pairs_that_are_learnt_from(tmp_path: Path) -> None:
    tokenizer = _hh.train_tokenizer(["marmalade marmalade"] * 3)
    assert len(tokenizer.encode(" marmalade")) == 1
    assert tokenizer.decode(tokenizer.encode("Über 7 Äpfel — ☃\n")) == "Über 7 Äpfel — ☃\n"
    sizes = TinyConfig(hidden_size=64, intermediate_size=64, layers=1, heads=2, kv_heads=1)
    parameters = _hh.write_model(sizes, tokenizer, tmp_path)
    assert parameters == 64 * len(tokenizer) + 2 * 64 * 64 + 64 + 2 * (64 * 32 + 32) + 3 * 64 * 64 + 3 * 64


def test_the_longer_response() -> None:
    def pair(better: str, worse: str) -> Comparison:
        return Comparison("a:1", (Message("user", "?"),), (worse, better), (Pair(1, 0, 0.0),))

    assert _hh.longer_is_better([pair("long", "s"), pair("s", "long"), pair("same", "size")]) == 1.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["configs/local.yaml"], "`configs/local.yaml` is not of the form key=value"),
        (["preferences.form=pair"], "the benchmark sets preferences.form itself"),
        (["reward.stepz=3"], "reward.stepz"),
        (["--train", "0"], "'0' is not a whole number of 1 or more"),
        (["--train", "9"], "9 pairs; with --train 9 none is left"),
        (["--folder", "."], "--folder . exists; give a new one"),
    ],
)
def test_wrong_words(words: list[str], message: str, tmp_path: Path) -> None:
    data = hh_file(tmp_path / "hh.jsonl.gz", 9)
    with pytest.raises(InputError, match=message):
        bench.main(["--data", str(data), *words])


def test_a_folder_of_a_refused_run_is_gone(tmp_path: Path) -> None:
    data = hh_file(tmp_path / "hh.jsonl.gz", 9)
    with pytest.raises(InputError, match=r"9 pairs; with --train"):
        bench.main(["--data", str(data), "--folder", str(tmp_path / "work")])
    assert not (tmp_path / "work").exists()


def test_no_data() -> None:
    with pytest.raises(InputError, match="--data"):
        bench.main([])
    with pytest.raises(InputError, match=r"nowhere\.jsonl"):
        bench.main(["--data", "nowhere.jsonl"])


def test_every_key_of_its_config_is_one() -> None:
    assert DataConfig(**bench.CONFIG["data"]).response_key == "text"


@pytest.mark.engines
@pytest.mark.faults  # for its time
def test_a_tiny_run_of_the_whole(tmp_path: Path) -> None:
    """Plain text is learnt first, by a model whose tokenizer has no start token."""
    data = hh_file(tmp_path / "hh.jsonl.gz", 40, bad=(3,))
    out, picture, folder = tmp_path / "hh.json", tmp_path / "hh.png", tmp_path / "work"
    command = [sys.executable, "-m", "rlhf_dist", "bench", "hh_reward", "--data", str(data), "--train", "30"]
    places = ["--out", str(out), "--out-picture", str(picture), "--folder", str(folder)]
    result = subprocess.run(
        [*command, *places, *TINY_WORDS], capture_output=True, text=True, timeout=280, cwd=ROOT, check=False
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(out.read_text())
    assert found["pairs"] == {"train": 29, "test": 10} and found["test"]["pairs"] == 10
    assert [place.rsplit(":", 1)[1] for place in found["unusable"]] == ["4"]
    accuracy = found["test"]["results"]["reward_model/accuracy"]
    assert 0.0 <= accuracy <= 1.0 and accuracy * 20 == pytest.approx(round(accuracy * 20))  # ties count 1/2
    assert found["test"]["longer_is_better"] == 1.0
    assert f"test accuracy: {accuracy:.3f} (95%: " in result.stdout
    assert found["language_model"]["after"] < found["language_model"]["before"]
    assert set(found["seconds"]) == set(bench.STAGES) and min(found["seconds"].values()) > 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    kept = json.loads(
        (
            folder / "reward" / "checkpoints" / f"step-{found['early_stop']['kept_step']}" / "hf" / "config.json"
        ).read_text()
    )
    assert kept["vocab_size"] == found["vocabulary"]
    assert "garden" not in out.read_text() + result.stdout + result.stderr  # figures only
