#!/usr/bin/env python3
"""Writes the tokenizers that test/test_io.c reads, and what Hugging Face `tokenizers` makes of some texts.

    pip install tokenizers
    python dev/tokenizer_fixtures.py TEXT_FILE      e.g. data/tinyshakespeare.txt

writes test/fixtures/tokenizer_{gpt2,llama3,qwen2}.json and test/fixtures/tokenizer_cases.json.
"""
import json
import os
import random
import sys

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
ENDS = {"gpt2": "<|endoftext|>", "llama3": "<|end_of_text|>", "qwen2": "<|endoftext|>"}

MIXED = [
    "",
    "Hello, world! It's 2024; they'll say WE'RE, I'VE, he'D, you'LL, SHE'S, it'\u017f, 'T was.",
    "the cafe\u0301 is the caf\u00e9; \u212bngstr\u00f6m is A\u030angstro\u0308m; q\u0323\u0307 is q\u0307\u0323; \u1e9b\u0323",
    "人之初,性本善。性相近,習相遠。苟不教,性乃遷。 \u3000全角 空白",
    "اللغة العربية جميلة ١٢٣٤٥٦ ۱۲۳ \u0651\u064e\u064b",
    "हिन्दी में १२३४५ और \u0915\u093c \u0958; தமிழ்; ไทย ๑๒๓๔; ខ្មែរ",
    "한국어 \u1112\u1161\u11ab\u1100\u1173\u11af \uac00\u11a8 \u1100\u1161 \ud4db",
    "Здравствуй, мир! Ελληνικά \u0391\u0301 עברית \u05d1\u05bc\u05b0",
    "🙂👍🏽👨‍👩‍👧‍👦🇩🇪 ❤️ 1️⃣ \U0001f9ea\u200d",
    "a\u00a0b \u2003 c\u3000\u3000d\u0085e\u2028f\u202fg\u1680h\ufeffi\u200bj\u180ek",
    "one\r\ntwo\n\nthree\r\r\nfour \n  five\t\n\t six   \n\n   seven \r\n",
    "   leading, trailing   ", " ", "  ", "\n", "\r\n\r\n  ", "\t\tx", " \n x", "x \n", "...\n\n...\r\n!", " ...\n a",
    "\x00\x01\x02 \x1b[31m \x7f\x80\x9f \x1c\x1d\x1e\x1f \x0b\x0c",
    "1 12 123 1234 12345 1234567890 3.14159 1,000,000 ½ ² Ⅷ ㊿ 四 \U0001d7d8\U0001d7d9",
    "for (int i = 0; i < n; i++) { x[i] += 'a'; } // it's\n\tif(!p)return\"''\";",
    "''''s 's'S'ſ'ſſ 're're'Re'rE 'l'll 'LL'd'D'm'M 'v've",
    "<|endoftext|>a<|endoftext|> b <|end_of_text|><|begin_of_text|>x<|im_start|>user\nhi<|im_end|><|endoftext",
    "forsooth, the king forsooth forsoothly",
    "<tool> the <tool>tool</tool> x",
    "<|endoftext|>\u0338 <|im_end|>\u0301 \u0338<|endoftext|>",
    "\ud7fb\ue000\ufffd\uffff\U0010ffff \U000105c9\u1c89\U00010d40 \U00016d68",
    "ﬁ ﬀ ǆ ß İ ı ſ K Å Ω \u0344 \u0f77 \u0fb2\u0f81 \u09c7\u09be \u0b47\u0b3e \U0001d15f \u2adc \ufb1d",
]


def random_text(rng):
    """Strings that put the interesting characters next to each other."""
    pools = ["abstredvlmSTREDVLM'", " \t\n\r", "\u00a0\u3000\u0085\u2028\x0b\x0c\x1c", "0123456789\u0661\u0967\u00bd", ".,!?-+<|>\"'`~",
             "\u0301\u0300\u0323\u0327\u0338\u0345\u05b0\u0651\u093c\u1dce\u302a", "éüñçåÅøẛſK", "中文字語かなカナ한국", "\u1100\u1161\u11a8\uac00\uac01",
             "🙂👍🏽\u200d\ufe0f", "абвΑΒΓאבגابت", "\x00\x01\x7f\x80"]
    out = []
    for _ in range(rng.randint(1, 40)):
        kind = rng.random()
        if kind < 0.9:
            pool = rng.choice(pools)
            out.append("".join(rng.choice(pool) for _ in range(rng.randint(1, 4))))
        elif kind < 0.95:
            c = rng.randrange(0x110000 - 0x800)
            out.append(chr(c if c < 0xD800 else c + 0x800))
        else:
            out.append(rng.choice(["'s", "'LL", "<|endoftext|>", " the", "ing", "\r\n", "forsooth", "<tool>"]))
    return "".join(out)


def build(kind, texts):
    """A tokenizer of 600 tokens as its JSON tree."""
    tokenizer = Tokenizer(models.BPE())
    if kind == "gpt2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    else:
        pattern = Regex(LLAMA3 if kind == "llama3" else QWEN2)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tree = json.loads(tokenizer.to_str())
    if kind == "gpt2":  # the old way to write merges
        tree["model"]["merges"] = [" ".join(pair) for pair in tree["model"]["merges"]]
    if kind == "llama3":  # a word that only ignore_merges can find
        tree["model"]["ignore_merges"] = True
        tree["model"]["vocab"]["\u0120forsooth"] = len(tree["model"]["vocab"])
    tokenizer = Tokenizer.from_str(json.dumps(tree))
    tokenizer.add_special_tokens([ENDS[kind], "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("cafe\u0301", normalized=True)])
    new = json.loads(tokenizer.to_str())
    new["model"]["merges"] = tree["model"]["merges"]
    return new


def main():
    fixtures = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "test", "fixtures")
    text = open(sys.argv[1], encoding="utf-8").read()
    rng = random.Random(1)
    cases = MIXED + [text[i:i + 200] for i in range(0, 200000, 50000)] + [random_text(rng) for _ in range(60)]
    out = {"cases": [{"text": case} for case in cases]}
    for kind in ENDS:
        tree = build(kind, [text[:300000]] + 30 * MIXED)
        path = os.path.join(fixtures, f"tokenizer_{kind}.json")
        with open(path, "w", encoding="utf-8") as f:
            json.dump(tree, f, ensure_ascii=False, separators=(",", ":"))
        tokenizer = Tokenizer.from_file(path)
        for case in out["cases"]:
            case[kind] = tokenizer.encode(case["text"], add_special_tokens=False).ids
    with open(os.path.join(fixtures, "tokenizer_cases.json"), "w") as f:
        json.dump(out, f, separators=(",", ":"))


if __name__ == "__main__":
    main()
