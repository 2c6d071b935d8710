#!/usr/bin/env python3
"""Draw what a run of train_nsa did: losses, learning rate, gradient norm, gates, load of the experts.

    python scripts/plot_log.py out/run_001/log.jsonl -o run.png
    python scripts/plot_log.py out/full/log.jsonl out/nsa/log.jsonl -o both.png    # losses overlaid

Gates and expert load are drawn for the last log that has them. Needs matplotlib and numpy.
"""
import argparse
import json
import math
import sys
from pathlib import Path

try:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
except ImportError as error:
    sys.exit(f"plot_log.py: {error}; install with: pip install matplotlib numpy")

RUNS = ["#2f6db3", "#d9632e", "#3d9a5f", "#8d5bb0", "#b8962e", "#c2527f", "#4aa3b5", "#6b6b6b"]
BRANCHES = [("compression", "#8d5bb0"), ("selection", "#d9632e"), ("window", "#2f6db3")]
STYLE = {
    "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.spines.top": False,
    "axes.spines.right": False, "axes.edgecolor": "#888888", "axes.grid": True, "grid.color": "#e6e6e6", "grid.linewidth": 0.7,
    "axes.axisbelow": True, "legend.frameon": False, "legend.fontsize": 8, "figure.facecolor": "white", "xtick.color": "#444444", "ytick.color": "#444444",
}


def die(message):
    sys.exit("plot_log.py: " + " ".join(str(message).split()))


def read_log(path):
    """The objects of a log, one a step. A last line that a running or killed program left half written is passed over."""
    path = Path(path) / "log.jsonl" if Path(path).is_dir() else Path(path)      # the folder of a run will do
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        die(f"{path}: {error.strerror}")
    except UnicodeDecodeError:
        die(f"{path} is not a text file")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            if number == len(lines):
                print(f"plot_log.py: warning: {path}: the last line is half written and left out", file=sys.stderr)
                continue
            die(f"{path}: line {number} is not JSON")
        if not isinstance(row, dict) or not isinstance(row.get("step"), (int, float)):
            die(f"{path}: line {number} is not an object with a step: is this a log.jsonl of train_nsa?")
        rows.append(row)
    if not rows:
        die(f"{path} has no steps yet")
    return rows


def series(rows, key):
    """Steps and values of the rows that have a finite number under this key."""
    pairs = [(r["step"], r[key]) for r in rows if isinstance(r.get(key), (int, float)) and math.isfinite(r[key])]
    return np.array([p[0] for p in pairs], float), np.array([p[1] for p in pairs], float)


def smooth(values, share=0.02):
    """A running mean over `share` of the points on either side, by weights that fall off like a bell."""
    width = max(1, int(len(values) * share))
    if len(values) < 8 or width < 2:
        return values
    kernel = np.exp(-0.5 * (np.arange(-3 * width, 3 * width + 1) / width) ** 2)
    total = np.convolve(values, kernel)[3 * width: 3 * width + len(values)]
    return total / np.convolve(np.ones(len(values)), kernel)[3 * width: 3 * width + len(values)]


def labels(paths):
    """Short names of the runs: the folders, without what they all share."""
    names = [Path(p).resolve().parent.name if Path(p).name == "log.jsonl" else Path(p).stem for p in paths]
    return names if len(set(names)) == len(names) else [str(p) for p in paths]


def draw_loss(ax, runs):
    low, high = [], []
    for (name, rows), color in zip(runs, RUNS * 9):
        steps, loss = series(rows, "loss")
        if len(loss):
            ax.plot(steps, loss, color=color, alpha=0.18, linewidth=0.7)
            ax.plot(steps, smooth(loss), color=color, linewidth=1.6, label=f"{name}, training")
            low.append(loss.min())
            high.append(np.percentile(loss, 98) if len(loss) > 50 else loss.max())
        steps, loss = series(rows, "val_loss")
        if len(loss):
            best = int(loss.argmin())
            ax.plot(steps, loss, color=color, linewidth=1, linestyle=(0, (4, 2)), marker="o", markersize=3.2, markerfacecolor="white",
                    label=f"{name}, validation (best {loss[best]:.4f} at step {steps[best]:.0f})")
            low.append(loss.min())
            high.append(loss.max() if len(loss) < 3 else loss[1:].max())
    if low and max(high) > min(low):
        room = 0.05 * (max(high) - min(low))
        ax.set_ylim(min(low) - room, max(high) + room)
    ax.set_title("Loss (nats per token)")
    ax.legend(loc="upper right")


