"""The clients, what each of them can ask for, and how its script is run."""

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from asking import Server
from environments import HERE, node_folder, python_of
from plain import Json

TIMEOUT_S = 300.0
# A client must not ask anything of the network but the cluster, whatever the environment of the tests says.
QUIET = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LANGSMITH_TRACING": "false", "HF_HUB_OFFLINE": "1"}
DROPPED = ("PYTHONPATH", "OPENAI_BASE_URL", "OPENAI_API_KEY", "OPENAI_API_BASE", "http_proxy", "HTTP_PROXY")


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


COMPLETIONS = words("completion completion_choices completion_stopped completion_seeded")
CHATS = words("chat chat_tokens chat_logprobs choices stopped stop_reason seeded streamed streamed_usage")
HTTP = {"unknown_model": "NotFoundError", "too_long": "BadRequestError", "wrong_key": "AuthenticationError"}
GRPC = {"unknown_model": "NOT_FOUND", "too_long": "INVALID_ARGUMENT", "wrong_key": "UNAUTHENTICATED"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """One client package."""

    script: str
    imported: str | None  # the name under which Python imports it; None: JavaScript
    tells: frozenset[str]  # the answers that it can ask for
    refusals: Mapping[str, str]  # why -> the client's own word for it

    def run(self, server: Server, folder: Path) -> Json:
        """What its script got from the cluster."""
        if self.imported is None:
            for name in (self.script, "asked.json"):  # node finds packages from where a script lies
                shutil.copy(HERE / name, node_folder())
            command = ["node", str(node_folder() / self.script)]
        else:
            command = [str(python_of(self.imported)), str(HERE / self.script)]
        done = subprocess.run(
            command, cwd=folder, env=environment(server), capture_output=True, text=True, timeout=TIMEOUT_S
        )
        assert done.returncode == 0, f"{self.script} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return json.loads(done.stdout.splitlines()[-1])


def environment(server: Server) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in DROPPED}
    return kept | QUIET | {"NO_PROXY": "127.0.0.1,localhost"} | server.environment


CLIENTS: Mapping[str, Client] = {
    "openai": Client(
        script="use_openai.py",
        imported="openai",
        tells=COMPLETIONS | CHATS | {"models", "completion_tokens"},
        refusals=HTTP,
    ),
    "openai-js": Client(
        script="use_openai.mjs",
        imported=None,
        tells=COMPLETIONS | CHATS | {"models", "completion_tokens"},
        refusals=HTTP,
    ),
    "langchain-openai": Client(
        script="use_langchain.py",
        imported="langchain_openai",
        tells=COMPLETIONS | CHATS | {"completion_tokens"},
        refusals=HTTP,
    ),
    "llama-index": Client(
        script="use_llama_index.py", imported="llama_index", tells=COMPLETIONS | CHATS, refusals=HTTP
    ),
    "litellm": Client(
        script="use_litellm.py",
        imported="litellm",
        tells=COMPLETIONS | CHATS | {"completion_tokens"},
        refusals=HTTP,
    ),
    "tritonclient": Client(
        script="use_tritonclient.py",
        imported="tritonclient",
        tells=COMPLETIONS
        | words("models live ready model_ready inputs decoupled completion_as_words completion_logprobs with_prompt")
        | words("finish_reason num_output_tokens streamed_completion streamed_seeded after_error after_cancel"),
        refusals=GRPC,
    ),
    "kserve": Client(
        script="use_kserve.py",
        imported="kserve",
        tells=COMPLETIONS | words("live ready model_ready"),
        refusals=GRPC,
    ),
    "grpc-requests": Client(
        script="use_grpc_requests.py",
        imported="grpc_requests",
        tells=words("models completion completion_stopped completion_seeded streamed_completion health"),
        refusals=GRPC,
    ),
}
