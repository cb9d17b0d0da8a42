"""One guard against images that stand in two splits.  Knows marks and places, not records, files or data sets."""

from __future__ import annotations

from free_dist.config import UserError


class LeakError(UserError):
    """An image stands in two splits; the message names both places."""


class LeakGuard:
    """Remembers in which split every mark of an image (a hash of its bytes, its published id) was seen first.

    Threads may share a guard as long as they add to one split at a time.
    """

    def __init__(self) -> None:
        self._seen: dict[str, tuple[str, str]] = {}

    def elsewhere(self, mark: str, split: str, place: str) -> str | None:
        """The place in another split that showed the same mark, or None, and then ``place`` is remembered for it."""
        first_split, first_place = self._seen.setdefault(mark, (split, place))
        return None if first_split == split else first_place

    def refuse(self, mark: str, split: str, place: str, *, what: str = "image", advice: str = "") -> None:
        """Raise LeakError where :meth:`elsewhere` finds something; ``advice`` ends the message."""
        other = self.elsewhere(mark, split, place)
        if other is not None:
            raise LeakError(f"the {what} of {place} is that of {other}: a split leaks into another{advice}")
