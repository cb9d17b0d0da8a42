"""Checkpoint directories: what loads is what the files hold, and what is wrong with them is told before they are read."""

from __future__ import annotations

import json
import pickle
import re
import resource
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "backbones"))

from checkpoints import COMBINATIONS, write_checkpoint

from free_dist.backbones.checkpoint_files import open_checkpoint, read_header
from free_dist.backbones.loading import check_vocabulary, load_model, read_config
from free_dist.config import (
    BackboneConfig,
    ConfigError,
    MissingFileError,
    Recipe,
    TrainingConfig,
    UserError,
)
from free_dist.data.pretrained import load_for_inference, load_pretrained
from free_dist.distributed import World
from free_dist.recipe_checks import check_recipe
from free_dist.training.trainer import train

TEXTS = ["what colour is the circle? red", "is there a blue square? yes", "a photo of a red circle"] * 4


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, PreTrainedModel]]:
    """``saved(name)``: the directory of a combination in several shards, and the model that was saved; do not change it."""
    made: dict[str, tuple[Path, PreTrainedModel]] = {}

    def make(name: str) -> tuple[Path, PreTrainedModel]:
        if name not in made:
            directory = tmp_path_factory.mktemp("loading") / name
            model = write_checkpoint(name, directory, TEXTS)
            (directory / "model.safetensors").unlink()
            config = (directory / "config.json").read_bytes()
            model.save_pretrained(directory, max_shard_size="100KB")
            (directory / "config.json").write_bytes(config)  # with the keys that are ours
            made[name] = directory, model
        return made[name]

    return make


@pytest.fixture
def directory(saved, tmp_path: Path) -> Path:
    """A sharded BLIP-2 of one's own, to be damaged."""
    return Path(shutil.copytree(saved("blip2-opt")[0], tmp_path / "checkpoint"))


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def as_pickle(directory: Path) -> dict[str, torch.Tensor]:
    """Replace the safetensors of a directory by a pickle of the same tensors."""
    tensors = {name: tensor for path in shards(directory) for name, tensor in load_file(path).items()}
    for path in (*shards(directory), directory / "model.safetensors.index.json"):
        path.unlink()
    torch.save(tensors, directory / "pytorch_model.bin")
    return tensors


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in COMBINATIONS), ("instructblip-flan-t5", torch.bfloat16)]
)
def test_what_was_saved_in_shards_loads_frozen_and_bit_for_bit(saved, name: str, dtype: torch.dtype) -> None:
    directory, model = saved(name)
    assert len(shards(directory)) > 2
    loaded = load_model(directory, dtype=dtype)
    assert type(loaded) is type(model) and not loaded.training
    found, wanted = (
        dict(loaded.named_parameters(remove_duplicate=False)),
        model.named_parameters(remove_duplicate=False),
    )
    for parameter, weight in wanted:
        assert found[parameter].dtype == dtype and not found[parameter].requires_grad
        assert torch.equal(found[parameter], weight.to(dtype)), parameter
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))


def test_dtype_auto_is_the_checkpoints_own(saved, tmp_path: Path) -> None:
    model = load_model(saved("blip2-opt")[0], dtype="bfloat16")
    model.save_pretrained(tmp_path)
    assert load_model(tmp_path, dtype="auto").dtype == torch.bfloat16
    assert load_model(saved("blip2-opt")[0], dtype="auto").dtype == torch.float32


def test_weights_are_counted_from_headers(saved) -> None:
    directory, model = saved("instructblip-vicuna")
    count = sum(parameter.numel() for parameter in model.parameters())
    checkpoint = open_checkpoint(directory)
    assert checkpoint.nbytes() == 4 * count and checkpoint.nbytes(torch.bfloat16) == 2 * count


def test_a_stored_tensor_is_read_when_a_torch_function_takes_it(saved) -> None:
    directory, model = saved("blip2-opt")
    stored = open_checkpoint(directory).tensors["query_tokens"]
    assert stored.shape == model.query_tokens.shape and stored.dtype == torch.float32
    copied = torch.empty(stored.shape).copy_(stored)
    assert torch.equal(copied, model.query_tokens)


def fails(directory: Path, *wanted: str, kind: type[UserError] = UserError, **options: object) -> None:
    """Loading raises one line that holds every string of ``wanted``."""
    with pytest.raises(kind) as caught:
        load_model(directory, **options)
    message = str(caught.value)
    assert "\n" not in message
    for part in wanted:
        assert part in message, message


def test_a_missing_shard_is_named(directory: Path) -> None:
    shards(directory)[1].unlink()
    fails(directory, "model.safetensors.index.json", "model-00002-of", "copy", kind=MissingFileError)


