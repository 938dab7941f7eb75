"""What may come in from outside: every struct is strict, bounded, and says where it is wrong."""

from __future__ import annotations

import inspect
import json
import types
import typing
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_wt_plugin import errors
from vllm_wt_plugin.errors import HandleError, RequestError, WeightSyncError
from vllm_wt_plugin.wire import buckets, exchange, handles, messages, params
from vllm_wt_plugin.wire import messages as msg
from vllm_wt_plugin.wire.buckets import cut, row_bytes
from vllm_wt_plugin.wire.handles import (
    CudaStorage,
    LocalStorage,
    Registration,
    ShmStorage,
    Storage,
    TensorRef,
    contiguous_stride,
)
from vllm_wt_plugin.wire.nccl import (
    Joined,
    Leave,
    Progress,
    Receive,
    ReceiveNamed,
    ReceivePatches,
    Written,
)
from vllm_wt_plugin.wire.params import ITEMSIZE, LINE, MAX_ELEMENTS, ParamSpec, check_specs
from vllm_wt_plugin.wire.patches import Part, PatchPush, wrong_sums
from vllm_wt_plugin.wire.sparse import patches
from vllm_wt_plugin.wire.update import UpdateInfo

KEY = "0123456789abcdef" * 2
SHM = {"kind": "shm", "name": f"/wt_{KEY}", "nbytes": 64}
REF = ["w", "float32", [4, 4], 0, 0]
REGISTRATION: dict[str, Any] = {"id": KEY, "storages": [SHM], "tensors": [REF]}
PUSH = {"registration": KEY, "register": REGISTRATION, "version": "7", "owner": "me"}
STRUCTS = [
    s
    for module in (params, handles, messages)
    for _, s in inspect.getmembers(module, inspect.isclass)
    if issubclass(s, msgspec.Struct)
    and s.__module__ == module.__name__
    and not s.__name__.startswith("_")
]


def decode(kind: Any, data: Any) -> Any:
    return msg.decode(msgspec.json.Decoder(kind), json.dumps(data).encode())


