#!/bin/bash
#SBATCH --job-name=finetune
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#
# Stage 1: parts of the backbone on task data, one task per GPU.
#
#   sbatch slurm/finetune.sh --config RECIPE run_dir=runs/stage1
#   sbatch --nodes=2 slurm/finetune.sh --ds_config FILE --config RECIPE run_dir=runs/stage1
#   sbatch --array=0-2 slurm/finetune.sh --sweep finetune.learning_rate=1e-4,3e-4,1e-3 --config RECIPE run_dir=runs/rates
#
# Options of sbatch before the script's name win over those above.  Two minutes before the time limit every task gets SIGUSR1; see
# slurm/preamble.sh for what follows, and for the variables that change it.
set -euo pipefail
cd "${FREE_DIST_ROOT:-$SLURM_SUBMIT_DIR}"
[[ -f slurm/preamble.sh ]] || { echo "$PWD is not the repository: submit from there, or export FREE_DIST_ROOT" >&2; exit 2; }
source slurm/preamble.sh
start launch/finetune.py "$@"
