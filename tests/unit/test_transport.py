"""Both ends of `transport.ipc` and `transport.memory` on the CPU, ipc between real processes."""

from __future__ import annotations

import fcntl
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from vllm_wt_plugin.errors import (
    HandleError,
    RequestError,
    StateError,
    TransferError,
    UnknownRegistration,
    WeightSyncError,
    from_dict,
)
from vllm_wt_plugin.transport import cuda, layout, shm
from vllm_wt_plugin.transport.ipc import Exporter, Importer
from vllm_wt_plugin.transport.layout import BaseExporter, Span
from vllm_wt_plugin.transport.memory import MemoryExporter
from vllm_wt_plugin.transport.shm import Segment
from vllm_wt_plugin.wire.handles import (
    CudaStorage,
    LocalStorage,
    Registration,
    ShmStorage,
    TensorRef,
)
from vllm_wt_plugin.wire.params import ITEMSIZE

SPAWN = multiprocessing.get_context("spawn")
DTYPES = {getattr(torch, name) for name in ITEMSIZE if hasattr(torch, name)}
MIB = 2**20
DEV_SHM = shm.SHM_DIR
Named = dict[str, torch.Tensor]


# ---- a worker process -----------------------------------------------------------------------


def bits(tensor: torch.Tensor) -> bytes:
    """The values as bytes, bit for bit, in row-major order."""
    return bytes(tensor.detach().contiguous().flatten().view(torch.uint8).tolist())


def run_verb(importer: Importer, verb: str, argument: Any) -> Any:
    if verb in ("open", "read"):
        registration = msgspec.json.decode(argument, type=Registration)
        views = importer.open(registration)
        if verb == "open":
            return list(views)
        importer.check_alive(registration.id)
        importer.wait(registration)
        return {name: (str(t.dtype), tuple(t.shape), bits(t)) for name, t in views.items()}
    if verb == "check":
        return importer.check_alive(argument)
    if verb == "close":
        return importer.close(argument)
    shm.SHM_DIR, seconds = argument  # sweep, without a pause
    end, swept = time.monotonic() + seconds, shm.sweep_orphans()
    while time.monotonic() < end:
        swept += shm.sweep_orphans()
    shm.SHM_DIR = DEV_SHM
    return swept


def worker_main(pipe: Connection) -> None:
    """Runs an Importer on commands from the pipe: open, read (values now), check, close, sweep."""
    torch.set_num_threads(1)
    with Importer() as importer:
        for verb, argument in iter(pipe.recv, None):
            try:
                pipe.send(("ok", run_verb(importer, verb, argument)))
            except WeightSyncError as exc:
                pipe.send(("error", exc.to_dict()))


class Worker:
    """The test's end of `worker_main`."""

    def __init__(self) -> None:
        self.pipe, theirs = SPAWN.Pipe()
        self.process = SPAWN.Process(target=worker_main, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def send(self, verb: str, argument: Any) -> None:
        self.pipe.send((verb, argument))

    def answer(self) -> Any:
        assert self.pipe.poll(30), "the worker does not answer"
        status, reply = self.pipe.recv()
        if status == "error":
            raise from_dict(reply)
        return reply

    def call(self, verb: str, argument: Any) -> Any:
        self.send(verb, argument)
        return self.answer()

    def read(self, registration: Registration) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
        found: dict[str, tuple[str, tuple[int, ...], bytes]] = self.call(
            "read", msgspec.json.encode(registration)
        )
        return found

    def open(self, registration: Registration) -> list[str]:
        names: list[str] = self.call("open", msgspec.json.encode(registration))
        return names

    def stop(self) -> None:
        self.pipe.send(None)
        self.process.join(20)
        assert self.process.exitcode == 0


@pytest.fixture(scope="module")
def shared_worker() -> Iterator[Worker]:
    worker = Worker()
    worker.call("close", None)
    yield worker
    worker.stop()


@pytest.fixture
def worker(shared_worker: Worker) -> Iterator[Worker]:
    yield shared_worker
    if shared_worker.process.is_alive():
        shared_worker.call("close", None)


@pytest.fixture
def private_shm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own instead of /dev/shm, for tests that count or sweep segments."""
    monkeypatch.setattr(shm, "SHM_DIR", str(tmp_path))
    return tmp_path


def make(kind: str) -> BaseExporter:
    return Exporter() if kind == "ipc" else MemoryExporter()


each_kind = pytest.mark.parametrize("kind", ["ipc", "memory"])


def random(dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    """Every bit pattern, NaNs included; bools are 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    high = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, high, (*shape, dtype.itemsize), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def push(exporter: BaseExporter, tensors: Named) -> Registration:
    registration, _ = exporter.register(tensors.items())
    exporter.refresh()
    return registration


def path(registration: Registration, index: int = 0) -> Path:
    storage = registration.storages[index]
    assert isinstance(storage, ShmStorage)
    return Path(shm.SHM_DIR + storage.name)


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("wt_*"))


