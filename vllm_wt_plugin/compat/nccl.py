"""The `nccl` engine: what the trainer, rank 0 of a group, broadcasts; gloo's place on CPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from vllm_wt_plugin import _pynccl
from vllm_wt_plugin.compat.engine import (
    ApplyPatches,
    Load,
    WeightTransferEngine,
    args_of,
    update_of,
)
from vllm_wt_plugin.compat.info import (
    NCCLTrainerSendWeightsArgs,
    NCCLWeightTransferInitInfo,
    NCCLWeightTransferUpdateInfo,
)
from vllm_wt_plugin.errors import RequestError
from vllm_wt_plugin.sparse.patch import SparseWeightPatch, index_dtype, received
from vllm_wt_plugin.transport import pynccl
from vllm_wt_plugin.transport.group import Communicator, Group
from vllm_wt_plugin.transport.nccl import Receiver, Sender
from vllm_wt_plugin.wire import messages as msg
from vllm_wt_plugin.wire.buckets import Piece, buckets_of, size
from vllm_wt_plugin.wire.nccl import RENDEZVOUS_S, TIMEOUT_S, NcclInit
from vllm_wt_plugin.wire.params import check_specs
from vllm_wt_plugin.wire.sparse import named, parts

Tensors = Iterable[tuple[str, torch.Tensor]]
KEY = "0" * 32  # of a push that nobody registers


class NCCLWeightTransferEngine(WeightTransferEngine):
    """A worker's end is made by `init_transfer_engine`, the trainer's by `trainer_init`, at the
    same time. Receiving and sending raise TransferError, naming the bucket."""

    init_info_cls = NCCLWeightTransferInitInfo
    update_info_cls = NCCLWeightTransferUpdateInfo
    model_update_group: Communicator | None = None
    _init: NcclInit
    _last: NCCLWeightTransferUpdateInfo | None = None

    def parse_init_info(self, init_dict: dict[str, Any]) -> Any:
        """Raises ValueError. With an id, no address need be named."""
        return super().parse_init_info({"master_address": None, "master_port": None} | init_dict)

    def init_transfer_engine(self, init_info: NCCLWeightTransferInitInfo) -> None:
        """Blocking, until all are there. Raises ValueError, NotJoined, TransferError."""
        given = {k: v for k, v in vars(init_info).items() if v is not None}
        try:
            self._init = msg.convert(given, NcclInit)
            rank = self._init.check(self._worker_rank())
        except RequestError as exc:
            raise ValueError(str(exc)) from exc
        self.shutdown()
        self.model_update_group = pynccl.meet(
            self._init, rank, self._at, threading.Event(), _pynccl.load
        )

    def receive_weights(self, update_info: Any, load_weights: Load | None = None) -> None:
        """`load_weights` is called for each bucket; the tensors are its own. No `names`: those of
        the last update."""
        load = self._load(load_weights)
        info = update_info if update_info.names else self._last
        if info is None:
            raise ValueError("`names` is empty, and no update has named any before")
        specs = update_of(info, "dense").specs
        check_specs(specs)
        packed, nbytes, number = self._geometry(info)
        buckets = buckets_of(specs, "vllm" if packed else "apart", nbytes)
        largest = max(map(size, buckets), default=0)
        memory = [torch.empty(largest, dtype=torch.uint8, device=self._at) for _ in range(number)]
        with self._receiving(memory, [size(b) for b in buckets]) as wait:
            for i, bucket in enumerate(buckets):
                release = wait()
                load([(p.spec.name, _tensor(memory[i % number], p)) for p in bucket])
                release()
        self._last = info

    def receive_sparse_weights(self, update_info: Any, apply_patches: ApplyPatches) -> None:
        """`apply_patches` is called once, with all patches of the update."""
        push = named(update_of(update_info, "sparse_flat"), KEY)
        tensors = {
            name: torch.empty(n, dtype=getattr(torch, dtype), device=self._at)
            for name, dtype, n in parts(push)
        }
        memory = [t.view(torch.uint8) for t in tensors.values() if t.numel()]
        if memory:
            with self._receiving(memory, [m.numel() for m in memory]) as wait:
                for _ in memory:
                    wait()
        apply_patches(received(push, tensors))

    def shutdown(self) -> None:
        """Also the trainer's end, where it hangs, is over then."""
        group, self.model_update_group, self._last = self.model_update_group, None, None
        if group is not None:
            group.close()

    @property
    def _at(self) -> torch.device:
        if self.device is not None:
            return self.device
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def _worker_rank(self) -> int:
        p = self.parallel_config
        dp: int = getattr(p, "data_parallel_index", 0) * getattr(p, "world_size", 1)
        return dp + int(getattr(p, "rank", 0))

    def _geometry(self, info: NCCLWeightTransferUpdateInfo) -> tuple[bool, int, int]:
        """Packed, bytes of a buffer, buffers: of the update that says so, else as init said."""
        said = info if info.packed else self._init
        return said.packed, said.packed_buffer_size_bytes, said.packed_num_buffers

    @contextmanager
    def _receiving(
        self, memory: Sequence[torch.Tensor], sizes: Sequence[int]
    ) -> Iterator[Callable[[], Callable[[], None]]]:
        """A function that waits for the next bucket, and returns the one that gives its memory
        back. A failure inside ends the group: what is still under way must not be taken for the
        next update's."""
        if self.model_update_group is None:
            raise RuntimeError("NCCL weight transfer not initialized. Call init_transfer_engine().")
        receiver = Receiver(self.model_update_group, memory, sizes, self._init.timeout_s)

        def wait() -> Callable[[], None]:
            while receiver.next(TIMEOUT_S) is None:
                pass  # the receiver has the deadline
            return receiver.release

        try:
            yield wait
        except BaseException as exc:  # raised again: an interrupt too must end the transfer
            receiver.abort(f"the update failed: {exc}")
            self.shutdown()
            raise

    @staticmethod
    def trainer_init(init_info: NCCLWeightTransferInitInfo | dict[str, Any]) -> Any:
        """The trainer's end, rank 0, for `trainer_send_weights`: on GPUs vLLM's own communicator,
        on the current device. Blocking, until all workers are there; they are asked to join at
        the same time. Raises ValueError, RequestError, NotJoined, UnsupportedVLLM."""
        given = init_info if isinstance(init_info, dict) else vars(init_info)
        try:
            host, port, world = (given[k] for k in ("master_address", "master_port", "world_size"))
        except KeyError as exc:
            raise ValueError(f"Invalid init_info: {exc} is missing") from exc
        if torch.cuda.is_available():
            return _pynccl.open_group(host, port, world)
        return pynccl.open_group(host, port, world, RENDEZVOUS_S)

    @staticmethod
    def trainer_send_weights(iterator: Tensors, *given: Any, **named: Any) -> None:
        """Broadcast the tensors to workers that are receiving the same. As arguments either
        `trainer_args`, or its fields one by one: `group`, `src`, `post_iter_func`, `packed`,
        `stream`, …; see `NCCLTrainerSendWeightsArgs`."""
        args = args_of(NCCLTrainerSendWeightsArgs, *given, **named)
        tensor_of = args.post_iter_func or _second
        flat = (_bytes(tensor_of(item)) for item in iterator)
        _broadcast(_packed(flat, args.packed_buffer_size_bytes) if args.packed else flat, args)

    @staticmethod
    def trainer_send_sparse_weights(
        iterator: Iterable[SparseWeightPatch],
        trainer_args: NCCLTrainerSendWeightsArgs | dict[str, Any],
    ) -> None:
        """Broadcast patches to workers that are receiving the same, in this order."""
        args = args_of(NCCLTrainerSendWeightsArgs, trainer_args)
        if args.packed:
            raise ValueError("patches are not packed: leave out `packed`")
        _broadcast((_bytes(t) for patch in iterator for t in _both(patch)), args)


