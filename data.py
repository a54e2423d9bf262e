"""data.py: the tasks of looped.py, all in one shape: integer tokens in, one class per token out.

    python data.py --task sudoku --side 6 --n 3 --level hard    # print puzzles with their answers
    python data.py --task chess --files lichess_db_puzzle.csv   # the same from a public data set

A puzzle is a row x of L token ids with a row y of L labels; an answer counts when all L are right.
Generated puzzles follow from the seed (and the versions of numpy and chess), and each is proven to
have one solution. Those that take long are kept in out/cache, which may be deleted at any time.

There are two levels, "easy" (trained on) and "hard" (only tested on), and four splits: an easy
puzzle goes to "train", "val" or "easy", the easy test set; a hard one to "hard", the hard test set.
Which of the three an easy one joins depends on a hash of it (see split_of), not on how many are
asked for: so asking for more never moves a puzzle from training into a test or back.

Reading order: what every task has (Task); prefix sums, sudoku, chess; then the machinery: splits,
cache and processes, data files, command line. A new task is one class, and its instance in TASKS.
"""
import argparse
import csv
import functools
import gzip
import hashlib
import io
import itertools
import os
import random
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from multiprocessing import get_context
from pathlib import Path

import chess
import numpy as np


class UserError(ValueError):
    """Bad data or an impossible request: the message is one line that says what to do.

    exit_code: 2 for a request that cannot be met, 1 for work that failed, 130 for work stopped.
    """

    def __init__(self, message, exit_code=2):
        super().__init__(message)
        self.exit_code = exit_code


@dataclass
class Puzzles:
    """x [N, L] token ids and y [N, L] labels, both uint8; rating [N], the difficulty, which decides
    the level (of strings their length does).

    Indexed by an int, or in a for loop, it gives single puzzles: x [L], y [L], one rating.
    """

    x: np.ndarray
    y: np.ndarray
    rating: np.ndarray

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return Puzzles(self.x[i], self.y[i], self.rating[i])


# --------------------------------------------------------------------------------------------------
# what every task has


class Task:
    """One kind of puzzle: a frozen dataclass, whose fields are its options.

    A subclass must set every attribute below that has no value, and write chunk, draw and read, and
    also convert if it sets `columns`. Set attributes without an annotation (name = "mine") or as a
    property: what is annotated (size: int = 9) is a field of the dataclass, and so an option.

    Options are int, float or str. In looped.py an option can be set if Config has a field of the
    same name whose tasks= hold your task's name; the default there wins. (`positions`, if you have
    that field, is set for all tasks.) If it shapes hard puzzles alone, add it to MAY_CHANGE there,
    too (what --resume may change). Defaults for training are a line in DEFAULTS there; what it
    leaves out comes from COMMON.

    The model gives a board an embedding for each cell. A string has nothing but RoPE, so a start
    token, without which nothing marks its ends, is the task's own affair: see PrefixSums.
    """

    name: str           # what --task calls it
    grid: tuple         # (rows, columns) of a board, or (tokens,) of an easy string
    vocab: int          # tokens are 0 .. vocab - 1
    classes: int        # labels are 0 .. classes - 1
    symbols: str        # symbols[token] and symbols[label] are the characters of those that show
    levels: dict        # {"easy": phrase, "hard": phrase}: describes generated puzzles to a user

    # base of the rotary angles (rotary_table in looped.py): 10 suits the few places of a board, 1e4
    # a string
    rope_base = 10.0

    # True: chunks take long, so they are made on all cores and kept in the cache
    slow = False

    # ---- what every task has to write. chunk makes puzzles; read is its part of parse(), which
    # reads what text() writes for the command line, and draw its part of show()

    def chunk(self, seed, index):
        """Chunk number `index` (0, 1, ...) of a seed -> {"easy": Puzzles, "hard": Puzzles}.

        A chunk is a batch of some dozens or more: splits() takes one after the other until it has
        enough. It must depend on seed, index and options alone. Whether a puzzle is easy or hard
        must follow from the puzzle alone, or else it could be trained on and be a hard test, too.
        """
        raise NotImplementedError

    def draw(self, x, answers):
        """x [L] -> a picture as text; answers {i: text of token i's answer}, may be empty.

        An answer may be wider than its symbol: --watch adds a mark.
        """
        raise NotImplementedError

    def read(self, text):
        """A puzzle as text() writes it, perhaps with spaces -> x [L], solution y [L] or None.

        Raises ValueError (such as UserError) if it is no puzzle, or a board of another size.
        """
        raise NotImplementedError

    # ---- training and evaluation

    def keys(self, x, y):
        """x, y [N, L] -> keys [N, K]. Of puzzles with equal keys only the first is used, and a hash
        of the key decides the split."""
        return x

    def loss(self, logits, y):
        """logits [B, L, C], labels [B, L] -> scalar."""
        # torch is imported where it is needed: processes that only make puzzles start faster
        import torch.nn.functional as F

        return F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())

    def predict(self, logits):
        """logits [B, L, C] -> labels [B, L]."""
        return logits.argmax(-1)

    def scored(self, x):
        """x, numpy or torch -> bool of its shape: the tokens that are counted singly and shown.

        Loss and "solved" take all tokens, so that the others need labels, too.
        """
        return x >= 0       # all of them

    def augment(self, x, y, generator):
        """Torch x, y [B, L] -> x, y [B, L] to train on instead: symmetric forms, for example.

        generator: one on the device of x. What comes out should hardly ever be a puzzle of a test.
        """
        return x, y

    def rename(self, x, generator):
        """Torch x [B, L] -> x2, a random symmetric form of each; undo(logits of x2) -> those of x.

        For --tries: needed if your task is in the tasks= of Config.tries in looped.py.
        """
        raise NotImplementedError

    # ---- data files, for a task that reads some

    # the columns of a file, the rating last; () if there are no files
    columns = ()

    # (lowest hard rating, highest that is used); None: the hardest fifth is hard, all are used
    file_limits = None

    def convert(self, *texts):
        """A row's columns without the rating -> x [L], y [L]; ValueError with the reason."""
        raise NotImplementedError

    def verify(self, x, y):
        """Rows, x, y [N, L] -> N messages, "" where all is well; another one ends the reading."""
        return [""] * len(x)

    # ---- text

    def text(self, x):
        """x [L] -> what `parse` reads."""
        return "".join(self.symbols[token] for token in x)

    def tokens(self, text, symbols):
        """text -> the places [L] of its characters in symbols."""
        for c in text:
            if c not in symbols:
                raise UserError(f"{c!r} is none of {symbols}")
        return np.array([symbols.index(c) for c in text], np.uint8)

    def parse(self, text):
        """What a user typed -> x [L], solution y [L] if one is proven, else None; or UserError."""
        text = text.strip()
        try:
            return self.read(text)
        except ValueError as error:
            raise UserError(f"puzzle {text!r}: {error}") from None

    def answer_texts(self, x, y):
        """x, y [L] -> {i: text of label y[i]} for the tokens i whose labels are worth showing."""
        return {i: self.symbols[y[i]] for i in np.flatnonzero(self.scored(x)).tolist()}

    def show(self, x, y=None, mark=None):
        """x [L] -> a picture as text, with y also the answers; mark(i, text) decorates one."""
        x = np.asarray(x)
        answers = {}
        if y is not None:
            answers = self.answer_texts(x, np.asarray(y))
        if mark is not None:
            answers = {i: mark(i, text) for i, text in answers.items()}
        return self.draw(x, answers)

    def verdict(self, text, y):
        """The text of a puzzle and labels y [L] -> one line on whether they solve it."""
        x, solution = self.parse(text)
        if solution is None:
            return "no solution is known to compare with"
        wrong = solution != np.asarray(y)
        if wrong.any():
            asked = self.scored(x) | wrong      # a clue that was changed counts, too
            return f"{wrong.sum()} of {asked.sum()} are wrong"
        return "solved"


