"""looped.py: looped transformers with recall and outer normalization, in one file.

One transformer block (or a few) is applied again and again to a state. Does looping longer at test
time solve harder problems than those trained on? "Stability and Generalization in Looped
Transformers" (arXiv 2604.15259), the paper below, looks for the answer in the fixed points:

    reachability        does the state come to rest?
    input-dependence    does the point of rest still depend on the input?
    geometry            is it smooth in the input, and safe to backpropagate through?

and in two choices that decide what the fixed points are like:

    recall              the input is mixed in again in every loop: into the state itself
                        (external recall), or only into what a sub-layer reads (internal)
    outer norm          the norm comes after the residual sum, so that it bounds the state

This is an independent reading of its abstract and its public code, not the author's own. To run it:

    python looped.py --task prefix_sums --recall internal   # laptop: train on 32 bits, solve 512
    python looped.py --preset paper                         # GPU: the author's protocol

The whole idea is in LoopedTransformer.step (where does the input come in again, and where is the
norm?) and in carry_loss (how to train a loop without unrolling all of it). Notation:

    x, y [B, L]  token ids and labels of B puzzles of L tokens ([N, L]: of a whole set)
    e [B, L, D]  embedded input, D channels wide
    h [B, L, D]  state; h_0 = e
    r [B, L, D]  W_e e; recall makes W_h u + r of what it acts on, in every loop
    N(u)         g * u / rms(u) for each token, with a learned gain g (RMSNorm)
    F(u)         a sub-layer, attention or MLP (in the code F is torch.nn.functional)

A loop is one call of LoopedTransformer.step. Everywhere else a step, as in --steps, is one update
of the weights.
cfg is a Config (below): every field is an option of the command line. The puzzles are in data.py. A
Task there has a loss (cross-entropy of the tokens), predict (logits -> labels), scored (the tokens
that are asked for), augment and rename (a random symmetry).

Not in the paper: carry_loss() with its rest term, Muon, averaged weights, skipping and tries in
solve(), a start token before strings (added by data.py), an embedding for each cell of a board
(--positions absolute).
"""
import argparse
import contextlib
import dataclasses
import io
import json
import math
import platform
import shlex
import sys
import time
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
from data import UserError

# -----------------------------------------------------------------------------
# the parts of a block: norm, rotary positions, attention


class RMSNorm(nn.Module):
    """N(u) = g * u / rms(u) over the last axis; in fp32 at least, also under bf16 autocast."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, u):
        if u.dtype == torch.bfloat16:
            u = u.float()
        mean_square = u.square().mean(-1, keepdim=True)
        return self.weight * (u * (mean_square + 1e-6).rsqrt())


def rotary_table(grid, head_dim, base, like):
    """cos and sin [L, 1, head_dim / 2] of RoPE (arXiv 2104.09864), one angle per pair of channels.

    Each axis of the grid (on a board: row, column) turns k = head_dim / (2 * axes) of the pairs;
    pair j of an axis turns by p * base ** (-j / k) at place p. Device and dtype are those of the
    tensor `like`.
    """
    k = head_dim // (2 * len(grid))
    options = {"device": like.device, "dtype": like.dtype}
    frequency = base ** (-torch.arange(k, **options) / k)
    places = torch.meshgrid(*[torch.arange(n, **options) for n in grid], indexing="ij")
    angles = [place.flatten()[:, None] * frequency for place in places]
    angle = torch.cat(angles, dim=-1)[:, None]
    return angle.cos(), angle.sin()


def rotate(u, cos, sin):
    """Turn each pair (u[j], u[j + head_dim / 2]) by its angle, u [B, L, H, head_dim]."""
    a, b = u.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Attention(nn.Module):
    """Multi-head self-attention, full or windowed. q and k are normalized, then rotated (RoPE), so
    that scores depend on relative positions only. (Absolute ones enter with the input.)"""

    def __init__(self, width, heads, grid, window, rope_base):
        super().__init__()
        self.heads = heads
        self.grid = grid
        self.window = window
        self.rope_base = rope_base
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = RMSNorm(width // heads)
        self.k_norm = RMSNorm(width // heads)
        self.out = nn.Linear(width, width)

    def forward(self, u):
        B, L, D = u.shape
        H = self.heads
        # boards have one size, but strings may be longer than those in training
        grid = self.grid if len(self.grid) > 1 else (L,)
        # in the dtype of the weights: u may be bf16, which has too few digits for angles
        cos, sin = rotary_table(grid, D // H, self.rope_base, self.q_norm.weight)

        q, k, v = self.qkv(u).view(B, L, 3, H, D // H).unbind(2)        # each (B, L, H, D/H)
        q = rotate(self.q_norm(q), cos, sin).to(v.dtype)
        k = rotate(self.k_norm(k), cos, sin).to(v.dtype)

        if self.window == 0:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)   # (B, H, L, D/H)
            o = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        else:
            o = windowed_attention(q, k, v, min(self.window, L))
        return self.out(o.reshape(B, L, D))


def windowed_attention(q, k, v, window):
    """Each token sees itself and its neighbours, `window` tokens in all; q, k, v [B, L, H, D/H].

    The same as F.scaled_dot_product_attention with a band as its mask, but linear in L. At both
    ends windows shift inwards, so that every token sees `window` tokens.
    """
    L, _, head_dim = q.shape[1:]
    k = pad_ends(k, window)
    v = pad_ends(v, window)

    # token i sees the padded places i to i + window - 1: a slice for each of the neighbours
    score = [(q * k[:, j:j + L]).sum(-1) for j in range(window)]            # each (B, L, H)
    weight = (torch.stack(score) / math.sqrt(head_dim)).softmax(dim=0)      # (window, B, L, H)
    return sum(weight[j, ..., None] * v[:, j:j + L] for j in range(window))     # (B, L, H, D/H)


def pad_ends(u, window):
    """u [B, L, ...] -> [B, L + window - 1, ...], so that no window sticks out. A window of 5 has

        d e | a b c d e f ... u v w x y z | v w

    so that a sees (d e a b c) and b sees (e a b c d): both see the first five tokens. Their order
    is of no account, as RoPE has rotated each k by its true place already.
    """
    L = u.shape[1]
    before = window // 2
    left = u[:, window - before:window]
    right = u[:, L - window:L - before - 1]
    return torch.cat((left, u, right), dim=1)


class Block(nn.Module):
    """The two sub-layers F and their norms. There is no forward: recall comes in between norm and
    sub-layer, so LoopedTransformer.step puts them together. Without recall:

        norm       F reads u =          the state becomes
        pre        N(h)                 h + F(u)
        peri       N(h)                 h + N(F(u))
        outer      h                    N(h + F(u))
        gru        N(h)                 GRU(N(F(u)), h), a gate in place of the sum
    """

    def __init__(self, cfg, task):
        super().__init__()
        D = cfg.width
        self.attn = Attention(D, cfg.heads, task.grid, cfg.window, task.rope_base)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))
        # each norm, with its gain, is shared by both sub-layers
        if cfg.norm != "outer":
            self.norm_in = RMSNorm(D)
        if cfg.norm in ("peri", "outer", "gru"):
            self.norm_out = RMSNorm(D)
        if cfg.norm == "gru":
            self.gru = nn.GRUCell(D, D)
            nn.init.xavier_uniform_(self.gru.weight_ih)
            nn.init.orthogonal_(self.gru.weight_hh)
            for bias in (self.gru.bias_ih, self.gru.bias_hh):
                nn.init.zeros_(bias)
                # the update gate starts at sigmoid(1 + 1) = 0.88, so that most of h is kept
                nn.init.ones_(bias[D:2 * D])


# -----------------------------------------------------------------------------
# the looped transformer


class LoopedTransformer(nn.Module):
    """h_0 = e, then h_{t+1} = step(h_t, r) with r = W_e e, then logits = readout(h_T)."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.task = cfg.make_task()
        D = cfg.width

        self.tok_emb = nn.Embedding(self.task.vocab, D)
        # the size of e, against that of h, sets how strong recall is at first
        with torch.no_grad():
            self.tok_emb.weight *= cfg.embed_rms / self.tok_emb.weight.square().mean().sqrt()

        self.pos_emb = None
        if len(self.task.grid) > 1 and cfg.positions == "absolute":
            cells = math.prod(self.task.grid)
            # half the size of the token embedding, so that tokens dominate
            self.pos_emb = nn.Parameter(0.5 * cfg.embed_rms * torch.randn(cells, D))

        # one pair of maps, shared by all blocks and both sub-layers
        if cfg.recall != "none":
            self.W_h = nn.Linear(D, D)
            self.W_e = nn.Linear(D, D)

        self.blocks = nn.ModuleList([Block(cfg, self.task) for _ in range(cfg.blocks)])
        self.head = nn.Sequential(
            RMSNorm(D), nn.Linear(D, D), nn.GELU(), nn.Linear(D, self.task.classes)
        )

    def embed(self, x):
        """x [B, L] of any integer type -> e [B, L, D]."""
        e = self.tok_emb(x.long())
        if self.pos_emb is not None:
            e = e + self.pos_emb
        return e

    def recall_term(self, e):
        """e [B, L, D] -> r [B, L, D], what recall adds in every loop; None without recall."""
        if self.cfg.recall == "none":
            return None
        return self.W_e(e)

    def step(self, h, r):
        """One loop: h [B, L, D], r from recall_term() -> h [B, L, D].

        Both choices of the paper are made here: where does the input come in again, and where is
        the norm? Under autocast to bf16 the state stays in fp32: a sum h + f is fp32 because h is;
        external recall and the gate are no such sums, hence their .to(h.dtype).
        """
        recall = self.cfg.recall
        norm = self.cfg.norm
        for block in self.blocks:

            # external recall: the residual stream itself is mixed with the input
            if recall == "external":
                h = (self.W_h(h) + r).to(h.dtype)       # h <- W_h h + W_e e

            for sublayer in (block.attn, block.mlp):

                # what the sub-layer reads: internal recall mixes the input in here only
                u = h
                if norm != "outer":
                    u = block.norm_in(h)                # u <- N(h)
                if recall == "internal":
                    u = self.W_h(u) + r                 # u <- W_h u + W_e e
                f = sublayer(u)

                # how its output joins the state
                if norm == "pre":
                    h = h + f                           # h <- h + F(u)
                elif norm == "peri":
                    h = h + block.norm_out(f)           # h <- h + N(F(u))
                elif norm == "outer":
                    h = block.norm_out(h + f)           # h <- N(h + F(u))
                elif norm == "gru":
                    rows = block.norm_out(f).flatten(0, 1)              # a token is a row
                    new = block.gru(rows, h.flatten(0, 1))
                    h = new.view_as(h).to(h.dtype)      # h <- GRU(N(F(u)), h)
                else:
                    raise ValueError(f"norm {norm!r} has no branch in LoopedTransformer.step")
        return h

    def readout(self, h):
        """h [B, L, D] -> logits [B, L, classes]."""
        return self.head(h)

    def forward(self, x, loops, h=None, restart=None):
        """Loop on from the states h [B, L, D], or from h_0 = e where there are none.

        x [B, L], loops >= 1, restart [B] bool: puzzles that restart from e and ignore h
        -> logits [B, L, classes]; h [B, L, D] after the last loop; old [B, L, D], h before it.
        """
        e = self.embed(x)
        r = self.recall_term(e)
        if h is None:
            h = e
        elif restart is not None:
            h = torch.where(restart[:, None, None], e, h)
        for _ in range(loops):
            old = h
            h = self.step(h, r)
        return self.readout(h), h, old


