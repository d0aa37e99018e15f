"""Flags from dataclasses: a plug-in's settings are its flags, for every plug-in alike.

``dim: int = 16`` becomes ``--dim INTEGER``, ``batch_norm: bool = True`` becomes ``--batch-norm / --no-batch-norm``,
``Literal["zero", "codebook"]`` a choice, ``tuple[int, ...]`` a comma-separated list, ``X | None`` an optional ``X``.
A field of a group is ``--group-field``, see :mod:`pocketrec.settings`. The help text is the field's line in the class
docstring. A flag that is not given leaves the field's default alone.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import click

from pocketrec import registry, settings
from pocketrec.settings import REQUIRED, Setting

T = TypeVar("T")


def option(setting: Setting, flag: str = "") -> click.Option:
    """The click option of a setting; its value is ``None`` unless the user gives the flag."""
    flag = flag or setting.flag
    kind = click_type(setting.type)
    names = [f"{flag}/--no-{flag[2:]}" if kind is click.BOOL else flag, parameter(flag)]
    if setting.default is REQUIRED:
        return click.Option(names, type=kind, required=True, help=setting.help)
    shown = f"{setting.help} [default: {settings.spell(setting.default)}]".strip()
    return click.Option(names, type=kind, default=None, help=shown)


def parameter(flag: str) -> str:
    """The name under which click hands over a flag's value."""
    return flag.removeprefix("--").replace("-", "_")


def given(values: Mapping[str, Any], wanted: Iterable[Setting], taken: Iterable[str] = ()) -> dict[str, Any]:
    """The settings whose flags the user gave, by name; see :func:`spelt` for those that are ``taken``."""
    named = {s.name: values.get(parameter(flag)) for s, flag in spelt(wanted, taken)}
    return {name: value for name, value in named.items() if value is not None}


def spelt(wanted: Iterable[Setting], taken: Iterable[str]) -> list[tuple[Setting, str]]:
    """Settings of a training with their flags; ``--training-NAME`` where the plug-in has a flag of that name."""
    return [(s, f"--training-{s.flag[2:]}" if s.flag in taken else s.flag) for s in wanted]


def build(cls: type[T], values: Mapping[str, Any]) -> T:
    """An instance of the dataclass from the flags that were given; its own checks raise :class:`ConfigError`."""
    return settings.build(cls, given(values, settings.leaves(cls)))


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


class PluginCommand(click.Command):
    """A verb whose flags are those of the plug-in that one of its own flags names, plus those of fixed dataclasses.

    ``pocketrec train --backbone lightgcn --help`` lists LightGCN's flags; nothing is loaded before a verb is chosen.
    """

    def __init__(
        self,
        *args: Any,
        axis: registry.Axis,
        flag: str,
        also: Callable[[type[Any]], tuple[Setting, ...]] = lambda plugin: (),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.axis: registry.Axis = axis
        self.flag, self.also = flag, also

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Find the plug-in's name first, so that the parser knows its flags."""
        ctx.meta["plugin"] = registry.load(self.axis, self._named(args))
        return super().parse_args(ctx, args)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Own parameters, then the plug-in's flags; a flag that the verb has already is not repeated."""
        own = super().get_params(ctx)
        if (plugin := ctx.meta.get("plugin")) is None:
            return own
        taken = {p.name for p in own}
        named = [(s, s.flag) for s in settings.leaves(plugin)]
        named += spelt(self.also(plugin), [flag for _, flag in named])
        return [*own, *(option(s, flag) for s, flag in named if parameter(flag) not in taken)]

    def _named(self, args: list[str]) -> str:
        for here, following in zip(args, [*args[1:], ""], strict=True):
            if here == f"--{self.flag}":
                return following
            if here.startswith(f"--{self.flag}="):
                return here.partition("=")[2]
        return next(str(p.default) for p in self.params if p.name == self.flag)
