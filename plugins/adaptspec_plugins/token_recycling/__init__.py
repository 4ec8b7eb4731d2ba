"""The tokens the model found likely after each token before."""
