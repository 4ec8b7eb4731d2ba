"""Score settings on recorded answers, without the target's forward passes."""
