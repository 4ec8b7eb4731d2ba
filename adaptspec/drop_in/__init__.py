"""Decoding in place of transformers' ``generate``, with the arguments it is given."""
