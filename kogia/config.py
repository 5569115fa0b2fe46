"""Configuration as frozen dataclasses: strict reading, exact round trips, and one command line for all of them.

A value comes from the first of: flag, recipe (one TOML file), default. Reading is strict: an unknown key, a value of the
wrong type, a number that is not finite and a missing required key are each a `ValueError` that names the place. Nested
tables overlay the default they replace, key by key. TOML has no null, so `None` is left out where it is the default and
written `"none"` elsewhere. Where a field is `Annotated[..., Presets(by_name)]`, `preset = "name"` in its table puts that
value in the place of the default.
"""

import contextlib
import dataclasses
import difflib
import functools
import importlib
import math
import os
import re
import sys
import tomllib
import types
import typing
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, Union

from kogia.files import write_text

C = TypeVar("C")
_RAISE: Any = object()  # the `missing` of _read_*: a required key that is not there is an error
_NO_VALUE = dataclasses.MISSING


@dataclasses.dataclass(frozen=True)
class Presets:
    """Marks a field whose table may start from a named value."""

    by_name: Callable[[str], Any]
    """Raises ValueError for a name that it does not know."""


class _Field(NamedTuple):
    hint: Any
    default: Any
    """Or _NO_VALUE."""
    presets: Presets | None


def from_dict(cls: type[C], data: Mapping[str, Any], where: str = "") -> C:
    """Build `cls` from nested mappings as TOML gives them. `where` is the table's own name, for messages.

    Ints are taken for floats, bools never for numbers; strings become paths, lists become tuples. A union of
    dataclasses is told apart by its `kind`; without `kind` the default's applies. Raises ValueError as the module says.
    """
    config = _read_table(cls, data, where, None, _RAISE)
    check_finite(config, where)
    return config


def check_finite(value: Any, where: str = "") -> None:
    """Raise ValueError at the first number in a configuration, or in what it holds, that is NaN or infinite."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} = {value}: must be a finite number")
    for name, inner in _parts(value):
        check_finite(inner, f"{where}{name}" if where else name.removeprefix("."))


def check_least(config: Any, bound: float, *names: str) -> None:
    """Raise ValueError for the first of these fields that is below `bound`; None, which stands for a default, is not."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < bound:
            raise ValueError(f"{name} = {value}: must be at least {bound}")


def check_seed(seed: int) -> None:
    """Raise ValueError for a seed that not all of Python, NumPy and PyTorch take."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed = {seed}: must lie in 0..{2**32 - 1}")


def to_dict(config: Any) -> dict[str, Any]:
    """The inverse of `from_dict`: plain TOML values, every field written except a `None` that is the default."""
    return _write_table(config, None, "")


def load_toml(path: str | Path, cls: type[C]) -> C:
    """Read `cls` from a TOML file. Raises ValueError that begins with the path, or FileNotFoundError."""
    data = _load(Path(path))
    with _naming(path):
        return from_dict(cls, data)


def parse_toml(text: str) -> dict[str, Any]:
    """The tables of a TOML text. Raises ValueError for what is none, also where brackets nest too deep to be read."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("brackets in brackets in brackets: too deep to be read; correct it") from None


def save_toml(config: Any, path: str | Path) -> None:
    """Write `config` so that `load_toml` gives an equal value. Replaces the file at once or not at all."""
    import tomli_w

    write_text(path, tomli_w.dumps(to_dict(config)))


def resolve(spec: str) -> Any:
    """The object that `"package.module:Name"` names. The current directory is importable, after everything installed."""
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise ValueError(f"{spec!r}: write it as 'module:Name', for example 'my_package.sudoku:Sudoku'")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may fail in any way while it is imported
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{spec!r}: cannot import {module_name!r} ({reason}); the current directory {here} is searched, "
            "so run from the directory that holds the module, or install it"
        ) from error
    if not hasattr(module, name):
        hint = _suggestion(name, [n for n in vars(module) if not n.startswith("_")])
        raise ValueError(f"{spec!r}: {module_name!r} ({getattr(module, '__file__', None)}) has no {name!r}{hint}")
    return getattr(module, name)


