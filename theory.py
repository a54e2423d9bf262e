"""theory.py: the fixed-point claims about looped transformers, checked numerically in float64.

A loop h <- f(h, e) is judged on three axes: are its fixed points reached (reachability), do they
depend on the input e (input-dependence), are they smooth in e and safe to backpropagate through
(geometry). After the abstract of "Stability and Generalization in Looped Transformers", arXiv
2604.15259. One function per claim; its docstring says what is claimed, why it holds, and whether it
is the paper's (abstract) or derived here. A control row is the same measure on a loop where it has
to come out the other way.

    python theory.py                            # one table; exit code 1 if a claim fails
    python theory.py --only R5,G5 --seed 7      # --quick: small sizes, a few seconds
    python theory.py --ckpt out/RUN             # the same measurements on a trained model

letters   h or s state   e embedded input   A or W_h acts on the state, w or W_e e is the recall
          N(u) = sqrt(D) u / |u|, the outer norm     J = df/dh at h*     rho = spectral radius
"""
import copy, functools, io, json, math, sys  # noqa: E401
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import data
import looped
# ---- what the claims share -----------------------------------------------------------------------
Row = namedtuple("Row", "claim what predicted measured tolerance passed note")
CLAIMS, SECONDS = {}, {}    # id -> function(seed, quick, **variant) -> [Row]; its seconds
NORMS, RECALLS = ("pre", "peri", "outer", "sandwich"), ("none", "external", "internal")
STRONG = 8.0        # recall gain: all of 120 outer-norm blocks came to rest, at 4.0 all but one
AXES = {"R": "reachability", "I": "input-dependence", "G": "geometry", "g": "all three axes"}

def claim(name, seconds):
    """Registers a generator of row()'s arguments as the claim `name`."""
    def register(rows):
        @functools.wraps(rows)
        def checked(seed=0, quick=False, show=lambda r: r, **variant):
            return [show(row(name, *columns)) for columns in rows(seed, quick, **variant)]
        CLAIMS[name], SECONDS[name] = checked, seconds
        return checked
    return register

def row(name, what, relation, predicted, measured, tol=0.0, note=""):
    """-> Row, passed if `measured relation predicted` holds within tol; NaN passes nothing."""
    m, p = float(measured), float(predicted)
    gap = {"=": abs(m - p), "<=": m - p, ">=": p - m}[relation]
    return Row(name, what, f"{relation} {p:.4g}", f"{m:.4g}", f"{tol:.1g}", gap <= tol, note)

def spread(values):
    """-> the mean of values, no tolerance, and a note with the standard deviation."""
    t = torch.tensor([float(v) for v in values])
    return t.mean(), 0, f"{t.mean():.2g} +- {t.std():.2g}"

def rng(seed):
    """-> draw(*shape): standard normal float64 from a generator of its own."""
    g = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)

def N(u, norm="outer"):
    """The last axis of u at rms 1 under the outer norm; u itself under any other."""
    return u / u.square().mean(-1, keepdim=True).sqrt() if norm == "outer" else u

def moved(new, old):
    """|new - old| / max(1, |old|) over the last axis; inf where it is undefined."""
    return ((new - old).norm(dim=-1) / old.norm(dim=-1).clamp(min=1)).nan_to_num(nan=math.inf)

def rest(f, h, loops):
    """Iterates states h [..., n] <- f(h) until all rest or `loops` are spent; -> h, residual."""
    for k in range(1, loops + 1):
        old, h = h, f(h)
        if k % 25 == 0 and moved(h, old).max() < 1e-14:
            break
    return h, moved(f(h), h)

def unique(points):
    """The different rows of points [N, n]: two are the same if max |a - b| <= 1e-6."""
    found = points[:0]
    while len(points):
        found = torch.cat((found, points[:1]))
        points = points[(points - points[0]).abs().amax(1) > 1e-6]
    return found

def distinct(points):
    return len(unique(points))

def jacobian(f, s):
    """J [B, n, n] at s [B, n] of a map of [B, n] whose rows do not see each other."""
    with sdpa_kernel(SDPBackend.MATH):      # the fused backward pass cannot be batched
        return torch.func.jacrev(lambda t: f(t).sum(0))(s).transpose(0, 1).detach()

def radius(J):
    """Spectral radius from the dense eigenvalues, [..., n, n] -> [...]."""
    return torch.linalg.eigvals(J).abs().amax(-1)

def slope(x, y):
    """Least-squares slope of y over x, along the first axis."""
    x = torch.as_tensor(x, dtype=y.dtype)
    return torch.tensordot((x - x.mean()) / (x - x.mean()).square().sum(), y, 1)

class Loop:
    """f(h): one turn of a float64 model on states [B, L D], for embedded inputs e [B, L, D]."""
    def __init__(self, model, e):
        self.model, self.e, self.start, self.r = model, e, e.flatten(1), model.recall(e)
    def __call__(self, h):
        return self.model.step(h.view(self.e.shape), self.r).flatten(1)
    def on(self, e):
        """The same model on other inputs."""
        return Loop(self.model, e.view(-1, *self.e.shape[1:]))

def untrained(seed, norm, recall, quick, inputs=8, gain=1.0, rho=None):
    """-> Loop with random weights and 5 random tokens; gain scales W_e, rho is set for W_h."""
    cfg = looped.Config(width=32 if quick else 64, window=0, norm=norm, recall=recall,
                        recall_gain=gain)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = looped.LoopedTransformer(cfg).double().requires_grad_(False)
    if rho:
        model.W_h.weight *= rho / radius(model.W_h.weight)
    return Loop(model, cfg.embed_rms * rng(seed + 10 ** 6)(inputs, 5, cfg.width))

def states(f, marks):
    """-> h_k for k in marks, [len(marks), B, L D], from h_0 = e."""
    h, found = f.start, []
    for k in range(1, max(marks) + 1):
        h = f(h)
        found += [h] if k in marks else []
    return torch.stack(found)

def sensitivity(f, marks, seed):
    """-> h_k, dh_k/de v, dN(h_k)/de v for k in marks [len(marks), B, L D], v random, |v| = 1."""
    v, small = F.normalize(rng(seed)(*f.start.shape)), 1e-5
    around = f.on(torch.cat((f.start, f.start + small * v, f.start - small * v)))
    h, up, down = states(around, marks).chunk(3, 1)         # their differences are good to 1e-10
    up_N, down_N = (N(t.unflatten(2, f.e.shape[1:])).flatten(2) for t in (up, down))
    return h, (up - down) / (2 * small), (up_N - down_N) / (2 * small)
