"""Every official file, with every field it has, becomes records that lose nothing of what a task needs."""

from __future__ import annotations

import json
from pathlib import Path

import official_files as official
import pytest

from free_dist.config import MissingFileError, UserError
from free_dist.data import stamps
from free_dist.data.published import LAYOUTS, layout_of, prepare
from free_dist.data.records import Record
from free_dist.data.stream import records


def converted(dataset: str, annotations: Path, images: Path, root: Path, **how) -> dict[str, list[Record]]:
    """Split -> its records, read back from the shards."""
    return {
        manifest.split: list(records(root, manifest.split))
        for manifest in prepare(dataset, annotations, images, root, **how)
    }


def ids(found: list[Record]) -> list[int]:
    return [int(record.image_id or "") for record in found]


TRAIN, VAL = official.part_ids("train"), official.part_ids("val")
CALIBRATION = TRAIN[::20]
REST = [n for n in TRAIN if n not in CALIBRATION]


def test_vqav2_keeps_ten_answers_with_confidences_and_types(annotations: Path, images: Path, tmp_path: Path) -> None:
    official.vqa(annotations)
    official.coco_images(images, "train2014", "val2014", "test2015")
    found = converted("vqav2", annotations, images, tmp_path / "data", withheld=True)
    assert {split: ids(part) for split, part in found.items()} == {
        "train": REST,
        "calibration": CALIBRATION,
        "test": VAL,
        "withheld": official.part_ids("test"),
    }
    for record in (*found["train"], *found["calibration"], *found["test"]):
        n = int(record.image_id or "")
        assert [question.question_id for question in record.questions] == [str(1000 * n), str(1000 * n + 1)]
        first = record.questions[0]
        assert first.question == f"What is {1000 * n}?" and first.answer == "net"
        assert first.answers == tuple(official.ten(i, False)["answer"] for i in range(10))
        assert first.answer_confidences == ("yes", "maybe") * 5
        assert (first.question_type, first.answer_type) == ("what is", "other")
        assert record.image == official.jpeg(n)  # as encoded
    assert all(question.answers == () for record in found["withheld"] for question in record.questions)
    assert found["test"][0].key == "vqav2-COCO_val2014_000000002000"


def test_okvqa_has_the_same_form(annotations: Path, images: Path, tmp_path: Path) -> None:
    official.vqa(annotations, okvqa=True)
    official.coco_images(images, "train2014", "val2014")
    found = converted("okvqa", annotations, images, tmp_path / "data")
    assert [ids(part) for part in found.values()] == [REST, CALIBRATION, VAL]
    question = found["test"][0].questions[0]
    assert len(question.answers) == 10 and question.answer == "net" and question.question_type == "one"
    with pytest.raises(UserError, match="--withheld: okvqa withholds no answers"):
        prepare("okvqa", annotations, images, tmp_path / "data", withheld=True)


@pytest.mark.parametrize("year", [2014, 2017])
def test_official_coco_captions_are_gathered_by_image(
    year: int, annotations: Path, images: Path, tmp_path: Path
) -> None:
    official.coco_captions(annotations, year)
    official.coco_images(images, f"train{year}", f"val{year}")
    found = converted("coco", annotations, images, tmp_path / "data")
    assert [ids(part) for part in found.values()] == [REST, CALIBRATION, VAL]
    for part in found.values():
        for record in part:
            assert record.captions == tuple(f"Caption {i} of {record.image_id}." for i in range(5))
            assert record.licence == "http://creativecommons.org/licenses/by/2.0/"
            assert record.image == official.jpeg(int(record.image_id or ""))


def test_karpathys_restval_belongs_to_train(annotations: Path, images: Path, tmp_path: Path) -> None:
    official.karpathy(annotations)
    official.coco_images(images, "train2014", "val2014")
    found = converted("coco", annotations, images, tmp_path / "data")
    his = {"restval": 0, "val": 1, "test": 2}
    assert ids(found["train"]) == TRAIN + [n for n in VAL if n % 3 == his["restval"]]
    assert ids(found["calibration"]) == [n for n in VAL if n % 3 == his["val"]]
    assert ids(found["test"]) == [n for n in VAL if n % 3 == his["test"]]
    assert found["test"][0].captions == ("A man, 0.", "A man, 1.")


