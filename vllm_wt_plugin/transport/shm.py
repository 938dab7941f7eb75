"""CPU storages through POSIX shared memory: the trainer's copy, the worker's private mapping.

For the bridge, the other way round: `Home` is where a worker's weights live, and the trainer maps
it to write in.

A segment is a file `/dev/shm/wt_<32 hex>`, mode 0600. Its owner holds a shared `flock` on it
until it is closed or dies; one that can be locked exclusively has no owner and may be swept.
Names are secrets (whoever knows one may read it): they appear in no message.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import stat
import weakref
from functools import partial
from typing import cast

import torch

from vllm_wt_plugin.errors import HandleError, StateError, TransferError
from vllm_wt_plugin.transport.layout import Mapped, Span, flat
from vllm_wt_plugin.wire.handles import SHM_PREFIX, ShmStorage

SHM_DIR = "/dev/shm"  # noqa: S108  where Linux keeps POSIX shared memory
_NAME = re.compile(re.escape(SHM_PREFIX) + r"[0-9a-f]{32}")
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # NONBLOCK: a FIFO would wait
_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Segment:
    """Trainer side: shared memory that holds bytes [start, stop) of a CPU storage.

    Owns the file, one descriptor and the mapping. `close`, garbage collection and normal exit
    remove the file; a worker that mapped it keeps reading the last bytes.
    """

    def __init__(self, storage: torch.UntypedStorage, span: Span) -> None:
        self.start = span.start
        self._storage = storage
        self._name = span.name
        nbytes = span.stop - span.start
        name, fd = _create(nbytes, span.name)
        self._finalizer = weakref.finalize(self, _remove, name, fd, os.getpid())
        self.handle = ShmStorage(name, nbytes)
        self._bytes = flat(_map(fd, nbytes, shared=True, name=span.name), 0, nbytes)

    def rebind(self, storage: torch.UntypedStorage) -> bool:
        """Always possible: the bytes are copied anyway."""
        self._storage = storage
        return True

    def refresh(self) -> None:
        """Copy the storage's present bytes in. StateError if it shrank since it was registered."""
        if self._storage.nbytes() < self.start + self.handle.nbytes:
            raise StateError(
                "the parameter's storage was freed or shrunk after it was registered",
                where=self._name,
                next_step="register the tensors again",
            )
        self._bytes.copy_(flat(self._storage, self.start, self.handle.nbytes))

    def close(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)  # unmaps
        self._finalizer()


class Home(Segment):
    """Worker side: a segment that takes a storage's place. Tensors set on `memory` are shared as
    they are; nothing is copied after the first time."""

    def __init__(self, storage: torch.UntypedStorage, name: str) -> None:
        super().__init__(storage, Span(0, storage.nbytes(), name))
        super().refresh()
        self._storage = self.memory = self._bytes.untyped_storage()

    def rebind(self, storage: torch.UntypedStorage) -> bool:
        """False where the tensors have left it."""
        return storage.data_ptr() == self.memory.data_ptr()

    def refresh(self) -> None:
        """Nothing to do: it is the memory."""

    def close(self) -> None:
        """Nothing: weights live here until their process ends."""


def owned(handle: ShmStorage) -> bool:
    """Does a living process of this user hold the segment? The owner keeps a lock on it."""
    try:
        fd = os.open(_path(handle, ""), _READ)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _create(nbytes: int, name: str) -> tuple[str, int]:
    """A new locked segment of `nbytes` zeros: its name and a descriptor that holds the lock."""
    try:
        while True:
            segment = SHM_PREFIX + secrets.token_hex(16)
            fd = os.open(SHM_DIR + segment, _CREATE, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_SH)
                # A sweeper may have come between open and lock. It unlinks only while it holds
                # the exclusive lock, so from here on a segment that has its name keeps it.
                if os.fstat(fd).st_nlink == 0:
                    os.close(fd)
                    continue
                if nbytes:
                    # Not ftruncate: on a full /dev/shm the first write to a hole is a SIGBUS.
                    os.posix_fallocate(fd, 0, nbytes)
            except OSError:
                _remove(segment, fd, os.getpid())
                raise
            return segment, fd
    except OSError as exc:
        raise TransferError(
            f"cannot make {nbytes} bytes of shared memory: {os.strerror(exc.errno or 0)}",
            where=name,
            next_step="enlarge /dev/shm (docker run --shm-size or --ipc=host) or, if files are "
            "lacking, raise `ulimit -n`",
        ) from None  # the cause's text has the name


