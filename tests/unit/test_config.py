"""What a deployment refuses before anything starts, and whether the sentence says what to change."""

import json
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from deploy import config as config_module
from deploy.config import DEFAULT_CONFIG, EMBEDDED, Resolved, check_machine, load, memory_needed, resolve, state_dir
from experts.errors import ConfigError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "c.yaml"


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def refusal(file: Path, text: str, overrides: Mapping[str, object] | None = None) -> str:
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(file, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def changed(nano: Path, tmp_path: Path, **fields: object) -> Path:
    """A copy of the checkpoint with other fields in its config.json; None removes one."""
    folder = shutil.copytree(nano, tmp_path / "changed")
    content = json.loads((folder / "config.json").read_text()) | fields
    content = {key: value for key, value in content.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def resolved(checkpoint: Path | str, file: Path, **overrides: object) -> Resolved:
    file.write_text("")
    named = {name.replace("__", "."): value for name, value in overrides.items()}
    return resolve(load(file, {"model.checkpoint": str(checkpoint), **named}))


# The file.


@pytest.mark.parametrize("text", ["0", "-1.5", ".inf", ".nan", "'1.25'", "true"])
def test_a_capacity_factor_is_a_number_above_0(file: Path, text: str) -> None:
    assert "router.capacity_factor" in refusal(file, f"router: {{capacity_factor: {text}}}")


@pytest.mark.parametrize(("text", "value"), [("null", None), ("1.25", 1.25), ("2", 2.0)])
def test_a_capacity_factor_may_be_left_out(file: Path, text: str, value: float | None) -> None:
    file.write_text(f"router: {{capacity_factor: {text}}}")
    assert load(file).router.capacity_factor == value
    file.write_text("")
    assert load(file).router.capacity_factor is None


def test_the_default_file_loads_and_an_empty_one_means_the_defaults(file: Path) -> None:
    file.write_text("")
    assert load(DEFAULT_CONFIG).experts.groups == load(file).experts.groups == 4


def test_overrides_win_over_the_file(file: Path) -> None:
    file.write_text("experts: {groups: 2, replicas: 3}")
    experts = load(file, {"experts.groups": 8}).experts
    assert (experts.groups, experts.replicas) == (8, 3)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("expert: {groups: 4}", "unknown key expert; did you mean experts?"),
        ("experts: {group: 4}", "unknown key experts.group; did you mean groups?"),
        ("model: {max_model_length: 9}", "unknown key model.max_model_length; did you mean max_model_len?"),
        ("router: {qqq: 1}", "unknown key router.qqq; known: replicas, dispatch_timeout_s, capacity_factor, num_cpus"),
        ("qqq: {}", "unknown key qqq; known: model, gateway, attention, router, experts"),
        ("1: 2", "keys should be strings"),
        ("experts: {groups: four}", "experts.groups is 'four'"),
        ("experts: {groups: 4.5}", "experts.groups is 4.5"),
        ("experts: {groups: 0}", "experts.groups is 0: input should be greater than or equal to 1"),
        ("experts: {groups: }", "experts.groups is None"),
        ("experts: 3", "experts is 3"),
        ("experts: {num_cpus: .nan}", "experts.num_cpus is nan"),
        (
            "experts: {compute: fast}",
            "experts.compute is 'fast': input should be 'auto', 'loop', 'kernel' or 'grouped'",
        ),
        ("gateway: {http_port: 70000}", "gateway.http_port is 70000"),
        ("gateway: {http_host: 3}", "gateway.http_host is 3"),
        ("model: {dtype: int8}", "model.dtype is 'int8': input should be 'auto', 'float32', 'bfloat16' or 'float16'"),
        ("attention: {step_timeout_s: 0}", "attention.step_timeout_s is 0"),
        (
            "- experts",
            "must hold sections (model, gateway, attention, router, experts, autoscale, metrics, traces, placement)",
        ),
        ("experts: [", "is not YAML"),
    ],
)
def test_a_file_with_a_mistake_is_refused_with_a_sentence_that_names_it(file: Path, text: str, sentence: str) -> None:
    found = refusal(file, text)
    assert sentence in found and str(file) in found


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the config file .*none\.yaml: No such file"):
        load(tmp_path / "none.yaml")


def test_an_unknown_override_is_refused_like_an_unknown_key(file: Path) -> None:
    assert "did you mean groups?" in refusal(file, "", {"experts.group": 2})


def test_an_override_of_an_empty_section_sets_it(file: Path) -> None:
    file.write_text("experts:\n")
    assert load(file, {"experts.groups": 2}).experts.groups == 2


def test_an_override_inside_something_that_is_no_section_is_refused(file: Path) -> None:
    assert "experts" in refusal(file, "experts: 3", {"experts.groups": 2})


def test_a_file_that_is_not_text_is_refused(file: Path) -> None:
    file.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError):
        load(file)


# The checkpoint.


def test_a_checkpoint_is_opened_and_named(nano: Path, file: Path) -> None:
    found = resolved(nano, file, model__max_model_len=512)
    assert (found.served_name, found.dtype, found.max_rows) == (nano.name, "bfloat16", 512)
    assert found.checkpoint.shape.num_experts == 32
    assert resolved(nano, file, model__served_name="mine").served_name == "mine"
    assert resolved(nano, file, model__dtype="float32").dtype == "float32"
    assert resolved(nano, file, model__max_model_len=16, attention__max_num_seqs=64).max_rows == 64
    assert resolved(nano, file, model__max_model_len=512, attention__max_num_batched_tokens=2048).max_rows == 2048
    assert resolved(nano, file, model__max_model_len=512, attention__max_num_batched_tokens=1).max_rows == 512


