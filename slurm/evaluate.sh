#!/bin/bash
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=4:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#
# Evaluation of trained exits, samples shared out to one task per GPU; nothing is kept of one that is cut off.
#
#   sbatch slurm/evaluate.sh --exits runs/exits/export --config RECIPE run_dir=runs/exits
#   sbatch --array=0-1 slurm/evaluate.sh --sweep backbone.attn_implementation=sdpa,flash_attention_2 --exits DIR run_dir=runs/attention
#
# Options of sbatch before the script's name win over those above.  Two minutes before the time limit every task gets SIGUSR1; see
# slurm/preamble.sh for what follows, and for the variables that change it.
set -euo pipefail
cd "${FREE_DIST_ROOT:-$SLURM_SUBMIT_DIR}"
[[ -f slurm/preamble.sh ]] || { echo "$PWD is not the repository: submit from there, or export FREE_DIST_ROOT" >&2; exit 2; }
source slurm/preamble.sh
start launch/evaluate.py "$@"
