"""`vllm-wt` as a user runs it: what it prints, what it sends, and what its exit code says.

Servers are the plugin's real routes in front of toy workers (`toy_server`).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from tests.unit.test_session import Trainer
from tests.unit.toy_server import ToyEngine, ToyServer
from vllm_wt_plugin import bench as core
from vllm_wt_plugin.cli import app as module
from vllm_wt_plugin.cli import bench, doctor, push, selftest, serve
from vllm_wt_plugin.cli.app import app
from vllm_wt_plugin.cli.exits import Exit, exit_of
from vllm_wt_plugin.errors import BY_CODE, RequestError
from vllm_wt_plugin.server.access import AccessPolicy
from vllm_wt_plugin.wire import messages as msg

NOWHERE = "http://127.0.0.1:1"


def run(*args: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(a) for a in args])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout


def ask(*args: str) -> tuple[int, dict[str, Any]]:
    """With --json: one object, on one line."""
    code, text = run(*args, "--json")
    assert text.count("\n") == 1, text
    data: dict[str, Any] = json.loads(text)
    return code, data


@pytest.fixture
def server() -> Iterator[ToyServer]:
    engine = ToyEngine()
    engine.workers[0].session.known.keeps_shadow = True
    with ToyServer(engine) as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    """`folder(seed, **changes)` → a checkpoint folder of the toy."""

    def make(name: str, tensors: dict[str, torch.Tensor]) -> str:
        (tmp_path / name).mkdir()
        distinct = {n: t.clone().contiguous() for n, t in tensors.items()}
        save_file(distinct, tmp_path / name / "model.safetensors")
        return str(tmp_path / name)

    return make


# ---- serve --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "found", "names"),
    [
        (None, [], "wt"),
        (None, ["a", "wt", "b"], "a,wt,b"),
        ("", ["a"], "wt"),
        ("a", ["a", "b"], "a,wt"),
        ("wt", ["a"], "wt"),
        ("a,wt,b", [], "a,wt,b"),
    ],
)
def test_other_plugins_stay(given: str | None, found: list[str], names: str) -> None:
    assert serve.plugins(given, found) == names


def test_serve_finds_plugins_that_vllm_would_load() -> None:
    found = serve.discovered()
    assert "wt" in found
    assert found == sorted(set(found))


@pytest.mark.parametrize("packaged", [True, False])
def test_serve_works_with_and_without_the_vllm_command(
    packaged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "has_vllm_command", lambda: packaged)
    monkeypatch.setenv("VLLM_PLUGINS", "mine")
    code, told = ask("serve", "some/model", "--port", "81", "--dry-run", "--backend", "nccl")
    assert code == Exit.DONE
    assert told["env"] == {"VLLM_PLUGINS": "mine,wt"}
    start = ["serve", "some/model"] if packaged else ["--model", "some/model"]
    config = ["--weight-transfer-config", '{"backend": "nccl"}']
    assert told["command"][3:] == [*start, "--port", "81", *config]


def test_serve_starts_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(module.os, "execve", lambda *args: started.append(args))
    mine = '--weight-transfer-config={"backend": "ipc", "x": 1}'
    assert run("serve", "m", mine)[0] == Exit.DONE
    ((program, command, env),) = started
    assert (program, command[-1]) == (sys.executable, mine)
    assert "wt" in env["VLLM_PLUGINS"].split(",")


def test_serve_refuses_the_front_end_without_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    code, said = ask("serve", "m", "--dry-run")
    assert (code, said["where"]) == (Exit.REFUSED, "VLLM_USE_RUST_FRONTEND")


# ---- push, verify, status ------------------------------------------------------------------


def test_push_then_verify_then_push_what_changed(server: ToyServer, folder: Any) -> None:
    tensors = Trainer(2).tensors
    first = folder("first", tensors)
    code, told = ask("push", first, server.url)
    assert code == Exit.DONE
    assert told["servers"][server.url]["version"] == told["version"] == "first"
    assert ask("verify", first, server.url) == (
        0, {"ok": True, "differ": {server.url: []}, "unseen": {server.url: []}},
    )  # fmt: skip
    name = max(tensors, key=lambda n: tensors[n].numel())
    tensors[name].view(-1)[3] += 1
    second = folder("second", tensors)
    code, found = ask("verify", second, server.url)
    assert (code, found["differ"][server.url]) == (Exit.FOUND, [name])
    code, told = ask("push", second, server.url, "--sparse-from", first, "--version", "v2")
    assert (code, told["version"]) == (Exit.DONE, "v2")
    assert 0 < told["changed"] < 0.01
    assert ask("verify", second, server.url)[0] == Exit.DONE
    # The base is no longer what the server holds.
    code, error = ask("push", second, server.url, "--sparse-from", first)
    assert (code, error["code"]) == (Exit.NOT_NOW, "VersionMismatch")
    assert name in error["error"]


@pytest.mark.parametrize("packed", [True, False])
def test_push_tells_people_of_every_server(
    server: ToyServer, folder: Any, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above `BUFFER` bytes through two buffers, one server after the other."""
    checkpoint = folder("big", Trainer(3).tensors)
    if packed:
        monkeypatch.setattr(push, "BUFFER", 1 << 12)
    code, text = run("push", checkpoint, server.url)
    assert code == Exit.DONE, text
    assert "version big:" in text
    assert "GB/s" in text
    assert ask("verify", checkpoint, server.url)[0] == Exit.DONE
    code, text = run("verify", checkpoint, server.url)
    assert "every tensor that was compared is equal" in text


