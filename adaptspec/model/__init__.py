"""The language model: its forward passes, cache, masks, weights and costs."""