def refused(kind: Any, data: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        decode(kind, data)
    assert type(caught.value) is RequestError
    return caught.value


def put(data: Any, path: str, value: Any) -> Any:
    """A deep copy of `data` with the element at `a.0.b` replaced or added."""
    data = json.loads(json.dumps(data))
    at = data
    *way, last = path.split(".")
    for step in way:
        at = at[int(step)] if isinstance(at, list) else at[step]
    if isinstance(at, list):
        at[int(last)] = value
    else:
        at[last] = value
    return data


# ---- every struct -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", STRUCTS, ids=lambda s: s.__name__)
def test_frozen_and_closed(kind: type[msgspec.Struct]) -> None:
    config = kind.__struct_config__
    assert config.frozen
    assert config.forbid_unknown_fields


@pytest.mark.parametrize("kind", STRUCTS, ids=lambda s: s.__name__)
def test_documented_defaults_are_not_shared(kind: type[msgspec.Struct]) -> None:
    for field in msgspec.structs.fields(kind):
        assert not isinstance(field.default, (dict, list, set))


def example(kind: Any) -> st.SearchStrategy[Any]:
    """Values of an annotated type, within its own constraints; msgspec must take them all."""
    origin = typing.get_origin(kind)
    args = typing.get_args(kind)
    if kind is Any:
        return st.one_of(st.none(), st.integers(-5, 5), st.text(max_size=3))
    if origin is typing.Annotated:
        meta = args[1]
        if meta.pattern == LINE:  # from_regex takes minutes for nearly all of Unicode
            line = st.text(st.characters(exclude_categories=["C"]), max_size=8)
            return line.filter(lambda s: len(s) >= (meta.min_length or 0))
        if meta.pattern is not None:
            return st.from_regex(meta.pattern.replace(r"\Z", "$"), fullmatch=True).filter(
                lambda s: "\n" not in s
            )
        if args[0] is int:
            high = meta.le if meta.le is not None else 2**63 - 1
            return st.integers(meta.ge if meta.ge is not None else 0, high)
        if args[0] is float:
            return st.floats(meta.gt, meta.le, exclude_min=True)
        if args[0] is str:
            return st.text(max_size=8).filter(lambda s: len(s) >= (meta.min_length or 0))
        if args[0] is bytes:
            return st.binary(max_size=8)
        return example(args[0]).filter(lambda v: len(v) >= (meta.min_length or 0))
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*(example(a) for a in args))
    if origin is typing.Literal:
        return st.sampled_from(args)
    if origin is tuple and args[-1] is Ellipsis:
        return st.lists(example(args[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*(example(a) for a in args))
    if origin is list:
        return st.lists(example(args[0]), max_size=3)
    if origin is dict:
        return st.dictionaries(example(args[0]), example(args[1]), max_size=3)
    if inspect.isclass(kind) and issubclass(kind, msgspec.Struct):
        hints = typing.get_type_hints(kind, include_extras=True)
        made = {f.name: example(hints[f.name]) for f in msgspec.structs.fields(kind)}
        if kind is msg.StartBody:
            made["is_checkpoint_format"] = st.just(True)  # there is no Literal[True] in msgspec
        return st.builds(kind, **made)
    simple: dict[Any, st.SearchStrategy[Any]] = {
        int: st.integers(-(2**31), 2**31),
        str: st.text(max_size=5),
        float: st.floats(allow_nan=False, allow_infinity=False),
        bool: st.booleans(),
        bytes: st.binary(max_size=5),
        type(None): st.none(),
    }
    return simple[kind]


@pytest.mark.parametrize("kind", STRUCTS, ids=lambda s: s.__name__)
@settings(max_examples=15, deadline=None)
@given(st.data())
def test_round_trips(kind: type[msgspec.Struct], data: st.DataObject) -> None:
    value = data.draw(example(kind))
    text, packed = msgspec.json.encode(value), msgspec.msgpack.encode(value)
    assert msg.decode(msgspec.json.Decoder(kind), text) == value
    assert msg.decode(msgspec.msgpack.Decoder(kind), packed) == value
    assert msg.convert(msgspec.to_builtins(value), kind) == value


# ---- bodies: the message says where -------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "data", "path", "value", "where"),
    [
        (msg.PushRequest, PUSH, "extra", 1, ""),
        (msg.PushRequest, PUSH, "registration", KEY + "\n", "$.registration"),
        (msg.PushRequest, PUSH, "registration", KEY[:-1], "$.registration"),
        (msg.PushRequest, PUSH, "registration", KEY.upper(), "$.registration"),
        (msg.PushRequest, PUSH, "registration", "x" + KEY, "$.registration"),
        (msg.PushRequest, PUSH, "version", "", "$.version"),
        (msg.PushRequest, PUSH, "version", "v" * 257, "$.version"),
        (msg.PushRequest, PUSH, "version", 7, "$.version"),
        (msg.PushRequest, PUSH, "version", "7\nINFO another line", "$.version"),
        (msg.PushRequest, PUSH, "owner", "o" * 257, "$.owner"),
        (msg.PushRequest, PUSH, "owner", "me\x1b[2J", "$.owner"),
        (msg.PushRequest, PUSH, "register.extra", 1, "$.register"),
        (msg.PushRequest, PUSH, "register.tensors", [], "$.register.tensors"),
        (msg.PushRequest, PUSH, "register.tensors.0.0", "", "$.register.tensors[0][0]"),
        (msg.PushRequest, PUSH, "register.tensors.0.0", "n" * 1025, "$.register.tensors[0][0]"),
        (msg.PushRequest, PUSH, "register.tensors.0.2.1", -1, "$.register.tensors[0][2][1]"),
        (msg.PushRequest, PUSH, "register.tensors.0.2.1", 2**40 + 1, "$.register.tensors[0][2][1]"),
        (msg.PushRequest, PUSH, "register.tensors.0.2.1", 2**70, "$.register.tensors[0][2][1]"),
        (msg.PushRequest, PUSH, "register.tensors.0.2.1", 1.5, "$.register.tensors[0][2][1]"),
        (msg.PushRequest, PUSH, "register.tensors.0.2.1", "4", "$.register.tensors[0][2][1]"),
        (msg.PushRequest, PUSH, "register.tensors.0.2.1", True, "$.register.tensors[0][2][1]"),
        (msg.PushRequest, PUSH, "register.tensors.0.2", [1] * 17, "$.register.tensors[0][2]"),
        (msg.PushRequest, PUSH, "register.tensors.0.3", -1, "$.register.tensors[0][3]"),
        (msg.PushRequest, PUSH, "register.tensors.0.4", -1, "$.register.tensors[0][4]"),
        (msg.PushRequest, PUSH, "register.tensors.0.4", 2**40 + 1, "$.register.tensors[0][4]"),
        (
            msg.PushRequest, PUSH, "register.tensors.0", [*REF, [4, -1]],
            "$.register.tensors[0][5][1]",
        ),
        (msg.PushRequest, PUSH, "register.tensors.0", [*REF, None, 0], ""),
        (msg.PushRequest, PUSH, "register.tensors.0", REF[:4], "$.register.tensors[0]"),
        (msg.PushRequest, PUSH, "register.storages.0.name", "/etc", "$.register.storages[0].name"),
        (
            msg.PushRequest, PUSH, "register.storages.0.name", f"/wt_{KEY}\n",
            "$.register.storages[0].name",
        ),
        (
            msg.PushRequest, PUSH, "register.storages.0.name", f"/wt_{KEY[:-2]}/.",
            "$.register.storages[0].name",
        ),
        (msg.PushRequest, PUSH, "register.storages.0.nbytes", -1, "$.register.storages[0].nbytes"),
        (
            msg.PushRequest, PUSH, "register.storages.0.nbytes", 2**48 + 1,
            "$.register.storages[0].nbytes",
        ),
        (msg.PushRequest, PUSH, "register.storages.0.kind", "file", "$.register.storages[0].kind"),
        (msg.PushRequest, PUSH, "register.storages.0.extra", 1, "$.register.storages[0]"),
        (msg.StartBody, {}, "lease_s", 0, "$.lease_s"),
        (msg.StartBody, {}, "lease_s", -1, "$.lease_s"),
        (msg.StartBody, {}, "lease_s", 3601, "$.lease_s"),
        (msg.StartBody, {}, "announced", KEY + "\n", "$.announced"),
        (msg.FinishBody, {}, "weight_version", "", "$.weight_version"),
        (msg.FinishBody, {}, "version", "1", ""),
        (msg.VersionBody, {}, "new_version", "", "$.new_version"),
        (msg.AbortBody, {}, "reason", 5, "$.reason"),
        (msg.UpdateBody, {"update_info": {}}, "update_info.extra", 1, "$.update_info"),
        (
            msg.UpdateBody, {"update_info": {}}, "update_info.update_kind", "sparse",
            "$.update_info.update_kind",
        ),
        (
            msg.UpdateBody, {"update_info": {}}, "update_info.handles", [[0, -1, None]],
            "$.update_info.handles[0][1]",
        ),
        (msg.UpdateBody, {"update_info": {}}, "update_info.bucket", -1, "$.update_info.bucket"),
        (msg.IpcInit, {}, "protocol", 2, "$.protocol"),
        (msg.IpcInit, {}, "packed", "yes", "$.packed"),
    ],
)  # fmt: skip
def test_refused_with_the_path(kind: Any, data: Any, path: str, value: Any, where: str) -> None:
    if data is PUSH:
        decode(kind, data)  # what is wrong is what was put there
    assert refused(kind, put(data, path, value)).where == where


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"\xff", b'"\xff"', b"{" * 100_000, b"[" * 100_000, b"NaN"],
    ids=repr,
)
def test_what_is_not_even_json(body: bytes) -> None:
    with pytest.raises(RequestError):
        msg.decode(msgspec.json.Decoder(msg.PushRequest), body)


