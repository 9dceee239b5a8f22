"""What a checkpoint folder holds, read from its config and its safetensors headers, without any tensor data."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch

from experts.errors import ConfigError
from experts.headers import TensorEntry, read_header
from experts.shape import MoEShape, routing_of

DTYPES: Mapping[str, torch.dtype] = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

# Two spellings of the same three matrices; the keys of the result are always gate, up and down.
_SPELLINGS: Mapping[str, str] = {
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "w1": "gate",
    "w3": "up",
    "w2": "down",
}
_EXPERT = re.compile(
    r"^(?P<home>(?:.+\.)?layers\.(?P<layer>\d+)\.(?:.+\.)?)experts\.(?P<expert>\d+)"
    rf"\.(?P<matrix>{'|'.join(_SPELLINGS)})\.weight$"
)
_ANY_EXPERT = re.compile(r"(?:^|\.)layers\.(?P<layer>\d+)\.(?:.+\.)?experts\.")


class ExpertKey(NamedTuple):
    """One of the three matrices of one routed expert."""

    layer: int
    expert: int
    matrix: str  # gate, up or down


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checked checkpoint: every tensor of every routed expert is there, with the right shape."""

    path: Path
    config: Mapping[str, object]  # config.json
    shape: MoEShape
    tensors: Mapping[str, TensorEntry]  # by name, all tensors of the checkpoint
    fingerprint: str  # sha256, hex: equal for equal files, without reading tensor data
    dtype: torch.dtype  # of the expert tensors on disk
    expert_names: Mapping[ExpertKey, str] = field(repr=False)  # tensor name of each expert matrix
    layer_homes: Mapping[int, str] = field(repr=False)  # layer -> what its names begin with, "model.layers.1.mlp."


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Reads and checks the description of a checkpoint folder.

    path: folder with config.json and either model.safetensors.index.json with its shards or model.safetensors.
    Raises ConfigError, with a sentence that says what to change, for anything that could not be served.
    """
    folder = Path(path)
    config, config_bytes = _read_config(folder)
    routing = routing_of(config)
    digest = hashlib.sha256(config_bytes)
    tensors: dict[str, TensorEntry] = {}
    weight_map = _weight_map(folder)
    for file in sorted(set(weight_map.values()) if weight_map is not None else {"model.safetensors"}):
        header = read_header(folder / file)
        # Lengths between the parts, so that no two different folders give the same bytes.
        digest.update(f"\0{file}\0{header.file_bytes}\0{len(header.raw)}\0".encode())
        digest.update(header.raw)
        tensors |= header.tensors
    if weight_map is not None:
        _check_index(folder, weight_map, tensors)
    names = _find_experts(tensors, config)
    shape = _shape_of(names, tensors, config, routing)
    homes = {key.layer: _home(name) for key, name in names.items()}
    _check_experts(shape, names, homes, tensors)
    _check_bias(shape, homes, tensors)
    dtype = Counter(tensors[name].dtype for name in names.values()).most_common(1)[0][0]
    return Checkpoint(
        path=folder,
        config=config,
        shape=shape,
        tensors=tensors,
        fingerprint=digest.hexdigest(),
        dtype=DTYPES[dtype],
        expert_names=names,
        layer_homes=homes,
    )


def bias_name(home: str) -> str:
    """Name of the selection bias of a layer whose names begin with `home`."""
    return f"{home}gate.e_score_correction_bias"


def _read_config(folder: Path) -> tuple[Mapping[str, object], bytes]:
    if not folder.is_dir():
        raise ConfigError(f"there is no checkpoint folder {folder}; give the path of a folder with config.json")
    file = folder / "config.json"
    if not file.is_file():
        raise ConfigError(f"{folder} has no config.json; give the folder of a Hugging Face checkpoint")
    raw = file.read_bytes()
    config = _parse_object(raw, file)
    if config.get("auto_map"):
        raise ConfigError(
            f"{file} has an auto_map, which names code to run from the checkpoint; that is never done here: "
            "if vLLM knows the model's architecture by itself, remove the auto_map entry"
        )
    return config, raw


def _weight_map(folder: Path) -> Mapping[str, str] | None:
    """Tensor name -> file name from the index; None for a checkpoint of one file."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _parse_object(index.read_bytes(), index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ConfigError(f"{index} has no weight_map; download or save the checkpoint again")
        checked: dict[str, str] = {}
        for name, file in weight_map.items():
            checked[name] = _inside(folder, index, name, file)
        return checked
    if (folder / "model.safetensors").is_file():
        return None
    pickled = sorted(f.name for pattern in ("*.bin", "*.pt", "*.pth") for f in folder.glob(pattern))
    if pickled:
        raise ConfigError(
            f"{folder} has its weights in {pickled[0]}, a pickle, which could run code when read; "
            "convert the checkpoint to safetensors (in transformers: load it and call save_pretrained)"
        )
    raise ConfigError(f"{folder} has neither model.safetensors nor model.safetensors.index.json")


