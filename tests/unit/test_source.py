"""Sources: what is pushed must be what `save_pretrained` writes, without copies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

os.environ["HF_HUB_OFFLINE"] = "1"

import transformers as hf
from safetensors.torch import save_file
from transformers.core_model_loading import revert_weight_conversion

from vllm_wt_plugin.errors import RequestError
from vllm_wt_plugin.trainer import fused, source
from vllm_wt_plugin.trainer.source import INDEX, FolderSource, Source, as_source
from vllm_wt_plugin.wire.params import ParamSpec

hf.logging.set_verbosity_error()

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
# Every size differs, so that a wrong split or transposition cannot keep its shape.
MOE: dict[str, Any] = {"moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2}
MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
QWEN_VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 8,
    "out_hidden_size": 32,
}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}


def _llava() -> Any:
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION),
        text_config=hf.LlamaConfig(**TINY),
        image_token_id=3,
    )
    return hf.LlavaForConditionalGeneration(config)


def _gemma3_vision() -> Any:
    config = hf.Gemma3Config(
        vision_config=hf.SiglipVisionConfig(**VISION).to_dict(),
        text_config=hf.Gemma3TextConfig(**TINY, head_dim=8).to_dict(),
        mm_tokens_per_image=4,
    )
    return hf.Gemma3ForConditionalGeneration(config)


def _qwen2_5_vl() -> Any:
    text = {**TINY, "rope_parameters": ROPE}
    return hf.Qwen2_5_VLForConditionalGeneration(
        hf.Qwen2_5_VLConfig(vision_config=QWEN_VISION, text_config=text)
    )


def _qwen3_vl_moe() -> Any:
    text = {**TINY, **MOE, "head_dim": 8, "rope_parameters": ROPE}
    vision = {**QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return hf.Qwen3VLMoeForConditionalGeneration(
        hf.Qwen3VLMoeConfig(vision_config=vision, text_config=text)
    )


def _ernie4_5_vl_moe() -> Any:
    text = {
        **TINY,
        "moe_intermediate_size": [24, 20],
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "rope_parameters": ROPE,
    }
    return hf.Ernie4_5_VLMoeForConditionalGeneration(
        hf.Ernie4_5_VLMoeConfig(text_config=text, vision_config=QWEN_VISION)
    )


def _hrm_text() -> Any:
    sizes = {key: value for key, value in TINY.items() if key != "num_key_value_heads"}
    return hf.HrmTextForCausalLM(hf.HrmTextConfig(**sizes, head_dim=8, num_layers_per_stack=1))


def _nemotron_h() -> Any:
    sizes = {key: value for key, value in TINY.items() if key != "num_hidden_layers"}
    config = hf.NemotronHConfig(
        **sizes,
        head_dim=8,
        layers_block_type=["mamba", "moe", "attention"],
        mamba_num_heads=4,
        mamba_head_dim=8,
        ssm_state_size=8,
        n_groups=1,
        n_routed_experts=4,
        moe_intermediate_size=24,
        num_experts_per_tok=2,
        moe_shared_expert_intermediate_size=24,
    )
    return hf.NemotronHForCausalLM(config)


def _olmo_hybrid() -> Any:
    config = hf.OlmoHybridConfig(
        **TINY,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=12,
    )
    return hf.OlmoHybridForCausalLM(config)


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**TINY, **UNTIED)),
    "llama-tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**TINY, **TIED)),
    "llama-base": lambda: hf.LlamaModel(hf.LlamaConfig(**TINY)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**TINY, head_dim=8)),
    "qwen3-tied": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**TINY, **TIED, head_dim=8)),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**TINY, **MOE, head_dim=8)),
    "qwen3_moe-tied": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**TINY, **MOE, **TIED, head_dim=8, mlp_only_layers=[0])
    ),
    "qwen2_moe": lambda: hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(**TINY, **MOE, shared_expert_intermediate_size=40)
    ),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**TINY, num_local_experts=4)),
    "olmoe": lambda: hf.OlmoeForCausalLM(
        hf.OlmoeConfig(**TINY, num_experts=6, num_experts_per_tok=2)
    ),
    "deepseek_v2": lambda: hf.DeepseekV2ForCausalLM(hf.DeepseekV2Config(**TINY | MLA)),
    "deepseek_v3": lambda: hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**TINY | MLA)),
    "gpt_oss": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(**TINY, head_dim=8, num_local_experts=4, num_experts_per_tok=2)
    ),
    "nemotron_h": _nemotron_h,
    "olmo_hybrid": _olmo_hybrid,
    "hrm_text": _hrm_text,
    "ernie4_5_vl_moe": _ernie4_5_vl_moe,
    "minimax_m2": lambda: hf.MiniMaxM2ForCausalLM(
        hf.MiniMaxM2Config(**TINY, head_dim=8, num_local_experts=4)
    ),
    "gemma3_text": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**TINY, head_dim=8)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**TINY)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4)
    ),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**TINY)),
    "mamba2": lambda: hf.Mamba2ForCausalLM(
        hf.Mamba2Config(
            vocab_size=96,
            hidden_size=32,
            num_hidden_layers=2,
            state_size=8,
            num_heads=8,
            head_dim=8,
            n_groups=1,
        )
    ),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    ),
    "llava": _llava,
    "gemma3": _gemma3_vision,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl_moe": _qwen3_vl_moe,
}

# What checkpoints fuse and memory does not: the only tensors that are not views.
COMPUTED = {
    "ernie4_5_vl_moe": {"model.layers.1.mlp.moe_statics.e_score_correction_bias"},
    "hrm_text": {
        f"model.{stack}_module.layers.0.{leaf}.weight"
        for stack in "HL"
        for leaf in ("attn.gqkv_proj", "mlp.gate_up_proj")
    },
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(arch: str) -> Any:
    """A model in which no two tensors are alike: fresh norms and biases all are."""
    torch.manual_seed(sorted(MODELS).index(arch))
    model = MODELS[arch]()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.normal_()
    return model


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert sorted(got) == sorted(want)
    for name, tensor in want.items():
        assert (got[name].shape, got[name].dtype) == (tensor.shape, tensor.dtype), name
        assert torch.equal(bits(got[name]), bits(tensor)), name


def described(tensors: Source) -> tuple[ParamSpec, ...]:
    return tuple(
        ParamSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, tensor in tensors
    )


def storages(module: nn.Module) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in module.state_dict().values()}


@pytest.mark.parametrize("arch", MODELS)
def test_module_is_what_save_pretrained_writes(arch: str, tmp_path: Path) -> None:
    model = build(arch)
    model.save_pretrained(tmp_path)
    pushed = as_source(model)
    assert_same(dict(pushed), dict(as_source(tmp_path)))
    assert pushed.specs() == described(pushed)
    held = storages(model)
    copied = {n for n, t in pushed if t.untyped_storage().data_ptr() not in held}
    assert copied == COMPUTED.get(arch, set())
    assert not any(tensor.requires_grad for _, tensor in pushed)


@pytest.mark.parametrize("arch", ["qwen3_moe", "llava", "qwen2_5_vl", "hrm_text"])
def test_loaded_module_keeps_the_names_of_its_checkpoint(arch: str, tmp_path: Path) -> None:
    """A loaded model carries the conversions its checkpoint needed; a new one looks them up."""
    model = build(arch)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert_same(dict(as_source(loaded)), dict(as_source(tmp_path)))


def test_bfloat16_tensors_keep_their_bits(tmp_path: Path) -> None:
    model = build("qwen3_moe-tied").bfloat16()
    model.save_pretrained(tmp_path)
    assert {spec.dtype for spec in as_source(model).specs()} == {"bfloat16"}
    assert_same(dict(as_source(model)), dict(as_source(tmp_path)))


def test_tied_embeddings_are_pushed_once() -> None:
    names = [name for name, _ in as_source(build("llama-tied"))]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    assert "lm_head.weight" in dict(as_source(build("llama")))


def test_experts_are_views_of_the_fused_parameter() -> None:
    model = build("qwen3_moe")
    pushed = dict(as_source(model))
    fused_up = model.model.layers[1].mlp.experts.gate_up_proj
    up = pushed["model.layers.1.mlp.experts.3.up_proj.weight"]
    assert up.data_ptr() == fused_up[3, MOE["moe_intermediate_size"] :].data_ptr()
    with torch.no_grad():
        fused_up.fill_(7.0)
    assert bool((up == 7.0).all())


def test_every_pass_is_fresh() -> None:
    model = build("mixtral")
    pushed = as_source(model)
    name = "model.layers.0.block_sparse_moe.experts.2.w2.weight"
    before = dict(pushed)[name].clone()
    down = model.model.layers[0].mlp.experts.down_proj
    down.data = down.data + 1.0  # a new storage, as some optimizers leave behind
    assert torch.equal(dict(pushed)[name], before + 1.0)
    assert [n for n, _ in pushed] == [n for n, _ in pushed]


def test_new_strides_are_planned_anew() -> None:
    model = build("qwen3_moe")
    pushed = as_source(model)
    want = {name: tensor.clone() for name, tensor in pushed}
    experts = model.model.layers[0].mlp.experts
    experts.down_proj.data = experts.down_proj.data.transpose(1, 2).contiguous().transpose(1, 2)
    assert_same(dict(pushed), want)


def test_views_start_where_a_flat_buffer_puts_the_parameter() -> None:
    model = build("qwen3_moe")
    want = {name: tensor.clone() for name, tensor in as_source(model)}
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    offset = 0
    for parameter in model.parameters():
        parameter.data = flat[offset : offset + parameter.numel()].view(parameter.shape)
        offset += parameter.numel()
    pushed = as_source(model)
    assert_same(dict(pushed), want)
    home = flat.untyped_storage().data_ptr()
    assert {t.untyped_storage().data_ptr() for _, t in pushed} == {home}


@pytest.mark.parametrize("arch", ["qwen2_moe", "qwen3_moe", "deepseek_v2", "mixtral", "gpt_oss"])
def test_table_agrees_with_transformers(arch: str) -> None:
    model = build(arch)
    state = fused.drop_ties(model, model.state_dict())
    split = fused.split_experts(model.config.model_type, state)
    assert_same(split, revert_weight_conversion(model, state))


def test_plain_module_with_fused_experts_is_split_by_the_table() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.ModuleDict({"experts": nn.Module()})
            experts = self.mlp["experts"]
            experts.register_parameter("gate_up_proj", nn.Parameter(torch.randn(3, 8, 6)))
            experts.register_parameter("down_proj", nn.Parameter(torch.randn(3, 6, 4)))

    block = nn.Module()
    block.layer = Block()
    pushed = dict(as_source(block))
    experts = block.layer.mlp["experts"]
    assert len(pushed) == 9
    name = "layer.mlp.experts.2.up_proj.weight"
    assert torch.equal(pushed[name], experts.gate_up_proj[2, 4:])
    assert pushed[name].data_ptr() == experts.gate_up_proj[2, 4:].data_ptr()


def test_plain_module_ties_buffers_and_empty_tensors() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2))
    module[1].weight = module[0].weight
    module.register_buffer("scratch", torch.zeros(1), persistent=False)
    module.register_parameter("none", nn.Parameter(torch.empty(0, 2)))
    module.register_parameter("void", nn.Parameter(torch.empty(0, 2)))
    names = [name for name, _ in as_source(module)]
    assert "0.weight" in names
    assert "1.weight" not in names
    assert {"none", "void", "2.running_mean", "2.num_batches_tracked"} <= set(names)
    assert "scratch" not in names


class Declaring(nn.Module):
    """What transformers' models say of themselves; `first` is the alias, though it comes first."""

    _tied_weights_keys: typing.ClassVar = {"first.weight": "second.weight"}
    _keys_to_ignore_on_save: typing.ClassVar = ["unsaved"]

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2, bias=False)
        self.second = nn.Linear(2, 2, bias=False)
        self.first.weight = self.second.weight
        self.unsaved = nn.Parameter(torch.zeros(1))


