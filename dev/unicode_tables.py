#!/usr/bin/env python3
"""Prints the Unicode tables that stand in the tokenizer section of train_nsa.c.

    pip install tokenizers unicodedata2==16.0.0     (or Python 3.14, whose unicodedata is 16.0)
    python dev/unicode_tables.py > tables.txt       and paste

The tables must agree with the Hugging Face `tokenizers` package, which uses two Unicode versions: the
regular expressions (Oniguruma) know 16.0, the NFC normaliser knows 9.0. Characters never change their
normal form once they are assigned, so the tables of 9.0 are those of 16.0 without the characters that
came later; which ones those are, the package itself is asked.

A table is a string of numbers, decoded at first use by table_number(). A number is one character if it
is below 60: the printable ASCII characters from '#' on, without '?' and '\\', stand for 0 .. 89, and a
character of 60 or more means (itself - 60) + 30 * the number that follows.
"""
try:
    import unicodedata2 as unicodedata
except ImportError:
    import unicodedata
from tokenizers import Regex, normalizers, pre_tokenizers

ALPHABET = [chr(c) for c in range(35, 127) if chr(c) not in "?\\"]
CODE_POINTS = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
nfc = normalizers.NFC().normalize_str


def number(n):
    return ALPHABET[n] if n < 60 else ALPHABET[60 + n % 30] + number(n // 30)


def signed(n):
    return number(2 * n if n >= 0 else -2 * n - 1)


def ranges(values):
    """{code point: value} as [first, last, value] with equal neighbours joined."""
    out = []
    for c in sorted(values):
        if out and out[-1][1] == c - 1 and out[-1][2] == values[c]:
            out[-1][1] = c
        else:
            out.append([c, c, values[c]])
    return out


def category(letter):
    """Ranges of a general category: gap since the last range, length - 1."""
    values = {c: 1 for c in CODE_POINTS if unicodedata.category(chr(c))[0] == letter}
    split = pre_tokenizers.Split(Regex(r"\p{%s}" % letter), "removed")
    for i in range(0, len(CODE_POINTS), 1000):
        block = CODE_POINTS[i:i + 1000]
        left = set("".join(piece for piece, _ in split.pre_tokenize_str("".join(map(chr, block)))))
        assert all((c in values) == (chr(c) not in left) for c in block), "tokenizers has another Unicode version"
    text, end = "", 0
    for first, last, _ in ranges(values):
        text += number(first - end) + number(last - first)
        end = last + 1
    return text


def combining_classes():
    """Ranges: gap since the last range, length - 1, class. Marks unknown to the package are left out."""
    def known(s):
        return all(nfc("q" + s + m) == unicodedata.normalize("NFC", "q" + s + m) for m in "\u0334\u0345\u0323")
    values = {c: unicodedata.combining(chr(c)) for c in CODE_POINTS if unicodedata.combining(chr(c))}
    text, end = "", 0
    for first, last, value in ranges({c: v for c, v in values.items() if known(chr(c))}):
        text += number(first - end) + number(last - first) + number(value)
        end = last + 1
    return text


def decompositions():
    """c -> a, or a + b: gap since the last c; a, as difference to the last a; kind: 0 for a alone, else
    1 + the place of b in the list of all b, doubled, + 1 if a + b must not be composed to c again."""
    entries = []
    for c in CODE_POINTS:
        parts = [int(x, 16) for x in unicodedata.decomposition(chr(c)).split() if not x.startswith("<")]
        if not parts or unicodedata.decomposition(chr(c)).startswith("<") or 0xAC00 <= c <= 0xD7A3:
            continue
        full = unicodedata.normalize("NFD", chr(c))
        if nfc(full) == unicodedata.normalize("NFC", full):
            entries.append((c, parts, unicodedata.normalize("NFC", chr(c)) != chr(c)))
    seconds = sorted({p[1] for _, p, _ in entries if len(p) == 2}, key=lambda b: -sum(p[1:] == [b] for _, p, _ in entries))
    text, last_c, last_a = number(len(seconds)), 0, 0
    previous = 0
    for b in seconds:
        text += signed(b - previous)
        previous = b
    for c, parts, excluded in entries:
        text += number(c - last_c) + signed(parts[0] - last_a)
        text += number(0 if len(parts) == 1 else 1 + 2 * seconds.index(parts[1]) + excluded)
        last_c, last_a = c, parts[0]
    return text


def literal(name, text, width=118):
    print(f"const char {name}[] =")
    lines = [text[i:i + width - 6] for i in range(0, len(text), width - 6)]
    print("\n".join(f'    "{line}"' for line in lines) + ";")


if __name__ == "__main__":
    print(f"// Made by dev/unicode_tables.py from Unicode {unicodedata.unidata_version}.")
    literal("unicode_letters", category("L"))
    literal("unicode_numbers", category("N"))
    literal("unicode_combining", combining_classes())
    literal("unicode_decompositions", decompositions())
