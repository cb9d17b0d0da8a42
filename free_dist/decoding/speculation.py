"""Lossless decoding: which drafted tokens the full model accepts, and how many to draft before asking it.

Tokens emitted by exits are drafts.  The full model reads all of them in one call and keeps the longest prefix it agrees
with (greedy), or a prefix chosen so that every kept token has exactly the full model's distribution (sampling: Leviathan et
al., 2023, arXiv 2211.17192, algorithm 1).  Does not know caches, exits or blocks.

Shape letters: G drafted tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from free_dist.decoding.sampling import Sampler


def accept_greedy(drafts: Sequence[int], best: Sequence[int]) -> tuple[int, int | None]:
    """(accepted drafts, the full model's own next token).

    ``best`` holds the full model's most likely token after each draft's predecessor and, where it read the last draft too, one
    more.  The own token is None when every draft was accepted and there is no more.
    """
    for accepted, (draft, wanted) in enumerate(zip(drafts, best, strict=False)):
        if draft != wanted:
            return accepted, wanted
    return len(drafts), best[len(drafts)] if len(best) > len(drafts) else None


def accept_sampled(
    drafts: Sequence[int], drafted: Sequence[Tensor], full: Tensor, sampler: Sampler
) -> tuple[int, int | None]:
    """(accepted drafts, a token drawn by the full model), so that each kept token is distributed as ``full`` says.

    ``drafted``: for each draft the probabilities [V] it was drawn from; ``full``: the full model's at the same places and,
    where it read the last draft too, one more, [G or G + 1, V].  A draft t is kept with probability min(1, p(t) / q(t));
    the first one that is not is replaced by a draw from max(p - q, 0), normalised.
    """
    chances = sampler.uniform(len(drafts), full.device).tolist()
    for i, (token, q, chance) in enumerate(zip(drafts, drafted, chances, strict=True)):
        p = full[i]
        # chance < p / q, without dividing: q(t) > 0, or t could not have been drawn.
        if chance * float(q[token]) < float(p[token]):
            continue
        rest = (p - q).clamp_(min=0)
        # Rounding can leave nothing where p and q are equal, although then the draft should have been kept.
        source = rest if float(rest.sum()) > 0 else p
        return i, int(sampler.draw(source[None])[0])
    if full.shape[0] > len(drafts):
        return len(drafts), int(sampler.draw(full[-1:])[0])
    return len(drafts), None


class DraftLength:
    """How many tokens to draft before the full model reads them: the number with the most tokens per unit of work.

    With acceptance rate a, drafting cost c and verification cost v, G drafts give (1 - a^(G + 1)) / (1 - a) tokens for
    G c + v.  The rate is learned from what was accepted, starting from a prior.
    """

    def __init__(self, longest: int, *, draft_cost: float, verify_cost: float) -> None:
        """Costs in any common unit, such as blocks; ``longest`` is at least 1."""
        self._longest = longest
        self._draft_cost = draft_cost
        self._verify_cost = verify_cost
        self._accepted, self._offered = 9.0, 10.0  # a prior worth ten drafts
        self.current = self._best()
        """Drafts to make, from 1 to ``longest``."""

    @property
    def acceptance(self) -> float:
        """Estimated probability that a draft is accepted given that those before it were."""
        return self._accepted / self._offered

    def record(self, accepted: int, offered: int) -> None:
        """Learn from one verification; a draft after a rejected one says nothing, so it is not counted."""
        self._accepted += accepted
        self._offered += min(offered, accepted + 1)
        self.current = self._best()

    def _best(self) -> int:
        rate = self.acceptance
        best, best_value, tokens, power = 1, 0.0, 1.0, 1.0
        for length in range(1, self._longest + 1):
            power *= rate
            tokens += power
            value = tokens / (length * self._draft_cost + self._verify_cost)
            if value > best_value:
                best, best_value = length, value
        return best
