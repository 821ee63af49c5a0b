#!/usr/bin/env python3
"""Writes tests/fixtures/models/: a tiny random checkpoint per architecture, with the logits that it has to give.

The models are made, saved and computed by Hugging Face transformers, so that the loader and the decoder answer to
something that folio's authors did not write. Run it only to change the models; its output is committed (the versions
are in tests/fixtures/models/README.md) and the same in every run:

    python3 -m venv .venv
    .venv/bin/pip install torch transformers safetensors
    .venv/bin/python scripts/make_model_fixtures.py [--out DIRECTORY] [--only NAME ...] [--search]

Each model is made from random weights, saved with `save_pretrained`, and loaded again from that directory in float64.
Everything expected comes from the loaded model: from the weights as rounded to the file's type, and from config.json as
transformers reads it. transformers computes norms, softmax and rotary angles in float32 whatever the model's type;
`Exact` turns those into float64 too, so that the expected values carry no rounding but their own, to float32.

expected.safetensors holds a ragged batch of sequences, one after another:
    lengths  I32 [sequences]          tokens in each
    tokens   I32 [sum of lengths]
    logits   F32 [sum of lengths, vocab_size], of every token, each sequence computed by itself
    greedy   I32 [sequences, STEPS]   the continuation by the most probable token, STEPS times

A fixture is refused, and `--search` looks for the next seed, unless
- at every greedy step the best logit leads by MIN_GAP standard deviations of the logits, which rounding cannot turn,
- no continuation contains an end-of-sequence token, and each has MIN_DISTINCT different tokens,
- the logits' standard deviation is within LOGITS_STD, and attention is neither uniform nor fixed on one key,
- every tensor matters: shifted by one element, it changes some logit by MIN_EFFECT standard deviations,
- positions matter, and so does the scaling of rotary embeddings if the model has one,
- every setting that its options name matters,
- the last expert that a token is sent to leads the next one by MIN_ROUTER_GAP, which rounding cannot turn.
"""

import argparse
import copy
import json
import math
import pathlib
import shutil
import zlib

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

LENGTHS = [1, 7, 37, 90]
STEPS = 24
POSITIONS = 128
MAX_BYTES = 400_000
MIN_GAP = 0.01
MIN_DISTINCT = 5
LOGITS_STD = (1.0, 3.0)
# Mean over heads, layers and queries of the entropy of attention, as a fraction of the uniform one's.
ATTENTION_ENTROPY = (0.2, 0.9)
MIN_EFFECT = 0.05
# Of the router's logits, whose standard deviation is about 1.5. float32 is off by some 1e-6.
MIN_ROUTER_GAP = 2e-4

# Implementations that compute in float64.
EAGER = dict(attn_implementation="eager", experts_implementation="eager")

assert max(LENGTHS) + STEPS <= POSITIONS

