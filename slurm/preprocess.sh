#!/bin/bash
#SBATCH --job-name=megalite-preprocess
#SBATCH --array=0-7
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=16G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A-%a.log
#
# Tokenizing, on a cluster and on one machine, to the same bytes:
#
#   sbatch slurm/preprocess.sh OPTION ...      one shard of the input a task; sbatch --array=0-63 ... for 64 of them
#   bash   slurm/preprocess.sh OPTION ...      all of it on this machine
#
# OPTIONs are those of tools/preprocess_data.py. Submit from the repository's root; paths are relative to it. The task
# that finishes last joins the shards. If tasks failed, submit the same line again: finished shards are kept.
# WITHIN=... names a container or modules to run in; see within.sh.
set -euo pipefail

fail() { echo "preprocess.sh: $*" >&2; exit 2; }

dry_run=
if [[ ${1:-} == --dry-run ]]; then dry_run=1; shift; fi
[[ $# -ge 1 ]] || fail "usage: preprocess.sh [--dry-run] --input FILE ... --output-prefix P --tokenizer FOLDER ..."

# sbatch runs a copy of this file from its spool folder, so where the file lies says nothing there.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ ! -d $root/megalite ]]; then root=${SLURM_SUBMIT_DIR:-$PWD}; fi
cd "$root"
[[ -f tools/preprocess_data.py ]] || fail "no tools/preprocess_data.py in $root (submit from the repository's root)"

source slurm/within.sh

command=("${python[@]}" tools/preprocess_data.py)
if ((${#srun[@]} > 1)); then command=("${srun[@]}" --ntasks=1 "${command[@]}"); fi
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then command+=(--workers "$SLURM_CPUS_PER_TASK"); fi
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
  first=$SLURM_ARRAY_TASK_MIN
  # A shard's place follows from the whole array: part of one would cut the input at other places.
  count=$((SLURM_ARRAY_TASK_MAX - first + 1))
  ((count == SLURM_ARRAY_TASK_COUNT)) || fail "the array has gaps; submit it whole, finished shards take no time"
  command+=(--shard "$((SLURM_ARRAY_TASK_ID - first))/$count")
fi

command+=("$@")

printf '%q ' "${command[@]}"; echo
if [[ -z $dry_run ]]; then exec "${command[@]}"; fi
