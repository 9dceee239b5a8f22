"""Every snippet of the README's section on clients runs as it stands there, but for the address.

A block without a language is for the shell, as everywhere in the README; python and js blocks are whole programs.
Blocks marked text, json or yaml show something, and are not run. Python runs where its client is installed: in the
client's environment, or in ours where it imports `cluster`.
"""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from asking import Server
from environments import GROUPS, ROOT, node_folder, python_of

README = ROOT / "README.md"
SECTION = "## Clients"
HTTP, GRPC = "127.0.0.1:8000", "127.0.0.1:9000"  # what the README says
SHELL, PYTHON, JAVASCRIPT = {"", "bash", "sh"}, {"python"}, {"js", "javascript"}
SHOWN = {"text", "json", "yaml"}
TIMEOUT_S = 120.0
_BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Snippet:
    """One fenced block."""

    line: int  # of the README
    language: str
    code: str

    @property
    def name(self) -> str:
        return f"line {self.line}: {self.language or 'shell'}"


def snippets() -> Iterator[Snippet]:
    """The blocks of the section on clients, those that are only shown left out."""
    before, heading, rest = README.read_text().partition(f"\n{SECTION}\n")
    assert heading, f"the README has no section {SECTION!r}"
    section = rest.partition("\n## ")[0]
    for found in _BLOCK.finditer(section):
        line = (before + heading + section[: found.start()]).count("\n") + 1
        language = found[1].strip()
        assert language in SHELL | PYTHON | JAVASCRIPT | SHOWN, f"README, line {line}: what is {language!r}?"
        if language not in SHOWN:
            yield Snippet(line=line, language=language, code=found[2])


SNIPPETS = list(snippets())


def addressed(code: str, server: Server) -> str:
    return code.replace(HTTP, server.http.removeprefix("http://")).replace(GRPC, server.grpc)


def interpreter_of(code: str) -> str:
    """The Python that has what the code imports."""
    modules = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    clients = sorted(modules & GROUPS.keys())
    return str(python_of(clients[0])) if clients and "cluster" not in modules else sys.executable


def run(snippet: Snippet, server: Server, folder: Path) -> str:
    """What it prints. Raises AssertionError if it fails."""
    code = addressed(snippet.code, server)
    (folder / ".curlrc").write_text("fail-with-body\n")  # or curl would take a refusal for an answer
    # Programs of the clients' packages are there as after an installation.
    path = [str(node_folder() / "node_modules" / ".bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    found = os.environ | {"PATH": ":".join(path), "CURL_HOME": str(folder), "PYTHONPATH": str(ROOT)}
    found |= {"EXPERTMESH_API_KEY": server.any_key, "OPENAI_API_KEY": server.any_key}
    script = folder / "snippet.py"
    if snippet.language in SHELL:
        command = ["bash", "-euo", "pipefail", "-c", code]
    elif snippet.language in PYTHON:
        script.write_text(code)
        command = [interpreter_of(code), str(script)]
    else:
        script = node_folder() / f"readme-{snippet.line}.mjs"  # node finds packages from where a script lies
        script.write_text(code)
        command = ["node", str(script)]
    done = subprocess.run(command, cwd=folder, env=found, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, f"{snippet.name} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_section_on_clients_has_snippets() -> None:
    assert {snippet.language for snippet in SNIPPETS} & PYTHON
    assert {snippet.language for snippet in SNIPPETS} & SHELL


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.name)
def test_a_snippet_of_the_readme_runs_as_it_stands(snippet: Snippet, open_server: Server, tmp_path: Path) -> None:
    printed = run(snippet, open_server, tmp_path)
    assert printed.strip()
    assert '"error"' not in printed  # a stream that fails after its first byte
