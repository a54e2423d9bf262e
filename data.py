"""data.py: the tasks of looped.py behind one interface: integer tokens in, one class per token out.

    python data.py --task sudoku --n 3 --level hard    # print puzzles, solutions and ratings
    python data.py --task chess --stats                # quantiles of ratings and sizes
    python data.py --task sudoku --bench               # puzzles made a second on this machine

A puzzle is a row x of L token ids with a row y of L labels; an answer counts when all L are right.
Puzzles are made offline from a seed and proven, none comes from a fixed list. There are two levels:
easy (training, validation, one test) and hard (the other test). Prefix sums: 32 and 512 bits.
Boards (sudoku with one solution, chess mates in one and two with one solving move): rating = how
far an exhaustive search looked; hard = at or above the ratings' 80 % quantile. `path` reads files.
"""
import argparse, bz2, csv, gzip, hashlib, io, itertools, os, random, signal, sys, time  # noqa: E401
import zipfile, zlib  # noqa: E401
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, fields, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import chess
import numpy as np

VERSION = 1     # raise it whenever a seed makes other puzzles than before: caches carry it

class DataError(ValueError):
    """Bad data or an impossible request: the message is one line that says what to do."""

@dataclass
class Puzzles:
    """x [N, L] token ids and y [N, L] labels, both uint8; rating [N], the difficulty."""
    x: np.ndarray
    y: np.ndarray
    rating: np.ndarray
    def __len__(self):
        return len(self.x)
    def __getitem__(self, i):
        return Puzzles(self.x[i], self.y[i], self.rating[i])

def join(parts):
    return Puzzles(*map(np.concatenate, zip(*(vars(p).values() for p in parts))))

def unseen(rows, seen):
    """Indices of the rows that are not in the set `seen`, to which they are added."""
    keys = [row.tobytes() for row in rows]
    return [i for i, key in enumerate(keys) if not (key in seen or seen.add(key))]
# ---- all cores, time left, files -----------------------------------------------------------------
def parallel(job, first=0):
    """Yield job(first), job(first + 1), ... in order, made on all cores until closed."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # a fork needs no main module to import: notebooks work; Ctrl-C is the parent's to handle
    with ProcessPoolExecutor(cores, get_context("fork" if sys.platform == "linux" else "spawn"),
                             signal.signal, (signal.SIGINT, signal.SIG_IGN)) as workers:
        for start in itertools.count(first, 4 * cores):
            yield from workers.map(job, range(start, start + 4 * cores))

def clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"

def progress(what):
    """-> report(done, total): now and then a line with the time left on stderr."""
    start = last = time.monotonic()
    def report(done, total):
        nonlocal last
        now, tty = time.monotonic(), sys.stderr.isatty()
        if done and now - last > (0.5 if tty else 15):
            last, left = now, clock((now - start) * (total - done) / done)
            print(f"{what}: {done:,} of {total:,}, {left} left", file=sys.stderr,
                  end="   \r" if tty and done < total else "\n", flush=True)
    return report

def write_atomic(path, content):
    """bytes -> file: whatever happens, the old file is there or the new, never half of it."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

def load_cache(file):
    """The arrays of a cache file, or {} if it is missing or not what save_cache wrote there."""
    try:
        with np.load(file, allow_pickle=False) as f:
            arrays = dict(f)
        if str(arrays.pop("name", None)) == file.name:
            return arrays
        print(f"{file}: not the cache of that name, making it again", file=sys.stderr)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as e:
        print(f"{file}: unreadable cache, making it again ({e})", file=sys.stderr)
    return {}

def save_cache(file, **arrays):
    content = io.BytesIO()
    np.savez_compressed(content, name=file.name, **arrays)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, content.getvalue())
    except OSError as e:
        print(f"{file}: cannot be kept ({e})", file=sys.stderr)
