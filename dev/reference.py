#!/usr/bin/env python3
"""The oracle: nsa.c's model (design, section 3) in PyTorch, float64, gradients by autograd.

The forward pass itself is scripts/modeling_nsa.py, written independently of the C code; here it runs in
float64 and everything that checks other programs against it is built:

    dev/reference.py fixtures --out test/fixtures         write the fixtures that test_nsa.c reads
    dev/reference.py bf16 test/fixtures                   beside each fixture, how far PyTorch in bf16 is from it
    dev/reference.py make-folder OUT --set gate=static    a random model folder
    dev/reference.py loss FOLDER FILE -t N                = ./train_nsa -e FOLDER -j FILE -b 1 -t N -m 1 -x 0
    dev/reference.py logits FOLDER --text P --out F       write a tensor `logits`
    dev/reference.py compare FOLDER F --text P            against ./sample -e FOLDER -p P --dump-logits F
"""
import argparse
import copy
import json
import math
import pathlib
import shutil
import sys
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

SCRIPTS = pathlib.Path(__file__).resolve().parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))
import modeling_nsa  # noqa: E402
from modeling_nsa import NSAConfig, NSAForCausalLM  # noqa: E402


# ---------------------------------------------------------------------------------------------------------
# Models and folders

# every key of config.json that a caller may set, with the values of the smallest useful model
SMALL = dict(
    vocab_size=19, hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, head_dim=4, v_head_dim=4, max_position_embeddings=64, rope_theta=10000.0,
    rms_norm_eps=1e-5, tie_word_embeddings=True, attention="nsa", full_layers=[], cmp_block=8, cmp_stride=4,
    sel_block=8, sel_blocks=4, sel_init_blocks=1, sel_local_blocks=2, window=10, compress="mlp", gate="input",
    num_experts=0, num_shared_experts=0, num_experts_per_tok=0, moe_intermediate_size=0, first_dense_layers=0,
    capacity_factor=0.0, z_loss_coef=1e-3, balance_loss_coef=1e-2)


def config_json(settings):
    """The text of config.json: every key, in the design's order."""
    return json.dumps(dict(
        model_type="nsa", architectures=["NSAForCausalLM"],
        auto_map={"AutoConfig": "modeling_nsa.NSAConfig", "AutoModelForCausalLM": "modeling_nsa.NSAForCausalLM"},
        eos_token_id=None, torch_dtype="float32", **settings), indent=2) + "\n"


