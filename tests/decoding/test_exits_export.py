"""Exits saved and loaded again are the same exits, in whatever type the backbone is; anything else is refused by name."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Blip2ForConditionalGeneration

from free_dist.backbones import Blip2Backbone
from free_dist.backbones.checkpoint_hash import checkpoint_hash, loaded_from, stored_dtype
from free_dist.backbones.embedded import new_model
from free_dist.decoding import generate
from free_dist.exits import ExitBank, ExitVariant, trained_parameters
from free_dist.exits.export import MANIFEST, WEIGHTS, backbone_hash, load_exits, read_exits_manifest, save_exits
from free_dist.exits.manifest import BackboneFacts


@pytest.fixture
def exported(backbone, bank, tmp_path):
    directory = tmp_path / "export"
    save_exits(bank, directory, backbone=backbone, thresholds=[0.2, 0.4, 0.9], extra={"git_hash": "abc"})
    return directory


@pytest.fixture(scope="module")
def checkpoint(backbone, tmp_path_factory) -> Path:
    """The backbone's weights as a Hugging Face directory of one file, float32."""
    directory = tmp_path_factory.mktemp("checkpoint")
    backbone.model.save_pretrained(directory)
    return directory


@pytest.fixture
def filed(checkpoint, bank, tmp_path):
    """An export that knows its backbone by the files of ``checkpoint``."""
    directory = tmp_path / "filed"
    save_exits(bank, directory, backbone=from_files(checkpoint), thresholds=0.5)
    return directory


def from_files(directory: Path, dtype: torch.dtype = torch.float32) -> Blip2Backbone:
    model = Blip2ForConditionalGeneration.from_pretrained(directory, dtype=dtype, local_files_only=True)
    return Blip2Backbone(model.eval().requires_grad_(False))


def change(directory: Path, **fields: object) -> None:
    """Replace fields of the manifest; a dictionary changes the entries that it names."""
    manifest = json.loads((directory / MANIFEST).read_text())
    for name, value in fields.items():
        manifest[name] = manifest[name] | value if isinstance(value, dict) and name in manifest else value
    (directory / MANIFEST).write_text(json.dumps(manifest))


def changed_bank(backbone: Blip2Backbone, variant: ExitVariant) -> ExitBank:
    """A bank of a variant, with every trainable weight moved away from where it starts."""
    bank = ExitBank(backbone, (2, 5), variant=variant, init="last").eval()
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in bank.transformers.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return bank.requires_grad_(False)


# The same exits again.


def test_round_trip_gives_identical_generation(backbone, bank, cases, exported) -> None:
    loaded = load_exits(backbone, exported)
    for pixels, prompt in cases:
        first, second = (
            generate(backbone, exits, pixels, prompt, thresholds=0.01, max_new_tokens=8) for exits in (bank, loaded)
        )
        assert first == second
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.lm_head is backbone.shared_modules()[1]


@pytest.mark.parametrize(
    "variant",
    [ExitVariant(), ExitVariant(name="lora", rank=3), ExitVariant(name="bottleneck", bottleneck_size=7)],
    ids=lambda variant: variant.name,
)
def test_every_variant_comes_back_with_its_sizes_and_generates_the_same(backbone, cases, tmp_path, variant) -> None:
    bank = changed_bank(backbone, variant)
    save_exits(bank, tmp_path, backbone=backbone, thresholds=0.5)
    loaded = load_exits(backbone, tmp_path)
    apart = load_exits(backbone, tmp_path, merged=False)
    assert apart.variant == bank.variant
    assert read_exits_manifest(tmp_path).init == "last"
    for name, tensor in bank.trainable_state_dict().items():
        assert torch.equal(tensor, apart.trainable_state_dict()[name])
    exits = set()
    for pixels, prompt in cases:
        first, second = (
            generate(backbone, exits, pixels, prompt, thresholds=0.01, max_new_tokens=8)
            for exits in (bank.merged(), loaded)
        )
        assert first == second
        exits |= set(first[0].exit_layers)
    assert exits & {2, 5}


