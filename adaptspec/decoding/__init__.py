"""The decoding core: one loop, one verification, for every strategy."""
