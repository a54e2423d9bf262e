"""results.py: every table, figure and movie of this project, made from the raw files of the runs.

    python assets/results.py tables [FOLDER ...]   # Markdown tables of any folder of runs
    python assets/results.py write [FILE.md ...]   # fill in the tables of the two READMEs
    python assets/results.py check [FILE.md ...]   # exit code 1 if one differs from the raw files;
                                                   # without FILE.md also if the front page lacks a
                                                   # sentence of phrases(), with numbers in prose
    python assets/results.py curve RUN             # draw RUN/curve.png: accuracy against loops
    python assets/results.py figures [NAME ...]    # draw the figures in assets/, or some of them
    python assets/results.py movie                 # make assets/sudoku9.gif

A table in a Markdown file stands between two lines of its own, `<!-- table KIND ARGUMENT ... -->`
and `<!-- end -->`. KIND is a key of TABLES below, an argument a pattern or a file in the folder
of raw results: `<!-- table runs grid/chess/* -->`. A run is a folder with an eval.json; runs whose
names differ in "-seedN" alone are one row. Standard deviations have n - 1, intervals are 95 %.

Runs of your own: `tables out` prints two tables of them. For others write the two lines of a table
into a file, say `<!-- table pairs new old -->` for out/new-seed0, out/old-seed0, ... into notes.md,
and then `write notes.md --results out`.
"""

import argparse
import itertools
import json
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

# the project's own modules lie in the folder above
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import looped
import theory
from data import UserError

ROOT = Path(looped.__file__).resolve().parent
ASSETS = ROOT / "assets"
RAW = ASSETS / "results"
NOTEBOOKS = [ROOT / "README.md", RAW / "README.md"]
LEVELS = ("easy", "hard")

# two-sided 95 % quantiles of Student's t with 1, 2, ... degrees of freedom; for more than 10 that
# of 10 is used, which makes intervals a little too wide
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)

# the cells of the grid, in the order in which they are shown
RECALLS = ("none", "external", "internal")
GRID_NORMS = ("pre", "peri", "outer", "gru")


# ----------------------------------------------------------------------------
# raw files


class Run(NamedTuple):
    """One finished run: where it lies, the name it shares with other seeds, and its eval.json."""

    folder: Path
    name: str
    seed: int
    result: dict

    def last(self, level):
        """The measurements at the largest loop count."""
        counts = self.result[level]
        return counts[max(counts, key=int)]

    def exact(self, level):
        return self.last(level)["exact"]

    def n(self, level):
        """Puzzles tested in one pass. ("halting" has an n of its own: 32 in older runs.)"""
        config = self.result["config"]
        return config["n_test"] if level == "easy" else config["n_hard"]

    def halting(self, level):
        """What came out where each puzzle stopped by itself, perhaps in several tries."""
        return self.result["halting"][level]

    def settings(self):
        """The options that seeds of one experiment have in common."""
        own = ("seed", "out", "resume", "device", "dtype", "compile", "watch", "puzzle", "tries")
        config = self.result["config"]
        return {name: value for name, value in config.items() if name not in own}


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except ValueError:
        raise UserError(f"{path}: not a JSON file") from None


def without_seed(name):
    """The name that a run shares with other seeds."""
    return re.sub(r"-?seed\d+$", "", name)


def read_run(path):
    """An eval.json -> Run. Raises UserError."""
    folder = path.parent
    name = without_seed(folder.name) or folder.resolve().parent.name
    result = read_json(path)
    try:
        run = Run(folder, name, result["config"]["seed"], result)
        needed = [result["minutes"]]
        for level in LEVELS:
            needed += [run.last(level)["residual"], run.last(level)["norm_ratio"], run.n(level)]
            needed += [run.halting(level)[key] for key in ("n", "exact", "converged", "loops")]
    except (LookupError, TypeError, AttributeError, ValueError):
        raise UserError(f"{path}: not an eval.json of looped.py") from None
    return run


def find_groups(raw, patterns):
    """Patterns in the folder of raw results -> {name: [its runs by seed]}.

    Of several patterns the names begin with the folder that the runs lie in: sudoku6/internal.
    Raises UserError, also where runs of one name are not seeds of one experiment.
    """
    groups = {}
    for pattern in patterns:
        runs = [read_run(path) for path in sorted(raw.glob(f"{pattern}/eval.json"))]
        if not runs:
            raise UserError(f"{raw / pattern}: no eval.json there")
        for run in sorted(runs, key=lambda run: (run.folder.parent, run.name, run.seed)):
            name = run.name
            # one name in two folders: say which
            if len(patterns) > 1 and name != run.folder.parent.name:
                name = f"{run.folder.parent.name}/{name}"
            group = groups.setdefault(name, [])
            for other in group:
                if other.seed == run.seed or other.settings() != run.settings():
                    raise UserError(f"{other.folder} and {run.folder} would be one row, but are "
                                    "not two seeds of one experiment: rename one")
            group.append(run)
    return groups


# ----------------------------------------------------------------------------
# numbers and how they are written


def spread(values, form=".3f"):
    """Mean and standard deviation (n - 1) over seeds; of one seed only the value."""
    mean = format(np.mean(values), form)
    if len(values) == 1:
        return mean
    return f"{mean} ± {np.std(values, ddof=1):{form}}"


def each(values, form=".2f"):
    return " ".join(format(value, form) for value in values)


def hits_of(runs, level):
    """-> how many puzzles of all seeds are solved in one pass, and of how many."""
    hits = round(sum(run.exact(level) * run.n(level) for run in runs))
    return hits, sum(run.n(level) for run in runs)


def halted(runs, levels, key):
    """Summed over all puzzles: how many "converged", are "exact", ..., or the "loops" they took."""
    found = [run.halting(level) for run in runs for level in levels]
    # eval.json holds means over puzzles
    return round(sum(record[key] * record["n"] for record in found))


def pooled(runs, level):
    """All puzzles of all seeds, with the interval of their share: 659 of 768 [0.830, 0.882]."""
    hits, n = hits_of(runs, level)
    low, high = looped.wilson(hits / n, n)
    return f"{hits:,} of {n:,} [{low:.3f}, {high:.3f}]"


def mean_curve(runs, level):
    """-> loop counts, share solved as a mean over seeds."""
    counts = sorted(runs[0].result[level], key=int)
    means = [np.mean([run.result[level][t]["exact"] for run in runs]) for t in counts]
    return [int(t) for t in counts], means


def sizes(runs, level):
    """How many puzzles each seed was tested on."""
    return "/".join(str(n) for n in sorted({run.n(level) for run in runs}))


def markdown(head, rows):
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, *rows)]
    lines.insert(1, "|---" * len(head) + "|")
    return "\n".join(lines)


# ----------------------------------------------------------------------------
# tables of runs


def runs_table(raw, *patterns):
    """Accuracy at the largest loop count, a row for each group of seeds."""
    head = [
        "run", "seeds", "puzzles a seed, easy, hard", "easy", "hard", "hard, each seed",
        "hard, all seeds", "residual", "norm ratio", "minutes",
    ]
    rows = []
    for name, runs in find_groups(raw, patterns).items():
        easy = [run.exact("easy") for run in runs]
        hard = [run.exact("hard") for run in runs]
        residual = np.median([run.last("hard")["residual"] for run in runs])
        ratio = np.median([run.last("hard")["norm_ratio"] for run in runs])
        minutes = np.mean([run.result["minutes"] for run in runs])
        rows.append(
            [
                name, len(runs), f"{sizes(runs, 'easy')}, {sizes(runs, 'hard')}", spread(easy),
                spread(hard), each(hard), pooled(runs, "hard"), f"{residual:.0e}", f"{ratio:.3g}",
                f"{minutes:.1f}",
            ]
        )
    return markdown(head, rows)


