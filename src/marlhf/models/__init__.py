"""Policy, critic and reward classifiers: building, loading, adapters."""
