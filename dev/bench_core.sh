#!/bin/sh
# The attention of a layer as a whole (build/core bench) against the length of context: NSA and dense of ours, and of PyTorch cuDNN's and
# FlashAttention-2's dense attention, on one GPU. Milliseconds, medians, and the memory of the layer with all that its backward pass needs.
#
#   make build/core && dev/bench_core.sh                          T = 1024 to 65536; 64 heads on 4 key/value heads of 128
#   LENGTHS="65536 1048576" KINDS=nsa SHAPE="16 1 64" dev/bench_core.sh
#   MODEL=out/model TEXT='tokens/val_*.bin' dev/bench_core.sh     also the attention of a trained model's LAYERS (build/core model)
#
# KINDS: nsa, full, peers; LAYERS: 0 1. peers needs PyTorch. scripts/plot_speed.py --attention draws the table.
set -eu
[ $# -eq 0 ] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 2; }
SHAPE=${SHAPE:-64 4 128}
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# NAME T COMMAND...: a row of the table, from the times that the command prints.
row() {
  name=$1 T=$2
  shift 2
  if ! "$@" >"$log" 2>&1; then
    printf '%-16s %8d failed: %s\n' "$name" "$T" "$(tail -n 1 "$log")"
    return
  fi
  sed -n 's/.*forward \([0-9.]*\) ms, backward \([0-9.]*\) ms.*/\1 \2/p' "$log" | {
    read -r forward backward
    printf '%-16s %8d %12.3f %12.3f %8s\n' "$name" "$T" "$forward" "$backward" "$(sed -n 's/^memory \([0-9.]*\) GB.*/\1/p' "$log")"
  }
}
printf '%-16s %8s %12s %12s %8s\n' attention T 'forward ms' 'backward ms' GB
for T in ${LENGTHS:-1024 2048 4096 8192 16384 32768 65536}; do
  for kind in ${KINDS:-nsa full peers}; do
    # shellcheck disable=SC2086  # SHAPE is several words
    case $kind in
      nsa) row nsa "$T" build/core bench "$T" $SHAPE
           for layer in ${MODEL:+${LAYERS:-0 1}}; do row "trained-$layer" "$T" build/core model "$MODEL" "$T" "${TEXT:?the text or tokens that MODEL reads}" "$layer"; done ;;
      full) row full "$T" build/core bench "$T" $SHAPE full ;;
      peers) python3 dev/cuda/peers.py $SHAPE "$T" ;;
      *) echo "bench_core.sh: KINDS: '$kind' is none of nsa, full, peers" >&2; exit 2 ;;
    esac
  done
done
