#!/bin/sh
# The reference run: Tiny Shakespeare as bytes, in nanoGPT's small setting for a CPU (4 layers, width 128, 4 heads,
# 64 tokens of context, batch 12, 2000 steps, no dropout), dense and sparse, and the same pair with 256 tokens of
# context, where the selection has something to select. Prints the validation losses, over all of the validation data.
#
#   scripts/run_shakespeare.sh                    all four
#   scripts/run_shakespeare.sh nsa_64 full_64     some of them
#   scripts/run_shakespeare.sh full_gpu nsa_gpu   nanoGPT's setting for a GPU (6 layers, width 384, 6 heads, 256 tokens of
#                                                 context, batch 64, 5000 steps, dropout 0.2), by train_nsacu in bf16
#
# Environment: OUT, where the runs go (out/shakespeare); STEPS (2000, on a GPU 5000). A run that was interrupted goes on
# from its last checkpoint, a finished one is only shown again.
set -eu

out=${OUT:-out/shakespeare}
all="full_64 nsa_64 full_256 nsa_256 full_gpu nsa_gpu"

die() { echo "run_shakespeare.sh: $*" >&2; exit 2; }

case ${1:-} in -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
case ${STEPS:-1} in *[!0-9]* | 0*) die "STEPS is a whole number, not '$STEPS'" ;; esac
for run in "$@"; do
  case " $all " in *" $run "*) ;; *) die "there is no run '$run': $all" ;; esac
done
[ $# -gt 0 ] || set -- full_64 nsa_64 full_256 nsa_256

case $out in /*) ;; *) out=$(pwd)/$out ;; esac
cd "$(dirname "$0")/.."
case " $* " in *_gpu*) make train_nsacu ;; esac
make
sh data/tinyshakespeare.sh

finished() { [ "$(basename "$(readlink "$1/latest" 2>/dev/null || true)")" = "$(printf 'step_%08d' "$steps")" ]; }

for run in "$@"; do
  folder=$out/$run
  case $run in
    *_gpu)
      # So large a model learns this text by heart: a strong decay holds it off, and the best loss comes after some 1000 steps.
      program=./train_nsacu heads=6 steps=${STEPS:-5000}
      setting="--dtype bf16 --layers 6 --width 384 -t 256 -b 64 -l 5e-4 --beta2 0.99 -c 1 -u 100 --dropout 0.2 -v 100" ;;
    *)
      program=./train_nsa heads=4 steps=${STEPS:-2000}
      setting="--layers 4 --width 128 -t ${run#*_} -b 12 -l 1e-3 -v 500" ;;
  esac
  case $run in
    full_*) attention="--attention full --kv-heads $heads" ;;
    *) attention="--attention nsa --preset short --kv-heads 2" ;;
  esac
  if finished "$folder"; then
    echo "$run is finished: $folder"
  elif [ -e "$folder/latest" ]; then
    $program -y -o "$folder" -x "$steps"
  else
    rm -f "$folder/log.jsonl"  # of a run that was stopped before its first checkpoint
    # shellcheck disable=SC2086  # $attention and $setting are several words
    $program -i data/tinyshakespeare.txt -o "$folder" $attention --heads $heads $setting -x "$steps" -m 0 -n 250 -s 0 --keep 1
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
