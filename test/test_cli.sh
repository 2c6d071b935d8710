#!/bin/sh
# The command line of train_nsa: what it takes, what it refuses and how, what it writes.

fixtures=$(realpath test/fixtures)
. test/lib.sh
mkdir tokens
cp "$fixtures/tokenizer_gpt2.json" tokens/tokenizer.json

# --- options that cannot be
bad 2 'did you mean --batch?' --btach 8
bad 2 'did you mean --sel-blocks?' --sel-blcks=8
bad 2 'unknown option --zzzzzzzzz' --zzzzzzzzz
bad 2 'unknown option -Q' -Q 3
bad 2 'unexpected argument "text.txt"' text.txt
bad 2 '-b (--batch) needs a value' -b
bad 2 '-o (--out) needs a value' -o ''
bad 2 'needs a whole number, not "8x"' -b 8x
bad 2 'needs a whole number, not "1.5"' -b 1.5
bad 2 'needs a whole number, not "99999999999999999999"' -x 99999999999999999999
bad 2 'needs a whole number, not "9999999999g"' -x 9999999999g
bad 2 'needs a whole number, not " 8"' -b ' 8'
bad 2 'out of range' -b 0
bad 2 'out of range' -b -3
bad 2 'too large' -b 4g
bad 2 '-l (--lr) needs a number, not "abc"' -l abc
bad 2 'needs a number, not "nan"' -l nan
bad 2 'needs a number, not "inf"' -l inf
bad 2 'needs a number, not "1e999"' -l 1e999
bad 2 'needs a number, not "0x10"' -l 0x10
bad 2 'out of range' --dropout 1
bad 2 'out of range' --beta1 1
bad 2 'out of range' -r 3
bad 2 'must be one of nsa|full' --attention sparse
bad 2 'must be one of cosine|linear|constant|wsd|restarts' -k cos
bad 2 'stands alone or takes 0 or 1' -a2
bad 2 'stands alone or takes 0 or 1' --resume=yes
bad 2 'three numbers' --gate-init 1,2
bad 2 'three numbers' --gate-init 1,2,3,4
bad 2 'layer numbers' --full-layers 0,,1
bad 2 'layer numbers' --full-layers 0,
bad 2 'layer numbers' --full-layers -1

# --- models that cannot be
bad 2 '--head-dim (head_dim) is 0' $tiny --width 1 --heads 2
bad 2 '--head-dim 7 must be even' $tiny --head-dim 7
bad 2 '--kv-heads 3 must divide --heads 4' $tiny --heads 4 --kv-heads 3
bad 2 '--cmp-stride 16 must divide --cmp-block 24' $tiny --cmp-block 24
bad 2 '--cmp-stride 16 must divide --sel-block 24' $tiny --sel-block 24
bad 2 '--cmp-block 32 must be at most --sel-block 16' $tiny --cmp-block 32
bad 2 '--sel-blocks 2 must be at least' $tiny --sel-blocks 2
bad 2 '--sel-local' $tiny --sel-local 0
bad 2 '--window' $tiny --window 0
bad 2 '--layers' $tiny --layers 0
bad 2 '--layers' $tiny --layers 1025
bad 2 '--full-layers names layer 2' $tiny --full-layers 0,2
bad 2 '--experts-per-token 5 must be from 1 to --experts 4' $tiny --experts 4 --experts-per-token 5
bad 2 '--dense-layers 3 must be at most' $tiny --experts 4 --dense-layers 3
bad 2 'need --experts' $tiny --experts-per-token 2
bad 2 'out of range' --vocab 0
bad 2 'out of range' --ffn-width 0
bad 2 'too large' $tiny --width 1048576 --heads 1024 --layers 1000
bad 2 'at most' $tiny --head-dim 65536 --heads 65536 --kv-heads 1

# --- runs that cannot be
bad 2 'must be a multiple of -b 2 times -t 32: use -d 128' $tiny -d 100
bad 2 'use a smaller -b' $tiny -b 1m -t 1m
bad 2 'of memory' $tiny -b 100000
bad 2 '-t' $tiny -t 100000
bad 2 '--early-stop needs' $tiny --early-stop 2
bad 2 'leave out -e' $tiny -y -e d6
bad 2 'no run in out/' -y
bad 2 'holds no checkpoint' -y -o nowhere
bad 1 'nosuch' $tiny -e nosuch -x 1
bad 1 'nosuch.txt' -i nosuch.txt -x 1
bad 1 'nosuch.json' $tiny --tokenizer nosuch.json -x 1
bad 1 'cannot create this folder' $tiny -x 1 -o text.txt/run
check 'nothing was written' test ! -e out