# -----------------------------------------------------------------------------
# two losses


def carry_loss(model, batch, carry):
    """The default: truncated backpropagation through time, with states carried between steps.

    Each optimizer step goes on with a batch of half-finished puzzles: cfg.grad_loops loops, all
    with gradient, and then the loss. The states are detached and carried over to the next step,
    until a puzzle has had cfg.loops loops (rounded up to whole optimizer steps); then a new one
    takes its place. With cfg.grad_loops = cfg.loops, as in chess, each step finishes its puzzles:
    nothing is carried, and nothing cut off.

    Why old states will do: near a fixed point that attracts, where the spectral radius (the largest
    |eigenvalue|) of the Jacobian dh_{t+1}/dh_t is below 1, the state forgets where it came from. So
    a state that slightly older weights have made is as good a start as any. Not so without recall:
    the puzzle is then known from h_0 only, which the state must not forget. What is cut off, the
    gradient through the loops of earlier steps, is not small (theory.py --ckpt measures it), and
    why training mostly works all the same is not explained.

    The task's loss alone does not bring a state to rest: it may go round for ever among states that
    all give the right answer. So the loss has a rest term: cfg.rest times the motion of the last
    loop.

    batch: new x, y [B, L]. carry: {"x", "y" [B, L], "h" [B, L, D], "age" [B]: the loops that a
    puzzle has had, see start_carry} -> loss, new carry.
    """
    cfg = model.cfg
    new_x, new_y = batch
    # a puzzle that has had all its loops is replaced by a new one, at h_0 = e. A whole new batch is
    # drawn and mostly not used: a compiled model wants fixed shapes
    done = carry["age"] >= cfg.loops
    x = torch.where(done[:, None], new_x, carry["x"])
    y = torch.where(done[:, None], new_y, carry["y"])

    logits, h, old = model(x, cfg.grad_loops, carry["h"], restart=done)
    loss = model.task.loss(logits, y)

    # the rest term: |h_t - h_{t-1}|^2 / |h_t|^2, mean over tokens. The denominator is detached, so
    # that to make h larger does not lower the loss
    motion = (h - old).square().sum(-1) / h.detach().square().sum(-1)
    loss = loss + cfg.rest * motion.mean()

    age = carry["age"].masked_fill(done, 0) + cfg.grad_loops
    return loss, {"x": x, "y": y, "h": h.detach(), "age": age}


def start_carry(model, batch):
    """The first carry: new puzzles, all at h_0 = e."""
    x, y = batch
    # made-up ages, so that each step replaces about as many puzzles: with equal ones all would go
    # at once. The price: most of this first batch get fewer loops
    age = torch.arange(len(x), device=x.device) * model.cfg.loops // len(x)
    return {"x": x, "y": y, "h": model.embed(x).detach(), "age": age}


def progressive_loss(model, batch, rng):
    """The paper's: n ~ U{0..K-1} loops without gradient, then k ~ U{1..K-n} with; K is cfg.loops.

    The loss is that of the last output. (Bansal et al., arXiv 2202.05826.)
    """
    x, y = batch
    K = model.cfg.loops
    n = torch.randint(0, K, (), generator=rng, device=rng.device).item()
    k = torch.randint(1, K - n + 1, (), generator=rng, device=rng.device).item()
    h = None                        # for n = 0: the start h_0 = e keeps its gradient
    if n > 0:
        with torch.no_grad():
            h = model(x, n)[1]
    logits, _, _ = model(x, k, h)
    return model.task.loss(logits, y)


