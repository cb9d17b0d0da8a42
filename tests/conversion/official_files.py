"""Writes small data sets as they are officially published: every field of every file, and images in the published folders."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

N_TRAIN, N_VAL = 42, 6
"""Images of a part; 42 give three calibration images."""

INFO = {
    "description": "made for a test",
    "url": "http://example.org",
    "version": "2.0",
    "year": 2017,
    "contributor": "nobody",
    "date_created": "2017-04-26 00:00:00",
}
LICENCES = [
    {
        "url": "http://creativecommons.org/licenses/by-nc-sa/2.0/",
        "id": 1,
        "name": "Attribution-NonCommercial-ShareAlike",
    },
    {"url": "http://creativecommons.org/licenses/by/2.0/", "id": 4, "name": "Attribution License"},
]


def jpeg(shade: int) -> bytes:
    """A JPEG unlike that of any other shade below 65,536, large enough to be cut in the middle."""
    pixels = bytes(value for n in range(40 * 30) for value in (shade % 256, shade // 256, n * (1 + shade % 7) % 256))
    written = io.BytesIO()
    Image.frombytes("RGB", (40, 30), pixels).save(written, "JPEG", quality=90)
    return written.getvalue()


def place(path: Path, content: Any) -> Path:
    """Write bytes as they are, anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def part_ids(part: str) -> list[int]:
    """The image ids of a part."""
    start, count = {
        "train": (1000, N_TRAIN),
        "val": (2000, N_VAL),
        "test": (3000, N_VAL),
    }[part.rstrip("0123456789")]
    return list(range(start, start + count))


def coco_images(images: Path, *parts: str) -> None:
    """``train2014/COCO_train2014_000000001000.jpg`` and so on; without prefix in 2017."""
    for part in parts:
        for image_id in part_ids(part):
            place(images / part / coco_name(part, image_id), jpeg(image_id))


def coco_name(part: str, image_id: int) -> str:
    """The published file name of an image."""
    return f"{image_id:012d}.jpg" if part.endswith("2017") else f"COCO_{part}_{image_id:012d}.jpg"


def coco_captions(annotations: Path, year: int) -> None:
    """``captions_{train,val}YEAR.json``."""
    for part in (f"train{year}", f"val{year}"):
        ids = part_ids(part)
        place(
            annotations / f"captions_{part}.json",
            {
                "info": INFO,
                "images": [
                    {
                        "license": 4,
                        "file_name": coco_name(part, n),
                        "coco_url": f"http://images.cocodataset.org/{part}/{coco_name(part, n)}",
                        "height": 30,
                        "width": 40,
                        "date_captured": "2013-11-14 17:02:52",
                        "flickr_url": "http://farm7.staticflickr.com/6116/6255196340_da26cf2c9e_z.jpg",
                        "id": n,
                    }
                    for n in ids
                ],
                "licenses": LICENCES,
                # Captions of an image do not stand together in the official files.
                "annotations": [
                    {"image_id": n, "id": 10 * n + i, "caption": f"Caption {i} of {n}. "} for i in range(5) for n in ids
                ]
                + [{"image_id": ids[0], "id": 1, "caption": "\n"}],
            },
        )


def karpathy(annotations: Path) -> None:
    """``dataset_coco.json``: train2014 is train, val2014 is restval, val and test in turn."""
    entries = []
    for part in ("train2014", "val2014"):
        for n in part_ids(part):
            entries.append(
                {
                    "filepath": part,
                    "sentids": [10 * n, 10 * n + 1],
                    "filename": coco_name(part, n),
                    "imgid": len(entries),
                    "split": "train" if part == "train2014" else ("restval", "val", "test")[n % 3],
                    "sentences": [
                        {
                            "tokens": ["a", "man", str(i)],
                            "raw": f"A man, {i}.",
                            "imgid": len(entries),
                            "sentid": 10 * n + i,
                        }
                        for i in range(2)
                    ],
                    "cocoid": n,
                }
            )
    place(annotations / "dataset_coco.json", {"images": entries, "dataset": "coco"})


