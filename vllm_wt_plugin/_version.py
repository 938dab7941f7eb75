"""Which vLLM this plugin works in: asked before anything of vLLM's insides is imported."""

from __future__ import annotations

from vllm_wt_plugin.errors import UnsupportedVLLM

BELOW = (0, 34)
FROM = (0, 32)
FROM_ON_CPU = (0, 29)


def check() -> None:
    """Raise UnsupportedVLLM unless this vLLM is one the plugin was tried on."""
    import vllm
    from vllm.platforms import current_platform

    text = vllm.__version__
    try:
        version = tuple(int(p) for p in text.split("+")[0].split(".")[:2])
    except ValueError:
        version = ()
    cpu = current_platform.is_cpu()
    lowest = FROM_ON_CPU if cpu else FROM
    if not lowest <= version < BELOW:
        low, below = (".".join(map(str, v)) for v in (lowest, BELOW))
        raise UnsupportedVLLM(
            f"vLLM {text} is not supported{' on CPU' if cpu else ''}",
            next_step=f"install vLLM >= {low}, < {below}; its own backends stay in use until then",
        )
