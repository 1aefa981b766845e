"""The server of one measurement: a fresh container of the image, with the fake API in it, on the host's loopback."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg

from bench import ROOT
from fake_api import FakeApi

HOST = "127.0.0.1"
PASSWORD = "postgres"
# In the folder of the tests.
FAKE_API = ["python3", "-m", "fake_api"]
# Commit timestamps say when each vector became visible, without a look at the table while it is being filled.
POSTGRES_SETTINGS = {"shared_buffers": "2GB", "max_wal_size": "8GB", "track_commit_timestamp": "on"}

Connection = psycopg.Connection[Any]


@dataclass(frozen=True)
class Server:
    name: str
    port: int
    api: FakeApi

    @property
    def url(self) -> str:
        return f"postgresql://postgres:{PASSWORD}@{HOST}:{self.port}/postgres"

    def connect(self, user: str = "postgres") -> Connection:
        return psycopg.connect(self.url, autocommit=True, user=user)

    @property
    def hung_api(self) -> FakeApi:
        """Where a hostile neighbour's provider may be."""
        return FakeApi(self.api.control_url, f"{self.api.control_url}/hung/v1", "hung")

    def bare_model_seconds(self, texts: list[str]) -> float:
        """How long a plain loop takes to embed the texts with the image's model."""
        loop = ["python3", "/tmp/bare_model.py", "/usr/local/share/autoembed/models/all-MiniLM-L6-v2"]
        docker("cp", f"{ROOT / 'bench' / 'bare_model.py'}", f"{self.name}:/tmp")
        path = "PYTHONPATH=/usr/local/lib/autoembed/python"
        command = ["docker", "exec", "--interactive", f"--env={path}", self.name, *loop]
        return float(
            subprocess.run(command, check=True, input=json.dumps(texts), capture_output=True, text=True).stdout
        )

    def log_bytes(self) -> int:
        logs = subprocess.run(["docker", "logs", self.name], check=True, capture_output=True)
        return len(logs.stdout) + len(logs.stderr)


@contextmanager
def running_server(image: str, request_seconds: float, input_seconds: float) -> Iterator[Server]:
    """On the host's network: a published port would put Docker's proxy, and its cost, between rivals and server."""
    port, api_port = free_port(), free_port()
    api = FakeApi(f"http://{HOST}:{api_port}", f"http://{HOST}:{api_port}/bench/v1", "bench")
    server = Server(f"autoembed-bench-{uuid.uuid4().hex[:8]}", port, api)
    environment = {
        "PGPORT": port,
        "POSTGRES_PASSWORD": PASSWORD,
        "AUTOEMBED_LANES": 0,
        "OPENAI_API_KEY": "sk-bench",
    }
    variables = [f"--env={name}={value}" for name, value in environment.items()]
    settings = [f"--{name}={value}" for name, value in {"listen_addresses": HOST, **POSTGRES_SETTINGS}.items()]
    # A look at its health every few seconds would be counted as the server's own work.
    options = ["--network=host", "--shm-size=1g", "--no-healthcheck", f"--name={server.name}"]
    docker("run", "--detach", *options, *variables, image, *settings)
    try:
        docker("cp", f"{ROOT / 'tests'}", f"{server.name}:/tmp/tests")
        serve = [*FAKE_API, "--host", HOST, "--port", str(api_port)]
        docker("exec", "--detach", "--workdir=/tmp/tests", server.name, *serve)
        wait_until(lambda: answers(server), 60)
        api.behave(delay_seconds=request_seconds, delay_seconds_per_input=input_seconds, keep_texts=False)
        yield server
    except Exception:
        print(docker("logs", "--tail=20", server.name, stderr=subprocess.STDOUT), file=sys.stderr)
        raise
    finally:
        docker("rm", "--force", "--volumes", server.name)


def answers(server: Server) -> bool:
    try:
        server.api.counters()
        server.connect().close()
    except (OSError, psycopg.OperationalError):
        return False
    return True


def docker(*arguments: str, stderr: int | None = None) -> str:
    done = subprocess.run(["docker", *arguments], check=True, stdout=subprocess.PIPE, stderr=stderr, text=True)
    return done.stdout.strip()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return int(listener.getsockname()[1])


def wait_until(condition: Callable[[], bool], seconds: float, pause_seconds: float = 0.02) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not true within {seconds} s")
        time.sleep(pause_seconds)
