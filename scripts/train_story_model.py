#!/usr/bin/env python3
"""Trains the story model: a tiny Llama that tells tales and answers questions about them.

    python train_story_model.py --out models/stories --minutes 38 --threads 1

Everything is made here: the corpus comes from `story_grammar.py` (endless, so no
story is seen twice), the byte-level BPE tokenizer is trained on a sample of it,
the model is a plain PyTorch Llama, and the export is what Hugging Face's
`LlamaForCausalLM` reads (f16 safetensors + config.json + tokenizer.json).

Needs torch, tokenizers, safetensors, numpy; `--check` also transformers.
`--evaluate` scores an exported model on its held-out stories and trains nothing.
Deterministic for a given --seed, --threads and number of steps (--steps); with --minutes
the clock decides how many steps there are.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import story_grammar as grammar

BOS, EOS = "<|begin|>", "<|end|>"


# ------------------------------------------------------------------------------------------
# Tokenizer


def train_tokenizer(vocab: int, seed: int) -> Tokenizer:
    """A byte-level BPE: any UTF-8 prompt can be encoded, and common words are one token."""
    rng = random.Random(seed * 7919 + 1)
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tok.decoder = decoders.ByteLevel()

    def corpus():
        for _ in range(4000):
            s = grammar.tell(rng, rng.random())
            yield s.text
            for q in s.questions:
                yield f"\nQuestion: {q.question}\nAnswer: {q.answer}\n"

    tok.train_from_iterator(corpus(), trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[BOS, EOS], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tok


# ------------------------------------------------------------------------------------------
# Model: the Llama architecture, written out, with Hugging Face's parameter names


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.h, self.kv, self.d = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        self.q_proj = nn.Linear(c["hidden_size"], self.h * self.d, bias=False)
        self.k_proj = nn.Linear(c["hidden_size"], self.kv * self.d, bias=False)
        self.v_proj = nn.Linear(c["hidden_size"], self.kv * self.d, bias=False)
        self.o_proj = nn.Linear(self.h * self.d, c["hidden_size"], bias=False)

    def forward(self, x, cos, sin, cache=None):
        b, t, _ = x.shape
        q = self.q_proj(x).view(b, t, self.h, self.d).transpose(1, 2)
        k = self.k_proj(x).view(b, t, self.kv, self.d).transpose(1, 2)
        v = self.v_proj(x).view(b, t, self.kv, self.d).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:               # generation: append to what is already known
            k, v = cache.append(self, k, v)
        n = k.shape[2]
        if n == t:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:                               # the queries are the last t of n positions
            mask = torch.ones(t, n, dtype=torch.bool).tril(n - t)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(b, t, self.h * self.d))


def rotate(x, cos, sin):
    """RoPE in the half-split layout: dimension i turns with dimension i + d/2."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c["hidden_size"], c["intermediate_size"], bias=False)
        self.up_proj = nn.Linear(c["hidden_size"], c["intermediate_size"], bias=False)
        self.down_proj = nn.Linear(c["intermediate_size"], c["hidden_size"], bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.mlp = MLP(c)

    def forward(self, x, cos, sin, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Names match `LlamaForCausalLM`; the output layer is the embedding, transposed."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.model.layers = nn.ModuleList(Block(c) for _ in range(c["num_hidden_layers"]))
        self.model.norm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        half = c["head_dim"] // 2
        freq = c["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.arange(c["max_position_embeddings"], dtype=torch.float64)[:, None] * freq
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self):
        """A start from which looking things up is quickly found.

        The circuit for "what followed this, last time?" needs heads that look a fixed
        number of tokens back and write down what they see, and heads in later layers that
        compare those notes with the present and copy.  From a random start, 3 million tokens
        (16 minutes) had not discovered them; so they are sketched here ("mimetic"
        initialisation), roughly and with noise, and training does the rest.  Nothing is
        frozen, and the architecture is the plain one.
        """
        c, d, half = self.config, 32, 16
        h, kv, dim = c["num_attention_heads"], c["num_key_value_heads"], c["hidden_size"]
        group = h // kv
        assert dim >= 4 * d and dim % d == 0 and h >= 4, "no room for the notes"
        emb = self.model.embed_tokens.weight
        unit = 0.5 / math.sqrt(dim)
        # Four subspaces: the token itself, and notes on the tokens one, two, three before.
        basis = torch.linalg.qr(torch.randn(dim, dim))[0].T.reshape(dim // d, d, dim)
        basis[:, :, 0] = 0
        notes = basis[1:].reshape(-1, dim)
        nn.init.normal_(emb, std=unit)
        emb -= 0.7 * emb @ notes.T @ notes
        emb[:, 0] = 3 * unit                # one constant direction, for positional heads
        theta = c["rope_theta"] ** (-torch.arange(half) / half)
        # Looking a fixed way back needs the fast frequencies, comparing at any distance the slow.
        fast = torch.tensor([3.0, 2.5, 2, 1.5, 1, 1, .7, .7, .5, .5, .3, .3, .2, .2, .1, .1]).sqrt()
        slow = (torch.tensor([.2] * 4 + [.6] * 4 + [1.0] * 8) * 1.7).repeat(2)[:, None]
        # What the heads of a key/value group compare: (my note, your note), 0 the token itself.
        compare = {(1, 1): (0, 1), (2, 0): (0, 1), (2, 1): (1, 2), (3, 0): (1, 2), (3, 1): (2, 3),
                   (4, 0): (0, 1), (4, 1): (2, 3)}
        for n, layer in enumerate(self.model.layers):
            at, mlp = layer.self_attn, layer.mlp
            for m in (mlp.gate_proj, mlp.up_proj):
                nn.init.normal_(m.weight, std=unit)
            nn.init.zeros_(mlp.down_proj.weight)
            wq, wk = 0.02 * torch.randn(h, d, dim), 0.02 * torch.randn(kv, d, dim)
            wv = basis[:1].repeat(kv, 1, 1)
            wo = 0.02 * wv.repeat_interleave(group, 0).mT       # copy what is attended to
            backs = {0: h - 1, 1: group}.get(n, 0)              # heads that look back
            for head in range(h):
                g = head // group
                if head < backs:
                    angle = (head + 1) * theta
                    wk[g] = 0
                    wk[g, :half, 0] = fast
                    wq[head] = 0
                    wq[head, :half, 0] = fast * angle.cos()
                    wq[head, half:, 0] = -fast * angle.sin()
                    wo[head] = 0.025 * basis[head + 1].T if n == 0 else 0
                elif (n, g) in compare:     # "what followed this, last time?"
                    mine, yours = compare[n, g]
                    if head % group == 0:
                        wk[g] += slow * basis[yours]
                    wq[head] += slow * basis[mine]
            at.k_proj.weight.copy_(wk.reshape(kv * d, dim))
            at.q_proj.weight.copy_(wq.reshape(h * d, dim))
            at.v_proj.weight.copy_(wv.reshape(kv * d, dim))
            at.o_proj.weight.copy_(wo.permute(1, 0, 2).reshape(dim, h * d))

    def forward(self, ids, cache=None):
        at = cache.length if cache is not None else 0
        cos, sin = self.cos[at:at + ids.shape[1]], self.sin[at:at + ids.shape[1]]
        x = self.model.embed_tokens(ids)
        for block in self.model.layers:
            x = block(x, cos, sin, cache)
        if cache is not None:
            cache.length += ids.shape[1]
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)


class Cache:
    """A key/value cache that can go back to an earlier length (to ask several questions)."""

    def __init__(self):
        self.length, self.kv = 0, {}

    def append(self, layer, k, v):
        if layer in self.kv:
            k0, v0 = self.kv[layer]
            k = torch.cat((k0[:, :, :self.length], k), 2)
            v = torch.cat((v0[:, :, :self.length], v), 2)
        self.kv[layer] = (k, v)
        return k, v


def make_config(a, tok: Tokenizer) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "vocab_size": tok.get_vocab_size(), "hidden_size": a.hidden,
        "intermediate_size": a.intermediate, "num_hidden_layers": a.layers,
        "num_attention_heads": a.heads, "num_key_value_heads": a.kv_heads, "head_dim": 32,
        "max_position_embeddings": 1024, "rope_theta": 10000.0, "rope_scaling": None,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "attention_bias": False,
        "mlp_bias": False, "tie_word_embeddings": True, "initializer_range": 0.02,
        "attention_dropout": 0.0, "use_cache": True, "torch_dtype": "float16",
        "bos_token_id": tok.token_to_id(BOS), "eos_token_id": tok.token_to_id(EOS),
    }


# ------------------------------------------------------------------------------------------
# Documents and batches


def story_prompt(story: str) -> str:
    return BOS + story


def question_prompt(question: str) -> str:
    """What follows the story, or the answer before."""
    return f"\nQuestion: {question}\nAnswer:"


def document(rng: random.Random, tok: Tokenizer, size: float, weight: float, held_out: set[str]):
    """One training text as (ids, loss weights).  Weight goes to what must be recalled."""
    while True:
        story = grammar.tell(rng, size)
        if story.text not in held_out:
            break
    # The chat form ends every turn with <|end|>; the plain form has only line ends.
    end = EOS if rng.random() < 0.5 else ""
    text = BOS if rng.random() < 0.8 else ""
    marks = [(lo - 1 + len(text), hi + len(text)) for lo, hi in story.recalls]
    text += story.text + end
    for q in story.questions[:8]:
        text += question_prompt(q.question)
        # The fact's own words as far as story and answer agree, from the first new one.
        fact = q.answer[q.known:]
        text += " " + q.answer[:q.known].rstrip()
        marks.append((len(text), len(text) + 1 + len(fact)))
        text += " " + fact + end
    text += "" if end else "\n" + EOS
    enc = tok.encode(text)
    # The facts of a drill are pure chance; learning from them would only be noise.
    w = np.full(len(enc.ids), 1.0 if size >= 0 else 0.1, np.float32)
    starts = np.array([o[0] for o in enc.offsets])
    for lo, hi in marks:
        w[(starts >= lo) & (starts < hi)] = weight
    return enc.ids, w


class Curriculum:
    """Drills and sketches first, where the trick of looking things up is found; once the
    answers come out right, ever longer tales.  All lengths stay in the mix to the end."""

    def __init__(self, a):
        self.loss, self.level, self.a = 1.0, 0.0, a

    def update(self, loss: float, p: float) -> None:
        self.loss = 0.98 * self.loss + 0.02 * loss
        if self.loss < 0.2:
            self.level += 1 / self.a.grow_steps
        # Whatever happens, the last part of the run sees full tales.
        self.level = min(1.0, max(self.level, (p - 0.45) / 0.2))

    def size(self, rng) -> float:
        if rng.random() < min(0.9, max(0.05, 1.2 * self.loss)):
            return -1.0
        return rng.uniform(0 if rng.random() < 0.4 else 0.8 * self.level, self.level)


def batches(rng, tok, a, held_out, curriculum):
    """Endless batches of about `a.batch` tokens, of stories of similar length."""
    while True:
        docs = [document(rng, tok, curriculum.size(rng), a.answer_weight, held_out)
                for _ in range(128)]
        docs.sort(key=lambda d: len(d[0]))
        groups, group = [], []
        for d in docs:
            if group and len(d[0]) * (len(group) + 1) > a.batch:
                groups.append(group)
                group = []
            group.append(d)
        groups.append(group)
        rng.shuffle(groups)
        for g in groups:
            n = max(len(d[0]) for d in g)
            ids = np.zeros((len(g), n), np.int64)
            w = np.zeros((len(g), n), np.float32)
            for i, (x, y) in enumerate(g):
                ids[i, :len(x)], w[i, :len(x)] = x, y
            w[:, 0] = 0
            yield torch.from_numpy(ids), torch.from_numpy(w)


# ------------------------------------------------------------------------------------------
# Optimizer


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by five Newton-Schulz steps, for the matrices of the blocks.

    For a model this small on a CPU the extra arithmetic is a few percent of a step, and it
    needs clearly fewer steps than Adam.  Matrices of one shape go through as one batch.
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(list(params), dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = defaultdict(list)
            for p in group["params"]:
                shapes[p.shape].append(p)
            for shape, ps in shapes.items():
                updates = []
                for p in ps:
                    m = self.state[p].setdefault("m", torch.zeros_like(p))
                    m.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(m, group["momentum"]))
                x = torch.stack(updates)
                if shape[0] > shape[1]:
                    x = x.mT
                x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
                for _ in range(5):
                    g = x @ x.mT
                    x = 3.4445 * x + (-4.7750 * g + 2.0315 * (g @ g)) @ x
                if shape[0] > shape[1]:
                    x = x.mT
                scale = group["lr"] * 0.2 * math.sqrt(max(shape))
                for p, u in zip(ps, x):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(scale * u)


def schedule(p: float) -> float:
    """Warm-up, constant, then linear decay over the last 40 %."""
    return min(1.0, p / 0.01 + 0.02, max(0.02, (1 - p) / 0.4))


# ------------------------------------------------------------------------------------------
# Held-out stories and evaluation


def make_held_out(tok: Tokenizer, count: int, seed: int) -> list[dict]:
    """Full-size stories of a seed of their own.  Distances are counted in tokens from the
    token where the fact's answer begins to the last token of the prompt (`Answer:`)."""
    rng = random.Random(seed * 7919 + 2)
    out = []
    while len(out) < count:
        s = grammar.tell(rng, rng.uniform(0.85, 1.0))
        enc = tok.encode(s.text)
        if not 300 <= len(enc.ids) <= 700:
            continue
        starts = [o[0] for o in enc.offsets]
        qs = []
        for q in s.questions:
            at = sum(x <= q.at for x in starts) - 1
            extra = len(tok.encode(question_prompt(q.question)).ids)
            qs.append({"question": q.question, "answer": q.answer, "kind": q.kind,
                       "distance": len(enc.ids) + extra - 1 - at})
        out.append({"story": s.text, "questions": qs})
    return out


@torch.no_grad()
def continue_greedily(model, tok, cache, ids, stop="\n", limit=24) -> str:
    """Greedy decoding up to a line end or <|end|>.  The token that ends the answer is not
    kept in the cache: the next question brings its own line end."""
    out = []
    eos = tok.token_to_id(EOS)
    while len(out) < limit:
        nxt = int(model(torch.tensor([ids]), cache)[0, -1].argmax())
        if nxt == eos:
            break
        out.append(nxt)
        if stop in tok.decode(out):
            break
        ids = [nxt]
    return tok.decode(out).split(stop)[0].strip()


@torch.no_grad()
def evaluate(model, tok, stories, mode="plain") -> list[tuple]:
    """Exact match of every question.  Modes: "plain": each question right after the story;
    "chat": the same, but the story ends with <|end|>; "chain": all questions one after the
    other, the model's own answers staying in the context."""
    model.eval()
    results = []
    for s in stories:
        cache = Cache()
        ids = tok.encode(story_prompt(s["story"]) + (EOS if mode == "chat" else "")).ids
        model(torch.tensor([ids]), cache)
        end = cache.length
        for q in s["questions"]:
            if mode != "chain":
                cache.length = end          # back to the end of the story
            got = continue_greedily(model, tok, cache, tok.encode(question_prompt(q["question"])).ids)
            results.append((q["kind"], q["distance"], got == q["answer"].strip(), q["answer"], got))
    return results


def report(results) -> str:
    lines = [f"all: {sum(r[2] for r in results)}/{len(results)}"
             f" = {100 * np.mean([r[2] for r in results]):.2f} %"]
    for title, key in (("kind", lambda r: r[0]),
                       ("distance", lambda r: f"{r[1] // 100 * 100:4d}-{r[1] // 100 * 100 + 99}")):
        groups = defaultdict(list)
        for r in results:
            groups[key(r)].append(r[2])
        for k in sorted(groups):
            lines.append(f"  {title} {k}: {sum(groups[k])}/{len(groups[k])}"
                         f" = {100 * np.mean(groups[k]):.2f} %")
    return "\n".join(lines)


@torch.no_grad()
def sample(model, tok, prompt: str, seed: int, temperature=0.7, limit=700) -> str:
    g = torch.Generator().manual_seed(seed)
    cache, ids = Cache(), tok.encode(BOS + prompt).ids
    out, eos = list(ids), tok.token_to_id(EOS)
    while len(out) < limit:
        p = (model(torch.tensor([ids]), cache)[0, -1] / temperature).softmax(-1)
        ids = [int(torch.multinomial(p, 1, generator=g))]
        out += ids
        if ids[0] == eos or tok.decode(out[-6:]).endswith("The end."):
            break
    return tok.decode(out)


# ------------------------------------------------------------------------------------------
# Export


def export(model, tok, out: Path, held_out) -> None:
    out.mkdir(parents=True, exist_ok=True)
    weights = {k: v.detach().to(torch.float16).contiguous() for k, v in model.state_dict().items()}
    # Written to a side file first: an export is always whole, whenever training stops.
    save_file(weights, out / "model.safetensors.part", metadata={"format": "pt"})
    (out / "model.safetensors.part").replace(out / "model.safetensors")
    (out / "model.safetensors").chmod(0o644)
    (out / "config.json").write_text(json.dumps(model.config, indent=2) + "\n")
    c = model.config
    (out / "generation_config.json").write_text(json.dumps({
        "bos_token_id": c["bos_token_id"], "eos_token_id": c["eos_token_id"],
        "do_sample": True, "temperature": 0.7}, indent=2) + "\n")
    tok.save(str(out / "tokenizer.json"))
    with open(out / "held_out.jsonl", "w") as f:
        for s in held_out:
            f.write(json.dumps(s) + "\n")


def load(out: Path):
    """The exported model with its f16 weights, computing in f32."""
    model = Llama(json.loads((out / "config.json").read_text()))
    model.load_state_dict({k: v.float() for k, v in load_file(out / "model.safetensors").items()})
    held_out = [json.loads(x) for x in (out / "held_out.jsonl").read_text().splitlines()]
    return model.eval(), Tokenizer.from_file(str(out / "tokenizer.json")), held_out


@torch.no_grad()
def check(out: Path) -> None:
    """Compares logits with transformers' LlamaForCausalLM on held-out stories.

    Transformers computes the RoPE angles in f32, which at position 600 is off by some 1e-5
    (and heads that look exactly one token back feel it); the tables here come from f64.
    The comparison is made both ways, and the limit applies to equal tables.
    """
    from transformers import LlamaForCausalLM
    model, tok, held_out = load(out)
    theirs = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32).eval()

    def worst() -> float:
        texts = [tok.encode(story_prompt(s["story"])).ids for s in held_out[:10]]
        return max(float((model(x) - theirs(x).logits).abs().max())
                   for x in (torch.tensor([t]) for t in texts))

    own = worst()
    c = model.config
    freq = 1.0 / c["rope_theta"] ** (torch.arange(0, c["head_dim"], 2).float() / c["head_dim"])
    angle = torch.arange(c["max_position_embeddings"]).float()[:, None] * freq
    model.cos, model.sin = angle.cos(), angle.sin()
    same = worst()
    print(f"largest logit difference to transformers' LlamaForCausalLM: {same:.2e} with its f32"
          f" RoPE angles, {own:.2e} with angles computed in f64")
    assert same < 1e-4