@pytest.mark.parametrize("kept", [0.999, 0.5, 0.001, 0.0])
def test_a_truncated_shard_is_named(directory: Path, kept: float) -> None:
    path = shards(directory)[-1]
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    fails(directory, str(path), "copy or download it again")


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"\xff" * 8 + content[8:],
        lambda content: content[:8] + b"x" + content[9:],
        lambda content: content + b"\0",
        lambda content: content.replace(b'"shape":[', b'"shape":[2,', 1),
        lambda content: content.replace(b'"shape":[', b'"shape":["', 1),
        lambda content: content.replace(b'"dtype"', b'"dtypo"', 1),
        lambda content: content.replace(b'"F32"', b'"F99"', 1),
    ],
)
def test_a_corrupt_header_is_told_with_its_file(directory: Path, damage: Callable[[bytes], bytes]) -> None:
    path = shards(directory)[0]
    content = path.read_bytes()
    path.write_bytes(damage(content))
    assert path.read_bytes() != content
    fails(directory, str(path))


@pytest.mark.parametrize(
    ("index", "wanted"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"weight_map": {"query_tokens": 3}}', "damaged"),
        ('{"weight_map": {"query_tokens": "../model.safetensors"}}', "not a file beside it"),
        ('{"weight_map": {"nowhere": "model-00001-of-00001.safetensors"}}', "not of one checkpoint"),
    ],
)
def test_a_damaged_index_is_named(directory: Path, index: str, wanted: str) -> None:
    shards(directory)[0].rename(directory / "model-00001-of-00001.safetensors")
    (directory / "model.safetensors.index.json").write_text(index)
    fails(directory, str(directory / "model"), wanted)


def test_a_shape_that_config_does_not_want_is_told_with_file_tensor_and_shapes(directory: Path) -> None:
    path = next(path for path in shards(directory) if "query_tokens" in read_header(path))
    rewrite(path, lambda tensors: tensors.update(query_tokens=torch.zeros(1, 5, 24)))
    fails(directory, str(path), "query_tokens", "[1, 5, 24]", "[1, 4, 24]")


def test_missing_and_unexpected_weights_are_listed_and_never_initialised(directory: Path) -> None:
    path = next(path for path in shards(directory) if "query_tokens" in read_header(path))
    rewrite(path, lambda tensors: tensors.update(stranger=tensors.pop("query_tokens")))
    index = directory / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"query_tokens"', '"stranger"'))
    fails(directory, "lack query_tokens")
    rewrite(path, lambda tensors: tensors.update(query_tokens=torch.zeros(1, 4, 24)))
    fails(directory, "no place for", "stranger")
    rewrite(path, lambda tensors: (tensors.pop("stranger"), tensors.update({"qformer.position_ids": torch.arange(4)})))
    index.write_text(index.read_text().replace('"stranger"', '"query_tokens"'))
    assert not load_model(directory).query_tokens.any(), "a stored constant is no weight, and what is stored is loaded"


def test_mistakes_are_told_without_reading_weights(directory: Path) -> None:
    huge = 8_000_000_000  # bytes, more than this test may ever hold
    name, columns = "language_model.lm_head.bias", huge // 4
    header = json.dumps({name: {"dtype": "F32", "shape": [columns], "data_offsets": [0, huge]}}).encode()
    path = directory / "model-00009-of-00009.safetensors"
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + huge)  # a hole: no disk is used
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][name] = path.name
    index.write_text(json.dumps(content))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fails(directory, "no place for", name)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000, "KiB"


def test_a_pickle_is_loaded_only_on_request_and_then_exactly(directory: Path) -> None:
    tensors = as_pickle(directory)
    fails(directory, "pytorch_model.bin is a pickle", "backbone.allow_pickle=true")
    fails(directory, "one tensor at a time", "zero_optimization.stage", allow_pickle=True, sharding=nullcontext())
    loaded = load_model(directory, allow_pickle=True).state_dict()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize("kept", [0.999, 0.9, 0.5, 0.1, 0.01, 0.0])
def test_a_truncated_pickle_is_told_in_one_line(directory: Path, kept: float) -> None:
    as_pickle(directory)
    path = directory / "pytorch_model.bin"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    fails(directory, "pytorch_model*.bin holds more than weights, or is damaged", allow_pickle=True)


def test_exits_are_not_trained_on_a_pickle_in_a_type_that_inference_does_not_load(directory: Path, tmp_path) -> None:
    as_pickle(directory)
    training = TrainingConfig(sample_every=0)
    recipe = Recipe(
        run_dir=str(tmp_path), backbone=BackboneConfig(path=str(directory), allow_pickle=True), training=training
    )
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    with pytest.raises(UserError, match=r"holds a pickle.*convert it to safetensors"):
        train(recipe, {"backbone": {"bf16": {"enabled": True}}}, world)


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.path,)  # type: ignore[return-value]


def test_a_pickle_never_runs_code(directory: Path, tmp_path: Path) -> None:
    tensors = as_pickle(directory)
    sprung = tmp_path / "sprung"
    torch.save(tensors | {"trap": Trap(sprung)}, directory / "pytorch_model.bin")
    with open(directory / "pytorch_model.bin", "rb") as file:
        torch.load(file, weights_only=False)
    assert sprung.exists(), "the trap must work"
    sprung.unlink()
    fails(directory, "holds more than weights", allow_pickle=True)
    assert not sprung.exists()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(sprung), protocol=2))
    fails(directory, "holds more than weights", allow_pickle=True)
    assert not sprung.exists()


