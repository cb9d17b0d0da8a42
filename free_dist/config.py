"""The run recipe: *what* is trained and measured, as typed dataclasses, and the errors of the person who wrote it.

Imports neither torch nor anything of the project, so a mistake in a recipe is told in a fraction of a second.  Does not know
files or command lines (``free_dist.recipe_io``), nor how a run is distributed: batch sizes, precision, optimizer and ZeRO
stages stand in the ds_config JSON.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field

EMBEDDED_BACKBONE = "embedded"
"""Name of the pretrained BLIP-2 that ships inside the package."""

TASKS = ("vqa", "caption", "dialogue")
"""Names of the tasks that records can be turned into."""

POLICY_NAMES = ("max_prob", "entropy", "margin", "patience")
"""Names of the exit policies (``free_dist.decoding.policy``)."""

EXIT_VARIANTS = ("full", "lora", "bottleneck", "classifier")
"""Kinds of trained exits (``free_dist.exits.variants``)."""

EXIT_HEADS = ("full", "pruned", "low_rank")
"""Ways of reading an exit feature (``free_dist.exits.gate``)."""

CAPTION_METRICS = ("BLEU", "METEOR", "ROUGE-L", "CIDEr-D", "SPICE")
"""Names of the caption metrics (``free_dist.evaluation.metrics_captions``)."""

CAPTION_TOKENIZERS = ("auto", "ptb", "ptb-like")
"""Ways of splitting captions into tokens (``free_dist.evaluation.metrics_captions``)."""

WITHHELD = "withheld"
"""The split whose answers are not published."""

ALARM_ACTIONS = ("off", "warn", "stop")
"""What becomes of an alarm (``free_dist.training.alarms``)."""

FINETUNE_PARTS = ("vision", "qformer", "projection", "lora", "all")
"""Parts of a backbone that stage 1 can train."""

UNTRAINED_BACKBONE = "untrained"
"""``finetune.start`` of stage 1 from random weights."""

ATTENTIONS = ("sdpa", "flash_attention_2")
"""Attention implementations that are causal without a mask (``free_dist.backbones.loading``)."""

RUNNERS = ("eager", "compile", "reduce-overhead", "graph", "compile+graph")
"""Names of the runners (``free_dist.decoding.runners``)."""


class UserError(ValueError):
    """A mistake that the person who started the program can put right; launchers print it as one line, without traceback.

    The message names the file, field or flag, and says what to do.
    """

    exit_code = 2
    """What a launcher ends with."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or directory that the person named does not exist."""


class ConfigError(UserError):
    """A recipe that cannot be run; the message names the dotted field."""


class RunFailed(UserError):
    """A run that was ended because it was failing: by an alarm, or by too many skipped steps."""

    exit_code = 3


@dataclass(kw_only=True)
class BackboneConfig:
    """Which frozen vision-language model the exits hang on."""

    path: str = EMBEDDED_BACKBONE
    """Hugging Face directory of a BLIP-2 or InstructBLIP checkpoint, or ``embedded`` for the one that ships with the package."""
    attn_implementation: str = "sdpa"
    """Attention of the language model's own blocks: ``sdpa``, or ``flash_attention_2`` (needs a GPU, flash-attn, bfloat16)."""
    allow_pickle: bool = False
    """Read ``pytorch_model.bin`` where a checkpoint has no safetensors; with ``weights_only``, so it runs no code."""


