#!/usr/bin/env python3
"""Turn text into token files for train_nsa, with Hugging Face `tokenizers`.

    # a vocabulary of your own, then the token files
    python data/tokenize.py train book.txt --vocab 4096 -o tokens/
    ./train_nsa -i 'tokens/train_*.bin' -j 'tokens/val_*.bin' ...

    # a given vocabulary, such as GPT-2's tokenizer.json
    python data/tokenize.py encode --tokenizer gpt2/tokenizer.json *.txt -o tokens/

Every file is a document; --split-on cuts files into more. <|endoftext|> stands between documents.
Files are read in pieces, so they may be larger than the memory. The shards are llm.c's .bin files:
256 int32 (magic 20240520, version, number of tokens), then uint16 tokens (version 1), or uint32
(version 2) for vocabularies over 65536.
"""
import os
import sys

if __name__ == "__main__":  # this file has the name of a standard module, and must not be imported in its stead
    sys.path[:] = [p for p in sys.path if os.path.realpath(p or ".") != os.path.dirname(os.path.realpath(__file__))]

import argparse
import codecs
import unicodedata
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"
MAGIC, HEADER = 20240520, 256
PIECE = 1 << 20  # bytes read at a time, and about the longest text that is encoded in one go

PATTERNS = {  # how text is cut into words before merging; None: the built-in one of GPT-2
    "gpt2": None,
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def die(message, code=1):
    print("tokenize.py: " + " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(code)


def pieces(path, begin, end, progress=None):
    """The bytes [begin, end) of a file as text, in pieces of about PIECE bytes."""
    decode = codecs.getincrementaldecoder("utf-8")("strict").decode
    with open(path, "rb") as file:
        file.seek(begin)
        at = begin
        while at < end:
            data = file.read(min(PIECE, end - at))
            if not data:
                die(f"{path} became shorter while it was read")
            at += len(data)
            try:
                text = decode(data, at >= end)
            except UnicodeDecodeError as error:
                die(f"{path} is not UTF-8: {error.reason} near byte {at - len(data) + error.start}")
            if progress is not None:
                progress.update(len(data))
            if text:
                yield text


def documents(spans, split_on, progress=None):
    """Yields (text, is_first_piece_of_a_document). A long document comes in several pieces
    (see last_cut)."""
    for path, begin, end in spans:
        rest, first = "", True
        for text in pieces(path, begin, end, progress):
            rest += text
            while split_on:
                i = rest.find(split_on)
                if i < 0:
                    break
                if rest[:i].strip():
                    yield rest[:i], first
                rest, first = rest[i + len(split_on):], True
            if len(rest) > PIECE:
                i = last_cut(rest, len(rest) - len(split_on or ""))
                if i > 0:
                    yield rest[:i], first
                    rest, first = rest[i:], False
        if rest.strip() or (rest and not first):
            yield rest, first


def last_cut(text, most):
    """The last place before `most` between a letter and a blank, or a letter and punctuation as in Chinese: every
    split pattern cuts there, so that the tokens are the same as of the whole text. 0: there is none."""
    for i in range(most - 1, 0, -1):
        c = text[i]
        if text[i - 1].isalpha() and (c.isspace() or (not c.isascii() and unicodedata.category(c)[0] == "P")):
            return i
    return 0


def split_spans(paths, fraction):
    """Cut the files, taken as one row of bytes, at `fraction` of them, between two characters."""
    sizes = [os.path.getsize(path) for path in paths]
    left = int(fraction * sum(sizes))
    train, val = [], []
    for path, size in zip(paths, sizes):
        cut = min(left, size)
        left -= cut
        if 0 < cut < size:
            with open(path, "rb") as file:
                file.seek(cut)
                while cut < size and (file.read(1) or b"a")[0] & 0xC0 == 0x80:
                    cut += 1
        if cut > 0:
            train.append((path, 0, cut))
        if cut < size:
            val.append((path, cut, size))
    return train, val


class Shards:
    """Writes tokens to NAME_000000.bin.part, NAME_000001.bin.part...; they get their names only when all are whole."""

    def __init__(self, folder, name, vocab, shard_tokens):
        import numpy

        self.numpy, self.folder, self.name, self.most = numpy, Path(folder), name, shard_tokens
        self.version, self.dtype = (1, "<u2") if vocab <= 65536 else (2, "<u4")
        self.total, self.parts, self.file = 0, [], None

    def write(self, ids):
        array = self.numpy.asarray(ids, dtype=self.dtype)
        while len(array):
            if self.file is None:
                self.parts.append(self.folder / f"{self.name}_{len(self.parts):06d}.bin.part")
                self.file, self.count = open(self.parts[-1], "wb"), 0
                self.file.write(bytes(4 * HEADER))
            some = array[: self.most - self.count]
            self.file.write(some.tobytes())
            self.count += len(some)
            self.total += len(some)
            array = array[len(some):]
            if self.count == self.most:
                self.close()

    def close(self):
        if self.file is None:
            return
        header = self.numpy.zeros(HEADER, dtype="<i4")
        header[:3] = MAGIC, self.version, self.count
        self.file.seek(0)
        self.file.write(header.tobytes())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.file = None

    def publish(self):
        for part in self.parts:
            os.replace(part, part.with_suffix(""))
        self.parts = []

    def drop(self):
        for part in self.parts:
            part.unlink(missing_ok=True)
        if self.file is not None:
            try:
                self.file.close()
            except OSError:     # the disk is full, as the error before this one said
                pass


def bar(spans, what, quiet):
    from tqdm import tqdm

    total = sum(end - begin for _, begin, end in spans)
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, unit_divisor=1024, disable=quiet)


def train_tokenizer(spans, args):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    pattern = PATTERNS[args.pattern]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    tokenizer.pre_tokenizer = byte_level if pattern is None else pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), behavior="isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=args.vocab, special_tokens=[END_OF_TEXT], show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    with bar(spans, "learn", args.quiet) as progress:
        tokenizer.train_from_iterator((text for text, _ in documents(spans, args.split_on, progress)), trainer)
    return tokenizer


