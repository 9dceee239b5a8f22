"""What a gateway counts of the requests that come in over HTTP and gRPC."""

from collections import Counter
from collections.abc import Iterator

import pytest
from families import values
from gateway_fakes import FakeEngine, Front, a_front

from cluster.metrics import GATEWAY
from experts.errors import GroupUnavailable


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    yield from a_front(tmp_path_factory.mktemp("model"))


@pytest.fixture
def front(running: Front) -> Iterator[Front]:
    """On exit no request must be counted as open."""
    running.use(FakeEngine())
    yield running
    assert values(GATEWAY.collect(), "expertmesh_open_requests") == {(): 0}


class Ended:
    """Requests that have ended since it was made, by outcome and surface."""

    def __init__(self) -> None:
        self._before = self._counted()

    def __call__(self) -> dict[tuple[str, ...], int]:
        return dict(self._counted() - self._before)

    def _counted(self) -> Counter[tuple[str, ...]]:
        counted = values(GATEWAY.collect(), "expertmesh_requests_total")
        return Counter({ending: int(number) for ending, number in counted.items()})


def times(name: str) -> float:
    return values(GATEWAY.collect(), f"expertmesh_{name}_seconds_count")[()]


def test_answers_are_counted_by_surface_and_looking_at_the_gateway_is_not(front: Front) -> None:
    ended = Ended()
    front.post("/v1/completions", prompt="hello")
    front.post("/v1/chat/completions", messages=[{"role": "user", "content": "hi"}], stream=True)
    front.generate(prompt="hello")
    front.stream(prompt="hello")
    front.request("GET", "/v1/models")
    front.request("OPTIONS", "/v1/completions")
    assert ended() == {("ok", "http"): 2, ("ok", "grpc"): 2}


def test_streams_are_timed_and_answers_in_one_piece_are_not(front: Front) -> None:
    first, later = times("time_to_first_token"), times("inter_token")
    front.post("/v1/completions", prompt="hello")
    front.generate(prompt="hello")
    assert (times("time_to_first_token"), times("inter_token")) == (first, later)
    front.post("/v1/completions", prompt="hello", stream=True)
    front.stream(prompt="hello")
    assert (times("time_to_first_token"), times("inter_token")) == (first + 2, later + 4)


def test_refused_requests_are_counted_under_the_code_that_the_client_is_told(front: Front) -> None:
    ended = Ended()
    front.post("/v1/completions", model="another", prompt="hello")
    front.post("/v1/completions", prompt="x" * 5000)
    front.generate(prompt="hello", temperature=-1)
    front.stream(prompt="hello", model="another")
    assert ended() == {
        ("model_not_found", "http"): 1,
        ("body_too_large", "http"): 1,
        ("invalid_value", "grpc"): 1,
        ("model_not_found", "grpc"): 1,
    }


@pytest.mark.parametrize("words", [[], ["a"]], ids=["before the first token", "after it"])
def test_failed_requests_are_counted_under_their_code(front: Front, words: list[str]) -> None:
    ended = Ended()
    front.engine.words, front.engine.then = words, GroupUnavailable("no live copy of group 1")
    front.post("/v1/completions", prompt="hello")
    front.post("/v1/completions", prompt="hello", stream=True)
    front.generate(prompt="hello")
    front.stream(prompt="hello")
    assert ended() == {("unavailable", "http"): 2, ("unavailable", "grpc"): 2}


def test_a_client_that_leaves_has_cancelled_its_request(front: Front) -> None:
    ended = Ended()

    front.engine.delay_s = 0.05
    front.leave_early(prompt="hello")
    assert ended() == {("cancelled", "grpc"): 1}
