#!/bin/sh
# Several ranks do what one does: over MPI where the program and mpirun are there, and over plain sockets anywhere.

repository=$PWD
. test/lib.sh
export OMP_NUM_THREADS=1

mpi=
if ! command -v mpirun > mpirun.txt 2>&1; then echo "mpirun is not here: MPI is not tested (Debian: apt install openmpi-bin libopenmpi-dev), sockets are"
elif ! grep -q MPI_Init "$TRAIN"; then echo "$TRAIN was built without MPI: MPI is not tested, sockets are"
else mpi=1; fi
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1

free_port() { port=$((${port:-$((20000 + $$ % 20000))} + 1)); tcp=tcp:localhost:$port; }
how=file:address
[ -z "$mpi" ] || how=mpi
small='-i text.txt --layers 2 --width 32 --heads 2 --kv-heads 1 -t 32 -b 2 -s 0 -m 5 -v 10 -d 256 -n 0'

# --- 1, 2 and 4 ranks: the same losses over 50 steps
apart=1e-4
several() { # NAME OPTIONS...
    of=$1; shift
    good $small -x 50 -o "$of.1" "$@"
    for n in ${RANKS:-2 4}; do
        together $n $how $small -x 50 -z 1 -o "$of.$n" "$@"
        for key in loss val_loss grad_norm; do near "$of.1/log.jsonl" "$of.$n/log.jsonl" $key; done
        check "$of: the log says $n ranks" grep -q "\"ranks\":${n}[,}]" "$of.$n/log.jsonl"
    done
}
several nsa --dropout 0.2
several experts --experts 4 --shared-experts 1 --balance-loss 0 --dtype bf16
near experts.1/log.jsonl experts.2/log.jsonl moe_z
check 'the load of the experts is that of all ranks' sh -c 'for n in 1 2; do sed -n "1s/.*\(\"moe_load\".*\)/\1/p" experts.$n/log.jsonl; done | uniq | wc -l | grep -qx 1'

# --- again: the same bits, over MPI and sockets, with the state shared or not
together 2 $how $small -x 50 -z 1 -o nsa.again --dropout 0.2
same nsa.2 nsa.again 00000050
free_port
together 2 $tcp $small -x 50 -z 1 -o nsa.tcp --dropout 0.2
same nsa.2 nsa.tcp 00000050
together 2 file:address $small -x 50 -z 1 -o nsa.file --dropout 0.2
same nsa.2 nsa.file 00000050
check 'the file of the address is gone' test ! -e address
together 2 $how $small -x 50 -o nsa.whole --dropout 0.2
near nsa.2/log.jsonl nsa.whole/log.jsonl loss
check 'without -z 1 the state is one file' test -f nsa.whole/latest/state.safetensors
check 'with it two' test -f nsa.2/latest/state-00002-of-00002.safetensors -a ! -e nsa.2/latest/state.safetensors

# --- a run that is resumed: bit for bit on as many ranks, to 1e-4 on others
together 2 $how $small -x 50 -n 25 --keep 0 -z 1 -o whole --dropout 0.2
halfway() { # NAME: a copy that is at step 25
    rm -rf "$1"
    cp -R whole "$1"
    rm -r "$1/step_00000050" "$1/latest" "$1/best"
    ln -s step_00000025 "$1/latest"
}
halfway resumed
together 2 $how -y -z 1 -o resumed
same whole resumed 00000050
for n in 1 4; do
    halfway resumed.$n
    if [ $n -eq 1 ]; then good -y -o resumed.$n; else together $n $how -y -o resumed.$n -z 1; fi
    near whole/log.jsonl resumed.$n/log.jsonl loss
    near whole/log.jsonl resumed.$n/log.jsonl val_loss
done
halfway broken
rm broken/latest/state-00002-of-00002.safetensors
bad 1 'state-00002-of-00002.safetensors' -y -o broken
halfway mixed
cp mixed/latest/state-00001-of-00002.safetensors mixed/latest/state-00002-of-00002.safetensors
bad 1 'are missing' -y -o mixed

