"""Rewards by libraries (sacrebleu, rouge-score, jsonschema, reasoning_gym), in a process of their own.

Libraries are imported here only, and only the one that is needed. All values are between 0 and 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

REFERENCES = {"$ref", "$dynamicRef"}
"""Keys of JSON Schema that name another schema."""
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
    from referencing import Registry
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
    draft = DRAFT202012.detect(schema)
    root = draft.create_resource(schema)
    _check_references(root, registry.resolver_with_root(root), draft, REFERENCES & kind.VALIDATORS.keys(), set())
    return kind(schema, registry=registry)


def _check_references(resource: Any, resolver: Any, draft: Any, keys: set[str], seen: set[int]) -> None:
    """Look up every reference of a schema, of its parts and of what they name, as a validation would.

    `keys`: those that refer, in the schema's `draft`; `seen`: schemas that were looked at, by `id`. Raises Refused.
    """
    from referencing.exceptions import Unresolvable

    schema = resource.contents
    if not isinstance(schema, dict) or id(schema) in seen:
        return
    seen.add(id(schema))
    for key in sorted(keys & schema.keys()):
        try:
            found = resolver.lookup(schema[key])
        except (Unresolvable, ValueError, TypeError, AttributeError):  # a path may lead through what has no parts
            found = None
        if found is None or not isinstance(found.contents, (dict, bool)):
            what = "nothing in it; other documents are not read" if found is None else "no schema"
            raise Refused(f"its {key} {schema[key]!r} names {what}: put the definition into it")
        _check_references(draft.create_resource(found.contents), found.resolver, draft, keys, seen)
    for part in resource.subresources():
        _check_references(part, resolver.in_subresource(part), draft, keys, seen)
