"""Trains the demo checkpoint: structured initialisation, then a curriculum of growing length.

  python train.py --corpus DIR --model assets/demo --work DIR --device cpu --minutes 60
  python train.py --corpus DIR --model assets/demo --work DIR --device cuda --minutes 25

Loss: cross entropy on answers + a little language modelling + a selector term, which asks that the mean key of the page that
holds the answer stand out among the page means for the row that asks (so that `mean-key` can find single needles).
The run continues from WORK/state.pt if it exists; MODEL is rewritten atomically at every save.
"""

import argparse
import math
import pathlib
import random
import time

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

import circuit
from batches import dilution_bias, make_batch
from data import Generator, Source
from model import Config, Llama, load, save

# (share of the time, tokens, sequences, questions per sequence, copies of far tokens in the softmax)
STAGES = {
    "cpu": [(0.7, 512, 8, 4, 40), (0.3, 2048, 2, 12, 10)],
    "cuda": [(0.25, 512, 256, 4, 40), (0.25, 2048, 64, 12, 10), (0.3, 8192, 16, 32, 1), (0.2, 32768, 4, 48, 1)],
}
RETRIEVAL_LAYER = 2
FREE = ("model.layers.2.mlp", "model.layers.3", "model.norm")
PAGES_AT_16K = 128
PAGE, GRANULE = 128, 32


def selector_loss(q, k, batch, rng):
    """Cross entropy of the answer's page among page means, per asking row, as if there were 16K tokens of pages.

    Short sequences hold few pages of 128 tokens, so a page is made of the answer's granule of 32 tokens and three
    other granules; competitors are made of four others, and each counts as often as needed to fill 16K.
    """
    losses = []
    group = q.shape[1] // k.shape[1]
    for b, row, place in batch.links:
        granules = batch.context[b] // GRANULE
        mine = place // GRANULE
        if granules < 6 or mine >= granules:
            continue
        means = k[b, :, : granules * GRANULE].unflatten(1, (granules, GRANULE)).mean(2)       # [Hkv, granules, D]
        others = [g for g in range(granules) if g != mine]
        index = torch.tensor([[mine] + rng.sample(others, 3)] + [rng.sample(others, 4) for _ in range(12)], device=k.device)
        pages = means[:, index].mean(2)                                                        # [Hkv, 13, D]
        score = torch.einsum("gtd,gpd->gtp", q[b, :, row].unflatten(0, (-1, group)), pages) * q.shape[-1] ** -0.5
        score = score.float() + torch.cat([score.new_zeros(1), score.new_full((12,), math.log(PAGES_AT_16K / 12))])
        # A share of 0.6 is enough: beyond it only the scale of the logits would grow.
        losses.append((-score.log_softmax(-1)[..., 0] - 0.5).relu().mean())
    return torch.stack(losses).mean() if losses else q.sum() * 0


