"""Importers make class pools: from the archives of known data sets, and from anybody's files."""