def assert_same(found: dict[str, tuple[str, tuple[int, ...], bytes]], tensors: Named) -> None:
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        want = (str(tensor.dtype), tuple(tensor.shape), bits(tensor))
        assert found[name] == want, name


# ---- values -----------------------------------------------------------------------------------


def test_round_trip_is_bit_exact_for_every_dtype(worker: Worker) -> None:
    tensors = {str(d): random(d, 5, 7) for d in sorted(DTYPES, key=str)}
    assert {"torch.bool", "torch.float8_e4m3fn", "torch.bfloat16"} < set(tensors)
    with Exporter() as exporter:
        assert_same(worker.read(push(exporter, tensors)), tensors)


def strided() -> tuple[torch.Tensor, Named]:
    base = random(torch.float32, 24, 10)
    return base, {
        "whole": base,
        "rows": base[4:8],
        "transposed": base.t(),
        "columns": base[:, 3:9:2],
        "expanded": base[5, :1].expand(6),
        "scalar": base[7, 7],
        "as_int8": base.view(torch.int8)[3:5],
        "one_by_n": base[2:3],
    }


@each_kind
def test_views_of_one_storage_export_it_once(kind: str) -> None:
    _, tensors = strided()
    with make(kind) as exporter, Importer() as importer:
        registration = push(exporter, tensors)
        assert len(registration.storages) == 1
        views = importer.open(registration)
        for name, tensor in tensors.items():
            assert views[name].stride() == tensor.stride() or tensor.is_contiguous()
            assert bits(views[name]) == bits(tensor), name
        assert {r.name for r in registration.tensors if r.stride is None} >= {"whole", "one_by_n"}


def test_strided_views_cross_processes(worker: Worker) -> None:
    _, tensors = strided()
    with Exporter() as exporter:
        assert_same(worker.read(push(exporter, tensors)), tensors)


def test_only_the_span_in_use_is_shared(worker: Worker) -> None:
    base = random(torch.uint8, 64 * MIB)
    tensors = {
        "late": base[50 * MIB + 3 : 50 * MIB + 1003],
        "wide": base[50 * MIB + 808 : 50 * MIB + 2808].view(torch.float64),
        "early": base[50 * MIB - 1000 : 50 * MIB - 990],
    }
    with Exporter() as exporter:
        registration = push(exporter, tensors)
        (storage,) = registration.storages
        assert 3808 <= storage.nbytes <= 3808 + 64
        assert path(registration).stat().st_size == storage.nbytes
        assert_same(worker.read(registration), tensors)


@each_kind
def test_zero_element_tensors(kind: str, worker: Worker) -> None:
    empty = {"a": torch.empty(0, 3), "b": torch.empty(4, 0, dtype=torch.bfloat16)}
    mixed = {
        "a": torch.empty(0, 3),
        "full": random(torch.float16, 4),
        "z": random(torch.int8, 9)[2:2],
    }
    for tensors in (empty, mixed):
        with make(kind) as exporter, Importer() as importer:
            registration = push(exporter, tensors)
            assert len(registration.storages) == 1
            views = importer.open(registration)
            assert {n: t.shape for n, t in views.items()} == {
                n: t.shape for n, t in tensors.items()
            }
            if kind == "ipc":
                assert_same(worker.read(registration), tensors)