def test_trained_numbers_of_an_export_are_those_that_it_stores_also_when_it_is_merged(backbone, tmp_path) -> None:
    counts = {}
    for name in ("full", "lora", "bottleneck", "classifier"):
        bank = changed_bank(backbone, ExitVariant(name=name, rank=2))
        save_exits(bank, tmp_path / name, backbone=backbone, thresholds=0.5)
        stored = load_file(tmp_path / name / WEIGHTS)
        for merged in (True, False):
            loaded = load_exits(backbone, tmp_path / name, merged=merged)
            counts[name] = trained_parameters(loaded)
            assert counts[name] == sum(tensor.numel() for tensor in stored.values())
            first = sum(tensor.numel() for weight, tensor in stored.items() if weight.startswith("transformers.0."))
            assert trained_parameters(loaded.subset([2])) == first
    assert counts["lora"] < counts["full"]


def test_low_rank_updates_are_stored_without_the_blocks_they_belong_to(backbone, tmp_path) -> None:
    bank = changed_bank(backbone, ExitVariant(name="lora", rank=3))
    save_exits(bank, tmp_path, backbone=backbone, thresholds=0.5)
    stored = sum(tensor.numel() for tensor in load_file(tmp_path / WEIGHTS).values())
    one_block = sum(parameter.numel() for parameter in backbone.block(1).parameters())
    assert stored < len(bank.exit_layers) * one_block / 2


def test_manifest_keeps_what_was_saved_and_no_temporary_file_stays(backbone, exported) -> None:
    manifest = read_exits_manifest(exported)
    assert manifest.exit_layers == (1, 3, 5)
    assert manifest.thresholds == (0.2, 0.4, 0.9)
    assert manifest.extra == {"git_hash": "abc"}
    assert manifest.backbone_hash == backbone_hash(backbone)
    assert manifest.backbone == BackboneFacts.of(backbone)
    assert manifest.backbone.layout["opening"] == list(backbone.layout.opening)
    assert sorted(path.name for path in exported.iterdir()) == [MANIFEST, WEIGHTS]


def test_export_holds_no_frozen_weight(exported) -> None:
    assert all(name.startswith("transformers.") for name in load_file(exported / WEIGHTS))


def test_an_export_of_format_1_is_still_read(backbone, bank, cases, exported) -> None:
    now = json.loads((exported / MANIFEST).read_text())
    kept = ("backbone_hash", "exit_layers", "thresholds", "weights_sha256", "extra")
    old = {"format_version": 1, "variant": "full"} | {name: now[name] for name in kept}
    (exported / MANIFEST).write_text(json.dumps(old))
    loaded = load_exits(backbone, exported)
    pixels, prompt = cases[1]
    first, second = (
        generate(backbone, exits, pixels, prompt, thresholds=0.01, max_new_tokens=8) for exits in (bank, loaded)
    )
    assert first == second
    manifest = read_exits_manifest(exported)
    assert (manifest.variant.name, manifest.backbone, manifest.calibrated) == ("full", None, {})


# Which backbone.


def test_parameters_hash_changes_with_one_bit_a_name_or_a_shape(backbone) -> None:
    wanted = backbone_hash(backbone)
    assert backbone_hash(copy.deepcopy(backbone)) == wanted
    changed = copy.deepcopy(backbone)
    weight = changed.block(2).fc1.weight.data
    weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    assert backbone_hash(changed) != wanted
    assert backbone_hash(torch.nn.Linear(2, 3, bias=False)) != backbone_hash(torch.nn.Linear(3, 2, bias=False))


def test_a_sharded_model_has_no_parameters_hash() -> None:
    with pytest.raises(ValueError, match="weight is empty: a sharded model"):
        backbone_hash(torch.nn.Linear(0, 3, bias=False))


def test_files_hash_is_the_same_for_one_file_and_for_shards(backbone, checkpoint, tmp_path) -> None:
    backbone.model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    assert checkpoint_hash(tmp_path) == checkpoint_hash(checkpoint)


