#!/bin/bash
#SBATCH --job-name=free_blip2
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
# Stage 2: exits on a frozen backbone, one task per GPU.
#
#   sbatch slurm/free_blip2.sh --ds_config ds_configs/eight_gpus_2.7b.json --config RECIPE run_dir=runs/exits
#   sbatch --nodes=4 slurm/free_blip2.sh --ds_config ds_configs/four_nodes_13b.json --config RECIPE run_dir=runs/exits
#   sbatch --array=0-2 slurm/free_blip2.sh --sweep training.seed=0,1,2 --ds_config FILE run_dir=runs/seeds
#
# Options of sbatch before the script's name win over those above.  Two minutes before the time limit every task gets SIGUSR1; see
# slurm/preamble.sh for what follows, and for the variables that change it.
set -euo pipefail
cd "${FREE_DIST_ROOT:-$SLURM_SUBMIT_DIR}"
[[ -f slurm/preamble.sh ]] || { echo "$PWD is not the repository: submit from there, or export FREE_DIST_ROOT" >&2; exit 2; }
source slurm/preamble.sh
start launch/train.py "$@"
