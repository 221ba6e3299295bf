"""Files of a run: checkpoints, metrics, samples, state."""
