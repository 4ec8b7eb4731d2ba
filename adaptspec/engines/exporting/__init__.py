"""Turns what was measured of an engine into what starts it."""