def load_tokenizer(path):
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        die(f"{path} is not a tokenizer.json that `tokenizers` reads: {error}")


def encode(tokenizer, spans, shards, args):
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    if end_of_text is None:
        die(f"the tokenizer has no {END_OF_TEXT} token, which stands between documents")
    batch = []

    def flush():
        texts = [text for text, _ in batch]
        for encoding, (_, first) in zip(tokenizer.encode_batch(texts, add_special_tokens=False), batch):
            if first:
                shards.write([end_of_text])
            shards.write(encoding.ids)
        batch.clear()

    held = 0
    with bar(spans, shards.name, args.quiet) as progress:
        for text, first in documents(spans, args.split_on, progress):
            batch.append((text, first))
            held += len(text)
            if held >= 4 * PIECE:
                flush()
                held = 0
        flush()
    shards.close()


def parse(argv):
    parser = argparse.ArgumentParser(prog="tokenize.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: die(message + "; see --help", 2)
    commands = parser.add_subparsers(dest="command", required=True, metavar="train|encode")
    for name, text in (("train", "learn a byte-level BPE from the text, then encode it"), ("encode", "encode with a given tokenizer.json")):
        sub = commands.add_parser(name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.error = parser.error
        sub.add_argument("files", nargs="+", help="UTF-8 text files")
        sub.add_argument("-o", "--out", required=True, help="folder for train_*.bin, val_*.bin and tokenizer.json")
        sub.add_argument("--val", nargs="+", default=[], metavar="FILE", help="validation text; without it the last part of the bytes")
        sub.add_argument("--train-fraction", type=float, default=0.9, help="share of the bytes to train on, without --val")
        sub.add_argument("--split-on", default=None, metavar="TEXT", help=r"what separates documents within a file, such as '\n\n' for a blank line")
        sub.add_argument("--shard-tokens", type=int, default=100_000_000, help="most tokens in a .bin file")
        sub.add_argument("-q", "--quiet", action="store_true", help="no progress bars")
        if name == "train":
            sub.add_argument("--vocab", type=int, default=8192, help="size of the vocabulary, special token included")
            sub.add_argument("--pattern", choices=sorted(PATTERNS), default="gpt2", help="how text is split into words")
        else:
            sub.add_argument("--tokenizer", required=True, metavar="FILE", help="a tokenizer.json")
    args = parser.parse_args(argv)
    if args.split_on is not None:
        args.split_on = args.split_on.replace("\\n", "\n").replace("\\t", "\t")
        if not args.split_on:
            die("--split-on is empty", 2)
    if not 0 < args.train_fraction <= 1:
        die("--train-fraction is more than 0 and at most 1", 2)
    if not 1 <= args.shard_tokens < 2**31:
        die("--shard-tokens is from 1 to 2147483647", 2)
    if args.command == "train" and not 257 <= args.vocab <= 1 << 24:
        die(f"--vocab is from 257 (256 bytes and {END_OF_TEXT}) to {1 << 24}", 2)
    return args


def main(argv=None):
    args = parse(argv)
    try:
        import numpy  # noqa: F401
        import tokenizers  # noqa: F401
        import tqdm  # noqa: F401
    except ImportError as error:
        die(f"{error}; install with: pip install tokenizers tqdm numpy")
    written = []
    try:
        for path in args.files + args.val:
            if not os.path.isfile(path):
                die(f"{path} is not a file")
        train, val = split_spans(args.files, 1.0 if args.val else args.train_fraction)
        if args.val:
            val = split_spans(args.val, 0.0)[1]
        if not train:
            die("there is no text to train on: the files are empty, or --train-fraction leaves nothing")
        if args.val and not val:
            die("there is no text to validate on: the files of --val are empty")
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)      # before the long work, not behind it
        tokenizer = train_tokenizer(train, args) if args.command == "train" else load_tokenizer(args.tokenizer)
        vocab = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        if args.command == "train" and vocab < args.vocab:
            print(f"tokenize.py: note: the text gave only {vocab} tokens, not {args.vocab}", file=sys.stderr)
        for name, spans in (("train", train), ("val", val)):
            if spans:
                written.append(shards := Shards(out, name, vocab, args.shard_tokens))
                encode(tokenizer, spans, shards, args)
                if not shards.total:
                    die(f"there is nothing but white space to {'train' if name == 'train' else 'validate'} on")
                size = sum(end - begin for _, begin, end in spans)
                print(f"{name}: {shards.total} tokens in {len(shards.parts)} file{'s' * (len(shards.parts) != 1)}, {size / max(shards.total, 1):.2f} bytes a token")
        part = out / "tokenizer.json.part"
        tokenizer.save(str(part))
        for old in list(out.glob("train_*.bin")) + list(out.glob("val_*.bin")):
            old.unlink()  # shards of an earlier run would be read along with the new ones
        os.replace(part, out / "tokenizer.json")
        for shards in written:
            shards.publish()
        print(f"{out}: vocabulary {vocab}, .bin version {shards.version}")
    except OSError as error:
        die(f"{error.filename or args.out}: {error.strerror}")
    except KeyboardInterrupt:
        die("interrupted", 130)
    finally:
        for shards in written:
            shards.drop()


if __name__ == "__main__":
    main()
