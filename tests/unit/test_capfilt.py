"""CapFilt: what is sampled, what is kept, and that shards come out the same however they were made."""

from __future__ import annotations

import io
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipImageProcessorPil,
    LogitsProcessorList,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from free_dist.backbones.checkpoint_hash import checkpoint_hash
from free_dist.config import DataConfig, MissingFileError, UserError
from free_dist.data.capfilt import CapFiltSettings, Counts, bootstrap
from free_dist.data.capfilt_models import BlipCaptioner, BlipFilter, SeededNucleus, row_generator
from free_dist.data.capfilt_shards import CapFilt, copy_split, finish, finished, run_rank, unfinished
from free_dist.data.records import Record
from free_dist.data.shards import is_intact, read_manifest, write_split
from free_dist.data.stream import epoch_samples, records
from tests.small_blip import save_captioner, save_filter

SETTINGS = CapFiltSettings(captions=3, threshold=0.5, min_length=6, max_length=14)


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("blip")
    return save_captioner(root / "captioner"), save_filter(root / "filter")


@pytest.fixture(scope="module")
def captioner(directories) -> BlipCaptioner:
    return BlipCaptioner(directories[0])


@pytest.fixture(scope="module")
def matcher(directories) -> BlipFilter:
    return BlipFilter(directories[1])


@pytest.fixture(scope="module")
def capfilt(captioner, matcher) -> CapFilt:
    return CapFilt(captioner=captioner, matcher=matcher, settings=SETTINGS)


@pytest.fixture(scope="module")
def source(tiny_root: Path, tmp_path_factory) -> Path:
    """Nine records in shards of four."""
    root = tmp_path_factory.mktemp("source")
    found = list(records(tiny_root, "train"))[:9]
    write_split(root, dataset="easyvqa", split="train", records=found, total=9, records_per_shard=4)
    return root


@pytest.fixture(scope="module")
def whole(source: Path, capfilt: CapFilt, tmp_path_factory) -> Path:
    """What one process makes of ``source``."""
    out = tmp_path_factory.mktemp("whole")
    make(source, out, capfilt)
    return out


@pytest.fixture(scope="module")
def some(tiny_root: Path) -> list[Record]:
    return list(records(tiny_root, "train"))[:6]


def opened(record: Record) -> Image.Image:
    return Image.open(io.BytesIO(record.image)).convert("RGB")


def written(captioner: BlipCaptioner, found: list[Record], settings: CapFiltSettings = SETTINGS) -> list[list[str]]:
    return captioner.write([opened(record) for record in found], [record.key for record in found], settings)


def shard_bytes(root: Path, split: str = "train") -> list[bytes]:
    return [path.read_bytes() for path in sorted((root / split).glob("*.tar"))]


def make(source: Path, out: Path, capfilt: CapFilt, world_size: int = 1) -> Counts:
    remaining = unfinished(source, out, "train", capfilt)
    for rank in range(world_size):
        dealt = {"rank": rank, "world_size": world_size, "remaining": remaining}
        run_rank(source, out, "train", capfilt, batch_size=3, **dealt)
    return finish(source, out, "train", capfilt)


def test_sampling_follows_the_nucleus_distribution() -> None:
    torch.manual_seed(0)
    logits = 1.5 * torch.randn(1, 40)
    ids = torch.zeros(1, 1, dtype=torch.long)
    warped = LogitsProcessorList([TopKLogitsWarper(20), TopPLogitsWarper(0.8)])(ids, logits)
    expected = torch.softmax(warped, -1)[0]
    draws = 4000
    nucleus = SeededNucleus([row_generator(0, str(i), 0) for i in range(draws)], top_p=0.8, top_k=20)
    found = nucleus(ids.expand(draws, 1), logits.expand(draws, -1)).argmax(-1)
    counts = torch.bincount(found, minlength=40)
    inside = expected > 0
    assert 5 < inside.sum() < 20 and counts[~inside].sum() == 0
    chi_squared = ((counts - draws * expected) ** 2 / (draws * expected))[inside].sum()
    freedom = int(inside.sum()) - 1
    assert chi_squared < freedom + 4 * (2 * freedom) ** 0.5


