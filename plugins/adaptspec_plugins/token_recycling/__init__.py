"""Token recycling: drafts tokens that the model found likely after each token."""
