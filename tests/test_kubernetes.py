"""Kubernetes manifests of documents and examples, against the schemas of Kubernetes, and of KubeRay
and Kubeflow as far as these manifests go."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from tood_deploy.cli.batch import build_parser as batch_parser
from tood_deploy.cli.train import parser as train_parser

yaml = pytest.importorskip("yaml")
kubernetes_validate = pytest.importorskip("kubernetes_validate")
import jsonschema

ROOT = Path(__file__).resolve().parents[1]
VERSION = "1.37"
SCALE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
COUNT = {"type": "integer", "minimum": 0}
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
POD = {"type": "object"}  # checked by Kubernetes' own schema


def fields(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the schema of an object without other fields."""
    return {
        "type": "object",
        "properties": required | (optional or {}),
        "required": list(required),
        "additionalProperties": False,
    }


# Of KubeRay's ray-operator/apis/ray/v1/{rayjob,raycluster}_types.go.
RAY_WORKERS = fields(
    {"groupName": {"type": "string"}, "rayStartParams": TEXTS, "template": POD},
    dict.fromkeys(("replicas", "minReplicas", "maxReplicas", "numOfHosts"), COUNT),
)
RAY_CLUSTER = fields(
    {"headGroupSpec": fields({"rayStartParams": TEXTS, "template": POD})},
    {
        "rayVersion": {"type": "string"},
        "enableInTreeAutoscaling": {"type": "boolean"},
        "workerGroupSpecs": {"type": "array", "items": RAY_WORKERS},
    },
)
RAY_JOB = fields(
    {"entrypoint": {"type": "string"}, "rayClusterSpec": RAY_CLUSTER},
    {
        "shutdownAfterJobFinishes": {"type": "boolean"},
        "backoffLimit": COUNT,
        "ttlSecondsAfterFinished": COUNT,
        "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
    },
)
# Of Kubeflow's training operator, pkg/apis/kubeflow.org/v1/pytorch_types.go.
REPLICAS = fields(
    {"template": POD},
    {"replicas": COUNT, "restartPolicy": {"enum": ["Always", "OnFailure", "Never", "ExitCode"]}},
)
TORCH_JOB = fields(
    {"pytorchReplicaSpecs": fields({}, {"Master": REPLICAS, "Worker": REPLICAS})},
    {"nprocPerNode": {"type": "string"}},
)


def job_of(kind: str) -> dict[str, Any]:
    """Return the manifest of a kind that docs/scale.md has."""
    blocks = re.findall(r"```yaml\n(.*?)```", SCALE, re.DOTALL)
    (job,) = (one for one in map(yaml.safe_load, blocks) if one["kind"] == kind)
    return job


def check(job: dict[str, Any], group: str, spec: dict[str, Any]) -> None:
    """Check a job against the schema of its specification."""
    metadata = fields({"name": {"type": "string", "pattern": "^[a-z0-9-]+$"}})
    whole = {"apiVersion": {"const": group}, "kind": {"type": "string"}}
    jsonschema.validate(job, fields(whole | {"metadata": metadata, "spec": spec}))


def check_pod(template: dict[str, Any]) -> None:
    """Check a template of pods, and that what its containers mount is there."""
    whole = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "a"}}
    kubernetes_validate.validate(whole | {"template": template}, VERSION, strict=True)
    volumes = {volume["name"] for volume in template["spec"].get("volumes", [])}
    for container in template["spec"]["containers"]:
        assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes


def test_the_manifest_of_the_server() -> None:
    text = (ROOT / "examples" / "serving" / "kubernetes.yaml").read_text(encoding="utf-8")
    objects = list(yaml.safe_load_all(text))
    assert len(objects) == 4
    for one in objects:
        kubernetes_validate.validate(one, VERSION, strict=True)
    check_pod(objects[0]["spec"]["template"])


def test_the_job_of_kuberay() -> None:
    job = job_of("RayJob")
    check(job, "ray.io/v1", RAY_JOB)
    cluster = job["spec"]["rayClusterSpec"]
    head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    for group in (head, workers):
        check_pod(group["template"])
    program, *arguments = shlex.split(job["spec"]["entrypoint"])
    args = batch_parser().parse_args(arguments)
    assert (program, args.address) == ("tood-batch", "auto")
    (container,) = workers["template"]["spec"]["containers"]
    cpus = int(container["resources"]["limits"]["cpu"])
    assert args.workers <= workers["maxReplicas"] * cpus // args.cpus_per_worker
    (container,) = head["template"]["spec"]["containers"]
    assert str(Path(args.model).parent) in {one["mountPath"] for one in container["volumeMounts"]}


def test_the_job_of_kubeflow() -> None:
    job = job_of("PyTorchJob")
    check(job, "kubeflow.org/v1", TORCH_JOB)
    template = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
    check_pod(template)
    (container,) = template["spec"]["containers"]
    assert container["name"] == "pytorch"  # as the operator wants it
    program, _, module, *arguments = container["command"]
    assert (program, module) == ("torchrun", "tood_deploy.cli.train")
    assert train_parser().parse_args(arguments).resume


@pytest.mark.parametrize("wrong", ["shutdownAfterJobFinish", "backoffLimits"])
def test_a_misspelt_field_is_noticed(wrong: str) -> None:
    job = job_of("RayJob")
    job["spec"][wrong] = 1
    with pytest.raises(jsonschema.ValidationError, match=wrong):
        check(job, "ray.io/v1", RAY_JOB)
