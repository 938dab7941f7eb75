"""The package as a whole: what imports what, what no module may contain, what is public."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

import vllm_wt_plugin

ROOT = Path(vllm_wt_plugin.__file__).parent
PACKAGE = ROOT.name
PROJECT = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())
MODULES = sorted(p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*.py"))
MAX_LINES = 400

# What a module may import beside the standard library; the first pattern that fits counts.
# Names without a dot are distributions, the others parts of this package.
MAY_IMPORT = {
    "errors.py": set(),
    "__init__.py": {".errors", ".sparse.patch", ".trainer", ".bridge"},
    "_pynccl.py": {".errors", ".transport.pynccl", "torch", "vllm"},
    "_version.py": {".errors", "vllm"},
    "_vllm.py": {".errors", ".wire.params", ".worker.plan", "safetensors", "torch", "vllm"},
    "wire/*": {".errors", ".wire", "msgspec"},
    "sparse/cuda_diff.py": {".sparse", "torch", "triton"},
    "sparse/kernels.py": {".sparse", "torch", "triton"},
    "sparse/cuda_sums.py": {".sparse", "torch", "triton"},
    "sparse/*": {".errors", ".wire", ".sparse", "torch"},
    "transport/*": {".errors", ".wire", ".transport", "torch"},
    "trainer/actors.py": {".errors", ".wire", "msgspec", "ray"},
    "trainer/*": {
        ".errors", ".wire", ".sparse", ".transport", ".trainer", "torch", "msgspec",
    },
    "actor.py": {".errors", ".wire", ".trainer.client", ".server", "msgspec"},
    "bridge/model.py": {".errors", ".wire", ".trainer", "torch"},
    "bridge/*": {".errors", ".wire", ".transport", ".trainer", ".bridge", "torch", "msgspec"},
    "compat/*": {
        ".errors", ".wire", ".sparse", ".transport", ".trainer", ".compat", "._pynccl", "torch",
        "msgspec", "ray",
    },
    "bench.py": {".trainer.sync", "torch", "transformers", "vllm"},
    "cli/*": {
        ".bench", ".errors", ".wire", ".transport", ".trainer", ".server.access", ".cli", "torch",
        "msgspec", "typer", "rich",
    },
    "server/*": {
        ".errors", ".wire", ".server", "._vllm", "._version", "msgspec", "fastapi", "starlette",
        "prometheus_client",
    },
    "worker/plan/kernels.py": {".worker.plan", "torch", "triton"},
    "worker/plan/*": {".errors", ".wire", ".worker.plan", "torch"},
    "worker/known.py": {".errors", ".wire", ".transport", ".worker", "torch"},
    "worker/open.py": {".errors", ".wire", ".worker", "torch"},
    "worker/session.py": {".errors", ".wire", ".transport", ".worker", "torch", "msgspec"},
    "worker/places.py": {".errors", ".wire", ".sparse", ".worker", "torch", "msgspec"},
    "worker/patches.py": {".errors", ".wire", ".sparse", ".transport", ".worker", "torch"},
    "worker/export.py": {".errors", ".wire", ".transport", ".worker", "torch"},
    "worker/packed.py": {".errors", ".wire", ".sparse", ".transport", ".worker", "torch"},
    "worker/engine.py": {
        ".errors", ".wire", ".sparse", ".transport", ".worker", "._vllm", "._pynccl", "torch",
        "msgspec", "vllm",
    },
    "worker/*": {
        ".errors", ".wire", ".transport", ".worker", "._vllm", "._version", "torch", "msgspec",
        "vllm",
    },
}  # fmt: skip
# Only these know vLLM; of them only _vllm.py what differs between versions.
KNOW_VLLM = {
    "_pynccl.py", "_version.py", "_vllm.py", "worker/engine.py", "worker/register.py",
    "worker/cpu_inplace.py", "worker/core.py", "worker/lifecycle.py", "bench.py",
}  # fmt: skip
HEAVY = {"vllm", "triton", "fastapi", "starlette", "safetensors", "transformers", "ray"}


def tree(module: str) -> ast.Module:
    return ast.parse((ROOT / module).read_text())


def imports(module: str) -> Iterator[tuple[str, int]]:
    """Full names of what a module imports anywhere in it, with lines."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from ((a.name, node.lineno) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: relative import"
            yield from ((f"{node.module}.{a.name}", node.lineno) for a in node.names)


def allowed(module: str) -> set[str]:
    return next(names for pattern, names in MAY_IMPORT.items() if fnmatch(module, pattern))


def fits(name: str, allowed: set[str]) -> bool:
    if name.partition(".")[0] in sys.stdlib_module_names | {"_posixshmem"}:
        return True
    if name.partition(".")[0] == PACKAGE:
        name = name.removeprefix(PACKAGE)
    return any(name == a or name.startswith(a + ".") for a in allowed)


@pytest.mark.parametrize("module", MODULES)
def test_imports_stay_within_their_bounds(module: str) -> None:
    wrong = [f"{module}:{line}: {n}" for n, line in imports(module) if not fits(n, allowed(module))]
    assert wrong == []


def test_few_modules_know_vllm() -> None:
    knowing = {m for m in MODULES for n, _ in imports(m) if n.partition(".")[0] == "vllm"}
    assert knowing <= KNOW_VLLM


