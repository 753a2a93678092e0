"""Writes mean_key_goldens.h: masks of the mean-key presets, for tests/unit/mean_key_golden_test.cc.

Written from the published rules with NumPy in fp64, not from the C++ code. Inputs come from a linear congruential
generator and are exact in fp32, so that the test makes them again and the file holds masks only. The queries of a head
share a direction (twice a base vector, plus noise): rows of a tile agree on pages as in real attention.

Usage: python tests/golden/make_mean_key_goldens.py
"""

import pathlib

import numpy as np

# name: tile, visible, norm, vote, alpha (None: share)
PRESETS = {
    "mean-key": ("packed", "full", "row", "max", None),
    "compact": ("per_head", "last", "tile", "mean", 0.06),
    "flashprefill-v1": ("per_head", "last", "tile", "mean", 0.18),
    "flashprefill-v2": ("packed", "first", "tile", "mean", 0.1),
}
SHARE = 0.08  # of the preset mean-key; the test sets it, so that tuning the default leaves the goldens alone

# Hq, Hkv, D, P, S, C
SHAPES = [
    (4, 1, 16, 16, 160, 64),    # aligned
    (4, 2, 16, 16, 323, 75),    # ragged on both sides
    (7, 1, 8, 32, 1000, 100),   # G not a power of two: tiles of 16 tokens
    (8, 1, 16, 16, 1100, 33),   # more than 64 past pages
    (2, 2, 24, 128, 1300, 300), # tiles of 128 tokens
    (1, 1, 16, 64, 64, 1),      # one query, one past page
]


class Lcg:
    """Numerical Recipes' generator; the top 16 bits as a value in [-2, 2)."""

    def __init__(self, seed):
        self.state = seed

    def values(self, count):
        out = np.empty(count, np.float64)
        for i in range(count):
            self.state = (self.state * 1664525 + 1013904223) % 2**32
            out[i] = (self.state >> 16) / 2**14 - 2
        return out


def block_tokens(tile, group, page_tokens):
    most = 128 // group if tile == "packed" else 128
    power = 1
    while power * 2 <= most:
        power *= 2
    return min(power, page_tokens)


def rows_of_mask(preset, shape, q, mean):
    """One list of page sets per mask head and query block, and the smallest distance to a threshold."""
    tile, visible, norm, vote, alpha = PRESETS[preset]
    heads, kv_heads, dim, page_tokens, start, tokens = shape
    group = heads // kv_heads
    block = block_tokens(tile, group, page_tokens)
    positions = np.arange(start, start + tokens)
    num_past = start // page_tokens
    rows, closest = [], np.inf
    for mask_head in range(kv_heads if tile == "packed" else heads):
        tile_heads = range(mask_head * group, mask_head * group + group) if tile == "packed" else [mask_head]
        kv_head = mask_head if tile == "packed" else mask_head // group
        for index in range(start // block, (start + tokens - 1) // block + 1):
            members = np.nonzero(positions // block == index)[0]
            last = positions[members[-1]]
            end = positions[members[0]] if visible == "full" else last + 1
            pages = np.array([j for j in range(len(mean)) if (j + 1) * page_tokens <= end])
            scores, seen = [], []
            for t in members:
                for h in tile_heads:
                    scores.append(mean[pages, kv_head] @ q[t, h] / np.sqrt(dim))
                    edge = pages * page_tokens if visible == "first" else (pages + 1) * page_tokens - 1
                    seen.append(positions[t] >= edge)
            scores = np.where(seen, scores, -np.inf)
            if norm == "row":
                weights = np.exp(scores - scores.max(axis=1, keepdims=True))
                energy = getattr(weights / weights.sum(axis=1, keepdims=True), vote)(axis=0)
            else:
                energy = np.exp(scores - scores.max()).sum(axis=0)
            threshold = SHARE if alpha is None else alpha * energy.max()
            past = energy[:num_past]
            closest = min(closest, np.abs(past / threshold - 1).min())
            rows.append([int(j) for j in np.nonzero(past >= threshold)[0]])
    return rows, closest


def main():
    lines = [
        "// Made by make_mean_key_goldens.py (NumPy, fp64). Do not edit.",
        "#pragma once",
        "",
        "#include <cstdint>",
        "#include <string_view>",
        "#include <vector>",
        "",
        "namespace compact::golden {",
        "",
        "struct MeanKeyGolden {",
        "  std::string_view preset;",
        "  std::int32_t q_heads, kv_heads, head_dim, page_tokens, chunk_start, chunk_tokens;",
        "  std::uint32_t seed;",
        "  std::vector<std::vector<std::uint64_t>> rows;  // [mask heads x query blocks][words]",
        "};",
        "",
        f"inline constexpr float kMeanKeyGoldenShare = {SHARE}F;",
        "",
        "inline const std::vector<MeanKeyGolden> kMeanKeyGoldens = {",
    ]
    for preset in PRESETS:
        for number, shape in enumerate(SHAPES):
            heads, kv_heads, dim, page_tokens, start, tokens = shape
            seed = 1000 + number
            while True:  # no decision on the edge, so that fp32 must agree
                lcg = Lcg(seed)
                base = lcg.values(heads * dim).reshape(1, heads, dim)
                q = 2 * base + lcg.values(tokens * heads * dim).reshape(tokens, heads, dim)
                num_pages = (start + tokens) // page_tokens  # complete ones
                mean = lcg.values(num_pages * kv_heads * dim).reshape(num_pages, kv_heads, dim)
                rows, closest = rows_of_mask(preset, shape, q, mean)
                if closest > 2e-4:
                    break
                seed += 100
            num_words = (start // page_tokens + 63) // 64
            text = []
            for pages in rows:
                words = [sum(1 << (j % 64) for j in pages if j // 64 == w) for w in range(num_words)]
                text.append("{" + ", ".join(f"0x{word:x}U" for word in words) + "}")
            lines.append(f'    {{"{preset}", {", ".join(map(str, shape))}, {seed},')
            row = "     {"
            for item in text:
                if len(row) + len(item) > 116:
                    lines.append(row.rstrip())
                    row = "      "
                row += item + ", "
            lines.append(row.rstrip(", ") + "}},")
            kept = sum(map(len, rows)) / (len(rows) * (start // page_tokens))
            print(f"{preset:16} {shape} seed {seed} kept {kept:.2f} closest {closest:.1e}")
    lines += ["};", "", "}  // namespace compact::golden", ""]
    pathlib.Path(__file__).with_name("mean_key_goldens.h").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
