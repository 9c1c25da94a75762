"""Exported models give torch's predictions, and need nothing of us."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from metadist import MetaTrainer, load
from metadist.algorithms import MAML, ProtoNet
from metadist.cli import cli
from metadist.errors import MetadistError, UserError
from metadist.export import export_model
from metadist.exported import load_exported
from metadist.models import Conv4
from metadist.predictor import Predictor
from metadist.sections import RunSettings, TrainingSettings
from metadist.tasks import FewShot
from metadist.tasks.class_pool import PoolRow, write_pool
from tests.bad_input.builders import png
from tests.builders import tiny_config

WITHOUT_METADIST = """
import json, sys
import numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
described = json.loads(session.get_modelmeta().custom_metadata_map["metadist"])
x = numpy.load(sys.argv[2]).astype("float32") * numpy.float32(described["preprocessing"]["scale"])
alone = numpy.concatenate([session.run(None, {"x": x[place : place + 1]})[0] for place in range(len(x))])
together = numpy.concatenate([session.run(None, {"x": part})[0] for part in numpy.split(x, [7, 300])])
assert "metadist" not in sys.modules and "torch" not in sys.modules
print(json.dumps([[described["labels"][row] for row in found.argmax(1)] for found in (alone, together)]))
"""


def images(number, seed=0):
    """Coarse patterns, so that they differ by more than noise."""
    coarse = np.random.default_rng(seed).integers(0, 256, (number, 1, 4, 4), np.uint8)
    return coarse.repeat(4, axis=2).repeat(4, axis=3)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """ProtoNet with more ways than it was trained for; MAML with fewer than its head has."""
    place = tmp_path_factory.mktemp("export")
    classes = enumerate(["train"] * 3 + ["val"] * 3 + ["test"] * 3)
    rows = [PoolRow(f"c{n}", None, split, image=png(16, 16, 10 * n + k)) for n, split in classes for k in range(2)]
    write_pool(rows, place / "pool.parquet")

    def adapted(algorithm, labels, steps=None):
        config = tiny_config(
            task=FewShot(pool=str(place / "pool.parquet"), ways=3, shots=1),
            model=Conv4(filters=4),
            algorithm=algorithm,
            training=TrainingSettings(
                steps=1, meta_batch_size=1, chunk_size=1, compile=False, batch_norm="transductive"
            ),
            run=RunSettings(name=type(algorithm).__name__, storage_path=str(place)),
        )
        return load(MetaTrainer(config).fit(evaluate=False).run_dir).adapt(images(len(labels)), labels, steps=steps)

    return {
        "proto_net": adapted(ProtoNet(), ["ant", "bee", "cat", "dog", "ant"]),
        "maml": adapted(MAML(inner_lr=0.5, inner_steps=5), [30, 10, 30, 10], steps=5),
    }


@pytest.fixture(scope="module")
def onnx_files(models, tmp_path_factory):
    place = tmp_path_factory.mktemp("onnx")
    for name, model in models.items():
        export_model(model, str(place / f"{name}.onnx"))
    return place


@pytest.mark.parametrize("name", ["proto_net", "maml"])
def test_onnxruntime_alone_gives_torchs_labels_on_1000_images_one_by_one_and_in_batches(
    models, onnx_files, name, tmp_path
):
    x = images(1000, seed=1)
    np.save(tmp_path / "x.npy", x)
    command = [sys.executable, "-c", WITHOUT_METADIST, str(onnx_files / f"{name}.onnx"), str(tmp_path / "x.npy")]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    alone, together = json.loads(result.stdout)
    expected = models[name].predict(x).tolist()
    assert len(set(expected)) > 1
    assert alone == expected
    assert together == expected


def test_onnx_probabilities_are_the_adapted_models(models, onnx_files):
    x = images(40, seed=2)
    for name, model in models.items():
        found = load_exported(str(onnx_files / f"{name}.onnx")).outputs(x)
        np.testing.assert_allclose(found, model.predict_proba(x), atol=1e-5)
        assert found.shape == (40, len(model.classes_))


def test_pt2_gives_the_same_and_knows_its_labels(models, tmp_path):
    x, model = images(20, seed=3), models["maml"]
    export_model(model, str(tmp_path / "model.pt2"))
    loaded = load_exported(str(tmp_path / "model.pt2"))
    np.testing.assert_allclose(loaded.outputs(x), model.predict_proba(x), atol=1e-5)
    np.testing.assert_allclose(loaded.outputs(x[:1]), model.predict_proba(x)[:1], atol=1e-5)
    assert loaded.described["labels"] == [10, 30]
    assert loaded.described["preprocessing"]["color"] == "grey"


def test_what_a_model_of_negatives_predicts_is_inverted_too_unless_told_otherwise(models, tmp_path):
    x, model = images(20, seed=3), models["maml"]
    (tmp_path / "paper").mkdir()
    for number, image in enumerate(x):
        Image.fromarray(255 - image[0]).save(tmp_path / "paper" / f"{number:02}.png")
    for name, inverted in (("light", False), ("ink", True)):
        export_model(model, str(tmp_path / f"{name}.pt2"), inverted=inverted)
    cases = [("ink", [], x), ("ink", ["--invert"], x), ("ink", ["--no-invert"], 255 - x)]
    for name, options, seen in [*cases, ("light", [], 255 - x), ("light", ["--invert"], x)]:
        arguments = ["predict", str(tmp_path / f"{name}.pt2"), str(tmp_path / "paper"), "--json", *options]
        found = CliRunner().invoke(cli, arguments)
        assert found.exit_code == 0, found.output
        predicted = [row["prediction"] for row in json.loads(found.stdout)["predictions"]]
        assert predicted == model.predict(seen).tolist()
    assert model.predict(x).tolist() != model.predict(255 - x).tolist()


def test_frozen_statistics_give_what_the_policy_support_gives(models):
    model = models["maml"]
    x = torch.tensor(images(5, seed=4) / np.float32(255))
    expected = model.network.outputs(model.phi, x, reference=model.support.x)
    frozen = model.network.frozen(model.phi, model.support.x)
    for place in range(5):
        found = frozen.outputs(model.phi, x[place : place + 1])
        torch.testing.assert_close(found, expected[place : place + 1], rtol=1e-4, atol=1e-5)


def test_safetensors_hold_every_adapted_tensor_and_the_description(models, tmp_path):
    from safetensors.torch import load_file

    model = models["proto_net"]
    export_model(model, str(tmp_path / "model"))
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(tensors[name], value) for name, value in model.phi.items())
    assert "block1.norm.running_var" in tensors
    assert json.loads((tmp_path / "model" / "model.json").read_text())["labels"] == ["ant", "bee", "cat", "dog"]


def test_a_model_that_differs_from_torchs_is_not_written(models, tmp_path, monkeypatch):
    forward = Predictor.forward
    # What is traced is off by a little; what it is compared with, afterwards, is not.
    monkeypatch.setattr(
        Predictor,
        "forward",
        lambda self, x: forward(self, x) + (1e-3 if torch.compiler.is_exporting() else 0.0),
    )
    with pytest.raises(MetadistError, match=r"differs from torch's by 0\.001"):
        export_model(models["maml"], str(tmp_path / "model.pt2"))
    assert list(tmp_path.iterdir()) == []


def test_another_ending_is_refused(models, tmp_path):
    with pytest.raises(UserError, match=r"must end in \.onnx or \.pt2"):
        export_model(models["maml"], str(tmp_path / "model.h5"))


def test_predict_prints_one_object_and_refuses_other_files(models, onnx_files, tmp_path):
    x = images(3, seed=5)
    for number, pixels in enumerate(x):
        Image.fromarray(pixels[0]).save(tmp_path / f"{number}.png")
    result = CliRunner().invoke(cli, ["predict", str(onnx_files / "maml.onnx"), str(tmp_path), "--json"])
    found = json.loads(result.stdout)
    assert [row["prediction"] for row in found["predictions"]] == models["maml"].predict(x).tolist()
    assert found["size_bytes"] == (onnx_files / "maml.onnx").stat().st_size
    assert found["latency_ms"] > 0
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    for name, words in (("broken.onnx", "not a readable ONNX file"), ("none.onnx", "no such file")):
        refused = CliRunner().invoke(cli, ["predict", str(tmp_path / name), str(tmp_path)])
        assert refused.exit_code == 2
        assert words in refused.stderr