def vqa(annotations: Path, *, okvqa: bool = False) -> None:
    """VQAv2's or OK-VQA's questions and annotations, and VQAv2's questions of the test images."""
    prefix = "" if okvqa else "v2_"
    licence = {"url": LICENCES[1]["url"], "name": LICENCES[1]["name"]}
    for part in ("train2014", "val2014", "test2015"):
        asked = [(n, 1000 * n + i) for i in range(2) for n in part_ids(part)]
        questions = {
            "info": INFO,
            "task_type": "Open-Ended",
            "data_type": "mscoco",
            "license": licence,
            "data_subtype": part,
            "questions": [{"image_id": n, "question": f"What is {q}?", "question_id": q} for n, q in asked],
        }
        place(annotations / f"{prefix}OpenEnded_mscoco_{part}_questions.json", questions)
        if part == "test2015":
            continue
        answered = [
            {
                "question_type": "one" if okvqa else "what is",
                "multiple_choice_answer": "net",
                "answers": [ten(i, okvqa) for i in range(10)],
                "image_id": n,
                "answer_type": "other",
                "question_id": q,
            }
            | ({"confidence": 3} if okvqa else {})
            for n, q in reversed(asked)
        ]
        if okvqa:
            for entry in answered:
                del entry["multiple_choice_answer"]
        place(
            annotations / f"{prefix}mscoco_{part}_annotations.json",
            {
                "info": INFO,
                "license": licence,
                "data_subtype": part,
                "annotations": answered,
                "data_type": "mscoco",
                **({"question_types": {"one": "Vehicles and Transportation"}} if okvqa else {}),
            },
        )


def ten(i: int, okvqa: bool) -> dict[str, Any]:
    """The i-th of ten answers."""
    said = {
        "answer": ("net", "net", "netting")[i % 3],
        "answer_confidence": ("yes", "maybe")[i % 2],
        "answer_id": i + 1,
    }
    return said | ({"raw_answer": "nets"} if okvqa else {})