def test_a_caption_depends_on_key_and_seed_and_not_on_its_neighbours(captioner, some) -> None:
    together = written(captioner, some)
    alone = [written(captioner, [record])[0] for record in some]
    assert together == alone
    assert written(captioner, some[::-1]) == together[::-1]
    assert all(len(texts) == SETTINGS.captions for texts in together)
    assert len({text for texts in together for text in texts}) > len(some)
    assert written(captioner, some, replace(SETTINGS, seed=1)) != together
    same_image = [replace(some[0], key="other"), some[0]]
    other, first = written(captioner, same_image)
    assert first == together[0] != other


def test_without_choice_in_the_nucleus_captions_are_those_of_transformers(captioner, directories, some) -> None:
    settings = replace(SETTINGS, captions=1, top_k=1, prompt="a picture of")
    model = BlipForConditionalGeneration.from_pretrained(directories[0]).eval()
    tokenizer, processor = (
        AutoTokenizer.from_pretrained(directories[0]),
        BlipImageProcessorPil.from_pretrained(directories[0]),
    )
    for record in some:
        asked = tokenizer(settings.prompt, return_tensors="pt").input_ids  # its [SEP] is cut off by generate
        made = model.generate(
            processor(opened(record), return_tensors="pt")["pixel_values"], input_ids=asked, max_length=settings.max_length,
            min_length=settings.min_length, repetition_penalty=settings.repetition_penalty, do_sample=False, num_beams=1,
        )[0]  # fmt: skip
        assert settings.min_length <= len(made) <= settings.max_length
        ids = [i for i in made[asked.shape[1] - 1 :].tolist() if i < len(tokenizer)]
        assert written(captioner, [record], settings) == [[tokenizer.decode(ids, skip_special_tokens=True)]]


def test_scores_are_the_matching_heads_of_transformers_with_enc_in_front(matcher, directories, some) -> None:
    model = BlipForImageTextRetrieval.from_pretrained(directories[1]).eval()
    tokenizer, processor = (
        AutoTokenizer.from_pretrained(directories[1]),
        BlipImageProcessorPil.from_pretrained(directories[1]),
    )
    texts = [["a red circle", "two dogs near the white house"], ["a blue shape"], []]
    scores = matcher.score([opened(record) for record in some[:3]], texts)
    assert [len(of_image) for of_image in scores] == [2, 1, 0]
    for record, asked, found in zip(some, texts, scores, strict=False):
        for text, score in zip(asked, found, strict=True):
            read = tokenizer(text, return_tensors="pt")
            read["input_ids"][:, 0] = model.config.text_config.vocab_size - 1
            pixels = processor(opened(record), return_tensors="pt")["pixel_values"]
            with torch.no_grad():
                wanted = model(pixel_values=pixels, **{k: read[k] for k in ("input_ids", "attention_mask")}).itm_score
            assert score == pytest.approx(float(torch.softmax(wanted, -1)[0, 1]), abs=1e-5)
    assert len({round(score, 3) for of_image in scores for score in of_image}) == 3


def test_rows_judged_at_once_do_not_change_scores(directories, matcher, some) -> None:
    images, texts = [opened(record) for record in some], [["a red circle", "the small blue shape on it"]] * len(some)
    narrow = BlipFilter(directories[1], rows=3).score(images, texts)
    assert narrow == [pytest.approx(found, abs=1e-6) for found in matcher.score(images, texts)]