def test_depth_is_an_error_and_not_a_crash() -> None:
    body = b'{"init_info": {"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}}"
    with pytest.raises(RequestError):
        msg.decode(msgspec.json.Decoder(msg.InitBody), body)


def test_converted_data_is_refused_alike() -> None:
    with pytest.raises(RequestError) as caught:
        msg.convert({"protocol": 9}, msg.IpcInit)
    assert caught.value.where == "$.protocol"


# ---- what types cannot say ----------------------------------------------------------------


def registration(
    *refs: TensorRef, storages: tuple[Storage, ...] = (ShmStorage(f"/wt_{KEY}", 64),)
) -> Registration:
    return Registration(KEY, storages, refs)


def ref(shape: tuple[int, ...], stride: tuple[int, ...] | None = None, **kw: Any) -> TensorRef:
    kw = {"name": "w", "dtype": "float32", "storage": 0, "offset": 0} | kw
    return TensorRef(shape=shape, stride=stride, **kw)


@pytest.mark.parametrize(
    "good",
    [
        ref((4, 4)),
        ref((4, 4), (1, 4)),
        ref((15,), offset=1),
        ref((), offset=15),
        ref((2**20, 4), (0, 1)),  # broadcast: every element is inside
        ref((0, 2**40)),
        ref((0,), offset=2**40),  # no element, so none outside
        ref((1, 4), (2**40, 1)),  # the stride of a dimension of one is never taken
        ref((8,), dtype="float64"),
        ref((64,), dtype="float8_e4m3fn"),
    ],
    ids=repr,
)
def test_views_inside_their_storage(good: TensorRef) -> None:
    registration(good).check()


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (ref((17,)), "needs 68 bytes, its storage has 64"),
        (ref((4, 4), offset=1), "needs 68 bytes"),
        (ref((4, 4), (5, 1)), "needs 76 bytes"),
        (ref((9,), dtype="float64"), "needs 72 bytes"),
        (ref((), offset=16), "needs 68 bytes"),
        (ref((2, 2), (2**40, 1)), "its storage has 64"),
        (ref((2,) * 16, (2**40,) * 16), "its storage has 64"),  # past any machine's integers
        (ref((2**40,), (0,), offset=16), "its storage has 64"),
        (ref((4, 4), storage=1), "storage 1 of 1 does not exist"),
        (ref((0,), storage=1), "storage 1 of 1 does not exist"),
        (ref((4, 4), (4,)), "does not fit"),
        (ref((4, 4), (4, 1, 1)), "does not fit"),
        (ref((), (1,)), "does not fit"),
    ],
    ids=repr,
)
def test_views_that_leave_their_storage(bad: TensorRef, says: str) -> None:
    with pytest.raises(HandleError, match=says) as caught:
        registration(bad).check()
    assert caught.value.where == "w"


