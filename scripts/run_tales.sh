#!/bin/sh
# The default model, trained for longer on more of the built-in tales, and with a context that holds half a story:
# ten to fifteen minutes on two cores. Ends with samples.
#
#   scripts/run_tales.sh                              STEPS=6000 BYTES=16M SEED=1 OUT=out/tales
#   STEPS=30000 BYTES=64M scripts/run_tales.sh        an hour
#   scripts/run_tales.sh --attention full             further options go to train_nsa
#
# A run that was interrupted goes on from its last checkpoint.
set -eu

out=${OUT:-out/tales}
steps=${STEPS:-6000}
bytes=${BYTES:-16M}
seed=${SEED:-1}

case ${1:-} in -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
case $steps in '' | *[!0-9]* | 0*) echo "run_tales.sh: STEPS is a whole number, not '$steps'" >&2; exit 2 ;; esac
case $out in /*) ;; *) out=$(pwd)/$out ;; esac
cd "$(dirname "$0")/.."
make
make tales
mkdir -p "$out"
[ -e "$out/tales.txt" ] || { data/tales --bytes "$bytes" --seed "$seed" -o "$out/tales.part" && mv "$out/tales.part" "$out/tales.txt"; }

if [ -e "$out/run/latest" ]; then
  ./train_nsa -y -o "$out/run" -x "$steps"
else
  rm -f "$out/run/log.jsonl"  # of a run that was stopped before its first checkpoint
  ./train_nsa -i "$out/tales.txt" -o "$out/run" -t 1024 -b 1 -x "$steps" -v 500 -m 50 -n 500 -s 1000 --keep 2 "$@"
fi

[ -x ./sample ] || exit 0
for prompt in "There was once a young baker named" "The Lost Silver Key"; do
  printf '\n'
  ./sample -e "$out/run/latest" -p "$prompt" -n 1500 --temp 0.8 --top-p 0.95 --seed 1
done
