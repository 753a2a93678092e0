"""Converts published AttnGate weights of SeerAttention (arXiv 2410.13276) to safetensors, for `compact --selector seer --gates FILE`.

    python3 tools/convert_gates.py attn_gate_weights.pth gates.safetensors [--layers N]

Input: a torch state dict. Tensors whose names end in
    layers.{n}.self_attn.attn_gate.mask_linear_k.weight
    layers.{n}.self_attn.attn_gate.mask_linear_q.weight   (gates that map their queries)
are written under `model.layers.{n}.self_attn.attn_gate.mask_linear_{k,q}.weight`, values and types unchanged. Every layer
from 0 on must be there, and with --layers exactly so many. Anything else in the file is named and refused: a gate of
another kind would be read wrongly.
"""

import argparse
import re
import sys

NAME = re.compile(r"(?:.*\.)?layers\.(\d+)\.self_attn\.attn_gate\.(mask_linear_[kq])\.weight")


def renamed(tensors: dict) -> dict:
    """Tensors under the documented names. Raises ValueError naming what does not belong."""
    result, unknown = {}, []
    for name, tensor in tensors.items():
        match = NAME.fullmatch(name)
        if not match:
            unknown.append(name)
            continue
        target = f"model.layers.{int(match[1])}.self_attn.attn_gate.{match[2]}.weight"
        if target in result:
            raise ValueError(f"{name}: {target} is there twice")
        if tensor.ndim != 3:
            raise ValueError(f"{name}: shape {list(tensor.shape)}; allowed: [heads, inputs, outputs]")
        result[target] = tensor
    if unknown:
        raise ValueError(f"no gate weights: {', '.join(sorted(unknown)[:5])}")
    return result


def check_layers(tensors: dict, expected: int) -> int:
    """The number of layers. Raises ValueError if one is missing, or they are not as many as expected (0: any number)."""
    maps = {"k": set(), "q": set()}
    for name in tensors:
        match = NAME.fullmatch(name)
        maps[match[2][-1]].add(int(match[1]))
    layers = expected or max(maps["k"], default=-1) + 1
    missing = sorted(set(range(layers)) - maps["k"])
    if layers == 0 or missing or len(maps["k"]) != layers:
        raise ValueError(f"key maps of {len(maps['k'])} layers, missing {missing[:5]}; allowed: all of 0 to {max(layers, 1) - 1}")
    if maps["q"] and maps["q"] != maps["k"]:
        raise ValueError("query maps in some layers only; allowed: in all, or in none")
    return layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input")
    parser.add_argument("output")
    parser.add_argument("--layers", type=int, default=0, help="layers that the model has")
    arguments = parser.parse_args()
    import torch
    from safetensors.torch import save_file
    try:
        tensors = renamed(torch.load(arguments.input, map_location="cpu", weights_only=True))
        layers = check_layers(tensors, arguments.layers)
    except ValueError as error:
        sys.exit(f"{arguments.input}: {error}")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, arguments.output)
    print(f"{layers} layers, {len(tensors)} tensors, first {next(iter(tensors.values())).shape}")


if __name__ == "__main__":
    main()