@pytest.mark.parametrize(
    ("refs", "says"),
    [
        ([ref((4,)), ref((4,))], "given twice"),
        ([ref((4,), dtype="float31")], "dtype 'float31' cannot be transferred"),
        ([ref((4,), dtype="torch.float32")], "cannot be transferred"),
        ([ref((4,), dtype="complex64")], "cannot be transferred"),
        ([ref((2**21, 2**20), (0, 0))], r"more than 2\^40 elements"),
    ],
)
def test_tables_that_make_no_sense(refs: list[TensorRef], says: str) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        registration(*refs).check()
    assert caught.value.where == "w"


def test_strides_are_of_elements() -> None:
    assert contiguous_stride((2, 3, 4)) == (12, 4, 1)
    assert contiguous_stride((2, 0, 4)) == (4, 4, 1)
    assert contiguous_stride(()) == ()
    assert ref((2, 3)).strides == (3, 1)
    assert ref((2, 3), (1, 2)).strides == (1, 2)


def test_every_dtype_is_torchs() -> None:
    import torch

    for name, size in ITEMSIZE.items():
        assert getattr(torch, name).itemsize == size


def test_specs() -> None:
    spec = ParamSpec("w", "bfloat16", (3, 5))
    assert (spec.numel, spec.nbytes) == (15, 30)
    assert ParamSpec("s", "float32", ()).numel == 1
    check_specs((spec, ParamSpec("big", "uint8", (MAX_ELEMENTS,))))


