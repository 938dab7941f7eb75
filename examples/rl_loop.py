"""Reinforcement learning against a live vLLM server, on two CPU cores and without downloads.

    python examples/rl_loop.py            (after `make setup`; `make demo` does both)

    rollouts from /v1/completions → reward → PyTorch update → WeightSync.push → next rollouts

A tiny byte-level Qwen3, random at first, learns to write vowels when asked for vowels and digits
when asked for digits. The update is GRPO's (advantages relative to the group of one prompt's
samples) in fp32; the server samples from the same weights in bf16. Every step prints a row:

    step  vowels digits     gap   stale changed pushed MB     ms  serves  what the server wrote
       1   0.018  0.038  0.0012  0.2709             1.45   31.0       1  ·|y····S·+o··  ·····@p··xPb
      ...
      30   0.999  1.000  0.0065  0.0307             1.45   11.9      30  oaoaoooaaoaoa  900000300000
    ok: vowels 0.03 -> 1.00, digits 0.06 -> 1.00; server and trainer at most 0.009 nats per …

and `out/rl_loop.png` shows the curves. `gap` is the mean distance, in nats per sampled token,
between the server's log-probs and the trainer's own: bf16's rounding, as long as the server
computes with the weights pushed last. One version behind, it would be `stale`. The last rows train
at the rate of a large model's RL, where few bf16 weights change from step to step: only those are
sent, and `changed` says how many they were.
Exit code 1 and the reason if a reward did not rise clearly, if the gap comes near `stale`, or if
the server reports another version than the one just pushed. About a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

# Read when transformers is imported.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
os.environ |= {"TOKENIZERS_PARALLELISM": "false"}

import httpx
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from vllm_wt_plugin import WeightSync, WeightSyncError

TASKS = {"vowels: ": "aeiou", "digits: ": "0123456789"}  # prompt → what its reward counts
SAMPLES = 64  # per prompt and rollout: one group
TOKENS = 24  # per sample
UPDATES = 2  # optimizer steps per rollout
LEARNING_RATE = 2e-3
FINE, FINE_RATE = 5, 1e-6  # the last steps are this many, at this rate: pushed sparse
CLIP = 0.2  # PPO's, on the probability ratio to the server's own log-probs
EDGE = 5  # rollouts averaged at either end for the check
RISE = 0.5  # the least rise of each task's mean reward between them; reached: 0.9
DISTINCT = 3.0  # how much wider than any gap the median `stale` must be; reached: 13 to 25
START_S = 240.0
STOP_S = 20.0


class DemoFailed(Exception):
    """What the last line says before exit code 1."""


@dataclass(frozen=True)
class Group:
    """One prompt's samples, as the server gave them."""

    prompt: str
    prompt_ids: list[int]
    tokens: Tensor  # [SAMPLES, TOKENS]
    logprobs: Tensor  # [SAMPLES, TOKENS], the server's
    rewards: Tensor  # [SAMPLES]: the share of tokens that are characters of the asked kind
    text: str  # of the first sample

    @property
    def reward(self) -> float:
        return float(self.rewards.mean())


@dataclass(frozen=True)
class Step:
    """The rollouts of one served version, and the push that replaced it (if it was not the last).

    Nats per token between the server's log-probs and the trainer's: `gap` with the weights pushed
    before this rollout, `stale` with the next ones, as if the server were one version behind.
    """

    groups: list[Group]
    gap: float
    stale: float = float("nan")
    pushed_mb: float = float("nan")
    push_ms: float = float("nan")
    changed: float | None = None  # the share of elements that a sparse push found changed


def build_model(seed: int) -> Qwen3ForCausalLM:
    """A random fp32 policy of 0.36 M parameters: small updates add up, which bf16 would round."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=258, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=256,
        bos_token_id=0, eos_token_id=1, pad_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).float()


def save_tokenizer(folder: Path) -> None:
    """One token per byte after two special ones, in the form transformers reads."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|bos|>": 0, "<|eos|>": 1, **{c: i + 2 for i, c in enumerate(alphabet)}}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|bos|>", "<|eos|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|eos|>"}
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 256, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))