def rate(progress, peak):
    warm = min(1.0, progress / 0.02)
    return peak * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=pathlib.Path, required=True)
    parser.add_argument("--model", type=pathlib.Path, required=True, help="holds tokenizer.json; receives the checkpoint")
    parser.add_argument("--work", type=pathlib.Path, required=True, help="state.pt, for continuing")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--rate", type=float, default=4e-4)
    parser.add_argument("--circuit-rate", type=float, default=0.05, help="learning rate of the written weights, relative")
    parser.add_argument("--max-position", type=int, default=36000)
    parser.add_argument("--save-every", type=float, default=4, help="minutes")
    parser.add_argument("--selector-weight", type=float, default=0.5)
    parser.add_argument("--prose-weight", type=float, default=0.1)
    parser.add_argument("--hard", type=float, default=0.05, help="share of samples with several answers or variable chains")
    parser.add_argument("--start", type=pathlib.Path, help="begin with the weights of this checkpoint folder")
    parser.add_argument("--last-stage", type=int, help="stop the curriculum after this stage")
    parser.add_argument("--first-stage", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    if args.device == "cpu":
        torch.set_num_threads(args.threads)
    rng = random.Random(args.seed)
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    generator = Generator(Source(args.corpus, "train"), args.seed, args.hard)
    model = Llama(Config(vocab_size=tokenizer.get_vocab_size()))
    circuit.write(model, tokenizer, args.seed)
    if args.start:
        model.load_state_dict(load(args.start).state_dict())
    model.to(args.device)
    # Noise in the written circuit costs accuracy before gradients repair it, so what it occupies moves slowly.
    free = [p for n, p in model.named_parameters() if n.startswith(FREE)]
    written = [p for n, p in model.named_parameters() if not n.startswith(FREE)]
    groups = [{"params": free, "factor": 1.0}, {"params": written, "factor": args.circuit_rate}]
    optimiser = torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.95), weight_decay=0.0)
    state_path, step, elapsed = args.work / "state.pt", 0, 0.0
    args.work.mkdir(parents=True, exist_ok=True)
    if state_path.exists():
        state = torch.load(state_path, map_location=args.device)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        step, elapsed = state["step"], state["elapsed"]
        generator.rng.seed(args.seed + step)
        print("continuing at step", step, flush=True)

    stages = STAGES["cuda" if args.device.startswith("cuda") else "cpu"]
    stages = stages[args.first_stage : args.last_stage]
    total = sum(s[0] for s in stages)
    budget = args.minutes * 60
    last_save = elapsed
    seen = dict(answer=0.0, prose=0.0, selector=0.0, first=0.0, exact=0.0, count=0)
    while elapsed < budget:
        began = time.time()
        progress, passed = elapsed / budget, 0.0
        for share, tokens, size, questions, copies in stages:
            passed += share / total
            if progress < passed:
                break
        for g in optimiser.param_groups:
            g["lr"] = g["factor"] * rate(progress, args.rate)
        batch = make_batch(generator, tokenizer, tokens, size, questions, args.max_position, rng)
        ids, positions = batch.ids.to(args.device), batch.positions.to(args.device)
        bias = dilution_bias(batch, copies).to(args.device) if copies > 1 else None
        taps = []
        with torch.autocast("cuda", torch.bfloat16, enabled=args.device.startswith("cuda")):
            hidden = model.hidden(ids, positions, taps, bias)
            rows = torch.cat([batch.answer_rows, batch.prose_rows])
            picked = hidden[rows[:, 0], rows[:, 1]]
            logits = model.logits(picked).float()
        targets = ids[rows[:, 0], rows[:, 1] + 1]
        losses = F.cross_entropy(logits, targets, reduction="none")
        answers = len(batch.answer_rows)
        answer, prose = losses[:answers].mean(), losses[answers:].mean()
        selector = selector_loss(*taps[RETRIEVAL_LAYER], batch, rng)
        loss = answer + args.prose_weight * prose + args.selector_weight * selector
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step += 1

        right = (logits[:answers].argmax(-1) == targets[:answers]).cpu()
        turns = batch.answer_turn
        first = torch.cat([torch.tensor([True]), turns[1:] != turns[:-1]])
        exact = torch.tensor([right[turns == t].all() for t in turns.unique()]).float().mean()
        for name, value in (("answer", answer), ("prose", prose), ("selector", selector), ("first", right[first].float().mean()),
                            ("exact", exact)):
            seen[name] += float(value.detach())
        seen["count"] += 1
        elapsed += time.time() - began
        if step % 20 == 0:
            n = seen.pop("count")
            print(f"step {step} {elapsed / 60:.1f} min tokens {tokens} " + " ".join(f"{k} {v / n:.3f}" for k, v in seen.items()), flush=True)
            seen = dict.fromkeys(seen, 0.0) | {"count": 0}
        if elapsed - last_save > 60 * args.save_every or elapsed >= budget:
            last_save = elapsed
            save(model, args.model)
            state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "step": step, "elapsed": elapsed}
            torch.save(state, state_path.with_suffix(".partial"))
            state_path.with_suffix(".partial").replace(state_path)
    print("done: steps", step, "minutes", round(elapsed / 60, 1))


if __name__ == "__main__":
    main()
