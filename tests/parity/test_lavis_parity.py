"""What is imported from LAVIS's files answers as LAVIS did: transformers' class and our backbone, against LAVIS's own tensors.

The reference is committed; where ``.venv-lavis`` exists (``make lavis-env``), the real LAVIS is run again and must agree with
it.  Float32 on two versions of everything: logits of spread 1 agree within 1e-5.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Blip2ForConditionalGeneration

from free_dist.data.pretrained import load_pretrained
from free_dist.data.samples import Turn
from free_dist.decoding import generate
from tests.parity.committed import PUBLISHED, REFERENCE, Reference, read_reference

pytestmark = pytest.mark.parity

TOLERANCE = {"rtol": 1e-5, "atol": 3e-5}
"""Float32 on another processor: sums in another order."""
N_TOKENS = 8
SIDE_ENVIRONMENT = Path(__file__).parents[2] / ".venv-lavis"
SCRIPT = Path(__file__).with_name("make_lavis_reference.py")


@pytest.fixture(scope="module")
def hugging_face(imported: Path) -> Blip2ForConditionalGeneration:
    """Transformers' own class on the imported directory."""
    model, info = Blip2ForConditionalGeneration.from_pretrained(
        imported, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


def full_ids(reference: Reference, image_token_id: int) -> tuple[Tensor, Tensor]:
    """LAVIS's ids and mask of the three captions behind the placeholders of transformers, [3, Q + T]."""
    ids, mask = reference.tensors["input_ids"], reference.tensors["mask"]
    places = torch.full((len(ids), reference.tensors["prefix"].shape[1]), image_token_id)
    return torch.cat((places, ids), 1), torch.cat((torch.ones_like(places), mask), 1)


def decoder_ids(labels: Tensor) -> Tensor:
    """T5's decoder reads its start token and the answer but for the last token, [B, N]."""
    return torch.cat((torch.zeros_like(labels[:, :1]), labels[:, :-1]), 1)


@torch.no_grad()
def test_transformers_own_class_gives_the_logits_of_lavis(reference: Reference, hugging_face) -> None:
    ids, mask = full_ids(reference, hugging_face.config.image_token_id)
    more, counted = {}, mask.bool()
    if "labels" in reference.tensors:
        written = reference.tensors["labels_mask"]
        more = {"decoder_input_ids": decoder_ids(reference.tensors["labels"]), "decoder_attention_mask": written}
        counted = written.bool()
    logits = hugging_face(pixel_values=reference.tensors["image"], input_ids=ids, attention_mask=mask, **more).logits
    assert logits.std() > 0.5, "logits too small for the tolerance to mean anything"
    torch.testing.assert_close(logits[counted], reference.tensors["logits"][counted], **TOLERANCE)


@torch.no_grad()
def test_our_backbone_gives_the_prefix_and_logits_of_lavis(reference: Reference, imported: Path) -> None:
    backbone, _ = load_pretrained(str(imported))
    tensors = reference.tensors
    prefix = backbone.encode_prefix(tensors["image"])
    assert (prefix - prefix.mean(0)).abs().mean() > 0.01, "images too much alike to tell a wrong vision tower"
    torch.testing.assert_close(prefix, tensors["prefix"], **TOLERANCE)
    ids, mask = full_ids(reference, backbone.layout.image_token_id)
    ids = ids.masked_fill(mask == 0, backbone.layout.pad_token_id)
    written, counted = None, mask.bool()
    if "labels" in tensors:
        written, counted = decoder_ids(tensors["labels"]), tensors["labels_mask"].bool()
    features = backbone(tensors["image"], torch.arange(3), ids, (1, 2), decoder_ids=written)
    logits = backbone.lm_head(features.final)
    torch.testing.assert_close(logits[counted], tensors["logits"][counted], **TOLERANCE)


def test_greedy_tokens_are_those_of_lavis_generate(reference: Reference, imported: Path, hugging_face) -> None:
    backbone, encoder = load_pretrained(str(imported))
    prompts = [encoder.encode_prompt([Turn(prompt=text, answer="")]) for text in reference.notes["prompts"]]
    wanted = reference.notes["generated"]
    assert len({tuple(tokens) for tokens in wanted}) == len(wanted), "answers that are all alike compare nothing"
    image = reference.tensors["image"]
    ours = generate(backbone, None, image, prompts, max_new_tokens=N_TOKENS)
    assert [row.tokens for row in ours] == wanted
    for row, prompt in enumerate(prompts):
        made = hugging_face.generate(
            pixel_values=image[row : row + 1],
            input_ids=torch.tensor([prompt]),
            max_new_tokens=N_TOKENS,
            do_sample=False,
        )
        assert made[0].tolist()[-N_TOKENS:] == wanted[row]


def test_answers_end_with_the_token_that_ends_them_in_lavis(
    opt: Reference, reference: Reference, imported: Path
) -> None:
    backbone, encoder = load_pretrained(str(imported))
    if reference.folder == opt.folder:
        assert backbone.layout.eos_token_id == opt.notes["eos_token_id"] == encoder.tokenizer.encode("\n")[-1]
    else:
        assert backbone.layout.eos_token_id == encoder.tokenizer.convert_tokens_to_ids("</s>") == 1


@pytest.mark.skipif(not (SIDE_ENVIRONMENT / ".installed").exists(), reason="no .venv-lavis: make lavis-env builds it")
def test_lavis_itself_still_answers_as_committed(tmp_path: Path) -> None:
    command = [str(SIDE_ENVIRONMENT / "bin" / "python"), str(SCRIPT), "--out", str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / PUBLISHED).read_bytes() == (REFERENCE / PUBLISHED).read_bytes()
    for committed in sorted(path for path in REFERENCE.iterdir() if path.is_dir()):
        old, new = read_reference(committed), read_reference(tmp_path / committed.name)
        assert old.notes == new.notes
        torch.testing.assert_close(new.tensors, old.tensors, **TOLERANCE)
        for file in ("checkpoint.pth", "eva_vit_g.pth"):
            if (committed / file).exists():
                weights = [
                    torch.load(folder / file, weights_only=True) for folder in (committed, tmp_path / committed.name)
                ]
                torch.testing.assert_close(*[content.get("model", content) for content in weights], rtol=0, atol=0)