def compute_loss(model, batch, carry, rng):
    """-> the loss that --train names, and the carry for the next step."""
    train = model.cfg.train
    if train == "carry":
        return carry_loss(model, batch, carry)
    elif train == "progressive":
        return progressive_loss(model, batch, rng), carry
    else:
        raise ValueError(f"train {train!r} has no branch in compute_loss")


# -----------------------------------------------------------------------------
# configuration: all options live here, and the command line is generated from them


def option(default, help, choices=(), low=None, group=None, tasks=()):
    """A field of Config: help text, allowed values, least value, and the tasks it applies to.

    Without `low` a number must be positive. `group` opens a new group of the help.
    """
    metadata = dict(help=help, choices=choices, low=low, group=group, tasks=tasks)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class Config:
    """Options of a run. Raises UserError.

    None becomes the default of the task, or else the common one (DEFAULTS and COMMON, below); an
    option that has neither stays None.
    """

    # task and data
    task: str = option("prefix_sums", "what to solve", tuple(data.TASKS), group="task and data")
    files: str = option(None, "puzzles from FILE or TRAIN,TEST instead of generated ones")
    bits: int = option(32, "bits of an easy string", tasks=("prefix_sums",))
    hard_bits: int = option(512, "bits of a hard string", tasks=("prefix_sums",))
    side: int = option(9, "side of the board", (4, 6, 9), tasks=("sudoku",))
    marks: str = option("from_to", "label the two squares of a move as from and to, or alike",
                        ("from_to", "squares"), tasks=("chess",))
    n_train: int = option(None, "puzzles to train on")
    n_val: int = option(256, "easy puzzles that pick the checkpoint, and nothing else")
    n_test: int = option(256, "easy puzzles that are only reported")
    n_hard: int = option(None, "hard puzzles that are only reported")

    # model
    width: int = option(64, "D, channels of the state", group="model")
    heads: int = option(4, "attention heads")
    window: int = option(None, "how many tokens a token sees, itself included; 0: all", low=0,
                         tasks=("prefix_sums",))
    positions: str = option("absolute", "relative: RoPE only; absolute: RoPE and a start token "
                            "(strings) or an embedding of each cell (boards)",
                            ("absolute", "relative"))
    blocks: int = option(None, "different blocks in a loop, one after the other")
    recall: str = option("internal", "where the input is re-injected",
                         ("none", "external", "internal"))
    norm: str = option("outer", "where the norm stands, see Block; gru: a gate",
                       ("pre", "peri", "outer", "gru"))
    embed_rms: float = option(0.65, "rms of the token embedding before training")

    # training
    train: str = option("carry", "truncated backprop with carried states, or the paper's loss",
                        ("carry", "progressive"), group="training")
    loops: int = option(None, "loops of a puzzle in training (and in validation)")
    grad_loops: int = option(None, "carry: loops in a step, all with gradient")
    rest: float = option(0.1, "carry: weight in the loss of how far the last loop moves the state",
                         low=0)
    steps: int = option(None, "optimizer steps")
    batch: int = option(64, "puzzles in a step")
    optimizer: str = option("muon", "Muon for hidden matrices and AdamW for the rest, or AdamW",
                            ("muon", "adamw"))
    lr: float = option(None, "learning rate; warm-up and decay scale it down")
    decay: str = option("linear", "linear: to 0 at the end; step: x0.1 after 60 % of the steps",
                        ("linear", "step"))
    warmup: int = option(50, "steps of the ramp; with --decay step its time constant", low=0)
    weight_decay: float = option(0.01, "on matrices and embeddings", low=0)
    clip: float = option(1.0, "largest norm of the gradient")
    average: float = option(None, "the model that counts has the mean of the weights over about "
                            "this share of the steps; 0: the last", low=0)

    # evaluation
    eval_loops: int = option(None, "largest loop count of the table", group="evaluation")
    eval_every: int = option(100, "steps from one validation to the next")
    tol: float = option(1e-3, "converged: no token moves by more than this share of its size")
    skip: float = option(None, "share of the tokens, drawn anew for each loop, that keep their "
                         "state; neither in training nor in the table of loops", low=0)
    tries: int = option(1, "how often at most to try a board until it converges, each time but the "
                        "first in a random symmetric form", tasks=("sudoku",))
    watch: bool = option(False, "with --resume: show how one puzzle is solved")
    puzzle: str = option(None, "the puzzle to watch: bits, a board with . for blanks, a FEN")

    # system
    seed: int = option(0, "of data, weights and batches", low=0, group="system")
    device: str = option("auto", "where to compute", ("auto", "cuda", "mps", "cpu"))
    dtype: str = option("auto", "of training (auto: bf16 on cuda)", ("auto", "fp32", "bf16"))
    compile: str = option("auto", "torch.compile (auto: on cuda)", ("auto", "on", "off"))
    out: str = option(None, "folder of the run (default: out/ and the main options)")
    resume: str = option(None, "go on with a run; a finished one is evaluated again")
    preset: str = option(None, "the author's protocol; other flags win over it", ("paper",))

    def __post_init__(self):
        defaults = COMMON | DEFAULTS.get(self.key, {})
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is None:
                setattr(self, field.name, defaults.get(field.name))
            self.check(field)

        grid = self.make_task().grid

        # RoPE turns the channels of a head in pairs, and each axis of the grid (strings have one,
        # boards two) gets the same number of pairs
        unit = 2 * len(grid)
        if self.width % (self.heads * unit) != 0:
            raise UserError(f"--width {self.width}: must be a multiple of --heads times {unit}, "
                            f"that is {self.heads * unit}, because of RoPE")
        if self.window > 0 and self.window % 2 == 0:
            raise UserError(f"--window {self.window}: must be odd, or 0 for all tokens")
        for name in ("skip", "average"):
            if getattr(self, name) >= 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be below 1")
        # with --loops below --grad_loops a puzzle gets all its loops in one step
        self.grad_loops = min(self.grad_loops, self.loops)

    def check(self, field):
        """Raises UserError if the value of a field is not one that its option allows."""
        value = getattr(self, field.name)
        choices = field.metadata["choices"]
        low = field.metadata["low"]
        if value is None:
            return
        if choices and value not in choices:
            raise UserError(f"--{field.name} {value}: unknown; choose one of "
                            + ", ".join(map(str, choices)))
        if field.type in (int, float):
            # the bounds catch slips of the keyboard; 2^63 is that of torch's seeds
            if low is None and not 0 < value < 1e8:
                raise UserError(f"--{field.name} {value}: must be more than 0 and below 1e8")
            if low is not None and not low <= value < 2 ** 63:
                raise UserError(f"--{field.name} {value}: must be between {low} and 2^63")

    @property
    def key(self):
        """What DEFAULTS and the run's folder call the task: for sudoku with its side, "sudoku6"."""
        return f"sudoku{self.side}" if self.task == "sudoku" else self.task

    def make_task(self):
        """-> the data.Task; its fields take the values of the options of this task, by name."""
        task = data.TASKS[self.task]
        options = {field.name for field in dataclasses.fields(self)
                   if self.task in field.metadata["tasks"]}
        options.add("positions")        # an option of all tasks, and a field of prefix sums
        names = [field.name for field in dataclasses.fields(task) if field.name in options]
        return dataclasses.replace(task, **{name: getattr(self, name) for name in names})