# what the two levels of a task are, in a few words; `levels` in data.py says it in full
FRONT = {
    "prefix_sums": ("prefix sums", "32 bits", "512 bits"),
    "sudoku6": ("sudoku 6x6", "a solver need not guess", "it has to guess"),
    "sudoku9": ("sudoku 9x9", "0 to 4 guesses", "5 guesses and more"),
    "chess": ("chess", "mates in one", "mates in two"),
    "lichess": ("chess", "Lichess, rated to 1600", "1601 to 2000"),
}


def task_key(config):
    return f"sudoku{config['side']}" if config["task"] == "sudoku" else config["task"]


def front_table(raw, *patterns):
    """For the front page: a row for each group of seeds, with loop counts in parentheses.

    Easy puzzles are scored at the largest loop count; hard ones at the loops of training, too, and
    where each stops by itself. Minutes are those of the fastest seed.
    """
    head = [
        "task, seeds", "trained on (easy)", "easy solved", "tested on (hard)",
        "hard solved, loops as in training", "hard solved, more loops",
        "hard solved, each stops by itself", "minutes",
    ]
    rows = []
    for runs in find_groups(raw, patterns).values():
        config = runs[0].result["config"]
        key = task_key(config)
        if key == "chess" and config["files"]:
            key = "lichess"
        task, easy, hard = FRONT[key]
        first = in_training(runs[0])
        early = np.mean([run.result["hard"][first]["exact"] for run in runs])
        late = spread([run.exact("hard") for run in runs])
        alone = spread([run.halting("hard")["exact"] for run in runs])
        loops = np.mean([run.halting("hard")["loops"] for run in runs])
        rows.append(
            [
                f"{task}, {len(runs)}", easy, spread([run.exact("easy") for run in runs]), hard,
                f"{early:.3f} ({first})", f"{late} ({config['eval_loops']})",
                f"{alone} ({loops:.0f})",
                f"{min(run.result['minutes'] for run in runs):.1f}",
            ]
        )
    return markdown(head, rows)


def loops_table(raw, *patterns):
    """Share solved against loops, mean over seeds."""
    groups = find_groups(raw, patterns)
    counts = {int(t) for runs in groups.values() for t in runs[0].result["hard"]}
    rows = []
    for name, runs in groups.items():
        for level in LEVELS:
            row = [f"{name}, {level}", f"{len(runs)} x {sizes(runs, level)}"]
            for t in sorted(counts):
                values = [
                    run.result[level][str(t)]["exact"] for run in runs
                    if str(t) in run.result[level]
                ]
                row.append(f"{np.mean(values):.3f}" if values else "")
            rows.append(row)
    return markdown(["loops", "seeds x puzzles", *sorted(counts)], rows)


def halting_table(raw, *patterns):
    """How many puzzles converge by themselves, how many of those are right, after which loops."""
    head = ["run", "seeds"]
    for level in LEVELS:
        head += [f"{level}, converge", "right of those", "solved", "loops, mean"]
    rows = []
    for name, runs in find_groups(raw, patterns).items():
        row = [name, len(runs)]
        for level in LEVELS:
            n = sum(run.halting(level)["n"] for run in runs)
            row += [
                f"{halted(runs, [level], 'converged'):,} of {n:,}",
                f"{halted(runs, [level], 'converged_and_right'):,}",
                f"{halted(runs, [level], 'exact'):,}", f"{halted(runs, [level], 'loops') / n:.0f}",
            ]
        rows.append(row)
    return markdown(head, rows)


def read_lines(path):
    """-> the records of a file with one in each line."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def validations(run):
    """-> the records of a run's validations: exact, loss, ..."""
    return [record for record in read_lines(run.folder / "log.jsonl") if "exact" in record]


def learnt_table(raw, *patterns):
    """After how many steps half of the validation puzzles, and all, are solved; a number a seed."""
    rows = []
    for name, runs in find_groups(raw, patterns).items():
        row = [name, runs[0].result["config"]["steps"], each([run.seed for run in runs], "d")]
        for share in (0.5, 1.0):
            steps = [[v["step"] for v in validations(run) if v["exact"] >= share] for run in runs]
            row.append(" ".join(str(found[0]) if found else "never" for found in steps))
        rows.append(row)
    return markdown(["run", "steps", "seeds", "half of validation after", "all after"], rows)


def rates_table(raw, pattern):
    """Best validation of each variant at each learning rate; the highest in bold is the choice.

    Of equal ones that with the lowest loss at the end. Nothing of the test sets is in this table.
    """
    found = {}
    for (run,) in find_groups(raw, [pattern]).values():
        variant = run.name.split("-lr")[0]
        records = validations(run)
        score = (max(record["exact"] for record in records), -records[-1]["loss"])
        found.setdefault(variant, {})[run.result["config"]["lr"]] = score
    rates = sorted({rate for row in found.values() for rate in row})
    rows = []
    for variant, row in sorted(found.items(), key=lambda item: cell_order(item[0])):
        cells = {rate: f"{exact:.3f}" for rate, (exact, _) in row.items()}
        chosen = max(row, key=row.get)
        cells[chosen] = f"**{cells[chosen]}**"
        rows.append([variant] + [cells.get(rate, "") for rate in rates])
    return markdown(["validation at a rate of", *rates], rows)


def in_training(run):
    """The least loop count of the table that is not below the loops of training."""
    loops = run.result["config"]["loops"]
    return min((t for t in run.result["hard"] if int(t) >= loops), key=int)


def cell_order(name):
    """Sorts recall-norm: by recall, then by norm, then by what is no cell of the grid."""
    recall, _, norm = name.partition("-")
    known = recall in RECALLS and norm in GRID_NORMS
    if not known:
        return len(RECALLS), 0, name
    return RECALLS.index(recall), GRID_NORMS.index(norm), name


def grid_table(raw, *patterns):
    """Recall and norm, a column for each task: hard puzzles at the loops of training, and at all.

    Means over seeds; how many, in parentheses, where there are fewer than elsewhere.
    """
    columns = [find_groups(raw, [pattern]) for pattern in patterns]
    head = ["hard puzzles solved"]
    for groups in columns:
        # the untied blocks have one pass only
        loop = next(runs[0] for name, runs in groups.items() if not name.startswith("fixed"))
        config = loop.result["config"]
        task, *_ = FRONT[task_key(config)]
        head.append(f"{task}, {in_training(loop)} → {config['eval_loops']} loops")
    rows = []
    for name in sorted({name for groups in columns for name in groups}, key=cell_order):
        row = [name.replace("-", ", ", 1)]
        for groups in columns:
            runs = groups.get(name, [])
            early = [run.result["hard"][in_training(run)]["exact"] for run in runs]
            late = [run.exact("hard") for run in runs]
            cell = f"{np.mean(early):.2f} → {spread(late, '.2f')}" if runs else "not run"
            most = max(map(len, groups.values()))
            if 0 < len(runs) < most:
                cell += f" ({len(runs)})"
            row.append(cell)
        rows.append(row)
    return markdown(head, rows)


