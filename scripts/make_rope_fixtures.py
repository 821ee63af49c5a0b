#!/usr/bin/env python3
"""Writes tests/fixtures/rope.json: frequencies and rotations of rotary embeddings as Hugging Face transformers computes them.

`folio::RopeConfig` and `folio::reference::rope` are checked against them, so that both answer to something that folio's authors did not
write. Run it only to change the cases; its output is committed (made with transformers 5.23 and the same in every run):

    python3 -m venv .venv
    .venv/bin/pip install torch transformers
    .venv/bin/python scripts/make_rope_fixtures.py

frequencies: for each case the parameters as in a checkpoint's configuration, and what `ROPE_INIT_FUNCTIONS` makes of them:
inv_freq [rotary_dim / 2], computed in f32, and the attention factor. "dynamic" cases name the sequence length that they are for.

rotations: x [num_tokens, num_heads, head_dim] and what `apply_rotary_pos_emb` of a model makes of its first rotary_dim elements, in f64.
"""

import json
import pathlib

import torch
import transformers
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as rotate_interleaved
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as rotate_half_split

OUTPUT = pathlib.Path(__file__).parent.parent / "tests" / "fixtures" / "rope.json"
MAX_BYTES = 100_000

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
DEEPSEEK = {
    "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
    "mscale": 1.0, "mscale_all_dim": 0.707,
}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# name, head_dim, share of it that turns, theta, parameters, sequence length
FREQUENCIES = [
    ("default", 128, 1.0, 10_000.0, {"rope_type": "default"}, None),
    ("default of Llama 3", 128, 1.0, 500_000.0, {"rope_type": "default"}, None),
    ("default of Qwen", 64, 1.0, 1_000_000.0, {"rope_type": "default"}, None),
    ("a quarter of 80", 80, 0.25, 10_000.0, {"rope_type": "linear", "factor": 1.0}, None),
    ("a quarter of 16", 16, 0.25, 10_000.0, {"rope_type": "linear", "factor": 1.0}, None),
    ("linear", 128, 1.0, 10_000.0, {"rope_type": "linear", "factor": 4.0}, None),
    ("linear, partial", 96, 0.5, 10_000.0, {"rope_type": "linear", "factor": 2.5}, None),
    ("dynamic within", 128, 1.0, 10_000.0, {"rope_type": "dynamic", "factor": 2.0}, 2048),
    ("dynamic beyond", 128, 1.0, 10_000.0, {"rope_type": "dynamic", "factor": 2.0}, 8192),
    ("dynamic, partial", 64, 0.5, 10_000.0, {"rope_type": "dynamic", "factor": 4.0}, 5000),
    ("yarn of Qwen", 128, 1.0, 1_000_000.0, YARN, None),
    ("yarn of the paper", 128, 1.0, 10_000.0, YARN | {"factor": 16.0, "original_max_position_embeddings": 4096}, None),
    ("yarn of DeepSeek", 64, 1.0, 10_000.0, DEEPSEEK, None),
    ("yarn with equal mscales", 64, 1.0, 10_000.0, DEEPSEEK | {"mscale_all_dim": 1.0}, None),
    ("yarn with one mscale", 64, 1.0, 10_000.0, DEEPSEEK | {"mscale_all_dim": None}, None),
    ("yarn with a given factor", 128, 1.0, 10_000.0, YARN | {"attention_factor": 1.25}, None),
    ("yarn of gpt-oss", 64, 1.0, 150_000.0,
     YARN | {"factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}, None),
    ("yarn with other betas", 96, 1.0, 10_000.0, YARN | {"beta_fast": 16.0, "beta_slow": 2.0}, None),
    ("yarn, partial", 128, 0.25, 10_000.0, YARN | {"original_max_position_embeddings": 2048}, None),
    ("yarn with a factor below 1", 64, 1.0, 10_000.0, YARN | {"factor": 0.5}, None),
    ("yarn with one pair between", 64, 1.0, 10_000.0,
     YARN | {"beta_fast": 1.0, "beta_slow": 1.0, "original_max_position_embeddings": 5, "truncate": True}, None),
    ("llama3", 128, 1.0, 500_000.0, LLAMA3, None),
    ("llama3 of 3.2", 64, 1.0, 500_000.0, LLAMA3 | {"factor": 32.0}, None),
    ("llama3 with other factors", 80, 1.0, 10_000.0, LLAMA3 | {"low_freq_factor": 2.0, "high_freq_factor": 3.0}, None),
]
MAX_POSITION = 2048


def frequencies(name, head_dim, share, theta, parameters, seq_len):
    rope = parameters | {"rope_theta": theta, "partial_rotary_factor": share}
    config = LlamaConfig(
        hidden_size=8 * head_dim, num_attention_heads=8, head_dim=head_dim, max_position_embeddings=MAX_POSITION,
        rope_parameters=rope,
    )
    if parameters["rope_type"] == "default":
        inv_freq, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        inv_freq, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu", seq_len=seq_len)
    rotary_dim = int(head_dim * share)
    assert inv_freq.dtype == torch.float32 and len(inv_freq) == rotary_dim // 2
    return {
        "name": name, "rotary_dim": rotary_dim, "theta": theta, "parameters": parameters, "seq_len": seq_len,
        "max_position": MAX_POSITION,
        # 9 digits tell every f32 from its neighbours.
        "inv_freq": [float(f"{f:.9g}") for f in inv_freq.tolist()], "attention_factor": factor,
    }


def rotation(name, interleaved, head_dim, rotary_dim, num_heads, positions, factor, generator):
    x = torch.randn(len(positions), num_heads, head_dim, generator=generator)
    inv_freq = 10_000.0 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    angles = torch.tensor(positions, dtype=torch.float64)[:, None] * inv_freq
    cos, sin = angles.cos() * factor, angles.sin() * factor
    turning, rest = x.double()[..., :rotary_dim], x.double()[..., rotary_dim:]
    if interleaved:
        turned = rotate_interleaved(turning[None], sin[None], cos[None])[0]
    else:
        twice = [torch.cat((t, t), dim=-1) for t in (cos, sin)]
        turned, _ = rotate_half_split(turning, turning, *twice, unsqueeze_dim=1)
    return {
        "name": name, "interleaved": interleaved, "head_dim": head_dim, "rotary_dim": rotary_dim, "num_heads": num_heads,
        "positions": positions, "theta": 10_000.0, "attention_factor": factor,
        "x": x.flatten().tolist(), "turned": torch.cat((turned, rest), dim=-1).flatten().tolist(),
    }


def main():
    # It warns of configurations that no model has; these only have to reach every branch of the formulas.
    transformers.logging.set_verbosity_error()
    generator = torch.Generator().manual_seed(1)
    rotations = [
        rotation("half split", False, 16, 16, 2, [0, 1, 1000], 1.0, generator),
        rotation("half split, partial", False, 24, 6, 1, [7, 131071], 1.25, generator),
        rotation("interleaved", True, 16, 16, 2, [0, 1, 1000], 1.0, generator),
        rotation("interleaved, partial", True, 24, 6, 1, [7, 131071], 1.25, generator),
    ]
    text = json.dumps({"frequencies": [frequencies(*case) for case in FREQUENCIES], "rotations": rotations})
    text = text.replace('{"name"', '\n{"name"') + "\n"
    assert len(text) < MAX_BYTES, len(text)
    OUTPUT.write_text(text)
    print(f"{OUTPUT.name}: {len(FREQUENCIES)} frequencies, {len(rotations)} rotations, {len(text)} bytes")


if __name__ == "__main__":
    main()
