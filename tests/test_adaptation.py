"""From a run to a person's own data: adapting, predicting, and how far to trust it."""

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from PIL import Image
from torch import nn

from metadist import MetaTrainer, load
from metadist.algorithms import MAML, R2D2, ProtoNet
from metadist.cli import cli
from metadist.core.episode import Examples
from metadist.core.keys import TaskKey
from metadist.cross_validation import _temperature, wilson
from metadist.errors import DataError
from metadist.models import MLP, Conv4
from metadist.sections import EvaluationSettings, RunSettings, TrainingSettings
from metadist.similarity import similarity
from metadist.tasks import FewShot
from metadist.tasks.class_pool import PoolRow, write_pool
from metadist.tasks.labelled_files import read_labelled
from tests.builders import tiny_config

FEATURES = 4
CENTRES = np.random.default_rng(0).normal(size=(12, FEATURES)) * 6
NAMES = np.array(["ant", "bee", "cat"])


def points(classes, number, seed=1):
    """`number` points around the centre of each class: `x: [classes * number, FEATURES]`, class by class."""
    random = np.random.default_rng(seed)
    return np.concatenate([CENTRES[c] + random.normal(size=(number, FEATURES)) for c in classes]).astype(np.float32)


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    """A pool of vectors, four classes a split."""
    path = tmp_path_factory.mktemp("pool") / "vectors.parquet"
    rows = [
        PoolRow(f"{split}{c}", None, split, features=x.tolist())
        for number, split in enumerate(("train", "val", "test"))
        for c in range(4 * number, 4 * number + 4)
        for x in points([c], 8, seed=c)
    ]
    write_pool(rows, path)
    return str(path)


def trained(directory: Path, pool: str, algorithm, model=None, **training) -> str:
    config = tiny_config(
        task=FewShot(pool=pool, ways=3, shots=2, queries=3),
        model=model or MLP(hidden=(8,)),
        algorithm=algorithm,
        training=TrainingSettings(**{"steps": 4, "meta_batch_size": 4, "chunk_size": 2, "compile": False, **training}),
        evaluation=EvaluationSettings(episodes=2),
        run=RunSettings(name="run", storage_path=str(directory)),
    )
    return MetaTrainer(config).fit(evaluate=False).run_dir


@pytest.fixture(scope="module")
def maml(vectors, tmp_path_factory):
    return load(trained(tmp_path_factory.mktemp("maml"), vectors, MAML(inner_lr=0.1, inner_steps=3)))


@pytest.fixture(scope="module")
def proto_net(vectors, tmp_path_factory):
    return load(trained(tmp_path_factory.mktemp("proto_net"), vectors, ProtoNet()))


