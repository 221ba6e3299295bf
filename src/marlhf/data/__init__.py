"""From files to prompts, demonstrations and preference pairs."""