def test_storages_are_told_apart_by_kind() -> None:
    decoder = msgspec.json.Decoder(Storage)
    for storage in (
        ShmStorage(f"/wt_{KEY}", 1),
        LocalStorage(1, KEY, 1),
        CudaStorage("GPU-0", b"\x00\xff", 1, 0),
    ):
        assert decoder.decode(msgspec.json.encode(storage)) == storage


# ---- update bodies ------------------------------------------------------------------------


def info(**change: Any) -> UpdateInfo:
    good: dict[str, Any] = {
        "names": ["w"], "dtype_names": ["float32"], "shapes": [[4, 4]],
        "storages": [SHM], "handles": [[0, 0, None]],
    }  # fmt: skip
    return decode(UpdateInfo, good | change)


def test_an_update_is_a_registration() -> None:
    assert info().registrations(KEY) == {"": registration(ref((4, 4)))}


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"dtype_names": []}, "$.update_info.dtype_names"),
        ({"shapes": [[4], [4]]}, "$.update_info.shapes"),
        ({"handles": []}, "$.update_info.handles"),
        ({"names": [], "dtype_names": [], "shapes": [], "handles": []}, "$.update_info.names"),
        ({"update_kind": "sparse_flat"}, ""),
        ({"num_updates_list": [1]}, "$.update_info.num_updates_list"),
        ({"packed": True}, "$.update_info.tensor_sizes"),
        ({"ipc_handles_pickled": "gASV"}, "$.update_info.ipc_handles_pickled"),
        ({"ipc_handles": []}, "$.update_info.ipc_handles"),
        ({"handles": [[1, 0, None]]}, "w"),
        ({"handles": [[0, 1, None]]}, "w"),
        ({"dtype_names": ["object"]}, "w"),
    ],
)
def test_updates_that_do_not_fit(change: dict[str, Any], where: str) -> None:
    with pytest.raises(RequestError) as caught:
        info(**change).registrations(KEY)
    assert caught.value.where == where


# ---- verbs --------------------------------------------------------------------------------


def patch_push(**change: Any) -> PatchPush:
    given = dict(
        names=["w"], dtype_names=["bfloat16"], shapes=[(4, 4)], num_updates_list=[3],
        registration=KEY, base_version="1", sums=[-5],
    )  # fmt: skip
    return PatchPush(**(given | change))


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"dtype_names": []}, "$.dtype_names"),
        ({"num_updates_list": []}, "$.num_updates_list"),
        ({"sums": [1, 2]}, "$.sums"),
        ({"names": [], "dtype_names": [], "shapes": [], "num_updates_list": [], "sums": []},
         "$.names"),
        ({"num_updates_list": [17]}, "w"),
        ({"dtype_names": ["object"]}, "w"),
        ({"whole": [ParamSpec("w", "bfloat16", (4, 4))]}, "w"),
    ],
)  # fmt: skip
def test_patches_that_do_not_fit(change: dict[str, Any], where: str) -> None:
    with pytest.raises(RequestError) as caught:
        patch_push(**change).check()
    assert caught.value.where == where


def sparse_info(**change: Any) -> UpdateInfo:
    given = dict(
        names=["w"], dtype_names=["bfloat16"], shapes=[(4, 4)], update_kind="sparse_flat",
        num_updates_list=[3], storages=[LocalStorage(1, KEY, 18)],
        handles=[(0, 0, None), (0, 6, None)],
    )  # fmt: skip
    return msg.convert(msgspec.to_builtins(given | change), UpdateInfo)