@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel], ids=["bare", "wrapped"])
def test_declarations_of_the_class_hold(wrap: Callable[[nn.Module], nn.Module]) -> None:
    assert [spec.name for spec in as_source(wrap(Declaring())).specs()] == ["second.weight"]


def test_experts_with_biases_stay_fused() -> None:
    shapes = {"gate_up_proj": (3, 8, 6), "down_proj": (3, 6, 4), "gate_up_proj_bias": (3, 8)}
    state = {f"0.mlp.experts.{leaf}": torch.zeros(shape) for leaf, shape in shapes.items()}
    assert list(fused.split_experts(None, state)) == list(state)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: torch.compile(model),
        lambda model: nn.DataParallel(model),
        lambda model: nn.DataParallel(torch.compile(model)),
    ],
    ids=["compile", "data parallel", "both"],
)
def test_wrappers_do_not_show(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = build("qwen3_moe-tied")
    assert_same(dict(as_source(wrap(model))), dict(as_source(model)))


@pytest.mark.parametrize("arch", ["qwen3_moe", "llava"])
def test_compiled_parts_do_not_show(arch: str) -> None:
    """Not even where a conversion holds for one part only, found by its path (llava)."""
    model = build(arch)
    want = dict(as_source(model))
    layers = model.get_decoder().layers
    layers[1] = torch.compile(layers[1])
    model.model = torch.compile(model.model)
    assert_same(dict(as_source(model)), want)


def test_stripped_names_may_not_collide() -> None:
    module = nn.Module()
    module.module = nn.Linear(1, 1, bias=False)
    module.weight = nn.Parameter(torch.zeros(1))
    with pytest.raises(RequestError, match="wrappers are stripped") as caught:
        as_source(module)
    assert caught.value.where == "weight"


def _push_sharded(rank: int, store: str, arch: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        want = dict(as_source(build(arch)))
        model = build(arch)
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model.model)
        fully_shard(model)
        pushed = as_source(model)
        gather, source._whole = source._whole, None  # type: ignore[assignment]
        specs = pushed.specs()  # gathers nothing
        source._whole = gather
        assert_same(dict(pushed), want)
        assert specs == described(pushed)
        model(torch.arange(8)[None]).logits.sum().backward()  # leaves some unsharded
        assert_same(dict(pushed), want)
        assert dict(as_source({"a": model.lm_head.weight}))["a"].shape == (96, 32)
    finally:
        dist.destroy_process_group()


def test_fsdp2_is_gathered_to_whole_tensors(tmp_path: Path) -> None:
    """Its `[1, H]` gates leave one rank with empty shards; its classes are renamed by FSDP2."""
    torch.multiprocessing.spawn(_push_sharded, (str(tmp_path / "store"), "qwen2_moe"), nprocs=2)


def test_mapping_is_read_anew_in_every_pass() -> None:
    held = {"b": torch.randn(2, 3, requires_grad=True), "a": torch.zeros(4, dtype=torch.int8)}
    pushed = as_source(held)
    assert pushed.specs() == (ParamSpec("b", "float32", (2, 3)), ParamSpec("a", "int8", (4,)))
    assert pushed.specs() == described(pushed)
    got = dict(pushed)
    assert not got["b"].requires_grad
    assert got["b"].data_ptr() == held["b"].data_ptr()
    held["b"] = torch.ones(5)
    assert dict(pushed)["b"].shape == (5,)


def test_iterator_is_consumed_once() -> None:
    tensors = {"a": torch.randn(2), "b": torch.randn(3)}
    pushed = as_source(iter(tensors.items()))
    for _ in range(2):
        assert_same(dict(pushed), tensors)
    assert_same(dict(as_source(list(tensors.items()))), tensors)


def test_source_is_returned_as_is() -> None:
    pushed = as_source({"a": torch.zeros(1)})
    assert isinstance(pushed, Source)
    assert as_source(pushed) is pushed


def test_sharded_folder_follows_its_index(tmp_path: Path) -> None:
    model = build("qwen3_moe")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    save_file({"stray": torch.zeros(1)}, tmp_path / "stray.safetensors")
    pushed = as_source(str(tmp_path))
    assert_same(dict(pushed), dict(as_source(model)))
    assert pushed.specs() == described(pushed)


def test_folder_without_index_gives_every_file(tmp_path: Path) -> None:
    tensors = {name: torch.randn(3).to(torch.float8_e4m3fn) for name in "abc"}
    for name, tensor in tensors.items():
        save_file({name: tensor}, tmp_path / f"{name}.safetensors")
    assert_same(dict(as_source(tmp_path)), tensors)
    save_file({"a": torch.zeros(1)}, tmp_path / "again.safetensors")
    with pytest.raises(RequestError, match="2 files of the folder hold this name") as caught:
        as_source(tmp_path)
    assert caught.value.where.startswith("a in ")


def _index(weight_map: object) -> str:
    return json.dumps({"weight_map": weight_map})


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "no readable weight_map"),
        ("{}", "no readable weight_map"),
        (_index(["a"]), "no readable weight_map"),
        (_index({"a": "gone.safetensors"}), "'gone.safetensors', not a file"),
        (_index({"a": "../a.safetensors"}), "'../a.safetensors', not a file"),
        (_index({"a": "a.safetensors", "b": "a.safetensors"}), "promises 'b'"),
    ],
)
def test_bad_index_is_refused(tmp_path: Path, index: str, message: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for place in (tmp_path, folder):
        save_file({"a": torch.zeros(1)}, place / "a.safetensors")
    (folder / INDEX).write_text(index)
    with pytest.raises(RequestError, match=message) as caught:
        as_source(folder)
    assert str(folder) in caught.value.where
    assert caught.value.next_step


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such checkpoint folder"):
        as_source(tmp_path / "gone")
    with pytest.raises(RequestError, match="holds no"):
        as_source(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"not safetensors")
    with pytest.raises(RequestError, match="no such checkpoint folder"):
        as_source(file)
    with pytest.raises(RequestError, match="cannot be read"):
        as_source(tmp_path)
    save_file({"x.lora_A.weight": torch.zeros(1)}, file)
    with pytest.raises(RequestError, match="not merged"):
        as_source(tmp_path)


def test_missing_safetensors_says_how_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(RequestError, match="pip install safetensors"):
        FolderSource(tmp_path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0], "a list is not a tensor"),
        (torch.zeros(2, device="meta"), "has no data"),
        (torch.zeros(2, 2).to_sparse(), "torch.sparse_coo cannot be sent"),
        (torch.zeros(2, dtype=torch.complex64), "'complex64' cannot be transferred"),
        (torch.nested.nested_tensor([torch.zeros(1)], layout=torch.jagged), "cannot be sent"),
    ],
    ids=["list", "meta", "sparse", "complex", "nested"],
)
def test_what_cannot_be_sent_is_named(value: object, message: str) -> None:
    for given in ({"w.bad": value}, [("w.bad", value)], iter([("w.bad", value)])):
        with pytest.raises(RequestError, match=message) as caught:
            as_source(given)
        assert caught.value.where == "w.bad"


