"""Tests: offline and small, against oracles that share no code with what they test.

A check that might pass by accident carries a control, where it must come out the other way.
"""
import bz2, dataclasses, gzip, importlib.util, itertools, json, os, random, re, shlex  # noqa: E401
import signal, subprocess, sys  # noqa: E401
from dataclasses import asdict, replace
from pathlib import Path

import chess
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import looped
import theory

torch.set_num_threads(1)
TINY = dict(bits=12, hard_bits=24, width=16, heads=2, n_train=64, n_val=8, n_test=8, n_hard=8,
            steps=6, batch=8, loops=4, grad_loops=2, eval_loops=4, eval_every=2, warmup=2,
            device="cpu")
NORMS, RECALLS = ("pre", "peri", "outer", "sandwich", "gru"), ("none", "external", "internal")

def tiny(**options):
    return looped.Config(**TINY | options)

def flags(**options):
    return [s for k, v in (TINY | options).items() for s in (f"--{k}", str(v))]

def model_of(**options):
    """In float64, with random biases and norm weights, so that none of them goes unnoticed."""
    model = looped.LoopedTransformer(tiny(**options)).double()
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p) * (p.dim() != 2)
    return model

def sets_of(cfg):
    counts = cfg.n_train, cfg.n_val, cfg.n_test, cfg.n_hard
    return {k: (torch.tensor(p.x).long(), torch.tensor(p.y).long())
            for k, p in data.splits(cfg.make_task(), cfg.seed, *counts).items()}

def same(a, b):
    """Equal bit for bit, through dicts, lists and tensors."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

def unroll(model, h, e, loops):
    for _ in range(loops):
        h = model.step(h, model.recall(e))
    return h

def gradient(model, loss):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

# ---- the model -----------------------------------------------------------------------------------
def oracle(attn, u, grid, mask):
    """torch's own attention under a boolean mask; RoPE as a turn in the complex plane."""
    place = torch.cartesian_prod(*(torch.arange(n).double() for n in grid)).view(u.shape[1], -1)
    k = u.shape[2] // attn.heads // 2 // len(grid)
    angle = (place[:, :, None] * attn.rope_base ** (-torch.arange(k).double() / k)).flatten(1)
    qkv = attn.qkv(u).unflatten(2, (3, attn.heads, -1))
    z = torch.complex(*attn.qk_norm(qkv[:, :, :2]).permute(2, 0, 3, 1, 4).chunk(2, -1))
    z, v = z * torch.exp(1j * angle), qkv[:, :, 2].transpose(1, 2)
    o = F.scaled_dot_product_attention(*torch.cat((z.real, z.imag), -1), v, mask)
    return attn.out(o.transpose(1, 2).flatten(2))

def windows(L, w, inwards=True):
    """[L, L]: of all windows of w tokens a query sees the one whose middle is nearest to it."""
    i, s = torch.arange(L)[:, None], torch.arange(L - w + 1) if inwards else torch.arange(-w, L)
    start = s[(s + w // 2 - i).abs().argmin(1, keepdim=True)]
    return (i.T >= start) & (i.T < start + w)

@pytest.mark.parametrize("grid", [*((n,) for n in (5, 31, 33, 48, 49, 64, 65, 100, 513)),
                                  (6, 6), (5, 13), (2, 3)], ids=str)
def test_attention_is_torchs_own_with_the_window_as_a_mask(grid):
    L = torch.tensor(grid).prod().item()
    u = torch.randn(2, L, 16).double()
    for w in (w for w in (0, 1, 3, 5, 7) if w <= L):
        attn = looped.Attention(16, 2, grid, w, 10.0).double()
        attn.qk_norm.weight.data = torch.rand(2, 1, 8).double() + 0.5
        right, alone = windows(L, w or L), w == 1           # then only the token itself is seen
        cases = ((grid, right), (grid, windows(L, max(1, w - 2))), ((L, 1), right),
                 (grid, windows(L, w or 3, inwards=False)))     # one is right, three are controls
        close = [torch.allclose(attn(u), oracle(attn, u, *case), atol=1e-12) for case in cases]
        assert close == [True, alone, alone, alone], w

def test_positions_count_but_only_relative_ones():
    model, h = model_of(bits=59), torch.randn(16).double().repeat(1, 60, 1)
    h[:, 20:24] = torch.randn(4, 16).double()
    def run(h):                                             # 3 loops reach 6 tokens
        return model(torch.zeros(1, 60).long(), 3, h)[1][:, 12:48]
    assert torch.allclose(run(h).roll(9, 1)[:, 9:], run(h.roll(9, 1))[:, 9:], atol=1e-12)
    places = torch.randn(1, 60, 16).double()                # control: absolute ones
    assert not torch.allclose(run(h + places).roll(9, 1)[:, 9:], run(h.roll(9, 1) + places)[:, 9:])
    swapped = h[:, [*range(21), 22, 21, *range(23, 60)]]    # control: a window is no bag of tokens
    assert not torch.allclose(*(model.blocks[0].attn(t)[0, 23] for t in (h, swapped)), atol=1e-6)

def test_windowed_attention_costs_O_of_L():
    def largest(L, window, sizes):
        attn = looped.Attention(4, 1, (L,), window, 1e4)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()), print), \
                torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            attn(torch.randn(1, L, 4))
        return max(sizes)
    assert largest(4096, 5, []) <= 9 * largest(512, 5, [])
    assert largest(2048, 0, []) >= 60 * largest(256, 0, [])         # control: all pairs

