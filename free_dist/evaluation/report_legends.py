"""What the columns of a report's tables mean, in words; knows no data."""

from __future__ import annotations

RESULTS_LEGEND = (
    "quality: VQA accuracy (vqa), accuracy of the last answer given the true history (dialogue), CIDEr-D (caption; "
    '1.0 is "100"). relative: over the full model\'s quality on the same samples. agreement: share of samples whose '
    "whole token sequence equals the full model's. blocks: mean block calls per token, prefill included, an exit "
    "transformer counted as one. layer ratio: all blocks over blocks; it is a count, not a speed. speed: wall-clock "
    "ratio against our own full depth and against Hugging Face generate, end to end from pixels to tokens, same run, "
    "interleaved sample by sample, sums of times, with a 95% bootstrap interval over images; above 1 is faster, and "
    "the lower of the two counts. Every row is scored on its own n samples. The row marked * is the fastest that "
    "keeps 99% of the quality; it was chosen on the samples it is reported on."
)
ROBUSTNESS_LEGEND = (
    "Noise: standard deviation where black is 0 and white 1; blur: where the picture's shorter side is 1; both on the "
    'decoded picture, before the image processor; level 0 is the clean evaluation. "full depth" is the full model on '
    "the same spoilt pictures. ECE: answer tokens under teacher forcing; the last block is the full model. Transfer: "
    "an exit's loss is the share of an image's answer tokens that it would emit and the full model would not, under "
    'teacher forcing; exit "all" is whole answers with one threshold for all exits, really decoded, by their harm '
    "(lost accuracy; for captions, lost share of CIDEr-D). Thresholds were chosen by Learn then Test, which promises "
    "the loss with high probability for images like those they were chosen on, and nothing elsewhere. Intervals are "
    "95% bootstrap over images."
)
COSTS_LEGEND = (
    "vision is timed inside the answer; prompt (blocks at the first token), blocks, checks (exit transformers and "
    "their heads), heads and bookkeeping are counted from the exits that the tokens took and the pieces' own measured "
    'times. The diamond, and the column "measured", is the time measured end to end, without a clock inside, '
    "earlier in the same run: on a busy machine the two differ."
)
RANKING_LEGEND = (
    "scored by: whose head gives the log-likelihood of every token of a candidate: the full model's, one exit's, or with "
    "a threshold the first exit that is more confident than it (a token at which none is: the full model's). per token: "
    "divided by the number of tokens. mean layer is where tokens were scored, a depth and not a speed: ranking computes "
    "all depths. ndcg over the samples with dense annotations (n ndcg), the others over those whose true answer is "
    "known. same best: share of samples whose best candidate is the full model's, read in the same way."
)
ABLATION_LEGEND = (
    "Answer-token accuracy under teacher forcing behind every exit, mean over seeds with its 95% interval; in brackets "
    "the difference to the base, * where it is not 0 with 95% confidence, paired by seed, with no correction for the "
    "number of comparisons. trained: parameters."
)
