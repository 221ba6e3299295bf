"""`marlhf estimate`: the memory of a run, from configurations alone."""
