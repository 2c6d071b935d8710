#!/usr/bin/env python3
"""Draw which blocks each query chose, and what weight its gates gave to the three branches.

    ./sample -e out/run_001/latest -f story.txt -n 0 --dump-attention map.safetensors
    python scripts/attention_map.py map.safetensors -o map.png

One panel for each layer and key/value head: the query's position runs to the right, the selection block upwards.
Grey blocks are always taken (the first and the local ones), orange ones were chosen for their importance. On the right
the gates along the text: the mean over the heads, and a band from the lowest head to the highest.
Needs matplotlib, numpy and safetensors.
"""
import argparse
import json
import re
import sys
from pathlib import Path

try:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch
    from safetensors import SafetensorError, safe_open
except ImportError as error:
    sys.exit(f"attention_map.py: {error}; install with: pip install matplotlib numpy safetensors")

BRANCHES = [("compression", "#8d5bb0"), ("selection", "#d9632e"), ("window", "#2f6db3")]
BACKGROUND, FORCED, CHOSEN = "#f5f5f2", "#b9c0c8", "#d9632e"
STYLE = {"font.size": 8, "axes.titlesize": 9, "axes.titlelocation": "left", "axes.titleweight": "bold", "axes.edgecolor": "#999999",
         "xtick.color": "#444444", "ytick.color": "#444444", "legend.frameon": False, "figure.facecolor": "white"}


def die(message):
    sys.exit("attention_map.py: " + " ".join(str(message).split()))


def read_dump(path):
    """config, length of the text, and per layer (block_idx (T,KV,n), gates (T,H,3))."""
    if not Path(path).is_file():
        die(f"{path} is not a file")
    try:
        with safe_open(path, framework="numpy") as file:
            config = json.loads((file.metadata() or {}).get("config", ""))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        T, layers = len(tensors["tokens"]), {}
        for name, tensor in tensors.items():
            match = re.fullmatch(r"model\.layers\.(\d+)\.self_attn\.block_idx", name)
            if match:
                layers[int(match[1])] = tensor, tensors[name.replace("block_idx", "gates")]
        sizes = [config[key] for key in ("sel_block", "sel_init_blocks", "sel_local_blocks")]
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        die(f"{path} is not a dump of ./sample --dump-attention: {type(error).__name__} {error}")
    for layer, (index, gates) in layers.items():
        if index.ndim != 3 or gates.ndim != 3 or len(index) != T or len(gates) != T or gates.shape[2] != 3:
            die(f"{path}: layer {layer} has block_idx {index.shape} and gates {gates.shape} for {T} tokens")
        if index.max(initial=-1) * sizes[0] >= T or index.min(initial=-1) < -1:
            die(f"{path}: layer {layer} names a block that is not in the text")
    if not layers:
        die(f"{path} has no NSA layer: the model attends to everything")
    return sizes, T, dict(sorted(layers.items()))


def chosen_map(index, sizes, T):
    """(blocks, T): 0 not taken, 1 forced, 2 chosen."""
    block, n_init, n_local = sizes
    blocks = -(-T // block)
    picture = np.zeros((blocks, T), np.uint8)
    t = np.repeat(np.arange(T), index.shape[1])
    j = index.reshape(-1).astype(int)
    t, j = t[j >= 0], j[j >= 0]
    picture[j, t] = np.where((j < n_init) | (j > t // block - n_local), 1, 2)
    return picture


def shrink(picture, most):
    """At most `most` columns, each the strongest of those it stands for, so that no choice is lost."""
    T = picture.shape[1]
    step = -(-T // most)
    if step == 1:
        return picture
    padded = np.pad(picture, ((0, 0), (0, -T % step)))
    return padded.reshape(len(picture), -1, step).max(axis=2)


def draw_gates(ax, gates, T, layer, last):
    """The mean gates over heads, along the text, smoothed; the band is from head to head."""
    width = max(1, T // 100)
    kernel = np.ones(width) / width
    x = np.arange(T - width + 1) + (width - 1) / 2
    for b, (name, color) in enumerate(BRANCHES):
        heads = np.stack([np.convolve(gates[:, h, b], kernel, "valid") for h in range(gates.shape[1])])
        ax.fill_between(x, heads.min(0), heads.max(0), color=color, alpha=0.13, linewidth=0)
        ax.plot(x, heads.mean(0), color=color, linewidth=1.3, label=f"{name} {gates[:, :, b].mean():.2f}")
    ax.set(xlim=(0, T), ylim=(0, 1))
    ax.set_title(f"layer {layer}: gates")
    ax.grid(True, color="#e6e6e6", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.03), fontsize=7, handlelength=1, borderaxespad=0.2)
    ax.tick_params(labelbottom=last)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dump", metavar="DUMP.safetensors")
    parser.add_argument("-o", "--out", required=True, metavar="FILE.png", help="the picture; .pdf and .svg work too")
    parser.add_argument("--layers", help="only these, such as 0,5")
    args = parser.parse_args()
    sizes, T, layers = read_dump(args.dump)
    if args.layers:
        try:
            wanted = [int(n) for n in args.layers.split(",")]
        except ValueError:
            die(f"--layers wants numbers with commas between, not {args.layers}")
        missing = [n for n in wanted if n not in layers]
        if missing:
            die(f"layer {missing[0]} has no choices in the dump; it has {', '.join(map(str, layers))}")
        layers = {n: layers[n] for n in wanted}

    heads = max(index.shape[1] for index, _ in layers.values())
    colors = ListedColormap([BACKGROUND, FORCED, CHOSEN])
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(len(layers), heads + 1, figsize=(3.0 * heads + 4.0, 2.05 * len(layers) + 0.6), squeeze=False,
                                    layout="constrained", sharex=True)
        for row, (layer, (index, gates)) in enumerate(layers.items()):
            last = row + 1 == len(layers)
            for head in range(heads):
                ax = axes[row, head]
                if head >= index.shape[1]:
                    ax.set_visible(False)
                    continue
                picture = chosen_map(index[:, head], sizes, T)
                ax.imshow(shrink(picture, 700), cmap=colors, vmin=0, vmax=2, aspect="auto", origin="lower", interpolation="nearest",
                          extent=(0, T, -0.5, len(picture) - 0.5))
                far = (picture == 2).sum() / max(1, (picture > 0).sum())
                ax.set_title(f"layer {layer}, KV head {head}")
                ax.text(0.02, 0.95, f"{100 * far:.0f}% chosen", transform=ax.transAxes, va="top", fontsize=7, color="#777777")
                ax.yaxis.get_major_locator().set_params(integer=True)
                if head == 0:
                    ax.set_ylabel(f"block of {sizes[0]}")
                ax.tick_params(labelbottom=last, labelleft=head == 0)
                if last:
                    ax.set_xlabel("query position")
            draw_gates(axes[row, heads], gates, T, layer, last)
            if last:
                axes[row, heads].set_xlabel("query position")
        figure.legend(handles=[Patch(color=CHOSEN, label="chosen by importance"), Patch(color=FORCED, label="always taken: first and local blocks"),
                               Patch(facecolor=BACKGROUND, edgecolor="#cccccc", label="not read by selection")], loc="outside upper left", ncols=3, fontsize=8)
        try:
            figure.savefig(args.out, dpi=130)
        except (OSError, ValueError) as error:
            die(f"{args.out}: {getattr(error, 'strerror', None) or error}")
    print(args.out)


if __name__ == "__main__":
    main()