def test_module_on_meta_is_refused() -> None:
    with torch.device("meta"):
        module = nn.Linear(2, 2)
    with pytest.raises(RequestError, match="has no data") as caught:
        as_source(module)
    assert caught.value.where == "weight"


@pytest.mark.parametrize(
    "name", ["q_proj.base_layer", "q_proj.lora_A", "q_proj.lora_B", "head.modules_to_save"]
)
def test_unmerged_adapters_are_refused(name: str) -> None:
    module: nn.Module = nn.Linear(1, 1)
    for part in reversed(name.split(".")):
        module = nn.ModuleDict({part: module})
    with pytest.raises(RequestError, match="merge_and_unload") as caught:
        as_source(module)
    assert caught.value.where == f"{name}.weight"


def test_partitioned_parameters_are_refused() -> None:
    module = nn.Linear(2, 2, bias=False)
    module.weight.data = torch.empty(0)
    module.weight.ds_numel = 4  # type: ignore[assignment]
    with pytest.raises(RequestError, match="ZeRO-3"):
        as_source(module)


@pytest.mark.parametrize("obj", [None, 3, torch.zeros(2), b"model", object()])
def test_anything_else_is_refused(obj: object) -> None:
    with pytest.raises(RequestError, match=r"cannot take weights from a .* pass an nn\.Module"):
        as_source(obj)


def test_malformed_pairs_are_refused() -> None:
    zero = torch.zeros(1)
    with pytest.raises(RequestError, match="given twice") as caught:
        as_source([("a", zero), ("a", zero)])
    assert caught.value.where == "a"
    for items in ([zero], ["ab"], [("a", zero, zero)], [(1, zero)]):
        with pytest.raises(RequestError, match=r"expected a .name, tensor. pair") as caught:
            as_source(items)
        assert caught.value.where == "item 0"
    with pytest.raises(RequestError, match="non-empty string"):
        as_source({1: zero})


def test_importing_sources_needs_only_torch() -> None:
    code = (
        "import sys, torch; from vllm_wt_plugin.trainer.source import as_source;"
        "list(as_source(torch.nn.Linear(1, 1)));"
        "print(sorted({'transformers', 'safetensors', 'vllm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