def pair_by_seed(ones, others):
    """Two groups of runs -> [(run of the first, run of the second)] for the seeds of both."""
    first = {run.seed: run for run in ones}
    second = {run.seed: run for run in others}
    return [(first[seed], second[seed]) for seed in sorted(first.keys() & second.keys())]


def mean_difference(gaps):
    """-> mean and half of its 95 % interval (Student's t) of paired differences."""
    t = STUDENT[min(len(gaps) - 2, len(STUDENT) - 1)]
    return np.mean(gaps), t * np.std(gaps, ddof=1) / math.sqrt(len(gaps))


def pairs_table(raw, *names):
    """Two variants seed by seed on hard puzzles: the mean difference, in one pass and with tries.

    names: first and second, and perhaps more such pairs, of folders without their -seedN. The row
    for tries is there if all the runs had the same number.
    """
    if not names or len(names) % 2 == 1:
        raise UserError(f"pairs {' '.join(names)}: names come in pairs, first and second")
    rows = []
    for first, second in zip(names[::2], names[1::2], strict=True):
        rows += difference_rows(raw, first, second)
    head = ["hard", "paired seeds", "puzzles a seed", "first", "second", "each", "mean difference"]
    return markdown(head, rows)


def difference_rows(raw, first, second):
    """-> the rows of one pair of variants."""
    (ones,), (others,) = (find_groups(raw, [f"{name}-seed*"]).values() for name in (first, second))
    pairs = pair_by_seed(ones, others)
    if len(pairs) < 2:
        raise UserError(f"{first}, {second}: a pair needs two seeds in common")

    shares = {"one pass": [[run.exact("hard") for run in pair] for pair in pairs]}
    tries = {run.halting("hard").get("tries", 1) for pair in pairs for run in pair}
    if len(tries) == 1 and tries != {1}:
        solved = [[run.halting("hard")["exact"] for run in pair] for pair in pairs]
        shares[f"up to {min(tries)} tries"] = solved
    rows = []
    for way, solved in shares.items():
        of_first, of_second = zip(*solved, strict=True)
        gaps = [one - other for one, other in zip(of_first, of_second, strict=True)]
        mean, half = mean_difference(gaps)
        rows.append([
            f"{first} - {Path(second).name}, {way}", len(pairs), sizes(ones, "hard"),
            spread(of_first), spread(of_second), each(gaps, "+.3f"),
            f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]",
        ])
    return rows


# ----------------------------------------------------------------------------
# tables of measurements in float64, of claims, of halting

AXES = {  # a key of theory.py's records: how it is shown
    "converged": "converged",
    "norm_ratio": "norm ratio",
    "distinct": "distinct limits",
    "rho": "rho(J*)",
    "sensitivity_30_100_500": "dh/de, last",
    "swapped_to_new": "input swapped: off the new limit",
}


# the rows of rank_table: title, key of the records, the accuracy it ranks, and whether only loops
# with recall count (without recall there is no input to swap). The last two are controls: does
# recall alone rank as well? And is it about more loops than in training?
RANKED = [(title, key, "hard", key == "swapped_to_new") for key, title in AXES.items()] + [
    ("axes held, 0 to 3", "held", "hard", False),
    ("... of loops with recall", "held", "hard", True),
    ("control: recall or none", "has_recall", "hard", False),
    ("control: axes held, accuracy at the loops of training", "held", "hard_in_training", False),
]


def axes_held(record):
    """0 to 3, what a run has of the axes: the share of inputs that converge; 1 if most do and the
    limit depends on the input; 1 if the loop is smooth."""
    depends = record["converged"] > 0.5 and record["sensitivity_30_100_500"][-1] > 1e-3
    # of the gradients through 15, 30, 60 and 120 loops
    *_, early, late = record["gradient_15_30_60_120"]
    smooth = max(record["rho"]) < 1 and abs(late - early) < 0.25 * late
    return record["converged"] + depends + smooth


def read_axes(raw, file):
    """theory.py's measurements of trained runs -> {name: [its records, a seed each]}.

    Of lists one number counts: of rho the largest of the inputs, of the sensitivity the last.
    """
    found = {}
    for record in read_json(raw / file):
        record["held"] = axes_held(record)
        record["has_recall"] = record["recall"] != "none"
        record["rho"] = max(record["rho"])
        record["sensitivity_30_100_500"] = record["sensitivity_30_100_500"][-1]
        name = without_seed(Path(record["run"]).name)
        found.setdefault(name, []).append(record)
    return found


def accuracy_in_training(raw, file, record):
    """Hard accuracy at the loops of training. The runs of axes-TASK.json lie in TASK beside it."""
    task = Path(file).stem.removeprefix("axes-")
    run = read_run((raw / file).parent / task / record["run"] / "eval.json")
    return run.result["hard"][in_training(run)]["exact"]


def column(records, key):
    return [float(record[key]) for record in records]


def ranks(values):
    """Ranks from 0, ties share their mean rank."""
    values = np.asarray(values)
    below = (values[None] < values[:, None]).sum(1)
    equal = (values[None] == values[:, None]).sum(1)
    return below + (equal - 1) / 2


def spearman(a, b):
    """Rank correlation; NaN where all values of one are equal."""
    a = ranks(a)
    b = ranks(b)
    a = a - a.mean()
    b = b - b.mean()
    size = np.sqrt((a @ a) * (b @ b))
    return a @ b / size if size > 0 else math.nan


def rank_table(raw, *files):
    """Rank correlation of hard accuracy with each axis over all runs, two columns for each file.

    The seeds of a variant are no independent runs. So the interval is of a bootstrap over variants,
    and the control is the 97.5 % quantile of the size that is left when whole variants swap their
    accuracies.
    """
    head = ["rank correlation with hard accuracy"]
    rows = [[title] for title, *_ in RANKED]
    for file in files:
        head += [Path(file).stem, "shuffled"]
        variants = list(read_axes(raw, file).values())
        for records in variants:
            for record in records:
                record["hard_in_training"] = accuracy_in_training(raw, file, record)
        for row, (_, key, accuracy, needs_recall) in zip(rows, RANKED, strict=True):
            some = [records for records in variants
                    if records[0]["has_recall"] or not needs_recall]
            now, low, high, chance = bootstrap(some, key, accuracy)
            if math.isnan(now):
                row += ["all equal", ""]
                continue
            runs = sum(map(len, some))
            row += [f"{now:+.2f} [{low:+.2f}, {high:+.2f}], {runs} runs", f"{chance:.2f}"]
    return markdown(head, rows)


def ends_table(raw, *files):
    """Where the loops of each cell end: inputs at rest (mean), rho, growth of |h| (medians)."""
    columns = [read_axes(raw, file) for file in files]
    rows = []
    for name in sorted(columns[0], key=cell_order):
        row = [name.replace("-", ", ")]
        for cells in columns:
            converged, rho, growth = (column(cells[name], key)
                                      for key in ("converged", "rho", "norm_ratio"))
            row.append(f"{np.mean(converged):.0%}, {np.median(rho):.2f}, {np.median(growth):.1f}")
        rows.append(row)
    return markdown(["at rest, rho, growth", *(Path(file).stem for file in files)], rows)


