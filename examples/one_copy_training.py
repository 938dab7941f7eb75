"""Reinforcement learning on the engine's own weights: one copy of the model, no transfer at all.

    python examples/one_copy_training.py            (after `make setup`; uses a GPU if there is one)

The task, the model and the checks are those of `rl_loop.py`, but nothing is pushed: the trainer's
parameters are views of the tensors that vLLM computes with, so that `optimizer.step()` inside
`bridge.update` is the update. fp32 masters keep what bf16 would round away. Prints a row per step,
then

    ok: 25 of 25 parameters are vLLM's own memory, none has moved; vowels 0.02 -> 0.97, digits …

Exit code 1 and the reason if a reward did not rise clearly, if the server's log-probs are not
those of the trainer's newest weights, or if a parameter is not in the engine's memory.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import cast

import httpx
import rl_loop as rl
import torch
from transformers import Qwen3ForCausalLM

from vllm_wt_plugin.bridge import BridgeConfig, VLLMWeightBridge

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU_ARGS = ("--gpu-memory-utilization", "0.3") if DEVICE == "cuda" else ()


def rollout(http: httpx.Client) -> list[rl.Group]:
    """A group of samples per task, on the trainer's device."""
    return [
        replace(
            g,
            tokens=g.tokens.to(DEVICE),
            logprobs=g.logprobs.to(DEVICE),
            rewards=g.rewards.to(DEVICE),
        )
        for g in rl.rollout(http)
    ]


def backward(model: Qwen3ForCausalLM, groups: list[rl.Group]) -> None:
    loss = torch.stack([rl.policy_loss(model, g) for g in groups]).sum()
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def train(bridge: VLLMWeightBridge, url: str, steps: int) -> list[rl.Step]:
    """Roll out and update, `steps` times; one more rollout judges the last update."""
    model = cast(Qwen3ForCausalLM, bridge.get_trainable_model(master="fp32"))
    optimizer = torch.optim.AdamW(bridge.parameters(), lr=rl.LEARNING_RATE, weight_decay=0.0)
    done: list[rl.Step] = []
    version = ""
    with httpx.Client(base_url=url, timeout=120, trust_env=False) as http:
        print(rl.HEADER)
        for step in range(1, steps + 1):
            groups = rollout(http)
            gap = rl.logprob_gap(model, groups)
            seconds = 0.0
            for _ in range(rl.UPDATES):
                backward(model, groups)
                start = time.perf_counter()
                with bridge.update(version=step):
                    optimizer.step()
                seconds += time.perf_counter() - start
            stale = rl.logprob_gap(model, groups)
            done.append(rl.Step(groups, gap, stale, 0.0, seconds * 1e3))
            version = http.get("/weight_info").json()["weight_version"]
            print(f"{step:>4}  {rl.row(done[-1], version)}", flush=True)
            if version != str(step):
                raise rl.DemoFailed(f"step {step} was written, the server serves {version!r}")
        groups = rollout(http)
        done.append(rl.Step(groups, rl.logprob_gap(model, groups)))
        print(f" end  {rl.row(done[-1], version)}", flush=True)
    return done


def places(bridge: VLLMWeightBridge) -> list[int]:
    """Addresses of the parameters, each of them in memory that the engine showed."""
    parameters = list(bridge.get_trainable_model().parameters())
    shown = {t.untyped_storage().data_ptr() for t in bridge.shared_state_dict.values()}
    if not all(p.untyped_storage().data_ptr() in shown for p in parameters):
        raise rl.DemoFailed("a parameter of the trainer is not in the engine's memory")
    return [p.data_ptr() for p in parameters]


def run(steps: int, seed: int, out: Path) -> str:
    out.mkdir(parents=True, exist_ok=True)
    log = out / "one_copy_training.server.log"
    torch.set_num_threads(1)  # the server's threads spin on the other cores
    os.environ |= {"WT_CPU_INPLACE": "1", "LOGDIR": str(out)}  # for the server
    with tempfile.TemporaryDirectory() as folder:
        rl.build_model(seed).bfloat16().save_pretrained(folder)
        rl.save_tokenizer(Path(folder))
        print(f"starting the server (log: {log})", flush=True)
        with rl.served(Path(folder), log, *GPU_ARGS) as url:
            config = BridgeConfig(model_name=folder, device=DEVICE, vllm_api_url=url)
            with VLLMWeightBridge(config) as bridge:
                before = places(bridge)
                done = train(bridge, url, steps)
                if places(bridge) != before:
                    raise rl.DemoFailed("parameters have moved")
    n = len(before)
    return f"{n} of {n} parameters are vLLM's own memory, none has moved; {rl.check(done)}"


if __name__ == "__main__":
    sys.exit(rl.main(run))
