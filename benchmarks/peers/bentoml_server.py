"""BentoML as its documentation has it: a service with one worker, raw bytes in through a file, bytes out.

Its time-out holds for all requests (here: the longest deadline offered) and answers 504 while the work goes on; the work of a thread
cannot be taken back. `max_concurrency`, its limit, is left off: it would answer 429. The launcher says mode and threads by environment
variables, because `bentoml serve` takes none of ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import bentoml
from bentoml.validators import ContentType

from benchmarks.peers.work import LONGEST_S, from_environment, work_of

MODE, THREADS = from_environment()
GIVES = "application/json" if MODE == "study" else "application/octet-stream"


@bentoml.service(workers=1, traffic={"timeout": LONGEST_S}, logging={"access": {"enabled": False}})
class Studies:
    def __init__(self) -> None:
        self._work = work_of(MODE, THREADS)

    @bentoml.api(route="/api/studies")
    def answer(self, data: Annotated[Path, ContentType("application/octet-stream")], /) -> Annotated[bytes, ContentType(GIVES)]:
        return self._work(data.read_bytes())
