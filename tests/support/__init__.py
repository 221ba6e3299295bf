"""What several tests use: tiny models, oracles, launches, servers."""
