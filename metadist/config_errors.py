"""What is wrong with a config, in sentences: key, rule, value, place, remedy."""

import dataclasses
import difflib
import math
from collections.abc import Sequence
from typing import Any

import yaml
from pydantic import ValidationError

from metadist.config_file import Document
from metadist.core.settings import keys_of


def explain(document: Document, section: str, kind: type, error: ValidationError) -> list[str]:
    """One sentence a wrong key, out of pydantic's errors (several for one key where a union is allowed)."""
    rules: dict[tuple[str | int, ...], list[str]] = {}
    for item in error.errors():
        path = document.existing((section, *item["loc"]), item["type"])
        if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            valid = ["name"] * (section in ("task", "model", "algorithm")) + _fields_at(kind, path[1:-1])
            rules[path] = [unknown_key(document, path, valid)]
        elif item["type"] == "value_error":
            # A rule about several keys, whose text begins with the one to change.
            name, _, rule = str(item["ctx"]["error"]).partition(" ")
            key = _dotted((*path, name))
            rules[path] = [f"{key} {document.placed(key, rule)}"]
        elif item["type"] == "missing":
            rules[path] = [f"{_dotted(path)} must be given{document.place(path[:-1])}. Add it."]
        else:
            rules.setdefault(path, []).append(_rule(item))
    messages = []
    for path, found in rules.items():
        if found[0].startswith(_dotted(path)):
            messages.append(found[0])
            continue
        value = document.value(path)
        messages.append(
            f"{_dotted(path)} must be {' or '.join(dict.fromkeys(found))}, got {_shown(value)}"
            f"{document.place(path)}.{_try(value, found)}"
        )
    return messages


def _rule(item: Any) -> str:
    context = {key: f"{value:g}" if isinstance(value, float) else value for key, value in item.get("ctx", {}).items()}
    simple = {
        "greater_than": "> {gt}",
        "greater_than_equal": ">= {ge}",
        "less_than": "< {lt}",
        "less_than_equal": "<= {le}",
        "finite_number": "a finite number",
        "literal_error": "{expected}",
        "too_long": "a list of {max_length} values",
        "too_short": "a list of at least {min_length} values",
    }
    if item["type"] in simple:
        text = simple[item["type"]].format(**context)
        return f"one of {text}" if item["type"] == "literal_error" else text
    kinds = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "text"}
    kinds |= {"tuple": "a list", "dict": "a section of keys", "dataclass": "a section of keys", "none": "left out"}
    return kinds.get(item["type"].split("_")[0], item["msg"][:1].lower() + item["msg"][1:])


def _try(value: Any, rules: list[str]) -> str:
    if any(rule.startswith("one of") for rule in rules):
        return " Choose one of these."
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        if any(rule.startswith(">") for rule in rules):
            return f" Try {-value}." if value < 0 else " Raise it."
        if any(rule.startswith("<") for rule in rules):
            return " Lower it."
        if "a whole number" in rules:
            return f" Try {round(value)}."
        if "text" in rules:
            return f" Write '{value}' in quotes."
    if isinstance(value, str) and any("number" in rule for rule in rules):
        try:
            return f" Write {yaml.safe_load(repr(float(value)))!r} without quotes."
        except ValueError:
            return " Write a number."
    return " Write a value, or leave the key out." if value is None else " Correct it."


def _fields_at(kind: type, path: Sequence[str | int]) -> list[str]:
    for part in path:
        kinds = {f.name: f.type for f in dataclasses.fields(kind)}
        kind = kinds[str(part)]  # type: ignore[assignment]
    return list(keys_of(kind).values())


def unknown_key(document: Document, path: tuple[str | int, ...], valid: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(path[-1]), valid, n=1, cutoff=0.5)
    hint = f"Did you mean {_dotted((*path[:-1], near[0]))}?" if near else f"Valid here: {', '.join(valid)}."
    return f"{_dotted(path)} is not a known key{document.place(path)}. {hint}"


def _dotted(path: Sequence[str | int]) -> str:
    return ".".join(map(str, path))


def _shown(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) < 80 else text[:77] + "..."
