"""Inference engines, ours and others', that are measured and tuned alike."""
