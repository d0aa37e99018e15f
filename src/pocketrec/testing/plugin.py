"""Checks that every plug-in of every axis must pass: a frozen dataclass that explains itself."""

from __future__ import annotations

import dataclasses
import doctest
import inspect
import json
import re
import sys
from typing import Any, Literal, get_args, get_origin

import click

from pocketrec import registry, settings
from pocketrec.command import options
from pocketrec.data.source import Source
from pocketrec.errors import ConfigError
from pocketrec.testing.lab import Lab, require


def check_is_a_dataclass(plugin: Any, _lab: Lab) -> None:
    """A plug-in is its own configuration."""
    require(dataclasses.is_dataclass(plugin), f"{type(plugin).__name__} to be a dataclass")


def check_is_frozen(plugin: Any, _lab: Lab) -> None:
    """No field can be set after construction."""
    require(type(plugin).__dataclass_params__.frozen, f"{type(plugin).__name__} to be frozen")


def check_needs_no_argument(plugin: Any, _lab: Lab) -> None:
    """Every field has a default."""
    needed = [s.name for s in settings.leaves(type(plugin)) if s.default is settings.REQUIRED]
    require(not needed, "every field to have a default", f"none for {', '.join(needed)}")


def check_is_final(plugin: Any, _lab: Lab) -> None:
    """Classes are abstract or final: a plug-in class has no abstract method left and inherits no fields."""
    cls = type(plugin)
    require(not inspect.isabstract(cls), f"{cls.__name__} to define every abstract method")
    inherited = [base.__name__ for base in cls.__mro__[1:] if dataclasses.is_dataclass(base)]
    require(not inherited, "all fields to be defined in one class", f"fields from {', '.join(inherited)}")


def check_name_is_plain(plugin: Any, _lab: Lab) -> None:
    """Names are lower-case words, as they are typed on the command line."""
    require(re.fullmatch(r"[a-z][a-z0-9_]*", plugin.name) is not None, "a lower-case name", repr(plugin.name))


def check_name_is_unique(plugin: Any, _lab: Lab) -> None:
    """A registered name leads back to this class."""
    for axis in registry.AXES:
        if plugin.name in registry.modules(axis) and isinstance(plugin, registry.load(axis, plugin.name)):
            require(registry.load(axis, plugin.name) is type(plugin), f"{plugin.name!r} to name one class only")


def check_survives_json(plugin: Any, _lab: Lab) -> None:
    """A configuration written as JSON and read back is the same configuration."""
    again = settings.from_json(type(plugin), json.loads(json.dumps(settings.to_json(plugin))))
    require(again == plugin, f"{plugin!r} after a round trip through JSON", repr(again))


def check_keys_hold_what_differs(plugin: Any, _lab: Lab) -> None:
    """The key of stored work has no default in it, but every change of a setting."""
    usual = settings.key(type(plugin)())
    require(not {s.name.partition(".")[0] for s in settings.leaves(type(plugin))} & usual.keys(), "no defaults", usual)
    for setting in settings.leaves(type(plugin)):
        for value in _others(setting):
            try:
                changed = settings.build(type(plugin), {setting.name: value})
            except ConfigError:
                continue
            require(settings.key(changed) != usual, f"the key to tell {setting.name}={value!r}", settings.key(changed))


def _others(setting: settings.Setting) -> tuple[Any, ...]:
    """Values that are not the default."""
    if get_origin(setting.type) is Literal:
        return tuple(v for v in get_args(setting.type) if v != setting.default)
    by_type = {bool: (not setting.default,), int: (1, 2, 3, 4), float: (0.25, 0.5, 2.0), str: ("other",)}
    return tuple(v for v in by_type.get(setting.type, ()) if v != setting.default)


def check_equal_settings_are_equal(plugin: Any, _lab: Lab) -> None:
    """Two plug-ins with the same fields are equal and hash alike: they are keys of stored work."""
    other = dataclasses.replace(plugin)
    require(other == plugin and hash(other) == hash(plugin), "equal configurations to be equal and hash alike")


def check_shows_its_settings(plugin: Any, _lab: Lab) -> None:
    """``repr`` names every field."""
    hidden = [f.name for f in dataclasses.fields(plugin) if f"{f.name}=" not in repr(plugin)]
    require(not hidden, "every field to be in the repr", f"{plugin!r} without {', '.join(hidden)}")


def check_settings_are_flags(plugin: Any, _lab: Lab) -> None:
    """The command line can spell every field, and an untouched flag leaves the default."""
    flags = [s.flag for s in settings.leaves(type(plugin))]
    require(len(set(flags)) == len(flags), "every setting to have a flag of its own", flags)
    command = click.Command("exam", params=[options.option(s) for s in settings.leaves(type(plugin))])
    values = command.make_context("exam", []).params
    require(options.build(type(plugin), values) == type(plugin)(), "no flag to mean the defaults")


def check_refuses_unknown_settings(plugin: Any, _lab: Lab) -> None:
    """A field that does not exist is an error, not a silent default."""
    try:
        type(plugin)(**{"no_such_setting": 1})
    except TypeError:
        return
    require(False, "an unknown setting to be refused", "no error")


def check_explains_itself(plugin: Any, _lab: Lab) -> None:
    """The class docstring has a first line, and a line for every field."""
    text = inspect.getdoc(type(plugin)) or ""
    require(text.split("\n")[0].endswith("."), "a one-line summary that ends in a full stop", repr(text[:80]))
    missing = {f.name for f in dataclasses.fields(plugin)} - set(settings.explained(type(plugin)))
    require(
        not missing,
        "a line in the Args for every field, of the class or a base",
        f"none for {', '.join(sorted(missing))}",
    )


def check_cites_its_reference(plugin: Any, _lab: Lab) -> None:
    """Backbones and methods say where they come from."""
    if not isinstance(plugin, Source):
        require("Reference" in (type(plugin).__doc__ or ""), "a Reference section in the class docstring")


def check_example_runs(plugin: Any, _lab: Lab) -> None:
    """The class docstring has an example, and it does what it shows."""
    cls = type(plugin)
    found = doctest.DocTestFinder(recurse=False).find(cls, cls.__name__, globs=vars(sys.modules[cls.__module__]).copy())
    examples = [example for test in found for example in test.examples]
    require(bool(examples), f"an example (>>>) in the docstring of {cls.__name__}")
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False)
    for test in found:
        runner.run(test, out=report.append)
    require(runner.failures == 0, "the example in the docstring to run", " ".join("".join(report).split()))


def check_bad_settings_speak(plugin: Any, _lab: Lab) -> None:
    """A number far out of range is refused with the field's name and the value, or is harmless by declaration."""
    for setting in settings.leaves(type(plugin)):
        if setting.type in (int, float) and setting.name != "seed":
            try:
                settings.build(type(plugin), {**settings.flat(plugin), setting.name: setting.type(-7)})
            except ConfigError as error:
                message, name = str(error), setting.name.rpartition(".")[2]
                require(name in message and "-7" in message, f"{setting.name}=-7 to be named", message)
            except Exception as error:
                require(False, f"{setting.name}=-7 to raise ConfigError", repr(error))
