#!/usr/bin/env python3
"""Where the time of a run on the GPU goes: the kernels by their share, from Nsight Compute's time of each launch.

    ncu --clock-control none --metrics gpu__time_duration.sum --csv ./train_nsacu ... -x 2 > launches.csv
    python3 dev/profile_step.py launches.csv

ncu runs the kernels one by one: gaps between them do not show, and caches are cold.
"""
import collections
import csv
import re
import sys


def kernels(path):
    lines = [line for line in open(path, errors="replace") if line.startswith('"')]
    for row in csv.DictReader(lines):
        if row["Metric Name"] != "gpu__time_duration.sum":
            continue
        scale = {"ns": 1e-6, "us": 1e-3, "ms": 1.0, "s": 1e3, "nsecond": 1e-6, "usecond": 1e-3, "msecond": 1.0, "second": 1e3}[row["Metric Unit"]]
        yield row["Kernel Name"], float(row["Metric Value"].replace(",", "")) * scale


def short(name):
    name = re.sub(r"\(anonymous namespace\)::|<unnamed>::|^void ", "", name)
    name = name.split("(")[0] if not name.startswith("(") else name
    return name[:96]


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__.strip())
    total, count = collections.Counter(), collections.Counter()
    for name, ms in kernels(sys.argv[1]):
        total[short(name)] += ms
        count[short(name)] += 1
    everything = sum(total.values())
    if not everything:
        sys.exit(f"{sys.argv[1]}: no launches with gpu__time_duration.sum")
    print(f"{everything:.1f} ms in {sum(count.values())} launches")
    for name, ms in total.most_common(40):
        print(f"{ms / everything:6.1%} {ms:9.3f} ms {count[name]:6d} x {ms / count[name] * 1e3:9.1f} us  {name}")


if __name__ == "__main__":
    main()
