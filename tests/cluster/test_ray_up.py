"""The cluster files of `ray up`: valid by the schema in Ray's own package, and the same token everywhere."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

FILES = sorted((Path(__file__).parents[2] / "cluster/ray_up").glob("*.yaml"))
CONFIGS = {path.stem: yaml.safe_load(path.read_text()) for path in FILES}
CLOUDS = ["aws", "gcp"]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_file_is_valid_by_rays_schema_and_by_what_ray_checks_beside_it(config: dict[str, Any]) -> None:
    import ray.autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    # With its defaults, as `ray up` fills them in.
    filled_in = prepare_config(config)
    validate_config(filled_in)
    if config["provider"]["type"] == "local":
        (kind,) = filled_in["available_node_types"].values()
        assert kind["min_workers"] == kind["max_workers"] == len(config["provider"]["worker_ips"])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_all_nodes_ask_for_the_token_and_get_it_from_a_file(config: dict[str, Any]) -> None:
    assert config["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("RAY_AUTH_MODE=token" in command and "~/.profile" in command for command in config["setup_commands"])
    assert "--dashboard-host" not in json.dumps(config)  # Ray's own is 127.0.0.1: `ray dashboard` tunnels there.


@pytest.mark.parametrize("cloud", CLOUDS)
def test_nodes_of_a_cloud_come_and_go_between_their_limits(cloud: str) -> None:
    config = CONFIGS[cloud]
    kinds = dict(config["available_node_types"])
    head = kinds.pop(config["head_node_type"])
    assert head["resources"]["CPU"] == 0
    assert any("--head" in command and "--num-cpus=0" in command for command in config["head_start_ray_commands"])
    assert [kind["resources"].get("GPU", 0) for kind in kinds.values()] == [0, 1, 8]
    for kind in kinds.values():
        assert 0 <= kind["min_workers"] <= kind["max_workers"] <= config["max_workers"]
        assert kind.get("labels", {}).get("gpus-per-node", "0") == str(kind["resources"].get("GPU", 0))
