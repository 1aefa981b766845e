"""The examples for Compose, Kubernetes and CloudNativePG: what they ask for is what the image takes, and it embeds."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from testcontainers.core.docker_client import DockerClient

from harness import IMAGE
from waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
SECRETS = {"postgres_password": "a password", "openai_api_key": "sk-of-a-file"}
# The keys of a Compose service that the examples use.
SERVICE_KEYS = {
    "build",
    "environment",
    "image",
    "ports",
    "read_only",
    "restart",
    "secrets",
    "shm_size",
    "stop_grace_period",
    "tmpfs",
    "volumes",
}


@dataclass
class Pod:
    """A server as Docker's own options have it."""

    environment: dict[str, str]
    # Where the data and the files of the secrets are mounted, and what is writable in memory.
    data: str
    secrets: str
    memory: list[str]
    user: str = ""
    options: dict[str, Any] = field(default_factory=dict)


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((EXAMPLES / name).read_text()))


def of_kind(name: str, kind: str) -> dict[str, Any]:
    (found,) = [document for document in documents(name) if document["kind"] == kind]
    return found


def compose() -> Pod:
    (whole,) = documents("compose.yaml")
    (service,) = whole["services"].values()
    (volume,) = [volume.split(":") for volume in service["volumes"]]
    assert volume[0] in whole["volumes"]
    assert set(service["secrets"]) == whole["secrets"].keys() == SECRETS.keys()
    return Pod(
        service["environment"], volume[1], "/run/secrets", service["tmpfs"], options={"read_only": service["read_only"]}
    )


def kubernetes() -> Pod:
    pod = of_kind("kubernetes.yaml", "StatefulSet")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    memory = [path for name, path in mounts.items() if "emptyDir" in volumes.get(name, {}) and path != "/dev/shm"]
    security = pod["securityContext"]
    return Pod(
        {entry["name"]: entry["value"] for entry in container["env"]},
        mounts["data"],
        mounts["secrets"],
        memory,
        user=f"{security['runAsUser']}:{security['runAsGroup']}",
        options={
            "read_only": container["securityContext"]["readOnlyRootFilesystem"],
            "cap_drop": container["securityContext"]["capabilities"]["drop"],
            "security_opt": ["no-new-privileges"],
        },
    )


def for_this_major(pod: Pod) -> Pod:
    """The same at the place where the image has its volume: the comments in the examples say so of 17."""
    ((place, _),) = DockerClient().client.images.get(IMAGE).attrs["Config"]["Volumes"].items()
    for name, value in pod.environment.items():
        if value.startswith(f"{pod.data}/"):
            pod.environment[name] = value.replace(pod.data, place, 1)
    pod.data = place
    return pod


@contextmanager
def running(pod: Pod) -> Iterator[Any]:
    """A container as the example has it, with the files of the secrets in a volume."""
    client = DockerClient().client
    with ExitStack() as stack:
        data, secrets = (client.volumes.create(f"autoembed_{uuid.uuid4().hex}") for _ in range(2))
        for volume in (data, secrets):
            stack.callback(volume.remove)
        lines = [f"printf %s '{text}' > /secrets/{name}" for name, text in SECRETS.items()]
        client.containers.run(
            IMAGE,
            ["-c", "; ".join([*lines, "chmod 444 /secrets/*"])],
            entrypoint="bash",
            volumes={secrets.name: {"bind": "/secrets"}},
            remove=True,
        )
        container = client.containers.run(
            IMAGE,
            detach=True,
            environment=pod.environment,
            volumes={data.name: {"bind": pod.data}, secrets.name: {"bind": pod.secrets, "mode": "ro"}},
            tmpfs=dict.fromkeys(pod.memory, ""),
            user=pod.user,
            **pod.options,
        )
        stack.callback(container.remove, force=True)
        yield container


@pytest.mark.parametrize("example", [compose, kubernetes])
def test_an_example_starts_embeds_and_reads_its_secrets(example: Any) -> None:
    pod = for_this_major(example())
    with running(pod) as container:

        def sql(statement: str) -> str:
            options = ["--username=postgres", "--dbname=app", "--no-align", "--tuples-only", "--no-psqlrc"]
            return str(container.exec_run(["psql", *options, f"--command={statement}"]).output.decode().strip())

        probe = ["pg_isready", "--quiet", "--host=127.0.0.1", "--username=postgres"]
        wait_until(lambda: container.exec_run(probe).exit_code == 0, 60)
        sql("CREATE TABLE notes (id int PRIMARY KEY, body text)")
        sql("SELECT autoembed.enable('notes', content_columns => '{body}')")
        sql("INSERT INTO notes VALUES (1, 'a note')")

        wait_until(lambda: sql("SELECT embedded = 1 FROM autoembed.status") == "t", 30)
        assert sql(f"SELECT pg_read_file('{pod.secrets}/openai_api_key')") == SECRETS["openai_api_key"]
        assert f"file:{pod.secrets}/openai_api_key" in (ROOT / "docs" / "operations.md").read_text()


@pytest.mark.parametrize("file", [ROOT / "compose.yaml", EXAMPLES / "compose.yaml"])
def test_compose_starts_the_server_again_and_uses_what_compose_knows(file: Path) -> None:
    (service,) = yaml.safe_load(file.read_text())["services"].values()

    assert service.keys() <= SERVICE_KEYS
    assert service["restart"] == "unless-stopped"


def test_kubernetes_probes_and_names_fit_together() -> None:
    secret, service, stateful = (of_kind("kubernetes.yaml", kind) for kind in ("Secret", "Service", "StatefulSet"))
    spec = stateful["spec"]
    pod = spec["template"]
    (container,) = pod["spec"]["containers"]
    volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
    claims = {claim["metadata"]["name"] for claim in spec["volumeClaimTemplates"]}

    assert spec["selector"]["matchLabels"] == pod["metadata"]["labels"] == service["spec"]["selector"]
    assert spec["serviceName"] == service["metadata"]["name"]
    assert secret["stringData"].keys() == SECRETS.keys()
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes | claims
    assert container["startupProbe"]["exec"] == container["readinessProbe"]["exec"]
    assert {"name", "image", "env", "ports", "volumeMounts"} <= container.keys()


def test_cloudnativepg_gets_a_tag_with_the_major_and_the_settings_of_pg_cron() -> None:
    spec = of_kind("cloudnativepg.yaml", "Cluster")["spec"]
    application = spec["bootstrap"]["initdb"]

    # The operator takes the major from the tag.
    assert re.fullmatch(r"\d\d-\d+\.\d+\.\d+", spec["imageName"].rpartition(":")[2])
    assert spec["postgresql"]["shared_preload_libraries"] == ["pg_cron"]
    assert spec["postgresql"]["parameters"]["cron.database_name"] == application["database"]
    assert all(isinstance(value, str) for value in spec["postgresql"]["parameters"].values())
    assert application["postInitApplicationSQL"][-1] == "SELECT autoembed.schedule()"