# name -> options:
#   config    arguments of transformers' AutoConfig.for_model
#   seed      of weights and tokens, found by --search
#   dtype     of the file's weights; float32 if absent
#   shard     max_shard_size of save_pretrained
#   drop, put keys removed from and written into config.json after saving, to make it look as older versions wrote it
#   strip     prefix removed from the tensors' names
#   masks     name of causal masks, one per layer, which older versions saved with the weights, and their type
#   inv_freq  name of rotary frequencies, one tensor per layer, which older versions saved too
#   noise     of randomize, where it differs: a tied head and large embeddings would repeat the last token
#   packed    True: the experts' tensors as transformers holds them, not as it saves them by default
#   mxfp4     True: the experts' weights in MXFP4, as OpenAI's checkpoints have them
#   without   changes of the configuration, by name, each of which has to change logits
MODELS = {
    "gpt2": dict(
        seed=0,
        config=dict(model_type="gpt2", vocab_size=97, n_embd=48, n_head=6, n_layer=2, n_positions=POSITIONS),
    ),
    # As the `gpt2` checkpoint on the Hub: no `transformer.` prefix, and the causal masks are saved.
    "gpt2_hub": dict(
        seed=13,
        config=dict(
            model_type="gpt2", vocab_size=97, n_embd=32, n_head=4, n_layer=2, n_positions=POSITIONS, n_inner=72
        ),
        strip="transformer.",
        masks=("h.{}.attn.bias", torch.float32),
        drop=["dtype", "add_cross_attention", "tie_word_embeddings", "pad_token_id", "use_cache"],
        put=dict(n_ctx=POSITIONS, transformers_version=None),
    ),
    # Multi-head attention, the head not tied.
    "llama": dict(
        seed=11,
        config=dict(
            model_type="llama", vocab_size=101, hidden_size=48, num_attention_heads=3, num_key_value_heads=3,
            num_hidden_layers=2, intermediate_size=88, tie_word_embeddings=False,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0),
        ),
    ),
    # Grouped queries, tied head, bfloat16. config.json as Llama 3.1's: `rope_theta` and `rope_scaling`, `torch_dtype`,
    # several ends of sequence, no `head_dim`.
    # With this base and length the 8 wavelengths lie on both sides of, and between, the limits of the scaling.
    "llama3": dict(
        seed=138,
        dtype=torch.bfloat16,
        config=dict(
            model_type="llama", vocab_size=151, hidden_size=64, num_attention_heads=4, num_key_value_heads=2,
            num_hidden_layers=3, intermediate_size=112, tie_word_embeddings=True, rms_norm_eps=1e-5,
            eos_token_id=[150, 149],
            rope_parameters=dict(
                rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=32,
            ),
        ),
        drop=["rope_parameters", "head_dim", "dtype", "pad_token_id"],
        put=dict(
            rope_theta=500.0,
            rope_scaling=dict(
                factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32,
                rope_type="llama3",
            ),
            torch_dtype="bfloat16",
            transformers_version="4.43.0",
        ),
    ),
    # One key-value head of 24, half of `hidden_size`.
    "llama_yarn": dict(
        seed=4,
        config=dict(
            model_type="llama", vocab_size=103, hidden_size=48, num_attention_heads=2, num_key_value_heads=1,
            num_hidden_layers=2, intermediate_size=80, tie_word_embeddings=True,
            rope_parameters=dict(
                rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=32
            ),
        ),
    ),
    # config.json as Llama 1's and early Llama 2's: no `num_key_value_heads`, no `rope_theta`, scaling under "type";
    # the checkpoint has rotary frequencies.
    "llama_linear": dict(
        seed=11,
        config=dict(
            model_type="llama", vocab_size=109, hidden_size=56, num_attention_heads=7, num_key_value_heads=7,
            num_hidden_layers=2, intermediate_size=64, tie_word_embeddings=False,
            rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=4.0),
        ),
        inv_freq="model.layers.{}.self_attn.rotary_emb.inv_freq",
        drop=["rope_parameters", "head_dim", "dtype", "pad_token_id", "num_key_value_heads", "attention_bias",
              "attention_dropout", "mlp_bias"],
        put=dict(
            rope_scaling=dict(type="linear", factor=4.0), torch_dtype="float32", transformers_version="4.31.0"
        ),
    ),
    # Biases of queries, keys and values; seven query heads on one; saved in several files.
    "qwen2": dict(
        seed=24,
        shard="120KB",
        config=dict(
            model_type="qwen2", vocab_size=113, hidden_size=56, num_attention_heads=7, num_key_value_heads=1,
            num_hidden_layers=3, intermediate_size=88, tie_word_embeddings=True,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0),
        ),
    ),
    # Norms of queries and keys; `head_dim` is not hidden_size / num_attention_heads.
    "qwen3": dict(
        seed=26,
        config=dict(
            model_type="qwen3", vocab_size=107, hidden_size=48, num_attention_heads=4, num_key_value_heads=2,
            head_dim=24, num_hidden_layers=2, intermediate_size=72, tie_word_embeddings=False,
            rope_parameters=dict(rope_type="default", rope_theta=1000000.0),
        ),
    ),
    # 6 of 24 dimensions are rotated; float16.
    "gpt_neox": dict(
        seed=2,
        dtype=torch.float16,
        config=dict(
            model_type="gpt_neox", vocab_size=131, hidden_size=48, num_attention_heads=2, num_hidden_layers=3,
            intermediate_size=192, tie_word_embeddings=False, use_parallel_residual=True,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.25),
        ),
    ),
    # config.json as Pythia's: `rotary_pct` and `rotary_emb_base`; the checkpoint has causal masks, the value that they
    # put in, and rotary frequencies.
    "gpt_neox_sequential": dict(
        seed=89,
        config=dict(
            model_type="gpt_neox", vocab_size=137, hidden_size=48, num_attention_heads=3, num_hidden_layers=2,
            intermediate_size=136, tie_word_embeddings=False, use_parallel_residual=False,
            rope_parameters=dict(rope_type="default", rope_theta=5000.0, partial_rotary_factor=0.25),
        ),
        masks=("gpt_neox.layers.{}.attention.bias", torch.bool),
        inv_freq="gpt_neox.layers.{}.attention.rotary_emb.inv_freq",
        drop=["rope_parameters", "dtype", "pad_token_id", "attention_bias", "is_decoder"],
        put=dict(rotary_pct=0.25, rotary_emb_base=5000, torch_dtype="float32", transformers_version="4.24.0"),
    ),
    # A window that is shorter than the text.
    "mistral": dict(
        seed=2,
        config=dict(
            model_type="mistral", vocab_size=101, hidden_size=48, num_attention_heads=6, num_key_value_heads=2,
            num_hidden_layers=2, intermediate_size=80, sliding_window=16, tie_word_embeddings=True,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0),
        ),
        without={"window": dict(sliding_window=POSITIONS)},
    ),
    # Stacked projections, a window; 12 of 16 dimensions are rotated, by LongRoPE's short factors up to POSITIONS tokens.
    "phi3": dict(
        seed=72,
        config=dict(
            model_type="phi3", vocab_size=103, hidden_size=64, num_attention_heads=4, num_key_value_heads=2,
            num_hidden_layers=2, intermediate_size=72, sliding_window=20, tie_word_embeddings=False, pad_token_id=0,
            max_position_embeddings=4 * POSITIONS, original_max_position_embeddings=POSITIONS,
            rope_parameters=dict(
                rope_type="longrope", rope_theta=10000.0, partial_rotary_factor=0.75,
                short_factor=[1.0, 1.1, 1.5, 2.0, 3.0, 4.5], long_factor=[1.0, 2.0, 5.0, 9.0, 14.0, 20.0],
            ),
        ),
        without={"window": dict(sliding_window=None)},
    ),
    # config.json as Phi-3's: `rope_theta`, and `rope_scaling` with `type`. Every text of more than one token is a
    # long one, and at the first position no rotation shows.
    "phi3_long": dict(
        seed=2,
        config=dict(
            model_type="phi3", vocab_size=107, hidden_size=48, num_attention_heads=3, num_key_value_heads=3,
            num_hidden_layers=2, intermediate_size=72, tie_word_embeddings=True, pad_token_id=0,
            original_max_position_embeddings=1,
            rope_parameters=dict(
                rope_type="longrope", rope_theta=10000.0, attention_factor=1.1875,
                short_factor=[1.0] * 8, long_factor=[1.0, 1.25, 1.5, 2.0, 3.0, 5.0, 9.0, 14.0],
            ),
        ),
        drop=["rope_parameters", "dtype", "pad_token_id", "partial_rotary_factor"],
        put=dict(
            rope_theta=10000.0,
            rope_scaling=dict(
                type="longrope", attention_factor=1.1875, short_factor=[1.0] * 8,
                long_factor=[1.0, 1.25, 1.5, 2.0, 3.0, 5.0, 9.0, 14.0],
            ),
            pad_token_id=0, torch_dtype="float32", transformers_version="4.40.0",
        ),
    ),
    # The second of three layers has no rotary embedding, and a window.
    "smollm3": dict(
        seed=6,
        config=dict(
            model_type="smollm3", vocab_size=109, hidden_size=48, num_attention_heads=6, num_key_value_heads=2,
            num_hidden_layers=3, intermediate_size=64, tie_word_embeddings=True, pad_token_id=0,
            no_rope_layer_interval=2, use_sliding_window=True, sliding_window=12,
            rope_parameters=dict(rope_type="default", rope_theta=2000000.0),
        ),
        drop=["no_rope_layers", "layer_types"],
        without={
            "window": dict(use_sliding_window=False, layer_types=["full_attention"] * 3),
            "layer without rope": dict(no_rope_layers=[1, 1, 1]),
        },
    ),
    # Norms behind attention and MLP, and of all queries and all keys of a token.
    "olmo2": dict(
        seed=9,
        config=dict(
            model_type="olmo2", vocab_size=113, hidden_size=64, num_attention_heads=4, num_key_value_heads=2,
            num_hidden_layers=2, intermediate_size=72, tie_word_embeddings=False, pad_token_id=0,
            rope_parameters=dict(rope_type="default", rope_theta=500000.0),
        ),
    ),
    # Soft caps, windows in every other layer, a scale of logits that is not the head's, norms before and behind.
    # config.json as Gemma 2's: no `layer_types`.
    "gemma2": dict(
        seed=12,
        dtype=torch.bfloat16,
        config=dict(
            model_type="gemma2", vocab_size=101, hidden_size=64, num_attention_heads=4, num_key_value_heads=2,
            head_dim=24, num_hidden_layers=3, intermediate_size=56, sliding_window=12, query_pre_attn_scalar=16,
            attn_logit_softcapping=2.0, final_logit_softcapping=10.0, tie_word_embeddings=False,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0),
        ),
        drop=["layer_types", "rope_parameters", "dtype"],
        put=dict(rope_theta=10000.0, torch_dtype="bfloat16", transformers_version="4.42.4"),
        without={
            "window": dict(sliding_window=POSITIONS),
            "full layer": dict(layer_types=["sliding_attention"] * 3),
            "soft cap of attention": dict(attn_logit_softcapping=None),
            "soft cap of the head": dict(final_logit_softcapping=None),
            "scale of attention": dict(query_pre_attn_scalar=24),
        },
    ),
    # Norms of queries and keys, a base of the rotation for layers with a window and another, scaled, for the others.
    "gemma3": dict(
        seed=126,
        noise=dict(embedding=0.14, post_norm=2.0),
        dtype=torch.bfloat16,
        config=dict(
            model_type="gemma3_text", vocab_size=103, hidden_size=64, num_attention_heads=4, num_key_value_heads=1,
            head_dim=16, num_hidden_layers=4, intermediate_size=72, sliding_window=12, query_pre_attn_scalar=64,
            layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            rope_parameters=dict(
                full_attention=dict(rope_type="linear", factor=4.0, rope_theta=100000.0),
                sliding_attention=dict(rope_type="default", rope_theta=1000.0),
            ),
        ),
        without={
            "window": dict(sliding_window=POSITIONS),
            "full layers": dict(layer_types=["sliding_attention"] * 4),
            "scale of attention": dict(query_pre_attn_scalar=16),
        },
    ),
    # config.json as Gemma 3's: `rope_local_base_freq`, `sliding_window_pattern`.
    "gemma3_older": dict(
        seed=23,
        config=dict(
            model_type="gemma3_text", vocab_size=97, hidden_size=64, num_attention_heads=2, num_key_value_heads=1,
            head_dim=16, num_hidden_layers=3, intermediate_size=48, sliding_window=10, query_pre_attn_scalar=16,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"], final_logit_softcapping=10.0,
            tie_word_embeddings=False,
            rope_parameters=dict(
                full_attention=dict(rope_type="linear", factor=8.0, rope_theta=50000.0),
                sliding_attention=dict(rope_type="default", rope_theta=500.0),
            ),
        ),
        drop=["layer_types", "rope_parameters", "dtype"],
        put=dict(
            rope_theta=50000.0, rope_local_base_freq=500.0, rope_scaling=dict(rope_type="linear", factor=8.0),
            sliding_window_pattern=2, torch_dtype="float32", transformers_version="4.50.0.dev0",
        ),
        without={"window": dict(sliding_window=POSITIONS), "soft cap of the head": dict(final_logit_softcapping=None)},
    ),
    # Latents, queries without one; YaRN with an attention factor of its own and a scale of logits. config.json as
    # DeepSeek-V2-Lite's.
    "deepseek_v2": dict(
        seed=30,
        config=dict(
            model_type="deepseek_v2", vocab_size=97, hidden_size=48, num_attention_heads=3, num_key_value_heads=3,
            num_hidden_layers=2, intermediate_size=64, tie_word_embeddings=False, first_k_dense_replace=2,
            kv_lora_rank=24, q_lora_rank=None, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=20,
            rope_parameters=dict(
                rope_type="yarn", rope_theta=10000.0, factor=8.0, original_max_position_embeddings=16,
                beta_fast=32.0, beta_slow=1.0, mscale=1.5, mscale_all_dim=0.75,
            ),
        ),
        drop=["rope_parameters", "head_dim", "dtype"],
        put=dict(
            rope_theta=10000.0,
            rope_scaling=dict(
                beta_fast=32, beta_slow=1, factor=8, mscale=1.5, mscale_all_dim=0.75,
                original_max_position_embeddings=16, type="yarn",
            ),
            torch_dtype="float32", transformers_version="4.33.1",
        ),
        without={"scale of attention": dict(rope_parameters=dict(
            rope_type="yarn", rope_theta=10000.0, factor=8.0, original_max_position_embeddings=16,
            attention_factor=(0.15 * math.log(8.0) + 1) / (0.075 * math.log(8.0) + 1),
        ))},
    ),
    # Latents of queries, too, and biases of what makes latents. Nine heads on one row are more than a decode kernel takes.
    "deepseek_v3": dict(
        seed=27,
        config=dict(
            model_type="deepseek_v3", vocab_size=101, hidden_size=40, num_attention_heads=9, num_key_value_heads=9,
            num_hidden_layers=2, intermediate_size=56, tie_word_embeddings=False, first_k_dense_replace=2,
            kv_lora_rank=32, q_lora_rank=20, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12,
            attention_bias=True, rope_parameters=dict(rope_type="default", rope_theta=10000.0),
        ),
        without={"interleaved pairs": dict(rope_interleave=False)},
    ),
    # Pairs that lie half of the rotated part apart.
    "deepseek_v3_half_split": dict(
        seed=25,
        config=dict(
            model_type="deepseek_v3", vocab_size=89, hidden_size=40, num_attention_heads=2, num_key_value_heads=2,
            num_hidden_layers=2, intermediate_size=48, tie_word_embeddings=True, first_k_dense_replace=2,
            kv_lora_rank=16, q_lora_rank=24, qk_nope_head_dim=8, qk_rope_head_dim=16, v_head_dim=16,
            rope_interleave=False, rope_parameters=dict(rope_type="default", rope_theta=10000.0),
        ),
        without={"halves as pairs": dict(rope_interleave=True)},
    ),
    # The second layer has experts: the best three of the two best of four groups, and two that all tokens share.
    "deepseek_v2_experts": dict(
        seed=9,
        config=dict(
            model_type="deepseek_v2", vocab_size=97, hidden_size=40, num_attention_heads=2, num_key_value_heads=2,
            num_hidden_layers=2, intermediate_size=48, tie_word_embeddings=False, first_k_dense_replace=1,
            kv_lora_rank=24, q_lora_rank=16, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=16,
            n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=12, n_shared_experts=2,
            topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=3.0,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0),
        ),
        without={
            "groups": dict(topk_method="greedy"), "scale": dict(routed_scaling_factor=1.0),
            "number of experts": dict(num_experts_per_tok=2),
        },
    ),
    # All layers have experts, by sigmoids and with corrections.
    "deepseek_v3_experts": dict(
        seed=121,
        config=dict(
            model_type="deepseek_v3", vocab_size=89, hidden_size=40, num_attention_heads=2, num_key_value_heads=2,
            num_hidden_layers=2, intermediate_size=48, tie_word_embeddings=True, first_k_dense_replace=0,
            kv_lora_rank=16, q_lora_rank=None, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12,
            n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=12, n_shared_experts=1,
            n_group=4, topk_group=2, rope_parameters=dict(rope_type="default", rope_theta=10000.0),
        ),
        without={
            "groups": dict(topk_group=4), "scale": dict(routed_scaling_factor=1.0),
            "sum of weights": dict(norm_topk_prob=False), "number of experts": dict(num_experts_per_tok=1),
        },
    ),
    # Two of four experts, in tensors of their own.
    "mixtral": dict(
        seed=25,
        config=dict(
            model_type="mixtral", vocab_size=101, hidden_size=48, num_attention_heads=6, num_key_value_heads=2,
            num_hidden_layers=2, intermediate_size=36, num_local_experts=4, num_experts_per_tok=2,
            sliding_window=None, tie_word_embeddings=False, rms_norm_eps=1e-5,
            rope_parameters=dict(rope_type="default", rope_theta=1000000.0),
        ),
        without={"number of experts": dict(num_experts_per_tok=1)},
    ),
    # The experts of a layer in one tensor, the window of Mixtral's first release; bfloat16.
    "mixtral_packed": dict(
        seed=8,
        dtype=torch.bfloat16,
        packed=True,
        config=dict(
            model_type="mixtral", vocab_size=103, hidden_size=64, num_attention_heads=4, num_key_value_heads=2,
            num_hidden_layers=2, intermediate_size=40, num_local_experts=5, num_experts_per_tok=3,
            sliding_window=12, tie_word_embeddings=True, rms_norm_eps=1e-5,
            rope_parameters=dict(rope_type="default", rope_theta=1000000.0),
        ),
        without={"number of experts": dict(num_experts_per_tok=2), "window": dict(sliding_window=None)},
    ),
    # Three of eight experts, weights that sum to 1; the second layer has none. Norms of queries and keys.
    "qwen3_moe": dict(
        seed=137,
        config=dict(
            model_type="qwen3_moe", vocab_size=107, hidden_size=48, num_attention_heads=4, num_key_value_heads=2,
            head_dim=24, num_hidden_layers=3, intermediate_size=32, moe_intermediate_size=8, num_experts=8,
            num_experts_per_tok=3, norm_topk_prob=True, mlp_only_layers=[1], tie_word_embeddings=False,
            rope_parameters=dict(rope_type="default", rope_theta=1000000.0),
        ),
        without={"sum of weights": dict(norm_topk_prob=False), "number of experts": dict(num_experts_per_tok=2)},
    ),
    # Every other layer has experts, and weights sum to less than 1.
    "qwen3_moe_sparse": dict(
        seed=1,
        dtype=torch.bfloat16,
        config=dict(
            model_type="qwen3_moe", vocab_size=101, hidden_size=64, num_attention_heads=4, num_key_value_heads=2,
            head_dim=16, num_hidden_layers=3, intermediate_size=48, moe_intermediate_size=20, num_experts=7,
            num_experts_per_tok=2, decoder_sparse_step=2, norm_topk_prob=False, tie_word_embeddings=True,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0),
        ),
        without={"sum of weights": dict(norm_topk_prob=True)},
    ),
    # Sinks of attention, a window in every other layer, biases, the clamped SwiGLU, gate and up in alternation.
    "gpt_oss": dict(
        seed=46,
        noise=dict(sinks=2.0),
        config=dict(
            model_type="gpt_oss", vocab_size=103, hidden_size=64, num_attention_heads=4, num_key_value_heads=2,
            head_dim=16, num_hidden_layers=2, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2,
            sliding_window=12, swiglu_limit=1.25, tie_word_embeddings=False,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters=dict(
                rope_type="yarn", rope_theta=150000.0, factor=4.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
                original_max_position_embeddings=32,
            ),
        ),
        without={
            "window": dict(layer_types=["full_attention"] * 2),
            "full layer": dict(layer_types=["sliding_attention"] * 2),
            "limit": dict(swiglu_limit=7.0),
            "alpha": dict(swiglu_alpha=1.0),
        },
    ),
    # As published: the experts' weights in MXFP4, and config.json by older names.
    "gpt_oss_mxfp4": dict(
        seed=8,
        mxfp4=True,
        noise=dict(sinks=2.0),
        config=dict(
            model_type="gpt_oss", vocab_size=97, hidden_size=64, num_attention_heads=4, num_key_value_heads=1,
            head_dim=16, num_hidden_layers=2, intermediate_size=32, num_local_experts=4, num_experts_per_tok=3,
            sliding_window=12, tie_word_embeddings=False,
            rope_parameters=dict(
                rope_type="yarn", rope_theta=150000.0, factor=4.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
                original_max_position_embeddings=32,
            ),
        ),
        drop=["rope_parameters", "dtype", "layer_types", "swiglu_alpha"],
        put=dict(
            rope_theta=150000.0,
            rope_scaling=dict(
                rope_type="yarn", factor=4.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
                original_max_position_embeddings=32,
            ),
        ),
    ),
    # The mixture of DeepSeek-V3 beside attention as Qwen3's: groups, corrections, a shared expert, a first layer without.
    "dots1": dict(
        seed=38,
        dtype=torch.bfloat16,
        config=dict(
            model_type="dots1", vocab_size=101, hidden_size=48, num_attention_heads=4, num_key_value_heads=2,
            head_dim=16, num_hidden_layers=3, intermediate_size=40, moe_intermediate_size=16, n_routed_experts=8,
            num_experts_per_tok=3, n_group=4, topk_group=2, n_shared_experts=2, first_k_dense_replace=1,
            norm_topk_prob=True, routed_scaling_factor=1.75, sliding_window=None, tie_word_embeddings=False,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0),
        ),
        without={
            "groups": dict(n_group=1, topk_group=1),
            "scale": dict(routed_scaling_factor=1.0),
            "sum of weights": dict(norm_topk_prob=False),
        },
    ),
}


