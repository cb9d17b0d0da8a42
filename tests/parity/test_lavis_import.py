"""The importer: every tensor accounted for, sizes that do not fit, damaged and dangerous files, what is written and when."""

from __future__ import annotations

import json
import os
import pickle
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import Blip2ForConditionalGeneration, Blip2Processor, OPTConfig, OPTForCausalLM

from free_dist.backbones import lavis
from free_dist.backbones.lavis import import_lavis, read_pth
from free_dist.backbones.lavis_config import lavis_config, resized_positions
from free_dist.backbones.published import published_config
from free_dist.config import MissingFileError, UserError
from free_dist.data.pretrained import load_pretrained
from free_dist.data.samples import Turn
from tests.parity.committed import PUBLISHED, REFERENCE, Reference

SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "layer_norm_eps",
    "cross_attention_frequency",
    "encoder_hidden_size",
)
REPOSITORY = Path(__file__).parents[2]


def test_missing_tensors_are_all_named(changed, tmp_path: Path) -> None:
    gone = ["ln_vision.bias", "Qformer.bert.encoder.layer.2.crossattention.self.key.weight"]
    files = changed(lambda weights: [weights.pop(name) for name in gone])
    with pytest.raises(UserError, match="2 missing tensors") as told:
        import_lavis(files, tmp_path / "out")
    assert "vision_model.post_layernorm.bias" in str(told.value)
    assert "qformer.encoder.layer.2.crossattention.attention.key.weight" in str(told.value)
    assert not (tmp_path / "out").exists()


def test_half_of_a_pair_of_biases_is_missing_not_zero(opt: Reference, tmp_path: Path) -> None:
    vision = torch.load(opt.folder / "eva_vit_g.pth", weights_only=True)
    del vision["blocks.1.attn.v_bias"]
    torch.save(vision, tmp_path / "eva.pth")
    with pytest.raises(UserError, match=r"vision_model\.encoder\.layers\.1\.self_attn\.qkv\.bias"):
        import_lavis(replace(opt.files, vision=tmp_path / "eva.pth"), tmp_path / "out")


@pytest.mark.parametrize(
    "name",
    [
        "visual_encoder.blocks.0.gamma_1",
        "Qformer.bert.encoder.layer.0.adapter.weight",
        "prompt_tokens",
        "t5_proj.weight",
        "opt_model.model.decoder.layers.9.fc1.weight",
    ],
)
def test_unexpected_tensors_are_named(changed, name: str, tmp_path: Path) -> None:
    files = changed(lambda weights: weights.update({name: torch.zeros(2)}))
    with pytest.raises(UserError, match="1 unexpected tensors") as told:
        import_lavis(files, tmp_path / "out")
    assert name.removeprefix("opt_model.") in str(told.value)


