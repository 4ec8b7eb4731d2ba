"""Suffix decoding: copies what most often followed the same ending."""
