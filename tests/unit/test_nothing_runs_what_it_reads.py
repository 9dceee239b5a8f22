"""No module of the product turns bytes into code: what a socket or a file holds is data."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = ("cluster", "deploy", "experts", "router")
MODULES = sorted(path for package in PRODUCT for path in (ROOT / package).rglob("*.py"))

RUNS_WHAT_IT_READS = frozenset({"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "jsonpickle", "code"})
CALLS = frozenset(
    {"eval", "exec", "compile", "os.system", "os.popen", "torch.load", "yaml.load", "numpy.load", "np.load"}
)


def forbidden_in(tree: ast.AST) -> list[str]:
    """What a module does that reads code out of data, or hands a sentence to a shell."""
    found = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Call):
            if ast.unparse(node.func) in CALLS:
                found.append(f"line {node.lineno}: {ast.unparse(node.func)}()")
            found += [
                f"line {node.lineno}: shell=True"
                for keyword in node.keywords
                if keyword.arg == "shell" and not (isinstance(keyword.value, ast.Constant) and not keyword.value.value)
            ]
        found += [f"line {node.lineno}: {name}" for name in names if name.split(".")[0] in RUNS_WHAT_IT_READS]  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_reads_data_and_runs_none_of_it(module: Path) -> None:
    assert not forbidden_in(ast.parse(module.read_text()))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import ray.cloudpickle as a, cloudpickle",
        "def f(x):\n    return eval(x)",
        "torch.load(path)",
        "subprocess.run(line, shell=True)",
        "subprocess.run(line, shell=flag)",
    ],
)
def test_what_is_forbidden_is_found(source: str) -> None:
    assert forbidden_in(ast.parse(source))


def test_what_is_allowed_is_not() -> None:
    assert not forbidden_in(
        ast.parse("import json, re\nre.compile('x')\nsubprocess.run(line, shell=False)\nyaml.safe_load(f)")
    )
