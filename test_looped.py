"""Tests: offline and small, against oracles that share no code with what they test.

A check that might pass by accident carries a control, where it must come out the other way.
"""
import contextlib
import dataclasses
import gzip
import importlib.util
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
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


# --------------------------------------------------------------------------------------------------
# what the tests share: small settings

TINY = dict(bits=12, hard_bits=24, width=16, heads=2, n_train=64, n_val=8, n_test=8, n_hard=8,
            steps=6, batch=8, loops=4, grad_loops=2, eval_loops=4, eval_every=2, warmup=2,
            device="cpu")
BOARD = dict(task="sudoku", side=4)
NORMS = ("pre", "peri", "outer", "gru")
RECALLS = ("none", "external", "internal")


@pytest.fixture(autouse=True)
def quiet_place(tmp_path, monkeypatch):
    """Each test begins in an empty folder, with the same random numbers, and Ctrl-C as usual."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)

    # a shell that starts the tests in the background has them ignore Ctrl-C; main() takes SIGTERM
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGINT, before)
    signal.signal(signal.SIGTERM, handler)


def settings(options):
    """TINY with other options, without those that belong to another task or loss."""
    values = TINY | options
    if values.get("train") == "progressive":
        del values["grad_loops"]
    if values.get("task", "prefix_sums") != "prefix_sums":
        del values["bits"]
        del values["hard_bits"]
    return values


def tiny(**options):
    return looped.Config(**settings(options))


def flags(**options):
    words = []
    for name, value in settings(options).items():
        words += [f"--{name}", str(value)]
    return words


def model_of(**options):
    """In float64, with random biases and norm weights, so that none of them goes unnoticed."""
    model = looped.LoopedTransformer(tiny(**options)).double()
    for p in model.parameters():
        if p.dim() == 1:
            p.data += 0.3 * torch.randn_like(p)
    return model


def add_input(model):
    """The same model with a plain recall: h + e."""
    model.W_h = torch.nn.Identity()
    model.W_e = torch.nn.Identity()
    return model


def sets_of(cfg):
    counts = (cfg.n_train, cfg.n_val, cfg.n_test, cfg.n_hard)
    splits = data.splits(cfg.make_task(), cfg.seed, *counts)
    return {name: (torch.tensor(p.x).long(), torch.tensor(p.y).long())
            for name, p in splits.items()}


def same(a, b):
    """Equal bit for bit, through dicts, lists, tensors and Puzzles."""
    if isinstance(a, data.Puzzles):
        return same(vars(a), vars(b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    return a == b


def close(a, b, atol=1e-8):
    return torch.allclose(a, b, atol=atol)


def unroll(model, h, e, loops):
    for _ in range(loops):
        h = model.step(h, model.recall_term(e))
    return h


def gradient(model, loss):
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([g.flatten() for g in grads])


def read_log(out):
    return [json.loads(line) for line in open(Path(out, "log.jsonl"))]


def give_marks(y, classes):
    """Labels [..., L] -> logits that predict them."""
    return 9.0 * F.one_hot(y, classes)


def train(cfg, out, checkpoint=None):
    """Train a new model, or go on from a checkpoint -> the last checkpoint, the log."""
    out.mkdir(exist_ok=True)
    torch.manual_seed(cfg.seed)
    looped.train(cfg, looped.LoopedTransformer(cfg), sets_of(cfg), out, checkpoint)
    return looped.read_checkpoint(out)[0], read_log(out)


def spy(monkeypatch, name, look):
    """Call look(*args) before each call of looped.<name>."""
    real = getattr(looped, name)

    def spied(*args, **options):
        look(*args)
        return real(*args, **options)
    monkeypatch.setattr(looped, name, spied)


# --------------------------------------------------------------------------------------------------
# what the tests share: small tasks and files

BOX = {4: (2, 2), 6: (2, 3), 9: (3, 3)}


class SmallSudoku(data.Sudoku):
    """With an eighth of the boards in a chunk, so that tests need not wait for them."""

    def chunk(self, seed, index, n=128):
        return super().chunk(seed, index, n)


class SmallChess(data.Chess):
    """With fewer positions in a chunk."""

    def chunk(self, seed, index, ones=16, twos=2):
        return super().chunk(seed, index, ones, twos)


SUDOKU = {side: SmallSudoku(side=side) for side in BOX}
CHESS = SmallChess()
SQUARES = replace(CHESS, marks="squares")
BITS = data.TASKS["prefix_sums"]
TASK = {**SUDOKU, "chess": CHESS, "squares": SQUARES, "bits": BITS}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def made(cache):
    """{task or side: splits}, made once."""
    return {k: data.splits(task, 2, 6, 1, 1, 2, cache=cache) for k, task in TASK.items()}


def rows(array):
    return [row.tobytes() for row in array]


HEADER = {"chess": "PuzzleId,FEN,Moves,Rating", "sudoku": "source,question,answer,rating"}
FEN = "r1bqkbnr/pppp1ppp/2n5/4p2Q/2B1P3/8/PPPP1PPP/RNB1K1NR b KQkq - 3 3"
QUESTION = "1.3..4..2..3..2."
ANSWER = "1234341221434321"
HARD = [f"b,{FEN},{m} h5f7,{r}" for m, r in (("h7h6", 1601), ("d7d6", 2000), ("g8h6", 2001))]


def write_rows(path, *lines, opener=open):
    with opener(path, "wt") as f:
        f.write("\n".join(lines) + "\n")
    return str(path)


def many_mates(folder):
    """A file of 70 rows with Qxf7 to find: 62 positions, 40 of them easy."""
    board = chess.Board(FEN)
    lines = []
    for first in list(board.legal_moves):
        for second in ("b1c3", "d2d3"):
            later = chess.Board(FEN)
            later.push(first)
            if chess.Move.from_uci(second) not in later.legal_moves:
                continue
            later.push_uci(second)
            for reply in list(later.legal_moves)[:3]:
                mate = later.copy()
                mate.push(reply)
                if chess.Move.from_uci("h5f7") in mate.legal_moves:
                    rating = 1500 if len(lines) % 3 else 1700
                    lines.append(f"i,{later.fen()},{reply.uci()} h5f7,{rating}")
    return write_rows(folder / "many.csv", HEADER["chess"], *lines[:70])


# --------------------------------------------------------------------------------------------------
# what the tests share: programs that are called


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished tiny run and what it printed, on an ASCII terminal: (folder, text)."""
    place = tmp_path_factory.mktemp("finished")
    out = Path("out", "prefix_sums-internal-outer-seed0")
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(terminal):
        patch.chdir(place)
        assert looped.main(flags()) == 0
    return place / out, terminal.buffer.getvalue().decode()


@pytest.fixture
def home(finished):
    """The test's folder has two finished runs, RUN and OTHER, and a file."""
    for name in ("RUN", "OTHER"):
        shutil.copytree(finished[0], name)
    Path("file").write_text("mine")
    return Path()


def raising(error):
    """-> a function that does nothing but raise the error, to stand in for another."""
    def function(*args, **options):
        raise error
    return function


stopped = raising(KeyboardInterrupt())      # Ctrl-C comes while it works


def exit_code(main, argv):
    try:
        return main(argv)
    except SystemExit as exit:
        return exit.code


def fails(capsys, argv, code=2, main=looped.main):
    """-> the one line on stderr."""
    got = exit_code(main, argv)
    line = capsys.readouterr().err
    assert got == code, line
    assert line.count("\n") == 1 and line.endswith("\n"), line
    return line


# --------------------------------------------------------------------------------------------------
# data.py: what a task is


def toy(**members):
    """A task class with all that a task must have, and perhaps other members."""

    def chunk(self, seed, index):
        rng = np.random.default_rng((seed, index))
        x = rng.integers(0, 2, (256, 8), np.uint8)
        p = data.Puzzles(x, 1 - x, x.sum(1))
        return {"easy": p[p.rating < 4], "hard": p[p.rating >= 4]}

    whole = {
        "name": "toy", "grid": (8,), "vocab": 2, "classes": 2, "symbols": "01",
        "levels": {"easy": "few ones", "hard": "many"}, "chunk": chunk,
        "draw": lambda self, x, answers: self.text(x), "read": lambda self, text: (None, None),
    }
    return type("Toy", (data.Task,), whole | members)


def test_a_whole_task_is_one_class(tmp_path):
    task = dataclass(frozen=True)(toy())()
    p = data.splits(task, 0, 20, 2, 2, 20, cache=tmp_path)
    assert [len(part) for part in p.values()] == [20, 2, 2, 20]
    assert task.show(p["hard"].x[0], p["hard"].y[0]) == task.text(p["hard"].x[0])


# --------------------------------------------------------------------------------------------------
# data.py: splits


@pytest.mark.parametrize("side, most, least", [(6, 0, 1), (9, 4, 5)])
def test_easy_and_hard_boards_are_rated_as_they_are_called(side, most, least):
    chunk = data.Sudoku(side=side).chunk(3, 0, n=512)
    assert chunk["easy"].rating.max() == most
    assert chunk["hard"].rating.min() in (least, least + 1)


def test_easy_and_hard_4x4_boards_have_other_numbers_of_clues(cache):
    s = data.splits(SUDOKU[4], 3, 99, 9, 9, 99, cache=cache)
    clues = {name: set((p.x > 0).sum(1)) for name, p in s.items()}
    assert clues["train"] == {7, 8, 9, 10}
    assert clues["hard"] == {4, 5}


GROWING = {
    "4x4": (SUDOKU[4], (400, 20, 20, 110)), "6x6": (SUDOKU[6], (180, 12, 12, 10)),
    "bits": (BITS, (1500, 70, 70, 200)), "file": (CHESS, (25, 2, 1, 10)),
    "two files": (SUDOKU[9], (12, 0, 9, 3)),
}