# ------------------------------------------------------------------------------------------


def train(a) -> None:
    out = Path(a.out)
    torch.manual_seed(a.seed)
    tok = train_tokenizer(a.vocab, a.seed)
    held_out = make_held_out(tok, 200, a.seed)
    d = [q["distance"] for s in held_out for q in s["questions"]]
    n = [len(tok.encode(s["story"]).ids) for s in held_out]
    print(f"vocabulary {tok.get_vocab_size()}; held out: stories of {min(n)}..{max(n)} tokens,"
          f" {len(d)} questions, median distance {statistics.median(d)},"
          f" {sum(x >= 400 for x in d)} at 400 or more", flush=True)
    model = Llama(make_config(a, tok))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)

    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    opts = [torch.optim.AdamW(others, lr=a.lr, betas=(0.9, 0.95), weight_decay=0.0)]
    if a.muon:
        opts.append(Muon(matrices, lr=a.muon, weight_decay=0.02))
    else:
        opts.append(torch.optim.AdamW(matrices, lr=a.lr, betas=(0.9, 0.95), weight_decay=0.05))

    step, tokens, start, last, seen = 0, 0, time.time(), 0.0, np.zeros((2, 2))

    def progress() -> float:
        if a.steps:
            return step / a.steps
        return (time.time() - start) / (60 * a.minutes)

    curriculum = Curriculum(a)
    data = batches(random.Random(a.seed * 7919 + 3), tok, a, {s["story"] for s in held_out}, curriculum)
    while (p := progress()) < 1:
        ids, w = next(data)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = group.setdefault("peak", group["lr"]) * schedule(p)
        logits = model(ids[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        wt = w[:, 1:].flatten()
        ((loss * wt).sum() / wt.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        step += 1
        tokens += int((wt > 0).sum())
        with torch.no_grad():
            for i, kind in enumerate((wt == 1, wt > 1)):
                seen[i] += np.array([float(loss[kind].sum()), int(kind.sum())])
            curriculum.update(float(loss[wt > 1].mean()), p)
        if step % a.log == 0:
            t = time.time() - start
            print(f"{t / 60:5.1f} min  step {step}  {tokens / 1e6:.2f} M tokens ({tokens / t:.0f}/s)"
                  f"  level {curriculum.level:.2f}  loss: story {seen[0][0] / max(1, seen[0][1]):.3f}"
                  f", answers {seen[1][0] / max(1, seen[1][1]):.4f}", flush=True)
            seen[:] = 0
        if time.time() - last > 60 * a.save_every:
            last = time.time()
            export(model, tok, out, held_out)
            if step > 1:
                r = evaluate(model, tok, held_out[:10])
                print(f"      held out (10 stories): {report(r)}", flush=True)
                model.train()
    export(model, tok, out, held_out)
    print(f"done: {step} steps, {tokens / 1e6:.2f} M tokens, {(time.time() - start) / 60:.1f} min"
          f" wall, {time.process_time() / 60:.1f} min of CPU", flush=True)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", default="models/stories")
    ap.add_argument("--minutes", type=float, default=38.0, help="wall time of the training")
    ap.add_argument("--steps", type=int, default=0, help="a number of steps instead of minutes")
    ap.add_argument("--threads", type=int, default=1)
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--vocab", type=int, default=1024)
    ap.add_argument("--hidden", type=int, default=128)
    ap.add_argument("--intermediate", type=int, default=352)
    ap.add_argument("--layers", type=int, default=5)
    ap.add_argument("--heads", type=int, default=4)
    ap.add_argument("--kv-heads", type=int, default=2)
    ap.add_argument("--batch", type=int, default=2048, help="tokens per step")
    ap.add_argument("--lr", type=float, default=2e-3)
    ap.add_argument("--muon", type=float, default=4e-3, help="lr of Muon; 0: AdamW everywhere")
    ap.add_argument("--answer-weight", type=float, default=5.0)
    ap.add_argument("--grow-steps", type=int, default=1500, help="steps from sketch to full tale")
    ap.add_argument("--log", type=int, default=50)
    ap.add_argument("--save-every", type=float, default=5.0, help="minutes between exports")
    ap.add_argument("--evaluate", action="store_true")
    ap.add_argument("--check", action="store_true")
    ap.add_argument("--sample", default=None, help="continue this text")
    a = ap.parse_args()
    torch.set_num_threads(a.threads)
    if a.check:
        check(Path(a.out))
    if a.evaluate:
        model, tok, held_out = load(Path(a.out))
        for mode in ("plain", "chat", "chain"):
            r = evaluate(model, tok, held_out, mode)
            print(mode, report(r))
            for x in [x for x in r if not x[2]][:10]:
                print("   wrong:", x)
    if a.sample is not None:
        model, tok, _ = load(Path(a.out))
        print(sample(model, tok, a.sample, a.seed))
    if not (a.check or a.evaluate or a.sample is not None):
        train(a)


if __name__ == "__main__":
    main()