# --- data that cannot be. A .bin is 256 int32 (magic 20240520, version, count), then uint16 tokens.
bin() { # NAME MAGIC VERSION COUNT TOKENS: one byte each of version and count, MAGIC and TOKENS as printf takes them
    { printf "$2\\$(printf %03o "$3")\\0\\0\\0\\$(printf %03o "$4")\\0\\0\\0"; head -c 1012 /dev/zero; printf "$5"; } > "$1"
}
magic='\210\330\064\001'
seventy=$(printf '\\%03o\\0' $(seq 100 169))
bin good.bin "$magic" 1 70 "$seventy"
bin magic.bin '\1\2\3\4' 1 70 "$seventy"
bin version.bin "$magic" 7 70 "$seventy"
bin short.bin "$magic" 1 71 "$seventy"
bin long.bin "$magic" 1 69 "$seventy"
bin nothing.bin "$magic" 1 0 ''
head -c 100 good.bin > header.bin
: > empty.txt
bin_run="-t 8 -b 1 -x 0 --layers 1 --width 16 --heads 2"
bad 1 'magic.bin' $bin_run -j magic.bin
bad 1 'version' $bin_run -j version.bin
bad 1 'short.bin' $bin_run -j short.bin
bad 1 'long.bin' $bin_run -j long.bin
bad 1 'header.bin' $bin_run -j header.bin
bad 1 'vocab' $bin_run -j good.bin --vocab 160
"$TRAIN" $bin_run -j nothing.bin > out.txt 2> err.txt
check 'a .bin of no tokens is refused' test $? -ne 0 -a "$(wc -l < err.txt)" -eq 1
"$TRAIN" $bin_run -j empty.txt > out.txt 2> err.txt
check 'an empty text is refused' test $? -ne 0 -a "$(wc -l < err.txt)" -eq 1
bad 2 '-t' $bin_run -j good.bin -t 70
good $bin_run -j good.bin -t 69

# --- --help
good --help
for option in batch seq-len total-batch cmp-block gate-init experts tokenizer skip-bad-steps help; do
    check "--help lists --$option" grep -q -e "--$option" out.txt
done
check '--help fits the screen' test "$(grep -cE '^.{81,}' out.txt)" -eq 0
check '--help shows the short letters' grep -q -e '-b, --batch B' out.txt

# --- the ways to write an option
good $tiny -x 2 -o spelled1 --seed 7 -q 0.5
good $tiny -x2 -ospelled2 --seed=7 -q0.5
good $tiny --max-steps 2 --out=spelled3 --seed 1 --final-lr-frac=.5 --seed 7 -a 0 --overfit=0
for run in spelled2 spelled3; do
    check "$run is the same run" cmp spelled1/latest/model.safetensors $run/latest/model.safetensors
done

# --- explicit options beat --preset and -e dN, in any order
good $tiny -x 1 -o preset1 --window 48 --preset medium
good $tiny -x 1 -o preset2 --preset medium --window 48
check 'the option beats the preset' grep -q '"window": 48,' preset1/latest/config.json
check 'the preset sets the rest' grep -q '"sel_block": 32,' preset1/latest/config.json
check 'in any order' cmp preset1/latest/config.json preset2/latest/config.json
good -i text.txt -t 32 -b 1 -m 1 -s 0 -x 1 -o depth1 --width 32 -e d1 --preset short
good -i text.txt -t 32 -b 1 -m 1 -s 0 -x 1 -o depth2 --preset short -e d1 --width 32
check 'the option beats -e dN' grep -q '"hidden_size": 32,' depth1/latest/config.json
check '-e dN sets the rest' grep -q '"head_dim": 64,' depth1/latest/config.json
check 'in any order' cmp depth1/latest/config.json depth2/latest/config.json
good -i text.txt -t 32 -b 1 -m 1 -x 0 -e depth1/latest/config.json --window 20

# --- where runs go
good $tiny -x 1
good $tiny -x 1
check 'runs are numbered' test -f out/run_001/latest/model.safetensors -a -f out/run_002/latest/model.safetensors
good -y -x 2
check '-y takes the newest' test -d out/run_002/step_00000002 -a ! -d out/run_001/step_00000002
bad 2 'holds a run already' $tiny -x 1 -o out/run_001
bad 2 'nothing is left to do' -y
mkdir started; echo '{"step":1}' > started/log.jsonl
bad 2 'before its first checkpoint' $tiny -x 1 -o started
good $tiny -x 6 -n 1 --keep 2 -o kept
check 'old checkpoints go' test "$(ls -d kept/step_* | wc -l)" -eq 2 -a -d kept/step_00000005

