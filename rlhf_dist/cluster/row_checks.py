"""Rows of data files against what a run makes of them, before anything starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING

from rlhf_dist.cluster.sources import model_path
from rlhf_dist.config.schema import Config
from rlhf_dist.data.demonstrations import (
    TaskDemonstrations,
    demonstrations,
    held_out_demonstrations,
    ptx_demonstrations,
)
from rlhf_dist.data.files import held_out_rows, used_rows
from rlhf_dist.data.judgements import FileJudgements, Judgements, held_out_judgements, judgements
from rlhf_dist.data.numeric_answers import ambiguous_whole
from rlhf_dist.data.records import Row, parsed, together
from rlhf_dist.data.rows import question
from rlhf_dist.data.text_checks import (
    RowTexts,
    require_rendered,
    text_warnings,
    texts_of_demonstrations,
    texts_of_judgements,
)
from rlhf_dist.data.token_checks import placed_texts, require_tokens
from rlhf_dist.errors import DataError
from rlhf_dist.planning.placement import Command

if TYPE_CHECKING:
    from rlhf_dist.scoring.verifier import AnswerReader


def read_data(config: Config, command: Command) -> list[RowTexts]:
    """Read what the processes of `command` will read, so that bad rows are told before any of them starts.

    Returns the texts of files, for `check_texts`. Raises one DataError for all bad rows.
    """
    held_back = config.eval.prompts
    reads: list[Callable[[], Sequence[RowTexts]]] = []
    if command in ("train", "eval") and config.data.source != "task":
        reads.append(partial(_prompts, config, command))
    if command == "sft":
        reads.append(lambda: _texts(demonstrations(config.data, config.sft, config.seed, held_back)))
        reads.append(lambda: _texts(held_out_demonstrations(config.data, config.sft, held_back)))
    if command in ("reward", "prefer"):
        unusable = config.preferences.unusable
        reads.append(lambda: _judged(judgements(config.preferences, config.data, config.seed, unusable)))
        reads.append(lambda: _judged(held_out_judgements(config.preferences, config.data, unusable)))
    if command == "train" and config.ptx.coef:
        reads.append(lambda: _texts(ptx_demonstrations(config.data, config.ptx, config.seed, held_back)))
    return [text for texts in together(reads) for text in texts]


def check_texts(config: Config, command: Command, rows: Sequence[RowTexts]) -> list[str]:
    """Refuse texts that the policy's tokenizer makes no token of, or its template rejects; returns what to warn of.

    Raises DataError, and ModelError for a tokenizer or template that cannot be used.
    """
    rewards = config.scoring.rewards if command in ("train", "eval") else {}
    if not rows and not any(spec.kind == "regex" for spec in rewards.values()):
        return []
    from rlhf_dist.models.hf import load_tokenizer
    from rlhf_dist.scoring.special_tokens import hidden_token_warnings

    path, chat = model_path(config, config.model.path, "model.path"), config.data.chat
    tokenizer = load_tokenizer(path)
    if command not in ("reward", "prefer"):  # a judgement without a token may be left out: `told_apart`
        require_tokens(placed_texts(rows), tokenizer, config.model.path, chat)
    if chat:
        require_rendered(rows, tokenizer)
    answers = [row.answer for row in rows]
    return [*text_warnings(rows, tokenizer, chat), *hidden_token_warnings(rewards, answers, tokenizer, chat)]


def _prompts(config: Config, command: Command) -> list[RowTexts]:
    held_back = config.eval.prompts
    rows = used_rows(config.data, held_back) if command == "train" else held_out_rows(config.data, held_back)
    from rlhf_dist.scoring.verifier import AnswerReader

    with closing(AnswerReader()) as reader:
        return parsed(rows, lambda row: _prompt(row, config, reader))


def _prompt(row: Row, config: Config, reader: AnswerReader) -> RowTexts:
    """The question of a row. Raises DataError for one that cannot be used, or an answer that a reward cannot read."""
    asked, key = question(row, config.data), config.data.answer_key
    for name, spec in config.scoring.rewards.items():
        reason = reader.unreadable(spec.kind, asked.answer)
        if reason:
            raise DataError(
                f"{row.place}: the answer {asked.answer!r} cannot be compared with by the reward {name} of kind "
                f"{spec.kind}: {reason}"
            )
        if spec.kind == "exact" and config.data.source != "gsm8k" and ambiguous_whole(row, key):
            raise DataError(
                f"{row.place}: {key!r} is {asked.answer} in a column that holds fractions too, and the reward {name} "
                "of kind exact compares text: write the answers as text, or use kind number"
            )
    return RowTexts(row.place, asked.messages, answer=asked.answer)


def _texts(demos: object) -> list[RowTexts]:
    """Texts of files; a built-in task's are made by the thousand, of characters that every tokenizer knows."""
    return [] if isinstance(demos, TaskDemonstrations) else texts_of_demonstrations(demos)  # type: ignore[arg-type]


def _judged(judged: Judgements) -> list[RowTexts]:
    return texts_of_judgements(judged) if isinstance(judged, FileJudgements) else []
