"""Drafts of a smaller model with another tokenizer."""
