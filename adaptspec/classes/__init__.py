"""Finds the class that a prompt belongs to."""
