"""Drafts of a smaller model with the target's vocabulary."""
