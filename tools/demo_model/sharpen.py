"""Scales the key-matching pairs of the retrieval layer after training (a temperature for H, nothing else).

Page means dilute a needle by 128; this sets how far above the other pages its page stands. Dense answers do not change, as all
tokens of a value gain alike.
"""

import argparse
import pathlib

import torch

import circuit
from model import load, save
from train import RETRIEVAL_LAYER


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--factor", type=float, default=1.25, help="of queries and of keys")
    parser.add_argument("--quiet", action="store_true", help="write circuit.quiet_prose again (checkpoints older than it)")
    args = parser.parse_args()
    model = load(args.source)
    if args.quiet:
        circuit.quiet_prose(model)
    attention = model.model.layers[RETRIEVAL_LAYER].self_attn
    pairs = circuit.Layout(model.config).key_coordinates()
    with torch.no_grad():
        for weight in (attention.q_proj.weight, attention.k_proj.weight):
            weight.view(-1, model.config.head_dim, weight.shape[1])[:, pairs] *= args.factor
    save(model, args.out)


if __name__ == "__main__":
    main()
