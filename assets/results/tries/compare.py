"""Another chance for boards that do not converge: which kind pays, at equal loops?

    python assets/results/tries/compare.py RUN --json FILE rename,0,512,0,0.25 push,1,128,0,0.25

All kinds begin alike: `per_try` loops from h_0 = e. A board that has not converged by then gets
another chance, and another, until it converges or has had `budget` loops in all:

    on        it simply goes on
    rename    another form of the board, from its own h_0: what --tries does
    push      it goes on from where it is, plus noise
    restart   from h_0 plus noise
    path      from h_0, with noise in each of the first per_try / 2 loops, as in PTRM
              (arXiv 2605.19943)

Noise is Gaussian, sigma times the rms of a token. All loops are damped, h <- (1 - d) step(h) + d h,
and in each of them a share `skip` of the tokens, drawn anew, keeps its state.
"""
import argparse
import json
import sys
from pathlib import Path

import torch

# the project's own modules lie at the top level
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import data
import looped

TOL = 1e-3
MARKS = (128, 256, 512, 1024, 2048, 2560)


def noisy(h, sigma, generator):
    """h [N, L, D] with noise of sigma times the rms of each token."""
    rms = h.square().mean(-1, keepdim=True).sqrt()
    return h + sigma * rms * torch.randn(h.shape, generator=generator)


def loop_on(model, x, h, loops, damping, skip, sigma, generator):
    """Up to `loops` loops of boards x [N, L] from h [N, L, D], the first half with noise.

    -> h, where each board stopped; the loop in which it converged [N], 0 if it did not.
    """
    h = h.clone()
    r = model.recall_term(model.embed(x))
    when = torch.zeros(len(x), dtype=torch.long)
    for t in range(1, loops + 1):
        moving = (when == 0).nonzero()[:, 0]
        for part in moving.split(looped.chunk_size(x)):
            old = h[part]
            new = model.step(old, r[part])
            converged = looped.relative_change(new, old) < TOL
            new = new.lerp(old, damping)
            draw = torch.rand(new[..., :1].shape, generator=generator)
            new = torch.where(draw < skip, old, new)
            if sigma > 0 and t <= loops // 2:
                new = noisy(new, sigma, generator)
                converged[:] = False
            h[part] = new
            when[part[converged]] = t
    return h, when


@torch.inference_mode()
def compare(model, x, y, kind, sigma, per_try, damping, skip, budget, seed):
    """-> record: boards that converge, how many are right, loops, and a curve of right ones."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros_like(y)
    used = torch.zeros(len(x), dtype=torch.long)
    converged = torch.zeros(len(x), dtype=torch.bool)
    h = model.embed(x)
    for first_loop in range(0, budget, per_try):
        left = (~converged).nonzero()[:, 0]
        if len(left) == 0:
            break
        again = first_loop > 0
        form = x[left]
        start = h[left]
        path_sigma = 0.0
        undo = None
        if again and kind == "rename":
            form, undo = model.task.rename(form, generator)
            start = model.embed(form)
        elif again and kind == "push":
            start = noisy(start, sigma, generator)
        elif again and kind == "restart":
            start = noisy(model.embed(form), sigma, generator)
        elif again and kind == "path":
            start = model.embed(form)
            path_sigma = sigma

        loops = min(per_try, budget - first_loop)
        h[left], when = loop_on(model, form, start, loops, damping, skip, path_sigma,
                                generator)
        logits = model.readout(h[left])
        if undo is not None:
            logits = undo(logits)

        # the answer is that of the first try until one converges (where it goes on, the latest)
        now = when > 0
        keep = now | (not again or kind == "on")
        labels[left[keep]] = model.task.predict(logits)[keep]
        used[left] += torch.where(now, when, loops)
        converged[left[now]] = True

    right = (labels == y).all(-1)
    sure = converged & right
    return {
        "kind": kind, "sigma": sigma, "per_try": per_try, "damping": damping, "skip": skip,
        "budget": budget,
        "boards": len(x), "converged": converged.sum().item(), "sure": sure.sum().item(),
        "right": right.sum().item(), "loops": used.double().mean().item(),
        "curve": {t: (sure & (used <= t)).sum().item() for t in MARKS if t <= budget},
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("--n", type=int, default=256, help="boards")
    parser.add_argument("--level", default="hard", choices=("easy", "hard"))
    parser.add_argument("--files", help="boards from TRAIN,TEST instead of generated ones")
    parser.add_argument("--seed", type=int, default=0, help="of the boards and of the noise")
    parser.add_argument("--budget", type=int, default=2560, help="most loops of a board")
    parser.add_argument("--json", required=True, metavar="FILE", help="a line is added for each")
    parser.add_argument("cells", nargs="+", metavar="KIND,SIGMA,PER_TRY,DAMPING,SKIP")
    args = parser.parse_args()

    model, _ = looped.load(args.run)
    sets = data.splits(model.task, args.seed, 0, 0, args.n, args.n, args.files)
    boards = sets[args.level]
    x = torch.as_tensor(boards.x).long()
    y = torch.as_tensor(boards.y).long()
    for cell in args.cells:
        kind, *numbers = cell.split(",")
        sigma, per_try, damping, skip = map(float, numbers)
        run = "/".join(Path(args.run).parts[-2:])
        record = {"run": run, "seed": args.seed, "level": args.level}
        record |= compare(model, x, y, kind, sigma, int(per_try), damping, skip, args.budget,
                          args.seed)
        print(json.dumps(record), flush=True)
        with open(args.json, "a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
