"""Faster operations; decoding runs without them, too."""
