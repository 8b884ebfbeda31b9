#!/bin/bash
#SBATCH --job-name=megalite
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#
# Pretraining, on a cluster and on one machine:
#
#   sbatch slurm/pretrain.sh CONFIG [key=value ...]      sbatch --nodes=4 ... overrides the lines above
#   bash   slurm/pretrain.sh CONFIG [key=value ...]      the same run on this machine, with or without GPUs
#
# Submit from the repository's root; CONFIG is relative to it. --dry-run before CONFIG prints the command instead.
# RANKS=n sets the ranks per machine; otherwise there is one per GPU, or without GPUs as many as CONFIG needs.
# A requeued job continues from its newest checkpoint (checkpoint.resume: auto) and adds to its log.
set -euo pipefail

fail() { echo "pretrain.sh: $*" >&2; exit 2; }

dry_run=
if [[ ${1:-} == --dry-run ]]; then dry_run=1; shift; fi
[[ $# -ge 1 ]] || fail "usage: pretrain.sh [--dry-run] CONFIG [key=value ...]"

# sbatch runs a copy of this file from its spool folder, so where the file lies says nothing there.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ ! -d $root/megalite ]]; then root=${SLURM_SUBMIT_DIR:-$PWD}; fi
cd "$root"
[[ -f $1 ]] || fail "no config $1 in $root (submit from the repository's root)"

python=python
if [[ -x $root/.venv/bin/python ]]; then python=$root/.venv/bin/python; fi

count_gpus() {
  if [[ -n ${SLURM_GPUS_ON_NODE:-} ]]; then echo "$SLURM_GPUS_ON_NODE"
  elif [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true
  elif command -v nvidia-smi >/dev/null; then nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true
  else echo 0; fi
}

nodes=${SLURM_NNODES:-1}
needed=$("$python" -m megalite ranks "$@") # also finds a mistake in the config once, before every rank would
ranks=${RANKS:-$(count_gpus)}
if ((ranks == 0)); then ranks=$(((needed + nodes - 1) / nodes)); fi

# Every rank gets its share of the cores; torchrun alone would give each of several ranks one thread.
cores=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-$(nproc)}}
threads=$((cores / ranks))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}

torchrun=("$python" -m torch.distributed.run "--nproc-per-node=$ranks")
if [[ -n ${SLURM_JOB_ID:-} ]]; then
  head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
  port=$((10000 + SLURM_JOB_ID % 20000)) # below the ports Linux hands out by itself; jobs that share a node differ
  launch=(srun "--nodes=$nodes" "--ntasks=$nodes" --ntasks-per-node=1 "--cpus-per-task=$cores" # srun forgets sbatch's
    --kill-on-bad-exit=1 --wait=60
    "${torchrun[@]}" "--nnodes=$nodes" "--rdzv-id=$SLURM_JOB_ID" --rdzv-backend=c10d "--rdzv-endpoint=$head:$port")
else
  launch=("${torchrun[@]}" --standalone --local-addr=127.0.0.1)
fi
launch+=(-m megalite train "$@")

echo "OMP_NUM_THREADS=$OMP_NUM_THREADS$(printf ' %q' "${launch[@]}")"
if [[ -z $dry_run ]]; then exec "${launch[@]}"; fi
