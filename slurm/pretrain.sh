#!/bin/bash
#SBATCH --job-name=megalite
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
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
#
#   RANKS=n        ranks per machine; otherwise one per GPU, or without GPUs as many as CONFIG needs
#   WITHIN=...     container or modules to run in; see within.sh
#   HOOK=file      script that sets NCCL's variables and the like for your cluster; see within.sh
#   LOGS=folder    for what the nodes say; otherwise RUN/logs
#   TRIES=n        attempts in a row that may fail without a new checkpoint (3; without Slurm 1)
#   RESTARTS=n     how often a job may start again in all (100)
#   PREFLIGHT=no   do not look first whether the job's nodes are fit
#
# A job starts again by itself, from its newest checkpoint. Five to six minutes before its time limit (--signal, above;
# it must be well below the limit) all ranks save and the job requeues itself, so that a run can be longer than the
# limit. After a rank has failed, it starts again on the nodes it has; after a node is lost, or found unfit by
# `megalite preflight`, it requeues itself, without the unfit ones. Under `sbatch --nodes=MIN-MAX`, with
# parallel.elastic: true in CONFIG, it goes on with fewer nodes while there are not enough; global batch and order of
# the data stay the same. Where the cluster does not let jobs requeue themselves, submit the same line as often as
# needed, with --dependency=singleton --job-name=NAME: each job goes on where the one before it stopped.
# `scancel --batch --signal=USR1 JOB` brings the requeue on early, --signal=TERM saves and ends the job for good.
#
# sbatch itself takes SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_QOS and SBATCH_EXCLUSIVE=exclusive from the environment: set
# once in your profile, they need not be given each time. The job's own log goes where --output says.
#
# The job's log shows rank 0 and a summary; all that a node says is in RUN/logs/JOB.RESTART-NODE.log. The exit status
# is that of megalite (megalite/runtime/exit_codes.py).
set -euo pipefail

fail() { echo "$(basename "$0"): $*" >&2; exit 2; }

