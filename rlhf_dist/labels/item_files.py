"""Prompts with responses, read from files and from the samples of runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

from rlhf_dist.config.schema import DataConfig, PreferencesConfig
from rlhf_dist.data.files import read_rows
from rlhf_dist.data.judgement_rows import Comparison, NoJudgement, judgement, number, prompt, response, responses
from rlhf_dist.data.records import Row, listed, shown
from rlhf_dist.data.rows import checked_text
from rlhf_dist.errors import DataError
from rlhf_dist.labels.items import Answered
from rlhf_dist.labels.verdicts import MOST_STARS

Form = Literal["responses", "pair", "transcripts", "ranking", "battles", "rating", "thumbs"]
"""responses: prompt with responses, models and gold; the others as `rlhf-dist reward` reads them."""
FORMS: tuple[str, ...] = get_args(Form)
COLUMNS = PreferencesConfig(source="jsonl")
"""The names of columns are the defaults of `preferences`."""
DATA = DataConfig()
ROLLOUTS = "rollouts"


def read_answered(path: Path, form: Form) -> tuple[list[Answered], Counter[str]]:
    """What a file (JSON lines, also .gz, or parquet) or a run directory holds, and what was left out for which reason.

    Of a run: the samples in its `rollouts/step-*.parquet`. Raises one DataError for all rows that are wrong.
    """
    left_out: Counter[str] = Counter()
    if path.is_dir():
        return _of_run(path, left_out), left_out
    source = "parquet" if path.suffix == ".parquet" else "jsonl"
    return _parsed(read_rows(source, str(path), "FILE"), _reader(form), left_out), left_out


def _of_run(run: Path, left_out: Counter[str]) -> list[Answered]:
    files = sorted((run / ROLLOUTS).glob("step-*.parquet"))
    if not files:
        raise DataError(
            f"{run}: has no {ROLLOUTS}/step-*.parquet; name a file, or the directory of a run of `train` that keeps "
            "samples (telemetry.samples, telemetry.samples_every)"
        )
    found: list[Answered] = []
    for file in files:
        rows = read_rows("parquet", str(file), "RUN")
        model = f"{run}@{file.stem}"
        found += _parsed(rows, lambda row, model=model: _sample(row, model), left_out)
    return found


def _sample(row: Row, model: str) -> Answered:
    text = response(row, "'response'", row.fields.get("response"))
    return Answered(row.place, prompt(row, COLUMNS, DATA), (text,), (model,), None)


def _parsed(rows: Sequence[Row], parse: Callable[[Row], Answered], left_out: Counter[str]) -> list[Answered]:
    found: list[Answered] = []
    wrong: list[str] = []
    for row in rows:
        try:
            found.append(parse(row))
        except NoJudgement:
            left_out["a response is empty, or the sides are equal or share no prompt"] += 1
        except DataError as error:
            wrong.append(str(error))
    if wrong:
        raise DataError(listed(wrong, len(rows)))
    return found


def _reader(form: Form) -> Callable[[Row], Answered]:
    if form == "responses":
        return _own
    if form == "battles":
        from rlhf_dist.data.battles import battle  # needs torch

        def read_battle(row: Row) -> Answered:
            met = battle(row, COLUMNS, DATA)
            return Answered(row.place, met.messages, met.responses, ("", ""), (met.outcome, 1.0 - met.outcome))

        return read_battle
    preferences = PreferencesConfig(source="jsonl", form=form)
    return lambda row: _of_judgement(row, preferences)


def _of_judgement(row: Row, preferences: PreferencesConfig) -> Answered:
    said = judgement(row, preferences, DATA)
    if isinstance(said, Comparison):
        better = Counter(pair.better for pair in said.pairs)
        gold = tuple(float(better[i]) for i in range(len(said.responses)))
        return Answered(row.place, said.messages, said.responses, ("",) * len(said.responses), gold)
    value = said.value if said.kind == "logistic" else (said.value + 1) / 2 * MOST_STARS
    return Answered(row.place, said.messages, (said.response,), ("",), (value,))


def _own(row: Row) -> Answered:
    """`prompt` with `responses`, `models` and `gold`, or with `response`, `model` and a number as `gold`."""
    messages = prompt(row, COLUMNS, DATA)
    one = "responses" not in row.fields
    texts = (response(row, "'response'", row.fields.get("response")),) if one else responses(row, "responses")
    if not texts:
        raise DataError(f"{row.place}: 'responses' is empty; it has to be a list of texts")
    models = _listed(row, "model" if one else "models", len(texts), one)
    names = tuple(
        checked_text(row, f"model {place}", model) if model != "" else "" for place, model in enumerate(models, 1)
    )
    gold = _listed(row, "gold", len(texts), one)
    values = tuple(
        float(value) if isinstance(value, bool) else number(row, f"gold {place} (higher for better)", value)
        for place, value in enumerate(gold, 1)
    )
    return Answered(row.place, messages, texts, names or ("",) * len(texts), values or None)


def _listed(row: Row, key: str, size: int, one: bool) -> list[object]:
    """The values of a column that may be absent, one for each response. Raises DataError for another number."""
    value = row.fields.get(key)
    if value is None:
        return []
    if one and not isinstance(value, list):
        return [value]
    if not isinstance(value, list) or len(value) != size:
        raise DataError(
            f"{row.place}: {key!r} is {shown(value)}; it has to be a list, one for each of {size} responses"
        )
    return value