@dataclass(kw_only=True)
class DataConfig:
    """Which shards are streamed and how records become samples."""

    root: str = "data/easyvqa"
    """Directory of WebDataset shards with one ``manifest.json`` per split, an fsspec URL (``s3://...``) of one, or
    ``pipe:COMMAND`` whose ``{}`` is replaced by ``SPLIT/NAME``."""
    tasks: dict[str, float] = field(default_factory=lambda: {"vqa": 1.0, "caption": 1.0, "dialogue": 1.0})
    """Task name -> relative frequency of batches of that task (vqa, caption, dialogue)."""
    questions_per_image: int = 4
    """VQA samples drawn per image and epoch; they share one pass through the vision tower."""
    max_turns: int = 4
    """Longest dialogue, in question-answer turns."""
    shuffle_buffer: int = 1000
    """Records that are shuffled among each other: a larger split is read in windows of so many, drawn from all over it."""
    bucket: int = 0
    """Records of similar text length that stand together, which saves padding; about the rows of a step. 0: none do."""
    workers: int = 1
    """Threads that read and decode ahead; 0: none, and a stalled reader stalls the run."""
    read_timeout: float = 60.0
    """Seconds after which a read that has not ended counts as stalled: its shard is left alone from then on."""
    bad_sample_budget: float = 0.001
    """Share of a split's records that may be unusable; each is named in ``run_dir/quarantine.jsonl``, more end the run."""
    cache: str | None = None
    """Directory for copies of remote shards (None: ``~/.cache/free_dist``), and for indices where shards cannot be written."""
    caption_prompt: str = "a photo of"
    """Prompt before a caption."""
    question_prompt: str = "Question: {question} Answer:"
    """Prompt of one question; ``{question}`` is replaced."""
    history_prompt: str = "Dialog history: {history}\n"
    """Stands before a question of a recorded dialogue; ``{history}`` is the image's caption and the turns so far."""
    history_turn: str = "q: {question} a: {answer}"
    """One turn of a history."""
    max_history_tokens: int | None = None
    """Tokens that a history may add to a prompt: the oldest turns are cut first, the caption last; None for no limit."""
    clean_text: bool = False
    """Questions and target captions as LAVIS trains on them: lower case, without some punctuation, at most 50 words."""
    synthetic_share: float = 0.5
    """Chance that an image's caption is a synthetic one, where it has both kinds; 0 uses human captions alone, 1 synthetic."""
    visual_cache: str | None = None
    """Directory of vision features made by launch/cache_vision.py, read in training instead of pixels; None: pixels."""


@dataclass(kw_only=True)
class ExitsConfig:
    """Where the exits are and what they are made of."""

    exit_layers: list[int] = field(default_factory=lambda: [2, 4, 7])
    """``k`` means an exit after block ``k``; 1-based, strictly increasing, at most the number of blocks."""
    variant: str = "full"
    """``full``: a trainable block; ``lora``: low-rank updates of a frozen one; ``bottleneck``: a small map without attention;
    ``classifier``: no exit transformer but a vocabulary head of its own, the usual baseline."""
    init: str = "next"
    """Block an exit starts from: ``same`` (block k), ``next`` (block k+1) or ``last`` (block L); ``full`` and ``lora`` alone."""
    rank: int = 16
    """Rank of the updates of ``lora``."""
    bottleneck_size: int | None = None
    """Inner width of ``bottleneck``; None: a quarter of the model's width."""
    discriminator: str = "per_exit"
    """``per_exit``: a discriminator for each exit; ``shared``: one that judges all of them."""
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
    discriminator_steps: int = 1
    """Updates of the discriminators for every one of the exits; above 1 needs ``gradient_accumulation_steps`` 1."""
    temperature: float = 1.0
    """Softmax temperature T of the KL loss, which is multiplied by T squared."""
    exit_weighting: str = "uniform"
    """``uniform``, or ``depth``: an exit's loss is weighted by its block number (mean weight 1)."""


@dataclass(kw_only=True)
class CostConfig:
    """What a training step need not compute, with the same losses and gradients; data.bucket and data.visual_cache save too."""

    drop_padding: bool = False
    """Blocks leave out what follows a row's last answer position. OPT and LLaMA, as the next two; needs attention ``sdpa``."""
    share_prefix: bool = False
    """What opens every row (image and begin of text) passes the blocks once per image. Not InstructBLIP, which has one a row."""
    answer_queries: bool = False
    """Exit transformers and the last block compute answer positions alone, and keys and values of the others."""
    head_chunk: int = 4096
    """Answer positions, counted for every exit, whose logits over the vocabulary are held at once."""

    @property
    def packs(self) -> bool:
        """Whether blocks run on a list of positions instead of padded rows."""
        return self.drop_padding or self.share_prefix or self.answer_queries