# --------------------------------------------------------------------------------------------------
# prefix sums

START = 2               # the token before the bits
MOST_BITS = 65536       # one chunk of such strings takes about 200 MB


@dataclass(frozen=True)
class PrefixSums(Task):
    """The parity of the bits so far. For 4 bits:

        puzzle   1 1 0 1
        tokens   2 1 1 0 1      a start token, then the bits
        labels   0 1 0 0 1      y_i = (x_1 + ... + x_i) mod 2, and 0 at the start token

    The last label needs the first bit, however long the string. A window (--window) has 5 tokens,
    as in the paper, two on either side; at an end of the string it is moved inwards, so that it is
    full there, too. So one loop moves information 2 places (4 into the last token): 512 bits need
    255 loops, while in training a string gets 21 at most.

    Why a start token? Without it (--positions relative, as in the paper) nothing marks the first
    bit: attention knows distances only, and windows at the ends are full. If a string begins with
    five ones or more, its first tokens see five equal tokens, as in the middle of a run, and
    attention averages five equal values, whatever its weights.

    Rating: the number of bits.
    """

    bits: int = 32
    hard_bits: int = 512
    positions: str = "absolute"

    name = "prefix_sums"
    vocab = 3
    classes = 2
    symbols = "01"
    rope_base = 1e4

    def __post_init__(self):
        for option in ("bits", "hard_bits"):
            length = getattr(self, option)
            if not 1 <= length <= MOST_BITS:
                raise UserError(f"--{option} {length}: must be 1 to {MOST_BITS}")
        # or else a string could be trained on and be a hard test, too
        if self.bits == self.hard_bits:
            raise UserError(f"--hard_bits {self.hard_bits}: must differ from --bits")
        if self.positions not in ("absolute", "relative"):
            raise UserError(f"--positions {self.positions}: choose absolute or relative")

    @property
    def levels(self):
        return {"easy": f"{self.bits} bits", "hard": f"{self.hard_bits} bits"}

    @property
    def front(self):
        """How many start tokens there are, 0 or 1."""
        return int(self.positions == "absolute")

    @property
    def grid(self):
        return (self.bits + self.front,)

    def scored(self, x):
        return x != START

    def puzzles(self, bits):
        """bits [N, n] -> Puzzles, with the start token if there is one."""
        sums = np.bitwise_xor.accumulate(bits, axis=1)
        padding = ((0, 0), (self.front, 0))
        x = np.pad(bits, padding, constant_values=START)
        y = np.pad(sums, padding)
        return Puzzles(x, y, np.full(len(bits), bits.shape[1]))

    def chunk(self, seed, index):
        # two streams of random numbers, so that neither level depends on the other's length
        easy_rng = np.random.default_rng((seed, index, 0))
        hard_rng = np.random.default_rng((seed, index, 1))
        easy = easy_rng.integers(0, 2, (1024, self.bits), np.uint8)
        hard = hard_rng.integers(0, 2, (128, self.hard_bits), np.uint8)
        return {"easy": self.puzzles(easy), "hard": self.puzzles(hard)}

    def keys(self, x, y):
        return x[:, self.front:]

    def text(self, x):
        return super().text(x[self.scored(x)])

    def draw(self, x, answers):
        """The bits and, below them, their sums; a line holds 64 characters."""
        # answers may carry a mark, so they may be wider than a bit
        width = max(map(len, answers.values()), default=1)
        lines = []
        per_line = 64 // width
        for start in range(self.front, len(x), per_line):
            places = range(start, min(start + per_line, len(x)))
            bits = [bit.ljust(width) for bit in self.text(x[places])]
            lines.append("bits  " + "".join(bits).rstrip())
            if answers:
                lines.append("sums  " + "".join(answers[i] for i in places))
        return "\n".join(lines)

    def read(self, text):
        bits = self.tokens("".join(text.split()), self.symbols)
        if not 1 <= len(bits) <= MOST_BITS:
            raise UserError(f"{len(bits)} bits, must be 1 to {MOST_BITS}")
        puzzle = self.puzzles(bits[None])
        return puzzle.x[0], puzzle.y[0]


# --------------------------------------------------------------------------------------------------
# sudoku: many boards at once
#
# For one board a solver is a few lines:
#
#     repeat until nothing changes:                                   deduce
#         a cell with one candidate left: strike it from the row, column and box
#         a digit with one cell left in a row, column or box: it goes there
#     no candidate left somewhere: a dead end; one left everywhere: a solution
#     else for each candidate of a cell with the fewest:              branch
#         solve the board with that candidate alone in the cell       solve
#
# In Python that is slow, so here each numpy operation runs over many boards, on the last axis.
# cand [L, M] uint16 are the candidates of M boards: bit d - 1 of a cell says that digit d is still
# possible there.

# a band is a row of boxes, a stack a column of boxes. With cells as [band, row in band, stack,
# column in stack] these axes span a row, a column, a box
UNITS = ((2, 3), (0, 1), (1, 3))


def all_digits(box):
    """The candidates of a blank cell: every digit is possible."""
    return np.uint16((1 << box[0] * box[1]) - 1)