def _remove(segment: str, fd: int, owner: int) -> None:
    """Unlink and unlock; in a forked child only drop the child's descriptor."""
    if os.getpid() == owner:
        with contextlib.suppress(FileNotFoundError):  # someone cleaned /dev/shm
            os.unlink(SHM_DIR + segment)
    os.close(fd)


def _map(fd: int, nbytes: int, *, shared: bool, name: str) -> torch.UntypedStorage:
    """Map the file; unmapped with the last tensor on it. Python's mmap would keep a descriptor."""
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8).untyped_storage()
    try:
        mapped = torch.UntypedStorage.from_file(f"/proc/self/fd/{fd}", shared, nbytes)
    except RuntimeError as exc:
        raise TransferError(
            f"cannot map {nbytes} bytes of shared memory: {exc}", where=name
        ) from exc
    return cast(torch.UntypedStorage, mapped)


def attach(handle: ShmStorage, name: str, *, write: bool = False) -> Mapped:
    """Worker side: a private read mapping of a segment, checked first; `name`: the parameter.
    `write`: a shared one, whose writes the other side sees.

    Raises HandleError for a name that is not ours, a file that is gone, is no regular file,
    belongs to another user, or is smaller than claimed (reading past its end kills a process).
    """
    path = _path(handle, name)
    try:
        fd = os.open(path, _READ)
    except OSError as exc:
        raise _unreadable(exc, name) from None
    try:
        found = os.fstat(fd)
        _check_file(found, handle.nbytes, name)
        memory = _map(fd, handle.nbytes, shared=write, name=name)
    finally:
        os.close(fd)
    return Mapped(memory, 0, partial(_check_alive, handle, name, (found.st_dev, found.st_ino)))


def _path(handle: ShmStorage, name: str) -> str:
    if not _NAME.fullmatch(handle.name):
        raise HandleError(
            "the name of the shared-memory segment is not one of ours",
            where=name,
            next_step="send the registration that the exporter made",
        )
    return SHM_DIR + handle.name


def _unreadable(exc: OSError, name: str) -> HandleError:
    gone = isinstance(exc, FileNotFoundError)
    return HandleError(
        "the shared-memory segment of this parameter "
        + ("is gone" if gone else f"cannot be opened: {os.strerror(exc.errno or 0)}"),
        where=name,
        next_step="the trainer ended or released it: register the tensors again"
        if gone
        else "trainer and worker must run as the same user on the same host and share /dev/shm",
    )


def _check_file(found: os.stat_result, nbytes: int, name: str) -> None:
    what = ""
    if not stat.S_ISREG(found.st_mode):
        what = "is not a regular file"
    elif found.st_uid != os.geteuid():
        what = f"belongs to user {found.st_uid}, this process runs as {os.geteuid()}"
    elif found.st_size < nbytes:
        what = f"has {found.st_size} bytes, its handle claims {nbytes}"
    if what:
        raise HandleError(
            f"the shared-memory segment of this parameter {what}",
            where=name,
            next_step="register the tensors again, from a trainer of the same user",
        )


def _check_alive(handle: ShmStorage, name: str, identity: tuple[int, int]) -> None:
    """Still there under its name, the same file, still large enough; else HandleError."""
    try:
        found = os.stat(_path(handle, name), follow_symlinks=False)
    except OSError as exc:
        raise _unreadable(exc, name) from None
    if (found.st_dev, found.st_ino) != identity:
        raise HandleError(
            "the shared-memory segment of this parameter is gone: another file has its name",
            where=name,
            next_step="register the tensors again",
        )
    _check_file(found, handle.nbytes, name)


def sweep_orphans() -> int:
    """Unlink this user's segments whose owner is dead; how many. Safe beside live exporters."""
    try:
        names = os.listdir(SHM_DIR)
    except FileNotFoundError:
        return 0
    return sum(_sweep(SHM_DIR + "/" + name) for name in names if _NAME.fullmatch("/" + name))


def _sweep(path: str) -> bool:
    try:
        fd = os.open(path, _READ)
    except OSError:
        return False  # gone meanwhile, a link, or not ours to read
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            return False
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)  # while locked: see _create
        return True
    except (BlockingIOError, FileNotFoundError):
        return False
    finally:
        os.close(fd)
