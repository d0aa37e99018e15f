"""Settings as values: the one module that reads dataclasses, for flags, plans, JSON, keys and exams.

A field may be a dataclass itself, a *group* of settings. Its fields are then known by dotted names, ``search.epochs``:
that is the key of a plan, ``search = { epochs = 3 }``, and the flag ``--search-epochs 3``. What is not given keeps the
default of the class that holds the group, which may differ from the group's own.

Torch-free.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from pocketrec.errors import ConfigError

T = TypeVar("T")

REQUIRED: Any = object()


@dataclass(frozen=True)
class Setting:
    """One field of a dataclass, or one keyword of a function; ``default=REQUIRED`` if it has none.

    Attributes:
        name: dotted inside a group.
        type: its annotation.
        default: where nothing is given.
        help: its line in the docstring.
    """

    name: str
    type: Any
    default: Any
    help: str

    @property
    def flag(self) -> str:
        """The flag that gives it.

        Example:
            >>> Setting("search.batch_size", int, 1, "").flag
            '--search-batch-size'
        """
        return "--" + re.sub(r"[._]", "-", self.name)


# ---- what a dataclass has --------------------------------------------------------------------------------------------


@cache
def leaves(cls: type[Any]) -> tuple[Setting, ...]:
    """The settings of a dataclass in order, those of groups in their place."""
    hints, text = _hints(cls), explained(cls)
    found: list[Setting] = []
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        default = _default(field)
        if (group := _group(hints[field.name])) is None:
            found.append(Setting(field.name, hints[field.name], default, text.get(field.name, "")))
            continue
        for inner in leaves(group):
            own = _at(default, inner.name) if isinstance(default, group) else inner.default
            found.append(Setting(f"{field.name}.{inner.name}", inner.type, own, inner.help))
    return tuple(found)


def keywords(function: Callable[..., Any], skip: Iterable[str] = ()) -> tuple[Setting, ...]:
    """The keyword-only settings of a function, in order, without those in ``skip``."""
    hints, text = get_type_hints(function), described(function.__doc__)
    return tuple(
        Setting(p.name, hints[p.name], REQUIRED if p.default is p.empty else p.default, text.get(p.name, ""))
        for p in inspect.signature(function).parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.name not in skip
    )


def described(docstring: str | None) -> dict[str, str]:
    """``name: text`` lines of a google-style ``Args:`` or ``Attributes:`` section, continuation lines joined."""
    section = re.search(r"^\s*(?:Args|Attributes):\n((?:[ \t]+\S.*\n?)+)", inspect.cleandoc(docstring or ""), re.M)
    lines = re.split(r"\n(?= {4}\S)", section[1].rstrip()) if section else []
    found = (re.match(r"\s*\**(\w+)(?:\s*\([^)]*\))?:\s*(.*)", line, re.S) for line in lines)
    return {m[1]: " ".join(m[2].split()).replace("``", "") for m in found if m}


def explained(cls: type[Any]) -> dict[str, str]:
    """What the docstring of a class says of each setting, or that of the nearest base which says something."""
    return {name: words for base in reversed(cls.__mro__) for name, words in described(base.__doc__).items()}


def spell(value: Any) -> str:
    """A default as the user would type it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None or value == () or value == {}:
        return "none"
    return ",".join(map(spell, value)) if isinstance(value, tuple) else str(value)


# ---- making one ------------------------------------------------------------------------------------------------------


def build(cls: type[T], values: Mapping[str, Any]) -> T:
    """An instance from settings by dotted name; what is not given keeps its default.

    Raises:
        ConfigError: a name that is none, or a value that the class refuses.

    Example:
        >>> build(Setting, {"name": "dim", "type": int, "default": 16, "help": ""}).flag
        '--dim'
    """
    own, groups = _parted(values)
    hints = _hints(cls)
    known("", [*own, *groups], [f.name for f in dataclasses.fields(cast("Any", cls))], f"setting of {cls.__name__}")
    for field in dataclasses.fields(cast("Any", cls)):
        if field.name in groups:
            start = own.get(field.name, _default(field))
            own[field.name] = _changed(field.name, _group(hints[field.name]), start, groups[field.name])
    try:
        return cls(**own)
    except TypeError as error:
        raise ConfigError(f"{cls.__name__} cannot be made from these settings: {error}.") from error


