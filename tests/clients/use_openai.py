# type: ignore  (the packages are of another environment: here there is none of them, or another version)
"""The openai package."""

from asking import Asked, Server, refusals, report
from openai import OpenAI

SERVER, ASKED = Server.from_environment(), Asked.read()
GREEDY = {"model": SERVER.model, "max_tokens": ASKED.max_tokens, "temperature": 0}
SEEDED = GREEDY | {"temperature": ASKED.temperature, "seed": ASKED.seed}


def client(key: str) -> OpenAI:
    return OpenAI(base_url=f"{SERVER.http}/v1", api_key=key, max_retries=0)


def completions(api: OpenAI) -> dict[str, object]:
    ask = api.completions.create
    greedy = ask(prompt=ASKED.prompt, logprobs=1, **GREEDY).choices[0]
    return {
        "completion": greedy.text,
        "completion_tokens": greedy.logprobs.tokens,
        "completion_choices": [choice.text for choice in ask(prompt=ASKED.prompt, n=ASKED.n, **SEEDED).choices],
        "completion_stopped": ask(prompt=ASKED.prompt, stop=ASKED.stop, **GREEDY).choices[0].text,
        "completion_seeded": ask(prompt=ASKED.prompt, **SEEDED).choices[0].text,
    }


def chats(api: OpenAI) -> dict[str, object]:
    ask = api.chat.completions.create
    greedy = ask(messages=ASKED.messages, logprobs=True, top_logprobs=2, **GREEDY).choices[0]
    stopped = ask(messages=ASKED.messages, stop=ASKED.stop, **GREEDY).choices[0]
    choices = ask(messages=ASKED.messages, n=ASKED.n, **SEEDED).choices
    return {
        "chat": greedy.message.content,
        "chat_tokens": [token.token for token in greedy.logprobs.content],
        "chat_logprobs": [token.logprob for token in greedy.logprobs.content],
        "choices": [choice.message.content for choice in choices],
        "stopped": stopped.message.content,
        "stop_reason": stopped.finish_reason,
        "seeded": ask(messages=ASKED.messages, **SEEDED).choices[0].message.content,
    }


def streamed(api: OpenAI) -> dict[str, object]:
    text, usage = "", None
    stream = api.chat.completions.create(
        messages=ASKED.messages, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    for chunk in stream:
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        usage = chunk.usage or usage
    return {"streamed": text, "streamed_usage": [usage.prompt_tokens, usage.completion_tokens]}


def ask(model: str, prompt: str, key: str) -> object:
    return client(key).chat.completions.create(
        model=model, messages=[{"role": "user", "content": prompt}], max_tokens=1
    )


if __name__ == "__main__":
    api = client(SERVER.any_key)
    listed = {"models": [model.id for model in api.models.list()]}
    report(listed | completions(api) | chats(api) | streamed(api) | {"refused": refusals(ask, SERVER, ASKED)})
