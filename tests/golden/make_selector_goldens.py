"""Writes selector_goldens.h: masks of the selectors beside mean-key, for tests/unit/selector_golden_test.cc.

Written from docs/design/method.md 3.6, 3.7, 3.8, 3.10 and 3.14 with NumPy in fp64 over the keys of all tokens, without pages,
tiles or summaries of the C++ code. Inputs come from the generator of make_mean_key_goldens.py and are exact in fp32, so
that the test makes them again and the file holds masks only. Keys of a page share a topic and queries of a head a
direction, so that pages differ.

Usage: python tests/golden/make_selector_goldens.py
"""

import math
import pathlib

import numpy as np
from make_mean_key_goldens import Lcg

# Hq, Hkv, D, P, S, C
SHAPES = [
    (4, 2, 16, 16, 323, 75),     # ragged on both sides, strides cut by both edges
    (8, 1, 8, 32, 1000, 100),    # fewer tokens than pages' worth in the last block
    (7, 1, 8, 64, 700, 70),      # G not a power of two
    (2, 1, 16, 128, 1300, 140),  # the usual page
]
SINK_PAGES, WINDOW_PAGES = 1, 2  # read anyway
XATTENTION = {"stride": 8, "mass": 0.7}
QUOKA = {"picked_queries": 5, "kept_pages": 4, "kept_tokens": 20}
SUB_MEAN = {"share": 0.03, "lift": 1.5, "temperature": 1.5, "peak_weight": 0.125}
SEER = {"threshold": 0.07, "block": 64}
SEER_SHAPES = {2: "single", 3: "group"}  # of SHAPES, with pages of whole blocks -> layout of the gate's weights
RANDOM = {"seed": 11, "layer": 3, "share": 0.3}
LEAST_MARGIN = 1e-3  # of every comparison, so that fp32 must agree


def rows_within(most, page_tokens):
    return min(2 ** int(math.log2(most)), page_tokens)


def blocks_of(start, tokens, block):
    """Token positions of each query block."""
    positions = np.arange(start, start + tokens)
    return [positions[positions // block == i] for i in range(start // block, (start + tokens - 1) // block + 1)]


def best(scores, count):
    """The `count` best entries, ties to the lower; and how clear the cut is."""
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], j))
    cut = scores[order[count - 1]] - scores[order[count]] if 0 < count < len(scores) else np.inf
    return order[:count], cut


