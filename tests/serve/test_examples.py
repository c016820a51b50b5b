"""The Dockerfile and the Kubernetes manifest, against what the command and the server have."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from tood_deploy.cli.serve import build_parser
from tood_deploy.serve.app import build_app
from tood_deploy.serve.models import ServeLimits
from tood_deploy.serve.state import ServerState

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "serving"
DOCKERFILE = (FOLDER / "Dockerfile").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def kubernetes() -> dict[str, Any]:
    """The objects by their kind."""
    yaml = pytest.importorskip("yaml")
    text = (FOLDER / "kubernetes.yaml").read_text(encoding="utf-8")
    return {one["kind"]: one for one in yaml.safe_load_all(text)}


def container(kubernetes: dict[str, Any]) -> dict[str, Any]:
    (only,) = kubernetes["Deployment"]["spec"]["template"]["spec"]["containers"]
    return only


def entry_point() -> list[str]:
    (line,) = re.findall(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.MULTILINE)
    return json.loads(line)


def test_the_image_starts_the_command_as_a_user_of_its_own() -> None:
    program, *arguments = entry_point()
    (default,) = re.findall(r"^CMD (.*)$", DOCKERFILE, re.MULTILINE)
    args = build_parser().parse_args([*arguments, *json.loads(default)])
    assert (program, args.host, args.port) == ("tood-serve", "0.0.0.0", 8000)
    last_stage = DOCKERFILE.rpartition("\nFROM ")[2]
    assert re.search(r"^USER (?!0|root)", last_stage, re.MULTILINE)
    assert "EXPOSE 8000" in last_stage
    assert len(shlex.split(last_stage.partition("HEALTHCHECK")[2].splitlines()[0])) > 1


def test_the_deployment_starts_the_command_and_probes_what_there_is(
    kubernetes: dict[str, Any],
) -> None:
    server = container(kubernetes)
    args = build_parser().parse_args([*entry_point()[1:], *server["args"]])
    assert args.port == server["ports"][0]["containerPort"]
    mounts = {mount["mountPath"] for mount in server["volumeMounts"]}
    for path in (Path(args.models[0]), args.token_file):
        assert str(path.parent) in mounts
    state = ServerState([], ServeLimits())
    app: Any = build_app(state)
    routes = {route.path for route in app._app.routes}
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert server[probe]["httpGet"]["path"] in routes
    assert server["startupProbe"]["httpGet"]["path"] == "/v2/health/ready"
    assert server["livenessProbe"]["httpGet"]["path"] == "/v2/health/live"
    assert set(server["resources"]) == {"requests", "limits"}
    grace_s = kubernetes["Deployment"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    pause_s = int(server["lifecycle"]["preStop"]["exec"]["command"][1])
    assert grace_s > args.timeout + pause_s
    state.close()


def test_it_scales_on_a_metric_that_the_server_has(kubernetes: dict[str, Any]) -> None:
    (metric,) = kubernetes["HorizontalPodAutoscaler"]["spec"]["metrics"]
    name = metric["pods"]["metric"]["name"]
    state = ServerState([], ServeLimits())
    assert f"# TYPE {name} gauge" in state.metrics.text().decode()
    state.close()
    selector = kubernetes["Service"]["spec"]["selector"]
    assert selector == kubernetes["Deployment"]["spec"]["selector"]["matchLabels"]
