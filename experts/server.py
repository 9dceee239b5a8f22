"""The data plane of one expert-group replica: rows come in, are joined by layer, and go back as partial sums."""

import logging
import time
import warnings
from collections import Counter, deque
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from experts.batch import Batch, Rows, join
from experts.counting import MAX_NOTES
from experts.errors import FrameError
from experts.gently import let_others_finish
from experts.handshake import Role
from experts.link import Conn
from experts.load import LoadMeter
from experts.loop import DataPlaneLoop
from experts.metrics import BatchNote
from experts.pairs import Pairs
from experts.room import Room
from experts.wire import DType, Header, Kind, Limits

log = logging.getLogger(__name__)

TORCH_DTYPES = {DType.FLOAT32: torch.float32, DType.BFLOAT16: torch.bfloat16, DType.FLOAT16: torch.float16}
WIRE_DTYPES = {dtype: wire for wire, dtype in TORCH_DTYPES.items()}

# Frames are read-only to us and never outlive the pass that computes them.
warnings.filterwarnings("ignore", message="The given buffer is not writable")


class ExpertFFN(Protocol):
    """Partial sums of one layer; experts/compute.py has the implementations."""

    def __call__(self, layer: int, x: Tensor, pairs: Pairs, out: Tensor | None = None) -> Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Whom to answer, and under which number."""

    conn: Conn
    seq: int
    placement_version: int


class ExpertServer(DataPlaneLoop):
    """Serves the experts of one replica.

    held: global ids of the experts that this replica holds, in the order of its weights.
    load: is told of all the work that is done; None: nobody asks.
    """

    def __init__(
        self,
        ffn: ExpertFFN,
        *,
        held: range,
        layers: frozenset[int],
        dtype: torch.dtype,
        num_experts: int,
        address: str,
        secret: bytes,
        fingerprint: bytes,
        incarnation: int,
        group: int,
        limits: Limits,
        load: LoadMeter | None = None,
    ) -> None:
        super().__init__(
            address=address,
            secret=secret,
            fingerprint=fingerprint,
            incarnation=incarnation,
            group=group,
            roles=frozenset({Role.ROUTER}),
            limits=limits,
            name=f"experts-{group}",
        )
        self._ffn = ffn
        self._layers = layers
        self._dtype = WIRE_DTYPES[dtype]
        self._local = np.full(num_experts, -1, dtype=np.int32)  # global expert id -> index into our weights
        self._local[np.asarray(held)] = np.arange(len(held), dtype=np.int32)
        self._waiting: list[Rows[Question]] = []
        self._room = Room()
        self._load = load
        self._num_pairs = 0  # computed in this round of the loop
        self.counts: Counter[str] = Counter()
        self.batch_notes: deque[BatchNote] = deque(maxlen=MAX_NOTES)
        self.failed_in_a_row = 0  # batches that could not be computed; a health check asks

    def run(self) -> None:
        let_others_finish()
        super().run()

    def on_frame(self, conn: Conn, header: Header, payload: memoryview) -> None:
        if header.kind is not Kind.ROWS or header.dtype is not self._dtype:
            raise FrameError(f"{header.kind.name} {header.dtype.name} frame sent to an expert group")
        rows = self._read_rows(conn, header, payload)
        if rows is None:
            self._nack(conn, header.layer, header.seq)
        else:
            self._waiting.append(rows)

    def on_pass(self) -> None:
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        pass_s = time.monotonic()
        for batch in join(waiting):
            begun_s = time.monotonic()
            try:
                y = self._ffn(batch.layer, batch.x, batch.pairs, out=self._take_sums(batch))
                self.failed_in_a_row = 0
            except (RuntimeError, ValueError) as error:
                self.failed_in_a_row += 1
                # Out of memory, most likely: another copy may have more, and these rows must not end this one.
                log.exception("rows not computed", extra={"layer": batch.layer, "rows": len(batch.x)}, exc_info=error)
                for asker, _ in batch.parts:
                    self._nack(asker.conn, batch.layer, asker.seq)
                continue
            compute_s = time.monotonic() - begun_s
            num_rows = batch.x.shape[0]
            self.batch_notes.append(BatchNote(batch.layer, num_rows, batch.pairs.expert, begun_s - pass_s, compute_s))
            self._answer(batch, y)
            self._num_pairs += batch.pairs.num_pairs
            self.counts["rows"] += num_rows
            self.counts["batches"] += 1
            self.counts["joined"] += len(batch.parts)
            self.beat()  # a long pass is work, not a stuck thread

    def _take_sums(self, batch: Batch[Question]) -> Tensor:
        """Where a batch is computed; its answers are sent, or copied, before the next one is."""
        self._room.clear()
        return torch.from_numpy(self._room.take(tuple(batch.x.shape), np.float32))

    def on_round(self, woke_s: float, now_s: float) -> None:
        if self._load is not None:
            self._load.add(woke_s, now_s, self._num_pairs)
            self._num_pairs = 0

    def _nack(self, conn: Conn, layer: int, seq: int) -> None:
        self.counts["nacks"] += 1
        self.send(conn, Header(Kind.NACK, layer=layer, seq=seq, incarnation=self.incarnation))

    def _read_rows(self, conn: Conn, header: Header, payload: memoryview) -> Rows[Question] | None:
        """The rows of a frame, or None where they ask for what this replica does not hold."""
        num_rows, num_pairs = header.num_rows, header.num_extra
        x_bytes = num_rows * self.limits.hidden_size * header.dtype.itemsize
        table = np.frombuffer(payload, dtype=np.int32, offset=x_bytes).reshape(3, num_pairs)
        row = table[0]
        try:
            # As unsigned numbers, negative ones are too large, too.
            local = self._local[table[1].view(np.uint32)]
        except IndexError:
            local = None
        if local is None or row.view(np.uint32).max() >= num_rows:
            raise FrameError("ROWS frame names a row or an expert that does not exist")
        if header.incarnation != self.incarnation or header.layer not in self._layers or local.min() < 0:
            return None
        return Rows(
            asker=Question(conn=conn, seq=header.seq, placement_version=header.placement_version),
            layer=header.layer,
            x=torch.frombuffer(payload[:x_bytes], dtype=TORCH_DTYPES[header.dtype]).view(num_rows, -1),
            pairs=Pairs(
                row=torch.from_numpy(row),
                expert=torch.from_numpy(local),
                weight=torch.from_numpy(table[2].view(np.float32)),
            ),
        )

    def _answer(self, batch: Batch[Question], y: Tensor) -> None:
        for asker, rows in batch.parts:
            part = y if len(batch.parts) == 1 else y[rows]
            header = Header(
                Kind.PARTIAL,
                layer=batch.layer,
                num_rows=part.shape[0],
                seq=asker.seq,
                placement_version=asker.placement_version,
                incarnation=self.incarnation,
            )
            self.send(asker.conn, header, part.numpy().data.cast("B"))
