"""Streams whose attention replica dies: what the caller hears is what an undisturbed run would have said."""

import asyncio
from contextlib import aclosing

import pytest
from continuation_fakes import PROMPT, TOKENIZER, Heard, Replicas, babble, listen, says
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from cluster.continuation import EARLIER_TOKENS, NotContinued, ReplicaLost, Told
from cluster.gateway_errors import Overloaded, refusal_of
from cluster.gateway_failover import ContinuingEngine, Patience
from cluster.gateway_run import run
from experts.errors import DeadlineExceeded, GroupUnavailable

DELTA, CUMULATIVE, FINAL_ONLY = RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE, RequestOutputKind.FINAL_ONLY
TOKENS = 14
SOON = Patience(max_losses=3, wait_s=30, longest_pause_s=0.02)
IMPATIENT = Patience(wait_s=0.5, longest_pause_s=0.02)
TEXT = "Grüße 🎉🎉 aus 日本語, the end is near. Grüße 🎉 日本"
ENDING = TOKENIZER.encode("a")[-1]
PARAMETERS: dict[str, dict[str, object]] = {
    "greedy": {"temperature": 0.0},
    "greedy with log-probabilities": {"temperature": 0.0, "logprobs": 1},
    "greedy, special tokens shown": {"temperature": 0.0, "skip_special_tokens": False},
    "greedy, ended by a token": {"temperature": 0.0, "stop_token_ids": [ENDING], "min_tokens": 6},
    "seeded": {"temperature": 1.0, "seed": 11},
    "three seeded": {"temperature": 1.0, "seed": 11, "n": 3, "logprobs": 1},
    "three seeded, ended by a token": {"temperature": 1.0, "seed": 5, "n": 3, "stop_token_ids": [ENDING]},
}


def hear(replicas: Replicas, params: SamplingParams, *, patience: Patience = SOON) -> list[Heard]:
    engine = ContinuingEngine(replicas, patience=patience)
    return asyncio.run(listen(engine.generate({"prompt_token_ids": PROMPT}, params, "mine"), params))


def asked_for(kind: RequestOutputKind, **fields: object) -> SamplingParams:
    return SamplingParams(**({"max_tokens": TOKENS, "output_kind": kind} | fields))  # type: ignore[arg-type]


@pytest.mark.parametrize("resumes", [True, False], ids=["in the middle", "from the start"])
@pytest.mark.parametrize("kind", [DELTA, CUMULATIVE, FINAL_ONLY], ids=lambda kind: kind.name)
@pytest.mark.parametrize("fields", PARAMETERS.values(), ids=PARAMETERS.keys())
def test_a_death_at_any_place_changes_nothing(
    fields: dict[str, object], kind: RequestOutputKind, resumes: bool
) -> None:
    params = asked_for(kind, **fields)
    undisturbed = hear(Replicas(resumes=resumes), params)
    num_tokens = [len(heard.tokens) for heard in undisturbed]
    # In pieces, each token of each answer is an output.
    for life in range(max(num_tokens) if kind is FINAL_ONLY else sum(num_tokens)):
        replicas = Replicas(lives=[life], resumes=resumes)
        assert hear(replicas, params) == undisturbed
        assert len(replicas.asked) == 2 and not replicas.open


@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.data())
def test_stop_strings_and_split_characters_across_several_deaths_change_nothing(data: st.DataObject) -> None:
    begin = data.draw(st.integers(0, len(TEXT) - 2))
    stops = [TEXT[begin : begin + data.draw(st.integers(1, 6))], "never said", "日本x"]
    params = asked_for(
        data.draw(st.sampled_from([DELTA, CUMULATIVE])),
        temperature=0.0,
        max_tokens=len(TOKENIZER.encode(TEXT, add_special_tokens=False)),
        stop=stops,
        min_tokens=data.draw(st.integers(0, 12)),
        include_stop_str_in_output=data.draw(st.booleans()),
    )
    undisturbed = hear(Replicas(model=says(TEXT)), params)
    lives = data.draw(st.lists(st.integers(1, 20), max_size=3))
    resumes = data.draw(st.booleans())
    assert hear(Replicas(model=says(TEXT), lives=lives, resumes=resumes), params) == undisturbed


