"""Output for people: the terminal, HTML pages, charts, reports."""