def _inside(folder: Path, index: Path, name: str, file: object) -> str:
    if not isinstance(file, str) or not file:
        raise ConfigError(f"{index}: the file of {name} is {file!r}, and must be a file name")
    parts = PurePosixPath(file)
    # By name only: the shards of a hub cache are links to files elsewhere, put there by the machine's owner.
    if parts.is_absolute() or ".." in parts.parts or "\\" in file or "\0" in file:
        raise ConfigError(f"{index}: the file of {name} is {file!r}, which leaves the checkpoint folder; refused")
    if not (folder / file).is_file():
        raise ConfigError(f"{index} names {file}, which is missing in {folder}; download the checkpoint again")
    return file


def _check_index(folder: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorEntry]) -> None:
    for name, file in weight_map.items():
        entry = tensors.get(name)
        if entry is None or entry.file != folder / file:
            raise ConfigError(f"{folder}: the index says that {name} is in {file}, but it is not; save it again")


def _find_experts(tensors: Mapping[str, TensorEntry], config: Mapping[str, object]) -> dict[ExpertKey, str]:
    names: dict[ExpertKey, str] = {}
    for name, entry in tensors.items():
        found = _ANY_EXPERT.search(name)
        if found is None or _is_extra_layer(int(found["layer"]), config):
            continue
        match = _EXPERT.match(name)
        if match is None:
            _refuse_unknown_layout(name, entry)
            continue
        key = ExpertKey(int(match["layer"]), int(match["expert"]), _SPELLINGS[match["matrix"]])
        if key in names:
            raise ConfigError(f"{names[key]} and {name} are both expert {key.expert} of layer {key.layer}")
        if entry.dtype not in DTYPES:
            raise ConfigError(
                f"{name} is stored as {entry.dtype}; BF16, F16 and F32 can be read: "
                "use an unquantised version of the checkpoint"
            )
        names[key] = name
    if not names:
        raise ConfigError("no tensor is named ...layers.<n>...experts.<n>....weight: this checkpoint has no experts")
    return names


def _is_extra_layer(layer: int, config: Mapping[str, object]) -> bool:
    """True for layers behind the model's last one: prediction heads, which are not served."""
    num_layers = config.get("num_hidden_layers")
    return isinstance(num_layers, int) and layer >= num_layers


def _refuse_unknown_layout(name: str, entry: TensorEntry) -> None:
    if len(entry.shape) == 3:
        raise ConfigError(
            f"{name} holds all experts of a layer in one tensor {list(entry.shape)}; "
            "save the checkpoint with one tensor per expert (experts.<n>.gate_proj.weight)"
        )
    if name.endswith((".qweight", ".weight_packed", ".bias")):
        kind = "a bias" if name.endswith(".bias") else "quantised"
        raise ConfigError(f"{name} is {kind}, which is not supported; use another version of the checkpoint")


