"""FSDP2 training beside an expert-parallel vLLM on the same devices, weights over packed `ipc`.

    python examples/fsdp_ep_ipc.py --device cuda --ranks 4            # one rank, one engine per GPU
    python examples/fsdp_ep_ipc.py --device cpu --ranks 2             # a tiny model, no GPU
    … --launcher ray                     # actors in a placement group, not torchrun and a server

Every device holds one rank of an FSDP2 trainer and one vLLM worker: on GPUs a data-parallel group
of engines that share the experts, on CPU (where vLLM 0.32 has no kernels for expert parallelism)
the workers of one tensor-parallel engine, which share each expert. No rank has the whole model: a
push gathers one tensor after another, fused experts are cut into checkpoint tensors as views, every
rank fills two buffers, and each worker reads those on its own device. Where vLLM can sleep (GPUs),
it does while the trainer steps, and wakes up in two parts: weights, push, KV cache.

torchrun's ranks push to `vllm serve` by URL. With Ray, a placement group has one bundle per device;
in each sits one rank, and the engines' processes are those of one actor, which holds an AsyncLLM
and is pushed to by its handle. One host either way, as `ipc` asks for.

The engines start with random weights of their own. The program checks that what they say changes
with each push, that every weight they hold adds up to the trainer's, and, bit for bit, that they
say what a vLLM says that has loaded the trainer's checkpoint. Last line `ok: …`, exit code 0.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
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
DUMMY = ("--load-format", "dummy")
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

    def __init__(self, folder: Path, device: str, buffer_mb: int, **meeting: Any) -> None:
        self.folder, self.device = folder, torch.device(device)
        if device == "cuda":  # torchrun shows every rank all GPUs, Ray only its own
            self.device = torch.device(device, int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(self.device)
        else:
            torch.set_num_threads(1)
        # What ranks tell each other goes over gloo: a rank that waits in NCCL keeps its GPU busy,
        # and the engine that shares the GPU gets time slices.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", **meeting)
        self.rank = dist.get_rank()
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
                tensors[name] = tensor.to("cpu", copy=True)
        if self.rank == 0:
            save_file(tensors, self.folder / "model.safetensors", metadata={"format": "pt"})

    def close(self) -> None:
        if self.sync is not None:
            self.sync.close()
        dist.destroy_process_group()


def asked(engines: int) -> list[tuple[int, list[int]]]:
    """(rank, prompt): every prompt is said once, and every engine is asked."""
    return [(n % engines, PROMPTS[n % len(PROMPTS)]) for n in range(max(engines, len(PROMPTS)))]


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
    """The engines behind one server: a data-parallel group of `engines`."""

    def __init__(self, url: str, engines: int, can_sleep: bool) -> None:
        self.target, self.engines, self.can_sleep = url, engines, can_sleep
        self._http = httpx.Client(base_url=url, timeout=300, trust_env=False)

    def generate(self) -> list[Any]:
        """Greedy tokens and log-probs, one prompt after another (a batch changes bits), from every
        engine by its rank: which one answers decides the order in which experts' parts are added.
        """
        out = []
        for rank, prompt in asked(self.engines):
            body = {
                "model": "policy", "prompt": prompt, "max_tokens": 12, "temperature": 0,
                "logprobs": 0, "ignore_eos": True, "return_tokens_as_token_ids": True,
                "detokenize": False,
            }  # fmt: skip
            at = {"X-data-parallel-rank": str(rank)}
            answer = self._post("/v1/completions", json=body, headers=at).json()
            said = answer["choices"][0]["logprobs"]
            out.append((said["tokens"], said["token_logprobs"]))
        return out

    def sleep(self) -> None:
        self._post("/sleep?level=1")

    def wake_up(self, tag: str) -> None:
        self._post(f"/wake_up?tags={tag}")

    def _post(self, path: str, **request: Any) -> httpx.Response:
        response = self._http.post(path, **request)
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
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        said: list[Any] = json.loads(box[0])
        return said


def one_rank(a: argparse.Namespace) -> None:
    """What torchrun starts on every rank."""
    trainer = Trainer(a.folder, a.device, a.buffer_mb)
    ranks = HereAndElsewhere(trainer)
    if trainer.rank > 0:
        ranks.follow()
        return
    phases: dict[str, float] = {}
    try:
        said = run(ranks, Served(a.url, engines_of(a), a.device == "cuda"), phases)
        (a.folder / "said.json").write_text(json.dumps({"said": said, "seconds": phases}))
    finally:
        ranks.all("close")


def by_torchrun(a: argparse.Namespace) -> tuple[list[Any], dict[str, float]]:
    """A server, then torchrun on this very file."""
    log = a.out / "engines.log"
    with rl.served(a.folder, log, *engine_args(a), *DUMMY) as url:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc-per-node", str(a.ranks), __file__, "--device", a.device,
            "--ranks", str(a.ranks), "--buffer-mb", str(a.buffer_mb),
            "--folder", str(a.folder), "--url", url,
        ]  # fmt: skip
        ranks = subprocess.Popen(command, start_new_session=True)
        try:
            failed = ranks.wait()
        finally:
            rl.stop(ranks)
        if failed:
            raise ExampleFailed(f"the trainer failed; the end of the engines' log:\n{rl.tail(log)}")
    result = json.loads((a.folder / "said.json").read_text())
    return [tuple(s) for s in result["said"]], result["seconds"]


# ---- Ray -----------------------------------------------------------------------------------


class Engine:
    """An actor that holds the engines. Its methods are async, so that it answers a push as well."""

    async def start(self, engines: int, *args: str) -> None:
        from vllm import AsyncEngineArgs
        from vllm.utils.argparse_utils import FlexibleArgumentParser
        from vllm.v1.engine.async_llm import AsyncLLM

        parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
        options = AsyncEngineArgs.from_cli_args(parser.parse_args(args))
        self.engines = engines
        self.llm = AsyncLLM.from_engine_args(options)  # here, on the loop that it will run on

    async def generate(self) -> list[Any]:
        """The same as `Served.generate`."""
        from vllm import SamplingParams

        out = []
        for i, (rank, prompt) in enumerate(asked(self.engines)):
            params = SamplingParams(
                max_tokens=12, temperature=0, logprobs=0, ignore_eos=True, detokenize=False
            )
            ask = {"prompt_token_ids": prompt}
            async for said in self.llm.generate(ask, params, str(i), data_parallel_rank=rank):
                last = said.outputs[0]
            tokens = [f"token_id:{t}" for t in last.token_ids]
            rows = zip(last.token_ids, last.logprobs, strict=True)
            out.append((tokens, [row[token].logprob for token, row in rows]))
        return out

    async def sleep(self) -> None:
        await self.llm.sleep(level=1)

    async def wake_up(self, tag: str) -> None:
        await self.llm.wake_up([tag])

    async def stop(self) -> None:
        self.llm.shutdown()


class Actors:
    """Trainer ranks, or the engines, as `run` uses them: calls that block until all have done."""

    def __init__(self, actors: list[Any], can_sleep: bool = False) -> None:
        self._actors, self.target, self.can_sleep = actors, actors[0], can_sleep

    def all(self, method: str, *args: Any) -> Any:
        """On every actor; what the first says."""
        import ray

        return ray.get([getattr(actor, method).remote(*args) for actor in self._actors])[0]

    def generate(self) -> list[Any]:
        said: list[Any] = self.all("generate")
        return said

    def sleep(self) -> None:
        self.all("sleep")

    def wake_up(self, tag: str) -> None:
        self.all("wake_up", tag)


def by_ray(a: argparse.Namespace) -> tuple[list[Any], dict[str, float]]:
    """A placement group with a bundle per device; rank n of the trainer sits in bundle n."""
    import ray
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    gpu = int(a.device == "cuda")
    # The engines' actor asks for no GPU of its own, and is to see all of them.
    os.environ |= rl.vllm_env() | {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    ray.init(num_cpus=a.ranks, include_dashboard=False, log_to_driver=False)
    phases: dict[str, float] = {}
    try:
        group = placement_group([{"CPU": 1, "GPU": gpu}] * a.ranks, strategy="STRICT_PACK")
        ray.get(group.ready(), timeout=60)

        def actor(cls: type, bundle: int, *args: Any, cpus: int, gpus: int, **kwargs: Any) -> Any:
            placed = PlacementGroupSchedulingStrategy(group, bundle)
            remote = ray.remote(num_cpus=cpus, num_gpus=gpus, scheduling_strategy=placed)(cls)
            return remote.remote(*args, **kwargs)

        engines = Actors([actor(Engine, 0, cpus=0, gpus=0)], can_sleep=bool(gpu))
        engines.all("start", engines_of(a), *common_args(a), *engine_args(a), *DUMMY)
        store = a.out / "ranks"  # where they meet
        store.unlink(missing_ok=True)
        meeting = {"init_method": f"file://{store}", "world_size": a.ranks}
        trainers = Actors([
            actor(Trainer, n, a.folder, a.device, a.buffer_mb, cpus=1, gpus=gpu, rank=n, **meeting)
            for n in range(a.ranks)
        ])  # fmt: skip
        said = run(trainers, engines, phases)
        trainers.all("close")
        engines.all("stop")
    finally:
        ray.shutdown()
    return said, phases


def common_args(a: argparse.Namespace) -> list[str]:
    """What `rl.served` gives to its server, and that processes are vLLM's own, not Ray's."""
    return [
        "--model", str(a.folder), "--dtype", "bfloat16", "--enforce-eager",
        "--max-model-len", "256", "--weight-transfer-config", '{"backend": "ipc"}',
        "--distributed-executor-backend", "mp",
    ]  # fmt: skip


# ---- the program ---------------------------------------------------------------------------


def engines_of(a: argparse.Namespace) -> int:
    """Data-parallel engines; on CPU the ranks' workers are those of one."""
    return a.ranks if a.device == "cuda" else 1