def _tensor(memory: torch.Tensor, piece: Piece) -> torch.Tensor:
    """A copy: what vLLM's layers are loaded from later must outlive the buffer."""
    data = memory[piece.offset : piece.offset + piece.nbytes].clone()
    return data.view(getattr(torch, piece.spec.dtype)).view(piece.shape)


def _second(item: tuple[str, torch.Tensor]) -> torch.Tensor:
    return item[1]


def _bytes(t: torch.Tensor) -> torch.Tensor:
    flat = t.detach().contiguous().view(-1)
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8)  # one element may have any stride


def _both(patch: SparseWeightPatch) -> tuple[torch.Tensor, torch.Tensor]:
    patch.check()
    numel = torch.Size(patch.full_shape or ()).numel()
    return patch.indices.to(index_dtype(numel)), patch.values


def _packed(flat: Iterable[torch.Tensor], nbytes: int) -> Iterator[torch.Tensor]:
    """As `wire/buckets.py: cut_as_vllm`, of tensors that exist one at a time."""
    held: list[torch.Tensor] = []
    for data in flat:
        held.append(data)
        if sum(d.numel() for d in held) > nbytes:
            yield torch.cat(held)
            held = []
    if held:
        yield torch.cat(held)


def _broadcast(chunks: Iterable[torch.Tensor], args: NCCLTrainerSendWeightsArgs) -> None:
    """Each to every rank; as many are under way as there are buffers."""
    made = args.group
    group: Communicator = made if isinstance(made, Group) else pynccl.PyNccl(made)
    slots = [torch.empty(0)] * args.packed_num_buffers
    sender = Sender(group, slots, 0, TIMEOUT_S)
    with nullcontext() if args.stream is None else torch.cuda.stream(args.stream):
        for i, data in enumerate(d for d in chunks if d.numel()):
            sender.buffer()  # until what this slot held has arrived
            slots[i % len(slots)] = data
            sender.send(data.numel())
        sender.drain()
