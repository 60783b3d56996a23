"""The files for deployment name what there is, and leave time to drain."""

import json
import re
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from varedit_serve import app, server
from varedit_serve.cli import main
from varedit_serve.keys import VARIABLE
from varedit_serve.limits import Limits

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "runtime" / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LONGEST = Limits().upload_seconds + Limits().deadline + server._LAST_SECONDS


def composed() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]


def pod() -> dict[str, Any]:
    deployment, _ = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    return deployment["spec"]["template"]["spec"]


def in_image() -> list[str]:
    return json.loads(re.findall(r"^CMD (\[.*\])$", DOCKERFILE, re.M)[0])


@pytest.mark.parametrize(
    "arguments",
    [
        in_image(),
        pod()["containers"][0]["args"],
        *(service["command"] for service in composed().values()),
    ],
)
def test_commands_are_those_of_the_server(arguments: list[str]) -> None:
    digest = "a" * 64
    filled = [re.sub(r"\$\{\w+:-\}", digest, argument) for argument in arguments]
    options = main.make_context("varedit-serve", filled).params
    assert (str(options["bundle"]), options["host"]) == ("/bundle", "0.0.0.0")
    assert {option.name: options[option.name] for option in fields(Limits)} == vars(Limits())


def test_there_is_time_to_drain() -> None:
    paused = int(pod()["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod()["terminationGracePeriodSeconds"] > paused + LONGEST
    for service in composed().values():
        assert int(service["stop_grace_period"].removesuffix("s")) > LONGEST


def test_probes_ask_what_the_server_answers_whatever_its_names_are() -> None:
    (container,) = pod()["containers"]
    probes = {
        kind: container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")
    }
    assert {kind: probe["path"] for kind, probe in probes.items()} == {
        "startup": "/livez",
        "liveness": "/livez",
        "readiness": "/readyz",
    }
    source = Path(app.__file__).read_text()
    assert all(f'"{probe["path"]}"' in source for probe in probes.values())
    assert all(
        probe["httpHeaders"] == [{"name": "Host", "value": "localhost"}]
        for probe in probes.values()
    )


def test_keys_are_given_where_the_server_looks() -> None:
    (container,) = pod()["containers"]
    assert [one["name"] for one in container["env"]] == [VARIABLE]
    assert [list(one["environment"]) for one in composed().values()] == [[VARIABLE]] * 2


def test_the_image_is_built_from_what_the_wheel_needs() -> None:
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    sent = {line[1:] for line in lines if line.startswith("!")}
    packages = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    licences, readme = PROJECT["project"]["license-files"], PROJECT["project"]["readme"]
    used = {readme, *licences, *(path.split("/")[0] for path in packages)}
    assert sent == used | {"pyproject.toml", "constraints.txt"}


def test_extras_and_user_are_those_that_there_are() -> None:
    named = re.findall(r"EXTRAS[=:] ?([\w,-]+)", DOCKERFILE + (DEPLOY / "compose.yaml").read_text())
    extras = PROJECT["project"]["optional-dependencies"]
    assert {extra for names in named for extra in names.split(",")} <= extras.keys()
    assert (bound := re.search(r'"onnxruntime-gpu(>=[\d.]+)"', DOCKERFILE))
    assert any(line.endswith(bound[1]) for line in extras["gpu"])
    user = pod()["securityContext"]["runAsUser"]
    assert f"--uid {user} " in DOCKERFILE and f"USER {user}\n" in DOCKERFILE