@contextmanager
def served(model: Path, log: Path, *args: str) -> Iterator[str]:
    """The URL of a vLLM server with the plugin; its process group is gone when this is left."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(model), "--served-model-name", "policy",
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16",
        "--enforce-eager", "--max-model-len", "256",
        "--weight-transfer-config", '{"backend": "ipc"}', *args,
    ]  # fmt: skip
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=vllm_env(), cwd=log.parent,
            start_new_session=True,
        )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_healthy(url, process, log)
        yield url
    finally:
        stop(process)


def vllm_env() -> dict[str, str]:
    """The environment of every process of vLLM."""
    env = os.environ | {"VLLM_PLUGINS": "wt", "VLLM_NO_USAGE_STATS": "1"}
    env.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    env.setdefault("WT_CPU_INPLACE", "1")  # as on a GPU: what is served lies as it was loaded
    return env


def wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise DemoFailed(f"the server died at its start; the end of its log:\n{tail(log)}")
        try:
            if httpx.get(f"{url}/health", trust_env=False).is_success:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.3)
    raise DemoFailed(f"no /health within {START_S:.0f} s; the end of its log:\n{tail(log)}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and its process group: with time to remove its shared memory, then without."""
    try:
        process.terminate()
        process.wait(STOP_S)
        wait_until_gone(process.pid)
    except subprocess.TimeoutExpired:
        pass
    finally:  # on a second ctrl-C too
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_until_gone(group: int) -> None:
    deadline = time.monotonic() + STOP_S
    with suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.1)


def tail(log: Path) -> str:
    return log.read_text(errors="replace")[-3000:]


def rollout(http: httpx.Client) -> list[Group]:
    """A group of samples per task, from whatever weights the server holds now."""
    body = {
        "model": "policy", "prompt": list(TASKS), "n": SAMPLES, "max_tokens": TOKENS,
        "temperature": 1.0, "top_p": 1.0, "ignore_eos": True,
        "logprobs": 0, "return_token_ids": True,
    }  # fmt: skip
    response = http.post("/v1/completions", json=body)
    if not response.is_success:
        raise DemoFailed(f"/v1/completions answered {response.status_code}: {response.text[:500]}")
    choices = response.json()["choices"]
    return [
        as_group(prompt, choices[i * SAMPLES : (i + 1) * SAMPLES]) for i, prompt in enumerate(TASKS)
    ]


def as_group(prompt: str, choices: list[dict[str, Any]]) -> Group:
    rewards = [sum(c in TASKS[prompt] for c in choice["text"]) / TOKENS for choice in choices]
    return Group(
        prompt=prompt,
        prompt_ids=choices[0]["prompt_token_ids"],
        tokens=torch.tensor([c["token_ids"] for c in choices]),
        logprobs=torch.tensor([c["logprobs"]["token_logprobs"] for c in choices]),
        rewards=torch.tensor(rewards),
        text=choices[0]["text"],
    )


def token_logprobs(model: Qwen3ForCausalLM, group: Group) -> Tensor:
    """The trainer's log-prob of each sampled token: [SAMPLES, TOKENS]."""
    ids = torch.tensor(group.prompt_ids, device=group.tokens.device)
    prompt = ids.expand(len(group.tokens), -1)
    logits = model(torch.cat([prompt, group.tokens], dim=1)).logits.float()
    scores = logits[:, prompt.shape[1] - 1 : -1].log_softmax(-1)
    chosen: Tensor = scores.gather(-1, group.tokens.unsqueeze(-1)).squeeze(-1)
    return chosen


