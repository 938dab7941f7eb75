"""Pushes on a CPU, by model size and by changed share, beside vLLM's own reload and memcpy.

    python -m benchmarks.cpu --out benchmarks/results [--sizes 10M,30M,100M,300M,1B] [--rounds 5]

The measuring is `vllm-wt bench`'s: engine and trainer in one process for each size, one thread,
weights in place. Rows are times in ms; claims are ratios within rounds. 1B takes 11 GB.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.result import Result
from vllm_wt_plugin.bench import COPY, DENSE, RELOAD, SHARES, sparse
from vllm_wt_plugin.cli.bench import measure, parameters, ratio

ROWS = (COPY, DENSE, *map(sparse, SHARES), RELOAD)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--sizes", default="10M,30M,100M,300M,1B")
    ap.add_argument("--rounds", type=int, default=5)
    ap.add_argument("--out", type=Path, required=True)
    a = ap.parse_args()
    result = Result("cpu")
    for size in a.sizes.split(","):
        found = measure(parameters(size), a.rounds)
        for row in ROWS:
            result.add(f"{size}: {row}", found["rows"][row])
        result.facts[size] = {k: v for k, v in found.items() if k != "rows"} | {
            "times memcpy": {r: round(ratio(found, r, COPY), 3) for r in ROWS},
            "times faster than vLLM's reload": {
                r: round(ratio(found, RELOAD, r), 3) for r in ROWS if r != RELOAD
            },
        }
        claims(result, size, found)
        print("WROTE", result.write(a.out, chart), flush=True)  # each time: a run takes long


def claims(result: Result, size: str, found: dict[str, Any]) -> None:
    result.claim(f"{size}: dense push, times memcpy", ratio(found, DENSE, COPY), 1.25)
    result.claim(
        f"{size}: dense push, times faster than vLLM's reload", ratio(found, RELOAD, DENSE), 1,
        at_least=True,
    )  # fmt: skip
    result.claim(f"{size}: same bits as the trainer's after both", found["same"], 1, at_least=True)


def chart(data: dict[str, Any], path: Path) -> None:
    """How time grows with the model, and how it goes with the changed share."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    sizes, medians = list(data["facts"]), data["medians_ms"]
    count = [data["facts"][s]["parameters"] for s in sizes]
    fig, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6))
    colors = ["#9aa0a6", "#2f6fb0", "#7fc4a3", "#3f9e78", "#1c6b4c", "#d98c3f"]
    for row, color in zip(ROWS, colors, strict=True):
        left.plot(count, [medians[f"{s}: {row}"] for s in sizes], "o-", color=color, label=row)
    left.set(xscale="log", yscale="log", xlabel="parameters (bfloat16)", ylabel="ms (median)")
    left.set_ylim(top=left.get_ylim()[1] * 8)
    left.legend(fontsize=8, frameon=False, ncols=2, loc="upper left")
    shades = plt.get_cmap("Blues")
    for i, s in enumerate(sizes):
        shares = [medians[f"{s}: {sparse(x)}"] / medians[f"{s}: {DENSE}"] for x in SHARES]
        shade = shades(0.35 + 0.6 * i / max(1, len(sizes) - 1))
        right.plot([x * 100 for x in SHARES], shares, "o-", color=shade, label=s)
    right.axhline(1, color="#9aa0a6", lw=1, ls="--")
    right.set(xscale="log", yscale="log", xlabel="% of the elements changed",
              ylabel="time of a sparse push / of a dense one")  # fmt: skip
    right.legend(fontsize=8, frameon=False, title="parameters", title_fontsize=8)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, lw=0.5)
    version = data["machine"].get("vllm", "")
    fig.suptitle(f"{data['name']}: one CPU thread, vLLM {version}, {data['date']}", fontsize=10)
    fig.tight_layout()
    fig.savefig(path, dpi=130)
    plt.close(fig)


if __name__ == "__main__":
    main()
