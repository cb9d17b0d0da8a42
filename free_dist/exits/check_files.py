"""Fitted checks on disk, beside the exits they belong to: ``checks.safetensors`` and ``checks.json``.

The frozen head is not stored: a pruned head is a list of token ids, a low-rank screen two thin factors, so any size up to
the fitted one can be chosen at loading.  The JSON is written last and holds the checksums of the weights and of the exits.
Does not know how checks are fitted or when they are asked.

Shape letters: K exits, P answer positions, D model width, V vocabulary.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from free_dist.atomic import write_atomically
from free_dist.backbones import Backbone
from free_dist.config import ConfigError, MissingFileError
from free_dist.exits.classifier import FeatureClassifiers
from free_dist.exits.export import ExportError, read_exits_manifest
from free_dist.exits.gate import (
    CheckOptions,
    ExitChecks,
    FullHead,
    LowRankHead,
    OwnHeads,
    PrunedHead,
    full_head,
    linear_head,
)
from free_dist.exits.transformer import ExitBank

FORMAT_VERSION = 1
WEIGHTS = "checks.safetensors"
MANIFEST = "checks.json"

Table = tuple[tuple[bool, ...], ...]
"""[K][P]; the last column stands for all later answer positions too."""


@dataclass(frozen=True, kw_only=True)
class FittedChecks:
    """Everything that fitting yields, whichever options are switched on later."""

    gates: FeatureClassifiers
    """On the layer-normalised ``h_k``; float32."""
    gate_thresholds: tuple[float, ...]
    """Probability per exit above which its gate opens."""
    discriminators: FeatureClassifiers
    """On the normed exit feature; float32."""
    discriminator_thresholds: tuple[float, ...]
    """Probability per exit above which a feature goes on to the head."""
    token_order: Tensor
    """[V] int64: every token, the most frequent of the training answers first."""
    pruned_size: int
    """Rows of the pruned head where the options do not say."""
    down: Tensor
    """[rank, D] of the screen; its first r rows, with the first r columns of ``lift``, are the screen of rank r."""
    lift: Tensor
    """[D, rank]."""
    screen_rank: int
    """Rank of the screen where the options do not say."""
    thresholds: tuple[float, ...]
    """Confidence threshold per exit that gates and ``worthwhile`` were fitted for."""
    worthwhile: dict[str, dict[str, Table]]
    """Task -> setting of the checks (:attr:`CheckOptions.setting`) -> whether asking exit k pays at answer position p."""

    def position_thresholds(
        self, options: CheckOptions, task: str, thresholds: Sequence[float] | None = None
    ) -> tuple[tuple[float, ...], ...]:
        """[K][P] confidence thresholds: the exit's own where asking it pays, 1 (never emits, never asked) elsewhere.

        ``thresholds`` replace those that the checks were fitted for; where asking pays is not estimated anew.  Raises
        ConfigError for a task that the checks were not fitted on.
        """
        if task not in self.worthwhile:
            raise ConfigError(
                f"task {task!r}: where asking pays was fitted for {', '.join(self.worthwhile) or 'no task'}"
            )
        given = self.thresholds if thresholds is None else thresholds
        return tuple(
            tuple(float(threshold) if pays else 1.0 for pays in row)
            for threshold, row in zip(given, self.worthwhile[task][options.setting], strict=True)
        )


@dataclass(frozen=True, kw_only=True)
class ChecksManifest:
    """What ``checks.json`` says."""

    format_version: int
    exits_sha256: str
    """Checksum of the ``exits.safetensors`` that the checks were fitted to."""
    weights_sha256: str
    """Of ``checks.safetensors``."""
    exit_layers: tuple[int, ...]
    gate_hidden_size: int
    discriminator_hidden_size: int
    gate_thresholds: tuple[float, ...]
    discriminator_thresholds: tuple[float, ...]
    pruned_size: int
    rank: int
    """Of the stored factors."""
    screen_rank: int
    thresholds: tuple[float, ...]
    worthwhile: dict[str, dict[str, Table]]
    extra: dict[str, Any] = field(default_factory=dict)
    """Whatever the fitting wants to keep: data, rows, wanted recall, what was measured on held-out rows."""


def save_checks(directory: str | Path, fitted: FittedChecks, extra: dict[str, Any] | None = None) -> None:
    """Write the checks beside the exits in ``directory``; ``extra`` is JSON.

    Raises what :func:`~free_dist.exits.export.read_exits_manifest` raises where no export lies.
    """
    exits = read_exits_manifest(directory)
    weights = save({name: tensor.detach().cpu().contiguous() for name, tensor in _tensors(fitted).items()})
    manifest = ChecksManifest(
        format_version=FORMAT_VERSION,
        exits_sha256=exits.weights_sha256,
        weights_sha256=hashlib.sha256(weights).hexdigest(),
        exit_layers=exits.exit_layers,
        gate_hidden_size=fitted.gates.weight_in.shape[2],
        discriminator_hidden_size=fitted.discriminators.weight_in.shape[2],
        gate_thresholds=fitted.gate_thresholds,
        discriminator_thresholds=fitted.discriminator_thresholds,
        pruned_size=fitted.pruned_size,
        rank=len(fitted.down),
        screen_rank=fitted.screen_rank,
        thresholds=fitted.thresholds,
        worthwhile=fitted.worthwhile,
        extra=extra or {},
    )
    content = json.dumps(asdict(manifest), indent=2, allow_nan=False).encode() + b"\n"
    write_atomically(Path(directory) / WEIGHTS, weights)
    write_atomically(Path(directory) / MANIFEST, content)


def read_checks_manifest(directory: str | Path) -> ChecksManifest:
    """What the checks in ``directory`` say about themselves; raises MissingFileError or ExportError."""
    path = Path(directory) / MANIFEST
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist: fit the checks with launch/fit_checks.py --exits {directory}")
    try:
        content = json.loads(path.read_text())
        manifest = ChecksManifest(**content)
        lists = ("exit_layers", "gate_thresholds", "discriminator_thresholds", "thresholds")
        tuples: dict[str, Any] = {name: tuple(content[name]) for name in lists}
        tuples["worthwhile"] = {
            task: {setting: tuple(tuple(row) for row in table) for setting, table in tables.items()}
            for task, tables in manifest.worthwhile.items()
        }
    except (json.JSONDecodeError, TypeError, AttributeError) as error:
        raise ExportError(f"{path} is not a checks manifest ({error}); fit the checks again") from error
    if manifest.format_version != FORMAT_VERSION:
        raise ExportError(f"{path}: format {manifest.format_version}; this version reads format {FORMAT_VERSION}")
    return ChecksManifest(**content | tuples)


def load_fitted(directory: str | Path, backbone: Backbone, bank: ExitBank) -> FittedChecks:
    """The checks beside the exits ``bank``, which hang on ``backbone``; float32 on the CPU.

    Raises MissingFileError for a missing file and ExportError for a damaged one, or one that belongs to other exits.
    """
    manifest = read_checks_manifest(directory)
    path = Path(directory) / WEIGHTS
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist although {MANIFEST} does: fit the checks again")
    exits = read_exits_manifest(directory)
    if manifest.exits_sha256 != exits.weights_sha256:
        raise ExportError(
            f"{path} was fitted to exits with checksum {manifest.exits_sha256[:12]}, those beside it have "
            f"{exits.weights_sha256[:12]}: fit the checks again with launch/fit_checks.py --exits {directory}"
        )
    if manifest.exit_layers != bank.exit_layers:
        raise ExportError(
            f"{path} belongs to exits after blocks {list(manifest.exit_layers)}, these are after "
            f"{list(bank.exit_layers)}: load both from one directory"
        )
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != manifest.weights_sha256:
        raise ExportError(f"{path} does not match the checksum in {MANIFEST}: it is damaged or from another fit")
    fitted = _empty(manifest, backbone)
    tensors, wanted = load(content), _tensors(fitted)
    for name, tensor in wanted.items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            found = list(tensors[name].shape) if name in tensors else "missing"
            raise ExportError(f"{path}: {name} is {found}, wanted {list(tensor.shape)}: fit the checks again")
        tensor.copy_(tensors[name])
    return fitted


def build_checks(bank: ExitBank, fitted: FittedChecks, options: CheckOptions) -> ExitChecks:
    """Fitted checks and what is switched on -> checks on the bank's device, frozen; heads in the bank's own type.

    Raises ConfigError for options that go beyond what was fitted.
    """
    head: FullHead | OwnHeads | PrunedHead | LowRankHead
    if options.head == "pruned":
        size = fitted.pruned_size if options.pruned_size is None else options.pruned_size
        if size > len(fitted.token_order):
            raise ConfigError(f"pruned_size={size}: the vocabulary has {len(fitted.token_order)} tokens")
        head = PrunedHead(linear_head(bank), fitted.token_order[:size])
    elif options.head == "low_rank":
        rank = fitted.screen_rank if options.rank is None else options.rank
        if rank > len(fitted.down):
            raise ConfigError(f"rank={rank}: factors of rank {len(fitted.down)} were fitted; fit again with more")
        head = LowRankHead(linear_head(bank), fitted.down[:rank], fitted.lift[:, :rank], options.rescored)
    else:
        head = full_head(bank)

    device = next(bank.transformers.parameters()).device

    def copied(classifiers: FeatureClassifiers) -> FeatureClassifiers:
        return copy.deepcopy(classifiers).to(device).requires_grad_(False)

    n_exits = len(bank.exit_layers)
    checks = ExitChecks(
        head,
        gates=copied(fitted.gates) if options.gate else None,
        gate_thresholds=_per_exit("gate_threshold", options.gate_threshold, fitted.gate_thresholds, n_exits),
        discriminators=copied(fitted.discriminators) if options.discriminator else None,
        discriminator_thresholds=_per_exit(
            "discriminator_threshold", options.discriminator_threshold, fitted.discriminator_thresholds, n_exits
        ),
    )
    return checks.eval()


def load_checks(directory: str | Path, backbone: Backbone, bank: ExitBank, options: CheckOptions) -> ExitChecks:
    """:func:`load_fitted` and :func:`build_checks` in one; raises what they raise."""
    return build_checks(bank, load_fitted(directory, backbone, bank), options)


def _tensors(fitted: FittedChecks) -> dict[str, Tensor]:
    """Name in the file -> tensor."""
    tensors = {"token_order": fitted.token_order, "screen.down": fitted.down, "screen.lift": fitted.lift}
    for group, classifiers in (("gates", fitted.gates), ("discriminators", fitted.discriminators)):
        tensors |= {f"{group}.{name}": tensor for name, tensor in classifiers.state_dict().items()}
    return tensors


def _empty(manifest: ChecksManifest, backbone: Backbone) -> FittedChecks:
    """What the manifest says, with tensors of the right shapes and no content."""
    n_exits, width, rank = len(manifest.exit_layers), backbone.hidden_size, manifest.rank
    return FittedChecks(
        gates=FeatureClassifiers(n_exits, width, manifest.gate_hidden_size).requires_grad_(False),
        gate_thresholds=manifest.gate_thresholds,
        discriminators=FeatureClassifiers(n_exits, width, manifest.discriminator_hidden_size).requires_grad_(False),
        discriminator_thresholds=manifest.discriminator_thresholds,
        token_order=torch.empty(backbone.vocab_size, dtype=torch.long),
        pruned_size=manifest.pruned_size,
        down=torch.empty(rank, width),
        lift=torch.empty(width, rank),
        screen_rank=manifest.screen_rank,
        thresholds=manifest.thresholds,
        worthwhile=manifest.worthwhile,
    )


def _per_exit(
    name: str, given: float | Sequence[float] | None, fitted: tuple[float, ...], n_exits: int
) -> tuple[float, ...]:
    if given is None:
        return fitted
    values = (given,) * n_exits if isinstance(given, (int, float)) else tuple(given)
    if len(values) != n_exits:
        raise ConfigError(f"{name}: {len(values)} values for {n_exits} exits; give one for all, or one per exit")
    return values