def deduce(cand, box):
    """One round of naked, then hidden singles -> new candidates [L, M], contradiction found [M]."""
    height, width = box
    # boxes have height x width cells, so there are `width` bands and `height` stacks; g is cand as
    # [band, row in band, stack, column in stack, board]
    g = cand.reshape(width, height, height, width, -1)
    bad = np.zeros_like(g[0, 0, 0, 0])                  # [M]: digits that contradict, or 0

    # naked singles: a cell's only candidate is impossible in the rest of its row, column and box.
    # The sum of different bits is their union (010 + 100 = 110), and where a digit occurs twice it
    # is not (010 + 010 = 100)
    single = np.where(g & (g - 1), 0, g)
    fixed = np.zeros_like(g)
    for unit in UNITS:
        union = np.bitwise_or.reduce(single, unit, keepdims=True)
        total = np.add.reduce(single, unit, dtype=g.dtype, keepdims=True)
        bad |= np.bitwise_or.reduce(total ^ union, (0, 1, 2, 3))        # a digit twice in a unit
        fixed |= union
    g = (g & ~fixed) | single

    # hidden singles: a digit that has one cell left in a unit goes there
    hidden = np.zeros_like(g)
    for unit in UNITS:
        cells = np.moveaxis(g, unit, (0, 1))
        once = np.zeros_like(cells[0, 0])
        twice = np.zeros_like(cells[0, 0])
        for cell in itertools.chain(*cells):
            twice |= once & cell
            once |= cell
        bad |= np.bitwise_and.reduce(once, (0, 1)) ^ all_digits(box)    # a digit nowhere in a unit
        hidden |= np.expand_dims(once & ~twice, unit)
    hidden &= g
    bad |= np.bitwise_or.reduce(hidden & (hidden - 1), (0, 1, 2, 3))     # two of them in a cell

    new = np.where(hidden, hidden, g).reshape(cand.shape)
    return new, (bad != 0) | ~new.all(0)


def branch(cand, owner, digits):
    """Stuck boards cand [L, M] of puzzles owner [M] -> children, and the puzzles they are of.

    A child is the board with one candidate tried in a cell that has the fewest. Both results are
    lists, an entry for each digit.
    """
    size = np.bitwise_count(cand)
    cell = np.where(size > 1, size, 99).argmin(0)
    choices = cand[cell, np.arange(len(owner))]

    children = []
    owners = []
    for d in range(digits):
        parent = np.flatnonzero(choices >> d & 1)
        child = cand.take(parent, 1)
        child[cell[parent], np.arange(len(parent))] = 1 << d
        children.append(child)
        owners.append(owner[parent])
    return children, owners