@pytest.mark.parametrize("what", ["bit", "name", "dtype", "shape", "missing"])
def test_files_hash_changes_with_one_bit_a_name_a_type_a_shape_or_a_tensor(what: str, tmp_path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(2), "scalar": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    wanted = checkpoint_hash(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"other": "words"})
    assert checkpoint_hash(tmp_path) == wanted
    if what == "bit":
        tensors["a"][1, 2] = torch.nextafter(tensors["a"][1, 2], torch.tensor(9.0))
    elif what == "name":
        tensors["c"] = tensors.pop("b")
    elif what == "dtype":
        tensors["b"] = torch.zeros(2, dtype=torch.int32)  # the same bytes
    elif what == "shape":
        tensors["a"] = tensors["a"].reshape(3, 2).contiguous()
    else:
        del tensors["scalar"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert checkpoint_hash(tmp_path) != wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_exits_trained_in_float32_load_on_the_same_files_in_any_type(checkpoint, filed, cases, dtype) -> None:
    manifest = read_exits_manifest(filed)
    assert manifest.backbone_hash == checkpoint_hash(checkpoint)
    assert manifest.backbone is not None and manifest.backbone.dtype == stored_dtype(checkpoint) == "float32"
    backbone = from_files(checkpoint, dtype)
    loaded = load_exits(backbone, filed)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    pixels, prompt = cases[0]
    (result,) = generate(backbone, loaded, pixels.to(dtype), prompt, thresholds=0.0, max_new_tokens=2)
    assert result.exit_layers == [1, 1]


def test_exits_known_by_parameters_are_refused_in_another_type(backbone, exported) -> None:
    with pytest.raises(ValueError, match="in the type it was trained in"):
        load_exits(copy.deepcopy(backbone).bfloat16(), exported)


def test_a_backbone_that_went_through_bfloat16_is_still_known_by_its_files(checkpoint) -> None:
    assert loaded_from(from_files(checkpoint, torch.bfloat16).float()) == checkpoint


def test_files_are_not_taken_for_a_model_that_was_changed_since_or_only_has_their_config(checkpoint, filed) -> None:
    changed = from_files(checkpoint)
    changed.block(3).fc1.weight.mul_(1.01)
    untrained = Blip2Backbone(Blip2ForConditionalGeneration(changed.model.config).eval())
    assert untrained.model.name_or_path == str(checkpoint)
    for other in (changed, untrained):
        assert loaded_from(other) is None
        with pytest.raises(ValueError, match="not those of any files"):
            load_exits(other, filed)
    assert load_exits(changed, filed, verify=False).exit_layers == (1, 3, 5)


def test_facts_of_a_named_directory_need_no_weights_in_memory(checkpoint) -> None:
    facts = BackboneFacts.of(from_files(checkpoint))
    sharded = from_files(checkpoint)
    for parameter in sharded.parameters():
        parameter.data = parameter.data.new_empty(0)
    assert BackboneFacts.of(sharded, checkpoint) == facts


def test_another_backbone_of_the_same_shape_is_refused_naming_both(exported, filed, tmp_path) -> None:
    other = Blip2Backbone(new_model(width=32, n_blocks=6, n_heads=2, seed=5))
    with pytest.raises(ValueError, match=r"belongs to Blip2Backbone with hash .*, this one has [0-9a-f]"):
        load_exits(other, exported)
    other.model.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"belongs to checkpoint0 with hash files:\w+, .*/other has files:\w+"):
        load_exits(from_files(tmp_path / "other"), filed)


# What does not fit, is damaged, or is something else.


def test_an_exit_beyond_the_last_block_is_told(backbone, exported) -> None:
    shallow = Blip2Backbone(new_model(width=32, n_blocks=4, n_heads=2))
    with pytest.raises(ValueError, match="an exit after block 5, but this backbone has 4 blocks"):
        load_exits(shallow, exported)


@pytest.mark.parametrize(
    ("fact", "words"),
    [
        ({"vocab_size": 651}, "vocabulary mismatch: .* with 651, this backbone has 648"),
        ({"hidden_size": 64}, "width mismatch: .* with 64, this backbone has 32"),
        ({"n_blocks": 9}, "depth mismatch: .* with 9, this backbone has 6"),
        ({"block": "LlamaDecoderLayer"}, "kind of block: .* with LlamaDecoderLayer, this backbone has OPTDecoderLayer"),
    ],
)
def test_a_backbone_of_another_shape_is_told_before_it_is_hashed(backbone, exported, fact, words: str) -> None:
    change(exported, backbone=fact)
    for verify in (True, False):
        with pytest.raises(ValueError, match=words):
            load_exits(backbone, exported, verify=verify)


