"""`marlhf estimate`: the memory that a run needs, from configurations alone."""
