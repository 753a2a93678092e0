"""The `mean-key` selector of this project, simulated in torch for one request: which past pages does a chunk read?

Page summaries are means of post-RoPE keys over P = 128 tokens. A tile is 32 tokens (absolute multiples) times the query heads
of one KV head. Scores are softmaxed per row over the pages that lie wholly before the tile, and a page is kept if its share
reaches tau in any row of the tile. The chunk reads the union of its tiles, plus first and nearest pages.
"""

import torch

PAGE, TILE, CHUNK = 128, 32, 1024
SINK_PAGES, WINDOW_PAGES = 2, 3


def page_means(k):
    """k [Hkv, L, D] -> means of the complete pages [Hkv, pages, D]."""
    pages = k.shape[1] // PAGE
    return k[:, : pages * PAGE].unflatten(1, (pages, PAGE)).mean(2)


def tile_shares(q, means, start):
    """q [Hq, C, D] at positions start..start+C, means [Hkv, pages, D] -> E [Hkv, tiles, pages], start a multiple of TILE."""
    kv_heads, pages, dim = means.shape
    heads, tokens, _ = q.shape
    grouped = q.unflatten(0, (kv_heads, heads // kv_heads))
    score = torch.einsum("ghtd,gpd->ghtp", grouped, means) * dim**-0.5
    tile_start = torch.arange(start, start + tokens, device=q.device) // TILE * TILE
    visible = tile_start[:, None] >= (torch.arange(pages, device=q.device) + 1) * PAGE
    share = score.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0.0).amax(1)
    tiles = (tokens + TILE - 1) // TILE
    pad = tiles * TILE - tokens
    return torch.nn.functional.pad(share, (0, 0, 0, pad)).unflatten(1, (tiles, TILE)).amax(2)


def chunk_pages(q, k, start, tau):
    """Past pages read by the chunk [start, start + C): bool [Hkv, past pages]; k [Hkv, L, D] holds the chunk as well."""
    past = start // PAGE
    share = tile_shares(q, page_means(k), start)[..., :past]
    keep = (share >= tau).any(1)
    keep[:, :SINK_PAGES] = True
    keep[:, max(0, past - WINDOW_PAGES) :] = True
    return keep