def given(values: Mapping[str, Any], settings: Iterable[Setting]) -> dict[str, Any]:
    """Those of ``values`` that belong to ``settings`` and that the user gave."""
    return {s.name: values[s.name] for s in settings if values.get(s.name) is not None}


def flat(value: Any) -> dict[str, Any]:
    """Every setting of an instance by dotted name."""
    return {s.name: _at(value, s.name) for s in leaves(type(value))}


def flattened(where: str, table: Mapping[str, Any], cls: type[Any], also: Sequence[str] = ()) -> dict[str, Any]:
    """A nested table by dotted names of the settings of ``cls``, values as they are.

    Args:
        where: the table is, for messages.
        table: of settings and groups.
        cls: that the settings are of.
        also: keys that may stand beside them; they are left out.

    Raises:
        ConfigError: a key that is none.
    """
    hints = {f.name: _hints(cls)[f.name] for f in dataclasses.fields(cls) if f.init}
    known(where, table, [*hints, *also])
    found: dict[str, Any] = {}
    for name, value in table.items():
        group = _group(hints[name]) if name in hints else None
        if group is not None and isinstance(value, Mapping):
            inner = flattened(f"{where}.{name}" if where else name, value, group)
            found |= {f"{name}.{n}": v for n, v in inner.items()}
        elif group is not None and value is not None:
            raise ConfigError(f"`{where}.{name}` must be a table of settings, but got {value!r}.")
        elif name in hints:
            found[name] = value
    return found


def to_json(value: Any) -> dict[str, Any]:
    """All settings, ready for JSON; groups are nested."""
    return dataclasses.asdict(value)


def from_json(cls: type[T], document: Mapping[str, Any], where: str = "") -> T:
    """What :func:`to_json` wrote, each value checked against its annotation."""
    values = flattened(where, document, cls)
    hints = {s.name: s.type for s in leaves(cls)}
    place = f"{where}." if where else ""
    return build(cls, {n: checked(f"{place}{n}", v, hints[n]) if n in hints else v for n, v in values.items()})


# ---- keys ------------------------------------------------------------------------------------------------------------


def key(value: Any) -> dict[str, Any]:
    """What stored work is known by: the name, the settings that differ from their defaults, a version above 1.

    So a new setting leaves all keys as they were, while its default means what was done before. A class whose default
    or meaning changes raises its ``version``; that of a group is in the keys of all who hold it. Fields that do not
    ``compare`` have no say.

    Example:
        >>> key(Setting("dim", int, 16, "width"))["help"]
        'width'
    """
    cls = type(value)
    return {"name": getattr(cls, "name", cls.__name__), **_difference(value, None)}


