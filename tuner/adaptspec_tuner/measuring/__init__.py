"""Decode with a setting and measure what it takes."""
