#!/usr/bin/env python3
"""Tokens per second of a Llama decoder in PyTorch on the CPU, float32: what folio's own figures are put beside.

The model is written here rather than taken from transformers, which allocates and copies its key-value cache and runs
queries, keys and values, and gate and up, as separate products. Here those are merged, the cache is allocated once and
contiguous, attention is PyTorch's scaled_dot_product_attention on the cache in place, prefill computes the last token's
logits only, and each product uses the fastest of PyTorch's kernels, found by timing them on this model when a number of
rows is first met (`Linears.kernel`). It reads checkpoints of Hugging Face's `llama` type without biases.

    torch_decoder_bench.py CHECKPOINT          a directory with config.json and safetensors
    torch_decoder_bench.py --random-100m       random weights: 768 wide, 12 layers, 12 heads over 4, 32000 tokens
    torch_decoder_bench.py ... --serve         for a benchmark that takes turns with this one, see below
    torch_decoder_bench.py CHECKPOINT --check  compare with the logits in CHECKPOINT/expected.safetensors, no timing

Without --serve it prints one JSON object: the prefill of --tokens tokens (median of 5), and for each of --batch decode
steps (median of --steps) with --context tokens already in each sequence's cache. A step is all of: embedding, layers,
logits, choice of the most probable token.

With --serve it prints one line of JSON when the model is ready, then reads lines from standard input and answers each
with one line of JSON, until the end of input:

    prefill TOKENS           one prefill, after a warm-up
    decode BATCH [CONTEXT]   --steps steps, after a warm-up

A line that cannot be run is answered with {"error": ...}. While it waits it uses no processor time: OpenMP's threads
sleep instead of spinning. Where other processes want the same cores this is also the faster setting by far.
"""

import argparse
import json
import math
import os
import pathlib
import statistics
import sys
import time

# Read once by OpenMP, when PyTorch is loaded.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

RANDOM_100M = dict(
    model_type="llama", vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
    num_attention_heads=12, num_key_value_heads=4, head_dim=64, rms_norm_eps=1e-5, rope_theta=10000.0,
    max_position_embeddings=2048, tie_word_embeddings=True,
)  # fmt: skip


def check(condition, message):
    if not condition:
        raise SystemExit(message)


class Linears:
    """The same product of every layer: weights [out, in] of one shape, and the kernel to use for a number of rows."""

    # How each kernel wants the weight, and how it is called. "packed" is oneDNN's blocked layout, which torch.compile
    # uses too: the fastest for some tens of rows.
    KERNELS = {
        "linear": (lambda weight, rows: weight, F.linear),
        "transposed": (lambda weight, rows: weight.t().contiguous(), torch.mm),
        "packed": (
            lambda weight, rows: torch.ops.mkldnn._reorder_linear_weight(weight, rows),
            lambda x, weight: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], ""),
        ),
    }

    def __init__(self, weights):
        self.weights = weights
        self.chosen = {}

    def kernel(self, rows):
        """The kernel that is fastest for all layers in turn, so that weights come from memory as they will in use."""
        if rows not in self.chosen:
            x = torch.randn(rows, self.weights[0].shape[1])
            candidates = {}
            for name, (prepare, call) in self.KERNELS.items():
                try:
                    prepared = [prepare(weight, rows) for weight in self.weights]
                    call(x, prepared[0])
                    candidates[name] = (name, call, prepared)
                except (AttributeError, RuntimeError):
                    pass  # PyTorch without oneDNN
            best = dict.fromkeys(candidates, math.inf)
            # In turn, and the best of several, because other processes may disturb some.
            for _ in range(3 if rows > 64 else 8):
                for name, call, prepared in candidates.values():
                    best[name] = min(best[name], timed(lambda: [call(x, weight) for weight in prepared]))
            self.chosen[rows] = candidates[min(best, key=best.get)]
        return self.chosen[rows]

    def __call__(self, x, layer):
        _, call, prepared = self.kernel(x.shape[0])
        return call(x, prepared[layer])


