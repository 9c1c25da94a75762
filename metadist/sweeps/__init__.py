"""Sweeps over a config's keys: their files, points, trials and records, without Ray; `metadist/tuning/` runs them."""