def gqa(annotations: Path, images: Path) -> None:
    """``{train,val,testdev,test}_balanced_questions.json``; ids of some images have a letter."""
    for number, part in enumerate(("train", "val", "testdev", "test")):
        questions = {}
        for i in range(6):
            image_id = f"n{100 * number + i // 2}"
            place(images / "images" / f"{image_id}.jpg", jpeg(100 * number + i // 2))
            questions[f"0{number}{i:05d}"] = {
                "semantic": [{"operation": "select", "dependencies": [], "argument": "sky (2486325)"}],
                "entailed": ["02930160"],
                "equivalent": [f"0{number}{i:05d}"],
                "question": f"What is {i}?",
                "imageId": image_id,
                "isBalanced": True,
                "groups": {"global": None, "local": "06-sky_dark"},
                "answer": "yes",
                "semanticStr": "select: sky (2486325)->verify color: dark [0]",
                "annotations": {"answer": {}, "question": {"2": "2486325"}, "fullAnswer": {"2": "2486325"}},
                "types": {"detailed": "verifyAttr", "semantic": "attr", "structural": "verify"},
                "fullAnswer": "Yes, the sky is dark.",
            }
            if part == "test":
                kept = ("question", "imageId", "isBalanced")
                questions[f"0{number}{i:05d}"] = {name: questions[f"0{number}{i:05d}"][name] for name in kept}
        place(annotations / f"{part}_balanced_questions.json", questions)


def visdial(annotations: Path, images: Path) -> None:
    """``visdial_1.0_{train,val,test}.json``, both dense annotations, and images in COCO's and VisDial's own folders."""
    answers = [f"answer {i}" for i in range(150)]
    questions = [f"is it {i}" for i in range(40)]
    for part in ("train", "val", "test"):
        dialogues = []
        for n in part_ids(part):
            rounds = 3 if part == "test" else 10
            turns = [
                {
                    "question": (n + r) % 40,
                    "answer": (n + r) % 150,
                    "answer_options": [(n + r + 7 * i) % 150 for i in range(-4, 96)],
                    "gt_index": 4,
                }
                for r in range(rounds)
            ]
            if part == "test":  # earlier rounds have no candidates, the last one no answer
                for turn in turns[:-1]:
                    del turn["answer_options"], turn["gt_index"]
                del turns[-1]["answer"], turns[-1]["gt_index"]
            dialogues.append({"image_id": n, "caption": f"a man on {n}", "dialog": turns})
            if part == "train":
                folder = "train2014" if n % 2 else "val2014"
                place(images / folder / f"COCO_{folder}_{n:012d}.jpg", jpeg(n))
            else:
                name = f"VisualDialog_{part}2018"
                place(images / name / f"{name}_{n:012d}.jpg", jpeg(n))
        content = {"dialogs": dialogues, "questions": questions, "answers": answers}
        place(annotations / f"visdial_1.0_{part}.json", {"version": "1.0", "split": part, "data": content})
    shares = [0.0, 0.2, 0.4, 1.0] * 25
    place(
        annotations / "visdial_1.0_val_dense_annotations.json",
        [{"image_id": n, "round_id": 1 + n % 10, "gt_relevance": shares} for n in part_ids("val")],
    )
    place(
        annotations / "visdial_1.0_train_dense_sample.json",
        [{"image_id": n, "round_id": 10, "relevance": shares} for n in part_ids("train")[:2]],
    )


def nocaps(annotations: Path, images: Path) -> None:
    """``nocaps_val_4500_captions.json`` and ``nocaps_test_image_info.json``: ids start from 0 in both."""
    for part, file in (("val", "nocaps_val_4500_captions.json"), ("test", "nocaps_test_image_info.json")):
        entries = []
        for i in range(N_VAL):
            name = f"{part}0013ea20870{i:05d}.jpg"
            place(images / part / name, jpeg(i + (100 if part == "test" else 0)))
            entry = {
                "id": i,
                "coco_url": f"https://s3.amazonaws.com/nocaps/{part}/{name}",
                "date_captured": "2018-11-06 11:04:33",
                "file_name": name,
                "height": 30,
                "width": 40,
                "license": 0,
                "open_images_id": name.removesuffix(".jpg"),
            }
            if part == "val":
                entry["domain"] = ("in-domain", "near-domain", "out-domain")[i % 3]
            entries.append(entry)
        content = {"licenses": [], "info": INFO, "images": entries}
        if part == "val":
            content["annotations"] = [
                {"image_id": i, "id": 10 * i + c, "caption": f"Caption {c} of {i}"}
                for i in range(N_VAL)
                for c in range(10)
            ]
        place(annotations / file, content)


def visual_genome(annotations: Path, images: Path) -> None:
    """``image_data.json``, ``region_descriptions.json``, ``question_answers.json``; odd images lie in the second folder."""
    ids = part_ids("train")
    for n in ids:
        place(images / ("VG_100K_2" if n % 2 else "VG_100K") / f"{n}.jpg", jpeg(n))
    box = {"x": 1, "y": 2, "width": 3, "height": 4}
    place(
        annotations / "image_data.json",
        [
            {
                "image_id": n,
                "url": f"https://cs.stanford.edu/people/rak248/VG_100K_2/{n}.jpg",
                "width": 40,
                "height": 30,
                "coco_id": n if n % 3 else None,
                "flickr_id": None,
            }
            for n in ids
        ],
    )
    place(
        annotations / "region_descriptions.json",
        [
            {
                "id": n,
                "regions": [
                    {"region_id": 10 * n + i, "image_id": n, "phrase": f"the clock {i // 2} is green ", **box}
                    for i in range(3)
                ]
                + [{"region_id": 1, "image_id": n, "phrase": " ", **box}],
            }
            for n in ids
        ],
    )
    asked = {"a_objects": [], "q_objects": [{"object_id": 5, "names": ["clock"], "synsets": ["clock.n.01"], **box}]}
    place(
        annotations / "question_answers.json",
        [
            {
                "id": n,
                "qas": [
                    {"question": f"What is {n}?", "image_id": n, "qa_id": 100 * n + i, "answer": "Green.", **asked}
                    for i in range(n % 3)
                ],
            }
            for n in reversed(ids)
        ],
    )