def random_model(settings, seed, noise=0.1):
    """A float64 model whose weights (init + noise * normal) are float32 numbers: exact in any program."""
    torch.manual_seed(seed)
    model = NSAForCausalLM(NSAConfig(**settings)).double().eval()
    random = np.random.default_rng(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((p + noise * torch.from_numpy(random.standard_normal(tuple(p.shape)))).float())
    return model


def save_folder(model, settings, folder):
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config_json(settings))
    save_file({name: p.detach().float().contiguous() for name, p in model.named_parameters()},
              folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(SCRIPTS / "modeling_nsa.py", folder)


def load_folder(folder):
    """config.json + model.safetensors -> float64 model. Every tensor must be there, and no other."""
    folder = pathlib.Path(folder)
    model = NSAForCausalLM(NSAConfig(**json.loads((folder / "config.json").read_text()))).double().eval()
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return model


def encode(folder, data):
    """bytes -> token ids: the bytes themselves, or the folder's tokenizer.json."""
    file = pathlib.Path(folder) / "tokenizer.json"
    if not file.exists():
        return list(data)
    from tokenizers import Tokenizer
    return Tokenizer.from_file(str(file)).encode(data.decode(), add_special_tokens=False).ids


def read_tokens(folder, path):
    """A .bin of 256 int32 (magic, version, count) and uint16 (version 2: uint32) tokens, or a text."""
    data = pathlib.Path(path).read_bytes()
    if not str(path).endswith(".bin"):
        return encode(folder, data)
    magic, version, count = np.frombuffer(data, "<i4", 3)
    assert magic == 20240520 and version in (1, 2), "not a token file"
    return np.frombuffer(data, "<u2" if version == 1 else "<u4", count, 1024).tolist()


# ---------------------------------------------------------------------------------------------------------
# Running a model

def run(model, tokens):
    """tokens (B,T+1) -> logits (B,T,V), mean cross entropy, the MoE terms (coefficients included, summed over
    layers) and the trace: one dict a layer with gates, importance, block_idx, routing."""
    trace = []
    logits = model(tokens[:, :-1], trace=trace).logits
    loss = F.cross_entropy(modeling_nsa.up(logits).flatten(0, 1), tokens[:, 1:].flatten())
    zero = logits.new_zeros(())
    return dict(logits=logits, loss=loss, trace=trace,
                moe_z=sum((note.get("moe_z", zero) for note in trace), zero),
                moe_balance=sum((note.get("moe_balance", zero) for note in trace), zero))


def smallest_gap(trace, config):
    """The least relative distance, over every discrete choice made, between the last taken and the first left:
    below rounding errors a correct program may choose differently."""
    gaps = [math.inf]
    free = config.sel_blocks - config.sel_init_blocks - config.sel_local_blocks  # chosen by importance

    def add(sorted_values, last):  # descending along the last axis
        if 0 < last < sorted_values.shape[-1]:
            taken, left = sorted_values[..., last - 1], sorted_values[..., last]
            gaps.extend(((taken - left) / taken)[torch.isfinite(left)].tolist())

    for note in trace:
        if "importance" in note:
            importance = note["importance"]  # (B,T,KV,Ns)
            own = torch.arange(importance.shape[1])[:, None, None] // config.sel_block
            j = torch.arange(importance.shape[-1])
            contested = (own + 1 > config.sel_blocks) & (j >= config.sel_init_blocks) & (j <= own - config.sel_local_blocks)
            add(importance.masked_fill(~contested, -math.inf).sort(-1, descending=True).values, free)
        if "router" in note:
            router, choice = note["router"], note["choice"]
            add(router.sort(-1, descending=True).values, choice.shape[1])
            if note["capacity"] is not None:
                for e in range(router.shape[1]):
                    add(router[(choice == e).any(-1), e].sort(descending=True).values, note["capacity"])
    return min(gaps)


# ---------------------------------------------------------------------------------------------------------
# Fixtures

FIXTURES = {  # name: (B, T, what differs from SMALL)
    "mlp":            (2, 45, dict(num_hidden_layers=2)),
    "grouped_mlp":    (1, 47, dict(compress="grouped_mlp")),
    "conv1d":         (2, 45, dict(compress="conv1d")),
    "avgpool":        (2, 45, dict(compress="avgpool")),
    "gate_q_cond":    (1, 45, dict(gate="q_cond", num_hidden_layers=2)),
    "gate_static":    (1, 45, dict(gate="static", num_hidden_layers=2)),
    "full":           (2, 37, dict(attention="full", num_hidden_layers=2)),
    "hybrid":         (1, 45, dict(full_layers=[0, 2], num_hidden_layers=3)),
    "kv_1":           (1, 45, dict(num_key_value_heads=1)),
    "kv_all":         (1, 45, dict(num_key_value_heads=4)),
    "group_of_3":     (1, 45, dict(num_attention_heads=6, head_dim=2)),
    "v_wide":         (1, 45, dict(v_head_dim=7, compress="conv1d")),
    "v_narrow":       (1, 45, dict(head_dim=6, v_head_dim=3, compress="grouped_mlp")),
    "width_odd":      (1, 45, dict(hidden_size=13, head_dim=6, intermediate_size=17, vocab_size=31)),
    "untied":         (1, 45, dict(tie_word_embeddings=False)),
    "theta_eps":      (1, 45, dict(rope_theta=100.0, rms_norm_eps=1e-2)),
    "one_token":      (2, 1, {}),
    "below_block":    (2, 7, dict(num_hidden_layers=2)),
    "one_block":      (2, 8, {}),
    "all_blocks":     (1, 45, dict(sel_blocks=9)),
    "stride_1_1":     (1, 45, dict(cmp_stride=8)),
    "stride_1_4":     (1, 51, dict(cmp_stride=2)),
    "paper_geometry": (1, 107, dict(sel_block=16)),
    "sel_block_3d":   (1, 83, dict(sel_block=12, num_key_value_heads=1)),
    "local_1":        (1, 45, dict(sel_init_blocks=0, sel_local_blocks=1, sel_blocks=2)),
    "init_2_local_3": (1, 61, dict(sel_init_blocks=2, sel_local_blocks=3, sel_blocks=6)),
    "forced_only":    (1, 45, dict(sel_blocks=3)),
    "window_1":       (1, 45, dict(window=1)),
    "window_all":     (1, 45, dict(window=1000)),
    "moe":            (1, 45, dict(num_hidden_layers=2, num_experts=4, num_shared_experts=2, num_experts_per_tok=2,
                                   moe_intermediate_size=5, first_dense_layers=1)),
    "moe_k1":         (2, 23, dict(num_experts=3, num_experts_per_tok=1, moe_intermediate_size=6)),
    "moe_capacity":   (2, 23, dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=6, capacity_factor=0.8)),
    "moe_capacity_1": (1, 45, dict(num_hidden_layers=2, num_experts=5, num_experts_per_tok=1, num_shared_experts=1,
                                   moe_intermediate_size=4, capacity_factor=1.1, attention="full")),
    "everything":     (2, 33, dict(num_hidden_layers=3, full_layers=[1], num_key_value_heads=1, v_head_dim=6,
                                   tie_word_embeddings=False, compress="grouped_mlp", gate="q_cond", num_experts=3,
                                   num_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=4,
                                   first_dense_layers=1)),
}


