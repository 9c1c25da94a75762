"""`metadist adapt`."""

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from metadist.commands.output import invert_option, json_option, print_json, result_console
from metadist.commands.support import read_support

if TYPE_CHECKING:
    from metadist.adaptation import AdaptedModel
    from metadist.cross_validation import CrossValidation
    from metadist.tasks.labelled_files import LabelledExamples


@click.command()
@click.argument("run")
@click.option("--support", required=True, metavar="FILE|DIR", help="Labelled examples: images, Parquet or CSV.")
@click.option("--query", metavar="FILE|DIR", help="Examples to predict; where they have labels, these are compared.")
@click.option("--steps", type=click.IntRange(min=0), help="Inner steps; left out, cross-validation chooses them.")
@click.option("--step", type=click.IntRange(min=0), help="The checkpoint of this outer step, instead of the newest.")
@click.option("--predictions", metavar="FILE.csv", help="Where predictions for the query examples are written.")
@click.option(
    "--out", metavar="FILE|DIR", help="Export the model: NAME.onnx, NAME.pt2, or a directory for safetensors and JSON."
)
@invert_option
@json_option
def adapt(
    run: str,
    support: str,
    query: str | None,
    steps: int | None,
    step: int | None,
    predictions: str | None,
    out: str | None,
    invert: bool,
    as_json: bool,
) -> None:
    """Adapt RUN's model to your own examples, and predict others.

    Examples are a directory of images (one directory a class; images without classes for --query), or a
    Parquet or CSV file with the column `class` (in regression `target`).
    """
    from metadist.adaptation import load
    from metadist.errors import UserError
    from metadist.tasks.labelled_files import read_labelled

    if predictions and not query:
        raise UserError("--predictions needs --query, the examples to predict. Add it.")
    loaded = load(run, step=step)
    x, y = read_support(loaded, support, invert)
    model = loaded.adapt(x, y, steps=steps)
    asked = read_labelled(query, loaded.spec, invert=invert) if query else None
    rows = _predictions(model, asked) if asked else []
    if predictions:
        _write(rows, Path(predictions))
    if out:
        from metadist.export import export_model

        export_model(model, out, inverted=invert)
    expected = loaded.expected_accuracy(model) if model.cross_validation is None else None
    result = {
        "run_dir": loaded.location,
        "step": loaded.step,
        "batch_norm": model.network.policy if model.network.batch_norms else None,
        "classes": {str(name): int((y == name).sum()) for name in model.classes_},
        "support_examples": len(x),
        "inner_steps": model.steps,
        "cross_validation": model.cross_validation.as_dict() if model.cross_validation else None,
        "expected_accuracy": expected.as_dict() if expected else None,
        "temperature": model.temperature,
        "query_examples": len(rows),
        "query_score": model.score(asked.x, asked.y) if asked and asked.y is not None else None,
        "predictions": rows,
        "exported": out,
    }
    if as_json:
        print_json(result)
        return
    _show(model, result, predictions)
    if out:
        click.echo(f"exported     {out}")


def _predictions(model: "AdaptedModel", asked: "LabelledExamples") -> list[dict[str, Any]]:
    predicted = model.predict(asked.x)
    if not len(model.classes_):
        return [
            {"example": name, "prediction": value.tolist()} for name, value in zip(asked.names, predicted, strict=True)
        ]
    shares = model.predict_proba(asked.x).max(1)
    return [
        {"example": name, "prediction": str(label), "probability": float(share)}
        for name, label, share in zip(asked.names, predicted, shares, strict=True)
    ]


def _write(rows: list[dict[str, Any]], path: Path) -> None:
    from metadist.files import replacing, writing

    with writing(str(path)), replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def _show(model: "AdaptedModel", result: dict[str, Any], predictions: str | None) -> None:
    from rich.table import Table

    console = result_console()
    classes = result["classes"]
    if classes:
        shots = sorted(set(classes.values()))
        shown = f"{shots[0]}" if len(shots) == 1 else f"{shots[0]} to {shots[-1]}"
        console.print(f"adapted to {len(classes)} classes of {shown} example{'s' * (shots[-1] > 1)}", end="")
    else:
        console.print(f"adapted to {result['support_examples']} examples", end="")
    console.print(f", {result['inner_steps']} inner step{'s' * (result['inner_steps'] != 1)}")
    console.print(_trust(model.cross_validation, result["expected_accuracy"], bool(classes)))
    if result["query_score"] is not None:
        name = "accuracy" if classes else "R²"
        score = f"{result['query_score']:.2%}" if classes else f"{result['query_score']:.4f}"
        console.print(f"{name} on the {result['query_examples']} query examples: {score}")
    if predictions:
        console.print(f"predictions  {predictions}")
    elif result["predictions"]:
        table = Table("example", "prediction", "probability" if classes else "")
        for row in result["predictions"][:20]:
            value = row["prediction"] if classes else f"{row['prediction']}"
            table.add_row(row["example"], value, f"{row['probability']:.1%}" if classes else "")
        console.print(table)
        if len(result["predictions"]) > 20:
            console.print(f"and {len(result['predictions']) - 20} more: --predictions FILE.csv or --json has all")


def _trust(found: "CrossValidation | None", expected: dict[str, Any] | None, classes: bool) -> str:
    """What cross-validation says, in words; without it, what tasks of held-out classes let expect."""
    if found is None:
        said = "no estimate from these examples is possible: that takes a second one of some class."
        if expected is None:
            return f"{said} Give more examples, or a --query with labels."
        low, high = expected["range"]
        return (
            f"{said}\n{expected['tasks']} tasks of the run's validation classes with as many ways and shots had"
            f" {expected['mean']:.1%} on average, 95 % of them {low:.1%} to {high:.1%}; yours may be harder or easier"
        )
    way = "leaving out one example after another" if found.folds == found.scored else f"{found.folds}-fold"
    if not classes:
        return f"R² of {found.score:.4f} on the support set, cross-validated ({way})"
    assert found.interval is not None
    low, high = found.interval
    left = f"; {found.unscored} that are alone in their class cannot be left out" if found.unscored else ""
    return (
        f"cross-validated accuracy on the support set: {found.score:.1%}, 95 % interval {low:.1%} to {high:.1%}"
        f" ({way}{left})"
    )
