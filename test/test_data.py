#!/usr/bin/env python3
"""Checks data/ (tales.c, tokenize.py, tinyshakespeare.sh) and the plots of scripts/. Run it as it is, or with pytest:

    python test/test_data.py
"""
import hashlib
import json
import math
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
TEMP = Path(tempfile.mkdtemp(prefix="nsa_test_data_"))
SEPARATOR = "\n\n* * *\n\n"
END_OF_TEXT = "<|endoftext|>"


def call(*command, rc=0, **more):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=120, **more)
    assert done.returncode == rc, f"{command}: exit {done.returncode}, not {rc}: {done.stdout[-500:]}{done.stderr[-500:]}"
    return done.stdout if rc == 0 else done.stderr


def python(script, *arguments, **more):
    return call(sys.executable, ROOT / script, *arguments, **more)


def program(flags=("-O2",)):
    """data/tales, built once for each set of flags."""
    path = TEMP / ("tales" + "".join(flags).replace("/", "_"))
    if not path.exists():
        compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or "cc"
        call(compiler, "-std=gnu11", "-Wall", "-Wextra", "-Werror", *flags, ROOT / "data/tales.c", "-o", path)
    return path


def tales(*arguments, **more):
    return call(program(), *arguments, **more)


def refuses(message, *command, rc=2):
    """The program ends with this code and one line of error that has the message in it."""
    error = call(*command, rc=rc)
    assert error.count("\n") == 1 and message in error, f"{command}: {error!r}"


# ---------------------------------------------------------------------------- tales


def test_tales_are_deterministic():
    short, long = tales("--bytes", "100K", "--seed", 5), tales("--bytes", "400K", "--seed", 5)
    assert long.startswith(short) and 400 * 1024 <= len(long) < 410 * 1024
    assert tales("--bytes", "100K", "--seed", 6) != short
    assert call(program(("-O0",)), "--bytes", "400K", "--seed", 5) == long
    assert call(program(("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")), "--bytes", "400K", "--seed", 5) == long
    # the same bytes on every machine, and in every version: models and results refer to them
    digest = hashlib.sha256(tales("--bytes", "4M", "--seed", 1).encode()).hexdigest()
    assert digest == "d6fdcd1c241a3ea25ab40222954bd1e1c712e4b91928490a15bfc14758f0a10b", digest


def test_tales_make_gives_the_same_text():
    source = TEMP / "make.c"
    source.write_text('#define TALES_NO_MAIN\n#include "data/tales.c"\nint main(void) { int64_t n; char *t = tales_make(5, 100 << 10, &n);\n'
                      "  int whole = t && t[n] == 0; if (t) fwrite(t, 1, (size_t)n, stdout); free(t); return !whole; }\n")
    flags = ["-Wall", "-Wextra", "-Werror", f"-I{ROOT}", source, "-o", TEMP / "make"]
    call("gcc", "-std=gnu11", *flags)
    assert call(TEMP / "make") == tales("--bytes", "100K", "--seed", 5)
    call("g++", "-std=gnu++17", "-x", "c++", *flags)
    assert call(TEMP / "make") == tales("--bytes", "100K", "--seed", 5)