# --- --context-parallel: ranks that share each sequence do what one does; pieces of 30 or 15 tokens end inside blocks
pieces='-t 120 -b 1 -d 240 -x 8 -m 2 --preset paper --cmp-block 8 --cmp-stride 4 --sel-block 8 --sel-blocks 5 --window 24'
apart=1e-5
shared() { # NAME "RANKS P" OPTIONS...
    of=$1 n=${2% *} P=${2#* }; shift 2
    [ -d "$of.1" ] || good $small $pieces -o "$of.1" "$@"
    together "$n" $how $small $pieces --context-parallel "$P" -o "$of.$n.$P" "$@"
    for key in loss val_loss grad_norm; do near "$of.1/log.jsonl" "$of.$n.$P/log.jsonl" $key; done
}
for ranks in '2 2' '4 2' '4 4'; do shared mlp "$ranks" --dropout 0.2 -r 2 -z 1 --heads 4 --kv-heads 2; done
shared grouped_mlp '2 2' --compress grouped_mlp --gate q_cond -b 2
shared conv1d '2 2' --compress conv1d --full-layers 0 -r 1
shared avgpool '4 4' --compress avgpool --gate static
shared full '2 2' --attention full -b 2
shared routed '2 2' --experts 4 --experts-per-token 2 --balance-loss 0.1 -b 2
near routed.1/log.jsonl routed.2.2/log.jsonl moe_balance
near routed.1/log.jsonl routed.2.2/log.jsonl moe_z
for n in 1 2.2; do grep -o '"gates":.*' routed.$n/log.jsonl | sed 's/\.\([0-9]\{5\}\)[0-9]*/.\1/g' | tail -n 1 > gates.$n.txt; done
check 'the gates and the loads are those of all parts' cmp gates.1.txt gates.2.2.txt
# a run goes on with other ranks and other parts, and writes the same samples
for n in 1 2; do
    if [ $n -eq 1 ]; then good $small $pieces -n 4 --keep 0 -s 4 -g 8 -o half.1
    else together 2 $how $small $pieces -n 4 --keep 0 -s 4 -g 8 -o half.2 --context-parallel 2; fi
    sed -n '/^--- sample/,/^---$/p' "$([ $n -eq 1 ] && echo out.txt || echo run.out)" > sample.$n.txt
    rm -r half.$n/step_00000008 half.$n/latest half.$n/best
    ln -s step_00000004 half.$n/latest
done
check 'the samples are the same' cmp sample.1.txt sample.2.txt
good -y -o half.2
together 4 $how -y -o half.1 --context-parallel 4 -z 1
for key in loss val_loss; do near half.1/log.jsonl half.2/log.jsonl $key; done
for P in 1 2; do
    together 2 $how -i text.txt -m 3 -t 64 -b 2 -x 0 -e half.1 --context-parallel $P
    mkdir -p loss.$P
    sed -n 's/^val_loss /"val_loss":/p' run.out > loss.$P/log.jsonl
done
near loss.1/log.jsonl loss.2/log.jsonl val_loss
good $small --plan --ranks 4 --context-parallel 2
grep -A 5 '^  weights' out.txt > planned.txt
together 4 $how $small -x 1 --context-parallel 2 -o planned.parts
grep -A 5 '^  weights' run.out > taken.txt
check 'the plan of parts is what is taken' cmp planned.txt taken.txt
rm -rf half.* planned.parts
apart 2 $how 2 '--context-parallel 3 must divide the number of ranks, 2' $small --context-parallel 3
apart 2 $how 2 'must be a multiple of 2 times --context-parallel 2 (each rank has two pieces of a sequence): use -t 32' $small -t 30 --context-parallel 2
apart 2 $how 2 '--capacity-factor chooses among all tokens of a micro-batch' $small --context-parallel 2 --experts 4 --capacity-factor 1
apart 2 $how 2 '-g (--sample-len) 300 is too long for --context-parallel 2: one rank alone writes samples, of at most 8 tokens: use -g 8, or -s 0' $small -s 10 --context-parallel 2
bad 2 'use another --ranks' $small --plan --ranks 3 --context-parallel 2
apart=1e-4

# --- --plan counts what the ranks then take, and no data is read for it
good $small --plan --ranks 4 -z 1
grep -A 5 '^  weights' out.txt > planned.txt
together 4 $how $small -x 1 -z 1 -o planned
grep -A 5 '^  weights' run.out > taken.txt
check 'the plan is what is taken' cmp planned.txt taken.txt
check 'it has every part' grep -q 'AdamW state' planned.txt
good -i none.txt --plan --ranks 16 -z 1 -e d12 -t 1k
check 'the step is told' grep -q '^step  *[0-9.]* s, .* tok/s' out.txt
bad 2 'use -d 384' $small --plan --ranks 3
bad 2 '--ranks is for --plan' $small --ranks 3
bad 2 '--tflops is for --plan' $small --tflops 3

# --- the scripts for Slurm, with an srun that starts two ranks here
ln -s "$TRAIN" train_nsacu
cat > srun <<'END'
#!/bin/sh
while case $1 in -*) ;; *) false ;; esac; do shift; done
for SLURM_PROCID in 1 0; do
    export SLURM_PROCID
    "$@" &