def test_the_text_is_the_scripts() -> None:
    """So that the tests above compare something."""
    num_tokens = len(TOKENIZER.encode(TEXT, add_special_tokens=False))
    [heard] = hear(Replicas(model=says(TEXT), lives=[7]), asked_for(DELTA, temperature=0.0, max_tokens=num_tokens))
    assert heard.text == TEXT
    [stopped] = hear(Replicas(model=says(TEXT), lives=[7]), asked_for(DELTA, max_tokens=num_tokens, stop=["日本"]))
    assert (stopped.text, stopped.stop_reason) == ("Grüße 🎉🎉 aus ", "日本")


def test_an_unseeded_stream_goes_on_behind_its_last_token() -> None:
    replicas = Replicas(lives=[5, 4])
    [heard] = hear(replicas, asked_for(DELTA, temperature=1.0))
    earlier = [params.extra_args[EARLIER_TOKENS] for _, params in replicas.asked[1:] if params.extra_args]
    assert [len(tokens) for tokens in earlier] == [5, 9] and len(heard.tokens) == TOKENS
    assert all(heard.tokens[: len(tokens)] == tokens for tokens in earlier)
    assert [request_id for request_id, _ in replicas.asked] == ["mine", "mine.1", "mine.2"]


def test_unseeded_answers_that_cannot_begin_in_the_middle_get_a_seed_to_be_computed_again_from() -> None:
    params = asked_for(DELTA, temperature=1.0, n=3)
    replicas = Replicas(lives=[10])
    heard = hear(replicas, params)
    (_, first), (_, second) = replicas.asked
    assert first.seed == second.seed and params.seed is None
    assert heard == hear(Replicas(), asked_for(DELTA, temperature=1.0, n=3, seed=first.seed))


def test_a_stream_that_would_go_on_with_other_tokens_ends_with_a_typed_error() -> None:
    replicas = Replicas(lives=[5], resumes=False)
    replicas.model = lambda tokens, noise: babble(tokens, len(replicas.asked))
    with pytest.raises(NotContinued, match="other tokens than were already sent") as caught:
        hear(replicas, asked_for(DELTA, temperature=0.0))
    assert (refusal_of(caught.value).http_status, refusal_of(caught.value).retry_after_s) == (503, 1)


def test_an_answer_of_several_is_over_when_the_last_one_is_that_the_caller_waits_for() -> None:
    told = Told(asked_for(DELTA, temperature=1.0, seed=1, n=2))
    told.begin()
    assert told.new_in(output(0, [5], "stop")) and told.new_in(output(1, [6], None))
    told.begin()
    rest = told.new_in(output(1, [6, 7], "length"))  # this time, the second is faster
    assert rest is not None and rest.finished
    assert [list(choice.token_ids) for choice in rest.outputs] == [[7]]


def output(index: int, tokens: list[int], end: str | None) -> RequestOutput:
    choice = CompletionOutput(index, "x" * len(tokens), tokens, None, None, finish_reason=end)
    return RequestOutput("r", None, PROMPT, None, [choice], finished=False)


def test_what_came_with_the_first_token_is_not_asked_for_again() -> None:
    replicas = Replicas(lives=[0, 3])
    hear(replicas, asked_for(DELTA, temperature=0.0, prompt_logprobs=2))
    assert [params.prompt_logprobs for _, params in replicas.asked] == [2, 2, None]


def test_a_request_that_another_replica_refuses_at_first_is_tried_again() -> None:
    between = [ReplicaLost("still routed to the dead one"), Overloaded("everybody came at once"), None]
    engine = ContinuingEngine(replicas := Replicas(lives=[4], between=list(between)), patience=SOON)
    params = asked_for(DELTA, temperature=0.0)
    heard = asyncio.run(listen(engine.generate({"prompt_token_ids": PROMPT}, params, "mine"), params))
    assert heard == hear(Replicas(), params)
    assert (len(replicas.asked), engine.continued, engine.given_up) == (4, 1, 0)


