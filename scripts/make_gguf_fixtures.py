#!/usr/bin/env python3
"""Writes tests/fixtures/gguf/: tiny GGUF files, and what has to come out of them.

Files are written by the `gguf` package of llama.cpp. Expected values come from that package, from Hugging Face transformers
and from SentencePiece, none of which folio's authors wrote. Run it only to change the fixtures; its output is committed and
the same in every run:

    python3 -m venv .venv
    .venv/bin/pip install torch transformers safetensors gguf sentencepiece accelerate
    .venv/bin/python scripts/make_gguf_fixtures.py [--out DIRECTORY] [--only MODEL ...]

blocks.safetensors        per type, some blocks of bytes and their values by `gguf.quants.dequantize`
<model>/model.gguf        a random model
<model>/expected.safetensors  tokens, and logits of transformers in float64, of the weights as the file's types round them
<model>/model.safetensors, config.json   (llama) those weights as a Hugging Face checkpoint, in float32; others have config.json alone
tokenizers/<name>.gguf    a vocabulary without tensors
tokenizers/expected.json  texts, and their ids by transformers or SentencePiece

transformers also reads most of the models' GGUF files itself; its weights must be those that the logits are made from.
"""

import argparse
import io
import json
import math
import pathlib
import shutil
import zlib

import gguf
import numpy as np
import sentencepiece
import torch
import transformers
from gguf import GGMLQuantizationType as T
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

TOKENS = 24
POSITIONS = 64

BLOCKS = [T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0, T.Q2_K, T.Q3_K, T.Q4_K, T.Q5_K, T.Q6_K, T.IQ4_NL, T.IQ4_XS, T.MXFP4]

# Where the half-precision scales of a block of random bytes lie: at these bytes. With the size with which weights are about as large as others.
SCALES = {
    T.Q2_K: ([80, 82], 5e-3), T.Q3_K: ([108], 2e-3), T.Q4_K: ([0, 2], 2e-4), T.Q5_K: ([0, 2], 2e-4), T.Q6_K: ([208], 3e-5),
    T.IQ4_NL: ([0], 2e-3), T.IQ4_XS: ([0], 1e-4),
}

CORPUS = [
    "Once upon a time, in autumn, Mia hid the silver key under the old bridge. Later the clouds went away.",
    "The quick brown fox jumps over the lazy dog; it didn't stop, and they'd said it wouldn't. I'LL GO, WE'RE LATE!",
    "In 1984 there were 12345 people and 67 890 birds. 3.14159 is not 2,718,281. Call 555-0100 or 0x1F4A9.",
    "def f(x):\n    return [i ** 2 for i in range(x)]\n\n\tif x == 10:\n        print(\"ten\")\n",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. Ça va être là-bas. Привет, мир! 你好，世界。",
    "naïve café façade, déjà vu; Ελληνικά, العربية, हिन्दी, 日本語, 한국어. 😀 🎉🎉 👩‍🚀",
] * 3

TEXTS = [
    "",
    " ",
    "  ",
    "Hello, world!",
    " leading and trailing ",
    "Once upon a time, in autumn, Mia hid the silver key.",
    "a  b   c    d",
    "tabs\tand\nnewlines\n\n\r\n end",
    "12345 6 78 90123456789",
    "it's we'll THEY'RE I'd",
    "naïve café — “quotes” … ½ №5",
    "Привет, мир! 你好，世界。日本語 한국어 العربية",
    "😀 👩‍🚀🎉 \u0301 \u200b \ufeff",
    "x = y**2 + f(a[0], b->c) != \"d\" // e\n\treturn 0;",
    "\u0000\u0007 control \u007f",
    "Cafe\u0301 decomposed",
]

