"""A group of two real processes over gloo, ended while the bytes of a broadcast are halfway."""

from __future__ import annotations

import os
import secrets
import signal
import threading
import time

import pytest
import torch
from torch._C._distributed_c10d import TCPStore

from tests.support.toy_replica import forked
from tests.support.waiting import stopped, until
from vllm_wt_plugin.errors import TransferError
from vllm_wt_plugin.transport.backends import Member
from vllm_wt_plugin.transport.group import Group, join, listen
from vllm_wt_plugin.transport.nccl import Receiver, Sender

NBYTES = 256 << 20  # far more than sockets hold
SOON_S = 10
QUICK = 1e-4  # a bucket is halfway for some milliseconds


def meet(store: TCPStore, key: str, rank: int) -> Group:
    at = Member(host="127.0.0.1", port=store.port, group=key, rank=rank, world_size=2)
    return join(at, torch.device("cpu"), 30, threading.Event(), store)


def peer(port: int, key: str, rank: int) -> None:
    """Sends ones; or receives, and stands still as soon as the first of them are there."""
    group = meet(TCPStore("127.0.0.1", port, None, False, use_libuv=False), key, rank)
    data = torch.full((NBYTES,), int(rank == 0), dtype=torch.uint8)
    pending = group.broadcast(data, 60)
    assert until(lambda: bool(data[0]), 30, QUICK)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    assert until(pending.done, 30, QUICK)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_group_ends_while_a_peer_stands_still_in_mid_bucket(rank: int) -> None:
    store, key = listen("127.0.0.1"), secrets.token_hex(16)
    process = forked(peer, store.port, key, 1 - rank)
    try:
        group = meet(store, key, rank)
        (send if rank == 0 else receive)(group, process.pid or 0)
    finally:
        process.kill()


def send(group: Group, pid: int) -> None:
    sender = Sender(group, [torch.ones(NBYTES, dtype=torch.uint8)], 1, 60)
    sender.send(NBYTES)
    assert until(lambda: stopped(pid), 30, QUICK)
    begun = time.monotonic()
    group.abort("somebody says so")
    with pytest.raises(TransferError, match="bucket 1 of 1: somebody says so"):
        sender.drain()
    group.close()
    assert time.monotonic() - begun < SOON_S


def receive(group: Group, pid: int) -> None:
    memory = [torch.zeros(NBYTES, dtype=torch.uint8)]
    receiver = Receiver(group, memory, [NBYTES], 60)
    assert until(lambda: bool(memory[0][0]), 30, QUICK)
    os.kill(pid, signal.SIGSTOP)
    assert until(lambda: stopped(pid), 30, QUICK)
    begun = time.monotonic()
    assert receiver.next(0.1) is None
    receiver.abort("somebody says so")
    with pytest.raises(TransferError, match="bucket 1 of 1 did not arrive: somebody says so"):
        receiver.next(1)
    group.close()
    assert time.monotonic() - begun < SOON_S