# ---- what tasks share ----------------------------------------------------------------------------
class Task:
    """The fields of a task's dataclass are its options; what it does not override is as here."""
    window, rope_base = 0, 10.0         # window 0: full attention
    columns, limits = (), None          # of a data file: rating last; cut and largest hard rating
    kinds = {}                          # what --bench measures: name -> options of chunk
    def predict(self, logits):
        """logits [B, L, C] -> labels [B, L]."""
        return logits.argmax(-1)
    def scored(self, x):
        """x [B, L] -> bool [B, L]: the tokens that count for per-token accuracy."""
        return x >= 0
    def augment(self, x, y, generator):
        """x, y [B, L] -> as many other puzzles with their solutions; all on one device."""
        return x, y
    def distinct(self, x, y):
        """x or y: what no two puzzles of a data set may share, whatever their splits."""
        return x
    def cut(self, rating):
        """rating [N] -> the smallest hard one: the 80 % quantile, but above the lowest rating."""
        q, above = np.quantile(rating, 0.8), rating[rating > rating.min()]
        return q if q > rating.min() else above.min(initial=np.iinfo(int).max)
    def text(self, x):
        """tokens [L] -> what `parse` reads."""
        return "".join(self.symbols[v] for v in x)
    def tokens(self, text, symbols):
        """text -> the places [L] of its characters in symbols."""
        for c in set(text) - set(symbols):
            raise DataError(f"{c!r} is none of {symbols}")
        return np.array([symbols.index(c) for c in text], np.uint8)
    def parse(self, text):
        """What a user typed -> x [L], its solution y [L] if there is a proven one, else None."""
        try:
            return self.read(text.strip())
        except ValueError as e:
            raise DataError(f"puzzle {text.strip()!r}: {e}") from None
    def answer(self, text, y):
        """labels y [L] for the puzzle of a text -> a line on whether they solve it."""
        wrong = (self.parse(text)[1] != np.asarray(y)).sum()
        return f"{wrong} of {len(y)} are wrong" if wrong else "solved"
    def make(self, seed, need, cache):
        """-> {level: Puzzles} from as few chunks of the seed as hold need {level: count}.

        Chunks depend on options, seed and index alone: not on the number of cores, nor on the
        cache, which keeps all that were made, also when interrupted.
        """
        options = "-".join(map(str, (self.name, *astuple(self), "seed", seed, f"v{VERSION}")))
        file, report = Path(cache) / f"{options}.npz", progress(f"making {self.name}")
        old, parts, have = load_cache(file), [], []
        if old:
            ends = old.pop("ends")
            parts = [Puzzles(**old)[a:b] for a, b in itertools.pairwise(ends)]
        kept, seen = len(parts), {r.tobytes() for p in parts for r in self.distinct(p.x, p.y)}
        more = parallel(partial(self.chunk, seed), max(kept, 1))
        try:
            for used in itertools.count(1):
                if used > len(parts):   # one chunk is often enough and not worth the processes
                    new = next(more) if used > 1 else self.chunk(seed, 0)
                    parts.append(new[unseen(self.distinct(new.x, new.y), seen)])
                rating = np.concatenate([p.rating for p in parts[:used]])
                hard = rating >= self.cut(rating)
                have.append({"easy": (~hard).sum(), "hard": hard.sum()})
                short = [k for k in need if have[-1][k] < need[k]]
                if not short:
                    pool = join(parts[:used])
                    return {"easy": pool[~hard][:need["easy"]], "hard": pool[hard][:need["hard"]]}
                for k in short:
                    if used > 20 and have[-1][k] - have[-21][k] < 20:
                        raise DataError(f"{self.name}: hardly more than {have[-1][k]:,} different "
                                        f"{k} puzzles can be made, {need[k]:,} asked for")
                report(sum(min(have[-1][k], need[k]) for k in need), sum(need.values()))
        finally:
            more.close()
            if len(parts) > kept:
                save_cache(file, ends=np.cumsum([0, *map(len, parts)]), **vars(join(parts)))
    def paint(self, i, y, paint):
        """The text of label y[i], decorated by paint(i, text) if there is one."""
        return paint(i, self.symbols[y[i]]) if paint else self.symbols[y[i]]
# ---- prefix sums ---------------------------------------------------------------------------------
START = 2       # the token before the bits

@dataclass(frozen=True)
class PrefixSums(Task):
    """y_i = (x_1 + ... + x_i) mod 2: the last label needs the first bit, however long the string.

    With the paper's window of 5 tokens one loop moves information 2 places, so L bits need about
    L / 2 loops: more than training ever used as soon as the test strings are longer.

    A start token comes first (label 0). Without it (positions "relative", as in the paper) it must
    find the edge by itself, and windows that shift inwards hide it: in a string that begins with
    five or more ones the first tokens see five equal neighbours, as they would in the middle of a
    run, and softmax weights sum to 1, so position does not show.
    """
    bits: int = 32
    hard_bits: int = 512
    positions: str = "absolute"
    name, vocab, classes, window, rope_base = "prefix_sums", 3, 2, 5, 1e4
    symbols, size, chance = "01", "ones", "half of the sums would be right"
    def __post_init__(self):
        for flag in ("bits", "hard_bits"):
            if getattr(self, flag) < 1:
                raise DataError(f"--{flag} {getattr(self, flag)}: must be at least 1")
        if self.positions not in ("absolute", "relative"):
            raise DataError(f"--positions {self.positions}: choose absolute or relative")
    @property
    def grid(self):
        return (self.bits + self.front,)
    @property
    def front(self):
        return int(self.positions == "absolute")    # start tokens
    def scored(self, x):
        return x != START
    def puzzles(self, bits):
        """bits [N, n] -> Puzzles, with the start token if there is one."""
        front, sums = ((0, 0), (self.front, 0)), np.bitwise_xor.accumulate(bits, 1)
        return Puzzles(np.pad(bits, front, constant_values=START), np.pad(sums, front),
                       np.full(len(bits), bits.shape[1]))
    def make(self, seed, need, cache):
        rng, seen, out = np.random.default_rng(seed), set(), {}
        for level, flag in (("easy", "bits"), ("hard", "hard_bits")):
            bits, taken = getattr(self, flag), len(seen) if self.bits == self.hard_bits else 0
            n, x = need[level], np.empty((0, bits), np.uint8)
            if n + taken > 2 ** bits:
                raise DataError(f"--{flag} {bits}: only {2 ** bits:,} strings for {n + taken:,} "
                                f"puzzles, at least --{flag} {(n + taken - 1).bit_length()} needed")
            while len(x) < n:                   # repetitions are drawn again
                more = rng.integers(0, 2, (n - len(x), bits), np.uint8)
                x = np.concatenate((x, more[unseen(more, seen)]))
            out[level] = self.puzzles(x)
        return out
    def text(self, x):
        return super().text(x[self.scored(x)])
    def show(self, x, y=None, paint=None):
        """The bits and, below them, their sums; 64 to a line."""
        lines = []
        for some in (range(i, min(i + 64, len(x))) for i in range(self.front, len(x), 64)):
            lines.append("bits  " + self.text(x[some.start:some.stop]))
            if y is not None:
                lines.append("sums  " + "".join(self.paint(i, y, paint) for i in some))
        return "\n".join(lines)
    def read(self, text):
        p = self.puzzles(self.tokens("".join(text.split()) or " ", self.symbols)[None])
        return p.x[0], p.y[0]
