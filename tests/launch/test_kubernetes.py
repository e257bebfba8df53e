"""PyTorchJob manifests: fields of the resource, and a command line that parses."""

import re
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from mimic_fast.launch.cli import app

MANIFESTS = sorted((Path(__file__).parents[2] / "launch" / "kubernetes").glob("*.yaml"))

# Of kubeflow.org/v1 PyTorchJob (training operator 1.9), what the manifests may use.
JOB_FIELDS = {
    "spec": {"elasticPolicy", "nprocPerNode", "pytorchReplicaSpecs", "runPolicy"},
    "spec.elasticPolicy": {"rdzvBackend", "rdzvId", "minReplicas", "maxReplicas", "maxRestarts"},
    "spec.runPolicy": {"cleanPodPolicy", "backoffLimit", "ttlSecondsAfterFinished"},
    "replica": {"replicas", "restartPolicy", "template"},
    "pod": {"containers", "volumes", "terminationGracePeriodSeconds"},
    "container": {"name", "image", "command", "env", "resources", "volumeMounts"},
}


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_manifest_has_the_fields_of_a_pytorchjob(path):
    job = yaml.safe_load(path.read_text())

    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    # DNS-1035, and room for "-worker-0" in the pods' names
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,50}[a-z0-9])?", job["metadata"]["name"])
    spec = job["spec"]
    assert spec.keys() <= JOB_FIELDS["spec"]
    assert spec.get("elasticPolicy", {}).keys() <= JOB_FIELDS["spec.elasticPolicy"]
    assert spec["runPolicy"].keys() <= JOB_FIELDS["spec.runPolicy"]
    assert spec["runPolicy"]["cleanPodPolicy"] in ("All", "Running", "None")
    assert isinstance(spec["nprocPerNode"], str)
    roles = spec["pytorchReplicaSpecs"]
    elastic = "elasticPolicy" in spec
    assert roles.keys() == ({"Worker"} if elastic else {"Master", "Worker"})
    assert elastic or roles["Master"]["replicas"] == 1
    for replica in roles.values():
        assert replica.keys() <= JOB_FIELDS["replica"]
        assert replica["restartPolicy"] == "OnFailure"
        check_pod(replica["template"]["spec"], processes=int(spec["nprocPerNode"]), elastic=elastic)


def check_pod(pod: dict[str, Any], *, processes: int, elastic: bool) -> None:
    assert pod.keys() <= JOB_FIELDS["pod"]
    assert pod["terminationGracePeriodSeconds"] == 60
    (container,) = pod["containers"]
    assert container.keys() <= JOB_FIELDS["container"]
    assert container["name"] == "pytorch"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == processes
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    assert all(isinstance(value, str) for value in variables.values())
    assert int(variables["OMP_NUM_THREADS"]) * processes == int(
        container["resources"]["limits"]["cpu"]
    )
    assert (variables.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") == "1") == elastic
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    assert mounts["shm"] == "/dev/shm"
    shm = next(volume for volume in pod["volumes"] if volume["name"] == "shm")
    assert shm["emptyDir"]["medium"] == "Memory"
    check_command(container["command"], shared=mounts["shared"])


def check_command(words: list[str], *, shared: str) -> None:
    assert words[:4] == ["torchrun", "-m", "mimic_fast", "purify"]
    command: Any = typer.main.get_command(app)
    params = command.commands["purify"].make_context("purify", words[4:]).params
    assert params["resume"] == "auto"
    for path in (params["recipe"], params["out"]):
        assert path.is_relative_to(shared)
