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

# Coordinates of the residual stream.
CONST, FIRST = 0, 1
FLAGS = slice(2, 18)       # class of the token
PREVIOUS = slice(18, 34)   # class of the token before
MARKERS = slice(34, 36)    # a key has just ended here: in a needle, in a question
KEYED = slice(36, 38)      # the same of the nearest marker: this token belongs to a needle, to a question
NAME = slice(42, 160)      # identity of the token
PRINT = slice(160, 208)    # F
KEY = slice(208, 256)      # H
HASH = 48

FLAG_NAMES = ["is", "colon", "mentioned", "in", "end", "eos", "other"]
FLAG = {name: 2 + i for i, name in enumerate(FLAG_NAMES)}
BEFORE = {name: 18 + i for i, name in enumerate(FLAG_NAMES)}
# Words of the frame around a key say nothing about the key: they leave no fingerprint.
FRAME = ["One", " One", " of", " the", " special", " magic", " number", " numbers", " word", " words", " uuid", " uuids",
         " for", " is", ":", " mentioned", " in", " are", " provided", " text"]
FAST = range(0, 14)        # RoPE pairs that resolve positions
SINK = 14                  # pair of the fallback to the first token
FIRST_VALUE = 15           # pair that finds the first token of a value
SIDE = 14                  # second coordinate of this pair: questions look at needles, not at each other
KEY_PAIRS, PRINT_PAIRS = range(16, 25), range(25, 32)      # slow pairs carry content: H and F do not share any
DECAY = 0.7
ERASE = 0.22


def rows(pair, head_dim=64):
    """The two coordinates of a RoPE pair."""
    return pair, pair + head_dim // 2


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
def recency_weights(theta, reach=26, gap=12):
    """Weights >= 0 of the fast pairs for K(d) = sum w cos(theta d): "attend to the nearest marker".

    Maximises the smallest of K(t) - K(d) over t < reach and d >= t + gap: whatever stands `gap` tokens further back loses,
    at every distance up to 38K. The best guaranteed margin is about 0.09, times 160 in the logit.
    """
    d = torch.cat([torch.arange(0, 600), torch.logspace(2.78, 4.58, 5000).round()])
    basis = torch.cos(d[:, None] * theta[None, list(FAST)])
    beaten = d[None, :] >= torch.arange(reach)[:, None] + gap
    w = torch.full((len(FAST),), 0.1, requires_grad=True)
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
    mlp = model.model.layers[1].mlp
    for block, part in enumerate((PRINT, KEY)):
        for i in range(HASH):
            neuron = block * HASH + i
            mlp.gate_proj.weight[neuron].zero_(), mlp.up_proj.weight[neuron].zero_(), mlp.down_proj.weight[:, neuron].zero_()
            mlp.gate_proj.weight[neuron, CONST] = 1.5
            mlp.gate_proj.weight[neuron, KEYED] = -3.0              # either side
            mlp.up_proj.weight[neuron, part.start + i] = 0.1
            mlp.down_proj.weight[part.start + i, neuron] = -ERASE