# --- the log
check 'one line a step' test "$(wc -l < kept/log.jsonl)" -eq 6
for key in step loss lr grad_norm tokens tok/s ms mem ranks; do
    check "every line has $key" test "$(grep -c "\"$key\":[-0-9.e+]*[,}]" kept/log.jsonl)" -eq 6
done
check 'validation at the last step alone' test "$(grep -c val_loss kept/log.jsonl)" -eq 1
check 'gates of each layer' grep -qE '"gates":\[\[[^]]*\],\[[^]]*\]\]' kept/log.jsonl
good $tiny -x 1 -o moe --experts 4 --dense-layers 1 --full-layers 1
check 'the terms of the experts' grep -qE '"moe_z":[0-9.e-]+,"moe_balance":[0-9.e-]+,' moe/log.jsonl
check 'the load of the experts, null elsewhere' grep -qE '"gates":\[\[[^]]*\],null\],"moe_load":\[null,\[[^]]*\]\]' moe/log.jsonl

# --- -x 0
good $tiny -m 1 -x 0 -e kept/latest
check '-x 0 prints one loss' test "$(grep -cE '^val_loss [0-9]+\.[0-9]{8,}$' out.txt)" -eq 1
check '-x 0 writes nothing' test ! -e out/run_003
good $tiny -x 0 -e kept/latest
evaluated=$(sed -n 's/^val_loss //p' out.txt)
logged=$(sed -n 's/.*"val_loss":\([0-9.]*\).*/\1/p' kept/log.jsonl)
check "a checkpoint evaluates as it was ($logged, $evaluated)" test "$(printf %.6f "$evaluated")" = "$(printf %.6f "$logged")"
good $tiny -x 0 -e kept/latest -o noted
check '-x 0 -o FOLDER notes it' grep -q '"val_loss"' noted/log.jsonl
check '-x 0 -o FOLDER writes no checkpoint' test ! -e noted/latest
good $tiny -x 2 -o loads --experts 4
check 'the load of the experts at every step' test "$(grep -c '"moe_load":\[\[' loads/log.jsonl)" -eq 2

# --- a model that training has lost keeps its last good checkpoint
bad 1 'the validation loss is not finite' $tiny -x 3 -l 10 -c 100 -u 0 -v 1 -n 1 --keep 1 -o lost
[ ! -e lost/latest ] || good $tiny -x 0 -e lost

# --- runs are numbered upwards, so that -y finds the newest
mkdir numbers_only && cd numbers_only || exit 1
for i in 1 2 3; do good $tiny -i ../text.txt -x 1; done
rm -rf out/run_001 out/run_002
good -y -x 2
check 'the newest goes on' test -d out/run_003/step_00000002
good $tiny -i ../text.txt -x 1
check 'a new run comes behind it' test -d out/run_004/latest
cd ..

# --- where a run cannot go, what cannot be said
bad 2 'is the folder of a model' $tiny -x 1 -o kept/latest
for idle in '--cycles 3' '--dense-layers 1' '-e kept --gate-init 0,0,0'; do
    "$TRAIN" $tiny -x 0 -m 1 $idle > out.txt 2> err.txt
    check "$idle: a warning that it says nothing here" test $? -eq 0 -a "$(wc -l < err.txt)" -eq 1
done
bad 2 'from -1000 to 1000' $tiny -x 1 --gate-init 1e308,0,0
cp text.txt "$(printf 'caf\351.txt')"
bad 2 'not UTF-8' $tiny -i "$(printf 'caf\351.txt')" -x 1 -o latin

# --- closed streams, data that changes under a run
"$TRAIN" $tiny -x 2 -o closed >&- 2>&-
check 'a closed standard output is not the log' test "$(grep -c '^{"step"' closed/log.jsonl)" -eq "$(wc -l < closed/log.jsonl)"
cp text.txt shrinking.txt
"$TRAIN" -i shrinking.txt --layers 1 --width 32 --heads 2 -t 32 -b 2 -s 0 -v 0 -n 0 -m 2 -x 100000000 -o shrunk > out.txt 2> err.txt &
for i in $(seq 100); do [ -s shrunk/log.jsonl ] && break; sleep 0.1; done
: > shrinking.txt
wait $!
check 'a text cut short under a run: exit 1, one line' test $? -eq 1 -a "$(wc -l < err.txt)" -eq 1
( ulimit -f 0; exec "$TRAIN" $tiny -x 0 -e kept -o limited > /dev/null 2> err2.txt ); check 'a limit on files: an error, not a signal' test $? -eq 1

good $tiny -x 0 -e kept
check '-e OUT is -e OUT/latest' grep -qF "val_loss $evaluated" out.txt
if [ -e /dev/full ]; then
    "$TRAIN" $tiny -x 0 -e kept > /dev/full 2> err.txt
    check 'a loss that cannot be printed' test $? -eq 1 -a "$(wc -l < err.txt)" -eq 1