def solve(cand, box, limit=2):
    """cand [L, N] -> solutions found (at most limit) [N], one of them [L, N], guesses made [N].

    Naked and hidden singles (see deduce) are filled in until nothing changes; then each candidate
    of a cell with the fewest is tried, which is a guess. Their number is a puzzle's rating. With
    one solution and limit 2 the whole tree is searched, so that the rating depends neither on the
    order of the search nor on how many boards are worked on together.
    """
    N = cand.shape[1]
    at_once = 256           # about so many boards, though at least one of each puzzle
    found = np.zeros(N, int)
    guesses = np.zeros(N, int)
    solution = np.zeros_like(cand)

    # the boards still to be worked on: column j of cand is one of puzzle owner[j]; sorted by
    # puzzle, and the latest of a puzzle last
    owner = np.arange(N)
    while len(owner):
        # depth first, for all puzzles at once: only the `share` latest boards of each, as all of
        # them would grow exponentially where there are many solutions
        share = max(1, at_once // len(np.unique(owner)))
        # behind: 1 for the latest board of a puzzle, 2 for the one before it, ...
        behind = np.searchsorted(owner, owner, "right") - np.arange(len(owner))
        pick = behind <= share
        old = cand.compress(pick, 1)
        who = owner[pick]

        # contradictions are dropped, boards that changed are kept for another round
        new, dead = deduce(old, box)
        stable = (new == old).all(0) & ~dead
        moving = ~(stable | dead)
        boards = [cand.compress(~pick, 1), new.compress(moving, 1)]
        owners = [owner[~pick], who[moving]]

        # boards that stand still are solved or stuck
        new = new.compress(stable, 1)
        who = who[stable]
        done = (np.bitwise_count(new) == 1).all(0)
        solution[:, who[done]] = new.compress(done, 1)
        found += np.bincount(who[done], minlength=N)
        children, child_owners = branch(new.compress(~done, 1), who[~done], box[0] * box[1])
        guesses += np.bincount(np.concatenate(child_owners), minlength=N)

        # the children are the latest; a puzzle with enough solutions is left alone
        cand = np.concatenate(boards + children, 1)
        owner = np.concatenate(owners + child_owners)
        order = owner.argsort(kind="stable")
        order = order[found[owner[order]] < limit]
        cand = cand.take(order, 1)
        owner = owner[order]
    return found.clip(max=limit), solution, guesses


def solved_grids(rng, N, box):
    """-> N solved boards, as candidates [L, N]: where deduction stops, a random digit is put into a
    random one of the cells with the fewest candidates.

    A board with a contradiction starts again. Every grid that exists can come up, though not all
    are equally likely.
    """
    n = box[0] * box[1]
    blank = all_digits(box)
    cand = np.full((n * n, N), blank)
    while True:
        new, dead = deduce(cand, box)
        stable = (new == cand).all(0) & ~dead
        cand = np.where(dead, blank, new)
        size = np.bitwise_count(cand)
        stuck = np.flatnonzero(stable & (size > 1).any(0))
        if stable.all() and not len(stuck):
            return cand

        # boards where deduction stands still get a random digit in one of their tightest cells
        size = size.take(stuck, 1)
        noise = rng.random(size.shape, np.float32)
        cell = np.where(size > 1, size + noise, 99).argmin(0)
        choices = cand[cell, stuck] >> np.arange(n, dtype=np.uint16)[:, None] & 1
        digit = (rng.random(choices.shape, np.float32) * choices).argmax(0)
        cand[cell, stuck] = 1 << digit


def remove_clues(rng, grid, box, keep):
    """Solved boards grid [L, N] -> puzzles [L, N], both as candidates, with one solution each.

    In random order a clue is removed if no solution has another digit in its cell. It ends at
    keep [N] clues, or when every clue that is left is needed.
    """
    L, N = grid.shape
    blank = all_digits(box)
    puzzle = grid.copy()
    clues = np.full(N, L)
    for cell in rng.random((L, N)).argsort(0):          # cell [N]: another one for each board
        # if another digit in this cell has a solution, the clue must stay
        index = np.flatnonzero(clues > keep)
        trial = puzzle.take(index, 1)
        trial[cell[index], np.arange(len(index))] ^= blank      # all digits but the clue
        found = solve(trial, box, limit=1)[0]

        index = index[found == 0]
        puzzle[cell[index], index] = blank
        clues[index] -= 1
    return puzzle


# --------------------------------------------------------------------------------------------------
# sudoku: the task


@dataclass(frozen=True)
class Side:
    """What differs between boards of side 4, 6 and 9."""

    box: tuple          # rows and columns of a box
    easy: int           # the largest easy rating
    hard: int           # the lowest hard rating; a puzzle between the two is dropped
    levels: dict


SIDES = {
    # a toy, see Sudoku.toy
    4: Side((2, 2), easy=9, hard=11, levels={"easy": "7 to 10 clues", "hard": "4 or 5 clues"}),
    # 28,200,960 grids, but only 49 up to symmetry: the puzzles of a test are new (a few are images
    # of training puzzles), while their grids are all images of training grids
    6: Side((2, 3), easy=0, hard=1,
            levels={"easy": "singles suffice (rating 0)", "hard": "rating 1 and more"}),
    # 6.7e21 grids, 5.5e9 up to symmetry
    9: Side((3, 3), easy=4, hard=5,
            levels={"easy": "at most 4 guesses", "hard": "5 guesses and more"}),
}


@dataclass(frozen=True)
class Sudoku(Task):
    """Every digit once in each row, column and box. For side 4, row by row:

        puzzle   1.3. .4.. 2..3 ..2.
        tokens   1030 0400 2003 0020    0 is a blank
        labels   1234 3412 2143 4321    the digits of the solution, clues included

    Rating: the guesses of `solve`, which proves that there is one solution; 0 means that naked and
    hidden singles suffice. Puzzles are minimal, every clue is needed, and no two of
    a data set share a solution. Side 4 differs, see toy.
    """

    side: int = 9

    name = "sudoku"
    symbols = ".123456789"
    columns = ("question", "answer", "rating")
    slow = True

    def __post_init__(self):
        if self.side not in SIDES:
            raise UserError(f"--side {self.side}: choose 4, 6 or 9")

    @property
    def toy(self):
        """Side 4: of 288 grids a model can memorise all, and nearly all puzzles fall to singles.

        So it is rated by blanks, every second puzzle keeps 7 to 10 clues, and solutions recur. It
        is not augmented: most easy puzzles of a test are symmetric images of training puzzles.
        """
        return self.side == 4

    @property
    def box(self):
        return SIDES[self.side].box

    @property
    def levels(self):
        return SIDES[self.side].levels

    @property
    def grid(self):
        return (self.side, self.side)

    @property
    def vocab(self):
        return self.side + 1

    @property
    def classes(self):
        return self.side + 1        # class 0 is never a label

    def scored(self, x):
        return x == 0

    def keys(self, x, y):
        return x if self.toy else y

    def chunk(self, seed, index, n=1024):
        side = SIDES[self.side]
        rng = np.random.default_rng((seed, index))
        least, most = (7, 10) if self.toy else (0, 0)       # clues that every second puzzle keeps
        keep = np.zeros(n, int)
        keep[::2] = rng.integers(least, most + 1, len(keep[::2]))

        # make them, then prove once more that each has one solution
        grid = solved_grids(rng, n, self.box)
        puzzle = remove_clues(rng, grid, self.box, keep)
        found, solution, guesses = solve(puzzle, self.box)
        assert (found == 1).all() and (solution == grid).all(), "not exactly one solution"

        y = self.digits(grid)
        x = np.where(np.bitwise_count(puzzle).T == 1, y, 0).astype(np.uint8)
        p = Puzzles(x, y, (x == 0).sum(1) if self.toy else guesses)
        return {"easy": p[p.rating <= side.easy], "hard": p[p.rating >= side.hard]}

    def digits(self, grid):
        """Solved boards, as candidates [L, N] -> digits [N, L]."""
        return np.bitwise_count(grid - 1).T + np.uint8(1)      # bit d - 1 has d - 1 bits below it

    def prove(self, x):
        """x [N, L] -> solutions [N, L], and N reasons why x is no puzzle, "" where it is one."""
        bits = np.array([all_digits(self.box)] + [1 << d for d in range(self.side)], np.uint16)
        found, solution, _ = solve(bits[x].T, self.box)

        reasons = np.array(["no solution", "", "several solutions"], object)[found]
        reasons[(x == 0).all(1)] = "no clues"
        return self.digits(solution), reasons

    def verify(self, x, y):
        solution, reasons = self.prove(x)
        wrong = (reasons == "") & (solution != y).any(1)
        reasons[wrong] = "the answer is not the solution"
        return reasons.tolist()

    def symmetry(self, count, device, generator):
        """-> cell [B, L] and digit [B, side + 1]: for each board a random symmetry of the rules.

        The image of a board is digit[board[cell]]: digits renamed, bands, stacks, and rows and
        columns within them permuted; half of the boards transposed where boxes are square.
        """
        import torch
        import torch.nn.functional as F

        n = self.side
        h, w = self.box

        def order(*shape):
            """Random permutations of the last axis."""
            noise = torch.rand(count, *shape, device=device, generator=generator)
            return noise.argsort(-1)

        rows = (order(w)[..., None] * h + order(w, h)).view(count, n, 1)
        columns = (order(h)[..., None] * w + order(h, w)).view(count, 1, n)
        cell = rows * n + columns                               # [B, n, n]
        if h == w:
            transpose = order(2)[..., :1, None] == 1           # a coin for each board
            cell = torch.where(transpose, cell.mT, cell)
        digit = F.pad(order(n) + 1, (1, 0))                     # 0 stays blank
        return cell.flatten(1), digit

    def image(self, board, cell, digit):
        """board [B, L] -> digit[board[cell]], see symmetry()."""
        return digit.gather(1, board.gather(1, cell).long()).to(board.dtype)

    def augment(self, x, y, generator):
        if self.toy:
            return x, y
        cell, digit = self.symmetry(len(x), x.device, generator)
        return self.image(x, cell, digit), self.image(y, cell, digit)

    def rename(self, x, generator):
        cell, digit = self.symmetry(len(x), x.device, generator)
        x2 = self.image(x, cell, digit)

        def undo(logits):
            # first the digits, d became digit[d]; then the cells, cell i of the image was cell[i]
            logits = logits.gather(2, digit[:, None].expand_as(logits))
            return logits.scatter(1, cell[..., None].expand_as(logits), logits)

        return x2, undo

    def draw(self, x, answers):
        """The board with its boxes, the answers in the blanks."""
        h, w = self.box
        cells = list(self.text(x))
        for i, text in answers.items():
            cells[i] = text

        # answers may carry a mark, so cells may be wider than a digit
        width = max(map(len, cells))
        cells = [cell.ljust(width) for cell in cells]
        parts = [" ".join(cells[i:i + w]) for i in range(0, len(cells), w)]     # a row of one box
        rows = [" | ".join(parts[i:i + h]) for i in range(0, len(parts), h)]
        rule = "\n" + "-+-".join(["-" * ((width + 1) * w - 1)] * h) + "\n"
        return rule.join("\n".join(rows[i:i + h]) for i in range(0, len(rows), h))

    def cells(self, text):
        """The characters of a board -> its tokens [L]."""
        if len(text) != self.side ** 2:
            raise UserError(f"{len(text)} characters, not the {self.side ** 2} of side {self.side}")
        return self.tokens(text.replace("0", "."), self.symbols[:self.side + 1])

    def read(self, text):
        x = self.cells("".join(text.split()))
        solution, reasons = self.prove(x[None])
        if reasons[0]:
            raise UserError(reasons[0])
        return x, solution[0]

    def convert(self, question, answer):
        return self.cells(question), self.cells(answer)


# --------------------------------------------------------------------------------------------------
# chess: positions and their proof


def maybe_checks(board):
    """Yield pseudo-legal moves: all that give check are among them, except castling."""
    king = board.king(not board.turn)           # the one to be checked
    occupied = board.occupied

    # the squares from which a bishop, a rook, a knight or a pawn would give check
    diagonals = chess.BB_DIAG_ATTACKS[king][chess.BB_DIAG_MASKS[king] & occupied]
    straights = (chess.BB_RANK_ATTACKS[king][chess.BB_RANK_MASKS[king] & occupied]
                 | chess.BB_FILE_ATTACKS[king][chess.BB_FILE_MASKS[king] & occupied])
    jumps = chess.BB_KNIGHT_ATTACKS[king]
    lines = diagonals | straights
    pawns = chess.BB_PAWN_ATTACKS[not board.turn][king]
    promotions = chess.BB_BACKRANKS & (lines | jumps)

    # a piece checks from a square of its kind, or uncovers a check by leaving a line
    yield from board.generate_pseudo_legal_moves(board.bishops, diagonals)
    yield from board.generate_pseudo_legal_moves(board.rooks, straights)
    yield from board.generate_pseudo_legal_moves(board.queens, lines)
    yield from board.generate_pseudo_legal_moves(board.knights, jumps)
    yield from board.generate_pseudo_legal_moves(board.pawns, pawns | promotions)
    if board.occupied_co[board.turn] & lines:
        yield from board.generate_pseudo_legal_moves(lines)
    # en passant, too, can take a piece off a line: the captured pawn stands on another square
    yield from board.generate_pseudo_legal_ep()


def solutions(board, depth):
    """Yield the first moves that force mate in exactly `depth` moves, 1 or 2, some of them twice.

    Another move may mate sooner: see position(). Castling does not mate here: generated positions
    have no right to it.
    """
    refutations = set()
    candidates = maybe_checks(board) if depth == 1 else board.legal_moves
    for move in list(candidates):           # a list: the board changes meanwhile
        board.push(move)
        works = board.is_checkmate() if depth == 1 else loses(board, depth - 1, refutations)
        board.pop()
        if works and board.is_legal(move):  # last, because few moves come so far
            yield move


def loses(board, depth, refutations):
    """Is there a mate in `depth` after every reply, of which there is at least one?"""
    # what refuted earlier moves often refutes this one, so such replies are remembered
    replies = sorted(board.legal_moves, key=refutations.__contains__, reverse=True)
    for reply in replies:
        board.push(reply)
        mated = any(solutions(board, depth))
        board.pop()
        if not mated:
            refutations.add(reply)
            return False
    return len(replies) > 0


def one_pair(moves):
    """Is there a move, and do all have the same two squares? (So promotions count as one.)"""
    return len({(move.from_square, move.to_square) for move in moves}) == 1


def game(rng):
    """Yield the positions of a random legal game, without castling and en passant."""
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
    """Yield one position, if legal: up to 11 pieces of White's and 9 of Black's, anywhere."""
    army = [chess.PAWN] * 8 + [chess.KNIGHT, chess.BISHOP, chess.ROOK] * 2 + [chess.QUEEN]
    board = chess.Board(None)
    squares = rng.sample(chess.SQUARES, 20)
    for color, least, most in ((chess.WHITE, 6, 10), (chess.BLACK, 2, 8)):
        for piece in [chess.KING] + rng.sample(army, rng.randint(least, most)):
            square = squares.pop()
            if piece != chess.PAWN or 8 <= square < 56:
                board.set_piece_at(square, chess.Piece(piece, color))
    if board.is_valid():
        yield board


def position(rng, source, depth):
    """-> a position with one mate in `depth` moves and no shorter mate, and the mating moves."""
    while True:
        for board in source(rng):
            if depth == 2 and any(solutions(board, 1)):
                continue
            found = list(solutions(board, depth))
            if one_pair(found):
                return board, found


def view_mask(board):
    """-> m: square ^ m is the square as the side to move sees it, its king on files e to h."""
    upside_down = 0 if board.turn else 56
    mirrored = 7 if board.king(board.turn) % 8 < 4 else 0
    return upside_down | mirrored


def legal_board(fen):
    """A FEN -> its position; ValueError with the reason if there is none."""
    board = chess.Board(fen)
    if not board.is_valid():
        raise UserError(f"not legal, {board.status()!r}")
    return board


def encode(board):
    """-> tokens x [64], as the side to move sees the board."""
    x = np.zeros(64, np.uint8)
    mask = view_mask(board)
    for square, piece in board.piece_map().items():
        own = piece.color == board.turn
        x[square ^ mask] = piece.piece_type if own else piece.piece_type + 6
    return x


# --------------------------------------------------------------------------------------------------
# chess: the task


@dataclass(frozen=True)
class Chess(Task):
    """The only move that forces mate in one, or in two. Here the queen mates on g7:

        puzzle   7k/8/5KQ1/8/8/8/8/8 w - - 0 1
        tokens   6 on f6, 5 on g6, 12 on h8, 0 elsewhere
        labels   1 on g6, which the move leaves, 2 on g7, which it reaches, 0 elsewhere

    Tokens: 0 empty, 1-6 own pawn, knight, bishop, rook, queen, king, 7-12 the opponent's; squares
    in the order a1, b1, ... h8. With marks "squares", as in the paper, both squares have label 1.

    The side to move plays upwards, and the board is mirrored if its king is on files a to d. Not
    encoded: colour, castling and en passant rights (generated positions have none), the piece of a
    promotion. A chunk is 40 mates in one (half from random games, half from random placements) and
    one mate in two (from placements), which takes a fourth of the chunk's time. All have one
    solving pair of squares. Rating: the depth of the mate.

    In files the answer is the second of the Moves, which need not mate and is not proven, and the
    rating is the file's.
    """

    marks: str = "from_to"

    name = "chess"
    grid = (8, 8)
    vocab = 13
    symbols = ".PNBRQKpnbrqk"
    levels = {"easy": "mate in one", "hard": "mate in two"}
    columns = ("FEN", "Moves", "Rating")
    file_limits = (1601, 2000)
    slow = True

    def __post_init__(self):
        if self.marks not in ("from_to", "squares"):
            raise UserError(f"--marks {self.marks}: choose from_to or squares")

    @property
    def classes(self):
        return 3 if self.marks == "from_to" else 2

    def predict(self, logits):
        """The squares with the largest marks: exactly one from and one to, or two squares."""
        lift = logits - logits[..., :1]
        y = logits.new_zeros(logits.shape[:-1]).long()
        if self.marks == "squares":
            return y.scatter(-1, lift[..., 1].topk(2).indices, 1)

        start = lift[..., 1].argmax(-1, keepdim=True)
        others = lift[..., 2].scatter(-1, start, -float("inf"))
        end = others.argmax(-1, keepdim=True)
        return y.scatter(-1, start, 1).scatter(-1, end, 2)

    def label(self, board, move):
        """-> labels y [64] of a move."""
        y = np.zeros(64, np.uint8)
        y[move.from_square ^ view_mask(board)] = 1
        y[move.to_square ^ view_mask(board)] = self.classes - 1
        return y

    def chunk(self, seed, index, ones=40, twos=1):
        rng = random.Random(f"{seed} {index}")
        plan = [(1, (game, placement)[i % 2]) for i in range(ones)] + [(2, placement)] * twos
        rows = []
        for depth, source in plan:
            board, found = position(rng, source, depth)
            rows.append((encode(board), self.label(board, found[0]), depth))

        x, y, rating = (np.array(column) for column in zip(*rows, strict=True))
        p = Puzzles(x, y, rating)
        return {"easy": p[rating == 1], "hard": p[rating == 2]}

    def text(self, x):
        """The position as it is encoded, White to move, as a FEN."""
        board = chess.Board(None)
        for i in np.flatnonzero(x).tolist():
            board.set_piece_at(i, chess.Piece.from_symbol(self.symbols[x[i]]))
        return board.fen()

    def answer_texts(self, x, y):
        """The marked squares only: (N) is left, [.] is reached; (N) and (.) with "squares"."""
        frames = {1: "({})", 2: "[{}]"}
        return {i: frames[y[i]].format(self.symbols[x[i]]) for i in np.flatnonzero(y).tolist()}

    def draw(self, x, answers):
        """The board as the side to move sees it, its own side at the bottom."""
        cells = [f" {self.symbols[token]} " for token in x]
        for i, text in answers.items():
            cells[i] = text
        ranks = ["".join(cells[i:i + 8]) for i in range(0, 64, 8)]
        return "\n".join(reversed(ranks))

    def read(self, text):
        """The solution is known if exactly one move, promotions aside, mates at once."""
        board = legal_board(text)
        if not any(board.legal_moves):
            raise UserError("the game is over")

        mates = [move for move in board.legal_moves if "#" in board.san(move)]
        y = self.label(board, mates[0]) if one_pair(mates) else None
        return encode(board), y

    def verdict(self, text, y):
        """The move that labels y [64] mean in the position of a FEN: is it legal, does it mate?"""
        board = chess.Board(text)
        y = np.asarray(y)
        moves = [move for move in board.legal_moves if (self.label(board, move) == y).all()]
        lines = [f"{board.san(move)} ({move.uci()})" for move in moves]

        # of several promotions one that mates
        for line in lines:
            if "#" in line:
                return f"{line}: legal, mate"
        if lines:
            return f"{lines[0]}: legal, no mate at once"

        # the square that is left comes before the one that is reached, unless both have label 1
        places = sorted(np.flatnonzero(y).tolist(), key=y.__getitem__)
        squares = [chess.square_name(i ^ view_mask(board)) for i in places]
        return f"{'-'.join(squares) or 'nothing marked'}: no legal move"

    def convert(self, fen, moves):
        """The first move leads to the position, the second is the one to find."""
        board = legal_board(fen)
        played = moves.split()
        if len(played) < 2 or "0000" in played[:2]:
            raise UserError(f"needs two moves, not {moves!r}")
        board.push(board.parse_uci(played[0]))
        return encode(board), self.label(board, board.parse_uci(played[1]))


TASKS = {task.name: task for task in (PrefixSums(), Sudoku(), Chess())}


# --------------------------------------------------------------------------------------------------
# splits


def bucket(key):
    """A puzzle's key [K] -> 0 .. 15, a hash: each bucket holds about a sixteenth of all puzzles."""
    # not a CRC, which is a parity of the bits: a split would then be a parity class of the strings
    return hashlib.sha256(key.tobytes()).digest()[0] % 16


def split_of(level, key, role="both"):
    """-> "train", "val", "easy", "hard", or None: the puzzle is not used.

    level: "easy", "hard", or None (rated above the file's limit). key: see Task.keys. role: "both",
    or of two files "train" for the first and "test" for the second. The first gives no tests: what
    would be one is dropped, so that TRAIN,TEST trains on the same puzzles as TRAIN alone. The
    second gives nothing but tests.
    """
    split = level
    if level == "easy" and role != "test":
        split = {0: "val", 1: "easy"}.get(bucket(key), "train")
    if role == "train" and split not in ("train", "val"):
        return None
    return split


# we give up after so many parts in a row (a part is one level of one chunk) that held no puzzle for
# any split that is short
PATIENCE = 100


def splits(task, seed, n_train, n_val, n_test, n_hard, path=None, cache="out/cache"):
    """-> {"train", "val", "easy", "hard": Puzzles} of n_train, n_val, n_test, n_hard puzzles.

    path: None to make them, or "FILE" or "TRAIN,TEST". Within one call no puzzle is in two splits,
    for 9x9 and 6x6 sudoku no solution either. UserError says what is impossible.
    """
    need = {"train": n_train, "val": n_val, "easy": n_test, "hard": n_hard}
    if seed < 0:
        raise UserError(f"--seed {seed}: must be at least 0")
    if path is None:
        source = task.name
        stream = generated(task, seed, Path(cache))
        patience = PATIENCE
        report = progress(f"making {source}")
    else:
        source = path
        stream = from_files(task, path)
        patience = np.inf
        report = progress(f"reading {source}")

    seen = set()
    rows = {split: [] for split in need}    # (x, y, rating) of each puzzle, in the order they came
    count = dict.fromkeys(need, 0)          # all that came, also those not needed
    idle = 0
    with closing(stream):
        while short := [split for split in need if count[split] < need[split]]:
            part = next(stream, None)
            if part is None or idle == patience:
                raise too_few(short[0], need, count, source)

            puzzles, puzzle_levels, role = part
            idle += 1               # a task may run out: there are only 16 strings of 4 bits
            keys = task.keys(puzzles.x, puzzles.y)
            for puzzle, level, key in zip(puzzles, puzzle_levels, keys, strict=True):
                # of puzzles that share a key only the first counts
                if key.tobytes() in seen:
                    continue
                seen.add(key.tobytes())
                split = split_of(level, key, role)
                if split is None:
                    continue
                count[split] += 1
                if count[split] <= need[split]:
                    rows[split].append((puzzle.x, puzzle.y, puzzle.rating))
                    idle = 0
            report(sum(map(len, rows.values())), sum(need.values()))
    return {split: stack(task, found) for split, found in rows.items()}


def generated(task, seed, cache):
    """Yield puzzles, the level of each, "both" (see split_of) from the chunks of a seed."""
    chunks = (task.chunk(seed, index) for index in itertools.count())
    if task.slow:
        chunks = slow_chunks(task, seed, cache)
    with closing(chunks):
        for chunk in chunks:
            for level, puzzles in chunk.items():
                yield puzzles, [level] * len(puzzles), "both"


def too_few(split, need, count, source):
    """-> the UserError that says what was asked for and what there is."""
    there = ", ".join(f"{n:,} {name}" for name, n in count.items())
    return UserError(f"{need[split]:,} {split} puzzles asked for, but {source} has only {there}")


def stack(task, rows):
    """[(x, y, rating)] -> Puzzles."""
    if not rows:
        nothing = np.zeros((0, np.prod(task.grid)), np.uint8)
        return Puzzles(nothing, nothing, np.zeros(0, int))
    x, y, rating = zip(*rows, strict=True)
    return Puzzles(np.stack(x), np.stack(y), np.array(rating))


def describe_levels(task, path=None):
    """-> {"easy": phrase, "hard": phrase}, what they mean; for files that depends on the file."""
    if path is None:
        return task.levels
    name = path.split(",")[0]
    cut, top = rating_limits(task, name)
    end = "and more" if top == np.inf else f"to {top}"
    return {"easy": f"rated below {cut} in {name}", "hard": f"rated {cut} {end}"}


# --------------------------------------------------------------------------------------------------
# cache and processes

def code_hash():
    """A checksum of this file. Cache folders carry it: no puzzle of another data.py is served."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]


def slow_chunks(task, seed, cache):
    """Yield the chunks of a seed from the cache, and then from all cores."""
    options = "".join(f"-{name}_{value}" for name, value in asdict(task).items())
    folder = cache / f"{task.name}{options}-seed_{seed}-{code_hash()}"
    job = functools.partial(cached_chunk, task, seed, folder)

    # chunk 0 and cached ones come from this process; workers are started only for what is left
    for index in itertools.count():
        if index > 0 and not chunk_file(folder, index).exists():
            break
        yield job(index)
    yield from parallel(job, index)


def chunk_file(folder, index):
    return folder / f"{index:06d}.npz"


def cached_chunk(task, seed, folder, index):
    """A chunk from its file, or made and kept at once: an interrupt loses none that is ready."""
    file = chunk_file(folder, index)
    chunk = load_cache(file)
    if chunk is None:
        chunk = task.chunk(seed, index)
        save_cache(file, chunk)
    return chunk


def parallel(job, start):
    """Yield job(start), job(start + 1), ... in order, made on all cores until closed."""
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))

    # a fork needs no main module to import, so that notebooks work
    context = get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(cores, context, worker, (os.getpid(),)) as workers:
        try:
            # map() begins all that it is given, so it gets a few at a time
            for index in itertools.count(start, 4 * cores):
                yield from workers.map(job, range(index, index + 4 * cores))
        except BrokenProcessPool:
            raise UserError("a process that makes puzzles was killed: out of memory?") from None


def worker(parent):
    """What a new process does first: leave Ctrl-C to its parent, and end when the parent ends (one
    that is killed cannot tell its workers, who would wait for ever)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def follow():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def load_cache(file):
    """-> {level: Puzzles}, or None if there is no file that can be read."""
    if not file.exists():
        return None
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return {level: Puzzles(*(arrays[f"{level} {field.name}"] for field in fields(Puzzles)))
                    for level in ("easy", "hard")}
    except Exception as error:      # of damaged files numpy and zipfile raise a dozen kinds
        print(f"{file}: unusable cache, making it again ({error})", file=sys.stderr)
        return None


def save_cache(file, chunk):
    """{level: Puzzles} -> file."""
    arrays = {f"{level} {name}": array for level, puzzles in chunk.items()
              for name, array in vars(puzzles).items()}
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, content.getvalue())
    except OSError as error:
        print(f"{file}: cannot be kept ({error})", file=sys.stderr)


