"""Inference engines: what runs the models, each measured and tuned the same way."""