done
wait $!
END
printf '#!/bin/sh\necho localhost\n' > scontrol
chmod +x srun scontrol
for by in file tcp; do
    check "slurm_$by.sbatch" env PATH="$work:$PATH" SLURM_NTASKS=2 SLURM_STEP_NUM_TASKS=2 SLURM_JOB_ID=$$ SLURM_JOB_NODELIST=here \
        bash "$repository/scripts/multi_node/slurm_$by.sbatch" $small -x 2 -o "slurm.$by"
    check "slurm_$by.sbatch: two ranks" grep -q '"ranks":2[,}]' "slurm.$by/log.jsonl"
done
if [ -n "$mpi" ]; then
    printf '# this one\nlocalhost slots=2\n' > hosts
    check mpirun.sh env THREADS=1 sh "$repository/scripts/multi_node/mpirun.sh" hosts $small -x 2 -o by.hosts
    check 'mpirun.sh: two ranks' grep -q '"ranks":2[,}]' by.hosts/log.jsonl
fi

# --- validation is shared: the same loss to the last digit, with more ranks than batches too
good -i text.txt -m 0 -t 32 -b 2 -x 0 -e whole
grep val_loss out.txt > val1.txt
for n in 2 4; do
    together $n $how -i text.txt -m 0 -t 32 -b 2 -x 0 -e whole
    grep val_loss run.out > val2.txt
    check "validation on $n ranks" cmp val1.txt val2.txt
done

# --- what all ranks get wrong is said once, what one gets wrong with its number
apart 3 $how 2 'must be a multiple of 3 ranks times -b 2 times -t 32: use -d 384' $small -x 1 -o wrong
apart 2 $how 2 'use -d 256, or -b 3' $small -d 192 -b 4 -x 1 -o wrong
apart 2 $how 2 'unknown option --bogus' $small --bogus
apart 2 $how 2 'holds a run already' $small -x 1 -o nsa.1
free_port
apart 2 $tcp 2 'holds a run already' $small -x 1 -o nsa.1
bad 2 'which rank is this' --init tcp:localhost:1
apart 2 nonsense 2 '--init must be mpi, file:PATH or tcp:HOST:PORT' $small
apart 2 tcp:localhost 2 'use mpi, file:PATH' $small
sed 's/1500/1501/' text.txt > other.txt
different() { # CODE FRAGMENT OPTIONS...: of rank 1 alone
    code=$1 fragment=$2; shift 2
    free_port
    RANK=0 WORLD_SIZE=2 "$TRAIN" $small -x 5 -o wrong --init $tcp > out.txt 2> err.txt &
    RANK=1 WORLD_SIZE=2 "$TRAIN" $small -x 5 -o wrong --init $tcp "$@" > out1.txt 2>> err.txt
    check "$fragment: rank 1 ends with $code" test $? -eq "$code"
    wait $!
    check "$fragment: rank 0 ends with $code" test $? -eq "$code"
    check "$fragment: one line" test "$(wc -l < err.txt)" -eq 1
    check "$fragment: it says so" grep -qF -e "$fragment" err.txt
}
different 2 'rank 1 differs from rank 0 in the training data' -i other.txt
different 2 'rank 1 differs from rank 0 in the options' -l 1
different 2 'rank 1 differs from rank 0 in the model' --heads 1
different 1 'rank 1: none.txt: cannot open' -i none.txt
different 2 'rank 1: -q (--final-lr-frac) 7 is out of range' -q 7
RANK=0 WORLD_SIZE=2 "$TRAIN" $small > out.txt 2> err.txt
check 'a launcher without --init: exit 2' test $? -eq 2 -a "$(wc -l < err.txt)" -eq 1
check 'it asks how the ranks find each other' grep -q 'how do they find each other' err.txt