@pytest.mark.parametrize("error", [GroupUnavailable("poisoned"), Overloaded("full"), DeadlineExceeded("late")])
def test_what_is_no_loss_of_a_replica_is_not_repeated(error: Exception) -> None:
    class Refusing(Replicas):
        async def generate(self, prompt, params, request_id):
            self.asked.append((request_id, params))
            raise error
            yield

    replicas = Refusing()
    with pytest.raises(type(error)):
        hear(replicas, asked_for(DELTA))
    assert len(replicas.asked) == 1


@pytest.mark.parametrize("kind", [DELTA, FINAL_ONLY], ids=lambda kind: kind.name)
def test_patience_ends_when_no_replica_comes(kind: RequestOutputKind) -> None:
    gone = ReplicaLost("no replica")
    engine = ContinuingEngine(replicas := Replicas(lives=[4], between=[gone] * 1000), patience=IMPATIENT)
    params = asked_for(kind, temperature=0.0)
    with pytest.raises(ReplicaLost):
        asyncio.run(listen(engine.generate({"prompt_token_ids": PROMPT}, params, "mine"), params))
    assert (engine.continued, engine.given_up, replicas.open) == (0, 1, 0)
    assert 2 < len(replicas.asked) < 60  # it pauses


def test_a_replica_that_stays_silent_is_not_waited_for_longer() -> None:
    class Silent(Replicas):
        async def generate(self, prompt, params, request_id):
            if self.asked:
                await asyncio.sleep(60)
            async for output in super().generate(prompt, params, request_id):
                yield output

    with pytest.raises(ReplicaLost, match="in time"):
        hear(Silent(lives=[4]), asked_for(DELTA, temperature=0.0), patience=IMPATIENT)


def test_a_request_loses_so_many_replicas_and_no_more() -> None:
    params = asked_for(DELTA, temperature=0.0)
    assert hear(Replicas(lives=[1, 1, 1]), params) == hear(Replicas(), params)
    with pytest.raises(ReplicaLost):
        hear(Replicas(lives=[1, 1, 1, 1]), params)


def test_the_requests_own_deadline_ends_the_search() -> None:
    async def run_late() -> None:
        engine = ContinuingEngine(Replicas(lives=[4], between=[ReplicaLost("no replica")] * 1000))
        deadline = asyncio.get_running_loop().time() + 0.2
        async with aclosing(run(engine, PROMPT, asked_for(DELTA), "mine", deadline=deadline)) as outputs:
            async for _ in outputs:
                pass

    with pytest.raises(DeadlineExceeded):
        asyncio.run(run_late())


def test_a_caller_that_leaves_closes_the_engine_that_has_its_request() -> None:
    async def leave() -> None:
        engine = ContinuingEngine(replicas := Replicas(lives=[2]), patience=SOON)
        async with aclosing(engine.generate({"prompt_token_ids": PROMPT}, asked_for(DELTA), "mine")) as outputs:
            for _ in range(4):
                await anext(outputs)
            assert replicas.open == 1
        assert replicas.open == 0

    asyncio.run(leave())


def test_an_engine_that_was_shut_down_is_a_lost_one() -> None:
    class ShutDown(Replicas):
        async def generate(self, prompt, params, request_id):
            async for output in super().generate(prompt, params, request_id):
                if len(self.asked) == 1:
                    output.outputs[0].finish_reason = "abort"
                yield output

    params = asked_for(DELTA, temperature=0.0)
    assert hear(replicas := ShutDown(), params) == hear(Replicas(), params)
    assert len(replicas.asked) == 2


def test_an_answer_is_marked_where_dropped_rows_could_have_been_lost_with_a_replica() -> None:
    def marks(params: SamplingParams, lives: list[int], *, drops_rows: bool) -> list[int]:
        engine = ContinuingEngine(Replicas(lives=lives), drops_rows=drops_rows)
        heard = asyncio.run(listen(engine.generate({"prompt_token_ids": PROMPT}, params, "mine"), params))
        return [answer.dropped_rows for answer in heard]

    stream, again = asked_for(DELTA), asked_for(DELTA, n=2, temperature=1.0)
    assert marks(stream, [5], drops_rows=True) == [4]  # the three that it says, and at least one
    assert marks(stream, [5], drops_rows=False) == marks(stream, [0], drops_rows=True) == [3]
    assert marks(again, [5], drops_rows=True) == [3, 3]  # computed from the start
