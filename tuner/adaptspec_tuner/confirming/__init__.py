"""Finalists decoded on held-out prompts."""
