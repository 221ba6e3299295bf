"""Sampling seeds, which fix the noise of each response."""

EVAL_STEP = -1
"""The step for the noise of held-out responses, the same at every evaluation."""


def row_seed(seed: int, step: int, row_id: int) -> int:
    """A well-mixed 63-bit seed for one response of one step (splitmix64 over the three)."""
    state = 0
    for part in (seed, step, row_id):
        state = (state ^ (part & 0xFFFFFFFFFFFFFFFF)) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1
