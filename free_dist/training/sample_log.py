"""Which samples every step saw, in a file: ``samples.jsonl``, one line per optimizer step.

The ids stand in the order of the global batch, so the lines are the same for any number of ranks.  Lines are kept until
:meth:`SampleLog.write`, because gathering them costs a message between ranks.  Knows ids and ranks; nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from free_dist.data.samples import Batch
from free_dist.distributed import World, all_gather


class SampleLog:
    """The log of one run; all ranks call every method.  A disabled one does nothing."""

    def __init__(self, path: Path, world: World, *, enabled: bool) -> None:
        self._path = path
        self._is_main = world.is_main
        self._enabled = enabled
        self._waiting: list[tuple[int, list[tuple[str, ...]]]] = []

    def add(self, step: int, batches: Sequence[Batch]) -> None:
        """Remember this rank's micro-batches of a step."""
        if self._enabled:
            self._waiting.append((step, [batch.keys for batch in batches]))

    def write(self) -> None:
        """Append the lines of all steps since the last call."""
        if not self._waiting:
            return
        ranks = all_gather(self._waiting)
        self._waiting = []
        if self._is_main:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "a") as file:
                for parts in zip(*ranks, strict=True):  # one step, by rank
                    micro_batches = zip(*(keys for _, keys in parts), strict=True)
                    ids = [key for shares in micro_batches for share in shares for key in share]
                    file.write(json.dumps({"step": parts[0][0], "samples": ids}) + "\n")
