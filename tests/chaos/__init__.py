"""Runs that everything goes wrong in: `python -m tests.chaos`."""