def policy_loss(model: Qwen3ForCausalLM, group: Group) -> Tensor:
    """GRPO: samples better than their group's mean become likelier, within PPO's clip."""
    advantage = (group.rewards - group.rewards.mean()) / (group.rewards.std() + 1e-4)
    advantage = advantage.unsqueeze(-1)
    ratio = (token_logprobs(model, group) - group.logprobs).exp()
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    return -torch.minimum(ratio * advantage, clipped * advantage).mean()


def update(model: Qwen3ForCausalLM, optimizer: torch.optim.Optimizer, groups: list[Group]) -> None:
    for _ in range(UPDATES):
        optimizer.zero_grad()
        loss = torch.stack([policy_loss(model, g) for g in groups]).sum()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def logprob_gap(model: Qwen3ForCausalLM, groups: list[Group]) -> float:
    gaps = [(token_logprobs(model, g) - g.logprobs).abs().mean() for g in groups]
    return float(torch.stack(gaps).mean())


def train(model: Qwen3ForCausalLM, url: str, steps: int) -> list[Step]:
    """Roll out, update, push, `steps` times and FINE more; another rollout judges the last push."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    done: list[Step] = []
    version = ""
    with httpx.Client(base_url=url, timeout=120, trust_env=False) as http, WeightSync(url) as sync:
        print(HEADER)
        for step in range(1, steps + FINE + 1):
            fine = step > steps
            optimizer.param_groups[0]["lr"] = FINE_RATE if fine else LEARNING_RATE
            groups = rollout(http)
            gap = logprob_gap(model, groups)
            update(model, optimizer, groups)
            stale = logprob_gap(model, groups)
            # "auto" would choose by what either way took; here the sparse one is to be seen.
            report = sync.push(model, version=step, mode="sparse" if fine else "auto")
            took = report.seconds["total"] * 1e3
            done.append(Step(groups, gap, stale, report.bytes / 1e6, took, report.changed))
            version = http.get("/weight_info").json()["weight_version"]
            print(f"{step:>4}  {row(done[-1], version)}", flush=True)
            if version != str(step):
                raise DemoFailed(f"pushed version {step}, but the server serves {version!r}")
        groups = rollout(http)
        done.append(Step(groups, logprob_gap(model, groups)))
        print(f" end  {row(done[-1], version)}", flush=True)
    return done


HEADER = (
    "step  vowels digits     gap   stale changed pushed MB     ms  serves  what the server wrote"
)


def row(s: Step, version: str) -> str:
    rewards = " ".join(f"{g.reward:6.3f}" for g in s.groups)
    pushed = " " * 32
    if s.push_ms == s.push_ms:  # not the last row
        changed = "" if s.changed is None else f"{s.changed:.2%}"
        pushed = f"{s.stale:7.4f} {changed:>7} {s.pushed_mb:9.3f} {s.push_ms:6.1f}"
    texts = "  ".join("".join(c if " " < c <= "~" else "·" for c in g.text) for g in s.groups)
    return f"{rewards} {s.gap:7.4f} {pushed} {version:>7}  {texts}"


def check(steps: list[Step]) -> str:
    """The line that sums the run up, or DemoFailed."""
    widest = max(s.gap for s in steps)
    stale = statistics.median(s.stale for s in steps[:-1])
    if widest * DISTINCT > stale:
        raise DemoFailed(
            f"the server does not compute what was pushed: its log-probs are up to {widest:.4f} "
            f"nats per token off, and one version behind would be {stale:.4f}"
        )
    rises = []
    for i, task in enumerate(TASKS):
        curve = [s.groups[i].reward for s in steps]
        before, after = statistics.fmean(curve[:EDGE]), statistics.fmean(curve[-EDGE:])
        rises.append(f"{task.strip(': ')} {before:.2f} -> {after:.2f}")
        if after < before + RISE:
            raise DemoFailed(
                f"the reward did not rise by {RISE} between the first and last {EDGE} rollouts: "
                f"{rises[-1]} (mean over {SAMPLES * EDGE} samples each)"
            )
    return (
        f"{', '.join(rises)}; server and trainer at most {widest:.3f} nats per token apart "
        f"({stale:.2f} if it were one version behind)"
    )


def saved(steps: list[Step]) -> str:
    """What sending only what changed was good for in the last steps, or DemoFailed."""
    sparse = steps[-FINE - 1 : -1]
    sent, dense = sum(s.pushed_mb for s in sparse), FINE * steps[0].pushed_mb
    if any(s.changed is None for s in sparse) or sent > dense / 2:
        raise DemoFailed(f"sparse pushes saved little: {sent:.2f} of {dense:.2f} MB were sent")
    changed = statistics.fmean(s.changed or 0.0 for s in sparse)
    return f"{changed:.1%} changed at the small rate: {1 - sent / dense:.0%} of the bytes saved"


def plot(steps: list[Step], path: Path) -> None:
    """Rewards, log-prob gaps and push times over the version that the server held."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (reward, gap, push) = plt.subplots(
        3, 1, sharex=True, figsize=(8, 9), height_ratios=(3, 2, 2), layout="constrained"
    )
    versions = range(len(steps))
    for i, (task, colour) in enumerate(zip(TASKS, ("C0", "C1"), strict=True)):
        means = [s.groups[i].reward for s in steps]
        low, high = ([float(s.groups[i].rewards.quantile(q)) for s in steps] for q in (0.1, 0.9))
        reward.plot(versions, means, color=colour, label=f'prompt "{task.strip()}", mean')
        reward.fill_between(versions, low, high, color=colour, alpha=0.15, lw=0)
    reward.set(ylabel="share of characters\nof the asked kind", ylim=(-0.02, 1.02))
    reward.set_title(f"Reward ({SAMPLES} samples per prompt; shaded: 10th to 90th percentile)")
    reward.legend(loc="upper left")

    gap.plot(versions, [s.gap for s in steps], color="C2", label="weights pushed last")
    gap.plot(
        versions[:-1], [s.stale for s in steps[:-1]], color="C3", ls="--",
        label="one version behind, for comparison",
    )  # fmt: skip
    gap.set(ylabel="nats per token", yscale="log")
    gap.set_title("Distance of the server's log-probs from the trainer's")
    gap.legend()

    push.bar([v + 1 for v in versions[:-1]], [s.push_ms for s in steps[:-1]], color="C4")
    push.set(ylabel="milliseconds", xlabel="version that the server held")
    push.set_title(f"WeightSync.push, call to weights live ({steps[0].pushed_mb:.2f} MB, CPU)")
    for axis in (reward, gap, push):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def run(steps: int, seed: int, out: Path) -> str:
    out.mkdir(parents=True, exist_ok=True)
    png, log = out / "rl_loop.png", out / "rl_loop.server.log"
    torch.set_num_threads(1)  # the server's threads spin on the other cores
    model = build_model(seed)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        save_tokenizer(Path(folder))
        print(f"starting the server (log: {log})", flush=True)
        with served(Path(folder), log) as url:
            done = train(model, url, steps)
    plot(done, png)
    return f"{check(done)}; {saved(done)}; wrote {png}"


def main(demo: Callable[[int, int, Path], str] = run) -> int:
    parser = argparse.ArgumentParser(description="GRPO against a live vLLM server")
    parser.add_argument("--steps", type=int, default=30, help="at least 25 for the check to pass")
    parser.add_argument("--seed", type=int, default=0, help="of the model's first weights")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for PNG and log")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, terminated)
    start = time.monotonic()
    try:
        line = demo(max(1, args.steps), args.seed, args.out.resolve())
    except (DemoFailed, WeightSyncError, httpx.HTTPError) as exc:
        print(f"FAILED: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the server is stopped", file=sys.stderr)
        return 130
    print(f"ok: {line} ({time.monotonic() - start:.0f} s)")
    return 0


def terminated(signum: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM unwinds like ctrl-C, so that the server is stopped."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