def make_fixture(name, seed):
    """One fixture as (tensors, metadata), or None when a choice in it is too close to call."""
    B, T, changes = FIXTURES[name]
    settings = {**SMALL, **changes}
    dropping = settings["capacity_factor"] > 0
    model = random_model(settings, seed).train(dropping)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(settings["vocab_size"], (B, T + 1), generator=generator)
    out = run(model, tokens)
    if smallest_gap(out["trace"], model.config) < 1e-4:
        return None
    (out["loss"] + out["moe_z"] + out["moe_balance"]).backward()
    tensors = {"tokens": tokens.int(), "logits": out["logits"]}
    for key in ("loss", "moe_z", "moe_balance"):
        tensors[key] = out[key].reshape(1)
    for key, p in model.named_parameters():
        tensors["param." + key] = p.float()
        tensors["grad." + key] = torch.zeros_like(p) if p.grad is None else p.grad
    for i, note in enumerate(out["trace"]):
        if "block_idx" in note:
            tensors["block_idx.%d" % i] = note["block_idx"].int()
    if dropping:  # the same model as evaluation and sampling see it: nothing is dropped
        with torch.no_grad():
            out = run(model.eval(), tokens)
        if smallest_gap(out["trace"], model.config) < 1e-4:
            return None
        tensors.update(eval_logits=out["logits"], eval_loss=out["loss"].reshape(1))
    return ({key: x.detach().contiguous() for key, x in tensors.items()},
            {"format": "pt", "config": config_json(settings), "training": str(int(dropping))})


