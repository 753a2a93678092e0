"""Writes the seed corpus of tokenizer_fuzz: small tokenizer.json files, each with a zero byte and a text behind it.

Usage: python tests/fuzz/make_tokenizer_corpus.py   (standard library only)
"""

import json
import pathlib

ROOT = pathlib.Path(__file__).parent / "corpus" / "tokenizer"
RULE = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+")
TEXT = "hello <|eot|> he'S 1234  \n\n caf\u00e9 e\u0301 \u4e16\u754c".encode() + b"\xff\xe2\x82"

SHIFTED = [b for b in range(256) if not (0x21 <= b <= 0x7E or 0xA1 <= b <= 0xAC or 0xAE <= b <= 0xFF)]
BYTES = [chr(0x100 + SHIFTED.index(b)) if b in SHIFTED else chr(b) for b in range(256)]


def tokenizer(**changes):
    vocab = {character: byte for byte, character in enumerate(BYTES)}
    vocab.update({"he": 256, "ll": 257, "hell": 258})
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": RULE}, "behavior": "Isolated", "invert": False}
    root = {
        "model": {"type": "BPE", "vocab": vocab, "merges": ["h e", "l l", "he ll"], "ignore_merges": False},
        "added_tokens": [{"id": 259, "content": "<|eot|>", "special": True, "normalized": False},
                         {"id": 260, "content": "<t>", "special": False, "normalized": True}],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": {"type": "TemplateProcessing",
                           "single": [{"SpecialToken": {"id": "<|eot|>"}}, {"Sequence": {"id": "A"}}],
                           "special_tokens": {"<|eot|>": {"ids": [259]}}},
        "decoder": byte_level,
    }
    root.update(changes)
    return root


def seed(root, text=TEXT):
    return json.dumps(root, separators=(",", ":"), ensure_ascii=False).encode() + b"\0" + text


SEEDS = {
    "llama3": seed(tokenizer()),
    "nfc": seed(tokenizer(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}]})),
    "gpt2": seed(tokenizer(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "use_regex": True})),
    "no_template": seed(tokenizer(post_processor=None)),
    "text": TEXT,
}

if __name__ == "__main__":
    ROOT.mkdir(parents=True, exist_ok=True)
    for name, data in SEEDS.items():
        (ROOT / name).write_bytes(data)