def write_atomic(path, content):
    """bytes -> file: wherever the program stops, the old file is there or the new, never a part."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def clock(seconds):
    """95 -> "1:35"."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}"


def progress(what):
    """-> report(done, total): now and then a line with the time left on stderr."""
    start = time.monotonic()
    last = start
    terminal = sys.stderr.isatty()

    def report(done, total):
        nonlocal last
        now = time.monotonic()
        is_due = now - last >= (0.5 if terminal else 15)
        ends = last > start and done >= total       # a line that was begun is ended
        if not done or not (is_due or ends):
            return
        last = now
        left = clock((now - start) * (total - done) / done)
        end = "   \r" if terminal and done < total else "\n"
        print(f"{what}: {done:,} of {total:,}, {left} left", end=end, file=sys.stderr, flush=True)

    return report


# --------------------------------------------------------------------------------------------------
# data files


def open_text(path):
    """A file's text, unpacked according to its name."""
    opener = gzip.open if path.endswith(".gz") else open
    if path.endswith(".zst"):
        try:
            from zstandard import open as opener
        except ImportError:
            raise UserError(f"{path}: needs `pip install zstandard`, or unpack it") from None
    return opener(path, "rt", encoding="utf-8-sig", newline="")


def read_lines(path):
    """Yield line number, [fields] of a CSV file whose fields hold no line breaks."""
    line = 0
    try:
        with open_text(path) as file:
            for line, text in enumerate(file, 1):
                # line by line: a stray quote is an error of its own line, and swallows no others
                row = next(csv.reader([text], strict=True), None)
                if row:
                    yield line, row
    except csv.Error as error:
        raise UserError(f"{path} line {line}: {error}, a stray quote?") from None
    except UserError:
        raise
    except Exception as error:      # each decompressor has its own
        where = f" after line {line}" if line else ""
        raise UserError(f"{path}: cannot be read{where} ({error})") from None