def by_the_book(model, h, e, norm, recall):
    """One loop as the equations say it."""
    def N(name, u):
        g = getattr(block, name).weight if hasattr(block, name) else 1
        return g * u / (u.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    def inject(u):
        return u + e if model.cfg.inject == "add" else model.W_h(u) + model.W_e(e)
    def gru(x, h):
        a, b = F.linear(x, c.weight_ih, c.bias_ih), F.linear(h, c.weight_hh, c.bias_hh)
        (a_r, a_z, a_n), (b_r, b_z, b_n) = a.chunk(3, -1), b.chunk(3, -1)
        z = (a_z + b_z).sigmoid()
        return (1 - z) * (a_n + (a_r + b_r).sigmoid() * b_n).tanh() + z * h
    for block in model.blocks:
        c, h = getattr(block, "gru", None), inject(h) if recall == "external" else h
        for layer in (block.attn, block.mlp):
            u = h if norm == "outer" else N("norm_in", h)
            f = layer(inject(u) if recall == "internal" else u)
            h = (h + f if norm == "pre" else h + N("norm_out", f) if norm == "peri" else
                 gru(N("norm_out", f), h) if norm == "gru" else N("norm_out", h + f))
    return h

@pytest.mark.parametrize("norm, recall, inject",
                         [*itertools.product(NORMS, RECALLS, ("linear", "add"))])
def test_step_is_the_papers_equation_with_a_gradient_for_every_parameter(norm, recall, inject):
    model = model_of(norm=norm, recall=recall, inject=inject, blocks=2)
    h, e = torch.randn(2, 3, 9, 16).double()
    for other in itertools.product(NORMS, RECALLS):         # all but one are controls
        if (recall != "none" or other[1] == "none") and (norm == "gru" or other[0] != "gru"):
            close = torch.allclose(model.step(h, model.recall(e)), by_the_book(model, h, e, *other))
            assert close == (other == (norm, recall)), other
    for given, unused in ((None, []), (h, ["table.weight"] if recall == "none" else [])):
        model.zero_grad()
        logits = model(torch.randint(2, (3, 9)), 3, given)[0]
        F.cross_entropy(logits.mT, torch.randint(2, (3, 9))).backward()
        grads = {k: p.grad for k, p in model.named_parameters()}
        assert [k for k, g in grads.items() if g is None] == unused
        assert all(g.isfinite().all() and g.any() for g in grads.values() if g is not None)

@pytest.mark.parametrize("task, text", (("prefix_sums", "1" * 40), ("sudoku", "." * 16)))
def test_relative_positions_do_not_show_the_place_in_a_run_of_equal_tokens(task, text):
    for positions in ("relative", "absolute"):
        model = model_of(task=task, bits=40, side=4, positions=positions)
        x = model.task.tokens(text, model.task.symbols)[None]
        x = model.task.puzzles(x).x if task == "prefix_sums" else x
        h = model(torch.tensor(x).long(), 20)[1][0, -len(text):]
        same_everywhere = torch.allclose(h, h[:1].expand_as(h), atol=1e-9)
        assert same_everywhere == (positions == "relative")

def test_the_compiled_step_is_one_graph_and_equals_the_eager_step():
    boards = {"task": "sudoku", "side": 4, "window": 0}
    for options, L in (({"bits": 99}, 100), (boards, 16)):
        model, graphs = model_of(**options), []
        def backend(graph, inputs):
            graphs.append(str(graph.graph))
            attention, = (n for n in graph.graph.nodes if "scaled_dot" in str(n.target))
            assert attention.meta["example_value"].dim() == 4   # 5: inductor of 2.13 fuses wrongly
            return graph
        torch._dynamo.reset()
        torch.compiler.assume_constant_result(looped.constant_geometry)
        step = torch.compile(looped.LoopedTransformer.step, fullgraph=True, dynamic=False,
                             backend=backend)
        for h, r in torch.randn(2, 2, 2, L, 16).double():       # twice the same shape
            assert torch.allclose(step(model, h, r), model.step(h, r), atol=1e-12)
        assert len(graphs) == 1 and "get_attr[target=constant_geometry" in graphs[0]

@pytest.mark.parametrize("recall", RECALLS)
def test_without_recall_the_input_acts_through_h_0_alone(recall):
    model, e = model_of(recall=recall), torch.randn(2, 9, 16).double().requires_grad_()
    for h, reached in ((torch.randn(2, 9, 16).double(), recall != "none"), (e, True)):
        out = model.readout(unroll(model, h, e, 4)).square().sum() + 0 * e.sum()
        assert torch.autograd.grad(out, e)[0].any() == reached

# ---- losses, evaluation, halting -----------------------------------------------------------------
def test_carry_loss_is_the_loss_of_puzzles_unrolled_one_by_one():
    model, (x, y, new_x, new_y) = model_of(loops=6), torch.randint(2, (4, 4, 9))
    h = unroll(model, model.embed(x), model.embed(x), 2)    # its graph must not be followed
    carry = {"x": x, "y": y, "h": h.detach(), "age": torch.tensor([2, 5, 6, 7])}
    loss, after = looped.carry_loss(model, model.cfg, carry, (new_x, new_y))
    x, y = torch.cat((x[:2], new_x[2:])), torch.cat((y[:2], new_y[2:]))     # 6 loops: replaced
    def naive(h):
        e = model.embed(x)
        ends = [unroll(model, (h if b < 2 else e)[b, None], e[b, None], 2) for b in range(4)]
        assert torch.allclose(torch.cat(ends), after["h"], atol=1e-12)
        return sum(F.cross_entropy(model.readout(u)[0].float(), t) for u, t in zip(ends, y)) / 4
    assert same([after["x"], after["y"], after["age"].tolist()], [x, y, [4, 7, 2, 2]])
    ours, short, full = (gradient(model, v) for v in (loss, naive(h.detach()), naive(h)))
    assert torch.allclose(loss, naive(h), atol=1e-6) and not after["h"].requires_grad
    assert torch.allclose(ours, short, atol=1e-6) and (ours - full).abs().max() > 1e-4

def test_progressive_loss_is_the_naive_one_and_draws_n_and_k_uniformly():
    model, rng, (x, y) = model_of(), torch.Generator().manual_seed(0), torch.randint(2, (2, 2, 9))
    step, modes, count, draws = model.step, [], {}, 1500
    def draw(step):
        modes.clear()
        model.step = lambda h, r: modes.append(torch.is_grad_enabled()) or step(h, r)
        loss = looped.progressive_loss(model, model.cfg, x, y, rng)
        n, k = modes.count(False), modes.count(True)
        assert modes == [False] * n + [True] * k            # only the last k have a gradient
        return loss, n, k
    for _ in range(5):
        (loss, n, k), e = draw(step), model.embed(x)
        h = unroll(model, unroll(model, e, e, n).detach() if n else e, e, k)
        naive = F.cross_entropy(model.readout(h).float().mT, y)
        assert torch.allclose(gradient(model, loss), gradient(model, naive), atol=1e-6)
        assert torch.allclose(loss, naive, atol=1e-6)
    for _ in range(draws):
        nk = draw(lambda h, r: h)[1:]
        count[nk] = count.get(nk, 0) + 1
    chance = {(n, k): 1 / 4 / (4 - n) for n in range(4) for k in range(1, 5 - n)}
    assert count.keys() == chance.keys()
    assert all(abs(count[c] - draws * p) < 6 * (draws * p) ** 0.5 for c, p in chance.items())

def test_evaluate_is_the_naive_computation_and_leaves_training_possible():
    model, counts = model_of(bits=16), (1, 3, 4)
    x = torch.cat((torch.full((7, 1), data.START), torch.randint(2, (7, 16))), 1)
    e = model.embed(x)
    paths = [[unroll(model, e[b, None], e[b, None], t)[0] for t in range(7)] for b in range(7)]
    guess = {t: torch.stack([model.readout(p[t]).argmax(-1) for p in paths]) for t in counts}
    y = guess[3].clone()
    y[0, 5], y[1, 0] = 1 - y[0, 5], 1 - y[1, 0]     # wrong: a sum; the start token, not scored
    looped.geometry.cache_clear()
    got = looped.evaluate(model, x.repeat(40, 1), y.repeat(40, 1), counts)      # two chunks
    for t in counts:
        right = (guess[t] == y).double()
        moves = [sum(((p[t + j] - p[t]).norm(dim=1) / p[t].norm(dim=1)).max() for p in paths) / 7
                 for j in (1, 2)]
        ratio = sum(p[t].norm() / p[1].norm() for p in paths) / 7
        naive = right.prod(1).mean(), right[:, 1:].mean(), *moves, ratio
        assert list(got[t].values()) == pytest.approx([v.item() for v in naive], rel=1e-6)
    assert got[3]["exact"] == pytest.approx(5 / 7) and got[3]["token"] == pytest.approx(1 - 1 / 112)
    assert gradient(model, model(x, 1)[0].square().sum()).any()

def test_solve_lets_each_puzzle_rest_by_itself_and_reports_those_that_never_do():
    model = model_of(inject="add")
    x = torch.tensor([[1] * k + [0] * (9 - k) for k in range(10)]).repeat(50, 1)    # two chunks
    def pull(h, r):         # to another point, at a speed that depends on the puzzle
        ones = (r == model.table.weight[1]).all(-1).double().mean(1)[:, None, None]
        return h + (0.2 + 0.6 * ones) * (3 * r.roll(1, 1) - h)
    model.step = pull
    logits, used, settled = looped.solve(model, x, tol=1e-4, max_loops=200)
    for b in (*range(10), 499):
        e = model.embed(x[b, None])
        path = [unroll(model, e, e, t) for t in range(used[b] + 1)]
        assert [looped.moved(*p) < 1e-4 for p in zip(path[1:], path)] == [0] * (used[b] - 1) + [1]
        assert torch.allclose(logits[b], model.readout(path[-1])[0])
    assert settled.all() and len(set(used.tolist())) >= 8
    some = looped.solve(model, x, tol=1e-4, max_loops=30)[1:]
    assert same(some, (used.clamp(max=30), used <= 30)) and not some[1].all()
    model.step = lambda h, r: 1.05 * h      # small damped moves are no rest
    assert not looped.solve(model, x, max_loops=9, damping=0.99)[2].any()
    model.step = lambda h, r: -h            # a two-cycle is no fixed point
    assert not looped.solve(model, x, max_loops=9)[2].any()
    assert looped.solve(model, x, max_loops=9, damping=0.5)[2].all()        # its fixed point is 0
    assert looped.evaluate(model, x, x, [5])[5].items() >= {"residual": 2, "residual2": 0}.items()

# ---- training, resume, checkpoints ---------------------------------------------------------------
def train(cfg, out, *cuts, rng=None):
    """Train in pieces, each with a new model from the checkpoint -> final checkpoint, log."""
    state = out.mkdir()
    for until in (*cuts, None):
        torch.manual_seed(cfg.seed)
        done = looped.train(cfg, looped.LoopedTransformer(cfg), sets_of(cfg), out, state, until)
        assert done == (until is None)
        state = looped.read_checkpoint(out)[0]
        state["rng"] = state["rng"] if rng is None else rng
    logged = [json.loads(line) for line in open(out / "log.jsonl")]
    return [{k: v for k, v in d.items() if k not in ("ms", "seconds")} for d in (state, *logged)]

@pytest.mark.parametrize("loss", ("carry", "progressive"))
def test_a_run_in_pieces_is_bit_for_bit_the_run_in_one_go_and_the_seed_decides(tmp_path, loss):
    cfg = tiny(train=loss, ema=0.9, loops=5)
    whole, other = train(cfg, tmp_path / "a"), torch.Generator().manual_seed(9).get_state()
    assert same(train(cfg, tmp_path / "b", 1, 4), whole) and same(train(cfg, tmp_path / "c"), whole)
    for control in (train(cfg, tmp_path / "d", 4, rng=other),
                    train(dataclasses.replace(cfg, seed=1), tmp_path / "e")):
        assert not same(control[0]["model"], whole[0]["model"])

def test_ema_is_the_naive_recursion_and_the_best_weights_are_kept(tmp_path, monkeypatch):
    cfg, states, model = tiny(ema=0.7, eval_every=1), [], looped.LoopedTransformer(tiny())
    average = {k: v.clone() for k, v in model.state_dict().items()}
    monkeypatch.setattr(data, "write_atomic", lambda path, raw: states.append(raw))
    monkeypatch.setattr(looped, "evaluate", lambda *_: {
        4: {"exact": len(states) in (2, 3), "residual": 0.0}})
    looped.train(cfg, model, sets_of(cfg), tmp_path)
    for t, raw in enumerate(states, 1):
        (tmp_path / "ckpt.pt").write_bytes(raw)
        state, keep = looped.read_checkpoint(tmp_path)[0], min(0.7, t / (t + 10))
        average = {k: keep * v + (1 - keep) * state["model"][k] for k, v in average.items()}
        assert all(torch.allclose(v, state["average"][k], atol=1e-6) for k, v in average.items())
        best = looped.load(tmp_path)[0].state_dict()            # validation is best at 3 and 4
        assert same(best, state["average"]) == (t <= 4) and not same(best, state["model"])

def test_learning_rate_warms_up_and_decays():
    lr = {d: [looped.learning_rate(looped.Config(decay=d, lr=1.0, warmup=10, steps=100), i)
              for i in range(100)] for d in ("linear", "step")}
    up, down, slow = lr["linear"][:10], lr["linear"][9:], lr["step"]
    assert up == sorted(up) and down == sorted(down)[::-1] and up[-1] > 0.9 and 0 < down[-1] < 0.02
    assert slow[:60] == sorted(slow[:60]) and 0 < slow[0] < 0.1 and 0.99 < slow[59] <= 1
    assert slow[60:] == sorted(slow[60:]) and slow[60] == pytest.approx(slow[59] / 10, rel=0.01)

def test_carry_learns_short_strings_and_no_puzzle_outlives_its_loops(tmp_path):
    cfg = tiny(bits=4, positions="relative", n_train=10, n_val=2, n_test=2, window=0, steps=150,
               batch=32, lr=1e-2, loops=8, grad_loops=4, warmup=10, eval_every=75)
    carry = train(cfg, tmp_path / "run", 7)[0]["carry"]
    learnt, new = looped.load(tmp_path / "run")[0], looped.LoopedTransformer(cfg)
    better, chance = (looped.evaluate(model, *sets_of(cfg)["train"], [8])[8]["token"]
                      for model in (learnt, new))
    assert better > chance + 0.15
    assert set(carry["age"].tolist()) == {4, 8}             # of all ages; those of 8 make way next

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert looped.main(flags(out=out)) == 0
    return out

@pytest.fixture
def home(finished, tmp_path, monkeypatch):
    """A folder with two runs, RUN and OTHER, and a file; -> where the run came from."""
    monkeypatch.chdir(tmp_path)
    for name in ("RUN", "OTHER"):
        Path(name).mkdir()
        Path(name, "ckpt.pt").write_bytes((finished / "ckpt.pt").read_bytes())
    Path("file").write_text("mine")
    return finished

def fails(capsys, argv, code=2):
    """-> the one line on stderr."""
    try:
        got = looped.main(argv)
    except SystemExit as e:
        got = e.code
    err = capsys.readouterr().err
    assert got == code and err.count("\n") == 1 and err.endswith("\n"), (got, err)
    return err

def test_load_gives_the_weights_of_the_reported_result(finished):
    (model, cfg), report = looped.load(finished), json.loads((finished / "eval.json").read_text())
    again = looped.evaluate(model, *sets_of(cfg)["hard"], [4])[4]
    assert report["hard"]["4"] == pytest.approx(again) and report["config"]["bits"] == cfg.bits

class Evil:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)

