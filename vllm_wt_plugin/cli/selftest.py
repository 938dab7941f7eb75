"""What only two processes can show: that memory of one opens in the other, and that they can talk.

    parent: Exporter ─ Registration on stdin ─▶ child: Importer ─ what it reads ─▶ parent compares

Each function says what it found, or raises `Failed`.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from datetime import timedelta

import msgspec
import torch
import torch.distributed as dist

from vllm_wt_plugin.errors import WeightSyncError
from vllm_wt_plugin.transport.ipc import Exporter, Importer
from vllm_wt_plugin.wire.handles import Registration

WAIT_S = 60.0
NUMBERS = 1 << 16


class Failed(Exception):
    """The child's last line, or that it said nothing in time."""


def memory(device: str) -> str:
    """Shared memory (`cpu`) or CUDA IPC (`cuda`), the way a push goes."""
    numbers = torch.arange(NUMBERS, dtype=torch.int32, device=device)
    exporter = Exporter()
    try:
        registration, _ = exporter.register([("numbers", numbers)])
        exporter.refresh()
        said = _children([["memory"]], msgspec.json.encode(registration))[0]
    except WeightSyncError as exc:
        raise Failed(str(exc)) from exc
    finally:
        exporter.close()
    if said != str(int(numbers.sum())):
        raise Failed(f"another process read something else: {said}")
    return f"another process read {numbers.nbytes // 1024} KiB of this one's memory"


def collective(backend: str) -> str:
    """A sum over two processes of this machine, with `gloo` or (two GPUs) `nccl`."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    said = _children([["collective", backend, str(rank), str(port)] for rank in (0, 1)])
    if said != ["3.0", "3.0"]:
        raise Failed(f"a sum over two processes is wrong: {said}")
    return "two processes added up a tensor"


def _children(arguments: list[list[str]], stdin: bytes = b"") -> list[str]:
    """The last line that each of these says."""
    module = [sys.executable, "-m", __name__]
    running = [
        subprocess.Popen(  # noqa: S603  this very module
            [*module, *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for args in arguments
    ]
    said = []
    try:
        for process in running:
            out, err = process.communicate(stdin, WAIT_S)
            if process.returncode:
                lines = err.decode(errors="replace").strip().splitlines()
                raise Failed(lines[-1] if lines else f"exit code {process.returncode}")
            said.append(out.decode().split()[-1])
    except subprocess.TimeoutExpired as exc:
        raise Failed(f"no answer from another process in {WAIT_S:g} s") from exc
    finally:
        for process in running:
            with process:  # closes its pipes, and waits
                process.kill()
    return said


def _main(what: str, *args: str) -> str:
    if what == "memory":
        registration = msgspec.json.decode(sys.stdin.buffer.read(), type=Registration)
        with Importer() as importer:
            tensor = importer.open(registration)["numbers"]
            importer.check_alive(registration.id)
            importer.wait(registration)
            return str(int(tensor.sum()))
    backend, rank, port = args
    device = torch.device("cuda", int(rank)) if backend == "nccl" else torch.device("cpu")
    store = dist.TCPStore("127.0.0.1", int(port), 2, rank == "0")  # type: ignore[attr-defined]
    dist.init_process_group(
        backend, store=store, rank=int(rank), world_size=2, timeout=timedelta(seconds=WAIT_S / 2)
    )
    total = torch.tensor([float(rank) + 1], device=device)
    dist.all_reduce(total)
    result = str(total.item())
    dist.destroy_process_group()
    return result


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.stdout.write(_main(*sys.argv[1:]) + "\n")
