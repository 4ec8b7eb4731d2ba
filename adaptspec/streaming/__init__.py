"""Output while it is decoded, and what a request comes to in the end."""
