"""Which class a prompt belongs to."""
