"""Which converter reads which published files: data set, layout of its annotations, conversion.

A data set may come in several layouts: the official files, Karpathy's split of COCO, LAVIS's rewritten files.  A layout is told
by the names of its files and by what they open with.  Does not know what stands in them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from free_dist.config import MissingFileError, UserError
from free_dist.data import coco, gqa, lavis_annotations, nocaps, visdial, visual_genome, vqa
from free_dist.data.conversion import ConversionOptions, SplitSource, convert
from free_dist.data.published_files import opens_with
from free_dist.data.shards import Manifest


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One form in which a data set is published."""

    files: tuple[str, ...]
    """All that it needs; the first of them tells it."""
    sources: Callable[[Path, Path, bool], list[SplitSource]]
    """(annotations, images, whether to convert the withheld split) -> splits."""
    opens_with: str = "{"


def _lavis(dataset: str) -> Layout:
    files = lavis_annotations.DATASETS[dataset]
    return Layout(
        files=(*files.train, *files.calibration, *files.test),
        sources=partial(lavis_annotations.sources, dataset),
        opens_with="[",
    )


def _vqa(dataset: str) -> Layout:
    names = vqa.FILES[dataset]
    return Layout(
        files=tuple(
            name.format(part) for part in ("train2014", "val2014") for name in (names.questions, names.answers)
        ),
        sources=partial(vqa.sources, dataset),
    )


LAYOUTS: dict[str, dict[str, Layout]] = {
    "coco": {
        "karpathy": Layout(files=(coco.KARPATHY_FILE,), sources=coco.karpathy_sources),
        **{
            f"official-{year}": Layout(
                files=(f"captions_train{year}.json", f"captions_val{year}.json"),
                sources=partial(coco.official_sources, year),
            )
            for year in (2014, 2017)
        },
        "lavis": _lavis("coco"),
    },
    "nocaps": {
        "official": Layout(files=(nocaps.VALIDATION_FILE,), sources=nocaps.sources),
        "lavis": _lavis("nocaps"),
    },
    "vqav2": {"official": _vqa("vqav2"), "lavis": _lavis("vqav2")},
    "okvqa": {"official": _vqa("okvqa")},
    "gqa": {
        "official": Layout(
            files=tuple(gqa.FILE.format(part) for split, part in gqa.PARTS.items() if split != "withheld"),
            sources=gqa.sources,
        )
    },
    "visdial": {
        "official": Layout(files=tuple(visdial.FILE.format(part) for part in ("train", "val")), sources=visdial.sources)
    },
    "vg": {"official": Layout(files=visual_genome.FILES, sources=visual_genome.sources, opens_with="[")},
}


def layout_of(dataset: str, annotations: Path, wanted: str | None = None) -> Layout:
    """The layout whose files lie in ``annotations``; ``wanted`` names one where there are several.

    Raises MissingFileError for files of none, or of one not whole, and UserError for files of several, or of another form.
    """
    known = LAYOUTS[dataset]
    if wanted is not None and wanted not in known:
        raise UserError(f"--layout: {dataset} has {', '.join(known)}, not {wanted}")
    found = [name for name, layout in known.items() if (annotations / layout.files[0]).is_file()]
    if wanted is None and len(found) > 1:
        raise UserError(f"{annotations} has the files of several layouts; choose with --layout {'|'.join(found)}")
    if wanted is None and not found:
        told = "; ".join(f"{', '.join(layout.files)} ({name})" for name, layout in known.items())
        raise MissingFileError(f"--annotations: {annotations} has none of the published files of {dataset}: {told}")
    name = wanted or found[0]
    layout = known[name]
    for file in layout.files:
        if not (annotations / file).is_file():
            raise MissingFileError(f"{annotations / file} does not exist; the {name} layout of {dataset} needs it")
        first = opens_with(annotations / file)
        if first != layout.opens_with:
            raise UserError(
                f"{annotations / file} opens with {first!r}, not {layout.opens_with!r} as the {name} layout of {dataset}"
            )
    return layout


def prepare(
    dataset: str,
    annotations: Path,
    images: Path,
    root: Path,
    *,
    layout: str | None = None,
    withheld: bool = False,
    options: ConversionOptions | None = None,
) -> list[Manifest]:
    """Write the splits of ``dataset``, a name in ``LAYOUTS``, under ``root``; raises as ``layout_of`` and ``convert`` do."""
    sources = layout_of(dataset, annotations, layout).sources(annotations, images, withheld)
    return convert(root, dataset, sources, options)