# -----------------------------------------------------------------------------
# defaults of the tasks, and the author's protocol

# COMMON: 9x9 sudoku, and what DEFAULTS leaves open; a puzzle gets its 15 loops in 5 steps. average
# and skip are for states that are slow to come to rest
COMMON = dict(n_train=20000, n_hard=256, window=0, blocks=2, loops=15, grad_loops=3, steps=2000,
              lr=4e-3, average=0.1, eval_loops=512, skip=0.25)
DEFAULTS = {
    "prefix_sums": dict(n_train=8000, n_hard=64, window=5, blocks=1, loops=21, steps=400, lr=8e-3,
                        average=0.0, eval_loops=500, skip=0.0),
    "sudoku4": dict(blocks=1, loops=16, steps=800, average=0.0, eval_loops=64, skip=0.0),
    "sudoku6": dict(eval_loops=128),
    # chess is learned sooner with a gradient through all loops
    "chess": dict(n_train=48000, loops=3, steps=4000, lr=8e-3, average=0.0, eval_loops=64,
                  skip=0.0),
}

PAPER = dict(width=256, heads=8, blocks=1, train="progressive", loops=30, batch=500,
             optimizer="adamw", lr=3e-4, decay="step", warmup=160, steps=1600, average=0.0,
             eval_loops=500, skip=0.0, positions="relative")
PAPER_BOARD = PAPER | dict(warmup=800, steps=8000, n_train=40000, n_val=2000, n_hard=10000)
PAPER_PRESET = {
    "prefix_sums": PAPER,
    "sudoku": PAPER_BOARD,
    "chess": PAPER_BOARD | dict(marks="squares"),
}


# -----------------------------------------------------------------------------
# training


def get_batch(task, x_all, y_all, batch_size, rng):
    """A random batch, augmented -> x, y [batch_size, L]."""
    index = torch.randint(len(x_all), (batch_size,), generator=rng, device=rng.device)
    return task.augment(x_all[index], y_all[index], rng)


def get_lr(cfg, step):
    """The learning rate at a step, counted from 0. (More --steps on resume stretch the decay.)"""
    warm = (step + 1) / cfg.warmup if cfg.warmup > 0 else math.inf
    if cfg.decay == "linear":
        return cfg.lr * min(1.0, warm) * (1 - step / cfg.steps)
    elif cfg.decay == "step":
        # the paper's: 1 - exp(-t / warmup) where others have a ramp, x0.1 after 60 % of the steps
        drop = 0.1 if step >= 0.6 * cfg.steps else 1.0
        return cfg.lr * (1 - math.exp(-warm)) * drop
    else:
        raise ValueError(f"decay {cfg.decay!r} has no branch in get_lr")


def orthogonalize(u):
    """A matrix -> one with the same singular vectors, its singular values mostly near 1.

    Newton-Schulz: each turn maps all singular values s to a s + b s^3 + c s^5. The coefficients are
    those of Jordan et al. (2024), by which most values end between 0.7 and 1.2.
    """
    tall = u.shape[0] > u.shape[1]
    if tall:
        u = u.T
    u = u / u.norm().clamp(min=1e-7)
    for _ in range(5):
        square = u @ u.T
        u = 3.4445 * u + (-4.7750 * square + 2.0315 * square @ square) @ u
    return u.T if tall else u


class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal, for matrices (Jordan et al., 2024).

    The same as torch.optim.Muon with adjust_lr_fn="match_rms_adamw", but in fp32: that one computes
    in bf16, which on many CPUs takes as long as the rest of the training step. Each group needs a
    rate, "lr", which train() sets.
    """

    def __init__(self, groups, weight_decay, momentum=0.95):
        super().__init__(groups, {"weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                average = state["momentum_buffer"]
                average.lerp_(p.grad, 1 - group["momentum"])
                ahead = p.grad.lerp(average, group["momentum"])         # Nesterov

                # entries of an orthogonal matrix have rms 1 / sqrt(max(p.shape)), AdamW's updates
                # about 0.2: with the same rms both have rates of the same size
                scale = 0.2 * math.sqrt(max(p.shape))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(orthogonalize(ahead), alpha=-group["lr"] * scale)


def configure_optimizers(model, cfg):
    """-> the optimizers that take a step together. Biases and norms have no weight decay.

    lr_scale is the rate of a group of parameters, relative to that of the schedule.
    """
    vectors = [p for p in model.parameters() if p.dim() < 2]
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    if cfg.optimizer == "adamw":
        optimizers = []
        lr_scale = 1.0
    elif cfg.optimizer == "muon":
        # Muon is meant for maps from hidden to hidden channels, not for the two ends
        ends = (model.tok_emb.weight, model.pos_emb, model.head[-1].weight)
        hidden = [p for p in matrices if all(p is not end for end in ends)]
        matrices = [p for p in matrices if any(p is end for end in ends)]
        optimizers = [Muon([{"params": hidden, "lr_scale": 1.0}], cfg.weight_decay)]
        # half of Muon's rate was a good one for the rest, among the few that were tried
        lr_scale = 0.5
    else:
        raise ValueError(f"optimizer {cfg.optimizer!r} has no branch in configure_optimizers")

    groups = [
        {"params": matrices, "weight_decay": cfg.weight_decay, "lr_scale": lr_scale},
        {"params": vectors, "weight_decay": 0.0, "lr_scale": lr_scale},
    ]
    return optimizers + [torch.optim.AdamW(groups, fused=True)]


@torch.no_grad()
def update_average(averaged, model, weight):
    """averaged <- averaged + weight (model - averaged), for all weights.

    With 1 / (1 + a t) in step t it is a mean over the last share a of all steps, roughly, where
    later ones count more (Shamir and Zhang, arXiv 1212.1824).
    """
    for mean, p in zip(averaged.parameters(), model.parameters(), strict=True):
        mean.lerp_(p, weight)


def clone_weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def log(out, record):
    """Append a record to the run's log.jsonl."""
    with open(out / "log.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")


