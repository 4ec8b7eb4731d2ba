"""Inference engines that are tuned and compared: ours, and those people serve with."""
