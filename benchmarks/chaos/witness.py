"""What the simulated learner was told to learn from."""

from __future__ import annotations

from dataclasses import dataclass, field

from chaos.servers import Trained


@dataclass(slots=True)
class Witness:
    """What the learner was told to learn from, over all lives: a second account beside the ledger's."""

    trained: list[tuple[int, Trained]] = field(default_factory=list)
    """(step, group), those that a resume took back left out."""

    def go_back(self, step: int) -> None:
        """A run goes on from here."""
        self.trained = [(of, group) for of, group in self.trained if of <= step]

    def saw(self, step: int, group: Trained) -> None:
        """The learner got it."""
        self.trained.append((step, group))

    @property
    def step(self) -> int:
        """The last that was learnt from; 0: none."""
        return max((of for of, _ in self.trained), default=0)
