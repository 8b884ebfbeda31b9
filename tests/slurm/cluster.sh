#!/usr/bin/env bash
# A real Slurm of several nodes on this machine, for tests: munged, slurmctld, and a slurmd a node.
#
#   cluster.sh install      get it from Debian's packages, where it is not there yet
#   cluster.sh up           start it; then `export SLURM_CONF=...` as it says
#   cluster.sh down         end all of it, jobs included
#   cluster.sh crash NODE   kill slurmd and all it runs, at once and without a farewell
#   cluster.sh start NODE   start slurmd again
#
# NODES (2) are called test0, test1 ...; each claims 64 cores. Everything is below DIR (/tmp/megalite-slurm), but for
# marked lines in /etc/hosts. Needs root, and Debian's slurmctld, slurmd, slurm-client and munge; neither systemd nor
# cgroups.
set -euo pipefail

dir=$(readlink -m "${DIR:-/tmp/megalite-slurm}") nodes=${NODES:-2}
# Several clusters can live on a machine: ports, job ids (from which jobs derive their ports) and names follow from DIR.
number=$(cksum <<<"$dir") number=$((${number%% *} % 5000))
name=test$number ports=$((20000 + 2 * number)) mark="# slurm of $dir"
export SLURM_CONF=$dir/slurm.conf

say() { echo "cluster.sh: $*" >&2; }

# A node's name must lead where the machine's own leads, or torchrun on it does not know that it is the first node.
address=$(getent ahostsv4 "$(hostname)" | awk 'NR == 1 { print $1 }') address=${address:-127.0.0.1}

write_config() {
    local i
    mkdir -p "$dir"/{log,state,spool}
    head -c 1024 /dev/urandom >"$dir/munge.key"
    chmod 400 "$dir/munge.key"
    # From 23.11 on slurmd wants one of these, of which v2 needs systemd; from 24.05 on it can do without.
    case $(slurmd -V | grep -oE '[0-9]+\.[0-9]+' | head -n 1) in
        2[0-3].* | 24.02) echo 'CgroupPlugin=cgroup/v1' ;;
        *) echo 'CgroupPlugin=disabled' ;;
    esac >"$dir/cgroup.conf"
    cat >"$SLURM_CONF" <<EOF
ClusterName=$name
SlurmctldHost=$(hostname -s)($address)
SlurmctldPort=$ports
FirstJobId=$((number + 1))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits until the credentials of its last run have expired, 5 s at least. The times are short, for tests.
AuthInfo=socket=$dir/munge.socket,cred_expire=5
SlurmdTimeout=10
KillWait=5
SchedulerParameters=sched_interval=1,bf_interval=1
ReturnToService=2
MinJobAge=3600
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
MailProg=/bin/true
TopologyPlugin=topology/tree
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
JobCompType=jobcomp/filetxt
JobCompLoc=$dir/log/jobs.txt
EOF
    for ((i = 0; i < nodes; i++)); do
        echo "NodeName=test$i NodeHostname=$(hostname -s) NodeAddr=$address Port=$((ports + 1 + i))" \
            'CPUs=64 RealMemory=100000 State=UNKNOWN'
    done >>"$SLURM_CONF"
    # The last node has a switch of its own, which is named first.
    {
        ((nodes < 3)) || echo "SwitchName=s0 Nodes=test$((nodes - 1))"
        echo "SwitchName=s1 Nodes=test[0-$((nodes < 3 ? nodes - 1 : nodes - 2))]"
        echo "SwitchName=top Switches=s[$((nodes < 3))-1]"
    } >"$dir/topology.conf"
    echo "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE" >>"$SLURM_CONF"
    echo "PartitionName=other Nodes=ALL MaxTime=INFINITE" >>"$SLURM_CONF"
}

# A daemon holds nothing of the caller's: neither environment, nor terminal, nor descriptors. PART is what `with` finds.
daemon() { # PART COMMAND...
    local part=$1
    shift
    (cd / && exec setsid env -i PATH="$PATH" SLURM_CONF="$SLURM_CONF" CLUSTER="$dir" PART="$part" "$@") \
        </dev/null >>"$dir/log/$part.out" 2>&1 &
}

start_node() { daemon "$1" slurmd -D -N "$1"; }

# Processes whose environment has a line.
with() { grep -lzxF -- "$1" /proc/[0-9]*/environ 2>/dev/null | cut -d / -f 3 || true; }

both() { comm -12 <(with "$1" | sort) <(with "$2" | sort); }

end() { xargs --no-run-if-empty kill -KILL 2>/dev/null || true; }

ours() { with "CLUSTER=$dir" && with "SLURM_CLUSTER_NAME=$name"; }

# What one of them had just begun when it was killed is ended the next time.
all_gone() { ours | end; [[ -z $(ours) ]]; }

wait_for() { # SECONDS COMMAND...
    local deadline=$((SECONDS + $1))
    shift
    until "$@"; do
        ((SECONDS < deadline)) || return 1
        sleep 0.1
    done
}

all_up() { [[ $(sinfo -h -N -p all -o '%N %t' 2>/dev/null | grep -cE ' (idle|mix|alloc)$') == "$nodes" ]]; }

# /etc/hosts may be a mount: it can be written, not replaced; and another cluster may be about to.
change_hosts() { # COMMAND
    local rest
    {
        flock 9
        rest=$(grep -vF "$mark" /etc/hosts || true)
        { printf '%s\n' "$rest" && "$@"; } >/etc/hosts
    } 9</etc/hosts
}

name_nodes() { for ((i = 0; i < nodes; i++)); do echo "$address test$i $mark"; done; }

up() {
    local i
    ((EUID == 0)) || { say "needs root" && exit 1; }
    down
    write_config
    change_hosts name_nodes
    daemon munged munged -F --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" \
        --pid-file="$dir/munged.pid" --seed-file="$dir/munge.seed" --log-file="$dir/log/munged.log"
    wait_for 60 test -S "$dir/munge.socket" || { cat "$dir/log/munged.out" >&2 && exit 1; }
    daemon slurmctld slurmctld -D -i
    for ((i = 0; i < nodes; i++)); do start_node "test$i"; done
    wait_for 60 all_up || { tail -n 20 "$dir"/log/*.log >&2 && exit 1; }
    echo "export SLURM_CONF=$SLURM_CONF"
}

down() {
    wait_for 30 all_gone
    if grep -qF "$mark" /etc/hosts; then change_hosts true; fi
    rm -rf "$dir"
}

install() {
    local missing
    missing=$(for program in slurmctld slurmd sbatch munged; do command -v $program >/dev/null || echo $program; done)
    [[ -n $missing ]] || return 0
    if ((EUID)) || ! command -v apt-get >/dev/null; then
        say "missing here, and no root or no apt-get to install them:" $missing
        exit 1
    fi
    {
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
            slurmctld slurmd slurm-client munge
    } >/dev/null
}

case "${1:-}:${2:-}" in
    install:) install ;;
    up:) up ;;
    down:) down ;;
    crash:test*)
        both "CLUSTER=$dir" "PART=$2" | end # with slurmd go the managers of its jobs
        both "SLURM_CLUSTER_NAME=$name" "SLURMD_NODENAME=$2" | end
        ;;
    start:test*) start_node "$2" ;;
    *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2 && exit 2 ;;
esac