def test_safetensors_are_preferred_to_a_pickle_beside_them(directory: Path) -> None:
    (directory / "pytorch_model.bin").write_bytes(b"not even a pickle")
    load_model(directory, allow_pickle=True)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [(None, "no config.json"), ("{", "is not JSON"), ("[]", "not a JSON object"), ('{"model_type": "opt"}', "'opt'")],
)
def test_a_directory_of_something_else_is_refused(directory: Path, content: str | None, wanted: str) -> None:
    (directory / "config.json").unlink()
    if content is not None:
        (directory / "config.json").write_text(content)
    fails(directory, str(directory), wanted)


def test_a_directory_without_weights_is_refused(directory: Path) -> None:
    for path in (*shards(directory), directory / "model.safetensors.index.json"):
        path.unlink()
    fails(directory, "model.safetensors", kind=MissingFileError)


def test_a_tokenizer_larger_than_the_embeddings_is_refused(directory: Path, saved) -> None:
    load_pretrained(str(directory))
    for path in saved("instructblip-vicuna")[0].glob("*token*"):
        if path.is_file():
            shutil.copy(path, directory)
    rows = read_config(directory)["text_config"]["vocab_size"]
    with pytest.raises(UserError, match=rf"gives .* the id \d+, but the language model has {rows} embeddings"):
        load_pretrained(str(directory))


@pytest.mark.parametrize("names", [("tokenizer.json", "tokenizer_config.json"), ("tokenizer.json",)])
def test_a_directory_without_its_tokenizer_is_refused(directory: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (directory / name).unlink()
    with pytest.raises(MissingFileError, match=r"backbone\.path: .*checkpoint has no tokenizer .*copy tokenizer\.json"):
        load_pretrained(str(directory))


def test_a_directory_without_its_image_processor_is_refused(directory: Path) -> None:
    for name in ("preprocessor_config.json", "processor_config.json"):
        (directory / name).unlink(missing_ok=True)
    with pytest.raises(MissingFileError, match=r"checkpoint has no image processor .*copy preprocessor_config\.json"):
        load_pretrained(str(directory))


def test_a_q_former_tokenizer_without_its_files_is_refused(saved, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(saved("instructblip-vicuna")[0], tmp_path / "checkpoint"))
    for path in (directory / "qformer_tokenizer").iterdir():
        path.unlink()
    with pytest.raises(MissingFileError, match=r"qformer_tokenizer has no tokenizer"):
        load_pretrained(str(directory))


def test_inference_takes_type_pickle_and_attention_of_the_recipe(directory: Path) -> None:
    config = BackboneConfig(path=str(directory), attn_implementation="flash_attention_2")
    with pytest.raises(UserError, match=r"flash_attention_2 needs a GPU, --device is cpu"):
        load_for_inference(config, dtype="bfloat16")
    for device in ("nowhere", "cuda:99"):
        with pytest.raises(UserError, match=f"--device {device}: "):
            load_for_inference(BackboneConfig(path=str(directory)), device=device)
    as_pickle(directory)
    backbone, _ = load_for_inference(BackboneConfig(path=str(directory), allow_pickle=True), dtype="bfloat16")
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_the_tokenizer_of_every_combination_fits_its_embeddings(saved, name: str) -> None:
    directory, model = saved(name)
    from free_dist.backbones.blip2 import load_tokenizer

    check_vocabulary(load_tokenizer(directory), model, directory)


def test_attention_that_cannot_run_is_refused_with_the_field(saved) -> None:
    blip2, flan = saved("blip2-opt")[0], saved("blip2-flan-t5")[0]
    fails(blip2, "backbone.attn_implementation=eager", "want sdpa", attn_implementation="eager")
    fails(flan, "T5ForConditionalGeneration", "want sdpa", attn_implementation="flash_attention_2")
    if not torch.cuda.is_available():
        fails(
            blip2,
            "needs a GPU and the package flash-attn",
            attn_implementation="flash_attention_2",
            dtype=torch.bfloat16,
        )
    for dtype in (torch.float32, "auto"):
        fails(blip2, "computes in bfloat16 or float16 alone", attn_implementation="flash_attention_2", dtype=dtype)
    recipe = Recipe()
    recipe.backbone.attn_implementation = "eager"
    with pytest.raises(ConfigError, match=re.escape("backbone.attn_implementation='eager'")):
        check_recipe(recipe)


def test_vision_and_qformer_run_sdpa_whatever_the_language_model_runs(saved) -> None:
    for name in ("blip2-opt", "instructblip-vicuna"):
        config = load_model(saved(name)[0]).config
        for part in (config.vision_config, config.qformer_config, config.text_config):
            assert part._attn_implementation == "sdpa"


def test_an_unknown_type_is_refused_with_those_there_are(saved) -> None:
    fails(saved("blip2-opt")[0], "--dtype half", "auto, float32, bfloat16", dtype="half")