@each_kind
def test_parameters_that_require_grad_are_read_without_it(kind: str) -> None:
    weight = torch.nn.Parameter(torch.randn(3, 3))
    with make(kind) as exporter, Importer() as importer:
        views = importer.open(push(exporter, {"w": weight}))
        assert not views["w"].requires_grad
        assert bits(views["w"]) == bits(weight)


def test_refresh_propagates_new_values(worker: Worker) -> None:
    base = torch.zeros(300)
    tensors = {"w": base[100:200]}
    with Exporter() as exporter:
        registration = push(exporter, tensors)
        for value in (1.0, -0.0, 2.5):
            tensors["w"].fill_(value)
            before = worker.read(registration)
            exporter.refresh()
            assert_same(worker.read(registration), tensors)
            assert before["w"][2] != bits(tensors["w"])  # nothing had moved until refresh


# ---- registrations ----------------------------------------------------------------------------


@each_kind
def test_same_tensors_same_registration(kind: str) -> None:
    _, tensors = strided()
    with make(kind) as exporter:
        first, new = exporter.register(tensors.items())
        assert new
        again, new = exporter.register({n: t.detach() for n, t in tensors.items()}.items())
        assert not new
        assert again is first


@each_kind
@pytest.mark.parametrize("what", ["moved", "name", "dtype", "shape", "stride", "offset", "fewer"])
def test_any_change_is_a_new_registration(kind: str, what: str) -> None:
    base = random(torch.float32, 16, 16)
    square = base[:8, :8]
    tensors = {"a": square, "b": random(torch.float16, 4)}
    changed: dict[str, Callable[[], Named]] = {
        "moved": lambda: {**tensors, "a": base.clone()[:8, :8]},
        "name": lambda: {"A": square, "b": tensors["b"]},
        "dtype": lambda: {**tensors, "a": square.view(torch.int32)},
        "shape": lambda: {**tensors, "a": base[:4, :8]},
        "stride": lambda: {**tensors, "a": square.t()},
        "offset": lambda: {**tensors, "a": base[1:9, :8]},
        "fewer": lambda: {"a": square},
    }
    with make(kind) as exporter, Importer() as importer:
        first, _ = exporter.register(tensors.items())
        now = changed[what]()
        second, new = exporter.register(now.items())
        assert new
        assert second.id != first.id
        exporter.refresh()
        for name, view in importer.open(second).items():
            assert bits(view) == bits(now[name])
        assert exporter.register(now.items()) == (second, False)


def test_a_moved_tensor_keeps_the_other_segments(worker: Worker) -> None:
    tensors = {"stays": random(torch.float32, 8), "moves": random(torch.float32, 8, seed=1)}
    with Exporter() as exporter:
        first = push(exporter, tensors)
        tensors["moves"] = tensors["moves"].clone() + 1
        second = push(exporter, tensors)
        assert second.storages[0] == first.storages[0]
        assert second.storages[1] != first.storages[1]
        assert_same(worker.read(second), tensors)


def test_the_last_generation_lives_until_retire() -> None:
    with Exporter() as exporter:
        first = push(exporter, {"w": torch.zeros(4)})
        second = push(exporter, {"w": torch.ones(4)})
        assert path(first).exists()  # a worker may still be reading it
        exporter.retire()
        assert not path(first).exists()
        assert path(second).exists()
        third = push(exporter, {"w": torch.ones(4) * 3})
        fourth = push(exporter, {"w": torch.ones(4) * 4})
        assert not path(second).exists()  # two registrations ago
        assert path(third).exists()
        assert path(fourth).exists()


def test_alternating_buffers_keep_their_segments() -> None:
    one, two = torch.zeros(4), torch.ones(4)
    with Exporter() as exporter:
        first = push(exporter, {"w": one})
        push(exporter, {"w": two})
        third = push(exporter, {"w": one})
        assert third.id != first.id
        assert third.storages == first.storages


