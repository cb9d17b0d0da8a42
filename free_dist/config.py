"""The run recipe: *what* is trained and measured, as typed dataclasses.

Loaded from YAML plus dotted overrides and checked before torch is imported.  How a run is
distributed (batch sizes, precision, optimizer, ZeRO stages) is not known here: that is the
ds_config JSON, read by ``free_dist.engines``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

EMBEDDED_BACKBONE = "embedded"
"""Name of the pretrained BLIP-2 that ships inside the package."""


@dataclass(kw_only=True)
class BackboneConfig:
    """Which frozen vision-language model the exits hang on."""

    path: str = EMBEDDED_BACKBONE
    """Hugging Face directory of a BLIP-2 checkpoint, or ``embedded`` for the one that ships with the package."""


@dataclass(kw_only=True)
class DataConfig:
    """Which shards are streamed and how records become samples."""

    root: str = "data/easyvqa"
    """Directory of WebDataset shards with one ``manifest.json`` per split."""
    tasks: dict[str, float] = field(default_factory=lambda: {"vqa": 1.0, "caption": 1.0, "dialogue": 1.0})
    """Task name -> relative frequency of batches of that task (vqa, caption, dialogue)."""
    questions_per_image: int = 4
    """VQA samples drawn per image and epoch; they share one pass through the vision tower."""
    max_turns: int = 6
    """Longest dialogue, in question-answer turns."""
    shuffle_buffer: int = 1000
    """Records held by the shuffle buffer."""
    caption_prompt: str = "a photo of"
    """Prompt before a caption."""
    question_prompt: str = "Question: {question} Answer:"
    """Prompt of one question; ``{question}`` is replaced."""


@dataclass(kw_only=True)
class ExitsConfig:
    """Where the exits are and what they are made of."""

    exit_layers: list[int] = field(default_factory=lambda: [3, 6, 10])
    """``k`` means an exit after block ``k``; 1-based, strictly increasing, below the number of blocks."""
    init: str = "next"
    """Block an exit transformer is copied from: ``same`` (block k), ``next`` (block k+1) or ``last`` (block L)."""
    discriminator_hidden_size: int = 256
    """Width of the feature classifier's hidden layer."""


@dataclass(kw_only=True)
class LossConfig:
    """What the exits are trained for."""

    mode: str = "supervised"
    """``supervised``: cross entropy on the labels; ``unsupervised``: KL to the frozen model's own predictions."""
    task_weight: float = 1.0
    """lambda, the weight of the task loss in the generator's objective; 0 trains with the adversarial loss alone."""
    adversarial_weight: float = 0.1
    """Weight of the adversarial loss in the generator's objective; 0 switches the discriminators off."""
    temperature: float = 1.0
    """Softmax temperature T of the KL loss, which is multiplied by T squared."""
    exit_weighting: str = "uniform"
    """``uniform``, or ``depth``: an exit's loss is weighted by its block number (mean weight 1)."""


@dataclass(kw_only=True)
class TrainingConfig:
    """Length, schedule and logging of a run (stage 1 and stage 2)."""

    max_steps: int = 300
    """Optimizer steps."""
    warmup_steps: int = 20
    """Steps of linear learning-rate warm-up, followed by a cosine to zero."""
    seed: int = 0
    """Seed of initialisation, data order and task choice."""
    log_every: int = 10
    """Steps between two logged steps."""
    sample_every: int = 100
    """Steps between two logs of sample captions; 0 for never."""
    expected_world_size: int | None = None
    """Number of processes the run was meant for; a smaller launch is an error. None accepts any."""


@dataclass(kw_only=True)
class DecodingConfig:
    """How an exit decides, at inference."""

    confidence_threshold: float = 0.9
    """An exit emits when its maximum softmax probability exceeds this; above 1 never exits."""
    max_new_tokens: int = 32
    """Longest answer, in tokens."""


@dataclass(kw_only=True)
class EvaluationConfig:
    """What is measured after training, and on how much."""

    split: str = "test"
    """Split to evaluate: ``calibration`` or ``test``."""
    tasks: list[str] = field(default_factory=lambda: ["vqa", "caption", "dialogue"])
    """Tasks to evaluate."""
    max_samples: int = 400
    """Samples per task; 0 for all of them."""
    thresholds: list[float] = field(default_factory=lambda: [0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.1])
    """Confidence thresholds of the sweep."""
    timing_samples: int = 60
    """Samples per task used for paired wall-clock timing."""


@dataclass(kw_only=True)
class FinetuneConfig:
    """Stage 1: training the backbone itself on the task data."""

    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.05
    """AdamW weight decay, on matrices only."""
    batch_size: int = 64
    """Rows per optimizer step, over all ranks."""
    grad_clip: float = 1.0
    """Gradient norm limit."""
    eval_every: int = 500
    """Steps between two evaluations on the calibration split."""


@dataclass(kw_only=True)
class Recipe:
    """One run: everything but its distribution."""

    run_dir: str = "runs/default"
    """Directory that receives logs, TensorBoard events, exports and reports."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    data: DataConfig = field(default_factory=DataConfig)
    exits: ExitsConfig = field(default_factory=ExitsConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)


def load_recipe(path: str | None, overrides: list[str]) -> Recipe:
    """Defaults <- YAML file <- dotted overrides (``training.max_steps=10``)."""
    from omegaconf import OmegaConf

    layers = [OmegaConf.structured(Recipe)]
    if path is not None:
        layers.append(OmegaConf.load(path))
    merged = OmegaConf.merge(*layers, OmegaConf.from_dotlist(overrides))
    recipe = OmegaConf.to_object(merged)
    assert isinstance(recipe, Recipe)
    return recipe