# name -> options: arch of the file, config of transformers, types by the ends of the file's names, and what else there is.
MODELS = {
    # A type each, so that rows have to be long.
    "llama": dict(
        arch="llama",
        config=dict(
            model_type="llama", vocab_size=32, hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
            num_hidden_layers=1, intermediate_size=32, tie_word_embeddings=False,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0),
        ),
        types=dict(
            token_embd=T.Q6_K, output=T.Q5_0, attn_q=T.Q4_K, attn_k=T.Q5_K, attn_v=T.Q6_K, attn_output=T.Q4_0,
            ffn_gate=T.Q4_1, ffn_up=T.Q5_1, ffn_down=T.Q8_0,
        ),
        checkpoint=True,
    ),
    # Biases, a tied head, the tokenizer and a chat template.
    "qwen2": dict(
        arch="qwen2",
        config=dict(
            model_type="qwen2", vocab_size=300, hidden_size=32, num_attention_heads=4, num_key_value_heads=2,
            num_hidden_layers=2, intermediate_size=64, tie_word_embeddings=True,
            rope_parameters=dict(rope_type="default", rope_theta=1000000.0),
        ),
        types=dict(token_embd=T.Q8_0, attn_q=T.Q4_0, attn_k=T.Q5_0, ffn_gate=T.Q4_0, ffn_up=T.Q5_1, ffn_down=T.Q4_1, default=T.Q8_0),
        tokenizer="qwen2",
    ),
    # Norms of queries and keys; heads wider than their share of the model.
    "qwen3": dict(
        arch="qwen3",
        config=dict(
            model_type="qwen3", vocab_size=48, hidden_size=24, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
            num_hidden_layers=2, intermediate_size=40, tie_word_embeddings=False,
            rope_parameters=dict(rope_type="default", rope_theta=1000000.0),
        ),
        types=dict(default=T.BF16),
    ),
    # Divisors of the rotary frequencies; biases of queries and keys, which are interleaved as well.
    "llama3": dict(
        arch="llama",
        config=dict(
            model_type="llama", vocab_size=48, hidden_size=32, num_attention_heads=2, num_key_value_heads=2,
            num_hidden_layers=2, intermediate_size=40, tie_word_embeddings=True, attention_bias=True, mlp_bias=True,
            rope_parameters=dict(
                rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=32,
            ),
        ),
        types=dict(default=T.F16),
    ),
    "llama_linear": dict(
        arch="llama",
        config=dict(
            model_type="llama", vocab_size=48, hidden_size=16, num_attention_heads=2, num_key_value_heads=2,
            num_hidden_layers=1, intermediate_size=24, tie_word_embeddings=True,
            rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=4.0),
        ),
        types=dict(default=T.F32),
    ),
    "llama_yarn": dict(
        arch="llama",
        config=dict(
            model_type="llama", vocab_size=48, hidden_size=32, num_attention_heads=2, num_key_value_heads=2,
            num_hidden_layers=1, intermediate_size=24, tie_word_embeddings=True,
            rope_parameters=dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=16),
        ),
        types=dict(default=T.F32),
    ),
    "gpt2": dict(
        arch="gpt2",
        config=dict(model_type="gpt2", vocab_size=48, n_embd=24, n_head=3, n_layer=2, n_positions=POSITIONS),
        types=dict(default=T.F16),
    ),
    # 4 of 16 dimensions are rotated.
    "gpt_neox": dict(
        arch="gptneox",
        config=dict(
            model_type="gpt_neox", vocab_size=48, hidden_size=32, num_attention_heads=2, num_hidden_layers=2,
            intermediate_size=64, tie_word_embeddings=False, use_parallel_residual=True, hidden_act="gelu",
            rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.25),
        ),
        types=dict(default=T.F16),
    ),
    # Interleaved queries and keys, experts.
    "mixtral": dict(
        arch="llama",
        config=dict(
            model_type="mixtral", vocab_size=48, hidden_size=32, num_attention_heads=4, num_key_value_heads=2,
            num_hidden_layers=1, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False,
            rope_parameters=dict(rope_type="default", rope_theta=1000000.0),
        ),
        types=dict(default=T.F16),
    ),
    # The other types of blocks.
    "qwen3moe": dict(
        arch="qwen3moe",
        config=dict(
            model_type="qwen3_moe", vocab_size=32, hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
            num_hidden_layers=1, intermediate_size=64, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2,
            norm_topk_prob=True, tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=10000.0),
        ),
        types=dict(
            token_embd=T.Q8_0, attn_q=T.Q2_K, attn_k=T.Q3_K, attn_v=T.IQ4_XS, attn_output=T.MXFP4, ffn_gate_inp=T.F32,
            ffn_gate_exps=T.Q4_K, ffn_up_exps=T.Q3_K, ffn_down_exps=T.IQ4_NL,
        ),
    ),
    # Biases, sinks, windows, MXFP4.
    "gpt_oss": dict(
        arch="gpt-oss",
        config=dict(
            model_type="gpt_oss", vocab_size=48, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
            num_hidden_layers=2, intermediate_size=32, num_local_experts=4, num_experts_per_tok=2, sliding_window=6,
            tie_word_embeddings=False,
            rope_parameters=dict(
                rope_type="yarn", rope_theta=150000.0, factor=4.0, original_max_position_embeddings=16, beta_fast=32.0,
                beta_slow=1.0, truncate=False,
            ),
        ),
        types=dict(ffn_gate_exps=T.MXFP4, ffn_up_exps=T.MXFP4, ffn_down_exps=T.MXFP4, ffn_gate_inp=T.F32, default=T.F16),
    ),
    "dots1": dict(
        arch="dots1",
        config=dict(
            model_type="dots1", vocab_size=48, hidden_size=32, num_attention_heads=4, num_key_value_heads=4, head_dim=8,
            num_hidden_layers=2, intermediate_size=40, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2,
            n_shared_experts=2, first_k_dense_replace=1, norm_topk_prob=True, routed_scaling_factor=2.5, sliding_window=None,
            tie_word_embeddings=False, rope_parameters=dict(rope_type="default", rope_theta=10000.0),
        ),
        types=dict(ffn_gate_inp=T.F32, default=T.F16),
    ),
    # LongRoPE of a part of each head, a window, two stacks of projections.
    "phi3": dict(
        arch="phi3",
        config=dict(
            model_type="phi3", vocab_size=48, hidden_size=32, num_attention_heads=2, num_key_value_heads=1,
            num_hidden_layers=2, intermediate_size=40, sliding_window=9, tie_word_embeddings=False, pad_token_id=0,
            original_max_position_embeddings=32,
            rope_parameters=dict(
                rope_type="longrope", rope_theta=10000.0, partial_rotary_factor=0.75, original_max_position_embeddings=32,
                short_factor=[1.0, 1.05, 1.25, 1.5, 2.0, 3.0], long_factor=[1.0, 1.5, 2.5, 4.0, 9.0, 14.0],
            ),
        ),
        types=dict(default=T.F16),
    ),
    # The fourth layer is not rotated.
    "smollm3": dict(
        arch="smollm3",
        config=dict(
            model_type="smollm3", vocab_size=48, hidden_size=16, num_attention_heads=2, num_key_value_heads=1,
            num_hidden_layers=4, intermediate_size=24, tie_word_embeddings=True, pad_token_id=0, no_rope_layer_interval=4,
            rope_parameters=dict(rope_type="default", rope_theta=2000000.0),
        ),
        types=dict(default=T.F16),
    ),
    # In three files.
    "olmo2": dict(
        arch="olmo2",
        config=dict(
            model_type="olmo2", vocab_size=48, hidden_size=32, num_attention_heads=4, num_key_value_heads=2,
            num_hidden_layers=2, intermediate_size=24, tie_word_embeddings=False, pad_token_id=0,
            rope_parameters=dict(rope_type="default", rope_theta=500000.0),
        ),
        types=dict(default=T.F16),
        split=9,
    ),
    "gemma2": dict(
        arch="gemma2",
        config=dict(
            model_type="gemma2", vocab_size=48, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            num_hidden_layers=2, intermediate_size=40, sliding_window=6, attn_logit_softcapping=2.0, final_logit_softcapping=5.0,
            query_pre_attn_scalar=16, tie_word_embeddings=True, pad_token_id=0,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0),
        ),
        types=dict(default=T.F16),
    ),
    # The sixth layer has no window.
    "gemma3": dict(
        arch="gemma3",
        config=dict(
            model_type="gemma3_text", vocab_size=48, hidden_size=16, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
            num_hidden_layers=6, intermediate_size=24, sliding_window=6, query_pre_attn_scalar=8, tie_word_embeddings=True,
            pad_token_id=0,
            rope_parameters=dict(
                full_attention=dict(rope_type="linear", rope_theta=1000000.0, factor=8.0),
                sliding_attention=dict(rope_type="default", rope_theta=10000.0),
            ),
        ),
        types=dict(default=T.F16),
    ),
    "deepseek_v2": dict(
        arch="deepseek2",
        config=dict(
            model_type="deepseek_v2", vocab_size=48, hidden_size=32, num_attention_heads=2, num_key_value_heads=2,
            num_hidden_layers=2, intermediate_size=40, moe_intermediate_size=12, n_routed_experts=4, num_experts_per_tok=2,
            n_shared_experts=2, first_k_dense_replace=1, norm_topk_prob=False, routed_scaling_factor=1.0, q_lora_rank=None,
            kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=12, v_head_dim=20, n_group=1, topk_group=1,
            topk_method="greedy", tie_word_embeddings=False,
            rope_parameters=dict(
                rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=16, beta_fast=32.0, beta_slow=1.0,
                mscale=0.707, mscale_all_dim=0.707,
            ),
        ),
        types=dict(ffn_gate_inp=T.F32, default=T.F16),
    ),
    # As old files have latents: in one piece, with the sizes of keys and values as they are made of them. No layer has experts.
    "deepseek_old": dict(
        arch="deepseek2",
        config=dict(
            model_type="deepseek_v2", vocab_size=32, hidden_size=16, num_attention_heads=2, num_key_value_heads=2,
            num_hidden_layers=1, intermediate_size=24, moe_intermediate_size=12, n_routed_experts=4, num_experts_per_tok=2,
            n_shared_experts=1, first_k_dense_replace=1, norm_topk_prob=False, routed_scaling_factor=1.0, q_lora_rank=None,
            kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=12, v_head_dim=20, n_group=1, topk_group=1,
            topk_method="greedy", tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=10000.0),
        ),
        types=dict(default=T.F16),
        old_latents=True,
    ),
    # Groups of experts, latents of queries, matrices of keys in blocks.
    "deepseek_v3": dict(
        arch="deepseek2",
        config=dict(
            model_type="deepseek_v3", vocab_size=48, hidden_size=32, num_attention_heads=2, num_key_value_heads=2,
            num_hidden_layers=2, intermediate_size=32, moe_intermediate_size=32, n_routed_experts=8, num_experts_per_tok=3,
            n_shared_experts=1, first_k_dense_replace=1, norm_topk_prob=True, routed_scaling_factor=1.5, q_lora_rank=32,
            kv_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=32, v_head_dim=16, n_group=4, topk_group=2,
            scoring_func="sigmoid", tie_word_embeddings=False, rope_parameters=dict(rope_type="default", rope_theta=10000.0),
        ),
        types=dict(ffn_gate_inp=T.F32, default=T.Q8_0),
    ),
}