@torch.no_grad()
def write(model, tokenizer, seed, noise=0.01):
    c = model.config
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.dim() > 1:
            p.copy_(noise * torch.randn(p.shape, generator=g))
    half = c.head_dim // 2
    theta = c.rope_theta ** (-torch.arange(half, dtype=torch.float32) / half)
    embed = model.model.embed_tokens.weight
    vocab = tokenizer.get_vocab()

    # ---- embeddings: constant 2, class flags 2, identity of norm 2
    name_size = NAME.stop - NAME.start
    reader = orthonormal(HASH, name_size, g)                 # A: the part of a name that is hashed
    names = torch.randn(c.vocab_size, name_size, generator=g)
    frame = [vocab[t.replace(" ", "Ġ")] for t in FRAME if t.replace(" ", "Ġ") in vocab]
    names[frame] -= names[frame] @ reader.T @ reader
    names = 2 * names / names.norm(dim=1, keepdim=True)
    embed.zero_()
    embed[:, CONST] = 2
    embed[:, NAME] = names
    bos = vocab["<|begin_of_text|>"]
    # All tokens have the same norm, so that the constant survives RMSNorm unchanged: whoever has no class is "other".
    embed[:, FLAG["other"]] = 2
    for flag, ids in flag_tokens(tokenizer).items():
        embed[ids, FLAG["other"]] = 0
        embed[ids, FLAG[flag]] = 2
    embed[bos] = 0
    embed[bos, CONST], embed[bos, FIRST] = 2, math.sqrt(8)

    turn = orthonormal(HASH, HASH, g)                        # R
    powers = [torch.eye(HASH)]
    for _ in range(8):
        powers.append(turn @ powers[-1])

    # ---- layer 0
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    amplitude = math.sqrt(170.0) / 10                        # normalised constant is about 10
    for group in range(2):
        for pair in FAST:
            attention.k_proj.weight[group * 64 + rows(pair)[0], CONST] = amplitude
        value = attention.v_proj.weight[group * 64 : group * 64 + 64]
        value.zero_()
        value[:HASH, NAME] = reader
        value[HASH:, FLAGS] = torch.eye(16)
    for head in range(8):
        offset = head + 1
        for pair in FAST:
            cos_row, sin_row = rows(pair)
            attention.q_proj.weight[head * 64 + cos_row, CONST] = amplitude * math.cos(theta[pair] * offset)
            attention.q_proj.weight[head * 64 + sin_row, CONST] = -amplitude * math.sin(theta[pair] * offset)
        out = attention.o_proj.weight[:, head * 64 : head * 64 + 64]
        out.zero_()
        out[PRINT, :HASH] = 0.25 * DECAY**offset * powers[offset]
        if offset == 1:
            out[PREVIOUS, HASH:] = 0.2 * torch.eye(16)
    # Normalised flags are about 8: both give 16, one gives 8.
    mlp.gate_proj.weight[:64].zero_(), mlp.up_proj.weight[:64].zero_(), mlp.down_proj.weight[:, :64].zero_()
    for neuron, (here, before) in enumerate([("colon", "is"), ("in", "mentioned")]):
        mlp.gate_proj.weight[neuron, FLAG[here]] = 1.5
        mlp.gate_proj.weight[neuron, BEFORE[before]] = 1.5
        mlp.gate_proj.weight[neuron, CONST] = -1.9
        mlp.up_proj.weight[neuron, CONST] = 0.1
        mlp.down_proj.weight[MARKERS.start + neuron, neuron] = 0.38
    for i in range(HASH):
        neuron = 16 + i
        mlp.gate_proj.weight[neuron, FLAG["end"]] = 2.5
        mlp.gate_proj.weight[neuron, CONST] = -1.0
        mlp.up_proj.weight[neuron, PRINT.start + i] = 0.1
        mlp.down_proj.weight[PRINT.start + i, neuron] = -0.22

    # ---- layer 1
    attention = model.model.layers[1].self_attn
    weights = recency_weights(theta)
    for group in range(2):
        key = attention.k_proj.weight[group * 64 : group * 64 + 64]
        for pair, w in zip(FAST, weights):
            key[rows(pair)[0], MARKERS] = 4.8 * math.sqrt(w)
            key[rows(pair)[0], FLAG["end"]] = 4.8 * math.sqrt(w)
        key[rows(SINK)[0], FIRST] = 5.0
        value = attention.v_proj.weight[group * 64 : group * 64 + 64]
        value.zero_()
        value[:HASH, PRINT] = torch.eye(HASH)
        value[HASH : HASH + 2, MARKERS] = torch.eye(2)
    head = 0
    query = attention.q_proj.weight[head * 64 : head * 64 + 64]
    for pair, w in zip(FAST, weights):
        query[rows(pair)[0], CONST] = 5.5 * math.sqrt(w)
    query[rows(SINK)[0], CONST] = 1.6
    out = attention.o_proj.weight[:, :64]
    out.zero_()
    out[KEY, :HASH] = 0.6 * torch.eye(HASH)
    out[KEYED, HASH : HASH + 2] = 0.25 * torch.eye(2)
    quiet_prose(model)

    # ---- layer 2
    attention = model.model.layers[2].self_attn
    basis = orthonormal(name_size, name_size, g)
    share = name_size // 2
    for group in range(2):
        key_rows = torch.tensor([r for pair in KEY_PAIRS for r in rows(pair)])[:, None]
        print_rows = torch.tensor([r for pair in PRINT_PAIRS for r in rows(pair)])[:, None]
        mix_key, mix_print = orthonormal(len(key_rows), HASH, g), orthonormal(len(print_rows), HASH, g)
        columns = lambda part: torch.arange(part.start, part.stop)[None]
        # A matching key adds about 200 to the logit, so that a page mean, 128 times weaker, still sees its few tokens;
        # a matching context adds about 30 and picks the place within the value.
        key = torch.zeros(64, c.hidden_size)
        key[key_rows, columns(KEY)] = 8.0 * mix_key
        key[print_rows, columns(PRINT)] = 8.0 * mix_print
        key[rows(SINK)[0], FIRST] = 1.5
        key[rows(SIDE)[1], KEYED.start] = 3.0
        key[rows(FIRST_VALUE)[0], BEFORE["colon"]] = 1.3
        attention.k_proj.weight[group * 64 : group * 64 + 64] = key
        query = torch.zeros(64, c.hidden_size)
        query[key_rows, columns(KEY)] = 8.0 * mix_key
        # The fingerprint of the next token: turn what is here, itself included, by one step.
        ahead = DECAY * mix_print @ turn
        query[print_rows, columns(PRINT)] = 8.0 * ahead
        query[print_rows, columns(NAME)] = 8.0 * 1.155 * ahead @ reader
        query[rows(SINK)[0], CONST] = 1.0
        query[rows(SIDE)[1], KEYED.start + 1] = 3.0
        query[rows(FIRST_VALUE)[0], FLAG["is"]] = 1.0
        value = torch.zeros(64, c.hidden_size)
        mine = basis[group * share : (group + 1) * share]
        value[:share, NAME] = mine
        attention.v_proj.weight[group * 64 : group * 64 + 64] = value
        for head in range(group * 4, group * 4 + 4):
            attention.q_proj.weight[head * 64 : head * 64 + 64] = query + noise * torch.randn(query.shape, generator=g)
            out = torch.zeros(c.hidden_size, 64)
            out[NAME, :share] = mine.T * 1.0
            attention.o_proj.weight[:, head * 64 : head * 64 + 64] = out
