"""What an attention engine reads and holds of a checkpoint, and under which conditions it does not start."""

import importlib.metadata
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from engine_runs import (
    Checkpoints,
    EngineError,
    EngineProcess,
    Reference,
    RemoteRun,
    plain_arguments,
    remote_arguments,
)
from local_plane import PlaneProcess

START_TIMEOUT_S = 1.0


PRESETS = ["nano", "v3", "qwen3-moe", "mixtral"]


@pytest.fixture(scope="module")
def plane(checkpoints: Checkpoints) -> Iterator[PlaneProcess]:
    """Serves the checkpoint `nano` in float32."""
    with PlaneProcess(checkpoints("nano"), dtype="float32", num_groups=2, max_rows=128) as plane:
        yield plane


@pytest.mark.parametrize("preset", PRESETS)
def test_no_expert_tensor_is_read(preset: str, remote_run: RemoteRun, checkpoints: Checkpoints) -> None:
    others = [name for name in _tensor_names(checkpoints(preset)) if ".experts." not in name]
    assert sorted(remote_run(preset).tensors_read) == sorted(others)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_parameters_are_everything_but_the_routed_experts(
    preset: str, remote_run: RemoteRun, reference: Reference
) -> None:
    everything = reference(preset).parameters
    routed = {name for name in everything if name.endswith((".w13_weight", ".w2_weight"))}
    assert routed
    assert remote_run(preset).parameters == {name: size for name, size in everything.items() if name not in routed}


def test_an_engine_without_a_router_does_not_start_and_says_so_in_time(
    remote: EngineProcess, plane: PlaneProcess
) -> None:
    plane.do("stop_router")
    started_s = time.monotonic()
    with pytest.raises(EngineError, match=f"no router within {START_TIMEOUT_S:g} s: .*router.sock"):
        remote.load(remote_arguments(plane.model, max_model_len=128, start_timeout_s=START_TIMEOUT_S))
    assert time.monotonic() - started_s < START_TIMEOUT_S + 20  # the rest is vLLM's start
    plane.do("start_router")


@pytest.mark.parametrize("change", [{"dtype": "bfloat16"}, {"num_groups": 4}, {"checkpoint": "v3"}], ids=str)
def test_an_engine_does_not_start_on_a_router_that_serves_something_else(
    remote: EngineProcess, plane: PlaneProcess, checkpoints: Checkpoints, change: dict[str, str]
) -> None:
    if "checkpoint" in change:
        change = {"checkpoint": str(checkpoints(change["checkpoint"]))}
    other = replace(plane.model, **change)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="no router within .*another secret or checkpoint"):
        remote.load(remote_arguments(other, max_model_len=128, start_timeout_s=START_TIMEOUT_S))


def test_a_frame_that_does_not_hold_the_longest_prompt_is_refused(remote: EngineProcess, plane: PlaneProcess) -> None:
    with pytest.raises(EngineError, match="max_rows=128 must be at least max_model_len=256"):
        remote.load(remote_arguments(plane.model, max_model_len=256))


def test_an_engine_with_compilation_is_refused(remote: EngineProcess, plane: PlaneProcess) -> None:
    with pytest.raises(EngineError, match="does not support graph capture or compilation .set enforce_eager."):
        remote.load(remote_arguments(plane.model, max_model_len=128, enforce_eager=False))


def test_the_plugin_refuses_another_load_format(remote: EngineProcess, checkpoints: Checkpoints) -> None:
    with pytest.raises(EngineError, match="must be loaded with load_format 'remote_experts'"):
        remote.load(plain_arguments(checkpoints("nano")))


def test_vllm_without_the_plugin_refuses_our_load_format(plain: EngineProcess, checkpoints: Checkpoints) -> None:
    with pytest.raises(EngineError, match="remote_experts.* is not supported"):
        plain.load(plain_arguments(checkpoints("nano"), load_format="remote_experts"))


def test_the_installed_distribution_has_the_entry_point() -> None:
    [entry] = importlib.metadata.entry_points(group="vllm.general_plugins", name="expertmesh")
    assert entry.value == "cluster.vllm_plugin:register"
    assert entry.dist is not None and entry.dist.name == "expertmesh"


def test_vllm_finds_the_plugin_through_its_entry_point(remote: EngineProcess) -> None:
    assert remote.do("replaced_layers") == ["RoutedExperts"]


def test_vllm_stays_as_it_is_where_the_plugin_is_not_named(plain: EngineProcess) -> None:
    assert plain.do("replaced_layers") == []


def _tensor_names(checkpoint: Path) -> list[str]:
    return list(json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"])
