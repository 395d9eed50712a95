"""LitServe as its documentation has it: a LitAPI, one worker process, bytes as base64 in JSON.

Its one time-out holds for all requests (here: the longest deadline offered), is looked at when a request's turn comes, and answers 504;
there is no limit of the queue and no way to a request's own headers in `decode_request`, so deadlines are not seen.
"""

from __future__ import annotations

import argparse
import base64

import litserve
from starlette.responses import Response

from benchmarks.peers.work import LONGEST_S, work_of


class Api(litserve.LitAPI):
    def __init__(self, mode: str, threads: int) -> None:
        super().__init__(api_path="/api/studies")
        self._mode, self._threads = mode, threads

    def setup(self, device: str) -> None:  # noqa: ARG002 - LitServe's own signature
        self._work = work_of(self._mode, self._threads)

    # Without annotations: LitServe reads them, and takes an annotated request for a field of the body.
    def decode_request(self, request):  # type: ignore[no-untyped-def]
        return base64.b64decode(request["data"])

    def predict(self, data: bytes) -> bytes:
        return self._work(data)

    def encode_response(self, output):  # type: ignore[no-untyped-def]
        return Response(output, media_type="application/json" if self._mode == "study" else "application/octet-stream")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.litserve_server", description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--mode", choices=("study", "infer"), default="study")
    parser.add_argument("--threads", type=int, default=0, help="of the runtime; 0 leaves it the choice")
    parser.add_argument("--fast-queue", action="store_true", help="its ZeroMQ queue, made for many workers")
    args = parser.parse_args(argv)
    server = litserve.LitServer(Api(args.mode, args.threads), accelerator="cpu", timeout=LONGEST_S, fast_queue=args.fast_queue)
    server.run(host="127.0.0.1", port=args.port, log_level="warning", generate_client_file=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
