# shellcheck shell=bash
# What the batch scripts of this directory share; sourced by them on the first machine of a job.
#
# start SCRIPT ARGUMENTS...   runs a launcher as one task per GPU with srun.  Ends as it does, with one exception: after an exit code of
#                             REQUEUE_CODES the job goes back into the queue and starts again with the same command.
#
# From the environment at sbatch:
#   PYTHON          interpreter; default .venv/bin/python
#   LOG_DIR         one file per task, NAME-JOB-TASK.log, appended to by restarts, and srun's own; default logs
#   MAX_RESTARTS    restarts of a job after which it fails instead of starting again; default 50
#   REQUEUE_CODES   default "85 86 137": the launcher saved because it was asked to stop; it lost a task of its own; a task
#                   was killed
#   MASTER_PORT     where rank 0 waits; default: a function of the job's number (free_dist/launchers.py)
#   OMP_NUM_THREADS default 1, as under deepspeed and torchrun
#
# A sweep: `sbatch --array=0-2 SCRIPT --sweep KEY=A,B,C ARGUMENTS...` gives element i of the array the i-th value, as KEY=VALUE, and
# appends KEY-VALUE to the run_dir=, --out or --out= among the arguments.

fail() {
  echo "$SLURM_JOB_NAME: error: $*" >&2
  exit 2
}

# Sets ARGUMENTS to those of this element of the array.
choose_from_sweep() {
  ARGUMENTS=("$@")
  [[ ${1-} == --sweep ]] || return 0
  [[ ${2-} == *=?* ]] || fail "--sweep ${2-}: want KEY=VALUE,VALUE,..."
  [[ -n ${SLURM_ARRAY_TASK_ID-} ]] || fail "--sweep wants an array: sbatch --array=0-N"
  local key=${2%%=*} values value name i is_placed=""
  IFS=, read -r -a values <<<"${2#*=}"
  ((SLURM_ARRAY_TASK_ID < ${#values[@]})) ||
    fail "--sweep $2 has no value number $SLURM_ARRAY_TASK_ID: want --array=0-$((${#values[@]} - 1))"
  value=${values[SLURM_ARRAY_TASK_ID]}
  name=${key##*-}-$value
  ARGUMENTS=("${@:3}" "$key=$value")
  for i in "${!ARGUMENTS[@]}"; do
    case ${ARGUMENTS[i]} in
      run_dir=* | --out=*) ARGUMENTS[i]+=/$name is_placed=yes ;;
      --out) ARGUMENTS[i + 1]+=/$name is_placed=yes ;;
    esac
  done
  [[ $is_placed ]] || fail "--sweep wants run_dir=DIR or --out DIR: otherwise all elements write to the same"
}

# The job, or the element of an array: the last one has the number of the whole array as its SLURM_JOB_ID.
own_id() {
  if [[ -n ${SLURM_ARRAY_JOB_ID-} ]]; then
    echo "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
  else
    echo "$SLURM_JOB_ID"
  fi
}

# What srun reported first in file $1: one task that fails makes it end the others, whose codes then say less; $2 is srun's own code.
first_code() {
  local told
  told=$(grep -m 1 -oE 'tasks? [0-9,-]+: (Killed|Exited with exit code [0-9]+)' "$1" || true)
  case $told in
    *Killed) echo 137 ;;
    *code*) echo "${told##* }" ;;
    *) echo "$2" ;;
  esac
}

requeue_or_fail() {
  local code=$1 restarts=${SLURM_RESTART_COUNT:-0} state
  if ((restarts >= MAX_RESTARTS)); then
    echo "$SLURM_JOB_NAME: exit code $code after $restarts restarts, and MAX_RESTARTS=$MAX_RESTARTS: giving up" >&2
    exit "$code"
  fi
  for _ in {1..60}; do
    state=$(squeue --noheader --jobs "$(own_id)" --states all --format %T)
    # While the signal that asked this job to stop is still on its way to other nodes, that is all its state says.
    [[ $state == SIGNALING ]] || break
    sleep 0.5
  done
  # Whoever cancelled the job does not want it back.
  if [[ $state != RUNNING && $state != SIGNALING ]]; then
    echo "$SLURM_JOB_NAME: exit code $code, and the job is $state: not started again" >&2
    exit "$code"
  fi
  echo "$SLURM_JOB_NAME: exit code $code: back into the queue for restart $((restarts + 1)) of at most $MAX_RESTARTS"
  scontrol requeue "$(own_id)"
  sleep 60 # Slurm ends this script; ending before it does would look as if the job were complete
  exit "$code"
}

start() {
  local script=$1 step code interrupted hosts logs
  shift
  choose_from_sweep "$@"
  : "${PYTHON:=.venv/bin/python}" "${LOG_DIR:=logs}" "${MAX_RESTARTS:=50}" "${REQUEUE_CODES=85 86 137}"
  [[ -x $(command -v "$PYTHON") ]] || fail "PYTHON=$PYTHON: no such program; run \`make quickstart\`, or export PYTHON"
  mkdir -p "$LOG_DIR"
  logs=$LOG_DIR/$SLURM_JOB_NAME-$(own_id)
  mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  export MASTER_ADDR=${hosts[0]} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  # srun takes this from no directive of the batch script.
  if [[ -n ${SLURM_CPUS_PER_TASK-} ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
  echo "$SLURM_JOB_NAME: job $(own_id), restart ${SLURM_RESTART_COUNT:-0}, ${#hosts[@]} nodes: $script ${ARGUMENTS[*]}"
  # Tasks get the signals of the scheduler themselves; this script has to outlive them.
  trap 'interrupted=yes' TERM USR1
  srun --kill-on-bad-exit=1 --open-mode=append --output="$logs-%t.log" \
    "$PYTHON" "$script" "${ARGUMENTS[@]}" 2>"$logs-srun.log" &
  step=$!
  while :; do
    interrupted="" code=0
    wait "$step" || code=$?
    [[ $interrupted ]] || break
  done
  cat "$logs-srun.log" >&2
  code=$(first_code "$logs-srun.log" "$code")
  case " $REQUEUE_CODES " in *" $code "*) requeue_or_fail "$code" ;; esac
  exit "$code"
}