def read_rows(path, columns):
    """Yield line number, [text of each column but the last], rating of a CSV file with a header."""
    rows = read_lines(path)
    line, header = next(rows, (1, []))
    for column in columns:
        if column not in header:
            raise UserError(f"{path} line {line}: no column {column!r}, needs {','.join(columns)}")
    places = [header.index(column) for column in columns]

    for line, row in rows:
        if len(row) != len(header):
            raise UserError(f"{path} line {line}: {len(row)} fields, the header has {len(header)}")
        *texts, rating = (row[i] for i in places)
        if not rating.isdecimal() or len(rating) > 9:
            reason = f"rating {rating!r} is not a whole number below a billion"
            raise UserError(f"{path} line {line}: {reason}")
        yield line, texts, int(rating)


def read_puzzles(task, path):
    """Yield Puzzles, some rows of the file at a time, in its order, converted and verified."""
    rows = read_rows(path, task.columns)
    while batch := list(itertools.islice(rows, 1024)):
        pairs = []
        for line, texts, _ in batch:
            try:
                pairs.append(task.convert(*texts))
            except ValueError as error:
                raise UserError(f"{path} line {line}: {error}") from None

        x, y = (np.array(column) for column in zip(*pairs, strict=True))
        for (line, _, _), reason in zip(batch, task.verify(x, y), strict=True):
            if reason:
                raise UserError(f"{path} line {line}: {reason}")
        yield Puzzles(x, y, np.array([rating for _, _, rating in batch]))


