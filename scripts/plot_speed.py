#!/usr/bin/env python3
"""Draw training speed against the length of context, from the table that dev/bench_124M.sh prints.

    dev/bench_124M.sh 'tokens/train_*.bin' | tee speed.txt
    python scripts/plot_speed.py speed.txt -o speed.png
    python scripts/plot_speed.py speed.txt --peer "llm.c: 1024=493e3 8192=305e3 32768=131e3" -o speed.png

Needs matplotlib.
"""
import argparse
import re
import sys
from pathlib import Path

from plot_log import STYLE, plt

NAMES = {"nsa": ("NSA", "#d9632e"), "full": ("dense twin", "#2f6db3")}
PEERS = ["#6b6b6b", "#8d5bb0", "#3d9a5f"]


def die(message):
    sys.exit("plot_speed.py: " + " ".join(str(message).split()))


def read_table(path):
    """{model: {T: tokens a second}}; rows of runs that failed are passed over."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        die(f"{path}: {error}")
    speeds = {}
    for line in lines:
        row = re.match(r"(nsa|full) +(\d+) +(\d+) +\d+ +[\d.]+ +[\d.]+$", line.strip())
        if row:
            speeds.setdefault(row[1], {})[int(row[2])] = int(row[3])
    if not speeds:
        die(f"{path}: no row of dev/bench_124M.sh (model, T, tok/s, ms, GB, MFU)")
    return speeds


def read_peer(text):
    name, colon, points = text.partition(":")
    try:
        speeds = {int(t): float(rate) for t, rate in (point.split("=") for point in points.split())}
    except ValueError:
        speeds = {}
    if not colon or not name.strip() or not speeds:
        die(f"--peer '{text}': it reads NAME: T=tokens_a_second ...")
    return name.strip(), speeds


def length(t):
    return f"{t // 1024}k" if t % 1024 == 0 else str(t)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", help="what dev/bench_124M.sh printed")
    parser.add_argument("-o", "--out", required=True, help="the picture: .png, .pdf, .svg")
    parser.add_argument("--peer", action="append", default=[], metavar="'NAME: T=RATE ...'", help="another program's tokens a second, measured on the same GPU")
    parser.add_argument("--title", default="124M parameters, one GPU, bf16")
    args = parser.parse_args()
    speeds = read_table(args.table)
    peers = [read_peer(text) for text in args.peer]

    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
        lines = [(*NAMES[kind], "-", of_length) for kind, of_length in speeds.items()]
        lines += [(name, PEERS[i % len(PEERS)], "--", of_length) for i, (name, of_length) in enumerate(peers)]
        for name, color, style, of_length in lines:
            lengths = sorted(of_length)
            axes.plot(lengths, [of_length[t] / 1e3 for t in lengths], style, color=color, marker="o", markersize=4, label=name)
        both = sorted(set(speeds.get("nsa", {})) & set(speeds.get("full", {})))
        for t in both:
            ratio = speeds["nsa"][t] / speeds["full"][t]
            axes.annotate(f"{ratio:.2g}x" if ratio < 10 else f"{ratio:.0f}x", (t, speeds["nsa"][t] / 1e3), textcoords="offset points", xytext=(0, 7), ha="center", fontsize=8, color=NAMES["nsa"][1])
        ticks = sorted({t for *_, of_length in lines for t in of_length})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [length(t) for t in ticks])
        axes.set_ylim(0, None)
        axes.set_xlabel("tokens of context")
        axes.set_ylabel("thousand tokens a second")
        axes.set_title(args.title)
        axes.legend()
        try:
            figure.savefig(args.out, dpi=150)
        except (OSError, ValueError) as error:
            die(f"{args.out}: {error}")


if __name__ == "__main__":
    main()
