"""Rewards by libraries (sacrebleu, rouge-score, jsonschema, reasoning_gym), in a process of their own.

Libraries are imported here only, and only the one that is needed. All values are between 0 and 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

Call = Callable[[Sequence[str], Sequence[str], Sequence[str]], list[float]]
"""(prompts, responses, answers), n each -> n values."""


class Refused(Exception):
    """A setting that cannot be used; the message is the rest of a sentence that begins with its key."""


def reward(setting: dict[str, Any]) -> Call:
    """`setting`: `kind`, as in a config, and what else it needs. Raises Refused, and what the library's import does."""
    kind = setting["kind"]
    if kind == "json":
        return _json(setting["schema"])
    if kind == "reasoning_gym":
        return _gym(setting)
    likeness = _rouge(kind) if kind.startswith("rouge") else {"bleu": _bleu, "chrf": _chrf}[kind]()
    return lambda prompts, responses, answers: [
        min(1.0, max(0.0, likeness(response, answer))) for response, answer in zip(responses, answers, strict=True)
    ]


def _gym(setting: dict[str, Any]) -> Call:
    from rlhf_dist.scoring.gym_main import GymRefused, gym_reward

    try:
        return gym_reward(setting)
    except GymRefused as refused:
        raise Refused(str(refused)) from None


def _bleu() -> Callable[[str, str], float]:
    """Of sentences: n-grams that a short text cannot have do not count (effective order)."""
    from sacrebleu.metrics.bleu import BLEU

    bleu = BLEU(effective_order=True)
    return lambda response, answer: bleu.sentence_score(response, [answer]).score / 100


def _chrf() -> Callable[[str, str], float]:
    from sacrebleu.metrics.chrf import CHRF

    chrf = CHRF()
    return lambda response, answer: chrf.sentence_score(response, [answer]).score / 100


def _rouge(kind: str) -> Callable[[str, str], float]:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([kind])
    return lambda response, answer: scorer.score(answer, response)[kind].fmeasure


def _json(schema: str) -> Call:
    """`schema`: the text of a JSON Schema; empty: any JSON will do."""
    validator = _validator(schema) if schema else None

    def valid(response: str) -> bool:
        try:
            value = json.loads(response, parse_constant=_no_constant)
            return validator is None or validator.is_valid(value)
        except (ValueError, RecursionError, OverflowError):  # numbers of a thousand digits, lists a thousand deep
            return False

    return lambda prompts, responses, answers: [float(valid(response)) for response in responses]


def _no_constant(name: str) -> None:
    """NaN and Infinity are Python's, and not JSON."""
    raise ValueError(name)


def _validator(text: str) -> Any:
    """Raises Refused. References to other documents are never fetched."""
    from jsonschema import SchemaError
    from jsonschema.validators import Draft202012Validator, validator_for
    from referencing import Registry, Resource
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012

    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refused(f"it is not JSON: {error}") from None
    if not isinstance(schema, dict):
        raise Refused(f"it is {text.strip()[:40]}; a JSON Schema is an object")
    kind = validator_for(schema, default=Draft202012Validator)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise Refused(f"it is not a JSON Schema: {error.message} at {error.json_path}") from None
    registry: Registry = Registry()
    resolver = registry.resolver_with_root(Resource.from_contents(schema, default_specification=DRAFT202012))
    for reference in _references(schema):
        try:
            resolver.lookup(reference)
        except Unresolvable:
            raise Refused(
                f"its $ref {reference!r} names nothing in it; other documents are not read: put the definition into it"
            ) from None
    return kind(schema, registry=registry)


def _references(value: Any) -> list[str]:
    """Every `$ref` of a schema."""
    if isinstance(value, list):
        return [found for part in value for found in _references(part)]
    if not isinstance(value, dict):
        return []
    own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
    return [*own, *(found for part in value.values() for found in _references(part))]