@pytest.mark.parametrize("name", GROWING)
def test_to_ask_for_more_moves_nothing_between_splits(name, tmp_path, cache):
    task, large = GROWING[name]
    path = {"file": many_mates, "two files": two_files}.get(name, lambda folder: None)(tmp_path)
    small = [n // 9 for n in large]
    before = data.splits(task, 5, *small, path, cache)

    for grown in range(4):
        numbers = [large[i] if i == grown else small[i] for i in range(4)]
        after = data.splits(task, 5, *numbers, path, cache)
        for split, n in zip(before, small, strict=True):
            assert same(before[split], after[split][:n])

    # all that is trained on in one request is tested on in none
    after = data.splits(task, 5, *large, path, cache)
    keys = [set(rows(task.keys(p.x, p.y))) for p in after.values()]
    assert sum(map(len, keys)) == len(set.union(*keys)) == sum(large)


def test_a_longer_file_only_appends(tmp_path):
    path = Path(many_mates(tmp_path))
    lines = path.read_text().splitlines()
    short = write_rows(tmp_path / "short.csv", *lines[:25])
    before = data.splits(CHESS, 0, 8, 1, 0, 3, short)
    after = data.splits(CHESS, 0, 16, 2, 1, 8, str(path))
    assert all(same(before[k], after[k][: len(before[k])]) for k in before)


@pytest.mark.parametrize("bits", [4, 5, 6, 7])
def test_a_small_population_is_refused_with_what_there_is(bits, tmp_path):
    task = replace(BITS, bits=bits)
    with pytest.raises(data.UserError, match="500 train puzzles asked for.*only ") as refusal:
        data.splits(task, 0, 500, 0, 0, 0, cache=tmp_path)
    _, _, said = str(refusal.value).partition(" only ")
    there = {split: int(n) for n, split in re.findall(r"(\d+) (train|val|easy)", said)}
    assert sum(there.values()) == 2**bits

    # the control: just as many can be had
    s = data.splits(task, 0, *there.values(), 0, cache=tmp_path)
    everything = [row for p in s.values() for row in rows(p.x)]
    assert len(set(everything)) == 2**bits


def test_many_small_chunks_are_no_reason_to_give_up(tmp_path):
    def chunk(self, seed, index):
        x = np.random.default_rng((seed, index)).integers(0, 2, (4, 8), np.uint8)
        p = data.Puzzles(x, 1 - x, x.sum(1))
        return {"easy": p, "hard": p[:0]}

    task = dataclass(frozen=True)(toy(chunk=chunk))()
    assert len(data.splits(task, 0, 150, 0, 0, 0, cache=tmp_path)["train"]) == 150


def test_long_strings_are_not_made_of_the_short_ones():
    chunk = BITS.chunk(0, 0)
    easy = chunk["easy"].x[:16, 1:].ravel()
    hard = chunk["hard"].x[0, 1:]
    assert len(easy) == len(hard) and 150 < (easy != hard).sum() < 362


def test_the_split_of_a_puzzle_never_changes():
    # of another hash, training puzzles of old checkpoints would be in the tests: the SHA-256 of the
    # bytes 1 0 1 begins with 85
    assert data.bucket(np.array([1, 0, 1], np.uint8)) == 0x85 % 16


def test_a_sixteenth_of_the_easy_puzzles_is_val_and_another_is_the_test():
    x = np.random.default_rng(0).integers(0, 2, (8000, 32), np.uint8)
    split = [data.split_of("easy", row) for row in x]
    # 500 are expected in each, with a standard deviation of 22
    assert abs(split.count("val") - 500) < 110 and abs(split.count("easy") - 500) < 110
    assert split.count("train") == 8000 - split.count("val") - split.count("easy")

    # the first of two files trains and validates, the second tests, and hard ones are tests only
    assert {data.split_of("easy", row, "train") for row in x} == {"train", "val", None}
    assert {data.split_of("easy", row, "test") for row in x} == {"easy"}
    assert {data.split_of("hard", row) for row in x} == {"hard"}
    assert {data.split_of("hard", row, "train") for row in x} == {None}


# --------------------------------------------------------------------------------------------------
# data.py: prefix sums


def test_prefix_sums_are_cumsums_after_a_start_token(made):
    for level, p in made["bits"].items():
        assert (p.x[:, 1:].astype(int).cumsum(1) % 2 == p.y[:, 1:]).all()
        assert (p.x[:, 0] == 2).all() and (p.y[:, 0] == 0).all()
        assert p.x.shape[1] == (513 if level == "hard" else 33)
        assert (BITS.scored(p.x).sum(1) == p.x.shape[1] - 1).all()
    relative = data.splits(replace(BITS, positions="relative"), 2, 6, 1, 1, 2)
    assert (relative["train"].x == made["bits"]["train"].x[:, 1:]).all()


# --------------------------------------------------------------------------------------------------
# data.py: sudoku


def peers(i, side):
    height, width = BOX[side]
    row, column = divmod(i, side)
    box = (row // height, column // width)
    return [
        j for j in range(side * side)
        if j // side == row or j % side == column or (j // side // height, j % side // width) == box
    ]


PEERS = {(side, i): peers(i, side) for side in BOX for i in range(side * side)}


def solutions(board, side):
    """Up to two full boards, by plain backtracking."""
    options = {
        i: set(range(1, side + 1)) - {board[j] for j in PEERS[side, i]}
        for i, digit in enumerate(board) if not digit
    }
    if not options:
        return [tuple(board)]
    i = min(options, key=lambda i: len(options[i]))
    found = []
    for digit in options[i]:
        if len(found) < 2:
            found += solutions(board[:i] + [digit] + board[i + 1 :], side)
    return found[:2]


@pytest.mark.parametrize("side", BOX)
def test_sudoku_has_one_solution_also_after_augmentation(made, side):
    p = made[side]["hard"]
    x = torch.tensor(p.x)
    y = torch.tensor(p.y)
    x2, y2 = SUDOKU[side].augment(x, y, torch.Generator().manual_seed(5))
    assert side == 4 or (x2 != x).any(1).all()
    assert ((x2 > 0).sum(1) == (x > 0).sum(1)).all()

    for boards, labels in ((x, y), (x2, y2)):
        for board, label in zip(boards.tolist(), labels.tolist(), strict=True):
            assert solutions(board, side) == [tuple(label)]
            board[next(i for i, digit in enumerate(board) if digit)] = 0
            assert len(solutions(board, side)) == 2  # the control: one clue less


@pytest.mark.parametrize("side", BOX)
def test_each_board_gets_a_symmetry_of_its_own_and_every_kind_occurs(made, side):
    task = SUDOKU[side]
    y = torch.tensor(made[side]["hard"].y[:1]).repeat(400, 1)
    a, _ = task.rename(y, torch.Generator().manual_seed(1))
    assert len(set(rows(a.numpy()))) > (100 if side == 4 else 300)  # 4x4 has 288 grids

    # rows and columns are permuted, and half of the boards transposed where boxes are square
    cell, _ = task.symmetry(400, "cpu", torch.Generator().manual_seed(1))
    assert len((cell[:, 0] // side).unique()) == len((cell[:, 0] % side).unique()) == side
    first_two_in_one_row = (cell[:, 0] // side == cell[:, 1] // side).double().mean()
    assert first_two_in_one_row == 1 if side == 6 else abs(first_two_in_one_row - 0.5) < 0.1

    # every digit goes everywhere, blanks stay blank
    for cell in range(side * side):
        assert len(a[:, cell].unique()) == side
    blank = torch.zeros_like(y)
    assert not task.rename(blank, torch.Generator())[0].any()

    # augmentation draws from the same symmetries
    b, _ = task.augment(y, y, torch.Generator().manual_seed(1))
    assert torch.equal(b, y if side == 4 else a)


@pytest.mark.parametrize("side", BOX)
def test_logits_of_renamed_puzzles_come_back(made, side):
    task = SUDOKU[side]
    p = made[side]["train"]
    x = torch.tensor(p.x).long()
    y = torch.tensor(p.y).long()
    x2, undo = task.rename(x, torch.Generator().manual_seed(2))

    def labels_of(boards):
        return undo(give_marks(boards, task.classes)).argmax(-1)
    assert (x2 != x).any(1).all()
    assert torch.equal(labels_of(x2), x)

    # whoever solves the renamed puzzles has solved these
    y2 = torch.tensor([solutions(board, side)[0] for board in x2.tolist()])
    assert torch.equal(labels_of(y2), y)
    assert not torch.equal(y2, y)


def test_rating_counts_guesses_and_two_solutions_are_found():
    full = np.array([1, 2, 3, 4, 3, 4, 1, 2, 2, 1, 4, 3, 4, 3, 2, 1])
    given = (1 << full - 1).astype(np.uint16)[:, None]
    blank = np.isin(np.arange(16), (0, 1, 8, 9))[:, None]
    open_cells = np.where(blank, 3, given).astype(np.uint16)

    # 1 and 2 can be swapped in four cells: one branch of two
    found, _, tried = data.solve(open_cells, (2, 2))
    assert (found, tried) == (2, 2)
    found, _, _ = data.solve(open_cells, (2, 2), limit=1)
    assert found == 1

    found, solution, tried = data.solve(given, (2, 2))
    assert (found, tried) == (1, 0) and (np.log2(solution[:, 0]) + 1 == full).all()
    clash = given.copy()
    clash[1] = clash[0]
    assert data.solve(clash, (2, 2))[0] == 0


def guesses(cells, units):
    """Those of a search for all solutions: singles first, then a cell with the fewest candidates.

    cells: the candidates of each, a list of sets. units: the cells of each row, column and box.
    """
    before = None
    while cells != before:
        before = list(cells)
        for unit in units:
            for i in unit:
                if len(cells[i]) == 1:
                    for j in unit:
                        if j != i:
                            cells[j] = cells[j] - cells[i]
            for digit in range(1, len(unit) + 1):
                places = [i for i in unit if digit in cells[i]]
                if not places:
                    return 0
                if len(places) == 1:
                    cells[places[0]] = {digit}
    i = min(range(len(cells)), key=lambda i: (len(cells[i]) == 1, len(cells[i])))
    if len(cells[i]) == 1:
        return 0
    return sum(1 + guesses(cells[:i] + [{d}] + cells[i + 1:], units) for d in cells[i])


@pytest.mark.parametrize("side", [6, 9])
def test_a_rating_is_the_guesses_of_a_plain_search(made, side):
    h, w = BOX[side]
    places = [divmod(i, side) for i in range(side ** 2)]
    units = []
    for part in ([row for row, _ in places], [column for _, column in places],
                 [(row // h, column // w) for row, column in places]):
        units += [[i for i, name in enumerate(part) if name == each] for each in set(part)]
    for p in (*made[side]["hard"], *made[side]["train"]):
        cells = [{d} if d else set(range(1, side + 1)) for d in p.x.tolist()]
        assert guesses(cells, units) == p.rating


def test_a_digit_twice_in_a_unit_is_a_contradiction_at_once():
    # on an open 9x9 board nothing else tells so soon
    board = np.full((81, 4), 511, np.uint16)
    pairs = [(0, 3), (0, 27), (0, 10), (0, 13)]  # in a row, a column, a box; control: in none
    for i, cells in enumerate(pairs):
        board[list(cells), i] = 1
    _, bad = data.deduce(board, (3, 3))
    assert bad.tolist() == [True, True, True, False]


def test_full_boards_are_random_in_every_digit():
    # 400 boards: a digit in the first cell 100 times, with a standard deviation of 8.7
    grid = data.solved_grids(np.random.default_rng(0), 400, (2, 2))
    digits = SUDOKU[4].digits(grid)
    for cell in (0, 6, 15):
        counts = np.bincount(digits[:, cell], minlength=5)[1:]
        assert (abs(counts - 100) < 50).all(), counts
    assert len({row.tobytes() for row in digits}) > 150  # of 288


def test_a_chunk_with_a_board_of_two_solutions_is_stopped(monkeypatch):
    def careless(rng, grid, box, keep):
        puzzle = grid.copy()
        puzzle[:8] = 15
        return puzzle

    monkeypatch.setattr(data, "remove_clues", careless)
    with pytest.raises(AssertionError, match="not exactly one solution"):
        SUDOKU[4].chunk(0, 0, n=16)


# --------------------------------------------------------------------------------------------------
# data.py: chess


def decode(x):
    board = chess.Board(None)
    pieces = {i: chess.Piece((token - 1) % 6 + 1, token < 7) for i, token in enumerate(x) if token}
    board.set_piece_map(pieces)
    return board


def forced(board, depth):
    """(from, to) of the moves that mate within `depth` moves, by trying everything."""
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
        if works:
            pairs.add((move.from_square, move.to_square))
    return pairs


def marked(y):
    return int(np.flatnonzero(y == 1)[0]), int(np.flatnonzero(y == 2)[0])


def test_chess_puzzles_have_one_solving_move_of_the_depth_they_are_rated():
    chunk = CHESS.chunk(7, 0, 6, 1)
    assert (len(chunk["easy"]), len(chunk["hard"])) == (6, 1)
    for depth, p in ((1, chunk["easy"]), (2, chunk["hard"])):
        assert (p.rating == depth).all()
        for x, y in zip(p.x.tolist(), p.y, strict=True):
            board = decode(x)
            assert board.is_valid() and chess.square_file(board.king(True)) >= 4
            assert forced(board, depth) == {marked(y)}
            assert depth == 1 or not forced(board, 1)


def test_a_chunk_of_chess_is_half_from_games_and_half_from_placements(monkeypatch):
    plan = []
    real = data.position

    def position(rng, source, depth):
        plan.append((source.__name__, depth))
        return real(rng, data.placement, 1)

    monkeypatch.setattr(data, "position", position)
    data.Chess().chunk(0, 0)
    assert sorted(set(plan)) == [("game", 1), ("placement", 1), ("placement", 2)]
    assert [plan.count(kind) for kind in sorted(set(plan))] == [20, 20, 1]


@pytest.mark.parametrize("chunk", [BITS.chunk, SUDOKU[4].chunk,
                                   lambda seed, index: CHESS.chunk(seed, index, 3, 0)])
def test_a_chunk_depends_on_seed_and_index_alone(chunk):
    # 1, 10 and 11, 0: digits must not run together, nor be added up
    places = [(0, 0), (0, 1), (1, 0), (1, 10), (11, 0)]
    chunks = [chunk(*place)["easy"].x[:20] for place in places]
    assert np.array_equal(chunk(0, 0)["easy"].x[:20], chunks[0])
    for first, second in itertools.combinations(chunks, 2):
        assert not np.array_equal(first, second)


@pytest.mark.parametrize(
    "fen",
    [
        "7k/P7/6K1/8/8/8/8/8 w - - 0 1",  # a promotion mates, to queen or rook
        "k7/2K5/8/1N6/8/8/6P1/7B w - - 0 1",  # a pawn that uncovers a bishop
        "7k/6pp/8/8/8/8/8/R5K1 w - - 0 1",  # on the back rank
        "4k3/8/8/8/4N3/8/8/4R1K1 w - - 0 1",  # discovered checks
        "8/8/8/2k5/3Pp3/8/8/B3K2R b - d3 0 1",  # en passant
        "7k/8/5KQ1/8/8/8/8/8 w - - 0 1",  # mates, and stalemates that are none
        "8/8/3k4/8/2P1P3/8/8/4K3 w - - 0 1",  # two pawns of White's can check
        "4k3/8/8/2p1p3/8/3K4/8/8 b - - 0 1",  # and two of Black's
    ],
)
def test_checks_are_all_moves_that_give_check_but_castling(fen):
    board = chess.Board(fen)
    kept = set(data.maybe_checks(board))
    plain = {m for m in board.legal_moves if board.gives_check(m) and not board.is_castling(m)}
    assert plain <= kept <= set(board.pseudo_legal_moves)
    assert {(m.from_square, m.to_square) for m in data.solutions(board, 1)} == forced(board, 1)


def test_random_positions_have_the_mates_that_trying_everything_finds():
    rng = random.Random(3)
    boards = [board for _ in range(60) for board in data.placement(rng)]
    boards += list(data.game(rng))[::9]
    counts = []
    for board in boards:
        pairs = [(m.from_square, m.to_square) for m in data.solutions(board, 1)]
        assert set(pairs) == forced(board, 1)
        counts.append(len(pairs))
    assert len(boards) > 20 and sum(counts) > 0


def test_after_stalemate_there_is_no_mate_in_two():
    stalemate = chess.Board("7k/8/6Q1/8/8/8/8/K7 b - - 0 1")
    stuck = chess.Board("7k/8/5K2/8/8/8/8/6Q1 w - - 0 1")
    assert data.loses(stalemate, 1, []) is False
    pairs = {(m.from_square, m.to_square) for m in data.solutions(stuck, 2)}
    assert pairs == forced(stuck, 2) - forced(stuck, 1)


def test_a_position_with_a_mate_in_one_is_passed_over_where_two_are_asked_for(monkeypatch):
    first, second = chess.Board(), chess.Board()
    mate = chess.Move.from_uci("e2e4")

    def solutions(board, depth):
        """Both have a mate in two, the first also one in one."""
        return iter([] if board is second and depth == 1 else [mate])

    monkeypatch.setattr(data, "solutions", solutions)
    boards = [first, second]
    assert data.position(None, lambda rng: iter(boards), 2)[0] is second
    assert data.position(None, lambda rng: iter(boards), 1)[0] is first  # control


def test_games_are_some_moves_old_and_placements_have_armies_of_the_sizes_they_say():
    games = [b.copy() for seed in range(3) for b in data.game(random.Random(seed))]
    placed = [b for seed in range(300) for b in data.placement(random.Random(seed))]
    # no position has a right that is not encoded
    for board in games + placed:
        assert board.is_valid() and board.ep_square is None and board.castling_rights == 0
    assert min(len(board.move_stack) for board in games) == 10

    white = []
    black = []
    for board in placed:
        assert board.turn and not board.pawns & chess.BB_BACKRANKS
        pieces = list(board.piece_map().values())
        white.append(sum(piece.color for piece in pieces))
        black.append(len(pieces) - white[-1])
    # a pawn that falls on the first or last rank is left out
    assert 1 <= min(white) < 9 and max(white) == 11
    assert 1 <= min(black) < 4 and max(black) == 9


def test_promotions_count_as_one_move():
    board = chess.Board("7k/P7/6K1/8/8/8/8/8 w - - 0 1")
    x, y = CHESS.parse(board.fen())
    assert marked(y) == (chess.A7, chess.A8)
    verdict = CHESS.verdict(board.fen(), y)
    assert verdict.startswith("a8=") and verdict.endswith("legal, mate")


def test_two_pieces_that_mate_on_one_square_are_two_answers():
    both = chess.Board("6k1/5ppp/8/8/8/8/8/R3K2Q w - - 0 1")
    assert forced(both, 1) == {(chess.A1, chess.A8), (chess.H1, chess.A8)}
    assert not data.one_pair(data.solutions(both, 1))
    _, y = CHESS.parse(both.fen())
    assert y is None

    # controls: one piece alone, and two squares that one piece mates from
    rook = chess.Board("6k1/5ppp/8/8/8/8/8/R3K3 w - - 0 1")
    assert data.one_pair(data.solutions(rook, 1))
    queen = chess.Board("k7/8/1K6/8/8/8/8/7Q w - - 0 1")
    assert len(forced(queen, 1)) > 1 and not data.one_pair(data.solutions(queen, 1))


def test_chess_is_seen_by_the_side_to_move():
    rng = random.Random(0)
    board = chess.Board()
    for _ in range(60):
        x = data.encode(board)
        assert (data.encode(board.mirror()) == x).all() and np.flatnonzero(x == 6) % 8 > 3
        for move in rng.sample(list(board.legal_moves), min(3, board.legal_moves.count())):
            y = CHESS.label(board, move)
            start, _ = marked(y)
            assert f"({move.uci()[:4]}" in CHESS.verdict(board.fen(), y)
            assert decode(x.tolist()).piece_at(start).color == chess.WHITE
            assert decode(x.tolist()).piece_type_at(start) == board.piece_type_at(move.from_square)
        board.push(rng.choice(list(board.legal_moves)))
        if not any(board.legal_moves):
            board = chess.Board()


def test_the_two_kinds_of_marks_say_the_same_squares():
    board = chess.Board()
    move = chess.Move.from_uci("g1f3")
    y = CHESS.label(board, move)
    assert marked(y) == (chess.G1, chess.F3) and (y > 0).sum() == 2
    assert (SQUARES.label(board, move) == (y > 0)).all()
    assert (CHESS.classes, SQUARES.classes) == (3, 2)


def test_chess_predicts_the_largest_marks_one_of_each():
    logits = torch.randn(50, 64, 3)
    logits[0] = 0
    logits[0, 7] = torch.tensor([0.0, 5.0, 9.0])  # largest as from and as to
    logits[0, 8] = torch.tensor([-1.0, 3.0, 4.0])
    logits[0, 9] = torch.tensor([4.0, 8.0, 7.0])  # large, but so is "nothing"
    logits[1, :, 0] += 20  # "nothing" is likelier everywhere
    y = CHESS.predict(logits)
    assert marked(y[0].numpy()) == (7, 8)

    for board, labels in zip(logits.numpy(), y.numpy(), strict=True):
        start = np.argmax(board[:, 1] - board[:, 0])
        reached = board[:, 2] - board[:, 0]
        reached[start] = -99
        assert marked(labels) == (start, np.argmax(reached)) and (labels > 0).sum() == 2


def test_with_squares_it_predicts_the_two_largest():
    logits = torch.randn(50, 64, 2)
    y = SQUARES.predict(logits).numpy()
    mark = (logits[..., 1] - logits[..., 0]).numpy()
    for board, labels in zip(mark, y, strict=True):
        assert set(np.flatnonzero(labels)) == set(np.argsort(board)[-2:])


@pytest.mark.parametrize("task", [CHESS, SQUARES])
def test_an_answer_says_whether_a_move_is_legal_and_mates(task):
    fen = "7k/8/5KQ1/8/8/8/8/8 w - - 0 1"
    board = chess.Board(fen)
    for move, words in (
        ("g6g7", "Qg7# (g6g7): legal, mate"), ("g6g1", "Qg1 (g6g1): legal, no mate at once"),
        ("g6h8", "g6-h8: no legal move"), ("a1a2", "a1-a2: no legal move"),
    ):
        assert task.verdict(fen, task.label(board, chess.Move.from_uci(move))) == words


def test_a_verdict_counts_what_is_asked_for_and_what_was_changed_beside():
    _, y = SUDOKU[4].parse(QUESTION)
    assert SUDOKU[4].verdict(QUESTION, y) == "solved"
    assert QUESTION.count(".") == 10
    y[1] = 5 - y[1]                         # a blank
    assert SUDOKU[4].verdict(QUESTION, y) == "1 of 10 are wrong"
    y[0] = 5 - y[0]                         # a clue
    assert SUDOKU[4].verdict(QUESTION, y) == "2 of 11 are wrong"


# --------------------------------------------------------------------------------------------------
# data.py: text


@pytest.mark.parametrize(
    "task, text, message",
    [
        (9, "." * 81, "no clues"), (9, "1" + "." * 80, "several"),
        (9, "11" + "." * 79, "no solution"), (9, "1", "1 characters"), (4, "x" * 16, "'x'"),
        (4, "9" + "." * 15, "'9'"), ("bits", "012", "'2'"), ("bits", "", "0 bits"),
        ("chess", "hello", "8 rows"), ("chess", "8/" * 7 + "8", "legal"), ("chess", "", "FEN|fen"),
        ("chess", "7k/5Q2/6K1/8/8/8/8/8 b - - 0 1", "game is over"),
    ],
)
def test_typed_puzzles_that_are_none(task, text, message):
    with pytest.raises(data.UserError, match=message) as refusal:
        TASK[task].parse(text)
    assert "\n" not in str(refusal.value)


def symbols_of(picture):
    """What is left of a picture without marks, rules and spaces: of a string all bits, then all
    sums, since a marked one is in shorter lines."""
    lines = sorted(picture.split("\n"), key=lambda line: line.startswith("sums"))
    return re.sub(r"[-+<>\s]|bits|sums", "", "".join(lines))


@pytest.mark.parametrize("key", TASK)
def test_typed_puzzles_round_trip(made, key):
    task = TASK[key]
    x = made[key]["easy"].x[0]
    y = made[key]["easy"].y[0]
    again, solution = task.parse(f" {task.text(x)}\n")
    assert (again == x).all() and (solution == y).all()

    picture = task.show(x, y, lambda i, text: f"<{text}>")
    assert picture.count("<") == {"chess": 2, "squares": 2, "bits": 32}.get(key, (x == 0).sum())
    assert symbols_of(picture) == symbols_of(task.show(x, y)) != symbols_of(task.show(x))
    assert picture.isascii()
    assert ("mate" if key in ("chess", "squares") else "solved") in task.verdict(task.text(x), y)
    assert task.verdict(task.text(x), y[::-1]) != task.verdict(task.text(x), y)


def test_the_examples_in_the_docstrings_are_right():
    x, y = BITS.parse("1101")
    assert x.tolist() == [2, 1, 1, 0, 1] and y.tolist() == [0, 1, 0, 0, 1]
    x, y = SUDOKU[4].parse("1.3. .4.. 2..3 ..2.")
    assert "".join(map(str, x)) == "1030040020030020" and "".join(map(str, y)) == ANSWER

    x, y = CHESS.parse("7k/8/5KQ1/8/8/8/8/8 w - - 0 1")
    assert {chess.square_name(i): x[i] for i in np.flatnonzero(x)} == {"f6": 6, "g6": 5, "h8": 12}
    assert {chess.square_name(i): y[i] for i in np.flatnonzero(y)} == {"g6": 1, "g7": 2}


def test_pictures_show_boxes_and_brackets():
    x, y = SUDOKU[4].parse(QUESTION)
    assert SUDOKU[4].show(x).splitlines()[0] == "1 . | 3 ."
    assert SUDOKU[4].show(x).splitlines()[2] == "----+----"
    assert SUDOKU[4].show(x, y).splitlines()[4] == "4 3 | 2 1"
    fen = "7k/8/5KQ1/8/8/8/8/8 w - - 0 1"
    picture = CHESS.show(*CHESS.parse(fen)).splitlines()
    assert picture[0].split() == [".", ".", ".", ".", ".", ".", ".", "k"]
    assert picture[1].split()[6] == "[.]" and picture[2].split()[6] == "(Q)"
    assert BITS.show(*BITS.parse("1101")) == "bits  1101\nsums  1001"


# --------------------------------------------------------------------------------------------------
# data.py: files


@pytest.mark.parametrize("opener, suffix", [(open, ""), (gzip.open, ".gz")])
def test_lichess_files_are_read(tmp_path, opener, suffix):
    lines = Path(many_mates(tmp_path)).read_text().splitlines()
    path = write_rows(tmp_path / f"p.csv{suffix}", *lines, *HARD, opener=opener)
    s = data.splits(CHESS, 0, 20, 2, 1, 20, path, tmp_path)
    assert all(marked(y) == (chess.H5, chess.F7) for p in s.values() for y in p.y)
    assert all(len(p) for p in s.values())
    assert set(s["train"].rating) == {1500} and set(s["hard"].rating) == {1700}

    # 2,000 is hard, 2,001 is too hard
    few = write_rows(tmp_path / "few.csv", HEADER["chess"], *HARD)
    assert data.splits(CHESS, 0, 0, 0, 0, 2, few)["hard"].rating.tolist() == [1601, 2000]
    with pytest.raises(data.UserError, match="few.csv has only 0 train, .* 2 hard"):
        data.splits(CHESS, 0, 0, 0, 0, 3, few)


@pytest.mark.parametrize(
    "name, row, reason",
    [
        ("chess", f"x,{FEN},a7a6 h5h8,1500", "illegal"),
        ("chess", f"x,{FEN},a7a6,1500", "two moves"), ("chess", "x,8/8/8,a1a2 a3a4,1500", "rows"),
        ("chess", f"x,{FEN},0000 a7a6,1500", "two moves"),
        ("chess", f"x,{FEN},a7a6 h5f7,high", "'high'"),
        ("chess", f"x,{'8/' * 7}8,a1a2 a2a3,9", "legal"),
        ("chess", f"x,{FEN},a7a6 h5f7,{'9' * 30}", "not a whole number below"),
        ("chess", f"x,{FEN},a7a6 h5f7,-5", "not a whole number below"),
        ("chess", f'x,"{FEN},a7a6,1', "quote"), ("chess", f"x,{FEN}", "2 fields"),
        ("chess", f"x,{FEN},a7a6 h5f7,1500,", "5 fields"),
        ("sudoku", f"s,{QUESTION}.,{ANSWER},0", "17 char"),
        ("sudoku", f"s,{QUESTION},{ANSWER[:-1]}x,0", "'x'"),
        ("sudoku", f"s,2{QUESTION[1:]},{ANSWER},0", "no solution|not the solution"),
        ("sudoku", f"s,{QUESTION},{ANSWER[:-2]}12,0", "not the solution"),
        ("sudoku", f"s,{QUESTION},{ANSWER[:-1]}.,0", "not the solution"),
        ("sudoku", f"s,{QUESTION},{ANSWER},", "rating ''"),
        ("sudoku", f"s,{'.' * 16},{ANSWER},0", "no clues"),
        ("sudoku", f"s,1{'.' * 15},{ANSWER},0", "several solutions"),
        ("sudoku", f"s,11{'.' * 14},{ANSWER},0", "no solution"),
    ],
)
def test_a_bad_row_is_refused_with_its_line_and_reason(tmp_path, name, row, reason):
    task = TASK.get(name, SUDOKU[4])
    good = HARD[:1] if name == "chess" else [f"s,{QUESTION},{ANSWER},0"]
    path = write_rows(tmp_path / "p.csv", HEADER[name], *good, row, *good)
    with pytest.raises(data.UserError, match=f"p.csv line 3: .*({reason})") as refusal:
        data.splits(task, 0, 50, 0, 0, 0, path)
    assert "\n" not in str(refusal.value)


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    lines = ["FEN,Moves,Rating"] + [line.removeprefix("b,") for line in HARD]
    path = tmp_path / "p.csv"
    path.write_text("\n".join(lines), encoding="utf-8-sig")
    assert path.read_bytes().startswith(b"\xef\xbb\xbfFEN")
    assert len(data.splits(CHESS, 0, 0, 0, 0, 2, str(path))["hard"]) == 2


def test_a_file_is_read_to_its_end_and_empty_lines_are_none(tmp_path):
    row = f"s,{QUESTION},{ANSWER},0"
    path = write_rows(tmp_path / "p.csv", HEADER["sudoku"], *[row] * 1030, "", row)
    assert sum(map(len, data.read_puzzles(SUDOKU[4], path))) == 1031


def test_unusable_files_are_named(tmp_path, monkeypatch):
    packed = gzip.compress("\n".join([HEADER["chess"], *HARD]).encode())
    (tmp_path / "cut.csv.gz").write_bytes(packed[:-20])
    (tmp_path / "p.csv.zst").write_bytes(b"")
    write_rows(tmp_path / "column.csv", "PuzzleId,FEN,Moves", *HARD)
    write_rows(tmp_path / "rows.csv", HEADER["sudoku"])
    monkeypatch.setitem(sys.modules, "zstandard", None)
    for task, name, reason in (
        (CHESS, "cut.csv.gz", "cannot be read"), (CHESS, "p.csv.zst", "pip install zstandard"),
        (CHESS, "column.csv", "line 1: no column 'Rating'"), (CHESS, "none.csv", "No such fi"),
        (CHESS, ".", "directory"), (SUDOKU[9], "rows.csv", "no rows"),
    ):
        with pytest.raises(data.UserError, match=f"{name}.*{reason}"):
            data.splits(task, 0, 4, 0, 0, 0, str(tmp_path / name))


@pytest.mark.parametrize("path", ["", ",", "a.csv,", "a,b,c"])
def test_empty_and_surplus_file_names_are_refused(path):
    with pytest.raises(data.UserError, match="must be FILE or TRAIN,TEST"):
        data.splits(CHESS, 0, 1, 0, 0, 0, path)
    with pytest.raises(data.UserError, match="reads no files"):
        data.splits(BITS, 0, 1, 0, 0, 0, path)


def nine_grids():
    """Grids of 9x9 sudoku, each with an easily solved puzzle."""
    shifts = [3 * (r % 3) + r // 3 + c for r in range(9) for c in range(9)]
    grids = []
    for swap in range(40):
        digits = list("123456789")
        random.Random(swap).shuffle(digits)
        grids.append("".join(digits[i % 9] for i in shifts))
    return grids


def two_files(folder):
    """25 boards for training, and 20 for the test, five of which are among the first."""
    lines = [f"s,{'.' * 9}{g[9:]},{g},{k % 5}" for k, g in enumerate(nine_grids())]
    train = write_rows(folder / "train.csv", HEADER["sudoku"], *lines[:25])
    test = write_rows(folder / "test.csv", HEADER["sudoku"], *lines[20:])
    return f"{train},{test}"


def test_the_second_file_is_for_the_tests_and_shares_no_grid_with_the_first(tmp_path):
    grids = nine_grids()
    easy = [f"s,{g[:72]}{'.' * 9},{g},{k % 5}" for k, g in enumerate(grids)]
    other = [f"s,{'.' * 9}{g[9:]},{g},{k % 5}" for k, g in enumerate(grids)]
    train = write_rows(tmp_path / "train.csv", HEADER["sudoku"], *easy[:25])
    test = write_rows(tmp_path / "test.csv", HEADER["sudoku"], *other)
    new = {g for g in grids[25:]}

    s = data.splits(SUDOKU[9], 0, 10, 0, 5, 3, f"{train},{test}")

    assert s["train"].rating.max() == 3 and (s["hard"].rating == 4).all()
    for level in ("easy", "hard"):
        assert {"".join(map(str, y)) for y in s[level].y} <= new
    assert {"".join(map(str, y)) for y in s["train"].y} <= set(grids[:25])
    assert data.describe_levels(SUDOKU[9], f"{train},{test}") == {
        "easy": f"rated below 4 in {train}", "hard": "rated 4 and more",
    }

    # what is easy does not depend on the test file
    flat = [re.sub(r"\d+$", "0", line) for line in other]
    flat = write_rows(tmp_path / "flat.csv", HEADER["sudoku"], *flat)
    again = data.splits(SUDOKU[9], 0, 10, 0, 0, 0, f"{train},{flat}")
    assert same(again["train"], s["train"])


@pytest.mark.parametrize(
    "ratings, cut",
    [(range(10), 8), ([0] * 9 + [2], 1), ([2, 2, 4, 4], 4), ([1] * 7 + [2, 3, 4], 3), ([5], 6)],
)
def test_the_hardest_fifth_of_a_file_is_hard_but_never_all(tmp_path, ratings, cut):
    lines = [f"s,{QUESTION},{ANSWER},{rating}" for rating in ratings]
    path = write_rows(tmp_path / "p.csv", HEADER["sudoku"], *lines)
    assert data.rating_limits(SUDOKU[4], path) == (cut, np.inf)


def test_long_strings_are_shown_64_to_a_line():
    x, y = BITS.parse("1" * 70)
    lines = BITS.show(x, y).split("\n")
    assert lines == ["bits  " + "1" * 64, "sums  " + "10" * 32, "bits  111111", "sums  101010"]
    assert BITS.show(x).split("\n") == lines[::2]

    # with marks half as many, and each bit above its sum
    lines = BITS.show(x, y, lambda i, text: text + "+").split("\n")
    assert lines[:2] == ["bits  " + " ".join("1" * 32), "sums  " + "1+0+" * 16]
    assert len(lines) == 6


# --------------------------------------------------------------------------------------------------
# data.py: cache and processes


def test_the_number_of_cores_and_the_cache_change_nothing(tmp_path, monkeypatch):
    def make(folder, n):
        return data.splits(SUDOKU[4], 1, n, 5, 5, 5, cache=tmp_path / folder)

    once = make("a", 300)
    make("b", 10)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(1), raising=False)
    assert same(once, make("b", 300))


@pytest.mark.parametrize("cores", [1, 2])
def test_chunks_made_on_all_cores_come_in_order_and_none_is_left_out(cores, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores), raising=False)
    stream = data.parallel(abs, 3)
    assert [next(stream) for _ in range(20)] == list(range(3, 23))
    stream.close()


def test_a_cache_is_for_one_seed_one_set_of_options_and_one_code(tmp_path, monkeypatch):
    def make(task, seed):
        return data.splits(task, seed, 9, 1, 1, 1, cache=tmp_path)

    def files():
        return {path for path in tmp_path.rglob("*.npz")}

    first = make(SUDOKU[4], 0)
    known = files()
    assert same(first, make(SUDOKU[4], 0)) and files() == known

    assert not same(first, make(SUDOKU[4], 1)) and len(files()) == 2
    make(SUDOKU[6], 0)
    assert len(files()) == 3
    monkeypatch.setattr(data, "code_hash", lambda: "0" * 12)
    make(SUDOKU[4], 0)
    assert len(files()) == 4


def test_a_cache_serves_what_it_holds_and_a_damaged_one_is_made_again(
    tmp_path, capsys, monkeypatch
):
    def make():
        return data.splits(SUDOKU[4], 0, 20, 1, 1, 1, cache=tmp_path)

    first = make()
    (file,) = tmp_path.rglob("*.npz")
    whole = file.read_bytes()
    np.savez(tmp_path / "other", x=[1])
    for content in (whole[:-300], b"", b"PK no zip", (tmp_path / "other.npz").read_bytes()):
        file.write_bytes(content)
        assert same(first, make()) and f"{file}: " in capsys.readouterr().err

    # the control: a whole one is used, in silence
    monkeypatch.setattr(data.Sudoku, "chunk", None)
    assert same(first, make()) and capsys.readouterr().err == ""


def test_a_full_disk_costs_the_cache_only(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    s = data.splits(SUDOKU[4], 0, 3, 1, 1, 1, cache=tmp_path / "file" / "cache")
    assert len(s["train"]) == 3 and "cannot be kept" in capsys.readouterr().err


def test_of_two_processes_that_write_one_file_neither_sees_the_others_half(tmp_path, monkeypatch):
    file = tmp_path / "f"
    write = Path.write_bytes

    def overtaken(self, content):
        """Write a part, then let another process write all of its own, then write the rest."""
        write(self, content[:1])
        monkeypatch.setattr(Path, "write_bytes", write)
        monkeypatch.setattr(os, "getpid", lambda: 0)
        data.write_atomic(file, b"theirs")
        assert file.read_bytes() == b"theirs"
        with open(self, "ab") as rest:
            rest.write(content[1:])

    monkeypatch.setattr(Path, "write_bytes", overtaken)
    data.write_atomic(file, b"ours")
    assert file.read_bytes() == b"ours" and list(tmp_path.iterdir()) == [file]


def test_the_clock_and_the_time_left(capsys, monkeypatch):
    now = iter([0, 10, 20, 21, 40, 41])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    report = data.progress("work")
    for done in (1, 25, 26, 50, 100):
        report(done, 100)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["work: 25 of 100, 1:00 left", "work: 50 of 100, 0:40 left",
                     "work: 100 of 100, 0:00 left"]         # the last one, however soon
    assert data.clock(3725.9) == "62:05"


def test_work_that_is_done_soon_shows_no_progress(capsys):
    report = data.progress("work")
    for done in (1, 2, 3):
        report(done, 3)
    assert capsys.readouterr().err == ""


# --------------------------------------------------------------------------------------------------
# data.py: the command line


def data_cli(folder, *args, **options):
    command = [sys.executable, data.__file__, *map(str, args)]
    return subprocess.Popen(
        command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


def test_two_processes_print_the_same_and_only_ascii(tmp_path):
    args = ("--task", "chess", "--level", "hard", "--n", 1)
    runs = [data_cli(tmp_path, *args, env=os.environ | {"PYTHONIOENCODING": "ascii"}) for _ in "ab"]
    (out, err), (other, _) = (run.communicate() for run in runs)
    assert out == other and out.isascii() and out.count("rating 2") == 1 and not err
    assert not any(run.returncode for run in runs)


def test_puzzles_of_a_file_are_printed(tmp_path):
    path = write_rows(tmp_path / "p.csv", HEADER["chess"], *HARD)
    out, err = data_cli(
        tmp_path, "--task", "chess", "--files", path, "--level", "hard", "--n", 2
    ).communicate()
    assert "rating 1601" in out and "rating 2000" in out and not err


@pytest.mark.parametrize(
    "args, message",
    [
        (("--task", "go"), "invalid choice: 'go'"),
        (("--task", "sudoku", "--side", 5), "choose 4, 6"),
        (("--bits", 0), "--bits 0: must be 1 to"), (("--bits", 512), "differ from --bits"),
        (("--n", -1), "data.py: --n -1: must"),
        (("--files", "x"), "no files"), (("--files", ""), "no files"),
        (("--task", "chess", "--files", ""), "must be FILE"), (("--side", 4), "--side 4"),
        (("--bits", "999999999999"), "--bits 999999999999: must be"),
        (("--task", "chess", "--marks", "x"), "choose from_to or squares"),
        (("--seed", -1), "--seed -1"),
    ],
)
def test_the_command_line_refuses_in_one_line(tmp_path, args, message, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = exit_code(data.main, list(map(str, args)))
    out, err = capsys.readouterr()
    assert code == 2 and message in err and err.count("\n") == 1 and not out


def test_two_tasks_may_have_an_option_of_one_name(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)

    @dataclass(frozen=True)
    class Other(toy()):
        side: int = 3

    monkeypatch.setitem(data.TASKS, "toy", Other())
    data.main(["--task", "toy", "--side", "7", "--n", "2"])
    assert capsys.readouterr().out.count("rating") == 2


def processes_of(group):
    """The processes of a group that have not ended."""
    found = subprocess.run(["ps", "-eo", "pgid,stat,pid"], capture_output=True, text=True).stdout
    lines = [line.split() for line in found.splitlines()[1:]]
    return [pid for pgid, state, pid in lines if int(pgid) == group and state[0] != "Z"]


@pytest.mark.parametrize(
    "sign, code", [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)]
)
def test_workers_end_with_their_parent_and_what_was_made_is_kept(tmp_path, sign, code):
    command = ("--task", "sudoku", "--side", 4, "--n", 1000000)
    run = data_cli(tmp_path, *command, start_new_session=True)
    until = time.monotonic() + 30
    while len(list(tmp_path.rglob("*.npz"))) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    assert len(processes_of(run.pid)) > 1

    run.send_signal(sign)

    _, err = run.communicate()
    assert run.returncode == code
    assert code < 0 or err.endswith("data.py: stopped\n") and "Traceback" not in err
    until = time.monotonic() + 10
    while processes_of(run.pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not processes_of(run.pid)
    assert len(list(tmp_path.rglob("*.npz"))) >= 2


@pytest.mark.parametrize("n", ["3", "5000"])      # it shows at the last flush, or while printing
def test_a_reader_that_goes_away_ends_the_program_quietly(n):
    reading, writing = os.pipe()
    os.close(reading)
    buffered = {name: v for name, v in os.environ.items() if name != "PYTHONUNBUFFERED"}
    # data.run, which all programs share
    ended = subprocess.run([sys.executable, data.__file__, "--n", n], stdout=writing,
                           stderr=subprocess.PIPE, text=True, env=buffered)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (1, "")


# --------------------------------------------------------------------------------------------------
# looped.py: the model


def rms_norm(norm, u):
    return norm.weight * u / (u.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def attention(attn, u, grid, mask):
    """torch's own attention under a boolean mask; RoPE as a turn in the complex plane."""
    B, L, D = u.shape
    axes = [torch.arange(n).double() for n in grid]
    place = torch.cartesian_prod(*axes).view(L, -1)
    pairs = D // attn.heads // 2 // len(grid)
    frequency = attn.rope_base ** (-torch.arange(pairs).double() / pairs)
    turn = torch.exp(1j * (place[:, :, None] * frequency).flatten(1))

    q, k, v = attn.qkv(u).view(B, L, 3, attn.heads, -1).permute(2, 0, 3, 1, 4)
    turned = []
    for norm, t in ((attn.q_norm, q), (attn.k_norm, k)):
        z = torch.complex(*rms_norm(norm, t).chunk(2, -1)) * turn
        turned.append(torch.cat((z.real, z.imag), -1))
    o = F.scaled_dot_product_attention(*turned, v, mask)
    return attn.out(o.transpose(1, 2).flatten(2))


def windows(L, w, inwards=True):
    """[L, L]: of all windows of w tokens a query sees the one whose middle is nearest to it."""
    i = torch.arange(L)[:, None]
    starts = torch.arange(L - w + 1) if inwards else torch.arange(-w, L)
    nearest = (starts + w // 2 - i).abs().argmin(1, keepdim=True)
    start = starts[nearest]
    return (i.T >= start) & (i.T < start + w)


@pytest.mark.parametrize("grid", [(3,), (5,), (8,), (100,), (6, 6), (2, 3)], ids=str)
def test_attention_is_torchs_own_with_the_window_as_a_mask(grid):
    L = math.prod(grid)
    u = torch.randn(2, L, 16).double()
    for w in (0, 1, 3, 5, 7):
        seen = min(w or L, L)           # a window that is longer than the string sees all of it
        attn = looped.Attention(16, 2, grid, w, 10.0).double()
        for norm in (attn.q_norm, attn.k_norm):
            norm.weight.data = torch.rand(8).double() + 0.5
        got = attn(u)
        assert close(got, attention(attn, u, grid, windows(L, seen)), atol=1e-12), w

        # controls: a narrower window, places in one row, windows that do not shift inwards;
        # where a token sees itself only, they are no different
        others = [(grid, windows(L, max(1, seen - 2))),
                  ((L, 1), windows(L, seen)),
                  (grid, windows(L, seen if w else 3, inwards=False))]
        for other in others:
            assert close(got, attention(attn, u, *other), atol=1e-12) == (seen == 1), w


def test_the_norm_and_the_rotary_angles_are_exact_to_fp32_under_bf16(monkeypatch):
    norm = looped.RMSNorm(64)
    u = torch.randn(5, 64).bfloat16()
    exact = u.double() / (u.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert close(norm(u).double(), exact, atol=1e-5)
    assert not close(exact.bfloat16().double(), exact, atol=1e-3)       # control

    like = []
    spy(monkeypatch, "rotary_table", lambda grid, head_dim, base, tensor: like.append(tensor.dtype))
    model = looped.LoopedTransformer(tiny())
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randint(2, (2, 13)), 1)
    assert set(like) == {torch.float32}


def test_windowed_attention_costs_O_of_L():
    def largest_tensor(L, window):
        sizes = []
        attn = looped.Attention(4, 1, (L,), window, 1e4)
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()), print)
        plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
        with hooks, plain:
            attn(torch.randn(1, L, 4))
        return max(sizes)

    assert largest_tensor(4096, 5) <= 9 * largest_tensor(512, 5)
    assert largest_tensor(2048, 0) >= 60 * largest_tensor(256, 0)       # control: all pairs


@pytest.mark.parametrize("task, base, window, grid", [("prefix_sums", 1e4, 5, (13,)),
                                                      ("sudoku", 10.0, 0, (4, 4)),
                                                      ("chess", 10.0, 0, (8, 8))])
def test_each_task_has_its_own_grid_window_and_base_of_rope(task, base, window, grid):
    options = {"task": task, "side": 4} if task == "sudoku" else {"task": task}
    blocks = looped.LoopedTransformer(tiny(**options, blocks=2)).blocks
    assert len(blocks) == len(set(blocks)) == 2
    for block in blocks:
        attn = block.attn
        assert (attn.rope_base, attn.window, attn.grid) == (base, window, grid)
        assert attn.heads == TINY["heads"]


def gru(cell, x, h):
    """A gated recurrent unit: z keeps, r forgets, n is new."""
    x_r, x_z, x_n = F.linear(x, cell.weight_ih, cell.bias_ih).chunk(3, -1)
    h_r, h_z, h_n = F.linear(h, cell.weight_hh, cell.bias_hh).chunk(3, -1)
    r = (x_r + h_r).sigmoid()
    z = (x_z + h_z).sigmoid()
    n = (x_n + r * h_n).tanh()
    return (1 - z) * n + z * h


def by_the_book(model, h, e, norm, recall):
    """One loop as the equations say it; a norm that the model lacks has gain 1."""
    def mix(u):
        return model.W_h(u) + model.W_e(e)

    def read(u):
        return mix(u) if recall == "internal" else u

    gain = looped.RMSNorm(16).double()
    for block in model.blocks:
        norm_in = getattr(block, "norm_in", gain)
        norm_out = getattr(block, "norm_out", gain)
        if recall == "external":
            h = mix(h)
        for layer in (block.attn, block.mlp):
            if norm == "pre":
                h = h + layer(read(rms_norm(norm_in, h)))
            elif norm == "peri":
                h = h + rms_norm(norm_out, layer(read(rms_norm(norm_in, h))))
            elif norm == "outer":
                h = rms_norm(norm_out, h + layer(read(h)))
            elif norm == "gru":
                h = gru(block.gru, rms_norm(norm_out, layer(read(rms_norm(norm_in, h)))), h)
            else:
                raise ValueError(f"no equation here for the norm {norm}")
    return h


VARIANTS = list(itertools.product(NORMS, RECALLS))


@pytest.mark.parametrize("norm, recall", VARIANTS)
def test_step_is_the_papers_equation_and_no_other_variants(norm, recall):
    model = model_of(norm=norm, recall=recall, blocks=2)
    h, e = torch.randn(2, 3, 9, 16).double()
    got = model.step(h, model.recall_term(e))
    assert close(got, by_the_book(model, h, e, norm, recall))

    # controls: all other variants for which the model has the weights
    for other in VARIANTS:
        lacks_recall = recall == "none" and other[1] != "none"
        lacks_gru = norm != "gru" and other[0] == "gru"
        if other != (norm, recall) and not lacks_recall and not lacks_gru:
            assert not close(got, by_the_book(model, h, e, *other)), other


@pytest.mark.parametrize("norm, recall", VARIANTS)
def test_every_parameter_has_a_gradient(norm, recall):
    model = model_of(norm=norm, recall=recall, blocks=2)
    x, y = torch.randint(2, (2, 3, 9))
    for h in (None, torch.randn(3, 9, 16).double()):
        model.zero_grad()
        F.cross_entropy(model(x, 3, h)[0].mT, y).backward()

        grads = {name: p.grad for name, p in model.named_parameters()}
        unused = [name for name, g in grads.items() if g is None]
        input_is_cut_off = recall == "none" and h is not None
        assert unused == (["tok_emb.weight"] if input_is_cut_off else [])
        for name, g in grads.items():
            assert name in unused or (g.isfinite().all() and g.any()), name


@pytest.mark.parametrize("task, text", [("prefix_sums", "1" * 40), ("sudoku", "." * 16)])
@pytest.mark.parametrize("positions", ["relative", "absolute"])
def test_relative_positions_do_not_show_the_place_in_a_run_of_equal_tokens(task, text, positions):
    options = {"bits": 40} if task == "prefix_sums" else BOARD
    model = model_of(**options, positions=positions)
    x = torch.tensor(model.task.tokens(text, model.task.symbols)).long()
    if task == "prefix_sums" and positions == "absolute":
        x = F.pad(x, (1, 0), value=data.START)

    h = model(x[None], 20)[1][0, -len(text):]
    same_everywhere = close(h, h[:1].expand_as(h), atol=1e-9)
    assert same_everywhere == (positions == "relative")


@pytest.mark.parametrize("options, L", [({"bits": 99}, 100), (BOARD, 16)])
def test_the_compiled_step_is_one_graph_and_equals_the_eager_step(options, L):
    model = model_of(**options)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    step = torch.compile(looped.LoopedTransformer.step, fullgraph=True, dynamic=False,
                         backend=backend)
    for h, r in torch.randn(2, 2, 2, L, 16).double():           # twice the same shape
        assert close(step(model, h, r), model.step(h, r), atol=1e-12)
    assert len(graphs) == 1


def test_embed_rms_scales_the_embeddings_and_nothing_else():
    def weights(**options):
        torch.manual_seed(0)
        return looped.LoopedTransformer(tiny(**BOARD, **options)).state_dict()

    plain = weights()
    louder = weights(embed_rms=1.3)

    assert plain["tok_emb.weight"].square().mean().sqrt().item() == pytest.approx(0.65)
    assert plain["pos_emb"].square().mean().sqrt().item() == pytest.approx(0.325, rel=0.2)
    for name in plain:
        by = 2 if name in ("tok_emb.weight", "pos_emb") else 1
        assert close(louder[name], by * plain[name]), name


def test_the_gru_begins_by_keeping_most_of_the_state():
    model = looped.LoopedTransformer(tiny(norm="gru", blocks=2))
    for block in model.blocks:
        cell = block.gru
        assert cell.bias_ih.tolist() == cell.bias_hh.tolist() == [0] * 16 + [1] * 16 + [0] * 16

        w = cell.weight_hh.detach()
        assert close(w.T @ w, torch.eye(16), atol=1e-5) and cell.weight_ih.abs().max() > 0.26

        # without this the new state is 0 where the input is, so that what is kept is seen alone
        cell.weight_hh.data.zero_()
        kept = cell(torch.zeros(1, 16), torch.ones(1, 16))
        assert close(kept, torch.full((1, 16), 0.8808), atol=1e-4)      # sigmoid(2)


@pytest.mark.parametrize("name", ["norm", "train", "decay", "optimizer"])
def test_a_choice_without_its_branch_is_an_error_that_names_it(name, monkeypatch, tmp_path):
    # a forker adds the choice to Config, and forgets the branch
    field = looped.Config.__dataclass_fields__[name]
    more = field.metadata["choices"] + ("mine",)
    monkeypatch.setattr(field, "metadata", dict(field.metadata) | {"choices": more})
    cfg = tiny(**{name: "mine"})
    with pytest.raises(ValueError, match=f"{name}.*mine.* has no branch"):
        train(cfg, tmp_path)

    # control: the same road with a choice that has a branch
    cfg = tiny(**{name: field.metadata["choices"][0]})
    train(cfg, tmp_path)


# --------------------------------------------------------------------------------------------------
# looped.py: the two losses


@pytest.mark.parametrize("rest", [0.0, 0.7])
def test_carry_loss_is_the_loss_of_puzzles_unrolled_one_by_one(rest):
    model = model_of(loops=6, rest=rest)
    x, y, new_x, new_y = torch.randint(2, (4, 4, 9))
    h = unroll(model, model.embed(x), model.embed(x), 2)        # its graph must not be followed
    age = torch.tensor([2, 5, 6, 7])
    carry = {"x": x, "y": y, "h": h.detach(), "age": age}
    loss, after = looped.carry_loss(model, (new_x, new_y), carry)

    # the last two have had their 6 loops: others take their places
    x = torch.cat((x[:2], new_x[2:]))
    y = torch.cat((y[:2], new_y[2:]))
    assert same([after["x"], after["y"]], [x, y])
    assert after["age"].tolist() == [4, 7, 2, 2]

    def naive(h, rest=rest):
        total = 0
        for b in range(4):
            e = model.embed(x[b:b + 1])
            start = h[b:b + 1] if b < 2 else e
            middle = unroll(model, start, e, 1)
            end = unroll(model, middle, e, 1)
            assert close(end[0], after["h"][b], atol=1e-12)
            total += F.cross_entropy(model.readout(end)[0].float(), y[b]) / 4
            # the length of the state is a number here: growing is no way to look still
            for old, new in zip(middle[0], end[0], strict=True):
                total += rest / (4 * 9) * ((new - old).norm() / new.norm().item()) ** 2
        return total

    assert close(loss.double(), naive(h).double(), atol=1e-6)
    assert not after["h"].requires_grad
    ours = gradient(model, loss)
    assert close(ours, gradient(model, naive(h.detach())), atol=1e-6)

    # controls: the gradient through all loops is another one, and so is that of another weight
    assert (ours - gradient(model, naive(h))).abs().max() > 1e-4
    assert (ours - gradient(model, naive(h.detach(), rest + 0.1))).abs().max() > 1e-4


def test_the_first_carry_holds_new_puzzles_of_evenly_spread_ages():
    model = model_of(batch=8, loops=4)
    x, y = torch.randint(2, (2, 8, 9))
    carry = looped.start_carry(model, (x, y))
    assert carry["age"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert not carry["h"].requires_grad
    assert same([carry["x"], carry["y"], carry["h"]], [x, y, model.tok_emb(x).detach()])


def test_progressive_loss_is_the_naive_one_and_draws_n_and_k_uniformly():
    model = model_of()
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randint(2, (2, 2, 9))
    real_step = model.step
    modes = []

    def draw(step):
        """-> the loss, how many loops had no gradient, how many had one."""
        modes.clear()

        def counted(h, r):
            modes.append(torch.is_grad_enabled())
            return step(h, r)

        model.step = counted
        loss = looped.progressive_loss(model, (x, y), rng)
        n = modes.count(False)
        k = modes.count(True)
        assert modes == [False] * n + [True] * k
        return loss, n, k

    drawn = []
    for _ in range(8):
        loss, n, k = draw(real_step)
        drawn.append(n)
        model.step = real_step
        e = model.embed(x)
        start = unroll(model, e, e, n).detach() if n > 0 else e
        naive = F.cross_entropy(model.readout(unroll(model, start, e, k)).float().mT, y)
        assert close(loss, naive, atol=1e-6)
        assert close(gradient(model, loss), gradient(model, naive), atol=1e-6)
    assert min(drawn) == 0 < max(drawn)         # with n = 0 the start keeps its gradient

    # n is one of 0 .. 3, and k one of what is left of 4 loops
    draws = 1500
    count = {(n, k): 0 for n in range(4) for k in range(1, 5 - n)}
    for _ in range(draws):
        _, n, k = draw(lambda h, r: h)
        count[n, k] += 1
    for (n, _), times in count.items():
        expected = draws / 4 / (4 - n)
        assert abs(times - expected) < 6 * expected ** 0.5


# --------------------------------------------------------------------------------------------------
# looped.py: evaluation and halting


def test_evaluate_is_the_naive_computation():
    model = model_of(bits=16, skip=0.5)         # the table is of plain loops all the same
    x = F.pad(torch.randint(2, (7, 16)), (1, 0), value=data.START)
    paths = []
    for b in range(7):
        e = model.embed(x[b:b + 1])
        paths.append([unroll(model, e, e, t)[0].detach() for t in range(7)])

    # the labels are what the model says after 3 loops, but for one sum, and for the start token of
    # another puzzle, which is not scored
    guess = {t: torch.stack([model.readout(path[t]).argmax(-1) for path in paths])
             for t in (1, 3, 4)}
    y = guess[3].clone()
    y[0, 5] = 1 - y[0, 5]
    y[1, 0] = 1 - y[1, 0]
    got = looped.evaluate(model, x.repeat(40, 1), y.repeat(40, 1), (1, 3, 4))   # two chunks

    def move(path, t):
        return ((path[t + 1] - path[t]).norm(dim=1) / path[t].norm(dim=1)).max()

    for t in (1, 3, 4):
        right = (guess[t] == y).double()
        naive = {
            "exact": right.prod(1).mean(), "token": right[:, 1:].mean(),
            "residual": sum(move(path, t) for path in paths) / 7,
            "norm_ratio": sum(path[t].norm() / path[1].norm() for path in paths) / 7,
        }
        for name, value in naive.items():
            assert got[t][name] == pytest.approx(value.item(), rel=1e-6), (t, name)
    assert got[3]["exact"] == pytest.approx(5 / 7)
    assert got[3]["token"] == pytest.approx(1 - 1 / (7 * 16))


def test_a_string_that_is_longer_than_a_chunk_is_a_chunk_of_its_own():
    assert looped.chunk_size(torch.empty(2, 5000)) == 1
    assert looped.chunk_size(torch.empty(2, 500)) == 8


def pull(self, h, r):
    """A step to another point, faster with more ones in the puzzle -> new h, number of ones."""
    ones = (r == self.tok_emb.weight[1]).all(-1).double().sum(1)[:, None, None]
    return h + (0.2 + 0.03 * ones) * (3 * r.roll(1, 1) - h), ones


@pytest.mark.parametrize("tol, last", [(1e-4, 200), (1e-4, 30), (1e-7, 60)])
def test_each_puzzle_stops_by_itself_in_solve_and_beside_the_table(tol, last, monkeypatch):
    model = add_input(model_of())
    x = torch.tensor([[1] * k + [0] * (9 - k) for k in range(10)]).repeat(50, 1)    # two chunks

    def step(self, h, r):
        """The puzzle with two ones goes round for ever."""
        new, ones = pull(self, h, r)
        return torch.where(ones == 2, -h, new)

    monkeypatch.setattr(looped.LoopedTransformer, "step", step)
    done = []
    logits, used, converged = looped.solve(model, x, tol=tol, max_loops=last,
                                           progress=lambda *now: done.append(now))
    for b in (*range(10), 499):
        e = h = model.embed(x[b:b + 1])
        t = 0
        rests = False
        while t < last and not rests:
            old, h = h, model.step(h, model.recall_term(e))
            rests = ((h - old).norm(dim=-1) / old.norm(dim=-1)).max().item() < tol
            t += 1
        assert (used[b], converged[b]) == (t, rests)
        assert close(logits[b], model.readout(h)[0])
    assert converged.any() and not converged.all() and len(set(used.tolist())) > 4

    # the table's own halting is the same, and the table that of evaluate
    table, labels, *halted = looped.evaluate_and_halt(model, x, x, [1, last], tol=tol,
                                                      progress=lambda *now: done.append(now))
    assert done == 2 * [(455, 500), (500, 500)]
    assert same([labels, *halted], [logits.argmax(-1), used, converged])
    if tol > looped.ROUNDING:
        assert table == looped.evaluate(model, x, x, [1, last])


def test_a_puzzle_at_rest_costs_nothing_and_a_nan_is_not_at_rest(monkeypatch):
    model = add_input(model_of())
    x = torch.tensor([[1] * k + [0] * (9 - k) for k in range(10)])
    asked = []

    def step(self, h, r):
        """The puzzle with a single one breaks."""
        asked.append(len(h))
        new, ones = pull(self, h, r)
        return torch.where(ones == 1, math.nan, new)

    monkeypatch.setattr(looped.LoopedTransformer, "step", step)
    tol = 1e-4
    path = [(h.clone(), residual.clone()) for _, h, residual in looped.run_loop(model, x, 60, tol)]
    assert len(path) == 60

    # each puzzle is asked as long as it moves, and then stays where it was
    moved = torch.stack([residual for _, residual in path])             # [60, 10]
    still_moves = ~(moved < tol)
    before = torch.cat([torch.ones(1, 10, dtype=torch.bool), still_moves[:-1]])
    assert asked == before.sum(1).tolist()
    assert asked[0] == 10 and asked[-1] == 1        # the control: the NaN is asked to the end
    for b in (0, 2, 9):
        rest = int((~still_moves[:, b]).nonzero()[0])
        assert same(path[rest][0][b], path[-1][0][b])
        assert 0 < moved[rest, b] < tol

    # so it is in the table
    asked.clear()
    looped.evaluate(model, x, x, [99])
    assert len(asked) == 100 and asked[0] == 10 and asked[-1] == 1

    # what the table calls at rest has nothing left but rounding
    assert 1 < looped.ROUNDING / torch.finfo(torch.float32).eps < 20


def test_evaluate_and_solve_keep_no_graph():
    model = model_of()
    real = model.step
    modes = []

    def step(h, r):
        modes.append(torch.is_grad_enabled())
        return real(h, r)

    model.step = step
    x = torch.randint(2, (3, 9))
    looped.evaluate(model, x, x, [2])
    looped.solve(model, x, max_loops=2)
    assert modes and not any(modes)


def test_tokens_that_skip_a_loop_keep_their_state_and_end_a_circle_but_no_drift(monkeypatch):
    model = add_input(model_of())
    x = torch.randint(2, (400, 9))
    seed = torch.Generator().manual_seed

    # a state that grows is at rest nowhere, even where hardly a token moves
    monkeypatch.setattr(looped.LoopedTransformer, "step", lambda self, h, r: 1.05 * h)
    assert not looped.solve(model, x, max_loops=9, skip=0.99)[2].any()

    # all tokens take over from their left neighbour: at once they go round for ever, one by one
    # they end up alike
    monkeypatch.setattr(looped.LoopedTransformer, "step", lambda self, h, r: h.roll(1, 1))
    some = x[:20]
    assert not looped.solve(model, some, max_loops=900)[2].any()
    first, again = (looped.solve(model, some, max_loops=900, skip=0.5, generator=seed(0))
                    for _ in range(2))
    assert first[2].all() and same(first, again)

    # a loop: a quarter of the tokens stays, whole, and the next loop draws other ones
    e = model.embed(x)
    moved = e + 1
    monkeypatch.setattr(looped.LoopedTransformer, "step", lambda self, h, r: moved)
    path = [h.clone() for _, h, _ in looped.run_loop(model, x, 2, 0.0, 0.25, seed(0))]
    stays = (path[0] == e).all(-1)
    assert torch.equal(path[0], torch.where(stays[..., None], e, moved))
    assert 0.2 < stays.double().mean() < 0.3
    assert 0.04 < (path[1] == e).all(-1).double().mean() < 0.09         # 1/16
    again = next(looped.run_loop(model, x, 1, 0.0, 0.25, seed(0)))[1]
    assert torch.equal(again, path[0])


def test_a_board_that_does_not_converge_is_asked_again_in_another_guise(monkeypatch):
    model = looped.LoopedTransformer(tiny(**BOARD))
    x, truth = sets_of(model.cfg)["hard"]
    x, truth = x[:4], truth[:4]
    converges = iter([[True, False, False, False], [False, True, False], [True, False]])
    asked = []

    def one_try(model, x, tol, max_loops, skip, generator, progress):
        """Right where it converges, else nonsense; it takes 7 loops."""
        assert (tol, max_loops, skip) == (0.5, 99, 0.25)
        asked.append(x)
        converged = torch.tensor(next(converges))
        y = torch.tensor(model.task.prove(x.numpy())[0]).long()
        y[~converged] = len(asked)
        return give_marks(y, 5), torch.full((len(x),), 7), converged

    monkeypatch.setattr(looped, "loop_until_converged", one_try)
    logits, used, converged = looped.solve(model, x, tol=0.5, max_loops=99, skip=0.25, tries=3,
                                           generator=torch.Generator().manual_seed(0))
    labels = model.task.predict(logits)

    # board 0 rests in the first try, 2 in the second, 1 in the third, 3 never: its first answer
    assert converged.tolist() == [True, True, True, False]
    assert used.tolist() == [7, 21, 14, 21]
    assert torch.equal(labels[:3], truth[:3])
    assert (labels[3] == 1).all()

    # the guises are other boards, with as many clues
    assert [len(boards) for boards in asked] == [4, 3, 2]
    assert not torch.equal(asked[1], x[1:])
    expected, _ = model.task.rename(x[1:], torch.Generator().manual_seed(0))
    assert torch.equal(asked[1], expected)
    assert torch.equal((asked[1] > 0).sum(1), (x[1:] > 0).sum(1))


@pytest.mark.parametrize("right, n", [(0, 5), (3, 10), (64, 64), (120, 256)])
def test_wilsons_interval_holds_the_rates_that_the_count_does_not_contradict(right, n):
    low, high = looped.wilson(right / n, n)

    # at both ends the observed rate is 1.96 standard errors of that very rate away
    for end in (low, high):
        error = abs(right / n - end) - 1.96 * (end * (1 - end) / n) ** 0.5
        assert error == pytest.approx(0, abs=1e-9) or end in (0, 1)
    assert low < right / n < high or right in (0, n)
    assert 0 <= low < high <= 1


def scripted_report(monkeypatch, capsys, exact):
    """The report of a run whose evaluate gives exact[level][t] -> result, printed text."""
    cfg = tiny(n_test=6, n_hard=8, tol=0.01)
    model = looped.LoopedTransformer(cfg)
    sets = sets_of(cfg)

    def evaluate_and_halt(model, x, y, loops, progress, tol):
        assert tol == 0.01
        level, = [name for name in sets if sets[name][0] is x]
        rest = {"token": 0.0, "residual": 0.5, "norm_ratio": 1.0}
        table = {t: {"exact": exact[level][t]} | rest for t in loops}
        return table, y, torch.zeros(len(x)), torch.zeros(len(x), dtype=torch.bool)

    monkeypatch.setattr(looped, "evaluate_and_halt", evaluate_and_halt)
    result = looped.report(cfg, model, sets)
    return result, capsys.readouterr().out


def test_the_report_gives_the_tests_at_the_last_loop_count_and_the_best_only_beside(
        monkeypatch, capsys):
    exact = {"easy": {1: 0.25, 2: 0.875, 4: 0.5}, "hard": {1: 0.0, 2: 0.375, 4: 0.125},
             "train": {1: 1.0, 2: 1.0, 4: 1.0}, "val": {1: 1.0, 2: 1.0, 4: 1.0}}
    result, printed = scripted_report(monkeypatch, capsys, exact)
    for level in ("easy", "hard"):
        assert {t: row["exact"] for t, row in result[level].items()} == exact[level]
        assert result["halting"][level]["skip"] == 0

    # the rows are those of a script; Wilson's intervals of 3 of 6 and 1 of 8 by hand
    assert printed == """
 loops |  easy solved  residual |  hard solved  residual
     1 |        0.250   5.0e-01 |        0.000   5.0e-01
     2 |        0.875   5.0e-01 |        0.375   5.0e-01
     4 |        0.500   5.0e-01 |        0.125   5.0e-01

easy: 12 bits, 6 puzzles
  0.500 solved at 4 loops (95 % interval 0.188 to 0.812; best at 2 loops)
  1.000 solved when each stops by itself: 0 converge, 0 loops each

hard: 24 bits, 8 puzzles
  0.125 solved at 4 loops (95 % interval 0.022 to 0.471; best at 2 loops)
  1.000 solved when each stops by itself: 0 converge, 0 loops each
"""


def test_with_skip_or_tries_halting_is_that_of_solve_for_every_puzzle(monkeypatch, capsys):
    old = tiny(**BOARD, n_test=40, n_hard=40)
    sets = sets_of(old)
    converged = torch.arange(40) % 2 == 0
    right = torch.arange(40) % 5 == 0
    asked = []

    def solve(model, x, tol, max_loops, skip, tries, generator, progress):
        asked.append((tol, max_loops, skip, tries, torch.rand(1, generator=generator).item()))
        y = next(y for x_all, y in sets.values() if same(x_all, x))
        labels = torch.where(right[:, None], y, 0)
        return give_marks(labels, 5), torch.full((40,), 3), converged

    monkeypatch.setattr(looped, "solve", solve)
    first = torch.rand(1, generator=torch.Generator().manual_seed(3)).item()
    for skip, tries in ((0.75, 2), (0.75, 1), (0, 2)):
        # a resumed model's own options may be others
        cfg = tiny(**BOARD, seed=3, skip=skip, tries=tries, tol=0.01, eval_loops=5)
        asked.clear()
        result = looped.report(cfg, looped.LoopedTransformer(old), sets)
        assert asked == 2 * [(0.01, 5, skip, tries, first)]     # both levels begin at the seed
        for level in ("easy", "hard"):
            assert list(result[level]) == [1, 2, 4, 5]
            assert result["halting"][level] == {
                "n": 40, "tries": tries, "skip": skip, "loops": 3, "exact": 0.2, "converged": 0.5,
                "converged_and_right": 0.1}
        printed = capsys.readouterr().out
        assert printed.count("by itself: 20 converge, 3 loops each\n  (") == 2
        assert printed.count(f"skip {skip:g}") == (2 if skip else 0)
        assert printed.count(f"up to {tries} tries") == (2 if tries > 1 else 0)


def watched(capsys, script, eval_loops=2):
    """What watch prints if the model says script[0], script[1], ... -> the lines with sums, all."""
    cfg = tiny(bits=4, eval_loops=eval_loops, puzzle="1101")
    model = looped.LoopedTransformer(cfg)
    answers = iter(script)
    model.readout = lambda h: give_marks(torch.tensor([next(answers)]), 2)
    model.step = lambda h, r: 1.5 * h               # never rests
    looped.watch(cfg, model)
    printed = capsys.readouterr().out
    assert f"did not converge in {2 * eval_loops} loops" in printed
    return re.findall(r"^sums +(.*)", printed, re.M), printed


def test_watch_marks_what_is_right_wrong_and_changed(capsys):
    truth = [0, 1, 0, 0, 1]
    wrong = [0, 1, 1, 0, 1]
    rows, printed = watched(capsys, [wrong, wrong, truth, truth], eval_loops=3)
    assert rows == ["1~1~0~1~", "1+1x0+1+", "1+0~0+1+", "1+0+0+1+"]
    assert re.findall(r"^loop (\d+)", printed, re.M) == ["1", "2", "4", "6"]   # the last one, too
    assert printed.rstrip().endswith("; solved")

    # control: an answer that stays wrong is not called solved
    rows, printed = watched(capsys, [truth, wrong, wrong])
    assert rows == ["1~0~0~1~", "1+1~0+1+", "1+1x0+1+"]
    assert printed.rstrip().endswith("; 1 of 4 are wrong")


def test_nothing_is_right_or_wrong_where_the_truth_is_unknown(monkeypatch, capsys):
    read = data.PrefixSums.read
    monkeypatch.setattr(data.PrefixSums, "read", lambda self, text: (read(self, text)[0], None))
    rows, printed = watched(capsys, [[0, 1, 0, 0, 1]] * 3)
    assert rows == ["1~0~0~1~", "1=0=0=1=", "1=0=0=1="]
    assert "no solution is known" in printed


def test_watch_skips_as_asked_and_by_the_seed(capsys):
    def watch(**options):
        cfg = tiny(eval_loops=200, puzzle="11010", **options)
        model = looped.LoopedTransformer(tiny())
        model.step = lambda h, r: h.roll(1, 1)      # it goes round for ever if nothing is skipped
        looped.watch(cfg, model)
        return capsys.readouterr().out

    plain = watch()
    assert "\ndid not converge in 400 loops" in plain
    assert "keep their state" not in plain
    printed = [watch(skip=0.5, seed=seed) for seed in (0, 0, 0, 1, 2, 3)]
    assert all("in each loop 50% of the tokens" in text for text in printed)
    loops = [re.search(r"\nconverged after (\d+)", text)[1] for text in printed]
    assert len(set(loops[:3])) == 1 < len(set(loops))


def test_watch_says_that_a_right_chess_answer_is_solved(capsys):
    fen = "7k/8/5KQ1/8/8/8/8/8 w - - 0 1"
    cfg = tiny(task="chess", puzzle=fen, eval_loops=1)
    model = looped.LoopedTransformer(cfg)
    y = torch.tensor(model.task.parse(fen)[1]).long()
    model.readout = lambda h: give_marks(y[None], 3)
    looped.watch(cfg, model)
    assert capsys.readouterr().out.rstrip().endswith("legal, mate, solved")


def test_watch_stops_where_the_state_rests_and_takes_a_hard_puzzle_if_none_is_given(capsys):
    cfg = tiny(seed=3, tol=0.01)
    model = looped.LoopedTransformer(cfg)
    speed = iter([1.0, 0.5, 5e-3])
    model.step = lambda h, r: (1 + next(speed)) * h
    looped.watch(cfg, model)
    printed = capsys.readouterr().out
    assert "converged after 3 loops" in printed

    hard_x = sets_of(cfg)["hard"][0][0]
    bits = " ".join(map(str, hard_x[1:].tolist()))
    assert f"bits  {bits}" in printed


def test_watch_takes_the_puzzle_from_the_files_and_of_the_length_that_are_asked_for(
        tmp_path, monkeypatch, capsys):
    longer = tiny(hard_bits=30, eval_loops=1)
    looped.watch(longer, looped.LoopedTransformer(longer))
    assert re.search(r"^bits  [01]( [01]){29}$", capsys.readouterr().out, re.M)

    cfg = tiny(task="chess", files=many_mates(tmp_path), eval_loops=1)
    asked = []
    monkeypatch.setattr(data.Chess, "show", lambda self, x, *_: asked.append(x) or "")
    looped.watch(cfg, looped.LoopedTransformer(cfg))
    assert (asked[0] == data.splits(CHESS, 0, 0, 0, 0, 1, cfg.files)["hard"].x[0]).all()


# --------------------------------------------------------------------------------------------------
# looped.py: training


def test_data_and_weights_follow_the_seed(monkeypatch):
    seen = []

    def look(cfg, model, sets, out, state):
        seen.append((sets, looped.clone_weights(model)))
        raise data.UserError("enough")

    monkeypatch.setattr(looped, "train", look)
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.rand(3)                           # what was drawn before must not matter
        looped.main(flags(out=out, seed=seed))
    first, again, other = seen
    assert same(first, again)
    for name in ("train", "val", "easy", "hard"):
        assert not torch.equal(first[0][name][0], other[0][name][0]), name
    assert not same(first[1], other[1])


def test_batches_follow_the_seed_even_where_data_and_weights_are_the_same(tmp_path):
    losses = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        cfg = tiny(eval_every=1)
        sets = sets_of(cfg)
        cfg.seed = seed
        torch.manual_seed(0)
        model = looped.LoopedTransformer(cfg)
        Path(name).mkdir()
        looped.train(cfg, model, sets, Path(name))
        losses.append([record["loss"] for record in read_log(name)])
    assert losses[0] == losses[1] != losses[2]


def test_the_checkpoint_is_picked_by_val_and_by_nothing_else(tmp_path, monkeypatch):
    cfg = tiny(eval_every=1)
    sets = sets_of(cfg)
    val_exact = [0.25, 0.5, 0.5, 0.25, 0.0, 0.25]       # the latest of the best is the third
    calls = []
    weights = []

    def evaluate(model, x, y, loops):
        assert x is sets["val"][0]
        assert y is sets["val"][1]
        assert list(loops) == [cfg.loops]
        weights.append(looped.clone_weights(model))
        calls.append(None)
        rest = {"token": len(calls) / 9, "residual": 1 / len(calls)}
        return {cfg.loops: {"exact": val_exact[len(calls) - 1]} | rest}

    drawn = []
    spy(monkeypatch, "get_batch", lambda task, x, y, *rest: drawn.append((x, y)))
    monkeypatch.setattr(looped, "evaluate", evaluate)
    looped.train(cfg, looped.LoopedTransformer(cfg), sets, tmp_path)
    assert drawn and all(x is sets["train"][0] and y is sets["train"][1] for x, y in drawn)
    state = looped.read_checkpoint(tmp_path)[0]
    assert same(state["best"], weights[2])
    assert same(state["model"], weights[5])
    assert same(state["averaged"], weights[5])
    assert state["best_val"] == 0.5
    assert same(looped.load(tmp_path)[0].state_dict(), weights[2])

    # controls: they differ from step to step
    assert not same(weights[2], weights[1])
    assert not same(weights[2], weights[5])
    assert [record["exact"] for record in read_log(tmp_path)] == val_exact


def test_what_counts_is_the_mean_of_the_weights_over_the_last_steps(tmp_path, monkeypatch):
    raw = []
    validated = []
    real_update = looped.update_average

    def update(averaged, model, weight):
        raw.append(looped.clone_weights(model))
        real_update(averaged, model, weight)

    def evaluate(model, *_, **__):
        validated.append(looped.clone_weights(model))
        return {TINY["loops"]: {"exact": 0.0, "residual": 0.0}}

    monkeypatch.setattr(looped, "update_average", update)
    monkeypatch.setattr(looped, "evaluate", evaluate)
    state, _ = train(tiny(steps=6, eval_every=3, average=0.25), tmp_path / "run")

    # step t has the weight 1 / (1 + t / 4), and each later one leaves 1 minus its own of that
    own = [1 / (1 + t / 4) for t in range(6)]
    for n, mean in ((3, validated[0]), (6, validated[1])):
        share = [own[t] * math.prod(1 - later for later in own[t + 1:n]) for t in range(n)]
        assert sum(share) == pytest.approx(1)
        for name, got in mean.items():
            expected = sum(s * weights[name] for s, weights in zip(share, raw, strict=False))
            assert close(got, expected, atol=1e-6), name
        assert not same(mean, raw[n - 1])                   # the control
    assert same(state["best"], validated[1])
    assert same(state["model"], raw[5])

    # without --average it is the last of them
    raw.clear()
    validated.clear()
    train(tiny(steps=2, average=0), tmp_path / "plain")
    assert same(validated[-1], raw[-1])


def test_a_resume_keeps_the_best_and_goes_on_with_the_mean(tmp_path, monkeypatch):
    score = {"exact": 0.75, "residual": 0.0}
    monkeypatch.setattr(looped, "evaluate", lambda *_, **__: {TINY["loops"]: score})
    before, _ = train(tiny(steps=2, average=0.5), tmp_path / "before")
    # the best were not the last ones
    before["best"] = {name: weight + 1 for name, weight in before["best"].items()}
    score["exact"] = 0.5
    after, _ = train(tiny(steps=3, average=0.5), tmp_path / "after", before)
    assert (before["step"], after["step"], after["best_val"]) == (2, 3, 0.75)
    assert same(after["best"], before["best"])

    # the third weights have the weight 1 / (1 + 2 / 2) in the mean
    for name, mean in after["averaged"].items():
        assert close(mean, (before["averaged"][name] + after["model"][name]) / 2, atol=1e-6), name


def test_random_numbers_of_another_kind_of_device_do_not_hinder_a_resume(tmp_path):
    before, _ = train(tiny(steps=2), tmp_path / "before")
    before["rng"] = torch.zeros(16, dtype=torch.uint8)          # as long as those of a GPU
    after, _ = train(tiny(steps=4), tmp_path / "after", before)
    assert after["step"] == 4
    assert not same(after["model"], before["model"])


def test_learning_rate_at_named_steps():
    # linear: up in 10 steps, and from the start on down to 0 at the end
    cfg = looped.Config(decay="linear", lr=0.1, warmup=10, steps=100)
    for step, expected in ((0, 0.01), (4, 0.05 * 0.96), (9, 0.1 * 0.91), (10, 0.1 * 0.9),
                           (50, 0.05), (99, 0.001)):
        assert looped.get_lr(cfg, step) == pytest.approx(expected), step

    # step: an exponential warm-up of scale 10, and a tenth from step 60 on
    cfg = looped.Config(decay="step", lr=0.1, warmup=10, steps=100)
    for step, expected in ((0, 0.1 * (1 - 0.904837)), (9, 0.1 * (1 - 0.367879)),
                           (59, 0.1 * (1 - 0.002479)), (60, 0.01 * (1 - 0.002243)),
                           (99, 0.01 * (1 - 0.000045))):
        assert looped.get_lr(cfg, step) == pytest.approx(expected, rel=1e-4), step

    # no warm-up: the first step has the full rate
    for decay in ("linear", "step"):
        cfg = looped.Config(decay=decay, lr=0.1, warmup=0, steps=100)
        assert looped.get_lr(cfg, 0) == pytest.approx(0.1)


def spy_on_steps(monkeypatch, look):
    """Call look(optimizers) before each step that training makes."""
    configure = looped.configure_optimizers

    def configured(model, cfg):
        optimizers = configure(model, cfg)
        optimizers[0].register_step_pre_hook(lambda optimizer, args, kwargs: look(optimizers))
        return optimizers

    monkeypatch.setattr(looped, "configure_optimizers", configured)


@pytest.mark.parametrize("optimizer, share", [("adamw", [1, 1]), ("muon", [1, 0.5, 0.5])])
def test_every_parameter_group_follows_the_schedule(optimizer, share, tmp_path, monkeypatch):
    cfg = tiny(lr=0.006, warmup=2, optimizer=optimizer)
    rates = []

    def look(optimizers):
        rates.append([group["lr"] for o in optimizers for group in o.param_groups])

    spy_on_steps(monkeypatch, look)
    train(cfg, tmp_path)

    expected = [0.003, 0.005, 0.004, 0.003, 0.002, 0.001]   # up in 2 steps, times 1 - step / 6
    assert len(rates) == 6
    for groups, rate in zip(rates, expected, strict=True):
        assert groups == pytest.approx([s * rate for s in share])
    assert [record["lr"] for record in read_log(tmp_path)] == pytest.approx(expected[1::2])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weight_decay_acts_on_matrices_only(optimizer):
    cfg = tiny(norm="gru", weight_decay=0.5, optimizer=optimizer)
    model = looped.LoopedTransformer(cfg)
    before = looped.clone_weights(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for optimizer in looped.configure_optimizers(model, cfg):
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        optimizer.step()

    # without a gradient a step only shrinks, here by 0.1 * 0.5
    for name, p in model.named_parameters():
        factor = 0.95 if p.dim() == 2 else 1.0
        assert close(p, factor * before[name]), name
    assert sum(p.dim() == 1 for p in model.parameters()) > 5


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest():
    model = looped.LoopedTransformer(tiny(**BOARD, optimizer="muon"))
    names = {id(p): name for name, p in model.named_parameters()}
    muon, adamw = [
        {names[id(p)] for group in optimizer.param_groups for p in group["params"]}
        for optimizer in looped.configure_optimizers(model, model.cfg)
    ]
    hidden = {"W_h.weight", "W_e.weight", "blocks.0.attn.qkv.weight", "blocks.0.attn.out.weight",
              "blocks.0.mlp.0.weight", "blocks.0.mlp.2.weight", "head.1.weight"}
    assert muon == hidden
    assert adamw == set(names.values()) - hidden


@pytest.mark.parametrize("shape", [(12, 12), (40, 12), (12, 40)])
def test_orthogonalize_keeps_the_singular_vectors_and_levels_the_values(shape):
    u = torch.randn(shape).double()
    left, values, right = torch.linalg.svd(u, full_matrices=False)
    new = left.T @ looped.orthogonalize(1e-3 * u) @ right.T     # the size of u does not matter
    assert close(new, new.diag().diag())
    # five steps by hand
    s = values / values.square().sum().sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s ** 3 + 2.0315 * s ** 5
    assert close(new.diag(), s)
    assert s.max() / s.min() < values.max() / values.min()
    assert not looped.orthogonalize(torch.zeros(shape)).any()


def test_muon_is_torchs_but_for_the_digits_that_bf16_lacks():
    start = torch.randn(40, 12)
    weights = [torch.nn.Parameter(start.clone()) for _ in range(3)]
    ours = looped.Muon([{"params": weights[:1], "lr": 0.02}], weight_decay=0.3)
    theirs, other = [
        torch.optim.Muon([w], lr=0.02, weight_decay=0.3, momentum=momentum,
                         adjust_lr_fn="match_rms_adamw")
        for w, momentum in zip(weights[1:], (0.95, 0.5), strict=True)
    ]
    for _ in range(6):
        grad = torch.randn(40, 12)
        for w in weights:
            w.grad = grad.clone()
        for optimizer in (ours, theirs, other):
            optimizer.step()
    way, theirs_way, other_way = [w.detach() - start for w in weights]
    assert (way - theirs_way).norm() < 0.03 * way.norm()
    assert (way - other_way).norm() > 0.1 * way.norm()          # control: another momentum


@pytest.mark.parametrize("clip", [1e-3, 1e3])
def test_clipping_acts_and_the_log_has_the_norm_before_it(clip, tmp_path, monkeypatch):
    cfg = tiny(clip=clip, eval_every=1)
    norms = []

    def look(optimizers):
        groups = [group for o in optimizers for group in o.param_groups]
        grads = [p.grad for group in groups for p in group["params"]]
        norms.append(torch.cat([g.flatten() for g in grads]).norm().item())

    spy_on_steps(monkeypatch, look)
    train(cfg, tmp_path)
    logged = [record["grad_norm"] for record in read_log(tmp_path)]
    assert min(logged) > 0.01
    expected = [min(clip, norm) for norm in logged]
    assert norms == pytest.approx(expected, rel=1e-3)


def test_augmentation_acts_in_training_and_is_paired(tmp_path, monkeypatch):
    cfg = tiny(**BOARD | {"side": 6})
    x_all, y_all = sets_of(cfg)["train"]
    batches = []
    spy(monkeypatch, "compute_loss", lambda model, batch, carry, rng: batches.append(batch))
    train(cfg, tmp_path)
    x = torch.cat([batch[0] for batch in batches])
    y = torch.cat([batch[1] for batch in batches])

    # the clues are the labels' own
    assert torch.equal(x[x > 0], y[x > 0])

    # hardly any is a puzzle of the training set as it stands
    known = {tuple(row) for row in x_all.tolist()}
    assert sum(tuple(row) in known for row in x.tolist()) < len(x) / 4


def test_augmentation_follows_the_generator_of_the_batches():
    x = torch.randint(7, (9, 36))
    first, again = (looped.get_batch(SUDOKU[6], x, x, 8, torch.Generator().manual_seed(0))[0]
                    for _ in range(2))
    assert torch.equal(first, again)


def test_every_training_puzzle_is_drawn():
    task = data.TASKS["prefix_sums"]
    x = torch.arange(5)[:, None].expand(5, 33)
    drawn, _ = looped.get_batch(task, x, x, 400, torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn[:, 0], minlength=5)
    assert len(counts) == 5 and (counts - 80).abs().max() < 40      # standard deviation 8


def test_time_in_validation_is_left_to_come_but_not_training_time(tmp_path, monkeypatch, capsys):
    spent = []
    spy(monkeypatch, "compute_loss", lambda *args: spent.append(1))
    spy(monkeypatch, "evaluate", lambda *args: spent.append(100))
    monkeypatch.setattr(looped.time, "time", lambda: sum(spent))
    cfg = tiny()                                            # six steps, three validations
    train(cfg, tmp_path)
    assert looped.read_checkpoint(tmp_path)[0]["seconds"] == 6
    assert [record["ms"] for record in read_log(tmp_path)] == [1000] * 3

    # 102 s for two steps and a validation, and as much for the next two
    assert re.findall(r"(\S+) left", capsys.readouterr().out) == ["3:24", "1:42", "0:00"]


def test_carry_learns_short_strings_and_no_puzzle_outlives_its_loops(tmp_path):
    cfg = tiny(bits=8, positions="relative", n_train=10, n_val=2, n_test=2, window=0, steps=60,
               batch=32, optimizer="adamw", lr=1e-2, loops=8, grad_loops=4, warmup=10,
               eval_every=30)
    state, _ = train(cfg, tmp_path / "run")
    assert set(state["carry"]["age"].tolist()) == {4, 8}        # those of 8 make way next

    learnt = looped.load(tmp_path / "run")[0]
    new = looped.LoopedTransformer(cfg)
    x, y = sets_of(cfg)["train"]
    token = [looped.evaluate(model, x, y, [8])[8]["token"] for model in (learnt, new)]
    assert token[0] > token[1] + 0.15


@pytest.mark.parametrize("norm, recall", [("outer", "internal"), ("pre", "external"),
                                          ("gru", "internal")])
def test_bf16_trains_with_a_state_in_fp32(tmp_path, norm, recall):
    losses = {}
    for dtype in ("fp32", "bf16", "auto"):
        cfg = tiny(norm=norm, recall=recall, dtype=dtype, eval_every=1)
        state, logged = train(cfg, tmp_path / dtype)
        assert state["carry"]["h"].dtype == torch.float32
        assert all(w.dtype == torch.float32 for w in state["model"].values())
        losses[dtype] = [record["loss"] for record in logged]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)
    assert losses["bf16"] != losses["fp32"]             # control: it is another computation
    assert losses["auto"] == losses["fp32"]             # on a CPU


def test_weights_cast_without_a_gradient_are_not_kept_for_the_loops_with_one(tmp_path, monkeypatch):
    modes = []

    def look(*args):
        modes.append((torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()))
    spy(monkeypatch, "compute_loss", look)
    train(tiny(dtype="bf16", train="progressive", steps=1), tmp_path / "run")
    assert modes == [(True, False)]


@pytest.mark.parametrize("every", ["100", "1"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_no_number_ends_the_run_and_leaves_a_usable_checkpoint(
        what, every, home, capsys, monkeypatch):
    argv = ["--resume", "RUN", "--steps", "12", "--eval_every", every]
    real = looped.carry_loss

    def spoilt(model, *rest):
        loss, carry = real(model, *rest)
        if what == "loss":
            return loss * math.nan, carry

        # a finite loss with a gradient that is not: the slope of a root at 0
        return loss + (0 * model.tok_emb.weight).sum().sqrt(), carry

    with monkeypatch.context() as patch:
        patch.setattr(looped, "carry_loss", spoilt)
        line = fails(capsys, argv, code=1)
    assert "--lr" in line and "RUN" in line
    assert looped.read_checkpoint("RUN")[0]["step"] == 6
    assert looped.main(argv) == 0


# --------------------------------------------------------------------------------------------------
# looped.py: checkpoints


def test_load_gives_the_weights_of_the_reported_result_without_a_gradient(home):
    model, cfg = looped.load("RUN")
    report = json.loads(Path("RUN", "eval.json").read_text())
    for level in ("easy", "hard"):
        again = looped.evaluate(model, *sets_of(cfg)[level], [1, 4])
        assert report[level]["4"] == pytest.approx(again[4])
        assert report[level]["1"] == pytest.approx(again[1])
    assert report["config"] == dataclasses.asdict(cfg) | {"resume": None}
    assert report["steps"] == TINY["steps"]

    # a long loop outside of inference_mode must not keep a graph
    assert not any(p.requires_grad for p in model.parameters())
    assert not model(sets_of(cfg)["hard"][0], 3)[0].requires_grad
    assert not model.training


class Evil:
    """What unpickling it would do."""

    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def broken_files(raw, state):
    """name -> bytes or an object to save, none of which is a checkpoint of ours."""
    nan = state["best"] | {"W_h.weight": state["best"]["W_h.weight"] * math.nan}
    weights = state["best"]["W_h.weight"].numpy().tobytes()
    return {
        "flipped bit": raw.replace(weights, bytes([weights[0] ^ 4]) + weights[1:]),
        "half": raw[:len(raw) // 2], "short": raw[:-99], "empty": b"", "text": b"hello",
        "list": [1], "other config": {"config": {"depth": 3}}, "evil": Evil(),
        "other width": state | {"config": state["config"] | {"width": 32}},
        "absurd width": state | {"config": state["config"] | {"width": 8 * 10 ** 6}},
        "nan": state | {"best": nan},
        "no weights": {name: state[name] for name in state if name != "best"},
    }


def test_a_broken_or_foreign_checkpoint_is_refused_by_name(home, capsys):
    raw = Path("RUN/ckpt.pt").read_bytes()
    state = torch.load("RUN/ckpt.pt", weights_only=True)
    for name, content in broken_files(raw, state).items():
        if isinstance(content, bytes):
            Path("bad.pt").write_bytes(content)
        else:
            torch.save(content, "bad.pt")
        assert "bad.pt" in fails(capsys, ["--resume", "bad.pt"]), name
        with pytest.raises(data.UserError, match="bad.pt"):
            looped.load("bad.pt")
    assert not Path("ran").exists()

    # control: the same way with nothing broken
    torch.save(state, "good.pt")
    assert same(looped.load("good.pt")[0].state_dict(), state["best"])


def test_a_run_reports_its_best_weights_not_its_last(monkeypatch):
    scores = iter([0.5, 0.25, 0.0])

    def evaluate(*args, **options):
        return {TINY["loops"]: {"exact": next(scores), "residual": 0.0}}

    reported = []
    monkeypatch.setattr(looped, "evaluate", evaluate)
    spy(monkeypatch, "report",
        lambda cfg, model, sets: reported.append(looped.clone_weights(model)))
    assert looped.main(flags(out="run")) == 0
    state = torch.load("run/ckpt.pt", weights_only=True)
    assert same(reported[0], state["best"])
    assert not same(state["best"], state["model"])      # control


@pytest.mark.parametrize("where, name", [(Path, "write_bytes"), (os, "replace")])
def test_a_full_disk_leaves_the_old_checkpoint_whole(where, name, home, capsys, monkeypatch):
    argv = ["--resume", "RUN", "--steps", "8"]
    raw = Path("RUN/ckpt.pt").read_bytes()
    files = set(Path("RUN").iterdir())

    def full(path, _):
        with open(path, "ab") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device", os.fspath(path))

    with monkeypatch.context() as patch:
        patch.setattr(where, name, full)
        assert "No space" in fails(capsys, argv)
    assert Path("RUN/ckpt.pt").read_bytes() == raw
    assert set(Path("RUN").iterdir()) == files

    # control: with a disk that has space the file changes
    assert looped.main(argv) == 0
    assert Path("RUN/ckpt.pt").read_bytes() != raw


def test_the_log_and_the_table_say_how_large_the_model_is_and_how_long_it_took(home, finished):
    state, model = looped.read_checkpoint("RUN")
    report = json.loads(Path("RUN", "eval.json").read_text())
    parameters = sum(math.prod(w.shape) for w in model.state_dict().values())
    head, *records = read_log("RUN")
    assert head["parameters"] == report["parameters"] == parameters
    assert f"{parameters:,} parameters" in finished[1]
    assert head["config"] == report["config"]
    assert head["torch"] == torch.__version__

    assert [record["step"] for record in records] == [2, 4, 6]
    assert report["minutes"] == state["seconds"] / 60
    assert 0 < report["eval_minutes"] < 1


def save_weights_alone(path):
    """What assets/*.pt hold, of RUN."""
    state = torch.load("RUN/ckpt.pt", weights_only=True)
    torch.save({name: state[name] for name in ("config", "best", "step", "seconds")}, path)


def test_weights_alone_can_be_evaluated_but_not_trained_on(home, capsys):
    save_weights_alone("small.pt")
    assert looped.main(["--resume", "small.pt"]) == 0
    saved = json.loads(Path("out/small/eval.json").read_text())
    first = json.loads(Path("RUN/eval.json").read_text())
    for name in ("easy", "hard", "steps"):
        assert saved[name] == first[name]
    assert "weights only" in fails(capsys, ["--resume", "small.pt", "--steps", "9"])


@pytest.mark.parametrize("first, again", [
    (flags(out="again"), ["--resume", "again"]),
    (["--resume", "small.pt", "--out", "again"], ["--resume", "small.pt", "--out", "again"]),
    (["--resume", "RUN", "--out", "again"], ["--resume", "RUN", "--out", "again"]),
])
def test_an_evaluation_that_is_stopped_can_be_asked_for_again(
        first, again, home, capsys, monkeypatch):
    save_weights_alone("small.pt")
    with monkeypatch.context() as patch:
        patch.setattr(looped, "report", stopped)
        line = fails(capsys, first, code=130)
    assert ("--resume again" in line) == (first == flags(out="again"))
    assert looped.main(again) == 0
    assert Path("again/eval.json").exists()
    assert Path("RUN/ckpt.pt").exists() and Path("RUN/log.jsonl").exists()


def test_a_run_goes_on_from_its_checkpoint_file_as_from_its_folder(home):
    assert looped.main(["--resume", "RUN/ckpt.pt", "--steps", "8"]) == 0
    assert looped.read_checkpoint("RUN")[0]["step"] == 8


def test_a_finished_run_is_evaluated_again_without_losing_its_first_table(
        home, capsys, monkeypatch):
    asked = []
    real = data.splits
    monkeypatch.setattr(data, "splits", lambda *args: asked.append(args[2:6]) or real(*args))
    before = Path("RUN/eval.json").read_bytes()
    assert looped.main(["--resume", "RUN"]) == 0
    assert asked == [(0, 0, TINY["n_test"], TINY["n_hard"])]            # no training puzzles
    assert "hard: 24 bits, 8 puzzles" in capsys.readouterr().out        # control
    now = ["--resume", "RUN", "--eval_loops", "8", "--n_hard", "5", "--hard_bits", "30"]
    assert looped.main(now) == 0
    assert Path("RUN/eval.json").read_bytes() == before
    printed = capsys.readouterr().out
    assert re.search(r"^ +8 \| ", printed, re.M)
    assert "hard: 30 bits, 5 puzzles" in printed

    # a folder of its own keeps the new table
    again = ["--resume", "RUN", "--eval_loops", "8", "--n_hard", "5", "--out", "again"]
    assert looped.main(again) == 0
    new = json.loads(Path("again/eval.json").read_text())
    old = json.loads(before)
    assert list(new["hard"]) == ["1", "2", "4", "8"]
    assert new["easy"]["4"] == pytest.approx(old["easy"]["4"])
    assert Path("RUN/eval.json").read_bytes() == before


def test_a_finished_run_is_tested_on_another_file_but_not_trained_on_it(tmp_path, capsys):
    many = many_mates(tmp_path)
    other = shutil.copy(many, tmp_path / "other.csv")
    small = {"n_train": 4, "n_val": 2, "n_test": 1, "n_hard": 4, "steps": 2}
    argv = flags(task="chess", files=many, out="RUN", **small)
    assert looped.main(argv) == 0

    # what it trains on is the file's, not what would be made
    cfg = looped.load("RUN")[1]
    x = looped.get_splits(cfg, "cpu")["train"][0]
    from_file = data.splits(CHESS, 0, 4, 2, 1, 4, many)["train"].x
    assert x.tolist() == from_file.tolist()

    asked = ["--resume", "RUN", "--files", str(other), "--n_hard", "6"]
    assert looped.main([*asked, "--out", "other"]) == 0
    found = json.loads(Path("other", "eval.json").read_text())
    assert found["config"]["files"] == str(other)
    assert found["halting"]["hard"]["n"] == 6
    capsys.readouterr()
    assert "--files" in fails(capsys, [*asked, "--steps", "4"])  # control


# --------------------------------------------------------------------------------------------------
# looped.py: the command line

BAD = [
    # values and names that are not there
    ("--norm sanwich", "sanwich"),
    ("--depth 3", "--depth"),

    # numbers out of range, or no numbers
    ("--window 4", "odd"),
    ("--heads 3", "heads"),
    ("--heads 16", "heads"),
    ("--batch 1.5", "batch"),
    ("--lr nan", "lr"),
    ("--skip 1", "skip"),
    ("--average 1", "average"),
    ("--seed 99999999999999999999", "seed"),
    ("--n_train 999999999", "n_train"),

    # an empty shell variable is a mistake, not another request
    ("--files=", "files"),
    ("--resume RUN --watch --puzzle=", "puzzle"),
    ("--resume RUN --watch --device cpu", "--device"),
    ("--resume RUN --watch --n_test 5", "--n_test has no meaning"),
    ("--resume RUN --watch --n_hard 5", "--n_hard has no meaning"),
    ("--resume RUN --watch --out new", "--out has no meaning"),
    ("--resume RUN --steps 9 --average 0.5", "--average"),
    ("--train progressive --rest 0.2", "--rest is not for"),
    ("--resume RUN --watch --files nofile", "nofile"),

    # places
    ("--files nofile", "nofile"),
    ("--resume nowhere", "nowhere"),
    ("--out file", "file"),
    ("--out /proc/none", "/proc/none"),
    ("--out RUN", "RUN"),
    ("--resume RUN --out OTHER", "OTHER"),

    # options that do not go together
    ("--side 4", "--side"),
    ("--watch", "--resume"),
    ("--puzzle 01", "--watch"),
    ("--train progressive --grad_loops 2", "--grad_loops is not for --train progressive"),
    ("--tries 2", "tries"),
    ("--resume RUN --width 32", "--width"),
    ("--resume RUN --task sudoku", "sudoku"),
    ("--resume RUN --seed 3", "--seed"),
    # a finished run is only evaluated, so options of training would be lies in its eval.json
    ("--resume RUN --lr 0.5", "--lr"),
    ("--resume RUN --compile on", "--compile"),
    ("--resume RUN --watch --eval_every 3", "--eval_every"),
    ("--resume RUN --watch --puzzle 012", "2"),
    ("--resume RUN --preset paper", "--preset"),
    ("--resume RUN --steps 2", "--steps"),
]
if not torch.cuda.is_available():
    BAD.append(("--device cuda", "cuda"))


@pytest.mark.parametrize("line, word", BAD, ids=[line for line, _ in BAD])
def test_bad_input_gets_one_line_that_names_it_and_nothing_is_lost(line, word, home, capsys):
    before = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    argv = line.split()
    if "--resume RUN" not in line:
        argv = flags() + argv
    assert word in fails(capsys, argv)
    after = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    assert before.items() <= after.items()

    # it is refused before anything is trained
    assert not any(path.name == "ckpt.pt" for path in after.keys() - before.keys())


def test_each_option_refuses_what_it_does_not_allow():
    refused = []
    for field in dataclasses.fields(looped.Config):
        bad = None
        if field.metadata["choices"]:
            bad = "another"
        elif field.type in (int, float):
            bad = 0 if field.metadata["low"] is None else -1
        if bad is not None:
            with pytest.raises(data.UserError, match=f"--{field.name} {bad}: "):
                looped.Config(**{field.name: bad})
            refused.append(field.name)
    with pytest.raises(data.UserError, match="--width 16"):
        tiny(**BOARD, heads=8)
    tiny(**BOARD, heads=4)                      # control
    # zero is allowed where -1 is not
    looped.Config(rest=0, weight_decay=0, warmup=0, seed=0, skip=0, average=0, window=0)
    assert {"recall", "loops", "rest", "seed"} <= set(refused) and len(refused) > 30


def test_of_two_runs_in_one_folder_the_second_is_refused_before_there_is_a_checkpoint(
        capsys, monkeypatch):
    codes = []
    lines = []

    def train_and_start_another(*args):
        codes.append(looped.main(flags(out="folder")))
        lines.append(len(read_log("folder")))
        raise data.UserError("the first run ends")

    monkeypatch.setattr(looped, "train", train_and_start_another)
    looped.main(flags(out="folder"))
    said = capsys.readouterr().err.splitlines()
    assert codes == [2]
    assert "folder is taken" in said[0] and "the first run ends" in said[1]
    assert lines == [1]                     # the second wrote nothing

    # the first failed before it had a checkpoint: the folder is free again
    assert not Path("folder", "log.jsonl").exists()


def test_the_commands_of_the_readme_do_not_share_a_folder(home):
    text = (Path(looped.__file__).parent / "README.md").read_text()
    commands = re.findall(r"^python looped.py (--task.*?) *(?:#.*)?$", text, re.M)
    assert len(commands) > 4
    folders = set()
    for command in commands:
        cfg, _, _ = looped.configure(looped.parse(shlex.split(command)))
        with looped.claimed_folder(cfg) as folder:
            folders.add(folder)
    assert len(folders) == len(commands)


def test_a_folder_is_refused_before_puzzles_are_made_for_it(home, capsys, monkeypatch):
    monkeypatch.setattr(data, "splits", lambda *_: pytest.fail("made puzzles first"))
    assert "RUN" in fails(capsys, flags(out="RUN"))


@pytest.mark.parametrize("number, options", [
    # carry: states and ages go on, too, and the mean of the weights
    (signal.SIGINT, {"loops": 5, "average": 0.5}),
    (signal.SIGTERM, {"train": "progressive", "recall": "none", "blocks": 2}),
], ids=["Ctrl-C", "kill"])
def test_a_stopped_run_exits_130_and_the_printed_command_finishes_it_bit_for_bit(
        number, options, home, capsys, monkeypatch):
    argv = flags(**options)
    assert looped.main([*argv, "--out", "whole"]) == 0
    capsys.readouterr()

    # the signal comes in the second validation: steps 3 and 4 are lost
    validations = []

    def look(*args):
        validations.append(None)
        if len(validations) == 2:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        spy(patch, "evaluate", look)
        line = fails(capsys, [*argv, "--out", "cut in two"], code=130)
    assert looped.read_checkpoint("cut in two")[0]["step"] == 2

    command = shlex.split(line.partition("validation with: ")[2])
    assert command[:2] == ["python", "looped.py"]
    assert looped.main(command[2:]) == 0
    cut = torch.load("cut in two/ckpt.pt", weights_only=True)
    whole = torch.load("whole/ckpt.pt", weights_only=True)
    for state in (cut, whole):
        del state["seconds"]
        del state["config"]
    assert same(cut, whole)
    tables = [json.loads(Path(name, "eval.json").read_text()) for name in ("cut in two", "whole")]
    assert tables[0]["hard"] == tables[1]["hard"]
    losses = [[record["loss"] for record in read_log(name) if "loss" in record]
              for name in ("cut in two", "whole")]
    assert losses[0] == losses[1]


def test_an_ascii_terminal_trains_on_boards_and_tries_them_again():
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict",
                                write_through=True)
    with contextlib.redirect_stdout(terminal):
        assert looped.main(flags(**BOARD, steps=1, tries=2, out="läufe")) == 0
    assert "hard solved" in terminal.buffer.getvalue().decode("ascii")
    widest = max(terminal.buffer.getvalue().decode("ascii").splitlines()[:20], key=len)
    assert len(widest) <= 80, widest


def test_the_output_of_a_run_fits_80_columns_and_is_all_there(finished):
    _, printed = finished
    for line in printed.splitlines():
        assert len(line) <= 80, line
    for word in ("task ", "model ", "parameters", "device ", "bits  ", "sums  ", "step      6 |",
                 "hard solved", "interval", "--watch"):
        assert word in printed, word


def test_help_shows_every_option_with_its_default_and_fits_the_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert exit_code(looped.main, ["--help"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for field in dataclasses.fields(looped.Config):
        assert f"--{field.name} " in text
    text = " ".join(text.split())
    assert "[pre|peri|outer|gru] (default: outer)" in text
    assert "(default: 15; prefix_sums: 21; sudoku4: 16; chess: 3)" in text
    for common in ("0.1", "0.25"):          # average, skip
        assert f"(default: {common}; prefix_sums: 0.0; sudoku4: 0.0; chess: 0.0)" in text


def test_defaults_depend_on_the_task_and_options_win():
    windows = [looped.Config(task=task).window for task in ("prefix_sums", "sudoku", "chess")]
    assert windows == [5, 0, 0]
    assert tiny(task="chess").loops == TINY["loops"]
    assert looped.Config(task="chess", marks="squares").make_task().classes == 2

    # all that shapes a run has a value
    free = {"files", "puzzle", "out", "resume", "preset"}
    for task in data.TASKS:
        missing = {name for name, v in vars(looped.Config(task=task)).items() if v is None}
        assert missing == free
    sides = {side: looped.Config(task="sudoku", side=side).loops for side in (4, 6, 9)}
    assert sides == {4: 16, 6: 15, 9: 15}
    assert looped.Config(task="sudoku", side=4, loops=3).loops == 3

    # a step never has more loops than a puzzle gets
    assert tiny(loops=1, grad_loops=3).grad_loops == 1
    assert tiny(loops=5, grad_loops=3).grad_loops == 3


def test_auto_takes_the_gpu_where_there_is_one(monkeypatch):
    for gpus, device in (({"cuda"}, "cuda"), ({"mps"}, "mps"), ({"cuda", "mps"}, "cuda"),
                         (set(), "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpus=gpus: "cuda" in gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda gpus=gpus: "mps" in gpus)
        assert looped.pick_device(tiny(device="auto")) == device
        assert looped.pick_device(tiny(device="cpu")) == "cpu"


@pytest.mark.parametrize("compile, times", [("on", 1), ("auto", 0), ("off", 0)])
def test_the_step_is_compiled_where_it_is_asked_for(compile, times, monkeypatch):
    calls = []

    def compiled(step, dynamic):
        assert not dynamic
        calls.append(step)
        return step

    monkeypatch.setattr(torch, "compile", compiled)
    assert looped.main(flags(compile=compile, steps=1)) == 0
    assert len(calls) == times                      # auto: not on a CPU


def test_the_papers_preset_is_its_protocol_and_yields_to_options():
    protocol = dict(width=256, heads=8, blocks=1, train="progressive", loops=30, batch=500, clip=1,
                    optimizer="adamw", weight_decay=0.01, lr=3e-4, decay="step",
                    positions="relative", eval_loops=500, average=0, skip=0)
    cases = [([], dict(steps=1600, warmup=160)),
             (["--task", "sudoku"], dict(steps=8000, warmup=800, n_train=40000, n_val=2000,
                                         n_hard=10000)),
             (["--task", "chess"], dict(steps=8000, marks="squares")),
             (["--lr", "0.1"], dict(lr=0.1))]
    for argv, differ in cases:
        cfg = looped.configure(looped.parse(["--preset", "paper", *argv]))[0]
        for name, value in (protocol | differ).items():
            assert getattr(cfg, name) == value, (argv, name)


def test_a_resumed_run_goes_to_its_own_folder_not_to_the_out_of_before(home):
    state = torch.load("RUN/ckpt.pt", weights_only=True)
    state["config"]["out"] = "old"
    torch.save(state, "RUN/ckpt.pt")
    assert looped.configure({"resume": "RUN"})[0].out is None


def test_what_may_change_on_a_resume(home):
    finished = [{"tol": 0.1}, {"skip": 0.5}, {"n_test": 9}, {"n_hard": 9}, {"eval_loops": 8},
                {"hard_bits": 30}, {"device": "auto"}, {"width": TINY["width"]}]
    goes_on = [{"lr": 0.1}, {"clip": 2.0}, {"eval_every": 3}, {"dtype": "bf16"}, {"compile": "on"}]
    for options in finished + [{"steps": 9} | more for more in goes_on]:
        cfg = looped.configure({"resume": "RUN"} | options)[0]
        assert options.items() <= dataclasses.asdict(cfg).items()
    boards = looped.configure({"resume": str(ASSETS / "sudoku9.pt"), "tries": 3})[0]
    assert boards.tries == 3


def no_number(*args, **options):
    """A validation after which a run cannot go on, to stand in for evaluate."""
    return {TINY["loops"]: {"exact": 0.0, "residual": math.nan}}


OUT_OF_MEMORY = ["CUDA out of memory. Tried to allocate 2 GiB",
                 "DefaultCPUAllocator: you tried to allocate 9"]


@pytest.mark.parametrize("stage, instead, code, words", [
    ("get_lr", stopped, 130, "stopped"),
    ("get_splits", raising(MemoryError()), 1, "memory: lower --batch"),
    ("train", raising(torch.OutOfMemoryError(OUT_OF_MEMORY[0])), 1, "memory"),
    ("train", raising(RuntimeError(OUT_OF_MEMORY[1])), 1, "memory"),
    ("evaluate", no_number, 1, "lower --lr"),
])
def test_what_ends_a_run_at_its_first_validation_or_before_leaves_the_folder_free(
        stage, instead, code, words, capsys, monkeypatch):
    argv = flags(out="folder")
    with monkeypatch.context() as patch:
        patch.setattr(looped, stage, instead)
        line = fails(capsys, argv, code)
    assert words in line and "--resume" not in line
    assert looped.main(argv) == 0


def test_an_error_that_is_nobodys_mistake_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(looped, "train", raising(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        looped.main(flags())


def test_options_of_other_tasks_and_of_the_model_are_none_of_a_new_task(monkeypatch):
    @dataclass(frozen=True)
    class Mine(data.PrefixSums):
        width: int = 3
        bits: int = 7
        name = "mine"

    monkeypatch.setitem(data.TASKS, "mine", Mine())
    monkeypatch.setattr(looped.Config, "check", lambda self, field: None)
    task = looped.Config(task="mine", width=64, positions="relative").make_task()
    assert (task.width, task.bits, task.positions) == (3, 7, "relative")


def test_a_loss_of_a_fork_may_use_the_options_of_carry(monkeypatch):
    field = looped.Config.__dataclass_fields__["train"]
    more = dict(field.metadata) | {"choices": ("carry", "mine")}
    monkeypatch.setattr(field, "metadata", more)
    cfg, _, _ = looped.configure(looped.parse(flags(train="mine", rest=0.3)))
    assert (cfg.train, cfg.rest) == ("mine", 0.3)


def test_a_board_of_another_size_is_refused_before_training():
    cfg = tiny(**BOARD)
    small = data.splits(cfg.make_task(), 0, 8, 8, 8, 8)
    large = data.splits(replace(cfg.make_task(), side=6), 0, 0, 0, 0, 8)["hard"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "splits", lambda *_: small)
        looped.get_splits(cfg, "cpu")                               # control
        patch.setattr(data, "splits", lambda *_: small | {"hard": large})
        with pytest.raises(data.UserError, match="36 tokens in hard; .* 16 of its grid"):
            looped.get_splits(cfg, "cpu")


# --------------------------------------------------------------------------------------------------
# theory.py: the claims


def failed(rows):
    return [row for row in rows if not row.passed]


def is_control(row):
    return row.what.startswith("control")


FAST_CLAIMS = ("R1", "R4", "R5", "I2", "I5", "G1", "G5", "G6")


@pytest.mark.parametrize("name", FAST_CLAIMS)
def test_claim_holds(name):
    rows = list(theory.CLAIMS[name](101, quick=True))
    assert not failed(rows)
    assert any(is_control(row) for row in rows)


# claims that take long, made smaller
SLOW_CLAIMS = [
    ("R2", {"norms": ("pre",)}), ("R3", {"norms": ("peri",)}), ("R7", {"loops": 400}), ("I1", {}),
    ("I3", {}), ("G2", {}), ("G3", {"loops": 200}), ("axes", {"blocks": 1}),
]
# one ingredient of each claim is broken
BROKEN_CLAIMS = [
    ("R1", {"judge": "external"}), ("R2", {"norms": ("outer",)}), ("R3", {"norms": ("outer",)}),
    ("R4", {"recall_scale": 5.0}), ("R5", {"norm": "pre"}), ("R5", {"recall_scale": 0.0}),
    ("R7", {"norm": "pre", "loops": 400}),
    ("I1", {"zeroed": True}), ("I2", {"recall_scale": 4.0}), ("I3", {"norm": "pre"}),
    ("I5", {"recalls": ("none",)}), ("G1", {"norm": "pre"}), ("G1", {"eps": 1e-2}),
    ("G2", {"norm": "pre"}), ("G3", {"norm": "pre", "loops": 200}), ("G5", {"norm": "pre"}),
    ("G6", {"norm": "pre"}), ("axes", {"swap": "pre", "blocks": 1}),
]


def rows_until_one_fails(name, seed, options):
    """The rows of a claim, up to the first that fails and is no control."""
    rows = []
    for row in theory.CLAIMS[name](seed, True, **options):
        rows.append(row)
        if not row.passed and not is_control(row):
            break
    return rows


@pytest.fixture(scope="session", autouse=True)
def rows_of(request):
    """-> rows(name, seed, options) of claims that take long, begun at the start of the session."""
    asked = {getattr(item, "originalname", "") for item in request.session.items}
    jobs = []
    if "test_slow_claim_holds" in asked:
        jobs += [(name, 303, smaller) for name, smaller in SLOW_CLAIMS]
    if "test_a_broken_claim_fails_a_row_that_is_no_control" in asked:
        jobs += [(name, 0, broken) for name, broken in BROKEN_CLAIMS]

    # a fork would inherit the locks of torch's threads
    with ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        begun = {str(job): pool.submit(rows_until_one_fails, *job) for job in jobs}
        yield lambda *job: begun[str(job)].result()
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name, smaller", SLOW_CLAIMS)
def test_slow_claim_holds(name, smaller, rows_of):
    rows = rows_of(name, 303, smaller)
    assert not failed(rows)
    assert any(is_control(row) for row in rows)


@pytest.mark.parametrize("name, broken", BROKEN_CLAIMS)
def test_a_broken_claim_fails_a_row_that_is_no_control(name, broken, rows_of):
    rows = rows_of(name, 0, broken)
    assert any(not row.passed and not is_control(row) for row in rows)


def test_every_claim_is_tested_and_broken_once():
    assert {name for name, _ in BROKEN_CLAIMS} == set(theory.CLAIMS)
    assert {*FAST_CLAIMS, *(name for name, _ in SLOW_CLAIMS)} == set(theory.CLAIMS)


def test_g2_judges_a_slow_loop_once_it_has_converged():
    # at 40 to 80 loops the gradients of this one still grow
    f = theory.untrained(8028, "outer", "internal", 16, inputs=1, gain=4.0)
    loss = theory.random_loss(f, 8028)
    sizes = [theory.gradients(f, K, loss).weights.norm() for K in (40, 80)]
    assert sizes[1] > 2 * sizes[0]                                  # control
    power, _, converged = theory.gradient_sweep("outer", 8028, (16,), recalls=("internal",))
    assert converged[0] and power[0] < 0.01


@pytest.mark.parametrize("name, what, row_of", [
    ("R4", "limits", "limit - sign"), ("R4", "steps", "decides"),
    ("R5", "limits", "moves the limit"), ("R5", "steps", "share reached"),
    ("I2", "limits", "1e-9 to 0.1"), ("G5", "steps", "")])
def test_every_other_state_that_goes_astray_fails_the_claim(name, what, row_of, monkeypatch):
    real = theory.iterate
    noise = theory.rng(1)

    def iterate(f, h, loops):
        h, step = real(f, h, loops)
        h = h.clone()
        step = step.clone()
        if what == "limits":
            h[..., ::2, :] += 1e-3 * noise(*h[..., ::2, :].shape)
        else:
            step[..., ::2] += 1e-3
        return h, step
    monkeypatch.setattr(theory, "iterate", iterate)
    rows = (row for row in theory.CLAIMS[name](0, quick=True) if row_of in row.what)
    assert any(not row.passed and not is_control(row) for row in rows)


def test_the_controls_of_r5_fail_where_everything_comes_to_rest(monkeypatch):
    real = theory.iterate

    def at_rest(f, h, loops):
        h, motion = real(f, h, loops)
        return h, torch.zeros_like(motion)
    monkeypatch.setattr(theory, "iterate", at_rest)
    controls = [row for row in theory.CLAIMS["R5"](0, quick=True) if is_control(row)]
    assert [row.passed for row in controls] == [False] * 2


TWICE = torch.tensor([1.0, 2.0])[:, None, None]       # at the second of two loop counts


@pytest.mark.parametrize("name, broken, expected", [
    ("iterate", lambda found, *_: (found[0], found[1] + torch.tensor([0, 1e-3])),
     (False, False, True)),                                             # one of two still moves
    ("iterate", lambda found, *_: (found[0][[0, 0]], found[1]), (True, False, True)),
    ("radius", lambda found, *_: found + 1, (True, True, False)),
    ("sensitivity", lambda found, *_: (found[0], found[1] * TWICE), (True, True, False)),
    ("gradients", lambda found, f, K, loss: found._replace(weights=K * found.weights),
     (True, True, False))])
def test_each_axis_asks_for_each_of_its_parts(name, broken, expected, monkeypatch):
    f = theory.untrained(0, "outer", "internal", 32, inputs=2, gain=16.0)
    assert theory.axes_of(f, 0, 500) == (True, True, True)              # control
    real = getattr(theory, name)
    monkeypatch.setattr(theory, name, lambda *args: broken(real(*args), *args))
    assert theory.axes_of(f, 0, 500) == expected


# --------------------------------------------------------------------------------------------------
# theory.py: the tools, against closed forms


@pytest.mark.parametrize("value, bound, passes", [
    (1.05, {"equals": 1, "within": 0.1}, True), (1.2, {"equals": 1, "within": 0.1}, False),
    (0.8, {"equals": 1, "within": 0.1}, False), (2, {"at_least": 1}, True),
    (0.9, {"at_least": 1}, False), (1, {"at_most": 1}, True), (1.1, {"at_most": 1}, False),
    (math.nan, {"equals": 0, "within": 9.0}, False), (math.nan, {"at_least": 0}, False),
    (math.nan, {"at_most": 0}, False),
])
def test_check_passes_what_it_says(value, bound, passes):
    assert theory.check("a", value, **bound).passed == passes
    assert theory.control("a", value, **bound).passed == passes
    assert theory.control("a", value, **bound).what == "control: a"


def test_a_row_without_a_bound_is_refused():
    with pytest.raises(ValueError, match="nothing to check"):
        theory.check("a", 1.0)


def test_distinct():
    points = torch.tensor([[0.0, 1.0], [0.0, 1.0 + 1e-9], [0.0, 1.1], [0.0, 1.0]]).double()
    assert theory.distinct(points) == 2
    assert theory.distinct(points[:0]) == 0
    near = torch.tensor([[0.0], [5e-7], [3e-6]]).double()
    assert theory.distinct(near) == 2


def test_moved_is_relative_only_to_large_states():
    old = torch.tensor([[0.0, 0.1], [0.0, 10.0]]).double()
    new = torch.tensor([[0.0, 0.2], [0.0, 10.1]]).double()
    assert torch.allclose(theory.moved(new, old), torch.tensor([0.1, 0.01]).double(), rtol=1e-5)
    assert theory.moved(old * math.nan, old).tolist() == [math.inf, math.inf]


def test_iterate_finds_a_fixed_point_and_no_cycle():
    h, step = theory.iterate(torch.cos, torch.ones(1, 1).double(), 500)
    assert abs(h.item() - 0.7390851332151607) < 1e-12 and step.item() < 1e-14

    _, step = theory.iterate(lambda s: -s, torch.ones(1, 1).double(), 500)      # a two-cycle
    assert step.item() == 2

    # both of two states have to stop
    shrink = torch.tensor([[0.0], [0.9]]).double()
    h, _ = theory.iterate(lambda s: s * shrink, torch.ones(2, 1).double(), 60)
    assert abs(h[1].item() / 0.9 ** 60 - 1) < 1e-4


def test_spectra_of_a_known_matrix():
    A = torch.tensor([[0.5, 1, 0], [0, -0.9, 0], [0, 0, 0.1]], dtype=torch.float64)

    def f(s):
        return s @ A.T
    J = theory.jacobian(f, torch.ones(2, 3).double())
    assert torch.allclose(J, A.expand(2, 3, 3))
    assert torch.allclose(theory.radius(J), torch.tensor([0.9, 0.9]).double())

    w = theory.left_eigenvector(A)
    assert torch.allclose(w @ A.to(w.dtype), -0.9 * w)
    rough = theory.estimated_radius(f, torch.ones(2, 3).double())
    assert (rough - 0.9).abs().max() < 1e-3


def test_matrix_with_top_has_that_eigenvalue_and_none_larger():
    for top in (1.01, -0.5, complex(0.6, 0.8)):
        A = theory.matrix_with_top(top, theory.rng(1))
        values = torch.linalg.eigvals(A)
        assert (values - top).abs().min() < 1e-10
        assert abs(values.abs().max() - abs(top)) < 1e-10
        assert (A - A.T).abs().max() > 0.1


def test_newton_finds_all_roots_of_a_cubic():
    s = torch.linspace(-2, 2, 21).double()[:, None]
    roots = theory.newton_roots(lambda s: s ** 3, s).flatten().tolist()
    assert sorted(round(r, 9) for r in roots) == [-1, 0, 1]


def test_sensitivity_is_the_chain_rule_through_the_loops():
    f = theory.untrained(3, "outer", "internal", 32, inputs=2)
    h, d = theory.sensitivity(f, (1, 7), 3)
    v = F.normalize(theory.rng(3)(2, 5 * 32))

    def after_seven(e):
        return theory.states(f.on(e), (7,))[0]
    exact = (theory.jacobian(after_seven, f.start) @ v[..., None])[..., 0]
    assert torch.allclose(h[1], after_seven(f.start))
    assert torch.allclose(d[1], exact, rtol=1e-6)
    assert not torch.allclose(d[0], exact, rtol=1e-2)


def test_gradients_are_those_of_autograd_and_of_differences():
    f = theory.untrained(3, "outer", "internal", 32, inputs=1)
    loss = theory.random_loss(f, 3)
    dh0, dW, dh = theory.gradients(f, 4, loss)
    assert torch.allclose(dh.flatten(), theory.rng(3)(*f.e.shape).flatten())

    # |dl/dh_0| from the Jacobians, one turn after the other
    g = dh
    for k in (3, 2, 1, 0):
        at = f.start if k == 0 else theory.states(f, (k,))[0]
        g = (g[:, None] @ theory.jacobian(f, at))[:, 0]
    assert abs(g.norm() - dh0) < 1e-10 * dh0

    # one weight of W_e by differences
    weight = f.model.W_e.weight
    values = []
    for change in (1e-5, -1e-5):
        weight[0, 0] += change
        values.append(loss(theory.per_token(theory.states(f.on(f.e), (4,))[0], f)))
        weight[0, 0] -= change
    slope = (values[0] - values[1]) / 2e-5
    # dW holds the weights of the loop alone: first those of W_h, 32 x 32 and 32, then W_e's
    assert abs(dW[32 * 33] - slope) < 1e-6 * abs(slope)


def test_untrained_sets_gain_and_radius():
    weak = theory.untrained(0, "outer", "external", 32, inputs=2)
    strong = theory.untrained(0, "outer", "external", 32, inputs=2, gain=8.0, rho=1.3)
    assert torch.allclose(strong.model.W_e.weight, 8 * weak.model.W_e.weight)
    assert abs(theory.radius(strong.model.W_h.weight) - 1.3) < 1e-12
    assert abs(weak.e.square().mean().sqrt() / weak.model.cfg.embed_rms - 1) < 0.2
    assert not torch.equal(weak.e, theory.untrained(1, "outer", "external", 32, inputs=2).e)


def test_tanh_path_ends_in_fixed_points_of_both_signs():
    place, s = theory.tanh_path(1, 0.0, 51, 1500, asymmetry=0.25)
    assert place[0] == 0 and place[-1] == 1
    assert torch.allclose(s[0], -s[-1], atol=1e-9) and s[0].norm() > 1


# --------------------------------------------------------------------------------------------------
# theory.py: trained runs


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    argv = flags(bits=8, hard_bits=10, n_train=8, embed_rms=5.0, steps=1, loops=2, grad_loops=1,
                 batch=4, warmup=0, out=folder)
    assert looped.main(argv) == 0
    return folder


def test_measurements_of_a_run(tiny_run, tmp_path, capsys):
    out = tmp_path / "table.json"
    assert theory.main(["--ckpt", str(tiny_run), "--inputs", "5", "--json", str(out)]) == 0
    found, = json.loads(out.read_text())
    assert capsys.readouterr().out.split()[:2] == ["run", "tiny"]

    # an outer-norm block with strong recall has all three axes, also after one step of training
    assert (found["recall"], found["norm"], found["task"]) == ("internal", "outer", "prefix_sums")
    assert found["converged"] == 1 and found["distinct"] == 5       # of the eight it could have
    assert found["swapped_to_new"] < 1e-8
    assert found["from_random_start"] < 1e-8
    assert found["return_after_push"] == 1
    assert (found["line_pairs"], found["line_equal"]) == (100, 0)
    assert found["line_least_change"] > 1e-6
    assert max(found["rho"]) < 1 and len(found["rho"]) == 3
    assert 0 < found["norm_ratio"] < 2
    assert found["left_out_3_6_10"] == [0, 0, 0]                    # the run has two loops


def test_what_truncated_backpropagation_leaves_out():
    f = theory.untrained(3, "outer", "internal", 32, inputs=2)
    losses = [theory.random_loss(f.on(f.e[i:i + 1]), i) for i in range(2)]
    found = theory.left_out_medians(f, losses, 5)

    # plainly: the state is detached before the last three of five loops
    weights = list(f.model.requires_grad_(True).parameters())
    shares = []
    for i, loss in enumerate(losses):
        e = f.e[i:i + 1]
        gradients = []
        for detached_at in (0, 2):
            h = e
            for t in range(5):
                if t == detached_at:
                    h = h.detach()
                h = f.model.step(h, f.model.recall_term(e))
            dW = torch.autograd.grad(loss(h), weights, allow_unused=True)
            gradients.append(torch.cat([g.flatten() for g in dW if g is not None]))
        whole, last = gradients
        shares.append((last - whole).norm() / whole.norm())
    assert min(shares) > 0.01
    assert torch.allclose(found[0], min(shares), rtol=1e-9)         # of two, the lower is taken
    assert found[1:].tolist() == [0, 0]                             # all of the loops


def test_the_norm_of_the_head_does_not_hide_that_gradients_grow(tiny_run, monkeypatch):
    monkeypatch.setattr(looped.LoopedTransformer, "step", lambda self, h, r: 1.01 * h + r)
    few, *_, many = theory.measure(tiny_run, inputs=2, loops=5)["gradient_15_30_60_120"]
    assert many > 3 * few


def test_a_run_that_flips_is_not_at_rest(tiny_run, monkeypatch):
    # each loop turns the sign of the state
    monkeypatch.setattr(looped.LoopedTransformer, "step",
                        lambda self, h, r: -h + 0 * self.W_h.weight.sum())
    found = theory.measure(tiny_run, inputs=2, loops=50)
    assert found["residual"] == pytest.approx(2)
    assert found["converged"] == 0 and found["norm_ratio"] == pytest.approx(1)


def test_a_model_that_gets_no_input_has_one_limit_on_a_line_of_inputs(tiny_run):
    model, x, _ = theory.trained(tiny_run, 8)
    model.double().W_e.weight.zero_()
    f = theory.Loop(model, model.embed(x))
    found = theory.limits_on_a_line(f, 500)
    assert (found["line_pairs"], found["line_equal"]) == (100, 1)
    assert found["line_least_change"] is None
    assert theory.distinct(theory.iterate(f, f.start, 500)[0]) == 1


def test_a_loop_in_float32_and_states_of_other_inputs_are_refused():
    model = model_of(bits=4)
    f = theory.Loop(model, model.embed(torch.tensor([[2, 0, 1, 1, 0], [2, 1, 1, 1, 0]])))
    with pytest.raises(ValueError, match="1 states, but the loop holds"):
        theory.jacobian(f, f.start[:1])
    one = f.on(f.e[:1])
    J = theory.jacobian(one, one.start)
    assert close(J, theory.jacobian(f, f.start)[:1])        # control: the input it belongs to

    with pytest.raises(ValueError, match="float32.*double"):
        theory.Loop(model.float(), f.e.float())


def test_measurements_are_made_on_the_easy_test_set(tiny_run):
    model, x, y = theory.trained(tiny_run, 8)
    cfg = model.cfg
    sets = data.splits(model.task, cfg.seed, cfg.n_train, cfg.n_val, cfg.n_test, cfg.n_hard)
    assert x.tolist() == sets["easy"].x.tolist() and y.tolist() == sets["easy"].y.tolist()
    assert x.tolist() != sets["val"].x.tolist()


def test_hard_accuracy_is_the_one_at_the_largest_loop_count(tmp_path):
    hard = {"8": {"exact": 0.5}, "16": {"exact": 0.75}}
    (tmp_path / "eval.json").write_text(json.dumps({"hard": hard}))
    assert theory.hard_accuracy(tmp_path) == 0.75


def test_a_run_on_files_is_measured_on_those_files(tmp_path):
    path = many_mates(tmp_path)
    argv = flags(task="chess", files=path, n_train=8, n_val=1, n_test=2, n_hard=2, out="run")
    assert looped.main(argv) == 0
    _, x, _ = theory.trained("run", 2)
    assert x.tolist() == data.splits(CHESS, 0, 0, 0, 2, 0, path)["easy"].x.tolist()


# --------------------------------------------------------------------------------------------------
# theory.py: the command line


def test_table_json_and_exit_codes(tmp_path, capsys, monkeypatch):
    out = tmp_path / "table.json"
    assert theory.main(["--only", "R1,G1", "--quick", "--seed", "3", "--json", str(out)]) == 0
    table = json.loads(out.read_text())
    assert {row["claim"] for row in table["rows"]} == {"R1", "G1"}
    assert (table["seed"], table["quick"]) == (3, True)

    def wrong(seed, quick):
        yield from theory.CLAIMS["G1"](seed, quick, eps=1e-2)

    def wrong_control(seed, quick):
        yield theory.control("cannot tell", 1, equals=0)

    for rows in (wrong, wrong_control):
        rows.axis = "reachability"
        monkeypatch.setitem(theory.CLAIMS, "R1", rows)
        assert theory.main(["--only", "R1", "--quick"]) == 1
        assert "FAILED R1" in capsys.readouterr().out


def test_a_bad_place_or_name_fails_before_any_work(tmp_path, capsys, monkeypatch):
    no_work = raising(AssertionError("computed before the request was checked"))
    monkeypatch.setattr(theory, "claims_table", no_work)
    (tmp_path / "ckpt.pt").write_bytes(b"no checkpoint")
    for argv in (["--only", "R9"], ["--only", "R1,"], ["--json", str(tmp_path / "no" / "x")],
                 ["--json", str(tmp_path)], ["--ckpt", "nowhere"], ["--ckpt", str(tmp_path)],
                 ["--inputs", "1"], ["--seed", "-1"]):
        fails(capsys, argv, main=theory.main)


# --------------------------------------------------------------------------------------------------
# assets/results.py

ASSETS = Path(looped.__file__).resolve().parent / "assets"


def load_script(path):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


results = load_script(ASSETS / "results.py")
SEEDS = ("internal-outer-seed0", "internal-outer-seed1", "internal-outer-seed2")
SINGLE = "external-gru-seed0"


@pytest.fixture
def raw(tmp_path):
    """A folder of raw results: three seeds of one variant of grid6, one seed of another."""
    for name in (*SEEDS, SINGLE):
        folder = tmp_path / "grid6" / name
        folder.mkdir(parents=True)
        shutil.copy(ASSETS / "results" / "grid" / "sudoku6" / name / "eval.json", folder)
    return tmp_path


@pytest.fixture
def notebook(raw):
    """A Markdown file with one table of those, filled in."""
    path = raw / "README.md"
    path.write_text("before\n\n<!-- table runs grid6/* -->\n<!-- end -->\n\nafter\n")
    assert results.main(["write", str(path), "--results", str(raw)]) == 0
    return path


def hard_share(raw, name):
    """Share of hard boards solved at the largest loop count, as plainly as can be."""
    levels = json.loads((raw / "grid6" / name / "eval.json").read_text())
    return levels["hard"]["128"]["exact"]


def cells(text, name):
    """The cells of the row of a Markdown table that begins with a name."""
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_a_row_has_the_mean_and_the_n_minus_1_deviation_of_its_seeds(raw, notebook):
    values = [hard_share(raw, name) for name in SEEDS]
    row = cells(notebook.read_text(), "internal-outer")
    assert row[1] == "3"
    assert row[4] == f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"
    assert row[5] == " ".join(f"{value:.2f}" for value in values)
    assert row[6].startswith(f"{round(256 * sum(values))} of 768 [")


def made_up_run(raw, name, seed, hard_exact=0.5, halting=None, **options):
    """An eval.json with some values of its own -> its folder, in a folder made-up/."""
    folder = raw / "made-up" / f"{name}-seed{seed}"
    folder.mkdir(parents=True)
    result = json.loads((raw / "grid6" / SINGLE / "eval.json").read_text())
    result["config"] |= {"seed": seed, **options}
    result["hard"]["128"]["exact"] = hard_exact
    result["halting"]["hard"] |= halting or {}
    (folder / "eval.json").write_text(json.dumps(result))
    return folder


def test_pairs_are_compared_seed_by_seed_with_students_interval(raw):
    shares = {"new": [0.5, 0.75, 0.875], "old": [0.25, 0.375, 0.375]}
    for name, values in shares.items():
        for seed, share in enumerate(values):
            made_up_run(raw, name, 2 - seed, share, {"exact": share / 4, "tries": 10})
    table = results.make_table(raw, "pairs made-up/new made-up/old")

    # the 97.5 % point of Student's t with two degrees of freedom is 4.303
    for way, scale in (("one pass", 1), ("up to 10 tries", 1 / 4)):
        gaps = [scale * gap for gap in (0.5, 0.375, 0.25)]      # of seeds 0, 1, 2
        half = 4.303 * statistics.stdev(gaps) / 3 ** 0.5
        row = cells(table, f"made-up/new - old, {way}")
        assert row[5] == " ".join(f"{gap:+.3f}" for gap in gaps)
        mean, low, high = map(float, re.findall(r"[+-][\d.]+", row[6]))
        assert mean == pytest.approx(statistics.mean(gaps), abs=6e-4)
        assert (low, high) == pytest.approx((mean - half, mean + half), abs=2e-3)


def test_halting_counts_the_puzzles_of_all_seeds(raw):
    for seed, (n, converge, right, solved, loops) in enumerate([(32, 24, 16, 20, 10),
                                                                (64, 8, 8, 40, 40)]):
        made_up_run(raw, "new", seed, halting={
            "n": n, "converged": converge / n, "exact": solved / n,
            "converged_and_right": right / n, "loops": loops})
    row = cells(results.make_table(raw, "halting made-up/*"), "new")
    assert row[1] == "2"
    assert row[6:] == ["32 of 96", "24", "60", "30"]        # (32 * 10 + 64 * 40) / 96 loops


def test_the_rate_chosen_validates_best_and_of_equal_ones_has_the_lowest_loss(raw):
    validations = {0.001: [0.5, 0.25], 0.002: [0.25, 0.75], 0.004: [0.75, 0.5], 0.008: [0.0, 0.5]}
    losses = {0.001: 0.1, 0.002: 0.3, 0.004: 0.2, 0.008: 0.1}
    for lr, values in validations.items():
        folder = made_up_run(raw, f"internal-gru-lr{lr}", 0, lr=lr)
        lines = [{"config": {}}] + [{"exact": value, "loss": losses[lr]} for value in values]
        (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    row = cells(results.make_table(raw, "rates made-up/*"), "internal-gru")
    assert row[1:] == ["0.500", "0.750", "**0.750**", "0.500"]


def test_the_grid_shows_what_looping_on_adds(raw):
    # trained with 30 loops: the column of 32 is the first that is not below
    early, late = (
        [json.loads((raw / "grid6" / name / "eval.json").read_text())["hard"][t]["exact"]
        for name in SEEDS] for t in ("32", "128")
    )
    assert early != late
    said = (f"{statistics.mean(early):.2f} → "
            f"{statistics.mean(late):.2f} ± {statistics.stdev(late):.2f}")
    made_up_run(raw, "none-pre", 0)
    table = results.make_table(raw, "grid grid6/* made-up/*")
    assert cells(table, "internal, outer")[1:] == [said, "not run"]
    # one seed where another cell of the task has three, and one where none has more
    assert cells(table, "external, gru")[1].endswith(" (1)")
    assert not cells(table, "none, pre")[2].endswith(" (1)")
    assert "32 → 128 loops" in table.splitlines()[0]
    # recalls and norms in their own order, not in that of the alphabet
    names = [line.split(" | ")[0] for line in table.splitlines()[2:]]
    assert names == ["| none, pre", "| external, gru", "| internal, outer"]


@pytest.fixture
def axes_raw(raw):
    """Measurements of five variants, three seeds each, and their runs. The more a variant solves,
    the less converges; at the loops of training, 30, the order of what is solved is the reverse."""
    variants = [("none", "pre", 0.1), ("none", "gru", 0.2), ("internal", "pre", 0.6),
                ("internal", "gru", 0.7), ("external", "gru", 0.8)]
    records = []
    for recall, norm, share in variants:
        for seed in range(3):
            solved = share + seed / 100
            records.append({
                "run": f"{recall}-{norm}-seed{seed}", "recall": recall, "norm": norm,
                "hard": solved, "converged": 1 - solved, "norm_ratio": 1.0, "distinct": seed,
                "rho": [0.5, solved], "sensitivity_30_100_500": [9, 9, solved],
                "gradient_15_30_60_120": [1, 1, 1, 2 if recall == "none" else 1],
                "swapped_to_new": solved,
            })
            folder = raw / "task" / records[-1]["run"]
            folder.mkdir(parents=True)
            result = json.loads((raw / "grid6" / SINGLE / "eval.json").read_text())
            result["hard"]["32"]["exact"] = 1 - solved
            (folder / "eval.json").write_text(json.dumps(result))
    (raw / "axes-task.json").write_text(json.dumps(records))
    return raw


def test_rank_correlation_by_hand():
    assert results.spearman([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)   # 1 - 6 * 2 / 60
    assert results.spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(0.75 ** 0.5)     # a tie
    assert math.isnan(results.spearman([1, 1, 1], [1, 2, 3]))


def test_the_axes_rank_the_runs_that_they_apply_to(axes_raw):
    table = results.make_table(axes_raw, "rank axes-task.json")
    for title, said in [("converged", "-1.00 [-1.00, -1.00], 15 runs"),
                        ("dh/de, last", "+1.00 [+1.00, +1.00], 15 runs"),
                        # without recall there is no input to swap
                        ("input swapped: off the new limit", "+1.00 [+1.00, +1.00], 9 runs"),
                        ("norm ratio", "all equal")]:
        assert cells(table, title)[1] == said

    # each of the first two converges mostly and depends on the input, but is not smooth (2 axes and
    # some); the others are smooth, but converge to 40 % at most (1 and some)
    assert cells(table, "... of loops with recall")[1] == "-1.00 [-1.00, -1.00], 9 runs"
    held = cells(table, "axes held, 0 to 3")[1]
    assert held.startswith("-1.00")
    in_training = cells(table, "control: axes held, accuracy at the loops of training")[1]
    assert in_training.startswith("+1.00")


def test_chance_is_that_of_variants_not_of_their_seeds(axes_raw):
    table = results.make_table(axes_raw, "rank axes-task.json")
    # whole variants swap their accuracies: of the 120 orders of five, 2.5 % reach 0.9 and more.
    # Runs that are shuffled singly stay below 0.6
    assert float(cells(table, "converged")[2]) > 0.85


def test_where_the_loops_end(axes_raw):
    table = results.make_table(axes_raw, "ends axes-task.json")
    # the share at rest, and medians of rho and of growth
    assert cells(table, "none, pre")[1] == "89%, 0.50, 1.0"
    assert cells(table, "internal, gru")[1] == "29%, 0.71, 1.0"
    assert [row.split(" | ")[0] for row in table.splitlines()[2:]] == [
        "| none, pre", "| none, gru", "| external, gru", "| internal, pre", "| internal, gru"]


def test_tables_prints_every_folder_of_runs(raw, capsys):
    assert results.main(["tables", str(raw)]) == 0
    text = capsys.readouterr().out
    assert f"{raw}/grid6" in text
    assert cells(text, "internal-outer")[1] == "3"
    assert cells(text, "internal-outer, hard")[1] == "3 x 256"


def test_check_passes_what_write_has_written_and_write_keeps_the_rest(raw, notebook):
    text = notebook.read_text()
    assert text.startswith("before\n\n<!-- table") and text.endswith("<!-- end -->\n\nafter\n")
    assert results.main(["check", str(notebook), "--results", str(raw)]) == 0
    assert results.main(["write", str(notebook), "--results", str(raw)]) == 0
    assert notebook.read_text() == text


def test_check_fails_on_a_changed_number_and_shows_the_line(raw, notebook, capsys):
    share = f"{hard_share(raw, SINGLE):.3f}"
    notebook.write_text(notebook.read_text().replace(f"| {share} |", "| 0.999 |"))
    assert results.main(["check", str(notebook), "--results", str(raw)]) == 1
    text = capsys.readouterr().out
    assert "table runs grid6/* is not what the raw files say" in text
    assert "0.999" in text and share in text


@pytest.mark.parametrize("text, expected", [
    ("<!-- table runs nothing/* -->\n<!-- end -->\n", "no eval.json"),
    ("<!-- table magic grid6/* -->\n<!-- end -->\n", "unknown kind"),
    ("<!-- table runs grid6/* -->\n", "<!-- end -->"),
    ("<!-- table runs grid6/* --> \n<!-- end -->\n", "lines of their own"),
    ("<!-- table runs grid6/* -->\n<!-- table runs grid6/* -->\n<!-- end -->\n<!-- end -->\n",
     "lines of their own"),
    ("<!-- table runs /grid6/* -->\n<!-- end -->\n", "table runs /grid6/*"),
    ("<!-- table pairs grid6/internal-outer -->\n<!-- end -->\n", "in pairs"),
])
def test_a_table_that_cannot_be_made_is_one_line(raw, capsys, text, expected):
    path = raw / "README.md"
    path.write_text(text)
    assert results.main(["write", str(path), "--results", str(raw)]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
    assert path.read_text() == text


@pytest.mark.parametrize("seed, options", [(0, {"lr": 0.5}), (1, {})])
def test_runs_that_are_not_seeds_of_one_experiment_are_no_row(raw, capsys, seed, options):
    # the same name with another rate, and the same seed once more
    folder = raw / "made-up" / "internal-outer-seed0"
    made_up_run(raw, "internal-outer", 1)
    made_up_run(raw, "internal-outer", 0, **options)
    result = json.loads((folder / "eval.json").read_text())
    result["config"]["seed"] = seed
    (folder / "eval.json").write_text(json.dumps(result))
    assert results.main(["tables", "--results", str(raw), str(raw / "made-up")]) == 2
    error = capsys.readouterr().err
    assert "not two seeds of one experiment" in error and error.count("\n") == 1


def test_a_broken_eval_is_one_line_with_its_path(raw, capsys):
    path = raw / "grid6" / SINGLE / "eval.json"
    path.write_text('{"hard": {}}')
    assert results.main(["tables", str(raw)]) == 2
    error = capsys.readouterr().err
    assert str(path) in error and error.count("\n") == 1


def test_without_matplotlib_curve_ends_in_one_line(raw, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert results.main(["curve", str(raw / "grid6" / SINGLE)]) == 2
    error = capsys.readouterr().err
    assert "pip install matplotlib" in error and error.count("\n") == 1


def test_curve_draws_a_picture_of_one_run(raw):
    pytest.importorskip("matplotlib")
    run = raw / "grid6" / SINGLE
    assert results.main(["curve", str(run)]) == 0
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name, puzzle", [
    ("prefix_sums", "1101" * 8),
    ("sudoku9", results.BOARD),
    ("chess", "r1bqkbnr/pppp1ppp/2n5/4p2Q/2B1P3/8/PPPP1PPP/RNB1K1NR w - - 0 1"),
])
def test_the_weights_in_assets_solve_what_the_front_page_shows(name, puzzle):
    model, cfg = looped.load(ASSETS / f"{name}.pt")
    x, y = model.task.parse(puzzle)
    logits, _, converged = looped.solve(model, torch.tensor(x)[None], max_loops=150, skip=cfg.skip,
                                        generator=torch.Generator().manual_seed(cfg.seed))
    assert converged.item()
    assert (model.task.predict(logits)[0].numpy() == y).all()


@pytest.mark.parametrize("name, options", [
    ("quickstart", {}), ("current/sudoku4/seed0", {"task": "sudoku", "side": 4}),
    ("current/sudoku6/internal-seed0", {"task": "sudoku", "side": 6}),
    ("current/sudoku9/internal-seed0", {"task": "sudoku", "eval_every": 200}),
    ("current/chess/seed0", {"task": "chess", "n_test": 500, "n_hard": 500, "eval_every": 500}),
])
def test_the_defaults_are_those_of_the_runs_that_are_reported(name, options):
    config = json.loads((results.RAW / name / "eval.json").read_text())["config"]
    defaults = dataclasses.asdict(looped.Config(**options))
    # options that came later than the run, and those of a place, say nothing
    names = defaults.keys() & config.keys() - {"out", "resume"}
    assert len(names) > 35
    assert {name: defaults[name] for name in names} == {name: config[name] for name in names}


def test_the_code_of_the_front_page_runs(monkeypatch, capsys):
    root = Path(looped.__file__).parent
    code, = re.findall(r"```python\n(import looped.*?)```", (root / "README.md").read_text(), re.S)
    monkeypatch.chdir(root)
    exec(code, {})
    assert capsys.readouterr().out.rstrip().endswith("True")


@pytest.mark.parametrize("script", [looped, data, theory, results])
def test_a_script_exits_with_the_code_of_its_main(script, tmp_path):
    argv = [sys.executable, script.__file__, "--nonsense"]
    assert subprocess.run(argv, cwd=tmp_path, capture_output=True).returncode == 2


def test_every_table_of_the_project_is_what_its_raw_files_say():
    assert results.main(["check"]) == 0


def test_every_number_of_the_front_page_is_looked_for(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(results, "phrases", lambda raw: ["3 of 4 boards", "0.25 of all"])
    page = tmp_path / "README.md"
    monkeypatch.setattr(results, "NOTEBOOKS", [page])
    page.write_text("It solves 3 of\n4 boards, and 0.25 of all.")
    assert results.main(["check"]) == 0
    page.write_text("It solves 3 of\n4 boards, and 0.26 of all.")
    assert results.main(["check"]) == 1
    assert "does not say '0.25 of all'" in capsys.readouterr().out