def bootstrap(variants, key, accuracy):
    """-> rank correlation of an axis with an accuracy over the runs of all variants, its interval,
    and what 97.5 % of shuffles stay below."""
    axis = [column(records, key) for records in variants]
    hard = [column(records, accuracy) for records in variants]

    def correlation(of_axis, of_hard):
        """Between the axis of some variants and the accuracy of some."""
        return spearman(np.concatenate([axis[i] for i in of_axis]),
                        np.concatenate([hard[i] for i in of_hard]))

    everyone = np.arange(len(variants))
    now = correlation(everyone, everyone)
    if math.isnan(now):
        return now, now, now, now
    random = np.random.RandomState(0)
    drawn = []
    shuffled = []
    for _ in range(1000):
        some = random.choice(everyone, len(everyone))
        drawn.append(correlation(some, some))
        shuffled.append(abs(correlation(everyone, random.permutation(everyone))))
    # a draw may happen to hold equal values only
    low, high = np.nanquantile(drawn, (0.025, 0.975))
    return now, low, high, np.nanquantile(shuffled, 0.975)


def limits_table(raw, file):
    """Where trained loops end: theory.py's records, a row for each run."""
    head = [
        "run", "converged", "distinct limits", "rho(J*)", "from a random state: off by",
        "back after a push", "equal neighbours on a line", "least other step",
    ]
    rows = []
    for record in read_json(raw / file):
        least = record["line_least_change"]
        rows.append(
            [
                f"{record['recall']}, {record['run']}", f"{record['converged']:.0%}",
                record["distinct"], each(record["rho"]), f"{record['from_random_start']:.0e}",
                f"{record['return_after_push']:.0%}",
                f"{record['line_equal']:.0%} of {record['line_pairs']}",
                "" if least is None else f"{least:.1e}",
            ]
        )
    return markdown(head, rows)


def count_table(raw, file):
    """How many limits the loops have for all strings of so many bits; trained and untrained."""
    records = read_json(raw / file)
    bits = [row["bits"] for row in records[0]["trained"]]
    rows = []
    for record in records:
        for kind in ("trained", "untrained"):
            cells = [f"{row['limits']} ({row['converged']})" for row in record[kind]]
            rows.append([f"{Path(record['run']).name}, {kind}", *cells])
    return markdown(["limits (strings that converge)", *(f"all {2 ** n}" for n in bits)], rows)


def theory_table(raw, *folders):
    """How many seeds of theory.py hold every row, a folder for each set of seeds."""
    rows = []
    for folder in folders:
        for kind in ("quick", "full"):
            tables = [read_json(path)["rows"] for path in raw.glob(f"{folder}/{kind}-seed*.json")]
            if not tables:
                continue
            held = sum(all(row["passed"] for row in table) for table in tables)
            size = "/".join(str(n) for n in sorted({len(table) for table in tables}))
            name = f"{Path(folder).name}, {kind}"
            rows.append([name, len(tables), size, f"{held} of {len(tables)}"])
    if not rows:
        raise UserError(f"{raw}: no table of theory.py in {', '.join(folders)}")
    return markdown(["seeds from", "seeds", "rows", "seeds of which every row holds"], rows)


def damping_table(raw, file):
    """Halting with damped loops, on 256 boards a seed."""
    rows = []
    for name, found in sorted(read_json(raw / file).items()):
        boards = 256 * len(found["seeds"])
        rows.append(
            [
                name, f"{found['solved']} of {boards}", found["rest"], found["right_at_rest"],
                f"{found['loops']:.0f}",
            ]
        )
    head = ["optimizer, recall, damping", "solved", "converged", "of those solved", "loops, mean"]
    return markdown(head, rows)


def left_out_table(raw, file):
    """theory.py's measurement of truncated backpropagation: the median share that is missing."""
    rows = []
    for record in read_json(raw / file):
        shares = [f"{share:.2f}" for share in record["left_out_3_6_10"]]
        rows.append([record["run"], *shares])
    return markdown(["run", "last 3 loops", "last 6", "last 10"], rows)


def tries_table(raw, file):
    """Another chance for boards that do not converge, see tries/compare.py."""
    records = read_lines(raw / file)
    marks = list(records[0]["curve"])
    rows = []
    for r in records:
        rows.append(
            [
                r["run"], r["kind"], r["sigma"] or "", r["per_try"], r["damping"], r["skip"],
                f"{r['converged']} of {r['boards']}", r["sure"], r["right"], f"{r['loops']:.0f}",
                *(r["curve"][t] for t in marks),
            ]
        )
    head = ["weights", "chance", "noise", "loops each", "damping", "skip"]
    head += ["converge", "right of those", "right"]
    return markdown([*head, "loops, mean", *(f"after {t}" for t in marks)], rows)


TABLES = {
    "runs": runs_table, "front": front_table, "loops": loops_table, "halting": halting_table,
    "learnt": learnt_table, "rates": rates_table, "grid": grid_table, "pairs": pairs_table,
    "rank": rank_table, "ends": ends_table, "limits": limits_table, "count": count_table,
    "theory": theory_table, "damping": damping_table, "left_out": left_out_table,
    "tries": tries_table,
}


def make_table(raw, spec):
    """What follows "table" in a marker -> the table, a string."""
    kind, *arguments = spec.split() or [""]
    if kind not in TABLES:
        raise UserError(f"table {spec}: unknown kind; one of {', '.join(TABLES)}")
    try:
        return TABLES[kind](raw, *arguments)
    except UserError:
        raise
    except (LookupError, StopIteration, TypeError, ValueError, NotImplementedError) as e:
        raise UserError(f"table {spec}: {type(e).__name__} {e}") from e


def tables(raw, folders):
    """Print the tables of all runs in the folders, one pair for each folder that holds runs."""
    for folder in folders or [raw]:
        paths = sorted(Path(folder).rglob("eval.json"))
        if not paths:
            raise UserError(f"{folder}: no eval.json there")
        for parent in sorted({path.parent.parent for path in paths}):
            print(f"\n## {parent}\n\n{runs_table(parent, '*')}\n\n{loops_table(parent, '*')}")


BLOCK = re.compile(r"^<!-- table (.+?) -->\n(.*?)^<!-- end -->$", re.M | re.S)


