"""CLIP's tokenizer, on a vocabulary that is small enough to work it out by hand, and on a piece of CLIP's."""
import json

import pytest

from nanodd.networks.sdxl import tokenizer


def write_tokenizer(folder, vocabulary, merges):
    """A folder as published: vocab.json and merges.txt, whose first line is a version."""
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")
    return tokenizer.Tokenizer(folder)


@pytest.fixture
def low(tmp_path):
    """Six merges; the ids count pieces in the order of this list."""
    pieces = ["l", "o", "w", "e", "r</w>", "w</w>", "lo", "low</w>", "low", "er</w>", "lower</w>", "oo"]
    vocabulary = {piece: k for k, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return write_tokenizer(tmp_path / "low", vocabulary,
                           ["l o", "lo w</w>", "e r</w>", "lo w", "o o", "low er</w>"])


# Those of the published merges that the prompts below can use, with their line numbers in merges.txt, from 0.
# A merge adds its piece to the vocabulary: its id is 512 + the line number, after 256 bytes with and without
# </w>. The expected ids are those of transformers' CLIPTokenizer 5.24.0 with the whole published vocabulary.
MERGES = (
    "e r</w> | t o</w> | i s</w> | a t</w> | o f</w> | a n</w> | t i | ð Ł | ' s</w> | l a | i t</w> | "
    "w e | h o | m o | d o | w e</w> | a f | ' t</w> | â Ģ | p h | c an</w> | w n</w> | c a | a w | "
    "p ho | n o</w> | pho to</w> | o t | do g</w> | o w | ðŁ Ĳ | c at</w> | la w | w er</w> | Ã © | "
    "c af | Ã ©</w> | t is</w> | o g</w> | la wn</w> | caf Ã©</w> | Ã© s</w> | æ Ĺ | o to</w> | "
    "mo wer</w> | mo w | Â ½</w> | æĹ ¥</w> | Â ²</w> | ðŁĲ Ł"
).split(" | ")
LINES = [int(line) for line in """
    16 19 21 24 27 38 43 46 56 60 73 86 94 105 127 137 190 201 216 233 241 245 260 296 304 359 613 1351
    1417 1520 1562 1856 2362 2468 2947 2959 3654 6882 8043 10512 14792 19995 21753 22887 30383 30494
    33101 36644 40663 41572
""".split()]
PROMPTS = {
    "": [],
    "lawn-mower": [11024, 268, 30895],
    "a photo of a  Cat, no DOG": [320, 1125, 539, 320, 2368, 267, 871, 1929],
    "it's 1984": [585, 568, 272, 280, 279, 275],                # a digit is a word of its own
    "CAFÉ": [15304],
    "cafe\u0301s": [3471, 20507],                               # the accent is a character of its own here
    "can't_we": [753, 713, 318, 649],
    "x²½Ⅷ": [343, 41175, 33613, 158, 227, 371],                 # three numbers, in Unicode's sense
    "\u2019tis": [728, 503, 7394],                              # a curly apostrophe stays curly
    "日": [37156],
    "🐟!": [42084, 256],
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    # the published order of the bytes: those with a character of their own first
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = [chr(byte) for byte in own] + [chr(256 + k) for k in range(256 - len(own))]
    vocabulary = {character: k for k, character in enumerate(characters)}
    vocabulary |= {f"{character}</w>": 256 + k for k, character in enumerate(characters)}
    vocabulary |= {merge.replace(" ", ""): 512 + line for merge, line in zip(MERGES, LINES, strict=True)}
    return write_tokenizer(tmp_path_factory.mktemp("clip"),
                           {**vocabulary, "<|startoftext|>": 49406, "<|endoftext|>": 49407}, MERGES)


def test_the_merge_that_stands_first_in_the_file_goes_first(low):
    assert low.pieces_of("low") == ["low</w>"]                  # lo, then low</w>: no other way
    assert low.pieces_of("lower") == ["lower</w>"]              # l o w e r -> lo -> er -> low -> lower
    assert low.pieces_of("loo") == ["lo", "o</w>"]              # not l oo, which comes later; o</w> is no o
    assert low.pieces_of("w") == ["w</w>"]


def test_a_merge_is_made_at_all_its_places_from_left_to_right(low):
    assert low.pieces_of("lolow") == ["lo", "low</w>"]
    assert low.pieces_of("oooow") == ["oo", "oo", "w</w>"] and low.pieces_of("ooow") == ["oo", "o", "w</w>"]


def test_ids_are_start_text_end_and_padding(low):
    assert low.start == 12 and low.end == 13
    assert low.ids_of("Low lower", pad=99) == [12, 7, 10, 13] + 73 * [99]
    assert low.ids_of("", pad=0) == [12, 13] + 75 * [0]


def test_a_long_text_is_cut_and_keeps_its_end(low):
    ids = low.ids_of("low " * 100, pad=99)
    assert ids == [12] + 75 * [7] + [13]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompts_have_the_published_ids(clip, prompt):
    expected = [49406, *PROMPTS[prompt], 49407]
    for pad in (49407, 0):
        assert clip.ids_of(prompt, pad) == expected + (77 - len(expected)) * [pad]


def test_an_accent_may_be_written_as_one_character_or_as_two(clip):
    assert clip.ids_of("cafe\u0301", 0) == clip.ids_of("caf\u00e9", 0)


def test_an_exclamation_mark_is_no_padding(clip):
    """transformers' tokenizer_2 makes 0 of it; OpenCLIP's, with which SDXL was trained, does not."""
    assert clip.ids_of("cat!", pad=0)[:4] == [49406, 2368, 256, 49407]


def test_every_byte_has_a_printable_character_of_its_own():
    characters = tokenizer.byte_characters()
    assert len(set(characters)) == 256 and all(c.isprintable() and not c.isspace() for c in characters)
    assert characters[ord("a")] == "a" and characters[0xe9] == "é"
    assert characters[0] == "Ā" and characters[ord(" ")] == "Ġ" and characters[0xad] == "Ń"


@pytest.mark.parametrize("text, words", [
    ("lawn-mower, cat", ["lawn", "-", "mower", ",", "cat"]),
    ("they'll it's o'clock", ["they", "'ll", "it", "'s", "o", "'", "clock"]),
    ("--'s", ["--'", "s"]),                                     # the run takes the apostrophe
    ("a1b22", ["a", "1", "b", "2", "2"]),
    (" \t a\u00a0b\n", ["a", "b"]),
    ("snake_case", ["snake", "_", "case"]),
    ("½x²", ["½", "x", "²"])])
def test_words_are_letters_single_digits_and_runs_of_others(text, words):
    assert list(tokenizer.words(text)) == words
