"""YAML documents that remember the line of each key, so that an error can say where it is."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from metadist.errors import ConfigError

KeyPath = tuple[str | int, ...]

MAX_BYTES, MAX_VALUES, MAX_DEPTH = 2**20, 20_000, 32
"""Of a document; far more than any config has. Values are counted where they are used, aliases (`*name`) included."""


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-3 as a number and 2024-05-01 as text, as YAML 1.2 does and everybody expects."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


@dataclass
class Document:
    """A config's data and where each key was written."""

    file: str
    data: dict[str, Any]
    lines: dict[KeyPath, int]
    overridden: set[KeyPath]

    def place(self, path: KeyPath) -> str:
        """` (file, line n)` of a key or of the nearest section around it that was written."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.overridden:
                return " (--set)"
            if path[:length] in self.lines:
                return f" ({self.file}, line {self.lines[path[:length]]})"
            if any(overridden[:length] == path[:length] for overridden in self.overridden):
                return " (--set)"
        return f" ({self.file})"

    def placed(self, key: str, rule: str) -> str:
        """A rule's sentence with the key's place before its remedy."""
        sentence, dot, remedy = rule.partition(". ")
        return sentence + self.place(tuple(key.split("."))) + dot + remedy

    def value(self, path: KeyPath) -> Any:
        """What stands at `path`, None where nothing does."""
        value: Any = self.data
        for part in path:
            try:
                value = value[part]
            except (KeyError, IndexError, TypeError):
                return None
        return value

    def existing(self, path: KeyPath, kind: str) -> KeyPath:
        """The part of a checker's path that names keys of this document (a missing key counts)."""
        value: Any = self.data
        for length, part in enumerate(path):
            try:
                value = value[part]
            except (KeyError, IndexError, TypeError):
                return path[: length + 1] if kind == "missing" else path[:length]
        return path

    def override(self, assignment: str) -> None:
        """Applies `section.key=value`, the value written as in YAML."""
        key, equals, text = assignment.partition("=")
        path = tuple(key.strip().split("."))
        if not equals or len(path) < 2 or not all(path):
            raise ConfigError(
                f"--set takes section.key=value, got {assignment!r}. For example: --set training.steps=3000."
            )
        try:
            loader, node = _composed(text, f"--set {key}")
            value = _plain(None if node is None else loader.construct_document(node), f"--set {key}")
        except (yaml.YAMLError, RecursionError) as error:
            raise ConfigError(
                f"--set {key}: {text!r} is not a YAML value ({_problem(error)}). Check its brackets and quotes."
            ) from None
        section: Any = self.data
        for part in path[:-1]:
            if section.get(part) is None:
                section[part] = {}
            section = section[part]
            if not isinstance(section, dict):
                raise ConfigError(f"--set {key}: {part} is a value, not a section of keys. Shorten the key.")
        section[path[-1]] = value
        self.overridden.add(path)
        self.lines = {place: line for place, line in self.lines.items() if place[: len(path)] != path}


def read_document(path: str) -> Document:
    """Reads one YAML mapping of sections. Raises ConfigError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file. Give the path of a YAML file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a readable text file ({error}). Give the path of a YAML file.") from None
    return parse_document(text, path)


def parse_document(text: str, file: str) -> Document:
    """The document in `text`; `file` is what errors call it."""
    lines: dict[KeyPath, int] = {}
    try:
        loader, node = _composed(text, file)
        if node is not None:
            _walk(node, (), lines, file)
        data = None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, RecursionError) as error:
        line = _line(error, text)
        raise ConfigError(
            f"{file}{f', line {line}' if line else ''}: not valid YAML ({_problem(error)})."
            " Check indentation and quotes there."
        ) from None
    if not isinstance(data, dict):
        raise ConfigError(
            f"{file}: a config is a mapping of sections (task, model, algorithm, ...), got"
            f" {'nothing' if data is None else type(data).__name__}. Start from a file in configs/."
        )
    return Document(file, _plain(data, file), lines, set())


def read_plain_yaml(text: str, file: str) -> Any:
    """Plain YAML's value, within a config's limits. Raises yaml.YAMLError, or ConfigError beyond them."""
    loader, node = _composed(text, file)
    return None if node is None else loader.construct_document(node)


def _composed(text: str, file: str) -> tuple[_Loader, yaml.Node | None]:
    """A document's nodes, before values are made of them; refused where an alias makes many of few."""
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{file}: holds {len(text)} characters, and a config at most {MAX_BYTES}. Is it a config?")
    loader = _Loader(text)
    node = loader.get_single_node()
    if node is not None:
        _count(node, 0, file, {})
    return loader, node


def _count(node: yaml.Node, depth: int, file: str, known: dict[int, int]) -> int:
    """Values below a node, each counted as often as aliases use it. Raises ConfigError, RecursionError."""
    if depth > MAX_DEPTH:
        raise RecursionError
    if id(node) in known:
        return known[id(node)]
    if isinstance(node, yaml.ScalarNode):
        return 1
    children = [child for pair in node.value for child in (pair if isinstance(pair, tuple) else (pair,))]
    count = 1 + sum(_count(child, depth + 1, file, known) for child in children)
    if count > MAX_VALUES:
        raise ConfigError(
            f"{file}, line {node.start_mark.line + 1}: holds more than {MAX_VALUES} values, aliases counted where they"
            " are used. Write them out, and fewer."
        )
    known[id(node)] = count
    return count


def _line(error: Exception, text: str) -> int | None:
    if isinstance(error, yaml.reader.ReaderError):
        return text.count("\n", 0, error.position) + 1
    mark = getattr(error, "problem_mark", None)
    return mark.line + 1 if mark else None


def _problem(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "a section that holds itself, or too many brackets"
    if isinstance(error, yaml.reader.ReaderError):
        return f"the character {error.character:#04x} is no text"
    return str(getattr(error, "problem", None) or error)


def _walk(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], file: str) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"{file}, line {line}: a key must be text, got a list or a section. Name the key.")
            inner = (*path, key.value)
            if inner in lines:
                raise ConfigError(
                    f"{'.'.join(map(str, inner))} is written twice ({file}, lines {lines[inner]} and {line})."
                    " Keep one of them."
                )
            lines[inner] = line
            _walk(value, inner, lines, file)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*path, index)] = value.start_mark.line + 1
            _walk(value, (*path, index), lines, file)


def _plain(value: Any, file: str) -> Any:
    """Checks that a value holds only what JSON has: dates and binary values are mistakes in a config."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        raise ConfigError(f"{file}: holds a value that is no text, number, list or section. Quote dates.") from None


def dump_yaml(data: Any) -> str:
    """Plain values as YAML, keys in their order."""
    text: str = yaml.safe_dump(data, sort_keys=False, default_flow_style=None, allow_unicode=True)
    return text
