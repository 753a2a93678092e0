"""Accuracy of a checkpoint per task and length, dense and with the mean-key selector in chunked prefill; JSON out.

For use while training: the engine's own figures come from `compact eval ruler`. Greedy decoding with a KV cache. A sample
scores the share of its answers that occur in the output, ignoring case, as in RULER. Decoding stops when all answers have
been seen (more text cannot change the score), at the end token, or at the limit.

With --prompts it answers the very prompts of `compact eval ruler --prompts FILE`, dense, and writes an answer a line: an
independent implementation on a GPU beside the engine.
"""

import argparse
import json
import pathlib
import time

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

import mean_key
from data import EVAL_TASKS, Generator, Source
from model import load, rope_tables


class Request:
    """KV cache of one prompt."""

    def __init__(self, model):
        self.model, self.c = model, model.config
        self.group = self.c.num_attention_heads // self.c.num_key_value_heads
        self.keys = [None] * self.c.num_hidden_layers
        self.values = [None] * self.c.num_hidden_layers
        self.length = 0
        # Past pages read and past pages there, per layer, weighted by tokens.
        self.by_layer = [[0, 0] for _ in range(self.c.num_hidden_layers)]

    def step(self, ids, tau=None):
        """Appends ids [T]; returns logits of the last row. tau selects past pages per chunk, None is dense."""
        device = self.model.model.embed_tokens.weight.device
        start, tokens = self.length, len(ids)
        x = self.model.model.embed_tokens(torch.tensor([ids], device=device))
        cos, sin = (t.unsqueeze(0).unsqueeze(0) for t in rope_tables(self.c, torch.arange(start, start + tokens, device=device)))
        for index, layer in enumerate(self.model.model.layers):
            q, k, v = layer.self_attn.project(layer.input_layernorm(x), cos, sin)
            if start:
                k, v = torch.cat([self.keys[index], k], 2), torch.cat([self.values[index], v], 2)
            self.keys[index], self.values[index] = k, v
            if start and tau is not None:
                o = self.sparse(index, q[0], k[0], v[0], start, tau)
            else:
                o = self.dense(q, k, v, start)
            x = x + layer.self_attn.merge(o)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        self.length += tokens
        return self.model.logits(self.model.model.norm(x[:, -1]))[0]

    def dense(self, q, k, v, start):
        k, v = k.repeat_interleave(self.group, 1), v.repeat_interleave(self.group, 1)
        tokens = q.shape[2]
        if start == 0:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mask = None if tokens == 1 else self.causal(tokens, start, q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    @staticmethod
    def causal(tokens, past, device):
        return torch.ones(tokens, past + tokens, dtype=torch.bool, device=device).tril(past)

    def sparse(self, index, q, k, v, start, tau):
        keep = mean_key.chunk_pages(q, k, start, tau)
        weight = q.shape[1]
        self.by_layer[index][0] += int(keep.sum()) * weight
        self.by_layer[index][1] += keep.numel() * weight
        outputs = []
        for head in range(k.shape[0]):
            tokens = keep[head].repeat_interleave(mean_key.PAGE).nonzero().squeeze(1)
            tail = torch.arange(start, k.shape[1], device=q.device)
            chosen = torch.cat([tokens, tail])
            mask = self.causal(q.shape[1], len(tokens), q.device)
            mine = q[head * self.group : (head + 1) * self.group]
            shape = (self.group, -1, -1)
            outputs.append(F.scaled_dot_product_attention(
                mine[None], k[head, chosen].expand(shape)[None], v[head, chosen].expand(shape)[None], attn_mask=mask))
        return torch.cat(outputs, 1)


@torch.no_grad()
def answer(model, tokenizer, ids, answers, limit, tau=None, eos=1):
    request = Request(model)
    if tau is None:
        logits = request.step(ids)
    else:
        for start in range(0, len(ids), mean_key.CHUNK):
            logits = request.step(ids[start : start + mean_key.CHUNK], tau)
    output = []
    for _ in range(limit):
        token = int(logits.argmax())
        if token == eos:
            break
        output.append(token)
        text = tokenizer.decode(output)
        if all(a.lower() in text.lower() for a in answers):
            break
        logits = request.step([token])
    text = tokenizer.decode(output)
    score = sum(a.lower() in text.lower() for a in answers) / len(answers)
    return score, text, request


# Tokens to generate: enough for every answer. RULER's own limit is 128 (30 for vt).
LIMITS = {"niah_multikey_3": 48, "niah_single_3": 48, "vt": 48, "niah_multivalue": 96, "niah_multiquery": 96}


def make_prompts(tokenizer, source, task, tokens, count, seed, limit):
    """(text, ids, answers) of prompts that fill `tokens` (with what is generated) up to one sentence."""
    generator = Generator(source, seed)
    per_token = {"niah_multikey_3": 1.7, "niah_single_1": 4.6, "vt": 4.6, "niah_multikey_2": 3.2}.get(task, 3.6)
    prompts = []
    while len(prompts) < count:
        characters = int((tokens - limit) * per_token) - 600
        while True:
            prompt, answers = generator.sample(task, characters)
            ids = tokenizer.encode(prompt).ids
            if len(ids) + limit <= tokens:
                break
            characters = int(characters * 0.97)
        prompts.append((prompt, ids, answers))
    return prompts


def answer_prompts(model, tokenizer, paths, output):
    """Dense answers to prompt files of the engine; prints the accuracy of each (task, tokens)."""
    sums = {}
    with open(output, "w") as lines:
        for path in paths:
            for line in open(path):
                prompt = json.loads(line)
                ids = tokenizer.encode(prompt["prompt"] + prompt["answer_prefix"]).ids
                if len(ids) != prompt["prompt_tokens"]:
                    raise SystemExit(f"{path}: {len(ids)} tokens, the engine counted {prompt['prompt_tokens']}")
                score, text, _ = answer(model, tokenizer, ids, prompt["answers"], prompt["generate_tokens"])
                row = {key: prompt[key] for key in ("task", "tokens", "sample")} | {"score": score, "output": text}
                lines.write(json.dumps(row) + "\n")
                total = sums.setdefault((prompt["task"], prompt["tokens"]), [0.0, 0])
                total[0] += score
                total[1] += 1
    for (task, tokens), (score, count) in sums.items():
        print(json.dumps({"task": task, "tokens": tokens, "samples": count, "accuracy": round(100 * score / count, 2)}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--corpus", type=pathlib.Path, help="needed without --prompts")
    parser.add_argument("--prompts", nargs="+", type=pathlib.Path, help="files of `compact eval ruler --prompts`")
    parser.add_argument("--answers", type=pathlib.Path, help="where --prompts writes its answers, JSON lines")
    parser.add_argument("--tasks", nargs="+", default=EVAL_TASKS)
    parser.add_argument("--lengths", nargs="+", type=int, default=[8192, 16384])
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--tau", nargs="*", type=float, default=[], help="mean-key thresholds beside dense")
    parser.add_argument("--no-dense", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--show", type=int, default=0, help="print this many wrong answers per row")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    model = load(args.model, args.device)
    if args.prompts:
        if args.answers is None:
            parser.error("--prompts needs --answers")
        with torch.no_grad():
            return answer_prompts(model, tokenizer, args.prompts, args.answers)
    if args.corpus is None:
        parser.error("--corpus is needed without --prompts")
    source = Source(args.corpus, "heldout")
    results = []
    for length in args.lengths:
        for task in args.tasks:
            limit = LIMITS.get(task, 16)
            prompts = make_prompts(tokenizer, source, task, length, args.samples, args.seed, limit)
            for tau in ([] if args.no_dense else [None]) + args.tau:
                began, total, wrong = time.time(), 0.0, 0
                layers = [[0, 0] for _ in range(model.config.num_hidden_layers)]
                for _, ids, answers in prompts:
                    score, text, request = answer(model, tokenizer, ids, answers, limit, tau)
                    total += score
                    for mine, theirs in zip(layers, request.by_layer):
                        mine[0] += theirs[0]
                        mine[1] += theirs[1]
                    if score < 1 and wrong < args.show:
                        wrong += 1
                        print("   wrong:", answers, "->", repr(text))
                row = {"task": task, "tokens": length, "samples": len(prompts), "seed": args.seed,
                       "selector": "dense" if tau is None else "mean-key", "tau": tau,
                       "accuracy": round(100 * total / len(prompts), 2),
                       "seconds_per_sample": round((time.time() - began) / len(prompts), 2)}
                if tau is not None:
                    row["density_by_layer"] = [round(r / max(p, 1), 4) for r, p in layers]
                    row["density"] = round(sum(r for r, _ in layers) / max(1, sum(p for _, p in layers)), 4)
                results.append(row)
                print(json.dumps(row), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
