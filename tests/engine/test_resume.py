"""A request that begins in the middle of its answer ends like the one that was not disturbed."""

import random
from collections.abc import Iterator, Mapping

import pytest
from engine_runs import PROMPTS, Checkpoints, EngineProcess, remote_arguments
from local_plane import PlaneProcess

from cluster.continuation import EARLIER_TOKENS

TOKENS = 24
DRAWN = {"temperature": 1.0, "seed": 7}
# By name: what a request asks for beside max_tokens. Each looks at earlier output in a way of its own.
PARAMETERS: Mapping[str, Mapping[str, object]] = {
    "greedy": {"temperature": 0.0, "logprobs": 2},
    "greedy, penalties": {"temperature": 0.0, "frequency_penalty": 1.5, "presence_penalty": 0.5},
    "greedy, repetition": {"temperature": 0.0, "repetition_penalty": 1.4},
    "seeded": DRAWN,
    "seeded, filtered": DRAWN | {"top_p": 0.8, "top_k": 40, "logprobs": 2},
    "seeded, penalties": DRAWN | {"frequency_penalty": 1.0, "repetition_penalty": 1.2},
    # Nothing but these tokens can come, and they may end it only from the 20th on.
    "seeded, min_tokens": DRAWN | {"allowed_token_ids": [5, 6, 7, 8], "stop_token_ids": [5, 6, 7], "min_tokens": 20},
    "seeded, bias": DRAWN | {"logit_bias": {9: 4.0}},
}


@pytest.fixture(scope="module")
def engine(remote: EngineProcess, checkpoints: Checkpoints) -> Iterator[EngineProcess]:
    with PlaneProcess(checkpoints("nano"), dtype="float32", num_groups=2) as plane:
        remote.load(remote_arguments(plane.model))
        yield remote


Answer = dict[str, list]


def answers(engine: EngineProcess, earlier: Mapping[str, list[int]]) -> dict[str, Answer]:
    """Of one batch; earlier: by name, the tokens that another engine has computed."""
    params = [
        dict(given) | {"max_tokens": TOKENS, "extra_args": {EARLIER_TOKENS: earlier[name]} if name in earlier else None}
        for name, given in PARAMETERS.items()
    ]
    found = engine.do("sample", prompts=PROMPTS[: len(params)], params=params)
    return dict(zip(PARAMETERS, found, strict=True))


@pytest.fixture(scope="module")
def undisturbed(engine: EngineProcess) -> dict[str, Answer]:
    return answers(engine, {})


@pytest.mark.parametrize("num_earlier", [1, 2, 11, 19])
def test_an_answer_goes_on_as_if_its_beginning_had_been_computed_here(
    engine: EngineProcess, undisturbed: dict[str, Answer], num_earlier: int
) -> None:
    earlier = {name: answer["tokens"][:num_earlier] for name, answer in undisturbed.items()}
    for name, answer in answers(engine, earlier).items():
        assert answer["tokens"] == undisturbed[name]["tokens"], name
        assert answer["logprobs"][num_earlier:] == pytest.approx(undisturbed[name]["logprobs"][num_earlier:], abs=1e-4)
        assert not any(answer["logprobs"][:num_earlier])


def test_requests_at_different_places_share_their_steps(engine: EngineProcess, undisturbed: dict[str, Answer]) -> None:
    rng = random.Random(3)
    for _ in range(3):
        earlier = {
            name: answer["tokens"][: rng.randrange(len(answer["tokens"]))] for name, answer in undisturbed.items()
        }
        found = answers(engine, {name: tokens for name, tokens in earlier.items() if tokens})
        assert {n: a["tokens"] for n, a in found.items()} == {n: a["tokens"] for n, a in undisturbed.items()}


def test_another_seed_gives_another_answer(undisturbed: dict[str, Answer]) -> None:
    """So that the tests above could fail."""
    assert undisturbed["seeded, min_tokens"]["tokens"][-1] in (5, 6, 7)
    assert len(undisturbed["seeded, min_tokens"]["tokens"]) >= 20
    assert len({tuple(answer["tokens"]) for answer in undisturbed.values()}) == len(PARAMETERS)
