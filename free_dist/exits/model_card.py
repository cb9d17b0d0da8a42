"""The README of published exits: what they are, where they sit, what is promised and measured, and how to load them.

Everything in it comes from the manifest or is handed in; nothing is measured or guessed here.  Does not know files or hubs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import ModelCardData

from free_dist.config import EMBEDDED_BACKBONE
from free_dist.exits.manifest import ExitsManifest

TAGS = ("early-exit", "vision-language", "free_dist")
PIPELINE = "image-text-to-text"


@dataclass(frozen=True, kw_only=True)
class CardNotes:
    """What a card says that the manifest does not know."""

    title: str = "Early exits"
    note: str = ""
    """Text of the author, as it is."""
    base_model: str = ""
    """Hub id of the backbone; empty: none is named in the front matter."""
    license: str = ""
    """Identifier of the exits' licence; empty: Apache-2.0 on the embedded backbone, the backbone's own elsewhere."""
    checks: bool = False
    """Whether fitted checks lie beside the exits."""
    measured: Sequence[Mapping[str, Any]] = field(default_factory=list)
    """Rows of ``results.json``: task, method, threshold, quality, quality_full, agreement, mean_blocks, n."""


def model_card(manifest: ExitsManifest, notes: CardNotes) -> str:
    """The text of ``README.md``, front matter included."""
    parts = [
        _front_matter(manifest, notes),
        f"# {notes.title}",
        _opening(manifest, notes),
        *([notes.note] if notes.note else []),
        "## Exits",
        _exits(manifest),
        "## Thresholds",
        _thresholds(manifest),
        "## Load",
        _loading(manifest, notes),
        "## Training",
        _training(manifest),
        *(["## Measured", _measured(notes.measured)] if notes.measured else []),
        "## Files",
        _files(manifest, notes),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(manifest: ExitsManifest, notes: CardNotes) -> str:
    is_ours = _name(manifest) == EMBEDDED_BACKBONE
    data = ModelCardData(
        license=notes.license or ("apache-2.0" if is_ours else "other"),
        license_name=None if notes.license or is_ours else "that-of-the-backbone",
        base_model=notes.base_model or None,
        library_name="free_dist",
        pipeline_tag=PIPELINE,
        tags=list(TAGS),
    )
    return f"---\n{data.to_yaml()}\n---"


def _opening(manifest: ExitsManifest, notes: CardNotes) -> str:
    backbone = notes.base_model or _name(manifest)
    text = (
        f"Exit transformers that let the frozen vision-language model `{backbone}` answer a token before its last block. "
        "They were trained with free_dist by the method FREE ([arXiv 2506.06884](https://arxiv.org/abs/2506.06884)). "
        "The model itself is not in this repository, and it is not changed."
    )
    if not notes.license and _name(manifest) != EMBEDDED_BACKBONE and manifest.variant.name != "bottleneck":
        text += " The exits began as copies of the model's own weights, so its licence holds for them too."
    return text


def _exits(manifest: ExitsManifest) -> str:
    depth = "" if manifest.backbone is None else f" of {manifest.backbone.n_blocks}"
    rows = [
        [
            f"{layer}{depth}",
            _variant(manifest),
            f"{threshold:g}",
            *[_threshold(t.thresholds[k]) for t in _tasks(manifest)],
        ]
        for k, (layer, threshold) in enumerate(zip(manifest.exit_layers, manifest.thresholds, strict=True))
    ]
    return _table(["after block", "kind", "threshold", *[f"for {task}" for task in manifest.calibrated]], rows)


def _thresholds(manifest: ExitsManifest) -> str:
    lines = [
        "An exit emits when its largest softmax probability exceeds its threshold. "
        f"The default thresholds: {manifest.calibration or 'how they were chosen is not recorded'}."
    ]
    for task, found in manifest.calibrated.items():
        settings = ", ".join(f"`{name}={value}`" for name, value in found.settings.items())
        lines.append(
            f"- **{task}** ({found.method}, loss `{found.loss}`, {found.n_images} calibration images): {found.guarantee}. "
            f"Holds for images like those of the calibration split, greedy decoding and {settings or 'the same prompts'}."
        )
    return "\n".join(lines)


def _loading(manifest: ExitsManifest, notes: CardNotes) -> str:
    is_embedded = _name(manifest) == EMBEDDED_BACKBONE
    where = "" if is_embedded else ", backbone=BACKBONE_DIRECTORY"
    task = next(iter(manifest.calibrated), None)
    lines = [
        "```python",
        "from free_dist.decoding.early_exit_model import EarlyExitModel",
        "",
        f"model = EarlyExitModel.from_pretrained(THIS_DIRECTORY{where})",
        'print(model.caption("picture.png")[0].text)',
        'print(model.ask("picture.png", "what is this?", lossless=True)[0].text)  # exactly the full model\'s tokens',
    ]
    if task is not None:
        lines.append(f'model.answer("picture.png", "...", calibrated_for="{task}")')
    lines.append("```")
    words = "The backbone's files are hashed and compared with the hash in `exits.json`; DeepSpeed is not needed."
    if not is_embedded:
        words = (
            f"`BACKBONE_DIRECTORY` is the Hugging Face directory of `{notes.base_model or _name(manifest)}`. {words}"
        )
    return "\n".join(lines) + f"\n\n{words}"


def _training(manifest: ExitsManifest) -> str:
    extra = manifest.extra
    rows = [["blocks they started from", manifest.init], ["stored type", manifest.dtype or "unknown"]]
    if manifest.backbone is not None:
        rows.append(["type of the backbone's files", manifest.backbone.dtype])
    if "data" in extra:
        rows += [[f"data: {name}", str(value)] for name, value in extra["data"].items()]
    if "steps" in extra:
        rows.append(["optimizer steps", str(extra["steps"])])
    if "loss" in extra:
        rows += [[f"loss: {name}", str(value)] for name, value in extra["loss"].items()]
    rows.append(["code", manifest.git_commit or extra.get("git_commit", "unknown")])
    rows += [[name, extra[name]] for name in ("free_dist", "torch", "deepspeed", "transformers") if name in extra]
    return _table(["what", "value"], rows)


def _measured(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = [
        [
            str(row["task"]),
            str(row["method"]),
            "" if row["threshold"] is None else f"{row['threshold']:g}",
            f"{row['quality']:.4f}",
            f"{row['quality_full']:.4f}",
            f"{row['agreement']:.1%}",
            f"{row['mean_blocks']:.2f}",
            str(row["n"]),
        ]
        for row in rows
    ]
    heads = ["task", "decoder", "threshold", "quality", "full model", "same answers", "blocks per token", "samples"]
    return _table(heads, cells)


def _files(manifest: ExitsManifest, notes: CardNotes) -> str:
    lines = [
        f"- `exits.safetensors`: the trained weights alone, sha256 `{manifest.weights_sha256}`",
        f"- `exits.json`: the manifest, format {manifest.format_version}; backbone hash `{manifest.backbone_hash}`",
    ]
    if notes.checks:
        lines.append("- `checks.safetensors`, `checks.json`: fitted gates and smaller exit heads")
    lines += [f"- `calibration-{task}.json`: the calibration of {task}" for task in manifest.calibrated]
    return "\n".join(lines)


def _name(manifest: ExitsManifest) -> str:
    return str(manifest.extra.get("backbone", "unknown")) if manifest.backbone is None else manifest.backbone.name


def _variant(manifest: ExitsManifest) -> str:
    variant = manifest.variant
    if variant.name == "lora":
        return f"low-rank update, rank {variant.rank}"
    if variant.name == "classifier":
        return "none, a vocabulary head of its own"
    return f"bottleneck of {variant.bottleneck_size}" if variant.name == "bottleneck" else "full block"


def _tasks(manifest: ExitsManifest) -> list[Any]:
    return list(manifest.calibrated.values())


def _threshold(value: float) -> str:
    return "off" if value >= 1 else f"{value:g}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    # A bar or a line break inside a cell would end it.
    lines = [" | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) for cells in [heads, *rows]]
    lines.insert(1, " | ".join("---" for _ in heads))
    return "\n".join(f"| {line} |" for line in lines)
