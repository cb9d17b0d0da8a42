"""A backbone with its exits as one object: directories in, answers out.

What the export says about thresholds, prompts and lengths is used where a call does not say otherwise.  Needs no DeepSpeed.
Does not know how exits were trained, nor how decoding works: ``answer`` and ``generate`` do.

Shape letters: B rows, T prompt positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from free_dist.backbones import Backbone
from free_dist.config import EMBEDDED_BACKBONE, ConfigError, DataConfig, DecodingConfig
from free_dist.data.pretrained import load_pretrained
from free_dist.data.samples import SampleEncoder
from free_dist.decoding.generate import Prompts, generate
from free_dist.decoding.pipeline import Answer, ImageLike, Prompt, answer
from free_dist.decoding.policy import ExitPolicy, Thresholds
from free_dist.decoding.result import Generation
from free_dist.exits import ExitBank
from free_dist.exits.check_files import load_checks
from free_dist.exits.export import load_exits
from free_dist.exits.gate import CheckOptions, ExitChecks
from free_dist.exits.manifest import MANIFEST, ExitsManifest, check_layout, read_exits_manifest


@dataclass(frozen=True, kw_only=True)
class EarlyExitModel:
    """What :meth:`from_pretrained` loads."""

    backbone: Backbone
    encoder: SampleEncoder
    bank: ExitBank
    manifest: ExitsManifest
    checks: ExitChecks | None = None
    """Cheap checks that were switched on."""

    @classmethod
    def from_pretrained(
        cls,
        exits: str | Path,
        backbone: str | Path | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        checks: CheckOptions | None = None,
        verify: bool = True,
        allow_pickle: bool = False,
    ) -> EarlyExitModel:
        """The export in ``exits`` on the Hugging Face directory ``backbone`` (None: the embedded one, if it is that).

        ``checks`` switches on what launch/fit_checks.py fitted; ``verify=False`` does not hash the backbone's files;
        ``allow_pickle`` reads ``pytorch_model.bin`` where there are no safetensors, with ``weights_only``.  Raises
        MissingFileError or UserError for files that are missing, damaged, or do not belong together.
        """
        manifest = read_exits_manifest(exits)
        path = Path(exits) / MANIFEST
        if backbone is None:
            name = manifest.extra.get("backbone") if manifest.backbone is None else manifest.backbone.name
            if name != EMBEDDED_BACKBONE:
                raise ConfigError(
                    f"{path}: the exits were trained on {name}: say where its directory is, with backbone="
                )
            backbone = EMBEDDED_BACKBONE
        model, encoder = load_pretrained(str(backbone), dtype=dtype, allow_pickle=allow_pickle)
        bank = load_exits(model, exits, verify=verify)
        check_layout(manifest, model, path)
        chosen = None if checks is None else load_checks(exits, model, bank, checks).to(device)
        return cls(backbone=model.to(device), encoder=encoder, bank=bank.to(device), manifest=manifest, checks=chosen)

    def ask(
        self, images: ImageLike | Sequence[ImageLike], questions: str | Sequence[str], **options: Any
    ) -> list[Answer]:
        """Answers to questions, put as in training; ``options`` and errors as in :meth:`answer`."""
        template = self.manifest.decoding.get("data.question_prompt", DataConfig.question_prompt)
        asked = [questions] if isinstance(questions, str) else questions
        return self.answer(images, [template.replace("{question}", question) for question in asked], **options)

    def caption(self, images: ImageLike | Sequence[ImageLike], **options: Any) -> list[Answer]:
        """Captions, prompted as in training; ``options`` and errors as in :meth:`answer`."""
        return self.answer(
            images, self.manifest.decoding.get("data.caption_prompt", DataConfig.caption_prompt), **options
        )

    def answer(
        self,
        images: ImageLike | Sequence[ImageLike],
        prompts: str | Sequence[Prompt],
        *,
        thresholds: Thresholds | ExitPolicy | None = None,
        calibrated_for: str | None = None,
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> list[Answer]:
        """Answers as text, with their traces; see :func:`~free_dist.decoding.pipeline.answer` for images, prompts, options.

        ``thresholds`` replaces the exported ones; ``calibrated_for`` takes those that were calibrated for a task.  Raises
        ConfigError where there are none, or both are given, and what ``answer`` raises.
        """
        return answer(
            self.backbone,
            self.encoder,
            self.bank,
            images,
            prompts,
            thresholds=self._thresholds(thresholds, calibrated_for),
            checks=self.checks,
            max_new_tokens=self._limit(max_new_tokens),
            **options,
        )

    def generate(
        self,
        pixel_values: Tensor | None,
        prompt_ids: Prompts,
        *,
        thresholds: Thresholds | ExitPolicy | None = None,
        calibrated_for: str | None = None,
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> Generation:
        """Pixels [B, 3, height, width] and prompts [B, T] -> ids with their traces.

        The other options are those of :func:`~free_dist.decoding.generate.generate`; thresholds as in :meth:`answer`.
        """
        return generate(
            self.backbone,
            self.bank,
            pixel_values,
            prompt_ids,
            thresholds=self._thresholds(thresholds, calibrated_for),
            checks=self.checks,
            max_new_tokens=self._limit(max_new_tokens),
            **options,
        )

    def _thresholds(self, given: Thresholds | ExitPolicy | None, task: str | None) -> Thresholds | ExitPolicy:
        if task is None:
            return self.manifest.thresholds if given is None else given
        if given is not None:
            raise ConfigError(f"calibrated_for={task!r} brings its own thresholds; drop thresholds=")
        if self.checks is not None:
            raise ConfigError(
                f"calibrated_for={task!r}: its thresholds were tested without checks; load without checks="
            )
        if task not in self.manifest.calibrated:
            known = ", ".join(self.manifest.calibrated) or "no task"
            raise ConfigError(
                f"calibrated_for={task!r}: these exits have thresholds for {known}; run launch/calibrate.py"
            )
        return self.manifest.calibrated[task].thresholds

    def _limit(self, given: int | None) -> int:
        if given is not None:
            return given
        return self.manifest.decoding.get("decoding.max_new_tokens", DecodingConfig.max_new_tokens)
