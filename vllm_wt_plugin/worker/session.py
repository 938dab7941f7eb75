"""The update session of one worker: the truth about which weights it serves.

    IDLE(v) ─ begin → UPDATING ─ commit → IDLE(v')      any error or abort → IDLE(v) or DIRTY(why)

Before the first written byte, and after commit, an error leaves the old weights serving. In
between patches are undone; after all else the worker is DIRTY, and only a complete dense update
ends that. `call` never raises: with several ranks vLLM stops at the first failing one and mixes up
all later replies.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec
import torch

from vllm_wt_plugin.errors import (
    EngineAsleep,
    NotBegun,
    NoUpdate,
    TransferError,
    UpdateInProgress,
    WeightSyncError,
)
from vllm_wt_plugin.transport.ipc import Importer
from vllm_wt_plugin.wire import messages as msg
from vllm_wt_plugin.wire.nccl import Joined, Leave, NcclInit
from vllm_wt_plugin.worker.export import Exports
from vllm_wt_plugin.worker.incoming import Incoming
from vllm_wt_plugin.worker.known import Known
from vllm_wt_plugin.worker.link import Link
from vllm_wt_plugin.worker.open import Committed, Draft, Open
from vllm_wt_plugin.worker.parts import apply_part, check_part
from vllm_wt_plugin.worker.patches import PatchUpdate, open_patches
from vllm_wt_plugin.worker.plan.host import Host
from vllm_wt_plugin.worker.plan.update import Update, check_equal
from vllm_wt_plugin.worker.turn import Turn


class WorkerSession:
    """One per engine and rank. Not thread-safe: called from the worker's main thread only."""

    def __init__(
        self,
        host: Callable[[], Host],
        importer: Importer,
        *,
        rank: int,
        world_size: int = 1,
        log: Callable[..., None],
        after_commit: Callable[[], None],
        synchronize: Callable[[], None],
        shadow: bool = False,
        partial: bool = False,
        link: Link | None = None,
        shared: bool = False,
    ) -> None:
        self.known = Known(host, importer, rank=rank, keeps_shadow=shadow, partial=partial)
        self.rank = rank
        self.link = link or Link(rank, torch.device("cpu"))
        self._log, self._after_commit, self._synchronize = log, after_commit, synchronize
        self.version = "default"
        self.dirty = ""  # why, while DIRTY
        self.dirty_since = 0.0
        self.resume_sticky = False  # a failed update paused the engine; the healing one resumes it
        self.incoming = Incoming(
            self.known, self.link, synchronize, lambda: (self.version, self.dirty)
        )
        self.exports = Exports(self.known, world_size)
        self.asleep: set[str] = set()
        self.open: Open | None = None
        self.turn = Turn(shared=shared)
        self.last: Committed | None = None  # patches that another rank's failure may take back
        self._called_off: deque[str] = deque(maxlen=64)  # sessions whose abort came first
        self.ended = ("", "")  # the last update's session, and `commit`, `abort` or `lease`

    # ---- the one entry ----------------------------------------------------------------

    def call(self, payload: object) -> dict[str, Any]:
        """Run encoded verbs in turn, stop at the first error; a `Reply` as plain data."""
        out = Draft()
        try:
            self.expire()
            for verb in msg.decode_verbs(payload):
                self.run(verb, out)
        except WeightSyncError as exc:
            out.error = exc.to_dict()
        # The last line of defence: an exception that crossed collective_rpc would desynchronise
        # every later reply of a multi-rank engine.
        except Exception as exc:
            self._log("weight sync: rank %d failed", self.rank, exc_info=True)
            out.error = TransferError(f"{type(exc).__name__}: {exc}").to_dict()
        return self._answer(out)

    def _answer(self, out: Draft) -> dict[str, Any]:
        if out.error is not None:
            out.error["where"] = " ".join(filter(None, [out.error["where"], f"rank {self.rank}"]))
            if out.mine and self.open is not None and self.open.wrote:
                self.abort(out.error["error"])
        reply = msg.Reply(self.rank, self.state(), out.error, out.report, out.seconds, out.info)
        data: dict[str, Any] = msgspec.to_builtins(reply)
        return data

    def run(self, verb: msg.Verb, out: Draft) -> None:
        match verb:
            case msg.Status():
                self.status(verb, out)
            case msg.Init():
                self.init(verb.info)
            case Joined():
                out.info["joining"] = not self.link.joined()
            case msg.Begin():
                self.begin(verb)
                out.info["shared"] = self.turn.shared
            case msg.Prepare() | msg.PreparePart():
                self.prepare(verb, out)
            case msg.PreparePatches():
                self.prepare_patches(verb, out)
            case msg.Sums():
                self._awake()
                places = self.known.places_for(verb.specs)
                out.info["sums"], out.report = places.sums_of(verb.names), places.plan.report
            case msg.Apply():
                self.apply(verb.session, out)
            case msg.Commit():
                self.commit(verb, out)
            case msg.Abort():
                self.abort_verb(verb, out)
            case msg.EndTurn():
                self.turn.end(verb.session)
            case msg.MarkDirty():
                self.mark_dirty(verb.reason)
                self.resume_sticky |= verb.resume_after
            case msg.SetVersion():
                self._no_update("the version")
                self.last = None
                self.version = verb.version
            case Leave() | msg.Shutdown():
                self._no_update("the connection")
                self.link.leave("the trainer shut it down, or was refused")
                if isinstance(verb, msg.Shutdown):
                    self.known.forget()
            case msg.Export():
                self._awake()
                self._no_update("sharing the weights")
                out.info["exported"] = self.exports.export(verb)
            case msg.Detach():
                self.exports.detach(verb.attached)
            case msg.Touch():
                self.touch(verb, out)
            case _:  # what `Incoming` is for
                self.incoming.run(verb, self._mine(verb.session, out), out)

    def status(self, verb: msg.Status, out: Draft) -> None:
        out.info = {
            "registrations": self.known.registrations,
            "ended": list(self.ended),
            "attached": self.exports.attached(),
        }
        if verb.memory:
            out.info["memory"] = self.known.memory()
        o = self.open
        if o is not None and o.parts and verb.whole in ("", o.session):
            self.known.parts(o, mixed=bool(self.dirty))

    def abort_verb(self, verb: msg.Abort, out: Draft) -> None:
        if self.open is not None and verb.session in ("", self.open.session):
            self.turn.keep(self.open, out)
            self.abort(verb.reason)
        elif self.last is not None and verb.session == self.last.session:
            self._take_back()
        elif verb.early and verb.session and verb.session != self.ended[0]:
            self._called_off.append(verb.session)
        out.info |= {"undone": self.ended == (verb.session, "abort") and not self.dirty}

    # ---- transitions ------------------------------------------------------------------

    def begin(self, verb: msg.Begin) -> None:
        self._awake()
        if verb.session in self._called_off:
            self._called_off.remove(verb.session)
            raise NotBegun("the update was aborted before it began", next_step="push again")
        self._no_update("a second update")
        self.last = None
        self.open = Open(
            verb.session, verb.owner, verb.lease_s, time.monotonic() + verb.lease_s, time.time(),
            verb.resume_after or self.resume_sticky,
        )  # fmt: skip

    def init(self, info: dict[str, Any]) -> None:
        """A trainer says how it will send; one that broadcasts says where its group meets."""
        if "world_size" not in info:
            msg.convert(info, msg.IpcInit)
            return
        self._no_update("another group")
        self.link.join(msg.convert(info, NcclInit))

    def prepare(self, verb: msg.Prepare | msg.PreparePart, out: Draft) -> None:
        open_ = self._mine(verb.session, out)
        if isinstance(verb, msg.PreparePart):
            own = verb.own(self.rank, self.known.importer.gpu)
            verb = msg.Prepare(verb.session, verb.registration, own, False)
        held, new = self.known.registered(verb, out.timed)
        if new:
            out.report = held.plan.report
            if not verb.complete:
                open_.ephemeral.append(verb.registration)
        with out.timed("wait"):  # for the trainer's memory: while the engine still serves
            self.known.importer.check_alive(verb.registration)
            self.known.importer.wait(held.registration)
            check_part(open_, held.plan, held.tensors)
        open_.prepared = held

    def prepare_patches(self, verb: msg.PreparePatches, out: Draft) -> None:
        """While the engine serves; only what the old weights are is found when they are written."""
        open_ = self._mine(verb.session, out)
        open_.by("as patches")
        arrived, open_.arriving = open_.arriving, None
        update, out.report = open_patches(
            self.known, verb.push, self.version, self.dirty, out.timed,
            None if arrived is None else arrived.tensors,
        )  # fmt: skip
        with out.timed("check"):
            update.prepare()
        open_.patches.append(update)
        open_.resume_after |= verb.pauses

    def apply(self, session: str, out: Draft) -> None:
        open_ = self._mine(session, out)
        if open_.prepared is None and any(not p.wrote for p in open_.patches):
            with out.timed("copy"):
                open_.wrote = True
                for p in open_.patches:
                    if not p.wrote:
                        out.info["sums"] = p.apply()
                self._synchronize()
            return
        if open_.prepared is None:
            raise NoUpdate("nothing is prepared", next_step="send the update first")
        held, open_.prepared = open_.prepared, None
        open_.by("in parts" if held.replay is None else "at once")
        with out.timed("copy"):
            if held.replay is None:
                apply_part(self.known, open_, held.plan, held.tensors)
            else:
                open_.wrote = True
                open_.update = Update(self.known.host, held.plan)
                open_.update.receive_all(held.tensors, held.replay)
                open_.update.finish()
            self._synchronize()
        if held.replay is not None:
            self.known.keep_shadow(held.plan, held.tensors)

    def touch(self, verb: msg.Touch, out: Draft) -> None:
        """An attached trainer begins to write: from now the weights may be mixed."""
        open_ = self._mine(verb.session, out)
        attached = self.exports.find(verb.attached)
        open_.by("in place")
        self._synchronize()  # the last step before the pause may still be reading
        open_.attached, open_.wrote = attached, True

    def commit(self, verb: msg.Commit, out: Draft) -> None:
        open_ = self._mine(verb.session, out)
        with out.timed("commit"):
            if open_.parts:
                plan = self.known.parts(open_, mixed=bool(self.dirty))
                update = Update(self.known.host, plan)
                check_equal(plan, open_.held, open_.written)
                update.assume(open_.written)
                open_.wrote = True
                update.receive(open_.held, lasting=True)
                update.finish()
                self._synchronize()
            elif open_.attached is not None:
                self.exports.finish(open_.attached)
                self._synchronize()
            elif open_.packed is not None:
                open_.packed.finish()
                self._synchronize()
            elif open_.patches:
                if not all(p.wrote for p in open_.patches):
                    raise NoUpdate("the patches were not applied", next_step="apply them first")
                for p in open_.patches:
                    p.finish()
                self._synchronize()
            elif open_.update is None and (self.dirty or open_.wrote):
                raise NoUpdate(
                    "nothing complete was written", next_step="push every weight, then finish"
                )
            self._after_commit()
        self._close_ephemeral(open_)
        if open_.packed is not None or open_.attached is not None or open_.parts:
            self.known.shadow.clear()  # not of these weights
        if open_.patches and all(p.exact for p in open_.patches):
            self.last = Committed(open_.session, open_.patches, self.version)
        self.ended = open_.session, "commit"
        out.info |= {"resume": open_.resume_after, "moved": open_.moved()}
        self.turn.keep(open_, out)
        self.version = self.version if verb.version is None else verb.version
        self.open, self.dirty, self.resume_sticky = None, "", False

    def abort(self, reason: str, how: str = "abort") -> None:
        """End the open update, whatever its phase; to IDLE if nothing was written, else DIRTY."""
        open_, self.open = self.open, None
        if open_ is None:
            return
        self.ended = open_.session, how
        self.link.stop(reason)
        self._close_ephemeral(open_)
        if open_.wrote and open_.patches and all(p.exact for p in open_.patches):
            open_.wrote = not self._undone(open_.patches)
        if open_.wrote:
            self.mark_dirty(f"update of {open_.owner or 'an unnamed trainer'} failed: {reason}")
        if self.dirty:
            self.resume_sticky = open_.resume_after

    def _take_back(self) -> None:
        """Another rank failed after this one had committed the same patches, or all checksums
        together do not agree."""
        last, self.last = self.last, None
        if last is None:
            return
        self.version, self.ended = last.before, (last.session, "abort")
        if not self._undone(last.patches):
            self.mark_dirty("patches of a failed update could not be taken back")

    def _undone(self, patches: list[PatchUpdate]) -> bool:
        try:
            for p in reversed(patches):
                p.undo()
            self._synchronize()
        # Whatever undoing raises, the weights are mixed now, and must be called so.
        except Exception:
            self._log("weight sync: rank %d could not undo patches", self.rank, exc_info=True)
            return False
        return True

    def mark_dirty(self, reason: str) -> None:
        self.last = None
        if self.open is not None:
            self.resume_sticky = self.open.resume_after
            self._close_ephemeral(self.open)
            self.open = None
        self.dirty, self.dirty_since = reason, time.time()

    def expire(self) -> None:
        """End an update whose trainer has not called for longer than its lease."""
        if self.open is not None and time.monotonic() > self.open.deadline:
            self.abort(f"its lease of {self.open.lease_s:g} s expired", "lease")
        self.resume_sticky |= self.turn.expire()  # the next update resumes in its stead

    # ---- what they share --------------------------------------------------------------

    def state(self) -> msg.State:
        o = self.open
        asleep = tuple(sorted(self.asleep))
        if o is not None:
            return o.state(self.version, self.dirty, asleep)
        if self.dirty:
            return msg.State(
                "DIRTY", self.version, self.dirty, since=self.dirty_since,
                resume_after=self.resume_sticky, asleep=asleep,
            )  # fmt: skip
        return msg.State("IDLE", self.version, asleep=asleep)

    def _mine(self, session: str, out: Draft) -> Open:
        if self.open is None or session not in ("", self.open.session):
            raise NoUpdate(
                "no such update is open (it may have been aborted, or its lease expired)",
                next_step="start the update again",
            )
        out.mine = True
        self._awake()
        self.open.deadline = time.monotonic() + self.open.lease_s
        return self.open

    def _awake(self) -> None:
        if "weights" in self.asleep:
            raise EngineAsleep(
                "the weights are asleep", next_step='wake them up first: wake_up(["weights"])'
            )

    def _no_update(self, what: str) -> None:
        self.turn.check(what)
        if self.open is not None:
            raise UpdateInProgress(
                f"{what} is refused: {self.open}",
                next_step="finish it, POST /abort_weight_update, or wait for its lease to end",
            )

    def _close_ephemeral(self, open_: Open) -> None:
        for key in open_.ephemeral:
            self.known.release(key)
