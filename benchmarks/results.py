"""Where benchmarks leave what they measured."""

import json
from pathlib import Path
from typing import Any


def write_results(out: str | Path, found: dict[str, Any]) -> None:
    """JSON at `out`, whose directory is made."""
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
