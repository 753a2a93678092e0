"""Structured initialisation: a retrieval circuit is written into the weights, training then makes it robust.

A model of this size needs hundreds of millions of tokens to discover retrieval by itself. We know which circuit it would
have to find, so we start from it:

  layer 0  eight heads look back 1..8 tokens (a constant direction turned by RoPE) and add up a rotated hash of what
           they see: F, the fingerprint of the preceding eight tokens. The MLP marks the tokens before which a key has just
           ended (": " after "is", "in" after "mentioned") and erases the fingerprint at sentence ends.
  layer 1  a head attends to the nearest marker and copies its fingerprint: H, the key under discussion. Sentence ends are
           markers with an empty fingerprint, the first token is the fallback: prose carries no key. The MLP erases F where
           there is no key, so in layer 2 prose neither asks nor answers: its mean keys are flat and the needle's stand out.
  layer 2  all heads match (H, F) of the query with (H, F) of earlier tokens in the slow RoPE pairs, and copy the
           token found there to the output.
  layer 3  free.

Everything is an ordinary parameter and keeps training.
"""

import math

import torch

FLAG_COUNT = 16


class Layout:
    """Where things stand in the residual stream and in a head. What was tuned at hidden 256, head dimension 64 is scaled from there."""

    def __init__(self, config):
        half, wide = config.head_dim // 2, config.hidden_size // 256
        self.hash = 48 * wide
        self.CONST, self.FIRST = 0, 1
        self.FLAGS = slice(2, 2 + FLAG_COUNT)                        # class of the token
        self.PREVIOUS = slice(18, 18 + FLAG_COUNT)                   # class of the token before
        self.MARKERS = slice(34, 36)                                 # a key has just ended here: in a needle, in a question
        self.KEYED = slice(36, 38)    # the same of the nearest marker: this token belongs to a needle, to a question
        self.NAME = slice(42, 42 + 118 * wide)                       # identity of the token
        self.PRINT = slice(config.hidden_size - 2 * self.hash, config.hidden_size - self.hash)  # F
        self.KEY = slice(config.hidden_size - self.hash, config.hidden_size)                    # H
        self.FAST = range(0, half * 14 // 32)                        # RoPE pairs that resolve positions
        self.SINK = half * 14 // 32                                  # pair of the fallback to the first token
        self.FIRST_VALUE = half * 15 // 32                           # pair that finds the first token of a value
        self.SIDE = self.SINK      # second coordinate of this pair: questions look at needles, not at each other
        # Slow pairs carry content: H and F do not share any.
        self.KEY_PAIRS, self.PRINT_PAIRS = range(half * 16 // 32, half * 25 // 32), range(half * 25 // 32, half)
        self.half, self.dim = half, config.head_dim
        # RMSNorm's output grows with the root of the width, the attention scale shrinks with that of the head dimension.
        self.norm = wide ** -0.5
        self.query_gain = (config.head_dim / 64) ** 0.5
        self.pair_gain = 14 / len(self.FAST)

    def rows(self, pair):
        """The two coordinates of a RoPE pair."""
        return pair, pair + self.half

    def key_coordinates(self):
        return torch.tensor([r for pair in self.KEY_PAIRS for r in self.rows(pair)])


FLAG_NAMES = ["is", "colon", "mentioned", "in", "end", "eos", "other"]
FLAG = {name: 2 + i for i, name in enumerate(FLAG_NAMES)}
BEFORE = {name: 18 + i for i, name in enumerate(FLAG_NAMES)}
# Words of the frame around a key say nothing about the key: they leave no fingerprint.
FRAME = ["One", " One", " of", " the", " special", " magic", " number", " numbers", " word", " words", " uuid", " uuids",
         " for", " is", ":", " mentioned", " in", " are", " provided", " text"]
DECAY = 0.7
ERASE = 0.22


def orthonormal(n, m, g):
    q, _ = torch.linalg.qr(torch.randn(max(n, m), min(n, m), generator=g))
    return q if n >= m else q.T


def flag_tokens(tokenizer):
    groups = {name: [] for name in FLAG_NAMES}
    groups["is"], groups["mentioned"], groups["in"] = [" is", " are"], [" mentioned"], [" in"]
    groups["colon"] = [":"]
    groups["eos"] = ["<|end_of_text|>"]
    vocab = tokenizer.get_vocab()
    ids = {name: [vocab[t.replace(" ", "Ġ").replace("\n", "Ċ")] for t in texts] for name, texts in groups.items()}
    # A sentence ends at a token of pure punctuation that holds a stop or a line break.
    for token, i in vocab.items():
        text = token.replace("Ċ", "\n").replace("Ġ", " ")
        if not any(c.isalnum() for c in text) and any(c in ".?!\n;" for c in text) and all(ord(c) < 128 for c in text):
            ids["end"].append(i)
    return ids


@torch.enable_grad()
def recency_weights(theta, fast, reach=26, gap=12):
    """Weights >= 0 of the fast pairs for K(d) = sum w cos(theta d): "attend to the nearest marker".

    Maximises the smallest of K(t) - K(d) over t < reach and d >= t + gap: whatever stands `gap` tokens further back loses,
    at every distance up to 38K. The best guaranteed margin is about 0.09, times 160 in the logit.
    """
    d = torch.cat([torch.arange(0, 600), torch.logspace(2.78, 4.58, 5000).round()])
    basis = torch.cos(d[:, None] * theta[None, list(fast)])
    beaten = d[None, :] >= torch.arange(reach)[:, None] + gap
    w = torch.full((len(fast),), 1.4 / len(fast), requires_grad=True)
    optimiser = torch.optim.Adam([w], 0.01)
    for _ in range(1500):
        optimiser.zero_grad()
        kernel = basis @ w.abs() / w.abs().sum()
        margin = (kernel[:reach, None] - kernel[None, :])[beaten]
        (torch.logsumexp(-40 * margin, 0) / 40).backward()
        optimiser.step()
    w = w.detach().abs()
    return w / w.sum()


@torch.no_grad()
def quiet_prose(model):
    """MLP of layer 1: erases F and what little H the sentence ends leave, wherever the nearest marker is not a key.

    A residue in H is shared by a whole sentence, so it does not average out in a page mean.
    """
    at = Layout(model.config)
    mlp = model.model.layers[1].mlp
    for block, part in enumerate((at.PRINT, at.KEY)):
        for i in range(at.hash):
            neuron = block * at.hash + i
            mlp.gate_proj.weight[neuron].zero_(), mlp.up_proj.weight[neuron].zero_(), mlp.down_proj.weight[:, neuron].zero_()
            mlp.gate_proj.weight[neuron, at.CONST] = 1.5
            mlp.gate_proj.weight[neuron, at.KEYED] = -3.0              # either side
            mlp.up_proj.weight[neuron, part.start + i] = 0.1
            mlp.down_proj.weight[part.start + i, neuron] = -ERASE


@torch.no_grad()
def write(model, tokenizer, seed, noise=0.01):
    c, at = model.config, Layout(model.config)
    dim, size = at.dim, at.hash
    groups, heads = c.num_key_value_heads, c.num_attention_heads
    g = torch.Generator().manual_seed(seed)
    noise = noise * at.norm
    for name, p in model.named_parameters():
        if p.dim() > 1:
            p.copy_(noise * torch.randn(p.shape, generator=g))
        else:
            p.fill_(at.norm)
    theta = c.rope_theta ** (-torch.arange(at.half, dtype=torch.float32) / at.half)
    embed = model.model.embed_tokens.weight
    vocab = tokenizer.get_vocab()

    # ---- embeddings: constant 2, class flags 2, identity of norm 2
    name_size = at.NAME.stop - at.NAME.start
    reader = orthonormal(size, name_size, g)                 # A: the part of a name that is hashed
    names = torch.randn(c.vocab_size, name_size, generator=g)
    frame = [vocab[t.replace(" ", "Ġ")] for t in FRAME if t.replace(" ", "Ġ") in vocab]
    names[frame] -= names[frame] @ reader.T @ reader
    names = 2 * names / names.norm(dim=1, keepdim=True)
    embed.zero_()
    embed[:, at.CONST] = 2
    embed[:, at.NAME] = names
    bos = vocab["<|begin_of_text|>"]
    # All tokens have the same norm, so that the constant survives RMSNorm unchanged: whoever has no class is "other".
    embed[:, FLAG["other"]] = 2
    for flag, ids in flag_tokens(tokenizer).items():
        embed[ids, FLAG["other"]] = 0
        embed[ids, FLAG[flag]] = 2
    embed[bos] = 0
    embed[bos, at.CONST], embed[bos, at.FIRST] = 2, math.sqrt(8)

    turn = orthonormal(size, size, g)                        # R
    powers = [torch.eye(size)]
    for _ in range(8):
        powers.append(turn @ powers[-1])

    # ---- layer 0
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    amplitude = math.sqrt(170.0) / 10                        # normalised constant is about 10
    for group in range(groups):
        for pair in at.FAST:
            attention.k_proj.weight[group * dim + at.rows(pair)[0], at.CONST] = amplitude
        value = attention.v_proj.weight[group * dim : (group + 1) * dim]
        value.zero_()
        value[:size, at.NAME] = reader
        value[size : size + FLAG_COUNT, at.FLAGS] = torch.eye(FLAG_COUNT)
    for head in range(heads):
        offset = head + 1
        for pair in at.FAST:
            cos_row, sin_row = at.rows(pair)
            strength = amplitude * at.query_gain * at.pair_gain
            attention.q_proj.weight[head * dim + cos_row, at.CONST] = strength * math.cos(theta[pair] * offset)
            attention.q_proj.weight[head * dim + sin_row, at.CONST] = -strength * math.sin(theta[pair] * offset)
        out = attention.o_proj.weight[:, head * dim : (head + 1) * dim]
        out.zero_()
        out[at.PRINT, :size] = 0.25 * DECAY**offset * powers[offset]
        if offset == 1:
            out[at.PREVIOUS, size : size + FLAG_COUNT] = 0.2 * torch.eye(FLAG_COUNT)
    # Normalised flags are about 8: both give 16, one gives 8.
    mlp.gate_proj.weight[: 16 + size].zero_(), mlp.up_proj.weight[: 16 + size].zero_(), mlp.down_proj.weight[:, : 16 + size].zero_()
    for neuron, (here, before) in enumerate([("colon", "is"), ("in", "mentioned")]):
        mlp.gate_proj.weight[neuron, FLAG[here]] = 1.5
        mlp.gate_proj.weight[neuron, BEFORE[before]] = 1.5
        mlp.gate_proj.weight[neuron, at.CONST] = -1.9
        mlp.up_proj.weight[neuron, at.CONST] = 0.1
        mlp.down_proj.weight[at.MARKERS.start + neuron, neuron] = 0.38
    for i in range(size):
        neuron = 16 + i
        mlp.gate_proj.weight[neuron, FLAG["end"]] = 2.5
        mlp.gate_proj.weight[neuron, at.CONST] = -1.0
        mlp.up_proj.weight[neuron, at.PRINT.start + i] = 0.1
        mlp.down_proj.weight[at.PRINT.start + i, neuron] = -0.22

    # ---- layer 1
    attention = model.model.layers[1].self_attn
    weights = recency_weights(theta, at.FAST)
    for group in range(groups):
        key = attention.k_proj.weight[group * dim : (group + 1) * dim]
        for pair, w in zip(at.FAST, weights):
            key[at.rows(pair)[0], at.MARKERS] = 4.8 * math.sqrt(w)
            key[at.rows(pair)[0], FLAG["end"]] = 4.8 * math.sqrt(w)
        key[at.rows(at.SINK)[0], at.FIRST] = 5.0
        value = attention.v_proj.weight[group * dim : (group + 1) * dim]
        value.zero_()
        value[:size, at.PRINT] = torch.eye(size)
        value[size : size + 2, at.MARKERS] = torch.eye(2)
    query = attention.q_proj.weight[:dim]
    for pair, w in zip(at.FAST, weights):
        query[at.rows(pair)[0], at.CONST] = 5.5 * at.query_gain * math.sqrt(w)
    query[at.rows(at.SINK)[0], at.CONST] = 1.6 * at.query_gain
    out = attention.o_proj.weight[:, :dim]
    out.zero_()
    out[at.KEY, :size] = 0.6 * torch.eye(size)
    out[at.KEYED, size : size + 2] = 0.25 * torch.eye(2)
    quiet_prose(model)

    # ---- layer 2
    attention = model.model.layers[2].self_attn
    basis = orthonormal(name_size, name_size, g)
    share, sharers = name_size // groups, heads // groups
    for group in range(groups):
        key_rows = at.key_coordinates()[:, None]
        print_rows = torch.tensor([r for pair in at.PRINT_PAIRS for r in at.rows(pair)])[:, None]
        mix_key, mix_print = orthonormal(len(key_rows), size, g), orthonormal(len(print_rows), size, g)
        columns = lambda part: torch.arange(part.start, part.stop)[None]
        # A matching key adds about 200 to the logit, so that a page mean, 128 times weaker, still sees its few tokens;
        # a matching context adds about 30 and picks the place within the value.
        key = torch.zeros(dim, c.hidden_size)
        key[key_rows, columns(at.KEY)] = 8.0 * mix_key
        key[print_rows, columns(at.PRINT)] = 8.0 * mix_print
        key[at.rows(at.SINK)[0], at.FIRST] = 1.5
        key[at.rows(at.SIDE)[1], at.KEYED.start] = 3.0
        key[at.rows(at.FIRST_VALUE)[0], BEFORE["colon"]] = 1.3
        attention.k_proj.weight[group * dim : (group + 1) * dim] = key
        query = torch.zeros(dim, c.hidden_size)
        query[key_rows, columns(at.KEY)] = 8.0 * mix_key
        # The fingerprint of the next token: turn what is here, itself included, by one step.
        ahead = DECAY * mix_print @ turn
        query[print_rows, columns(at.PRINT)] = 8.0 * ahead
        query[print_rows, columns(at.NAME)] = 8.0 * 1.155 * ahead @ reader
        query[at.rows(at.SINK)[0], at.CONST] = 1.0
        query[at.rows(at.SIDE)[1], at.KEYED.start + 1] = 3.0
        query[at.rows(at.FIRST_VALUE)[0], FLAG["is"]] = 1.0
        query *= at.query_gain
        value = torch.zeros(dim, c.hidden_size)
        mine = basis[group * share : (group + 1) * share]
        value[:share, at.NAME] = mine
        attention.v_proj.weight[group * dim : (group + 1) * dim] = value
        for head in range(group * sharers, (group + 1) * sharers):
            attention.q_proj.weight[head * dim : (head + 1) * dim] = query + noise * torch.randn(query.shape, generator=g)
            out = torch.zeros(c.hidden_size, dim)
            out[at.NAME, :share] = mine.T * 1.0
            attention.o_proj.weight[:, head * dim : (head + 1) * dim] = out
