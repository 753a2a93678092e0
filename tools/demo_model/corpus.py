"""Freely licensed English text from Debian packages, as training and held-out prose.

Sources (package -> licence of the text):
  r-cran-janeaustenr  six novels of Jane Austen, public domain (the R package around them is MIT)
  dict-jargon         the Jargon File 4.4.7, public domain
  dict-devil          The Devil's Dictionary, public domain
  sqlite3-doc         SQLite documentation, public domain
  wamerican           SCOWL word list, permissive (names keys and word values, no prose)

`python corpus.py --out DIR` downloads the packages with apt-get and writes train.txt, heldout.txt, demo.txt, words.txt.
"""

import argparse
import gzip
import html
import pathlib
import re
import struct
import subprocess
import zlib

PACKAGES = ["r-cran-janeaustenr", "dict-jargon", "dict-devil", "sqlite3-doc", "wamerican"]
# Persuasion measures, Northanger Abbey is the demo's haystack: neither is ever trained on.
HELDOUT_NOVEL, DEMO_NOVEL = "Persuasion", "NORTHANGER ABBEY"


def unpack_packages(cache):
    cache.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        target = cache / package
        if target.exists():
            continue
        subprocess.run(["apt-get", "download", package], cwd=cache, check=True)
        archive = next(cache.glob(f"{package}_*.deb"))
        subprocess.run(["dpkg", "-x", archive, target], check=True)


def read_novels(cache):
    """R lazy-load database: records of (big-endian length, zlib stream); strings are tagged 00 04 00 09 + length."""
    data = next((cache / "r-cran-janeaustenr").rglob("Rdata.rdb")).read_bytes()
    novels, offset = {}, 0
    while offset < len(data):
        stream = zlib.decompressobj()
        record = stream.decompress(data[offset + 4 :])
        offset = len(data) - len(stream.unused_data)
        lines = []
        for match in re.finditer(rb"\x00\x04\x00\x09(....)", record, re.S):
            (length,) = struct.unpack(">I", match.group(1))
            lines.append(record[match.end() : match.end() + length].decode("latin-1"))
        text = "\n".join(lines)
        novels[lines[0]] = text
    return novels


def unwrap(text):
    """Joins hard-wrapped lines; keeps paragraphs of real sentences."""
    paragraphs = []
    for block in re.split(r"\n\s*\n", text):
        line = re.sub(r"\s+", " ", block).strip()
        if len(line) > 60 and line[-1] in '.?!"':
            paragraphs.append(line)
    return "\n".join(paragraphs)


def read_dictionary(path):
    text = gzip.open(path).read().decode("utf-8", "replace")
    return unwrap(text.replace("{", "").replace("}", ""))


def read_sqlite_pages(cache):
    pages = []
    for path in sorted((cache / "sqlite3-doc").rglob("*.html")):
        source = path.read_text(errors="replace")
        paragraphs = re.findall(r"<p>(.*?)(?=</p>|<p>|<h\d|<div|<ul|<blockquote|<table)", source, re.S)
        text = "\n\n".join(html.unescape(re.sub(r"<[^>]+>", "", p)) for p in paragraphs)
        pages.append(unwrap(text))
    return "\n".join(pages)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--cache", type=pathlib.Path, help="where the packages are kept (default: OUT/packages)")
    args = parser.parse_args()
    cache = args.cache or args.out / "packages"
    unpack_packages(cache)

    novels = {title: unwrap(text) for title, text in read_novels(cache).items()}
    heldout, demo = novels.pop(HELDOUT_NOVEL), novels.pop(DEMO_NOVEL)
    devil = read_dictionary(next((cache / "dict-devil").rglob("*.dict.dz")))
    jargon = read_dictionary(next((cache / "dict-jargon").rglob("*.dict.dz")))
    words = (cache / "wamerican/usr/share/dict/american-english").read_text().split()
    words = [w for w in words if re.fullmatch(r"[a-z]{4,12}", w)]

    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "train.txt").write_text("\n".join([*novels.values(), jargon, read_sqlite_pages(cache)]))
    (args.out / "heldout.txt").write_text(heldout + "\n" + devil)
    (args.out / "demo.txt").write_text(demo)
    (args.out / "words.txt").write_text("\n".join(words))
    for path in sorted(args.out.glob("*.txt")):
        print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
