"""A run directory as the report finds it: its recipe, its exits, and what launchers measured, each file with the
command that makes it.

Reads JSON and says clearly what is wrong with it; does not know what is shown of it, nor models.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from free_dist.config import BackboneConfig, DataConfig, MissingFileError, Recipe, UserError
from free_dist.recipe_io import load_recipe

ROOT = Path(__file__).resolve().parents[2]
"""Of the repository: commands are typed there."""
RECIPE = "recipe.yaml"
LOG = "log.jsonl"
EXPORT = "export"
MANIFEST = "exits.json"
PROBES = "probes.json"
"""Accuracy per block that an evaluation found on the way."""
METHODS = ("exits", "exits_ce")
"""Training runs inside the directory of a quickstart, by the names they have in ``results.json``."""
ALONE = "ablation.json"
"""Ablations of a directory that holds nothing else."""
FORMAT = 1
"""The ``format`` that measured files carry."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One launcher and the file by which one sees that it ran."""

    name: str
    """What it does, in words."""
    file: str
    """Name in the run directory."""
    command: str
    """What to type; ``{run}`` is the run directory."""
    required: tuple[str, ...] = ()
    """Keys at the file's top level."""


STEPS = (
    Step(name="training and evaluation", file="results.json", command="python launch/quickstart.py run_dir={run}"),
    Step(
        name="comparison with other methods",
        file="comparison.json",
        command="python launch/compare.py {run}",
        required=("rows",),
    ),
    Step(
        name="placement under a budget",
        file="placement.json",
        command="python launch/place_exits.py {run}",
        required=("predicted", "measured", "baselines"),
    ),
    Step(
        name="mid-crisis and overthinking",
        file="mid_crisis.json",
        command="python launch/probe_depth.py {run} --fine-tune 80",
        required=("tasks",),
    ),
    Step(
        name="robustness, exit traces and cost breakdown",
        file="robustness.json",
        command="python launch/robustness.py {run}",
        required=("corruptions", "transfer", "ece", "length"),
    ),
    Step(
        name="ablations", file="ablation/ablation.json", command="python launch/ablate.py run_dir={run}/ablation"
    ),
)  # fmt: skip
"""Everything that is measured, in the order in which it is made."""


class UnreadableFile(UserError):
    """A measured file that is there and cannot be read."""

    def __init__(self, reason: str, command: str) -> None:
        super().__init__(f"{reason}; make it again: {command}")
        self.reason = reason
        """What is wrong with it, its path first."""


