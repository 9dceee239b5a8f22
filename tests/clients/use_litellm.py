# type: ignore  (the packages are of another environment: here there is none of them, or another version)
"""litellm: completion, and text_completion for plain completions."""

import litellm
from asking import Asked, Server, refusals, report

SERVER, ASKED = Server.from_environment(), Asked.read()
COMMON = {
    "api_base": f"{SERVER.http}/v1",
    "api_key": SERVER.any_key,
    "max_tokens": ASKED.max_tokens,
    "temperature": 0,
    "max_retries": 0,
}
CHAT = COMMON | {"model": f"openai/{SERVER.model}", "messages": ASKED.messages}
COMPLETION = COMMON | {"model": f"text-completion-openai/{SERVER.model}", "prompt": ASKED.prompt}
SEEDED = {"temperature": ASKED.temperature, "seed": ASKED.seed}


def completions() -> dict[str, object]:
    def ask(**fields: object) -> list:
        return litellm.text_completion(**COMPLETION | fields).choices

    greedy = ask(logprobs=1)[0]
    return {
        "completion": greedy.text,
        "completion_tokens": list(greedy.logprobs.tokens),
        "completion_choices": [choice.text for choice in ask(n=ASKED.n, **SEEDED)],
        "completion_stopped": ask(stop=ASKED.stop)[0].text,
        "completion_seeded": ask(**SEEDED)[0].text,
    }


def chats() -> dict[str, object]:
    def ask(**fields: object) -> list:
        return litellm.completion(**CHAT | fields).choices

    greedy = ask(logprobs=True, top_logprobs=2)[0]
    stopped = ask(stop=ASKED.stop)[0]
    return {
        "chat": greedy.message.content,
        "chat_tokens": [token.token for token in greedy.logprobs.content],
        "chat_logprobs": [token.logprob for token in greedy.logprobs.content],
        "choices": [choice.message.content for choice in ask(n=ASKED.n, **SEEDED)],
        "stopped": stopped.message.content,
        "stop_reason": stopped.finish_reason,
        "seeded": ask(**SEEDED)[0].message.content,
    }


def streamed() -> dict[str, object]:
    text, usage = "", None
    for chunk in litellm.completion(**CHAT, stream=True, stream_options={"include_usage": True}):
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        usage = getattr(chunk, "usage", None) or usage
    return {"streamed": text, "streamed_usage": [usage.prompt_tokens, usage.completion_tokens]}


def ask(model: str, prompt: str, key: str) -> object:
    changed = {"model": f"openai/{model}", "messages": [{"role": "user", "content": prompt}], "api_key": key}
    return litellm.completion(**CHAT | changed | {"max_tokens": 1})


if __name__ == "__main__":
    report(completions() | chats() | streamed() | {"refused": refusals(ask, SERVER, ASKED)})
