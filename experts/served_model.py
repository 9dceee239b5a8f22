"""What is served, as every member must agree on it. Imports neither torch nor Ray, so that it costs nothing."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from experts.handshake import model_fingerprint

if TYPE_CHECKING:
    import torch

    from experts.checkpoint import Checkpoint

SILENCE_LIMIT_S = 10.0  # a data-plane thread that has not come round for this long is stuck


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What every member must agree on; its fingerprint is part of each handshake."""

    checkpoint: str  # folder
    dtype: str  # float32, bfloat16 or float16: of hidden states and weights
    num_groups: int  # D
    max_rows: int  # tokens of one step at most
    runtime_dir: str  # Unix sockets
    secret_path: str | None = None  # the cluster's secret; None: in runtime_dir

    @property
    def torch_dtype(self) -> "torch.dtype":
        import torch

        return getattr(torch, self.dtype)

    @property
    def secret_file(self) -> Path:
        return Path(self.runtime_dir) / "secret" if self.secret_path is None else Path(self.secret_path)

    @property
    def router_address(self) -> str:
        """Where the router of a node listens; the same for every router, so that a new one is found at once."""
        return f"unix:{self.runtime_dir}/router.sock"

    def fingerprint(self, checkpoint: "Checkpoint") -> bytes:
        return model_fingerprint(checkpoint.fingerprint, dtype=self.dtype, num_groups=self.num_groups)
