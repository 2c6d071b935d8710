#!/bin/sh
# The program sample: what it prints, where it stops, what it writes, what it refuses and how.

fixtures=$(realpath test/fixtures)
. test/lib.sh
[ -x "$SAMPLE" ] || { echo "there is no program ${SAMPLE:-./sample}: make builds it"; exit 1; }
good $tiny -x 3 -o run
good $tiny -x 3 -o dense --attention full
good $tiny -x 1 -o larger --vocab 300
good $tiny -x 1 -o ascii --vocab 128
good $tiny -x 1 -o experts --experts 4 --full-layers 0 --dtype bf16
good $tiny -x 1 -o gpt2 --tokenizer "$fixtures/tokenizer_gpt2.json"
TRAIN=$SAMPLE               # good and bad run the sampler from here on
prompt='从前有座山。'

# valid_utf8 FILE
valid_utf8() {
    od -An -v -tu1 "$1" | awk '{ for (i = 1; i <= NF; i++) {
        b = $i
        if (more > 0) { if (b < low || b > high) bad = 1; more--; low = 128; high = 191 }
        else if (b >= 128) {
            low = b == 224 ? 160 : b == 240 ? 144 : 128
            high = b == 237 ? 159 : b == 244 ? 143 : 191
            more = b < 194 || b > 244 ? 9 : b < 224 ? 1 : b < 240 ? 2 : 3
            if (more == 9) bad = 1
        } } } END { exit bad || more }'
}

# header FILE: the JSON of a safetensors
header() { tail -c +9 "$1" | head -c "$(od -An -tu4 -N4 "$1" | tr -d ' ')"; }

# --- text
good -e run/latest -p "$prompt" -n 300 --temp 2 --top-k 0 --seed 1
check 'whole characters only' valid_utf8 out.txt
check 'the prompt comes first' grep -qF "$prompt" out.txt
cp out.txt first.txt
good -e run -p "$prompt" -n 300 --temp 2 --top-k 0 --seed 1
check 'same seed, same text' cmp first.txt out.txt
good -e run -p "$prompt" -n 300 --temp 2 --top-k 0 --seed 2
check 'another seed, another text' test "$(cmp -s first.txt out.txt; echo $?)" -eq 1
printf %s "$prompt" > prompt.txt
good -e run -f prompt.txt -n 300 --temp 2 --top-k 0 --seed 1
check 'a prompt from a file' cmp first.txt out.txt
"$SAMPLE" -e run -f - -n 300 --temp 2 --top-k 0 --seed 1 < prompt.txt > out.txt
check 'a prompt from the standard input' cmp first.txt out.txt
good -e run -p "$prompt" -n 300 --temp 2 --top-k 0 --seed 1 --no-echo
check 'without echo' test "$(cat prompt.txt out.txt | cksum)" = "$(cksum < first.txt)"
good -e run -p abc -n 40 --temp 0
cp out.txt first.txt
good -e run -p abc -n 40 --top-k 1 --seed 5
check 'top-k 1 is greedy' cmp first.txt out.txt
good -e run -p abc -n 40 --top-p 0 --seed 6
check 'so is top-p 0' cmp first.txt out.txt
good -e run -p abc -n 40 --temp 0 --threads 1
check 'greedy, one thread' cmp first.txt out.txt
good -e run -n 20                  # no prompt: starts a text
good -e run -p '' -n 5              # so does an empty one
good -e larger -p hello -n 3       # --vocab 300 is bytes still
# Counted in bytes, two answers of three and their ends, not in lines: the model may well say a newline.
printf 'abc\n\303\251\nabc\n' | "$SAMPLE" -e ascii -i -n 3 > out.txt 2> err.txt
check 'a line that the model cannot read is not the end' test $? -eq 0 -a "$(wc -l < err.txt)" -eq 1 -a "$(wc -c < out.txt)" -eq 8
bad 2 'name two files' -e run -p abc -n 0 --dump-logits same.st --dump-attention same.st
good -e dense -p abc -n 50
good -e experts -p abc -n 50
good -e gpt2 -p "$prompt" -n 50 --seed 3
check 'whole characters from a BPE' valid_utf8 out.txt
good -e gpt2 -n 5                  # starts with the end-of-text token

