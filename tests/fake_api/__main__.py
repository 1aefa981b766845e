"""The fake API as a program: `python3 fake_api`, or with `-m` from where the folder lies."""

from __future__ import annotations

import argparse
import contextlib
import sys
import threading
from pathlib import Path


def main() -> None:
    # Started by its path, Python looks in the folder itself, not where the folder lies.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from fake_api.server import Server

    parser = argparse.ArgumentParser(prog="fake_api", description="A stand-in for embedding APIs.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--tls-cert", help="serve https with this certificate (PEM)")
    parser.add_argument("--tls-key")
    arguments = parser.parse_args()
    with Server(arguments.host, arguments.port, arguments.tls_cert, arguments.tls_key) as server:
        print(f"listening on {server.url}", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
