"""Sends each request to the server that is fastest for the class of its prompt."""
