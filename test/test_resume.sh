#!/bin/sh
# A run that is interrupted, in any way, goes on as if it had not been.

. test/lib.sh

# --- from the middle of a run: the same weights, state and log
small='-i text.txt --layers 2 --width 32 --heads 2 --kv-heads 1 -t 32 -b 2 -s 0 -m 2 -v 3 -x 10 -n 5 --keep 0'
resumed() { # NAME OPTIONS...
    name=$1; shift
    good $small -o "$name.whole" "$@"
    rm -rf "$name.parts"
    cp -R "$name.whole" "$name.parts"
    rm -r "$name.parts/step_00000010" "$name.parts/latest" "$name.parts/best"
    ln -s step_00000005 "$name.parts/latest"
    printf '{"step":11,"loss":1.2' >> "$name.parts/log.jsonl"  # a line cut short
    good -y -o "$name.parts"
    same "$name.whole" "$name.parts" 00000010
}
resumed nsa --dropout 0.2
resumed accumulation -d 256 --dropout 0.1 --schedule wsd
resumed experts --experts 4 --shared-experts 1 --capacity-factor 1 --dense-layers 1
resumed bf16 --dtype bf16
resumed hybrid --full-layers 1 --gate q_cond --compress grouped_mlp --untied-head -r 2
resumed full --attention full --schedule restarts --cycles 2 -r 1
resumed overfit -a --early-stop 2 --gate static --compress conv1d

# --- another micro-batch sees the same sequences
good $small -o micro1 -d 256 -b 2 -x 1
good $small -o micro2 -d 256 -b 8 -x 1
loss() { sed -n 's/.*"loss":\([0-9]*\.[0-9]\{4\}\).*/\1/p' "$1/log.jsonl" | tail -n 1; }
check 'the micro-batch does not change the step' test "$(loss micro1)" = "$(loss micro2)"

# --- options: the saved ones hold, those given again win
good -y -o nsa.parts -x 11 --dropout 0 -c 0.3
check '-x 11 goes on to 11' test -d nsa.parts/step_00000011
bad 2 'contradicts the weights' -y -o nsa.parts -x 12 --layers 3
good -y -o nsa.parts -x 0
check '-y -x 0 evaluates' grep -q '^val_loss ' out.txt

# --- SIGTERM and SIGINT: the step is finished and saved
lines() { if [ -f "$1" ]; then wc -l < "$1"; else echo 0; fi; }
wait_for_lines() { # FILE N: at most half a minute
    for i in $(seq 300); do [ "$(lines "$1")" -ge "$2" ] && return; sleep 0.1; done
}
long='-i text.txt --layers 2 --width 32 --heads 2 --kv-heads 1 -t 32 -b 2 -s 0 -m 2 -v 0 -x 1000000'
for signal in TERM INT; do
    "$TRAIN" $long -n 0 -o signal.$signal > out.txt 2> err.txt &
    wait_for_lines signal.$signal/log.jsonl 3
    kill -$signal $!
    wait $!
    check "SIG$signal: exit 0" test $? -eq 0 -a ! -s err.txt
    check "SIG$signal: one line says so" grep -q 'stopped by a signal' out.txt
    last=$(sed -n '$s/{"step":\([0-9]*\),.*/\1/p' signal.$signal/log.jsonl)
    check "SIG$signal: the last step is saved" test "$(readlink signal.$signal/latest)" = "$(printf step_%08d "$last")"
    good -y -o signal.$signal -x $((last + 1))
done

# --- kill -9 at any moment: latest loads, and the run ends like one that nobody disturbed
killed='-i text.txt --layers 2 --width 32 --heads 2 --kv-heads 1 -t 32 -b 2 -s 0 -m 2 -v 7 -n 1 --keep 3 --lr 1e-3 -u 5 -k constant'
resume=
for delay in 0.31 0.12 0.23 0.08 0.17 0.29 0.05 0.21 0.13 0.26; do
    if [ -e killed/latest ]; then resume='-y -x 1000000'; else rm -rf killed; fi
    "$TRAIN" ${resume:-$killed -x 1000000} -o killed > out.txt 2> err.txt &
    sleep "${START_DELAY:-0}"      # a GPU takes its time to start
    sleep $delay
    kill -KILL $! 2> /dev/null
    wait $! 2> /dev/null
    [ ! -e killed/latest ] || good -y -o killed -x 0
done
last=$(readlink killed/latest | sed 's/step_0*//')
end=$((last + 2))
good -y -o killed -x $end
good $killed -x $end -o undisturbed
same killed undisturbed "$(printf %08d $end)"
check 'no rest of an unfinished checkpoint' test -z "$(find killed -name '*.tmp')"

# --- two programs cannot write one run
"$TRAIN" $long -n 2 -o shared > out1.txt 2> err1.txt &
wait_for_lines shared/log.jsonl 4
bad 1 'another program is writing this run' -y -o shared -x 2000000
kill -TERM $!
wait $!
check 'the first one goes on undisturbed' test $? -eq 0 -a ! -s err1.txt

# --- a full disk: one line, exit 1, and the last checkpoint stays
disk_full() { # NAME: what is in NAME/ after a failure
    check "$1: latest is the good one" test "$(readlink "$1/latest")" = step_00000002
    check "$1: nothing half done" test -z "$(find "$1" -name '*.tmp')"
    good -i text.txt -m 2 -t 32 -b 2 -x 0 -e "$1/latest"
}
good $tiny -x 2 -o limited
( ulimit -f 16; exec "$TRAIN" -y -o limited -x 4 -n 1 > out.txt 2> err.txt )
check 'a limit on files: exit 1, one line' test $? -eq 1 -a "$(wc -l < err.txt)" -eq 1
disk_full limited
mkdir disk
if mount -t tmpfs -o size=1400k none disk 2> /dev/null; then
    trap 'cd /; umount "$work/disk"; rm -rf "$work"' EXIT
    good $tiny -x 2 -o disk/run
    bad 1 'No space left on device' -y -o disk/run -x 40 -n 2 --keep 0
    check 'the message names the step' grep -q 'no checkpoint of step' err.txt
    check 'a full disk: latest loads' test -f disk/run/latest/model.safetensors
    check 'a full disk: nothing half done' test -z "$(find disk -name '*.tmp')"
    good -i text.txt -m 2 -t 32 -b 2 -x 0 -e disk/run/latest
fi

# --- the folder is taken away
"$TRAIN" $long -n 0 -o lost > out.txt 2> err.txt &
wait_for_lines lost/log.jsonl 3
rm -rf lost
kill -TERM $!
wait $!
check 'a lost folder: exit 1, one line' test $? -eq 1 -a "$(wc -l < err.txt)" -eq 1

result