def test_embedded_is_the_checkpoint_that_comes_with_the_package(file: Path) -> None:
    file.write_text("")
    found = resolve(load(file))
    assert (found.served_name, found.checkpoint.path) == ("expertmesh-nano", EMBEDDED)


def test_a_missing_checkpoint_is_named(tmp_path: Path, file: Path) -> None:
    with pytest.raises(ConfigError, match="no-such-folder"):
        resolved(tmp_path / "no-such-folder", file)


@pytest.mark.parametrize("groups", [3, 5, 16, 32])
def test_a_number_of_groups_that_does_not_divide_is_refused_with_those_that_do(
    nano: Path, file: Path, groups: int
) -> None:
    sentence = rf"experts\.groups is {groups}, which does not divide n_group \(8\); set it to one of 1, 2, 4, 8"
    with pytest.raises(ConfigError, match=sentence):
        resolved(nano, file, experts__groups=groups)


def test_a_length_beyond_the_context_is_refused(nano: Path, file: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_model_len is 4097, and the checkpoint's context is 4096: lower it"):
        resolved(nano, file, model__max_model_len=4097)
    resolved(nano, file, model__max_model_len=4096)


@pytest.mark.parametrize("field", ["kv_lora_rank", "qk_rope_head_dim"])
def test_a_latent_layout_that_the_cpu_lacks_is_refused_there_only(
    nano: Path, tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    other = changed(nano, tmp_path, **{field: 128})
    with pytest.raises(ConfigError, match=r"needs kv_lora_rank 512 and qk_rope_head_dim 64.*128.*CUDA GPU"):
        resolved(other, file)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    resolved(other, file)


@pytest.mark.parametrize("rope", [None, {"rope_type": "default"}, {"rope_type": "linear", "factor": 2.0}])
def test_a_rope_that_the_cpu_computes_wrong_is_refused(nano: Path, tmp_path: Path, file: Path, rope: object) -> None:
    with pytest.raises(ConfigError, match="rope_type is (default|linear).*use a checkpoint with yarn"):
        resolved(changed(nano, tmp_path, rope_parameters=rope), file)


def test_the_older_spelling_of_yarn_is_understood(nano: Path, tmp_path: Path, file: Path) -> None:
    older = {"type": "yarn", "factor": 4.0}
    resolved(changed(nano, tmp_path, rope_parameters=None, rope_scaling=older), file)


def test_a_model_without_latent_attention_has_none_of_its_limits(nano: Path, tmp_path: Path, file: Path) -> None:
    resolved(changed(nano, tmp_path, kv_lora_rank=None, rope_parameters=None), file)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
        ({"topk_method": "random"}, "topk_method 'random' is not supported"),
        ({"scoring_func": "relu"}, "scoring_func 'relu' is not supported"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok"),
    ],
)
def test_a_checkpoint_that_we_cannot_serve_is_refused(
    nano: Path, tmp_path: Path, file: Path, fields: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        resolved(changed(nano, tmp_path, **fields), file)


# The machine.


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize("key", ["http_port", "grpc_port"])
def test_a_port_in_use_is_refused_by_its_key(nano: Path, file: Path, taken: int, key: str) -> None:
    ports: dict[str, object] = {
        "gateway__http_port": free_port(),
        "gateway__grpc_port": free_port(),
        f"gateway__{key}": taken,
    }
    ports["gateway__auth"] = "none"
    with pytest.raises(ConfigError, match=rf"gateway\.{key}: port {taken} is in use"):
        check_machine(resolved(nano, file, **ports))


def test_one_port_for_both_is_refused(nano: Path, file: Path) -> None:
    port = free_port()
    with pytest.raises(ConfigError, match=f"are both {port}: they must differ"):
        check_machine(resolved(nano, file, gateway__http_port=port, gateway__grpc_port=port))


def test_without_a_key_nothing_that_wants_keys_is_started(
    nano: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EXPERTMESH_API_KEYS", raising=False)
    with pytest.raises(ConfigError, match="there is no key"):
        check_machine(resolved(nano, file, gateway__http_port=free_port(), gateway__grpc_port=free_port()))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.com"])
def test_without_keys_only_loopback_is_served(nano: Path, file: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="without keys only loopback is served"):
        resolved(nano, file, gateway__auth="none", gateway__grpc_host=host)


def test_too_little_memory_is_refused_with_what_is_needed_and_what_is_there(
    nano: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ports = {"gateway__http_port": free_port(), "gateway__grpc_port": free_port()}
    found = resolved(nano, file, gateway__auth="none", **ports)
    monkeypatch.setattr(config_module, "_cannot_bind", lambda host, port: None)
    needed = memory_needed(found)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=needed))
    check_machine(found)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 30))
    with pytest.raises(ConfigError, match=rf"needs about {needed / 2**30:.1f} GiB .* and 1\.0 GiB are free"):
        check_machine(found)


def test_more_of_anything_needs_more_memory(nano: Path, file: Path) -> None:
    least = memory_needed(resolved(nano, file, model__dtype="bfloat16"))
    for more in (
        {"model__dtype": "float32"},
        {"experts__replicas": 2},
        {"attention__replicas": 2},
        {"attention__kv_cache_mib": 1024},
    ):
        assert memory_needed(resolved(nano, file, **{"model__dtype": "bfloat16", **more})) > least


def test_the_state_folder_is_what_the_environment_says_or_lies_in_the_source_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EXPERTMESH_HOME", raising=False)
    assert state_dir() == DEFAULT_CONFIG.parents[2] / ".expertmesh"
    monkeypatch.setenv("EXPERTMESH_HOME", str(tmp_path / "home"))
    assert state_dir() == tmp_path / "home"