def test_the_bounds_are_lint_rules_too() -> None:
    """`ruff check` says it while one types."""
    for folder, banned in {
        "wire": {"torch", "vllm", f"{PACKAGE}.worker"},
        "transport": {"vllm", f"{PACKAGE}.trainer", f"{PACKAGE}.worker"},
        "trainer": {"vllm", f"{PACKAGE}.worker", f"{PACKAGE}.server"},
        "worker": {f"{PACKAGE}.trainer", f"{PACKAGE}.server"},
        "worker/plan": {"vllm", f"{PACKAGE}.trainer"},
        "server": {f"{PACKAGE}.trainer", f"{PACKAGE}.worker"},
        "bridge": {"vllm", f"{PACKAGE}.worker", f"{PACKAGE}.server"},
    }.items():
        rules = tomllib.loads((ROOT / folder / "ruff.toml").read_text())
        assert banned | {"pickle"} <= rules["lint"]["flake8-tidy-imports"]["banned-api"].keys()


def test_importing_loads_nothing_heavy() -> None:
    """All that runs without vLLM: a trainer's side, the plan and the session, and their tests."""
    modules = [
        PACKAGE, f"{PACKAGE}.wire.exchange", f"{PACKAGE}.transport.ipc",
        f"{PACKAGE}.worker.session",
        f"{PACKAGE}.worker.plan.update", "tests.unit.test_plan", "tests.unit.test_session",
    ]  # fmt: skip
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    print(name, *sorted({m.partition('.')[0] for m in sys.modules}))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, *modules],
        check=True, capture_output=True, text=True, timeout=60, cwd=ROOT.parent,
    )  # fmt: skip
    for line in out.stdout.splitlines():
        name, *loaded = line.split()
        assert HEAVY & set(loaded) == set(), name


def test_the_errors_need_nothing_at_all() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import errors; print('torch' in sys.modules)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(ROOT)],
        check=True, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert out.stdout.strip() == "False"


# ---- what no module contains --------------------------------------------------------------


def is_broad(handler: ast.ExceptHandler) -> bool:
    names = [handler.type] if not isinstance(handler.type, ast.Tuple) else handler.type.elts
    return any(
        n is None or (isinstance(n, ast.Name) and n.id in ("Exception", "BaseException"))
        for n in names
    )


def is_nothing(node: ast.stmt) -> bool:
    constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return constant or isinstance(node, ast.Pass | ast.Continue)


@pytest.mark.parametrize("module", MODULES)
def test_habits(module: str) -> None:
    found = []
    for node in ast.walk(tree(module)):
        match node:
            case ast.Assert():
                found.append((node.lineno, "assert"))
            case ast.ExceptHandler() if is_broad(node) and all(map(is_nothing, node.body)):
                found.append((node.lineno, "a broad except that says nothing"))
            case ast.ExceptHandler(type=None):
                found.append((node.lineno, "a bare except"))
            case ast.Call(func=ast.Name(id="print" | "eval" | "exec" | "__import__" as name)):
                found.append((node.lineno, name))
            case ast.Call(func=ast.Attribute(attr="suppress"), args=args) if any(
                isinstance(a, ast.Name) and a.id in ("Exception", "BaseException") for a in args
            ):
                found.append((node.lineno, "suppresses everything"))
            case ast.Attribute(value=ast.Name(id="torch"), attr="load" | "save" as name):
                found.append((node.lineno, f"torch.{name} is pickle"))
    pickles = [line for n, line in imports(module) if n.partition(".")[0] in PICKLES]
    assert found == []
    assert len(pickles) == (module == "wire/pickled.py")  # which reads one as data


PICKLES = {"pickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve"}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_one_noun(module: str) -> None:
    assert len((ROOT / module).read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is(module: str) -> None:
    text = (ROOT / module).read_text()
    assert not text.strip() or ast.get_docstring(tree(module))


def test_modules_are_short_as_a_rule() -> None:
    lines = sorted(len((ROOT / m).read_text().splitlines()) for m in MODULES)
    assert lines[len(lines) // 2] <= 200


# ---- what is public -----------------------------------------------------------------------


def test_all_is_sorted_and_there() -> None:
    names = vllm_wt_plugin.__all__
    assert list(names) == sorted(names)
    assert len(set(names)) == len(names)
    assert [n for n in names if not hasattr(vllm_wt_plugin, n)] == []


@pytest.mark.parametrize("module", MODULES)
def test_other_lists_of_names_are_sorted(module: str) -> None:
    for node in tree(module).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names = ast.literal_eval(node.value)
            assert names == sorted(names)


def test_every_error_is_public() -> None:
    from vllm_wt_plugin.errors import BY_CODE

    assert BY_CODE.keys() <= set(vllm_wt_plugin.__all__)


@pytest.mark.parametrize("group", ["vllm.general_plugins", "vllm.endpoint_plugins"])
def test_entry_points_name_what_exists(group: str) -> None:
    """Read, not imported: the server's needs fastapi, and what it does is tested elsewhere."""
    points = PROJECT["project"]["entry-points"][group]
    assert points.keys() == {"wt"}
    name, _, attribute = points["wt"].partition(":")
    path = ROOT.parent / (name.replace(".", "/") + ".py")
    defined = {
        *(n.name for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)),
        *(
            ast.unparse(t)
            for n in ast.parse(path.read_text()).body
            if isinstance(n, ast.Assign)
            for t in n.targets
        ),
    }
    assert attribute in defined


def test_registering_needs_no_vllm_to_be_imported() -> None:
    register = importlib.import_module("vllm_wt_plugin.worker.register")
    assert callable(register.register)


def test_typed() -> None:
    assert (ROOT / "py.typed").exists()
