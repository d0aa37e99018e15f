"""Flags from dataclasses: a plug-in's fields are its flags, for every plug-in alike.

``dim: int = 16`` becomes ``--dim INTEGER``, ``batch_norm: bool = True`` becomes ``--batch-norm / --no-batch-norm``,
``Literal["zero", "codebook"]`` a choice, ``tuple[int, ...]`` a comma-separated list, ``X | None`` an optional ``X``.
The help text is the field's line in the class docstring. A flag that is not given leaves the field's default alone.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import click

from pocketrec import registry
from pocketrec.errors import ConfigError

REQUIRED: Any = object()


@dataclasses.dataclass(frozen=True)
class Setting:
    """One field of a dataclass, or one keyword of a function, as a flag; ``default=REQUIRED`` if it has none."""

    name: str
    type: Any
    default: Any
    help: str

    def option(self) -> click.Option:
        """The click option; its value is ``None`` unless the user gives the flag."""
        flag = "--" + self.name.replace("_", "-")
        kind = click_type(self.type)
        given = f"{flag}/--no-{flag[2:]}" if kind is click.BOOL else flag
        if self.default is REQUIRED:
            return click.Option([given, self.name], type=kind, required=True, help=self.help)
        shown = f"{self.help} [default: {spell(self.default)}]".strip()
        return click.Option([given, self.name], type=kind, default=None, help=shown)


class ListType(click.ParamType):
    """A comma-separated list of one scalar type, read as a tuple."""

    def __init__(self, item: click.ParamType) -> None:
        self.item = item
        self.name = f"{item.name},..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read ``400,400,400``; an empty text is the empty tuple."""
        if not isinstance(value, str):
            return value
        return tuple(self.item.convert(part.strip(), param, ctx) for part in value.split(",") if part.strip())


_SCALARS: Mapping[Any, click.ParamType] = {int: click.INT, float: click.FLOAT, str: click.STRING, bool: click.BOOL}


def click_type(hint: Any) -> click.ParamType:
    """The click type that reads a field annotated with ``hint``; text where the annotation says nothing better."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return click_type(next((a for a in arguments if a is not type(None)), str))
    if origin is Literal:
        return click.Choice([str(a) for a in arguments])
    if inspect.isclass(origin) and issubclass(origin, Iterable):
        return ListType(click_type(arguments[0]))
    return _SCALARS.get(hint, click.STRING)


def spell(value: Any) -> str:
    """A default as the user would type it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None or value == () or value == {}:
        return "none"
    return ",".join(map(spell, value)) if isinstance(value, tuple) else str(value)


def argument_texts(docstring: str | None) -> dict[str, str]:
    """``name: text`` lines of a google-style ``Args:`` or ``Attributes:`` section, continuation lines joined."""
    section = re.search(r"^\s*(?:Args|Attributes):\n((?:[ \t]+\S.*\n?)+)", inspect.cleandoc(docstring or ""), re.M)
    lines = re.split(r"\n(?= {4}\S)", section[1].rstrip()) if section else []
    found = (re.match(r"\s*\**(\w+)(?:\s*\([^)]*\))?:\s*(.*)", line, re.S) for line in lines)
    return {m[1]: " ".join(m[2].split()).replace("``", "") for m in found if m}


def fields(cls: type[Any]) -> tuple[Setting, ...]:
    """The settings of a dataclass, in order."""
    hints, text = get_type_hints(cls), argument_texts(cls.__doc__)
    return tuple(
        Setting(f.name, hints[f.name], _default(f), text.get(f.name, "")) for f in dataclasses.fields(cls) if f.init
    )


def keywords(function: Callable[..., Any], skip: Iterable[str] = ()) -> tuple[Setting, ...]:
    """The keyword-only settings of a function, in order, without those in ``skip``."""
    hints, text = get_type_hints(function), argument_texts(function.__doc__)
    return tuple(
        Setting(p.name, hints[p.name], REQUIRED if p.default is p.empty else p.default, text.get(p.name, ""))
        for p in inspect.signature(function).parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.name not in skip
    )


def build(cls: type[Any], values: Mapping[str, Any]) -> Any:
    """An instance of the dataclass from the flags that were given; its own checks raise :class:`ConfigError`."""
    try:
        return cls(**given(values, fields(cls)))
    except TypeError as error:
        raise ConfigError(f"{cls.__name__} cannot be made from these flags: {error}.") from error


def given(values: Mapping[str, Any], settings: Iterable[Setting]) -> dict[str, Any]:
    """Those of ``values`` that belong to ``settings`` and that the user gave."""
    return {s.name: values[s.name] for s in settings if values.get(s.name) is not None}


class PluginCommand(click.Command):
    """A verb whose flags are those of the plug-in that one of its own flags names, plus those of fixed dataclasses.

    ``pocketrec train --backbone lightgcn --help`` lists LightGCN's flags; nothing is loaded before a verb is chosen.
    """

    def __init__(
        self,
        *args: Any,
        axis: registry.Axis,
        flag: str,
        also: Callable[[type[Any]], tuple[Setting, ...]] = lambda _: (),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.axis: registry.Axis = axis
        self.flag = flag
        self.also = also

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Find the plug-in's name first, so that the parser knows its flags."""
        ctx.meta["plugin"] = registry.load(self.axis, self._named(args))
        return super().parse_args(ctx, args)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Own parameters, then the plug-in's flags; a flag that the verb has already is not repeated."""
        own = super().get_params(ctx)
        taken = {p.name for p in own}
        settings = (*fields(ctx.meta["plugin"]), *self.also(ctx.meta["plugin"])) if "plugin" in ctx.meta else ()
        return [*own, *(s.option() for s in settings if s.name not in taken)]

    def _named(self, args: list[str]) -> str:
        for here, following in zip(args, [*args[1:], ""], strict=True):
            if here == f"--{self.flag}":
                return following
            if here.startswith(f"--{self.flag}="):
                return here.partition("=")[2]
        return next(str(p.default) for p in self.params if p.name == self.flag)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return REQUIRED if field.default is dataclasses.MISSING else field.default