def test_nocaps_keeps_domains_and_ids_that_start_anew_are_no_leak(
    annotations: Path, images: Path, tmp_path: Path
) -> None:
    official.nocaps(annotations, images)
    found = converted("nocaps", annotations, images, tmp_path / "data", withheld=True)
    assert ids(found["test"]) == ids(found["withheld"]) == list(range(official.N_VAL))
    assert [record.domain for record in found["test"]] == ["in-domain", "near-domain", "out-domain"] * 2
    assert all(len(record.captions) == 10 for record in found["test"])
    assert all(record.captions == () and record.domain is None for record in found["withheld"])


def test_gqa_is_read_by_question_id(annotations: Path, images: Path, tmp_path: Path) -> None:
    official.gqa(annotations, images)
    found = converted("gqa", annotations, images, tmp_path / "data", withheld=True)
    of = {split: [record.image_id for record in part] for split, part in found.items()}
    assert of == {
        "train": ["n0", "n1", "n2"],
        "calibration": ["n100", "n101", "n102"],
        "test": ["n200", "n201", "n202"],
        "withheld": ["n300", "n301", "n302"],
    }
    first, second = found["test"][0].questions
    assert (first.question, first.answers, first.question_id) == ("What is 0?", ("yes",), "0200000")
    assert (second.question_type, second.answer_type) == ("verify", "attr")
    assert found["withheld"][0].questions[0].answers == ()


def test_visdial_spells_out_what_its_dialogues_point_to(annotations: Path, images: Path, tmp_path: Path) -> None:
    official.visdial(annotations, images)
    found = converted("visdial", annotations, images, tmp_path / "data", withheld=True)
    assert [ids(part) for part in found.values()] == [REST, CALIBRATION, VAL, official.part_ids("test")]
    for record in (*found["train"], *found["calibration"], *found["test"]):
        n = int(record.image_id or "")
        assert record.captions == (f"a man on {n}",) and len(record.dialogue) == 10
        for r, turn in enumerate(record.dialogue):
            assert turn.question == f"is it {(n + r) % 40}"
            assert turn.answer == f"answer {(n + r) % 150}" == turn.candidates[turn.gold or 0]
            assert len(turn.candidates) == 100
    judged = {
        int(record.image_id or ""): [r + 1 for r, turn in enumerate(record.dialogue) if turn.relevance]
        for part in found.values()
        for record in part
    }
    assert all(judged[n] == [1 + n % 10] for n in VAL)
    assert [n for n in TRAIN if judged[n]] == TRAIN[:2] and judged[TRAIN[0]] == [10]
    assert found["test"][0].dialogue[VAL[0] % 10].relevance == (0.0, 0.2, 0.4, 1.0) * 25
    for record in found["withheld"]:
        *earlier, last = record.dialogue
        assert len(earlier) == 2 and all(turn.answer and not turn.candidates for turn in earlier)
        assert last.answer is None and last.gold is None and len(last.candidates) == 100


def test_visual_genome_is_train_and_calibration_alone(annotations: Path, images: Path, tmp_path: Path) -> None:
    official.visual_genome(annotations, images)
    found = converted("vg", annotations, images, tmp_path / "data")
    assert {split: ids(part) for split, part in found.items()} == {"train": REST, "calibration": CALIBRATION}
    for record in (*found["train"], *found["calibration"]):
        n = int(record.image_id or "")
        assert record.captions == ("the clock 0 is green", "the clock 1 is green")  # people repeat themselves
        assert [question.question_id for question in record.questions] == [str(100 * n + i) for i in range(n % 3)]
        assert all(question.answers == ("Green.",) for question in record.questions)
        assert record.image == official.jpeg(n)
    with pytest.raises(UserError, match="--withheld: Visual Genome withholds no answers"):
        prepare("vg", annotations, images, tmp_path / "data", withheld=True)


