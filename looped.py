"""looped.py: looped transformers with recall and outer normalization, in one file.

One transformer block is applied again and again to a state h. Does looping longer at test time
solve harder problems than those trained on? The answer lies in the fixed points of the loop: are
they reached, do they depend on the input, are they smooth? After the abstract and the public code
of "Stability and Generalization in Looped Transformers" (arXiv 2604.15259); independent reading.

    python looped.py --task prefix_sums --recall internal    # laptop: train on 32 bits, solve 512
    python looped.py --task sudoku --side 4                  # laptop: easy boards, then harder ones
    python looped.py --task chess --preset paper             # GPU: the authors' protocol

letters   x token ids [B, L]   y labels [B, L]   e embedded input [B, L, D]   h state [B, L, D]
          B batch, L tokens, D width, H heads    N(u) = g * u / rms(u) for each token, g learned
          W_h acts on the state h, W_e on the input e (called Wx and Wh in the paper's code)
beyond    the paper: carry_loss; a start token or embedded cells (--positions absolute); QK-norm
"""
import argparse, copy, functools, glob, io, itertools, json, math, platform  # noqa: E401
import os, re, shlex, signal, subprocess, sys, time  # noqa: E401
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import data
RANK, WORLD = (int(os.environ.get(k, n)) for k, n in (("RANK", 0), ("WORLD_SIZE", 1)))  # torchrun's
# ---- config: the only place of options; the command line is made from it -------------------------
class LoopedError(data.DataError): """A request that cannot be met, in one line. Exit code 2."""
class RunFailed(LoopedError): """Work that was begun and failed, in one line. Exit code 1."""
def refuse(*cases):
    for wrong, message in cases:
        if wrong:
            raise LoopedError(message)
def opt(default, help, *choices, low=None, top=None):
    return field(default=default, metadata=dict(help=help, choices=choices, low=low, top=top))

@dataclass
class Config:
    """Options of a run; None becomes the task's own default (TASK_DEFAULTS). Raises LoopedError."""
    # task
    task: str = opt("prefix_sums", "what to solve", *data.TASKS)
    data: str = opt("", "puzzles from FILE or TRAIN,TEST instead of generated ones")
    bits: int = opt(32, "prefix sums: length of the easy strings, those trained on", low=1)
    hard_bits: int = opt(512, "prefix sums: length of the hard strings", low=1)
    side: int = opt(9, "sudoku: side of the board: 9, 6 or 4")
    n_train: int = opt(None, "puzzles to train on", low=1)
    n_val: int = opt(256, "easy puzzles that pick the checkpoint and do nothing else", low=1)
    n_test: int = opt(256, "fresh easy puzzles, only reported", low=1)
    n_hard: int = opt(None, "fresh hard puzzles, only reported", low=1)
    # model
    width: int = opt(None, "D, channels of the state", low=1)
    heads: int = opt(4, "attention heads", low=1)
    window: int = opt(None, "tokens that a token attends to, odd; 0 = all", low=0)
    positions: str = opt("absolute", "with start token or embedded cells", "absolute", "relative")
    blocks: int = opt(1, "untied blocks a loop (fixed depth: 15, --loops 1, --recall none)", low=1)
    recall: str = opt("internal", "where the input comes in again", "none", "external", "internal")
    inject: str = opt("linear", "how it comes in: W_h h + W_e e, or h + e", "linear", "add")
    norm: str = opt("outer", "where the norm stands", "pre", "peri", "outer", "sandwich", "gru")
    recall_gain: float = opt(1.0, "scales W_e at the start (linear only)", low=1e-9)
    embed_rms: float = opt(0.65, "root mean square of the tokens' embedding at the start", low=1e-9)
    # training
    train: str = opt("carry", "hand states on, or the paper's loss", "carry", "progressive")
    loops: int = opt(None, "loops of a puzzle in training (carry: in whole steps)", low=1)
    grad_loops: int = opt(3, "carry: loops per step, all with gradient", low=1)
    steps: int = opt(None, "optimiser steps", low=1)
    batch: int = opt(None, "puzzles per step", low=1)
    lr: float = opt(None, "learning rate after the warm-up", low=1e-9)
    decay: str = opt("linear", "then: linearly to 0, or x0.1 after 0.6 of it", "linear", "step")
    warmup: int = opt(50, "steps of warm-up", low=0)
    weight_decay: float = opt(0.01, "of AdamW, on parameters of two axes or more", low=0)
    clip: float = opt(1.0, "largest gradient norm", low=1e-9)
    ema: float = opt(0.0, "decay of a moving average of the weights; 0 = off", low=0, top=1)
    # evaluation
    eval_loops: int = opt(None, "largest loop count of the final table", low=1)
    eval_every: int = opt(100, "steps between validations", low=1)
    tol: float = opt(1e-3, "a puzzle is at rest when its residual falls below this", low=1e-9)
    damping: float = opt(None, "d in halting, h <- (1 - d) step(h) + d h: flips less", low=0, top=1)
    watch: bool = opt(False, "with --resume: print the prediction for one puzzle, loop by loop")
    puzzle: str = opt("", "the puzzle to watch: bits, a board with . for blanks, or a FEN")
    table: str = opt("", "print a table of finished runs, say 'out/*'; with --out, plot it there")
    # system
    seed: int = opt(0, "of data, weights and batches", low=0, top=2 ** 63)
    device: str = opt("auto", "where to compute", "auto", "cuda", "mps", "cpu")
    dtype: str = opt("auto", "autocast in training (auto: bf16 on cuda)", "auto", "fp32", "bf16")
    compile: str = opt("auto", "torch.compile the step (auto: on cuda)", "auto", "on", "off")
    minutes: float = opt(0.0, "stop training after so many minutes, resumably; 0 = no limit", low=0)
    out: str = opt("", "folder of the run; if empty, out/ and a name made of the main options")
    resume: str = opt("", "go on with a run (its folder); a finished one is evaluated again")
    preset: str = opt("", "paper: the authors' protocol; options given beside it win", "", "paper")

    def __post_init__(self):
        own, small = (TASK_DEFAULTS.get(k, {}) for k in (self.task, f"{self.task} {self.side}"))
        for f in fields(self):
            if getattr(self, f.name) is None:
                setattr(self, f.name, (own | small).get(f.name))
            value, choices, low = getattr(self, f.name), f.metadata["choices"], f.metadata["low"]
            top = f.metadata["top"] or (10 ** 8 if f.type is int else math.inf)
            refuse((choices and value not in choices, f"--{f.name} {value}: unknown; choose one of "
                    + ", ".join(filter(None, choices))),
                   (low is not None and not low <= value < top,
                    f"--{f.name} {value}: must be at least {low} and less than {top}"))
        grid, head_dim = self.make_task().grid, self.width // self.heads
        refuse((self.width % self.heads or head_dim % (2 * len(grid)), f"--width {self.width} "
                f"--heads {self.heads}: RoPE needs a multiple of {2 * len(grid)} channels a head"),
               (self.window and (self.window % 2 == 0 or self.window > math.prod(grid)),
                f"--window {self.window}: odd, at most {math.prod(grid)}, or 0"))
        self.grad_loops = min(self.grad_loops, self.loops)

    def make_task(self):
        task = data.TASKS[self.task]
        return replace(task, **{f.name: getattr(self, f.name) for f in fields(task)})
