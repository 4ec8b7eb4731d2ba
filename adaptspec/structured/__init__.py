"""Output in a language: JSON of a schema, a regular expression, a grammar.

llguidance (https://github.com/guidance-ai/llguidance) keeps the languages; the extra
``structured`` installs it.
"""
