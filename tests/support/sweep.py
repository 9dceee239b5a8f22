"""The sweep: hundreds of malformed requests to a running gateway, and a good one directly after each.

    result = run_sweep(Doors(http="127.0.0.1:8000", grpc="127.0.0.1:9000", model="deepseek-v2-lite", key=None))
    assert not result.failures, "\\n".join(result.failures)

A malformed request passes if it ends within five seconds, in a way that its case allows, and its answer tells nothing
of the server's inside. A good one passes if it is answered; every twentieth generates two tokens.
"""

import json
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from malformed import SURFACES, Case, Surface, cases
from malformed_case import SILENT, Http1, RpcCase, WireCase, get
from malformed_grpc import GENERATE, MODEL_INFO
from sweep_wire import Answer, grpc_answer, http2_answer, http_answer

from cluster.proto.expertmesh.v1 import inference_pb2 as pb

CASE_TIMEOUT_S = 5.0
GOOD_TIMEOUT_S = 90.0  # of a generation, which may go on to the end of the context on a machine that is busy
_CONCURRENCY = 4
_GENERATE_EVERY = 20
_DEAD_AFTER = 5  # good requests that fail; what follows would only wait for as long
_ALWAYS_WRONG = ("UNKNOWN", "DATA_LOSS", SILENT)
_INSIDE = re.compile(
    rb'Traceback| at 0x[0-9a-f]|File "|\.py\b|site-packages|internal error'
    rb"|/(?:usr|home|opt|root|tmp|var|work|srv|mnt|etc|proc|venv|\.venv)/"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Doors:
    """Where a gateway listens."""

    http: str  # "host:port"
    grpc: str  # "host:port"
    model: str  # as it is served
    key: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepResult:
    num_cases: int
    num_good: int  # good requests that were answered
    num_generations: int  # of these
    ends: Mapping[str, int]  # "http 400" -> malformed requests that ended so
    slowest: str  # malformed request, with its seconds
    failures: tuple[str, ...]  # in words, by case; empty: the gateway has passed
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
    case: Case
    surface: Surface
    answer: Answer | None  # None: it was not sent any more
    failures: tuple[str, ...]
    generated: bool


def run_sweep(doors: Doors, *, surfaces: Sequence[Surface] = SURFACES, only: str = "") -> SweepResult:
    """Blocks until all is through, about a minute. Raises nothing: what goes wrong is in `failures`.

    only: a part of the names of the cases to send, to look at one again.
    """
    begin = time.monotonic()
    sweep = _Sweep(doors)
    todo = [(surface, case) for surface in surfaces for case in cases(surface, doors.key) if only in case.name]
    with ThreadPoolExecutor(_CONCURRENCY) as threads:
        outcomes = list(threads.map(sweep.run, range(1, len(todo) + 1), todo))
    return _result(outcomes, time.monotonic() - begin)


class _Sweep:
    """Used by several threads; the count of dead ends may be off by one or two, which does no harm."""

    def __init__(self, doors: Doors) -> None:
        self._doors = doors
        self._num_dead = 0

    def run(self, number: int, what: tuple[Surface, Case]) -> _Outcome:
        """One malformed request, and the good one behind it. number: from 1."""
        surface, case = what
        if self._num_dead >= _DEAD_AFTER:
            return _Outcome(case=case, surface=surface, answer=None, failures=(), generated=False)
        answer, wrong = self._malformed(surface, case)
        failures = [f"{case.name}: {why}" for why in wrong]
        generate = number % _GENERATE_EVERY == 0
        why = self._good_over_http(generate) if surface == "http" else self._good_over_grpc(generate)
        if why is not None:
            self._num_dead += 1
            failures.append(f"after {case.name}: a good request {why}")
        generated = generate and why is None
        return _Outcome(case=case, surface=surface, answer=answer, failures=tuple(failures), generated=generated)

    def _malformed(self, surface: Surface, case: Case) -> tuple[Answer, list[str]]:
        try:
            if isinstance(case, RpcCase):
                # Bytes that mean something after all are answered, and that may be with a whole context of tokens.
                answer = grpc_answer(self._doors.grpc, case, GOOD_TIMEOUT_S if "OK" in case.allowed else CASE_TIMEOUT_S)
            elif surface == "http":
                answer = http_answer(self._doors.http, case, CASE_TIMEOUT_S)
            else:
                answer = http2_answer(self._doors.grpc, case, CASE_TIMEOUT_S)
        except OSError as error:
            answer = Answer(end=SILENT, text=b"", seconds=0.0)
            return answer, [f"could not be sent: {error}"]
        return answer, list(wrong_with(case, answer))

    def _good_over_http(self, generate: bool) -> str | None:
        """What is wrong with the answer to a good request, if anything."""
        body = json.dumps({"model": self._doors.model, "prompt": "hi", "max_tokens": 2}).encode()
        wire = (Http1(body=body) if generate else get("/v1/models")).wire(self._doors.key)
        case = WireCase(name="good", wire=wire, allowed=frozenset({"200"}))
        try:
            answer = http_answer(self._doors.http, case, GOOD_TIMEOUT_S if generate else CASE_TIMEOUT_S)
        except OSError as error:
            return f"could not be sent: {error}"
        wanted = b'"completion_tokens"' if generate else self._doors.model.encode()
        if answer.end != "200" or wanted not in answer.text:
            return f"ended with {answer.end}: {_shown(answer)}"
        return None

    def _good_over_grpc(self, generate: bool) -> str | None:
        request = pb.GenerateRequest(model=self._doors.model, prompt="hi", max_tokens=2)
        case = RpcCase(
            name="good",
            method=GENERATE if generate else MODEL_INFO,
            messages=(request.SerializeToString() if generate else b"",),
            metadata=() if self._doors.key is None else (("authorization", f"Bearer {self._doors.key}"),),
            allowed=frozenset({"OK"}),
        )
        answer = grpc_answer(self._doors.grpc, case, GOOD_TIMEOUT_S if generate else CASE_TIMEOUT_S)
        if answer.end != "OK" or len(answer.text) < 2:
            return f"ended with {answer.end}: {_shown(answer)}"
        return None


def wrong_with(case: Case, answer: Answer) -> Iterator[str]:
    """Everything that the answer to a malformed request must not be."""
    is_ours = isinstance(case, RpcCase) and answer.end == "INTERNAL"
    if is_ours or answer.end in _ALWAYS_WRONG or answer.end.startswith("5") or answer.end not in case.allowed:
        allowed = ", ".join(sorted(case.allowed))
        yield f"ended with {answer.end} after {answer.seconds:.1f} s, and not with one of {allowed}: {_shown(answer)}"
    found = _INSIDE.search(answer.text)
    if found is not None:
        begin = max(0, found.start() - 80)
        yield f"its answer tells of the inside: {answer.text[begin : found.end() + 80]!r}"


def _shown(answer: Answer) -> str:
    """The answer's body, or its beginning."""
    _, blank, body = answer.text.partition(b"\r\n\r\n")
    return repr((body if blank else answer.text)[:200])


def _result(outcomes: Sequence[_Outcome], seconds: float) -> SweepResult:
    sent = [(outcome, outcome.answer) for outcome in outcomes if outcome.answer is not None]
    failures = [why for outcome in outcomes for why in outcome.failures]
    if len(sent) < len(outcomes):
        failures.append(f"{len(outcomes) - len(sent)} cases were not sent: {_DEAD_AFTER} good requests had failed")
    slowest_s, name = max(((answer.seconds, each.case.name) for each, answer in sent), default=(0.0, "none was sent"))
    return SweepResult(
        num_cases=len(sent),
        num_good=sum(not any(why.startswith("after ") for why in outcome.failures) for outcome, _ in sent),
        num_generations=sum(outcome.generated for outcome in outcomes),
        ends=dict(sorted(Counter(f"{each.surface} {answer.end}" for each, answer in sent).items())),
        slowest=f"{name}: {slowest_s:.1f} s",
        failures=tuple(failures),
        seconds=seconds,
    )