def test_visdials_own_images_may_have_ids_that_coco_has_too(annotations: Path, images: Path, tmp_path: Path) -> None:
    official.visdial(annotations, images)
    path = annotations / "visdial_1.0_val.json"
    content = json.loads(path.read_text())
    content["data"]["dialogs"][0]["image_id"] = TRAIN[5]
    official.place(path, content)
    (annotations / "visdial_1.0_val_dense_annotations.json").unlink()
    name = f"VisualDialog_val2018_{TRAIN[5]:012d}.jpg"
    official.place(images / "VisualDialog_val2018" / name, official.jpeg(9000))
    found = converted("visdial", annotations, images, tmp_path / "data")
    assert found["test"][0].image_id == str(TRAIN[5]) and found["test"][0].image == official.jpeg(9000)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"question": 40}, r"dialogue 0, round 1: question=40: want a place in the list of 40"),
        ({"answer_options": [0, 151]}, r"round 1: answer_options=151: want a place"),
        ({"gt_index": 100}, r"round 1: gt_index=100: there are 100 candidates"),
        ({"answer_options": "all"}, r"round 1: answer_options='all': want a list"),
    ],
)
def test_a_dialogue_that_points_nowhere_is_named(
    change: dict, complaint: str, annotations: Path, images: Path, tmp_path: Path
) -> None:
    official.visdial(annotations, images)
    path = annotations / "visdial_1.0_val.json"
    content = json.loads(path.read_text())
    content["data"]["dialogs"][0]["dialog"][0] |= change
    official.place(path, content)
    with pytest.raises(UserError, match=complaint):
        prepare("visdial", annotations, images, tmp_path / "data")


def test_dense_annotations_must_fit_their_dialogue(annotations: Path, images: Path, tmp_path: Path) -> None:
    official.visdial(annotations, images)
    path = annotations / "visdial_1.0_val_dense_annotations.json"
    good = json.loads(path.read_text())
    for change, complaint in (
        ({"round_id": 11}, "dense annotation is of round 11, of 10"),
        ({"image_id": 5}, "dense annotation is of image 5, which visdial_1.0_val.json has not"),
        ({"gt_relevance": [0.5]}, "1 dense annotations of 100 candidates"),
        ({"gt_relevance": [7] * 100}, "want shares of people"),
    ):
        official.place(path, [good[0] | change, *good[1:]])
        with pytest.raises(UserError, match=complaint):
            prepare("visdial", annotations, images, tmp_path / "data")


def test_questions_and_answers_that_do_not_fit_are_named(annotations: Path, images: Path, tmp_path: Path) -> None:
    official.vqa(annotations)
    official.coco_images(images, "train2014", "val2014")
    path = annotations / "v2_mscoco_val2014_annotations.json"
    good = json.loads(path.read_text())
    last = good["annotations"][-1]  # of the first question
    for change, complaint in (
        ({"question_id": 7}, "question 2000000 is about image 2000, and in .* about None"),
        ({"image_id": 7}, "question 2000000 is about image 2000, and in .* about 7"),
        ({"answers": []}, r"annotation 11: answers=\[\]: want a list of answers"),
        ({"question_type": None}, "annotation 11: question_type=None: want text"),
    ):
        official.place(path, good | {"annotations": [*good["annotations"][:-1], last | change]})
        with pytest.raises(UserError, match=complaint):
            prepare("vqav2", annotations, images, tmp_path / "data")
    official.place(path, good | {"annotations": [*good["annotations"], last | {"question_id": 7}]})
    with pytest.raises(UserError, match="question 7 is not in"):
        prepare("vqav2", annotations, images, tmp_path / "data")