@dataclass(frozen=True, kw_only=True)
class RunDirectory:
    """The directory of a quickstart, of one training run or of an evaluation."""

    path: Path

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        """Raises MissingFileError where there is no directory, UserError where it holds nothing of a run."""
        path = Path(path)
        if not path.is_dir():
            raise MissingFileError(f"{path}: no such directory; give the directory of a run, such as runs/quickstart")
        known = [RECIPE, *(f"{method}/{RECIPE}" for method in METHODS), *(step.file for step in STEPS), ALONE]
        if not any((path / name).is_file() for name in known):
            raise UserError(
                f"{path} holds neither {RECIPE} nor anything measured: give the directory of a run, such as runs/quickstart"
            )
        return cls(path=path)

    def recipe(self, overrides: Sequence[str] = ()) -> Recipe:
        """The run's recipe with ``overrides``, its ``run_dir`` this directory; raises MissingFileError where it has
        none."""
        files = [self.path / RECIPE, *(self.path / method / RECIPE for method in METHODS)]
        found = next((file for file in files if file.is_file()), None)
        if found is None:
            raise MissingFileError(f"{self.path} has no {RECIPE}: give the directory of a run, such as runs/quickstart")
        return replace(load_recipe(found, overrides), run_dir=str(self.path))

    def exports(self) -> dict[str, Path]:
        """Method -> export of trained exits; raises MissingFileError where there is none."""
        found = {method: self.path / method / EXPORT for method in METHODS}
        found = {method: path for method, path in found.items() if (path / MANIFEST).is_file()}
        if (self.path / EXPORT / MANIFEST).is_file():
            found = {"exits": self.path / EXPORT} | found
        if not found:
            raise MissingFileError(
                f"{self.path} has no trained exits ({EXPORT}/{MANIFEST}, or that below {' or '.join(METHODS)}): train some, or "
                "give an export with --exits"
            )
        return found

    def logs(self) -> dict[str, Path]:
        """Name of a training run -> its log."""
        own = {self.path.name: self.path / LOG} | {method: self.path / method / LOG for method in METHODS}
        return {name: path for name, path in own.items() if path.is_file()}

    def manifests(self) -> dict[str, dict[str, Any]]:
        """Method -> ``exits.json``; empty without exits."""
        try:
            exports = self.exports()
        except MissingFileError:
            return {}
        return {method: dict(_json_object(path / MANIFEST)) for method, path in exports.items()}

    def command(self, step: Step) -> str:
        """What to type to do a step for this run.

        A training run of its own (its exits lie in ``export``) is evaluated; any other directory is a quickstart's.  To be
        typed in the repository's root, wherever the run is read from.
        """
        name = shlex.quote(str(_from_root(self.path)))
        if step is STEPS[0] and (self.path / EXPORT / MANIFEST).is_file():
            return f"python launch/evaluate.py --exits {name}/{EXPORT} --config {name}/{RECIPE} run_dir={name}"
        words = self._origins() if step.file.endswith(ALONE) else []
        return " ".join([step.command.replace("{run}", name), *map(shlex.quote, words)])

    def _origins(self) -> list[str]:
        """Backbone and data of the run as overrides, where they are not those of a recipe that names none."""
        try:
            recipe = self.recipe()
        except UserError:  # whoever needs the recipe says what is wrong with it
            return []
        fields = {
            "backbone.path": (recipe.backbone.path, BackboneConfig.path),
            "data.root": (recipe.data.root, DataConfig.root),
        }
        return [f"{key}={own}" for key, (own, default) in fields.items() if own != default]

    def place(self, file: str) -> Path:
        """Where a step's file lies, or would lie."""
        path, alone = self.path / file, self.path / ALONE
        return alone if path.name == ALONE and not path.is_file() and alone.is_file() else path

    def measured(self, file: str) -> dict[str, Any] | None:
        """What a step wrote, None if it did not; a list at the top level becomes ``rows``.

        Raises UnreadableFile naming the file for one that is no JSON, of another format, or lacks what it must have.
        """
        step = next(step for step in STEPS if step.file == file)
        path = self.place(file)
        if not path.is_file():
            return None
        again = self.command(step)
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise UnreadableFile(f"{path} is no JSON ({error})", again) from error
        if isinstance(content, list):
            content = {"rows": content}
        if not isinstance(content, dict) or content.get("format", FORMAT) != FORMAT:
            raise UnreadableFile(f"{path} is not of format {FORMAT}", again)
        missing = [key for key in step.required if key not in content]
        if missing:
            raise UnreadableFile(f"{path} lacks {missing[0]!r}", again)
        return content

    def probes(self) -> dict[str, dict[str, Any]]:
        """Task -> its tokens and curves, as ``mid_crisis.json`` has them; empty where no evaluation left any."""
        path = self.path / PROBES
        if not path.is_file():
            return {}
        try:
            return {
                one["task"]: {
                    "tokens": one["tokens"],
                    "curves": {
                        name: {k: {"accuracy": value} for k, value in curve["accuracy"].items()}
                        for name, curve in one["curves"].items()
                    },
                }
                for one in json.loads(path.read_text())
            }
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} holds no probes ({error}): evaluate the run again") from error


def _from_root(path: Path) -> Path:
    """A directory as the repository's root sees it: a run there knows itself by a relative name."""
    path = path.resolve()
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def or_user_error(build: Callable[[], Any], path: Path) -> Any:
    """What ``build`` makes of a file; what it stumbles over is a UserError naming the file."""
    try:
        return build()
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        if isinstance(error, UserError):
            raise
        what = f"lacks {error}" if isinstance(error, KeyError) else f"cannot be shown ({error})"
        raise UserError(f"{path} {what}: remove it and measure it again") from error


def _json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content