def test_what_is_kept_scores_at_least_the_threshold_and_says_where_it_is_from(capfilt, directories, some) -> None:
    everything, all_counts = bootstrap(some, capfilt.captioner, capfilt.matcher, replace(SETTINGS, threshold=0.0))
    scores = sorted(caption.score for record in everything for caption in record.synthetic_captions)
    assert all_counts.kept == all_counts.distinct == len(scores) > len(some)
    threshold = scores[len(scores) // 2]
    result, counts = bootstrap(some, capfilt.captioner, capfilt.matcher, replace(SETTINGS, threshold=threshold))
    assert 0 < counts.kept < counts.distinct == all_counts.distinct
    assert counts.kept_share == counts.kept / counts.distinct
    assert sum(counts.histogram) == counts.distinct
    for before, full, after in zip(some, everything, result, strict=True):
        assert after.captions == before.captions and after.questions == before.questions and after.image == before.image
        kept = [caption.text for caption in full.synthetic_captions if caption.score >= threshold]
        assert [caption.text for caption in after.synthetic_captions] == kept
        assert {caption.model for caption in after.synthetic_captions} <= {checkpoint_hash(directories[0])}
        assert {caption.threshold for caption in after.synthetic_captions} <= {threshold}


def test_human_captions_are_held_to_the_threshold_on_request(capfilt, some) -> None:
    scored = [capfilt.matcher.score([opened(record)], [record.captions])[0] for record in some]
    threshold = sorted(score for of_image in scored for score in of_image)[2]
    settings = replace(SETTINGS, threshold=threshold - 1e-4, filter_human=True)
    result, counts = bootstrap(some, capfilt.captioner, capfilt.matcher, settings)
    for record, scores, after in zip(some, scored, result, strict=True):
        assert after.captions == tuple(
            text for text, score in zip(record.captions, scores, strict=True) if score > threshold - 1e-4
        )
    assert 0 < counts.human_kept == sum(len(record.captions) for record in result) < counts.human


def test_unreadable_images_pass_as_they_are_and_are_counted(capfilt, some) -> None:
    broken = replace(some[1], image=b"\x89PNG no image")
    result, counts = bootstrap([some[0], broken, some[2]], capfilt.captioner, capfilt.matcher, SETTINGS)
    assert result[1] == broken and counts.unreadable == 1 and counts.images == 3
    whole, _ = bootstrap([some[0], some[2]], capfilt.captioner, capfilt.matcher, SETTINGS)
    assert [result[0], result[2]] == whole


def test_repeated_runs_replace_their_own_captions_and_keep_those_of_others(capfilt, some) -> None:
    once, _ = bootstrap(some, capfilt.captioner, capfilt.matcher, SETTINGS)
    twice, _ = bootstrap(once, capfilt.captioner, capfilt.matcher, SETTINGS)
    assert twice == once
    foreign = [
        replace(r, synthetic_captions=tuple(replace(c, model="other") for c in r.synthetic_captions)) for r in once
    ]
    both, _ = bootstrap(foreign, capfilt.captioner, capfilt.matcher, SETTINGS)
    for record, before, own in zip(both, foreign, once, strict=True):
        assert record.synthetic_captions == before.synthetic_captions + own.synthetic_captions


@pytest.mark.parametrize("world_size", [2, 5])
def test_shards_do_not_depend_on_the_number_of_processes(source, whole, capfilt, tmp_path, world_size: int) -> None:
    assert make(source, tmp_path, capfilt, world_size).images == 9
    assert shard_bytes(tmp_path) == shard_bytes(whole) and len(shard_bytes(whole)) == 3
    for name in ("train/manifest.json", "capfilt-train.json"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


def test_output_is_an_ordinary_split_that_streams(source, whole, capfilt) -> None:
    assert is_intact(whole, "train")
    made, given = list(records(whole, "train")), list(records(source, "train"))
    assert [record.key for record in made] == [record.key for record in given]
    assert [replace(record, synthetic_captions=()) for record in made] == given
    data = DataConfig(root=str(whole), tasks={"caption": 1.0})
    assert len(list(epoch_samples(data, "caption", seed=0, epoch=0))) == len(made)
    report = json.loads((whole / "capfilt-train.json").read_text())
    assert report["captioner"] == capfilt.captioner.name and report["settings"]["threshold"] == SETTINGS.threshold
    kept = sum(len(record.synthetic_captions) for record in made)
    assert report["counts"]["kept"] == kept > 0
    assert report["kept_share"] == kept / report["counts"]["distinct"]
    assert not (whole / ".train.capfilt").exists()


class Counting:
    """A captioner that remembers what it was asked, and dies when told to."""

    def __init__(self, captioner: BlipCaptioner, last: int | None = None) -> None:
        self.captioner, self.name, self.last = captioner, captioner.name, last
        self.keys: list[str] = []

    def write(self, images, keys, settings):
        self.keys += keys
        if self.last is not None and len(self.keys) > self.last:
            raise KeyboardInterrupt
        return self.captioner.write(images, keys, settings)


def test_a_killed_run_keeps_its_whole_shards_and_goes_on(source, whole, capfilt, tmp_path) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(source, tmp_path, replace(capfilt, captioner=Counting(capfilt.captioner, last=5)))
    assert not (tmp_path / "train" / "manifest.json").exists()
    with pytest.raises(UserError, match="not whole"):
        finish(source, tmp_path, "train", capfilt)
    rest = Counting(capfilt.captioner)
    make(source, tmp_path, replace(capfilt, captioner=rest), world_size=2)
    keys = [record.key for record in records(source, "train")]
    assert sorted(rest.keys) == sorted(keys[4:])  # the first shard was whole
    assert shard_bytes(tmp_path) == shard_bytes(whole)


def test_a_run_killed_while_its_shards_are_put_together_goes_on(source, whole, capfilt, tmp_path) -> None:
    run_rank(source, tmp_path, "train", capfilt, batch_size=3)
    (tmp_path / "train").mkdir()
    (tmp_path / ".train.capfilt" / "000001.tar").rename(tmp_path / "train" / "000001.tar")
    rest = Counting(capfilt.captioner)
    make(source, tmp_path, replace(capfilt, captioner=rest))
    assert rest.keys == [] and shard_bytes(tmp_path) == shard_bytes(whole)


def test_a_damaged_shard_is_made_again(source, whole, capfilt, tmp_path) -> None:
    run_rank(source, tmp_path, "train", capfilt, batch_size=3)
    path = tmp_path / ".train.capfilt" / "000001.tar"
    path.write_bytes(path.read_bytes()[:-512])
    rest = Counting(capfilt.captioner)
    make(source, tmp_path, replace(capfilt, captioner=rest))
    assert rest.keys == [record.key for record in records(source, "train")][4:8]
    assert shard_bytes(tmp_path) == shard_bytes(whole)


def test_finished_work_is_kept_and_other_settings_are_refused(source, whole, capfilt, tmp_path) -> None:
    assert finished(source, tmp_path, "train", capfilt) is None
    counts = finished(source, whole, "train", capfilt)
    assert counts is not None and counts.images == 9
    other = replace(capfilt, settings=replace(SETTINGS, top_p=0.5))
    with pytest.raises(UserError, match=r"top_p 0\.9, not 0\.5"):
        finished(source, whole, "train", other)
    run_rank(source, tmp_path, "train", capfilt, rank=2, world_size=3)
    with pytest.raises(UserError, match=r"top_p 0\.9, not 0\.5"):
        run_rank(source, tmp_path, "train", other, rank=2, world_size=3)
    fewer = tmp_path / "fewer"
    write_split(fewer, dataset="easyvqa", split="train", records=list(records(source, "train"))[:3], total=3)
    with pytest.raises(UserError, match="other shards"):
        finished(fewer, whole, "train", capfilt)
    with pytest.raises(UserError, match="not made by this program"):
        finished(source, source, "train", capfilt)


def test_other_splits_are_copied_byte_by_byte(tiny_root, tmp_path) -> None:
    assert copy_split(tiny_root, tmp_path, "test") == read_manifest(tiny_root, "test")
    assert shard_bytes(tmp_path, "test") == shard_bytes(tiny_root, "test")
    assert is_intact(tmp_path, "test")


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"captions": 0}, "--captions 0"),
        ({"top_p": 0.0}, "--top-p"),
        ({"top_k": -1}, "--top-k"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty"),
        ({"min_length": 31}, "--min-length 31"),
        ({"threshold": 1.5}, "--threshold 1.5"),
    ],
)
def test_impossible_settings_name_their_flag(change: dict[str, float], flag: str) -> None:
    with pytest.raises(UserError, match=flag):
        replace(CapFiltSettings(), **change).check()


def test_models_that_are_not_what_they_should_be_are_refused(directories, tmp_path) -> None:
    with pytest.raises(UserError, match=r"lacks \d+ weights of BlipForConditionalGeneration"):
        BlipCaptioner(directories[1])
    with pytest.raises(UserError, match=r"lacks 2 weights of BlipForImageTextRetrieval|lacks \d+ weights"):
        BlipFilter(directories[0])
    (tmp_path / "config.json").write_text('{"model_type": "blip-2"}')
    with pytest.raises(UserError, match="wants a BLIP model"):
        BlipFilter(tmp_path)
    with pytest.raises(MissingFileError):
        BlipFilter(tmp_path / "nowhere")


def test_counts_add_up() -> None:
    one = Counts(images=2, kept=1, distinct=3, score_sum=0.5, histogram=(1, 2, *(0,) * 8))
    assert one + one == Counts(images=4, kept=2, distinct=6, score_sum=1.0, histogram=(2, 4, *(0,) * 8))
    assert Counter(vars(sum([one, one, one], Counts())))["images"] == 6
