"""The box without work: the appliance's own HTTP server in front of a handler that reads the study and answers a constant.

What this costs is what the sender, the loopback and the server's sockets cost; no system under test can be faster.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from typing import Any

from appliance.web.server import serve

REPORT = json.dumps({"status": "complete", "rung": "full", "shed": [], "findings": []}).encode()


def app(environ: dict[str, Any], start: Callable[[str, list[tuple[str, str]]], object]) -> Iterable[bytes]:
    """WSGI: the body is read to its end, as any server must."""
    source = environ["wsgi.input"]
    while source.read(1 << 20):
        pass
    start("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(REPORT)))])
    return [REPORT]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.null_server", description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    serve(app, port=parser.parse_args(argv).port)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
