#!/usr/bin/env python3
"""Where the time of a training step on the GPU goes: the kernels by their share, and the gaps between them.

    make build/trace.so
    TRACE=trace.csv CUDA_INJECTION64_PATH=$PWD/build/trace.so ./train_nsacu ... -x 4
    python3 dev/profile_step.py trace.csv

    ncu --clock-control none --metrics gpu__time_duration.sum --csv ./train_nsacu ... -x 1 > launches.csv
    python3 dev/profile_step.py launches.csv

A trace has kernels as they ran. ncu runs them one by one, with cold caches: no gaps, other clocks, but it needs nothing built.
A step ends with AdamW's last kernel before the next forward pass. The first, with what a program does but once, counts only where it is
alone; what follows the last (validation, samples) does not count.
"""
import collections
import csv
import re
import sys

FIRST_OF_FORWARD, LAST_OF_STEP = "embed_kernel", "adamw_kernel"
UNITS = {"ns": 1e-6, "us": 1e-3, "ms": 1.0, "s": 1e3, "nsecond": 1e-6, "usecond": 1e-3, "msecond": 1.0, "second": 1e3}


def short(name):
    name = re.sub(r"\(anonymous namespace\)::|<unnamed>::|^void ", "", name)
    name = name.split("(")[0] if not name.startswith("(") else name
    return name[:96]


def of_trace(lines):
    """(name, begin, end) in ms, in the order of their begin."""
    rows = sorted((int(begin), int(end), name) for begin, end, name in csv.reader(lines))
    return [(short(name), begin * 1e-6, end * 1e-6) for begin, end, name in rows]


def of_ncu(lines):
    """The same, one after the other without gaps."""
    rows, now = [], 0.0
    for row in csv.DictReader(line for line in lines if line.startswith('"')):
        if row["Metric Name"] != "gpu__time_duration.sum":
            continue
        ms = float(row["Metric Value"].replace(",", "")) * UNITS[row["Metric Unit"]]
        rows.append((short(row["Kernel Name"]), now, now + ms))
        now += ms
    return rows


def steps_of(rows):
    """The launches of whole steps, and how many steps they are."""
    marks = [(i, row[0].startswith(LAST_OF_STEP)) for i, row in enumerate(rows) if row[0].startswith((FIRST_OF_FORWARD, LAST_OF_STEP))]
    last = [i for (i, ends), after in zip(marks, marks[1:] + [(0, False)]) if ends and not after[1]]
    if not last:
        sys.exit(f"{sys.argv[1]}: no step: no launch of {LAST_OF_STEP}")
    if len(last) == 1:
        return rows[:last[0] + 1], 1
    return rows[last[0] + 1:last[-1] + 1], len(last) - 1


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__.strip())
    with open(sys.argv[1], errors="replace") as file:
        lines = file.readlines()
    traced = bool(lines) and re.match(r"\d+,\d+,", lines[0]) is not None
    rows = of_trace(lines) if traced else of_ncu(lines)
    if not rows:
        sys.exit(f"{sys.argv[1]}: neither a trace nor ncu's launches with gpu__time_duration.sum")
    rows, steps = steps_of(rows)

    total, count, gaps, gap_count = (collections.Counter() for _ in range(4))
    busy_until, gap = rows[0][1], 0.0
    before = None
    for name, begin, end in rows:
        total[name] += end - begin
        count[name] += 1
        if begin > busy_until:
            gap += begin - busy_until
            gaps[before, name] += begin - busy_until
            gap_count[before, name] += 1
        if end > busy_until or before is None:
            busy_until, before = end, name
    wall = busy_until - rows[0][1]

    print(f"{wall / steps:.1f} ms and {len(rows) / steps:.0f} launches a step, {steps} step{'s'[:steps > 1]}")
    for name, ms in total.most_common(40):
        print(f"{ms / wall:6.1%} {ms / steps:9.3f} ms {count[name] / steps:6.0f} x {ms / count[name] * 1e3:9.1f} us  {name}")
    if traced:
        print(f"{gap / wall:6.1%} {gap / steps:9.3f} ms  no kernel runs; the longest of these gaps:")
        for (left, right), ms in gaps.most_common(8):
            key = left, right
            print(f"{ms / wall:6.1%} {ms / steps:9.3f} ms {gap_count[key] / steps:6.0f} x {ms / gap_count[key] * 1e3:9.1f} us  from {left} to {right}")


if __name__ == "__main__":
    main()
