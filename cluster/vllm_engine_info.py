"""What vllm.grpc.engine.VllmEngine tells of the model, and the tokenizer's files in one archive."""

import hashlib
import io
import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from smg_grpc_proto.generated import common_pb2
from smg_grpc_proto.generated import vllm_engine_pb2 as pb
from vllm.config import ModelConfig

CHUNK_BYTES = 64 << 10
_NEEDED = "tokenizer.json"
_FILES = frozenset(
    {_NEEDED, "tokenizer_config.json", "config.json", "generation_config.json", "special_tokens_map.json"}
)
_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_LONG_AGO = (1980, 1, 1, 0, 0, 0)  # an archive's bytes say what the files say, and not when they were written


def model_info_of(
    checkpoint: str, model: ModelConfig, served_name: str, default_sampling: Mapping[str, object]
) -> pb.GetModelInfoResponse:
    """What GetModelInfo answers. default_sampling: of the model's generation_config.json."""
    hf = model.hf_text_config
    eos = getattr(hf, "eos_token_id", None)
    defaults = {name: default_sampling[name] for name in _DEFAULTS if default_sampling.get(name) is not None}
    return pb.GetModelInfoResponse(
        model_path=checkpoint,
        tokenizer_path=checkpoint,
        served_model_name=served_name,
        is_generation=True,
        max_context_length=model.max_model_len,
        max_req_input_len=model.max_model_len - 1,  # one token is left to the answer
        vocab_size=model.get_vocab_size(),
        model_type=hf.model_type,
        architectures=getattr(hf, "architectures", None) or (),
        eos_token_ids=eos if isinstance(eos, list) else [] if eos is None else [eos],
        bos_token_id=getattr(hf, "bos_token_id", None) or 0,
        pad_token_id=getattr(hf, "pad_token_id", None) or 0,
        default_sampling_params_json=json.dumps(defaults, separators=(",", ":")) if defaults else "",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerArchive:
    """A zip of the tokenizer's files; the same files make the same bytes."""

    data: bytes
    sha256: str

    def chunks(self) -> Iterator[common_pb2.GetTokenizerChunk]:
        """The archive in order; the last chunk has its sha256."""
        for begin in range(0, len(self.data), CHUNK_BYTES):
            end = begin + CHUNK_BYTES
            is_last = end >= len(self.data)
            yield common_pb2.GetTokenizerChunk(data=self.data[begin:end], sha256=self.sha256 if is_last else "")


@lru_cache(maxsize=1)
def tokenizer_archive_of(checkpoint: str) -> TokenizerArchive | None:
    """The archive, made once; None where the folder has no tokenizer.json. Takes a while: off the event loop.

    Raises OSError for a file that cannot be read.
    """
    files = _tokenizer_files(Path(checkpoint))
    if _NEEDED not in files:
        return None
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, _LONG_AGO)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, files[name].read_bytes())
    data = buffer.getvalue()
    return TokenizerArchive(data=data, sha256=hashlib.sha256(data).hexdigest())


def _tokenizer_files(folder: Path) -> dict[str, Path]:
    """Name in the archive -> file; a link that leads out of the folder is passed over."""
    inside = folder.resolve()
    found: dict[str, Path] = {}
    for path in folder.iterdir():
        target = path.resolve()
        is_wanted = path.name in _FILES or path.suffix == ".jinja"
        if is_wanted and target.is_relative_to(inside) and target.is_file():
            found[path.name] = target
    return found