@functools.cache        # a file is read to its end for this
def rating_limits(task, path):
    """-> the lowest hard rating, and the highest that is used (inf: no limit)."""
    if task.file_limits:
        return task.file_limits
    ratings = np.array([rating for _, _, rating in read_rows(path, task.columns)])
    if not len(ratings):
        raise UserError(f"{path}: no rows")

    # the hardest fifth, but the lowest rating is always easy
    cut = int(np.ceil(np.quantile(ratings, 0.8)))
    if cut == ratings.min():
        cut += 1
    return cut, np.inf


def from_files(task, path):
    """Yield puzzles, the level of each, their role (see split_of) from FILE or TRAIN,TEST.

    The first of two files is read to its end, even if only test puzzles are still missing: none of
    them may occur anywhere in it.
    """
    paths = path.split(",")
    if not task.columns:
        raise UserError(f"--files {path!r}: {task.name} reads no files")
    if len(paths) > 2 or "" in paths:
        raise UserError(f"--files {path!r}: must be FILE or TRAIN,TEST")

    cut, top = rating_limits(task, paths[0])
    roles = ["both"] if len(paths) == 1 else ["train", "test"]
    for name, role in zip(paths, roles, strict=True):
        for puzzles in read_puzzles(task, name):
            yield puzzles, [level_of(rating, cut, top) for rating in puzzles.rating], role


