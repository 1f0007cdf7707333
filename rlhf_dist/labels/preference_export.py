"""Decisions as rows that `rlhf-dist reward` reads. Whatever does not become a row is counted, with the reason."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from rlhf_dist.errors import DiskError, InputError
from rlhf_dist.labels.decisions import Decision, decisions
from rlhf_dist.labels.overview import by_labeller, gold_score, met
from rlhf_dist.labels.store import LabelStore
from rlhf_dist.labels.verdicts import BOTH_BAD, SKIP, TIE

ExportForm = Literal["pair", "transcripts", "ranking", "battles", "rating", "thumbs"]
EXPORT_FORMS: tuple[str, ...] = get_args(ExportForm)
FORM_JUDGES: dict[str, tuple[str, ...]] = {
    "pair": ("pair", "ranking"),
    "transcripts": ("pair", "ranking"),
    "ranking": ("pair", "ranking"),
    "battles": ("pair", "ranking"),
    "rating": ("stars",),
    "thumbs": ("thumbs",),
}
"""Form -> kinds of judgement that it can hold."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What became of the decisions."""

    rows: int
    decisions: int
    """That became rows."""
    ties: int
    """Rows that are ties, those where both were bad among them."""
    both_bad: int
    left_out: Counter[str]
    """Reason -> decisions."""

    def lines(self, form: str) -> list[str]:
        """For a reader."""
        ties = f", {self.ties} of them ties ({self.both_bad} where both are bad)" if self.ties else ""
        return [
            f"{self.rows} rows of form {form} from {self.decisions} decisions{ties}",
            *(f"not exported: {count} ({reason})" for reason, count in sorted(self.left_out.items())),
        ]


def export(store: LabelStore, path: Path, form: ExportForm, least_gold: float, flagged: bool) -> Exported:
    """Write the standing decisions as JSON lines, each decision by itself, ordered by item.

    least_gold: labellers with a smaller share of gold items right are left out; flagged: keep items with flags.
    Raises InputError where the file exists or there would be no row, DiskError where it cannot be written.
    """
    if path.exists():
        raise InputError(f"{path}: is there already; give another name, or remove it")
    with store.reading() as db:
        made = list(decisions(db))
    rows, exported = rows_of(made, form, least_gold, flagged)
    if not rows:
        raise InputError("\n".join([f"{store.path}: has no decision to export as {form}", *exported.lines(form)[1:]]))
    unfinished = path.with_name(f"{path.name}.tmp")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        raise DiskError(f"{path}: cannot be written: {error.strerror}") from error
    return exported


def rows_of(
    made: Sequence[Decision], form: ExportForm, least_gold: float, flagged: bool
) -> tuple[list[dict[str, Any]], Exported]:
    """The rows of a form, and what became of every decision."""
    distrusted = {name for name, mine in by_labeller(made).items() if _distrusted(mine, least_gold)}
    left_out: Counter[str] = Counter()
    rows: list[dict[str, Any]] = []
    used, ties, both_bad = 0, 0, 0
    for one in made:
        reason = _reason(one, form, flagged)
        if not reason and one.labeller in distrusted:
            reason = f"the labeller has fewer than {least_gold:.0%} of the gold items right"
        if reason:
            left_out[reason] += 1
            continue
        rows += _rows(one, form)
        used += 1
        ties += one.verdict in (TIE, BOTH_BAD)
        both_bad += one.verdict == BOTH_BAD
    return rows, Exported(len(rows), used, ties, both_bad, left_out)


def _distrusted(mine: Sequence[Decision], least_gold: float) -> bool:
    right, asked = gold_score(mine)
    return bool(asked) and right < least_gold * asked


def _reason(one: Decision, form: ExportForm, flagged: bool) -> str:
    """Why a decision becomes no row; empty where it does."""
    if one.gold is not None:
        return "a gold item, whose right answer was known"
    if one.verdict == SKIP:
        return "skipped"
    if one.flags and not flagged:
        return "flagged as spam, unsafe or not to be ranked; --flagged keeps them"
    if one.judge not in FORM_JUDGES[form]:
        forms = " or ".join(name for name, judges in FORM_JUDGES.items() if one.judge in judges)
        return f"{one.judge}: these are exported by --form {forms}"
    if form != "battles" and one.verdict in (TIE, BOTH_BAD):
        what = "a tie" if one.verdict == TIE else "both bad"
        return f"{what}, which a row of form {form} cannot say; --form battles keeps it as a tie"
    return ""


def _rows(one: Decision, form: ExportForm) -> Iterator[dict[str, Any]]:
    turns = [{"role": turn.role, "content": turn.content} for turn in one.messages]
    asked: Any = turns if len(turns) > 1 else one.messages[0].content
    origin = {"item": one.item, "labeller": one.labeller, "at": one.at}
    models = list(one.models)
    if form == "rating" or form == "thumbs":
        row = {"prompt": asked, "response": one.responses[0], "rating": one.verdict}
        yield row | origin | {"models": models}
    elif form == "ranking":
        order = one.verdict if isinstance(one.verdict, list) else [one.verdict, 1 - int(one.verdict)]
        ranks = [order.index(i) + 1 for i in range(len(order))]
        yield {"prompt": asked, "responses": list(one.responses), "ranks": ranks} | origin | {"models": models}
    else:
        for a, b, winner in met(one):
            if form != "battles" and winner == b:
                a, b = b, a
            yield _compared(one, form, turns, asked, (a, b), winner) | origin | {"models": [models[a], models[b]]}


def _compared(
    one: Decision, form: ExportForm, turns: list[dict[str, str]], asked: Any, sides: tuple[int, int], winner: object
) -> dict[str, Any]:
    """A row about two responses; sides: but for battles the better one is the first."""
    if form == "battles":
        won = sides.index(winner) if isinstance(winner, int) else TIE
        return {"prompt": asked, "responses": [one.responses[i] for i in sides], "winner": won}
    better, worse = (one.responses[i] for i in sides)
    if form == "pair":
        return {"prompt": asked, "chosen": better, "rejected": worse}
    chosen, rejected = ([*turns, {"role": "assistant", "content": text}] for text in (better, worse))
    return {"chosen": chosen, "rejected": rejected}
