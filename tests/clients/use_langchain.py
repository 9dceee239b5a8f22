# type: ignore  (the packages are of another environment: here there is none of them, or another version)
"""langchain-openai: ChatOpenAI, and OpenAI for plain completions."""

from asking import Asked, Server, refusals, report
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI, OpenAI

SERVER, ASKED = Server.from_environment(), Asked.read()
MESSAGES = [HumanMessage(message["content"]) for message in ASKED.messages]
SEEDED = {"temperature": ASKED.temperature, "seed": ASKED.seed}


def chat_model(**fields: object) -> ChatOpenAI:
    return ChatOpenAI(**common() | fields)


def common() -> dict[str, object]:
    return {
        "model": SERVER.model,
        "base_url": f"{SERVER.http}/v1",
        "api_key": SERVER.any_key,
        "max_tokens": ASKED.max_tokens,
        "temperature": 0,
        "max_retries": 0,
    }


def completions() -> dict[str, object]:
    greedy = OpenAI(**common(), logprobs=1).generate([ASKED.prompt]).generations[0][0]
    seeded = common() | SEEDED
    choices = OpenAI(**seeded, n=ASKED.n, best_of=1).generate([ASKED.prompt]).generations[0]
    return {
        "completion": greedy.text,
        "completion_tokens": greedy.generation_info["logprobs"]["tokens"],
        "completion_choices": [choice.text for choice in choices],
        "completion_stopped": OpenAI(**common()).invoke(ASKED.prompt, stop=ASKED.stop),
        "completion_seeded": OpenAI(**seeded).invoke(ASKED.prompt),
    }


def chats() -> dict[str, object]:
    greedy = chat_model(logprobs=True, top_logprobs=2).invoke(MESSAGES)
    tokens = greedy.response_metadata["logprobs"]["content"]
    stopped = chat_model(stop_sequences=ASKED.stop).invoke(MESSAGES)
    choices = chat_model(n=ASKED.n, **SEEDED).generate([MESSAGES]).generations[0]
    return {
        "chat": greedy.text,
        "chat_tokens": [token["token"] for token in tokens],
        "chat_logprobs": [token["logprob"] for token in tokens],
        "choices": [choice.text for choice in choices],
        "stopped": stopped.text,
        "stop_reason": stopped.response_metadata["finish_reason"],
        "seeded": chat_model(**SEEDED).invoke(MESSAGES).text,
    }


def streamed() -> dict[str, object]:
    text, usage = "", None
    for chunk in chat_model(stream_usage=True).stream(MESSAGES):
        text += chunk.text
        usage = chunk.usage_metadata or usage
    return {"streamed": text, "streamed_usage": [usage["input_tokens"], usage["output_tokens"]]}


def ask(model: str, prompt: str, key: str) -> object:
    return chat_model(model=model, api_key=key, max_tokens=1).invoke(prompt)


if __name__ == "__main__":
    report(completions() | chats() | streamed() | {"refused": refusals(ask, SERVER, ASKED)})
