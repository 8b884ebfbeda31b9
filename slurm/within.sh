# shellcheck shell=bash disable=SC2034
# Sourced by the launchers, in the repository's root: what Python is called with here, in $python, and srun, in $srun.
# WITHIN says what surrounds it, one of
#
#   WITHIN='module load python/3.11 cuda/12.8'                               also: ml ..., source ...
#   WITHIN='apptainer exec --nv --bind /data megalite.sif'                   or whatever else runs a command
#   WITHIN='--container-image=megalite.sqsh --container-mounts=/data'        options for srun: pyxis with enroot
#
# Without it, Python is that of .venv, or else the PATH's.
#
# HOOK=FILE is a script of your cluster's that is sourced before; the variables it sets, NCCL_SOCKET_IFNAME=ib0 and the
# like, are those of all ranks.

if [[ -n ${HOOK:-} ]]; then
  [[ -f $HOOK ]] || fail "HOOK=$HOOK: there is no such file in $PWD"
  set -a +u
  # shellcheck source=/dev/null
  source "$HOOK"
  set +a -u
fi
python=(python) srun=(srun)
if [[ -x $PWD/.venv/bin/python ]]; then python=("$PWD/.venv/bin/python"); fi
case ${WITHIN:-} in
  '') ;;
  'module '* | 'ml '* | 'source '*)
    set +u # modules are not written for it
    eval "$WITHIN"
    set -u
    ;;
  --*) read -ra options <<<"$WITHIN"; srun+=("${options[@]}") python=(python) ;;
  *) read -ra python <<<"$WITHIN python" ;;
esac