def engine_args(a: argparse.Namespace) -> list[str]:
    """One worker per device."""
    size = "--data-parallel-size" if a.device == "cuda" else "--tensor-parallel-size"
    args = [size, str(a.ranks), "--skip-tokenizer-init", "--max-num-seqs", "16"]
    if a.device == "cuda":
        args += ["--enable-expert-parallel", "--enable-sleep-mode",
                 "--gpu-memory-utilization", str(a.memory),
                 "--kv-cache-memory-bytes", str(1 << 30)]  # fmt: skip
    return args


def options() -> argparse.Namespace:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    ap.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    ap.add_argument("--ranks", type=int, default=2, help="devices: trainer ranks and vLLM workers")
    ap.add_argument("--launcher", choices=("torchrun", "ray"), default="torchrun")
    ap.add_argument("--config", type=Path, help="config.json of a Qwen3-MoE (default: tiny)")
    ap.add_argument("--memory", type=float, default=0.5, help="vLLM's share of each GPU")
    ap.add_argument("--buffer-mb", type=int, default=256, help="each of two, on every device")
    ap.add_argument("--out", type=Path, help="folder for logs and result.json")
    ap.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # torchrun's ranks
    ap.add_argument("--url", help=argparse.SUPPRESS)
    return ap.parse_args()


