"""CUDA handles as torch hands them on and vLLM's HTTP client pickles them: read as data alone.

Nothing here has a GPU: the arguments are of torch's own types, the handles in them are invented.
`tests/gpu/test_dropin.py` has vLLM's trainer send real ones.
"""

from __future__ import annotations

import base64
import os
import pickle  # noqa: TID251 -- what clients send
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from vllm_wt_plugin.errors import HandleError, RequestError
from vllm_wt_plugin.transport import cuda
from vllm_wt_plugin.transport.ipc import Importer
from vllm_wt_plugin.transport.layout import Mapped
from vllm_wt_plugin.wire import messages as msg
from vllm_wt_plugin.wire import pickled
from vllm_wt_plugin.wire.handles import CudaStorage, Registration, TorchExport
from vllm_wt_plugin.wire.update import UpdateInfo

KEY = "0" * 32
GPU, OTHER = "GPU-aaaa", "GPU-bbbb"
MEMORY, EVENT = bytes(range(64)), bytes(range(64, 128))


def reduced(tensor: torch.Tensor, slot: int = 0, **change: Any) -> tuple[Any, ...]:
    """What `reduce_tensor` gives for a CUDA tensor of this geometry, in torch's own types."""
    fields = {
        "cls": type(tensor), "size": tensor.size(), "stride": tensor.stride(),
        "offset": tensor.storage_offset(), "storage_cls": torch.storage.TypedStorage,
        "dtype": tensor.dtype, "device": 0, "handle": b"\x01c" + MEMORY,
        "nbytes": tensor.untyped_storage().nbytes(), "offset_bytes": 512,
        "requires_grad": False, "counter": b"/torch_12_345_0", "slot": slot, "event": EVENT,
        "wait": True,
    }  # fmt: skip
    return tuple((fields | change).values())


W = torch.zeros(4, 6, dtype=torch.bfloat16)
B = torch.zeros(8, dtype=torch.float32)[2:6]


def info(**change: Any) -> UpdateInfo:
    given = {
        "names": ["w", "b"], "dtype_names": ["bfloat16", "float32"], "shapes": [[4, 6], [4]],
        "ipc_handles": [{GPU: reduced(W, 0)}, {GPU: reduced(B, 1)}],
    }  # fmt: skip
    return msg.convert(given | change, UpdateInfo)


def as_pickle(handles: Any, protocol: int = pickle.DEFAULT_PROTOCOL) -> str:
    return base64.b64encode(pickle.dumps(handles, protocol)).decode()


def test_a_tensor_is_a_view_of_its_part_of_the_allocation() -> None:
    found = info().registrations(KEY)
    assert list(found) == [GPU]
    w, b = found[GPU].tensors
    assert (w.spec, w.offset, w.strides) == (found[GPU].specs[0], 0, (6, 1))
    assert (b.shape, b.offset) == ((4,), 2)
    export = TorchExport("/torch_12_345_0", 1, EVENT)
    assert found[GPU].storages[1] == CudaStorage(GPU, MEMORY, 32, 512, export)


def test_the_older_form_with_the_function_says_the_same() -> None:
    pairs = [{GPU: (rebuild_cuda_tensor, reduced(t, i))} for i, t in enumerate((W, B))]
    assert info(ipc_handles=pairs).registrations(KEY) == info().registrations(KEY)


