"""Classes discovered among prompts."""
