#!/usr/bin/env python3
"""Writes a random Llama of 100 million parameters, the shape of `cargo bench --bench model`, for measurements of whole programs.

    python3 scripts/make_random_llama.py DIRECTORY

Needs `pip install torch transformers`. The tokenizer is the story model's, which knows the first 1024 of the 32 000 tokens.
"""

import argparse
import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

STORIES = Path(__file__).resolve().parent.parent / "models" / "stories"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        intermediate_size=2048,
        vocab_size=32000,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config).to(torch.float16)
    model.save_pretrained(directory)
    shutil.copy(STORIES / "tokenizer.json", directory)
    print(f"{directory}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f} million parameters")


if __name__ == "__main__":
    main()
