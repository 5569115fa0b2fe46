"""Exact value of an arithmetic expression written by a model. Never `eval`: a whitelist of syntax tree nodes.

`**`, `//`, `%`, a sign before a number, decimals, names, calls and digits of other scripts are refused, and so is
anything long or deep enough to cost time: a checker that can be hung or fooled trains the model to do so.
"""

import ast
import operator
import re
from dataclasses import dataclass
from fractions import Fraction

MAX_LENGTH = 200
MAX_DEPTH = 16
MAX_DIGITS = 6

_ALLOWED_TEXT = re.compile(r"[0-9+\-*/() ]+")
_LONG_NUMBER = re.compile(rf"[0-9]{{{MAX_DIGITS + 1}}}")
_SYMBOL = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
_APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


@dataclass(frozen=True)
class Expression:
    value: Fraction | None
    """None when it divides by zero."""
    numbers: tuple[int, ...]
    """The numbers as they occur, left to right."""


def parse_expression(text: str, operators: str = "+-*/") -> Expression:
    """Reads and evaluates one expression. Raises ValueError saying what is not allowed."""
    text = text.strip()
    if len(text) > MAX_LENGTH:
        raise ValueError(f"{len(text)} characters, at most {MAX_LENGTH} allowed")
    if not _ALLOWED_TEXT.fullmatch(text):
        raise ValueError("only digits, + - * / ( ) and spaces are allowed")
    if _LONG_NUMBER.search(text):
        raise ValueError(f"a number of more than {MAX_DIGITS} digits")
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ValueError("not a well-formed expression") from error
    numbers: list[int] = []
    return Expression(_evaluate(tree, operators, numbers, 0), tuple(numbers))


def _evaluate(node: ast.expr, operators: str, numbers: list[int], depth: int) -> Fraction | None:
    if depth > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH}")
    if isinstance(node, ast.Constant) and type(node.value) is int:
        numbers.append(node.value)
        return Fraction(node.value)
    if not isinstance(node, ast.BinOp):
        raise ValueError(f"{type(node).__name__} is not allowed, only numbers joined by {' '.join(operators)}")
    symbol = _SYMBOL.get(type(node.op), type(node.op).__name__)
    if symbol not in operators:
        raise ValueError(f"operator {symbol} is not allowed, only {' '.join(operators)}")
    left = _evaluate(node.left, operators, numbers, depth + 1)
    right = _evaluate(node.right, operators, numbers, depth + 1)
    if left is None or right is None or (symbol == "/" and right == 0):
        return None
    return _APPLY[symbol](left, right)