def train(cfg, model, sets, out, checkpoint=None):
    """Train a model on sets["train"] and save out/ckpt.pt at each validation.

    sets: {"train", "val", ...: (x, y)} on the model's device. out: a Path, a folder that exists.
    checkpoint: one to go on from; on a CPU, with the same options, the result is bit for bit that
    of a run which was never stopped. Nothing is saved on Ctrl-C: the steps since the last
    validation are repeated. Raises UserError if the loss is not finite at a validation; the last
    good checkpoint stays.
    """
    task = model.task
    x_all, y_all = sets["train"]
    device = x_all.device
    bf16 = cfg.dtype == "bf16" or (cfg.dtype == "auto" and device.type == "cuda")
    # no cache of cast weights: progressive_loss loops under no_grad first, and a weight that was
    # cast there would be used again, without its gradient, in the loops that need one
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)

    optimizers = configure_optimizers(model, cfg)
    rng = torch.Generator(device).manual_seed(cfg.seed)
    # the mean of the last weights (update_average): it is validated and kept, and never trained
    averaged = LoopedTransformer(cfg).to(device)
    # what a checkpoint holds of a run, besides model and optimizers; seconds of training alone
    saved = {
        "step": 0, "seconds": 0.0, "carry": None, "averaged": clone_weights(model),
        "best": clone_weights(model), "best_val": -1.0,
    }
    if checkpoint is not None:
        saved = {name: checkpoint[name] for name in saved}
        restore(checkpoint, model, optimizers, rng)
    averaged.load_state_dict(saved["averaged"])
    if cfg.train != "progressive":      # all other losses carry states from step to step
        if saved["carry"] is None:
            batch = get_batch(task, x_all, y_all, cfg.batch, rng)
            saved["carry"] = start_carry(model, batch)
        saved["carry"] = {name: tensor.to(device) for name, tensor in saved["carry"].items()}

    first_step = saved["step"]
    start = time.time()
    interval_start = start
    timed_steps = 0
    for step in range(first_step, cfg.steps):

        # set the learning rate of this step
        lr = get_lr(cfg, step)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]

        # forward, backward, clip, step
        batch = get_batch(task, x_all, y_all, cfg.batch, rng)
        with autocast:
            loss, saved["carry"] = compute_loss(model, batch, saved["carry"], rng)
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        update_average(averaged, model, 1 / (1 + cfg.average * step))

        # validate, save and log now and then, and after the last step
        steps_done = step + 1
        saved["step"] = steps_done
        timed_steps += 1
        is_eval_step = steps_done % cfg.eval_every == 0 or steps_done == cfg.steps
        if not is_eval_step:
            continue
        loss = loss.item()          # waits for a GPU, so that the time is right
        elapsed = time.time() - interval_start
        ms = 1e3 * elapsed / timed_steps
        saved["seconds"] += elapsed
        val = evaluate(averaged, *sets["val"], [cfg.loops])[cfg.loops]
        if not math.isfinite(loss) or not math.isfinite(val["residual"]):
            again = ""
            if (out / "ckpt.pt").exists():
                again = f"; --resume {shlex.quote(str(out))} has the last good checkpoint"
            raise UserError(f"step {steps_done}: loss or residual is not finite (loss {loss:.3g}): "
                            f"lower --lr{again}", exit_code=1)

        # keep the best on validation, of equal ones the latest; the test sets are never used
        saved["averaged"] = clone_weights(averaged)
        if val["exact"] >= saved["best_val"]:
            saved["best_val"] = val["exact"]
            saved["best"] = saved["averaged"]
        save_checkpoint(out, saved | {        # all that is needed to resume
            "config": dataclasses.asdict(cfg), "model": model.state_dict(),
            "optimizers": [o.state_dict() for o in optimizers], "rng": rng.get_state(),
        })
        log(out, {
            "step": steps_done, "loss": loss, "exact": val["exact"], "residual": val["residual"],
            "grad_norm": grad_norm.item(), "lr": lr, "ms": ms,
        })
        left = (time.time() - start) / (steps_done - first_step) * (cfg.steps - steps_done)
        print(f"step {steps_done:6d} | loss {loss:.4f} | val solved {val['exact']:.3f} | "
              f"lr {lr:.1e} | {ms:4.0f} ms | {data.clock(left)} left", flush=True)
        interval_start = time.time()
        timed_steps = 0


# -----------------------------------------------------------------------------
# evaluation: accuracy against loops, and halting


def relative_change(new, old):
    """States [B, L, D] -> [B]: the largest |new - old| / |old| of a puzzle's tokens."""
    change = (new - old).norm(dim=-1) / old.norm(dim=-1).clamp(min=1e-30)
    return change.amax(dim=-1)


