"""Prompts -> responses with log-probs, values and rewards."""