@each_kind
def test_another_storage_at_the_same_address_is_not_mistaken(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`resize_` frees memory that the exporter refers to; its address may be given away."""
    monkeypatch.setattr(layout, "_address", lambda *_: 4096)  # an allocator that reuses at once
    old = torch.zeros(8)
    with make(kind) as exporter, Importer() as importer:
        importer.open(push(exporter, {"w": old}))
        old.untyped_storage().resize_(0)
        registration = push(exporter, {"w": torch.full((8,), 3.0)})
        importer.check_alive(registration.id) if kind == "ipc" else None
        assert importer.open(registration)["w"].tolist() == [3.0] * 8


@each_kind
def test_freed_storage_is_an_error_not_a_crash(kind: str) -> None:
    weight = torch.ones(1 * MIB)
    with make(kind) as exporter, Importer() as importer:
        registration = push(exporter, {"model.w": weight})
        importer.open(registration)
        weight.untyped_storage().resize_(0)
        with pytest.raises(RequestError, match=r"model\.w"):
            exporter.register({"model.w": weight}.items())
        with pytest.raises((StateError, HandleError), match=r"model\.w"):
            exporter.refresh() if kind == "ipc" else importer.check_alive(registration.id)
        weight.untyped_storage().resize_(4 * MIB)
        weight.fill_(2)
        back = push(exporter, {"model.w": weight})
        assert importer.open(back)["model.w"].min() == 2


class Subclass(torch.Tensor):
    """A wrapper subclass: claims a shape and a device, holds no memory (as DTensor does)."""

    @staticmethod
    def __new__(cls, shape: tuple[int, ...]) -> Subclass:
        made: Subclass = torch.Tensor._make_wrapper_subclass(cls, shape)
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any, **__: Any) -> Any:  # type: ignore[override]
        raise AssertionError(f"the exporter ran {func}")


def shrunk() -> torch.Tensor:
    tensor = torch.ones(64)
    tensor.untyped_storage().resize_(100)
    return tensor


REFUSED: dict[str, Callable[[], torch.Tensor]] = {
    "meta": lambda: torch.empty(3, device="meta"),
    "sparse": lambda: torch.ones(3, 3).to_sparse(),
    "negated": lambda: torch.randn(3, dtype=torch.complex64).conj().imag,
    "complex": lambda: torch.randn(3, dtype=torch.complex64),
    "wrapper": lambda: Subclass((3, 3)),
    "shrunk": shrunk,
}


@each_kind
@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_shared_is_refused_by_name(kind: str, what: str) -> None:
    tensors = {"ok": torch.ones(2), "layers.3.odd": REFUSED[what]()}
    with make(kind) as exporter:
        kept, _ = exporter.register({"ok": tensors["ok"]}.items())
        with pytest.raises(RequestError) as caught:
            exporter.register(tensors.items())
        assert caught.value.where == "layers.3.odd"
        assert exporter.register({"ok": tensors["ok"]}.items()) == (kept, False)


@each_kind
def test_no_tensors_twice_one_name_and_a_closed_exporter_are_refused(kind: str) -> None:
    exporter = make(kind)
    with pytest.raises(RequestError, match="no tensors"):
        exporter.register([])
    with pytest.raises(RequestError, match="twice"):
        exporter.register([("w", torch.ones(1)), ("w", torch.ones(1))])
    exporter.close()
    exporter.close()
    with pytest.raises(StateError, match="closed"):
        exporter.register([("w", torch.ones(1))])


@each_kind
def test_importer_keeps_a_registration_until_closed(kind: str) -> None:
    with make(kind) as exporter, Importer() as importer:
        registration = push(exporter, {"w": random(torch.float32, 3)})
        views = importer.open(registration)
        assert importer.open(registration) is views
        other = msgspec.structs.replace(registration, events={"gpu": b"x"})
        with pytest.raises(HandleError, match="in use"):
            importer.open(other)
        importer.close(registration.id)
        importer.close(registration.id)
        with pytest.raises(UnknownRegistration):
            importer.check_alive(registration.id)
        with pytest.raises(UnknownRegistration):
            importer.wait(registration)
        exporter.close()
        assert views["w"].shape == (3,)
        bits(views["w"])  # the caller's own view outlives both ends


# ---- handles that lie ---------------------------------------------------------------------------


def forge(registration: Registration, **changes: Any) -> Registration:
    (storage,) = registration.storages
    return msgspec.structs.replace(
        registration, storages=(msgspec.structs.replace(storage, **changes),)
    )


def refused(worker: Worker, registration: Registration, match: str) -> None:
    """Both this process and the worker refuse it, by the parameter's name and no other."""
    with Importer() as importer, pytest.raises(HandleError, match=match) as caught:
        importer.open(registration)
    assert caught.value.where == "layers.0.w"
    for storage in registration.storages:
        if isinstance(storage, ShmStorage):
            assert storage.name.strip("/") not in str(caught.value)
    with pytest.raises(HandleError, match=match):
        worker.open(registration)


@pytest.fixture
def sent() -> Iterator[Registration]:
    with Exporter() as exporter:
        yield push(exporter, {"layers.0.w": random(torch.float32, 64, 64)})


def test_a_segment_smaller_than_claimed_is_refused(worker: Worker, sent: Registration) -> None:
    os.truncate(path(sent), sent.storages[0].nbytes - 1)
    refused(worker, sent, "16383 bytes, its handle claims 16384")


def test_a_view_beyond_its_storage_is_refused(worker: Worker, sent: Registration) -> None:
    ref = sent.tensors[0]
    for lie in (
        TensorRef(ref.name, ref.dtype, (64, 65), 0, 0),
        TensorRef(ref.name, ref.dtype, ref.shape, 0, 1),
        TensorRef(ref.name, ref.dtype, ref.shape, 0, 0, (65, 1)),
        TensorRef(ref.name, ref.dtype, ref.shape, 1, 0),
    ):
        refused(worker, msgspec.structs.replace(sent, tensors=(lie,)), "storage")


def test_huge_empty_shapes_are_refused(sent: Registration) -> None:
    lie = TensorRef("layers.0.w", "float32", (2**40, 2**40, 0), 0, 0)
    with Importer() as importer, pytest.raises(HandleError, match="float32"):
        importer.open(msgspec.structs.replace(sent, tensors=(lie,)))


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "/wt_../../etc/passwd",
        "/wt_" + "A" * 32,
        "wt_" + "a" * 32,
        "/wt_" + "a" * 32 + "\n",
    ],
)
def test_a_name_outside_the_pattern_is_refused(sent: Registration, name: str) -> None:
    with Importer() as importer, pytest.raises(HandleError, match="not one of ours") as caught:
        importer.open(forge(sent, name=name))
    assert caught.value.where == "layers.0.w"
    with pytest.raises(msgspec.ValidationError):  # and by the decoder before that
        msgspec.json.decode(msgspec.json.encode(forge(sent, name=name)), type=Registration)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_segment_of_another_user_is_refused(worker: Worker, sent: Registration) -> None:
    os.chown(path(sent), 65534, 65534)
    refused(worker, sent, "user 65534")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_orphans_of_another_user_are_left(private_shm: Path) -> None:
    orphan = private_shm / ("wt_" + "0" * 32)
    orphan.write_bytes(b"theirs")
    os.chown(orphan, 65534, 65534)
    assert shm.sweep_orphans() == 0
    os.chown(orphan, 0, 0)
    assert shm.sweep_orphans() == 1