@pytest.mark.parametrize("kind", range(8))
def test_a_broken_or_foreign_checkpoint_is_refused_by_name(kind, home, capsys):
    raw, s = Path("RUN/ckpt.pt").read_bytes(), torch.load("RUN/ckpt.pt")
    bad = (raw[:len(raw) // 2], raw[:-99], b"", b"hello", [1], {"config": {"depth": 3}}, Evil(),
           s | {"config": s["config"] | {"width": 32}})[kind]
    Path("bad.pt").write_bytes(bad) if isinstance(bad, bytes) else torch.save(bad, "bad.pt")
    assert "bad.pt" in fails(capsys, ["--resume", "bad.pt"]) and not Path("ran").exists()
    with pytest.raises(looped.LoopedError, match="bad.pt"):
        looped.load("bad.pt")

@pytest.mark.parametrize("every, lr", (("100", "1e30"), ("1", "1e30"), ("1", "1e-3")))
def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_a_usable_checkpoint(
        every, lr, home, capsys, monkeypatch):
    loss, argv = looped.carry_loss, ["--resume", "RUN", "--steps", "12", "--eval_every", every]
    def root(m, *a):                # a finite loss with a gradient that is not
        return loss(m, *a)[0] + (0 * m.table.weight).sum().sqrt(), loss(m, *a)[1]
    with monkeypatch.context() as patch:
        patch.setattr(looped, "carry_loss", root if lr == "1e-3" else loss)
        line = fails(capsys, [*argv, "--lr", lr], code=1)
    assert "--lr" in line and "RUN" in line and looped.main([*argv, "--lr", "1e-3"]) == 0

@pytest.mark.parametrize("where, name", ((Path, "write_bytes"), (os, "replace")))
def test_a_full_disk_leaves_the_old_checkpoint_whole(where, name, home, capsys, monkeypatch):
    raw, argv = Path("RUN/ckpt.pt").read_bytes(), ["--resume", "RUN", "--steps", "8"]
    def full(path, _):
        open(path, "ab").write(b"half")
        raise OSError(28, "No space left on device", os.fspath(path))
    with monkeypatch.context() as patch:
        patch.setattr(where, name, full)
        assert "No space" in fails(capsys, argv) and Path("RUN/ckpt.pt").read_bytes() == raw
    assert {p.name for p in Path("RUN").iterdir()} == {"ckpt.pt", "log.jsonl"}
    assert looped.main(argv) == 0 and Path("RUN/ckpt.pt").read_bytes() != raw       # control

@pytest.mark.parametrize("norm, recall", (("outer", "internal"), ("pre", "external")))
def test_bf16_trains_with_a_state_in_fp32(tmp_path, norm, recall):
    losses = []
    for dtype in ("fp32", "bf16"):
        cfg = tiny(norm=norm, recall=recall, dtype=dtype, eval_every=1)
        state, _, *log = train(cfg, tmp_path / dtype)
        assert state["carry"]["h"].dtype == torch.float32
        losses.append([r["loss"] for r in log])
    assert losses[1] == pytest.approx(losses[0], rel=0.05) and losses[0] != losses[1]

def test_several_processes_take_the_steps_of_one(tmp_path):
    argv, losses = flags(eval_every=1), []
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc_per_node=2", looped.__file__, *argv, "--out", tmp_path / "two"],
                   check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    for name, seed in (("two", "0"), ("one", "0"), ("other", "1")):
        if name != "two":
            looped.main([*argv, "--seed", seed, "--out", f"{tmp_path / name}"])
        log = [json.loads(line) for line in open(tmp_path / name / "log.jsonl")]
        losses.append(pytest.approx([r["loss"] for r in log[1:]], rel=1e-4))
    assert losses[0] == losses[1].expected and losses[0] != losses[2].expected
    assert looped.main(["--resume", f"{tmp_path / 'two'}", "--steps", "8"]) == 0

def test_weights_alone_can_be_evaluated_but_not_trained_on(home, capsys):
    state = torch.load("RUN/ckpt.pt")
    torch.save({k: state[k] for k in ("config", "best", "step", "seconds")}, "small.pt")
    assert looped.main(["--resume", "small.pt"]) == 0
    a, b = (json.loads(Path(p, "eval.json").read_text()) for p in ("out/small", home))
    assert (a["easy"], a["hard"], a["steps"]) == (b["easy"], b["hard"], TINY["steps"])
    assert "weights only" in fails(capsys, ["--resume", "small.pt", "--steps", "9"])

def test_the_table_has_a_row_for_each_name_and_a_picture(home, capsys):
    r = json.loads((home / "eval.json").read_text())
    for name, exact in (("a-seed0", 0.25), ("a-seed1", 0.75), ("b-seed0", 1.0)):
        r["hard"]["4"]["exact"] = exact
        Path(name).mkdir()
        Path(name, "eval.json").write_text(json.dumps(r))
    assert looped.main(["--table", "*-seed?", "--out", "."]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:4]]
    assert [row[:2] + row[3:4] for row in rows] == [["| a", "2", "0.500 ± 0.250"],
                                                    ["| b", "1", "1.000 ± 0.000"]]
    if importlib.util.find_spec("matplotlib"):
        assert Path("curves.png").read_bytes().startswith(b"\x89PNG")

