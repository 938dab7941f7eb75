"""A group that is ended while bytes are halfway (two real processes over gloo), and buckets that
are handed on by streams (played)."""

from __future__ import annotations

import os
import secrets
import signal
import threading
import time

import pytest
import torch
from torch._C._distributed_c10d import TCPStore

from tests.support.forked import forked
from tests.support.waiting import stopped, until
from vllm_wt_plugin.errors import TransferError
from vllm_wt_plugin.transport.backends import Member
from vllm_wt_plugin.transport.group import Group, join, listen
from vllm_wt_plugin.transport.nccl import AHEAD, BUFFERS, Receiver, Sender

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


class Streams:
    """A communicator whose broadcasts end when the test says so, and order a stream until then."""

    rank, world_size, aborted = 1, 2, ""

    def __init__(self, *, ordered: bool = True) -> None:
        self.ordered, self.begun, self.ended = ordered, 0, 0

    def broadcast(self, tensor: torch.Tensor, timeout_s: float) -> Flight:
        self.begun += 1
        return Flight(self, self.begun)

    def abort(self, reason: str) -> None:
        self.aborted = self.aborted or reason

    def close(self) -> None:
        self.abort("closed")


class Flight:
    def __init__(self, streams: Streams, number: int) -> None:
        self.streams, self.number = streams, number

    def done(self) -> bool:
        return self.streams.ended >= self.number

    def order(self) -> bool:
        return self.streams.ordered


def tiny() -> list[torch.Tensor]:
    return [torch.zeros(4, dtype=torch.uint8) for _ in range(BUFFERS)]


@pytest.mark.parametrize("ordered", [True, False])
def test_a_sender_runs_ahead_where_a_stream_keeps_order(ordered: bool) -> None:
    streams = Streams(ordered=ordered)
    sender = Sender(streams, tiny(), 40, 0.3, ahead=True)
    for _ in range(AHEAD if ordered else BUFFERS):
        sender.buffer()
        sender.send(4)
    with pytest.raises(TransferError, match="bucket 1 of 40 was not taken by every rank"):
        sender.buffer()
    assert "bucket 1 of 40" in streams.aborted


def test_a_receiver_gives_out_what_is_on_its_way_but_is_complete_only_when_all_is_here() -> None:
    streams = Streams()
    receiver = Receiver(streams, tiny(), [4] * 5, 20)
    assert receiver.next(0.05) is None  # not ahead: it must be here
    for i in range(5):
        assert receiver.next(5, ahead=True) == i
        assert streams.begun <= i + BUFFERS
        receiver.release()
    assert (receiver.arrived, receiver.complete(0.05)) == (0, False)
    streams.ended = 4
    assert not receiver.complete(0.05)
    streams.ended = 5
    assert receiver.complete(5)


def test_what_is_lost_after_it_was_given_out_is_told() -> None:
    streams = Streams()
    receiver = Receiver(streams, tiny(), [4] * 3, 0.5)
    streams.ended = 1
    assert [receiver.next(5, ahead=True) for _ in range(2)] == [0, 1]
    with pytest.raises(TransferError, match="bucket 2 of 3 did not arrive: nothing came"):
        receiver.complete(10)
    with pytest.raises(TransferError, match="bucket 2 of 3"):
        receiver.next(1, ahead=True)
    receiver.abort("over")
