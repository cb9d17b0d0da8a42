"""What sample texts made during training tell about speed and length, beside the same texts at full depth.

Knows results of generation; does not know when one is a failure (``free_dist.training.alarms``).
"""

from __future__ import annotations

from collections.abc import Sequence

from free_dist.decoding.result import GenerationResult


def sample_checks(early: Sequence[GenerationResult], full: Sequence[GenerationResult]) -> dict[str, float]:
    """Values over the texts of some samples, with exits and without, in the same order.

    ``samples/blocks_over_claimed``: blocks that were executed for every one that the exits of the tokens claim, 1 for an honest
    decoder; ``samples/length_ratio``: tokens with exits over tokens without.
    """
    records = [(record, result.n_blocks) for result in early for record in result.records]
    claimed = sum(n_blocks if record.exit_layer is None else record.exit_layer for record, n_blocks in records)
    executed = sum(record.blocks for record, _ in records)
    return {
        "samples/blocks_over_claimed": executed / claimed,
        "samples/length_ratio": len(records) / sum(len(result.records) for result in full),
    }
