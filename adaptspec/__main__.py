"""``python -m adaptspec``."""

from adaptspec.cli import main

main()
