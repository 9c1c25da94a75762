"""The KubeRay manifests: valid by KubeRay's own schemas, and meant as Kubernetes and Ray will read them."""

import copy
import functools
import gzip
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from metadist.commands.train import train

MANIFESTS = Path(__file__).parents[2] / "cluster/kuberay"
SCHEMAS = Path(__file__).parents[3] / "shared/data/kuberay_crds"
UNITS = {"": 1, "Mi": 2**20, "Gi": 2**30}


def manifest(name: str) -> dict[str, Any]:
    return yaml.safe_load((MANIFESTS / f"{name}.yaml").read_text())


CLUSTERS = {"raycluster": manifest("raycluster")["spec"], "rayjob": manifest("rayjob")["spec"]["rayClusterSpec"]}
GROUPS = [
    pytest.param(group, id=f"{name}-{group.get('groupName', 'head')}")
    for name, spec in CLUSTERS.items()
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])
]


@functools.cache
def schema_of(kind: str) -> dict[str, Any]:
    path = SCHEMAS / f"ray.io_{kind.lower()}s.yaml.gz"
    if not path.exists():
        pytest.skip("KubeRay's schemas are not beside this checkout")
    # libyaml's loader, where there is one: these are 25,000 lines.
    definition = yaml.load(gzip.decompress(path.read_bytes()), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (version,) = (version for version in definition["spec"]["versions"] if version["storage"])
    return closed(version["schema"]["openAPIV3Schema"])


def closed(schema: Any) -> Any:
    """The schema with unknown fields refused, as `kubectl apply` refuses them."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(part) for key, part in schema.items()}
    # The contents of metadata are Kubernetes' own, and no CRD lists them.
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        result.setdefault("additionalProperties", False)
    return result


def in_bytes(quantity: str) -> int:
    number = quantity.rstrip("MGi")
    return int(number) * UNITS[quantity[len(number) :]]


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_a_manifest_is_valid_by_kuberays_schema(name: str) -> None:
    found = manifest(name)
    jsonschema.Draft7Validator(schema_of(found["kind"])).validate(found)


def test_a_misspelt_field_would_be_found() -> None:
    found = manifest("raycluster")
    found["spec"]["headGroupSpec"]["template"]["spec"]["terminationGracePeriod"] = 120
    with pytest.raises(jsonschema.ValidationError, match="terminationGracePeriod"):
        jsonschema.Draft7Validator(schema_of("RayCluster")).validate(found)


def test_a_job_has_the_same_cluster_and_its_config_beside_it() -> None:
    stays, comes_and_goes = CLUSTERS["raycluster"], copy.deepcopy(CLUSTERS["rayjob"])
    template = comes_and_goes["headGroupSpec"]["template"]["spec"]
    assert template["containers"][0]["volumeMounts"].pop() == {"name": "config", "mountPath": "/config"}
    assert template["volumes"].pop() == {"name": "config", "configMap": {"name": "metadist-config"}}
    assert comes_and_goes == stays


def test_the_jobs_command_is_one_of_ours_and_trains_on_the_volume_that_survives() -> None:
    words = manifest("rayjob")["spec"]["entrypoint"].split()
    assert words[:4] == ["python", "-m", "metadist", "train"]
    options = train.make_context("train", words[4:]).params
    assert (options["config"], options["address"]) == ("/config/experiment.yaml", "auto")
    assert options["run_dir"].startswith("/runs/")
    head = CLUSTERS["raycluster"]["headGroupSpec"]["template"]["spec"]
    assert {"name": "runs", "mountPath": "/runs"} in head["containers"][0]["volumeMounts"]
    (runs,) = (volume for volume in head["volumes"] if volume["name"] == "runs")
    assert runs["persistentVolumeClaim"]["claimName"] == manifest("runs")["metadata"]["name"]


@pytest.mark.parametrize("spec", CLUSTERS.values(), ids=CLUSTERS)
def test_the_token_comes_from_a_secret_and_stands_nowhere(spec: dict[str, Any]) -> None:
    # KubeRay gives key auth_token of this Secret to every container of head, workers, autoscaler and submitter.
    assert spec["authOptions"] == {"mode": "token", "secretName": "metadist-ray-token"}
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        for container in group["template"]["spec"]["containers"]:
            assert not any(variable["name"].startswith("RAY_AUTH") for variable in container.get("env", []))


@pytest.mark.parametrize("spec", CLUSTERS.values(), ids=CLUSTERS)
def test_workers_of_three_kinds_come_and_go(spec: dict[str, Any]) -> None:
    assert spec["enableInTreeAutoscaling"]
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert {name: group["rayStartParams"].get("num-gpus", "0") for name, group in groups.items()} == {
        "cpu": "0",
        "gpu": "1",
        "gpu8": "8",
    }
    for group in groups.values():
        assert 0 <= group["minReplicas"] < group["maxReplicas"]


@pytest.mark.parametrize("group", GROUPS)
def test_ray_is_told_of_the_resources_that_the_container_has(group: dict[str, Any]) -> None:
    (container,) = group["template"]["spec"]["containers"]
    limits, start = container["resources"]["limits"], group["rayStartParams"]
    assert container["resources"]["requests"] == limits
    assert (
        limits.get("nvidia.com/gpu", "0")
        == start.get("num-gpus", "0")
        == group.get("labels", {}).get("gpus-per-node", "0")
    )
    # The head has none for adapters.
    assert start["num-cpus"] == (limits["cpu"] if "groupName" in group else "0")


@pytest.mark.parametrize("group", GROUPS)
def test_the_object_store_fits_shared_memory_which_fits_the_memory(group: dict[str, Any]) -> None:
    pod = group["template"]["spec"]
    (container,) = pod["containers"]
    (mounted,) = (mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == "/dev/shm")
    (shm,) = (volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == mounted)
    assert shm["medium"] == "Memory"
    store = int(group["rayStartParams"]["object-store-memory"])
    # Half of the memory at least is left to processes.
    assert store < in_bytes(shm["sizeLimit"]) <= in_bytes(container["resources"]["limits"]["memory"]) / 2


@pytest.mark.parametrize("group", GROUPS)
def test_a_pod_takes_leave_of_its_cluster_and_is_nobody_special(group: dict[str, Any]) -> None:
    pod = group["template"]["spec"]
    (container,) = pod["containers"]
    assert "ray stop" in " ".join(container["lifecycle"]["preStop"]["exec"]["command"])
    assert pod["terminationGracePeriodSeconds"] >= 60
    assert pod["securityContext"]["runAsNonRoot"]
