"""What is known of each kind of reward (`RewardSpec.kind`), in one table that everything else asks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec


@dataclass(frozen=True, slots=True)
class Kind:
    """One row of `KINDS`."""

    compares: bool = False
    """Every prompt needs an answer."""
    right: bool = False
    """Says whether a response is right, so that accuracy can be measured by it."""
    at_most_1: bool = True
    """Its values are between 0 and 1."""
    process: bool = False
    """Runs in a process of its own, which serves one group at a time and can be enclosed in a sandbox."""
    remote: bool = False
    """Asks a server."""
    library: str = ""
    """The module that it needs, of a package that is not installed with ours."""

    @property
    def can_fail(self) -> bool:
        """Whether it can take too long or fail for one response, and is then left out on demand."""
        return self.process or self.remote


KINDS: Mapping[str, Kind] = {
    "exact": Kind(compares=True, right=True),
    "number": Kind(compares=True, right=True, process=True),
    "regex": Kind(right=True, process=True),
    "function": Kind(right=True, at_most_1=False, process=True),
    "model": Kind(at_most_1=False),
    "http": Kind(at_most_1=False, remote=True),
    "gold": Kind(at_most_1=False),
    "bleu": Kind(compares=True, process=True, library="sacrebleu"),
    "chrf": Kind(compares=True, process=True, library="sacrebleu"),
    "rouge1": Kind(compares=True, process=True, library="rouge_score"),
    "rouge2": Kind(compares=True, process=True, library="rouge_score"),
    "rougeL": Kind(compares=True, process=True, library="rouge_score"),
    "json": Kind(process=True, library="jsonschema"),
    "length": Kind(),
    "reasoning_gym": Kind(right=True, process=True, library="reasoning_gym"),
    "judge": Kind(at_most_1=False, remote=True),
}
PACKAGES = {
    "sacrebleu": "sacrebleu==2.6.0",
    "rouge_score": "rouge-score==0.1.2",
    "jsonschema": "jsonschema==4.26.0",
    "reasoning_gym": "reasoning-gym==0.1.25",
}
"""Module -> the package that has it, in the version that the extra `rewards` (`gym` for reasoning_gym) installs."""


def kinds(test: Callable[[Kind], object]) -> tuple[str, ...]:
    """Those whose row passes, in the order of the table."""
    return tuple(name for name, row in KINDS.items() if test(row))


def missing_library(kind: str) -> str:
    """The rest of a sentence on the library that a kind needs and this Python does not have; empty: it has it."""
    module = KINDS[kind].library
    if not module or find_spec(module) is not None:
        return ""
    return (
        f"needs {module}, which is not installed here: pip install {PACKAGES[module]!r}, or install rlhf_dist with the "
        f"extra {'gym' if module == 'reasoning_gym' else 'rewards'}"
    )
