#!/usr/bin/env python
"""Convert a published data set into WebDataset tar shards with a manifest per split.

python launch/prepare_data.py easyvqa                                  # from its PyPI package
python launch/prepare_data.py coco --annotations DIR --images DIR --workers 16
python launch/prepare_data.py vqav2 --annotations DIR --images DIR --withheld
python launch/prepare_data.py joined --sources data/easyvqa data/openclipart
python launch/prepare_data.py joined --sources data/vqav2 data/vg --drop-leaks --out data/vqav2_vg

Every command has a --help of its own, which says which official split becomes which of train, calibration and test.
Images are copied as encoded.  A conversion that was stopped goes on where it was: run the same command again.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from free_dist.recipe_io import fail_clearly, positive_integer

if TYPE_CHECKING:
    from free_dist.data.shards import Manifest

PUBLISHED = {
    "coco": """COCO captions.  Layouts, told by their files:
  karpathy       dataset_coco.json: his train and restval -> train, val -> calibration, test -> test
  official-2014  captions_{train,val}2014.json: train -> train but for every 20th image -> calibration, val -> test
  official-2017  captions_{train,val}2017.json: likewise
  lavis          coco_karpathy_{train,val,test}.json as LAVIS writes them: train, calibration, test
Images: train2014, val2014 (train2017, val2017) under --images, as the archives unpack.""",
    "nocaps": """NoCaps, on which nothing is trained.  Layouts, told by their files:
  official  nocaps_val_4500_captions.json: val -> test, with domains; --withheld: nocaps_test_image_info.json -> withheld
  lavis     nocaps_val.json as LAVIS writes it: test
Images: val (or validation) and test under --images, or all in --images itself.""",
    "vqav2": """VQAv2, ten answers a question.  Layouts, told by their files:
  official  v2_OpenEnded_mscoco_{train,val}2014_questions.json and v2_mscoco_{train,val}2014_annotations.json:
            train -> train but for every 20th image -> calibration, val -> test;
            --withheld: v2_OpenEnded_mscoco_test2015_questions.json -> withheld, questions without answers
  lavis     vqa_train.json, vqa_val.json as LAVIS writes them: likewise
Images: train2014, val2014, test2015 under --images.""",
    "okvqa": """OK-VQA, ten answers a question: OpenEnded_mscoco_{train,val}2014_questions.json and
mscoco_{train,val}2014_annotations.json: train -> train but for every 20th image -> calibration, val -> test.
Images: train2014, val2014 under --images.""",
    "gqa": """GQA, balanced questions: {train,val,testdev}_balanced_questions.json: train -> train, val -> calibration,
testdev -> test; --withheld: test_balanced_questions.json -> withheld.  Images: images/ID.jpg under --images.""",
    "visdial": """VisDial 1.0: visdial_1.0_{train,val}.json: train -> train but for every 20th dialogue -> calibration,
val -> test; --withheld: visdial_1.0_test.json -> withheld.  Dense annotations are added where their files lie beside them:
visdial_1.0_val_dense_annotations.json, visdial_1.0_train_dense_sample.json.
Images: train2014, val2014 (COCO's), VisualDialog_val2018, VisualDialog_test2018 under --images.""",
    "vg": """Visual Genome: question_answers.json, region_descriptions.json (as captions), image_data.json: all -> train but for
every 20th image -> calibration; no test split.  Images: VG_100K, VG_100K_2 under --images.""",
}
"""Converted from annotation files and a folder of images: what --help says of each."""

PACKAGED = {
    "easyvqa": "easy-VQA from its PyPI package: its test questions -> test, its train questions -> train but for every 10th "
    "image -> calibration.",
    "openclipart": "Debian's openclipart-png and openclipart-svg; a hash of the title chooses the split.",
    "stamps": "Debian's tuxpaint-stamps-default (GPL-2); a hash of the sentence chooses the split.",
}
"""Converted from an installed package: what --help says of each."""

JOINED = "Prepared data sets as one directory of shards, for a run that learns from all of them."

EPILOG = """Without --out the shards go to data/NAME.  Shards that match their checksums, and what they would be made of, are
kept; the others are made again.  The bytes written do not depend on --workers."""


def main() -> None:
    """Parse, convert, and say what every split holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = parser.add_subparsers(dest="dataset", required=True, metavar="NAME")
    for name, described in {**PUBLISHED, **PACKAGED, "joined": JOINED}.items():
        command = names.add_parser(
            name,
            help=described.partition(".")[0].partition(":")[0],
            description=described,
            epilog=EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name in PUBLISHED:
            add_published(command)
        if name == "joined":
            command.add_argument("--sources", type=Path, nargs="+", metavar="DIR", required=True, help="what to join")
        else:
            add_options(command)
        command.add_argument(
            "--drop-leaks",
            action="store_true",
            help="leave an image that stands in two splits out of the one further from test, instead of stopping",
        )
        command.add_argument("--out", type=Path, default=Path("data") / name, help="directory to write (%(default)s)")
    arguments = parser.parse_args()
    with fail_clearly(parser):
        for manifest in convert(arguments):
            where = arguments.out / manifest.split
            print(f"{where}: {manifest.samples} images in {len(manifest.shards)} shards")


def add_published(command: argparse.ArgumentParser) -> None:
    """The flags of data sets that come as annotation files and images."""
    command.add_argument("--annotations", type=Path, required=True, metavar="DIR", help="folder of the JSON files")
    command.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of the image folders")
    command.add_argument("--layout", help="which of the layouts above, where the files of several lie in DIR")
    command.add_argument(
        "--withheld",
        action="store_true",
        help="also convert the part whose answers are not published, as split withheld",
    )


def add_options(command: argparse.ArgumentParser) -> None:
    """The flags of every conversion."""
    command.add_argument(
        "--workers",
        type=positive_integer,
        default=min(8, os.cpu_count() or 1),
        help="threads that read and write (%(default)s)",
    )
    command.add_argument(
        "--records-per-shard", type=positive_integer, default=500, help="images to a tar file (%(default)s)"
    )


def convert(arguments: argparse.Namespace) -> list[Manifest]:
    """Run the conversion that the arguments describe."""
    from free_dist.data.conversion import ConversionOptions

    if arguments.dataset == "joined":
        from free_dist.data import joined

        return joined.prepare(arguments.out, arguments.sources, drop_leaks=arguments.drop_leaks)
    options = ConversionOptions(
        workers=arguments.workers,
        records_per_shard=arguments.records_per_shard,
        drop_leaks=arguments.drop_leaks,
    )
    if arguments.dataset in PUBLISHED:
        from free_dist.data import published

        return published.prepare(
            arguments.dataset,
            arguments.annotations,
            arguments.images,
            arguments.out,
            layout=arguments.layout,
            withheld=arguments.withheld,
            options=options,
        )
    from free_dist.data import easyvqa, openclipart, stamps

    packaged = {"easyvqa": easyvqa.prepare, "openclipart": openclipart.prepare, "stamps": stamps.prepare}
    return packaged[arguments.dataset](arguments.out, options=options)


if __name__ == "__main__":
    main()
