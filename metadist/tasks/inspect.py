"""What a class pool holds, and which episodes can be drawn from it."""

import hashlib
import json
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from metadist.core.keys import SPLITS
from metadist.tasks.class_pool import ClassPool, read_pool


def inspect_pool(path: str) -> dict[str, Any]:
    """Reads and checks a pool, and describes it in values that JSON knows."""
    pool = read_pool(path)
    shape = pool.examples.shape[1:]
    return {
        "pool": path,
        "kind": "images" if pool.is_images else "vectors",
        "shape": list(shape),
        "examples": len(pool.examples),
        "classes": len(pool.classes),
        "content_sha256": content_digest(pool),
        "splits": {
            split: _describe_split(pool, ids, turns=4 if pool.is_images and shape[1] == shape[2] else 1)
            for split, ids in pool.class_ids.items()
        },
    }


def _describe_split(pool: ClassPool, ids: np.ndarray, turns: int) -> dict[str, Any]:
    sizes = pool.sizes()[ids]

    def extreme(position: int) -> dict[str, Any]:
        return {"name": pool.classes[ids[position]], "examples": int(sizes[position])}

    return {
        "classes": len(ids),
        "examples": int(sizes.sum()),
        "superclasses": len({pool.superclasses[index] for index in ids} - {None}),
        "smallest_class": extreme(int(np.argmin(sizes))) if len(ids) else None,
        "largest_class": extreme(int(np.argmax(sizes))) if len(ids) else None,
        "max_ways": len(ids),
        "max_ways_with_rotations": turns * len(ids),
        "max_shots_plus_queries": int(sizes.min()) if len(ids) else 0,
    }


def content_digest(pool: ClassPool) -> str:
    """Sha256 over each class, sorted by name: a JSON line `[name, split, dtype, shape]`, then its values.

    Pools of one digest give the same episodes, however their images are encoded; superclasses, from which
    nothing is drawn, do not count.
    """
    digest = hashlib.sha256()
    for index, (name, split) in enumerate(zip(pool.classes, pool.splits, strict=True)):
        examples = pool.examples[pool.starts[index] : pool.starts[index + 1]]
        little_endian = np.ascontiguousarray(examples, dtype=examples.dtype.newbyteorder("<"))
        digest.update((json.dumps([name, split, little_endian.dtype.str, list(examples.shape)]) + "\n").encode())
        digest.update(little_endian.data)
    return digest.hexdigest()


def render(summary: dict[str, Any]) -> RenderableType:
    """What `inspect_pool` gave, as tables for people."""
    head = Table.grid(padding=(0, 2))
    head.add_row("pool", Text(summary["pool"]))
    head.add_row("kind", f"{summary['kind']}, {' x '.join(map(str, summary['shape']))}")
    head.add_row("holds", f"{summary['examples']:,} examples of {summary['classes']:,} classes")
    head.add_row("content", f"sha256 {summary['content_sha256']}")
    table = Table(Column("", no_wrap=True), *(Column(split, overflow="fold") for split in SPLITS))
    for words, name in (
        ("classes", "classes"),
        ("superclasses", "superclasses"),
        ("examples", "examples"),
        ("smallest class", "smallest_class"),
        ("largest class", "largest_class"),
        ("ways at most", "max_ways"),
        ("... with rotate_classes", "max_ways_with_rotations"),
        ("shots + queries at most", "max_shots_plus_queries"),
    ):
        table.add_row(words, *(_words(summary["splits"][split][name]) for split in SPLITS))
    return Group(head, table)


def _words(value: int | dict[str, Any] | None) -> Text:
    if isinstance(value, dict):
        return Text(f"{value['examples']:,} ({value['name']})")
    return Text("none" if value is None else f"{value:,}")