def test_without_the_vision_tower_the_error_names_the_flag(opt: Reference, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--vision"):
        import_lavis(replace(opt.files, vision=None), tmp_path / "out")


def test_parts_of_stage_one_are_left_out_and_reported(opt: Reference, changed, tmp_path: Path) -> None:
    extra = {
        "temp": torch.zeros(()),
        "itm_head.weight": torch.zeros(2, 16),
        "vision_proj.bias": torch.zeros(4),
        "Qformer.cls.predictions.bias": torch.zeros(9),
        "Qformer.bert.embeddings.word_embeddings.weight": torch.zeros(9, 16),
        "Qformer.bert.encoder.layer.1.output.dense.bias": torch.zeros(16),
        "visual_encoder.norm.weight": torch.zeros(24),
    }
    with_extra = import_lavis(changed(lambda weights: weights.update(extra)), tmp_path / "with")
    assert set(with_extra.left_out) == {*extra, "Qformer.bert.embeddings.position_ids"}
    without = import_lavis(opt.files, tmp_path / "without")
    assert weights_equal(with_extra.directory, without.directory)


def test_of_eva_gs_forty_blocks_the_first_thirty_nine_are_kept() -> None:
    weights = {f"visual_encoder.blocks.{i}.norm1.weight": torch.full((2,), float(i)) for i in range(40)}
    depth = lavis.vision_depth(weights)
    found = lavis.to_transformers(weights, lavis.KINDS["blip2-opt"], depth=depth)
    assert depth == 39
    assert found.left_out == ["visual_encoder.blocks.39.norm1.weight"]
    assert found.tensors["vision_model.encoder.layers.38.layer_norm1.weight"][0] == 38


def test_every_tensor_of_the_published_sizes_has_its_place() -> None:
    shapes = json.loads((REFERENCE / PUBLISHED).read_text())
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    kind, published = lavis.KINDS["blip2-opt"], published_config("blip2-opt-2.7b")
    found = lavis.to_transformers(weights, kind, depth=lavis.vision_depth(weights))
    config = lavis_config(found.tensors, kind, published.text_config, image_token_id=published.image_token_id)
    for name in SIZES:
        assert config.vision_config.to_dict().get(name) == published.vision_config.to_dict().get(name), name
        assert config.qformer_config.to_dict().get(name) == published.qformer_config.to_dict().get(name), name
    assert config.num_query_tokens == 32
    with torch.device("meta"):
        model = Blip2ForConditionalGeneration(config)
    wanted = {
        name: tensor.shape for name, tensor in model.state_dict().items() if not name.startswith("language_model.")
    }
    assert {name: tensor.shape for name, tensor in found.tensors.items()} == wanted
    assert found.unexpected == [] and not found.language_model
    stage_one = ("Qformer.cls.", "Qformer.bert.embeddings.", "Qformer.bert.encoder.layer.")
    assert all(name.startswith(stage_one) for name in found.left_out)
    assert len(found.left_out) + len(wanted) == len(weights) - 39, "39 pairs of biases became one each"


def test_a_checkpoints_own_vision_tower_wins_over_the_published_one(opt: Reference, changed, tmp_path: Path) -> None:
    trained = torch.full((1, 1, 24), 3.0)
    files = changed(lambda weights: weights.update({"visual_encoder.cls_token": trained}))
    written = load_file(import_lavis(files, tmp_path / "out").directory / "model.safetensors")
    assert torch.equal(written["vision_model.embeddings.class_embedding"], trained)


def test_a_later_checkpoint_wins_over_an_earlier_one(opt: Reference, changed, tmp_path: Path) -> None:
    newer = changed(lambda weights: weights.update({"opt_proj.bias": torch.full((32,), 7.0)})).checkpoints
    files = replace(opt.files, checkpoints=(*opt.files.checkpoints, *newer))
    written = load_file(import_lavis(files, tmp_path / "a").directory / "model.safetensors")
    assert (written["language_projection.bias"] == 7).all()
    files = replace(opt.files, qformer=newer[0])
    written = load_file(import_lavis(files, tmp_path / "b").directory / "model.safetensors")
    assert not (written["language_projection.bias"] == 7).any()


def test_a_language_model_trained_along_replaces_the_directorys(opt: Reference, changed, tmp_path: Path) -> None:
    name = "model.decoder.layers.1.fc1.bias"
    files = changed(lambda weights: weights.update({f"opt_model.{name}": torch.full((64,), 2.0)}))
    written = load_file(import_lavis(files, tmp_path / "out").directory / "model.safetensors")
    assert (written[f"language_model.{name}"] == 2).all()


def test_language_model_of_another_width_is_refused(opt: Reference, changed, tmp_path: Path) -> None:
    files = changed(
        lambda weights: weights.update({"opt_proj.weight": torch.zeros(48, 16), "opt_proj.bias": torch.zeros(48)})
    )
    with pytest.raises(UserError, match=r"--language-model: its width is 32, .* leads to 48"):
        import_lavis(files, tmp_path / "out")


def test_language_model_of_another_kind_is_refused(opt: Reference, t5: Reference, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is 't5', --kind blip2-opt wants 'opt'"):
        import_lavis(replace(opt.files, language_model=t5.files.language_model), tmp_path / "out")


def test_misshapen_tensor_is_named_with_both_shapes(changed, tmp_path: Path) -> None:
    files = changed(lambda weights: weights.update({"ln_vision.weight": torch.zeros(25)}))
    with pytest.raises(UserError, match=r"vision_model\.post_layernorm\.weight \(25,\) instead of \(24,\)"):
        import_lavis(files, tmp_path / "out")


def test_language_model_tensor_of_another_shape_is_named(changed, tmp_path: Path) -> None:
    files = changed(lambda weights: weights.update({"opt_model.lm_head.weight": torch.zeros(341, 48)}))
    with pytest.raises(UserError, match=r"lm_head\.weight \(341, 48\) instead of \(341, 32\)"):
        import_lavis(files, tmp_path / "out")


def test_heads_that_the_checkpoint_cannot_tell_must_be_given(opt: Reference, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--vision-heads"):
        import_lavis(replace(opt.files, vision_heads=None), tmp_path / "out")
    with pytest.raises(UserError, match="--qformer-heads 3: does not divide"):
        import_lavis(replace(opt.files, qformer_heads=3), tmp_path / "out")


@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_cut_off_file_is_refused(opt: Reference, keep: float, tmp_path: Path) -> None:
    whole = (opt.folder / "checkpoint.pth").read_bytes()
    path = tmp_path / "cut.pth"
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(UserError, match=r"cut\.pth is damaged or cut off"):
        read_pth(path)


def test_file_that_would_run_code_is_refused_and_the_code_does_not_run(tmp_path: Path) -> None:
    trap = tmp_path / "sprung"

    class Attack:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return os.mkdir, (str(trap),)

    torch.save({"model": {"query_tokens": Attack()}}, tmp_path / "zip.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"model": {"query_tokens": Attack()}}, protocol=2))
    for name in ("zip.pth", "plain.pth"):
        with pytest.raises(UserError, match=rf"{name}.*would run code"):
            read_pth(tmp_path / name)
    assert not trap.exists()


def test_files_in_torchs_older_format_are_read_alike(opt: Reference, tmp_path: Path) -> None:
    content = torch.load(opt.folder / "checkpoint.pth", weights_only=True)
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.testing.assert_close(read_pth(tmp_path / "old.pth"), read_pth(opt.folder / "checkpoint.pth"), rtol=0, atol=0)


def test_file_without_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"model": {"epoch": 3}}, tmp_path / "numbers.pth")
    with pytest.raises(UserError, match="not tensors: epoch"):
        read_pth(tmp_path / "numbers.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(UserError, match="want tensors by name"):
        read_pth(tmp_path / "list.pth")
    with pytest.raises(MissingFileError, match=r"absent\.pth does not exist"):
        read_pth(tmp_path / "absent.pth")


@pytest.mark.parametrize("damage", ["missing", "cut off", "pickle cut off"])
def test_damaged_language_model_is_refused(opt: Reference, damage: str, tmp_path: Path) -> None:
    broken = tmp_path / "language_model"
    model, _ = load_language_model(opt)
    model.save_pretrained(broken)
    shutil.copytree(opt.files.language_model, broken, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.bin"))
    weights = broken / "model.safetensors"
    if damage == "missing":
        weights.unlink()
    elif damage == "pickle cut off":
        weights.unlink()
        content = (opt.files.language_model / "pytorch_model.bin").read_bytes()
        (broken / "pytorch_model.bin").write_bytes(content[: len(content) // 2])
    else:
        weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="--language-model"):
        import_lavis(replace(opt.files, language_model=broken), tmp_path / "out")


def load_language_model(reference: Reference) -> tuple[torch.nn.Module, Path]:
    return OPTForCausalLM.from_pretrained(reference.files.language_model), reference.files.language_model


def test_existing_directory_is_never_touched(opt: Reference, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        import_lavis(opt.files, tmp_path)


def test_an_import_that_fails_while_saving_leaves_nothing(opt: Reference, tmp_path: Path, monkeypatch) -> None:
    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Blip2Processor, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space left"):
        import_lavis(opt.files, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_large_models_are_written_in_shards_that_transformers_reads(opt: Reference, tmp_path: Path) -> None:
    whole = import_lavis(opt.files, tmp_path / "whole").directory
    sharded = import_lavis(replace(opt.files, max_shard_size="100KB"), tmp_path / "sharded").directory
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    assert (sharded / "model.safetensors.index.json").is_file()
    first, second = (Blip2ForConditionalGeneration.from_pretrained(folder) for folder in (whole, sharded))
    torch.testing.assert_close(second.state_dict(), first.state_dict(), rtol=0, atol=0)


MEASURE = """
import sys
from dataclasses import replace
from pathlib import Path
from free_dist.backbones.lavis import import_lavis
from tests.parity.committed import REFERENCE, read_reference

def peak():
    # Not getrusage: its maximum starts at that of the process which started this one.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024

folder = Path(sys.argv[1])
files = read_reference(REFERENCE / "blip2_opt").files
import_lavis(files, folder / "small")
before = peak()
import_lavis(replace(files, language_model=folder / "language_model"), folder / "large")
print("grew by", peak() - before)
"""


def test_no_more_than_one_copy_of_the_language_model_is_ever_in_memory(opt: Reference, tmp_path: Path) -> None:
    stored = tmp_path / "language_model"
    shutil.copytree(opt.files.language_model, stored, ignore=shutil.ignore_patterns("*.bin"))
    config = OPTConfig.from_pretrained(stored)
    config.ffn_dim = 400_000
    with torch.device("meta"):
        large = OPTForCausalLM(config).half()
    large.to_empty(device="cpu").tie_weights()
    large.save_pretrained(stored)
    size = (stored / "model.safetensors").stat().st_size
    finished = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    growth = int(finished.stdout.split()[-1])
    assert 0.6 * size < growth < 1.5 * size, f"the peak grew by {growth} bytes for a model of {size}"


def test_weights_keep_the_precision_they_were_stored_in(opt: Reference, tmp_path: Path) -> None:
    written = load_file(import_lavis(opt.files, tmp_path / "out").directory / "model.safetensors")
    stored = torch.load(opt.files.language_model / "pytorch_model.bin", weights_only=True)
    types = {name.startswith("language_model."): tensor.dtype for name, tensor in written.items()}
    assert types == {True: torch.float16, False: torch.float32}
    name = "model.decoder.layers.0.fc1.weight"
    assert torch.equal(written[f"language_model.{name}"], stored[name])


def test_nothing_of_this_machine_is_written(opt: Reference, tmp_path: Path) -> None:
    directory = import_lavis(opt.files, tmp_path / "out").directory
    for path in directory.glob("*.json"):
        assert str(REPOSITORY) not in path.read_text() and str(tmp_path) not in path.read_text()


def test_processor_of_transformers_opens_the_directory(opt: Reference, tmp_path: Path) -> None:
    directory = import_lavis(opt.files, tmp_path / "out").directory
    processor = Blip2Processor.from_pretrained(directory)
    backbone, encoder = load_pretrained(str(directory))
    assert processor.num_query_tokens == backbone.layout.num_query_tokens == 5
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == backbone.layout.image_token_id
    assert encoder.image_processor.size == {"height": 42, "width": 42}
    read = processor(images=Image.new("RGB", (50, 60)), text="a photo of", return_tensors="pt")
    assert read["pixel_values"].shape == (1, 3, 42, 42)
    assert read["input_ids"][0].tolist() == encoder.encode_prompt([Turn(prompt="a photo of", answer="")])


@pytest.mark.parametrize("side", [2, 5])
def test_positions_are_resized_bicubically_and_the_class_token_is_kept(
    opt: Reference, side: int, tmp_path: Path
) -> None:
    old = torch.load(opt.folder / "eva_vit_g.pth", weights_only=True)["pos_embed"]
    imported = import_lavis(replace(opt.files, image_size=14 * side), tmp_path / "out")
    new = load_file(imported.directory / "model.safetensors")["vision_model.embeddings.position_embedding"]
    assert torch.equal(new[:, 0], old[:, 0])
    grid = old[:, 1:].double().reshape(3, 3, 24).permute(2, 0, 1)[None]
    wanted = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)[0].flatten(1).T
    torch.testing.assert_close(new[0, 1:].double(), wanted, rtol=0, atol=1e-5)
    assert json.loads((imported.directory / "config.json").read_text())["vision_config"]["image_size"] == 14 * side
    backbone, _ = load_pretrained(str(imported.directory))
    assert backbone.encode_prefix(torch.zeros(1, 3, 14 * side, 14 * side)).shape == (1, 5, 32)


def test_resizing_to_the_same_size_changes_nothing_and_half_precision_stays() -> None:
    positions = torch.randn(1, 10, 4).half()
    assert resized_positions(positions, 3) is positions
    assert resized_positions(positions, 6).dtype == torch.float16


def test_image_size_must_be_whole_patches(opt: Reference, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--image-size 50: not a multiple of the patch size 14"):
        import_lavis(replace(opt.files, image_size=50), tmp_path / "out")


def test_command_line_writes_what_the_function_does_and_tells_mistakes_in_one_line(
    opt: Reference, tmp_path: Path, monkeypatch, capsys
) -> None:
    launcher = runpy.run_path(str(REPOSITORY / "launch" / "import_lavis.py"))
    flags = ["--kind", "blip2-opt", "--checkpoint", str(opt.folder / "checkpoint.pth"), "--vision-heads", "3"]
    flags += ["--qformer-heads", "2", "--language-model", str(opt.files.language_model), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["import_lavis.py", *flags, "--vision", str(opt.folder / "absent.pth")])
    with pytest.raises(SystemExit, match="2"):
        launcher["main"]()
    assert capsys.readouterr().err.splitlines()[-1].endswith("absent.pth does not exist")
    monkeypatch.setattr(sys, "argv", ["import_lavis.py", *flags, "--vision", str(opt.folder / "eva_vit_g.pth")])
    launcher["main"]()
    printed = capsys.readouterr().out
    assert "saved: " in printed and "left out: Qformer.bert.embeddings.position_ids" in printed
    assert weights_equal(tmp_path / "out", import_lavis(opt.files, tmp_path / "again").directory)


def test_help_is_shown_without_torch() -> None:
    program = "import sys; sys.modules['torch'] = None; sys.argv = ['import_lavis.py', '--help']\n"
    program += f"import runpy; runpy.run_path({str(REPOSITORY / 'launch' / 'import_lavis.py')!r}, run_name='__main__')"
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert finished.returncode == 0 and all(kind in finished.stdout for kind in lavis.KINDS), finished.stderr


def weights_equal(first: Path, second: Path) -> bool:
    one, two = (load_file(folder / "model.safetensors") for folder in (first, second))
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