# ---- sudoku: many boards at once -----------------------------------------------------------------
# cand [L, M] uint16: bit d - 1 of a cell says that digit d is still possible there. Boards lie on
# the last axis, so that each numpy operation runs over thousands of them.

BOX = {4: (2, 2), 6: (2, 3), 9: (3, 3)}         # side -> rows and columns of a box
# with cells as [band, row in band, stack, column in stack]: the axes of a row, a column, a box
UNITS = (2, 3), (0, 1), (1, 3)

def deduce(cand, box):
    """One round of naked, then hidden singles -> new candidates [L, M], contradiction found [M]."""
    h, w = box
    g = cand.reshape(w, h, h, w, -1)
    single = np.where(g & (g - 1), 0, g)
    fixed, hidden, bad = np.zeros_like(g), np.zeros_like(g), np.zeros_like(g[0, 0, 0, 0])
    for unit in UNITS:
        f = np.bitwise_or.reduce(single, unit, keepdims=True)
        total = np.add.reduce(single, unit, dtype=g.dtype, keepdims=True)
        bad |= np.bitwise_or.reduce(total ^ f, (0, 1, 2, 3))        # a digit twice in a unit
        fixed |= f
    g = (g & ~fixed) | single
    for unit in UNITS:
        cells = np.moveaxis(g, unit, (0, 1))
        once, twice = np.zeros_like(cells[0, 0]), np.zeros_like(cells[0, 0])
        for cell in itertools.chain(*cells):
            twice |= once & cell
            once |= cell
        bad |= np.bitwise_and.reduce(once, (0, 1)) ^ ((1 << h * w) - 1)     # a digit nowhere
        hidden |= np.expand_dims(once & ~twice, unit)
    hidden &= g
    bad |= np.bitwise_or.reduce(hidden & (hidden - (hidden > 0)), (0, 1, 2, 3))
    new = np.where(hidden, hidden, g).reshape(cand.shape)
    return new, (bad != 0) | ~new.all(0)