@pytest.mark.parametrize("protocol", range(3, pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_says_the_same(monkeypatch: pytest.MonkeyPatch, protocol: int) -> None:
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    rows = [{GPU: reduced(torch.nn.Parameter(W), 0)}, {GPU: (rebuild_cuda_tensor, reduced(B, 1))}]
    given = info(ipc_handles=None, ipc_handles_pickled=as_pickle(rows, protocol))
    assert given.registrations(KEY) == info().registrations(KEY)


@pytest.mark.parametrize("flag", ["", "0"])
def test_no_pickle_without_vllms_flag(monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", flag)
    with pytest.raises(RequestError, match="refusing `ipc_handles_pickled` without") as caught:
        info(ipc_handles=None, ipc_handles_pickled=as_pickle([])).registrations(KEY)
    assert "push with WeightSync" in caught.value.next_step


def test_a_packed_buffer_is_cut_end_to_end() -> None:
    buffer = torch.zeros(1000, dtype=torch.uint8)
    found = info(ipc_handles={GPU: reduced(buffer)}, tensor_sizes=[48, 16]).registrations(KEY)
    assert [(t.storage, t.offset, t.stride) for t in found[GPU].tensors] == [
        (0, 0, None), (0, 12, None)]  # fmt: skip
    assert len(found[GPU].storages) == 1


def test_every_worker_takes_what_is_of_its_gpu() -> None:
    rows = [{GPU: reduced(t, i), OTHER: reduced(t, i + 7)} for i, t in enumerate((W, B))]
    one = info(ipc_handles=rows).registrations(KEY)
    verb = msg.PreparePart("", KEY, (one,))
    assert verb.own(5, OTHER) == one[OTHER] != one[GPU]
    with pytest.raises(HandleError, match="not found for GPU UUID GPU-c"):
        verb.own(5, "GPU-c")
    with pytest.raises(HandleError, match="has no GPU"):
        verb.own(5, "")
    each = msg.PreparePart("", KEY, (one, info().registrations(KEY)))
    assert each.own(1, GPU) == info().registrations(KEY)[GPU]


PACKED = {"ipc_handles": {GPU: reduced(torch.zeros(1000, dtype=torch.uint8))}}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ipc_handles": [{GPU: reduced(W)}]}, "same size as `names`: got 1 and 2"),
        ({"ipc_handles": 5}, "same size as `names`: got int"),
        ({"ipc_handles": [5, 5]}, "a dict from GPU UUID"),
        ({"ipc_handles": [{}, {}]}, "a dict from GPU UUID"),
        ({"ipc_handles": [{GPU: reduced(W)}, {OTHER: reduced(B)}]}, "not every tensor comes from"),
        ({"ipc_handles": [{GPU: reduced(W)}, {GPU: reduced(W)}]}, "announced is float32"),
        ({"ipc_handles": [{GPU: reduced(W)[:7]}] * 2}, "not the arguments of torch's"),
        ({"ipc_handles": [{GPU: "x" * 15}] * 2}, "not the arguments of torch's"),
        ({"ipc_handles": [{GPU: reduced(W, 10_000)}] * 2}, "a handle that torch does not make"),
        ({"ipc_handles": [{GPU: reduced(W, -1)}] * 2}, "a handle that torch does not make"),
        ({"ipc_handles": [{GPU: reduced(W, counter=b"/etc_1_2_3")}] * 2}, "torch does not make"),
        ({"ipc_handles": [{GPU: reduced(W, counter=b"/../torch_1_2_3")}] * 2}, "does not make"),
        ({"ipc_handles": [{GPU: reduced(W, handle=b"\1e" + bytes(99))}] * 2}, "expandable"),
        ({"ipc_handles": [{GPU: reduced(W, nbytes=47)}, {GPU: reduced(B)}]}, "needs 48 bytes"),
        (PACKED | {"tensor_sizes": [48]}, "`tensor_sizes` should be of the same size"),
        (PACKED | {"tensor_sizes": [48, 15]}, "says 15 bytes"),
        (PACKED | {"packed": True}, "`tensor_sizes` is required when packed=True"),
        ({"ipc_handles": {GPU: reduced(W)}, "tensor_sizes": [48, 16]}, "not contiguous uint8"),
        (PACKED | {"tensor_sizes": [48, 16], "names": ["w"] * 2}, "given twice"),
        ({"ipc_handles": {GPU: reduced(torch.zeros(63, dtype=torch.uint8))},
          "tensor_sizes": [48, 16]}, "needs 64 bytes, its storage has 63"),
        ({"ipc_handles": {GPU: reduced(torch.zeros(99, dtype=torch.uint8)[1:])},
          "tensor_sizes": [48, 16]}, "which no bfloat16 can"),
        ({"ipc_handles_pickled": "gASV"}, "Cannot specify both"),
    ],
)  # fmt: skip
def test_handles_that_cannot_be(change: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says.replace("(", r"\(")):
        info(**change).registrations(KEY)


# ---- pickles that are something else ------------------------------------------------------


class Runs:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_would_run_something_runs_nothing(tmp_path: Path, protocol: int) -> None:
    with pytest.raises(HandleError, match="not handles as vLLM's HTTP client"):
        pickled.read(as_pickle([{GPU: Runs(tmp_path / "ran")}], protocol))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "stream",
    [
        b"", b".", b"\x80\x04", b"\x80\xff.", b"cos\nsystem\n(S'true'\ntR.", b"(i\nos\nsystem\n.",
        b"\x80\x04\x95\x01", b"\x80\x05\x96" + (2**40).to_bytes(8, "little"),
        b"\x80\x04\x8e" + (2**62).to_bytes(8, "little"), b"\x80\x04\x8b\xff\xff\xff\x7f",
        b"\x80\x02\x82\x01.", b"Pid\n.", b"\x80\x05\x97.", b"}}b.", b"]]\x86R.", b"N\x80\x04}(]]u.",
    ],
)  # fmt: skip
def test_streams_that_no_client_sends(stream: bytes) -> None:
    with pytest.raises(HandleError):
        pickled.read(base64.b64encode(stream).decode())