class Llama:
    def __init__(self, config, tensors):
        """`tensors(name)` gives a tensor of the checkpoint."""
        self.layers = config["num_hidden_layers"]
        self.heads = config["num_attention_heads"]
        self.kv_heads = config.get("num_key_value_heads") or self.heads
        self.head_dim = config.get("head_dim") or config["hidden_size"] // self.heads
        self.vocab_size = config["vocab_size"]
        self.eps = config["rms_norm_eps"]
        self.max_len = config["max_position_embeddings"]
        self.cos, self.sin = rotary(config, self.head_dim, self.max_len)

        every = lambda name: [tensors(f"model.layers.{layer}.{name}.weight") for layer in range(self.layers)]
        merged = lambda *names: Linears([torch.cat(parts) for parts in zip(*map(every, names))])
        self.qkv = merged("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self.out = merged("self_attn.o_proj")
        self.gate_up = merged("mlp.gate_proj", "mlp.up_proj")
        self.down = merged("mlp.down_proj")
        self.attention_norm = every("input_layernorm")
        self.mlp_norm = every("post_attention_layernorm")
        self.norm = tensors("model.norm.weight")
        self.embedding = tensors("model.embed_tokens.weight")
        tied = config.get("tie_word_embeddings", False)
        self.head = Linears([self.embedding if tied else tensors("lm_head.weight")])

    def cache(self, batch, length):
        """Keys and values of every layer, [batch, kv_heads, length, head_dim], with random values."""
        shape = (batch, self.kv_heads, length, self.head_dim)
        return [(torch.randn(shape), torch.randn(shape)) for _ in range(self.layers)]

    def forward(self, tokens, cache, start, all_logits=False):
        """Logits [batch, vocab_size] of the last of `tokens` [batch, length], which are at `start` and after.

        With `all_logits` those of every token, [batch * length, vocab_size].
        """
        batch, length = tokens.shape
        end = start + length
        cos, sin = self.cos[start:end, None], self.sin[start:end, None]
        rotated, half = self.heads + self.kv_heads, self.head_dim // 2
        x = self.embedding[tokens.flatten()]
        for layer, (keys, values) in enumerate(cache):
            y = self.rms_norm(x, self.attention_norm[layer])
            qkv = self.qkv(y, layer).view(batch, length, rotated + self.kv_heads, self.head_dim)
            qk = qkv[:, :, :rotated]
            qk = torch.addcmul(qk * cos, qk.roll(half, -1), sin).transpose(1, 2)
            keys[:, :, start:end] = qk[:, self.heads :]
            values[:, :, start:end] = qkv[:, :, rotated:].transpose(1, 2)
            y = F.scaled_dot_product_attention(
                qk[:, : self.heads], keys[:, :, :end], values[:, :, :end], is_causal=length > 1, enable_gqa=True
            )
            x += self.out(y.transpose(1, 2).reshape(batch * length, -1), layer)
            y = self.rms_norm(x, self.mlp_norm[layer])
            gate, up = self.gate_up(y, layer).chunk(2, -1)
            x += self.down(F.silu(gate).mul_(up), layer)
        if not all_logits:
            x = x.view(batch, length, -1)[:, -1]
        return self.head(self.rms_norm(x, self.norm), 0)

    def rms_norm(self, x, weight):
        # A little faster than F.rms_norm, which on the CPU is the same steps, and more.
        return (x * x.square().mean(-1, keepdim=True).add_(self.eps).rsqrt_()).mul_(weight)


def rotary(config, head_dim, length):
    """Cosine and sine tables [length, head_dim] for `x * cos + roll(x, head_dim / 2) * sin`."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    theta = scaling.get("rope_theta") or config.get("rope_theta") or 10000.0
    frequency = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    if kind == "linear":
        frequency /= scaling["factor"]
    elif kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) / scaling["factor"])
    else:
        check(kind == "default", f"rotary embeddings of type {kind} are not supported")
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), -1).float(), torch.cat((-sin, sin), -1).float()


def load(directory):
    config = json.loads((directory / "config.json").read_text())
    check(config["model_type"] == "llama", f"{config['model_type']} is not supported, only llama is")
    check(not config.get("attention_bias") and not config.get("mlp_bias"), "biases are not supported")
    check(config.get("hidden_act", "silu") == "silu", f"{config.get('hidden_act')} is not supported, only silu is")
    index = directory / "model.safetensors.index.json"
    files = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    tensors = {name: tensor for file in sorted(files) for name, tensor in load_file(directory / file).items()}
    return Llama(config, lambda name: tensors[name].float())


def random_100m():
    config, generator = RANDOM_100M, torch.Generator().manual_seed(0)
    head_dim, hidden = config["head_dim"], config["hidden_size"]
    shapes = {
        "q_proj": (config["num_attention_heads"] * head_dim, hidden),
        "k_proj": (config["num_key_value_heads"] * head_dim, hidden),
        "v_proj": (config["num_key_value_heads"] * head_dim, hidden),
        "o_proj": (hidden, config["num_attention_heads"] * head_dim),
        "gate_proj": (config["intermediate_size"], hidden),
        "up_proj": (config["intermediate_size"], hidden),
        "down_proj": (hidden, config["intermediate_size"]),
        "embed_tokens": (config["vocab_size"], hidden),
    }

    def tensors(name):
        shape = shapes.get(name.split(".")[-2])
        return torch.ones(hidden) if shape is None else 0.02 * torch.randn(shape, generator=generator)

    return Llama(config, tensors)


def timed(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Bench:
    WARM_UP_STEPS = 2

    def __init__(self, model, steps):
        self.model, self.steps, self.caches = model, steps, {}

    def room(self, batch, length):
        """A cache for `batch` sequences of `length`."""
        if batch < 1 or length < 1 or length > self.model.max_len:
            raise ValueError(f"{batch} sequences of {length} tokens; the model takes {self.model.max_len} at most")
        if self.caches.get(batch, (0, None))[0] < length:
            self.caches[batch] = (length, self.model.cache(batch, length))
        return self.caches[batch][1]

    def prefill(self, tokens, times=1):
        """The median of `times` prefills of one sequence, after another one."""
        cache = self.room(1, tokens)
        prompt = torch.randint(0, self.model.vocab_size, (1, tokens))
        work = lambda: self.model.forward(prompt, cache, 0).argmax(-1)
        work()
        seconds = statistics.median(timed(work) for _ in range(times))
        return dict(kind="prefill", tokens=tokens, tokens_per_s=tokens / seconds, seconds=seconds)

    def decode(self, batch, context):
        """The median of the decode steps of `batch` sequences; the first step sees `context` tokens before its own."""
        if context < 0:
            raise ValueError(f"a context of {context} tokens")
        cache = self.room(batch, context + self.steps)
        last = torch.randint(0, self.model.vocab_size, (batch, 1))

        def step(index):
            nonlocal last
            last = self.model.forward(last, cache, context + index).argmax(-1, keepdim=True)

        for index in range(min(self.WARM_UP_STEPS, self.steps)):
            step(index)
        times = [timed(lambda: step(index)) for index in range(self.steps)]
        seconds = statistics.median(times)
        return dict(
            kind="decode", batch=batch, context=context, steps=self.steps, tokens_per_s=batch / seconds,
            seconds=seconds, seconds_min=min(times), seconds_max=max(times),
        )  # fmt: skip

    def line(self, line, context):
        """Runs one line of --serve."""
        match line.split():
            case ["prefill", tokens]:
                return self.prefill(int(tokens))
            case ["decode", batch]:
                return self.decode(int(batch), context)
            case ["decode", batch, context]:
                return self.decode(int(batch), int(context))
        raise ValueError("expected `prefill TOKENS` or `decode BATCH [CONTEXT]`")


def compare(model, directory):
    """The largest difference from the expected logits, for prefill and for decoding token by token."""
    expected = load_file(directory / "expected.safetensors")
    largest, lengths = dict(prefill=0.0, decode=0.0), expected["lengths"].tolist()
    for tokens, logits in zip(expected["tokens"].long().split(lengths), expected["logits"].split(lengths)):
        cache = model.cache(1, len(tokens))
        got = dict(
            prefill=model.forward(tokens[None], cache, 0, all_logits=True),
            decode=torch.cat([model.forward(token.view(1, 1), cache, i) for i, token in enumerate(tokens)]),
        )
        largest = {kind: max(largest[kind], (got[kind] - logits).abs().max().item()) for kind in got}
    check(max(largest.values()) < 1e-3, f"logits differ: {largest}")
    return largest


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=pathlib.Path, nargs="?")
    parser.add_argument("--random-100m", action="store_true", help="random weights instead of a checkpoint")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512, help="of the prefill (512)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="sequences decoded together (1 8 32)")
    parser.add_argument("--context", type=int, default=512, help="tokens in the cache of each sequence (512)")
    parser.add_argument("--steps", type=int, default=16, help="decode steps, of which the median counts (16)")
    parser.add_argument("--serve", action="store_true", help="measure what standard input asks for")
    parser.add_argument("--check", action="store_true", help="compare logits with expected.safetensors")
    arguments = parser.parse_args()
    if (arguments.checkpoint is None) != arguments.random_100m:
        parser.error("give either a checkpoint or --random-100m")
    if arguments.check and arguments.random_100m:
        parser.error("--check needs a checkpoint")

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    with torch.inference_mode():
        model = random_100m() if arguments.random_100m else load(arguments.checkpoint)
        bench = Bench(model, arguments.steps)
        about = dict(torch=torch.__version__, threads=torch.get_num_threads(), dtype="float32")
        if arguments.check:
            print(json.dumps(about | compare(model, arguments.checkpoint)))
        elif arguments.serve:
            print(json.dumps(dict(kind="ready") | about), flush=True)
            # Not `for line in sys.stdin`, which may read ahead.
            for line in iter(sys.stdin.readline, ""):
                try:
                    answer = bench.line(line, arguments.context)
                except (ValueError, RuntimeError) as error:
                    answer = dict(error=str(error))
                print(json.dumps(answer), flush=True)
        else:
            about["prefill"] = bench.prefill(arguments.tokens, times=5)
            about["decode"] = [bench.decode(batch, arguments.context) for batch in arguments.batch]
            linears = dict(qkv=model.qkv, out=model.out, gate_up=model.gate_up, down=model.down, head=model.head)
            about["kernels"] = {
                name: {rows: chosen[0] for rows, chosen in linear.chosen.items()} for name, linear in linears.items()
            }
            print(json.dumps(about))


if __name__ == "__main__":
    main()