def solve(cand, box, limit=2, width=256):
    """cand [L, N] -> solutions found (up to limit) [N], one of them [L, N], placements tried [N].

    A cell with the fewest candidates is branched on; each candidate is one tentative placement.
    Their number is a puzzle's rating: with a single solution the search is exhaustive, so it does
    not depend on the order of the search.
    """
    N = cand.shape[1]
    owner = np.arange(N)                # whose position a column of cand is; sorted, latest last
    found, tried, solution = np.zeros(N, int), np.zeros(N, int), np.zeros_like(cand)
    while len(owner):
        # depth first for all boards at once, the k latest positions of each: all of them would
        # grow exponentially on boards with many solutions
        k = max(1, width // len(np.unique(owner)))
        pick = np.searchsorted(owner, owner, "right") - np.arange(len(owner)) <= k
        old, who = cand.compress(pick, 1), owner[pick]
        new, dead = deduce(old, box)
        stable = (new == old).all(0) & ~dead
        moving = ~(stable | dead)
        boards = [cand.compress(~pick, 1), new.compress(moving, 1)]
        owners = [owner[~pick], who[moving]]

        new, who = new.compress(stable, 1), who[stable]
        size = np.bitwise_count(new)
        done = (size == 1).all(0)
        solution[:, who[done]] = new.compress(done, 1)
        found += np.bincount(who[done], minlength=N)
        cell = np.where(size > 1, size, 99).argmin(0)
        options = np.where(done, 0, new[cell, np.arange(len(who))])
        for d in range(box[0] * box[1]):
            at = np.flatnonzero(options >> d & 1)
            child = new.take(at, 1)
            child[cell[at], np.arange(len(at))] = 1 << d
            boards.append(child)
            owners.append(who[at])
        tried += np.bincount(np.concatenate(owners[2:]), minlength=N)
        owner = np.concatenate(owners)
        order = owner.argsort(kind="stable")
        order = order[found[owner[order]] < limit]
        cand, owner = np.concatenate(boards, 1).take(order, 1), owner[order]
    return found, solution, tried

def solved_grids(rng, N, box):
    """-> N full boards [L, N]: random digits in random tightest cells, starting again if stuck.

    Every grid that exists can come up, though not all are equally likely.
    """
    n = box[0] * box[1]
    full = np.uint16((1 << n) - 1)
    cand = np.full((n * n, N), full)
    while True:
        new, dead = deduce(cand, box)
        stable = (new == cand).all(0) & ~dead
        cand = np.where(dead, full, new)
        size = np.bitwise_count(cand)
        at = np.flatnonzero(stable & (size > 1).any(0))
        if stable.all() and not len(at):
            return cand
        size = size.take(at, 1)
        cell = np.where(size > 1, size + rng.random(size.shape, np.float32), 99).argmin(0)
        options = cand[cell, at] >> np.arange(n, dtype=np.uint16)[:, None] & 1
        cand[cell, at] = 1 << (rng.random(options.shape, np.float32) * options).argmax(0)

def remove_clues(rng, grid, box, keep):
    """grid [L, N] -> puzzle [L, N]: clues go in random order while the solution stays unique, that
    is, while no solution has another digit there; down to keep [N] clues, or until all are needed.
    """
    L, N = grid.shape
    full, puzzle, clues = np.uint16((1 << box[0] * box[1]) - 1), grid.copy(), np.full(N, L)
    for cell in rng.random((L, N)).argsort(0):
        board = np.flatnonzero(clues > keep)
        trial = puzzle.take(board, 1)
        trial[cell[board], np.arange(len(board))] ^= full
        board = board[solve(trial, box, limit=1)[0] == 0]
        puzzle[cell[board], board] = full
        clues[board] -= 1
    return puzzle

@dataclass(frozen=True)
class Sudoku(Task):
    """Tokens: 0 (blank) and 1..side; labels: the digit of every cell.

    Rating = tentative placements of `solve`; 0: naked and hidden singles suffice. Puzzles are
    minimal (every clue is needed) and all from different grids. 4x4 is a toy: a model can memorise
    its 288 grids, and nearly all puzzles fall to singles. There the rating is the number of blanks,
    easy has 7 to 10 clues and hard 4 or 5, and only the puzzles differ. 6x6 has 28,200,960 grids.
    """
    side: int = 9
    name, symbols, size, columns = "sudoku", ".123456789", "clues", ("question", "answer", "rating")
    kinds = {"unique, rated puzzles": {}}
    def __post_init__(self):
        if self.side not in BOX:
            raise DataError(f"--side {self.side}: choose 4, 6 or 9")
        n = self.side                           # class 0 is never a label
        chance = f"1/{n} of the blank cells (those that count as tokens) would be right"
        vars(self).update(grid=(n, n), box=BOX[n], vocab=n + 1, classes=n + 1, chance=chance)
    def scored(self, x):
        return x == 0
    def distinct(self, x, y):
        return x if self.side == 4 else y
    def cut(self, rating):
        return 10 if self.side == 4 else super().cut(rating)
    def chunk(self, seed, index, n=1024):
        """The index-th lot of puzzles of a seed."""
        rng, keep = np.random.default_rng((seed, index)), np.zeros(n, int)
        if self.side == 4:
            keep[::2] = rng.integers(7, 11, n // 2)
        grid = solved_grids(rng, n, self.box)
        puzzle = remove_clues(rng, grid, self.box, keep)
        found, solution, rating = solve(puzzle, self.box)
        assert (found == 1).all() and (solution == grid).all(), "not exactly one solution"
        y = np.bitwise_count(grid - 1) + 1
        x = np.where(np.bitwise_count(puzzle) == 1, y, 0).astype(np.uint8)
        p = Puzzles(x.T.copy(), y.T.copy(), (x == 0).sum(0) if self.side == 4 else rating)
        return p[p.rating != 10] if self.side == 4 else p
    def augment(self, x, y, generator):
        """Digits renamed; bands, stacks, rows, columns permuted; half transposed if boxes allow."""
        import torch        # here: a process that only makes puzzles starts faster without it
        (h, w), n, B = self.box, self.side, len(x)

        def order(*shape):                                      # random, of the last axis
            return torch.rand(B, *shape, device=x.device, generator=generator).argsort(-1)

        rows = (order(w)[..., None] * h + order(w, h)).view(B, n, 1)
        columns = (order(h)[..., None] * w + order(h, w)).view(B, 1, n)
        cell = rows * n + columns                               # [B, n, n]
        if h == w:
            cell = torch.where(order(2)[..., :1, None] == 0, cell, cell.mT)
        digit = torch.nn.functional.pad(order(n) + 1, (1, 0)).to(x.dtype)       # 0 stays blank
        return tuple(digit.gather(1, t.gather(1, cell.flatten(1)).long()) for t in (x, y))
    def show(self, x, y=None, paint=None):
        """The board with its boxes; with y its digits in the blanks."""
        (h, w), n, cells = self.box, self.side, list(self.text(x))
        for i in [] if y is None else np.flatnonzero(np.asarray(x) == 0).tolist():
            cells[i] = self.paint(i, y, paint)
        stacks = [" ".join(cells[i:i + w]) for i in range(0, n * n, w)]
        rows = [" | ".join(stacks[i:i + h]) for i in range(0, n * h, h)]
        rule = "\n" + "-+-".join(["-" * (2 * w - 1)] * h) + "\n"
        return rule.join("\n".join(rows[i:i + h]) for i in range(0, n, h))
    def tokens(self, text, symbols=symbols):
        if len(text) != self.side ** 2:
            raise DataError(f"{len(text)} characters, not the {self.side ** 2} of side {self.side}")
        return super().tokens(text.replace("0", "."), symbols[:self.side + 1])
    def read(self, text):
        x = self.tokens("".join(text.split()))
        cand = np.where(x, 1 << (x.astype(int) - 1).clip(0), (1 << self.side) - 1)
        found, y, _ = solve(cand.astype(np.uint16)[:, None], self.box)
        if found[0] != 1:
            raise DataError("several solutions" if found[0] else "no solution")
        return x, np.bitwise_count(y[:, 0] - 1) + 1
    def convert(self, question, answer):
        """Fields of a file -> x, y [L], or ValueError with the reason."""
        x, y = self.tokens(question), self.tokens(answer)
        if ((x > 0) & (x != y)).any():
            raise ValueError("the answer contradicts a clue")
        g = (1 << y.astype(int)).reshape(*self.box[::-1], *self.box)
        if any((np.bitwise_or.reduce(g, unit) != (2 << self.side) - 2).any() for unit in UNITS):
            raise ValueError("the answer breaks a rule")
        return x, y
# ---- chess ---------------------------------------------------------------------------------------
def checks(board):
    """Legal moves but castling that give check, and a few more."""
    us, king, occupied = board.turn, board.king(not board.turn), board.occupied
    diagonal = chess.BB_DIAG_ATTACKS[king][chess.BB_DIAG_MASKS[king] & occupied]
    line = (chess.BB_RANK_ATTACKS[king][chess.BB_RANK_MASKS[king] & occupied]
            | chess.BB_FILE_ATTACKS[king][chess.BB_FILE_MASKS[king] & occupied])
    pawn = chess.BB_PAWN_ATTACKS[not us][king] | chess.BB_BACKRANKS     # promotions change piece
    pawn |= chess.BB_SQUARES[board.ep_square] if board.ep_square else 0
    reach = 0, pawn, chess.BB_KNIGHT_ATTACKS[king], diagonal, line, diagonal | line, 0
    for move in board.generate_pseudo_legal_moves():
        # the piece gives check from its new square, or it may uncover one by leaving its line
        if (chess.BB_SQUARES[move.to_square] & reach[board.piece_type_at(move.from_square)]
                or chess.BB_SQUARES[move.from_square] & (diagonal | line)) and board.is_legal(move):
            yield move

def solutions(board, depth):
    """-> [first moves that force mate in depth moves, not fewer], positions visited to prove it.

    Castling does not mate here: generated positions have no right to it.
    """
    found, visited, refutations = [], 0, []
    for move in list(board.legal_moves if depth > 1 else checks(board)):
        board.push(move)
        # what refuted earlier moves often refutes this one
        replies = (sorted(board.legal_moves, key=refutations.__contains__, reverse=True)
                   if depth > 1 else [])
        works, visited = bool(replies) if depth > 1 else board.is_checkmate(), visited + 1
        for reply in replies:
            board.push(reply)
            works, n = solutions(board, depth - 1)
            board.pop()
            visited += n + 1
            if not works:
                refutations.append(reply)
                break
        board.pop()
        found += [move] if works else []
    return found, visited

def one_pair(moves):
    """Do all moves agree in their squares? (Promotions to different pieces count as one.)"""
    return len({(m.from_square, m.to_square) for m in moves}) == 1

def game(rng):
    """The positions of a random legal game, without castling and en passant."""
    board = chess.Board()
    board.castling_rights = 0
    for ply in range(200):
        moves = list(board.legal_moves)
        if not moves:
            return
        board.push(rng.choice(moves))
        board.ep_square = None
        if ply > 8:
            yield board

def placement(rng):
    """One position: on random squares White's king with 6 to 10 pieces, Black's with 2 to 8."""
    army = [chess.PAWN] * 8 + [chess.KNIGHT, chess.BISHOP, chess.ROOK] * 2 + [chess.QUEEN]
    board, squares = chess.Board(None), rng.sample(chess.SQUARES, 20)
    for color, least, most in (chess.WHITE, 6, 10), (chess.BLACK, 2, 8):
        for piece in [chess.KING] + rng.sample(army, rng.randint(least, most)):
            square = squares.pop()
            if piece != chess.PAWN or 8 <= square < 56:
                board.set_piece_at(square, chess.Piece(piece, color))
    if board.is_valid():
        yield board

def flip(board):
    """square ^ flip(board): the square as the side to move sees it, its king on files e to h."""
    return (0 if board.turn else 56) | (7 if board.king(board.turn) % 8 < 4 else 0)

def encode(board, move=None):
    """-> tokens x [64], marks y [64] of the move's squares, both as the side to move sees them."""
    planes = [board.pawns, board.knights, board.bishops, board.rooks, board.queens, board.kings,
              board.occupied_co[not board.turn]]
    bits = np.unpackbits(np.array(planes, "<u8").view(np.uint8), bitorder="little").reshape(7, 64)
    x, y = np.array([1, 2, 3, 4, 5, 6, 6]) @ bits, np.zeros(64, np.uint8)
    if move:
        y[[move.from_square ^ flip(board), move.to_square ^ flip(board)]] = 1
    return x[np.arange(64) ^ flip(board)].astype(np.uint8), y

@dataclass(frozen=True)
class Chess(Task):
    """Tokens: 0 empty, 1-6 own pawn, knight, bishop, rook, queen, king, 7-12 the opponent's; from
    a1, b1 on. Labels: 1 on the two squares of the move to find, 0 elsewhere.

    The side to move plays upwards, and the board is mirrored if its king is on files a to d. Not
    encoded: colour, castling and en passant rights (generated positions have none), the piece of a
    promotion. Ten mates in one (half from random games, half random placements) come with one mate
    in two (placements), all with one solving pair of squares. Rating = positions visited by the
    proof: hundreds for a mate in two, for a mate in one the moves that may give check; so the hard
    ones are all mates in two and the mates in one with most checks.
    """
    name, symbols, size, vocab, classes, grid = "chess", ".PNBRQKpnbrqk", "pieces", 13, 2, (8, 8)
    columns, limits = ("FEN", "Moves", "Rating"), (1601, 2000)
    chance = ".969 of the squares would be right, with nothing marked"
    kinds = {"mates in one": {"numbers": (20, 0)}, "mates in two": {"numbers": (0, 2)}}
    def predict(self, logits):
        """The two squares with the largest mark logit; logits [B, 64, 2] -> labels [B, 64]."""
        mark = logits[..., 1] - logits[..., 0]
        return mark.new_zeros(mark.shape, dtype=int).scatter(-1, mark.topk(2, -1).indices, 1)
    def chunk(self, seed, index, numbers=(20, 2)):
        """The index-th lot of puzzles of a seed: so many mates in one and in two."""
        rng, rows = random.Random(f"{seed} {index}"), []
        while len(rows) < sum(numbers):
            in_two = len(rows) >= numbers[0]
            for board in (placement if in_two or len(rows) % 2 else game)(rng):
                found, visited = solutions(board, 1)
                if in_two:
                    found, visited = ([], 0) if found else solutions(board, 2)
                if one_pair(found):
                    rows.append((*encode(board, found[0]), visited))
                    break
        return Puzzles(*map(np.array, zip(*rows)))
    def board(self, x):
        """tokens [64] -> the position as it is encoded, White to move."""
        board = chess.Board(None)
        for i in np.flatnonzero(x).tolist():
            board.set_piece_at(i, chess.Piece.from_symbol(self.symbols[x[i]]))
        return board
    def text(self, x):
        return self.board(x).fen()
    def show(self, x, y=None, paint=None):
        """The board with the side to move below; with y its two squares in brackets, the move."""
        cells = [f" {c} " for c in self.board(x).unicode(empty_square="\u00b7").split()]
        marked = [] if y is None else np.flatnonzero(y).tolist()
        for i in marked:
            j = i ^ 56                          # python-chess prints a8 first
            cells[j] = f"[{cells[j].strip()}]"
            cells[j] = paint(i, cells[j]) if paint else cells[j]
        lines = ["".join(cells[i:i + 8]) for i in range(0, 64, 8)]
        return "\n".join(lines + ([self.answer(self.text(x), y)] if marked else []))
    def read(self, text):
        """The solution is there if exactly one move mates at once."""
        board = chess.Board(text)
        if not board.is_valid() or not any(board.legal_moves):
            raise DataError("the game is over" if board.is_valid() else
                            f"not legal, {board.status().name}")
        found = [move for move in board.legal_moves if "#" in board.san(move)]
        return encode(board, found[0]) if one_pair(found) else (encode(board)[0], None)
    def answer(self, text, y):
        """The move that marks y [64] mean in the position of a FEN, and whether it mates."""
        board = chess.Board(text)
        squares = {int(i) ^ flip(board) for i in np.flatnonzero(y)}
        moves = [f"{board.san(m)} ({m.uci()})" for m in board.legal_moves
                 if {m.from_square, m.to_square} == squares]
        for move in moves:                      # of several promotions one that mates
            if "#" in move:
                return f"{move}: mate"
        return (f"{moves[0]}: no mate at once" if moves else
                " and ".join(map(chess.square_name, sorted(squares))) + ": no legal move")
    def convert(self, fen, moves):
        """Fields of a file -> x, y [64], or ValueError: the first move leads to the position, the
        second is the one to find."""
        board, (first, second) = chess.Board(fen), (moves.split() + ["", ""])[:2]
        if not board.is_valid() or "0000" in (first, second):
            raise ValueError("no legal position, or no move")
        board.push(board.parse_uci(first))
        return encode(board, board.parse_uci(second))

TASKS = {t.name: t for t in (PrefixSums(), Sudoku(), Chess())}
# ---- public data sets ----------------------------------------------------------------------------
def open_text(path):
    opener = {".gz": gzip.open, ".bz2": bz2.open}.get(Path(path).suffix, open)
    if path.endswith(".zst"):
        try:
            from zstandard import open as opener
        except ImportError:
            raise DataError(f"{path}: needs `pip install zstandard`, or unpack it") from None
    return opener(path, "rt", encoding="utf-8-sig", newline="")

def read_rows(path, columns):
    """Yield line number, [text of each column] for the rows of a CSV file with a header."""
    try:
        with open_text(path) as f:
            reader = csv.reader(f)
            header = next(reader, [])
            for c in columns:
                if c not in header:
                    raise DataError(f"{path} line 1: no column {c!r}, needs {', '.join(columns)}")
            where = [header.index(c) for c in columns]
            for row in filter(None, reader):
                yield reader.line_num, [row[i] if i < len(row) else "" for i in where]
    except DataError:
        raise
    except Exception as e:      # each decompressor has its own
        raise DataError(f"{path}: cannot be read ({e})") from None

def read_file(task, path, need, cut, top, seen):
    """-> {level: Puzzles}: the file's first need[level] rows that are not in `seen`.

    easy: rating < cut; hard: cut <= rating <= top. Bad rows are reported; more than 1 % of them,
    or too few good ones, is a DataError.
    """
    found, rows, bad, report = {k: [] for k in need}, 0, [], progress(f"reading {path}")
    least = 1000        # the share of bad rows among the first few says little
    for line, (*texts, rating) in read_rows(path, task.columns):
        if all(len(found[k]) == need[k] for k in need) or len(bad) > max(rows, least) / 100:
            break
        rows += 1
        try:
            level = "easy" if int(rating) < cut else "hard"
            if int(rating) <= top and len(found[level]) < need[level]:
                x, y = task.convert(*texts)
                if unseen([task.distinct(x, y)], seen):
                    found[level].append((x, y, int(rating)))
                    report(sum(map(len, found.values())), sum(need.values()))
        except ValueError as e:
            bad.append(f"line {line}: {e}")
    else:
        least = 0       # the whole file was read
    if bad:
        message = f"{path}: {len(bad):,} bad rows of {rows:,}: {'; '.join(bad[:3])}"
        if len(bad) > max(rows, least) / 100:
            raise DataError(message)
        print(message, file=sys.stderr)
    for k in need:
        if len(found[k]) < need[k]:
            raise DataError(f"{path}: only {len(found[k]):,} different {k} puzzles (hard: {cut:g} "
                            f"to {top:g}), {need[k]:,} asked for")
    empty = np.empty((2, 0, np.prod(task.grid)), np.uint8)
    return {k: Puzzles(*map(np.array, zip(*f))) if f else Puzzles(*empty, np.empty(0, int))
            for k, f in found.items()}

def from_files(task, path, n_fit, n_test, n_hard, cache):
    """FILE or TRAIN,TEST -> {level: Puzzles}, easy = n_fit puzzles to fit and n_test to test.

    Of two files the second serves for both tests. Levels are those of the first.
    """
    paths, digest = path.split(","), hashlib.sha256(repr((task, n_fit, n_test, n_hard)).encode())
    if not task.columns or len(paths) > 2:
        raise DataError(f"--data {path}: {task.name} reads "
                        + ("FILE or TRAIN,TEST" if task.columns else "no file"))
    for p in paths:
        try:
            with open(p, "rb") as f:
                digest.update(repr((os.stat(p).st_size, os.stat(p).st_mtime_ns)).encode())
                for block in iter(partial(f.read, 1 << 20), b""):
                    digest.update(block)
        except OSError as e:
            raise DataError(f"--data {p}: {e.strerror}") from None
    name = f"{task.name}-{Path(paths[0]).name}-{digest.hexdigest()[:16]}-v{VERSION}.npz"
    old = load_cache(Path(cache) / name)
    if not old:
        ratings = [] if task.limits else [r for _, (*_, r) in read_rows(paths[0], task.columns)]
        rating = np.array([r for r in ratings if r.isdecimal()] or [0], int)
        cut, top = task.limits or (Task.cut(task, rating), np.inf)
        seen = set()
        fit = read_file(task, paths[0], {"easy": n_fit, "hard": 0}, cut, top, seen)
        test = read_file(task, paths[-1], {"easy": n_test, "hard": n_hard}, cut, top, seen)
        levels = {"easy": join((fit["easy"], test["easy"])), "hard": test["hard"]}
        old = {f"{k} {name}": a for k, p in levels.items() for name, a in vars(p).items()}
        save_cache(Path(cache) / name, **old)
    return {k: Puzzles(*(old[f"{k} {f.name}"] for f in fields(Puzzles))) for k in ("easy", "hard")}
# ---- splits, and looking at them -----------------------------------------------------------------
def splits(task, seed, n_train, n_val, n_test, n_hard, path=None, cache="out/cache"):
    """-> {"train", "val", "easy", "hard": Puzzles} of n_train, n_val, n_test, n_hard puzzles.

    path: None to make them, or "FILE" or "TRAIN,TEST". No puzzle is in two splits, for 9x9 and
    6x6 sudoku no solution either. DataError says what is impossible.
    """
    for flag, n in zip(("seed", "n_train", "n_val", "n_test", "n_hard"),
                       (seed, n_train, n_val, n_test, n_hard)):
        if n < 0:
            raise DataError(f"--{flag} {n}: must be at least 0")
    fit = n_train + n_val
    levels = (from_files(task, path, fit, n_test, n_hard, cache) if path else
              task.make(seed, {"easy": fit + n_test, "hard": n_hard}, cache))
    easy, order = levels["easy"], np.random.default_rng(seed).permutation(fit)
    return {"train": easy[order[:n_train]], "val": easy[order[n_train:]], "easy": easy[fit:],
            "hard": levels["hard"]}

def stats(task, split):
    """Print the quantiles of ratings and sizes of both levels."""
    percent = 0, 5, 25, 50, 75, 95, 100
    print(f"{'quantiles in %':26}" + "".join(f"{q:7}" for q in percent))
    for level in ("easy", "hard"):
        p = split[level]
        for name, values in (("rating", p.rating), (task.size, (p.x > 0).sum(1))):
            row = "".join(f"{v:7.0f}" for v in np.percentile(values, percent))
            print(f"{len(p):7,} {level:5} {name:12}" + row)

def bench(task, seconds=10):
    """Print how many puzzles a second all cores make, without the time to start them."""
    for what, options in task.kinds.items():
        chunks, made = parallel(partial(task.chunk, 0, **options)), 0
        next(chunks)
        start = time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds:
            made += len(next(chunks))
        print(f"{made / elapsed:,.0f} {what} a second")
        chunks.close()

class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line instead of the usage."""
        self.exit(2, f"{self.prog}: {message}\n")

def main():
    parser = Parser(description="print puzzles of a task")
    parser.add_argument("--task", choices=TASKS, default="prefix_sums")
    parser.add_argument("--level", choices=("easy", "hard"), default="easy")
    parser.add_argument("--n", type=int, default=3, help="how many puzzles")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", metavar="FILE|TRAIN,TEST", help="read puzzles instead")
    parser.add_argument("--stats", action="store_true", help="print quantiles of n of each level")
    parser.add_argument("--bench", action="store_true", help="print the puzzles made a second")
    for f in itertools.chain(*map(fields, TASKS.values())):
        parser.add_argument(f"--{f.name}", type=f.type, default=f.default)
    args = parser.parse_args()
    try:
        task = TASKS[args.task]
        task = replace(task, **{f.name: getattr(args, f.name) for f in fields(task)})
        if args.bench:
            return bench(task)
        n = [args.n if args.stats or args.level == level else 0 for level in ("easy", "hard")]
        split = splits(task, args.seed, 0, 0, *n, args.data)
    except DataError as e:
        parser.error(str(e))
    if args.stats:
        return stats(task, split)
    for x, y, rating in zip(*vars(split[args.level]).values()):
        print(task.text(x), task.show(x), task.show(x, y), f"rating {rating}\n", sep="\n\n")

if __name__ == "__main__":
    main()
