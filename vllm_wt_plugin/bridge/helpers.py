"""Small things that trainers written for the Atropos bridge call: names, rotary rows, hosts."""

from __future__ import annotations

import os
import socket
import subprocess
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vllm_wt_plugin.errors import RequestError

TENSOR_PORT = 26756
CONTROL_PORT = 26757
INFERENCE_PORT = 26758
Urls = tuple[str, str, str, list[str]]


def get_inference_urls(
    num_inference_nodes: int,
    nodes: Sequence[str] | None = None,
    *,
    tensor_port: int = TENSOR_PORT,
    control_port: int = CONTROL_PORT,
    inference_port: int = INFERENCE_PORT,
) -> Urls:
    """(tensors, control, inference, inference nodes): `host:port` of each rendezvous.

    `nodes`: all of the job's, the inference nodes last; the first is the master. Without it
    Slurm is asked (`scontrol show hostnames`). No inference nodes: this host.
    """
    if num_inference_nodes < 0:
        raise RequestError("must not be negative", where="num_inference_nodes")
    if num_inference_nodes == 0:
        all_nodes = inference = ["localhost"]
    else:
        all_nodes = list(nodes) if nodes is not None else _slurm_nodes()
        if len(all_nodes) < num_inference_nodes:
            raise RequestError(
                f"{num_inference_nodes} inference nodes of {len(all_nodes)} in all",
                where=", ".join(all_nodes),
                next_step="give every node of the job, the inference nodes last",
            )
        inference = all_nodes[-num_inference_nodes:]
    return (
        f"{all_nodes[0]}:{tensor_port}",
        f"{all_nodes[0]}:{control_port}",
        f"{inference[0]}:{inference_port}",
        inference,
    )


def _slurm_nodes() -> list[str]:
    job = os.environ.get("SLURM_JOB_NODELIST", "")
    step = "give the node list, or run inside a Slurm job"
    if not job:
        raise RequestError("no node list", where="SLURM_JOB_NODELIST", next_step=step)
    command = ["scontrol", "show", "hostnames", job]
    try:
        out = subprocess.run(  # noqa: S603  a fixed program, no shell
            command, check=True, capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError) as exc:
        raise RequestError(f"scontrol failed: {exc}", where=job, next_step=step) from exc
    return out.stdout.split()


def get_local_hostname() -> list[str]:
    """This host's names: of the line of /etc/hosts that knows it and is not loopback, else its
    address and its own name."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        address = "127.0.0.1"
    try:
        with open("/etc/hosts") as file:
            rows = [line.partition("#")[0].split() for line in file]
    except OSError:
        rows = []
    for row in rows:
        known = len(row) >= 2 and (row[0] == address or name in row)
        if known and not row[0].startswith("127.") and row[0] != "::1":
            return row
    return [address, name]


def get_name_conversions(param_mappings: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """vLLM's name → the trainer's names: `param_mappings` of the config file, turned round."""
    out: dict[str, list[str]] = defaultdict(list)
    for name, info in param_mappings.items():
        out[info.get("vllm_name", name)].append(name)
    return dict(out)


def permute_for_rotary(w: torch.Tensor, n_heads: int) -> torch.Tensor:
    """[heads · d, …] with rotary pairs side by side → the two halves one after the other.

    One head of rows 0 1 2 3 → rows 0 2 1 3. A new tensor.
    """
    if n_heads <= 0 or w.dim() == 0 or w.shape[0] % (2 * n_heads):
        raise RequestError(
            f"a tensor of shape {tuple(w.shape)} has no {n_heads} heads of rotary pairs",
            next_step="give a query or key projection and its number of heads",
        )
    pairs = w.reshape(n_heads, w.shape[0] // n_heads // 2, 2, *w.shape[1:])
    return pairs.transpose(1, 2).reshape(w.shape).clone()


def permute_for_rotary_1d(w: torch.Tensor, n_heads: int) -> torch.Tensor:
    """The same for a bias [heads · d]."""
    if w.dim() != 1:
        raise RequestError(f"a bias has one dimension, got shape {tuple(w.shape)}")
    return permute_for_rotary(w, n_heads)
