"""From prompts to responses with log-probs, values and rewards."""
