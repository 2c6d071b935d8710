#!/usr/bin/env python3
"""Checks of the Python side: the oracle against loops and finite differences, the transformers wrapper, and,
where ./train_nsa and ./sample are built (or NSA_BIN names their folder), the programs against the oracle.

    python test/test_python.py [NAME ...]        or        pytest test/test_python.py
"""
import cmath
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import traceback
from unittest import SkipTest

TEMPORARY = tempfile.TemporaryDirectory()
os.environ["HF_HOME"] = TEMPORARY.name  # transformers copies a folder's code there
os.environ["HF_HUB_OFFLINE"] = "1"

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "dev"), str(ROOT / "scripts")]
try:
    import numpy as np
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file

    import modeling_nsa
    import reference
except ImportError as e:
    if __name__ != "__main__":
        raise
    print("SKIP everything: %s (see dev/requirements.txt)\n0 passed, 0 failed" % e)
    sys.exit(0)

BIN = pathlib.Path(os.environ.get("NSA_BIN", ROOT))
MOE = dict(num_experts=4, num_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=6)


def folder(name, settings=(), seed=1):
    path = pathlib.Path(TEMPORARY.name) / name
    settings = {**reference.SMALL, "vocab_size": 256, "window": 20, "max_position_embeddings": 512, **dict(settings)}
    reference.save_folder(reference.random_model(settings, seed), settings, path)
    return path


def random_tokens(B, T, V=reference.SMALL["vocab_size"], seed=0):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------
# The oracle by itself

def test_overlap_of_the_paper():
    m = modeling_nsa.overlap(Nc=63, Ns=16, l=32, d=16, s=64)
    for j in range(1, 15):
        assert m[:, j].nonzero().flatten().tolist() == list(range(4 * j - 1, 4 * j + 4))
        assert m[4 * j - 1:4 * j + 4, j].tolist() == [1, 2, 2, 2, 1]
    assert m[:4, 0].tolist() == [2, 2, 2, 1]


def test_overlap_counts_pieces():
    for l, d, s in ((8, 8, 8), (8, 4, 8), (8, 2, 8), (8, 4, 16), (8, 4, 12), (12, 4, 20), (6, 2, 8)):
        for T in range(l, 5 * s, 3):
            Nc, Ns = (T - l) // d + 1, -(-T // s)
            m = modeling_nsa.overlap(Nc, Ns, l, d, s)
            for i in range(Nc):
                for j in range(Ns):
                    inside = sum(j * s <= token < (j + 1) * s for token in range(i * d, i * d + l))
                    assert m[i, j] * d == inside


def test_selection_rule():
    random = np.random.default_rng(0)
    s = 8
    for n, n_init, n_local in ((4, 1, 2), (3, 1, 2), (2, 0, 1), (6, 2, 1), (20, 1, 2)):
        T = 75
        Ns = -(-T // s)
        importance = random.integers(0, 4, (1, 2, T, Ns)).astype(float)  # many ties
        got = modeling_nsa.select_blocks(torch.tensor(importance), torch.arange(T), n, n_init, n_local, s)
        for kv in range(2):
            for t in range(T):
                candidates = [j for j in range(Ns) if j * s <= t]
                taken = set(candidates[:n_init] + candidates[-n_local:])
                for j in sorted(candidates, key=lambda j: (-importance[0, kv, t, j], j)):
                    if len(taken) < n:
                        taken.add(j)
                assert got[0, kv, t].tolist() == sorted(taken) + [-1] * (n - len(taken))


def softmax(scores):
    e = [math.exp(s - max(scores)) for s in scores]
    return [x / sum(e) for x in e]


def rotate(x, position, theta):  # RoPE as what it is: complex numbers turned by an angle
    half = len(x) // 2
    z = [complex(x[i], x[i + half]) * cmath.exp(1j * position * theta ** (-i / half)) for i in range(half)]
    return np.array([c.real for c in z] + [c.imag for c in z])


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))