ARCHES = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}

# Experts as transformers holds them, by the end of the name: the format's names and the parts.
EXPERTS = {
    "mlp.experts.gate_up_proj": ["ffn_gate_exps.weight", "ffn_up_exps.weight"],
    "mlp.experts.gate_up_proj_bias": ["ffn_gate_exps.bias", "ffn_up_exps.bias"],
    "mlp.experts.down_proj": ["ffn_down_exps.weight"],
    "mlp.experts.down_proj_bias": ["ffn_down_exps.bias"],
    "mlp.router.weight": ["ffn_gate_inp.weight"],
    "mlp.router.bias": ["ffn_gate_inp.bias"],
    "mlp.gate.weight": ["ffn_gate_inp.weight"],
    "mlp.gate.e_score_correction_bias": ["exp_probs_b.bias"],
    "self_attn.sinks": ["attn_sinks.weight"],
}


class Exact(TorchFunctionMode):
    """Replaces float32 by float64 in the calls of PyTorch made under it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        widen = lambda value: torch.float64 if value is torch.float32 else value
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        return function(*map(widen, args), **{name: widen(value) for name, value in (kwargs or {}).items()})


def seed_of(*parts):
    return zlib.crc32("/".join(map(str, parts)).encode())


def random_blocks(kind, blocks, scale, seed):
    """Blocks of random bytes, with scales of about `scale`."""
    noise = np.random.default_rng(seed)
    data = noise.integers(0, 256, (blocks, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    for at in SCALES[kind][0]:
        data[:, at : at + 2] = (scale * noise.uniform(0.5, 1.5, blocks)).astype(np.float16).view(np.uint8).reshape(blocks, 2)
    return data


def encode(values, kind, seed):
    """A tensor's bytes in a type, and the values that they stand for."""
    if kind == T.F32:
        return values, values
    if kind == T.F16:
        return values.astype(np.float16), values.astype(np.float16).astype(np.float32)
    if kind in SCALES:
        # The package has no quantisation to these: any bytes are as good as those of noise.
        *rows, columns = values.shape
        data = random_blocks(kind, values.size // gguf.GGML_QUANT_SIZES[kind][0], SCALES[kind][1], seed).reshape(*rows, -1)
    else:
        data = gguf.quants.quantize(values, kind)
    return data, gguf.quants.dequantize(data, kind).reshape(values.shape).astype(np.float32)


def interleave(values, heads):
    """Rows of queries or keys as converters for llama.cpp order them: halves of a head turn into pairs."""
    width = values.shape[0] // heads
    order = [head * width + half * (width // 2) + i for head in range(heads) for i in range(width // 2) for half in range(2)]
    return values[order]


def by_kind(values, heads):
    """Rows of [head, (query, key, value), width] as all queries, all keys, all values."""
    width = values.shape[0] // heads // 3
    order = [head * 3 * width + part * width + i for part in range(3) for head in range(heads) for i in range(width)]
    return values[order]


def parts(key, values, arch, config, names, old_latents):
    """A tensor as converters for llama.cpp store it: names, and its elements in their order."""
    heads = config.num_attention_heads
    block, end = key.split(".")[2:3], ".".join(key.split(".")[3:])
    if end in EXPERTS:
        to = [f"blk.{block[0]}.{name}" for name in EXPERTS[end]]
        if arch == "gpt-oss" and "proj" in end:
            # Gate and up alternate; matrices are transposed.
            values = np.swapaxes(values, 1, 2) if values.ndim == 3 else values
            pieces = [values[:, i :: len(to)] for i in range(len(to))]
        else:
            pieces = np.split(values, len(to), axis=1) if len(to) > 1 else [values]
        return list(zip(to, pieces))
    if end == "self_attn.kv_b_proj.weight" and not old_latents:
        rows = values.reshape(heads, -1, values.shape[1])
        key_rows, value_rows = rows[:, : config.qk_nope_head_dim], rows[:, config.qk_nope_head_dim :]
        return [(f"blk.{block[0]}.attn_k_b.weight", np.swapaxes(key_rows, 1, 2)), (f"blk.{block[0]}.attn_v_b.weight", value_rows)]
    to = names.get_name(key, try_suffixes=(".weight", ".bias"))
    assert to, key
    if arch in ("llama", "smollm3") and ("q_proj" in key or "k_proj" in key):
        values = interleave(values, heads if "q_proj" in key else config.num_key_value_heads)
    if arch == "gptneox" and "query_key_value" in key:
        values = by_kind(values, heads)
    if arch == "gpt2" and any(part in key for part in ("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        values = values.T
    return [(to, values)]


def settings(writer, arch, config, old_latents):
    rope = getattr(config, "rope_parameters", None) or {}
    windowed, rope = rope.get("sliding_attention"), rope.get("full_attention", rope)
    setting = lambda name: getattr(config, name, None)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    inner = setting("intermediate_size") or 4 * config.hidden_size
    writer.add_feed_forward_length(inner)
    writer.add_head_count(config.num_attention_heads)
    if hasattr(config, "num_key_value_heads"):
        writer.add_head_count_kv(1 if arch == "deepseek2" and not old_latents else config.num_key_value_heads)
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(setting("layer_norm_eps") or config.layer_norm_epsilon)
    head_dim = setting("head_dim") or config.hidden_size // config.num_attention_heads
    if arch == "deepseek2":
        writer.add_kv_lora_rank(config.kv_lora_rank)
        if config.q_lora_rank:
            writer.add_q_lora_rank(config.q_lora_rank)
        made = [config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim]
        if old_latents:
            writer.add_key_length(made[0])
            writer.add_value_length(made[1])
        else:
            writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
            writer.add_value_length(config.kv_lora_rank)
            writer.add_key_length_mla(made[0])
            writer.add_value_length_mla(made[1])
        head_dim = config.qk_rope_head_dim
    elif head_dim * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    # Gemma 2's converter leaves out what is the default.
    if rope and arch != "gemma2":
        writer.add_rope_freq_base(rope["rope_theta"])
    if rope and not arch.startswith("gemma"):
        writer.add_rope_dimension_count(int(head_dim * (rope.get("partial_rotary_factor") or 1)))
    if windowed:
        writer.add_rope_freq_base_swa(windowed["rope_theta"])
    if rope.get("rope_type") in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for key, add in [("beta_fast", writer.add_rope_scaling_yarn_beta_fast), ("beta_slow", writer.add_rope_scaling_yarn_beta_slow)]:
            if key in rope:
                add(rope[key])
    if arch == "deepseek2" and rope.get("mscale_all_dim"):
        writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])
    if rope.get("rope_type") == "longrope":
        original = rope["original_max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(original)
        scale = config.max_position_embeddings / original
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))
    if arch == "gptneox":
        writer.add_parallel_residual(config.use_parallel_residual)
    if arch in ("gemma2", "gemma3", "gpt-oss", "phi3"):
        writer.add_sliding_window(config.sliding_window)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    experts = next((setting(name) for name in ("num_local_experts", "num_experts", "n_routed_experts") if setting(name)), None)
    if not experts:
        return
    writer.add_expert_count(experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    width = setting("moe_intermediate_size") or (inner if arch == "gpt-oss" else None)
    if width:
        writer.add_expert_feed_forward_length(width)
    if arch in ("deepseek2", "dots1"):
        writer.add_expert_shared_count(config.n_shared_experts)
        writer.add_leading_dense_block_count(config.first_k_dense_replace)
        writer.add_expert_weights_scale(config.routed_scaling_factor)
        writer.add_expert_weights_norm(config.norm_topk_prob)
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)
        sigmoid = config.model_type != "deepseek_v2"
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID if sigmoid else gguf.ExpertGatingFuncType.SOFTMAX)


def make_model(name, options, directory):
    arch = options["arch"]
    config = dict(options["config"])
    if config["model_type"] != "gpt2":
        config["max_position_embeddings"] = POSITIONS
    config = AutoConfig.for_model(**config, bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager").eval()
    directory.mkdir(parents=True)
    writer = gguf.GGUFWriter(directory / "model.gguf", arch, split_max_tensors=options.get("split", 0))
    old_latents = options.get("old_latents", False)
    settings(writer, arch, config, old_latents)
    if "tokenizer" in options:
        add_tokenizer(writer, TOKENIZERS[options["tokenizer"]])
        writer.add_chat_template(TEMPLATE)
    else:
        writer.add_vocab_size(config.vocab_size)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)

    names = gguf.get_tensor_name_map(ARCHES[arch], config.num_hidden_layers)
    heads = config.num_attention_heads
    stored = {}
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings or key.endswith((".attn.bias", ".masked_bias")):
            continue
        noise = np.random.default_rng(seed_of(name, key)).standard_normal(tuple(tensor.shape), dtype=np.float32)
        is_norm = tensor.ndim == 1 and key.endswith("weight")
        # Gemma's norms are stored less 1, but not in this format.
        offset = np.float32(is_norm and arch.startswith("gemma"))
        values = 1 + 0.3 * noise if is_norm else noise * (0.3 if config.hidden_size < 100 else 0.12)
        flat = np.empty(values.size, dtype=np.float32)
        places = parts(key, np.arange(values.size).reshape(values.shape), arch, config, names, old_latents)
        for (to, written), (_, place) in zip(parts(key, values, arch, config, names, old_latents), places):
            is_vector = written.ndim == 1 or to.endswith(".bias")
            kind = T.F32 if is_vector else options["types"].get(to.split(".")[-2], options["types"].get("default"))
            data, rounded = encode(np.ascontiguousarray(written), kind, seed_of(name, to))
            writer.add_tensor(to, data, raw_dtype=kind)
            flat[place.reshape(-1)] = (rounded - offset).reshape(-1)
        stored[key] = torch.from_numpy(flat.reshape(values.shape))
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "llama3":
        width = config.hidden_size // heads
        plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, width, 2).double() / width)
        with Exact():
            scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config)
        writer.add_tensor("rope_freqs.weight", (plain / scaled).float().numpy(), raw_dtype=T.F32)
    for length in ("long", "short") if rope.get("rope_type") == "longrope" else ():
        writer.add_tensor(f"rope_factors_{length}.weight", np.array(rope[f"{length}_factor"], dtype=np.float32), raw_dtype=T.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    missing, unexpected = model.load_state_dict(stored, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    # It knows few architectures in this format, no divisors of frequencies, and fails at BF16.
    if name in ("llama", "qwen2", "llama_linear", "llama_yarn", "gpt2"):
        # It takes the length of GPT-2's texts for granted, unless the configuration is given.
        given = dict(config=config) if arch == "gpt2" else {}
        read = AutoModelForCausalLM.from_pretrained(directory, gguf_file="model.gguf", dtype=torch.float32, **given)
        read = read.state_dict()
        for key, tensor in stored.items():
            assert torch.equal(read[key].float(), tensor), f"transformers reads another {key}"
    model = model.double()
    rotary = [module for module in model.modules() if hasattr(module, "rope_type")]
    tokens = torch.randint(3, config.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(seed_of(name)))
    with Exact():
        for module in rotary:
            functions = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS
            if isinstance(module.rope_type, dict):
                # A base for each kind of layers.
                for kind, rope_type in module.rope_type.items():
                    init = functions.get(rope_type, module.compute_default_rope_parameters)
                    setattr(module, f"{kind}_inv_freq", init(config, layer_type=kind)[0])
            else:
                init = functions.get(module.rope_type, module.compute_default_rope_parameters)
                module.inv_freq = init(config)[0]
        logits = model(input_ids=tokens[None], use_cache=False).logits[0]
    save_file(dict(tokens=tokens.int(), logits=logits.float()), directory / "expected.safetensors")
    if options.get("checkpoint"):
        save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    if options.get("checkpoint") or list(MODELS).index(name) >= list(MODELS).index("mixtral"):
        (directory / "config.json").write_text(config.to_json_string())
    return dict(name=name, logits_std=round(logits.std().item(), 3))


TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"

DEEPSEEK_LETTERS = r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"
DEEPSEEK_MARKS = r"\s?[!-/:-~！-／：-～‘-‟　-。]+"
DEEPSEEK_SCRIPTS = "[一-龥\u0800-一가-\ud7ff]+"

# Those that transformers doesn't know, as `llama-vocab.cpp` has them: each splits what the one before has left whole.
LLAMA_CPP_SPLITS = {
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2_SPLIT, r"\p{N}+", r"[0-9][0-9][0-9]"],
    "smollm": [r"\p{N}", GPT2_SPLIT],
    "deepseek-llm": [
        r"[\r\n]", DEEPSEEK_LETTERS, DEEPSEEK_MARKS, r"\s+$", DEEPSEEK_SCRIPTS, r"\p{N}+",
    ],
    "deepseek-coder": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", DEEPSEEK_SCRIPTS, r"\p{N}"],
    "deepseek-v3": [
        r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ],
}


def pre_tokenizer(splits):
    steps = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in splits]
    return pre_tokenizers.Sequence(steps + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not splits)])