if "$SAMPLE" --help | grep -q -e '--dtype'; then       # on a GPU
    good -e run -p "$prompt" -n 40 --dtype bf16 --temp 0
    cp out.txt first.txt
    good -e run -p "$prompt" -n 40 --dtype bf16 --temp 0
    check 'the same text in bf16 too' cmp first.txt out.txt
    good -e experts -p abc -n 20 --dtype bf16 --batch 2
fi

# --- where it stops
good -e run -p abc -n 0
check '-n 0 writes nothing' test ! -s out.txt
wild='--top-k 0 --temp 3 -n 2000 --seed 4 --no-echo'
"$SAMPLE" -e run $wild --stats > whole.txt 2> err.txt
check '-n tokens, of which the last one is not read again' grep -q '^decode     1999 tokens' err.txt
cp -RL run/latest eos
sed -i.bak 's/"eos_token_id": null/"eos_token_id": 65/' eos/config.json
good -e eos $wild -p abc
cp out.txt stopped.txt
good -e run $wild -p abc
first_A=$(od -An -v -tu1 out.txt | tr -s ' ' '\n' | grep . | grep -n '^65$' | head -n 1 | cut -d : -f 1)
{ head -c $((first_A - 1)) out.txt; echo; } > wanted.txt
check 'the end of the text stops' cmp wanted.txt stopped.txt

# --- several samples
good -e run -p abc -n 30 --batch 3 --seed 1
check 'three samples' test "$(grep -ac '^--- sample [123] ---$' out.txt)" -eq 3
cp out.txt first.txt
good -e run -p abc -n 30 -b 3 --seed 1
check 'the same three' cmp first.txt out.txt
good -e run -p abc -n 30 -b 2 --temp 0
check 'greedy samples are equal' test "$(grep -av '^--- sample' out.txt | sort | uniq -c | awk '$1 % 2' | wc -l)" -eq 0

# --- a conversation
printf 'abc\n\n12' | "$SAMPLE" -e run -i -n 7 --temp 0 --stats > out.txt 2> err.txt
check 'interactive ends well' test $? -eq 0
# three lines in: 3, then the token that waits, then it with a new line and two bytes; 3 x 6 steps more
check 'the cache is kept between lines' grep -q '^prefill    8 tokens' err.txt
check 'three answers' grep -q '^decode     18 tokens' err.txt
good -e run -p abc -n 14 --temp 0 --no-echo
tr -d '\n' < out.txt > whole.txt
printf '\n' | "$SAMPLE" -e run -i -p abc -n 7 --temp 0 --no-echo | tr -d '\n' > out.txt
check 'Enter alone goes on' cmp whole.txt out.txt
mkfifo lines
"$SAMPLE" -e run -i -n 100m > out.txt 2> err.txt < lines &
pid=$!
exec 3> lines
echo abc >&3
sleep $((1 + ${START_DELAY:-0}))    # a GPU takes its time to start
kill -INT $pid
exec 3>&-
wait $pid
check 'Ctrl-C stops an answer, not the program' test $? -eq 0 -a ! -s err.txt