def level_of(rating, cut, top):
    """-> "easy", "hard", or None: the puzzle is not used."""
    if rating > top:
        return None
    return "easy" if rating < cut else "hard"


# --------------------------------------------------------------------------------------------------
# command line


class Parser(argparse.ArgumentParser):
    """Errors are one line, with exit code 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def parse(argv):
    """-> the task with its options, and the other arguments."""
    # the task first: only its own options are added, as two tasks may have one of the same name
    chosen = Parser("data.py", add_help=False, allow_abbrev=False)
    chosen.add_argument("--task", choices=TASKS, default="prefix_sums")
    task = TASKS[chosen.parse_known_args(argv)[0].task]

    parser = Parser("data.py", allow_abbrev=False, parents=[chosen],
                    description="print puzzles of a task; --task TASK --help shows its options")
    parser.add_argument("--level", choices=("easy", "hard"), default="easy")
    parser.add_argument("--n", type=int, default=3, help="how many puzzles")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--files", metavar="FILE|TRAIN,TEST", help="read puzzles, make none")
    group = parser.add_argument_group(f"options of {task.name}")
    for f in fields(task):
        group.add_argument(f"--{f.name}", type=f.type, default=f.default,
                           help=f"default: {f.default}")
    args = parser.parse_args(argv)
    options = {f.name: getattr(args, f.name) for f in fields(task)}
    try:
        return replace(task, **options), args
    except UserError as error:
        parser.error(str(error))


def run(program, work):
    """work() -> exit code. A user's mistake is one line on stderr, a bug keeps its traceback."""
    # for terminals that cannot show everything
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    # a cluster's stop is treated like Ctrl-C
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = work()
        sys.stdout.flush()
        return code
    except UserError as error:
        code = error.exit_code
        message = str(error)
    except KeyboardInterrupt:
        code = 130
        message = "stopped"
    except BrokenPipeError:
        # our reader has gone, as in `| head`: the flush at exit must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        code = 2
        message = f"{error.filename or 'writing'}: {error.strerror or error}"
        if not isinstance(error, FileNotFoundError):
            message += "; choose another place"
    print(f"{program}: {message}", file=sys.stderr)
    return code


def print_puzzles(task, args):
    """Print n puzzles of a level: as looped.py --puzzle takes them, as a picture, and solved.

    Easy ones are those of the training set. -> exit code.
    """
    if args.n < 0:
        raise UserError(f"--n {args.n}: must be at least 0")
    n_train = args.n if args.level == "easy" else 0
    n_hard = args.n if args.level == "hard" else 0
    found = splits(task, args.seed, n_train, 0, 0, n_hard, args.files)
    puzzles = found["train"] if args.level == "easy" else found["hard"]
    for p in puzzles:
        print(task.text(p.x), task.show(p.x), task.show(p.x, p.y), sep="\n\n")
        print(f"rating {p.rating}\n")
    return 0


def main(argv=None):
    """The command line -> exit code."""
    task, args = parse(argv)
    return run("data.py", functools.partial(print_puzzles, task, args))


if __name__ == "__main__":
    sys.exit(main())