def read_blocks(path, raw):
    """A Markdown file -> its text, the text with fresh tables, [(spec, old, fresh)]."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a Markdown file") from None
    blocks = []

    def refill(match):
        fresh = make_table(raw, match[1])
        blocks.append((match[1], match[2].strip(), fresh))
        return f"<!-- table {match[1]} -->\n{fresh}\n<!-- end -->"

    fresh_text = BLOCK.sub(refill, text)
    marks = re.findall(r"^ *<!-- *(?:table|end)\b", text, re.M)
    if len(marks) != 2 * len(blocks):
        raise UserError(f"{path}: each <!-- table ... --> needs its own <!-- end -->, both on "
                        "lines of their own")
    return text, fresh_text, blocks


def mean_right(records):
    """-> the share of boards that are right, a mean over records of tries/compare.py."""
    return np.mean([record["right"] / record["boards"] for record in records])


def all_runs(raw, pattern):
    """-> all runs of a pattern, whatever their names."""
    return [run for runs in find_groups(raw, [pattern]).values() for run in runs]


def phrases(raw):
    """Yield the numbers that the front page states in prose, as it states them."""
    yield from main_command_phrases(raw)
    yield from grid_phrases(raw)
    yield from skip_phrases(raw)
    yield from fixed_point_phrases(raw)


def main_command_phrases(raw):
    """The output of the main command: three rows of its table, and what stops by itself."""
    result = read_json(raw / "quickstart/eval.json")
    for t in ("32", "256", "500"):
        easy, hard = result["easy"][t], result["hard"][t]
        row = f"{t} | {easy['exact']:.3f} {easy['residual']:.1e}"
        yield f"{row} | {hard['exact']:.3f} {hard['residual']:.1e}"

    halt = result["halting"]["hard"]
    converged = round(halt["converged"] * halt["n"])
    yield (f"{halt['exact']:.3f} solved when each stops by itself: {converged} converge, "
           f"{halt['loops']:.0f} loops each")

    # the same command without recall, and with pre norm
    groups = find_groups(raw, ["current/variants/*"])
    for cell in ("none-outer", "internal-pre"):
        easy, hard = [hits_of(groups[cell], level) for level in LEVELS]
        yield "{} of {} strings of 32 bits, and {} of {} of 512".format(*easy, *hard)


def grid_phrases(raw):
    """What recall, norm and protocol do."""
    # what a stack of blocks solves of the easy puzzles, beside a loop in chess
    shares = [np.mean([run.exact("easy") for run in all_runs(raw, f"grid/{pattern}")])
              for pattern in ("prefix_sums/fixed-pre-*", "sudoku6/fixed-pre-*",
                              "chess/fixed-pre-*", "chess/*ternal-outer-*")]
    yield ("of the easy ones {:.2f} (strings), {:.2f} (6x6) and {:.2f} (chess; loops: "
           "{:.2f})".format(*shares))

    # boards, tried again
    tried = read_lines(raw / "tries/ten.jsonl")
    shares = []
    for model in ("sudoku6/internal", "sudoku9-2000/internal"):
        shares.append(mean_right([r for r in tried if r["run"].startswith(model)]))
    yield "solves {:.3f} of the hard 6x6 and {:.3f} of the hard 9x9 boards".format(*shares)

    # without recall
    hard = [run.exact("hard") for run in all_runs(raw, "grid/prefix_sums/none-*")]
    some = [share for share in hard if share > 0]
    yield (f"{len(some)} of {len(hard)} such runs on strings (4 norms) solve at least one of "
           f"256 bits, the best {max(hard):.2f} of them")

    # 9x9 boards that are forgotten
    boards = find_groups(raw, ["grid/sudoku9/*"])
    for cell, phrase in (("none-outer", "{:.2f} of the hard 9x9 boards are solved after 64 loops, "
                          "and {:.2f}"),
                         ("internal-pre", "{:.2f} of the hard boards after 64 loops, {:.2f}")):
        shares = dict(zip(*mean_curve(boards[cell], "hard"), strict=True))
        yield phrase.format(shares[64], shares[512]) + " after 512"

    # the most that a cell loses by looping on
    lost = {"external-outer": [], "internal-outer": [], "external-pre": []}
    for task in ("prefix_sums", "sudoku6", "sudoku9", "chess"):
        groups = find_groups(raw, [f"grid/{task}/*"])
        for cell in lost:
            _, means = mean_curve(groups[cell], "hard")
            lost[cell].append(max(means) - means[-1])
    most = {cell: math.ceil(1e3 * max(by_task)) / 1e3 for cell, by_task in lost.items()}
    outer = max(most["external-outer"], most["internal-outer"])
    yield (f"no entry of the table loses more than {outer:.3f} (external recall with pre "
           f"norm: {most['external-pre']:.3f})")

    # internal against external recall, paired by seed
    for folder, ones, others in (("wide/sudoku9", "internal-outer", "external-outer"),
                                 ("grid/sudoku9", "internal-outer", "external-outer"),
                                 ("current/sudoku6-rest", "internal", "external")):
        groups = find_groups(raw, [f"{folder}/*"])
        pairs = pair_by_seed(groups[ones], groups[others])
        gaps = [one.exact("hard") - other.exact("hard") for one, other in pairs]
        mean, half = mean_difference(gaps)
        yield f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"

    # the paper's own protocol
    groups = find_groups(raw, ["wide/paper/prefix_sums/*"])
    hits = {cell: "{} of {}".format(*hits_of(runs, "hard")) for cell, runs in groups.items()}
    yield (f"solves {hits['internal-pre']} with pre norm, and {hits['internal-outer']} with "
           "outer norm")


def skip_phrases(raw):
    """What tokens that skip a loop bring, and where they do harm."""
    right = {(record["damping"], record["skip"]): record["right"]
             for record in read_lines(raw / "tries/sudoku9.jsonl") if record["kind"] == "on"}
    yield (f"one model solves {right[0.0, 0.0]} in 2,560 plain loops, {right[0.25, 0.0]} in damped "
           f"ones, ¾ step(h) + ¼ h, and {right[0.0, 0.25]}")
    share = mean_right(read_lines(raw / "tries/long.jsonl"))
    yield f"(three models, 2,048 loops: {share:.3f} solved)"
    shares = [np.mean([run.halting("hard")["exact"] for run in all_runs(raw, pattern)])
              for pattern in ("current/sudoku4-skip/*", "current/sudoku4/*")]
    yield "{:.3f} of the hard boards instead of {:.3f}".format(*shares)


def fixed_point_phrases(raw):
    """Gradients, the axes, and whether what is at rest is right."""
    # what truncated backpropagation leaves out
    left_out = {record["run"]: record["left_out_3_6_10"][0]
                for record in read_json(raw / "horizon/left-out.json")}
    shares = [left_out[f"{name}.pt"] for name in ("prefix_sums", "sudoku6", "sudoku9")]
    yield "off by {:.2f} on strings, {:.2f} on 6x6 and {:.2f} on 9x9".format(*shares)
    six = all_runs(raw, "horizon/sudoku9/6loops-4000steps-*")
    three = all_runs(raw, "one-block/9x9-one-block/internal-*")
    hard = [f"{run.exact('hard'):.2f}" for run in six + three]
    yield "{}, {}, {} solved; three {}, {}, {}".format(*hard)

    # chess by several blocks
    run, = all_runs(raw, "horizon/chess/pilot-2blocks-3loops-1000steps")
    yield f"({run.exact('easy'):.2f} of mates in one, 1,000 steps, one seed)"

    # how the axes rank the runs, and how recall does
    ranked = {"held": [], "has_recall": []}
    for task in ("prefix_sums", "sudoku6", "chess"):
        records = [record for runs in read_axes(raw, f"grid/axes-{task}.json").values()
                   for record in runs]
        for key, values in ranked.items():
            values.append(spearman(column(records, key), column(records, "hard")))
    yield "by {:.2f} on strings, {:.2f} on 6x6, {:.2f} in chess".format(*ranked["held"])
    yield "recall or none alone: {:.2f}, {:.2f}, {:.2f}".format(*ranked["has_recall"])

    # what converges, and is right
    boards = [*all_runs(raw, "current/sudoku6/internal-*"), *all_runs(raw, "current/sudoku9/*")]
    unbounded = all_runs(raw, "grid/to-2048/sudoku6/internal-pre-*")
    chess = all_runs(raw, "current/chess/*")
    for runs, levels, what in ((boards, LEVELS, "boards of the first table"),
                               (unbounded, ["hard"], "hard 6x6 ones"),
                               (chess, ["easy"], "mates in one")):
        right = halted(runs, levels, "converged_and_right")
        yield f"{right:,} of {halted(runs, levels, 'converged'):,} {what}"


def write(raw, files):
    for path in files or NOTEBOOKS:
        text, fresh, blocks = read_blocks(path, raw)
        if fresh != text:
            Path(path).write_text(fresh, encoding="utf-8")
        print(f"{path}: {len(blocks)} tables")


def check(raw, files):
    """-> exit code: 0, or 1 if a table is not what the raw files say."""
    wrong = 0
    for path in files or NOTEBOOKS:
        blocks = read_blocks(path, raw)[2]
        for spec, old, fresh in blocks:
            if old == fresh:
                continue
            wrong += 1
            print(f"{path}: table {spec} is not what the raw files say")
            lines = itertools.zip_longest(old.splitlines(), fresh.splitlines(),
                                          fillvalue="(no line)")
            for before, after in lines:
                if before != after:
                    print(f"  has  {before}\n  want {after}")
                    break
        print(f"{path}: {len(blocks)} tables checked")
    if wrong:
        print("python assets/results.py write puts it right")
    if not files:
        wrong += check_prose(raw, NOTEBOOKS[0])
    return int(wrong > 0)


def check_prose(raw, path):
    """-> how many of the phrases the file does not have."""
    text = " ".join(path.read_text(encoding="utf-8").split())
    missing = [phrase for phrase in phrases(raw) if " ".join(phrase.split()) not in text]
    for phrase in missing:
        print(f"{path}: does not say {' '.join(phrase.split())!r}, as the raw files do")
    return len(missing)


# ----------------------------------------------------------------------------
# figures

BLUE = "#0072B2"  # the colour-blind safe colours of Okabe and Ito
ORANGE = "#D55E00"
GREEN = "#009E73"
YELLOW = "#E69F00"
PINK = "#CC79A7"
RECALL_COLOURS = dict(zip(RECALLS, ("0.45", ORANGE, BLUE), strict=True))


def new_figure(width, height, rows=1, columns=1, **options):
    """-> a figure and its axes [rows, columns]; 100 dots an inch."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("figures need matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(width, height), layout="constrained", dpi=100)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    print(path)


