#!/bin/sh
# The 124M model (-e d12) and its dense twin in bf16 on one GPU: tokens a second, memory and model FLOP utilisation at several
# lengths, as dev/benchmarks.md and the README report them. Six steps of 524288 tokens each; the median of the last four.
#
#   dev/bench_124M.sh 'tokens/train_*.bin'                              T = 1024, 8192, 32768, 65536
#   LENGTHS="65536 262144" KINDS=nsa OPTIONS="-r 2" dev/bench_124M.sh 'tokens/train_*.bin'
#
# FLOPs of a token: 6 a parameter (the embedding counts once, as the head), and 12·D·H a layer for each key that it meets: T/2 of the
# dense twin; of NSA T/(2·16) compressed, 16·64 selected, 512 of the window. PEAK (790e12) is the matrix product measured on an H200.
set -eu
[ $# -eq 1 ] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 2; }
log=$(mktemp -d)
trap 'rm -rf "$log"' EXIT
printf '%-6s %8s %12s %10s %9s %6s\n' model T 'tok/s' 'ms a step' 'GB' MFU
for T in ${LENGTHS:-1024 8192 32768 65536}; do
  for kind in ${KINDS:-full nsa}; do
    # shellcheck disable=SC2086  # OPTIONS is several words
    if ! ./train_nsacu -i "$1" -e d12 --attention "$kind" --dtype bf16 -t "$T" -d 524288 -x 6 -v 0 -m 1 -s 0 -n 0 -o "$log/$kind$T" ${OPTIONS:-} >"$log/out.txt" 2>&1; then
      printf '%-6s %8d failed: %s\n' "$kind" "$T" "$(tail -n 1 "$log/out.txt")"
      continue
    fi
    parameters=$(sed -n 's/^model.*: \([0-9.]*\)M parameters.*/\1e6/p' "$log/out.txt" | head -n 1)
    sed -n 's/.*"step":\([0-9]*\).*"tok\/s":\([0-9.e+]*\),"ms":\([0-9.e+]*\),"mem":\([0-9.e+]*\).*/\1 \2 \3 \4/p' "$log/$kind$T/log.jsonl" | awk '$1 > 2' | sort -n -k 2 |
      awk -v kind="$kind" -v T="$T" -v parameters="${parameters:-124500000}" -v peak="${PEAK:-790e12}" '
        { rate[NR] = $2; ms[NR] = $3; mem = $4 }
        END {
          i = int((NR + 1) / 2)
          keys = kind == "full" ? T / 2 : T / 32 + (T / 2 < 1024 ? T / 2 : 1024) + (T / 2 < 512 ? T / 2 : 512)
          heads = kind == "full" ? 12 : 16
          flops = 6 * parameters + 12 * 12 * 64 * heads * keys
          printf "%-6s %8d %12.0f %10.0f %9.1f %6.2f\n", kind, T, rate[i], ms[i], mem / 1e9, rate[i] * flops / peak
        }'
  done
done
