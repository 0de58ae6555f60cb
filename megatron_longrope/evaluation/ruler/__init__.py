"""RULER: its thirteen tasks, samples of any length, and how answers are scored."""
