"""Turns training samples into tensors: ids, skipped positions, loss rows, where each answer stands, dilution bias."""

import dataclasses
import math

import torch

from data import encode_training


@dataclasses.dataclass
class Batch:
    ids: torch.Tensor          # [B, T]
    positions: torch.Tensor    # [B, T]
    answer_rows: torch.Tensor  # [N, 2] (b, t): row t predicts an answer token
    answer_turn: torch.Tensor  # [N] index of the question the row belongs to
    prose_rows: torch.Tensor   # [M, 2] rows for the language-modelling loss
    links: list                # (b, row of the last prompt token, index of the answer's first token in the context)
    context: list              # tokens of the context, per sequence


def find(ids, piece, limit):
    for at in range(limit - len(piece) + 1):
        if ids[at] == piece[0] and ids[at : at + len(piece)] == piece:
            return at
    return None


def make_batch(generator, tokenizer, tokens, batch, questions, max_position, rng, bos=0, eos=1):
    ids = torch.full((batch, tokens), eos)
    positions = torch.zeros(batch, tokens, dtype=torch.long)
    answer_rows, answer_turn, prose_rows, links, context = [], [], [], [], []
    stops = {tokenizer.token_to_id(t) for t in (".", "?", "Ċ", ".Ċ")}
    turn = 0
    for b in range(batch):
        while True:
            room = int((tokens - 75 * questions) * rng.uniform(2.9, 3.6))
            row, kinds = encode_training(tokenizer, generator.training_sample(max(300, room), questions), bos, eos)
            row, kinds = row[:tokens], kinds[:tokens]
            length = kinds.index(1) if 1 in kinds else None
            if length and kinds.count(2) > 4:
                break
        ids[b, : len(row)] = torch.tensor(row)
        context.append(length)
        for t in range(1, len(row)):
            if kinds[t] == 2:
                first = kinds[t - 1] == 1
                turn += first
                answer_rows.append((b, t - 1))
                answer_turn.append(turn)
                if first:
                    end = t
                    while end < len(row) and kinds[end] == 2:
                        end += 1
                    place = find(row, row[t : min(end - 2, t + 6)], length) if end - 2 > t else None
                    if place is not None:
                        links.append((b, t - 1, place))
        prose_rows += [(b, rng.randrange(length - 1)) for _ in range(24)]
        # Position skipping: a few random jumps at sentence ends, so that short sequences show every distance.
        span = rng.choice([tokens, max_position // 8, max_position // 2, max_position])
        spare = max(0, span - tokens)
        cuts = [t + 1 for t in range(length) if row[t] in stops]
        gaps = torch.ones(tokens, dtype=torch.long)
        gaps[0] = 0
        if spare and cuts:
            chosen = rng.sample(cuts, min(len(cuts), rng.randrange(1, 7)))
            shares = [rng.expovariate(1.0) for _ in range(len(chosen) + 1)]
            for cut, part in zip(chosen, shares):
                gaps[cut] += int(spare * part / sum(shares))
        positions[b] = gaps.cumsum(0)
    pairs = lambda x: torch.tensor(x, dtype=torch.long).view(-1, 2)
    return Batch(ids, positions, pairs(answer_rows), torch.tensor(answer_turn), pairs(prose_rows), links, context)


def dilution_bias(batch, copies, near=96):
    """Additive attention mask [B, 1, T, T]: each far token of the context counts `copies` times, the asked needles once.

    Softmax over 16K tokens is what a needle has to survive; this shows it to sequences of a few hundred tokens.
    """
    size, tokens = batch.ids.shape
    index = torch.arange(tokens)
    far = (index[:, None] - index[None, :]) > near
    bias = torch.where(far, math.log(copies), 0.0).expand(size, tokens, tokens).clone()
    bias[:, :, 0] = 0.0
    for b, _, place in batch.links:
        bias[b, :, place - 2 : place + 24] = 0.0
    bias.masked_fill_(index[None, :] > index[:, None], -torch.inf)
    return bias.unsqueeze(1)
