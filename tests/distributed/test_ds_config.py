"""The distribution file: what we refuse, what DeepSpeed accepts, and that the two lists of keys stay the same."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from free_dist.config import UserError
from free_dist.ds_config import (
    KNOWN_KEYS,
    SECTIONS,
    gradient_accumulation_steps,
    micro_batch_size,
    needs_frozen_copy,
    precision,
    read_ds_config,
    rows_per_step,
    with_rows_per_step,
    zero_stage,
)

SHIPPED = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))


@pytest.fixture
def content() -> dict[str, Any]:
    trained = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": 1},
    }
    backbone = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 3}}
    return {"backbone": backbone, "exits": trained, "discriminators": copy.deepcopy(trained)}


def read(content: Any, tmp_path: Path) -> dict[str, dict[str, Any]]:
    path = tmp_path / "shape.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_ds_config(path)


@pytest.mark.parametrize(
    ("section", "change", "words"),
    [
        ("exits", {"gradient_cliping": 1.0}, ["unknown key 'gradient_cliping'", "'gradient_clipping'"]),
        ("exits", {"train_batch_size": 8}, ["train_batch_size", "train_micro_batch_size_per_gpu"]),
        ("exits", {"scheduler": {"type": "WarmupLR"}}, ["scheduler", "training.warmup_steps"]),
        ("exits", {"fp16": {"enabled": True}}, ["fp16", "bf16"]),
        ("discriminators", {"optimizer": {}}, ["optimizer", "required"]),
        ("discriminators", {"zero_optimization": {"stage": 0}}, ["zero_optimization.stage", "1, 2 or 3"]),
        ("exits", {"zero_optimization": {}}, ["zero_optimization.stage", "1, 2 or 3"]),
        ("backbone", {"optimizer": {"type": "AdamW"}}, ["optimizer", "frozen"]),
        ("backbone", {"zero_optimization": {"stage": 2}}, ["zero_optimization.stage", "0 (replicated) or 3"]),
        ("exits", {"zero_optimization": 3}, ["'zero_optimization' must be an object, not 3"]),
        ("backbone", {"zero_optimization": 3}, ["'zero_optimization' must be an object, not 3"]),
        ("backbone", {"zero_optimization": {"stage": "x"}}, ["zero_optimization.stage", "integer, not 'x'"]),
        ("exits", {"zero_optimization": {"stage": True}}, ["zero_optimization.stage", "integer, not True"]),
        ("exits", {"bf16": True}, ["'bf16' must be an object, not True"]),
        ("exits", {"bf16": {"enabled": "auto"}}, ["bf16.enabled", "true or false, not 'auto'"]),
        ("exits", {"optimizer": {"type": "AdamW", "params": 1e-3}}, ["optimizer.params", "object, not 0.001"]),
        ("exits", {"train_micro_batch_size_per_gpu": 0}, ["train_micro_batch_size_per_gpu", "positive integer"]),
    ],
)
def test_a_wrong_entry_is_refused_with_file_section_and_remedy(content, tmp_path, section, change, words):
    read(content, tmp_path)
    content[section] |= change
    with pytest.raises(UserError, match=r"shape\.json") as error:
        read(content, tmp_path)
    for word in (f"section '{section}'", *words):
        assert word in str(error.value)


def test_sections_that_disagree_on_the_batch_are_refused(content, tmp_path):
    content["backbone"]["gradient_accumulation_steps"] = 2
    with pytest.raises(ValueError, match=r"shape.json: gradient_accumulation_steps.*backbone=2, exits=1"):
        read(content, tmp_path)


def test_a_misspelt_section_is_named_with_its_nearest(content, tmp_path):
    content["discriminator"] = content.pop("discriminators")
    with pytest.raises(ValueError, match=r"unknown section 'discriminator'; did you mean 'discriminators'\?"):
        read(content, tmp_path)


def test_a_missing_section_is_named(content, tmp_path):
    del content["backbone"]
    with pytest.raises(ValueError, match="section 'backbone' is missing"):
        read(content, tmp_path)


def test_broken_json_is_named_with_its_line_and_a_key_given_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"shape.json, line 2: not JSON"):
        read('{\n"exits": }', tmp_path)
    with pytest.raises(ValueError, match="'bf16' is given twice"):
        read('{"bf16": {}, "bf16": {}}', tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        read_ds_config(tmp_path / "nowhere.json")


def test_a_file_without_sections_configures_all_three_and_the_backbone_takes_no_optimizer(content, tmp_path):
    sections = read(content["exits"] | {"gradient_accumulation_steps": 3, "gradient_clipping": 1.0}, tmp_path)
    assert sections["exits"] == sections["discriminators"]
    assert "optimizer" not in sections["backbone"]
    assert zero_stage(sections["backbone"]) == 0
    assert (micro_batch_size(sections), gradient_accumulation_steps(sections)) == (4, 3)


@pytest.mark.parametrize("wrong", [3, {"stage": "x"}])
def test_a_wrong_type_in_a_file_without_sections_is_refused_too(content, tmp_path, wrong):
    with pytest.raises(UserError, match=r"shape\.json: .*zero_optimization.* must be an"):
        read(content["exits"] | {"zero_optimization": wrong}, tmp_path)


def test_an_optimizer_that_would_be_compiled_on_cpu_is_the_users_to_change(content):
    import deepspeed
    from torch import nn

    from free_dist.engines import build_engines

    if deepspeed.accelerator.get_accelerator().device_name() != "cpu":
        pytest.skip("only on CPU")
    content["backbone"]["zero_optimization"] = {"stage": 0}
    with pytest.raises(UserError, match=r"section 'exits'.*torch_adam"):
        build_engines(nn.Linear(2, 2), nn.Linear(2, 2), None, content, lambda step: 1.0)


def test_exits_need_their_own_head_when_the_backbone_is_sharded_or_has_another_precision(content):
    assert needs_frozen_copy(content)
    content["backbone"]["zero_optimization"] = {"stage": 0}
    assert not needs_frozen_copy(content)
    content["backbone"]["bf16"] = {"enabled": True}
    assert (precision(content["backbone"]), precision(content["exits"])) == ("bfloat16", "float32")
    assert needs_frozen_copy(content)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_file_is_accepted_by_us_and_by_deepspeed(path):
    from deepspeed.runtime.config import DeepSpeedConfig

    sections = read_ds_config(path)
    for name in SECTIONS:
        parsed = DeepSpeedConfig(sections[name])
        assert parsed.train_micro_batch_size_per_gpu == micro_batch_size(sections)
        assert parsed.zero_optimization_stage == zero_stage(sections[name])
        assert parsed.bfloat16_config.enabled == (precision(sections[name]) == "bfloat16")


def test_files_for_two_kinds_of_machine_are_shipped():
    assert {"cpu", "cpu_bf16", "one_gpu", "eight_gpus"} <= {path.stem for path in SHIPPED}


class Recorder(dict[str, Any]):
    """A dictionary that remembers which keys were asked for."""

    asked: set[str]

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def keys(self):
        outer = self

        class Keys(list[str]):
            def __contains__(self, key):
                outer.asked.add(key)
                return list.__contains__(self, key)

        return Keys(super().keys())


def test_every_key_we_allow_is_one_that_deepspeed_reads():
    from deepspeed.runtime.config import DeepSpeedConfig

    recorder = Recorder(train_micro_batch_size_per_gpu=1)
    recorder.asked = set()
    DeepSpeedConfig(recorder)
    assert not KNOWN_KEYS - recorder.asked
    assert "gradient_cliping" not in recorder.asked


def test_reading_does_not_import_torch():
    script = f"import sys; from free_dist.ds_config import read_ds_config; read_ds_config({str(SHIPPED[0])!r}); "
    script += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_a_run_keeps_its_rows_per_step_with_other_numbers_of_processes() -> None:
    sections = {name: {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2} for name in SECTIONS}
    assert with_rows_per_step(sections, None, 3) is sections
    for processes, steps in ((1, 8), (2, 4), (4, 2), (8, 1)):
        adapted = with_rows_per_step(sections, 32, processes)
        assert {section["gradient_accumulation_steps"] for section in adapted.values()} == {steps}
        assert rows_per_step(adapted, processes) == 32
    for processes in (3, 16):
        with pytest.raises(UserError, match=f"32 rows, which {processes} processes with 4 rows each cannot share"):
            with_rows_per_step(sections, 32, processes)
