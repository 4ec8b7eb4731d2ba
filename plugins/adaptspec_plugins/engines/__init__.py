"""Inference engines that can be tuned and compared."""
