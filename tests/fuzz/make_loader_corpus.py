"""Writes the seed corpora of safetensors_fuzz and config_fuzz: small valid files, and near misses of each check.

Usage: python tests/fuzz/make_loader_corpus.py   (standard library only)
"""

import json
import pathlib
import struct

ROOT = pathlib.Path(__file__).parent / "corpus"


def safetensors(header, data_bytes):
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + bytes(i & 255 for i in range(data_bytes))


def tensor(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


SAFETENSORS = {
    "no_tensors": safetensors({}, 0),
    "one": safetensors({"w": tensor("F32", [2], 0, 8)}, 8),
    "scalar": safetensors({"s": tensor("I64", [], 0, 8)}, 8),
    "types": safetensors({"__metadata__": {"format": "pt", "k": ""}, "a": tensor("BF16", [2, 3], 0, 12),
                          "b": tensor("F16", [1], 12, 14), "c": tensor("F8_E4M3", [3], 14, 17),
                          "d": tensor("BOOL", [2], 17, 19), "e": tensor("F64", [0, 4], 19, 19),
                          "f": tensor("U8", [1, 1, 1, 5], 19, 24)}, 24),
    "unordered": safetensors({"z": tensor("U8", [4], 0, 4), "a": tensor("I32", [1], 4, 8)}, 8),
    "padded": safetensors(b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}      ', 4),
    "escapes": safetensors(b'{"\\u00e4\\n\\"":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', 1),
    "overlap": safetensors({"a": tensor("U8", [4], 0, 4), "b": tensor("U8", [4], 3, 7)}, 7),
    "gap": safetensors({"a": tensor("U8", [4], 0, 4), "b": tensor("U8", [4], 5, 9)}, 9),
    "outside": safetensors({"a": tensor("U8", [9], 0, 9)}, 8),
    "huge_shape": safetensors({"a": tensor("F64", [2**31, 2**31, 2], 0, 8)}, 8),
    "huge_zero": safetensors({"a": tensor("F64", [2**62, 2**62, 0], 0, 0)}, 0),
    "twice": safetensors(b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]},"a":{}}', 1),
    "unknown_type": safetensors({"a": tensor("F4", [2], 0, 1)}, 1),
    "truncated": safetensors({"w": tensor("F32", [2], 0, 8)}, 8)[:-3],
    "length_limit": struct.pack("<Q", 100_000_001) + b"{}",
}

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 500000.0, "torch_dtype": "bfloat16",
    "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2,
}
LLAMA3_SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                  "original_max_position_embeddings": 512}
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "hidden_act": "silu", "dtype": "float32",
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"}, "use_sliding_window": False,
    "sliding_window": None, "layer_types": ["full_attention", "full_attention"], "eos_token_id": [2, 3],
}

CONFIG = {
    "llama": LLAMA,
    "llama3": {**LLAMA, "rope_scaling": LLAMA3_SCALING},
    "llama_new_words": {**LLAMA, "rope_theta": None, "rope_parameters": {**LLAMA3_SCALING, "rope_theta": 500000.0}},
    "llama_linear": {**LLAMA, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "qwen3": QWEN3,
    "qwen3_yarn": {**QWEN3, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "qwen3_moe": {**QWEN3, "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8, "num_experts_per_tok": 2,
                  "moe_intermediate_size": 32, "norm_topk_prob": True, "decoder_sparse_step": 2, "mlp_only_layers": [0]},
    "quantized": {**LLAMA, "quantization_config": {"quant_method": "awq"}},
    "generation": {"bos_token_id": 1, "eos_token_id": [2, 3, 4], "temperature": 0.6},
    "index": {"metadata": {"total_size": 16}, "weight_map": {"a": "model-00001-of-00002.safetensors",
                                                             "b": "model-00002-of-00002.safetensors"}},
    "index_outside": {"weight_map": {"a": "../outside.safetensors"}},
}


def main():
    for folder, files in (("safetensors", SAFETENSORS), ("config", CONFIG)):
        (ROOT / folder).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            data = content if isinstance(content, bytes) else (json.dumps(content, indent=1) + "\n").encode()
            suffix = ".safetensors" if folder == "safetensors" else ".json"
            (ROOT / folder / (name + suffix)).write_bytes(data)
        print(f"wrote {len(files)} files to {folder}")


if __name__ == "__main__":
    main()
