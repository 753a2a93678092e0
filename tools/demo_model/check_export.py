"""Loads a checkpoint with transformers and with model.py and compares their logits."""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from model import load

folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder)
theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
ours = load(folder)
text = "One of the special magic numbers for amber-lantern is: 4081726.\n" * 8 + "Here we go. There and back again."
ids = tokenizer(text, return_tensors="pt").input_ids
assert ids[0, 0] == theirs.config.bos_token_id, "the post-processor must prepend the first token"
with torch.no_grad():
    expected, got = theirs(ids).logits, ours.logits(ours.hidden(ids))
error = (expected - got).abs().max().item()
print(f"tokens {ids.shape[1]}, largest logit {expected.abs().max():.2f}, largest difference {error:.2e}")
assert error < 1e-2 * max(1.0, expected.abs().max().item())
