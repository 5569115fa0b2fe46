"""Mazes: the shortest way from S to G, a step at a time, around the walls.

S . #      0 a1                 cells by the number of steps from S, row by letter and column by number
. . .      1 a2 b1
# . G      2 b2
           3 b3 c2
           4 c3
           back c3 b3 b2 a2 a1
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from kogia.tasks.puzzle import Puzzle
from kogia.tasks.task import Problem, Status
from kogia.text.chat import Message

MOVES = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}
START, GOAL, FREE, WALL = "S", "G", ".", "#"
_MOVES = re.compile(r"[UDLR]([ ,]*[UDLR])*")

Cell = tuple[int, int]
"""(row, column), from 0."""


@dataclass(frozen=True, kw_only=True)
class Mazes(Puzzle):
    """`level`: rows and columns. `walls`: the share of cells that is one. An answer is moves, "D R R"; it must be as
    short as any, unless `shortest` is off."""

    name: ClassVar[str] = "mazes"
    levels: ClassVar[range] = range(2, 10)
    walls: float = 0.3
    shortest: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.walls <= 0.5:
            raise ValueError(f"walls={self.walls}: must lie in [0, 0.5], or hardly a maze has a way")

    def draw(self, rng: random.Random) -> Problem:
        size = self.level
        while True:
            cells = [WALL if rng.random() < self.walls else FREE for _ in range(size * size)]
            start, goal = rng.sample(range(size * size), 2)
            cells[start], cells[goal] = START, GOAL
            rows = ["".join(cells[i : i + size]) for i in range(0, len(cells), size)]
            if GOAL in "".join(rows[row][column] for layer in layers(rows) for row, column in layer):
                return make_problem(rows)

    def work(self, problem: Problem) -> tuple[str, str]:
        rows = problem.data["rows"]
        found = layers(rows)
        lines = [f"{i} {' '.join(map(_name, layer))}" for i, layer in enumerate(found)]
        way = _way_back(found)
        lines.append(f"back {' '.join(map(_name, way))}")
        return "\n".join(lines), " ".join(_moves(way[::-1]))

    def judge(self, problem: Problem, answer: str) -> tuple[Status, str]:
        rows = problem.data["rows"]
        if not _MOVES.fullmatch(answer):
            return "parse_fail", "must be moves U D L R"
        moves = re.findall("[UDLR]", answer)
        row, column = _find(rows, START)
        for i, move in enumerate(moves, start=1):
            row, column = row + MOVES[move][0], column + MOVES[move][1]
            if not _is_free(rows, (row, column)):
                return "wrong", f"move {i} runs into a wall"
        if rows[row][column] != GOAL:
            return "wrong", "does not end at G"
        if self.shortest and len(moves) > (least := len(layers(rows)) - 1):
            return "wrong", f"takes {len(moves)} moves, where {least} are enough"
        return "ok", ""


def make_problem(rows: Sequence[str]) -> Problem:
    grid = "\n".join(" ".join(row) for row in rows)
    text = f"The shortest way from S to G, # is a wall (U, D, L, R):\n{grid}"
    return Problem(f"mazes/{'/'.join(rows)}", (Message("user", text),), {"rows": list(rows)})


def layers(rows: Sequence[str]) -> list[list[Cell]]:
    """Cells by their distance from S, each layer in reading order, up to that of G or as far as one gets."""
    layer = [_find(rows, START)]
    seen, found = set(layer), [layer]
    while layer and not any(rows[row][column] == GOAL for row, column in layer):
        near = {cell for each in layer for cell in _neighbours(rows, each)} - seen
        layer = sorted(near)
        seen |= near
        found.append(layer)
    if layer:
        goal = _find(rows, GOAL)
        found[-1] = [goal]
    return found


def _way_back(found: Sequence[Sequence[Cell]]) -> list[Cell]:
    """From the last layer's only cell to the first: of each layer the first cell that is a step away."""
    way = [found[-1][0]]
    for layer in found[-2::-1]:
        way.append(next(cell for cell in layer if _distance(cell, way[-1]) == 1))
    return way


def _moves(way: Sequence[Cell]) -> list[str]:
    by_step: Mapping[Cell, str] = {step: move for move, step in MOVES.items()}
    return [by_step[(b[0] - a[0], b[1] - a[1])] for a, b in pairwise(way)]


def _neighbours(rows: Sequence[str], cell: Cell) -> list[Cell]:
    around = [(cell[0] + down, cell[1] + right) for down, right in MOVES.values()]
    return [each for each in around if _is_free(rows, each)]


def _is_free(rows: Sequence[str], cell: Cell) -> bool:
    row, column = cell
    return 0 <= row < len(rows) and 0 <= column < len(rows[row]) and rows[row][column] != WALL


def _find(rows: Sequence[str], mark: str) -> Cell:
    return next((i, row.index(mark)) for i, row in enumerate(rows) if mark in row)


def _distance(a: Cell, b: Cell) -> int:
    return abs(a[0] - b[0]) + abs(a[1] - b[1])


def _name(cell: Cell) -> str:
    return f"{'abcdefghi'[cell[0]]}{cell[1] + 1}"
