"""The sixty inputs that went wrong worst, one entry each: what is given, to which command, and what is told."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Change = Callable[[Path], object]
GOOD = [json.dumps({"prompt": f"{n} + 1", "answer": str(n + 1), "response": str(n + 1)}) for n in range(12)]
PAIR = {"prompt": "Name a colour.", "chosen": "Red.", "rejected": "Seven."}


@dataclass(frozen=True)
class Bad:
    """A malformed input."""

    told: tuple[str, ...]
    """Parts of the one message: place or key, value, way out."""
    command: str = "train"
    words: tuple[str, ...] = ()
    """Overrides and options."""
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    """Written into the working directory."""
    model: Change | None = None
    """What is done to a copy of the model, which is then in the folder `model`."""
    run: Change | None = None
    """What is done to a run directory, which is then in `runs/run`."""
    environment: Mapping[str, str] = field(default_factory=dict)
    config: str = "base.yaml"


def data(line: str | bytes, *told: str, command: str = "train", words: tuple[str, ...] = ()) -> Bad:
    """A data file whose third line is `line`."""
    good = [text.encode() for text in GOOD]
    lines = [*good[:2], line.encode() if isinstance(line, str) else line, *good[2:]]
    given = ("data.source=jsonl", "data.path=data.jsonl", *words)
    return Bad(told, command, given, files={"data.jsonl": b"\n".join(lines)})


def pairs(form: str, row: Mapping[str, Any], *told: str, words: tuple[str, ...] = ()) -> Bad:
    """A file of preferences whose rows are all this one."""
    given = ("preferences.source=jsonl", "preferences.path=p.jsonl", f"preferences.form={form}", *words)
    return Bad(told, "reward", given, files={"p.jsonl": "\n".join([json.dumps(row)] * 6)})


def edit_json(name: str, **changes: Any) -> Change:
    """Set keys of a JSON file of the model; None removes one."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return change


def put(name: str, content: str | bytes) -> Change:
    """Replace a file."""
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def no_latest(run: Path) -> None:
    """Nothing says which of two checkpoints is the newest."""
    (run / "checkpoints" / "LATEST").unlink()
    (run / "checkpoints" / "step-1").mkdir()


def link(name: str) -> Change:
    """Put a link to a file outside in the place of a run's file."""

    def change(run: Path) -> None:
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(run.parent.parent / "base.yaml")

    return change


def template(text: str) -> Change:
    """Give the tokenizer another chat template."""
    return put("chat_template.jinja", text)


def header(size: int, text: bytes) -> bytes:
    """A safetensors file of a header alone."""
    return struct.pack("<Q", size) + text