# ---- reachability --------------------------------------------------------------------------------
def scalar_loop(recall, x, y):
    """The toy with state weight x, input weight 1 and block F(u) = y u: a, b of s' = a s + b e."""
    return {"none": (1 + y, 0 * y), "external": ((1 + y) * x, 1 + y),
            "internal": (1 + x * y, y)}[recall]

@claim("R1", 1)
def r1(seed, quick, judge=None):
    """Scalar toy: a fixed point is reached iff |a| < 1, a = 1 + y, (1 + y) x or 1 + x y.

    Derived here: s' = a s + b e is affine, so s_k - s* = a^k (s_0 - s*) with s* = b e / (1 - a).
    """
    n = 2000 if quick else 20000
    x, y = 8 * torch.rand(2, n, generator=torch.Generator().manual_seed(seed)).double() - 4
    for recall, f in (("none", lambda s: s + y * s), ("external", lambda s: (1 + y) * (x * s + 1)),
                      ("internal", lambda s: s + y * (x * s + 1))):
        s = torch.full((n,), 0.3, dtype=x.dtype)
        for _ in range(3000):       # 0.99^3000 = 1e-13: hence the margin of 0.01 round |a| = 1
            s = f(s)
        right, wrong = (scalar_loop(rule, x, y)[0].abs() for rule in (judge or recall, "external"))
        hit, clear = (f(s) - s).abs() < 1e-9, (right - 1).abs() > 0.01
        broken = ((right < 1) != hit)[clear].sum()
        yield f"{recall}: points of {n} that break |a| < 1", "=", 0, broken
    yield "control: internal, by the external a", ">=", 0.05 * n, ((wrong < 1) != hit).sum()

@claim("R2", 5)
def r2(seed, quick, norms=("pre", "peri")):
    """Pre/peri + external recall: rho(W_h) is the regime, bounded iff it is below 1.

    Derived here: sub-layers read N(u), so block(u) - u is bounded and h' = W_h h + W_e e + O(1).
    Below 1 orbits stay in a ball (convergent or not), above 1 they grow at the rate log rho(W_h).
    """
    marks = range(150, 300) if quick else range(350, 700)   # 1.5^700 = 1e123: finite when squared
    def growth(norm, rho):
        f = untrained(seed, norm, "external", quick, 2, rho=rho)
        return slope(marks, states(f, marks).norm(dim=-1).log()).abs().max()
    for norm in norms:
        low = max(growth(norm, rho) for rho in (0.3, 0.58, 0.95))
        high = max(abs(growth(norm, rho) - math.log(rho)) for rho in (1.05, 1.2, 1.5))
        yield f"{norm}: |growth| of log |h| a loop, rho(W_h) <= 0.95", "=", 0, low, 0.02
        yield f"{norm}: |growth - log rho(W_h)|, 1.05 to 1.5", "=", 0, high, 0.02
    yield "control: outer, |growth| at rho(W_h) = 1.5", "=", 0, growth("outer", 1.5), 0.02

