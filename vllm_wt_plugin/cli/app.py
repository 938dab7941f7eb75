"""The commands and their options."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_wt_plugin.cli import serve as serving
from vllm_wt_plugin.cli import show
from vllm_wt_plugin.cli.exits import Exit, exit_of
from vllm_wt_plugin.errors import WeightSyncError
from vllm_wt_plugin.trainer.client import HTTPClient
from vllm_wt_plugin.trainer.sync import WeightSync

app = typer.Typer(
    name="vllm-wt",
    help="Live weight sync for vLLM. Exit codes: 0 done, 1 a problem was found, 2 wrong command "
    "line, 3 refused, 4 not now (dirty, asleep, busy), 5 unreachable, 6 failed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
Token = Annotated[
    str | None, typer.Option(envvar="WT_TOKEN", show_envvar=True, help="The server's WT_TOKEN.")
]
Timeout = Annotated[float, typer.Option(min=0.1, help="Seconds to wait for an answer.")]
Urls = Annotated[list[str], typer.Argument(help="Servers, such as http://127.0.0.1:8000.")]
Checkpoint = Annotated[
    Path, typer.Argument(help="Folder with *.safetensors.", exists=True, file_okay=False)
]


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="As for `vllm serve`; its options may follow.")],
    backend: Annotated[str, typer.Option(help="Weight transfer backend.")] = "ipc",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command only.")] = False,
    json_: Json = False,
) -> None:
    """Start vLLM with this plugin and every other that would load without it."""
    with show.errors(json_):
        command = serving.command(model, backend, ctx.args, os.environ)
    names = serving.plugins(os.environ.get("VLLM_PLUGINS"), serving.discovered())
    if json_:
        show.as_json({"command": command, "env": {"VLLM_PLUGINS": names}})
    elif dry_run:
        import shlex

        show.out.print(f"VLLM_PLUGINS={names} {shlex.join(command)}", markup=False)
    if not dry_run:
        os.execve(command[0], command, os.environ | {"VLLM_PLUGINS": names})  # noqa: S606


@app.command()
def push(
    checkpoint: Checkpoint,
    urls: Urls,
    version: Annotated[
        str | None, typer.Option(help="What the weights are called [default: the folder's name].")
    ] = None,
    sparse_from: Annotated[
        Path | None,
        typer.Option(
            help="The checkpoint that the servers hold now: send only what differs from it.",
            exists=True, file_okay=False,
        ),
    ] = None,
    token: Token = None,
    timeout: Timeout = 300.0,
    json_: Json = False,
) -> None:  # fmt: skip
    """Make a checkpoint the served weights of every server."""
    from vllm_wt_plugin.cli import push as pushing

    version = version or checkpoint.resolve().name
    failed = None
    with show.errors(json_):
        try:
            report = pushing.push(
                checkpoint, urls, version, sparse_from, token=token, timeout_s=timeout, hide=json_
            )
        except WeightSyncError as exc:
            if exc.report is None:
                raise
            report, failed = exc.report, exc
    if json_:
        show.as_json(pushing.described(report))
    else:
        pushing.summary(report)
    if failed is not None:
        show.leave(exit_of(failed))


@app.command()
def status(urls: Urls, token: Token = None, timeout: Timeout = 10.0, json_: Json = False) -> None:
    """What every server holds, and what is wrong with it. Exit code 1 if one is DIRTY."""
    found = {url: _status(url, token, timeout) for url in urls}
    if json_:
        show.as_json({"servers": found})
    else:
        columns = ("server", "state", "version", "backend", "world", "last push", "bytes",
                   "seconds", "changed")  # fmt: skip
        show.table("", columns, [_row(url, s) for url, s in found.items()])
        for url, s in found.items():
            if why := _why(s):
                show.out.print(f"{url}: {why}", markup=False)
    if any("code" in s for s in found.values()):
        codes = {s["code"] for s in found.values() if "code" in s}
        show.leave(Exit.UNREACHABLE if "ServerUnreachable" in codes else Exit.REFUSED)
    if any(s["state"] == "DIRTY" for s in found.values()):
        show.leave(Exit.FOUND)


def _status(url: str, token: str | None, timeout: float) -> dict[str, Any]:
    try:
        client = HTTPClient(url, token=token, timeout_s=timeout)
        try:
            return client.status()
        finally:
            client.close()
    except WeightSyncError as exc:
        return exc.to_dict()


def _row(url: str, s: dict[str, Any]) -> tuple[str, ...]:
    if "code" in s:
        return (url, "problem", *[""] * 7)
    last = s.get("last_push")
    pushed = ("", "", "", "")
    if last is not None:
        share = last["changed"]
        pushed = (
            show.ago(last["at"]), show.size(last["bytes"]), f"{last['seconds']:.3f}",
            "" if share is None else f"{share:.3%}",
        )  # fmt: skip
    return (url, s["state"], s["version"], s["backend"], str(s["world_size"]), *pushed)


def _why(s: dict[str, Any]) -> str:
    if "code" in s:
        return f"{s['error']} Next: {s['next_step']}"
    if s["state"] == "UPDATING":
        return f"an update of {s['owner'] or 'an unnamed trainer'} is open"
    asleep = f"asleep: {', '.join(s['asleep'])}" if s["asleep"] else ""
    return s["reason"] or asleep


@app.command()
def verify(
    checkpoint: Checkpoint, urls: Urls, token: Token = None, timeout: Timeout = 300.0,
    json_: Json = False,
) -> None:  # fmt: skip
    """Compare every weight that servers hold with a checkpoint, by checksum. Exit code 1 if any
    tensor differs."""
    with show.errors(json_), WeightSync(urls, token=token, timeout_s=timeout) as sync:
        found = sync.verify(checkpoint)
    if json_:
        show.as_json({"ok": found.ok, "differ": found.differ, "unseen": found.unseen})
    else:
        for url in found.differ:
            _tell_found(url, found.differ[url], found.unseen[url])
    if not found.ok:
        show.leave(Exit.FOUND)


def _tell_found(url: str, differ: list[str], unseen: list[str]) -> None:
    for name in differ:
        show.out.print(f"{url}: {name} differs", markup=False, style="red")
    verdict = (
        f"{len(differ)} tensors differ" if differ else "every tensor that was compared is equal"
    )
    rest = f"; {len(unseen)} are held in another form by vLLM and were not compared"
    show.out.print(f"{url}: {verdict}{rest if unseen else ''}", markup=False)


@app.command()
def doctor(
    urls: Annotated[list[str] | None, typer.Argument(help="Servers to look at too.")] = None,
    token: Token = None,
    timeout: Timeout = 10.0,
    json_: Json = False,
) -> None:
    """Look at everything that pushes need, here and on servers, and say what to do."""
    from vllm_wt_plugin.cli import doctor as looking

    findings = looking.examine(urls or [], token, timeout)
    if json_:
        show.as_json({"ok": looking.healthy(findings), "findings": [f._asdict() for f in findings]})
    else:
        show.table("", ("what", "is", "found", "what to do"), findings)
    if not looking.healthy(findings):
        show.leave(Exit.FOUND)


@app.command()
def bench(
    sizes: Annotated[str, typer.Option(help="Parameters of the models to make.")] = "10M,100M",
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Of each, beside a first one.")] = 5,
    json_: Json = False,
) -> None:
    """Time pushes beside vLLM's own reload of the same tensors and a bare copy, on this CPU. Exit
    code 1 if an engine did not hold the trainer's bits."""
    from vllm_wt_plugin.cli import bench as measuring

    found = []
    with show.errors(json_):
        for size in [measuring.parameters(s) for s in sizes.split(",")]:
            found.append(measuring.measure(size, rounds))
            if not json_:
                one = found[-1]
                title = f"{one['parameters']:,} parameters, {show.size(one['bytes'])}"
                columns = ("what", "ms", "x memcpy", "x faster than vLLM")
                show.table(title, columns, measuring.lines(one))
    if json_:
        show.as_json({"ok": all(f["same"] for f in found), "sizes": found})
    if not all(f["same"] for f in found):
        show.leave(Exit.FOUND)
