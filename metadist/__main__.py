"""`python -m metadist`."""

from metadist.cli import main

main()
