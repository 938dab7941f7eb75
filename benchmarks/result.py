"""The form every benchmark's result has: a JSON file with its claims, and a chart beside it."""

from __future__ import annotations

import datetime
import json
import platform
import statistics as st
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Result:
    """`rows`: {name: [milliseconds of each round]}; `claims`: what was aimed at, and held."""

    name: str
    rows: dict[str, list[float]] = field(default_factory=dict)
    phases: dict[str, dict[str, Any]] = field(default_factory=dict)  # of each row, ms
    facts: dict[str, Any] = field(default_factory=dict)
    claims: list[dict[str, Any]] = field(default_factory=list)

    def median(self, row: str) -> float:
        return st.median(self.rows[row])

    def claim(self, name: str, value: float, aim: float, *, at_least: bool = False) -> None:
        holds = value >= aim if at_least else value <= aim
        rounded = round(value, 3)
        self.claims.append({"name": name, "value": rounded, "aim": round(aim, 3), "holds": holds})
        print(f"CLAIM {name}: {value:.3f} (aim {'>=' if at_least else '<='} {aim:.3f}) {holds}",
              flush=True)  # fmt: skip

    def add(self, row: str, rounds: list[float]) -> None:
        self.rows[row] = [round(r, 3) for r in rounds]
        print(f"{row}: median {st.median(rounds):.2f} ms, "
              f"{min(rounds):.2f}-{max(rounds):.2f} over {len(rounds)}", flush=True)  # fmt: skip

    def add_phases(self, row: str, rounds: list[dict[str, float]]) -> None:
        """`rounds`: the milliseconds of each phase in each round."""
        names = dict.fromkeys(name for r in rounds for name in r)
        self.phases[row] = {}
        for name in names:
            ms = [r.get(name, 0.0) for r in rounds]
            spread = {"median": st.median(ms), "min": min(ms), "max": max(ms)}
            self.phases[row][name] = {k: round(v, 3) for k, v in spread.items()}
        shown = {n: p["median"] for n, p in self.phases[row].items()}
        print(f"phases of {row}: {shown}", flush=True)

    def write(
        self, folder: Path, draw: Callable[[dict[str, Any], Path], None] | None = None
    ) -> Path:
        """`<date>-<name>.json` and `.png` in `folder`; `draw`: another chart than bars."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{datetime.date.today()}-{self.name}.json"
        data = {
            "name": self.name, "date": str(datetime.date.today()), "machine": machine(),
            "facts": self.facts, "claims": self.claims,
            "medians_ms": {k: round(st.median(v), 3) for k, v in self.rows.items()},
            "phases_ms": self.phases, "rounds_ms": self.rows,
        }  # fmt: skip
        path.write_text(json.dumps(data, indent=1))
        (draw or chart)(data, path.with_suffix(".png"))
        return path


def machine() -> dict[str, Any]:
    import torch

    out: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        import vllm

        out["vllm"] = vllm.__version__
    except ImportError:
        pass
    if torch.cuda.is_available():
        out["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        out["driver"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout
        out["driver"] = out["driver"].split("\n")[0]
    return out


def chart(data: dict[str, Any], path: Path) -> None:
    """Horizontal bars of the medians, each with its value."""
    try:
        import matplotlib as mpl
    except ImportError:
        return  # on the GPU machine; `python -m benchmarks.result FILE…` draws later
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    medians: dict[str, float] = data["medians_ms"]
    names = list(medians)[::-1]
    fig, ax = plt.subplots(figsize=(9, 0.42 * len(names) + 1.6))
    bare = ("floor", "the same,")  # copies and broadcasts of as many bytes
    colors = [
        "#9aa0a6" if n.startswith(bare) else "#d98c3f" if "vLLM" in n else "#2f6fb0" for n in names
    ]
    ax.barh(names, [medians[n] for n in names], color=colors)
    for i, n in enumerate(names):
        ax.text(
            medians[n] + max(medians.values()) * 0.008,
            i,
            f"{medians[n]:,.1f}",
            va="center",
            fontsize=8,
        )
    ax.set_xlim(right=max(medians.values()) * 1.12)
    ax.set_xlabel(data["facts"].get("axis", "milliseconds per push (median)"))
    gpus = data["machine"].get("gpus", ["CPU"])
    version = data["machine"].get("vllm", "")
    ax.set_title(f"{data['name']}: {len(gpus)} x {gpus[0]}, vLLM {version}, {data['date']}",
                 fontsize=10)  # fmt: skip
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8)
    fig.tight_layout()
    fig.savefig(path, dpi=130)
    plt.close(fig)


if __name__ == "__main__":
    import sys

    for name in sys.argv[1:]:
        chart(json.loads(Path(name).read_text()), Path(name).with_suffix(".png"))