def by_hand(run, x, y, steps, new):
    """Outputs for `new` after plain SGD with torch.autograd on a module of its own."""
    module = nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, 3))
    torch.nn.utils.vector_to_parameters(run.theta.clone(), module.parameters())
    for _ in range(steps):
        gradients = torch.autograd.grad(F.cross_entropy(module(torch.tensor(x)), torch.tensor(y)), module.parameters())
        with torch.no_grad():
            for parameter, gradient in zip(module.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
    return module(torch.tensor(new)).detach().numpy()


def test_adapting_is_plain_gradient_descent_and_labels_stay_the_users_own(maml):
    x, y = points([9, 8, 10], 2), np.repeat([1, 0, 2], 2)
    new = points([8, 9, 10], 5, seed=2)
    model = maml.adapt(x, NAMES[y], steps=3)
    np.testing.assert_array_equal(model.classes_, NAMES)
    expected = by_hand(maml, x, y, 3, new)
    np.testing.assert_allclose(model.decision_function(new), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(model.predict(new), NAMES[expected.argmax(1)])
    assert model.score(new, model.predict(new)) == 1.0
    scaled = torch.tensor(expected / model.temperature).softmax(1)
    np.testing.assert_allclose(model.predict_proba(new), scaled, rtol=1e-3, atol=1e-5)


def test_prototypes_take_any_number_of_classes_and_unequal_shots(proto_net):
    classes, shots = [0, 3, 5, 8, 11], [1, 2, 3, 4, 5]
    x = np.concatenate([points([c], number, seed=c) for c, number in zip(classes, shots, strict=True)])
    y = np.repeat([10, 20, 30, 40, 50], shots)
    model = proto_net.adapt(x, y)
    new = points(classes, 6, seed=3)
    meta = proto_net.experiment.theta.unflatten(proto_net.theta)

    def embed(inputs):
        return proto_net.experiment.network.bind(proto_net.statistics, training=False).outputs(
            meta, torch.tensor(inputs)
        )

    prototypes = torch.stack([embed(x[y == label]).mean(0) for label in (10, 20, 30, 40, 50)])
    nearest = torch.cdist(embed(new), prototypes).argmin(1)
    np.testing.assert_array_equal(model.predict(new), np.array([10, 20, 30, 40, 50])[nearest])
    assert model.score(new, np.repeat([10, 20, 30, 40, 50], 6)) > 0.8
    # The class with one example cannot be left out.
    assert (model.cross_validation.scored, model.cross_validation.unscored) == (14, 1)


def test_a_head_with_more_outputs_than_classes_never_predicts_the_others(maml):
    model = maml.adapt(points([8, 9], 4), np.repeat(["left", "right"], 4), steps=0)
    assert model.predict_proba(points([10], 50)).shape == (50, 2)
    assert set(model.predict(points([10, 11, 0, 1], 50))) <= {"left", "right"}


@pytest.mark.parametrize("policy", ["transductive", "support", "running"])
def test_an_example_is_predicted_the_same_alone_and_among_others(tmp_path, policy):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (3, 6, 16, 16), np.uint8)
    directory = tmp_path / "pool"
    rows = []
    for split in ("train", "val", "test"):
        for c in range(3):
            for number in range(6):
                file = directory / f"{split}{c}_{number}.png"
                file.parent.mkdir(exist_ok=True)
                Image.fromarray(images[c, number]).save(file)
                rows.append(PoolRow(f"{split}{c}", None, split, image=file.read_bytes()))
    write_pool(rows, tmp_path / "pool.parquet")
    run = load(
        trained(
            tmp_path, str(tmp_path / "pool.parquet"), MAML(inner_lr=0.1), Conv4(filters=4), batch_norm=policy, steps=2
        )
    )
    # Five examples, where the spec has six; statistics are theirs.
    model = run.adapt(images[:, :2].reshape(6, 16, 16)[:5], [0, 0, 1, 1, 2])
    new = images[:, 2:].reshape(-1, 1, 16, 16)
    alone = np.concatenate([model.decision_function(image[None]) for image in new])
    np.testing.assert_allclose(model.decision_function(new), alone, rtol=1e-4, atol=1e-5)
    if policy != "running":
        # Independently: torch's own batch norm over support set and example together would see the example; the
        # statistics of the support set alone are those of a network whose spec has five support examples.
        shifted = model.run.adapt(images[:, 2:4].reshape(6, 16, 16)[:5], [0, 0, 1, 1, 2])
        assert not np.allclose(shifted.decision_function(new), alone, atol=1e-3)


def test_leave_one_out_is_a_loop_over_models_that_did_not_see_the_example(maml):
    x, y = points([8, 9, 10], 3), np.repeat([0, 1, 2], 3)
    found = maml.adapt(x, NAMES[y]).cross_validation
    losses = np.zeros(4)
    right = np.zeros(4)
    for out in range(9):
        kept = np.arange(9) != out
        for steps in range(4):
            outputs = torch.tensor(by_hand(maml, x[kept], y[kept], steps, x[[out]]))
            losses[steps] += F.cross_entropy(outputs, torch.tensor([y[out]])).item() / 9
            right[steps] += int(outputs.argmax()) == y[out]
    np.testing.assert_allclose(found.loss_per_step, losses, rtol=1e-4)
    assert found.steps == losses.argmin()
    assert found.score == right[found.steps] / 9
    assert (found.folds, found.scored, found.unscored) == (9, 9, 0)


def test_larger_sets_are_cut_into_folds_of_which_none_takes_a_whole_class(proto_net):
    shots = [2, 3, 95]
    y = np.repeat([0, 1, 2], shots)
    x = np.concatenate([points([c], number) for c, number in zip([8, 9, 10], shots, strict=True)])
    shuffled = np.random.default_rng(0).permutation(100)
    found = proto_net.adapt(x[shuffled], y[shuffled]).cross_validation
    assert (found.folds, found.scored) == (10, 100)
    assert found.score > 0.9  # A class that a fold had taken whole would have no prototype, and NaN everywhere.
    assert np.isfinite(found.loss_per_step).all()


def test_where_every_class_has_one_example_no_estimate_is_given(maml):
    model = maml.adapt(points([8, 9, 10], 1), NAMES)
    assert model.cross_validation is None
    assert model.steps == 3  # The config's own number.


def test_the_temperature_makes_confidence_equal_accuracy():
    # Of n examples with logits (a, -a) a share p is right: the likeliest T has sigmoid(2 a / T) = p. The prior's pull
    # vanishes with n.
    a, p, n = 4.0, 0.8, 10_000
    logits = torch.tensor([a, -a]).repeat(n, 1)
    targets = (torch.arange(n) >= p * n).long()
    assert _temperature(logits, targets) == pytest.approx(2 * a / math.log(p / (1 - p)), rel=0.01)
    # And three right answers are no reason to be certain.
    assert _temperature(logits[:3], targets[:3]) > 0.3


def test_wilson_interval_has_its_known_value():
    # (0.8 + 0.19208 -+ 1.96 sqrt(0.016 + 0.009604)) / 1.38416
    assert wilson(8, 10) == pytest.approx((0.49016, 0.94332), abs=1e-4)
    assert wilson(10, 10)[1] == 1.0


def test_regression_is_adapted_and_scored_too(tmp_path):
    config = tiny_config(
        run=RunSettings(name="run", storage_path=str(tmp_path)), evaluation=EvaluationSettings(episodes=2)
    )
    run = load(MetaTrainer(config).fit(evaluate=False).run_dir)
    x = np.linspace(-5, 5, 12, dtype=np.float32)[:, None]
    y = np.sin(x[:, 0])
    model = run.adapt(x, y)
    assert model.predict(x).shape == (12,)
    predicted = model.predict(x)
    expected = 1 - np.sum((y - predicted) ** 2) / np.sum((y - y.mean()) ** 2)
    assert model.score(x, y) == pytest.approx(expected, rel=1e-5)
    assert model.cross_validation.folds == 12
    with pytest.raises(Exception, match="predict_proba is for classification"):
        model.predict_proba(x)


def test_ridge_regression_adapts_in_one_go(vectors, tmp_path):
    run = load(trained(tmp_path, vectors, R2D2()))
    model = run.adapt(points([8, 9, 10, 11], 3), np.repeat(list("abcd"), 3))
    assert model.steps == 0
    assert model.score(points([8, 9, 10, 11], 9, seed=5), np.repeat(list("abcd"), 9)) > 0.8


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (
            np.zeros((3, 5)),
            [0, 1, 2],
            r"x must have the shape \['examples', 4\] that this run was trained on, got \[3, 5\]",
        ),
        (np.full((3, 4), np.nan), [0, 1, 2], "x holds NaN or infinity, first in example 0"),
        (np.array([["a"] * 4] * 3), [0, 1, 2], "x must hold numbers"),
        (np.zeros((3, 4)), [0, 1], "x has 3 examples and y has 2"),
        (np.zeros((3, 4)), [1, 1, 1], "has 1 class, and 2 or more are needed"),
        (np.zeros((4, 4)), [0, 1, 2, 3], "has 4 classes, and this run's model has 3 outputs"),
    ],
)
def test_data_that_do_not_fit_are_refused(maml, x, y, message):
    with pytest.raises(DataError, match=message):
        maml.adapt(x, y)