def test_names_are_text_and_a_huge_memo_index_costs_nothing() -> None:
    stream = b"\x80\x04cos\nsystem\nr\xff\xff\xff\xff."
    assert pickled.read(base64.b64encode(stream).decode()) == "os.system"


@pytest.mark.parametrize("text", ["not base64!", "ü", "A" * (pickled.MAX_BYTES * 4 // 3 + 1)])
def test_text_that_is_no_base64(text: str) -> None:
    with pytest.raises(HandleError):
        pickled.read(text)


# ---- the count that torch keeps of who still uses exported memory -------------------------


class Released:
    """Stands for CUDA, which is not here: its memory is the CPU's, its releases are noted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[TorchExport] = []
        memory = torch.zeros(2048, dtype=torch.uint8).untyped_storage()
        monkeypatch.setattr(
            cuda.Allocations, "attach", lambda *_: Mapped(memory, 512, lambda: None)
        )
        monkeypatch.setattr(cuda, "open_event", lambda *_: None)
        monkeypatch.setattr(cuda, "release", self.seen.append)


def opened(importer: Importer, key: str, **change: Any) -> Registration:
    registration = info(**change).registrations(key)[GPU]
    importer.open(registration)
    return registration


def test_each_export_is_released_once_when_nothing_uses_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    released = Released(monkeypatch)
    importer = Importer(0)
    packed = PACKED | {"tensor_sizes": [48, 16]}
    for i in range(3):  # three chunks through one buffer
        opened(importer, f"{i:032}", **packed)
    importer.close(f"{0:032}")
    importer.close(f"{1:032}")
    assert released.seen == []
    importer.close(f"{2:032}")
    importer.close(f"{2:032}")
    assert released.seen == [TorchExport("/torch_12_345_0", 0, EVENT)]
    opened(importer, KEY)
    importer.close()
    assert {e.slot for e in released.seen[1:]} == {0, 1}
    assert len(released.seen) == 3


@pytest.mark.parametrize("what", ["good", "gone", "short", "link"])
def test_only_a_file_as_torch_makes_it_is_written(
    monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(
        torch.UntypedStorage, "_release_ipc_counter_cuda", lambda *a: calls.append(a)
    )
    name = f"torch_{os.getpid()}_1_0"
    path = Path("/dev/shm") / name
    try:
        if what == "link":
            path.symlink_to("/etc/hostname")
        elif what != "gone":
            path.write_bytes(bytes(80_000 if what == "good" else 79_999))
        cuda.release(TorchExport(f"/{name}", 7))
    finally:
        path.unlink(missing_ok=True)
    assert calls == ([(f"/{name}".encode(), 7)] if what == "good" else [])
