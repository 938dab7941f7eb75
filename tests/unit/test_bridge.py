"""The trainer's end of the bridge without a server: models made of given memory, and helpers."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from tests.support import models
from vllm_wt_plugin import (
    PlanError,
    RequestError,
    ServerUnreachable,
    StateError,
)
from vllm_wt_plugin.bridge import (
    BridgeConfig,
    VLLMWeightBridge,
    create_bridge_from_training_config,
    get_inference_urls,
    get_local_hostname,
    get_name_conversions,
    permute_for_rotary,
    permute_for_rotary_1d,
)
from vllm_wt_plugin.bridge.master import Masters
from vllm_wt_plugin.bridge.model import Layout, skeleton
from vllm_wt_plugin.trainer.source import as_source

IDS = torch.tensor([[5, 6, 7, 8, 200, 3]])
KINDS = ["llama", "llama_bias", "qwen2", "qwen3", "qwen3_moe", "gemma3", "phi3", "gpt2", "mixtral",
         "deepseek_v3", "mamba2"]  # fmt: skip


def loaded(kind: str, folder: Path, *, tied: bool = False) -> Any:
    """As transformers loads it: bf16 weights, and buffers (`.to(bfloat16)` would round them)."""
    models.build(kind, 0, tied=tied).save_pretrained(folder)
    return tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def saved_config(model: Any, folder: Path) -> str:
    model.config.save_pretrained(folder)
    return str(folder)


def bridge_on(tensors: dict[str, torch.Tensor], name: str) -> VLLMWeightBridge:
    """In shared-memory mode: the tensors given are the memory."""
    config = BridgeConfig(model_name=name, device="cpu", use_cuda_ipc=False)
    bridge = VLLMWeightBridge(config)
    bridge.attach_to_vllm_weights(tensors)
    return bridge


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_views_computes_as_the_model_that_owns_them(
    kind: str, tied: bool, tmp_path: Path
) -> None:
    owner = loaded(kind, tmp_path, tied=tied)
    with bridge_on(dict(as_source(owner)), str(tmp_path)) as bridge:
        model = bridge.get_trainable_model()
        assert bridge.get_trainable_model() is model
        assert model.training
        own = {t.untyped_storage().data_ptr() for t in owner.state_dict().values()}
        assert {p.untyped_storage().data_ptr() for p in model.parameters()} <= own
        assert len(list(model.parameters())) == len(list(owner.parameters()))
        with torch.no_grad():
            assert torch.equal(model.eval()(IDS).logits, owner(IDS).logits)
        # A step through the model is a step of the memory.
        nn.functional.cross_entropy(model(IDS).logits[0].float(), IDS[0]).backward()  # type: ignore[no-untyped-call]
        torch.optim.SGD(bridge.parameters(), lr=0.5).step()
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, owner(IDS).logits)


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe", "gpt2"])
def test_a_skeleton_has_no_weights_and_all_tables(kind: str, tmp_path: Path) -> None:
    owner = loaded(kind, tmp_path)
    model = skeleton(str(tmp_path))
    assert all(p.is_meta for p in model.parameters())
    theirs = dict(owner.named_buffers())
    mine = dict(model.named_buffers())
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(b, theirs[n]) for n, b in mine.items())


def test_a_parameter_without_a_view_is_an_error_and_nothing_is_installed(tmp_path: Path) -> None:
    owner = models.build("qwen3", 0)
    name = saved_config(owner, tmp_path)
    memory = dict(as_source(owner))
    gone, short = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"
    memory.pop(gone)
    memory[short] = memory[short][:-1]
    layout = Layout(skeleton(name))
    with pytest.raises(PlanError, match=f"2 parameters have no view.*{gone}: {gone} is not there"):
        layout.install(memory, torch.device("cpu"))
    assert all(p.is_meta for p in layout.model.parameters())


def test_experts_in_the_wrong_order_have_no_view(tmp_path: Path) -> None:
    owner = models.build("qwen3_moe", 0)
    memory = dict(as_source(owner))
    a, b = (f"model.layers.0.mlp.experts.{i}.up_proj.weight" for i in (0, 1))
    memory[a], memory[b] = memory[b], memory[a]
    with bridge_on(memory, saved_config(owner, tmp_path)) as bridge:
        with pytest.raises(PlanError, match="equal distances") as caught:
            bridge.get_trainable_model()
        assert caught.value.where == "model.layers.0.mlp.experts.gate_up_proj"


def test_a_model_name_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="reads no config") as caught:
        skeleton(str(tmp_path))
    assert str(tmp_path) in caught.value.where


def test_nothing_attached(tmp_path: Path) -> None:
    name = saved_config(models.build("qwen3", 0), tmp_path)
    config = BridgeConfig(model_name=name, device="cpu", use_cuda_ipc=False)
    with VLLMWeightBridge(config) as bridge, pytest.raises(StateError, match="no memory"):
        bridge.get_trainable_model()


# ---- masters ------------------------------------------------------------------------------


def test_masters_add_up_what_bf16_would_round() -> None:
    served = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    masters = Masters([served, frozen])
    optimizer = torch.optim.SGD(masters.parameters, lr=1e-3)
    for _ in range(8):
        served.grad = torch.ones_like(served)
        masters.take_gradients()
        assert served.grad is None
        optimizer.step()
        masters.write_back()
    assert len(masters.parameters) == 1
    assert torch.allclose(masters.parameters[0], torch.full((4,), 0.992))
    assert torch.equal(served, torch.full((4,), 0.992).bfloat16())


def test_update_feeds_the_masters(tmp_path: Path) -> None:
    owner = models.build("llama", 0)
    with bridge_on(dict(as_source(owner)), saved_config(owner, tmp_path)) as bridge:
        model = bridge.get_trainable_model(master="fp32")
        assert {p.dtype for p in bridge.parameters()} == {torch.float32}
        optimizer = torch.optim.SGD(bridge.parameters(), lr=0.1)
        before = [p.detach().clone() for p in model.parameters()]
        model(IDS).logits.float().square().mean().backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        with bridge.update():
            optimizer.step()
        for p, was, grad in zip(model.parameters(), before, grads, strict=True):
            stepped = was.float().add(grad.float(), alpha=-0.1)
            assert torch.equal(p, stepped.bfloat16())


# ---- settings and helpers -----------------------------------------------------------------


def test_defaults() -> None:
    config = BridgeConfig()
    assert (config.trainer_rank, config.world_size, config.init_method) == (0, 1, "env://")
    assert (config.device, config.timeout_seconds) == ("cuda", 300.0)
    assert config.vllm_api_url == "http://localhost:9001"
    assert config.num_gpus_per_node == torch.cuda.device_count()
    assert config.is_local_mode
    assert not BridgeConfig(num_inference_nodes=1).is_local_mode


def test_from_a_training_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGDIR", "/logs")
    given = SimpleNamespace(
        trainer_rank=1, world_size=2, init_method="tcp://h:1", num_inference_nodes=0,
        model_name="m", device="cpu", vllm_port=9100, learning_rate=1.0,
    )  # fmt: skip
    config = BridgeConfig.from_training_config(given)
    assert config == BridgeConfig(
        trainer_rank=1, world_size=2, init_method="tcp://h:1", model_name="m", device="cpu",
        vllm_api_url="http://localhost:9100", log_dir="/logs",
    )  # fmt: skip
    del given.vllm_port
    assert BridgeConfig.from_training_config(given).vllm_api_url == "http://localhost:9001"


@pytest.mark.parametrize(
    "wrong", [{"trainer_rank": 1}, {"num_inference_nodes": -1}, {"timeout_seconds": 0.0}]
)
def test_settings_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        BridgeConfig(**wrong)


def test_no_server_is_an_error() -> None:
    given = SimpleNamespace(model_name="m", device="cpu", vllm_port=1)
    with pytest.raises(ServerUnreachable):
        create_bridge_from_training_config(given)


def test_a_closed_bridge_is_closed() -> None:
    bridge = VLLMWeightBridge(BridgeConfig(device="cpu", use_cuda_ipc=False))
    bridge.barrier()
    bridge.cleanup()
    bridge.cleanup()
    with pytest.raises(StateError, match="closed"):
        bridge.initialize()


def test_inference_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = ("localhost:26756", "localhost:26757", "localhost:26758", ["localhost"])
    assert get_inference_urls(0) == local
    nodes = ["a", "b", "c"]
    assert get_inference_urls(2, nodes) == ("a:26756", "a:26757", "b:26758", ["b", "c"])
    assert get_inference_urls(1, nodes, inference_port=5)[2] == "c:5"
    with pytest.raises(RequestError, match="4 inference nodes of 3"):
        get_inference_urls(4, nodes)
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    with pytest.raises(RequestError, match="no node list"):
        get_inference_urls(1)
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        '#!/bin/sh\n[ "$1 $2 $3" = "show hostnames n[1-3]" ] && echo "n1\nn2\nn3"\n'
    )
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-3]")
    assert get_inference_urls(1) == ("n1:26756", "n1:26757", "n3:26758", ["n3"])


def test_local_hostname() -> None:
    names = get_local_hostname()
    assert len(names) >= 2
    assert all(names)


def test_name_conversions() -> None:
    mappings = {"q": {"vllm_name": "qkv"}, "k": {"vllm_name": "qkv"}, "norm": {}}
    assert get_name_conversions(mappings) == {"qkv": ["q", "k"], "norm": ["norm"]}


def test_rotary_rows() -> None:
    w = torch.arange(16.0).view(8, 2)  # two heads of two pairs
    rows = [0, 2, 1, 3, 4, 6, 5, 7]
    assert torch.equal(permute_for_rotary(w, 2), w[rows])
    assert permute_for_rotary_1d(torch.arange(8.0), 2).tolist() == rows
    with pytest.raises(RequestError, match="no 3 heads"):
        permute_for_rotary(w, 3)
    with pytest.raises(RequestError, match="one dimension"):
        permute_for_rotary_1d(w, 2)