def main() -> None:
    a = options()
    if a.url:
        one_rank(a)
        return
    signal.signal(signal.SIGTERM, rl.terminated)
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # /sleep and /wake_up
    if a.device == "cpu":
        os.environ |= {"OMP_NUM_THREADS": "1"}
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(a.ranks)))
    with tempfile.TemporaryDirectory(prefix="fsdp-ep-") as temporary:
        a.out = (a.out or Path(temporary)).resolve()
        a.folder = a.out / "model"
        a.folder.mkdir(parents=True, exist_ok=True)
        config = TINY if a.config is None else json.loads(a.config.read_text())
        (a.folder / "config.json").write_text(json.dumps(config))
        launch = by_ray if a.launcher == "ray" else by_torchrun
        said, phases = launch(a)
        with rl.served(a.folder, a.out / "fresh.log", *engine_args(a)) as url:
            want = Served(url, engines_of(a), False).generate()
        rows = zip(asked(engines_of(a)), said, want, strict=True)
        wrong = [rank for (rank, _), ours, fresh in rows if ours != fresh]
        result = {"ranks": a.ranks, "layers": config["num_hidden_layers"], "answers": len(want),
                  "equal": len(want) - len(wrong), "seconds": phases}  # fmt: skip
        (a.out / "result.json").write_text(json.dumps(result, indent=1))
        if wrong:
            raise ExampleFailed(
                f"{len(wrong)} of {len(want)} answers, by the engines {wrong}, are not what a vLLM "
                "with this checkpoint says"
            )
    print(f"ok: {STEPS} pushes of {a.ranks} FSDP ranks to {a.ranks} vLLM workers, "
          "bit for bit a fresh load of the checkpoint")  # fmt: skip


if __name__ == "__main__":
    try:
        main()
    except (ExampleFailed, rl.DemoFailed, WeightSyncError) as exc:
        print(f"FAILED: {exc}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; the engines are stopped", file=sys.stderr)
        sys.exit(130)
