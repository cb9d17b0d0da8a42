#!/bin/bash
#SBATCH --job-name=capfilt
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#
# CapFilt: captions written and filtered, shard by shard, one task per GPU.
#
#   sbatch slurm/capfilt.sh --source data/coco --out data/coco_capfilt --captioner DIR --filter DIR
#   sbatch --array=0-2 slurm/capfilt.sh --sweep --threshold=0.4,0.5,0.6 --source data/coco --out data/capfilt --captioner DIR --filter DIR
#
# Options of sbatch before the script's name win over those above.  Two minutes before the time limit every task gets SIGUSR1; see
# slurm/preamble.sh for what follows, and for the variables that change it.
set -euo pipefail
cd "${FREE_DIST_ROOT:-$SLURM_SUBMIT_DIR}"
[[ -f slurm/preamble.sh ]] || { echo "$PWD is not the repository: submit from there, or export FREE_DIST_ROOT" >&2; exit 2; }
source slurm/preamble.sh
start launch/capfilt.py "$@"