@pytest.mark.parametrize("kind", ["symlink", "folder", "fifo"])
def test_what_is_no_regular_file_is_refused(
    worker: Worker, sent: Registration, tmp_path: Path, kind: str
) -> None:
    real = path(sent)
    real.rename(
        tmp_path / "moved"
    ) if real.stat().st_dev == tmp_path.stat().st_dev else real.unlink()
    (tmp_path / "target").write_bytes(b"x" * 20000)
    if kind == "symlink":
        real.symlink_to(tmp_path / "target")
    elif kind == "fifo":
        os.mkfifo(real)
    else:
        real.mkdir()
    try:
        refused(worker, sent, "cannot be opened|not a regular file")
        shm.sweep_orphans()
        assert real.is_symlink() or real.exists()
    finally:
        real.rmdir() if kind == "folder" else real.unlink()


@pytest.mark.parametrize("how", ["closed", "replaced", "truncated"])
def test_memory_that_is_gone_is_noticed_before_it_is_read(
    worker: Worker, sent: Registration, how: str
) -> None:
    worker.open(sent)
    worker.call("check", sent.id)
    file = path(sent)
    if how == "truncated":
        os.truncate(file, 100)
    else:
        file.unlink()
    if how == "replaced":
        file.write_bytes(b"x" * 20000)
    try:
        with pytest.raises(HandleError, match=r"gone|has 100 bytes") as caught:
            worker.call("check", sent.id)
        assert caught.value.where == "layers.0.w"
    finally:
        file.unlink(missing_ok=True)