BOARD = dict(n_train=20000, n_hard=256, width=64, window=0, loops=30, steps=16000, batch=64,
             lr=2e-3, eval_loops=256, damping=0.25)
TASK_DEFAULTS = {
    "prefix_sums": dict(n_train=8000, n_hard=64, width=64, window=5, loops=21, steps=800, batch=100,
                        lr=1e-3, eval_loops=500, damping=0.0),
    "sudoku": BOARD, "chess": BOARD | dict(n_train=16000, steps=8000),
    "sudoku 4": dict(loops=16, steps=1600, batch=128, lr=1e-3, eval_loops=64),
    "sudoku 6": dict(steps=3000, eval_loops=128)}
PAPER = dict(width=256, heads=8, train="progressive", loops=30, batch=500, lr=3e-4, decay="step",
             warmup=160, steps=1600, eval_loops=500, positions="relative")     # 100 epochs
PAPER_BOARD = PAPER | dict(warmup=800, steps=8000, n_train=40000, n_val=2000, n_hard=10000)
RESUMABLE = set("steps hard_bits n_test n_hard lr clip eval_loops eval_every tol damping device "
    "dtype compile minutes out resume watch puzzle table preset".split())    # may change
# ---- the parts: norm, rotary positions, attention ------------------------------------------------
class RMSNorm(nn.Module):
    """N(u) = g * u / rms(u) over the last axis; in fp32 (or fp64), also under autocast."""
    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))
    def forward(self, u):
        u = u.float() if u.dtype == torch.bfloat16 else u
        return u * (u.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * self.weight

@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)        # made during an evaluation, it may be used in training later
def geometry(grid, window, heads, head_dim, base, device, dtype):
    """What attention needs to know of positions; it depends on shapes alone, so it is made once.
    -> cos, sin [L, 1, 1, head_dim / 2]: n-D RoPE; the token at p on an axis turns pair j of that
    axis by p * base^(-j / k), k = head_dim / (2 * axes). -> queries [n, C], keys [n, K], mask
    [n * heads, C, K]: windowed attention in n chunks of C queries, with the K = C + window - 1 keys
    that their windows cover: O(L) work. No queries, keys for a single chunk, no mask for no window.
    """
    L, k, window = math.prod(grid), head_dim // (2 * len(grid)), min(window, math.prod(grid))
    freq = base ** (-torch.arange(k, dtype=torch.float64) / k)
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angle = torch.cat([p.flatten()[:, None] * freq for p in axes], -1)[:, None, None]
    rope = angle.cos().to(device, dtype), angle.sin().to(device, dtype)
    if not window:
        return *rope, None, None, None
    C = -(-L // max(1, round(L / 32)))
    queries = torch.arange(-(-L // C) * C).clamp(max=L - 1).view(-1, C)
    first = (queries - window // 2).clamp(0, L - window)    # at the ends the window shifts inwards
    keys = first[:, :1] + torch.arange(min(C + window - 1, L))
    seen = (keys[:, None] >= first[..., None]) & (keys[:, None] < first[..., None] + window)
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -math.inf).to(device)
    some = (queries.to(device), keys.clamp(max=L - 1).to(device)) if len(keys) > 1 else (None, None)
    return *rope, *some, mask.repeat_interleave(heads, 0)
def constant_geometry(*key):        # torch.compile freezes it into the graph: no weights in here
    return geometry(*key)

class Attention(nn.Module):
    """Multi-head self-attention, full or windowed, with QK-RMSNorm and then RoPE (so: relative)."""
    def __init__(self, width, heads, grid, window, rope_base):
        super().__init__()
        self.heads, self.grid, self.window, self.rope_base = heads, grid, window, rope_base
        self.qkv = nn.Linear(width, 3 * width)
        self.qk_norm = RMSNorm(2, 1, width // heads)
        self.out = nn.Linear(width, width)
    def forward(self, u):
        B, L, D = u.shape
        grid = self.grid if len(self.grid) > 1 else (L,)    # strings may be longer than in training
        cos, sin, queries, keys, mask = constant_geometry(
            grid, self.window, self.heads, D // self.heads, self.rope_base, u.device,
            self.qk_norm.weight.dtype)
        qkv = self.qkv(u).view(B, L, 3, self.heads, -1)                     # [B, L, 3, H, D/H]
        a, b = self.qk_norm(qkv[:, :, :2]).chunk(2, -1)
        qk = torch.cat((a * cos - b * sin, a * sin + b * cos), -1).to(qkv.dtype)
        q, k, v = *qk.unbind(2), qkv[:, :, 2]
        if queries is not None:
            q, k, v = (t.index_select(1, i.flatten()).unflatten(1, i.shape)
                       for t, i in ((q, queries), (k, keys), (v, keys)))
        q, k, v = (t.transpose(-3, -2).flatten(1, -3) for t in (q, k, v))   # [B, n H, C|K, D/H]
        o = F.scaled_dot_product_attention(q, k, v, mask).unflatten(1, (-1, self.heads))
        return self.out(o.transpose(-3, -2).reshape(B, -1, D)[:, :L])

class Block(nn.Module):
    """The two sub-layers and their norms; LoopedTransformer.step puts them together."""
    def __init__(self, cfg, task):
        super().__init__()
        D = cfg.width
        self.attn = Attention(D, cfg.heads, task.grid, cfg.window, task.rope_base)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))
        if cfg.norm != "outer":
            self.norm_in = RMSNorm(D)           # each norm is shared by the two sub-layers
        if cfg.norm != "pre":
            self.norm_out = RMSNorm(D)
        if cfg.norm == "gru":
            self.gru = nn.GRUCell(D, D)
            nn.init.xavier_uniform_(self.gru.weight_ih)
            nn.init.orthogonal_(self.gru.weight_hh)
            for bias in (self.gru.bias_ih, self.gru.bias_hh):   # update gate 1 + 1: keep most of h
                bias.data = torch.tensor([0.0, 1.0, 0.0]).repeat_interleave(D)
# ---- the looped transformer ----------------------------------------------------------------------
class LoopedTransformer(nn.Module):
    """h_0 = e;  h_{t+1} = step(h_t, W_e e);  logits = readout(h_K) after K loops."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.task, D = cfg, cfg.make_task(), cfg.width
        self.table, grid = nn.Embedding(self.task.vocab, D), self.task.grid
        if len(grid) > 1 and cfg.positions == "absolute":
            self.place = nn.Parameter(0.5 * cfg.embed_rms * torch.randn(math.prod(grid), D))
        if cfg.recall != "none":        # one pair for all sub-layers; inject "add": u + e
            self.W_h, self.W_e = ((nn.Linear(D, D), nn.Linear(D, D)) if cfg.inject == "linear" else
                                  (nn.Identity(), nn.Identity()))
        self.blocks = nn.ModuleList(Block(cfg, self.task) for _ in range(cfg.blocks))
        self.head = nn.Sequential(RMSNorm(D), nn.Linear(D, D), nn.GELU(),
                                  nn.Linear(D, self.task.classes))
        with torch.no_grad():       # |e| against |h| is part of recall's strength: set on purpose
            self.table.weight *= cfg.embed_rms / self.table.weight.square().mean().sqrt()
            if cfg.recall != "none" and cfg.inject == "linear":
                self.W_e.weight *= cfg.recall_gain
    def embed(self, x):
        """x [B, L] int -> e [B, L, D]."""
        return self.table(x) + getattr(self, "place", 0)
    def recall(self, e):
        """e [B, L, D] -> r [B, L, D], the part of recall that no loop changes; or None."""
        return None if self.cfg.recall == "none" else self.W_e(e)
    def step(self, h, r):
        """One turn of the loop, h [B, L, D], r from recall() -> h: recall and norm are here."""
        recall, norm = self.cfg.recall, self.cfg.norm
        for block in self.blocks:
            if recall == "external":
                h = (self.W_h(h) + r).to(h.dtype)           # h <- W_h h + W_e e
            for sublayer in (block.attn, block.mlp):
                u = h if norm == "outer" else block.norm_in(h)
                if recall == "internal":
                    u = self.W_h(u) + r                     # u <- W_h u + W_e e; h stays as it is
                f = sublayer(u)
                if norm == "pre":
                    h = h + f                               # h + F(N(h))
                elif norm == "peri":
                    h = h + block.norm_out(f)               # h + N(F(N(h)))
                elif norm == "gru":                         # GRUCell(N(F(N(h))), h)
                    f = block.gru(block.norm_out(f).flatten(0, 1), h.flatten(0, 1))
                    h = f.view_as(h).to(h.dtype)
                else:
                    h = block.norm_out(h + f)               # N(h + F(h)); sandwich N(h + F(N(h)))
        return h
    def readout(self, h):
        """h [B, L, D] -> logits [B, L, classes]."""
        return self.head(h)
    def forward(self, x, loops, h=None):
        """x [B, L], state h (default: h_0 = e) -> logits [B, L, classes], h after `loops` loops."""
        e = self.embed(x)
        r = self.recall(e)
        h = e if h is None else h
        for _ in range(loops):
            h = self.step(h, r)
        return self.readout(h), h
# ---- evaluation: accuracy against loops, and halting when the state has come to rest -------------
def moved(new, old):
    """States [B, L, D] -> [B]: how far a puzzle moved, max over tokens of |new - old| / |old|."""
    return ((new - old).norm(dim=-1) / old.norm(dim=-1).clamp(min=1e-30)).amax(-1)
def chunk_size(x):  # how many of the puzzles x [N, L] fit the caches of a CPU, or a GPU's memory
    return max(1, (4096 if x.device.type == "cpu" else 2 ** 17) // x.shape[1])

@torch.inference_mode()
def evaluate(model, x, y, loops, progress=lambda done, total: None):
    """Accuracy and motion of puzzles x, y [N, L] after each of the loop counts `loops`.
    -> {count: {"exact": share of puzzles with all tokens right, "token": share of scored tokens,
        "residual": max over tokens of |h_{t+1} - h_t| / |h_t|, mean over puzzles; "residual2": the
        same for h_{t+2} (small where residual is not: a two-cycle); "norm_ratio": |h_t| / |h_1|}}
    """
    refuse((min(loops) < 1, f"loop counts start at 1, not {min(loops)}"))
    total, size = {t: torch.zeros(5, dtype=torch.float64) for t in loops}, chunk_size(x)
    for done, (xb, yb) in enumerate(zip(x.split(size), y.split(size)), 1):
        h = model.embed(xb)
        r, scored, past = model.recall(h), model.task.scored(xb), {}
        for t in range(1, max(loops) + 3):
            h = model.step(h, r)
            first = h.norm(dim=(1, 2)) if t == 1 else first
            if t in total:
                past[t], right = h, model.task.predict(model.readout(h)) == yb
                token = (right & scored).sum(-1) / scored.sum(-1).clamp(min=1)
                ratio = h.norm(dim=(1, 2)) / first
                total[t][[0, 1, 4]] += torch.stack((right.all(-1), token, ratio)).sum(-1).cpu()
            for k, behind in ((2, t - 1), (3, t - 2)):
                if behind in past:
                    total[behind][k] += moved(h, past[behind]).sum().cpu()
        progress(min(done * size, len(x)), len(x))
    return {t: dict(zip(("exact", "token", "residual", "residual2", "norm_ratio"),
                        (total[t] / len(x)).tolist())) for t in loops}

@torch.inference_mode()
def solve(model, x, tol=1e-3, max_loops=2000, damping=0.0):
    """Adaptive halting: each puzzle of x [N, L] loops until none of its tokens moves more than tol.
    -> logits [N, L, classes], loops used [N], settled [N] (False: max_loops was not enough).
    h <- (1 - damping) step(h) + damping h has the same fixed points, but fewer flips round them."""
    results = []
    for xb in x.split(chunk_size(x)):
        e = model.embed(xb)
        h, r, active = e.clone(), model.recall(e), torch.arange(len(e), device=x.device)
        used, settled = torch.full_like(active, max_loops), torch.zeros_like(active).bool()
        for t in range(1, max_loops + 1):
            old = h[active]
            new = model.step(old, None if r is None else r[active])
            h[active], rest = new.lerp(old, damping), moved(new, old) < tol
            used[active[rest]], settled[active[rest]] = t, True
            active = active[~rest]
            if len(active) == 0:
                break
        results.append((model.readout(h), used, settled))
    return tuple(torch.cat(column) for column in zip(*results))
# ---- training: two losses ------------------------------------------------------------------------
def carry_loss(model, cfg, carry, fresh):
    """The default. A puzzle gets cfg.loops loops, a few of them a step: its state is carried over.
    Each step starts from the states that the last step left, detached, and runs `grad_loops` loops
    with gradient. Allowed because what counts is the fixed point: near it h hardly depends on the
    path, so a state of slightly older weights is as good a start as a new one, and a short gradient
    is close to the full one (terms shrink like rho(dh'/dh)^t). A batch holds puzzles of all ages;
    one whose loops are used up makes way for a fresh one.
    carry {"x", "y" [B, L], "h" [B, L, D], "age" [B]}; fresh x, y [B, L] -> loss, new carry.
    """
    over = carry["age"] >= cfg.loops
    x, y = (torch.where(over[:, None], new, carry[k]) for new, k in zip(fresh, "xy"))
    e = model.embed(x)
    h, r = torch.where(over[:, None, None], e, carry["h"]), model.recall(e)     # h_0 = e
    for _ in range(cfg.grad_loops):
        h = model.step(h, r)
    loss = F.cross_entropy(model.readout(h).flatten(0, 1).float(), y.flatten())
    age = carry["age"].masked_fill(over, 0) + cfg.grad_loops
    return loss, {"x": x, "y": y, "h": h.detach(), "age": age}

def progressive_loss(model, cfg, x, y, rng):
    """The paper's: n ~ U{0..K-1} loops without gradient, k ~ U{1..K-n} with it; K = cfg.loops."""
    n = torch.randint(0, cfg.loops, (), generator=rng, device=rng.device).item()
    k = torch.randint(1, cfg.loops - n + 1, (), generator=rng, device=rng.device).item()
    with torch.no_grad():
        h = model(x, n)[1] if n else None       # n = 0: h_0 = e keeps its gradient
    return F.cross_entropy(model(x, k, h)[0].flatten(0, 1).float(), y.flatten())
# ---- checkpoints and the training loop -----------------------------------------------------------
def read_checkpoint(path, device="cpu"):
    """A run's folder or its ckpt.pt -> state, model with its best weights. Raises LoopedError."""
    path = Path(path) / "ckpt.pt" if Path(path).is_dir() else Path(path)
    refuse((not path.is_file(), f"{path}: no checkpoint to resume; give a run's folder"))
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        model = LoopedTransformer(Config(**state["config"])).to(device)
        model.load_state_dict(state["best"])
    except Exception as e:      # torch raises a dozen kinds for truncated and foreign files
        raise LoopedError(f"{path}: broken or not of looped.py ({repr(e):.80})") from None
    return state, model.eval()
def load(path, device="cpu"):
    """A run's folder or checkpoint -> (model, cfg), with the weights that the run is judged by."""
    return (model := read_checkpoint(path, device)[1]), model.cfg
def learning_rate(cfg, step):
    """linear: up over `warmup` steps, then down to 0. step: 1 - exp(-t/warmup), x0.1 after 60 %."""
    ramp, share = (step + 1) / max(1, cfg.warmup), step / cfg.steps
    return cfg.lr * (min(1, ramp) * (1 - share) if cfg.decay == "linear" else
                     (1 - math.exp(-ramp)) * 0.1 ** (share >= 0.6))

def train(cfg, model, sets, out, state=None, until=None):
    """Train on sets["train"], saving out/ckpt.pt; state: a checkpoint to go on from, on a CPU bit
    for bit. -> False if stopped (`until` steps, minutes, Ctrl-C). RunFailed: loss not finite."""
    (x_all, y_all), device, began = sets["train"], sets["train"][0].device, time.time()
    bf16 = cfg.dtype == "bf16" or (cfg.dtype == "auto" and device.type == "cuda" and
                                   torch.cuda.is_bf16_supported(False))     # natively
    rng = torch.Generator(device).manual_seed(cfg.seed)
    judged = copy.deepcopy(model) if cfg.ema else model     # the moving average, if there is one
    decayed, vectors = ([p for p in model.parameters() if (p.dim() > 1) == b] for b in (1, 0))
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": vectors, "weight_decay": 0.0}],
                                  weight_decay=cfg.weight_decay, fused=device.type != "mps")
    def fresh():        # each of torchrun's processes takes its slice of the same batch
        pick = torch.randint(len(x_all), (cfg.batch,), generator=rng, device=device)
        return [t[RANK::WORLD] for t in model.task.augment(x_all[pick], y_all[pick], rng)]
    past = state or {"step": 0, "seconds": 0.0, "best": None, "best_val": -1.0, "carry": None}
    seconds, best, best_val, carry = (past[k] for k in ("seconds", "best", "best_val", "carry"))
    if state:
        for part, key in ((model, "model"), (judged, "average"), (optimizer, "optimizer")):
            part.load_state_dict(state[key])
        if state["rng"].shape == rng.get_state().shape:     # a GPU's generator is of another kind
            rng.set_state(state["rng"].cpu())
        carry = carry and {k: t.to(device) for k, t in carry.items()}
    if cfg.train == "carry" and (not carry or WORLD > 1):   # several processes start fresh puzzles
        (x, y), age = fresh(), torch.arange(RANK, cfg.batch, WORLD, device=device)
        carry = {"x": x, "y": y, "h": model.embed(x).detach(), "age": age * cfg.loops // cfg.batch}
    spent, ticks, asked = 0, 0, []
    ctrl_c = signal.signal(signal.SIGINT, lambda *_: asked.append(True))    # ends after its step
    try:
        for done in range(past["step"] + 1, cfg.steps + 1):
            tick, lr = time.time(), learning_rate(cfg, done - 1)
            for group in optimizer.param_groups:
                group["lr"] = lr
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
                if cfg.train == "carry":
                    loss, carry = carry_loss(model, cfg, carry, fresh())
                else:
                    loss = progressive_loss(model, cfg, *fresh(), rng)
            loss.backward()
            if done == until or 0 < 60 * cfg.minutes < time.time() - began:
                asked.append(True)
            if WORLD > 1:       # DistributedDataParallel in short; one asked to stop stops all
                loss, stop = loss.detach(), loss.new_full((), len(asked))
                for t in [p.grad for p in model.parameters() if p.grad is not None] + [loss, stop]:
                    torch.distributed.all_reduce(t.div_(WORLD))
                asked = [True] * int(stop > 0)
            norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
            optimizer.step(), optimizer.zero_grad()
            if cfg.ema:
                for a, p in zip(judged.parameters(), model.parameters()):
                    a.data.lerp_(p.data, 1 - min(cfg.ema, done / (done + 10)))
            look = done % cfg.eval_every == 0 or done == cfg.steps
            stop = asked and done < cfg.steps
            last = loss.item() if look or stop else 0.0     # waits for a GPU, so the time is right
            spent, ticks = spent + time.time() - tick, ticks + 1
            if look:
                val = evaluate(judged, *sets["val"], [cfg.loops])[cfg.loops]
            if not math.isfinite(last + (val["residual"] if look else 0)):
                raise RunFailed(f"step {done} is not finite (loss {last:.3g}): lower --lr; "
                                f"the last good checkpoint stays in {out}")
            if look:
                ms, spent, ticks, seconds = 1e3 * spent / ticks, 0, 0, seconds + spent
                now = dict(step=done, loss=last, exact=val["exact"], norm=norm.item())
                log(out, now | {"lr": lr, "ms": ms}, "step {step:6d} | loss {loss:.4f} | val exact "
                    "{exact:.3f} | gradient norm {norm:7.3f} | ".format(**now) + f"lr {lr:.1e} | "
                    f"{ms:5.0f} ms a step | {data.clock(ms / 1e3 * (cfg.steps - done))} left")
                if val["exact"] >= best_val:    # the latest of the best; the hard set has no say
                    best_val, best = val["exact"], None     # copied when it is saved
            if (look or stop) and RANK == 0:
                best = best or {k: v.detach().clone() for k, v in judged.state_dict().items()}
                torch.save({"config": asdict(cfg), "best": best, "best_val": best_val, "step": done,
                            "seconds": seconds + spent, "model": model.state_dict(), "rng":
                            rng.get_state(), "average": judged.state_dict(), "optimizer":
                            optimizer.state_dict(), "carry": carry if WORLD == 1 else None},
                           buffer := io.BytesIO())
                data.write_atomic(out / "ckpt.pt", buffer.getvalue())
            if stop:
                print(f"stopped after step {done}; go on with: "
                      f"python looped.py --resume {shlex.quote(str(out))}")
                return False
        return True
    finally:
        signal.signal(signal.SIGINT, ctrl_c)
def log(out, record, text):
    print(text, flush=True)
    if RANK == 0:
        with open(out / "log.jsonl", "a") as f:
            f.write(json.dumps(record) + "\n")
# ---- results -------------------------------------------------------------------------------------
def wilson(rate, n, z=1.96):        # 95 % interval of a rate seen in n trials (Wilson, 1927)
    middle, half = rate + z * z / (2 * n), z * math.sqrt(rate * (1 - rate) / n + (z / (2 * n)) ** 2)
    return max(0.0, middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
LEVELS = {"easy": "C0o-", "hard": "C1s-"}   # and how they are drawn
def report(cfg, model, sets):
    """Print accuracy and motion against loops, easy beside hard, and halting -> result."""
    counts = sorted({2 ** i for i in range(cfg.eval_loops.bit_length())} | {cfg.eval_loops})
    result, began, title, lines = {"halting": {}}, time.time(), "\n      ", []
    form = "| {exact:5.3f} {token:6.4f} {residual:8.1e} {residual2:9.1e} {norm_ratio:9.3g} "
    for level in LEVELS:
        (x, y), tell = sets[level], data.progress(f"evaluating {level}")
        r = result[level] = evaluate(model, x, y, counts, tell)
        logits, used, rest = solve(model, x[:32], cfg.tol, counts[-1], cfg.damping)
        right = (model.task.predict(logits) == y[:32]).all(-1)
        exact, loops, rest = (t.cpu().double().mean().item() for t in (right, used, rest))
        result["halting"][level] = {"exact": exact, "loops": loops, "settled": rest, "n": len(used)}
        title += "| %-43s" % (f"{level}: %d puzzles of %d tokens" % x.shape)
        low, high = wilson(last := r[counts[-1]]["exact"], len(x))
        best = max(counts, key=lambda t: r[t]["exact"])
        lines.append(f"{level}: exact {last:.3f} [{low:.3f}, {high:.3f}] at {counts[-1]} loops "
                     f"(best {r[best]['exact']:.3f} at {best}); each until it rests: exact "
                     f"{exact:.3f} after {loops:.0f} loops, {rest:.0%} of {len(used)} at rest")
    print(title + "\nloops " + "| exact  token residual residual2  |h|/|h1| " * 2)
    for t in counts:
        print(f"{t:5} " + form.format(**result["easy"][t]) + form.format(**result["hard"][t]))
    print(*lines, f"by chance {model.task.chance}", sep="\n")
    return result | {"config": asdict(cfg), "eval_minutes": (time.time() - began) / 60}

def plot(groups, path):
    """{title: [result of report]} -> a panel each, a line for every run; training shaded."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print(f"no {path}: pip install matplotlib to get one")
    wide, high = min(3, len(groups)), -(-len(groups) // 3)
    figure = Figure(figsize=(2 + 3.4 * wide, 1 + 2.4 * high), layout="constrained")
    panels = figure.subplots(high, wide, squeeze=False, sharex=True, sharey=True).flat
    for panel, (title, results) in zip(panels, groups.items()):
        panel.axvspan(1, results[0]["config"]["loops"], color="0.92", label="loops in training")
        for result, (level, style) in itertools.product(results, LEVELS.items()):
            loops, exact = zip(*((int(t), row["exact"]) for t, row in result[level].items()))
            panel.plot(loops, exact, style, label=level if result is results[0] else None)
        panel.set(xscale="log", xticks=loops[::2], xticklabels=loops[::2], title=title)
    figure.supxlabel("loops"), figure.supylabel("solved exactly")
    panel.legend(frameon=False)
    figure.savefig(buffer := io.BytesIO(), format="png", dpi=100)
    path.parent.mkdir(parents=True, exist_ok=True)
    data.write_atomic(path, buffer.getvalue())

def table(pattern, out=""):
    """Print a Markdown table, a row is the mean ± sd of runs NAME-seed*; plot out/curves.png."""
    groups, columns = {}, ("exact", "residual", "norm_ratio")
    for path in map(Path, sorted(glob.glob(f"{pattern}/eval.json"))):
        try:
            r, name = json.loads(path.read_text()), re.sub(r"-?seed\d+$", "", path.parent.name)
            easy, hard = (list(r[level].values())[-1] for level in LEVELS)
            r["row"] = easy["exact"], *(hard[k] for k in columns), r["minutes"]
            groups.setdefault(name or "all", []).append(r)
        except (ValueError, LookupError, TypeError, AttributeError):
            raise LoopedError(f"{path}: not an eval.json of looped.py") from None
    refuse((not groups, f"--table {pattern}: no eval.json there; give a pattern of run folders"))
    print("| run | seeds | easy | hard | hard, each seed | residual | norm ratio | minutes |\n"
          + "|---" * 8 + "|")
    for name, runs in groups.items():
        easy, hard, residual, ratio, minutes = np.array([r["row"] for r in runs]).T
        print(f"| {name} | {len(runs)} | {easy.mean():.3f} ± {easy.std():.3f} | {hard.mean():.3f} "
              f"± {hard.std():.3f} | {' '.join(f'{v:.2f}' for v in hard)} | "
              f"{np.median(residual):.0e} | {np.median(ratio):.3g} | {minutes.mean():.1f} |")
    if out:
        plot(groups, Path(out, "curves.png"))

@torch.inference_mode()
def watch(cfg, model, text, x, y):
    """Print the prediction for puzzle x [L] (text: as typed) at loops 1, 2, 4, ... until it rests:
    + right, x wrong, ~ changed since the last print, = unchanged; in colour on a terminal."""
    tty, colour = sys.stdout.isatty(), {"~": 33, "=": 0, "+": 32, "x": 31}
    e = model.embed(torch.as_tensor(x, dtype=torch.long)[None])
    h, r, before = e, model.recall(e), None
    for t in range(1, 2 * cfg.eval_loops + 1):
        new = model.step(h, r)
        h, rest = new.lerp(h, cfg.damping), moved(new, h).item()
        if t & (t - 1) and rest >= cfg.tol and t < 2 * cfg.eval_loops:
            continue
        now = model.task.predict(model.readout(h))[0].numpy()
        marks = np.where(now != before, "~", "=" if y is None else np.where(now == y, "+", "x"))
        before = now
        print(f"\nloop {t}: {'at rest' if rest < cfg.tol else f'residual {rest:.1g}'}")
        print(model.task.show(x, now, lambda i, cell: (
            f"\033[{colour[marks[i]]}m{cell}\033[0m" if tty else cell + marks[i])))
        if rest < cfg.tol:
            break
    print("\n" + model.task.answer(text or model.task.text(x), now))
# ---- command line --------------------------------------------------------------------------------
def parse(argv):
    """Command line -> {option: value} of the options that were given; unknown ones are refused."""
    parser = data.Parser("looped.py", allow_abbrev=False, argument_default=argparse.SUPPRESS,
                         formatter_class=functools.partial(argparse.HelpFormatter, width=180))
    for f in fields(Config):
        default = f.default if f.default is not None else "; ".join(
            f"{task} {own[f.name]}" for task, own in TASK_DEFAULTS.items() if f.name in own)
        choices = f" [{'|'.join(filter(None, f.metadata['choices']))}]".replace(" []", "")
        kind = {"action": "store_true"} if f.type is bool else {"type": f.type, "metavar": "VALUE"}
        kind["help"] = f"{f.metadata['help']}{choices} (default: {default})"
        parser.add_argument(f"--{f.name}", **kind)
    return vars(parser.parse_args(argv))

def configure(given):
    """The options that were given -> Config, device, checkpoint and model to resume, or None."""
    state, best = read_checkpoint(given["resume"]) if "resume" in given else (None, None)
    preset = PAPER if given.get("task", "prefix_sums") == "prefix_sums" else PAPER_BOARD
    base = state["config"] if state else preset if given.get("preset") == "paper" else {}
    cfg, done = Config(**base | given), state.get("step", 0) if state else 0
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": 1}
    device = next(d for d in there if there[d]) if cfg.device == "auto" else cfg.device
    refuse(*((getattr(cfg, name) != base[name], f"--{name} {given.get(name)}: the checkpoint was "
              f"made with {base[name]}; leave the option out, or start a new run")
             for name in (set(base) - RESUMABLE if state else ())),
           (not there[device], f"--device {device}: there is none here; use --device cpu"),
           (cfg.watch and not state, "--watch needs a trained model: --resume RUN"),
           ("puzzle" in given and not cfg.watch, "--puzzle is for --watch: add that"),
           ("preset" in given and state, "--preset is for new runs, a resumed one has its options"),
           (cfg.steps < done, f"--steps {cfg.steps}: the run has done {done} already"),
           (state and done < cfg.steps and "optimizer" not in state,
            f"{cfg.resume}: weights only, training cannot go on from them"),
           ("recall_gain" in given and (cfg.recall == "none" or cfg.inject == "add"),
            "--recall_gain scales W_e, which this recall does not have"),
           (cfg.batch % WORLD, f"--batch {cfg.batch}: must be a multiple of {WORLD} processes"))
    return cfg, device, state, best

def run(given):
    """Train, go on, evaluate or watch, as the options say."""
    cfg, device, state, best = configure(given)
    if cfg.table:
        return table(cfg.table, cfg.out)
    torch.manual_seed(cfg.seed)
    model, old = LoopedTransformer(cfg), Path(cfg.resume)
    if cfg.watch and cfg.puzzle:
        return watch(cfg, best, cfg.puzzle, *model.task.parse(cfg.puzzle))
    sets = data.splits(model.task, cfg.seed, cfg.n_train, cfg.n_val, cfg.n_test, cfg.n_hard,
                       cfg.data or None)
    if cfg.watch:
        return watch(cfg, best, "", sets["hard"].x[0], sets["hard"].y[0])
    if WORLD > 1:       # of several processes one speaks
        sys.stdout = open(os.devnull, "w") if RANK else sys.stdout
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    home = old if old.is_dir() else old.parent if old.name == "ckpt.pt" else Path("out", old.stem)
    out = Path(given.get("out") or (home if state else
               f"out/{cfg.task}-{cfg.recall}-{cfg.norm}-seed{cfg.seed}"))
    refuse(((out / "ckpt.pt").exists() and not (state and out.samefile(home)),
            f"{out} holds a run: --resume {out} goes on, --out DIR starts another"))
    out.mkdir(parents=True, exist_ok=True)
    git = f"git -C {shlex.quote(str(Path(__file__).parent))} log -1 --format=%h 2>&-"
    facts = {"parameters": sum(p.numel() for p in model.parameters()), "torch": torch.__version__,
             "chip": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
             "commit": subprocess.getoutput(git), "config": asdict(cfg)}
    log(out, facts, "\n".join((" ".join(f"{k}={v}" for k, v in (facts | asdict(cfg)).items()
        if k != "config"), model.task.show(sets["train"].x[0], sets["train"].y[0]))))
    sets = {k: tuple(torch.as_tensor(t, dtype=torch.long, device=device) for t in (p.x, p.y))
            for k, p in sets.items()}
    model.to(device)
    if cfg.compile == "on" or cfg.compile == "auto" and device == "cuda":
        torch._dynamo.config.cache_size_limit = 64      # a graph for each shape and grad mode
        torch.compiler.assume_constant_result(constant_geometry)
        LoopedTransformer.step = torch.compile(LoopedTransformer.step, dynamic=False)
        global solve
        solve = torch.compiler.set_stance("force_eager")(solve)         # its shapes shrink
    unfinished = not state or state.get("step", 0) < cfg.steps
    if unfinished and not train(cfg, model, sets, out, state) or RANK:
        return
    state = read_checkpoint(out, device)[0] if unfinished else state
    model.load_state_dict(state["best"])
    result = report(cfg, model.eval(), sets) | {"parameters": facts["parameters"], "steps":
             state.get("step"), "minutes": state.get("seconds", 0) / 60}
    print(f"trained {result['minutes']:.1f} min, evaluated {result['eval_minutes']:.1f} min: {out}")
    if not unfinished and "out" not in given and (out / "eval.json").exists():
        return print("the run's eval.json stays as it was; --out DIR saves this table")
    data.write_atomic(out / "eval.json", json.dumps(result, indent=1).encode())
    plot({f"{cfg.task}, {cfg.recall} recall, {cfg.norm} norm": [result]}, out / "curve.png")

def main(argv=None):
    try:
        return run(parse(argv)) or 0
    except data.DataError as e:
        code, message = 1 if isinstance(e, RunFailed) else 2, e
    except OSError as e:
        code, message = 2, f"{e.filename or 'writing'}: {e.strerror}; free it or give another --out"
    except (MemoryError, RuntimeError) as e:    # allocate: what torch says of a CPU's memory
        if not isinstance(e, (MemoryError, torch.OutOfMemoryError)) and "allocate" not in str(e):
            raise
        code, message = 1, f"out of memory: lower --batch, --width or --n_train ({str(e):.60})"
    except KeyboardInterrupt:
        code, message = 130, "interrupted; --resume goes on from what was saved"
    print(f"looped.py: {message}", file=sys.stderr)
    return code

if __name__ == "__main__":
    sys.exit(main())
