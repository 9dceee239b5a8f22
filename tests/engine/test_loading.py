"""What an attention engine reads and holds of a checkpoint, and under which conditions it does not start."""

import importlib.metadata
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from engine_runs import Checkpoints, EngineError, EngineProcess, plain_arguments, remote_arguments
from local_plane import PlaneProcess

START_TIMEOUT_S = 1.0


@pytest.fixture(scope="module", params=["nano", "v3", "qwen3-moe", "mixtral"])
def preset(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def loaded(preset: str, remote: EngineProcess, checkpoints: Checkpoints) -> EngineProcess:
    """An engine of ours that has loaded; its plane is gone already."""
    with PlaneProcess(checkpoints(preset), dtype="float32", num_groups=2) as plane:
        remote.load(remote_arguments(plane.model))
    return remote


def test_no_expert_tensor_is_read(loaded: EngineProcess, preset: str, checkpoints: Checkpoints) -> None:
    assert sorted(loaded.tensors_read()) == sorted(
        n for n in _tensor_names(checkpoints(preset)) if ".experts." not in n
    )


def test_the_parameters_are_everything_but_the_routed_experts(
    loaded: EngineProcess, preset: str, plain: EngineProcess, checkpoints: Checkpoints
) -> None:
    plain.load(plain_arguments(checkpoints(preset)))
    everything, held = plain.parameters(), loaded.parameters()
    routed = {name for name in everything if ".routed_experts." in name and "bias" not in name}
    assert routed
    assert held == {name: size for name, size in everything.items() if name not in routed}


def test_an_engine_without_a_router_does_not_start_and_says_so_in_time(
    remote: EngineProcess, checkpoints: Checkpoints
) -> None:
    with PlaneProcess(checkpoints("nano"), dtype="float32", num_groups=2) as plane:
        plane.do("stop_router")
        started_s = time.monotonic()
        with pytest.raises(EngineError, match=f"no router within {START_TIMEOUT_S:g} s: .*router.sock"):
            remote.load(remote_arguments(plane.model, start_timeout_s=START_TIMEOUT_S))
        assert time.monotonic() - started_s < START_TIMEOUT_S + 20  # the rest is vLLM's start


def test_an_engine_does_not_start_on_a_router_of_another_checkpoint(
    remote: EngineProcess, checkpoints: Checkpoints
) -> None:
    with PlaneProcess(checkpoints("nano"), dtype="float32", num_groups=2) as plane:
        other = replace(plane.model, checkpoint=str(checkpoints("v3")))
        with pytest.raises(EngineError, match="no router within .*another secret or checkpoint"):
            remote.load(remote_arguments(other, start_timeout_s=START_TIMEOUT_S))


def test_an_engine_does_not_start_on_a_router_of_another_dtype(remote: EngineProcess, checkpoints: Checkpoints) -> None:
    with PlaneProcess(checkpoints("nano"), dtype="float32", num_groups=2) as plane:
        other = replace(plane.model, dtype="bfloat16")
        with pytest.raises(EngineError, match="no router within .*another secret or checkpoint"):
            remote.load(remote_arguments(other, start_timeout_s=START_TIMEOUT_S))


def test_a_frame_that_does_not_hold_the_longest_prompt_is_refused(
    remote: EngineProcess, checkpoints: Checkpoints
) -> None:
    with (
        PlaneProcess(checkpoints("nano"), dtype="float32", num_groups=2, max_rows=64) as plane,
        pytest.raises(EngineError, match="max_rows=64 must be at least max_model_len=256"),
    ):
        remote.load(remote_arguments(plane.model))


def test_an_engine_with_compilation_is_refused(remote: EngineProcess, checkpoints: Checkpoints) -> None:
    with (
        PlaneProcess(checkpoints("nano"), dtype="float32", num_groups=2) as plane,
        pytest.raises(EngineError, match="does not support graph capture or compilation .set enforce_eager."),
    ):
        remote.load(remote_arguments(plane.model, enforce_eager=False))


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