# ---- command line --------------------------------------------------------------------------------
BAD = """--task sudokus; --recall inside; --norm sanwich; --depth 3; --bits 0; --hard_bits 0; extra
    --window 4; --window 15; --heads 3; --heads 16; --task sudoku --width 12; --bits 5 --window 3
    --loops 0; --steps 0; --batch 0; --lr nan; --lr x; --bits; --ema 1; --ema -1; --seed -1
    --seed 99999999999999999999; --n_train 0; --n_train -1; --tol 0; --data nofile; --resume=
    --table nothing*; --resume nowhere; --out file; --out /proc/none; --out RUN; --watch
    --resume RUN --width 32; --resume RUN --task sudoku; --resume RUN --seed 3
    --resume RUN --out OTHER; --resume RUN --watch --puzzle 012; --resume RUN --preset paper
    --resume RUN --steps 2; --recall none --recall_gain 2; --puzzle 01; --n_train 999999999
    --eval_loops 0; --damping 1""" + (
    "" if torch.cuda.is_available() else "; --device cuda")

@pytest.mark.parametrize("line", [case.strip() for case in re.split(r"[;\n]", BAD)])
def test_bad_input_gets_one_line_that_names_it_and_nothing_is_lost(line, home, capsys):
    before = {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()}
    err = fails(capsys, line.split() if "--resume RUN" in line else [*flags(), *line.split()])
    assert any(w.strip("-=") in err for w in line.split()[-2:])
    assert before == {p: p.read_bytes() for p in before}