def test_the_command_reads_csv_writes_predictions_and_says_how_far_to_trust_them(proto_net, tmp_path):
    def write(name, x, y):
        with (tmp_path / name).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["f1", "f2", "f3", "f4", "class"])
            writer.writerows([*row, label] for row, label in zip(x.tolist(), y, strict=True))
        return str(tmp_path / name)

    support = write("support.csv", points([8, 9, 10], 3), np.repeat(NAMES, 3))
    query = write("query.csv", points([8, 9, 10], 4, seed=7), np.repeat(NAMES, 4))
    arguments = ["adapt", proto_net.location, "--support", support, "--query", query]
    found = CliRunner().invoke(cli, [*arguments, "--json"])
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout)
    model = proto_net.adapt(points([8, 9, 10], 3), np.repeat(NAMES, 3))
    new = points([8, 9, 10], 4, seed=7)
    assert [row["prediction"] for row in result["predictions"]] == model.predict(new).tolist()
    assert result["query_score"] == model.score(new, np.repeat(NAMES, 4))
    assert result["classes"] == {"ant": 3, "bee": 3, "cat": 3}
    out = tmp_path / "predictions.csv"
    shown = CliRunner().invoke(cli, [*arguments, "--predictions", str(out)])
    assert shown.exit_code == 0, shown.output
    assert "adapted to 3 classes of 3 examples" in shown.stdout
    assert "cross-validated accuracy on the support set" in " ".join(shown.stdout.split())
    with out.open() as file:
        assert [row["prediction"] for row in csv.DictReader(file)] == model.predict(new).tolist()


