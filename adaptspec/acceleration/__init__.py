"""Faster CPU operations; decoding also runs without them."""
