"""Turns measured ratios into choices: pure functions over all classes of a tune."""
