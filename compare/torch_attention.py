#!/usr/bin/env python3
"""PyTorch on the CPU, for the comparison: scaled_dot_product_attention over a contiguous cache, and matrix products.

Speaks the protocol of `protocol/src/lib.rs` on standard input and output. OMP_NUM_THREADS says how many threads.
"""

import json
import os
import sys
import time

import numpy
import torch
import torch.nn.functional as F

DTYPES = {"f32": torch.float32, "f16": torch.float16}


class Loaded:
    def __init__(self, problem):
        if problem["format"] not in DTYPES:
            raise ValueError(f"PyTorch has no {problem['format']}")
        dtype = DTYPES[problem["format"]]
        self.batch, self.query_len, self.seq_len = (problem[name] for name in ("batch", "query_len", "seq_len"))
        self.heads, self.kv_heads, self.head_dim = (problem[name] for name in ("num_q_heads", "num_kv_heads", "head_dim"))
        self.group = self.heads // self.kv_heads

        def operand(name, tokens, heads):
            values = torch.from_numpy(numpy.fromfile(problem[name], dtype="<f4"))
            return values.view(self.batch, tokens, heads, self.head_dim).transpose(1, 2).contiguous().to(dtype)

        # [batch, heads, tokens, head_dim].
        self.q = operand("q", self.query_len, self.heads)
        self.k = operand("k", self.seq_len, self.kv_heads)
        self.v = operand("v", self.seq_len, self.kv_heads)
        # The query heads of a KV head as rows of one matrix.
        self.rows = self.q.view(self.batch, self.kv_heads, self.group * self.query_len, self.head_dim)
        self.scale = self.head_dim**-0.5
        self.mask = self.rows_mask = None
        if self.query_len > 1:
            # is_causal is aligned at the top left; these are aligned at the bottom right.
            visible = torch.ones(self.query_len, self.seq_len, dtype=torch.bool).tril(self.seq_len - self.query_len)
            self.mask = torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, float("-inf"))
            self.rows_mask = self.mask.repeat(self.group, 1)
        self.ways = {"sdpa, enable_gqa": self.gqa, "sdpa, grouped": self.grouped, "matmul, grouped": self.products}
        if 1 < self.query_len == self.seq_len:
            self.ways["sdpa, enable_gqa, is_causal"] = self.causal

    def gqa(self):
        return F.scaled_dot_product_attention(self.q, self.k, self.v, self.mask, enable_gqa=True)

    def causal(self):
        return F.scaled_dot_product_attention(self.q, self.k, self.v, is_causal=True, enable_gqa=True)

    def grouped(self):
        return F.scaled_dot_product_attention(self.rows, self.k, self.v, self.rows_mask)

    def products(self):
        scores = (self.rows @ self.k.transpose(2, 3)).mul_(self.scale)
        if self.rows_mask is not None:
            scores += self.rows_mask
        return scores.softmax(-1) @ self.v

    def run(self, way):
        start = time.perf_counter()
        out = self.ways[way]()
        return time.perf_counter() - start, out

    def write(self, way, path):
        out = self.run(way)[1].reshape(self.batch, self.heads, self.query_len, self.head_dim)
        out.transpose(1, 2).contiguous().float().numpy().astype("<f4").tofile(path)


def say(answer):
    print(json.dumps(answer), flush=True)


def main():
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count()))
    torch.set_num_threads(threads)
    loaded = None
    say({"ready": {"name": f"PyTorch {torch.__version__}", "about": f"CPU, {threads} threads, {torch.backends.cpu.get_cpu_capability()}"}})
    with torch.inference_mode():
        # Not `for line in sys.stdin`, which may read ahead.
        for line in iter(sys.stdin.readline, ""):
            request = json.loads(line)
            try:
                match request["op"]:
                    case "load":
                        loaded = Loaded(request)
                        say({"loaded": {"ways": list(loaded.ways)}})
                    case "output":
                        loaded.write(request["way"], request["out"])
                        say("done")
                    case "time":
                        say({"seconds": loaded.run(request["way"])[0]})
            except (RuntimeError, ValueError) as error:
                say({"failed": str(error).split("\n")[0]})


if __name__ == "__main__":
    main()
