"""Stage 1 (the backbone) and stage 2 (the exits)."""