def loops_axis(axis, config, counts):
    """Loops on a log scale, those of training shaded."""
    axis.axvspan(counts[0], config["loops"], color="0.93", linewidth=0)
    ticks = counts[::2]
    axis.set_xscale("log")
    axis.set_xticks(ticks, [str(t) for t in ticks])
    axis.minorticks_off()
    axis.set(ylim=(-0.03, 1.05), xlabel="loops")


def curve(run):
    """Draw RUN/curve.png: accuracy against loops of one finished run."""
    found = read_run(run / "eval.json")
    config = found.result["config"]
    figure, ((axis,),) = new_figure(6, 3.6)
    for level, colour, mark in zip(LEVELS, (BLUE, ORANGE), "os", strict=True):
        counts, exact = mean_curve([found], level)
        axis.plot(
            counts, exact, marker=mark, color=colour, markersize=4,
            label=f"{level}: {found.n(level)} puzzles",
        )
    loops_axis(axis, config, counts)
    axis.set(
        ylabel="solved exactly", title=f"{config['task']}: {config['recall']} recall, "
        f"{config['norm']} norm (shaded: loops in training)",
    )
    axis.title.set_fontsize(10)
    axis.legend(frameon=False)
    save_figure(figure, run / "curve.png")


def grid_figure(raw, out):
    """Hard puzzles against loops: a row for each task, a column for each norm, a line a recall."""
    tasks = [task for task in FRONT if (raw / "grid" / task).is_dir()]
    if not tasks:
        raise UserError(f"{raw}/grid: no folder of a task there")
    height = 0.5 + 2.1 * len(tasks)
    figure, axes = new_figure(8.5, height, len(tasks), 4, sharey="row", sharex="row")
    for row, task in zip(axes, tasks, strict=True):
        groups = find_groups(raw, [f"grid/{task}/*"])
        for axis, norm in zip(row, GRID_NORMS, strict=True):
            for recall, colour in RECALL_COLOURS.items():
                runs = groups.get(f"{recall}-{norm}", [])
                for run in runs:
                    counts, exact = mean_curve([run], "hard")
                    axis.plot(counts, exact, color=colour, linewidth=0.7, alpha=0.4)
                if runs:
                    counts, exact = mean_curve(runs, "hard")
                    axis.plot(counts, exact, color=colour, linewidth=2, label=recall)
                    loops_axis(axis, runs[0].result["config"], counts)
            if not axis.lines:
                axis.text(0.5, 0.5, "not run", color="0.5", ha="center", transform=axis.transAxes)
            axis.set_title(f"{FRONT[task][0]}, {norm} norm", fontsize=9)
            axis.set_xlabel("")
        top = max(line.get_ydata().max() for axis in row for line in axis.lines)
        row[0].set_ylim(-0.03 * top, 1.08 * top)
        row[0].set_ylabel("hard ones solved", fontsize=9)
    axes[0, 0].legend(frameon=False, fontsize=8, title="recall", title_fontsize=8)
    figure.supxlabel("loops (shaded: loops in training)", fontsize=9)
    save_figure(figure, out / "grid.png")


def axes_figure(raw, out):
    """A point for each trained run: hard accuracy against what its float64 loop does."""
    keys = ("converged", "rho", "swapped_to_new")
    tasks = [task for task in FRONT if (raw / "grid" / f"axes-{task}.json").exists()]
    if not tasks:
        raise UserError(f"{raw}/grid: no axes-TASK.json there")
    figure, axes = new_figure(8.5, 0.6 + 2.4 * len(tasks), len(tasks), len(keys), sharey="row")
    marks = dict(zip(GRID_NORMS, "s^oD", strict=True))
    for row, task in zip(axes, tasks, strict=True):
        for name, records in read_axes(raw, f"grid/axes-{task}.json").items():
            recall, norm = records[0]["recall"], records[0]["norm"]
            for axis, key in zip(row, keys, strict=True):
                if key == "swapped_to_new" and recall == "none":
                    continue
                axis.plot(
                    column(records, key), column(records, "hard"), marks[norm],
                    color=RECALL_COLOURS[recall], alpha=0.75, markersize=5,
                    label=name.replace("-", ", "),
                )
                axis.set_xlabel(AXES[key])
        row[2].set_xscale("log")
        row[0].set_ylabel(f"{FRONT[task][0]}: hard ones solved", fontsize=8.5)
    axes[0, 1].legend(frameon=False, fontsize=6.5)
    save_figure(figure, out / "axes.png")


def plain_ticks(axis, values):
    """Numbers instead of powers of ten on an axis with a log scale."""
    axis.set_ticks(values, [str(value) for value in values])
    axis.set_ticks([], minor=True)