def test_memory_handles_of_another_process_or_unknown_are_refused(worker: Worker) -> None:
    with MemoryExporter() as exporter:
        registration = push(exporter, {"layers.0.w": torch.ones(4)})
        with pytest.raises(HandleError, match=f"in process {os.getpid()}") as caught:
            worker.open(registration)
        assert caught.value.where == "layers.0.w"
        with Importer() as importer:
            with pytest.raises(HandleError, match="gone"):
                importer.open(forge(registration, key="0" * 32))
            lie = TensorRef("layers.0.w", "float64", (4,), 0, 0)
            with pytest.raises(HandleError, match="needs 32 bytes"):
                importer.open(msgspec.structs.replace(registration, tensors=(lie,)))
            with pytest.raises(HandleError, match="16 bytes, its handle claims 32"):
                importer.open(forge(registration, nbytes=32))
            importer.open(registration)
            exporter.close()
            with pytest.raises(HandleError, match="gone"):
                importer.check_alive(registration.id)
    with Importer() as importer, pytest.raises(HandleError, match="gone"):
        importer.open(registration)


def test_a_bad_cuda_handle_is_refused_without_a_gpu() -> None:
    """Lengths are checked before any byte reaches CUDA, which reads past short handles."""
    storage = CudaStorage("uuid", b"short", 16, 0)
    registration = Registration("0" * 32, (storage,), (TensorRef("w", "float32", (4,), 0, 0),))
    with Importer(device=0) as importer, pytest.raises(HandleError, match="5 bytes"):
        importer.open(registration)
    with pytest.raises(HandleError, match="event handle has 3"):
        cuda.open_event(b"bad", 0, "uuid")


class FakeEvent:
    """Fires at the n-th look."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def query(self) -> bool:
        self.looks -= 1
        return self.looks <= 0


def test_waiting_for_a_trainer_that_died_ends() -> None:
    event = FakeEvent(3)
    cuda.wait(event, 10)
    assert event.looks == 0
    began = time.monotonic()
    with pytest.raises(TransferError, match=r"within 0\.05 s"):
        cuda.wait(FakeEvent(10**9), 0.05)
    assert 0.05 <= time.monotonic() - began < 5


# ---- the life of segments -----------------------------------------------------------------------


def doomed_main(pipe: Connection, folder: str) -> None:
    """Holds a registration until it is killed."""
    shm.SHM_DIR = folder
    exporter = Exporter()
    pipe.send(msgspec.json.encode(push(exporter, {"a": torch.ones(10), "b": torch.ones(20)})))
    pipe.recv()


def test_a_killed_owner_is_swept_a_live_one_never(private_shm: Path, worker: Worker) -> None:
    pipe, theirs = SPAWN.Pipe()
    doomed = SPAWN.Process(target=doomed_main, args=(theirs, str(private_shm)), daemon=True)
    doomed.start()
    assert pipe.poll(120)
    lost = msgspec.json.decode(pipe.recv(), type=Registration)
    with Exporter() as exporter, Importer() as importer:
        kept = push(exporter, {"mine": torch.ones(3)})
        assert len(segments(private_shm)) == 3
        assert worker.call("sweep", (str(private_shm), 0.2)) == 0  # from yet another process
        assert doomed.pid is not None
        os.kill(doomed.pid, signal.SIGKILL)
        doomed.join(10)
        assert importer.open(lost)["b"].sum() == 20  # whole until swept
        assert worker.call("sweep", (str(private_shm), 0.2)) == 2
        assert segments(private_shm) == [path(kept)]
        assert importer.open(lost)["b"].sum() == 20  # the mapping stays
        with pytest.raises(HandleError, match="gone"):
            importer.check_alive(lost.id)
    assert segments(private_shm) == []


def test_a_new_exporter_sweeps(private_shm: Path) -> None:
    orphan = private_shm / ("wt_" + "0" * 32)
    orphan.write_bytes(b"left behind")
    other = private_shm / "wt_not_ours"
    other.write_bytes(b"")
    Exporter().close()
    assert not orphan.exists()
    assert other.exists()


def test_sweeping_beside_creation_takes_no_live_segment(private_shm: Path, worker: Worker) -> None:
    """A worker sweeps all the time, this process creates; all that is created stays."""
    worker.send("sweep", (str(private_shm), 1.5))
    storage, span = torch.ones(64).untyped_storage(), Span(0, 256, "w")
    end, made = time.monotonic() + 1.4, 0
    while time.monotonic() < end:
        batch = [Segment(storage, span) for _ in range(8)]
        assert all((private_shm / s.handle.name[1:]).exists() for s in batch)
        for segment in batch:
            segment.close()
        made += len(batch)
    swept = worker.answer()
    assert made > 100
    print(f"{made} made, {swept} swept before they were locked")
    assert segments(private_shm) == []


def test_a_sweeper_between_create_and_lock_costs_only_a_retry(
    private_shm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The window itself: a sweep runs when the file exists and is not locked yet."""
    real = fcntl.flock
    swept: list[int] = []

    def flock(fd: int, how: int) -> None:
        if how == fcntl.LOCK_SH and len(swept) < 3:
            swept.append(shm.sweep_orphans())
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with Exporter() as exporter:
        registration = push(exporter, {"w": torch.ones(4)})
        assert swept == [1, 1, 1]
        assert segments(private_shm) == [path(registration)]
        assert shm.sweep_orphans() == 0


