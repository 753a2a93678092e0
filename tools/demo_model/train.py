"""Trains the checkpoints of assets/: structured initialisation, then a curriculum of growing length.

  python train.py --corpus DIR --model assets/demo --work DIR --device cpu --minutes 60
  python train.py --corpus DIR --model assets/demo --work DIR --device cuda --minutes 25
  python train.py --size eval --corpus DIR --model assets/eval --work DIR --device cuda --minutes 9 --max-position 70000

Loss: cross entropy on answers + a little language modelling + a selector term, which asks that the mean key of the page that
holds the answer stand out among the page means for the row that asks (so that `mean-key` can find single needles).
The run continues from WORK/state.pt if it exists; MODEL is rewritten atomically at every save.
"""

import argparse
import dataclasses
import math
import pathlib
import time

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

import circuit
from batches import GRANULE, RIVALS, BatchStream, dilution_bias
from model import SIZES, Llama, load, save

# (share of the time, tokens, sequences, questions per sequence, copies of far tokens in the softmax)
STAGES = {
    "cpu": [(0.7, 512, 8, 4, 40), (0.3, 2048, 2, 12, 10)],
    "cuda": [(0.2, 512, 256, 4, 40), (0.25, 2048, 64, 12, 10), (0.3, 8192, 16, 32, 1), (0.25, 32768, 4, 48, 1),
             (0.1, 65536, 2, 64, 1)],
}
RETRIEVAL_LAYER = 2
WRITTEN = ("model.embed_tokens", "model.layers.0.", "model.layers.1.", "model.layers.2.self_attn", "model.layers.2.input_layernorm")
PAGES_AT_16K = 128
LOG_EVERY_STEPS = 20


def selector_loss(q, k, batch):
    """Cross entropy of the answer's page among page means, per asking row, as if there were 16K tokens of pages.

    q [B, Hq, T, D], k [B, Hkv, T, D] after RoPE. Each competitor counts as often as needed to fill 16K.
    """
    if len(batch.pages) == 0:
        return q.sum() * 0
    heads, group = k.shape[1], q.shape[1] // k.shape[1]
    sequence, row = batch.asking_rows.unbind(1)
    means = k.float().unflatten(2, (-1, GRANULE)).mean(3)                                     # [B, Hkv, granules, D]
    pages = means.transpose(1, 2)[sequence[:, None, None], batch.pages].mean(2)               # [K, 1 + RIVALS, Hkv, D]
    asking = q[sequence, :, row].float().unflatten(1, (heads, group))                         # [K, Hkv, G, D]
    score = torch.einsum("ngtd,npgd->ngtp", asking, pages) * q.shape[-1] ** -0.5
    weight = score.new_full((1 + RIVALS,), math.log(PAGES_AT_16K / RIVALS))
    weight[0] = 0
    # A share of 0.6 is enough: beyond it only the scale of the logits would grow.
    return (-(score + weight).log_softmax(-1)[..., 0] - 0.5).relu().mean()


def rate(progress, peak):
    warm = min(1.0, progress / 0.02)
    return peak * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def losses(model, batch, copies, weights):
    """-> the training loss and what the log shows of it (tensors on the device: reading them waits for it)."""
    bias = dilution_bias(batch.needles, copies) if copies > 1 else None
    taps = []
    hidden = model.hidden(batch.ids, batch.positions, taps, bias)
    rows = torch.cat([batch.answer_rows, batch.prose_rows])
    logits = model.logits(hidden[rows[:, 0], rows[:, 1]])
    targets = batch.ids[rows[:, 0], rows[:, 1] + 1]
    each = F.cross_entropy(logits, targets, reduction="none")
    answers = len(batch.answer_rows)
    answer, prose = each[:answers].mean(), each[answers:].mean()
    selector = selector_loss(*taps[RETRIEVAL_LAYER], batch)
    with torch.no_grad():
        right = (logits[:answers].argmax(-1) == targets[:answers]).float()
        turns = batch.answer_turn
        first = torch.cat([turns.new_ones(1), turns[1:] - turns[:-1]]).bool()
        exact = torch.ones(int(turns[-1]) + 1, device=right.device).scatter_reduce(0, turns, right, "amin")
    shown = {"answer": answer, "prose": prose, "selector": selector, "first": right[first].mean(), "exact": exact.mean()}
    return answer + weights.prose_weight * prose + weights.selector_weight * selector, {n: v.detach() for n, v in shown.items()}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=pathlib.Path, required=True)
    parser.add_argument("--model", type=pathlib.Path, required=True, help="holds tokenizer.json; receives the checkpoint")
    parser.add_argument("--work", type=pathlib.Path, required=True, help="state.pt, for continuing")
    parser.add_argument("--size", choices=SIZES, default="demo")
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
    parser.add_argument("--counting", type=float, default=0.0, help="share of samples that ask for the most frequent words")
    parser.add_argument("--start", type=pathlib.Path, help="begin with the weights of this checkpoint folder")
    parser.add_argument("--last-stage", type=int, help="stop the curriculum after this stage")
    parser.add_argument("--first-stage", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0, help="processes that make batches; 0: this one")
    return parser.parse_args()