def test_layouts_are_told_by_their_files(annotations: Path) -> None:
    with pytest.raises(MissingFileError, match=r"none of the published files of coco: dataset_coco\.json \(karpathy\)"):
        layout_of("coco", annotations)
    official.karpathy(annotations)
    assert layout_of("coco", annotations) is LAYOUTS["coco"]["karpathy"]
    for split in ("train", "val", "test"):
        official.place(annotations / f"coco_karpathy_{split}.json", [{"image": "a.jpg", "caption": "a"}])
    with pytest.raises(UserError, match=r"choose with --layout karpathy\|lavis"):
        layout_of("coco", annotations)
    assert layout_of("coco", annotations, "lavis") is LAYOUTS["coco"]["lavis"]
    official.place(annotations / "coco_karpathy_train.json", {"images": []})
    with pytest.raises(UserError, match=r"coco_karpathy_train\.json opens with '{', not '\['"):
        layout_of("coco", annotations, "lavis")
    (annotations / "coco_karpathy_train.json").unlink()
    with pytest.raises(MissingFileError, match=r"coco_karpathy_train\.json does not exist; the lavis layout"):
        layout_of("coco", annotations, "lavis")
    with pytest.raises(UserError, match="--layout: coco has karpathy, official-2014, official-2017, lavis, not paper"):
        layout_of("coco", annotations, "paper")


def test_lavis_files_are_told_by_themselves(annotations: Path, images: Path, tmp_path: Path) -> None:
    official.coco_images(images, "val2014")
    listed = [{"image": f"val2014/{official.coco_name('val2014', n)}", "caption": [f"about {n}"]} for n in VAL]
    for split, part in (("train", listed[:3]), ("val", listed[3:5]), ("test", listed[5:])):
        official.place(annotations / f"coco_karpathy_{split}.json", part)
    found = converted("coco", annotations, images, tmp_path / "data")
    assert [record.captions for part in found.values() for record in part] == [(f"about {n}",) for n in VAL]
    assert [len(part) for part in found.values()] == [3, 2, 1]
    with pytest.raises(UserError, match="--withheld: LAVIS's files of coco have no split without answers"):
        prepare("coco", annotations, images, tmp_path / "data", withheld=True)


def test_a_file_that_was_cut_off_or_is_another_is_named(annotations: Path, images: Path, tmp_path: Path) -> None:
    official.nocaps(annotations, images)
    path = annotations / "nocaps_val_4500_captions.json"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"nocaps_val_4500_captions\.json: not whole JSON"):
        prepare("nocaps", annotations, images, tmp_path / "data")
    official.place(path, {"info": {}})
    with pytest.raises(UserError, match=r"4500_captions\.json has no list 'annotations'"):
        prepare("nocaps", annotations, images, tmp_path / "data")
    with pytest.raises(MissingFileError, match=r"--images: .* is no directory"):
        prepare("nocaps", annotations, tmp_path / "nowhere", tmp_path / "data")


def test_images_may_lie_flat(annotations: Path, images: Path, tmp_path: Path) -> None:
    official.nocaps(annotations, images)
    for path in (images / "val").iterdir():
        path.rename(images / path.name)
    assert len(converted("nocaps", annotations, images, tmp_path / "data")["test"]) == official.N_VAL


def test_a_stamp_is_told_by_the_first_line_beside_it(tmp_path: Path) -> None:
    root = tmp_path / "stamps"
    for n in range(60):
        official.place(root / "animals" / f"cat{n}.png", png(n))
        official.place(root / "animals" / f"cat{n}.txt", f"A cat, {n}.\nde.utf8=Eine Katze.\n".encode())
    official.place(root / "plain.png", png(200))  # nobody says what it is
    official.place(root / "same.png", png(0))
    official.place(root / "same.txt", b"The very same cat.\n")
    manifests = stamps.prepare(tmp_path / "data", installed=root)
    found = [record for manifest in manifests for record in records(tmp_path / "data", manifest.split)]
    assert len(found) == 60 and {len(record.captions) for record in found} == {1, 2}
    told = {record.captions[0]: record for record in found}
    assert told["A cat, 3."].image == png(3) and told["A cat, 3."].key == "stamps-animals-cat3"
    assert told["A cat, 0."].captions == ("A cat, 0.", "The very same cat.")
    with pytest.raises(MissingFileError, match="apt-get install tuxpaint-stamps-default"):
        stamps.prepare(tmp_path / "data", installed=tmp_path / "nothing")


def png(shade: int) -> bytes:
    import io

    from PIL import Image

    written = io.BytesIO()
    Image.new("RGB", (9, 9), (shade, 0, 0)).save(written, "PNG")
    return written.getvalue()