class Refused(Exception):
    """The fixture of this seed would test too little, or be fragile."""


class Exact(TorchFunctionMode):
    """Replaces float32 by float64 in the calls of PyTorch made under it, and fails if one still gives float32."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        widen = lambda value: torch.float64 if value is torch.float32 else value
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        result = function(*map(widen, args), **{name: widen(value) for name, value in (kwargs or {}).items()})
        assert not (isinstance(result, torch.Tensor) and result.dtype == torch.float32), function
        return result


def generator(*seed):
    return torch.Generator().manual_seed(zlib.crc32("/".join(map(str, seed)).encode()))


def randomize(model, seed, embedding=0.23, post_norm=1.0, sinks=0.23):
    """Fills every parameter, norms and biases included, each from its own generator."""
    # Gemma's norms multiply by one more than their weight.
    offset = 1.0 if model.config.model_type.startswith("gemma") else 0.0
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator(seed, name))
        if parameter.ndim == 1 and name.endswith("weight"):
            # Of a norm. Where queries and keys are normalised, only this weight can make attention less than uniform.
            center = 1.8 if "q_norm" in name or "k_norm" in name else post_norm if ".post_" in name else 1.0
            parameter.data = center - offset + 0.3 * noise
        else:
            of_part = embedding if "embed_tokens" in name else sinks if "sinks" in name else 0.23
            parameter.data = of_part * noise
    for name, buffer in corrections(model):
        buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator(seed, name)))


def corrections(model):
    """What routers add to scores where they select experts: no parameters to PyTorch, but saved with them."""
    return [(name, buffer) for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]


def random_mxfp4(model, seed):
    """Gives experts random weights that MXFP4 holds, and returns these: blocks and scales by their names."""
    tensors = {}
    for name, parameter in model.named_parameters():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            continue
        count, columns, rows = parameter.shape
        groups = (count, rows, columns // 32)
        random = lambda low, high, shape, part: torch.randint(
            low, high, shape, dtype=torch.uint8, generator=generator(seed, name, part)
        )
        blocks, scales = random(0, 256, (*groups, 16), "blocks"), random(121, 125, groups, "scales")
        parameter.data = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        assert parameter.shape == (count, columns, rows)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    return tensors


def save_mxfp4(directory, packed):
    """Puts blocks and scales in place of the tensors that they stand for, and says so in config.json."""
    path = directory / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if f"{name}_blocks" not in packed}
    save_file(tensors | packed, path, metadata={"format": "pt"})
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = dict(quant_method="mxfp4", modules_to_not_convert=["model.layers.*.self_attn"])
    path.write_text(json.dumps(config, indent=2) + "\n")


def frequencies(model, exact):
    """The rotations of a model: each a label, its module, the inverse frequencies by the name of their buffer, and what
    they are without scaling."""
    found = []
    for rotary in (module for module in model.modules() if hasattr(module, "rope_type")):
        kinds = rotary.rope_type if isinstance(rotary.rope_type, dict) else {None: rotary.rope_type}
        for kind, rope_type in kinds.items():
            of_kind = {} if kind is None else dict(layer_type=kind)
            prefix = "" if kind is None else f"{kind}_"
            plain = rotary.compute_default_rope_parameters
            compute = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS.get(rope_type, plain)
            with exact:
                buffers = {f"{prefix}inv_freq": compute(model.config, **of_kind)[0]}
                if rope_type == "longrope":
                    buffers["original_inv_freq"] = buffers["inv_freq"]
                    buffers["long_inv_freq"] = compute(model.config, seq_len=1 << 40)[0]
                label = f"positions{f' of {kind}' * bool(kind)}"
                found.append((label, rotary, buffers, plain(model.config, **of_kind)[0]))
    return found


def set_frequencies(model):
    """Makes them as exact as float64 is."""
    for _, rotary, buffers, _ in frequencies(model, Exact()):
        for name, values in buffers.items():
            setattr(rotary, name, values.clone())


def load(directory, dtype):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **EAGER).eval()
    if dtype is torch.float64:
        set_frequencies(model)
    return model


def changed(model, changes):
    """The same weights with other settings."""
    config = copy.deepcopy(model.config)
    for name, value in changes.items():
        setattr(config, name, value)
    other = AutoModelForCausalLM.from_config(config, dtype=torch.float64, **EAGER).eval()
    other.load_state_dict(model.state_dict())
    set_frequencies(other)
    return other


def logits_of(model, tokens, **options):
    return model(input_ids=torch.tensor([tokens]), use_cache=False, **options)


def older_layout(directory, options, model):
    """Rewrites config.json and model.safetensors the way older versions of transformers wrote them."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    for key in options.get("drop", []):
        config.pop(key, None)
    config.update(options.get("put", {}))
    config = {key: value for key, value in sorted(config.items()) if key != "transformers_version" or value}
    path.write_text(json.dumps(config, indent=2) + "\n")

    path = directory / "model.safetensors"
    prefix = options.get("strip", "")
    tensors = {name.removeprefix(prefix): tensor for name, tensor in load_file(path).items()}
    for layer in range(model.config.num_hidden_layers):
        if "masks" in options:
            name, dtype = options["masks"]
            mask = torch.ones(1, 1, POSITIONS, POSITIONS, dtype=dtype).tril()
            tensors[name.format(layer)] = mask
            if dtype is torch.bool:
                tensors[name.format(layer).replace("bias", "masked_bias")] = torch.tensor(-1e9)
        if "inv_freq" in options:
            tensors[options["inv_freq"].format(layer)] = frequencies(model, Exact())[0][3].float()
    save_file(tensors, path, metadata={"format": "pt"})


