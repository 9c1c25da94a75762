"""The report of a run. Numbers: `findings` and what it gathers; sentences: `advice`; HTML and SVG: `page`, `charts`."""
