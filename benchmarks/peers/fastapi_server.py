"""A thin handler: the body is read, the work is done in a thread, one at a time behind a lock, and the answer is sent.

What somebody writes in an afternoon. No queue limit, no deadline: whatever arrives is worked on, whether or not it is still of use.
"""

from __future__ import annotations

import argparse
import threading

import uvicorn
from fastapi import FastAPI, Request, Response
from starlette.concurrency import run_in_threadpool

from benchmarks.peers.work import work_of


def create(mode: str, threads: int) -> FastAPI:
    work = work_of(mode, threads)
    app = FastAPI()
    engine = threading.Lock()  # an engine has one owner

    def job(data: bytes) -> bytes:
        with engine:
            return work(data)

    @app.get("/ready")
    async def ready() -> Response:
        return Response("ready")

    @app.post("/api/studies")
    async def answer(request: Request) -> Response:
        found = await run_in_threadpool(job, await request.body())
        return Response(found, media_type="application/json" if mode == "study" else "application/octet-stream")

    return app


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.fastapi_server", description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--mode", choices=("study", "infer"), default="study")
    parser.add_argument("--threads", type=int, default=0, help="of the runtime; 0 leaves it the choice")
    args = parser.parse_args(argv)
    uvicorn.run(create(args.mode, args.threads), port=args.port, log_level="warning")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
