"""Golden logits from transformers, in fp32, for model_golden_test.cc and engine_gpu_test.cc.

    python tests/golden/make_model_goldens.py [--only fp32|gpu|moe|demo]
    python tests/golden/make_model_goldens.py --shape CONFIG_JSON --layers 4 --out DIR     (on a GPU machine)

Needs torch, transformers and safetensors. Writes two tiny random checkpoints with their logits, and logits of the
shipped checkpoint at a few positions of a long prompt:

    tests/golden/llama31_tiny/   Llama-3.1: GQA 4:1, llama3 RoPE scaling that bites within the prompt, untied head, bf16
    tests/golden/qwen3_tiny/     Qwen3: query and key norms, head_dim != hidden / heads, tied head, fp32, two shards
    tests/golden/llama31_d64/    the same two with heads of 64 and 128, in bf16: what GPU kernels can compute
    tests/golden/qwen3_d128/
    tests/golden/qwen3_moe/      Qwen3-MoE: experts in two of three layers, bf16, three shards, a prompt whose tokens are
                                 chosen one by one so that no router is near a tie: which expert wins must not hang on
                                 the rounding of bf16
    tests/golden/demo_logits.safetensors

Each holds `tokens` [n] i32, `positions` [k] i32 and `logits` [k, vocab] f32: the logits after each of those positions;
and `bf16_error` [1] f32: the largest error of transformers' own bf16 at these positions, for tests of bf16 backends.

--shape writes a checkpoint of that shape with fewer layers, and its logits, to DIR: too large to keep, made where
`COMPACT_GOLDEN_DIR=DIR engine_gpu_test` runs.
"""

import argparse
import json
import pathlib

import torch
from safetensors.torch import save_file
from transformers import (AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM,
                          Qwen3MoeConfig, Qwen3MoeForCausalLM)

HERE = pathlib.Path(__file__).resolve().parent
DEMO = HERE.parents[1] / "assets" / "demo"
SEED = 20260516


def widen_random_weights(model: torch.nn.Module) -> None:
    """The default initialisation leaves logits nearly flat and norms at one: a wrong norm or rotation would not show."""
    device = model.device
    generator = torch.Generator(device).manual_seed(SEED)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data = 1 + 0.3 * torch.randn(parameter.shape, generator=generator, device=device)
        else:
            scale = 1.0 if "embed" in name else 2.0 / parameter.shape[-1] ** 0.5
            parameter.data = scale * torch.randn(parameter.shape, generator=generator, device=device)