def xattention(shape, q, k):
    heads, kv_heads, dim, page, start, tokens = shape
    stride, context = XATTENTION["stride"], start + tokens
    margin, rows = np.inf, []
    for head in range(heads):
        keys = k[:, head // (heads // kv_heads)]
        for members in blocks_of(start, tokens, rows_within(128, page)):
            pages = members[-1] // page + 1
            sums = np.zeros(pages)
            for i in range(members[0] // stride, members[-1] // stride + 1):
                z = []
                for j in range(i + 1):
                    pairs = []
                    for u in range(stride):
                        t, x = stride * i + stride - 1 - u, stride * j + u
                        if start <= t < context and x < context:
                            pairs.append(q[t - start, head] @ keys[x])
                    if pairs:
                        z.append((j, np.mean(pairs) / np.sqrt(dim)))
                values = np.exp(np.array([value for _, value in z]) - max(value for _, value in z))
                for (j, _), value in zip(z, values / values.sum()):
                    sums[j * stride // page] += value
            forced = [j < SINK_PAGES or j > members[0] // page - WINDOW_PAGES for j in range(pages)]
            taken, kept = sums[forced].sum(), []
            target = XATTENTION["mass"] * sums.sum()
            margin = min(margin, abs(taken / target - 1))
            free = [j for j in range(pages) if not forced[j]]
            order = sorted(free, key=lambda j: (-sums[j], j))
            for n, j in enumerate(order):
                if taken >= target:
                    margin = min(margin, (sums[order[n - 1]] - sums[j]) / sums[j] if kept else np.inf)
                    break
                kept.append(j)
                taken += sums[j]
                margin = min(margin, abs(taken / target - 1))
            rows.append(sorted(j for j in kept if j < start // page))
    return rows, margin


def unit(a):
    return a / np.linalg.norm(a, axis=-1, keepdims=True)


def picked_queries(q, count):
    """Queries [count, D] that choose, from the rows [tokens, G, D] of a KV head; and how clear their order is."""
    tokens, group, dim = q.shape
    picked, margin = np.zeros((count, dim)), np.inf
    for own in q.swapaxes(0, 1):
        order = np.arange(tokens)
        if tokens > count:
            cosines = unit(own) @ unit(own.mean(axis=0))
            order = np.argsort(cosines, kind="stable")
            margin = min(margin, np.diff(np.sort(cosines)[: count + 1]).min())
        picked += unit(own[order[:count]]) / group
    return picked, margin * 1e6  # fp64 on both sides


def quoka_scores(shape, q, k, kv_head, members, count, end):
    """Scores of the tokens before `end`."""
    group = shape[0] // shape[1]
    picked, margin = picked_queries(q[members - shape[4], kv_head * group : (kv_head + 1) * group], count)
    return (unit(k[:end, kv_head]) @ picked.T).max(axis=1), margin


def quoka(shape, q, k):
    heads, kv_heads, dim, page, start, tokens = shape
    past, margin, rows = start // page, np.inf, []
    for kv_head in range(kv_heads):
        for members in blocks_of(start, tokens, rows_within(128, page)):
            count = min(QUOKA["picked_queries"], len(members))
            scores, order_margin = quoka_scores(shape, q, k, kv_head, members, count, past * page)
            kept, cut = best(scores.reshape(past, page).max(axis=1), min(past, QUOKA["kept_pages"]))
            margin = min(margin, order_margin, cut)
            rows.append(sorted(kept))
    return rows, margin


def quoka_tokens(shape, q, k, quarter):
    """Token form: rows are [runs, KV heads]. quarter: the whole chunk is one run, and a quarter picks a quarter."""
    heads, kv_heads, dim, page, start, tokens = shape
    margin, rows = np.inf, []
    for members in blocks_of(start, tokens, 10**9 if quarter else 128):
        picks = max(1, len(members) // 4) if quarter else min(QUOKA["picked_queries"], len(members))
        keeps = max(1, members[0] // 4) if quarter else QUOKA["kept_tokens"]
        for kv_head in range(kv_heads):
            scores, order_margin = quoka_scores(shape, q, k, kv_head, members, picks, members[0])
            kept, cut = best(scores, keeps)
            margin = min(margin, order_margin, cut * 100)
            rows.append(sorted(kept))
    return rows, margin


def sub_mean(shape, q, k):
    heads, kv_heads, dim, page, start, tokens = shape
    group, granule = heads // kv_heads, min(32, page)
    margin, rows = np.inf, []
    for kv_head in range(kv_heads):
        for members in blocks_of(start, tokens, rows_within(128 // group, page)):
            scored = (members[-1] + 1) // granule
            means = k[: scored * granule, kv_head].reshape(scored, granule, dim).mean(axis=1)
            num_pages = -(-scored * granule // page)
            shares = []
            for position in members:
                for head in range(kv_head * group, (kv_head + 1) * group):
                    seen = (position + 1) // granule
                    a = SUB_MEAN["temperature"] * means[:seen] @ q[position - start, head] / np.sqrt(dim)
                    weights = np.exp(a - a.max())
                    padded = np.zeros(num_pages * (page // granule))
                    padded[:seen] = weights / weights.sum()
                    shares.append(padded.reshape(num_pages, -1).sum(axis=1))
            energy = np.mean(shares, axis=0) + SUB_MEAN["peak_weight"] * np.max(shares, axis=0)
            threshold = max(SUB_MEAN["share"], SUB_MEAN["lift"] / num_pages)
            past = energy[: start // page]
            margin = min(margin, np.abs(past / threshold - 1).min())
            rows.append([int(j) for j in np.nonzero(past >= threshold)[0]])
    return rows, margin


def gate_inputs(shape, seed):
    """Queries and keys before RoPE, and the gate's maps: key [heads, 3 D, D]; query [Hkv, G D, D] or none."""
    heads, kv_heads, dim, page, start, tokens = shape
    lcg = Lcg(seed + 1)
    draw = lambda *sizes: lcg.values(math.prod(sizes)).reshape(sizes)
    q = draw(heads, dim)[None] + draw(tokens, heads, dim)
    context = start + tokens
    topics = draw(-(-context // SEER["block"]), kv_heads, dim)
    k = topics[np.arange(context) // SEER["block"]] + draw(context, kv_heads, dim)
    single = SEER_SHAPES[SHAPES.index(shape)] == "single"
    key_map = draw(heads if single else kv_heads, 3 * dim, dim) / 4
    query_map = None if single else draw(kv_heads, heads // kv_heads * dim, dim) / 4
    return q, k, key_map, query_map


def rotate(row, block, dim):
    """The model's RoPE at the block's first token; angles in fp32, as the model rounds them."""
    frequencies = (10000.0 ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)).astype(np.float32)
    angle = (frequencies * np.float32(block * SEER["block"])).astype(np.float64)
    low, high = row[: dim // 2], row[dim // 2 :]
    return np.concatenate([low * np.cos(angle) - high * np.sin(angle), high * np.cos(angle) + low * np.sin(angle)])


def seer(shape, seed):
    heads, kv_heads, dim, page, start, tokens = shape
    group, block = heads // kv_heads, SEER["block"]
    q, k, key_map, query_map = gate_inputs(shape, seed)
    mask_heads = heads if query_map is None else kv_heads
    margin, rows = np.inf, []
    for head in range(mask_heads):
        kv_head = head * kv_heads // mask_heads
        members = [head] if query_map is None else range(head * group, (head + 1) * group)
        keys = []
        for j in range(-(-(start + tokens) // block)):
            own = k[j * block : (j + 1) * block, kv_head]
            pooled = np.concatenate([own.max(axis=0), own.min(axis=0), own.mean(axis=0)])
            keys.append(rotate(pooled @ key_map[head], j, dim))
        for positions in blocks_of(start, tokens, block):
            i = positions[0] // block
            pooled = np.concatenate([q[positions - start, member].mean(axis=0) for member in members])
            query = rotate(pooled if query_map is None else pooled @ query_map[head], i, dim)
            scores = np.array([query @ keys[j] for j in range(i + 1)]) / np.sqrt(dim)
            weights = np.exp(scores - scores.max())
            shares = weights / weights.sum()
            energy = [shares[j * (page // block) : (j + 1) * (page // block)].max() for j in range(start // page)]
            margin = min(margin, np.abs(np.array(energy) / SEER["threshold"] - 1).min())
            rows.append([j for j, value in enumerate(energy) if value > SEER["threshold"]])
    return rows, margin


def splitmix(key):
    mask = 2**64 - 1
    z = (key + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def random(shape, q, k):
    heads, kv_heads, dim, page, start, tokens = shape
    past, rows = start // page, []
    for kv_head in range(kv_heads):
        stream = splitmix((splitmix(RANDOM["seed"] + RANDOM["layer"]) + kv_head) % 2**64)
        draws = [splitmix((stream + j) % 2**64) >> 40 for j in range(past)]
        kept, _ = best(draws, math.ceil(RANDOM["share"] * past))
        rows += [sorted(kept)] * len(blocks_of(start, tokens, rows_within(128, page)))
    return rows, np.inf


def inputs_of(shape, seed):
    heads, kv_heads, dim, page, start, tokens = shape
    lcg = Lcg(seed)
    draw = lambda *sizes: lcg.values(math.prod(sizes)).reshape(sizes)
    q = 2 * draw(heads, dim)[None] + draw(tokens, heads, dim)
    context = start + tokens
    topics = draw(-(-context // page), kv_heads, dim)
    k = topics[np.arange(context) // page] + draw(context, kv_heads, dim)
    return q, k


def golden_of(name, rule, number):
    """Lines of one entry, from the first seed whose decisions are all clear."""
    shape, seed = SHAPES[number], 2000 + number
    while True:
        rows, margin = rule(shape, seed) if rule is seer else rule(shape, *inputs_of(shape, seed))
        if margin > LEAST_MARGIN:
            break
        seed += 100
    print(f"{name:11} {shape} seed {seed} kept {np.mean([len(row) for row in rows]):.1f} margin {margin:.1e}", flush=True)
    lines = [f'    {{"{name}", {", ".join(map(str, shape))}, {seed},']
    row = "     {"
    for pages in rows:
        item = "{" + ", ".join(map(str, pages)) + "}"
        if len(row) + len(item) > 116:
            lines.append(row.rstrip())
            row = "      "
        row += item + ", "
    return [*lines, row.rstrip(", ") + "}},"]


def main():
    lines = [
        "// Made by make_selector_goldens.py (NumPy, fp64). Do not edit.",
        "#pragma once",
        "",
        "#include <cstdint>",
        "#include <string_view>",
        "#include <vector>",
        "",
        "namespace compact::golden {",
        "",
        "struct SelectorGolden {",
        "  std::string_view selector;",
        "  std::int32_t q_heads, kv_heads, head_dim, page_tokens, chunk_start, chunk_tokens;",
        "  std::uint32_t seed;",
        "  std::vector<std::vector<std::int32_t>> rows;  // [mask heads x query blocks] pages; or [runs x KV heads] tokens",
        "};",
        "",
        f"inline constexpr std::int32_t kSinkPages = {SINK_PAGES}, kWindowPages = {WINDOW_PAGES};",
        f"inline constexpr std::int32_t kXAttentionStride = {XATTENTION['stride']};",
        f"inline constexpr float kXAttentionMass = {XATTENTION['mass']}F;",
        f"inline constexpr std::int32_t kQuokaPickedQueries = {QUOKA['picked_queries']}, "
        f"kQuokaKeptPages = {QUOKA['kept_pages']}, kQuokaKeptTokens = {QUOKA['kept_tokens']};",
        f"inline constexpr float kSubMeanShare = {SUB_MEAN['share']}F, kSubMeanLift = {SUB_MEAN['lift']}F, "
        f"kSubMeanTemperature = {SUB_MEAN['temperature']}F, kSubMeanPeakWeight = {SUB_MEAN['peak_weight']}F;",
        f"inline constexpr float kSeerThreshold = {SEER['threshold']}F;",
        f"inline constexpr std::uint64_t kRandomSeed = {RANDOM['seed']};",
        f"inline constexpr std::int32_t kRandomLayer = {RANDOM['layer']};",
        f"inline constexpr float kRandomShare = {RANDOM['share']}F;",
        "",
        "// clang-format off",
    ]
    rules = [("xattention", xattention), ("quoka", quoka), ("sub-mean", sub_mean), ("random", random)]
    lines.append("inline const std::vector<SelectorGolden> kSelectorGoldens = {")
    lines += [line for name, rule in rules for number in range(len(SHAPES)) for line in golden_of(name, rule, number)]
    lines += [line for number in SEER_SHAPES for line in golden_of("seer", seer, number)]
    lines += ["};", "", "inline const std::vector<SelectorGolden> kQuokaTokenGoldens = {"]
    for number in range(len(SHAPES)):
        lines += golden_of("quoka", lambda *step: quoka_tokens(*step, quarter=False), number)
    lines += golden_of("quoka-25", lambda *step: quoka_tokens(*step, quarter=True), 0)
    lines += ["};", "// clang-format on", "", "}  // namespace compact::golden", ""]
    pathlib.Path(__file__).with_name("selector_goldens.h").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
