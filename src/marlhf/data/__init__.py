"""Loads prompts, demonstrations and preference pairs from files and the hub."""
