"""Recipes on their way in and out: defaults <- YAML files <- dotted overrides; saved copies; the command line's help.

OmegaConf converts the values (PyYAML alone would read ``1e-5`` as a string).  Imports no torch.  Does not know what any field
means: that is ``free_dist.config``.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from yaml import YAMLError

from free_dist.atomic import write_atomically
from free_dist.config import ConfigError, Recipe, UserError, nearest
from free_dist.disk_errors import disk_error
from free_dist.recipe_checks import check_recipe

HELP_WIDTH = 100
"""Columns of the field list in ``--help``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeField:
    """One field that YAML and overrides can set."""

    name: str
    """Dotted, such as ``training.max_steps``."""
    wanted: str
    """Its type, as it is written in ``free_dist.config``."""
    default: object
    doc: str
    """The docstring under it."""
    is_text: bool
    is_mapping: bool


def load_recipe(paths: str | Path | Sequence[str | Path] | None, overrides: Sequence[str] = ()) -> Recipe:
    """Defaults <- YAML file, or several of which a later one wins <- overrides such as ``training.max_steps=10``, checked.

    A mapping given whole (``data.tasks={vqa: 1}``) replaces the default; a dotted key (``data.tasks.caption=0``) changes one
    entry.  Raises ConfigError naming the file or override, the field and the nearest valid name or the wanted type.
    """
    config = OmegaConf.structured(Recipe)
    for path in [paths] if isinstance(paths, str | Path) else paths or ():
        for name, value in _leaves(_read_yaml(Path(path)), "", str(path)):
            _assign(config, name, value, source=str(path))
    for override in overrides:
        name, value = _parse_override(override)
        _assign(config, name, value, source=f"override {override!r}")
    try:
        recipe = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {_first_line(error)}") from error
    assert isinstance(recipe, Recipe)
    check_recipe(recipe)
    return recipe


def save_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write every field of the recipe as YAML, atomically; :func:`load_recipe` gives the same recipe back."""
    write_atomically(Path(path), OmegaConf.to_yaml(OmegaConf.structured(recipe)).encode())


def add_recipe_arguments(parser: argparse.ArgumentParser, *, default: str = "built in") -> None:
    """Add ``--config FILE`` and the overrides to a launcher's parser, and the list of all fields below its ``--help``.

    Parse with ``parser.parse_intermixed_args()``, so that overrides may stand before and after flags.
    """
    parser.add_argument(
        "--config",
        action="append",
        metavar="FILE",
        help="recipe YAML, such as those in launch/recipes; given twice, the second file's fields win, so that a backbone's "
        f"and a task's make one recipe; default: {default}",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="recipe fields to change, such as training.max_steps=100"
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "\n\n".join(part for part in (parser.epilog, recipe_help()) if part)


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """The flag ``--device``: where a frozen model runs."""
    parser.add_argument(
        "--device", default="cpu", help="where the model runs: cpu, cuda, cuda:1 (default: %(default)s)"
    )


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags ``--device`` and ``--dtype``: where a frozen model runs, and in which type."""
    add_device_argument(parser)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16", "auto"), default="float32",
        help="type of the model's weights; auto is the checkpoint's own (default: %(default)s)",
    )  # fmt: skip


def open_share(text: str) -> float:
    """A command-line value strictly between 0 and 1."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text}: want a number between 0 and 1, such as 0.01")
    return value


def positive_integer(text: str) -> int:
    """A command-line value of at least 1; argparse shows the error."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: want at least 1")
    return value


def recipe_help() -> str:
    """Every field of a recipe: dotted name, type, default, and the docstring under it."""
    lines = ["recipe fields (KEY: type = default), for --config files and KEY=VALUE overrides:"]
    for known in recipe_fields():
        lines.append(f"  {known.name}: {known.wanted} = {known.default!r}")
        lines += textwrap.wrap(
            known.doc.replace("``", "'"), HELP_WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6
        )
    return "\n".join(lines)


