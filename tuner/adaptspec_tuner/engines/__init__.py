"""Tunes of other inference engines, with the same search, statistics and store."""