def _shape_of(
    names: Mapping[ExpertKey, str],
    tensors: Mapping[str, TensorEntry],
    config: Mapping[str, object],
    routing: Mapping[str, object],
) -> MoEShape:
    # The commonest shape is the right one: then a single bad tensor is the one that gets named.
    gates = Counter(tensors[name].shape for key, name in names.items() if key.matrix == "gate")
    if not gates or len(expected := gates.most_common(1)[0][0]) != 2:
        raise ConfigError(f"{next(iter(names.values()))}: no gate matrix of two dimensions stands beside it")
    intermediate_size, hidden_size = expected
    for field_name, found in (("hidden_size", hidden_size), ("moe_intermediate_size", intermediate_size)):
        if config.get(field_name, found) != found:
            raise ConfigError(f"config.json: {field_name} is {config[field_name]}, but expert tensors have {found}")
    num_experts = 1 + max(key.expert for key in names)
    if isinstance(said := routing["num_experts"], int) and num_experts > said:
        raise ConfigError(f"config.json says {said} routed experts, but there are tensors of expert {num_experts - 1}")
    layers = tuple(sorted({key.layer for key in names} | set(_routed_layers(names, tensors, config))))
    return MoEShape(
        moe_layers=layers,
        hidden_size=hidden_size,
        moe_intermediate_size=intermediate_size,
        **routing,  # pyright: ignore[reportArgumentType]  (routing_of checked each field)
    )


def _routed_layers(
    names: Mapping[ExpertKey, str], tensors: Mapping[str, TensorEntry], config: Mapping[str, object]
) -> Iterator[int]:
    """Layers with a router beside the place where experts are in other layers: these must have experts, too."""
    places = {re.escape(_home(name).split(f"layers.{key.layer}.", 1)[1]) for key, name in names.items()}
    router = re.compile(rf"(?:^|\.)layers\.(\d+)\.(?:{'|'.join(sorted(places))})gate\.weight$")
    for name in tensors:
        if (match := router.search(name)) and not _is_extra_layer(int(match[1]), config):
            yield int(match[1])


def _check_experts(
    shape: MoEShape,
    names: Mapping[ExpertKey, str],
    homes: dict[int, str],
    tensors: Mapping[str, TensorEntry],
) -> None:
    wide, tall = (
        (shape.moe_intermediate_size, shape.hidden_size),
        (shape.hidden_size, shape.moe_intermediate_size),
    )
    for layer in shape.moe_layers:
        for expert in range(shape.num_experts):
            for matrix in ("gate", "up", "down"):
                name = names.get(ExpertKey(layer, expert, matrix))
                if name is None:
                    place = homes.get(layer, f"layers.{layer}...")
                    raise ConfigError(
                        f"the {matrix} matrix of expert {expert} of layer {layer} is missing "
                        f"({_example(names, layer, expert, matrix, place)}); download the checkpoint again"
                    )
                expected = tall if matrix == "down" else wide
                if tensors[name].shape != expected:
                    raise ConfigError(f"{name} has shape {list(tensors[name].shape)}, and must be {list(expected)}")


def _example(names: Mapping[ExpertKey, str], layer: int, expert: int, matrix: str, place: str) -> str:
    """The name that a missing matrix would have."""
    spelled = next((n.rsplit(".", 2)[1] for key, n in names.items() if key.matrix == matrix), matrix)
    return f"{place}experts.{expert}.{spelled}.weight"


def _check_bias(shape: MoEShape, homes: Mapping[int, str], tensors: Mapping[str, TensorEntry]) -> None:
    for layer in shape.moe_layers if shape.uses_bias else ():
        name = bias_name(homes[layer])
        if name not in tensors:
            raise ConfigError(f"{name} is missing, and topk_method {shape.method} selects by it")
        if tensors[name].shape != (shape.num_experts,):
            raise ConfigError(f"{name} has shape {list(tensors[name].shape)}, and must be [{shape.num_experts}]")


def _home(name: str) -> str:
    match = _EXPERT.match(name)
    assert match is not None
    return match["home"]


def _parse_object(raw: bytes, file: Path) -> dict[str, object]:
    try:
        value = json.loads(raw)
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON ({error}); download or save it again") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{file} must hold a JSON object")
    return value