@contextmanager
def fail_clearly(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Turn a UserError into one line on standard error and its exit code: 2, argparse's own, unless it says otherwise.

    A disk that is full or closed to this user counts as one.  Every other exception keeps its traceback, because it is a defect.
    """
    try:
        yield
    except UserError as error:
        parser.exit(error.exit_code, f"{parser.prog}: error: {error}\n")
    except (OSError, RuntimeError, SafetensorError) as error:
        said = disk_error(error)
        if said is None:
            raise
        parser.exit(2, f"{parser.prog}: error: {said}\n")


@cache
def recipe_fields() -> tuple[RecipeField, ...]:
    """All settable fields in the order of declaration."""
    return tuple(_fields_of(Recipe, ""))


def _fields_of(section: type, prefix: str) -> Iterator[RecipeField]:
    hints, written, docs = get_type_hints(section), inspect.get_annotations(section), _field_docs(section)
    for entry in dataclasses.fields(section):
        if dataclasses.is_dataclass(hints[entry.name]):
            yield from _fields_of(hints[entry.name], f"{prefix}{entry.name}.")
            continue
        default = entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
        yield RecipeField(
            name=prefix + entry.name,
            wanted=str(written[entry.name]),
            default=default,
            doc=docs[entry.name],
            is_text=hints[entry.name] is str,
            is_mapping=get_origin(hints[entry.name]) is dict,
        )


def _field_docs(section: type) -> dict[str, str]:
    # A docstring under a field is a bare string statement that Python forgets; only the source still has it.
    tree = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0]
    assert isinstance(tree, ast.ClassDef)
    docs: dict[str, str] = {}
    name = None
    for statement in tree.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            name = statement.target.id
            docs[name] = ""
        elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) and name is not None:
            docs[name] = " ".join(str(statement.value.value).split())
            name = None
    return docs


def _read_yaml(path: Path) -> Mapping[Any, Any]:
    try:
        content = OmegaConf.load(path)
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read: {error.strerror}") from error
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"--config {path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, DictConfig):
        raise ConfigError(f"--config {path}: want KEY: VALUE lines at the top level, found a list")
    plain = OmegaConf.to_container(content, resolve=False)
    assert isinstance(plain, dict)
    return plain


def _leaves(section: Mapping[Any, Any], prefix: str, source: str) -> Iterator[tuple[str, object]]:
    """Dotted name and value of every field that a nested mapping sets."""
    sections = _section_names()
    for key, value in section.items():
        name = f"{prefix}{key}"
        if name not in sections:
            yield name, value
        elif value is None:  # an empty section
            continue
        elif isinstance(value, Mapping):
            yield from _leaves(value, f"{name}.", source)
        else:
            raise ConfigError(f"{source}: {name}={value!r}: this is a section, want KEY: VALUE lines under it")


def _parse_override(override: str) -> tuple[str, object]:
    name, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"override {override!r}: want KEY=VALUE, such as training.max_steps=100")
    if any(known.name == name and known.is_text for known in recipe_fields()):
        return name, text  # a prompt may hold colons and braces, which YAML would read as a mapping
    try:
        return name, OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index, call-overload]
    except YAMLError as error:
        raise ConfigError(f"override {override!r}: {text!r} is not a valid YAML value") from error


def _assign(config: DictConfig, name: str, value: object, *, source: str) -> None:
    known = {entry.name: entry for entry in recipe_fields()}
    owner = known.get(name) or known.get(name.rpartition(".")[0])
    if name in _section_names():
        raise ConfigError(f"{source}: {name} is a section; set its fields one by one, as in {name}.FIELD=VALUE")
    if owner is None or not (owner.name == name or owner.is_mapping):
        candidates = _section_names() if isinstance(value, Mapping) and "." not in name else list(known)
        raise ConfigError(f"{source}: {name}: no such field; did you mean {nearest(name, candidates)}?")
    try:
        OmegaConf.update(config, name, value, merge=False)
    except OmegaConfBaseException as error:
        inside = f": {_first_line(error)}" if isinstance(value, list | dict) else ""
        wanted = f"want {owner.wanted}, found {type(value).__name__}{inside}"
        raise ConfigError(f"{source}: {name}={value!r}: {wanted}") from error


def _section_names() -> list[str]:
    return list(dict.fromkeys(known.name.rpartition(".")[0] for known in recipe_fields() if "." in known.name))


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
