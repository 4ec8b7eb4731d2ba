"""Several strategies' candidates merged in one tree."""
