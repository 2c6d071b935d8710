# What the shell tests share. Each runs in a folder of its own, on a tiny model and a small text.

TRAIN=$(realpath "${TRAIN:-./train_nsa}")
[ -x "$TRAIN" ] || { echo "there is no program ${TRAIN:-./train_nsa}: make builds it"; exit 1; }
SAMPLE=$(realpath "${SAMPLE:-./sample}" 2>/dev/null)
export OMP_WAIT_POLICY=passive OMP_NUM_THREADS=2  # many short runs: threads that spin would only disturb
export ASAN_OPTIONS=detect_leaks=0                # what a program holds when it ends, the system takes
work=$(mktemp -d) || exit 1
trap 'cd /; rm -rf "$work"' EXIT
cd "$work" || exit 1
passed=0 failed=0

seq 1000 3000 > text.txt
tiny='-i text.txt --layers 2 --width 32 --heads 2 --kv-heads 1 -t 32 -b 2 -s 0 -v 0 -m 2'

ok() { passed=$((passed + 1)); }
not_ok() { failed=$((failed + 1)); echo "FAILED $*"; }

# check NAME COMMAND...: the command succeeds
check() {
    name=$1; shift
    if "$@" > check.txt 2>&1; then ok; else not_ok "$name: $*"; head -n 5 check.txt; fi
}

# says FILE PATTERN: for check, which then tells what the file says instead
says() { grep -q -e "$2" "$1" || { cat "$1"; return 1; }; }

# good OPTIONS...: the program runs, exits with 0 and says nothing on stderr; its output is in out.txt
good() {
    "$TRAIN" "$@" > out.txt 2> err.txt
    status=$?
    if [ $status -eq 0 ] && [ ! -s err.txt ]; then ok; else not_ok "exit $status: train_nsa $*"; head -n 5 err.txt; fi
}

# bad CODE FRAGMENT OPTIONS...: the program ends with that code and one line on stderr that says FRAGMENT
bad() {
    code=$1 fragment=$2; shift 2
    "$TRAIN" "$@" > out.txt 2> err.txt
    status=$?
    if [ $status -eq "$code" ] && [ "$(wc -l < err.txt)" -eq 1 ] && grep -qF -e "$fragment" err.txt; then ok
    else not_ok "exit $status, not $code and \"$fragment\": train_nsa $*"; head -n 5 err.txt; fi
}

# near FILE1 FILE2 KEY: the same number of values under this key, none further apart than $apart
near() {
    for log in "$1" "$2"; do sed -n "s/.*\"$3\":\([0-9.e+-]*\).*/\1/p" "$log" > "values.$(basename "$(dirname "$log")")"; done
    check "$3 of $1 and $2" sh -c 'paste "$0" "$1" | awk -v apart="$2" "{ d = \$1 - \$2; if (NF != 2 || d > apart || d < -apart) bad = 1 } END { exit bad || NR == 0 }"' \
        "values.$(basename "$(dirname "$1")")" "values.$(basename "$(dirname "$2")")" "$apart"
}

# The log without what differs from run to run.
plain_log() { sed 's/,"tok\/s":[^,]*,"ms":[^,]*,"mem":[^,]*//' "$1"; }

# same A B STEP: the checkpoints of that step agree to the last byte, and so do the logs
same() {
    for path in "$1/step_$3"/*; do check "$1 and $2 agree: $path" cmp "$path" "$2/step_$3/${path##*/}"; done
    plain_log "$1/log.jsonl" > log1.txt
    plain_log "$2/log.jsonl" > log2.txt
    check "$1 and $2 agree: log" cmp log1.txt log2.txt
}

# Several ranks. start N HOW FILE OPTIONS...: that many ranks; HOW is mpi, or what --init takes. Each leaves its pid in FILE.RANK.pid, what rank 0
# says in FILE.out and what all complain about in FILE.err. The exit codes that are not 0, once each, are in $status.
cat > rank.sh <<'END'
echo $$ > "$1.${OMPI_COMM_WORLD_RANK:-${PMI_RANK:-$RANK}}.pid"
shift
exec "$@"
END
start() {
    ranks=$1 by=$2 file=$3; shift 3
    if [ "$by" = mpi ]; then
        mpirun -q --oversubscribe -np "$ranks" sh rank.sh "$file" "$TRAIN" "$@" > "$file.out" 2> "$file.err"
        status=$?
        [ $status -ne 0 ] || status=
        return
    fi
    rm -f "$file.err"
    rank=0 pids=
    while [ $rank -lt "$ranks" ]; do
        RANK=$rank WORLD_SIZE=$ranks sh rank.sh "$file" "$TRAIN" --init "$by" "$@" > "$file.$rank.out" 2>> "$file.err" &
        pids="$pids $!" rank=$((rank + 1))
    done
    status=
    for pid in $pids; do
        wait "$pid"
        code=$?
        case " $status " in *" $code "*) ;; *) [ $code -eq 0 ] || status="$status $code" ;; esac
    done
    status=${status# }
    cp "$file.0.out" "$file.out"
}

# together N HOW OPTIONS...: the ranks end well and complain about nothing
together() {
    ranks=$1 by=$2; shift 2
    start "$ranks" "$by" run "$@"
    if [ -z "$status" ] && [ ! -s run.err ]; then ok; else not_ok "exit $status: $*"; head -n 5 run.err; fi
}
# apart N HOW CODE FRAGMENT OPTIONS...: all end with that code, and one line says FRAGMENT
apart() {
    ranks=$1 by=$2 code=$3 fragment=$4; shift 4
    start "$ranks" "$by" run "$@"
    if [ "$status" = "$code" ] && [ "$(wc -l < run.err)" -eq 1 ] && grep -qF -e "$fragment" run.err; then ok
    else not_ok "exit $status, not $code and \"$fragment\": $*"; head -n 5 run.err; fi
}

result() { echo "$passed passed, $failed failed"; [ "$failed" -eq 0 ]; }
