#!/usr/bin/env python3
"""Runs a workload of `folio bench --save-workload FILE` with Hugging Face transformers on the CPU, one by one and by its own continuous batching.

    python3 scripts/compare_batching.py WORKLOAD.json [--model DIR] [--rounds N] [--threads N]

Needs `pip install torch transformers`. The same weights in f32, the same prompts and numbers of tokens, greedy; all requests come at once, as that library
takes them from a queue. Prints medians over rounds in which the ways take turns.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig


def one_by_one(model, requests):
    start = time.perf_counter()
    texts = []
    for request in requests:
        prompt = torch.tensor([request["prompt"]])
        count = request["new_tokens"]
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, min_new_tokens=count, do_sample=False)
        texts.append(out[0, prompt.shape[1] :].tolist())
    return time.perf_counter() - start, texts


def continuous(model, requests, blocks):
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(num_blocks=blocks)
    manager = model.init_continuous_batching(generation_config=generation, continuous_batching_config=batching)
    manager.start()
    start = time.perf_counter()
    ids = [manager.add_request(request["prompt"], max_new_tokens=request["new_tokens"]) for request in requests]
    texts = {}
    while len(texts) < len(ids):
        result = manager.get_result(timeout=120)
        if result is None:
            raise SystemExit("continuous batching: no result in two minutes, or its thread has ended")
        if result.is_finished():
            texts[result.request_id] = result.generated_tokens
    seconds = time.perf_counter() - start
    manager.stop(block=True)
    return seconds, [texts[i] for i in ids]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workload", type=Path)
    parser.add_argument("--model", type=Path, default=Path(__file__).resolve().parent.parent / "models/stories")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="of PyTorch's; 0: its own choice")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    requests = json.loads(arguments.workload.read_text())["requests"]
    tokens = sum(request["new_tokens"] for request in requests)
    longest = max(len(request["prompt"]) + request["new_tokens"] for request in requests)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    model.eval()
    ways = {
        "one by one": (model, lambda m: one_by_one(m, requests)),
        "continuous": (None, lambda m: continuous(m, requests, len(requests) * (longest // 256 + 2))),
    }
    times = {name: [] for name in ways}
    texts = {}
    for _ in range(arguments.rounds):
        for name, (_, run) in ways.items():
            seconds, texts[name] = run(model)
            times[name].append(seconds)
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(f"{name:12} {len(requests)} requests, {tokens} tokens: {tokens / median:8.0f} tokens/s")
    equal = sum(a == b for a, b in zip(texts["one by one"], texts["continuous"]))
    print(f"texts that are the same both ways: {equal} of {len(requests)}")


if __name__ == "__main__":
    main()