def continuation(model, tokens):
    """The greedy continuation, and the smallest lead of the best logit over the second best."""
    tokens, gap = list(tokens), math.inf
    for _ in range(STEPS):
        best = logits_of(model, tokens).logits[0, -1].topk(2)
        gap = min(gap, (best.values[0] - best.values[1]).item())
        tokens.append(best.indices[0].item())
    return tokens[-STEPS:], gap


class RouterGap:
    """The smallest lead, over all calls made under it, of the last expert that is chosen over the first that is not."""

    def __init__(self, model):
        routers = [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]
        self.smallest = math.inf
        self.hooks = [router.register_forward_hook(self.see) for router in routers]

    def see(self, router, _, output):
        scores = output[0]
        if hasattr(router, "e_score_correction_bias"):
            scores = scores.sigmoid() + router.e_score_correction_bias
            groups = scores.unflatten(-1, (router.num_group, -1))
            values = groups.topk(2).values.sum(-1)
            if router.topk_group < router.num_group:
                self.lead(values, router.topk_group)
            chosen = values >= values.topk(router.topk_group).values[:, -1:]
            scores = groups.masked_fill(~chosen.unsqueeze(-1), -math.inf).flatten(-2)
        self.lead(scores, router.top_k)

    def lead(self, values, count):
        best = values.topk(count + 1, dim=-1).values
        self.smallest = min(self.smallest, (best[:, -2] - best[:, -1]).min().item())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


