#!/bin/bash
#SBATCH --job-name=megalite-sweep
#SBATCH --array=0-7
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A-%a.log
#
# A sweep, on a cluster and on one machine:
#
#   sbatch slurm/sweep.sh SWEEP [key=value ...]      a node a task takes trials; sbatch --array=0-31 ... for 32 of them
#   bash   slurm/sweep.sh SWEEP [key=value ...]      all of it on this machine
#
# Submit from the repository's root; SWEEP is relative to it. All tasks share the folder of the sweep, which must be on
# a disk that they all see. A trial runs on one node; `parallel` in SWEEP says how many of them at a time.
# Minutes before the time limit trials save, and the task requeues itself. Trials of a node that is lost are taken on by
# another task. Submitted again, the same line goes on.
# WITHIN=... names a container or modules to run in; see within.sh.
set -euo pipefail

fail() { echo "sweep.sh: $*" >&2; exit 2; }

dry_run=
if [[ ${1:-} == --dry-run ]]; then dry_run=1; shift; fi
[[ $# -ge 1 ]] || fail "usage: sweep.sh [--dry-run] SWEEP [key=value ...]"

# sbatch runs a copy of this file from its spool folder, so where the file lies says nothing there.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ ! -d $root/megalite ]]; then root=${SLURM_SUBMIT_DIR:-$PWD}; fi
cd "$root"
[[ -f $1 ]] || fail "no sweep $1 in $root (submit from the repository's root)"

source slurm/within.sh

command=("${python[@]}" -m megalite sweep "$@")
if ((${#srun[@]} > 1)); then command=("${srun[@]}" --ntasks=1 "${command[@]}"); fi
printf '%q ' "${command[@]}"; echo
if [[ -n $dry_run ]]; then exit; fi

asked="" child=""
stop() { # TO: `requeue` or `leave`
  asked=$1
  if [[ -n $child ]]; then kill -USR1 "$child" 2>/dev/null || true; fi
}
trap 'stop requeue' USR1
trap 'stop leave' TERM INT

"${command[@]}" &
child=$!
while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done # a signal interrupts the wait
status=0
wait "$child" || status=$?
if [[ $status == 75 && $asked == requeue && -n ${SLURM_JOB_ID:-} ]]; then
  trap '' TERM # which requeueing sends this script
  scontrol requeue "$SLURM_JOB_ID" || echo "sweep.sh: Slurm does not requeue jobs here; submitted again, the sweep goes on"
fi
exit "$status"