def parse_args(cls: type[C], argv: Sequence[str], *, prog: str, description: str) -> C:
    """Parse `[RECIPE.toml] [--flags]`: defaults, then the recipe, then the flags.

    Beside one flag per field: `--part.kind gqa` picks the member of a union, `--part none` switches an optional part
    off, naming a field of an absent part switches it on, `--part.preset name` starts from a preset, `--table.key value`
    sets an entry of a free table, and `--tables.name.key value` one of a table of tables. `true`, `false`, `none` and the
    choices of a field are understood in any case, a switch with or without a word (`--flag`, `--no-flag`, `--flag off`),
    and numbers with or without commas (`--k 1 8`, `--k 1,8`).
    A mistake in a flag prints a suggestion and exits with 2, as `--help` prints and exits with 0.
    """
    import tyro

    argv, recipe = list(argv), None
    if argv and argv[0].endswith(".toml"):
        recipe = Path(argv.pop(0))
    data = _load(recipe) if recipe else {}
    flags = _in_tyros_words(cls, _absorb_structure(cls, argv, data))
    with _naming(recipe):
        default = _read_table(cls, data, "", None, tyro.MISSING)
    with _help_in_paragraphs():
        config = tyro.cli(
            cls, default=default, args=flags, prog=prog, description=description, config=(tyro.conf.AvoidSubcommands,)
        )
    check_finite(config)
    return config


def _help_in_paragraphs() -> contextlib.AbstractContextManager[Any]:
    """Within it tyro tells a field without the line ends of its docstring, which are those of the source."""
    from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

    registry, is_asked = ConstructorRegistry(), False

    def told(field: StructFieldSpec) -> str | None:
        text = field.helptext() if callable(field.helptext) else field.helptext
        return text and " ".join(text.split())

    @registry.struct_rule
    def rule(info: StructTypeInfo) -> Any:
        nonlocal is_asked
        if is_asked:  # by itself, for what the other rules say
            return None
        is_asked = True
        try:
            spec = ConstructorRegistry.get_struct_spec(info)
        finally:
            is_asked = False
        if not isinstance(spec, StructConstructorSpec):
            return spec
        fields = (dataclasses.replace(field, helptext=functools.partial(told, field)) for field in spec.fields)
        return dataclasses.replace(spec, fields=tuple(fields))

    return registry


# Reading ---------------------------------------------------------------------------------------------------------------


def _load(path: Path) -> dict[str, Any]:
    with _naming(path):
        return parse_toml(path.read_bytes().decode("utf-8-sig"))  # some editors begin a file with a mark