def chunk_size(x):
    """How many puzzles of x [N, L] to take at once: what the caches of a CPU hold, or a GPU."""
    tokens = 4096 if x.device.type == "cpu" else 2 ** 17
    return max(1, tokens // x.shape[1])


# A residual below this is rounding only (float32 has steps of 1.2e-7), so that more loops are
# wasted. It is far below cfg.tol (1e-3), below which a puzzle counts as converged.
ROUNDING = 2e-6


def run_loop(model, x, max_loops, freeze_below, skip=0.0, generator=None):
    """Loop puzzles x [N, L] from h_0 = e -> yields t, h_t [N, L, D], residual [N] for t = 1, 2, ...

    residual: the largest |step(h) - h| / |h| of a puzzle's tokens, where h is h_{t-1}. Once it is
    below freeze_below a puzzle is frozen: state and residual stay as they are, at no more cost.
    skip: the share of tokens that keep their state in a loop, drawn anew for each loop by the
    generator. Fixed points stay what they are. In the mean it damps the loop, h <- (1 - skip)
    step(h) + skip h; and it is a noise that dies out as a state comes to rest, so that it ends
    circles, in which a state would go round for ever. (Growing Neural Cellular Automata are updated
    like this, too: Mordvintsev et al., 2020.)
    h and residual are written in place: clone what you keep.
    """
    e = model.embed(x)
    r = model.recall_term(e)
    h = e.clone()
    residual = e.new_full((len(x),), math.inf)
    for t in range(1, max_loops + 1):
        moving = (~(residual < freeze_below)).nonzero()[:, 0]       # not >=: a NaN counts as moving
        if len(moving) > 0:
            old = h[moving]
            new = model.step(old, None if r is None else r[moving])
            residual[moving] = relative_change(new, old)
            if skip > 0:
                draw = torch.rand(new[..., :1].shape, generator=generator, device=x.device)
                new = torch.where(draw < skip, old, new)
            h[moving] = new
        yield t, h, residual


def loop_until_converged(model, x, tol, max_loops, skip, generator, progress):
    """One try of solve(), below: each puzzle loops until none of its tokens moves more than tol.

    -> logits [N, L, classes], loops used [N], converged [N] (False: max_loops was not enough).
    """
    parts = []
    for xb in x.split(chunk_size(x)):
        used = torch.zeros(len(xb), dtype=torch.long, device=x.device)
        converged = torch.zeros(len(xb), dtype=torch.bool, device=x.device)
        for t, h, residual in run_loop(model, xb, max_loops, tol, skip, generator):
            used[~converged] = t
            converged = residual < tol
            if converged.all() or t == max_loops:
                parts.append((model.readout(h), used, converged))
                break
        if progress is not None:
            progress(sum(len(part[1]) for part in parts), len(x))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


@torch.inference_mode()
def solve(model, x, tol=1e-3, max_loops=2000, skip=0.0, tries=1, generator=None, progress=None):
    """Adaptive halting: each puzzle loops until its state has converged (loop_until_converged).

    x [N, L] of any integer type. With tries > 1 a puzzle that does not converge is tried again in
    a random symmetric form, `tries` in all: a board with its digits renamed and its rows and
    columns in another order. The first try that converges counts; if none does, the very first.
    (Compare Augmented HRM, arXiv 2601.10679, and EqR, arXiv 2605.21488.)
    skip: see run_loop. generator: of the tokens that skip a loop, and of the symmetric forms.
    progress(done, puzzles) is called now and then in each try.
    -> logits [N, L, classes], loops used in all tries [N], converged [N].
    """
    how = (tol, max_loops, skip, generator, progress)
    logits, used, converged = loop_until_converged(model, x, *how)
    for _ in range(1, tries):
        left = (~converged).nonzero()[:, 0]
        if len(left) == 0:
            break
        renamed, undo = model.task.rename(x[left], generator)
        new_logits, loops, now = loop_until_converged(model, renamed, *how)
        logits[left[now]] = undo(new_logits)[now]
        used[left] += loops
        converged[left[now]] = True
    return logits, used, converged


def evaluate(model, x, y, counts):
    """Loop puzzles x, y [N, L] int64 and measure after each loop count t of the list `counts`.

    -> {t: {"exact":      share of puzzles with every token right (those that are not scored, such
                          as the clues of a sudoku, have known labels too),
            "token":      share of scored tokens that are right, mean over puzzles,
            "residual":   largest |h_{t+1} - h_t| / |h_t| of a token, mean over puzzles,
            "norm_ratio": |h_t| / |h_1|, mean over puzzles}}
    """
    means, _, _, _ = evaluate_and_halt(model, x, y, counts)
    return means


@torch.inference_mode()
def evaluate_and_halt(model, x, y, counts, progress=None, tol=1e-3):
    """-> what evaluate() returns, labels [N, L], loops used [N], converged [N].

    The last three say what comes out where each puzzle stops by itself, as in solve(): once its
    residual is below tol, or else at the largest loop count. All of it in one pass over the loops.
    progress(done, N) is called now and then.
    """
    if min(counts) < 1:
        raise UserError(f"loop counts start at 1, not at {min(counts)}")
    size = chunk_size(x)
    tables = []
    halted = []
    done = 0
    for xb, yb in zip(x.split(size), y.split(size), strict=True):
        table, *stopped = evaluate_chunk(model, xb, yb, counts, tol)
        tables.append(table)
        halted.append(stopped)
        done += len(xb)
        if progress is not None:
            progress(done, len(x))

    means = {t: {} for t in counts}
    for t in counts:
        for name in tables[0][t]:
            means[t][name] = torch.cat([table[t][name] for table in tables]).mean().item()
    labels, used, converged = (torch.cat(column) for column in zip(*halted, strict=True))
    return means, labels, used, converged


def evaluate_chunk(model, x, y, counts, tol):
    """evaluate_and_halt for puzzles that are looped together.

    -> {t: {name: [N]}}, labels [N, L], loops used [N], converged [N].
    """
    scored = model.task.scored(x)
    last = max(counts)
    table = {t: {} for t in counts}
    used = torch.zeros(len(x), dtype=torch.long, device=x.device)
    converged = torch.zeros(len(x), dtype=torch.bool, device=x.device)

    # one loop more than asked for, for the residual of the last count. And min, because a puzzle
    # that is frozen above tol could never be seen to converge
    for t, h, residual in run_loop(model, x, last + 1, freeze_below=min(ROUNDING, tol)):
        if t == 1:
            first_norm = h.norm(dim=(1, 2))
            stopped_h = torch.empty_like(h)
        if t in table:
            right = model.task.predict(model.readout(h)) == y
            table[t]["exact"] = right.all(-1).float()
            table[t]["token"] = (right & scored).sum(-1) / scored.sum(-1).clamp(min=1)
            table[t]["norm_ratio"] = h.norm(dim=(1, 2)) / first_norm
        # the table looks ahead: the residual of a count is how far the next loop moves the state
        if t - 1 in table:
            table[t - 1]["residual"] = residual.clone()

        # what solve() returns: the state of the loop in which a puzzle stops by itself
        if t <= last:
            stops = ~converged & ((residual < tol) | (t == last))
            stopped_h[stops] = h[stops]
            used[stops] = t
            converged |= residual < tol
    return table, model.task.predict(model.readout(stopped_h)), used, converged


def wilson(rate, n):
    """The 95 % interval of a rate that was seen in n trials (Wilson, 1927)."""
    z = 1.96
    middle = rate + z * z / (2 * n)
    half = z * math.sqrt(rate * (1 - rate) / n + (z / (2 * n)) ** 2)
    low = max(0.0, (middle - half) / (1 + z * z / n))
    high = min(1.0, (middle + half) / (1 + z * z / n))
    return low, high


def report(cfg, model, sets):
    """Evaluate both test sets and print the table -> what eval.json says of them."""
    levels = data.describe_levels(model.task, cfg.files)
    # 1, 2, 4, ... and eval_loops
    counts = sorted({2 ** i for i in range(cfg.eval_loops.bit_length())} | {cfg.eval_loops})
    result = {"config": dataclasses.asdict(cfg), "halting": {}}
    began = time.time()
    for level in levels:
        x, y = sets[level]
        progress = data.progress(f"evaluating {level}")
        result[level], labels, used, converged = evaluate_and_halt(
            model, x, y, counts, progress, tol=cfg.tol)
        # the table is of plain loops; with --skip or --tries halting is that of another pass
        if cfg.skip > 0 or cfg.tries > 1:
            generator = torch.Generator(x.device).manual_seed(cfg.seed)
            progress = data.progress(f"looping {level} until at rest")
            logits, used, converged = solve(model, x, cfg.tol, cfg.eval_loops, cfg.skip, cfg.tries,
                                            generator, progress)
            labels = model.task.predict(logits)
        right = (labels == y).all(-1)
        n = len(x)
        result["halting"][level] = {
            "n": n,
            "tries": cfg.tries,
            "skip": cfg.skip,
            "exact": right.sum().item() / n,
            "loops": used.sum().item() / n,
            "converged": converged.sum().item() / n,
            "converged_and_right": (converged & right).sum().item() / n,
        }
    result["eval_minutes"] = (time.time() - began) / 60
    print_table(cfg, levels, counts, result)
    return result


def print_table(cfg, levels, counts, result):
    """What is solved after each loop count, and how far one more loop still moves the state."""
    print("\n loops |  easy solved  residual |  hard solved  residual")
    for t in counts:
        row = f"{t:6}"
        for level in levels:
            row += " | {exact:12.3f}  {residual:8.1e}".format(**result[level][t])
        print(row)
    for level, meaning in levels.items():
        halt = result["halting"][level]
        exact = {t: result[level][t]["exact"] for t in counts}
        solved = exact[cfg.eval_loops]
        low, high = wilson(solved, halt["n"])
        best = max(counts, key=exact.get)
        print(f"\n{level}: {meaning}, {halt['n']} puzzles\n"
              f"  {solved:.3f} solved at {cfg.eval_loops} loops (95 % interval {low:.3f} to "
              f"{high:.3f}; best at {best} loops)\n"
              f"  {halt['exact']:.3f} solved when each stops by itself: "
              f"{round(halt['converged'] * halt['n'])} converge, {halt['loops']:.0f} loops each")
        how = []
        if cfg.skip > 0:
            how.append(f"skip {cfg.skip:g}")
        if cfg.tries > 1:
            how.append(f"up to {cfg.tries} tries")
        if how:
            print(f"  ({', '.join(how)})")


@torch.inference_mode()
def watch(cfg, model):
    """Show how the model solves one puzzle: the user's, or the first of the run's hard test set.

    Prints the prediction at loops 1, 2, 4, ... until the state converges.
    """
    task = model.task
    if cfg.puzzle is not None:
        text = cfg.puzzle
        x, y = task.parse(text)             # y is None if no single solution is known
    else:
        hard = data.splits(task, cfg.seed, 0, 0, 0, n_hard=1, path=cfg.files)["hard"]
        x, y = hard.x[0], hard.y[0]
        text = task.text(x)

    shown = None        # the labels that were printed last; the loop below sets `labels`, the new

    def mark(i, answer):
        """The answer of token i with a sign behind it."""
        if shown is None or labels[i] != shown[i]:
            return answer + "~"
        if y is None:
            return answer + "="
        return answer + ("+" if labels[i] == y[i] else "x")

    print("+ right   x wrong   ~ changed since it was last shown   = unchanged, truth unknown")
    if cfg.skip > 0:
        print(f"in each loop {cfg.skip:.0%} of the tokens, drawn at random, keep their state")

    max_loops = 2 * cfg.eval_loops          # a puzzle of yours may be harder than ours
    batch = torch.as_tensor(x)[None]
    generator = torch.Generator().manual_seed(cfg.seed)
    loop = run_loop(model, batch, max_loops, cfg.tol, cfg.skip, generator)
    for t, h, residual in loop:
        converged = residual.item() < cfg.tol
        is_power_of_two = t & (t - 1) == 0
        if not (converged or is_power_of_two or t == max_loops):
            continue

        labels = task.predict(model.readout(h))[0].numpy()
        print(f"\nloop {t}, moved by {residual.item():.1g}")
        print(task.show(x, labels, mark))
        shown = labels
        if converged:
            break
    ending = f"converged after {t} loops" if converged else f"did not converge in {t} loops"
    verdict = task.verdict(text, labels)
    if y is not None and (labels == y).all() and verdict != "solved":
        verdict += ", solved"               # in chess a verdict is about the move alone
    print(f"\n{ending}; {verdict}")


# -----------------------------------------------------------------------------
# checkpoints


def save_checkpoint(out, checkpoint):
    """Write out/ckpt.pt atomically: a crash leaves the old file or the new one."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    data.write_atomic(out / "ckpt.pt", buffer.getvalue())


def restore(checkpoint, model, optimizers, rng):
    """Bring model, optimizers and random numbers to where a checkpoint left them, in place."""
    model.load_state_dict(checkpoint["model"])
    for optimizer, saved in zip(optimizers, checkpoint["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    # another shape means that it was saved on another kind of device, whose random numbers cannot
    # be continued here: then they begin again at the seed
    if checkpoint["rng"].shape == rng.get_state().shape:
        rng.set_state(checkpoint["rng"].cpu())


def checkpoint_path(run):
    """A run's folder or a .pt file -> the .pt file."""
    path = Path(run)
    return path / "ckpt.pt" if path.is_dir() else path


def read_checkpoint(run, device="cpu"):
    """A run's folder or a .pt file -> checkpoint, model with the best weights; or UserError."""
    path = checkpoint_path(run)
    if not path.is_file():
        raise UserError(f"{path}: there is no checkpoint; give a run's folder or a .pt file")
    try:
        # torch does not compare the checksums: a flipped bit would give wrong answers silently
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise ValueError("a checksum is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        cfg = Config(**checkpoint["config"])
        # a model without memory of its own: the shapes are compared before anything is allocated
        with torch.device("meta"):
            model = LoopedTransformer(cfg)
        model.load_state_dict(checkpoint["best"], assign=True)
        if not all(weight.isfinite().all() for weight in model.parameters()):
            raise ValueError("weights are not finite")
    except Exception as error:      # torch raises a dozen kinds for truncated and foreign files
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a checkpoint that this looped.py can read "
                        f"({reason:.200})") from None
    return checkpoint, model.to(device).eval().requires_grad_(False)


def load(path, device="cpu"):
    """A run's folder or a checkpoint -> (model, cfg), with the weights that validated best.

    The weights take no gradient: model.requires_grad_(True) to train them on.
    """
    _, model = read_checkpoint(path, device)
    return model, model.cfg


# -----------------------------------------------------------------------------
# command line

# options that may change when a run is resumed
MAY_CHANGE = ("steps", "hard_bits", "n_test", "n_hard", "eval_loops", "tol", "skip", "tries",
              "device")
# and these, too, if its training goes on
OF_TRAINING = ("lr", "clip", "eval_every", "dtype", "compile")
# options that belong to one call, not to the run
OF_ONE_CALL = ("watch", "puzzle", "out", "resume", "preset")


def parse(argv):
    """Command line -> {option: value} of the options that were given."""
    parser = data.Parser("looped.py", allow_abbrev=False, argument_default=argparse.SUPPRESS,
                         usage="python looped.py [options]")
    group = parser
    for field in dataclasses.fields(Config):
        if field.metadata["group"] is not None:
            group = parser.add_argument_group(field.metadata["group"])
        kind = {"type": field.type, "metavar": "VALUE"}
        if field.type is bool:
            kind = {"action": "store_true"}
        group.add_argument(f"--{field.name}", help=help_text(field), **kind)
    return vars(parser.parse_args(argv))


def help_text(field):
    """What an option is, what it may be, and what it is by default."""
    text = field.metadata["help"]
    if field.metadata["choices"]:
        text += " [" + "|".join(map(str, field.metadata["choices"])) + "]"
    default = field.default
    if field.name in COMMON:
        own = [f"{task}: {values[field.name]}" for task, values in DEFAULTS.items()
               if field.name in values]
        default = "; ".join([str(COMMON[field.name]), *own])
    if default is not None and default is not False:
        text += f" (default: {default})"
    return text.replace("%", "%%")          # argparse formats it


def configure(given):
    """The options that were given -> cfg, checkpoint, model; without --resume the last are None.

    Raises UserError for options that contradict each other, the task or the checkpoint.
    """
    for name, value in given.items():
        if value == "":
            raise UserError(f"--{name}: is empty; give a value or leave the option out")
    base = {}
    checkpoint = None
    model = None
    if "resume" in given:
        if "preset" in given:
            raise UserError("--preset is for new runs: a resumed one keeps its options")
        checkpoint, model = read_checkpoint(given["resume"])
        base = {name: value for name, value in checkpoint["config"].items()
                if name not in OF_ONE_CALL}
    elif given.get("preset") == "paper":
        base = PAPER_PRESET.get(given.get("task", Config.task), PAPER)
    cfg = Config(**(base | given))
    check_options(given, cfg)
    if checkpoint is not None:
        check_resume(given, cfg, checkpoint, model.cfg)
        model.task = cfg.make_task()        # --hard_bits may differ from training
    return cfg, checkpoint, model


def check_options(given, cfg):
    """Raises UserError if an option that was given has no meaning beside the others."""
    for field in dataclasses.fields(Config):
        name = field.name
        tasks = field.metadata["tasks"]
        if name in given and tasks and cfg.task not in tasks:
            raise UserError(f"--{name}: is an option of {', '.join(tasks)}, not of {cfg.task}")
    for name in ("rest", "grad_loops"):
        if name in given and cfg.train == "progressive":
            raise UserError(f"--{name} is not for --train {cfg.train}: leave the option out")
    if cfg.watch and cfg.resume is None:
        raise UserError("--watch needs a trained model: --resume RUN")
    if cfg.puzzle is not None and not cfg.watch:
        raise UserError("--puzzle is for --watch: add that")
    if cfg.watch:
        for name in ("device", "out", "tries", "n_test", "n_hard"):
            if name in given:
                raise UserError(f"--{name} has no meaning for --watch: leave it out")


def check_resume(given, cfg, checkpoint, old):
    """Raises UserError if an option that was given contradicts `old`, Config of the resumed run."""
    step = checkpoint["step"]
    may_change = MAY_CHANGE + OF_ONE_CALL
    if cfg.watch or cfg.steps == step:
        may_change += ("files",)        # a finished run may be tested on other puzzles
    else:
        may_change += OF_TRAINING
    for name, value in given.items():
        made_with = getattr(old, name)
        if name not in may_change and getattr(cfg, name) != made_with:
            raise UserError(f"--{name} {value}: the run was made with {made_with}; leave the "
                            "option out")
    if cfg.steps < step:
        raise UserError(f"--steps {cfg.steps}: the run has done {step} already")
    if cfg.steps > step and "optimizers" not in checkpoint:
        raise UserError(f"{cfg.resume}: holds weights only, training cannot go on from them")


def pick_device(cfg):
    """-> "cuda", "mps" or "cpu". Raises UserError if the machine lacks what is asked for."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                 "cpu": True}
    device = cfg.device
    if device == "auto":
        device = next(name for name in available if available[name])
    if not available[device]:
        raise UserError(f"--device {device}: there is none here (or torch is a CPU build); "
                        "use --device cpu")
    return device


def get_splits(cfg, device, train=True):
    """-> {"train", "val", "easy", "hard": (x, y)}, as tensors on the device.

    Without `train` the first two are empty: the tests are the same without them.
    """
    n_train = cfg.n_train if train else 0
    n_val = cfg.n_val if train else 0
    task = cfg.make_task()
    splits = data.splits(task, cfg.seed, n_train, n_val, cfg.n_test, cfg.n_hard, cfg.files)
    for name, puzzles in splits.items():
        tokens = puzzles.x.shape[1]
        if len(task.grid) > 1 and tokens != math.prod(task.grid):
            raise UserError(f"{task.name}: {tokens} tokens in {name}; only strings may be longer "
                            f"than in training, a board has the {math.prod(task.grid)} of its grid")
    return {
        name: (torch.as_tensor(puzzles.x, dtype=torch.long, device=device),
               torch.as_tensor(puzzles.y, dtype=torch.long, device=device))
        for name, puzzles in splits.items()
    }


def run_folder(run):
    """A run's folder or a .pt file -> the folder that its results go to."""
    path = checkpoint_path(run)
    if path.name == "ckpt.pt":
        return path.parent
    return Path("out", path.stem)       # a file of weights, such as those in assets/


@contextlib.contextmanager
def claimed_folder(cfg):
    """The folder to write to. Its log.jsonl claims it; UserError if another run has it.

    A run that fails before its first checkpoint gives it up: the same command then works again.
    """
    out = Path("out", f"{cfg.key}-{cfg.recall}-{cfg.norm}-seed{cfg.seed}")
    if cfg.out is not None:
        out = Path(cfg.out)
    elif cfg.resume is not None:
        out = run_folder(cfg.resume)
    out.mkdir(parents=True, exist_ok=True)
    quoted = shlex.quote(str(out))

    own = (out / "ckpt.pt").resolve()
    resumes = cfg.resume is not None and checkpoint_path(cfg.resume).resolve() == own
    if not resumes:
        try:
            open(out / "log.jsonl", "x").close()    # of two new runs at the same time one succeeds
        except FileExistsError:
            way = "choose another --out (or delete it, if no run is using it)"
            if (out / "ckpt.pt").exists():
                way = f"--resume {quoted} goes on with its run, --out DIR starts another"
            raise UserError(f"{out} is taken: {way}") from None

    try:
        yield out
    except BaseException as error:
        if not (out / "ckpt.pt").exists():
            (out / "log.jsonl").unlink(missing_ok=True)
        elif isinstance(error, KeyboardInterrupt):
            raise UserError("stopped; resume from the last validation with: python looped.py "
                            f"--resume {quoted}", exit_code=130) from None
        raise


def describe(cfg, model, sets, out, device):
    """Print what is about to happen, and begin the log with it."""
    task = model.task
    levels = data.describe_levels(task, cfg.files)
    x, y = sets["train"]
    parameters = sum(p.numel() for p in model.parameters())
    print(f"task      {cfg.task}\neasy      {levels['easy']}\nhard      {levels['hard']}")
    print(f"model     {cfg.recall} recall, {cfg.norm} norm, {parameters:,} parameters")
    print(f"training  {cfg.steps} steps of {cfg.batch} from {len(x)} easy puzzles, "
          f"up to {cfg.loops} loops each")
    print(f"device    {device}, torch {torch.__version__}, seed {cfg.seed}")
    print(f"run       {out}\n")
    print(task.show(x[0].cpu().numpy(), y[0].cpu().numpy()) + "\n", flush=True)

    chip = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    log(out, {"config": dataclasses.asdict(cfg), "parameters": parameters, "chip": chip,
              "torch": torch.__version__})


def run_training(cfg, checkpoint):
    """Train a new model, or go on with one, and evaluate it at the end."""
    device = pick_device(cfg)
    with claimed_folder(cfg) as out:
        sets = get_splits(cfg, device)
        torch.manual_seed(cfg.seed)
        model = LoopedTransformer(cfg).to(device)
        if cfg.compile == "on" or (cfg.compile == "auto" and device == "cuda"):
            # it recommends TF32, whose three digits would hide whether a state is at rest
            warnings.filterwarnings("ignore", message="TensorFloat32")
            # bound to this model: a copy of it would loop with this one's weights
            model.step = torch.compile(model.step, dynamic=False)

        describe(cfg, model, sets, out, device)
        train(cfg, model, sets, out, checkpoint)
        checkpoint, model = read_checkpoint(out, device)
        save_evaluation(cfg, checkpoint, model, sets, out)

    quoted = shlex.quote(str(out))
    print("\nwatch it solve a hard puzzle, or yours with --puzzle:\n"
          f"  python looped.py --watch --resume {quoted}\n"
          f"draw the curve:\n  python assets/results.py curve {quoted}")


def run_evaluation(cfg, checkpoint, model):
    """Evaluate a finished run again; its own eval.json is kept, --out DIR saves the new one."""
    device = pick_device(cfg)
    sets = get_splits(cfg, device, train=False)
    if cfg.out is None and (run_folder(cfg.resume) / "eval.json").exists():
        report(cfg, model.to(device), sets)
        print("the run's eval.json stays as it was; --out DIR saves this table")
        return
    with claimed_folder(cfg) as out:
        save_evaluation(cfg, checkpoint, model.to(device), sets, out)


def save_evaluation(cfg, checkpoint, model, sets, out):
    """Print the final table and write out/eval.json."""
    result = report(cfg, model, sets)
    result["parameters"] = sum(p.numel() for p in model.parameters())
    result["steps"] = checkpoint["step"]
    result["minutes"] = checkpoint["seconds"] / 60
    data.write_atomic(out / "eval.json", json.dumps(result, indent=1).encode())
    print(f"trained {result['minutes']:.1f} min, evaluated {result['eval_minutes']:.1f} min; "
          f"saved in\n{out}")


def execute(argv):
    """Do what a command line asks for -> exit code 0. Raises UserError."""
    given = parse(argv)
    try:
        cfg, checkpoint, model = configure(given)
        if cfg.watch:
            watch(cfg, model)
        elif checkpoint is not None and checkpoint["step"] == cfg.steps:
            run_evaluation(cfg, checkpoint, model)
        else:
            run_training(cfg, checkpoint)
    except (MemoryError, RuntimeError) as error:
        # torch reports out of memory as a RuntimeError; other ones keep their traceback
        if not isinstance(error, MemoryError) and "allocate" not in str(error):
            raise
        raise UserError("out of memory: lower --batch, --width or --n_hard", exit_code=1) from None
    return 0


def main(argv=None):
    """The command line -> exit code: 0, 1 for failed work, 2 for a bad request, 130 if stopped."""
    return data.run("looped.py", lambda: execute(argv))


if __name__ == "__main__":
    sys.exit(main())
