"""What the simulated learner was told to learn from."""

from __future__ import annotations

from dataclasses import dataclass, field

from chaos.servers import Trained


@dataclass(slots=True)
class Witness:
    """What the learner was told to learn from, over all lives: a second account beside the ledger's."""

    trained: list[tuple[int, Trained]] = field(default_factory=list)
    """(step, group), those that a resume took back left out."""
    skipped: list[tuple[int, str]] = field(default_factory=list)
    """(step, uid) of groups of steps that were skipped for their numbers; the same."""
    left_out: set[str] = field(default_factory=set)
    """uids of groups of steps for which a run went back."""

    def go_back(self, step: int) -> None:
        """A run goes on from here."""
        self.trained = [(of, group) for of, group in self.trained if of <= step]
        self.skipped = [(of, uid) for of, uid in self.skipped if of <= step]

    def saw(self, step: int, group: Trained) -> None:
        """The learner got it."""
        self.trained.append((step, group))

    @property
    def step(self) -> int:
        """The last that was learnt from, or skipped; 0: none."""
        return max((of for of, _ in [*self.trained, *self.skipped]), default=0)