def main():
    args = arguments()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")  # TF32 products on CUDA; nothing on the CPU
    if args.device == "cpu":
        torch.set_num_threads(args.threads)
    tokenizer_file = args.model / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    model = Llama(dataclasses.replace(SIZES[args.size], vocab_size=tokenizer.get_vocab_size()))
    circuit.write(model, tokenizer, args.seed)
    if args.start:
        model.load_state_dict(load(args.start).state_dict())
    model.to(args.device)
    # Noise in the written circuit costs accuracy before gradients repair it, so what it occupies moves slowly.
    free = [p for n, p in model.named_parameters() if not n.startswith(WRITTEN)]
    written = [p for n, p in model.named_parameters() if n.startswith(WRITTEN)]
    groups = [{"params": free, "factor": 1.0}, {"params": written, "factor": args.circuit_rate}]
    optimiser = torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.95), weight_decay=0.0)
    state_path, step, elapsed = args.work / "state.pt", 0, 0.0
    args.work.mkdir(parents=True, exist_ok=True)
    if state_path.exists():
        state = torch.load(state_path, map_location=args.device)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        step, elapsed = state["step"], state["elapsed"]
        print("continuing at step", step, flush=True)

    stages = STAGES["cuda" if args.device.startswith("cuda") else "cpu"][args.first_stage : args.last_stage]
    total = sum(s[0] for s in stages)
    stream = BatchStream(args.corpus, tokenizer_file, args.seed + step, args.hard, args.counting, args.max_position, [s[1:4] for s in stages])
    batches = iter(torch.utils.data.DataLoader(stream, batch_size=None, num_workers=args.workers))
    copies = {tokens: count for _, tokens, _, _, count in stages}
    budget = args.minutes * 60
    last_save = elapsed
    seen, skipped = {}, 0
    while elapsed < budget:
        began = time.time()
        progress, passed = elapsed / budget, 0.0
        for stage, (share, *_) in enumerate(stages):
            passed += share / total
            if progress < passed:
                break
        stream.set_stage(stage)
        for g in optimiser.param_groups:
            g["lr"] = g["factor"] * rate(progress, args.rate)
        batch = next(batches).to(args.device)
        tokens = batch.ids.shape[1]
        loss, shown = losses(model, batch, copies[tokens], args)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if torch.isfinite(norm):
            optimiser.step()
        else:
            skipped += 1
        step += 1
        for name, value in shown.items():
            seen.setdefault(name, []).append(value)
        elapsed += time.time() - began
        if step % LOG_EVERY_STEPS == 0:
            means = " ".join(f"{name} {float(torch.stack(values).mean()):.3f}" for name, values in seen.items())
            print(f"step {step} {elapsed / 60:.1f} min tokens {tokens} {means} skipped {skipped}", flush=True)
            seen = {}
        if elapsed - last_save > 60 * args.save_every or elapsed >= budget:
            last_save = elapsed
            save(model, args.model)
            state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "step": step, "elapsed": elapsed}
            torch.save(state, state_path.with_suffix(".partial"))
            state_path.with_suffix(".partial").replace(state_path)
    print("done: steps", step, "minutes", round(elapsed / 60, 1))


if __name__ == "__main__":
    main()
