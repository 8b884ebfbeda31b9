#!/bin/bash
#SBATCH --job-name=megalite-retrain
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=4:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#
# A round of retraining, by cron or Slurm; docs/retraining.md.
#
#   0 3 * * *  cd /srv/model && bash /srv/megalite/tools/retrain.sh retrain.yaml >> retrain.log 2>&1
#   sbatch tools/retrain.sh retrain.yaml      # goes back to the queue at its time limit, and goes on there
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ ! -f $root/tools/retrain.sh ]]; then root=$SLURM_SUBMIT_DIR; fi # sbatch runs a copy from its spool folder
if [[ -z ${VIRTUAL_ENV:-} && -f $root/.venv/bin/activate ]]; then source "$root/.venv/bin/activate"; fi
python -m megalite retrain "$@" &
child=$!
trap 'kill -TERM $child' USR1 TERM INT
status=0
wait $child || status=$?
# A trapped signal ends `wait` early: the round is still saving.
while kill -0 $child 2> /dev/null; do status=0; wait $child || status=$?; done
if [[ $status == 75 && -n ${SLURM_JOB_ID:-} ]]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $status
