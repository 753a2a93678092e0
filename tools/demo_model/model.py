"""A minimal Llama in torch: the same maths and parameter names as transformers' LlamaForCausalLM.

Kept small on purpose: plain RoPE, grouped-query attention, SwiGLU, tied embeddings. Positions are explicit, so that
training can skip ranges of them, and every layer can hand out q and k for the selector's loss.
"""

import dataclasses
import json
import os
import pathlib

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclasses.dataclass
class Config:
    vocab_size: int = 6144
    hidden_size: int = 256
    intermediate_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 64
    # 1e10: of the 32 RoPE pairs 18 turn by less than a third of a circle in 32K tokens, so they can carry content at any depth.
    rope_theta: float = 1e10
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 131072


SIZES = {
    "demo": Config(),
    "eval": Config(hidden_size=512, intermediate_size=512, num_hidden_layers=5, head_dim=128),
}


def rope_tables(config, positions):
    """cos, sin [.., T, D] for positions [.., T]; halves are paired (i, i + D/2) as in the Hugging Face layout."""
    half = config.head_dim // 2
    inverse = config.rope_theta ** (-torch.arange(half, device=positions.device, dtype=torch.float32) / half)
    angle = positions.float().unsqueeze(-1) * inverse
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cos + turned * sin


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)

    def project(self, x, cos, sin):
        """x [B, T, hidden] -> q [B, Hq, T, D], k and v [B, Hkv, T, D], q and k after RoPE."""
        batch, tokens, _ = x.shape
        shape = (batch, tokens, -1, self.c.head_dim)
        q, k, v = (p(x).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def merge(self, o):
        batch, _, tokens, _ = o.shape
        return self.o_proj(o.transpose(1, 2).reshape(batch, tokens, -1))

    def forward(self, x, cos, sin, taps, bias):
        q, k, v = self.project(x, cos, sin)
        if taps is not None:
            taps.append((q, k))
        group = self.c.num_attention_heads // self.c.num_key_value_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        if q.is_cuda:  # attention in bf16, everything else in fp32 or TF32: logits reach 200 and more
            q, k, v = (t.bfloat16() for t in (q, k, v))
            bias = bias if bias is None else bias.bfloat16()
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None)
        return self.merge(o.float())


class Mlp(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Norm(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(c.hidden_size))
        self.eps = c.rms_norm_eps

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self_attn, self.mlp = Attention(c), Mlp(c)
        self.input_layernorm, self.post_attention_layernorm = Norm(c), Norm(c)

    def forward(self, x, cos, sin, taps=None, bias=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, taps, bias)
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.norm = Norm(c)


class Llama(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Backbone(config)

    def hidden(self, ids, positions=None, taps=None, bias=None):
        """ids [B, T] -> normalised last hidden state [B, T, hidden].

        taps, if a list, receives (q, k) of each layer; bias [B, 1, T, T] replaces the causal mask (training only).
        """
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
        cos, sin = (t.unsqueeze(1) for t in rope_tables(self.config, positions))
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x, cos, sin, taps, bias)
        return self.model.norm(x)

    def logits(self, hidden):
        return F.linear(hidden, self.model.embed_tokens.weight)


def hf_config(c, bos, eos):
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.max_position_embeddings,
        "rope_theta": c.rope_theta,
        "rope_scaling": None,
        "rms_norm_eps": c.rms_norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": bos,
        "eos_token_id": eos,
        "use_cache": True,
    }


def write_atomic(path, write):
    """Readers of the folder never meet half a file."""
    partial = path.with_name(path.name + ".partial")
    write(partial)
    os.replace(partial, path)


def save(model, folder, bos=0, eos=1):
    """Writes config.json, generation_config.json and model.safetensors (bf16) in the Hugging Face layout."""
    from safetensors.torch import save_file

    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {n: p.detach().to("cpu", torch.bfloat16).contiguous() for n, p in model.state_dict().items()}
    write_atomic(folder / "model.safetensors", lambda p: save_file(weights, p, metadata={"format": "pt"}))
    config = json.dumps(hf_config(model.config, bos, eos), indent=2) + "\n"
    generation = json.dumps({"bos_token_id": bos, "eos_token_id": eos, "do_sample": False}, indent=2) + "\n"
    write_atomic(folder / "config.json", lambda p: p.write_text(config))
    write_atomic(folder / "generation_config.json", lambda p: p.write_text(generation))


def load(folder, device="cpu", dtype=torch.float32):
    from safetensors.torch import load_file

    folder = pathlib.Path(folder)
    raw = json.loads((folder / "config.json").read_text())
    config = Config(**{f.name: raw[f.name] for f in dataclasses.fields(Config)})
    model = Llama(config)
    model.load_state_dict({n: t.float() for n, t in load_file(folder / "model.safetensors").items()})
    return model.to(device, dtype)
