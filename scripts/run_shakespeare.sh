#!/bin/sh
# The reference run: Tiny Shakespeare as bytes, in nanoGPT's small setting for a CPU (4 layers, width 128, 4 heads,
# 64 tokens of context, batch 12, 2000 steps, no dropout), dense and sparse, and the same pair with 256 tokens of
# context, where the selection has something to select. Prints the validation losses, over all of the validation data.
#
#   scripts/run_shakespeare.sh                  all four
#   scripts/run_shakespeare.sh nsa_64 full_64   some of them
#
# Environment: OUT, where the runs go (out/shakespeare); STEPS (2000). A run that was interrupted goes on from its last
# checkpoint, a finished one is only shown again.
set -eu

out=${OUT:-out/shakespeare}
steps=${STEPS:-2000}
all="full_64 nsa_64 full_256 nsa_256"

die() { echo "run_shakespeare.sh: $*" >&2; exit 2; }

case ${1:-} in -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
case $steps in '' | *[!0-9]* | 0*) die "STEPS is a whole number, not '$steps'" ;; esac
for run in "$@"; do
  case " $all " in *" $run "*) ;; *) die "there is no run '$run': $all" ;; esac
done
[ $# -gt 0 ] || set -- full_64 nsa_64 full_256 nsa_256

case $out in /*) ;; *) out=$(pwd)/$out ;; esac
cd "$(dirname "$0")/.."
make
sh data/tinyshakespeare.sh

last_step() { printf 'step_%08d' "$steps"; }

finished() { [ "$(basename "$(readlink "$1/latest" 2>/dev/null || true)")" = "$(last_step)" ]; }

for run in "$@"; do
  folder=$out/$run
  context=${run#*_}
  case $run in
    full_*) attention="--attention full --kv-heads 4" ;;
    *) attention="--attention nsa --preset short --kv-heads 2" ;;
  esac
  if finished "$folder"; then
    echo "$run is finished: $folder"
  elif [ -e "$folder/latest" ]; then
    ./train_nsa -y -o "$folder" -x "$steps"
  else
    rm -f "$folder/log.jsonl"  # of a run that was stopped before its first checkpoint
    # shellcheck disable=SC2086  # $attention is several words
    ./train_nsa -i data/tinyshakespeare.txt -o "$folder" $attention --layers 4 --width 128 --heads 4 \
      -t "$context" -b 12 -x "$steps" -l 1e-3 -v 500 -m 0 -n 250 -s 0 --keep 1
  fi
  finished "$folder" || { echo "run_shakespeare.sh: $run stopped before step $steps; the same command goes on from there" >&2; exit 1; }
done

# One row a run, out of its log: best and last validation loss, minutes of training, folder.
row() {
  awk -v name="$1" -v folder="$2" '
    function value(key) {
      if (!match($0, "\"" key "\": *[-+0-9.eE]+")) return ""
      text = substr($0, RSTART, RLENGTH)
      sub(/^[^:]*: */, "", text)
      return text
    }
    { ms += value("ms") + 0 }
    value("val_loss") != "" {
      last = value("val_loss") + 0
      if (best == "" || last < best) { best = last; at = value("step") }
    }
    END { printf "%-10s %10.4f %8d %10.4f %9.1f  %s\n", name, best, at, last, ms / 60000, folder }
  ' "$2/log.jsonl"
}

printf '\n%-10s %10s %8s %10s %9s  %s\n' run "best val" "at step" "last val" minutes folder
for run in "$@"; do row "$run" "$out/$run"; done
