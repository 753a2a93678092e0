"""Writes rope_goldens.h: RoPE inverse frequencies of transformers, for tests/unit/rope_frequencies_test.cc.

Usage: python tests/golden/make_rope_goldens.py   (needs torch and transformers 5; CPU only)
"""

import pathlib

import torch
import transformers
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

# name: (head_dim, rope_theta, scaling as in config.json)
CASES = {
    "Llama2": (128, 10000.0, {"rope_type": "default"}),
    "Qwen3": (128, 1000000.0, {"rope_type": "default"}),
    "Linear4": (64, 10000.0, {"rope_type": "linear", "factor": 4.0}),
    "Llama31_8B": (128, 500000.0, {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                   "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}),
    "Llama32_1B": (64, 500000.0, {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
                                  "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}),
    # Factors without a short binary form and a short context: most dimensions lie in the smooth passage.
    "Odd": (80, 12345.6, {"rope_type": "llama3", "factor": 3.3, "low_freq_factor": 0.7,
                          "high_freq_factor": 9.1, "original_max_position_embeddings": 300}),
}


def inverse_frequencies(head_dim, theta, scaling):
    config = LlamaConfig(hidden_size=head_dim, num_attention_heads=1, num_key_value_heads=1, head_dim=head_dim,
                         max_position_embeddings=131072, rope_parameters={"rope_theta": theta, **scaling})
    return LlamaRotaryEmbedding(config).inv_freq.to(torch.float32).tolist()


def main():
    kinds = {"default": "kNone", "linear": "kLinear", "llama3": "kLlama3"}
    lines = [
        f"// Made by make_rope_goldens.py with transformers {transformers.__version__}, torch "
        f"{torch.__version__.split('+')[0]}. Do not edit.",
        "#pragma once",
        "",
        "#include <cstdint>",
        "#include <vector>",
        "",
        '#include "engine/loader/model_config.h"',
        "",
        "struct RopeGolden {",
        "  const char* name;",
        "  std::int32_t head_dim;",
        "  double rope_theta;",
        "  compact::engine::RopeScaling scaling;",
        "  std::vector<float> inverse_frequencies;  // [head_dim / 2] radians per token",
        "};",
        "",
        "inline const std::vector<RopeGolden> kRopeGoldens = {",
    ]
    for name, (head_dim, theta, scaling) in CASES.items():
        fields = [f".kind = compact::engine::RopeScaling::Kind::{kinds[scaling['rope_type']]}",
                  f".factor = {scaling.get('factor', 1.0)}",
                  f".low_freq_factor = {scaling.get('low_freq_factor', 1.0)}",
                  f".high_freq_factor = {scaling.get('high_freq_factor', 4.0)}",
                  f".original_max_position_embeddings = {scaling.get('original_max_position_embeddings', 0)}"]
        lines.append(f'    {{"{name}", {head_dim}, {theta},')
        lines.append("     {" + ",\n      ".join(fields) + "},")
        # Hexadecimal, so that the values are the bits and not a rounding of them.
        values = [f"{value.hex()}f" for value in inverse_frequencies(head_dim, theta, scaling)]
        rows = [", ".join(values[i:i + 4]) for i in range(0, len(values), 4)]
        lines.append("     {" + ",\n      ".join(rows) + "}},")
    lines.append("};")
    path = pathlib.Path(__file__).with_name("rope_goldens.h")
    path.write_text("\n".join(lines) + "\n")
    print(f"wrote {path.name}: {len(CASES)} cases")


if __name__ == "__main__":
    main()