@dataclass(kw_only=True)
class TrainingConfig:
    """Length, schedule and logging of a run (stage 1 and stage 2)."""

    max_steps: int = 300
    """Optimizer steps."""
    warmup_steps: int | None = None
    """Steps of linear learning-rate warm-up, followed by a cosine to zero. None: 20, or all steps of a shorter run."""
    seed: int = 0
    """Seed of initialisation, data order and task choice."""
    log_every: int = 10
    """Steps between two logged steps."""
    sample_every: int = 100
    """Steps between two logs of sample captions; 0 for never."""
    log_samples: bool = True
    """Write the ids of the samples that every step saw to ``run_dir/samples.jsonl``; about 20 bytes a row."""
    save_every: int = 500
    """Steps between two checkpoints, from which the same command goes on, also with another number of processes. A run that
    is asked to stop, and one at its end, saves too. 0: never."""
    save_in_background: bool = True
    """Write checkpoints while training goes on; needs room for a second copy of what is saved in the host's memory."""
    keep_last: int = 2
    """Newest checkpoints that are kept, also after the last step."""
    keep_best: int = 1
    """Checkpoints that are kept besides: those with the lowest mean training loss since the checkpoint before. 0: none."""
    expected_world_size: int | None = None
    """Number of processes the run was meant for; a smaller launch is an error. None accepts any."""
    expected_rows_per_step: int | None = None
    """Rows of one optimizer step, over all processes, that steps and learning rates were meant for. None accepts any."""
    max_skipped_in_a_row: int = 10
    """Optimizer steps in a row that may be skipped for a loss or gradient that is not finite; one more ends the run."""
    hang_timeout: float = 120.0
    """Seconds without a sign of life after which a process counts as lost: it is named and the others end. 0: never."""
    stall_timeout: float = 1800.0
    """Seconds in which no process finishes a step before all end, each with its stacks; longer than an evaluation."""
    peak_tflops: float | None = None
    """Peak of one device in the precision of the exits, for the share that is used. None: measured by a matrix product."""


@dataclass(kw_only=True)
class AlarmsConfig:
    """When a training run counts as failing, and what then happens (stage 1 and stage 2)."""

    action: str = "warn"
    """``off``; ``warn``: in TensorBoard, ``log.jsonl`` and on standard error; ``stop``: also end, exporting, with code 3."""
    window: int = 5
    """Logged steps in a row that must all show a failure."""
    collapse_cosine: float = 0.98
    """Mode collapse: cosine between two exits' features above which they count as one, unless both are the full model's."""
    collapse_ratio: float = 0.1
    """Mode collapse: rank of an exit's features, or entropy of its tokens, as a share of the full model's."""
    discriminator_wins: float = 0.99
    """Mean accuracy on real and on fake features from which a discriminator teaches an exit nothing."""
    discriminator_stuck: float = 0.02
    """Distance from 0.5 within which that accuracy never having left means that a discriminator does not learn."""
    vanished_gradient: float = 1e-4
    """Gradient norm of the exits as a share of that of the first logged steps."""
    rising_kl: float = 1.5
    """Forgetting: KL from the full model to an exit over the lowest that was reached."""
    calibration_error: float = 0.3
    """Expected calibration error of an exit's confidence, against agreement with the full model."""
    piled_share: float = 0.99
    """Share of tokens that one exit, or none, takes at ``decoding.confidence_threshold``; looked at in a run's second half."""
    eos_excess: float = 0.05
    """Length bias: share of tokens at which an exit ends the text and the full model does not, less the reverse."""
    kv_drift: float = 0.1
    """Difference between a confidence of sample texts, or of the most probable token, and the same without caches."""
    slow_rank: float = 1.5
    """Time of the slowest process for its own work over that of the median one."""


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
    """Split to evaluate: ``calibration``, ``test``, or ``withheld``, which has no answers: it is decoded for a submission."""
    tasks: list[str] = field(default_factory=lambda: ["vqa", "caption", "dialogue"])
    """Tasks to evaluate."""
    max_samples: int = 400
    """Samples per task; 0 for all of them."""
    thresholds: list[float] = field(default_factory=lambda: [0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.1])
    """Confidence thresholds of the sweep."""
    timing_samples: int = 60
    """About how many samples per task Hugging Face's own decoder answers too; 0 for none. Ours are timed on all samples."""
    caption_metrics: list[str] = field(default_factory=lambda: ["BLEU", "ROUGE-L", "CIDEr-D"])
    """Caption metrics besides CIDEr-D, which is always there. METEOR and SPICE need Java; what cannot run is named, not run."""
    caption_tokenizer: str = "auto"
    """``ptb``: the Penn Treebank tokenizer of the COCO caption code (Java); ``ptb-like``: ours; ``auto``: ptb where Java is."""
    rank_candidates: bool = True
    """Rank the candidate answers of dialogues that have them (VisDial) by their likelihood through the exits."""