def effects(model, tokens, logits, std, without):
    """The largest change of a logit, in standard deviations, for each thing that is changed in the model."""
    change = lambda model: ((logits_of(model, tokens).logits[0] - logits).abs().max() / std).item()
    found = {}
    for name, parameter in [*model.named_parameters(), *corrections(model)]:
        original = parameter.data
        # Of the experts' parameters, each expert's.
        parts = range(len(original)) if ".experts." in name else [slice(None)]
        for part in parts:
            parameter.data = original.clone()
            parameter.data[part] = original[part].roll(1, dims=-1)
            found[f"{name}[{part}]" if len(parts) > 1 else name] = change(model)
        parameter.data = original
    for name, rotary, buffers, plain in frequencies(model, Exact()):
        for label, values in [(name, torch.zeros_like(plain)), (f"scaling of {name}", plain)]:
            if values.equal(buffers[max(buffers, key=len)]):
                continue
            for buffer in buffers:
                setattr(rotary, buffer, values.clone())
            found[label] = change(model)
        for buffer, values in buffers.items():
            setattr(rotary, buffer, values)
    for name, changes in without.items():
        found[name] = change(changed(model, changes))
    return found


def attention_entropy(model, tokens):
    attentions = logits_of(model, tokens, output_attentions=True).attentions
    uniform = torch.arange(1, len(tokens) + 1).double().log()[1:]
    entropy = [-(weights * weights.clamp_min(1e-300).log()).sum(-1)[0, :, 1:] / uniform for weights in attentions]
    return torch.stack(entropy).mean().item()