def test_tales_are_english():
    text = tales("--bytes", "4M", "--seed", 2)
    stories = text.split(SEPARATOR)
    assert stories.pop() == ""
    assert not re.search(r"[^\n -~]", text), "more than plain ASCII"
    assert not re.search(r"[\[\]{}<>|^~]", text), "a template showed through"
    an_hour = r"(?!hour\b)(?!honest)"
    for pattern in (r"\b[Aa] [aeiou]", rf"\b[Aa]n {an_hour}[^aeiouAEIOU]", r"  ", r" [,.;:?!]", r"\ba a\b|\bthe the\b|\bthe an?\b|\ban? the\b", r"\.\.(?!\.)(?<!\.\.\.)",
                    r"[.?!] [a-z]", r"\n[a-z]", r"\bhe's\b", r",\.|\?\.|\.\?", r"\n\n\n", r"\b[Tt]he an? ", r"\bsaid s?he\b"):
        found = re.search(pattern, text)
        assert not found, f"{pattern}: {text[max(0, found.start() - 60):found.end() + 60]!r}"
    sizes = []
    for story in stories:
        title, rest = story.split("\n\n", 1)
        assert "\n" not in title and title[0].isupper() and title[-1] not in ".,;", title
        assert story.count('"') % 2 == 0, story
        for paragraph in rest.split("\n\n"):
            assert re.match(r"[A-Z\"']", paragraph) and re.search(r"[.?!][\"']{0,2}$", paragraph), paragraph
            assert paragraph.count('"') % 2 == 0, paragraph
        sizes.append(len(story))
    sizes.sort()
    assert 600 < sizes[len(sizes) // 100] and 1200 < sizes[len(sizes) // 2] < 2500 and 4000 < sizes[-1] < 9000, sizes[:: len(sizes) // 10]
    assert 0.02 < sum(s > 3500 for s in sizes) / len(sizes) < 0.08
    assert len(set(stories)) == len(stories) and len(set(re.findall(r"[a-z]+", text.lower()))) > 1000


def test_what_is_told_early_is_true_late():
    kinds, far = set(), []
    lines = tales("--bytes", "2M", "--seed", 3, "--facts").splitlines()
    for line in lines:
        story = json.loads(line)
        text = story["text"]
        assert text.startswith(story["title"] + "\n\n") and SEPARATOR not in text
        for fact in story["facts"]:
            first, last, words = fact["first"], fact["last"], fact["words"]
            for at in (first, last):
                assert text[at:at + len(words)].lower() == words.lower() and last > first
            kinds.add(fact["kind"])
        far.append(max((f["last"] - f["first"]) / len(text) for f in story["facts"]))
    assert len(kinds) > 12 and min(far) > 0.25 and sum(far) / len(far) > 0.5, (kinds, min(far), sum(far) / len(far))
    # and by reading, without the list of facts
    text = tales("--bytes", "4M", "--seed", 3)
    told = {"hid": 0, "bell": 0, "coat": 0, "message": 0}
    for story in text.split(SEPARATOR):
        early = re.search(r"s?he hid the \w+(?: \w+)?? ((?:behind|beneath|between|in|inside|on|under|up) [a-z' ]+?) and told nobody", story)
        if early:
            told["hid"] += 1
            assert f'"It is {early[1]}."' in story
        early = re.search(r"(\w+) strokes, then a rest", story)
        if early:
            told["bell"] += 1
            assert f"Then I counted {early[1].lower()}," in story
        early = re.search(r", (\w+) wore an? ([a-z]+ [a-z]+)\b", story)
        if early:
            told["coat"] += 1
            assert re.search(f"the {early[2]} ", story[early.end():], re.I), story
        early = re.search(r"and say this: ('[^\"]+')", story)
        if early:
            told["message"] += 1
            assert story.count(early[1]) == 2
    assert all(n > 20 for n in told.values()), told


def check_task(item, length):
    assert len(item["text"]) == length and item["text"].isascii()
    for q in item.get("queries", [item]):
        fact = item["text"][q["needle_offset"]:].split("\n\n")[0]
        assert q["answer"] in fact and item["text"].count(fact) == 1 and math.isclose(q["depth"], q["needle_offset"] / length, abs_tol=1e-4)
        assert q["needle_offset"] == 0 or item["text"][:q["needle_offset"]].endswith("\n\n")
        words = [w for w in re.findall(r"\w+", q["question"]) if w not in "What Where Who is are the of kept".split()]
        assert all(w in fact for w in words), (fact, q)


def test_needles_lie_where_they_should():
    for length, depth, count in ((8192, 0.35, 10), (1024, 0, 3), (1024, 1, 3), (300000, 0.5, 2), (65536, 0.9, 3)):
        lines = tales("--task", "needle", "--length", length, "--depth", depth, "--count", count, "--seed", 3).splitlines()
        assert len(lines) == count
        for line in lines:
            item = json.loads(line)
            check_task(item, length)
            assert abs(item["depth"] - depth) < 600 / length, (length, depth, item["depth"])
    depths = [json.loads(line)["depth"] for line in tales("--task", "needle", "--length", 4096, "--count", 40).splitlines()]
    assert min(depths) < 0.15 and max(depths) > 0.8
    text = tales("--task", "needle", "--length", 2048, "--depth", 0.5, "--count", 2, "--seed", 3, "--format", "text")
    items = [json.loads(line) for line in tales("--task", "needle", "--length", 2048, "--depth", 0.5, "--count", 2, "--seed", 3).splitlines()]
    assert text == "".join(f"{i['text']}\n\nQuestion: {i['question']}\nAnswer: {i['answer']}{SEPARATOR}" for i in items)


def test_recall_asks_for_many_facts():
    for line in tales("--task", "recall", "--length", 8192, "--queries", 8, "--pairs", 20, "--count", 5).splitlines():
        item = json.loads(line)
        check_task(item, 8192)
        assert len(item["queries"]) == 8 and item["pairs"] == 20 == len(re.findall(r"The number of the [a-z -]+ is \d{4}\.", item["text"]))
        assert len({q["question"] for q in item["queries"]}) == 8
    text = tales("--task", "recall", "--length", 4096, "--queries", 3, "--format", "text")
    assert text.count("Question: ") == 3 == text.count("\nAnswer: ") and text.endswith(SEPARATOR)


def test_tales_refuses_bad_options():
    t = program()
    for message, options in (("--foo", ["--foo"]), ("--bytes", ["--bytes"]), ("--bytes", ["--bytes", "12x"]), ("--bytes", ["--bytes", "99999999999999G"]), ("--seed", ["--seed", "-1"]),
                             ("--depth", ["--task", "needle", "--depth", "1.5"]), ("--task", ["--task", "hay"]), ("--length", ["--length", "500"]),
                             ("--queries", ["--task", "recall", "--queries", "9", "--pairs", "8"]), ("--format", ["--task", "needle", "--format", "xml"]),
                             ("--length", ["--task", "recall", "--length", "300"]), ("--bytes", ["--task", "needle", "--bytes", "4K"])):
        refuses(message, t, *options)
    refuses("cannot open", t, "-o", "/nonexistent/tales.txt", rc=1)
    if os.path.exists("/dev/full"):
        refuses("cannot write", t, "-o", "/dev/full", rc=1)
    assert "--task" in tales("--help")
    tales("-o", TEMP / "out.txt", "--bytes", "10K")
    assert (TEMP / "out.txt").read_text() == tales("--bytes", "10K")


# ---------------------------------------------------------------------------- tokenize.py


def read_bin(path):
    data = Path(path).read_bytes()
    header = struct.unpack("<256i", data[:1024])
    assert header[0] == 20240520 and header[1] in (1, 2) and not any(header[3:])
    tokens = np.frombuffer(data[1024:], {1: "<u2", 2: "<u4"}[header[1]])
    assert len(tokens) == header[2]
    return header[1], tokens.astype(int).tolist()


def read_bins(folder, name):
    paths = sorted(Path(folder).glob(f"{name}_*.bin"))
    assert paths and not list(Path(folder).glob("*.part"))
    return [token for path in paths for token in read_bin(path)[1]]


CHINESE = "从前有一个小村庄，村里住着一位老人。他每天都在河边钓鱼，从不说话。\n" * 40


def test_tokens_decode_to_the_text():
    from tokenizers import Tokenizer

    text = tales("--bytes", "300K", "--seed", 8) + CHINESE + "naïve café — 🦉 1234567 it's THEY'LL\t\ttabs\n\n\n   end"
    (TEMP / "a.txt").write_text(text, encoding="utf-8")
    (TEMP / "b.txt").write_text("A second document, short.\n", encoding="utf-8")
    for pattern in ("gpt2", "llama3", "qwen2"):
        out = TEMP / f"tokens_{pattern}"
        python("data/tokenize.py", "train", TEMP / "a.txt", TEMP / "b.txt", "--vocab", 1000, "--pattern", pattern, "--shard-tokens", 50000, "-o", out)
        tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
        end = tokenizer.token_to_id(END_OF_TEXT)
        assert tokenizer.get_vocab_size() == 1000 and end is not None
        train, val = read_bins(out, "train"), read_bins(out, "val")
        assert len(list(out.glob("train_*.bin"))) > 1 and train[0] == end and val[0] == end and train.count(end) == 1 and val.count(end) == 2
        decode = lambda ids: tokenizer.decode([i for i in ids if i != end], skip_special_tokens=False)
        both = (TEMP / "a.txt").read_bytes() + (TEMP / "b.txt").read_bytes()
        assert (decode(train) + decode(val)).encode() == both
        assert 0 <= len(decode(train).encode() ) - int(0.9 * len(both)) < 4
        assert train == [end] + tokenizer.encode(decode(train)).ids
    # a given tokenizer, files of their own to validate on, documents within a file
    out = TEMP / "tokens_given"
    python("data/tokenize.py", "encode", "--tokenizer", TEMP / "tokens_gpt2/tokenizer.json", TEMP / "a.txt", "--val", TEMP / "b.txt", "--split-on", r"\n\n* * *\n\n", "-o", out, "-q")
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    end = tokenizer.token_to_id(END_OF_TEXT)
    documents = text.split(SEPARATOR)
    assert read_bins(out, "train") == [i for d in documents for i in [end] + tokenizer.encode(d).ids]
    assert read_bins(out, "val") == [end] + tokenizer.encode("A second document, short.\n").ids


def test_a_long_document_is_cut_where_it_does_not_matter():
    sys.path.insert(0, str(ROOT / "data"))
    import importlib.util

    spec = importlib.util.spec_from_file_location("nsa_tokenize", ROOT / "data/tokenize.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.pop(0)
    from tokenizers import Tokenizer

    module.PIECE = 5000
    text = (TEMP / "a.txt").read_text(encoding="utf-8") if (TEMP / "a.txt").exists() else tales("--bytes", "300K")
    path = TEMP / "long.txt"
    path.write_text(CHINESE * 3 + text, encoding="utf-8")
    parts = list(module.documents([(path, 0, path.stat().st_size)], None))
    assert len(parts) > 50 and "".join(p for p, _ in parts) == path.read_text(encoding="utf-8") and [f for _, f in parts].count(True) == 1
    for pattern in ("gpt2", "llama3", "qwen2"):
        folder = TEMP / f"tokens_{pattern}"
        if not folder.exists():
            continue
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        assert [i for p, _ in parts for i in tokenizer.encode(p).ids] == tokenizer.encode(path.read_text(encoding="utf-8")).ids
    separated = list(module.documents([(path, 0, path.stat().st_size)], SEPARATOR))
    assert [f for _, f in separated].count(True) == path.read_text(encoding="utf-8").count(SEPARATOR) + 1


def test_large_vocabularies_take_four_bytes():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = sorted(pre_tokenizers.ByteLevel.alphabet()) + [f"<word{i}>" for i in range(66000)]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    tokenizer.save(str(TEMP / "large.json"))
    (TEMP / "large.txt").write_text("one two three " * 20)
    python("data/tokenize.py", "encode", "--tokenizer", TEMP / "large.json", TEMP / "large.txt", "-o", TEMP / "large")
    version, tokens = read_bin(TEMP / "large/train_000000.bin")
    assert version == 2 and tokens[0] == len(words) == 66256, "the end of text, whose number needs more than 16 bits, comes first"
    train_text = (TEMP / "large.txt").read_text()[:int(0.9 * 280)]
    assert tokenizer.decode(list(tokens[1:])) == train_text


def test_tokenize_refuses_bad_input():
    script, a = [sys.executable, ROOT / "data/tokenize.py"], TEMP / "plain.txt"
    a.write_text("some text to learn from " * 50)
    (TEMP / "latin.txt").write_bytes(b"caf\xe9 " * 20)
    (TEMP / "empty.txt").write_bytes(b"")
    out = ["-o", TEMP / "refused", "-q"]
    refuses("is not a file", *script, "train", TEMP / "nothing.txt", *out, rc=1)
    refuses("not UTF-8", *script, "train", TEMP / "latin.txt", *out, rc=1)
    refuses("empty", *script, "train", TEMP / "empty.txt", *out, rc=1)
    refuses("--vocab", *script, "train", a, "--vocab", "100", *out)
    refuses("--tokenizer", *script, "encode", a, *out)
    kept = TEMP / "kept"
    python("data/tokenize.py", "train", a, "--vocab", "300", "-o", kept, "-q")
    before = {path.name: path.read_bytes() for path in kept.iterdir()}
    refuses("not UTF-8", *script, "encode", a, TEMP / "latin.txt", "--tokenizer", kept / "tokenizer.json", "-o", kept, "-q", rc=1)
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before, "a failed run leaves the earlier run's files alone"
    refuses("not a tokenizer.json", *script, "encode", a, "--tokenizer", a, *out, rc=1)
    refuses("unrecognized", *script, "train", a, "--wrong", *out)
    refuses("plain.txt", *script, "train", a, "--vocab", "260", "-o", a, "-q", rc=1)


# ---------------------------------------------------------------------------- tinyshakespeare.sh


def test_tinyshakespeare_checks_what_lies_there():
    folder = TEMP / "shakespeare"
    folder.mkdir()
    shutil.copy(ROOT / "data/tinyshakespeare.sh", folder)
    (folder / "tinyshakespeare.txt").write_text("To be or not to be")
    refuses("not the expected text", "sh", folder / "tinyshakespeare.sh", rc=1)


# ---------------------------------------------------------------------------- pictures


def write_log(path, steps=600, layers=4, experts=0, seed=0, full=()):
    rng = random.Random(seed)
    with open(path, "w") as file:
        for step in range(1, steps + 1):
            loss = 1.2 + 0.1 * seed + 4.2 * math.exp(-step / 60) + 0.9 * math.exp(-step / 400)
            row = {"step": step, "loss": loss + rng.gauss(0, 0.06), "lr": 1e-3 * min(step / 40, 0.55 + 0.45 * math.cos(math.pi * step / steps)),
                   "grad_norm": math.exp(rng.gauss(0, 0.25)) * (0.4 + 3 * math.exp(-step / 30)), "tokens": 4096 * step, "tok/s": 20000.0, "ms": 200.0, "mem": 10**8, "ranks": 1}
            if step % 50 == 0 or step == steps:
                row["val_loss"] = loss + 0.05
                row["gates"] = [None if n in full else [0.12 + 0.3 * (1 - math.exp(-step / (150 + 60 * n))), 0.12 + 0.08 * n * step / steps, 0.88 - 0.1 * n * step / steps] for n in range(layers)]
                if experts:
                    load = [[1 + 0.5 * math.sin(e + step / (90 + 20 * n)) for e in range(experts)] for n in range(layers)]
                    row["moe_load"] = [None if n == 0 else [x / sum(l) for x in l] for n, l in enumerate(load)]
            file.write(json.dumps(row) + "\n")


def write_dump(path, T=1500, layers=3, H=4, KV=2, block=16, n=8, seed=0):
    """A dump in the format of ./sample --dump-attention, with choices as a trained model might make them."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(seed)
    tensors = {"tokens": rng.integers(0, 256, T).astype(np.int32)}
    for layer in range(layers):
        index = np.full((T, KV, n), -1, np.int32)
        for kv in range(KV):
            liking = rng.gamma(0.3 + 0.3 * layer, size=-(-T // block))
            for t in range(T):
                now = t // block
                forced = {0, now, max(0, now - 1)}
                score = liking[: now + 1] * np.exp(-(now - np.arange(now + 1)) / (8 + 40 * kv)) + 0.02 * rng.random(now + 1)
                order = [j for j in np.argsort(-score, kind="stable") if j not in forced]
                taken = sorted(forced | set(order[: n - len(forced)]))
                index[t, kv, : len(taken)] = taken
        tensors[f"model.layers.{layer}.self_attn.block_idx"] = index
        wave = np.sin(np.arange(T)[:, None, None] / 130 + np.arange(3) * 2 + np.arange(H)[:, None] / 2)
        tensors[f"model.layers.{layer}.self_attn.gates"] = (0.5 + 0.3 * wave + 0.05 * rng.standard_normal((T, H, 3))).clip(0, 1).astype(np.float32)
    config = {"model_type": "nsa", "sel_block": block, "sel_blocks": n, "sel_init_blocks": 1, "sel_local_blocks": 2}
    save_file(tensors, str(path), metadata={"config": json.dumps(config)})


def is_picture(path, least=40000):
    data = Path(path).read_bytes()
    return data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > least


def test_log_pictures():
    one, two = TEMP / "one.jsonl", TEMP / "two.jsonl"
    write_log(one, full=(1,))
    write_log(two, experts=8, layers=5, seed=1)
    python("scripts/plot_log.py", one, "-o", TEMP / "one.png")
    python("scripts/plot_log.py", one, two, "-o", TEMP / "two.png")
    assert is_picture(TEMP / "one.png") and is_picture(TEMP / "two.png")
    with open(one, "a") as file:
        file.write('{"step":601,"loss":2.')
    done = subprocess.run([sys.executable, ROOT / "scripts/plot_log.py", one, "-o", TEMP / "cut.png"], capture_output=True, text=True)
    assert done.returncode == 0 and "half written" in done.stderr and is_picture(TEMP / "cut.png")
    write_log(TEMP / "few.jsonl", steps=2)
    python("scripts/plot_log.py", TEMP / "few.jsonl", "-o", TEMP / "few.png")
    script = [sys.executable, ROOT / "scripts/plot_log.py"]
    for text in ("", "not json\n{}\n", "[1]\n"):
        (TEMP / "bad.jsonl").write_text(text)
        refuses("bad.jsonl", *script, TEMP / "bad.jsonl", "-o", TEMP / "bad.png", rc=1)
    refuses("nothing.jsonl", *script, TEMP / "nothing.jsonl", "-o", TEMP / "bad.png", rc=1)
    refuses("/nonexistent", *script, two, "-o", "/nonexistent/a.png", rc=1)


def test_speed_picture():
    table = TEMP / "speed.txt"
    table.write_text("model         T        tok/s  ms a step        GB    MFU\nfull       1024       480076       1092     124.5   0.49\n"
                     "nsa        1024       324410       1616      74.6   0.37\nfull      65536 failed: no memory\nnsa       65536       156578       3348      74.6   0.25\n")
    python("scripts/plot_speed.py", table, "--peer", "llm.c: 1024=493e3 8192=305e3", "-o", TEMP / "speed.png")
    assert is_picture(TEMP / "speed.png")
    attention = TEMP / "attention.txt"
    attention.write_text("attention               T   forward ms  backward ms       GB\nnsa                  1024        0.220        0.690    0.324\n"
                         "trained-0            1024        0.217        0.669\ntrained-1            1024        0.194        0.650\ncuDNN                1024        0.146        0.319\n"
                         "nsa               1048576 failed: out of memory\n")
    python("scripts/plot_speed.py", table, "--attention", attention, "-o", TEMP / "both.png")
    assert is_picture(TEMP / "both.png")
    script = [sys.executable, ROOT / "scripts/plot_speed.py"]
    refuses("--peer", *script, table, "--peer", "llm.c 1024", "-o", TEMP / "bad.png", rc=1)
    refuses("nothing.txt", *script, TEMP / "nothing.txt", "-o", TEMP / "bad.png", rc=1)
    refuses("no row", *script, table, "--attention", table, "-o", TEMP / "bad.png", rc=1)
    table.write_text("full      65536 failed: no memory\n")
    refuses("no row", *script, table, "-o", TEMP / "bad.png", rc=1)


def test_step_profile():
    profile = [sys.executable, ROOT / "dev/profile_step.py"]

    def of(path):
        return subprocess.run([*profile, path], capture_output=True, text=True, check=True).stdout.splitlines()

    # ncu's launches: one step and a validation
    launches = TEMP / "launches.csv"
    head = '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
    row = '"{}","{}","gpu__time_duration.sum","{}","{}"\n'
    launches.write_text("==PROF== Connected\n" + head + row.format(0, "void wide_kernel<float, 8>(float *, long)", "us", "1,500.0") +
                        row.format(1, "adamw_kernel(int)", "ns", "500000") + row.format(2, "void wide_kernel<float, 8>(float *, long)", "ms", "2") +
                        row.format(3, "adamw_kernel(int)", "ns", "0") + row.format(4, "embed_kernel(int)", "ms", "7"))
    done = of(launches)
    assert done[0] == "4.0 ms and 4 launches a step, 1 step" and done[1].split()[:4] == ["87.5%", "3.500", "ms", "2"]
    assert done[1].endswith("wide_kernel<float, 8>") and len(done) == 3
    # a trace: the first step does not count; two kernels at once, one within another, a copy between AdamW's kernels, gaps of 100 and 200
    trace = TEMP / "trace.csv"
    trace.write_text("".join(f'{begin}000000,{end}000000,"{name}"\n' for begin, end, name in [
        (0, 50, "embed_kernel(int, float)"), (60, 70, "adamw_kernel(int)"), (80, 100, "adamw_kernel(int)"),
        (200, 300, "embed_kernel(int, float)"), (250, 500, "void wide_kernel<float, 8>(float *, long)"), (260, 310, "copy"),
        (700, 800, "adamw_kernel(int)"), (800, 820, "copy"), (820, 900, "adamw_kernel(int)"),
        (900, 990, "embed_kernel(int, float)"), (991, 999, "wide_kernel")]))
    done = of(trace)
    assert done[0] == "700.0 ms and 6 launches a step, 1 step"
    assert [line.split()[0] for line in done[1:5]] == ["35.7%", "25.7%", "14.3%", "10.0%"] and done[1].endswith("wide_kernel<float, 8>")
    assert done[5].split()[:6] == ["28.6%", "200.000", "ms", "no", "kernel", "runs;"]
    assert done[6].split()[:2] == ["28.6%", "200.000"] and done[6].endswith("from wide_kernel<float, 8> to adamw_kernel") and len(done) == 7
    refuses("neither a trace nor", *profile, TEMP / "speed.txt", rc=1)
    trace.write_text('0,1,"embed_kernel"\n')
    refuses("no step", *profile, trace, rc=1)


def test_attention_pictures():
    write_dump(TEMP / "dump.safetensors")
    python("scripts/attention_map.py", TEMP / "dump.safetensors", "-o", TEMP / "map.png")
    python("scripts/attention_map.py", TEMP / "dump.safetensors", "--layers", "1", "-o", TEMP / "map1.png")
    assert is_picture(TEMP / "map.png") and is_picture(TEMP / "map1.png", 20000)
    write_dump(TEMP / "tiny.safetensors", T=5, layers=1)
    python("scripts/attention_map.py", TEMP / "tiny.safetensors", "-o", TEMP / "tiny.png")
    script = [sys.executable, ROOT / "scripts/attention_map.py"]
    (TEMP / "bad.safetensors").write_bytes(b"\xff" * 100)
    refuses("bad.safetensors", *script, TEMP / "bad.safetensors", "-o", TEMP / "bad.png", rc=1)
    refuses("is not a file", *script, TEMP / "nothing.safetensors", "-o", TEMP / "bad.png", rc=1)
    refuses("layer 7", *script, TEMP / "dump.safetensors", "--layers", "7", "-o", TEMP / "bad.png", rc=1)


def main():
    passed, failed = 0, 0
    for name, test in list(globals().items()):
        if name.startswith("test_"):
            try:
                test()
                passed += 1
                print(f"ok    {name[5:].replace('_', ' ')}")
            except Exception as error:
                failed += 1
                print(f"FAIL  {name[5:].replace('_', ' ')}: {type(error).__name__} {error}")
                traceback.print_exc()
    if failed or os.environ.get("KEEP"):
        print(f"files are in {TEMP}")
    else:
        shutil.rmtree(TEMP)
    print(f"{passed} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