@dataclass(kw_only=True)
class FinetuneConfig:
    """Stage 1: training the backbone itself on the task data."""

    start: str | None = None
    """Backbone directory to start from; None is ``backbone.path``, ``untrained`` a new embedded backbone."""
    n_blocks: int | None = None
    """Decoder blocks of an untrained backbone (None: 16); a shallower start is grown to so many (None: not at all)."""
    vision_steps: int = 0
    """Steps that vision tower and Q-Former train first, without the language model, on which answers belong to an image."""
    train: list[str] = field(default_factory=lambda: ["qformer", "projection"])
    """What is trained: any of ``vision``, ``qformer``, ``projection``, ``lora`` (on the language model); or ``all``, alone."""
    lora_rank: int = 16
    """Rank of the low-rank update of every adapted matrix."""
    lora_alpha: int = 32
    """The update is multiplied by alpha / rank."""
    lora_dropout: float = 0.05
    """Dropout before the low-rank update."""
    lora_targets: list[str] = field(default_factory=list)
    """Names of the adapted linear maps inside the language model's blocks; empty: query and value of every attention."""
    keep_adapter: bool = False
    """Also write the LoRA adapter by itself, as a ``peft`` directory; the backbone's directory has it merged either way."""
    augment_images: bool = False
    """Mirror and shift training images."""
    learning_rate: float = 1e-4
    """Peak learning rate; that of the ds_config, which is meant for exits, is not used."""
    weight_decay: float = 0.05
    """Weight decay of matrices, not of biases and norms; that of the ds_config is not used."""
    batch_size: int = 64
    """Rows per optimizer step without a ds_config, and images per step of ``vision_steps``."""
    grad_clip: float = 1.0
    """Gradient norm limit without a ds_config, and of ``vision_steps``."""
    eval_every: int = 500
    """Steps between two evaluations on the calibration split; 0 for none."""


@dataclass(kw_only=True)
class Recipe:
    """One run: everything but its distribution."""

    run_dir: str = "runs/default"
    """Directory that receives logs, TensorBoard events, exports and reports."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    data: DataConfig = field(default_factory=DataConfig)
    exits: ExitsConfig = field(default_factory=ExitsConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    cost: CostConfig = field(default_factory=CostConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    alarms: AlarmsConfig = field(default_factory=AlarmsConfig)
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)


def nearest(name: str, valid: Iterable[str]) -> str:
    """The valid name most like ``name``; the last part of a dotted name counts twice, so a forgotten section is found."""

    def likeness(other: str) -> float:
        whole = difflib.SequenceMatcher(a=name, b=other).ratio()
        return whole + difflib.SequenceMatcher(a=name.rpartition(".")[2], b=other.rpartition(".")[2]).ratio()

    return max(valid, key=likeness)