def test_close_and_collection_leave_nothing_behind(private_shm: Path) -> None:
    gc.collect()  # what tests before this one have left
    descriptors = len(os.listdir("/proc/self/fd"))
    exporter = Exporter()
    for n in range(3):
        push(exporter, {"a": torch.ones(n + 1), "b": torch.ones(n + 2)})
    assert segments(private_shm)
    assert not [p for p in segments(private_shm) if p.stat().st_mode & 0o077]
    exporter.close()
    assert segments(private_shm) == []
    forgotten = Exporter()
    push(forgotten, {"a": torch.ones(1)})
    del forgotten
    gc.collect()
    assert segments(private_shm) == []
    failing = Exporter()
    with pytest.raises(RequestError):
        failing.register({"a": torch.ones(1), "b": torch.ones(1, dtype=torch.complex64)}.items())
    assert segments(private_shm) == []
    failing.close()
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_failed_export_undoes_the_others(
    private_shm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a full /dev/shm: an error with advice instead of a SIGBUS at the first write."""
    real = os.posix_fallocate

    def fallocate(fd: int, offset: int, size: int) -> None:
        if size > 4096:
            raise OSError(28, "No space left on device", "/dev/shm/wt_secret")
        real(fd, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    with Exporter() as exporter:
        with pytest.raises(TransferError, match="No space left") as caught:
            exporter.register({"small": torch.ones(4), "big": torch.ones(4096)}.items())
        assert caught.value.where == "big"
        assert "--shm-size" in caught.value.next_step
        assert "wt_" not in str(caught.value)
        assert segments(private_shm) == []


FORK = """
import os, sys, torch
from vllm_wt_plugin.transport import shm
from vllm_wt_plugin.transport.ipc import Exporter
shm.SHM_DIR = sys.argv[1]
exporter = Exporter()
exporter.register({"w": torch.ones(4)}.items())
child = os.fork()
if child == 0:
    sys.exit(0)  # runs the finalizers that the child inherited
assert os.waitpid(child, 0)[1] == 0
print(len(os.listdir(sys.argv[1])))
"""


def test_a_forked_child_does_not_remove_the_parents_segments(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORK, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1"
    assert segments(tmp_path) == []


def test_local_storage_names_this_process() -> None:
    with MemoryExporter() as exporter:
        (storage,) = push(exporter, {"w": torch.ones(4)}).storages
        assert isinstance(storage, LocalStorage)
        assert (storage.pid, storage.nbytes) == (os.getpid(), 16)