def named_key(cls: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The key of what is only partly known: ``values`` by dotted name, among them such as are still to be searched."""
    defaults = {s.name: s.default for s in leaves(cls)}
    held = [("", cls), *((f.name, _group(_hints(cls)[f.name])) for f in dataclasses.fields(cls))]
    versions = {n: v for n, c in held if c is not None and (v := getattr(c, "version", 1)) > 1}
    differing = {n: v for n, v in sorted(values.items()) if n not in defaults or _plain(v) != _plain(defaults[n])}
    named = {"name": getattr(cls, "name", cls.__name__), "settings": differing}
    return {**named, "versions": versions} if versions else named


def text(value: Any) -> str:
    """The :func:`key` in one line, for a representation that is a part of stored work's key."""
    return json.dumps(key(value), sort_keys=True, default=str)


def _difference(value: Any, base: Any) -> dict[str, Any]:
    """What ``value`` says beyond ``base``, an instance of its class, or beyond the defaults."""
    cls = type(value)
    found: dict[str, Any] = {"version": version} if (version := getattr(cls, "version", 1)) > 1 else {}
    for field in dataclasses.fields(cls):
        own, usual = getattr(value, field.name), _default(field) if base is None else getattr(base, field.name)
        if not field.compare:
            continue
        if dataclasses.is_dataclass(own):
            inner = _difference(own, usual if type(usual) is type(own) else None)
            if inner or type(usual) is not type(own):
                found[field.name] = inner
        elif usual is REQUIRED or _plain(own) != _plain(usual):
            found[field.name] = _plain(own)
    return found


def _plain(value: Any) -> Any:
    """Tuples as the lists that JSON makes of them."""
    return [_plain(v) for v in value] if isinstance(value, (tuple, list)) else value


# ---- checks ----------------------------------------------------------------------------------------------------------


def check(settings: Any, **least: float) -> None:
    """Refuse what annotations and bounds do not allow; a list becomes the tuple that it stands for.

    Every ``Literal`` must be one of its values. ``dim=1`` asks for a finite number of at least 1, or ``None`` where the
    annotation allows it.

    Raises:
        ConfigError: with the name, what was expected, and the value.
    """
    for field in dataclasses.fields(settings):
        hint, value = _hints(type(settings))[field.name], getattr(settings, field.name)
        if isinstance(value, list) and get_origin(hint) is tuple:
            object.__setattr__(settings, field.name, tuple(value))
        if get_origin(hint) is Literal and value not in get_args(hint):
            one_of(field.name, value, get_args(hint))
    for name, bound in least.items():
        value = getattr(settings, name)
        if value is not None and not (math.isfinite(value) and value >= bound):
            raise ConfigError(f"`{name}` must be at least {bound:g}, but got {name}={value}.")


def check_above(settings: Any, **bounds: float) -> None:
    """Refuse what is not a finite number above its bound, or ``None``."""
    for name, bound in bounds.items():
        value = getattr(settings, name)
        if value is not None and not (math.isfinite(value) and value > bound):
            raise ConfigError(f"`{name}` must be above {bound:g}, but got {name}={value}.")


def check_share(settings: Any, *names: str) -> None:
    """Refuse what is not in [0, 1)."""
    for name in names:
        if not 0 <= (value := getattr(settings, name)) < 1:
            raise ConfigError(f"`{name}` must be in [0, 1), but got {name}={value}.")


def check_widths(settings: Any, *names: str) -> None:
    """Refuse numbers below 1 in a tuple."""
    for name in names:
        value = getattr(settings, name)
        if any(width < 1 for width in value):
            raise ConfigError(f"`{name}` must be numbers of at least 1, but got {name}={value}.")


def one_of(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Refuse a value that is none of the choices."""
    if value not in (choices := tuple(choices)):
        raise ConfigError(f"`{name}` must be one of {', '.join(map(str, choices))}, but got {value!r}.")


def checked(where: str, value: Any, hint: Any) -> Any:
    """A value of JSON or TOML as the type that a setting has.

    Raises:
        ConfigError: it has another one.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(hint).validate_json(json.dumps(value), strict=True)
    except (ValidationError, TypeError, ValueError) as error:
        message = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise ConfigError(f"`{where}`: {message}; got {value!r}.") from error


def known(where: str, names: Iterable[str], choices: Sequence[str], what: str = "known key") -> None:
    """Refuse names that are none, with the nearest one that is."""
    for name in names:
        if name not in choices:
            near = get_close_matches(name, choices, n=1, cutoff=0.5)
            hint = f"did you mean `{near[0]}`?" if near else f"known are {', '.join(choices)}."
            raise ConfigError(f"`{where + '.' if where else ''}{name}` is no {what}; {hint}")


# ---- inside ----------------------------------------------------------------------------------------------------------


@cache
def _hints(cls: type[Any]) -> dict[str, Any]:
    return get_type_hints(cls)


def _group(hint: Any) -> type[Any] | None:
    """The dataclass that a field holds, if it holds one."""
    if get_origin(hint) in (Union, types.UnionType):
        return next((g for a in get_args(hint) if (g := _group(a)) is not None), None)
    return hint if inspect.isclass(hint) and dataclasses.is_dataclass(hint) else None


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return REQUIRED if field.default is dataclasses.MISSING else field.default


def _at(value: Any, name: str) -> Any:
    """The setting of a dotted name; ``None`` in a group that is not there."""
    for part in name.split("."):
        value = None if value is None else getattr(value, part)
    return value


def _parted(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Own settings, and those of each group."""
    own: dict[str, Any] = {}
    groups: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        head, _, rest = name.partition(".")
        if rest:
            groups.setdefault(head, {})[rest] = value
        else:
            own[head] = value
    return own, groups


def _changed(name: str, group: type[Any] | None, start: Any, changes: Mapping[str, Any]) -> Any:
    """A group with some of its settings changed."""
    if group is None:
        raise ConfigError(f"`{name}` is no group of settings, but got {', '.join(f'{name}.{n}' for n in changes)}.")
    values = {**(flat(start) if isinstance(start, group) else {}), **changes}
    try:
        return build(group, values)
    except ConfigError as error:
        raise ConfigError(f"`{name}`: {error}") from error
