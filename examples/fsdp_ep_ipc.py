"""FSDP2 training beside an expert-parallel vLLM on the same devices, weights over packed `ipc`.

    python examples/fsdp_ep_ipc.py --device cuda --ranks 4            # one rank, one engine per GPU
    python examples/fsdp_ep_ipc.py --device cpu --ranks 2             # a tiny model, no GPU

Every device holds one rank of an FSDP2 trainer and one vLLM worker: on GPUs a data-parallel group
of engines that share the experts, on CPU (where vLLM 0.32 has no kernels for expert parallelism)
the workers of one tensor-parallel engine, which share each expert. No rank has the whole model: a
push gathers one tensor after another, fused experts are cut into checkpoint tensors as views, every
rank fills two buffers, and each worker reads those on its own device. Where vLLM can sleep (GPUs),
it does while the trainer steps, and wakes up in two parts: weights, push, KV cache.

The engines start with random weights of their own. The program checks that what they say changes
with each push, that every weight they hold adds up to the trainer's, and, bit for bit, that they
say what a vLLM says that has loaded the trainer's checkpoint. Last line `ok: …`, exit code 0.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import httpx
import rl_loop as rl
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM

from vllm_wt_plugin import WeightSync, WeightSyncError, as_source

STEPS = 2
PROMPTS = [[5, 6, 7, 8], list(range(20, 52)), [100, 3] * 6]
TINY = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "dtype": "bfloat16",
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "max_position_embeddings": 512,
    "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip


class ExampleFailed(Exception):
    """What the last line says before exit code 1."""


# ---- one rank of the trainer ---------------------------------------------------------------


class Trainer:
    """One FSDP2 rank. Made on every rank, in a process of its own; all methods are collective."""

    def __init__(self, folder: Path, device: str, buffer_mb: int) -> None:
        self.rank, self.folder = dist.get_rank(), folder
        self.device = torch.device(device, self.rank) if device == "cuda" else torch.device("cpu")
        self.buffer_bytes = buffer_mb << 20
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        model.to_empty(device=self.device)
        torch.manual_seed(self.rank)
        with torch.no_grad():
            for p in model.parameters():
                local = p.to_local()
                local.uniform_(0.5, 1.5) if p.dim() == 1 else local.normal_(0, 0.05)
        rotary = model.model.rotary_emb  # its buffers are computed, not loaded
        model.model.rotary_emb = type(rotary)(config).to(self.device)
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        self.sync: WeightSync | None = None

    def step(self) -> float:
        """One optimizer step on random tokens; the loss."""
        ids = torch.randint(0, self.model.config.vocab_size, (2, 16), device=self.device)
        loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def push(self, target: Any, version: str) -> dict[str, float]:
        """Every rank gathers and fills buffers; rank 0 talks to the engines. Seconds by phase."""
        if self.sync is None:
            self.sync = WeightSync(target, buffer_bytes=self.buffer_bytes)
        return self.sync.push(self.model, version=version).seconds

    def verified(self) -> bool:
        """Do the engines' weights add up to the trainer's, every one?"""
        source = as_source(self.model)
        if self.rank == 0 and self.sync is not None:
            return self.sync.verify(source).ok
        for _ in source:  # rank 0 gathers: all do
            pass
        return True

    def save(self) -> None:
        """The checkpoint, as rank 0 gathers it, beside config.json."""
        tensors = {}
        for name, tensor in as_source(self.model):
            if self.rank == 0:
                tensors[name] = tensor.cpu().clone()
        if self.rank == 0:
            save_file(tensors, self.folder / "model.safetensors", metadata={"format": "pt"})
        dist.barrier()

    def close(self) -> None:
        if self.sync is not None:
            self.sync.close()
        dist.destroy_process_group()


# ---- what is done, by rank 0 of whichever launcher -----------------------------------------


def run(trainers: Any, engines: Any, phases: dict[str, float]) -> list[Any]:
    """Train and push STEPS times; what the engines say after the last push. `trainers.all(method,
    *args)` calls it on every rank; `engines` generate, sleep and wake up."""

    @contextmanager
    def timed(phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        phases[phase] = round(time.perf_counter() - start, 4)
        print(f"{phase}: {phases[phase]:.3f} s", flush=True)

    with timed("generate, dummy weights"):
        said: list[Any] = engines.generate()
    for n in range(1, STEPS + 1):
        if engines.can_sleep:
            with timed(f"sleep {n}"):
                engines.sleep()
        with timed(f"train {n}"):
            print(f"loss {trainers.all('step'):.4f}", flush=True)
        if engines.can_sleep:
            with timed(f"wake up weights {n}"):
                engines.wake_up("weights")
        with timed(f"push {n}"):
            trainers.all("push", engines.target, str(n))
        if engines.can_sleep:
            with timed(f"wake up KV cache {n}"):
                engines.wake_up("kv_cache")
        with timed(f"generate {n}"):
            before, said = said, engines.generate()
        if said == before:
            raise ExampleFailed(f"push {n} changed nothing of what the engines say")
    with timed("verify"):
        if not trainers.all("verified"):
            raise ExampleFailed("the engines' weights do not add up to the trainer's")
    with timed("save"):
        trainers.all("save")
    return said


# ---- plain processes: `vllm serve` and torchrun --------------------------------------------


class Served:
    """The engines behind one server."""

    def __init__(self, url: str, can_sleep: bool) -> None:
        self.target, self.can_sleep = url, can_sleep
        self._http = httpx.Client(base_url=url, timeout=300, trust_env=False)

    def generate(self) -> list[Any]:
        """Greedy tokens and log-probs of each prompt, one after another (a batch changes bits)."""
        out = []
        for prompt in PROMPTS:
            body = {
                "model": "policy", "prompt": prompt, "max_tokens": 12, "temperature": 0,
                "logprobs": 0, "ignore_eos": True, "return_tokens_as_token_ids": True,
                "detokenize": False,
            }  # fmt: skip
            said = self._post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
            out.append((said["tokens"], said["token_logprobs"]))
        return out

    def sleep(self) -> None:
        self._post("/sleep?level=1")

    def wake_up(self, tag: str) -> None:
        self._post(f"/wake_up?tags={tag}")

    def _post(self, path: str, **body: Any) -> httpx.Response:
        response = self._http.post(path, **body)
        if not response.is_success:
            raise ExampleFailed(f"{path}: {response.status_code} {response.text[:500]}")
        return response


class HereAndElsewhere:
    """Under torchrun every rank is a process like this one: rank 0's decisions are told to all."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def all(self, method: str, *args: Any) -> Any:
        self._tell([method, *args])
        return getattr(self._trainer, method)(*args)

    def follow(self) -> None:
        """On the other ranks: do as rank 0 does, until it says `close`."""
        while True:
            method, *args = self._tell([])
            getattr(self._trainer, method)(*args)
            if method == "close":
                return

    def _tell(self, call: list[Any]) -> list[Any]:
        box = [json.dumps(call)]
        dist.broadcast_object_list(box, src=0, device=self._trainer.device)
        said: list[Any] = json.loads(box[0])
        return said


