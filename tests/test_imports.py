"""The arrows of the design: imports point down only, and a model runs without DeepSpeed.

Imports are read from the source, lazy ones inside functions included.  The checker itself is tested on made-up bad files.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

FLOORS = (
    {
        *("atomic", "config", "disk_errors", "distributed", "ds_config", "hashing", "launchers", "recipe_checks"),
        *("recipe_io", "stopping", "watchdog"),
    },
    {"backbones"},
    {"exits", "losses"},
    {"engines", "decoding", "data", "monitor", "gradients", "flops"},
    {"training", "evaluation", "planning"},
    {"launch"},
)
"""Rooms from the ground up; a room may import from its own floor and from those below."""

MAY_IMPORT_DEEPSPEED = {
    "free_dist.engines",
    "free_dist.distributed",
    "free_dist.training.checkpoint",
    "free_dist.training.checkpoint_state",
}
KEPT_FROM_DISTRIBUTION = {"backbones", "exits", "decoding", "data"}
"""Rooms that run in any process: no torch.distributed, not even through a module of ours."""

NEEDED_BEFORE_TORCH = {
    "atomic",
    "config",
    "disk_errors",
    "ds_config",
    "launchers",
    "recipe_checks",
    "recipe_io",
    "stopping",
}
"""Rooms that report a user's mistake before torch is imported."""

MAX_LINES = 400


def module_name(path: Path, root: Path) -> str:
    """``free_dist/data/shards.py`` -> ``free_dist.data.shards``."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(source: str, module: str, *, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that the source imports; ``from a import b`` gives ``a.b``."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = [*above, *([node.module] if node.module else [])]
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield node.lineno, "torch.distributed"


def room(module: str) -> str:
    """``free_dist.data.shards`` -> ``data``; ``launch.train`` -> ``launch``; ``free_dist`` itself -> the empty name."""
    first, _, rest = module.partition(".")
    return "launch" if first == "launch" else rest.partition(".")[0]


def floor(name: str) -> int | None:
    return next((number for number, rooms in enumerate(FLOORS) if name in rooms), None)


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """What is wrong with the imports of one module, one line each."""
    here = room(module)
    found = []
    if here and floor(here) is None:
        found.append(f"{module}: {here!r} stands on no floor; add it to FLOORS in tests/test_imports.py")
    for line, name in imported_modules(source, module, is_package=is_package):
        where = f"{module}:{line} imports {name}"
        if is_within(name, "free_dist") or is_within(name, "launch"):
            there = floor(room(name))
            if not here and room(name):
                found.append(
                    f"{where}: the package's own __init__ imports nothing, or every import would import it all"
                )
            elif here and there is not None and there > (floor(here) or 0):
                found.append(f"{where}: upward")
        if is_within(name, "deepspeed") and module not in MAY_IMPORT_DEEPSPEED:
            found.append(f"{where}: only {', '.join(sorted(MAY_IMPORT_DEEPSPEED))} may")
        if here in KEPT_FROM_DISTRIBUTION and (
            is_within(name, "torch.distributed") or is_within(name, "free_dist.distributed")
        ):
            found.append(f"{where}: {here} knows nothing of ranks")
        if here in NEEDED_BEFORE_TORCH and (is_within(name, "torch") or is_within(name, "transformers")):
            found.append(f"{where}: {here} must work before torch is imported")
    return found


def source_files() -> list[Path]:
    return sorted(path for folder in ("free_dist", "launch") for path in (REPOSITORY / folder).rglob("*.py"))


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_imports_point_down_only(path: Path) -> None:
    found = violations(path.read_text(), module_name(path, REPOSITORY), is_package=path.name == "__init__.py")
    assert not found, "\n".join(found)


def test_rooms_of_one_floor_do_not_import_each_other_in_a_circle() -> None:
    arrows: dict[str, set[str]] = {}
    for path in source_files():
        module = module_name(path, REPOSITORY)
        names = imported_modules(path.read_text(), module, is_package=path.name == "__init__.py")
        rooms = {room(name) for _, name in names if is_within(name, "free_dist")}
        arrows.setdefault(room(module), set()).update(rooms - {room(module)})
    assert not circles(arrows)


def circles(arrows: dict[str, set[str]]) -> set[str]:
    """Rooms that remain when rooms without outgoing arrows are taken away again and again."""
    remaining = dict(arrows)
    while leaves := [name for name, targets in remaining.items() if not targets & remaining.keys()]:
        for name in leaves:
            del remaining[name]
    return set(remaining)


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_no_file_has_two_subjects(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("free_dist.backbones.bad", "from free_dist.data.samples import Batch", "upward"),
        ("free_dist.backbones.bad", "from free_dist import exits", "upward"),
        ("free_dist.data.bad", "from ..training import step", "upward"),
        ("free_dist.exits.bad", "def f():\n    import free_dist.engines", "upward"),
        ("free_dist.training.bad", "import launch.train", "upward"),
        ("free_dist.training.bad", "import deepspeed", "only free_dist.distributed"),
        ("free_dist.decoding.bad", "from deepspeed.runtime import zero", "only free_dist.distributed"),
        ("free_dist.decoding.bad", "import torch.distributed as dist", "knows nothing of ranks"),
        ("free_dist.exits.bad", "from torch import distributed", "knows nothing of ranks"),
        ("free_dist.backbones.bad", "import torch\ntorch.distributed.barrier()", "knows nothing of ranks"),
        ("free_dist.data.bad", "from free_dist.distributed import rank", "knows nothing of ranks"),
        ("free_dist.config", "import torch", "before torch"),
        ("free_dist.cellar.bad", "", "stands on no floor"),
    ],
)
def test_checker_sees_a_forbidden_import(module: str, source: str, complaint: str) -> None:
    found = violations(source, module)
    assert len(found) == 1 and complaint in found[0]


def test_checker_resolves_relative_imports_of_a_package() -> None:
    assert violations("from ..engines import build", "free_dist.exits", is_package=True)
    assert not violations("from . import engines", "free_dist.exits", is_package=True)  # free_dist.exits.engines


def test_checker_keeps_the_root_package_empty() -> None:
    assert violations("from free_dist.data import samples", "free_dist", is_package=True)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "free_dist.training.step",
            "from free_dist.engines import Engines\nfrom free_dist.losses import generator_loss",
        ),
        ("free_dist.engines", "import deepspeed"),
        ("free_dist.losses", "from free_dist.exits import ExitBank"),
        ("free_dist.monitor", "from free_dist import __version__"),
        ("free_dist.training.finetune", "import torch\ntorch.distributed.barrier()"),
        ("launch.train", "from free_dist.training.step import adversarial_step"),
    ],
)
def test_checker_lets_a_downward_import_pass(module: str, source: str) -> None:
    assert violations(source, module) == []


def test_checker_sees_a_circle() -> None:
    assert circles({"engines": {"monitor"}, "monitor": {"engines"}, "data": {"monitor"}}) == {
        "engines",
        "monitor",
        "data",
    }
    assert circles({"engines": {"monitor"}, "monitor": set()}) == set()


def test_a_model_decodes_without_deepspeed() -> None:
    program = (
        "import sys\n"
        "sys.modules['deepspeed'] = None\n"  # makes any import of it an ImportError
        "import free_dist.decoding, free_dist.exits, free_dist.backbones, free_dist.data.stream\n"
        "print('imported')\n"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert finished.stdout == "imported\n", finished.stderr