def test_a_server_that_is_down_fails_and_the_other_takes_it(server: ToyServer, folder: Any) -> None:
    code, told = ask("push", folder("c", Trainer(2).tensors), server.url, NOWHERE)
    assert (code, told["ok"]) == (Exit.UNREACHABLE, False)
    assert told["servers"][NOWHERE]["code"] == "ServerUnreachable"
    assert told["servers"][server.url]["version"] == "c"
    code, text = run("push", folder("d", Trainer(2).tensors), server.url, NOWHERE)
    assert code == Exit.UNREACHABLE
    assert "check that the server runs" in text


def test_what_does_not_fit_is_refused_with_its_name(server: ToyServer, folder: Any) -> None:
    code, error = ask("push", folder("other", {"no.such": torch.zeros(2)}), server.url)
    assert code == Exit.REFUSED
    assert "no.such" in json.dumps(error)


def test_status(server: ToyServer, folder: Any) -> None:
    code, told = ask("status", server.url)
    assert (code, told["servers"][server.url]["state"]) == (Exit.DONE, "IDLE")
    server.engine.workers[0].ok(msg.MarkDirty("half of it is new"))
    code, text = run("status", server.url)
    assert code == Exit.FOUND
    assert "half of it is new" in text
    assert ask("push", folder("c", Trainer(2).tensors), server.url)[0] == Exit.DONE
    assert ask("status", server.url)[0] == Exit.DONE
    code, told = ask("status", server.url, NOWHERE)
    assert (code, told["servers"][NOWHERE]["code"]) == (Exit.UNREACHABLE, "ServerUnreachable")