def halting_figure(out):
    """Harder puzzles take more loops: strings by their length, boards by their rating."""
    figure, ((left, right),) = new_figure(8, 3.2, 1, 2)
    torch.manual_seed(0)
    model, cfg = looped.load(ASSETS / "prefix_sums.pt")
    for bits in (16, 32, 64, 128, 256, 512, 1024):
        texts = ["".join(map(str, row)) for row in torch.randint(0, 2, (16, bits)).tolist()]
        x = torch.as_tensor(np.stack([model.task.parse(text)[0] for text in texts])).long()
        left.plot([bits] * 16, looped.solve(model, x)[1], ".", color=BLUE, markersize=4)
    left.plot((16, 1024), (8, 512), color="0.5", label="as fast as windows allow")
    left.axvline(cfg.bits, color="0.9", linewidth=6, zorder=0, label="length in training")
    left.set(
        xscale="log", yscale="log", xlabel="bits", ylabel="loops until converged",
        title="prefix sums, 16 strings each",
    )
    plain_ticks(left.xaxis, (16, 64, 256, 1024))
    plain_ticks(left.yaxis, (16, 64, 256))
    left.legend(frameon=False, fontsize=8)

    model, cfg = looped.load(ASSETS / "sudoku9.pt")
    sets = data.splits(model.task, cfg.seed, 0, 0, cfg.n_test, cfg.n_hard)
    x = torch.as_tensor(np.concatenate([sets[level].x for level in LEVELS])).long()
    rating = np.concatenate([sets[level].rating for level in LEVELS])
    generator = torch.Generator().manual_seed(cfg.seed)
    found = looped.solve(model, x, max_loops=512, skip=cfg.skip, generator=generator)
    bands = {
        "0": (0, 0), "2": (2, 2), "4": (4, 4), "6-8": (6, 8), "10-14": (10, 14), "16+": (16, 999),
    }
    boxes = []
    names = []
    for name, (low, high) in bands.items():
        some = (low <= rating) & (rating <= high)
        boxes.append(found[1].numpy()[some])
        names.append(f"{name}\n{found[2].numpy()[some].mean():.0%}")
    right.boxplot(boxes, showfliers=False, medianprops={"color": ORANGE})
    right.axvspan(0.5, 3.5, color="0.93", zorder=0)
    right.text(0.6, 470, "ratings in training", color="0.4", fontsize=8.5)
    right.set(
        yscale="log", title=f"sudoku 9x9, {len(x)} boards",
        xlabel="guesses of a search\n(% that converge in 512 loops)",
    )
    right.set_xticks(range(1, 1 + len(names)), names)
    plain_ticks(right.yaxis, (64, 128, 256, 512))
    save_figure(figure, out / "halting.png")


def regions_figure(out):
    """Where a scalar loop reaches a fixed point, and where theory.py says that it does."""
    side = torch.linspace(-4, 4, 160, dtype=torch.float64)
    y, x = (t.flatten() for t in torch.meshgrid(side, side, indexing="ij"))
    figure, axes = new_figure(7, 6.8, 2, 2, sharex=True, sharey=True)
    for row, norm in zip(axes, ("pre", "outer"), strict=True):
        for axis, recall in zip(row, ("internal", "external"), strict=True):
            a, b = theory.scalar_loop(recall, x, y)
            axis.pcolormesh(
                side, side, theory.reached(a, b, norm, 0).view(160, 160), cmap="Blues", vmax=2,
                rasterized=True,
            )
            axis.contour(
                side, side, theory.settles(a, b, norm).view(160, 160), [0.5], colors=ORANGE,
                linewidths=1.2,
            )
            axis.set(
                title=f"{recall} recall, {'outer' if norm == 'outer' else 'no'} norm",
                aspect="equal",
            )
    figure.supxlabel("state weight x")
    figure.supylabel("block weight y")
    figure.suptitle("blue: a fixed point is reached; orange: the predicted edge", fontsize=11)
    save_figure(figure, out / "regions.png")


def drift_figure(out):
    """The state and its residual in an untrained block, against loops."""
    figure, axes = new_figure(8.5, 5, 2, 3, sharex=True, sharey="row")
    for (top, low), recall in zip(axes.T, ("none", "external", "internal"), strict=True):
        for norm, colour in (("pre", BLUE), ("peri", YELLOW), ("outer", GREEN)):
            # h_1 ... h_401 of one input
            loop = theory.untrained(0, norm, recall, theory.LARGE, 1, theory.STRONG)
            h = theory.states(loop, range(1, 402))[:, 0]
            residual = (h[1:] - h[:-1]).norm(dim=-1) / h[:-1].norm(dim=-1)
            top.loglog(range(1, 402), h.square().mean(1).sqrt(), label=norm, color=colour)
            low.loglog(range(1, 401), residual.clamp(min=1e-16), color=colour)
        top.set_title(f"recall: {recall}", fontsize=10)
        low.set_xlabel("loops")
    axes[0, 0].set_ylabel("rms of the state")
    axes[1, 0].set_ylabel("residual")
    axes[0, 0].legend(frameon=False, fontsize=8)
    save_figure(figure, out / "drift.png")


def staircase_figure(out):
    """Limits along a path of inputs: steps without recall, smooth pieces with it."""
    figure, axes = new_figure(7, 3, 1, 2, sharey=True)
    for axis, recall, title in zip(axes[0], (0.0, 4.0), ("no recall", "recall"), strict=True):
        place, limit = theory.tanh_path(0, recall, 801, 4000)
        for i, colour in enumerate((BLUE, YELLOW, GREEN, PINK)):
            axis.plot(place, limit[:, i], ".", markersize=2, color=colour)
        axis.set(title=title, xlabel="place on a path of inputs")
    axes[0, 0].set_ylabel("limit, 4 coordinates")
    save_figure(figure, out / "staircase.png")


def figures(raw, out, names):
    """Draw all figures, or those named."""
    draw = {
        "grid": lambda: grid_figure(raw, out), "axes": lambda: axes_figure(raw, out),
        "regions": lambda: regions_figure(out), "drift": lambda: drift_figure(out),
        "staircase": lambda: staircase_figure(out), "halting": lambda: halting_figure(out),
    }
    for name in names or draw:
        if name not in draw:
            raise UserError(f"figures {name}: one of {', '.join(draw)}")
        draw[name]()


# ----------------------------------------------------------------------------
# the movie, in units of a picture 700 wide; drawn at twice that size

# the board of the movie: a search needs 34 guesses on it
BOARD = "85...12........7.3....28.......5...8...7643...1.......67.2...4...2.....1..48....."
ZOOM = 2
INK = "#222222"
GREY = "#8a8a8a"
CLUE = "#e4e4e4"
PALE = "#fbe3d3"


class Canvas:
    """A picture of width x height units that knows lines, boxes and text."""

    def __init__(self, width, height):
        try:
            from PIL import Image, ImageDraw, ImageFont
        except ImportError:
            raise UserError("the movie needs pillow: pip install pillow") from None
        self.image = Image.new("RGB", (width * ZOOM, height * ZOOM), "white")
        self.pen = ImageDraw.Draw(self.image)
        self.font = ImageFont.load_default

    def box(self, x, y, width, height, fill=None, outline=None, line=1):
        corners = [round(v * ZOOM) for v in (x, y, x + width, y + height)]
        corners[2] -= 1
        corners[3] -= 1
        self.pen.rectangle(corners, fill, outline, round(line * ZOOM))

    def line(self, points, fill, width=1.0):
        self.pen.line([(x * ZOOM, y * ZOOM) for x, y in points], fill, round(width * ZOOM), "curve")

    def text(self, x, y, text, size=14, fill=INK, anchor="lm", bold=0):
        self.pen.text(
            (x * ZOOM, y * ZOOM), text, fill, self.font(size * ZOOM), anchor, stroke_width=bold
        )