def bpe(splits, size, specials):
    """A byte-level vocabulary trained on the corpus: tokens in order, and merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer(splits)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=sorted(alphabet), show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get) + specials
    return tokens, [" ".join(merge) for merge in model["merges"]]


def sentencepiece_model():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, model_type="bpe", vocab_size=600, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=True, character_coverage=0.98,
        num_threads=1, minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def make_vocabularies():
    from transformers.integrations.gguf import gguf_tokenizer_mapping as mapping

    found = {}
    for name, pre, size, specials, extra in [
        ("gpt2", "gpt-2", 400, ["<|endoftext|>"], dict(bos="<|endoftext|>", eos="<|endoftext|>")),
        ("llama_bpe", "llama-bpe", 420, ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"],
         dict(bos="<|begin_of_text|>", eos="<|end_of_text|>")),
        ("qwen2", "qwen2", 296, ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>"], dict(eos="<|im_end|>")),
        ("tekken", "tekken", 400, ["<unk>", "<s>", "</s>"], dict(bos="<s>", eos="</s>", unknown="<unk>")),
        ("default", "default", 400, ["<|endoftext|>"], dict(bos="<|endoftext|>", eos="<|endoftext|>")),
        ("smollm", "smollm", 400, ["<|im_end|>"], dict(bos="<|im_end|>", eos="<|im_end|>")),
        ("gpt_4o", "gpt-4o", 400, ["<|startoftext|>", "<|return|>", "<|call|>", "<|end|>"], dict(bos="<|startoftext|>", eos="<|return|>")),
        ("deepseek_llm", "deepseek-llm", 400, ["<｜end▁of▁sentence｜>"], dict(eos="<｜end▁of▁sentence｜>")),
        ("deepseek_coder", "deepseek-coder", 400, ["<|EOT|>"], dict(eos="<|EOT|>")),
        ("deepseek_v3", "deepseek-v3", 400, ["<｜end▁of▁sentence｜>"], dict(eos="<｜end▁of▁sentence｜>")),
    ]:
        known = mapping.GGUF_PRE_TOKENIZER_SPLITS.get(pre)
        tokens, merges = bpe(LLAMA_CPP_SPLITS.get(pre) or ([known] if known else []), size, specials)
        kinds = [3 if token in specials else 1 for token in tokens]
        if "<think>" in specials:
            kinds[tokens.index("<think>")] = 4
        found[name] = dict(model="gpt2", pre=pre, tokens=tokens, merges=merges, kinds=kinds,
                           ids={key: tokens.index(token) for key, token in extra.items()})
    processor = sentencepiece_model()
    count = processor.get_piece_size()
    kinds = [2 if processor.is_unknown(i) else 3 if processor.is_control(i) else 6 if processor.is_byte(i) else 1 for i in range(count)]
    found["llama_spm"] = dict(
        model="llama", pre="default", tokens=[processor.id_to_piece(i) for i in range(count)],
        scores=[processor.get_score(i) for i in range(count)], kinds=kinds, ids=dict(bos=1, eos=2, unknown=0), processor=processor,
    )
    return found


def add_tokenizer(writer, vocabulary):
    writer.add_tokenizer_model(vocabulary["model"])
    writer.add_tokenizer_pre(vocabulary["pre"])
    writer.add_token_list(vocabulary["tokens"])
    writer.add_token_types(vocabulary["kinds"])
    if "scores" in vocabulary:
        writer.add_token_scores(vocabulary["scores"])
    if "merges" in vocabulary:
        writer.add_token_merges(vocabulary["merges"])
    for name, token in vocabulary["ids"].items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)


def make_tokenizers(directory):
    directory.mkdir(parents=True)
    expected = {}
    for name, vocabulary in TOKENIZERS.items():
        path = directory / f"{name}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        add_tokenizer(writer, vocabulary)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        texts = list(TEXTS)
        if "processor" in vocabulary:
            # SentencePiece itself. It makes nothing of the text "", and cuts a text at its first NUL.
            texts = [text for text in texts if "\0" not in text]
            ids = [vocabulary["processor"].encode(text) for text in texts]
        else:
            specials = [token for token, kind in zip(vocabulary["tokens"], vocabulary["kinds"]) if kind in (3, 4)]
            texts += ["".join(f"{token}a b {token}\n" for token in specials)]
            if name == "qwen2":
                vocab = {token: i for i, token in enumerate(vocabulary["tokens"])}
                tokenizer = transformers.Qwen2Tokenizer(vocab=vocab, merges=[tuple(m.split(" ")) for m in vocabulary["merges"]])
                tokenizer.add_special_tokens({"additional_special_tokens": specials[:3]}, replace_extra_special_tokens=False)
                tokenizer.add_tokens(specials[3:])
            elif vocabulary["pre"] in LLAMA_CPP_SPLITS:
                vocab = {token: i for i, token in enumerate(vocabulary["tokens"])}
                model = models.BPE(vocab=vocab, merges=[tuple(m.split(" ")) for m in vocabulary["merges"]])
                tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))
                tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer(LLAMA_CPP_SPLITS[vocabulary["pre"]])
                tokenizer.backend_tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in specials])
            else:
                tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=path.name)
            ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        expected[name] = dict(texts=texts, ids=ids)
    text = json.dumps(expected, ensure_ascii=True, separators=(",", ":"))
    (directory / "expected.json").write_text(text + "\n")


def make_blocks(path):
    tensors = {}
    for kind in BLOCKS:
        blocks = 12 if gguf.GGML_QUANT_SIZES[kind][0] == 32 else 3
        noise = np.random.default_rng(seed_of(kind.name))
        if kind in SCALES:
            data = random_blocks(kind, blocks, 1e-3, seed_of(kind.name))
            data[-1] = noise.integers(0, 256, data.shape[1], dtype=np.uint8)
            for at in SCALES[kind][0]:
                data[-1, at : at + 2] = np.array([-0.37], dtype=np.float16).view(np.uint8)
        else:
            data = gguf.quants.quantize(noise.standard_normal((blocks, 32), dtype=np.float32), kind)
            # Codes that quantisation doesn't make, and a subnormal scale.
            data[-1] = noise.integers(0, 256, data.shape[1], dtype=np.uint8)
            if kind == T.MXFP4:
                # The smallest exponents, whose scales are subnormal, and about the largest whose values are finite.
                data[-3:, 0] = [0, 1, 251]
            else:
                data[-1, 0:2] = np.array([3e-6], dtype=np.float16).view(np.uint8)
            if kind in (T.Q4_1, T.Q5_1):
                data[-1, 2:4] = np.array([-1.5], dtype=np.float16).view(np.uint8)
        values = gguf.quants.dequantize(data, kind).astype(np.float32)
        assert np.isfinite(values).all(), kind
        tensors[f"{kind.name}.bytes"] = torch.from_numpy(data.reshape(-1).copy())
        tensors[f"{kind.name}.values"] = torch.from_numpy(values.reshape(-1).copy())
    save_file(tensors, path)


def main():
    global TOKENIZERS
    default = pathlib.Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "gguf"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=default, help="where the fixtures go")
    parser.add_argument("--only", nargs="*", metavar="MODEL", choices=list(MODELS), help="make these, and leave the rest as it is")
    options = parser.parse_args()
    out, only = options.out, options.only
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # README.md stays.
    for name in only or ["tokenizers", *MODELS]:
        shutil.rmtree(out / name, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    TOKENIZERS = make_vocabularies()
    if not only:
        make_blocks(out / "blocks.safetensors")
        make_tokenizers(out / "tokenizers")
    for name, options in MODELS.items():
        if only and name not in only:
            continue
        print(json.dumps(make_model(name, options, out / name)), flush=True)
    for path in out.rglob("*.*"):
        if path.is_file():
            path.chmod(0o644)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(json.dumps(dict(bytes=size, torch=torch.__version__, transformers=transformers.__version__)))
    assert size < 1_400_000


if __name__ == "__main__":
    main()