dry_run=
if [[ ${1:-} == --dry-run ]]; then dry_run=1; shift; fi
[[ $# -ge 1 ]] || fail "usage: $(basename "$0") [--dry-run] CONFIG [key=value ...]"

# sbatch runs a copy of this file from its spool folder, so where the file lies says nothing there.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ ! -d $root/megalite ]]; then root=${SLURM_SUBMIT_DIR:-$PWD}; fi
cd "$root"
[[ -f $1 ]] || fail "no config $1 in $root (submit from the repository's root)"

source slurm/within.sh

# Has the ranks save and leave, of which any one signal is enough; others than USR1 srun would not pass on.
asked="" child=""
stop() { # TO: `requeue` or `leave`
  asked=$1
  tell
}
tell() {
  if [[ -n $child ]]; then
    # Until it is the launcher it is a fork of this shell, which loses what that has a trap for.
    while cmp -s "/proc/$$/cmdline" "/proc/$child/cmdline"; do sleep 0.01; done
    kill -USR1 "$child" 2>/dev/null || true
  fi
}
trap 'stop requeue' USR1
trap 'stop leave' TERM INT

count_gpus() {
  if [[ -n ${SLURM_GPUS_ON_NODE:-} ]]; then echo "$SLURM_GPUS_ON_NODE"
  elif [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true
  elif command -v nvidia-smi >/dev/null; then nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true
  else echo 0; fi
}

job=${SLURM_JOB_ID:-} given=${SLURM_NNODES:-1}
ask=("${python[@]}" -m megalite job "$@" "--nodes=$given" "--ranks-per-node=${RANKS:-$(count_gpus)}")
if ((${#srun[@]} > 1)); then ask=("${srun[@]}" --nodes=1 --ntasks=1 "${ask[@]}"); fi
told=$("${ask[@]}") # also finds a mistake in the config once, before every rank would
read -r ranks nodes run <<<"$told"
logs=${LOGS:-$run/logs}

# Every rank gets its share of the cores; torchrun alone would give each of several ranks one thread.
cores=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-$(nproc)}}
threads=$((cores / ranks))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}

# The job's nodes, those of a switch side by side where Slurm knows the switches: neighbouring ranks say most to each
# other. Of a switch, and where there are none, by name.
in_order() {
  local names switches
  names=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | LC_ALL=C sort)
  switches=$(scontrol show topology 2>/dev/null | grep -E '^(SwitchName=\S+ Level=0|BlockName=)' |
    grep -oP '\sNodes=\K\S+' || true)
  {
    for list in $switches; do scontrol show hostnames "$list" | LC_ALL=C sort; done | grep -xF "$names" || true
    echo "$names"
  } | awk '!seen[$0]++'
}

# Puts into $launch what starts `megalite VERB` on all nodes.
compose() { # VERB
  local launcher=("${python[@]}" -m megalite.launch "--nproc-per-node=$ranks")
  local task=(-m megalite "$1" "${arguments[@]}")
  if [[ -z $job ]]; then
    launch=("${launcher[@]}" --standalone --local-addr=127.0.0.1 "${task[@]}")
  else
    mapfile -t hosts < <(in_order | head -n "$nodes")
    export MEGALITE_NODES="${hosts[*]}" # the order of the ranks; rank 0 is on the first
    log=$logs/$job.$restart
    if [[ $1 != train ]]; then log+=-$1; fi
    launch=("${srun[@]}" "--nodes=$nodes" "--ntasks=$nodes" --ntasks-per-node=1 "--cpus-per-task=$cores" # not inherited
      "--nodelist=$(IFS=,; echo "${hosts[*]}")"
      --kill-on-bad-exit=0 --wait=20 # when one node has ended, the others have so long to do so and say why
      bash -c 'exec "$@" >"$0-$SLURMD_NODENAME.log" 2>&1' "$log" "${launcher[@]}"
      "--nnodes=$nodes" "--rdzv-id=$job.$restart-$1" "--rdzv-endpoint=${hosts[0]}" # at a port of the step
      "${task[@]}")
  fi
}

# Runs `megalite VERB`; leaves its exit status in $status.
attempt() { # VERB
  local show=
  compose "$1"
  echo "OMP_NUM_THREADS=$OMP_NUM_THREADS$(printf ' %q' "${launch[@]}")"
  if [[ -n $dry_run ]]; then exit; fi
  if [[ -n $asked ]]; then status=75; return; fi
  if [[ $1 == train ]]; then trained=1; fi
  "${launch[@]}" &
  child=$!
  if [[ -n $asked ]]; then tell; fi # just then
  if [[ -n $job ]]; then
    tail --follow=name --retry --lines=+1 --sleep-interval=0.2 --pid="$child" "$log-${hosts[0]}.log" 2>/dev/null |
      grep --line-buffered -v '^== ' & # which comes in the summary
    show=$!
  fi
  while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done # a signal interrupts the wait
  status=0
  wait "$child" || status=$?
  child=
  if [[ -n $show ]]; then wait "$show" || true; summary | sort; fi
}

# A line a node: what became of its ranks, and the first error there.
summary() {
  local node last error
  for node in "${hosts[@]}"; do
    last=$(grep '^== ' "$log-$node.log" 2>/dev/null | tail -n 1 || true)
    error=$(grep -m 1 -oE '[A-Za-z]*Error: .*|^error.*' "$log-$node.log" 2>/dev/null | cut -c -200 || true)
    echo "${last:-== $node: lost, or ended from outside}${error:+; $error}"
  done
}

newest() { find "$run/checkpoints" -path '*/step-????????/manifest.json' 2>/dev/null | sort | tail -n 1 || true; }

finish() {
  echo "== $(date '+%F %T') ${job:+job $job, }start $restart: exit status $status; $*"
  exit "$status"
}

# Has Slurm start the job again, on other nodes than $unfit, if there are any.
requeue() {
  local excluded
  excluded=$(scontrol show job "$job" | grep -oE 'ExcNodeList=[^( ]+' | cut -d = -f 2 || true)
  echo "== $(date '+%F %T') job $job, start $restart: exit status $status; requeueing${unfit:+ without $unfit}"
  echo "$failures $restart" >"$logs/$job.starts"
  trap '' TERM # which requeueing sends this script; Slurm takes a new list only of a job that does not run any more
  if ! scontrol requeue "$job"; then finish "Slurm does not requeue jobs here; submitted again, the run goes on"; fi
  if [[ -n $unfit ]]; then scontrol update "JobId=$job" "ExcNodeList=${excluded:+$excluded,}$unfit"; fi
  exit "$status"
}

arguments=("$@") restart=${SLURM_RESTART_COUNT:-0} failures=0 tries=${TRIES:-1}
if [[ -n $job ]]; then
  mkdir -p "$logs"
  if read -r failures last 2>/dev/null <"$logs/$job.starts" && ((last >= restart)); then restart=$((last + 1)); fi
  tries=${TRIES:-3}
  if ((nodes < given)); then echo "== $nodes of the job's $given nodes are used: no more fit CONFIG"; fi
fi
for (( ; ; restart++)); do
  before=$(newest) status=0 unfit="" ready=1 trained=""
  if [[ -n $job ]]; then echo "$failures $restart" >"$logs/$job.starts"; fi
  if [[ -n $job && -z $dry_run && -z $asked && ${PREFLIGHT:-yes} != no ]]; then
    attempt preflight
    if ((status)); then ready=; fi
  fi
  if [[ -n $asked ]]; then status=75; elif ((status == 0)); then attempt train; fi
  case $status in
    0) finish "done" ;;
    2) finish "a mistake that starting again would not mend" ;;
    78) finish "bad numbers, which starting again would meet again" ;;
    75) if [[ $asked != requeue || -z $job ]]; then finish "stopped; started again, the run goes on where it was"; fi ;;
    *) if [[ $asked == leave ]]; then finish "stopped, without a checkpoint of the last step"; fi ;;
  esac
  if [[ $status == 77 ]]; then unfit=$(grep -oE '^--exclude=\S+' "$log-${hosts[0]}.log" | cut -d = -f 2 || true); fi
  # A job that is always stopped before it trains (its limit is too near --signal) must not come back for ever.
  if [[ $status == 75 && -n $trained || -n $unfit || $(newest) != "$before" ]]; then failures=0
  else failures=$((failures + 1)); fi
  if ((failures >= tries)); then finish "failed $failures times in a row without a new checkpoint"; fi
  if ((restart >= ${RESTARTS:-100})); then finish "that was the last of ${RESTARTS:-100} restarts"; fi
  # A job that was cancelled, or is past its limit, must not come back.
  if [[ -n $job && $(squeue --noheader --jobs="$job" --format=%T) != RUNNING ]]; then finish "ended by Slurm"; fi
  if [[ -n $job && (-n $asked || -z $ready) ]]; then requeue; fi
  echo "== $(date '+%F %T') start $restart: exit status $status; starting again"
done
