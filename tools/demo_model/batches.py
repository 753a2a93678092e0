"""Turns training samples into tensors: ids, skipped positions, loss rows, where each answer stands, dilution bias."""

import dataclasses
import math
import random

import torch
from tokenizers import Tokenizer

from data import Generator, Source, encode_training

GRANULE, GRANULES_PER_PAGE, RIVALS = 32, 4, 12


@dataclasses.dataclass
class Batch:
    ids: torch.Tensor          # [B, T]
    positions: torch.Tensor    # [B, T]
    answer_rows: torch.Tensor  # [N, 2] (b, t): row t predicts an answer token
    answer_turn: torch.Tensor  # [N] index of the question the row belongs to, 0..
    prose_rows: torch.Tensor   # [M, 2] rows for the language-modelling loss
    needles: torch.Tensor      # [B, T] bool: tokens of needles that a question asks for
    asking_rows: torch.Tensor  # [K, 2] (b, t): last prompt token of a question whose answer stands in the context
    pages: torch.Tensor        # [K, 1 + RIVALS, GRANULES_PER_PAGE] granules: a page with the answer, then pages without

    def to(self, device):
        moved = {f.name: getattr(self, f.name).to(device, non_blocking=True) for f in dataclasses.fields(self)}
        return Batch(**moved)


def find(ids, piece, limit):
    for at in range(limit - len(piece) + 1):
        if ids[at] == piece[0] and ids[at : at + len(piece)] == piece:
            return at
    return None


def rival_pages(place, context, rng):
    """Granules [1 + RIVALS, GRANULES_PER_PAGE] for the selector's loss, or None if the context is too short.

    Short sequences hold few pages of 128 tokens, so a page is made of the answer's granule of 32 tokens and three
    other granules; competitors are made of four others.
    """
    granules, mine = context // GRANULE, place // GRANULE
    if granules < 6 or mine >= granules:
        return None
    others = [g for g in range(granules) if g != mine]
    return [[mine] + rng.sample(others, 3)] + [rng.sample(others, 4) for _ in range(RIVALS)]


def make_batch(generator, tokenizer, tokens, batch, questions, max_position, rng, bos=0, eos=1):
    ids = torch.full((batch, tokens), eos)
    positions = torch.zeros(batch, tokens, dtype=torch.long)
    needles = torch.zeros(batch, tokens, dtype=torch.bool)
    answer_rows, answer_turn, prose_rows, asking_rows, pages = [], [], [], [], []
    stops = {tokenizer.token_to_id(t) for t in (".", "?", "Ċ", ".Ċ")}
    turn = -1
    for b in range(batch):
        while True:
            room = int((tokens - 75 * questions) * rng.uniform(2.9, 3.6))
            row, kinds = encode_training(tokenizer, generator.training_sample(max(300, room), questions), bos, eos)
            row, kinds = row[:tokens], kinds[:tokens]
            length = kinds.index(1) if 1 in kinds else None
            if length and kinds.count(2) > 4:
                break
        ids[b, : len(row)] = torch.tensor(row)
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
                        needles[b, max(0, place - 2) : place + 24] = True
                        around = rival_pages(place, length, rng)
                        if around:
                            asking_rows.append((b, t - 1))
                            pages.append(around)
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
    return Batch(ids, positions, pairs(answer_rows), torch.tensor(answer_turn), pairs(prose_rows), needles, pairs(asking_rows),
                 torch.tensor(pages, dtype=torch.long).view(-1, 1 + RIVALS, GRANULES_PER_PAGE))


def dilution_bias(needles, copies, near=96):
    """Additive attention mask [B, 1, T, T]: each far token of the context counts `copies` times, the asked needles once.

    Softmax over 16K tokens is what a needle has to survive; this shows it to sequences of a few hundred tokens.
    """
    index = torch.arange(needles.shape[1], device=needles.device)
    far = (index[:, None] - index[None, :]) > near
    counted = ~needles
    counted[:, 0] = False
    bias = math.log(copies) * (far[None] & counted[:, None, :]).float()
    return bias.masked_fill_(index[None, :] > index[:, None], -torch.inf).unsqueeze(1)


class BatchStream(torch.utils.data.IterableDataset):
    """Endless batches of the current stage, made in worker processes: the accelerator must not wait for text."""

    def __init__(self, corpus, tokenizer_file, seed, hard, counting, max_position, stages):
        """stages: [(tokens, sequences, questions)]; the trainer moves on with set_stage, which workers see at once."""
        self.corpus, self.tokenizer_file, self.seed, self.stages = corpus, tokenizer_file, seed, stages
        self.hard, self.counting, self.max_position = hard, counting, max_position
        self.current = torch.zeros(1, dtype=torch.long).share_memory_()

    def set_stage(self, index):
        self.current[0] = index

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        seed = self.seed * 1000 + (worker.id if worker else 0)
        torch.set_num_threads(1 if worker else torch.get_num_threads())
        tokenizer = Tokenizer.from_file(str(self.tokenizer_file))
        generator = Generator(Source(self.corpus, "train"), seed, self.hard, self.counting)
        rng = random.Random(seed)
        while True:
            tokens, size, questions = self.stages[int(self.current[0])]
            yield make_batch(generator, tokenizer, tokens, size, questions, self.max_position, rng)