# --- what it writes
good -e run -p abcde -n 0 --dump-logits logits.safetensors --dump-attention attention.safetensors
header logits.safetensors > header.txt
check 'shape of the logits' grep -qF '"logits":{"dtype":"F32","shape":[5,256]' header.txt
check 'size of the logits' test "$(wc -c < logits.safetensors)" -eq $((8 + $(wc -c < header.txt) + 5 * 256 * 4))
header attention.safetensors > header.txt
check 'tokens of the attention dump' grep -qF '"tokens":{"dtype":"I32","shape":[5]' header.txt
check 'blocks of the attention dump' grep -qF '"model.layers.1.self_attn.block_idx":{"dtype":"I32","shape":[5,1,5]' header.txt
check 'gates of the attention dump' grep -qF '"model.layers.1.self_attn.gates":{"dtype":"F32","shape":[5,2,3]' header.txt
check 'config of the attention dump' grep -qF '\"sel_blocks\": 5' header.txt
good -e experts -p abcde -n 0 --dump-attention attention.safetensors
check 'a full layer is not in the dump' test "$(header attention.safetensors | grep -c 'layers.0.self')" -eq 0

# --- long prompts warn, once
seq 1 60 > long.txt
"$SAMPLE" -e run -f long.txt -n 5 > out.txt 2> err.txt
check 'a long prompt warns' test $? -eq 0 -a "$(grep -c 'warning: the prompt has 171 tokens' err.txt)" -eq 1 -a "$(wc -l < err.txt)" -eq 1

# --- what it refuses
bad 2 '-e (--model) is needed'
bad 2 'did you mean --top-k?' -e run --topk 3
bad 2 'unexpected argument' -e run abc
bad 2 'give one of them' -e run -p a -f prompt.txt
bad 2 'would both read the standard input' -e run -i -f -
bad 2 'leave out -i' -e run -i -b 2
bad 2 'give one with -p' -e run -i --dump-logits x
bad 2 'out of range' -e run --temp -1
bad 2 'out of range' -e run --top-p 1.5
bad 2 'out of range' -e run --batch 0
bad 2 'out of range' -e run -n -1
bad 2 'no choice to show' -e dense -p a --dump-attention x
bad 1 'no such folder' -e nowhere -p a
bad 1 'holds no model' -e "$fixtures" -p a
bad 1 'cannot open' -e run -f nosuch.txt
bad 1 'is a folder' -e run -f .
bad 1 'nosuch.json' -e run -p a --tokenizer nosuch.json
bad 1 'it is not the model' -e run -p a --tokenizer "$fixtures/tokenizer_gpt2.json"
bad 1 'cannot write' -e run -p a --dump-logits nowhere/x
[ -e /dev/full ] && bad 1 'cannot write' -e run -p a -n 0 --dump-attention /dev/full
if [ -e /dev/full ]; then
    "$SAMPLE" -e run -p abc -n 5 > /dev/full 2> err.txt
    check 'a full standard output' test $? -eq 1 -a "$(wc -l < err.txt)" -eq 1
fi
cp -RL run/latest broken
head -c 3000 run/latest/model.safetensors > broken/model.safetensors
bad 1 'broken/model.safetensors' -e broken -p a
rm broken/model.safetensors
bad 1 'broken/model.safetensors' -e broken -p a
cp run/latest/model.safetensors broken
sed 's/"window": 64/"window": 0/' run/latest/config.json > broken/config.json
bad 2 '--window' -e broken -p a
echo '{' > broken/config.json
bad 1 'broken/config.json' -e broken -p a
sed 's/"num_hidden_layers": 2/"num_hidden_layers": 3/' run/latest/config.json > broken/config.json
bad 1 'model.layers.2' -e broken -p a
sed 's/"hidden_size": 32/"hidden_size": 1048576/; s/"vocab_size": 256/"vocab_size": 4194304/' run/latest/config.json > broken/config.json
bad 2 'the machine has' -e broken -p a
rm gpt2/latest/tokenizer.json       # what trained on token files of unknown origin looks like
good -e gpt2 -p '1 2 3' -n 5 --seed 1
check 'token numbers' grep -Eq '^1 2 3( [0-9]+)* $' out.txt
bad 2 'its text is token numbers' -e gpt2 -p 'abc' -n 5
bad 2 'only knows' -e gpt2 -p '99999999' -n 5

result
