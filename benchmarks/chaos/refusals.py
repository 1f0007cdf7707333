"""Steps whose numbers go wrong, and what may become of them: an account beside `loop.numbers_faults`, of one life."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from chaos.clock import Broken
from chaos.plan import LEARNER
from chaos.servers import Trained
from chaos.witness import Witness
from chaos.world import World
from rlhf_dist.config.numbers_keys import NumbersConfig
from rlhf_dist.models.checkpoints import checkpoint_steps, problems

MOST = NumbersConfig().max_faults
TOLD = "numbers that went wrong"
"""What `World.seen` counts them as."""


class Refusals:
    """Knows which optimizer steps are refused, and looks at what the run makes of that."""

    def __init__(self, world: World, checkpoints: Path, witness: Witness) -> None:
        self._world, self._checkpoints, self._witness = world, checkpoints, witness
        self._way = world.plan.settings.on_fault
        self._sick = {LEARNER: 0}
        """Rank -> how many more updates it refuses."""
        self._poisoned = 0
        """The step from which on its weights are wrong; 0: none."""
        self._owed = 0
        """A step that was refused, and that the run has not spoken of; 0: none."""
        self._learnt = self._highest = self._in_row = 0
        """The last step that was learnt from; the highest that went wrong; how many did since a new one was learnt."""
        self._left_out: set[str] = set()
        self._rolling = self._back_to = 0
        """The step for which the run is to go back; where it went, while no new step was learnt from since."""

    @property
    def rolls_back(self) -> bool:
        """Whether the next start of the ranks is one for a step's numbers."""
        return self._rolling > 0

    def refuses(self, who: str, step: int, groups: Sequence[Trained]) -> bool:
        """A model is asked to learn from these: whether it takes no optimizer step. Raises `Broken`."""
        if again := self._left_out & {group.uid for group in groups}:
            raise Broken("rolled back", f"{sorted(again)} were left out, and step {step} is to learn from them")
        if fault := self._world.strike("nan", who):
            self._sick[who] = 1 + int(fault.seconds)
        refused = self._sick.get(who, 0) > 0 or (who == LEARNER and self._poisoned > 0)
        self._sick[who] = max(0, self._sick.get(who, 0) - 1)
        if refused:
            self._owed = step
        return refused

    def learnt(self, step: int) -> None:
        """The ledger is to have its groups as trained, unless the run goes back."""
        self._learnt = step
        if step >= self._highest and self._owed != step:
            self._in_row = self._back_to = 0
        if self._world.strike("poison", LEARNER):
            self._poisoned = step

    def told(self, step: int, uids: Sequence[str]) -> None:
        """The run saves the batch of a step that went wrong. Raises `Broken`."""
        if self._owed not in (0, step):
            raise Broken("numbers", f"step {self._owed} was refused, and step {step} is told of")
        self._owed, self._highest, self._in_row = 0, max(self._highest, step), self._in_row + 1
        self._world.seen[TOLD] += 1
        if self._in_row > MOST + 1:
            raise Broken("numbers", f"step {step} is fault {self._in_row} in a row, and the most is {MOST}")
        if self._in_row > MOST:
            return
        if self._way == "skip" and self._learnt != step:
            self._witness.skipped += [(step, uid) for uid in uids]
        if self._way == "roll_back":
            self._rolling = step
            self._left_out |= set(uids)
            self._witness.left_out |= set(uids)

    def published(self, version: int) -> None:
        """Raises `Broken` where the run goes on from a step that was refused, and has not said so."""
        if self._owed:
            raise Broken("numbers", f"step {self._owed} was refused, and version {version} is published")

    def goes_back(self, folder: Path | None, step: int) -> None:
        """All ranks are started again from there. Raises `Broken`."""
        if folder is not None and (found := problems(folder)):
            raise Broken("restored", "; ".join(found))
        if not self._rolling:
            return
        if step >= self._rolling:
            raise Broken("rolled back", f"for step {self._rolling}, to {step}")
        earlier = [one for one in checkpoint_steps(self._checkpoints) if one < self._back_to]
        if self._back_to and earlier and step != earlier[-1]:
            raise Broken("rolled back", f"to {step}, as before to {self._back_to}; there are {earlier}")

    def went_back(self, step: int) -> None:
        """They are there."""
        self._owed = self._learnt = 0
        if self._rolling:
            self._world.seen["rolled back again" if self._back_to else "rolled back"] += 1
            self._rolling, self._back_to = 0, step
        if step < self._poisoned:
            self._poisoned = 0