def attention_by_loops(x, weights, c):
    """Section 3.1, one query and head at a time. x (T,C) -> output (T,C), block_idx (T,KV,n)."""
    T, H, KV = len(x), c.num_attention_heads, c.num_key_value_heads
    l, d, s, n, scale = c.cmp_block, c.cmp_stride, c.sel_block, c.sel_blocks, 1 / math.sqrt(c.head_dim)
    W = {name: w.detach().numpy() for name, w in weights.items()}

    def project(name, heads):
        return (x @ W[name + ".weight"].T).reshape(T, heads, -1)

    def compress(u, which, kv):
        w = {k.split(".", 1)[1]: v for k, v in W.items() if k.startswith(which + ".")}
        if c.compress == "avgpool":
            return u.mean(0)
        if c.compress == "conv1d":
            return w["conv.weight"][kv] @ u.reshape(-1) + w["conv.bias"][kv]
        if c.compress == "grouped_mlp":
            w = {k: v if k == "pos" else v[kv] for k, v in w.items()}
        return w["fc2.weight"] @ gelu(w["fc1.weight"] @ (u + w["pos"]).reshape(-1) + w["fc1.bias"]) + w["fc2.bias"]

    q = project("q_proj", H)
    k = {b: project("k_%s_proj" % b, KV) for b in ("cmp", "slc", "win")}
    v = {b: project("v_%s_proj" % b, KV) for b in ("cmp", "slc", "win")}
    o, block_idx = np.zeros((T, H, c.v_head_dim)), -np.ones((T, KV, n), int)
    for t in range(T):
        for kv in range(KV):
            group = range(kv * (H // KV), (kv + 1) * (H // KV))
            blocks = [i for i in range(T) if i * d + l - 1 <= t]
            keys = [rotate(compress(k["cmp"][i * d:i * d + l, kv], "compress_k", kv), i * d, c.rope_theta) for i in blocks]
            values = [compress(v["cmp"][i * d:i * d + l, kv], "compress_v", kv) for i in blocks]
            importance, o_cmp = np.zeros(t // s + 1), {}
            for h in group:
                turned = rotate(q[t, h], t, c.rope_theta)
                p = softmax([turned @ key * scale for key in keys]) if blocks else []
                o_cmp[h] = sum((a * value for a, value in zip(p, values)), np.zeros(c.v_head_dim))
                for i, a in zip(blocks, p):
                    for piece in range(i * d, i * d + l, d):
                        importance[piece // s] += a
            own = t // s
            taken = {j for j in range(own + 1) if j < c.sel_init_blocks or j > own - c.sel_local_blocks}
            for j in sorted(range(own + 1), key=lambda j: (-importance[j], j)):
                if len(taken) < n:
                    taken.add(j)
            block_idx[t, kv, :len(taken)] = sorted(taken)
            for h in group:
                if c.gate == "input":
                    logit = (W["g_proj.weight"] @ x[t] + W["g_proj.bias"])[3 * h:3 * h + 3]
                elif c.gate == "q_cond":
                    logit = W["gate_q.weight"][h] @ q[t, h] + W["gate_q.bias"][h]
                else:
                    logit = W["gate.bias"][h]
                g, turned, parts = 1 / (1 + np.exp(-logit)), rotate(q[t, h], t, c.rope_theta), [o_cmp[h]]
                for b, seen in (("slc", [u for u in range(t + 1) if u // s in taken]),
                                ("win", [u for u in range(t + 1) if u > t - c.window])):
                    p = softmax([turned @ rotate(k[b][u, kv], u, c.rope_theta) * scale for u in seen])
                    parts.append(sum(a * v[b][u, kv] for a, u in zip(p, seen)))
                o[t, h] = sum(g[b] * parts[b] for b in range(3))
    return o.reshape(T, -1) @ W["o_proj.weight"].T, block_idx


def test_attention_against_loops():
    for changes in (dict(), dict(compress="grouped_mlp", gate="q_cond", v_head_dim=3),
                    dict(compress="conv1d", gate="static", num_key_value_heads=1, sel_block=12),
                    dict(compress="avgpool", sel_init_blocks=0, sel_local_blocks=1, sel_blocks=2, num_key_value_heads=4)):
        settings = {**reference.SMALL, **changes}
        attention = reference.random_model(settings, 3, noise=0.3).model.layers[0].self_attn
        x = torch.randn(1, 42, settings["hidden_size"], dtype=torch.float64, generator=torch.Generator().manual_seed(4))
        note = {}
        got = attention(x, note)[0].detach().numpy()
        want, block_idx = attention_by_loops(x[0].numpy(), dict(attention.named_parameters()), attention.config)
        assert np.abs(got - want).max() < 1e-12 * np.abs(want).max()
        assert (note["block_idx"][0].numpy() == block_idx).all()


def test_query_chunks_change_nothing():
    model, tokens, size = reference.random_model(reference.SMALL, 5), random_tokens(2, 50), modeling_nsa.QUERY_CHUNK
    want = model(tokens).logits
    try:
        for modeling_nsa.QUERY_CHUNK in (1, 7, 49):
            assert (model(tokens).logits - want).abs().max() < 1e-12
    finally:
        modeling_nsa.QUERY_CHUNK = size


def test_gradients_against_differences():
    for changes in (dict(), dict(compress="grouped_mlp", gate="q_cond", full_layers=[0], num_hidden_layers=2),
                    dict(compress="conv1d", gate="static", tie_word_embeddings=False, v_head_dim=6),
                    dict(compress="avgpool", capacity_factor=0.9, **MOE),
                    dict(MOE, num_experts_per_tok=1, attention="full")):
        model = reference.random_model({**reference.SMALL, **changes}, 6).train()
        tokens, generator = random_tokens(2, 30), torch.Generator().manual_seed(7)

        def objective():
            out = reference.run(model, tokens)
            return out["loss"] + out["moe_z"] + out["moe_balance"]

        objective().backward()
        scale = math.sqrt(sum(p.grad.pow(2).sum().item() for p in model.parameters()))
        for name, p in model.named_parameters():
            u, step = torch.randn(p.shape, dtype=torch.float64, generator=generator), 1e-5
            with torch.no_grad():
                p += step * u
                high = objective().item()
                p -= 2 * step * u
                low = objective().item()
                p += step * u
            error = abs((high - low) / (2 * step) - (p.grad * u).sum().item())
            assert error < 1e-7 * (p.grad.norm().item() + scale), (changes, name, error)


def test_causality():
    for changes in (dict(num_hidden_layers=2), dict(full_layers=[0], num_hidden_layers=2), dict(capacity_factor=0.5, **MOE)):
        model = reference.random_model({**reference.SMALL, **changes}, 8, noise=0.3)
        tokens = random_tokens(1, 45)
        with torch.no_grad():
            want = model(tokens).logits
            for t in range(0, 45, 4):
                other = tokens.clone()
                other[0, t] = (other[0, t] + 1) % 19
                difference = (model(other).logits - want).abs().amax((0, 2))
                assert difference[:t].max() < 1e-12 if t else True
                assert difference[t] > 1e-6


def test_moe_routing_against_loops():
    random = np.random.default_rng(9)
    for k, f in ((1, 0.0), (2, 0.0), (1, 0.7), (2, 1.0), (3, 0.4)):
        N, E = 21, 5
        p = random.integers(1, 5, (N, E)).astype(float)  # many ties
        p /= p.sum(1, keepdims=True)
        capacity = math.ceil(f * N * k / E) if f else None
        index, weight, keep = modeling_nsa.route(torch.tensor(p), k, capacity)
        chosen = [sorted(range(E), key=lambda e: (-p[t, e], e))[:k] for t in range(N)]
        kept = {e: sorted((t for t in range(N) if e in chosen[t]), key=lambda t: (-p[t, e], t))[:capacity] for e in range(E)}
        for t in range(N):
            assert index[t].tolist() == chosen[t]
            total = sum(p[t, e] for e in chosen[t]) if k > 1 else 1
            assert np.allclose(weight[t], [p[t, e] / total for e in chosen[t]], rtol=1e-14)
            assert keep[t].tolist() == [t in kept[e] for e in chosen[t]]


def test_moe_layer_against_loops():
    settings = {**reference.SMALL, **MOE, "capacity_factor": 0.8}
    moe = reference.random_model(settings, 10, noise=0.3).model.layers[0].mlp
    x = torch.randn(2, 11, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(11))
    for training in (False, True):
        note, flat = {}, x.flatten(0, 1)
        with torch.no_grad():
            got = moe.train(training)(x, note).flatten(0, 1)
            r = flat @ moe.gate.weight.T
            p, (N, E), k = r.softmax(-1), r.shape, 2
            choice = [sorted(range(E), key=lambda e: -p[t, e])[:k] for t in range(N)]
            want, dropped = moe.shared_experts(flat), 0
            for e in range(E):
                tokens = sorted((t for t in range(N) if e in choice[t]), key=lambda t: -p[t, e])
                kept = tokens[:math.ceil(0.8 * N * k / E)] if training else tokens
                dropped += len(tokens) - len(kept)
                for t in kept:
                    want[t] += p[t, e] / sum(p[t, i] for i in choice[t]) * moe.experts[e](flat[t:t + 1])[0]
            share = [sum(e in c for c in choice) / (N * k) for e in range(E)]
        assert (got - want).abs().max() < 1e-13 and (dropped > 0) == training
        z = sum(math.log(sum(math.exp(a) for a in row)) ** 2 for row in r.tolist()) / N
        assert abs(note["moe_z"] - 1e-3 * z) < 1e-15
        assert abs(note["moe_balance"] - 1e-2 * E * sum(share[e] * p[:, e].mean() for e in range(E))) < 1e-15


def test_init():
    settings = {**reference.SMALL, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128}
    torch.manual_seed(0)
    for gate in ("input", "q_cond", "static"):
        model = modeling_nsa.NSAForCausalLM(modeling_nsa.NSAConfig(**dict(settings, gate=gate)))
        for name, p in model.named_parameters():
            if "norm" in name:
                assert (p == 1).all()
            elif name.endswith(("g_proj.bias", "gate_q.bias", "gate.bias")):
                assert (p.reshape(-1, 3) == torch.tensor([-2.0, -2.0, 2.0])).all()
            elif name.endswith("bias"):
                assert (p == 0).all()
            else:
                std = 0.02 / 2 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
                assert abs(p.std().item() / std - 1) < 5 / math.sqrt(2 * p.numel()), name


def test_fixtures_on_disk():
    for name in reference.FIXTURES:
        path = ROOT / "test" / "fixtures" / (name + ".safetensors")
        with safe_open(path, "pt") as f:
            meta, tensors = f.metadata(), {key: f.get_tensor(key) for key in f.keys()}
        model = modeling_nsa.NSAForCausalLM(modeling_nsa.NSAConfig(**json.loads(meta["config"]))).double()
        model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("param.")}, strict=True)
        model.train(meta["training"] == "1")
        out = reference.run(model, tensors["tokens"].long())
        (out["loss"] + out["moe_z"] + out["moe_balance"]).backward()
        assert reference.relative_error(out["logits"], tensors["logits"]) < 1e-10
        assert abs(out["loss"] - tensors["loss"][0]) < 1e-12
        scale = math.sqrt(sum(v.pow(2).sum().item() for k, v in tensors.items() if k.startswith("grad.")))
        for key, p in model.named_parameters():
            error = (tensors["grad." + key] - (0 if p.grad is None else p.grad)).norm()
            assert error < 1e-10 * scale, (name, key)
        for i, note in enumerate(out["trace"]):
            if "block_idx" in note:
                assert (note["block_idx"] == tensors["block_idx.%d" % i]).all()
        if meta["training"] == "1":
            assert any(not note["keep"].all() for note in out["trace"] if "keep" in note), "nothing was dropped"


def test_bf16_errors_on_disk():
    for name in ("mlp", "everything", "moe_capacity_1"):
        path = ROOT / "test" / "fixtures" / (name + ".safetensors")
        stored, few = json.loads(path.with_suffix(".bf16.json").read_text()), reference.bf16_errors(path, draws=4)
        assert stored.keys() == few.keys()
        for key in few:  # these four are among those of the file; machines add in different orders
            assert few[key] <= 1.2 * stored[key] and stored[key] <= 20 * few[key], (name, key, few[key], stored[key])
        assert stored["logits"] < 2e-2 and stored["loss"] < 2e-3


# ---------------------------------------------------------------------------------------------------------
# The transformers wrapper

def automodel(path, **options):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, **options)


def test_wrapper_loads_and_generates():
    for name, changes in (("hf_tied", dict(num_hidden_layers=2)),
                          ("hf_untied", dict(tie_word_embeddings=False, gate="q_cond", compress="conv1d", v_head_dim=6)),
                          ("hf_moe", dict(MOE, gate="static", compress="grouped_mlp", num_hidden_layers=2, full_layers=[0]))):
        path = folder(name, changes)
        model, info = automodel(path, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        assert not model.training and next(model.parameters()).dtype == torch.float32
        oracle, tokens = reference.load_folder(path), random_tokens(2, 50, 256)
        with torch.no_grad():
            assert reference.relative_error(model(tokens).logits, oracle(tokens).logits) < 1e-5
            loss = model(tokens, labels=tokens).loss
            assert abs(loss - reference.run(oracle, tokens)["loss"]) < 1e-5
        mask = torch.ones_like(tokens)
        out = model.generate(tokens, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
        want = tokens
        for _ in range(6):
            want = torch.cat((want, oracle(want).logits[:, -1:].argmax(-1)), 1)
        assert (out == want).all()
        padded, mask = tokens.clone(), mask.clone()
        padded[0, :20], mask[0, :20] = 0, 0  # left padding: as if the row were shorter
        both = model.generate(padded, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
        alone = model.generate(tokens[:1, 20:], attention_mask=mask[:1, 20:], max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert (both[0, 20:] == alone[0]).all() and (both[1] == out[1, :54]).all()
        try:
            model.generate(padded.flip(1), attention_mask=mask.flip(1), max_new_tokens=1, pad_token_id=0)
            raise AssertionError("right padding went unnoticed")
        except ValueError as e:
            assert "left" in str(e)


def test_wrapper_saves_and_trains():
    path = folder("hf_save", dict(MOE, capacity_factor=1.0))
    model, tokens = automodel(path), random_tokens(2, 40, 256)
    model.save_pretrained(path / "again")
    again = modeling_nsa.NSAForCausalLM.from_pretrained(path / "again")
    with torch.no_grad():
        assert (again(tokens).logits == model(tokens).logits).all()
    keys = set(load_file(path / "again" / "model.safetensors"))
    assert keys == set(load_file(path / "model.safetensors"))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(12):
        loss = model(tokens, labels=tokens).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 1, losses


def test_wrapper_bfloat16():
    path = folder("hf_bf16")
    model, oracle, tokens = automodel(path, torch_dtype=torch.bfloat16), reference.load_folder(path), random_tokens(2, 50, 256)
    assert next(model.parameters()).dtype == torch.bfloat16
    with torch.no_grad():
        assert reference.relative_error(model(tokens).logits, oracle(tokens).logits) < 8e-2


def test_command_line():
    path = folder("cli")
    text = path / "text.txt"
    text.write_bytes(bytes(random_tokens(1, 61, 256)[0].tolist()))
    tokens = np.frombuffer(text.read_bytes(), np.uint8)
    for version, dtype in ((1, "<u2"), (2, "<u4")):
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, version, len(tokens)
        (path / ("v%d.bin" % version)).write_bytes(header.tobytes() + tokens.astype(dtype).tobytes())
    want = reference.run(reference.load_folder(path), torch.tensor(tokens[None].astype(int)))["loss"].item()

    def command(*words):
        return subprocess.run([sys.executable, str(ROOT / "dev" / "reference.py"), *map(str, words)],
                              stdout=subprocess.PIPE, check=False)

    for file in (text, path / "v1.bin", path / "v2.bin"):
        assert command("loss", path, file, "-t", 60).stdout.decode() == "val_loss %.9f\n" % want
    assert command("logits", path, "--file", text, "--out", path / "out.safetensors").returncode == 0
    assert command("compare", path, path / "out.safetensors", "--file", path / "v1.bin").returncode == 0
    last = path / "v3.bin"  # another prompt of the same length must be told apart
    last.write_bytes((path / "v1.bin").read_bytes()[:-2] + b"\1\0")
    assert command("compare", path, path / "out.safetensors", "--file", last).returncode == 1


# ---------------------------------------------------------------------------------------------------------
# The programs against the oracle

PROMPT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 2


def program(name, *words):
    path = BIN / name
    if not path.exists():
        raise SkipTest("%s is not built (set NSA_BIN to its folder)" % name)
    done = subprocess.run([str(path), *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=TEMPORARY.name)
    assert done.returncode == 0, "%s %s: exit %d\n%s" % (name, " ".join(map(str, words)), done.returncode, done.stderr.decode())
    return done.stdout.decode()


def text_file():
    path = pathlib.Path(TEMPORARY.name) / "text.txt"
    path.write_text("".join("%d times %d is %d.\n" % (a, b, a * b) for a in range(40) for b in range(40)))
    return path


def check_loss(path, file, T):
    stdout = program("train_nsa", "-e", path, "-j", file, "-b", 1, "-t", T, "-m", 1, "-x", 0)
    found = re.search(r"\bval_loss\s+([0-9.eE+-]+)", stdout)
    assert found, "no val_loss in:\n" + stdout
    tokens = torch.tensor([reference.read_tokens(path, file)[:T + 1]])
    with torch.no_grad():
        want = reference.run(reference.load_folder(path), tokens)["loss"].item()
    assert abs(float(found.group(1)) - want) < 1e-4 * want, (path.name, found.group(1), want)


def check_logits(path):
    dump = path / "dump.safetensors"
    program("sample", "-e", path, "-p", PROMPT, "-n", 1, "--dump-logits", dump)
    with torch.no_grad():
        want = reference.load_folder(path)(torch.tensor([reference.encode(path, PROMPT.encode())])).logits[0]
    got = load_file(dump)["logits"]
    assert got.shape == want.shape and got.dtype == torch.float32
    error = reference.relative_error(got, want)
    assert error < 1e-4, (path.name, error)


VARIANTS = dict(
    mlp=dict(num_hidden_layers=2), grouped_mlp=dict(compress="grouped_mlp", gate="q_cond"),
    conv1d=dict(compress="conv1d", gate="static", tie_word_embeddings=False), avgpool=dict(compress="avgpool", v_head_dim=6),
    full=dict(attention="full", num_key_value_heads=1), hybrid=dict(num_hidden_layers=3, full_layers=[1], num_key_value_heads=4),
    moe=dict(MOE, num_hidden_layers=2, first_dense_layers=1, capacity_factor=0.5), moe_k1=dict(MOE, num_experts_per_tok=1))


def test_program_losses():
    for name, changes in VARIANTS.items():
        path = folder("variant_" + name, changes)
        for T in (5, 61, 300):
            check_loss(path, text_file(), T)


def test_program_logits():
    for name, changes in VARIANTS.items():
        check_logits(folder("variant_" + name, changes))


def trained(name, *words):
    out = pathlib.Path(TEMPORARY.name) / name
    program("train_nsa", "-i", text_file(), "-o", out, "-x", 10, "-b", 2, "-t", 160, "-s", 0, "--layers", 2, "--width", 40,
            "--heads", 4, "--kv-heads", 2, "--head-dim", 8, "--cmp-block", 8, "--cmp-stride", 4, "--sel-block", 16,
            "--sel-blocks", 4, "--window", 24, *words)
    return out / "latest"


TRAINED = {"trained": (), "trained_moe": ("--experts", 4, "--shared-experts", 1, "--experts-per-token", 2, "--expert-width", 16,
                                          "--dense-layers", 1, "--gate", "static", "--compress", "avgpool")}


def test_program_checkpoints():
    for name, words in TRAINED.items():
        path = trained(name, *words)
        config = json.loads((path / "config.json").read_text())
        want = json.loads(reference.config_json(reference.SMALL))
        assert set(config) == set(want), set(config) ^ set(want)
        assert [key for key, value in config.items() if value is None] == ["eos_token_id"]
        assert config["architectures"] == want["architectures"] and config["auto_map"] == want["auto_map"]
        assert (path / "modeling_nsa.py").read_bytes() == (ROOT / "scripts" / "modeling_nsa.py").read_bytes()
        check_loss(path, text_file(), 150)
        check_logits(path)
        tokens = torch.tensor([list(PROMPT.encode())])
        model = automodel(path)
        with torch.no_grad():
            assert reference.relative_error(model(tokens).logits, reference.load_folder(path)(tokens).logits) < 1e-5
        assert model.generate(tokens, max_new_tokens=3, do_sample=False).shape == (1, len(PROMPT) + 3)
        with safe_open(path / "state.safetensors", "pt") as state:
            assert len(list(state.keys())) > len(config)


def main():
    tests = [(name, f) for name, f in globals().items() if name.startswith("test_") and (not sys.argv[1:] or name in sys.argv[1:])]
    passed = failed = 0
    for name, f in tests:
        try:
            f()
            print("PASS", name, flush=True)
            passed += 1
        except SkipTest as e:
            print("SKIP", name + ":", e, flush=True)
        except Exception:
            print("FAIL", name, flush=True)
            traceback.print_exc()
            failed += 1
    print("%d passed, %d failed" % (passed, failed))
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
