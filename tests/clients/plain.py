"""The questions of asking.py over plain HTTP, from the standard library: what all clients must agree with."""

import json
import urllib.error
import urllib.request
from typing import cast

from asking import Asked, Server, refusals

Json = dict[str, object]
TIMEOUT_S = 120.0


class Refused(Exception):
    """An HTTP status of 400 or more."""

    def __init__(self, status: int) -> None:
        super().__init__(f"HTTP status {status}")
        self.status = status


def models(server: Server) -> list[str]:
    answer = _send(server, "/v1/models", None, server.any_key)
    return [str(model["id"]) for model in cast("list[Json]", answer["data"])]


def answers(server: Server, asked: Asked) -> Json:
    """Name of an answer -> the answer."""
    return (
        {"models": models(server), "refused": _refused(server, asked)}
        | _completions(server, asked)
        | _chats(server, asked)
    )


def _completions(server: Server, asked: Asked) -> Json:
    seeded = {"temperature": asked.temperature, "seed": asked.seed}

    def ask(**fields: object) -> list[Json]:
        body = {"model": server.model, "prompt": asked.prompt, "max_tokens": asked.max_tokens, "temperature": 0}
        return cast("list[Json]", _send(server, "/v1/completions", body | fields, server.any_key)["choices"])

    (greedy,) = ask(logprobs=1)
    (stopped,) = ask(stop=asked.stop)
    return {
        "completion": greedy["text"],
        "completion_tokens": cast("Json", greedy["logprobs"])["tokens"],
        "completion_logprobs": cast("Json", greedy["logprobs"])["token_logprobs"],
        "completion_choices": [choice["text"] for choice in ask(n=asked.n, **seeded)],
        "completion_stopped": stopped["text"],
        "completion_seeded": ask(**seeded)[0]["text"],
    }


def _chats(server: Server, asked: Asked) -> Json:
    seeded = {"temperature": asked.temperature, "seed": asked.seed}

    def ask(**fields: object) -> Json:
        body = {"model": server.model, "messages": asked.messages, "max_tokens": asked.max_tokens, "temperature": 0}
        return _send(server, "/v1/chat/completions", body | fields, server.any_key)

    greedy = ask(logprobs=True, top_logprobs=2)
    (choice,) = cast("list[Json]", greedy["choices"])
    (stopped,) = cast("list[Json]", ask(stop=asked.stop)["choices"])
    tokens = cast("list[Json]", cast("Json", choice["logprobs"])["content"])
    usage = cast("Json", greedy["usage"])
    return {
        "chat": _texts(greedy)[0],
        "chat_tokens": [token["token"] for token in tokens],
        "chat_logprobs": [token["logprob"] for token in tokens],
        "streamed": _texts(greedy)[0],
        "streamed_usage": [usage["prompt_tokens"], usage["completion_tokens"]],
        "choices": _texts(ask(n=asked.n, **seeded)),
        "stopped": cast("Json", stopped["message"])["content"],
        "stop_reason": stopped["finish_reason"],
        "seeded": _texts(ask(**seeded))[0],
    }


def _texts(answer: Json) -> list[object]:
    return [cast("Json", choice["message"])["content"] for choice in cast("list[Json]", answer["choices"])]


def _refused(server: Server, asked: Asked) -> dict[str, list[str]]:
    def ask(model: str, prompt: str, key: str) -> Json:
        body: Json = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": 1}
        return _send(server, "/v1/chat/completions", body, key)

    return refusals(ask, server, asked, told_by=lambda error: [str(getattr(error, "status", error))])


def _send(server: Server, path: str, body: Json | None, key: str) -> Json:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(server.http + path, None if body is None else json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise Refused(error.code) from None