@contextlib.contextmanager
def _naming(path: str | Path | None) -> Iterator[None]:
    """Puts the file's name before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        if path is None:
            raise
        raise ValueError(f"{path}: {error}") from error


def _parts(value: Any) -> list[tuple[str, Any]]:
    """(how it is written behind the value's name, what it is) of everything that a value of a configuration holds."""
    if dataclasses.is_dataclass(value):
        return [(f".{field.name}", getattr(value, field.name)) for field in dataclasses.fields(value)]
    if isinstance(value, Mapping):
        return [(f".{key}", inner) for key, inner in value.items()]
    if isinstance(value, list | tuple):
        return [(f"[{index}]", inner) for index, inner in enumerate(value)]
    return []


@functools.cache
def _fields(cls: type) -> dict[str, _Field]:
    """The fields that the constructor takes, by name."""
    hints, annotated = typing.get_type_hints(cls), typing.get_type_hints(cls, include_extras=True)
    found = {}
    for field in dataclasses.fields(cls):
        default = field.default
        if field.default_factory is not _NO_VALUE:
            default = field.default_factory()
        if field.init:
            marks = getattr(annotated[field.name], "__metadata__", ())
            presets = next((mark for mark in marks if isinstance(mark, Presets)), None)
            found[field.name] = _Field(hints[field.name], default, presets)
    return found


def _suggestion(word: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}" if known else ""


def _wrong(where: str, value: Any, expected: str) -> ValueError:
    return ValueError(f"{where} = {value!r} ({type(value).__name__}): expected {expected}")


def _read_table(cls: type, data: Any, where: str, base: Any, missing: Any) -> Any:
    """`cls` from `data` over `base` (an instance, or None: the class's own defaults).

    With a `missing` other than _RAISE the result is a form for flags to fill in: required values that are not there
    are `missing`, and no `__post_init__` has checked it.
    """
    if not isinstance(data, Mapping):
        raise _wrong(where or cls.__name__, data, f"a table ({cls.__name__})")
    known = _fields(cls)
    for key in data:
        if key not in known:
            place = f"in [{where}]" if where else "at the top level"
            raise ValueError(f"unknown key {key!r} {place}{_suggestion(str(key), known)}")
    values = {}
    for name, field in known.items():
        here = f"{where}.{name}" if where else name
        fallback = field.default if base is None else getattr(base, name)
        if name in data:
            value, start = _from_preset(field, data[name], here, fallback)
            values[name] = _read(field.hint, value, here, start, missing)
        elif fallback is not _NO_VALUE:
            values[name] = fallback
        elif missing is _RAISE:
            raise ValueError(f"{here} is missing: it is required and has no default")
        else:
            values[name] = missing
    if missing is _RAISE:
        return cls(**values)
    form = object.__new__(cls)
    for name, value in values.items():
        object.__setattr__(form, name, value)
    return form


def _from_preset(field: _Field, value: Any, where: str, fallback: Any) -> tuple[Any, Any]:
    """(the field's value without its `preset`, what it overlays)."""
    if field.presets is None or not isinstance(value, Mapping) or "preset" not in value:
        return value, fallback
    name = _read_scalar(str, value["preset"], f"{where}.preset")
    return {key: item for key, item in value.items() if key != "preset"}, field.presets.by_name(name)


def _read(hint: Any, value: Any, where: str, base: Any, missing: Any) -> Any:
    """`value` as the type `hint`; `base` is the default that a table overlays."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        return _read_table(hint, value, where, base if type(base) is hint else None, missing)
    if origin in (Union, types.UnionType):
        return _read_union(args, value, where, base, missing)
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in args):
            return value
        hint_text = _suggestion(value, map(str, args)) if isinstance(value, str) else ""
        raise _wrong(where, value, "one of " + ", ".join(map(repr, args)) + hint_text.partition("; known")[0])
    if origin is tuple or origin is list or hint in (tuple, list):
        return _read_sequence(origin or hint, args, value, where, missing)
    if hint is dict or (origin is not None and issubclass(origin, Mapping)):
        if not isinstance(value, Mapping):
            raise _wrong(where, value, "a table")
        item = args[1] if args else Any
        return {str(k): _read(item, v, f"{where}.{k}", None, missing) for k, v in value.items()}
    return _read_scalar(hint, value, where)


def _read_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    if hint is float and type(value) is int and abs(value) < 2**1023:
        return float(value)
    if hint in (bool, int, float, str):
        if type(value) is hint:
            return value
        raise _wrong(where, value, {bool: "true or false", int: "an int", float: "a number", str: "a string"}[hint])
    if hint is Path:
        raise _wrong(where, value, "a path")
    raise AssertionError(f"{where}: configurations do not hold {hint!r}")


def _read_sequence(kind: type, args: tuple[Any, ...], value: Any, where: str, missing: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise _wrong(where, value, "a list")
    if kind is list or not args or args[-1] is Ellipsis:
        hints = [args[0] if args else Any] * len(value)
    else:
        hints = list(args)
    if len(hints) != len(value):
        raise _wrong(where, value, f"a list of {len(hints)} values")
    return kind(_read(h, v, f"{where}[{i}]", None, missing) for i, (h, v) in enumerate(zip(hints, value, strict=True)))


def _read_union(args: tuple[Any, ...], value: Any, where: str, base: Any, missing: Any) -> Any:
    if types.NoneType in args and (value is None or value == "none"):
        return None
    members = [a for a in args if a is not types.NoneType]
    tables = [m for m in members if dataclasses.is_dataclass(m)]
    if len(tables) > 1 and isinstance(value, Mapping):
        members = [_pick_kind(tables, value, where, base)]
    if len(members) == 1:
        return _read(members[0], value, where, base, missing)
    for member in sorted(members, key=lambda m: type(value) is not m):
        try:
            return _read(member, value, where, base, missing)
        except ValueError:
            continue
    raise _wrong(where, value, " or ".join(getattr(m, "__name__", str(m)) for m in members))


def _kind_of(cls: Any) -> str:
    kind = _fields(cls)["kind"].default
    assert isinstance(kind, str), f"{cls}: a member of a union needs kind: Literal['...'] = '...'"
    return kind


def _pick_kind(tables: Sequence[Any], value: Mapping[str, Any], where: str, base: Any) -> Any:
    kinds = {_kind_of(t): t for t in tables}
    kind = value.get("kind", getattr(base, "kind", None))
    if kind is None:
        raise ValueError(f"{where}.kind is missing: write one of {', '.join(map(repr, kinds))}")
    if not isinstance(kind, str) or kind not in kinds:
        raise _wrong(f"{where}.kind", kind, "one of " + ", ".join(map(repr, kinds)))
    return kinds[kind]


# Writing ---------------------------------------------------------------------------------------------------------------


def _write_table(config: Any, base: Any, where: str) -> dict[str, Any]:
    """`config` as a table; `base` is what `_read_table` will overlay it on."""
    table = {}
    for name, field in _fields(type(config)).items():
        value, here = getattr(config, name), f"{where}.{name}" if where else name
        fallback = field.default if base is None else getattr(base, name)
        if value is None and fallback is None:
            continue
        if value == "none" and types.NoneType in typing.get_args(field.hint):
            raise ValueError(f"{here} = 'none': this word stands for no value; choose another")
        table[name] = _write(value, fallback, here)
    return table


def _write(value: Any, base: Any, where: str) -> Any:
    if value is None:
        return "none"
    if dataclasses.is_dataclass(value):
        return _write_table(value, base if type(base) is type(value) else None, where)
    if isinstance(value, list | tuple):
        return [_write(v, None, f"{where}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, Mapping):
        return {k: _write(v, None, f"{where}.{k}") for k, v in value.items()}
    return str(value) if isinstance(value, Path) else value


# Flags that decide which flags there are -------------------------------------------------------------------------------


def _absorb_structure(cls: type, argv: list[str], data: dict[str, Any]) -> list[str]:
    """Move the structural flags of `parse_args` from `argv` into `data`; returns the other words, in order."""
    rest, position = [], 0
    while position < len(argv):
        word = argv[position]
        flag, equals, value = word.partition("=")
        if not equals:
            value = argv[position + 1] if position + 1 < len(argv) else ""
        path = _flag_path(flag)
        if path and _absorb(cls, None, data, path, value):
            position += 1 if equals else 2
        else:
            rest.append(word)
            position += 1
    return rest


def _flag_path(flag: str) -> list[str]:
    """The fields that `--part.some-key` goes through; none where the word is no flag."""
    return flag[2:].replace("-", "_").split(".") if flag.startswith("--") else []


def _members(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type that `hint` is."""
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def _is_table_of_tables(hint: Any) -> bool:
    arguments = typing.get_args(hint)
    return typing.get_origin(hint) in (dict, Mapping) and typing.get_origin(arguments[1]) in (dict, Mapping)


def _absorb(cls: Any, base: Any, table: dict[str, Any], path: list[str], value: str) -> bool:
    """Apply one flag to `table` if it is structural; says whether it was used up."""
    name, inner = path[0], path[1:]
    if name not in _fields(cls):
        return False
    hint, default, presets = _fields(cls)[name]
    fallback = default if base is None else getattr(base, name)
    members = _members(hint)
    tables = [m for m in members if dataclasses.is_dataclass(m)]
    if not inner:
        if not tables or types.NoneType not in members or value.lower() != "none":
            return False
        table[name] = "none"
        return True
    if not isinstance(table.get(name, {}), dict):
        return False  # a recipe's mistake, which reading will name
    if any(_is_table_of_tables(m) for m in members):
        table.setdefault(name, dict(fallback) if isinstance(fallback, Mapping) else {})
        _absorb_entry(table[name], f"--{name.replace('_', '-')}", inner, value)
        return True
    if len(inner) == 1 and any(typing.get_origin(m) in (dict, Mapping) or m is dict for m in members):
        table.setdefault(name, dict(fallback) if isinstance(fallback, Mapping) else {})[inner[0]] = _toml_value(value)
        return True
    if not tables:
        return False
    given = table.get(name, {})
    if presets is not None and inner == ["preset"]:
        table[name] = given | {"preset": value}
        return True
    kind = given.get("kind", getattr(fallback, "kind", None))
    if len(tables) > 1 and inner == ["kind"]:
        table[name] = given if kind == value else {"kind": value}
        return True
    if fallback is None:
        table[name] = given
    chosen = next((t for t in tables if len(tables) > 1 and _kind_of(t) == kind), tables[0])
    used = _absorb(chosen, fallback if type(fallback) is chosen else None, given, inner, value)
    if used or given:  # given without used: an absent part further in was named, and is there now
        table[name] = given
    return used


def _absorb_entry(tables: dict[str, Any], flag: str, path: list[str], text: str) -> None:
    """`--task-options.my_pkg.tasks:Sudoku.size 9`, or `{size = 9}` for the whole: the table's name may hold dots."""
    value = _toml_value(text)
    if not isinstance(value, dict):
        path, value = path[:-1], {path[-1]: value}
    if not path:
        raise ValueError(f"{flag}.{next(iter(value))} {text}: whose? Write {flag}.NAME.KEY VALUE")
    name = ".".join(path)
    if isinstance(tables.get(name, {}), dict):  # else a recipe's mistake, too
        tables[name] = tables.get(name, {}) | value


def _toml_value(text: str) -> Any:
    """`4` -> 4, `true` or `True` -> True, `[1, 2]` -> list; anything that is no such value is the string itself."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        value = parse_toml(f"x = {text}")["x"]
    except ValueError:
        return text
    return value if isinstance(value, str | int | float | list | dict) else text  # no setting is a date


# Flags as people write them --------------------------------------------------------------------------------------------

_SWITCH_WORDS = {"true": "True", "yes": "True", "on": "True", "false": "False", "no": "False", "off": "False"}


def _in_tyros_words(cls: type, argv: Sequence[str]) -> list[str]:
    """`argv` with switches, choices and absent values spelled as tyro spells them."""
    rest, words = [], deque(argv)
    while words:
        word = words.popleft()
        flag, equals, value = word.partition("=")
        hint = _hint_at(cls, _flag_path(flag))
        if _is_of_numbers(hint) and "," in (value if equals else words[0] if words else ""):
            rest += [flag, *(value if equals else words.popleft()).split(",")]
            continue
        spelled = _spelling(hint, value if equals else words[0] if words else "")
        if spelled is not None and not equals:
            words.popleft()
        if spelled is None and equals and hint is bool:
            raise ValueError(f"{word}: {flag} takes true or false, or no value for true")
        if spelled is None:
            rest += [word] if equals else _bare(cls, word, hint)
        elif hint is bool:
            rest.append(flag if spelled == "True" else re.sub(r"([^-.][^.]*)$", r"no-\1", flag))
        else:
            rest += [flag, spelled]
    return rest


def _hint_at(hint: Any, path: Sequence[str]) -> Any:
    """The type of what `path` leads to from a value of the type `hint`; None where it leads nowhere."""
    if not path:
        return hint
    for member in _members(hint):
        inner = None
        if dataclasses.is_dataclass(member) and path[0] in _fields(typing.cast(type, member)):
            inner = _fields(typing.cast(type, member))[path[0]].hint
        elif typing.get_origin(member) in (tuple, list) and path[0].isdecimal():
            inner = typing.get_args(member)[0]
        if inner is not None and (found := _hint_at(inner, path[1:])) is not None:
            return found
    return None


def _spelling(hint: Any, value: str) -> str | None:
    """tyro's spelling of a word that is a value of the type `hint`; None where it is none, or spelled so already."""
    word, members = value.lower(), _members(hint)
    if bool in members and word in _SWITCH_WORDS:
        return _SWITCH_WORDS[word]
    if types.NoneType in members and word == "none":
        return "None"
    choices = [str(choice) for m in members if typing.get_origin(m) is Literal for choice in typing.get_args(m)]
    return None if value in choices else next((choice for choice in choices if choice.lower() == word), None)


def _bare(cls: type, flag: str, hint: Any) -> list[str]:
    """A flag without a value: of a switch that may be unset tyro knows neither `--flag` nor `--no-flag`."""
    if negative := re.fullmatch(r"(--(?:.*\.)?)no[-_](.+)", flag):
        positive = "".join(negative.groups())
        return [positive, "False"] if _may_be_unset(_hint_at(cls, _flag_path(positive))) else [flag]
    return [flag, "True"] if _may_be_unset(hint) else [flag]


def _is_of_numbers(hint: Any) -> bool:
    """Whether it is a list of numbers, which people also write with commas."""
    arguments = typing.get_args(hint)
    return typing.get_origin(hint) in (tuple, list) and arguments[0] in (int, float)


def _may_be_unset(hint: Any) -> bool:
    return set(_members(hint)) == {bool, types.NoneType}


Main = Callable[[Any], int | None]
"""What every command's `main` is: configuration in, exit status out (None is 0)."""
