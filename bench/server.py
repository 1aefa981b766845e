"""The server of one measurement: a fresh container of the image on the host's network, with the fake API in it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from testcontainers.core.container import DockerContainer

from bench import ROOT
from fake_api import FakeApi
from harness import HOST, PASSWORD, Server, put_file

# Commit timestamps say when each vector became visible, without a look at the table while it is being filled.
POSTGRES_SETTINGS = {"shared_buffers": "2GB", "max_wal_size": "8GB", "track_commit_timestamp": "on"}


@contextmanager
def running_server(image: str, request_seconds: float, input_seconds: float) -> Iterator[Server]:
    """On the host's network: a published port would put Docker's proxy, and its cost, between rivals and server."""
    port, api_port = free_port(), free_port()
    container = DockerContainer(image)
    # A look at its health every few seconds would be counted as the server's own work.
    options: dict[str, Any] = {"network_mode": "host", "shm_size": "5g", "healthcheck": {"test": ["NONE"]}}
    container.with_kwargs(**options)
    environment = {
        "PGPORT": str(port),
        "POSTGRES_PASSWORD": PASSWORD,
        "AUTOEMBED_LANES": "0",
        "OPENAI_API_KEY": "sk-bench",
    }
    for name, value in environment.items():
        container.with_env(name, value)
    settings = {"listen_addresses": HOST, **POSTGRES_SETTINGS}
    container.with_command([f"--{name}={value}" for name, value in settings.items()])
    with container:
        server = Server(container, port, api_port)
        try:
            server.with_fake_api()
            api(server).behave(delay_seconds=request_seconds, delay_seconds_per_input=input_seconds, keep_texts=False)
            yield server
        except Exception:
            print(docker("logs", "--tail=20", name_of(server), stderr=subprocess.STDOUT), file=sys.stderr)
            raise


def api(server: Server) -> FakeApi:
    """The provider of all systems."""
    return server.fake_api("bench")


def hung_api(server: Server) -> FakeApi:
    """Where a hostile neighbour's provider may be."""
    return server.fake_api("hung")


def bare_model_seconds(server: Server, texts: list[str]) -> float:
    """How long a plain loop takes to embed the texts with the image's model."""
    put_file(server.container, ROOT / "bench" / "bare_model.py", "/tmp")
    loop = ["python3", "/tmp/bare_model.py", "/usr/local/share/autoembed/models/all-MiniLM-L6-v2"]
    path = "PYTHONPATH=/usr/local/lib/autoembed/python"
    command = ["docker", "exec", "--interactive", f"--env={path}", name_of(server), *loop]
    return float(subprocess.run(command, check=True, input=json.dumps(texts), capture_output=True, text=True).stdout)


def log_bytes(server: Server) -> int:
    return sum(map(len, server.container.get_logs()))


def name_of(server: Server) -> str:
    """The container's, for the command line of Docker."""
    return str(server.container.get_wrapped_container().name)


def docker(*arguments: str, stderr: int | None = None) -> str:
    done = subprocess.run(["docker", *arguments], check=True, stdout=subprocess.PIPE, stderr=stderr, text=True)
    return done.stdout.strip()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return int(listener.getsockname()[1])