def test_a_sparse_update_is_a_push_of_patches() -> None:
    push = patches(sparse_info(base_version="7", sums=[5]), KEY)
    assert (push.num_updates_list, push.base_version, push.sums) == ([3], "7", [5])
    assert push.register is not None
    assert [(t.name, t.dtype, t.shape, t.offset) for t in push.register.tensors] == [
        ("indices/w", "int32", (3,), 0), ("values/w", "bfloat16", (3,), 6),
    ]  # fmt: skip
    wide = sparse_info(shapes=[(2**31, 1)], storages=[LocalStorage(1, KEY, 99)])
    wide_push = patches(wide, KEY)
    assert wide_push.register is not None
    assert wide_push.register.tensors[0].dtype == "int64"


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"update_kind": "sparse"}, "$.update_kind"),
        ({"num_updates_list": None}, "$.update_info.num_updates_list"),
        ({"num_updates_list": []}, "$.update_info.num_updates_list"),
        ({"num_updates_list": [3, 3]}, "$.update_info.num_updates_list"),
        ({"num_updates_list": [-1]}, "$.num_updates_list[0]"),
        ({"num_updates_list": [17]}, "w"),
        ({"num_updates_list": [4]}, "values/w"),
        ({"handles": [(0, 0, None)]}, "$.update_info.handles"),
        ({"shapes": []}, "$.update_info.shapes"),
        ({"dtype_names": ["object"]}, "w"),
        ({"names": [], "dtype_names": [], "shapes": []}, "$.update_info.num_updates_list"),
        ({"sums": [1, 2]}, "$.sums"),
        ({"packed": True}, "$.update_info.packed"),
    ],
)  # fmt: skip
def test_sparse_updates_that_do_not_fit(change: dict[str, Any], where: str) -> None:
    with pytest.raises(RequestError) as caught:
        patches(sparse_info(**change), KEY)
    assert caught.value.where == where


def test_parts_of_all_ranks_add_up() -> None:
    push = patch_push(names=["a", "b", "c"], sums=[-(2**63) + 5, 7, 1])
    ranks: list[dict[str, list[Part]]] = [
        {"a": [("rows 0", 2**63 - 1)], "b": [("all", 7)]},
        {"a": [("rows 1", 6)], "b": [("all", 7)]},
    ]
    assert list(wrong_sums(push, ranks)) == []
    ranks[1]["b"] = [("all", 8)]  # the same elements, and two ranks disagree
    ranks[0]["a"] = [("rows 0", 4)]
    assert list(wrong_sums(push, ranks)) == ["a", "b"]


VERBS: list[Any] = [
    msg.Status(),
    msg.Init({"packed": False}),
    msg.Begin(KEY, "me", 60.0, True),
    msg.Prepare(KEY, KEY, registration(ref((4, 4))), True),
    msg.PreparePart(KEY, KEY, ({"": registration(ref((4, 4)))},)),
    msg.PreparePatches(KEY, patch_push()),
    msg.Sums(["a.weight"]),
    msg.Announce(KEY, KEY, None, KEY, "sample", 7),
    msg.Bucket("", 3),
    Joined(),
    Leave(),
    Receive(KEY),
    ReceiveNamed(KEY, (ParamSpec("w", "bfloat16", (4, 4)),)),
    ReceivePatches(KEY, patch_push()),
    Progress(KEY),
    Written(KEY, ["w"]),
    msg.Apply(KEY),
    msg.Commit(KEY, None),
    msg.Abort("", "why"),
    msg.EndTurn(KEY),
    msg.MarkDirty("why", True),
    msg.SetVersion("7"),
    msg.Shutdown(),
    msg.Export(KEY, (ParamSpec("w", "bfloat16", (4, 4)),), "me", ShmStorage(f"/wt_{KEY}", 1)),
    msg.Detach(""),
    msg.Touch(KEY, ""),
]


def test_verbs_travel_together_and_all_are_known() -> None:
    assert msg.decode_verbs(msg.encode_verbs(*VERBS)) == VERBS
    assert {type(v) for v in VERBS} == set(typing.get_args(msg.Verb))


