#!/bin/sh
# One run on the GPUs of several machines, started by mpirun from any of them.
#
#   scripts/multi_node/mpirun.sh HOSTFILE OPTIONS...      options of train_nsacu
#
# HOSTFILE has a line for each machine, with its number of GPUs:  node1 slots=8
# The machines reach each other by ssh without a password, and see this folder, the data and the run's folder under the same names.
# Environment: PROGRAM, ./train_nsacu (or ./train_nsa, for ranks on CPUs); THREADS, OpenMP threads of a rank (4).
set -eu

die() { echo "mpirun.sh: $*" >&2; exit 2; }
case ${1:-} in '' | -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
hostfile=$1
shift
[ -f "$hostfile" ] || die "$hostfile: is not there: a line for each machine, \"node1 slots=8\""
program=${PROGRAM:-./train_nsacu}
[ -x "$program" ] || die "$program: is not there: make train_nsacu"
ranks=$(sed -e 's/#.*//' "$hostfile" | awk 'NF { n = 1; for (i = 2; i <= NF; i++) if (split($i, slots, "=") == 2 && slots[1] == "slots") n = slots[2]; sum += n } END { print sum + 0 }')
[ "$ranks" -gt 0 ] || die "$hostfile names no machine"

# NCCL's own variables (NCCL_SOCKET_IFNAME, NCCL_IB_HCA...) go to every rank, and where libraries lie.
passed=$(env | sed -n -e 's/^\(NCCL_[A-Z0-9_]*\)=.*/-x \1/p' -e 's/^\(LD_LIBRARY_PATH\)=.*/-x \1/p')
# shellcheck disable=SC2086
exec mpirun -np "$ranks" --hostfile "$hostfile" --map-by slot --bind-to none -x OMP_NUM_THREADS="${THREADS:-4}" $passed "$program" -z 1 "$@"