def test_help_shows_every_option_with_its_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        looped.main(["--help"])
    text = re.sub(r"\n {3,}", " ", capsys.readouterr().out)      # a long flag has its text below it
    options = dict(re.findall(r"^  --(\w+) (.*)", text, re.M))
    for f in dataclasses.fields(looped.Config):
        shown = r"prefix_sums \d" if f.default is None else re.escape(f"{f.default}")
        assert re.search(rf"\(default: {shown}", options[f.name]), f.name

def test_defaults_depend_on_the_task_and_a_preset_yields_to_options():
    given = [looped.Config(task=t) for t in ("prefix_sums", "sudoku", "chess")]
    assert [c.window for c in given] == [5, 0, 0] and tiny(task="chess").loops == TINY["loops"]
    assert None not in [v for c in given for v in vars(c).values()]
    official = dict(width=256, heads=8, blocks=1, train="progressive", loops=30, batch=500, clip=1,
                    weight_decay=0.01, lr=3e-4, decay="step", positions="relative", eval_loops=500)
    for extra, differ in (([], dict(steps=1600)), (["--task", "sudoku"], dict(steps=8000)),
                          (["--lr", "0.1"], dict(lr=0.1))):
        cfg = looped.configure(looped.parse(["--preset", "paper", *extra]))[0]
        assert vars(cfg).items() >= (official | differ).items()

def test_ctrl_c_saves_and_the_printed_command_finishes_the_same_run_of_fixed_depth(home):
    def cli(*argv):
        return subprocess.Popen([sys.executable, looped.__file__, *argv], text=True, stdout=-1,
                                stderr=-1, env=os.environ | {"OMP_NUM_THREADS": "1"})
    argv = flags(blocks=15, loops=1, recall="none", train="progressive", steps=16, eval_every=1)
    process = cli(*argv, "--out", "cut in two")
    while not (line := process.stdout.readline()).startswith("step "):
        assert line, process.stderr.read()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0 and not err, err
    again = cli(*shlex.split(re.search(r"python looped.py (--resume .*)", out)[1]))
    out, err = again.communicate(timeout=100)
    assert again.returncode == 0 and "step     16 | " in out and "hard: " in out, err
    assert looped.main([*argv, "--out", "whole"]) == 0
    cut, whole = (torch.load(f"{name}/ckpt.pt") for name in ("cut in two", "whole"))
    assert all(same(cut[k], whole[k]) for k in ("model", "best", "optimizer", "rng"))

# ---- data.py -------------------------------------------------------------------------------------
BOX = {4: (2, 2), 6: (2, 3), 9: (3, 3)}
SUDOKU = {side: replace(data.TASKS["sudoku"], side=side) for side in BOX}
CHESS, BITS = data.TASKS["chess"], data.TASKS["prefix_sums"]
TASK = {**SUDOKU, "chess": CHESS, "bits": BITS}

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """{task or side: splits}, made once."""
    cache = tmp_path_factory.mktemp("cache")
    return {k: data.splits(t, 3, 6, 3, 3, 4, cache=cache) for k, t in TASK.items()}