def loop_by_loop(model, x, limit):
    """One puzzle x [L] -> after each loop until it converges: predicted labels [L], residual."""
    found = []
    cfg = model.cfg
    generator = torch.Generator().manual_seed(cfg.seed)
    with torch.inference_mode():
        batch = torch.as_tensor(x)[None]
        for _, h, residual in looped.run_loop(model, batch, limit, cfg.tol, cfg.skip, generator):
            labels = model.task.predict(model.readout(h))[0].numpy()
            found.append((labels, residual.item()))
            if residual < cfg.tol:
                break
    return found


def save_movie(frames, times, path):
    """Write a GIF with one small palette for all frames."""
    from PIL import Image

    shown = [frames[0], frames[len(frames) // 2], frames[-1]]
    strip = Image.new("RGB", (frames[0].width, 3 * frames[0].height))
    for i, frame in enumerate(shown):
        strip.paste(frame, (0, i * frame.height))
    palette = strip.quantize(32, dither=Image.Dither.NONE)
    colours = np.array(palette.getpalette()).reshape(-1, 3)
    colours[colours.min(1) >= 250] = 255  # white stays white
    palette.putpalette(colours.flatten().tolist())
    small = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    path.parent.mkdir(parents=True, exist_ok=True)
    small[0].save(
        path, save_all=True, append_images=small[1:], duration=times, loop=0, optimize=True
    )
    print(f"{path}: {len(frames)} frames, {path.stat().st_size / 1024:.0f} kB")


def draw_board(picture, x0, y0, x, y, answer):
    """The board with what the model says now."""
    cell = 36
    for i in range(81):
        left = x0 + cell * (i % 9)
        top = y0 + cell * (i // 9)
        middle = (left + cell / 2, top + cell / 2)
        if x[i]:
            picture.box(left, top, cell, cell, CLUE)
            picture.text(*middle, str(x[i]), 20, INK, "mm", bold=1)
        elif answer[i] == y[i]:
            picture.text(*middle, str(answer[i]), 22, BLUE, "mm", bold=1)
        else:
            # not by colour alone: smaller, and in a box
            picture.box(left + 5, top + 5, cell - 10, cell - 10, PALE, ORANGE)
            picture.text(*middle, str(answer[i]), 15, ORANGE, "mm")
    end = 9 * cell
    for i in range(10):
        width = 2 if i % 3 == 0 else 0.5
        at = cell * i
        picture.line([(x0, y0 + at), (x0 + end, y0 + at)], INK, width)
        picture.line([(x0 + at, y0), (x0 + at, y0 + end)], INK, width)


def draw_residuals(picture, x0, x1, top, bottom, residuals, total, tol):
    """The residual up to now on a log scale that ends where the loop counts as converged."""
    high = 1
    low = math.floor(math.log10(tol))

    def point(t, residual):
        share = (high - math.log10(residual)) / (high - low)
        return x0 + (x1 - x0) * t / total, top + (bottom - top) * min(1, share)

    for power in range(low, high + 1):
        level = point(0, 10.0**power)[1]
        picture.line([(x0, level), (x1, level)], CLUE, 0.5)
        picture.text(x0 - 8, level, f"{10.0**power:g}", 12, GREY, "rm")
    picture.line([(x0, bottom), (x1, bottom)], GREY)
    for t in range(0, total + 1, 20):
        picture.text(point(t, 1)[0], bottom + 12, str(t), 12, GREY, "mm")
    picture.text(x1, bottom + 30, "loops", 12, GREY, "rm")

    points = [point(t, residual) for t, residual in enumerate(residuals, 1)]
    if len(points) > 1:
        picture.line(points, BLUE, 1.5)
    x, y = points[-1]
    picture.box(x - 3, y - 3, 6, 6, BLUE)


def draw_legend(picture, x, y):
    picture.box(x - 11, y - 11, 22, 22, CLUE)
    picture.text(x, y, "5", 16, INK, "mm", bold=1)
    picture.text(x + 22, y, "given")
    picture.text(x, y + 26, "5", 17, BLUE, "mm", bold=1)
    picture.text(x + 22, y + 26, "right so far")
    picture.box(x - 11, y + 41, 22, 22, PALE, ORANGE)
    picture.text(x, y + 52, "5", 13, ORANGE, "mm")
    picture.text(x + 22, y + 52, "not yet")


def board_frame(x, y, answer, residuals, total, tol, converged):
    """A board on the left, its residual up to now on the right."""
    picture = Canvas(700, 400)
    blank = x == 0
    right = int(((answer == y) & blank).sum())
    picture.text(20, 22, f"loop {len(residuals)}", 20, bold=1)
    picture.text(344, 22, f"{right} of {int(blank.sum())} blanks right", 14, GREY, "rm")
    draw_board(picture, 20, 48, x, y, answer)
    picture.text(380, 22, "residual: how far the state moved", 14, GREY)
    draw_residuals(picture, 420, 680, 60, 270, residuals, total, tol)
    if converged:
        picture.text(680, 46, f"converged after {len(residuals)} loops", 14, BLUE, "rm")
    draw_legend(picture, 420, 318)
    return picture.image


def movie(out):
    """A board that solves itself, as a GIF."""
    torch.set_num_threads(1)
    model, cfg = looped.load(ASSETS / "sudoku9.pt")
    x, y = model.task.parse(BOARD)
    found = loop_by_loop(model, x, 150)
    if found[-1][1] >= cfg.tol or (found[-1][0] != y).any():
        raise UserError("assets/sudoku9.pt does not solve the board of the movie in 150 loops")

    residuals = [residual for _, residual in found]
    total = 10 * math.ceil(len(found) / 10)
    frames = []
    for t, (answer, _) in enumerate(found, 1):
        last = t == len(found)
        frames.append(board_frame(x, y, answer, residuals[:t], total, cfg.tol, last))
    times = [400] * 6 + [120] * (len(frames) - 7) + [5000]
    save_movie(frames, times, out / "sudoku9.gif")


# ----------------------------------------------------------------------------
# command line


def parse(argv):
    """The command line -> its arguments."""
    parser = data.Parser(
        "results.py", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "command", choices=["tables", "write", "check", "curve", "figures", "movie"]
    )
    parser.add_argument(
        "paths", nargs="*", metavar="PATH",
        help="tables: folders; write, check: Markdown files; curve: a run; figures: names",
    )
    parser.add_argument("--results", type=Path, default=RAW, help="the folder of raw results")
    parser.add_argument("--out", type=Path, default=ASSETS, help="where figures and movies go")
    return parser.parse_intermixed_args(argv)


def execute(args):
    """Do what the arguments ask for -> exit code."""
    if args.command == "tables":
        tables(args.results, args.paths)
    elif args.command == "write":
        write(args.results, args.paths)
    elif args.command == "check":
        return check(args.results, args.paths)
    elif args.command == "curve":
        if len(args.paths) != 1:
            raise UserError("curve: name one run")
        curve(Path(args.paths[0]))
    elif args.command == "figures":
        figures(args.results, args.out, args.paths)
    elif args.command == "movie":
        if args.paths:
            raise UserError(f"movie {args.paths[0]}: there is one only, leave the name out")
        movie(args.out)
    return 0


def main(argv=None):
    """-> exit code: 0, 1 if check finds a difference, 2 for what cannot be done, 130 for Ctrl-C."""
    args = parse(argv)
    return data.run("results.py", lambda: execute(args))


if __name__ == "__main__":
    sys.exit(main())
