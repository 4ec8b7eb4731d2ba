"""Choosing between a class's finalists by what requests really take."""
