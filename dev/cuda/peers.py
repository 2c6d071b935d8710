#!/usr/bin/env python3
"""Dense attention of PyTorch on this GPU, through cuDNN and FlashAttention-2: what NSA's time is compared with.

    python3 dev/cuda/peers.py H KV D T [T ...]      H heads on KV key/value heads of D numbers, batch 1, causal, bf16, random normal

One row for each way and length: its name, T, milliseconds forward and backward; medians of 7 runs by the GPU's clock, after one that
is not counted. dev/bench_core.sh calls it. Needs PyTorch 2.5 or later (enable_gqa).
"""
import statistics
import sys

try:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
except ImportError:
    sys.exit("peers.py needs PyTorch 2.5 or later: pip install torch")

WAYS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FlashAttention-2": SDPBackend.FLASH_ATTENTION}
RUNS = 7


def normal(heads, T, D):
    return torch.randn(1, heads, T, D, device="cuda", dtype=torch.bfloat16)


def times(way, H, KV, D, T):
    q, k, v = (normal(heads, T, D).requires_grad_() for heads in (H, KV, KV))
    dout = normal(H, T, D)
    forward, backward = [], []
    with sdpa_kernel(way):
        for _ in range(RUNS + 1):
            begin, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
            torch.cuda.synchronize()
            begin.record()
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            middle.record()
            out.backward(dout)
            end.record()
            torch.cuda.synchronize()
            forward.append(begin.elapsed_time(middle))
            backward.append(middle.elapsed_time(end))
            q.grad = k.grad = v.grad = None
    return statistics.median(forward[1:]), statistics.median(backward[1:])


def main():
    try:
        H, KV, D, *lengths = [int(word) for word in sys.argv[1:]]
    except ValueError:
        lengths = []
    if not lengths:
        sys.exit(__doc__.strip())
    if not torch.cuda.is_available():
        sys.exit("peers.py: PyTorch finds no GPU")
    torch.manual_seed(1)
    for T in lengths:
        for name, way in WAYS.items():
            print(f"{name:<16} {T:>8} {'%12.3f %12.3f' % times(way, H, KV, D, T)}", flush=True)


if __name__ == "__main__":
    main()
