#!/bin/sh
# Runs every test program or script named, and sums their last lines "N passed, N failed".
# A test that ends without such a line, or badly although nothing failed, counts as one failure.

tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT
passed=0 failed=0
for test in "$@"; do
    echo "=== $test"
    case $test in
    *.sh) set -- sh "$test" ;;
    *)    set -- "./$test" ;;
    esac
    { "$@" 2>&1; echo $? > "$tmp/status"; } | tee "$tmp/out"
    status=$(cat "$tmp/status")
    sum=$(sed -n 's/^\([0-9][0-9]*\) passed, \([0-9][0-9]*\) failed$/\1 \2/p' "$tmp/out" | tail -n 1)
    p=${sum% *} f=${sum#* }
    if [ -z "$sum" ]; then
        echo "$test: ended with status $status and no result"
        p=0 f=1
    elif [ "$status" -ne 0 ] && [ "$f" -eq 0 ]; then
        echo "$test: ended with status $status"
        f=1
    fi
    passed=$((passed + p)) failed=$((failed + f))
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