def cast_weights(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Weights alone: rotation frequencies are fp32 in every loaded model, and would not survive bf16."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def save_logits(model: torch.nn.Module, tokens: torch.Tensor, positions: list[int], path: pathlib.Path) -> None:
    keep = torch.tensor(positions, device=model.device)
    with torch.no_grad():
        logits = cast_weights(model, torch.float32)(tokens[None].to(model.device), logits_to_keep=keep).logits[0]
        in_bf16 = cast_weights(model, torch.bfloat16)(tokens[None].to(model.device), logits_to_keep=keep).logits[0].float()
    error = (in_bf16 - logits).abs().max()
    save_file({"tokens": tokens.to(torch.int32), "positions": torch.tensor(positions, dtype=torch.int32),
               "logits": logits.cpu().float().contiguous(), "bf16_error": error.cpu().reshape(1)}, path)
    print(f"{path}: {len(tokens)} tokens, logits {tuple(logits.shape)}, "
          f"largest {logits.abs().max():.2f}, bf16 error {error:.4f}")


def routed_margin(router_logits: tuple[torch.Tensor, ...], experts_per_token: int) -> float:
    """How far the last expert chosen is ahead of the first not chosen, in the spread of all; the least of all layers."""
    margins = []
    for logits in router_logits:
        ordered = logits[-1].float().sort(descending=True).values
        margins.append(((ordered[experts_per_token - 1] - ordered[experts_per_token]) / ordered.std()).item())
    return min(margins)


def tokens_without_ties(model: torch.nn.Module, num_tokens: int, least_margin: float) -> torch.Tensor:
    """Random tokens, each drawn anew until no router of its layers is near a tie."""
    generator = torch.Generator().manual_seed(SEED + 1)
    cache, tokens = DynamicCache(), []
    while len(tokens) < num_tokens:
        candidate = torch.randint(0, model.config.vocab_size, (1, 1), generator=generator)
        with torch.no_grad():
            out = model(candidate, past_key_values=cache, output_router_logits=True)
        if routed_margin(out.router_logits, model.config.num_experts_per_tok) >= least_margin:
            tokens.append(candidate.item())
        else:
            cache.crop(-1)
    return torch.tensor(tokens)


def tiny(config, model_class, directory: pathlib.Path, dtype: torch.dtype, shard_size: str) -> None:
    model = model_class(config).eval()
    widen_random_weights(model)
    cast_weights(model, dtype).save_pretrained(directory, max_shard_size=shard_size)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    if hasattr(config, "num_experts_per_tok"):
        tokens = tokens_without_ties(model, 300, 0.15)
    else:
        tokens = torch.randint(0, config.vocab_size, (300,), generator=torch.Generator().manual_seed(SEED + 1))
    save_logits(model, tokens, [0, 1, 15, 16, 127, 128, 200, 298, 299], directory / "logits.safetensors")


def shape(config_file: str, layers: int, directory: pathlib.Path) -> None:
    values = json.loads(pathlib.Path(config_file).read_text())
    config = {"llama": LlamaConfig, "qwen3": Qwen3Config, "qwen3_moe": Qwen3MoeConfig}[values["model_type"]](**{**values, "num_hidden_layers": layers})
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    widen_random_weights(model)
    cast_weights(model, torch.bfloat16).save_pretrained(directory)
    tokens = torch.randint(0, config.vocab_size, (3000,), generator=torch.Generator().manual_seed(SEED + 3))
    save_logits(model, tokens, [0, 127, 1023, 1024, 2047, 2999], directory / "logits.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["fp32", "gpu", "moe", "demo"],
                        help="only the tiny models, those for GPUs, the mixture of experts, or the shipped one")
    parser.add_argument("--shape", metavar="CONFIG_JSON", help="a checkpoint of this shape instead, made on a GPU")
    parser.add_argument("--layers", type=int, default=4, help="of --shape")
    parser.add_argument("--out", type=pathlib.Path, help="of --shape")
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    if arguments.shape:
        shape(arguments.shape, arguments.layers, arguments.out)
        return
    if arguments.only in (None, "fp32"):
        tiny(LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=8,
                         num_key_value_heads=2, head_dim=16, max_position_embeddings=512, rms_norm_eps=1e-5,
                         tie_word_embeddings=False, bos_token_id=0, eos_token_id=[1, 2],
                         rope_parameters={"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0,
                                          "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                          "original_max_position_embeddings": 64}),
             LlamaForCausalLM, HERE / "llama31_tiny", torch.bfloat16, "5GB")
        tiny(Qwen3Config(vocab_size=80, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=7,
                         num_key_value_heads=1, head_dim=32, max_position_embeddings=512, rms_norm_eps=1e-6,
                         tie_word_embeddings=True, bos_token_id=None, eos_token_id=1,
                         rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}),
             Qwen3ForCausalLM, HERE / "qwen3_tiny", torch.float32, "100KB")
    if arguments.only in (None, "gpu"):
        tiny(LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=1, head_dim=64, max_position_embeddings=512, rms_norm_eps=1e-5,
                         tie_word_embeddings=False, bos_token_id=0, eos_token_id=[1, 2],
                         rope_parameters={"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0,
                                          "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                          "original_max_position_embeddings": 64}),
             LlamaForCausalLM, HERE / "llama31_d64", torch.bfloat16, "5GB")
        tiny(Qwen3Config(vocab_size=80, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=128, max_position_embeddings=512, rms_norm_eps=1e-6,
                         tie_word_embeddings=True, bos_token_id=None, eos_token_id=1,
                         rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}),
             Qwen3ForCausalLM, HERE / "qwen3_d128", torch.bfloat16, "5GB")
    if arguments.only in (None, "moe"):
        tiny(Qwen3MoeConfig(vocab_size=80, hidden_size=72, intermediate_size=112, moe_intermediate_size=40,
                            num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_experts=12,
                            num_experts_per_tok=3, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[1],
                            max_position_embeddings=512, rms_norm_eps=1e-6, tie_word_embeddings=False, bos_token_id=None,
                            eos_token_id=1, rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}),
             Qwen3MoeForCausalLM, HERE / "qwen3_moe", torch.bfloat16, "300KB")
    if arguments.only not in (None, "demo"):
        return
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(SEED + 2)
    tokens = torch.randint(2, model.config.vocab_size, (2600,), generator=generator)
    save_logits(model, tokens, [0, 127, 1023, 1024, 2047, 2599], HERE / "demo_logits.safetensors")


if __name__ == "__main__":
    main()
