"""Writes mixed.safetensors with the safetensors package, for tests/unit/safetensors_test.cc.

Usage: python tests/golden/make_safetensors_golden.py   (needs torch and safetensors)
"""

import pathlib

import torch
from safetensors.torch import save_file

TENSORS = {
    "f32": torch.tensor([[0.5, -1.0, 2.0], [3.0, 4.25, -8.0]]),
    "bf16": torch.tensor([1.0, -2.0, 0.5, 256.0], dtype=torch.bfloat16),
    "f16": torch.tensor([[1.0, 65504.0], [-0.25, 0.0]], dtype=torch.float16),
    "f64": torch.tensor([3.141592653589793], dtype=torch.float64),
    "f8_e4m3": torch.tensor([1.0, 2.0, -4.0]).to(torch.float8_e4m3fn),
    "f8_e5m2": torch.tensor([1.0, 2.0]).to(torch.float8_e5m2),
    "i8": torch.tensor([-1, 2], dtype=torch.int8),
    "i16": torch.tensor([-300], dtype=torch.int16),
    "i32": torch.tensor([[70000]], dtype=torch.int32),
    "scalar_i64": torch.tensor(-5, dtype=torch.int64),
    "u8": torch.tensor([7, 8, 9], dtype=torch.uint8),
    "u64": torch.tensor([2**63], dtype=torch.uint64),
    "bool": torch.tensor([True, False]),
    "empty": torch.zeros((0, 4)),
    "n\u00e4me \"quoted\"": torch.tensor([42.0]),
}

if __name__ == "__main__":
    path = pathlib.Path(__file__).with_name("mixed.safetensors")
    save_file(TENSORS, path, metadata={"format": "pt", "note": "line\nbreak"})
    print(f"wrote {path.name}: {len(TENSORS)} tensors, {path.stat().st_size} bytes")
