"""Where the prompts of a run come from that goes on from a checkpoint."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping

from rlhf_dist.data.stream import PromptStream
from rlhf_dist.types import Prompt


class ResumedPrompts:
    """The stream, and before it the groups that were open when the checkpoint was written."""

    def __init__(
        self,
        stream: PromptStream,
        open_groups: Mapping[str, int],
        left_out: Collection[str] = (),
        leave_out: Callable[[tuple[str, int]], None] = lambda attempt: None,
    ) -> None:
        """`open_groups`: uid -> attempt. `left_out`: uids that are passed over, each told to `leave_out`.

        Raises ConfigError for a uid that the data does not have.
        """
        self._stream = stream
        self._first = deque((stream.find(uid), attempt) for uid, attempt in open_groups.items())
        self._left_out, self._leave_out = left_out, leave_out

    def __len__(self) -> int:
        return len(self._stream)

    def take(self, n: int) -> list[tuple[Prompt, int]]:
        """See `rules.Prompts`."""
        found: list[tuple[Prompt, int]] = []
        while len(found) < n:
            wanted = n - len(found)
            more = [self._first.popleft() for _ in range(min(wanted, len(self._first)))]
            more += [(prompt, 0) for prompt in self._stream.take(wanted - len(more))]
            for prompt, attempt in more:
                if prompt.uid in self._left_out:
                    self._leave_out((prompt.uid, attempt))
                else:
                    found.append((prompt, attempt))
        return found
