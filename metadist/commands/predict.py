"""`metadist predict`."""

from typing import Any

import click

from metadist.commands.output import json_option, print_json, result_console

SHOWN = 20
"""Predictions that the table shows; --json has all."""


@click.command()
@click.argument("model")
@click.argument("file", metavar="FILE|DIR")
@click.option(
    "--invert/--no-invert",
    default=None,
    help="Whether to take the images' negatives; left out, as `metadist adapt --out` was told.",
)
@json_option
def predict(model: str, file: str, invert: bool | None, as_json: bool) -> None:
    """Predict the examples of FILE with MODEL, an exported .onnx or .pt2 file, on one core.

    Examples are as those of `metadist adapt --query`. Where they have labels, these are compared.
    """
    from metadist.exported import load_exported
    from metadist.tasks.labelled_files import read_labelled

    loaded = load_exported(model)
    asked = read_labelled(file, loaded.spec, invert=loaded.is_inverted if invert is None else invert)
    outputs, labels = loaded.outputs(asked.x), loaded.described["labels"]
    rows: list[dict[str, Any]]
    if labels:
        rows = [
            {"example": name, "prediction": labels[row.argmax()], "probability": float(row.max())}
            for name, row in zip(asked.names, outputs, strict=True)
        ]
    else:
        rows = [{"example": name, "prediction": row.tolist()} for name, row in zip(asked.names, outputs, strict=True)]
    accuracy = None
    if labels and asked.y is not None:
        right = sum(str(row["prediction"]) == str(label) for row, label in zip(rows, asked.y, strict=True))
        accuracy = right / len(rows)
    result = {
        "model": model,
        "size_bytes": loaded.size_bytes,
        "latency_ms": 1000 * loaded.latency_s(asked.x[:1]),
        "accuracy": accuracy,
        "predictions": rows,
    }
    if as_json:
        print_json(result)
        return
    _show(result)


def _show(result: dict[str, Any]) -> None:
    from rich.table import Table

    rows, has_shares = result["predictions"], "probability" in result["predictions"][0]
    table = Table("example", "prediction", *(["probability"] if has_shares else []))
    for row in rows[:SHOWN]:
        table.add_row(row["example"], str(row["prediction"]), *([f"{row['probability']:.1%}"] if has_shares else []))
    console = result_console()
    console.print(table)
    if len(rows) > SHOWN:
        console.print(f"and {len(rows) - SHOWN} more: --json has all")
    if result["accuracy"] is not None:
        console.print(f"accuracy on {len(rows)} examples: {result['accuracy']:.2%}")
    console.print(
        f"one example takes {result['latency_ms']:.3f} ms on one core; the file has {result['size_bytes']:,} bytes"
    )