def test_other_token_ids_are_told(backbone, exported) -> None:
    layout = read_exits_manifest(exported).backbone.layout | {"eos_token_id": 77}
    change(exported, backbone={"layout": layout})
    with pytest.raises(ValueError, match=r"eos_token_id mismatch: .* with 77, this backbone has 2"):
        load_exits(backbone, exported)


@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS])
def test_a_missing_file_is_named(backbone, exported, name: str) -> None:
    (exported / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_exits(backbone, exported)


def test_damaged_weights_are_noticed(backbone, exported) -> None:
    content = bytearray((exported / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (exported / WEIGHTS).write_bytes(content)
    with pytest.raises(ValueError, match="checksum"):
        load_exits(backbone, exported)


@pytest.mark.parametrize("share", [0.999, 0.5, 0.001])
def test_truncated_weights_are_called_truncated(backbone, exported, share: float) -> None:
    content = (exported / WEIGHTS).read_bytes()
    (exported / WEIGHTS).write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=rf"{WEIGHTS} is truncated"):
        load_exits(backbone, exported)


class Trap:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["exits.pt", "pytorch_model.bin", WEIGHTS])
@pytest.mark.parametrize("is_zip", [True, False])
def test_a_pickle_is_named_and_never_loaded(backbone, exported, tmp_path, name: str, is_zip: bool) -> None:
    mark = tmp_path / "executed"
    (exported / WEIGHTS).unlink()
    if is_zip:
        torch.save({"weights": Trap(mark)}, exported / name)
    else:
        (exported / name).write_bytes(pickle.dumps(Trap(mark)))
    with pytest.raises(ValueError, match=rf"{name} is a pickle.*never loaded"):
        load_exits(backbone, exported)
    assert not mark.exists()
    if not is_zip:
        pickle.loads((exported / name).read_bytes())
        assert mark.exists()  # the trap works


@pytest.mark.parametrize("change_to", ["shape", "missing", "surplus"])
def test_weights_that_do_not_fit_are_named(backbone, exported, change_to: str) -> None:
    tensors = load_file(exported / WEIGHTS)
    name = "transformers.1.block.fc1.weight"
    if change_to == "shape":
        tensors[name] = tensors[name][:5].contiguous()
    elif change_to == "missing":
        del tensors[name]
    else:
        name = "transformers.7.block.fc1.weight"
        tensors[name] = torch.zeros(2)
    save_file(tensors, exported / WEIGHTS)
    change(exported, weights_sha256=hashlib.sha256((exported / WEIGHTS).read_bytes()).hexdigest())
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load_exits(backbone, exported)


@pytest.mark.parametrize("content", ["", "{}", '{"format_version": 1}', "[]", '{"format_version": 2}', "\x80"])
def test_a_file_that_is_no_manifest_is_named(backbone, exported, content: str) -> None:
    (exported / MANIFEST).write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=MANIFEST):
        load_exits(backbone, exported)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"format_version": 3}, "format 3, this version of free_dist reads 1 and 2"),
        ({"format_version": None}, "format None"),
        ({"variant": {"name": "magic"}}, "variant 'magic', .* knows full, lora, bottleneck"),
        ({"variant": {"size": 1}}, "not an exits manifest"),
        ({"thresholds": [0.1, 0.2]}, "2 thresholds for 3 exits"),
        ({"thresholds": [0.1, 0.2, -1.0]}, "want numbers that are not negative"),
        ({"exit_layers": [5, 3, 1]}, "in rising order"),
        ({"exit_layers": [0, 3, 5]}, "in rising order"),
        ({"surplus": 1}, "surplus"),
    ],
)
def test_a_manifest_that_cannot_be_used_says_why(backbone, exported, fields, words: str) -> None:
    change(exported, **fields)
    with pytest.raises(ValueError, match=words) as caught:
        load_exits(backbone, exported)
    assert MANIFEST in str(caught.value)


def test_thresholds_must_match_the_exits(backbone, bank, tmp_path) -> None:
    with pytest.raises(ValueError, match="2 values for 3 exits"):
        save_exits(bank, tmp_path, backbone_hash="0", thresholds=[0.1, 0.2])
    with pytest.raises(ValueError, match="or its hash"):
        save_exits(bank, tmp_path, thresholds=0.1)