def make(name, options, seed, directory):
    """Writes one fixture and returns what README.md says about it."""
    config = dict(options["config"])
    vocab_size = config["vocab_size"]
    config.setdefault("bos_token_id", 1)
    config.setdefault("eos_token_id", vocab_size - 1)
    if config["model_type"] != "gpt2":
        config.setdefault("max_position_embeddings", POSITIONS)
    config = AutoConfig.for_model(**config)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomize(model, f"{name}/{seed}", **options.get("noise", {}))
    packed = random_mxfp4(model, f"{name}/{seed}") if options.get("mxfp4") else {}
    model.to(options.get("dtype", torch.float32))

    shutil.rmtree(directory, ignore_errors=True)
    size = {"max_shard_size": options["shard"]} if "shard" in options else {}
    model.save_pretrained(directory, **size, save_original_format=not options.get("packed", False))
    made = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
    if any(key in options for key in ("drop", "put", "strip", "masks", "inv_freq")):
        older_layout(directory, options, model)

    model = load(directory, torch.float64)
    loaded = model.state_dict()
    assert loaded.keys() == made.keys(), "tensors were lost"
    assert all(torch.equal(loaded[key], made[key].double()) for key in made), "weights were changed"
    for key in ("num_key_value_heads", "head_dim", "n_inner", "rms_norm_eps", "eos_token_id"):
        assert getattr(model.config, key, None) == getattr(config, key, None), key
    rope, read = (getattr(either, "rope_parameters", None) or {} for either in (config, model.config))
    assert rope.items() <= read.items(), f"rotary embeddings were read as {read}"

    tokens = [
        torch.randint(0, vocab_size, (length,), generator=generator(name, seed, "tokens", length)).tolist()
        for length in LENGTHS
    ]
    with Exact(), RouterGap(model) as router_gap:
        logits = [logits_of(model, sequence).logits[0] for sequence in tokens]
        std = torch.cat(logits).std().item()
        if not LOGITS_STD[0] <= std <= LOGITS_STD[1]:
            raise Refused(f"logits' standard deviation {std:.3f}")
        greedy, gap = [], math.inf
        for sequence in tokens:
            following, smallest = continuation(model, sequence)
            greedy.append(following)
            gap = min(gap, smallest / std)
            if gap < MIN_GAP:
                raise Refused(f"the best logit leads by {gap:.4f} standard deviations only")
            if len(set(following)) < MIN_DISTINCT:
                raise Refused("the continuation repeats itself")
        if router_gap.smallest < MIN_ROUTER_GAP:
            raise Refused(f"an expert leads by {router_gap.smallest:.1e} only")
        ends = model.config.eos_token_id
        if any(end in sum(greedy, []) for end in (ends if isinstance(ends, list) else [ends])):
            raise Refused("the continuation ends")
        entropy = attention_entropy(model, tokens[2])
        if not ATTENTION_ENTROPY[0] <= entropy <= ATTENTION_ENTROPY[1]:
            raise Refused(f"attention's entropy {entropy:.3f}")
        found = effects(model, tokens[2], logits[2], std, options.get("without", {}))
        weakest = min((effect, part) for part, effect in found.items())
        if weakest[0] < MIN_EFFECT:
            raise Refused(f"{weakest[1]} changes logits by {weakest[0]:.4f} standard deviations only")

    single = load(directory, torch.float32)
    rounding = max((logits_of(single, s).logits[0] - l).abs().max().item() for s, l in zip(tokens, logits))
    assert rounding < 1e-3 * std, f"float32 is {rounding} away: is the float64 model another one?"

    if packed:
        save_mxfp4(directory, packed)
    save_file(
        {
            "lengths": torch.tensor(LENGTHS, dtype=torch.int32),
            "tokens": torch.tensor(sum(tokens, []), dtype=torch.int32),
            "logits": torch.cat(logits).float(),
            "greedy": torch.tensor(greedy, dtype=torch.int32),
        },
        directory / "expected.safetensors",
    )
    for path in directory.iterdir():
        path.chmod(0o644)  # safetensors' own is 0o600
    size = sum(path.stat().st_size for path in directory.iterdir())
    assert size <= MAX_BYTES, f"{name} has {size} bytes"
    return dict(
        name=name, seed=seed, bytes=size, logits_std=round(std, 3), min_gap=round(gap, 4),
        distinct=min(len(set(following)) for following in greedy), entropy=round(entropy, 3),
        weakest=f"{weakest[1]} {weakest[0]:.2f}", float32_rounding=f"{rounding:.1e}",
    )


def main():
    default = pathlib.Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "models"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=default, help="where the models' folders go")
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS), help="make these only")
    parser.add_argument("--search", action="store_true", help="try further seeds for a model that is refused")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    torch.use_deterministic_algorithms(True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(json.dumps(dict(torch=torch.__version__, transformers=transformers.__version__)))
    for name in arguments.only:
        seed = MODELS[name]["seed"]
        while True:
            try:
                print(json.dumps(make(name, MODELS[name], seed, arguments.out / name)), flush=True)
                break
            except Refused as why:
                if not arguments.search:
                    raise SystemExit(f"{name}, seed {seed}: {why}")
                print(f"{name}, seed {seed}: {why}", flush=True)
                seed += 1


if __name__ == "__main__":
    main()