def write_fixture(path, tensors, metadata):
    """A safetensors file, the same bytes every time: the library's own writer shuffles the metadata."""
    names = {torch.float64: "F64", torch.float32: "F32", torch.int32: "I32"}
    header, data = {"__metadata__": metadata}, b""
    for key, x in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):  # keeps F64 aligned
        raw = x.numpy().tobytes()
        header[key] = {"dtype": names[x.dtype], "shape": list(x.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def command_fixtures(args):
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    total = 0
    for number, name in enumerate(FIXTURES):
        if args.only and name not in args.only:
            continue
        tries = (make_fixture(name, 1000 * number + attempt) for attempt in range(1000))
        attempt, fixture = next((a, f) for a, f in enumerate(tries) if f)
        path = out / (name + ".safetensors")
        write_fixture(path, *fixture)
        size = path.stat().st_size
        total += size
        print("%-16s %4d KB  redrawn %2d  loss %.9f" % (name, size // 1000, attempt, fixture[0]["loss"].item()))
    print("total %d KB" % (total // 1000))


# ---------------------------------------------------------------------------------------------------------
# How far bf16 is from a fixture: what test_nsa.cu may not exceed by much

class SumInFloat32(TorchDispatchMode):
    """Matrix products and gradients of embeddings in bf16 that add in float32 and round once, as on GPUs and on
    CPUs that have bf16. On others PyTorch rounds after every addition, which says little about bf16."""
    SUMS = {torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default,
            torch.ops.aten.embedding_dense_backward.default}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        low = [x for x in args if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16]
        if function not in self.SUMS or not low:
            return function(*args, **kwargs)
        return function(*(x.float() if any(x is y for y in low) else x for x in args), **kwargs).bfloat16()


def given(trace):
    """A patch under which a forward pass makes the choices of an earlier one: its blocks, experts and drops."""
    blocks = iter([note["block_idx"].transpose(1, 2) for note in trace if "block_idx" in note])
    routes = iter([(note["choice"], note["keep"]) for note in trace if "choice" in note])

    def route(probability, k, capacity):
        choice, keep = next(routes)
        value = probability.gather(1, choice)
        return choice, value / value.sum(-1, keepdim=True) if k > 1 else value, keep

    return mock.patch.multiple(modeling_nsa, select_blocks=lambda *_: next(blocks), route=route)


def gradients_of(model, tokens):
    """{tensor: value} of one forward and backward pass."""
    out = run(model, tokens)
    (out["loss"] + out["moe_z"] + out["moe_balance"]).backward()
    found = {"grad." + key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in model.named_parameters()}
    return {"logits": out["logits"].detach(), "loss": out["loss"].detach(), **found}


def bf16_errors(path, draws=32):
    """{tensor: error} of the fixture's model with weights and activations in bf16 against float64, which chooses
    the blocks and experts of both. An error is |a - b| / (|b| + 1e-6 |all gradients|), Euclidean norms.

    Where a few numbers are all that a sum leaves of many roundings, as in a bias of four, one run's error says
    little: by luck it is a third of the next one's. So the model runs several times, first as it is, then with
    every weight off by 1 % or so, which draws other roundings of the same sizes; the worst error counts."""
    with safe_open(path, "pt") as f:
        meta, tensors = f.metadata(), {key: f.get_tensor(key) for key in f.keys()}
    tokens = tensors["tokens"].long()
    weights = {key[6:]: x for key, x in tensors.items() if key.startswith("param.")}
    generator = torch.Generator().manual_seed(1)
    worst = {}
    for draw in range(draws):
        for prefix, training in (("", True), ("eval_", False)) if meta["training"] == "1" else (("", False),):
            exact = NSAForCausalLM(NSAConfig(**json.loads(meta["config"]))).double().train(training)
            exact.load_state_dict(weights, strict=True)
            with torch.no_grad():
                trace = run(exact, tokens)["trace"]
                for p in exact.parameters() if draw else ():
                    p.mul_(1 + 0.01 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
            low = copy.deepcopy(exact).to(torch.bfloat16)
            with given(trace):
                wanted = gradients_of(exact, tokens)
            with given(trace), SumInFloat32():
                found = gradients_of(low, tokens)
            everything = math.sqrt(sum(x.pow(2).sum().item() for key, x in wanted.items() if key.startswith("grad.")))
            for key in found if not prefix else ("logits", "loss"):
                error = (found[key].double() - wanted[key]).norm() / (wanted[key].norm() + 1e-6 * everything)
                worst[prefix + key] = max(worst.get(prefix + key, 0), error.item())
    return worst


def command_bf16(args):
    """One NAME.bf16.json a fixture. Two digits: the third depends on the order in which a machine adds."""
    for path in sorted(pathlib.Path(args.folder).glob("*.safetensors")):
        errors = bf16_errors(path)
        rows = ",\n".join('"%s": %.2g' % item for item in errors.items())
        path.with_suffix(".bf16.json").write_text("{\n" + rows + "\n}\n")
        gradients = {key: e for key, e in errors.items() if key.startswith("grad.")}
        worst = max(gradients, key=gradients.get)
        print("%-16s loss %.1e  logits %.1e  worst gradient %.1e %s" % (path.stem, errors["loss"], errors["logits"], errors[worst], worst))


# ---------------------------------------------------------------------------------------------------------
# The other commands

def relative_error(a, b):
    """The worst position's |a - b| / |b|, Euclidean norms over the vocabulary."""
    a, b = a.double(), b.double()
    return ((a - b).norm(dim=-1) / b.norm(dim=-1)).max().item()


def command_make_folder(args):
    settings = dict(SMALL, vocab_size=256, hidden_size=30, intermediate_size=50, num_hidden_layers=2, head_dim=8,
                    v_head_dim=6, max_position_embeddings=512, cmp_block=16, cmp_stride=8, sel_block=16, window=20)
    for item in args.set:
        key, _, value = item.partition("=")
        if key not in settings:
            sys.exit("reference.py: no such setting: " + key)
        settings[key] = value if isinstance(settings[key], str) else json.loads(value)
    save_folder(random_model(settings, args.seed, args.noise), settings, args.folder)


def command_loss(args):
    tokens = read_tokens(args.folder, args.file)[:args.seq_len + 1]
    if len(tokens) < args.seq_len + 1:
        sys.exit("reference.py: %s has %d tokens, -t %d needs %d" % (args.file, len(tokens), args.seq_len, args.seq_len + 1))
    print("val_loss %.9f" % run(load_folder(args.folder), torch.tensor([tokens]))["loss"].item())


def prompt_logits(args):
    if args.tokens:
        tokens = [int(t) for t in args.tokens.split(",")]
    elif args.file:
        tokens = read_tokens(args.folder, args.file)
    else:
        tokens = encode(args.folder, args.text.encode())
    return load_folder(args.folder)(torch.tensor([tokens])).logits[0]


def command_logits(args):
    save_file({"logits": prompt_logits(args).float().contiguous()}, args.out)


def command_compare(args):
    with safe_open(args.dump, "pt") as dump:
        theirs = dump.get_tensor("logits")
    ours = prompt_logits(args)
    if theirs.shape != ours.shape:
        sys.exit("reference.py: logits %s, expected %s" % (tuple(theirs.shape), tuple(ours.shape)))
    error = relative_error(theirs, ours)
    print("max relative error %.3g (tolerance %g)" % (error, args.tolerance))
    sys.exit(not error <= args.tolerance)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, function, what):
        sub = commands.add_parser(name, help=what, description=what)
        sub.set_defaults(function=function)
        return sub

    sub = command("fixtures", command_fixtures, "write the test fixtures")
    sub.add_argument("--out", default="test/fixtures")
    sub.add_argument("--only", nargs="*", metavar="NAME")
    sub = command("bf16", command_bf16, "write PyTorch's errors in bf16 beside the fixtures of a folder")
    sub.add_argument("folder", nargs="?", default="test/fixtures")
    sub = command("make-folder", command_make_folder, "write a random model folder of odd sizes")
    sub.add_argument("folder")
    sub.add_argument("--seed", type=int, default=1)
    sub.add_argument("--noise", type=float, default=0.1, help="normal noise on top of the init (default 0.1)")
    sub.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="config.json keys")
    sub = command("loss", command_loss, "mean cross entropy of the first N+1 tokens of a text or .bin file")
    sub.add_argument("folder")
    sub.add_argument("file")
    sub.add_argument("-t", "--seq-len", type=int, required=True, metavar="N")
    for name, function, what in (("logits", command_logits, "write the logits of a prompt"),
                                 ("compare", command_compare, "compare dumped logits; exit 1 above the tolerance")):
        sub = command(name, function, what)
        sub.add_argument("folder")
        if name == "compare":
            sub.add_argument("dump", help="safetensors with a tensor `logits` (T,V)")
            sub.add_argument("--tolerance", type=float, default=1e-4)
        else:
            sub.add_argument("--out", required=True)
        prompt = sub.add_mutually_exclusive_group(required=True)
        prompt.add_argument("--text")
        prompt.add_argument("--file", help="text or .bin")
        prompt.add_argument("--tokens", help="comma-separated ids")

    args = parser.parse_args()
    with torch.set_grad_enabled(args.command in ("fixtures", "bf16")):
        args.function(args)


if __name__ == "__main__":
    main()