fi

# --- a tokenizer: named, in the folder of the model, beside the .bin
good $tiny --tokenizer tokens/tokenizer.json -x 1 -t 8 -s 1 -g 20 -o words
check 'its vocabulary is the model'"'"'s' grep -q '"vocab_size": 605,' words/latest/config.json
check 'it goes into the checkpoint' cmp tokens/tokenizer.json words/latest/tokenizer.json
check 'the samples are text' grep -q '^--- sample at step 1$' out.txt
good -i text.txt -e words/latest -x 0
check '-e FOLDER brings its own' grep -q '^tokenizer  words/latest/tokenizer.json$' out.txt
good -y -o words -x 2
check '-y keeps it' cmp tokens/tokenizer.json words/latest/tokenizer.json
cp good.bin tokens/
good -i tokens/good.bin --layers 1 --width 32 --heads 2 -t 8 -b 1 -j tokens/good.bin -x 0
check 'a .bin has its own beside it' grep -q '^tokenizer  tokens/tokenizer.json$' out.txt
bad 2 '--vocab 256 is smaller' $tiny --tokenizer tokens/tokenizer.json --vocab 256 -x 1

# --- checkpoints and shapes that cannot be
bad 2 '--width 64 contradicts the weights' $tiny -x 1 -e kept/latest --width 64 --heads 2 --head-dim 16
bad 2 '--attention contradicts the weights' $tiny -x 1 -e kept/latest --attention full
good -i text.txt -b 2 -m 1 -s 0 -x 1 -e kept/latest --window 20
edit() { rm -rf broken; cp -rL kept/latest broken; sed "$1" kept/latest/config.json > broken/config.json; } # SED SCRIPT
edit 's/}//'
bad 1 'broken/config.json' $tiny -x 0 -e broken
edit '/"window"/d'
bad 1 'the key "window" is missing' $tiny -x 0 -e broken
edit 's/"window": [0-9]*/"window": "wide"/'
bad 1 '"window" must be a whole number' $tiny -x 0 -e broken
edit 's/"window": [0-9]*/"window": 1e99/'
bad 1 '"window" must be a whole number' $tiny -x 0 -e broken
edit 's/"window": [0-9]*/"window": 0/'
bad 2 '--window (window) is 0' $tiny -x 0 -e broken
edit 's/"mlp"/"magic"/'
bad 1 '"compress" must be one of' $tiny -x 0 -e broken
edit 's/"full_layers": \[\]/"full_layers": [0, 9999]/'
bad 1 '"full_layers"' $tiny -x 0 -e broken
edit 's/"model_type": "nsa"/"model_type": "llama"/'
bad 1 '"model_type"' $tiny -x 0 -e broken
edit 's/"cmp_stride": 16/"cmp_stride": 12/'
bad 2 'd | l' $tiny -x 0 -e broken
edit 's/"intermediate_size": [0-9]*/"intermediate_size": 64/'
bad 1 'shape' -i text.txt -m 1 -x 0 -e broken
edit 's/x/x/'; rm broken/model.safetensors
bad 1 'model.safetensors' -i text.txt -m 1 -x 0 -e broken
edit 's/x/x/'; head -c 5000 kept/latest/model.safetensors > broken/model.safetensors
bad 1 'model.safetensors' -i text.txt -m 1 -x 0 -e broken
edit 's/x/x/'; printf '\377\377\377\377\377\377\377\017{}' > broken/model.safetensors
bad 1 'model.safetensors' -i text.txt -m 1 -x 0 -e broken
edit 's/x/x/'; : > broken/model.safetensors
bad 1 'model.safetensors' -i text.txt -m 1 -x 0 -e broken

# --- numbers that are not finite: a NaN in the last weight
edit 's/x/x/'
size=$(wc -c < broken/model.safetensors)
printf '\0\0\300\177' | dd of=broken/model.safetensors bs=1 seek=$((size - 4)) conv=notrunc 2> dd.txt
bad 1 'the validation loss is not finite' $tiny -x 0 -e broken
bad 1 'step 1: the loss is not finite' $tiny -x 3 -e broken -o not_finite
bad 1 'first in the output head' $tiny -x 3 -e broken -o not_finite_again
check 'no checkpoint of it' test ! -e not_finite/latest
bad 1 'step 3: the validation loss is not finite' $tiny -x 3 -e broken --skip-bad-steps -o skipping
check 'a lost model is not saved' test ! -e skipping/latest
check 'every bad step is skipped and logged' test "$(grep -c '"loss":null' skipping/log.jsonl)" -eq 3

result