CONFIGS = {
    "a config nested 3,000 deep": Bad(
        ("bad.yaml", "nested more than 50"), files={"bad.yaml": "a: " + "[" * 3000}, config="bad.yaml"
    ),
    "a config with a key twice": Bad(
        ("bad.yaml:2", "`loop` comes twice"),
        files={"bad.yaml": "loop: {steps: 1}\nloop: {steps: 2}\n"},
        config="bad.yaml",
    ),
    "a config that would run Python": Bad(
        ("bad.yaml", "a config has no tags"),
        files={"bad.yaml": "name: !!python/object/apply:os.system ['touch hacked']"},
        config="bad.yaml",
    ),
    "a dollar and a brace in a text": Bad(
        ("`data.system`", "${"), files={"bad.yaml": "data: {system: 'costs ${'}"}, config="bad.yaml"
    ),
    "a config that includes itself": Bad(
        ("bad.yaml: `include` goes round in a circle",), files={"bad.yaml": "include: [bad.yaml]"}, config="bad.yaml"
    ),
    "a path of 5,000 characters": Bad(("too long",), words=("model.path=" + "x" * 5000,)),
    "a misspelt key": Bad(("algo.groupsize", "did you mean", "group_size"), words=("algo.groupsize=4",)),
    "a number that is not one": Bad(("learner.optimizer.lr", "nan"), words=("learner.optimizer.lr=nan",)),
    "an empty stop text": Bad(("rollout.stop",), words=("rollout.stop=['']",)),
    "a name that leaves the output": Bad(("name", "../../x"), words=("name=../../x",)),
    "an output that is a file": Bad(("output", "file"), words=("output=taken",), files={"taken": ""}),
    "no rewards": Bad(("scoring.rewards",), words=("scoring.rewards={}",)),
}
DATA = {
    "an answer that is NaN": data('{"prompt": "a", "answer": NaN}', "data.jsonl:3", "'answer' is nan"),
    "an answer beyond any number": data('{"prompt": "a", "answer": 1e999}', "data.jsonl:3"),
    "a line cut short": data('{"prompt": "a", "ans', "data.jsonl:3"),
    "a line that is not UTF-8": data(b'{"prompt": "\xff", "answer": "1"}', "data.jsonl:3", "UTF-8"),
    "a line nested 100,000 deep": data('{"prompt": ' + "[" * 100_000, "data.jsonl:3"),
    "half a surrogate pair": data(r'{"prompt": "a\ud800", "answer": "1"}', "data.jsonl:3", "surrogate"),
    "a prompt of spaces": data('{"prompt": "  ", "answer": "1"}', "data.jsonl:3", "prompt"),
    "a prompt that ends with the assistant": data(
        '{"messages": [{"role": "assistant", "content": "x"}], "answer": "1"}', "data.jsonl:3", "user turn"
    ),
    "an extra key of a message": data(
        '{"messages": [{"role": "user", "content": "x", "weight": 0}], "answer": "1"}',
        "data.jsonl:3",
        "weight",
    ),
    "an answer no number reward can read": data(
        '{"prompt": "a", "answer": "none"}', "data.jsonl:3", "none", words=("scoring.rewards={n: {kind: number}}",)
    ),
    "a demonstration that is empty": data(
        '{"prompt": "a", "response": " "}', "data.jsonl:3", "response", command="sft"
    ),
    "a parquet file that is none": Bad(
        ("data.parquet",),
        words=("data.source=parquet", "data.path=data.parquet"),
        files={"data.parquet": "PAR1 nothing PAR1"},
    ),
}
PREFERENCES = {
    "a pair of equals": pairs(
        "pair", PAIR | {"rejected": "Red."}, "p.jsonl:1", "are equal", "preferences.unusable=drop"
    ),
    "a margin beyond float32": pairs(
        "pair", PAIR | {"margin": 1e300}, "p.jsonl:1", "margin", words=("preferences.margin_key=margin",)
    ),
    "transcripts of different prompts": pairs(
        "transcripts",
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: b"},
        "p.jsonl:1",
        "share no prompt",
    ),
    "a rating off the scale": pairs(
        "rating", {"prompt": "a", "response": "b", "rating": 7}, "p.jsonl:1", "'rating' is 7", "preferences.rating_max"
    ),
}
MODELS = {
    "an index that is no JSON": Bad(("model.safetensors.index.json",), model=put("model.safetensors.index.json", "{")),
    "weights that are cut short": Bad(
        ("model/model.safetensors", "truncated"),
        model=lambda f: put("model.safetensors", (f / "model.safetensors").read_bytes()[:-100])(f),
    ),
    "weights whose header says more than there is": Bad(
        ("model/model.safetensors",), model=put("model.safetensors", header(10**15, b"{}"))
    ),
    "a pointer in the place of weights": Bad(
        ("model/model.safetensors", "git"),
        model=put("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
    ),
    "a config with fewer layers than the weights": Bad(
        ("model", "layers.1"), model=edit_json("config.json", num_hidden_layers=1, layer_types=["full_attention"])
    ),
    "no attention heads": Bad(
        ("model/config.json", "num_attention_heads"), model=edit_json("config.json", num_attention_heads=0)
    ),
    "a tokenizer that is no JSON": Bad(("model", "tokenizer"), model=put("tokenizer.json", "{")),
    "a template that divides by zero": Bad(("model", "template"), model=template("{{ 1 / 0 }}")),
    "a template that is no template": Bad(("model", "template"), model=template("{% for m in %}")),
    "a template that leaves the prompt out": Bad(("model", "template"), model=template("hello")),
}
RESUME = ("--resume",)
RUNS = {
    "LATEST names what is not there": Bad(
        ("checkpoints/LATEST", "step-9"), words=RESUME, run=put("checkpoints/LATEST", "step-9")
    ),
    "LATEST is not text": Bad(("checkpoints/LATEST",), words=RESUME, run=put("checkpoints/LATEST", b"\xff\xfe\x00")),
    "LATEST names another place": Bad(("checkpoints/LATEST",), words=RESUME, run=put("checkpoints/LATEST", "../../..")),
    "LATEST is gone": Bad(("checkpoints/LATEST", "is missing", "step-1, step-2"), words=RESUME, run=no_latest),
    "a bit of the weights is flipped": Bad(
        ("step-2/hf/model.safetensors",), words=RESUME, run=put("checkpoints/step-2/hf/model.safetensors", b"weightt")
    ),
    "an optimizer of another step": Bad(
        ("step-2/optimizer-0.safetensors",),
        words=RESUME,
        run=put("checkpoints/step-2/optimizer-0.safetensors", b"step 4."),
    ),
    "state.json is cut short": Bad(
        ("step-2/state.json",), words=RESUME, run=put("checkpoints/step-2/state.json", '{"step": 2')
    ),
    "state.json is of a later version": Bad(
        ("step-2/state.json",), words=RESUME, run=put("checkpoints/step-2/state.json", '{"step": 2, "format": 99}')
    ),
    "a run of another configuration": Bad(("seed",), words=("--resume", "seed=7"), run=lambda _: None),
    "run.lock is a link": Bad(("run.lock",), words=RESUME, run=link("run.lock")),
    "config.yaml is damaged": Bad(("runs/run/config.yaml",), words=RESUME, run=put("config.yaml", b"\xff: [")),
    "the ledger is no database": Bad(("ledger.sqlite",), words=RESUME, run=put("ledger.sqlite", "SQLite? no")),
}
REWARDS = {
    "a pattern that is none": Bad(
        ("scoring.rewards.r.pattern",), words=("scoring.rewards={r: {kind: regex, pattern: '(a'}}",)
    ),
    "a reward that fails at import": Bad(
        ("mine.py", "3"),
        words=("scoring.rewards={f: {kind: function, function: 'mine:f'}}",),
        files={"mine.py": "\n\n1 / 0\n"},
    ),
    "a function that takes other arguments": Bad(
        ("mine:f",),
        words=("scoring.rewards={f: {kind: function, function: 'mine:f'}}",),
        files={"mine.py": "def f(responses):\n    return []\n"},
    ),
    "a reward server that is not there": Bad(
        ("127.0.0.1:1",),
        words=("scoring.rewards={h: {kind: http, url: 'http://127.0.0.1:1/score', retries: 0, timeout_s: 2}}",),
    ),
    "a secret in an address": Bad(
        ("scoring.rewards.h.url",),
        words=("scoring.rewards={h: {kind: http, url: 'http://u:secret@127.0.0.1:1/score'}}",),
    ),
}
ENVIRONMENT = {
    "RAY_TMPDIR is not there": Bad(("RAY_TMPDIR=gone: does not exist",), environment={"RAY_TMPDIR": "gone"}),
    "TMPDIR is a file": Bad(("TMPDIR=base.yaml: is not a folder",), environment={"TMPDIR": "base.yaml"}),
    "RAY_ADDRESS is a dashboard's": Bad(
        ("RAY_ADDRESS=http://127.0.0.1:8265: this is the address of a dashboard",),
        words=("cluster.address=auto",),
        environment={"RAY_ADDRESS": "http://127.0.0.1:8265"},
    ),
    "RAY_ADDRESS where nobody is": Bad(
        ("RAY_ADDRESS=127.0.0.1:1: cannot be reached: Connection refused", "cluster.address=local"),
        words=("cluster.address=auto",),
        environment={"RAY_ADDRESS": "127.0.0.1:1"},
    ),
    "a key of wandb that is none": Bad(
        ("WANDB_API_KEY invalid", "telemetry.wandb=offline"),
        words=("telemetry.wandb=online",),
        environment={"WANDB_API_KEY": "short"},
    ),
}
INPUTS = CONFIGS | DATA | PREFERENCES | MODELS | RUNS | REWARDS | ENVIRONMENT
