"""First in, first out: one queue with a limit, one worker, and a request whose time is over when its turn comes is dropped.

The best of the usual kind of server, with its two knobs: `--limit` requests may be inside (more are refused with 503 at once), and
one that waited longer than `--wait-ms`, or past its own deadline, is answered 504 without work. It predicts nothing and has no rungs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import uvicorn
from fastapi import FastAPI, Request, Response

from benchmarks.peers.work import until_s, work_of


def error(status: int, code: str, message: str) -> Response:
    body = json.dumps({"error": {"code": code, "message": message}})
    return Response(body, status_code=status, media_type="application/json")


def create(mode: str, threads: int, limit: int, wait_ms: float) -> FastAPI:
    work = work_of(mode, threads)
    app = FastAPI()
    turn = ThreadPoolExecutor(1)  # its own queue is first in, first out
    inside, counting = 0, threading.Lock()

    def job(data: bytes, arrived_s: float, until: float) -> bytes | None:
        nonlocal inside
        try:
            now = time.monotonic()
            if now >= until or (now - arrived_s) * 1e3 > wait_ms:
                return None
            return work(data)
        finally:
            with counting:
                inside -= 1

    @app.get("/ready")
    async def ready() -> Response:
        return Response("ready")

    @app.post("/api/studies")
    async def answer(request: Request) -> Response:
        nonlocal inside
        arrived_s = time.monotonic()
        data = await request.body()
        with counting:
            full = inside >= limit
            inside += not full
        if full:
            return error(503, "fifo.full", f"{limit} requests are inside")
        found = await asyncio.get_running_loop().run_in_executor(turn, job, data, arrived_s, until_s(request.headers, arrived_s))
        if found is None:
            return error(504, "fifo.expired", "its time was over when its turn came")
        return Response(found, media_type="application/json" if mode == "study" else "application/octet-stream")

    return app


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.fifo_server", description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--mode", choices=("study", "infer"), default="study")
    parser.add_argument("--threads", type=int, default=0, help="of the runtime; 0 leaves it the choice")
    parser.add_argument("--limit", type=int, default=4, help="requests inside, the one at work included")
    parser.add_argument("--wait-ms", type=float, default=float("inf"), help="drop what waited longer, whatever its own deadline")
    args = parser.parse_args(argv)
    uvicorn.run(create(args.mode, args.threads, args.limit, args.wait_ms), port=args.port, log_level="warning")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
