#!/bin/sh
# The 124M model (-e d12: 16 heads on 1 KV head, preset paper) on long documents, 65536 tokens of context, on one GPU of 80 GB.
# Learns a vocabulary of 50257 tokens from the documents first, GPT-2's size, and keeps the token files.
#
#   scripts/run_124M_64k.sh FOLDER        documents: every .txt, .md and .py under FOLDER
#   scripts/run_124M_64k.sh FILE...       or these files, whatever they are called
#
# Environment: OUT, where the run goes (out/124M_64k); TOKENS, where the token files go (out/124M_64k_tokens; if they are there they
# are taken and no documents are needed); CONTEXT (65536); STEPS (1000, of 524288 tokens); ATTENTION, nsa (the default) or full for the
# dense twin; RECOMPUTE (-r: 0; 2 needs the least memory). A run that was interrupted goes on from its last checkpoint.
set -eu

out=${OUT:-out/124M_64k}
tokens=${TOKENS:-out/124M_64k_tokens}
context=${CONTEXT:-65536}
steps=${STEPS:-1000}
attention=${ATTENTION:-nsa}
recompute=${RECOMPUTE:-0}

die() { echo "run_124M_64k.sh: $*" >&2; exit 2; }

case ${1:-} in -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
for number in "$context" "$steps"; do
  case $number in '' | *[!0-9]* | 0*) die "CONTEXT and STEPS are whole numbers, not '$number'" ;; esac
done
case $attention in nsa | full) ;; *) die "ATTENTION is nsa or full, not '$attention'" ;; esac
for path in "$@"; do [ -e "$path" ] || die "$path: is not there"; done

here=$(cd "$(dirname "$0")/.." && pwd)
make -C "$here" train_nsacu

if ! ls "$tokens"/train_*.bin >/dev/null 2>&1; then
  [ $# -gt 0 ] || die "there are no token files in $tokens: name the documents to make them from"
  mkdir -p "$tokens"
  # One text with a mark between documents, since there may be more files than a command line holds.
  for path in "$@"; do
    if [ -f "$path" ]; then echo "$path"; else find "$path" -type f \( -name '*.txt' -o -name '*.md' -o -name '*.py' \) -size +1k -print; fi
  done | LC_ALL=C sort |
    while IFS= read -r file; do cat "$file"; printf '\n<|next document|>\n'; done | iconv -c -f utf-8 -t utf-8 > "$tokens/documents.txt"
  [ -s "$tokens/documents.txt" ] || die "no .txt, .md or .py under $*"
  python3 "$here/data/tokenize.py" train "$tokens/documents.txt" --split-on '<|next document|>' --vocab 50257 -o "$tokens"
  rm "$tokens/documents.txt"
fi

if [ -e "$out/latest" ]; then
  exec "$here/train_nsacu" -y -o "$out" -x "$steps"
fi
exec "$here/train_nsacu" -i "$tokens/train_*.bin" -j "$tokens/val_*.bin" -o "$out" -e d12 --attention "$attention" --dtype bf16 \
  -t "$context" -d 524288 -r "$recompute" -x "$steps" -u $((steps / 20)) -l 6e-4 -q 0.1 --beta2 0.95 -c 0.1 -v 100 -m 4 -n 200 -s 0 --keep 2