def test_a_directory_of_images_is_scaled_to_the_run(tmp_path, proto_net):
    spec = proto_net.spec
    image_spec = type(spec)(kind="classification", input_shape=(1, 4, 4), output_size=2, support_size=2, query_size=2)
    for name, value in (("dark", 10), ("light", 200)):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (9, 9), (value, value, value)).save(tmp_path / "images" / name / "1.png")
    found = read_labelled(str(tmp_path / "images"), image_spec)
    assert found.y.tolist() == ["dark", "light"]
    assert found.names == ["dark/1.png", "light/1.png"]
    np.testing.assert_array_equal(found.x, np.stack([np.full((1, 4, 4), value, np.uint8) for value in (10, 200)]))


def test_negatives_are_noticed_and_can_be_turned_round(tmp_path):
    random = np.random.default_rng(0)
    # Light strokes on dark ground, a fifth of each image.
    strokes = (random.random((6, 16, 16)) < 0.2).astype(np.uint8) * 255
    rows = []
    for split in ("train", "val", "test"):
        for c in range(3):
            for number in range(5):
                file = tmp_path / "stroke.png"
                Image.fromarray(np.roll(strokes[c], number, axis=0)).save(file)
                rows.append(PoolRow(f"{split}{c}", None, split, image=file.read_bytes()))
    write_pool(rows, tmp_path / "pool.parquet")
    model, pool = Conv4(filters=4), str(tmp_path / "pool.parquet")
    run = load(trained(tmp_path, pool, MAML(inner_lr=0.1), model, batch_norm="transductive", steps=1))
    for name in ("a", "b"):
        (tmp_path / "paper" / name).mkdir(parents=True)
        for number in range(2):
            Image.fromarray(255 - strokes[3 + number]).save(tmp_path / "paper" / name / f"{number}.png")
    arguments = ["adapt", run.location, "--support", str(tmp_path / "paper")]
    noticed = CliRunner().invoke(cli, arguments)
    assert noticed.exit_code == 0, noticed.output
    assert "look like negatives of those that the run was trained on" in noticed.stderr
    turned = CliRunner().invoke(cli, [*arguments, "--invert"])
    assert turned.exit_code == 0, turned.output
    assert "negatives" not in turned.stderr
    inverted = read_labelled(str(tmp_path / "paper"), run.spec, invert=True)
    np.testing.assert_array_equal(inverted.x[0, 0], strokes[3])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.csv", None, "no such file or directory"),
        ("empty.csv", "f1,f2,f3,f4,class\n", "holds no rows"),
        ("narrow.csv", "f1,f2,class\n1,2,a\n", "row 1 has 2 numbers, and this run's task has 4 features"),
        ("text.csv", "f1,f2,f3,f4,class\n1,2,3,x,a\n", "column 'f4' must hold numbers"),
        ("gap.csv", "f1,f2,f3,f4,class\n1,2,3,4,a\n1,2,,4,b\n", "row 2 has an empty cell"),
        ("plain.csv", "f1,f2,f3,f4\n1,2,3,4\n", "support examples need targets. Add the column 'class'"),
        ("notes.txt", "hello", "must be a .parquet or .csv file or a directory of images"),
        ("torn.parquet", "PAR1", "not a readable parquet file"),
    ],
)
def test_files_that_do_not_fit_are_named_with_a_remedy(proto_net, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    found = CliRunner().invoke(cli, ["adapt", proto_net.location, "--support", str(tmp_path / name)])
    assert found.exit_code == 2, found.output
    assert message in found.stderr
    assert "Traceback" not in found.stderr


def test_a_network_for_another_support_size_normalises_by_that_many_rows():
    from tests.builders import Problem, classification

    spec = classification(input_shape=(2,), ways=2, shots=3, queries=1)
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    problem = Problem(MAML(), module, spec, policy="support")
    params = problem.layout.unflatten(problem.theta)
    x = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for size in (2, 4):
        network = problem.network.for_support_size(size)
        hidden = F.linear(x, params["0.weight"], params["0.bias"])
        mean, variance = hidden[:size].mean(0), hidden[:size].var(0, unbiased=False)
        expected = (hidden[size:] - mean) / (variance + 1e-5).sqrt()
        support = Examples(x[:size], torch.zeros(size))
        torch.testing.assert_close(network.outputs(params, x[size:], reference=support.x), expected)


def test_one_example_a_class_is_told_how_held_out_classes_go(proto_net, vectors, tmp_path):
    model = proto_net.adapt(points([8, 9, 10], 1), NAMES)
    assert model.cross_validation is None
    found = proto_net.expected_accuracy(model)
    source = FewShot(pool=vectors, ways=3, shots=1, queries=5).open()
    scores = []
    for task in range(40):
        episode = source.sample([TaskKey(2**63, "val", 0, task)])
        one = proto_net.adapt(episode.support.x[0].numpy(), episode.support.y[0].numpy(), cross_validation=False)
        scores.append(one.score(episode.query.x[0].numpy(), episode.query.y[0].numpy()))
    assert found.mean == pytest.approx(np.mean(scores))
    assert found.range == pytest.approx(np.percentile(scores, (2.5, 97.5)))
    assert found.tasks == 40


def test_no_expectation_is_made_up_where_there_are_no_such_tasks(proto_net):
    # Four validation classes give no task of five.
    model = proto_net.adapt(points([0, 1, 8, 9, 10], 1), list("abcde"))
    assert proto_net.expected_accuracy(model) is None


def test_a_run_adapts_where_its_pool_is_not_at_hand_and_says_so(vectors, tmp_path, capsys):
    pool = Path(shutil.copy(vectors, tmp_path / "pool.parquet"))
    run_dir = trained(tmp_path, str(pool), MAML(inner_lr=0.1, inner_steps=3))
    x, y = points([9, 8, 10], 2), NAMES[np.repeat([1, 0, 2], 2)]
    with_pool = load(run_dir).adapt(x, y)
    pool.unlink()
    run = load(run_dir)
    assert "no such class pool" in capsys.readouterr().err
    model = run.adapt(x, y)
    np.testing.assert_array_equal(model.predict_proba(x), with_pool.predict_proba(x))
    one = run.adapt(points([8, 9, 10], 1), NAMES)
    assert run.expected_accuracy(one) is None
    with pytest.raises(DataError, match="tasks of the run's own are needed"):
        similarity(run, x, y)
    (Path(run_dir) / "spec.json").write_text('{"spec": 1}')
    with pytest.raises(DataError, match=r"spec\.json is damaged"):
        load(run_dir)
    (Path(run_dir) / "spec.json").unlink()
    with pytest.raises(DataError, match="no such class pool"):
        load(run_dir)