@pytest.mark.parametrize(
    "payload", ["[]", [], None, 5, {"verb": "status"}, bytearray(b"\x90"), memoryview(b"\x90")]
)
def test_verbs_are_bytes_or_nothing(payload: object) -> None:
    with pytest.raises(RequestError, match="internal"):
        msg.decode_verbs(payload)


@pytest.mark.parametrize(
    "verb",
    [
        {"verb": "explode"},
        {"verb": "apply", "session": KEY, "extra": 1},
        {"verb": "apply", "session": "x"},
        {"verb": "apply", "session": KEY + "\n"},
        {"verb": "apply"},
        {},
    ],
)
def test_verbs_are_as_strict_as_bodies(verb: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        msg.decode_verbs(msgspec.msgpack.encode([verb]))


def test_replies() -> None:
    reply = msg.Reply(1, msg.State("IDLE", "7"), report=msg.PlanReport(tensors=3))
    assert msgspec.convert(msgspec.to_builtins(reply), msg.Reply) == reply


@pytest.mark.parametrize(
    ("state", "error"),
    [
        (msg.State("DIRTY", "1", "half"), errors.EngineDirty),
        (msg.State("UPDATING", "1", wrote=True), errors.EngineDirty),
        (msg.State("UPDATING", "1", owner="you"), errors.UpdateInProgress),
    ],
)
def test_what_must_not_be_resumed(state: msg.State, error: type[WeightSyncError]) -> None:
    with pytest.raises(error):
        state.check_resumable()
    msg.State("IDLE", "1").check_resumable()


# ---- buckets ------------------------------------------------------------------------------

SPECS = st.lists(
    st.builds(
        ParamSpec,
        st.just("w"),
        st.sampled_from(["uint8", "bfloat16", "float64"]),
        st.lists(st.integers(0, 6), max_size=3).map(tuple),
    ),
    max_size=6,
)


@settings(max_examples=200, deadline=None)
@given(SPECS, st.integers(256, 2000))
def test_a_cut_brings_every_row_once_in_order(specs: list[ParamSpec], size: int) -> None:
    specs = [msgspec.structs.replace(s, name=str(i)) for i, s in enumerate(specs)]
    if any(row_bytes(s) > size for s in specs if s.numel):
        with pytest.raises(RequestError, match=r"one row of this tensor"):
            cut(specs, size)
        return
    rows = []
    for bucket in cut(specs, size):
        assert bucket
        end = 0
        for p in bucket:
            assert p.offset >= end
            assert p.offset % buckets.ALIGN == 0
            assert p.rows > 0
            end = p.offset + p.nbytes
            rows += [(p.spec.name, r) for r in range(p.row, p.row + p.rows)]
        assert end <= size
    want = [(s.name, r) for s in specs if s.numel for r in range(s.shape[0] if s.shape else 1)]
    assert rows == want


def test_a_row_larger_than_a_buffer_is_named() -> None:
    with pytest.raises(RequestError) as caught:
        cut([ParamSpec("w", "float32", (2, 100))], 399)
    assert caught.value.where == "w"


# ---- errors as data -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", errors.BY_CODE.values(), ids=lambda k: k.__name__)
def test_errors_cross_as_data(kind: type[WeightSyncError]) -> None:
    error = kind("what", where="w", next_step="do")
    back = errors.from_dict(json.loads(json.dumps(error.to_dict())))
    assert type(back) is kind
    assert str(back) == str(error) == "what [w] Next: do"


@pytest.mark.parametrize("data", [{}, {"code": "os.system"}, {"code": None, "error": 5}])
def test_unknown_errors_become_plain_ones(data: dict[str, Any]) -> None:
    assert type(errors.from_dict(data)) is WeightSyncError


def test_other_exceptions_keep_their_words() -> None:
    assert exchange.unexpected(KeyError("x")).what == "KeyError: 'x'"
    known = HandleError("gone")
    assert exchange.unexpected(known) is known
