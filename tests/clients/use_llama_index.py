# type: ignore  (the packages are of another environment: here there is none of them, or another version)
"""llama-index-llms-openai-like: OpenAILike, for chats and for plain completions."""

from asking import Asked, Server, refusals, report
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

SERVER, ASKED = Server.from_environment(), Asked.read()
MESSAGES = [ChatMessage(**message) for message in ASKED.messages]
SEEDED = {"temperature": ASKED.temperature, "seed": ASKED.seed}


def language_model(**fields: object) -> OpenAILike:
    common = {
        "model": SERVER.model,
        "api_base": f"{SERVER.http}/v1",
        "api_key": SERVER.any_key,
        "max_tokens": ASKED.max_tokens,
        "temperature": 0,
        "max_retries": 0,
        "is_chat_model": True,
    }
    return OpenAILike(**common | fields)


def completions() -> dict[str, object]:
    ask = language_model(is_chat_model=False).complete
    return {
        "completion": ask(ASKED.prompt).text,
        "completion_choices": [choice.text for choice in ask(ASKED.prompt, n=ASKED.n, **SEEDED).raw.choices],
        "completion_stopped": ask(ASKED.prompt, stop=ASKED.stop).text,
        "completion_seeded": ask(ASKED.prompt, **SEEDED).text,
    }


def chats() -> dict[str, object]:
    greedy = language_model(logprobs=True, top_logprobs=2).chat(MESSAGES)
    ask = language_model().chat
    tokens = greedy.raw.choices[0].logprobs.content
    stopped = ask(MESSAGES, stop=ASKED.stop)
    return {
        "chat": greedy.message.content,
        "chat_tokens": [token.token for token in tokens],
        "chat_logprobs": [token.logprob for token in tokens],
        "choices": [choice.message.content for choice in ask(MESSAGES, n=ASKED.n, **SEEDED).raw.choices],
        "stopped": stopped.message.content,
        "stop_reason": stopped.raw.choices[0].finish_reason,
        "seeded": ask(MESSAGES, **SEEDED).message.content,
    }


def streamed() -> dict[str, object]:
    text, usage = "", None
    for part in language_model().stream_chat(MESSAGES, stream_options={"include_usage": True}):
        text += part.delta or ""
        usage = part.raw.usage or usage
    return {"streamed": text, "streamed_usage": [usage.prompt_tokens, usage.completion_tokens]}


def ask(model: str, prompt: str, key: str) -> object:
    return language_model(model=model, api_key=key, max_tokens=1).chat([ChatMessage(role="user", content=prompt)])


if __name__ == "__main__":
    report(completions() | chats() | streamed() | {"refused": refusals(ask, SERVER, ASKED)})