def one_rank(a: argparse.Namespace) -> None:
    """What torchrun starts on every rank."""
    rank = int(os.environ["RANK"])
    if a.device == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if a.device == "cuda" else "gloo")
    ranks = HereAndElsewhere(Trainer(a.folder, a.device, a.buffer_mb))
    if rank > 0:
        ranks.follow()
        return
    phases: dict[str, float] = {}
    try:
        said = run(ranks, Served(a.url, a.device == "cuda"), phases)
        (a.folder / "said.json").write_text(json.dumps({"said": said, "seconds": phases}))
    finally:
        ranks.all("close")


def plain(a: argparse.Namespace, log: Path) -> tuple[list[Any], dict[str, float]]:
    """A server, then torchrun on this very file."""
    with rl.served(a.folder, log, *engine_args(a), "--load-format", "dummy") as url:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc-per-node", str(a.ranks), __file__, "--device", a.device,
            "--buffer-mb", str(a.buffer_mb), "--folder", str(a.folder), "--url", url,
        ]  # fmt: skip
        if subprocess.run(command, check=False).returncode:
            raise ExampleFailed(f"the trainer failed; the end of the engines' log:\n{rl.tail(log)}")
    result = json.loads((a.folder / "said.json").read_text())
    return [tuple(s) for s in result["said"]], result["seconds"]


def engine_args(a: argparse.Namespace) -> list[str]:
    """One worker per device."""
    size = "--data-parallel-size" if a.device == "cuda" else "--tensor-parallel-size"
    args = [size, str(a.ranks), "--skip-tokenizer-init", "--max-num-seqs", "16"]
    if a.device == "cuda":
        args += ["--enable-expert-parallel", "--enable-sleep-mode",
                 "--gpu-memory-utilization", str(a.memory),
                 "--kv-cache-memory-bytes", str(1 << 30)]  # fmt: skip
    return args


# ---- the program ---------------------------------------------------------------------------


def options() -> argparse.Namespace:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    ap.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    ap.add_argument("--ranks", type=int, default=2, help="devices: trainer ranks and vLLM workers")
    ap.add_argument("--config", type=Path, help="config.json of a Qwen3-MoE (default: tiny)")
    ap.add_argument("--memory", type=float, default=0.5, help="vLLM's share of each GPU")
    ap.add_argument("--buffer-mb", type=int, default=256, help="each of two, on every device")
    ap.add_argument("--out", type=Path, help="folder for logs and seconds.json")
    ap.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # torchrun's ranks
    ap.add_argument("--url", help=argparse.SUPPRESS)
    return ap.parse_args()


def main() -> None:
    a = options()
    if a.url:
        one_rank(a)
        return
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # /sleep and /wake_up
    if a.device == "cpu":
        os.environ |= {"OMP_NUM_THREADS": "1"}
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(a.ranks)))
    with tempfile.TemporaryDirectory(prefix="fsdp-ep-") as temporary:
        a.out = a.out or Path(temporary)
        a.folder = a.out / "model"
        a.folder.mkdir(parents=True, exist_ok=True)
        config = TINY if a.config is None else json.loads(a.config.read_text())
        (a.folder / "config.json").write_text(json.dumps(config))
        said, phases = plain(a, a.out / "engines.log")
        with rl.served(a.folder, a.out / "fresh.log", *engine_args(a)) as url:
            want = Served(url, False).generate()
        if said != want:
            raise ExampleFailed("the engines do not say what a vLLM with this checkpoint says")
        (a.out / "seconds.json").write_text(json.dumps(phases, indent=1))
    print(f"ok: {STEPS} pushes of {a.ranks} FSDP ranks to {a.ranks} vLLM workers, "
          "bit for bit a fresh load of the checkpoint")  # fmt: skip


if __name__ == "__main__":
    try:
        main()
    except (ExampleFailed, rl.DemoFailed, WeightSyncError) as exc:
        print(f"FAILED: {exc}", file=sys.stderr)
        sys.exit(1)