@claim("R3", 10)
def r3(seed, quick, norms=("pre", "peri")):
    """Pre/peri with internal or no recall: the state drifts off linearly, nothing is reached.

    Derived here: h' = h + F(N(h), e) + O(1 / |h|) with bounded F, so J - I falls like 1 / |h| and
    nothing contracts far out; |h| grows linearly if F has a mean along the direction that h takes.
    The cosine of successive states then goes to 1, which looks like convergence.
    """
    K = 300 if quick else 3200
    cells = [(norm, recall, 1.0) for norm in norms for recall in ("none", "internal")]
    for norm, recall, gain in cells + [("outer", "internal", STRONG)]:
        f = untrained(seed, norm, recall, quick, 2, gain)
        half, h, after = states(f, (K // 2, K, K + 1))
        power, name = (h.norm(dim=1) / half.norm(dim=1)).log2(), f"{norm} + {recall}"
        worst, cosine = power[(power - 1).abs().argmax()], torch.cosine_similarity(h, after).min()
        if gain > 1:
            yield f"control: {name}: power of k in |h|", "=", 0, worst, 1e-9
            yield f"control: {name}: |h_K+1 - h_K| / |h_K|", "=", 0, moved(after, h).max(), 1e-9
        else:
            near, far = ((jacobian(f, c * h) - torch.eye(h.shape[1])).norm() for c in (1, 100))
            yield f"{name}: power of k in |h|", "=", 1, worst, 0.2
            yield f"{name}: ... while 1 - cos(h_K, h_K+1) is", "<=", 1e-5, 1 - cosine
            yield f"{name}: 100 |J - I| at 100 h / |J - I| at h", "=", 1, 100 * far / near, 1e-2

@claim("R4", 1)
def r4(seed, quick, recall=0.0):
    """Outer norm without recall is power iteration, s' = N(A s).

    Derived here: s = N(A s) means A s = mu s with mu > 0, so fixed points are eigenvectors of
    positive eigenvalues, in two signs; s_k = N(A^k s_0) reaches one iff the dominant eigenvalue is
    real, positive and simple. The limit then holds one bit about the input.
    """
    draw, M, n, D = rng(seed), 30 if quick else 200, 8, 16
    A, e = draw(M, D, D), N(draw(M, n, D))
    eig, V = torch.linalg.eig(A)
    size, order = eig.abs().sort(descending=True)
    top, v = eig.gather(1, order[:, :1])[:, 0], V[torch.arange(M), :, order[:, 0]].real
    real = top.imag.abs() < 1e-12
    ratio = torch.where(real, size[:, 1], size[:, 2]) / size[:, 0]
    clear, wins = ratio < 0.98, real & (top.real > 0)       # 0.98^2000 = 3e-18
    s, residual = rest(lambda s: N(s @ A.mT + recall * e), e, 2000)
    decided = ((residual < 1e-9).all(1) == wins)[clear].double().mean()
    angle = (1 - (s @ N(v)[..., None]).abs() / D)[clear & wins].max()
    w = 3 * torch.linalg.matrix_norm(A, 2)[:, None, None] * e
    strong, _ = rest(lambda s: N(s @ A.mT + w), e, 200)
    yield "share of A where 'dominant eigenvalue > 0' decides", "=", 1, decided
    yield "1 - |cos(limit, dominant eigenvector)|", "=", 0, angle, 1e-9
    yield f"distinct limits of {n} inputs", "<=", 2, max(map(distinct, s[clear & wins]))
    yield f"control: with recall, distinct limits of {n}", "=", n, min(map(distinct, strong))

@claim("R5", 1)
def r5(seed, quick, norm="outer", recall=1.0):
    """Outer norm + recall: reachability is set by recall strength, not by rho(A).

    Paper's abstract: recall + outer norm gives reachable, smooth fixed points. Derived here: let
    s' = N(u), u = A s + w, r = |w| / (sqrt(D) |A|_2). Df = sqrt(D) / |u| (I - u u^T / |u|^2) A and
    |u| >= sqrt(D) |A|_2 (r - 1) on the ball, so Lip(f) <= 1 / (r - 1): above r = 2 a contraction
    with one fixed point, reached from everywhere. (A, w) -> (c A, c w) leaves f as it is.
    """
    draw, M, n, D = rng(seed), 8 if quick else 30, 16, 16
    A, w, start = draw(M, D, D), N(draw(M, n, D)), N(draw(2, M, n, D))
    def run(r, rho, norm=norm, recall=recall):      # -> share reached, 2 limits, Lipschitz quotient
        B = A * (rho / radius(A))[:, None, None]
        u = recall * r * w * torch.linalg.matrix_norm(B, 2)[:, None, None]
        f = lambda s: N(s @ B.mT + u, norm)  # noqa: E731
        (s, residual), (t, _) = (rest(f, h, 300) for h in start)
        pairs = (start, (s, N(s + 1e-3 * start[1])))
        lip = max(((f(a) - f(b)).norm(dim=-1) / (a - b).norm(dim=-1)).max() for a, b in pairs)
        return (residual < 1e-9).double().mean(), torch.stack((s, t)), lip
    for r in (2.01, 4):
        share, limits, lip = zip(*(run(r, rho) for rho in (0.5, 3, 10)))
        apart = (torch.stack(limits) - limits[0][0]).abs().max()
        yield f"r = {r}, rho(A) = 0.5, 3, 10: least share reached", "=", 1, min(share)
        yield f"r = {r}: Lipschitz quotients, bound 1 / (r - 1)", "<=", 1 / (r - 1), max(lip)
        yield f"r = {r}: another start or rho(A) moves the limit by", "=", 0, apart, 1e-9
    yield "control: r = 0.1, share reached", "<=", 0.9, run(0.1, 3)[0]
    yield "control: no recall, share reached", "<=", 0.9, run(4, 3, recall=0)[0]
    yield "control: r = 4, rho(A) = 3, no norm, share reached", "=", 0, run(4, 3, "pre")[0]

@claim("R6", 2)
def r6(seed, quick, norm="outer", recall=1.0):
    """Never unconditional: s' = N(R s + beta e), R a turn of all planes by theta, may not rest.

    Derived here: without recall each state moves by 2 sin(theta / 2) (a sphere is not convex, so
    Brouwer is no help). A fixed point has (mu - R) s = beta e and |s| = |e|, hence
    beta = |mu - e^(i theta)|, with roots mu > 0 iff beta >= sin(theta). J has the eigenvalue
    cos(theta) / mu there and, if D > 2, e^(+-i theta) / mu: it attracts from beta = sin(theta) on
    if D = 2, but only from mu = 1, that is beta = 2 sin(theta / 2), if D > 2.
    """
    n, theta = 16 if quick else 64, 0.8
    turn = complex(math.cos(theta), math.sin(theta))
    def run(D, beta):                   # -> share reached, what s(mu) moves by, least first move
        e, start = N(rng(seed)(2, n, D))

        def times(c, s):
            return torch.view_as_real(c * torch.view_as_complex(s.view(n, -1, 2))).flatten(1)
        f = lambda s: N(times(turn, s) + recall * beta * e, norm)  # noqa: E731
        mu = turn.real + math.sqrt(max(0, beta ** 2 - turn.imag ** 2))
        s, share = times(beta / (mu - turn), e), (rest(f, start, 4000)[1] < 1e-9).double().mean()
        return share, moved(f(s), s).max(), moved(f(start), start).min()
    for D, edge in ((2, turn.imag), (8, 2 * math.sin(theta / 2))):
        below, exists, _ = run(D, 0.95 * edge)          # in 8-D still above sin(theta)
        above, *_ = run(D, 1.05 * edge)
        yield f"D = {D}, beta 5 % below the threshold: share reached", "=", 0, below
        yield f"D = {D}, beta 5 % above the threshold: share reached", "=", 1, above
    yield "D = 8, beta 5 % below: the fixed point exists, moves by", "=", 0, exists, 1e-12
    yield "control: no recall, least move of a state", "=", edge, run(D, 0)[2], 1e-12
# ---- input-dependence ----------------------------------------------------------------------------
@claim("I1", 3)
def i1(seed, quick):
    """Fixed points are isolated for almost all weights, hence countable.

    Paper's abstract: countable without recall. Derived here: for C(s) + b, almost every b makes
    det(I - J) != 0 at all fixed points (Sard), and isolated points of R^n are countable. One sees
    sigma_min(I - J) > 0; and a map of a box into itself has sum sign det(I - J) = 1 over its fixed
    points, which a missed one would break. With a zeroed block all states are fixed points.
    """
    draw, M = rng(seed), 15 if quick else 60
    for D, grid in ((2, 25), (3, 11)):
        cube = torch.cartesian_prod(*[torch.linspace(-1, 1, grid, dtype=torch.float64)] * D)
        index, sigma, count, eye = [], [], [], torch.eye(D)
        for A, b in zip(2 * draw(M, D, D), draw(M, D) / 2):
            f, s = lambda s: torch.tanh(s @ A.T) + b, cube + b
            for _ in range(30):     # Newton's method from each point of the cube
                s = s + torch.linalg.solve_ex(eye - jacobian(f, s), f(s) - s)[0]
            points = unique(s[moved(f(s), s) < 1e-10])
            gap = eye - jacobian(f, points)
            index.append(torch.linalg.det(gap).sign().sum())
            sigma.append(torch.linalg.svdvals(gap).min())
            count.append(len(points))
        note = f"{min(count)} to {max(count)} fixed points"
        yield f"{D}-D: maps of {M} with index sum 1", "=", M, index.count(1), 0, note
        yield f"{D}-D: least sigma_min(I - J)", ">=", 1e-8, min(sigma)
    f = untrained(seed, "outer", "none", True)
    for layer in (f.model.blocks[0].attn.out, f.model.blocks[0].mlp[2]):
        nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    h, _ = rest(f, f.start, 200)
    sigma = torch.linalg.svdvals(torch.eye(h.shape[1]) - jacobian(f, h)).min()
    yield "control: zeroed block, sigma_min(I - J)", "<=", 1e-8, sigma
    yield f"control: zeroed block, distinct limits of {len(h)}", "=", len(h), distinct(h)

def tanh_path(seed, recall, n, loops):
    """Limits of s' = 0.8 s + 0.2 tanh(3 W s + recall e) from s_0 = e, for e on a path from a to -a.

    -> places on the path [m], limits [m, 16] of those m of n inputs that come to rest (W symmetric
    and a small step leave no two-cycles). The loop is odd, so the limits at the two ends differ.
    """
    draw, D = rng(seed), 16
    W, (a, b) = draw(D, D), draw(2, D)
    W, place = (W + W.T) / radius(W + W.T), torch.linspace(0, 1, n, dtype=W.dtype)
    e = torch.outer((math.pi * place).cos(), a) + torch.outer((math.pi * place).sin(), b)
    s, residual = rest(lambda s: 0.8 * s + 0.2 * torch.tanh(3 * s @ W + recall * e), e, loops)
    return place[residual < 1e-12], s[residual < 1e-12]

@claim("I2", 2)
def i2(seed, quick, recall=0.0):
    """Countable fixed points allow no strong input-dependence, in any spectral regime.

    Paper's abstract. Why (derived here): a continuous map from a connected set of inputs into a
    countable set is constant, so the limit only jumps. Linear: rho < 1 forgets e, rho > 1 reaches
    nothing, only rho = 1 exactly keeps e. tanh: along a path of inputs, a staircase.
    """
    draw, D, n = rng(seed), 16, 64
    Q, e, others = torch.linalg.qr(draw(D, D))[0], draw(n, D), 0.9 * torch.tanh(draw(D - 1))
    for rho in (0.5, 0.99, 1 - 1e-4, 1, 1 + 1e-4, 1.01, 2):
        A = Q @ torch.diag(rho * torch.cat((torch.ones(1), others))) @ Q.T      # symmetric
        h = e @ torch.linalg.matrix_power(A, 300 + math.ceil(30 / abs(math.log(rho) or 1)))
        if rho > 1:
            growth = ((h @ A).norm() / h.norm()).log() / math.log(rho)
            yield f"linear, rho = {rho}: growth of log |h| / log rho", "=", 1, growth, 1e-6
        else:
            name, limits = ("", 1) if rho < 1 else ("control: ", n)
            yield f"{name}linear, rho = {rho}: distinct limits of {n}", "=", limits, distinct(h)
    for name, u in (("tanh", recall), ("control: with recall", 4.0)):
        _, s = tanh_path(seed, u, *((501, 1500) if quick else (2001, 4000)))
        moves, count = (s.diff(dim=0).abs().amax(1) > 1e-9).double().mean(), distinct(s)
        sign, few, rare = ("<=", 20, 0.05) if name == "tanh" else ("=", len(s), 1)
        yield f"{name}: distinct limits of {len(s)} inputs on a path", sign, few, count
        yield f"{name}: share of steps along it that move the limit", sign, rare, moves

@claim("I3", 15)
def i3(seed, quick, norm="outer", recall="none"):
    """The real block without recall under outer norm ends in few states, whatever the input.

    Derived here; how few is seen on random weights, not proved. Equal tokens stay equal (attention
    weights sum to 1), and mostly the attractor lies there. |dh_k/de|, the memory of the input, dies
    at the rate log rho(J*).
    """
    share, limits, error = [], [], []
    for i in range(3 if quick else 5):
        f = untrained(10 * seed + i, norm, recall, quick, 8 if quick else 48)
        h, residual = rest(f, f.start, 500 if quick else 2000)
        still = residual < 1e-9
        share.append(still.double().mean())
        limits.append(distinct(h[still]))
        if still.any():
            f, h = f.on(f.e[still][:1]), h[still][:1]
            size = sensitivity(f, range(1, 301), seed)[1].norm(dim=-1)
            k = (size[:, 0] > 1e-8).nonzero()[:, 0]         # above the noise of differences
            k = k[len(k) // 2:]
            error.append((slope(k, size[k].log()) - radius(jacobian(f, h)).log()).abs())
    yield f"{len(share)} models: share of inputs that come to rest", ">=", 0.2, *spread(share)
    yield "most distinct limits of one model's inputs", "<=", 4, max(limits)
    yield "|slope of log |dh_k/de| - log rho(J*)|", "=", 0, max(error, default=math.nan), 0.05
    f = untrained(seed, "outer", "internal", quick, gain=STRONG)
    h, d, _ = sensitivity(f, (100, 200), seed)
    kept = (d[1].norm(dim=-1) / d[0].norm(dim=-1)).min()
    yield "control: internal recall, distinct limits of 8", "=", 8, distinct(h[-1])
    yield "control: internal recall, |dh_k/de|, k = 200 / k = 100", "=", 1, kept, 1e-2

@claim("I4", 20)
def i4(seed, quick, norms=("pre", "peri")):
    """Pre/peri without recall forgets slowly: dN(h_k)/de falls like a power of k. Statistical.

    Derived here from R3: relative to the state steps shrink like 1 / k, so the direction moves in
    log k and still looks input-dependent after hundreds of loops. Outer norm forgets exponentially
    (I3), internal recall less or not at all. At width 32; at 64 the powers are half as large.
    """
    models, t, top = (8, 2, 200) if quick else (16, 2, 400)             # t standard errors
    marks = [top // 8, top // 4, top // 2, top]
    def powers(norm, recall):           # of k, of each model
        runs = (sensitivity(untrained(models * seed + i, norm, recall, True, 16), marks, seed)[2]
                for i in range(models))
        logs = torch.stack([d.norm(dim=-1).log().mean(1) for d in runs], 1)
        return slope([math.log(k) for k in marks], logs)
    def bound(power):                   # of the mean over the models, from above
        return power.mean() + t * power.std() / models ** 0.5
    for norm in norms[:1] if quick else norms:
        power, name = powers(norm, "none"), f"{norm} + none: power of k in |dN(h_k)/de|"
        yield f"{name}, least", ">=", -1, power.min(), 0, spread(power)[2]
        yield f"{name}, mean + {t} errors", "<=", 0, bound(power)
        if not quick:
            more = power - powers(norm, "internal")
            yield (f"control: {norm}, none - internal: mean + {t} errors", "<=", 0,
                   bound(more), 0, spread(more)[2])
    yield "control: outer + none: power of k, median", "<=", -1, powers("outer", "none").median()

@claim("I5", 10)
def i5(seed, quick, norm="outer", recalls=("internal", "external")):
    """With recall the limit is smooth in the input: dh*/de = (I - J)^-1 df/de.

    Paper's abstract: recall + outer norm makes fixed points locally smooth in the input. Derived
    here: the implicit function theorem, wherever I - J is invertible. The outer norm fixes the
    length of each token, so the rank is L D - L.
    """
    def limit(f):
        h, residual = rest(f, f.start, 1500)
        return h if residual.max() < 1e-9 else h * math.nan
    def differences(f, v, small=1e-4):
        return (limit(f.on(f.start + small * v)) - limit(f.on(f.start - small * v))) / (2 * small)
    for recall in recalls:
        f = untrained(seed, norm, recall, quick, 1, gain=STRONG)
        h, v, n = limit(f), rng(seed)(4, f.start.shape[1]), f.start.shape[1]
        J, J_e = jacobian(f, h)[0], jacobian(lambda e: f.on(e)(h), f.start)[0]
        G = torch.linalg.solve(torch.eye(n) - J, J_e)
        exact, rank = v @ G.T, (torch.linalg.svdvals(G.nan_to_num(0, 0, 0)) > 1e-4).sum()
        error = (differences(f, v) - exact).norm() / exact.norm()
        yield f"{norm} + {recall}: implicit against differences", "=", 0, error, 1e-6
        yield f"{norm} + {recall}: rank of dh*/de, L D = {n}", "=", n - 5, rank
    limits = (differences(untrained(10 * seed + i, norm, "none", quick, 1), v) for i in range(9))
    memory = next((d.norm() / v.norm() for d in limits if d.isfinite().all()), math.nan)
    yield "control: no recall, |dh*/de v| / |v| where at rest", "<=", 1e-6, memory
# ---- geometry ------------------------------------------------------------------------------------
@claim("G1", 1)
def g1(seed, quick, norm="outer"):
    """RMSNorm: DN(u) = diag(g) (I - u u^T / (D sigma^2)) / sigma, sigma^2 = |u|^2 / D + eps.

    Derived here: it forgets the length: the radial singular value is eps / sigma^3, the others are
    1 / sigma. So the outer-norm loop of L tokens has L singular values near 0 in J.
    """
    layer, u = looped.RMSNorm(64).double(), rng(seed)(2, 64)
    layer.weight.data = 1 + u[1].abs()
    g, u = layer.weight.detach(), u[:1]
    sigma, J = (u * g / layer(u).detach())[0, 0], jacobian(layer, u)[0]
    formula = g[:, None] * (torch.eye(64) - u.T @ u / (64 * sigma ** 2)) / sigma
    radial, s = 1 - u.square().mean() / sigma ** 2, torch.linalg.svdvals(J / g[:, None])[-1] * sigma
    yield "|DN - formula| / |DN|", "=", 0, (J - formula).norm() / J.norm(), 1e-12
    yield "radial singular value / its formula", "=", 1, s / radial, 1e-6
    for name, kind, zeros in (("", norm, 5), ("control: ", "pre", 0)):
        f = untrained(seed, kind, "external", quick, 1)
        small = (torch.linalg.svdvals(jacobian(f, rest(f, f.start, 100)[0])) < 1e-4).sum()
        yield f"{name}{kind}, 5 tokens: singular values of J < 1e-4", "=", zeros, small

def flat(tensors):
    return torch.cat([t.flatten() for t in tensors if t is not None])

def gradients(f, K, loss):
    """-> |dl/dh_0|, dl/dW [all weights of the loop], h_K, dl/dh_K for l = loss(h_K [B, L, D])."""
    h, W = f.start.clone().requires_grad_(), list(f.model.requires_grad_(True).parameters())
    inputs, f = [h, *W], f.on(f.e)
    for _ in range(K):
        h = f(h)
    dh, dh0, *dW = torch.autograd.grad(loss(h.view(f.e.shape)), [h, *inputs], allow_unused=True)
    return dh0.norm(), flat(dW), h.detach(), dh

@claim("G2", 10)
def g2(seed, quick, norm="outer"):
    """Gradients through K loops converge to the implicit gradient where the loop comes to rest.

    Paper's abstract: stable backpropagation with recall + outer norm. Derived here: dl/dW is a
    series in J of rate rho(J*) with the limit (df/dW)^T (I - J^T)^-1 dl/dh. An expanding loop
    multiplies dl/dh_0 by rho(W_h) a loop, a drifting one (R3) keeps all terms of dl/dW. A head that
    begins with a norm divides by |h_K| and hides that: measured with and without it.
    """
    k, K = (60, 120) if quick else (100, 200)
    def run(norm, recall, head=False, **options):
        """-> Loop, rate of |dl/dh_0| from k to K, dl/dW at both, h_K, dl/dh_K; l = <c, read(h)>."""
        f = untrained(seed, norm, recall, quick, 1, **options)
        c, read = rng(seed)(*f.e.shape), f.model.head[0] if head else nn.Identity()
        (a, dW, *_), late = (gradients(f, loops, lambda h: (c * read(h)).sum()) for loops in (k, K))
        return f.on(f.e), (late[0] / a).log() / (K - k), dW, *late[1:]
    for name in (f"{norm} + internal", f"{norm} + external"):
        f, rate, _, dW, h, dh = run(*name.split(" + "), gain=STRONG)
        J, W = jacobian(f, h)[0], list(f.model.parameters())
        left = torch.linalg.solve(torch.eye(len(J)) - J.T, dh[0])
        exact = flat(torch.autograd.grad(f(h)[0] @ left, W, allow_unused=True))
        error, rate = (dW - exact).norm() / exact.norm(), rate / radius(J).log()
        yield f"{name}: dl/dW of {K} loops - implicit, relative", "=", 0, error, 1e-4
        yield f"{name}: rate of |dl/dh_0| / log rho(J*)", "=", 1, rate, 0.1
    for head, name in ((False, "control, no head: pre"), (True, "control, head norm: pre")):
        rate = run("pre", "external", head, rho=1.2)[1] / math.log(1.2)
        _, _, dW, dW2, *_ = run("pre", "internal", head)
        what, power = "rate of |dl/dh_0| / log rho(W_h)", (dW2.norm() / dW.norm()).log2()
        yield f"{name} + external: {what}", "<=" if head else "=", float(not head), rate, 0.1
        yield f"{name} + internal: power of K in |dl/dW|", "<=" if head else ">=", 0.5, power

@claim("G3", 5)
def g3(seed, quick, norm="outer"):
    """Stronger recall smooths: under outer norm rho(J*) falls like a power of |W_e|.

    Derived here: each norm divides what comes from h by the size of its input, which grows with
    W_e e where recall comes in: at one sub-layer a loop in external recall (power -1), at both in
    internal (-2). Under pre norm W_h h stays, and rho(J*) falls to rho(W_h) only: the control.
    """
    def rhos(norm, recall):
        fs = [untrained(seed, norm, recall, quick, 2, float(4 ** i)) for i in range(6)]
        limits = [rest(f, f.start, 500)[0] for f in fs]
        return torch.stack([radius(jacobian(f, h)).mean() for f, h in zip(fs, limits)]), fs[0]
    for recall, power in (("internal", -2), ("external", -1)):
        rho, _ = rhos(norm, recall)
        got, note = (rho[5] / rho[4]).log() / math.log(4), ", ".join(f"{v:.2g}" for v in rho)
        yield f"{norm} + {recall}: power of gain 256-1024 in rho(J*)", "=", power, got, 0.1, note
    rho, f = rhos("pre", "external")
    ratio = rho[5] / radius(f.model.W_h.weight)
    yield "control: pre + external: rho(J*) / rho(W_h) at gain 1024", "=", 1, ratio, 0.01

def hyperbola(p, q, c):
    """The point of x y = c nearest to (p, q), exactly: a^4 - p a^3 + c q a - c^2 = 0 at x = a."""
    C = torch.zeros(len(p), 4, 4, dtype=p.dtype)        # companion matrix of that polynomial
    C[:, 1:, :3] = torch.eye(3)
    C[:, 0] = torch.stack((p, 0 * p, -c * q, c * c), 1)
    root = torch.linalg.eigvals(C)
    a, unreal = root.real, root.imag.abs() > 1e-6 * root.abs()
    gap = (a - p[:, None]) ** 2 + (c[:, None] / a - q[:, None]) ** 2
    a = a.gather(1, gap.masked_fill(unreal, math.inf).argmin(1)[:, None])[:, 0]
    return a, c / a

def project(recall, x, y):
    """Weights x, y of the scalar toy -> the nearest for which |a| <= 1 (R1), where it held."""
    internal, inside = recall == "internal", scalar_loop(recall, x, y)[0].abs() <= 1
    q = y if internal else 1 + y
    px, py = hyperbola(x, q, torch.full_like(x, -2) if internal else (x * q).sign())
    if internal:                                    # -2 <= x y <= 0; x y > 0: to the nearer axis
        axis, wide = x * y > 0, x.abs() > y.abs()
        px, py = torch.where(axis, x * wide, px), torch.where(axis, y * ~wide, py)
    return torch.where(inside, x, px), torch.where(inside, y, py - (q - y)), inside

@claim("G4", 1)
def g4(seed, quick, recalls=("internal", "external")):
    """Anisotropy: without norm, internal recall is stable only in a lopsided region of weights.

    Derived here, for the toy of R1: internal is stable in -2 <= x y <= 0, with the origin on its
    edge, so half of all small weights are unstable and nearest to an axis, where one weight is 0;
    external in |(1 + y) x| <= 1, which holds a ball round 0. Weights ~ N(0, sigma^2) are projected
    onto the region; balance = min / max of |x|, |y|. A mean log-ratio of the two is an artefact of
    its epsilon: half of its terms are log(max / eps) for internal recall.
    """
    draw, n = rng(seed), 2000 if quick else 10000
    for sigma in (0.1, 0.5, 1, 2, 4):
        (x, y), balance = sigma * draw(2, n), []
        for recall, half, sign, name in zip(recalls, (0.5, 1), (">=", "<="), ("", "control: ")):
            px, py, inside = project(recall, x, y)
            low, high = torch.stack((px.abs(), py.abs())).sort(0)[0]
            balance.append((low / high).mean())
            if sigma == 0.1:
                share = inside.double().mean()
                a, b = (((high + eps) / (low + eps)).log().mean() for eps in (1e-8, 1e-4))
                yield f"sigma = 0.1, {recall}: share inside", "=", half, share, 0.05
                yield (f"{name}{recall}: log-ratio at eps 1e-8 - at 1e-4", sign, 1, a - b, 0,
                       f"{a:.2f} - {b:.2f}")
        note = f"{balance[0]:.3f} / {balance[1]:.3f}"
        yield f"sigma = {sigma}: balance, int / ext", "<=", 0.75, balance[0] / balance[1], 0, note

def reached(a, b, norm, seed):
    """Whether s' = N(a s + b e) comes to rest from a random start, for each of a, b [n]; D = 8."""
    e, s = N(rng(seed + 1)(2, len(a), 8))
    return rest(lambda s: N(a[:, None] * s + b[:, None] * e, norm), s, 2000)[1] < 1e-9

def settles(a, b, norm):
    """The prediction for `reached`."""
    return ((a > 0) & (b != 0)) | (b.abs() > 2 * a.abs()) if norm == "outer" else a.abs() < 1

@claim("G5", 5)
def g5(seed, quick, norm="outer"):
    """Outer norm turns the order of internal and external recall round.

    Paper's abstract: internal recall becomes competitive once outer norm is applied. Derived here:
    the toy of R1 with outer norm, s' = N(a s + b e), moves in the plane of s and e. Its angle to e
    shrinks in each loop if a > 0 (multiplier a / (a + |b|)) and changes sign if a < 0; so it is
    reached from almost everywhere iff a > 0, b != 0 or |b| > 2 |a|; else it ends in a two-cycle of
    cos = b / 2|a|. Without norm it needs |a| < 1.
    """
    draw, n, sigmas = rng(seed), 300 if quick else 2000, (0.1, 0.5, 1, 2, 4)
    x, y = torch.tensor(sigmas).repeat_interleave(n) * draw(2, 5 * n)
    for recall in ("internal", "external"):
        a, b = scalar_loop(recall, x, y)
        t = (b / a).abs()                               # 1.02^-2000 = 6e-18: a margin of 2 %
        clear = (t > 0.02) & ((t / 2 - 1).abs() > 0.02)
        agree = (reached(a, b, norm, seed) == settles(a, b, "outer"))[clear].double().mean()
        yield f"{recall}, {clear.sum()} points: share as predicted", "=", 1, agree
    b, (e, s) = torch.tensor([[1.5], [0.5]]), N(draw(2, 2, 8))
    s, _ = rest(lambda s: N(b * e - s, norm), s, 2000)
    off = ((s * e).mean(1) - b[:, 0] / 2).abs().max()
    yield "two-cycle, b / 2|a| = 0.75, 0.25: cos(s, e) off by", "=", 0, off, 1e-6
    for sigma in sigmas:
        x, y = sigma * draw(2, 100000)
        for m, sign, name in ((norm, 1, "int - ext"), ("pre", -1, "control: no norm, ext - int")):
            o, i = (settles(*scalar_loop(r, x, y), m).double().mean() for r in RECALLS[1:])
            yield (f"sigma = {sigma}: P(reached), {name}", ">=", 0, sign * (i - o), 0,
                   f"int {i:.2f}, ext {o:.2f}")

@claim("grid", 60)
def grid(seed, quick):
    """The untrained block, 4 norms x 3 recalls, several models: which cells have all three axes.

    Paper's abstract: none without recall, reliably so recall + outer norm. Seen on random weights,
    not proved: pre and peri drift (R3) or hang on rho(W_h) (R2), outer norm without recall forgets
    (I3), outer norm with recall has all three once recall is strong enough (R5).
    """
    models, inputs, K = (2, 2, 150) if quick else (5, 8, 1000)
    cells = [(n, r, 1.0) for n in (NORMS[:3:2] if quick else NORMS) for r in RECALLS]
    cells += [(n, r, STRONG) for n, r, _ in cells if n in ("outer", "sandwich") and r != "none"]
    for norm, recall, gain in cells:
        runs = []
        for i in range(models):
            f = untrained(10 * seed + i, norm, recall, quick, inputs, gain)
            (h, after), _, (d, _) = sensitivity(f, (K, K + 1), seed)
            still, rho = moved(after, h) < 1e-9, radius(jacobian(f.on(f.e[:2]), h[:2]))
            runs.append((still.sum(), distinct(h[still]), d.norm(dim=1).median(), rho.mean()))
        still, limits, *_ = columns = list(zip(*runs))
        names = f"at rest of {inputs}", "distinct", "|dN(h)/de|", "rho(J*)"
        if gain > 1:
            test = f"gain {gain:g}: fewest inputs at rest", "=", inputs, min(still)
        elif norm in ("pre", "peri") and recall != "external":
            test = "most inputs at rest", "=", 0, max(still)
        elif recall == "none":
            test = "most distinct limits", "<=", 4, max(limits)
        else:
            test = "inputs at rest that share a limit", "=", 0, sum(still) - sum(limits)
        yield (f"{norm} + {recall}, {test[0]}", *test[1:], 0,
               "  ".join(f"{name} {spread(v)[2]}" for name, v in zip(names, columns)))
# ---- the same measurements on a trained model ----------------------------------------------------
def growth(f, s, steps=50):
    """An estimate of rho(J) at s [B, n] for large n: growth of |J^k v| a loop, k > steps / 2."""
    v, small, sizes = torch.ones_like(s), 1e-5, []
    for _ in range(steps):
        v = F.normalize(v)
        v = (f(s + small * v) - f(s - small * v)) / (2 * small)
        sizes.append(v.norm(dim=1).log())
    return torch.stack(sizes[steps // 2:]).mean(0).exp()

def trained(path, inputs):
    """A run -> model, Loop in float64, x, y of its easy test set; Loop and h* of three inputs.

    Those, if strings, are cut to L D <= 1,024, where the eigenvalues of J take a second.
    """
    model, c = looped.load(path)
    sets = data.splits(model.task, c.seed, c.n_train, c.n_val, c.n_test, c.n_hard, c.data or None)
    x, y = (torch.as_tensor(t[:inputs]).long() for t in (sets["easy"].x, sets["easy"].y))
    double = copy.deepcopy(model).double().requires_grad_(False)
    cut = max(1, 1024 // c.width) if len(model.task.grid) == 1 else None
    g = Loop(double, double.embed(x[:3, :cut]))
    return model, Loop(double, double.embed(x)), x, y, g, rest(g, g.start, 500)[0]

def measure(path, inputs=256, loops=300, seed=0):
    """Seven measurements on the easy test puzzles of a trained run -> {what: value or values}."""
    model, f, x, y, short, s = trained(path, inputs)
    report, few, n = data.progress(f"{path}, step"), f.on(f.e[:8]), short.start.shape[1]
    found = {"run": str(path), "cell": f"{model.cfg.recall} recall, {model.cfg.norm} norm"}
    def note(what, *values):
        found[what] = [float(v) for v in values]
    h, residual = rest(f, f.start, loops)               # 1; a cosine would not tell (R3)
    still, ratio = residual < 1e-9, h.norm(dim=1) / f(f.start).norm(dim=1)
    note("1 share of inputs at rest", still.double().mean())
    note("1 residual; over two loops", residual.median(), moved(f(f(h)), h).median())
    note("1 |h_K| / |h_1|", ratio.median())
    report(1, 3)
    if n <= 2048:
        rhos = [radius(jacobian(short.on(short.e[i]), s[i:i + 1]))[0] for i in range(len(s))]
        note(f"2 rho(J*), L D = {n:,}", *rhos)
    else:
        note(f"2 rho(J*), L D = {n:,}, an estimate", *growth(short, s))
    if hasattr(model, "W_h"):
        note("2 rho(W_h)", radius(f.model.W_h.weight))
    report(2, 3)
    note(f"3 distinct limits of {still.sum()} inputs at rest", distinct(h[still]))
    _, d, _ = sensitivity(few, (30, 100, 500), seed)
    note("3 |dh_k/de|, k = 30, 100, 500", *d.norm(dim=-1).mean(1))
    h = h[:8]
    swapped, _ = rest(few.on(few.e.roll(1, 0)), h, loops)
    note("4 input swapped: from its limit; from the old one",
         moved(swapped, h.roll(1, 0)).median(), moved(swapped, h).median())
    note("5 from h_0 = 0; random: the limit moves by", *(
        moved(rest(few, start, loops)[0], h).median() for start in (0 * h, rng(seed)(*h.shape))))
    for name, head in (("with", f.model.head), ("without", f.model.head[1:])):
        loss = lambda h: F.cross_entropy(head(h).flatten(0, 1), y[:8].flatten())  # noqa: E731
        note(f"6 |dl/dW| {name} head norm, K = 15, 30, 60, 120", *(
            gradients(few, K, loss)[1].norm() for K in (15, 30, 60, 120)))
    exact = []
    for noise in (0, 0.05, 0.1, 0.2):
        noisy, g = copy.deepcopy(model), torch.Generator().manual_seed(seed)
        for p in noisy.parameters():
            p.data *= 1 + noise * torch.randn(p.shape, generator=g)
        exact.append(looped.evaluate(noisy, x[:64], y[:64], (200,))[200]["exact"])
    note("7 exact, weights x (1 + 0, 5, 10, 20 % noise)", *exact)
    report(3, 3)
    return found
# ---- figures, table, command line ----------------------------------------------------------------
@contextmanager
def canvas(folder, name, rows, columns, width, height):
    """-> axes [rows, columns] of a figure that is written to folder/name.png at the end."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise looped.LoopedError("--plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure.subplots(rows, columns, squeeze=False)
    figure.savefig(buffer := io.BytesIO(), format="png", dpi=110)
    folder.mkdir(parents=True, exist_ok=True)
    data.write_atomic(folder / f"{name}.png", buffer.getvalue())

def figures(folder, seed, runs):
    """Writes regions, drift, staircase and spectrum (of the runs, or of new weights) as .png."""
    colours = "#0072B2", "#E69F00", "#009E73", "#CC79A7"        # colour-blind safe
    side = torch.linspace(-4, 4, 160, dtype=torch.float64)
    y, x = (t.flatten() for t in torch.meshgrid(side, side, indexing="ij"))
    with canvas(folder, "regions", 2, 2, 7, 6.8) as axes:
        axes[0, 0].figure.suptitle("blue: a fixed point is reached; orange: predicted edge")
        for i, axis in enumerate(axes.flat):
            recall, norm = RECALLS[2 - i % 2], NORMS[i // 2 * 2]
            a, b = scalar_loop(recall, x, y)
            hit, edge = (t.view(160, 160) for t in (reached(a, b, norm, seed), settles(a, b, norm)))
            axis.pcolormesh(side, side, hit, cmap="Blues", vmax=2)
            axis.contour(side, side, edge, [0.5], colors="#D55E00", linewidths=1)
            axis.set(title=f"{recall} recall, {'outer' if i > 1 else 'no'} norm", aspect="equal",
                     xlabel="state weight x", ylabel="block weight y")
    with canvas(folder, "drift", 2, 3, 10, 5.4) as axes:
        axes[0, 0].figure.suptitle(f"untrained block, recall gain {STRONG:g}; "
                                   "outer and sandwich coincide")
        for (top, low), recall in zip(axes.T, RECALLS):
            for norm, colour in zip(NORMS, colours):
                h = states(untrained(seed, norm, recall, False, 1, STRONG), range(1, 402))[:, 0]
                style = dict(color=colour, linestyle=":" if norm == "sandwich" else "-")
                top.loglog(range(1, 402), h.square().mean(1).sqrt(), label=norm, **style)
                low.loglog(range(1, 401), moved(h[1:], h[:-1]).clamp(min=1e-16), **style)
            top.set(title=f"recall: {recall}", ylabel="rms of the state")
            low.set(xlabel="loops", ylabel="residual")
        axes[0, 0].legend(frameon=False)
    with canvas(folder, "staircase", 1, 2, 8, 3.2) as axes:
        for axis, u, title in zip(axes[0], (0.0, 4.0), ("no recall", "recall")):
            place, s = tanh_path(seed, u, 801, 4000)
            for i, colour in enumerate(colours):
                axis.plot(place, s[:, i], ".", markersize=2, color=colour)
            axis.set(title=title, xlabel="place on a path of inputs", ylabel="limit, 4 coordinates")
    cells = [(Path(run).name, *trained(run, 3)[4:]) for run in runs or ()]
    for name in () if runs else ("pre + internal", "outer + none", "outer + external",
                                 "outer + internal"):
        f = untrained(seed, *name.split(" + "), False, 1, STRONG)
        cells.append((f"{name}, untrained", f, rest(f, f.start, 1000)[0]))
    with canvas(folder, "spectrum", 1, len(cells), 2.9 * len(cells), 3.2) as axes:
        circle = torch.polar(torch.ones(200), torch.linspace(0, 2 * math.pi, 200))
        for axis, (name, f, h) in zip(axes[0], cells):
            eig = torch.linalg.eigvals(jacobian(f.on(f.e[:1]), h[:1])[0])
            axis.plot(circle.real, circle.imag, color="0.6", linewidth=1)
            axis.plot(eig.real, eig.imag, ".", color=colours[0], markersize=3)
            axis.set(title=f"{name}\nrho(J*) = {eig.abs().max():.2f}", aspect="equal")

def claims_table(args):
    """Prints the table of the claims -> what --json writes, exit code."""
    names, table, axis, done = args.only.split(","), [], None, 0
    if wrong := [name for name in names if name not in CLAIMS]:
        raise looped.LoopedError(f"--only {wrong[0]}: no such claim; one of {' '.join(CLAIMS)}")
    report, total = data.progress("seconds of work"), sum(SECONDS[name] for name in names)
    def show(r):
        print(f"{r.claim:4} {r.what:62} {r.predicted:>10} {r.measured:>10} {r.tolerance:>6} "
              f"{'PASS' if r.passed else 'FAIL'}  {r.note}".rstrip(), flush=True)
        return r
    for name in names:
        report(done, total)
        if AXES[name[0]] != axis:
            axis = AXES[name[0]]
            print(f"\n{axis:67} {'predicted':>10} {'measured':>10} {'within':>6}")
        table += CLAIMS[name](args.seed, args.quick, show)
        done += SECONDS[name]
    failed = sorted({r.claim for r in table if not r.passed})
    print(f"\n{len(names)} claims, {len(table)} rows, seed {args.seed}: "
          + (f"FAILED {', '.join(failed)}" if failed else "all hold"))
    result = {"seed": args.seed, "quick": args.quick, "rows": [r._asdict() for r in table]}
    return result, int(bool(failed))

def trained_table(args):
    """Prints the measurements of each run -> what --json writes, exit code."""
    results = []
    for run in args.ckpt:
        results.append(measure(run, seed=args.seed))
        for what, value in results[-1].items():
            values = [value] if isinstance(value, str) else [f"{v:.3g}" for v in value]
            print(f"{what:52}", *values)
        print(flush=True)
    print("| run | hard | at rest | residual | over two loops | distinct limits | rho(J*) | "
          "swapped: new, old input |\n" + "|---" * 8 + "|")
    for r in results:
        one = {what[:3]: values for what, values in reversed(r.items())}    # the first of each kind
        exact, (rest, two) = Path(r["run"], "eval.json"), r["1 residual; over two loops"]
        hard = (f"{list(json.loads(exact.read_text())['hard'].values())[-1]['exact']:.2f}"
                if exact.exists() else "")
        print(f"| {Path(r['run']).name} | {hard} | {r['1 share of inputs at rest'][0]:.0%} | "
              f"{rest:.0e} | {two:.0e} | {one['3 d'][0]:.0f} | {max(one['2 r']):.2f} | "
              "{:.0e}, {:.0e} |".format(*one["4 i"]))
    return results, 0

def main(argv=None):
    """The command line -> exit code: 0, 1 if a claim fails, 2 for a request that cannot be met."""
    parser = data.Parser(prog="theory.py", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="R5,G5", default=",".join(CLAIMS), help="these only")
    parser.add_argument("--quick", action="store_true", help="small sizes, a few seconds")
    parser.add_argument("--json", metavar="FILE", help="write the table there as well")
    parser.add_argument("--plot", metavar="DIR", help="write the figures there as well")
    parser.add_argument("--ckpt", metavar="RUN", nargs="+", help="measure trained runs instead")
    args = parser.parse_args(argv)
    try:
        result, code = (trained_table if args.ckpt else claims_table)(args)
        if args.json:
            data.write_atomic(args.json, json.dumps(result, indent=1).encode())
        if args.plot:
            figures(Path(args.plot), args.seed, args.ckpt)
        return code
    except data.DataError as e:
        print(f"theory.py: {e}", file=sys.stderr)
    except OSError as e:
        print(f"theory.py: {e.filename}: {e.strerror}; choose another place", file=sys.stderr)
    return 2

if __name__ == "__main__":
    torch.set_num_threads(1)        # the matrices are small
    sys.exit(main())
