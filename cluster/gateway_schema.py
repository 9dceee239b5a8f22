"""JSON schemas of `response_format`: compiled once before an engine sees them, off the event loop, for a bounded time.

A schema can be made so that its grammar takes hours. An engine would spend them in a thread that nobody can end; the
process that tries it here is killed.
"""

import asyncio
import json
import logging
import os
import sys
from asyncio.subprocess import PIPE, Process

from experts.errors import RequestError, ServingError

log = logging.getLogger(__name__)

COMPILE_TIMEOUT_S = 1.0
START_TIMEOUT_S = 60.0
MAX_WAITING = 16  # schemas; each takes a second at most
MAX_KNOWN = 1024  # schemas that need not be tried again
_FIELD = "response_format"


class SchemaCheck:
    """One child process, started with the first schema and again after each that it had to be killed for."""

    def __init__(self, checkpoint: str, vocab_size: int, *, timeout_s: float = COMPILE_TIMEOUT_S) -> None:
        self._arguments = (checkpoint, str(vocab_size))
        self._timeout_s = timeout_s
        self._process: Process | None = None
        self._turn = asyncio.Lock()
        self._waiting = 0
        self._known: dict[str, None] = {}

    async def check(self, schema: str) -> None:
        """Returns if the schema, as JSON, makes a grammar in time. Raises RequestError, and ServingError where it is
        not known."""
        if schema in self._known:
            return
        if self._waiting >= MAX_WAITING:
            raise ServingError("too many new JSON schemas at a time; try again")
        self._waiting += 1
        try:
            async with self._turn:
                await self._try(schema)
        finally:
            self._waiting -= 1
        self._known[schema] = None
        if len(self._known) > MAX_KNOWN:
            del self._known[next(iter(self._known))]

    async def close(self) -> None:
        """Ends the child."""
        if self._process is not None:
            self._process.kill()
            await self._process.wait()
            self._process = None

    async def _try(self, schema: str) -> None:
        try:
            process = await self._started()
            assert process.stdin is not None
            process.stdin.write(json.dumps(schema).encode() + b"\n")
            async with asyncio.timeout(self._timeout_s):
                verdict = await _line(process)
        except TimeoutError:
            await self.close()
            raise RequestError(
                f"{_FIELD}: the schema takes more than {self._timeout_s:g} s to compile; make it simpler", field=_FIELD
            ) from None
        except BaseException:  # also of a client that leaves: its verdict must not be taken for the next one's
            await self.close()
            raise
        if verdict:
            raise RequestError(f"{_FIELD}: the schema is not one that can be enforced: {verdict}", field=_FIELD)

    async def _started(self) -> Process:
        if self._process is None:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "cluster.schema_process",
                *self._arguments,
                stdin=PIPE,
                stdout=PIPE,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )
            try:
                async with asyncio.timeout(START_TIMEOUT_S):
                    await _line(self._process)
            except TimeoutError:
                raise ServingError("JSON schemas cannot be checked now; try again") from None
        return self._process


async def _line(process: Process) -> str:
    """Raises ServingError where the process has ended."""
    assert process.stdout is not None
    line = await process.stdout.readline()
    if not line:
        log.error("the process that compiles schemas ended", extra={"exit_code": await process.wait()})
        raise ServingError("JSON schemas cannot be checked now; try again")
    return json.loads(line)