def test_a_token_is_taken_from_option_or_environment(
    folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = AccessPolicy.from_env({"WT_TOKEN": "secret-token"}, [])
    with ToyServer(ToyEngine(), policy) as server:
        code, told = ask("status", server.url)
        assert (code, told["servers"][server.url]["code"]) == (Exit.REFUSED, "AccessDenied")
        assert ask("status", server.url, "--token", "secret-token")[0] == Exit.DONE
        monkeypatch.setenv("WT_TOKEN", "secret-token")
        code, text = run("push", folder("c", Trainer(2).tensors), server.url)
        assert code == Exit.DONE
        assert "secret-token" not in text


# ---- doctor ---------------------------------------------------------------------------------


def findings(*args: str) -> dict[str, tuple[str, str, str]]:
    _, told = ask("doctor", *args)
    return {f["what"]: (f["state"], f["found"], f["next_step"]) for f in told["findings"]}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the tests that start processes."""
    monkeypatch.setattr(selftest, "memory", lambda device: device)
    monkeypatch.setattr(selftest, "collective", lambda backend: backend)


def test_doctor_runs_its_own_tests() -> None:
    assert "another process read" in selftest.memory("cpu")
    assert "added up" in selftest.collective("gloo")


def test_doctor_names_a_failed_test() -> None:
    with pytest.raises(selftest.Failed, match="truncated"):
        selftest._children([["memory"]])  # nothing to read
    found = doctor.tried("x", lambda: selftest._children([["nonsense"]])[0], "do this")
    assert (found.state, found.next_step) == ("problem", "do this")
    assert found.found


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("environ", "what", "state", "says"),
    [
        ({}, "VLLM_PLUGINS", "note", "not set"),
        ({"VLLM_PLUGINS": "other"}, "VLLM_PLUGINS", "problem", "leaves wt out"),
        ({"VLLM_PLUGINS": "other,wt"}, "VLLM_PLUGINS", "ok", "other,wt"),
        ({"VLLM_USE_RUST_FRONTEND": "1"}, "front end", "problem", "loads no plugins"),
        ({"VLLM_SERVER_DEV_MODE": "1"}, "front end", "note", "/collective_rpc"),
        ({"WT_TOKEN": "with space"}, "token", "problem", "printable"),
        ({"WT_TOKEN": "fine"}, "token", "ok", "WT_TOKEN is set"),
        ({"WT_TOKEN_FILE": "/no/such/file"}, "token", "problem", "cannot be read"),
    ],
)
def test_doctor_reads_the_environment(
    environ: dict[str, str], what: str, state: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("VLLM_PLUGINS", "WT_TOKEN", "WT_TOKEN_FILE", "VLLM_USE_RUST_FRONTEND"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    found = findings()[what]
    assert (found[0], says in found[1]) == (state, True), found
    assert (run("doctor")[0] == Exit.FOUND) is (state == "problem")


@pytest.mark.usefixtures("quick")
def test_doctor_looks_at_servers(server: ToyServer) -> None:
    seen = findings(server.url, NOWHERE, "no address")
    assert seen[f"{server.url} routes"][0] == "ok"
    assert seen[f"{server.url} weights"][:2] == ("ok", "version default")
    assert seen[f"{server.url} dev mode"][0] == "ok"
    assert seen[f"{NOWHERE} routes"][0] == "problem"
    assert seen["no address"][0] == "problem"
    server.engine.workers[0].ok(msg.MarkDirty("mixed up"))
    state, found, step = findings(server.url)[f"{server.url} weights"]
    assert (state, "mixed up" in found, "push" in step) == ("problem", True, True)


@pytest.mark.usefixtures("quick")
def test_doctor_says_that_a_token_is_missing() -> None:
    with ToyServer(ToyEngine(), AccessPolicy.from_env({"WT_TOKEN": "t0ken"}, [])) as server:
        state, _, step = findings(server.url)[f"{server.url} token"]
        assert (state, "WT_TOKEN" in step) == ("problem", True)


# ---- bench ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "number"), [("10M", 10**7), ("1b", 10**9), ("1.5M", 1_500_000), ("2000000", 2 * 10**6)]
)
def test_bench_reads_sizes(size: str, number: int) -> None:
    assert bench.parameters(size) == number


@pytest.mark.parametrize("size", ["", "M", "10", "-1M", "10MB", "1000B"])
def test_bench_refuses_what_is_no_size(size: str) -> None:
    code, said = ask("bench", "--sizes", f"10M,{size}")
    assert (code, "no model size" in said["error"]) == (Exit.REFUSED, True)


def test_bench_needs_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda _: None)
    code, said = ask("bench")
    assert (code, said["code"]) == (Exit.FAILED, "UnsupportedVLLM")


def test_bench_makes_models_of_about_that_size() -> None:
    for size in (10**7, 10**8, 10**9):
        c = core.config(size)
        h = c["hidden_size"]
        heads = (2 * c["num_attention_heads"] + 2 * c["num_key_value_heads"]) * c["head_dim"]
        layer = h * heads + 3 * h * c["intermediate_size"]
        made = c["num_hidden_layers"] * layer + 2 * c["vocab_size"] * h
        assert made == pytest.approx(size, rel=0.15)


def test_bench_compares_within_rounds() -> None:
    """A round in which the machine was busy says the same as the others."""
    rows = {
        core.COPY: [1.0, 10.0, 1.0],
        core.DENSE: [2.0, 20.0, 2.0],
        core.RELOAD: [8.0, 80.0, 8.0],
    }
    table = bench.lines({"rows": rows})
    assert table[1] == (core.DENSE, "2.00", "2.00", "4.00")


# ---- the whole ------------------------------------------------------------------------------


def test_every_error_has_an_exit_code() -> None:
    codes = {name: exit_of(cls("x")) for name, cls in BY_CODE.items()}
    assert codes["PlanError"] == codes["AccessDenied"] == Exit.REFUSED
    assert codes["EngineDirty"] == codes["VersionMismatch"] == Exit.NOT_NOW
    assert codes["ServerUnreachable"] == Exit.UNREACHABLE
    assert codes["TransferError"] == codes["UnsupportedVLLM"] == Exit.FAILED
    assert Exit.DONE not in codes.values()


def test_a_wrong_command_line_and_a_bad_url() -> None:
    assert run("push", "/no/such/folder", NOWHERE)[0] == Exit.USAGE
    assert run("nonsense")[0] == Exit.USAGE
    code, told = ask("status", "nonsense")
    assert (code, told["servers"]["nonsense"]["code"]) == (Exit.REFUSED, RequestError.__name__)


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra_it_says_how_to_get_it(missing: str) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None\nfrom vllm_wt_plugin.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == Exit.USAGE
    assert "pip install 'vllm_wt_plugin[cli]'" in done.stderr
    assert "Traceback" not in done.stderr
