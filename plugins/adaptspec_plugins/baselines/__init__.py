"""Other engines' decoding, measured beside ours."""