def draw_series(ax, runs, key, title, log=False):
    for (name, rows), color in zip(runs, RUNS * 9):
        steps, values = series(rows, key)
        if len(values):
            if log:
                ax.plot(steps, values, color=color, alpha=0.25, linewidth=0.7)
                values = smooth(values)
            ax.plot(steps, values, color=color, linewidth=1.5, label=name)
    if log and any((series(rows, key)[1] > 0).any() for _, rows in runs):
        ax.set_yscale("log")
        low, high = np.log10(ax.get_ylim())
        steps = (1, 2, 5) if high - low < 2.5 else (1,)
        ax.yaxis.set_major_locator(LogLocator(subs=steps))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_title(title)
    if key == "lr":
        ax.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))


def stacked(rows, key):
    """steps and, per layer, an array (steps, branches or experts); layers that have none are left out."""
    found = [(r["step"], r[key]) for r in rows if isinstance(r.get(key), list) and r[key]]
    if not found:
        return None, {}
    layers = {}
    for n in range(min(len(v) for _, v in found)):
        if all(isinstance(v[n], list) and v[n] for _, v in found):
            try:
                layers[n] = np.array([v[n] for _, v in found], float)
            except (ValueError, TypeError):
                die(f'"{key}" of layer {n} is not the same list of numbers in every row: is this a log.jsonl of train_nsa?')
            if layers[n].ndim != 2 or (key == "gates" and layers[n].shape[1] != len(BRANCHES)):
                die(f'"{key}" of layer {n} has another shape than train_nsa writes')
    return np.array([s for s, _ in found], float), layers


def draw_gates(ax, steps, gates, layer):
    for b, (name, color) in enumerate(BRANCHES):
        ax.plot(steps, gates[:, b], color=color, linewidth=1.6, marker="o", markersize=2.4, label=name)
    ax.set_ylim(0, 1)
    ax.set_title(f"Gates, layer {layer}")


def draw_load(ax, steps, load, layer):
    experts = load.shape[1]
    colors = plt.get_cmap("viridis")(np.linspace(0.05, 0.92, experts))
    ax.stackplot(steps, 100 * load.T, colors=colors, edgecolor="white", linewidth=0.4)
    ax.set_ylim(0, 100)
    ax.set_title(f"Load of {experts} experts, layer {layer} (%)")
    ax.grid(False)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"plot_log.py: {message}; see --help")
    parser.add_argument("logs", nargs="+", metavar="LOG.jsonl", help="logs, or the folders of runs")
    parser.add_argument("-o", "--out", required=True, metavar="FILE.png", help="the picture; .pdf and .svg work too")
    parser.add_argument("--columns", type=int, default=4, help="small panels in a row (default 4)")
    args = parser.parse_args()
    if args.columns < 2:
        die("--columns is at least 2")
    runs = list(zip(labels(args.logs), [read_log(path) for path in args.logs]))

    gate_steps, gates, load_steps, loads = None, {}, None, {}
    for name, rows in runs:
        steps, layers = stacked(rows, "gates")
        if layers:
            gate_steps, gates, gate_run = steps, layers, name
        steps, layers = stacked(rows, "moe_load")
        if layers:
            load_steps, loads = steps, layers

    blocks = [(draw, steps, layers) for draw, steps, layers in ((draw_gates, gate_steps, gates), (draw_load, load_steps, loads)) if layers]
    heights = [4.6] + [1.75 * -(-len(layers) // args.columns) + 0.35 * (draw is draw_gates) for draw, _, layers in blocks]
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(3.0 * args.columns, sum(heights)), layout="constrained")
        parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        top = parts[0].subplot_mosaic([["loss", "rate"], ["loss", "norm"]], width_ratios=[2, 1], sharex=True)
        draw_loss(top["loss"], runs)
        draw_series(top["rate"], runs, "lr", "Learning rate")
        draw_series(top["norm"], runs, "grad_norm", "Gradient norm, before clipping", log=True)
        top["rate"].tick_params(labelbottom=False)
        for name in ("loss", "norm"):
            top[name].set_xlabel("step")
        for part, (draw, steps, layers) in zip(parts[1:], blocks):
            columns = min(args.columns, max(2, len(layers)))
            axes = part.subplots(-(-len(layers) // columns), columns, sharex=True, sharey=True, squeeze=False).reshape(-1)
            for i, (ax, (layer, values)) in enumerate(zip(axes, layers.items())):
                draw(ax, steps, values, layer)
                if i + columns >= len(layers):
                    ax.set_xlabel("step")
                    ax.tick_params(labelbottom=True)
            for ax in axes[len(layers):]:
                ax.set_visible(False)
            if draw is draw_gates:
                of = f" of {gate_run}" if len(runs) > 1 else ""
                handles = [Line2D([], [], color=color, linewidth=1.6, label=f"{name} gate{of}") for name, color in BRANCHES]
                part.legend(handles=handles, loc="outside upper left", ncols=3)
        try:
            figure.savefig(args.out, dpi=130)
        except (OSError, ValueError) as error:
            die(f"{args.out}: {getattr(error, 'strerror', None) or error}")
    print(args.out)


if __name__ == "__main__":
    main()