# --- a rank that dies or hangs: the others end, name it, and leave the last checkpoint whole
wait_for() { for i in $(seq 300); do [ -e "$1" ] && return; sleep 0.1; done; }
fault() { # NAME HOW SIGNAL RANK FRAGMENT
    run=$1 timeout=10
    [ "$3" = STOP ] || timeout=60      # a slow disk is no dead rank
    (
        wait_for "$run/step_00000050"
        kill "-$3" "$(cat "$run.$4.pid")"
        [ "$3" = STOP ] || exit
        for i in $(seq 300); do grep -q 'sign of life' "$run.err" && break; sleep 0.1; done
        kill -KILL "$(cat "$run.$4.pid")"      # where no launcher does
    ) > /dev/null 2>&1 &
    start 3 "$2" "$run" $small -d 192 -v 0 -n 5 -x 1000000 -z 1 -o "$run" --timeout $timeout
    check "$run: the run ends badly" test -n "$status"
    [ -z "$5" ] || check "$run: the rank is named" says "$run.err" "$5"
    check "$run: one line" test "$(grep -c '^train_nsa' "$run.err")" -le 1
    wait
    good -i text.txt -m 2 -t 32 -b 2 -x 0 -e "$run/latest"
    good -y -o "$run" -x $(($(readlink "$run/latest" | sed 's/step_0*//') + 1))
}
free_port; fault killed.tcp $tcp KILL 1 'rank 1 has ended'
free_port; fault stopped.tcp $tcp STOP 0 'rank 0 gave no sign of life for 10 s'
if [ -n "$mpi" ]; then
    fault killed.mpi mpi KILL 1 ''      # mpirun says which
    fault stopped.mpi mpi STOP 2 'rank 2 gave no sign of life for 10 s'
fi

# --- one signal stops all of them after the same step
free_port
( wait_for stop/step_00000050; kill -TERM "$(cat stop.1.pid)" ) &
start 2 $tcp stop $small -v 0 -n 5 -x 1000000 -o stop
check 'SIGTERM: exit 0' test -z "$status" -a ! -s stop.err
check 'SIGTERM: a line says so' grep -q 'stopped by a signal' stop.out
last=$(sed -n '$s/{"step":\([0-9]*\),.*/\1/p' stop/log.jsonl)
check 'SIGTERM: the last step is saved' test "$(readlink stop/latest)" = "$(printf step_%08d "$last")"

# --- a disk that is full for one rank
( ulimit -f 16; start 2 file:address limited $small -x 4 -n 2 -z 1 -o limited; echo "$status" > limited.status )
check 'a limit on files: exit 1' test "$(cat limited.status)" = 1
check 'one line says which step' grep -q 'no checkpoint of step 2' limited.err
check 'nothing half done' test -z "$(find limited -name '*.tmp')" -a ! -e limited/latest
result
