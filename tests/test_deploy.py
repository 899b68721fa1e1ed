"""The container and the manifests of docs/deploy: linted, and their commands are commands of serve.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import tyro
import yaml

from omni_jax.serving.command_line import COMMANDS
from omni_jax.serving.commands import BatchCommand

FOLDER = Path(__file__).parents[1] / "docs" / "deploy"
MANIFESTS = sorted(FOLDER.glob("*.yaml"))
KUBERNETES = "1.34"


def read_manifests(path: Path) -> list[dict[str, Any]]:
    """The resources of a file; of a JobSet, which Kubernetes has no schema of, its jobs."""
    resources = []
    for resource in yaml.safe_load_all(path.read_text()):
        if resource["kind"] == "JobSet":
            for job in resource["spec"]["replicatedJobs"]:
                metadata = {"name": job["name"]}
                resources.append({"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, **job["template"]})
        else:
            resources.append(resource)
    return resources


def find_containers(resource: dict[str, Any]) -> list[dict[str, Any]]:
    template = resource["spec"].get("template")
    return template["spec"]["containers"] if template else []


def test_dockerfile() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, FOLDER / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifest(path: Path) -> None:
    resources = read_manifests(path)
    assert resources
    for resource in resources:
        kubernetes_validate.validate(resource, KUBERNETES, strict=True)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_commands(path: Path) -> None:
    """An option that ``serve.py`` has no longer would end the container."""
    containers = [container for resource in read_manifests(path) for container in find_containers(resource)]
    assert containers
    for container in containers:
        command = tyro.extras.subcommand_cli_from_dict(COMMANDS, args=container["args"])
        chips = int(container["resources"]["limits"]["google.com/tpu"]) * (
            4 if isinstance(command, BatchCommand) else 1
        )
        assert command.mesh.num_devices == chips


def test_what_the_dockerfile_copies_is_there() -> None:
    root = FOLDER.parents[1]
    ignored = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    copied = [
        word
        for line in (FOLDER / "Dockerfile").read_text().splitlines()
        if line.startswith("COPY ")
        for word in line.split()[1:-1]
    ]
    assert copied
    for name in copied:
        assert (root / name).exists()
        assert f"!{name}" in ignored