def peers(i, side):
    (h, w), (r, c) = BOX[side], divmod(i, side)
    return [j for j in range(side * side) if j // side == r or j % side == c
            or (j // side // h, j % side // w) == (r // h, c // w)]

PEERS = {(side, i): peers(i, side) for side in BOX for i in range(side * side)}

def solutions(board, side):
    """Up to two full boards, by plain backtracking."""
    options = {i: set(range(1, side + 1)) - {board[j] for j in PEERS[side, i]}
               for i, v in enumerate(board) if not v}
    if not options:
        return [tuple(board)]
    found, i = [], min(options, key=lambda i: len(options[i]))
    for d in options[i]:
        found += solutions(board[:i] + [d] + board[i + 1:], side) if len(found) < 2 else []
    return found[:2]

@pytest.mark.parametrize("side", BOX)
def test_sudoku_has_one_solution_also_after_augmentation(made, side):
    p = made[side]["hard"]
    x, y = torch.tensor(p.x), torch.tensor(p.y)
    a, b = SUDOKU[side].augment(x, y, torch.Generator().manual_seed(5))
    assert (a != x).any(1).all() and ((a > 0).sum(1) == (x > 0).sum(1)).all()
    for boards, labels in ((x, y), (a, b)):
        for board, label in zip(boards[:2].tolist(), labels.tolist()):
            assert solutions(board, side) == [tuple(label)]
            board[next(i for i, v in enumerate(board) if v)] = 0        # the control: one clue less
            assert len(solutions(board, side)) == 2

def test_sudoku_rating_counts_placements():
    full = np.array([1, 2, 3, 4, 3, 4, 1, 2, 2, 1, 4, 3, 4, 3, 2, 1])
    x = np.where(np.isin(np.arange(16), (0, 1, 8, 9)), 3, 1 << full - 1).astype(np.uint16)[:, None]
    found, _, tried = data.solve(x, (2, 2))         # 1 and 2 can be swapped: one branch of two
    assert (found, tried) == (2, 2)
    found, y, tried = data.solve(1 << full.astype(np.uint16)[:, None] - 1, (2, 2))
    assert (found, tried) == (1, 0) and (np.log2(y[:, 0]) + 1 == full).all()

@pytest.mark.parametrize("rating, cut", [(range(10), 7.2), ([0] * 9 + [2], 2), ([2, 2, 4, 4], 4)])
def test_cut_is_the_quantile_and_leaves_both_levels(rating, cut):
    assert data.Task().cut(np.array(rating)) == pytest.approx(cut)

def test_levels_and_splits_are_disjoint(made):
    for name, split in made.items():
        assert [len(p) for p in split.values()] == [6, 3, 3, 4]
        if name != "bits":              # whose levels differ in length
            assert min(split["hard"].rating) > max(split[k].rating.max() for k in list(split)[:3])
            rows = [(p.y if name in (6, 9) else p.x) for p in split.values()]
            assert len(np.unique(np.concatenate(rows), axis=0)) == 16
    clues = {k: (p.x > 0).sum(1) for k, p in made[4].items()}
    assert clues["train"].min() >= 7 and clues["hard"].max() <= 5

def test_prefix_sums(made):
    for p in made["bits"].values():
        assert (p.x[:, 1:].astype(int).cumsum(1) % 2 == p.y[:, 1:]).all() and (p.x[:, 0] == 2).all()
    task = replace(BITS, bits=7, hard_bits=7, positions="relative")
    split = data.splits(task, 0, 50, 20, 20, 38).values()
    assert len(np.unique(np.concatenate([p.x for p in split]), axis=0)) == 128
    with pytest.raises(data.DataError, match="--hard_bits 7: only 128 .*--hard_bits 8 needed"):
        data.splits(task, 0, 50, 20, 20, 39)

def decode(x):
    pieces = {i: chess.Piece((v - 1) % 6 + 1, v < 7) for i, v in enumerate(x) if v}
    board = chess.Board(None)
    board.set_piece_map(pieces)
    return board

def forced(board, depth):
    """Pairs of squares whose moves mate within `depth` moves, by trying everything."""
    pairs = set()
    for move in list(board.legal_moves):
        board.push(move)
        works = board.is_checkmate()
        if depth > 1 and not works and any(board.legal_moves):
            works = True
            for reply in list(board.legal_moves):
                board.push(reply)
                works = works and bool(forced(board, depth - 1))
                board.pop()
        board.pop()
        pairs |= {frozenset((move.from_square, move.to_square))} if works else set()
    return pairs

def test_chess_puzzles_have_one_solving_pair():
    p, depths = CHESS.chunk(7, 0, numbers=(10, 1)), []
    for x, y in zip(p.x.tolist(), p.y):
        board, pair = decode(x), {frozenset(np.flatnonzero(y).tolist())}
        assert board.is_valid() and chess.square_file(board.king(True)) >= 4
        depths.append(1 if forced(board, 1) else 2)
        assert forced(board, depths[-1]) == pair
    assert depths == [1] * 10 + [2]

def test_chess_orientation_round_trip():
    rng, board = random.Random(0), chess.Board()
    for _ in range(60):
        for move in rng.sample(list(board.legal_moves), min(3, board.legal_moves.count())):
            x, y = data.encode(board, move)
            assert (data.encode(board.mirror())[0] == x).all() and np.flatnonzero(x == 6) % 8 > 3
            assert f"({move.uci()[:4]}" in CHESS.answer(board.fen(), y)
            piece = decode(x.tolist()).piece_at(int(np.flatnonzero((x > 0) & (x < 7) & (y > 0))[0]))
            assert piece.piece_type == board.piece_type_at(move.from_square)
        board.push(rng.choice(list(board.legal_moves)))
        board = board if any(board.legal_moves) else chess.Board()
    assert (CHESS.predict(torch.randn(5, 64, 2)).sum(-1) == 2).all()

HEADER = {"chess": "PuzzleId,FEN,Moves,Rating", "sudoku": "source,question,answer,rating"}
FEN = "r1bqkbnr/pppp1ppp/2n5/4p2Q/2B1P3/8/PPPP1PPP/RNB1K1NR b KQkq - 3 3"
Q, A = "1" + "." * 15, "1234341221434321"
MOVES = "a7a6", "a7a5", "b7b6", "b7b5"
GOOD = {"chess": [f"a,{FEN},{m} h5f7,{1500 + i}" for i, m in enumerate(MOVES)],
        "sudoku": [f"s,{A[:i]}{'.' * (16 - i)},{A},0" for i in (3, 4, 5, 6)]}
HARD = [f"b,{FEN},{m} h5f7,{r}" for m, r in (("h7h6", 1601), ("d7d6", 2000), ("g8h6", 2001))]

def write_rows(path, *rows, opener=open):
    with opener(path, "wt") as f:
        f.write("\n".join(rows) + "\n")
    return str(path)

@pytest.mark.parametrize("opener, suffix", [(open, ""), (gzip.open, ".gz"), (bz2.open, ".bz2")])
def test_lichess_reader(tmp_path, opener, suffix):
    rows = [HEADER["chess"], *GOOD["chess"], *HARD]
    path = write_rows(tmp_path / f"p.csv{suffix}", *rows, opener=opener)
    s = data.splits(CHESS, 0, 2, 1, 1, 2, path, tmp_path)
    assert sorted([*s["train"].rating, *s["val"].rating]) == [1500, 1501, 1502]
    assert s["easy"].rating == [1503] and s["hard"].rating.tolist() == [1601, 2000]
    assert all((np.flatnonzero(y) == [chess.H5, chess.F7]).all() for p in s.values() for y in p.y)
    with pytest.raises(data.DataError, match="only 2 different hard .*3 asked"):
        data.splits(CHESS, 0, 2, 1, 1, 3, path, tmp_path)

@pytest.mark.parametrize("name, row, reason", [
    ("chess", f"x,{FEN},a7a6 h5h8,1500", "illegal"), ("chess", f"x,{FEN},a7a6,1500", "uci"),
    ("chess", "x,8/8/8,a1a2 a3a4,1500", "rows"), ("chess", f"x,{FEN},0000 a7a6,1500", "no move"),
    ("chess", f"x,{FEN},a7a6 h5f7,high", "high"), ("chess", f"x,{'8/' * 7}8,a1a2 a2a3,9", "legal"),
    ("sudoku", f"s,{Q}.,{A},0", "17 char"), ("sudoku", f"s,{Q},{A[:-1]}x,0", "'x'"),
    ("sudoku", f"s,2{Q[1:]},{A},0", "clue"), ("sudoku", f"s,{Q},{A[:-2]}12,0", "rule"),
    ("sudoku", f"s,{Q},{A[:-1]}.,0", "rule"), ("sudoku", f"s,{Q},{A},", "int")])
def test_bad_rows_are_reported_and_too_many_refused(tmp_path, capsys, name, row, reason):
    task = TASK.get(name, SUDOKU[4])
    path = write_rows(tmp_path / "p.csv", HEADER[name], row, *GOOD[name])
    assert len(data.splits(task, 0, 2, 1, 0, 0, path, tmp_path)["train"]) == 2
    message = capsys.readouterr().err
    assert "1 bad rows of 4: line 2: " in message and reason in message
    with pytest.raises(data.DataError, match=f"p.csv: 1 bad rows of 5: line 2: .*{reason}"):
        data.splits(task, 0, 3, 1, 0, 0, path, tmp_path)

def test_unusable_files_are_named(tmp_path, monkeypatch):
    packed = gzip.compress("\n".join([HEADER["chess"], *GOOD["chess"]]).encode())
    (tmp_path / "cut.csv.gz").write_bytes(packed[:-20])
    (tmp_path / "p.csv.zst").write_bytes(b"")
    write_rows(tmp_path / "column.csv", "PuzzleId,FEN,Moves", *GOOD["chess"])
    monkeypatch.setitem(sys.modules, "zstandard", None)
    for name, reason in (("cut.csv.gz", "cannot be read"), ("p.csv.zst", "pip install zstandard"),
                         ("column.csv", "line 1: no column 'Rating'"), ("none.csv", "No such fi")):
        with pytest.raises(data.DataError, match=f"{name}.*{reason}"):
            data.splits(CHESS, 0, 4, 0, 0, 0, str(tmp_path / name), tmp_path)

def test_sudoku_files_keep_grids_apart(tmp_path):
    shifts = [3 * (r % 3) + r // 3 + c for r in range(9) for c in range(9)]
    grids = ["".join(str((i + k) % 9 + 1) for i in shifts) for k in range(9)]
    rows = [HEADER["sudoku"]] + [f"s,{g[:40]}{'.' * 41},{g},{k % 5}" for k, g in enumerate(grids)]
    paths = write_rows(tmp_path / "a.csv", *rows[:6]) + "," + write_rows(tmp_path / "b.csv", *rows)
    s = data.splits(SUDOKU[9], 0, 3, 1, 4, 1, paths, tmp_path)
    assert s["hard"].rating == [4] and {*s["train"].rating, *s["val"].rating} == {0, 1, 2, 3}
    assert len({y.tobytes() for p in s.values() for y in p.y}) == 9

def same_splits(a, b):
    return all((vars(a[k])[f] == vars(b[k])[f]).all() for k in a for f in ("x", "y", "rating"))

def test_only_the_seed_decides(tmp_path, monkeypatch):
    def make(seed, cache, n=1000):
        return data.splits(SUDOKU[4], seed, n, 5, 5, 5, cache=tmp_path / cache)
    once = make(1, "a")
    make(1, "b", 10)                    # a smaller request first, then one core
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(1), raising=False)
    assert same_splits(once, make(1, "b")) and not same_splits(once, make(2, "b"))
    a, b, c = (CHESS.chunk(s, 0, (2, 0)).x for s in (0, 0, 1))
    assert (a == b).all() and (a != c).any()

def test_damaged_and_foreign_caches_are_made_again(tmp_path, capsys):
    def make():
        return data.splits(SUDOKU[4], 0, 20, 5, 5, 5, cache=tmp_path)
    first, file = make(), next(tmp_path.iterdir())
    whole = file.read_bytes()
    np.savez(tmp_path / "other", name="other.npz")
    for content in (whole[:-300], b"", b"PK no zip", (tmp_path / "other.npz").read_bytes()):
        file.write_bytes(content)
        assert same_splits(first, make()) and f"{file}: " in capsys.readouterr().err
    assert same_splits(first, make()) and capsys.readouterr().err == ""    # the control: whole now

def data_cli(cwd, *args):
    return subprocess.Popen([sys.executable, data.__file__, *map(str, args)], cwd=cwd, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)

def test_two_processes_make_the_same_whole_file(tmp_path):
    args = "--task", "sudoku", "--side", 4, "--n", 2000, "--stats"
    runs = [data_cli(tmp_path, *args) for _ in "ab"]
    (out, _), (other, _) = [run.communicate() for run in runs]
    assert out == other and "2,000 hard" in out and not any(run.returncode for run in runs)
    files = list((tmp_path / "out/cache").iterdir())
    assert len(files) == 1 and data.load_cache(files[0])

@pytest.mark.parametrize("args, message", [
    (("--task", "go"), "invalid choice: 'go'"), (("--task", "sudoku", "--side", 5), "choose 4, 6"),
    (("--bits", 0), "must be at least 1"), (("--n", -1), "-1: must"), (("--data", "x"), "no file")])
def test_command_line_refuses_in_one_line(tmp_path, args, message):
    run = data_cli(tmp_path, *args)
    out, err = run.communicate()
    assert run.returncode == 2 and message in err and err.count("\n") == 1 and not out

@pytest.mark.parametrize("task, text, message", [
    (9, "." * 81, "several"), (9, "11" + "." * 79, "no solution"), (9, "1", "1 characters"),
    (4, "x" * 16, "'x'"), ("bits", "012", "'2'"), ("bits", "", "' '"), ("chess", "hello", "8 rows"),
    ("chess", "8/" * 7 + "8", "legal"),
    ("chess", "7k/5Q2/6K1/8/8/8/8/8 b - - 0 1", "game is over")])
def test_typed_puzzles_that_are_none(task, text, message):
    with pytest.raises(data.DataError, match=message):
        TASK[task].parse(text)

@pytest.mark.parametrize("key", TASK)
def test_typed_puzzles_round_trip(made, key):
    task, x, y = TASK[key], made[key]["easy"].x[0], made[key]["easy"].y[0]
    again, solution = task.parse(task.text(x))
    assert (again == x).all() and (solution == y).all()
    painted = task.show(x, y, lambda i, text: f"<{text}>").count("<")
    assert painted == {"chess": 2, "bits": 32}.get(key, (x == 0).sum())
    assert ("mate" if key == "chess" else "solved") in task.answer(task.text(x), y)
    assert task.answer(task.text(x), y[::-1]) != task.answer(task.text(x), y)

# ---- theory.py -----------------------------------------------------------------------------------
def failed(rows):
    return [r for r in rows if not r.passed]

@pytest.mark.parametrize("seed", [0, 101, 2026])
@pytest.mark.parametrize("name", ["R1", "R4", "R5", "R6", "I2", "I5", "G1", "G4", "G5"])
def test_claim_holds(name, seed):
    rows = theory.CLAIMS[name](seed, quick=True)
    assert not failed(rows) and any("control" in r.what for r in rows)

@pytest.mark.parametrize("name", ["R2", "R3", "I1", "I3", "I4", "G2", "G3", "grid"])
def test_claim_about_the_real_block_holds(name):
    assert not failed(theory.CLAIMS[name](303, quick=True))

@pytest.mark.parametrize("name, wrong", [
    ("R1", {"judge": "external"}), ("R2", {"norms": ("outer",)}), ("R3", {"norms": ("outer",)}),
    ("R4", {"recall": 5.0}), ("R5", {"norm": "pre"}), ("R5", {"recall": 0.0}),
    ("R6", {"norm": "pre"}), ("R6", {"recall": 0.0}), ("I2", {"recall": 4.0}),
    ("I3", {"norm": "pre"}), ("I4", {"norms": ("outer",)}), ("I5", {"recalls": ("none",)}),
    ("G1", {"norm": "pre"}), ("G2", {"norm": "pre"}), ("G3", {"norm": "pre"}),
    ("G4", {"recalls": ("external", "internal")}), ("G5", {"norm": "pre"})])
def test_wrong_variant_fails(name, wrong):
    wrongs = failed(theory.CLAIMS[name](0, quick=True, **wrong))
    assert any("control" not in r.what for r in wrongs)

def test_the_grid_fails_without_the_outer_norm(monkeypatch):
    def untrained(seed, norm, *rest, real=theory.untrained):
        return real(seed, "pre", *rest)
    monkeypatch.setattr(theory, "untrained", untrained)
    assert {r.what.split(",")[0] for r in failed(theory.CLAIMS["grid"](0, quick=True))} >= {
        "outer + internal"}

def test_sensitivity_is_the_chain_rule_through_the_loops():
    f, v = theory.untrained(3, "outer", "internal", True, 2), theory.rng(3)(2, 5 * 32)
    h, d, _ = theory.sensitivity(f, (1, 7), 3)
    J = theory.jacobian(lambda e: theory.states(f.on(e), (7,))[0], f.start)
    exact = (J @ F.normalize(v)[..., None])[..., 0]
    assert torch.allclose(d[1], exact, rtol=1e-6) and not torch.allclose(d[0], exact, rtol=1e-2)

def test_tools():
    assert theory.row("x", "", "=", 0, float("nan"), 9.0).passed is False
    assert theory.row("x", "", "<=", 1, 1.1).passed is False
    assert theory.row("x", "", ">=", 1, 2).passed
    points = torch.tensor([[0.0, 1.0], [0.0, 1.0 + 1e-9], [0.0, 1.1], [0.0, 1.0]]).double()
    assert theory.distinct(points) == 2
    h, residual = theory.rest(torch.cos, torch.ones(1, 1).double(), 500)
    assert abs(h.item() - 0.7390851332151607) < 1e-12 and residual.item() < 1e-14
    _, residual = theory.rest(lambda s: -s, torch.ones(1, 1).double(), 500)     # a two-cycle
    assert residual.item() == 2
    k = torch.arange(5)
    assert abs(theory.slope(k, 3.0 * k.double() + 1) - 3) < 1e-12
    A = torch.diag(torch.tensor([0.5, -0.9, 0.1], dtype=torch.float64))
    J = theory.jacobian(lambda s: s @ A.T, torch.ones(2, 3).double())
    assert J.shape == (2, 3, 3) and abs(theory.radius(J)[1] - 0.9) < 1e-12
    rough = theory.growth(lambda s: s @ A.T, torch.ones(2, 3).double())
    assert (rough - 0.9).abs().max() < 1e-3

def test_projection_is_the_nearest_point():
    x, y = 3 * theory.rng(5)(2, 50)
    a = torch.linspace(-7, 7, 20001).double().exp()
    a = torch.cat((a, -a))
    scan = ((a - x[:, None]) ** 2 + (-2 / a - y[:, None]) ** 2).amin(1)
    px, py = theory.hyperbola(x, y, torch.full_like(x, -2))
    gap = (px - x) ** 2 + (py - y) ** 2
    assert (px * py + 2).abs().max() < 1e-6
    assert (gap <= scan + 1e-9).all() and (scan - gap < 1e-2).all()

def test_command_line(tmp_path, capsys, monkeypatch):
    out = tmp_path / "table.json"
    assert theory.main(["--only", "R5,G1", "--quick", "--seed", "3", "--json", str(out)]) == 0
    assert {r["claim"] for r in json.loads(out.read_text())["rows"]} == {"R5", "G1"}
    monkeypatch.setitem(theory.CLAIMS, "R5", lambda *a, **k: theory.r5(0, True, norm="pre"))
    assert theory.main(["--only", "R5", "--quick"]) == 1
    capsys.readouterr()
    (tmp_path / "ckpt.pt").write_bytes(b"no checkpoint")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for wrong in (["--only", "R9"], ["--ckpt", "nowhere"], ["--ckpt", str(tmp_path)],
                  ["--only", "G1", "--json", str(tmp_path / "no" / "x")],
                  ["--only", "G1", "--quick", "--plot", str(tmp_path)]):
        assert theory.main(wrong) == 2
        assert capsys.readouterr().err.count("\n") == 1

@pytest.mark.parametrize("recall, norm", [
    ("internal", "outer"), ("none", "pre"), ("external", "gru")])
def test_measurements_of_a_run(tmp_path, capsys, recall, norm):
    cfg = looped.Config(bits=6, hard_bits=8, n_train=8, n_val=8, n_test=8, n_hard=8, width=16,
                        heads=2, recall=recall, norm=norm, recall_gain=8.0)
    best = looped.LoopedTransformer(cfg).state_dict()
    torch.save({"config": asdict(cfg), "best": best}, tmp_path / "ckpt.pt")
    assert theory.main(["--ckpt", str(tmp_path), "--json", str(tmp_path / "table.json")]) == 0
    found, = json.loads((tmp_path / "table.json").read_text())
    assert f"| {tmp_path.name} |  | " in capsys.readouterr().out.splitlines()[-1]
    assert len({k[0] for k in found if k[0].isdigit()}) == 7
    rested, = found["1 share of inputs at rest"]
    moved_from_new, moved_from_old = found["4 input swapped: from its limit; from the old one"]
    if (recall, norm) == ("internal", "outer"):
        assert rested == 1 and moved_from_new < 1e-8 < moved_from_old
    if recall == "none":
        assert rested == 0 and moved_from_old == moved_from_old
