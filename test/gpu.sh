#!/bin/sh
# The two programs on each other's folders: what one has trained, the other continues and evaluates. make test-gpu runs this.

GPU=$(realpath "${GPU:-./train_nsacu}")
. test/lib.sh
[ -x "$GPU" ] || { echo "there is no program $GPU: make train_nsacu builds it"; exit 1; }
CPU=$TRAIN

small='-i text.txt --layers 2 --width 32 --heads 2 --kv-heads 1 -t 64 -b 2 -s 0 -m 2 -v 3 -n 3 --keep 0'
both() { # NAME OPTIONS...
    of=$1; shift
    TRAIN=$CPU; good $small -x 6 -o "$of.cpu" "$@"
    TRAIN=$GPU; good $small -x 6 -o "$of.gpu" "$@"
    near "$of.cpu/log.jsonl" "$of.gpu/log.jsonl" loss
    near "$of.cpu/log.jsonl" "$of.gpu/log.jsonl" val_loss
    TRAIN=$CPU; good $small -x 3 -o "$of.mixed" "$@"
    TRAIN=$GPU; good -y -o "$of.mixed" -x 6
    near "$of.cpu/log.jsonl" "$of.mixed/log.jsonl" val_loss
    TRAIN=$GPU; good $small -x 3 -o "$of.mixed2" "$@"
    TRAIN=$CPU; good -y -o "$of.mixed2" -x 6
    near "$of.cpu/log.jsonl" "$of.mixed2/log.jsonl" val_loss
}
# The schedule is that of six steps for all of them.
flat='-k constant -u 2'
apart=1e-4
both nsa $flat --dropout 0.2
both experts $flat --experts 4 --shared-experts 1 --capacity-factor 1 -d 256
both hybrid $flat --full-layers 1 --gate q_cond --compress conv1d --untied-head
# On the GPU bf16 is the arithmetic too, on the CPU only what is written.
apart=1e-2
both low $flat --dtype bf16

# --- a run in bf16 that is resumed is the uninterrupted one, bit for bit
TRAIN=$GPU
rounded="$flat --dtype bf16 --stochastic-rounding --dropout 0.1"
good $small -x 6 -o whole $rounded
good $small -x 3 -o parts $rounded
good -y -o parts -x 6
plain_log whole/log.jsonl > whole.txt
plain_log parts/log.jsonl > parts.txt
check 'the same log' cmp whole.txt parts.txt
for file in model state; do check "the same $file" cmp whole/latest/$file.safetensors parts/latest/$file.safetensors; done

# --- without -b the micro-batch follows from -d
TRAIN=$GPU
good -i text.txt --layers 1 --width 32 --heads 2 -t 32 -d 256 -x 1 -s 0 -v 0 -m 2 -o chosen
check 'eight sequences at once' grep -q '(1 x 8 x 32)' out.txt
# --- two GPUs: the losses of one, the same bits again and after a resume, and what one GPU cannot do
case $GPU in
*emulated*) export EMU_GPUS=2; gpus=2 ;;
*) gpus=$(nvidia-smi -L | grep -c '^GPU') ;;
esac
if [ "$gpus" -lt 2 ] || ! grep -q ncclCommInitRank "$GPU"; then echo "one GPU, or no NCCL: several ranks are not tested"; result; exit; fi
apart=1e-4
ranks_options='-d 256 --dropout 0.2 --full-layers 1 --untied-head'
good $small $flat -x 6 -o ranks.1 $ranks_options
together 2 file:address $small $flat -x 6 -o ranks.2 $ranks_options
near ranks.1/log.jsonl ranks.2/log.jsonl loss
near ranks.1/log.jsonl ranks.2/log.jsonl val_loss
# 50 steps in f32: dropless where there are experts, and without their balance loss, which is each micro-batch's own
fifty() { # NAME OPTIONS...
    of=$1; shift
    good $small -x 50 -v 10 -n 0 -d 256 -o "$of.1" "$@"
    together 2 file:address $small -x 50 -v 10 -n 0 -d 256 -o "$of.2" -z 1 "$@"
    for key in loss val_loss grad_norm; do near "$of.1/log.jsonl" "$of.2/log.jsonl" $key; done
}
fifty long --dropout 0.2
fifty routed --experts 8 --balance-loss 0
bits="$flat --dtype bf16 --stochastic-rounding -d 256 --experts 4 --balance-loss 0 -z 1"
good $small -x 6 -o bits.1 $bits
together 2 file:address $small -x 6 -o bits.2 $bits
apart=1e-2
near bits.1/log.jsonl bits.2/log.jsonl loss
rm -rf bits.parts
cp -R bits.2 bits.parts
rm -r bits.parts/step_00000006 bits.parts/latest bits.parts/best
ln -s step_00000003 bits.parts/latest
together 2 file:address -y -z 1 -o bits.parts
same bits.2 bits.parts 00000006
TRAIN=$CPU
good -y -o bits.parts -x 7 --stochastic-rounding 0
TRAIN=$GPU
# --- GPUs that share each sequence: the losses of one in f32, and nearly so in bf16 by each tier's kernels
apart=1e-4
pieces='-t 180 -b 1 -d 180 --cmp-block 8 --cmp-stride 4'
good $small $flat -x 3 -o pieces.1 $pieces --dropout 0.2 --full-layers 1 --experts 3
together 2 file:address $small $flat -x 3 -o pieces.2 $pieces --dropout 0.2 --full-layers 1 --experts 3 --context-parallel 2 -r 2 -z 1
for key in loss val_loss grad_norm; do near pieces.1/log.jsonl pieces.2/log.jsonl $key; done
apart=1e-2
low="$pieces --dtype bf16 --head-dim 64 --heads 8 --kv-heads 2 --sel-block 64 --sel-blocks 3 --full-layers 1 -x 2 -v 0"
good $small $flat -o low.1 $low
together 2 file:address $small $flat -o low.2 $low --context-parallel 2 -z 1
near low.1/log.jsonl low.2/log.jsonl loss
[ "$gpus" -gt 2 ] || apart 3 file:address 2 "would share one GPU" $small -d 384 -x 1 -o shared
result
