"""CLIP's tokenizer: byte-pair encoding, by which a prompt becomes 77 numbers between 0 and 49,407.

    "a lawn-mower" -> a</w> | lawn</w> | -</w> | mower</w> -> 49406 320 11024 268 30895 49407 pad ... pad

A word starts as single characters, the last one marked with </w>. Of its pairs of neighbours, the one that
stands first in the file of 48,894 merges becomes one piece, again and again until none stands there.
Sources: Sennrich et al. 2016 (byte-pair encoding), Radford et al. 2019, sec. 2.2 (bytes), 2021 (CLIP).
"""
import json
import pathlib
import re
import unicodedata
from itertools import pairwise

CONTRACTION = re.compile("'(?:s|t|re|ve|m|ll|d)")
LENGTH = 77                    # ids in a prompt, with those of its start and its end


def kind(character):
    """The kind of a character: "space", "L" (letter), "N" (number) or "other", by Unicode's categories."""
    if character.isspace():
        return "space"
    category = unicodedata.category(character)[0]
    return category if category in "LN" else "other"


def words(text):
    """Cuts a text in lower case into words: contractions, runs of letters, single digits, other runs."""
    start = 0
    while start < len(text):
        contraction, end = CONTRACTION.match(text, start), start + 1
        if contraction:
            end = contraction.end()
        elif kind(text[start]) != "N":
            while end < len(text) and kind(text[end]) == kind(text[start]):
                end += 1
        if kind(text[start]) != "space":
            yield text[start:end]
        start = end


def byte_characters():
    """A printable character for each of the 256 bytes: its own where it has one, else from 256 on."""
    printable = {*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)}           # in Latin-1
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 256 + others.index(byte)) for byte in range(256)]


class Tokenizer:
    """ids_of(text) for the vocabulary and the merges in a folder: vocab.json and merges.txt.

    start, end: the ids that stand before and after every text. In a text, "<|endoftext|>" is nothing special.
    """

    def __init__(self, folder):
        folder = pathlib.Path(folder)
        self.vocabulary = json.loads((folder / "vocab.json").read_text("utf-8"))
        merges = (folder / "merges.txt").read_text("utf-8").splitlines()[1:]            # line 0: a version
        self.rank = {tuple(line.split()): k for k, line in enumerate(merges)}
        self.bytes = byte_characters()
        self.start, self.end = (self.vocabulary[f"<|{name}oftext|>"] for name in ("start", "end"))

    def pieces_of(self, word):
        """The pieces of one word after all merges, a list of strings; the last one ends with </w>."""
        pieces = [self.bytes[byte] for byte in word.encode()]
        pieces[-1] += "</w>"
        while len(pieces) > 1:
            pair = min(pairwise(pieces), key=lambda pair: self.rank.get(pair, len(self.rank)))
            if pair not in self.rank:
                break
            merged, k = [], 0
            while k < len(pieces):                              # every place of the pair, from left to right
                size = 2 if tuple(pieces[k:k + 2]) == pair else 1
                merged.append("".join(pieces[k:k + size]))
                k += size
            pieces = merged
        return pieces

    def ids_of(self, text, pad):
        """The 77 ids of a text: start, at most 75 ids, end, and `pad` in the places that are left.

        What is longer is cut. Upper case counts as lower, accents may be written as one character or as two.
        """
        text = unicodedata.normalize("NFC", text).lower()
        ids = [self.vocabulary[piece] for word in words(text) for piece in self.pieces_of(word)]
        ids = [self.start, *ids[:LENGTH - 2], self.end]
        return ids + [pad] * (LENGTH - len(ids))
