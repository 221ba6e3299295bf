"""What a run keeps on disk: checkpoints, metrics, samples, state."""
