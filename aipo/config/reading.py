"""YAML -> one typed, validated, immutable tree (:mod:`aipo.config.schema` has its keys).

A config file holds only what differs from its ``base:`` (looked up like the file itself: a name without a folder
is searched in ``configs/``). Dotted overrides (``optim.lr=2e-6``) are applied last. Every failure is a
:class:`UserError` that names the key, the file or override that set it, and the nearest valid key.
"""

from __future__ import annotations

import difflib
import json
import os
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from aipo.config.base import Section
from aipo.config.data import Source, TrainSource, WatchSource
from aipo.config.schema import Config
from aipo.errors import UserError

CONFIG_FOLDER = Path(__file__).resolve().parents[2] / "configs"


WHOLE = {"model.path", "data.train"}  # a file that says one of these stands by itself


def keys(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All leaf keys in order, as (dotted name, pydantic field)."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def type_name(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Annotated:
        return type_name(get_args(annotation)[0])
    if origin is Literal:
        return "|".join(map(str, get_args(annotation)))
    if origin is types.UnionType or str(origin) == "typing.Union":
        return "|".join(type_name(a) for a in get_args(annotation))
    if origin is tuple:
        return "[" + ", ".join("..." if a is Ellipsis else type_name(a) for a in get_args(annotation)) + "]"
    if isinstance(annotation, type) and issubclass(annotation, Source):
        return "source"
    return "null" if annotation is type(None) else annotation.__name__


def help_keys() -> str:
    """Two lines a key: name, type, default; meaning."""
    return _described(keys())


def help_sources() -> str:
    """The same of the keys of a source."""
    common = {name for name, _ in keys(Source)}
    train, watch = ([each for each in keys(kind) if each[0] not in common] for kind in (TrainSource, WatchSource))
    parts = [_described(keys(Source)), "  of data.train:", _described(train)]
    return "\n".join([*parts, "  of validation.watch:", _described(watch)])


def _described(fields: Iterable[tuple[str, Any]]) -> str:
    lines = []
    for name, field in fields:
        value = list(field.default) if isinstance(field.default, tuple) else field.default
        default = "required" if field.is_required() else f"default {json.dumps(value)}"
        lines.append(f"  {name}  ({type_name(field.annotation)}; {default})\n      {field.description}")
    return "\n".join(lines)


def find_config(name: str, asked_by: str = "") -> Path:
    """A path as given, or a name without a folder in ``configs/`` (with or without ``.yaml``)."""
    candidates = [Path(name)]
    if Path(name).name == name:
        candidates += [CONFIG_FOLDER / name, CONFIG_FOLDER / f"{name}.yaml"]
    elif not Path(name).is_absolute():
        candidates += [CONFIG_FOLDER / name]
    for path in candidates:
        if os.path.isfile(path):  # False also for a name that is too long
            return path
    known = sorted(str(p.relative_to(CONFIG_FOLDER)) for p in CONFIG_FOLDER.rglob("*.yaml"))
    near = difflib.get_close_matches(Path(name).name, known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]}?" if near else ""
    plain = [path for path in known if "/" not in path]
    folders = sorted({f"{Path(path).parts[0]}/" for path in known if path not in plain})
    raise UserError(
        f"{asked_by}config {name} not found here or in configs/{hint} (there: {', '.join(plain)}, and more in "
        f"{', '.join(folders)})"
    )


def find_method(name: str) -> Path:
    """A file as given, or ``configs/methods/NAME.yaml``."""
    methods = {path.stem: path for path in sorted((CONFIG_FOLDER / "methods").glob("*.yaml"))}
    path = methods.get(name, Path(name))
    if not path.is_file():
        near = difflib.get_close_matches(name, methods, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"--method {name} is unknown: {hint}there are {', '.join(methods)}, and files of your own")
    return path


def load_config(name: str, overrides: Sequence[str] = (), *, method: str | None = None) -> Config:
    """Read ``name`` with its bases, then a method's own keys, apply ``key.path=value`` overrides, validate.

    ``method`` is a name in ``configs/methods/`` or a file. Of its bases other methods and conditions come along:
    ``name`` takes the place of the config that they stand on.

    Raises:
        UserError: with the key and the file or override that is wrong.
    """
    values: dict[str, Any] = {}  # dotted key -> value
    origin: dict[str, str] = {}  # dotted key -> the file or override that set it
    path = find_config(name)
    own = []
    if method is not None:
        file = find_method(method)
        *bases, itself = layers(file)
        # what says which model or data is a whole config, in whose place ``name`` is, and so is all below it
        whole = [i for i, (_, tree) in enumerate(bases) if WHOLE & dict(flatten_sections(tree)).keys()]
        own = [*bases[max(whole, default=-1) + 1 :], itself]
        values["name"] = f"{path.stem}-{file.stem}"
    for layer, tree in [*layers(path), *own, *map(_parse_override, overrides)]:
        for key, value in flatten_sections(tree):
            _check_key(key, layer)
            values[key], origin[key] = value, layer
    values.setdefault("name", path.stem)
    try:
        return Config.model_validate(_unflatten(values))
    except ValidationError as error:
        raise UserError("; ".join(_explain(e, origin, path) for e in error.errors())) from None


def dump_config(config: Config) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def layers(
    path: Path, *, key: str = "base", elsewhere: Callable[..., Path] = find_config, seen: tuple[Path, ...] = ()
) -> list[tuple[str, dict[str, Any]]]:
    """(file, content) from the deepest base to the file itself.

    ``key`` names a file's base, which lies beside it or where ``elsewhere`` finds it.
    """
    if path.resolve() in seen:
        raise UserError(f"{path}: {key}: goes in a circle")
    tree = read_yaml(path)
    base = tree.pop(key, None)
    if base is None:
        return [(str(path), tree)]
    parent = path.parent / str(base)
    if not parent.is_file():
        parent = elsewhere(str(base), asked_by=f"{path}: {key}: ")
    return [*layers(parent, key=key, elsewhere=elsewhere, seen=(*seen, path.resolve())), (str(path), tree)]


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a file. UserError where it holds something else, or a key twice."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a month 13
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold keys and values, not a {type(tree).__name__}")
    return tree


# libyaml's where PyYAML was built with it: a campaign reads thousands of files, and Python takes ten times as long
_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_SafeLoader):
    """YAML in which nothing stands twice: PyYAML keeps the last of two keys and drops the first without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        first: dict[Any, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.YAMLError(f"line {line} has a list or a mapping where a key is to be: put it in quotes")
            if key.value in first:
                raise yaml.YAMLError(f"{key.value} stands in line {first[key.value]} and in line {line}: join them")
            first[key.value] = line
        return super().construct_mapping(node, deep)


def _parse_override(text: str) -> tuple[str, dict[str, Any]]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"override {text!r} must look like optim.lr=2e-6")
    try:
        read = yaml.load(value, _Loader)
    except (yaml.YAMLError, ValueError):
        raise UserError(f"override {text}: the value is not YAML (text with signs in it needs quotes)") from None
    if read is None and key in _SECTIONS:
        raise UserError(f"override {text}: {key} is a section: override its keys, such as {_first_key(key)}=...")
    if isinstance(read, str) and value.strip()[:1] not in ("'", '"') and read != value.strip():  # Answer #1
        raise UserError(f"override {text}: it would be read as {read!r}: put the value in quotes, '{key}=\"...\"'")
    return f"override {text}", {key: read}


def _first_key(section: str) -> str:
    return next(key for key in _KNOWN if key.startswith(f"{section}."))


_SECTIONS = {
    n: f.annotation
    for n, f in Config.model_fields.items()
    if isinstance(f.annotation, type) and issubclass(f.annotation, Section)
}
_KNOWN = {name: None for name, _ in keys()}  # in their order


def flatten_sections(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys with their values. Below a key a mapping is its value, such as a source of data."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key in _SECTIONS:
            yield from flatten_sections(value, f"{key}.")
        elif value is None and key in _SECTIONS:
            continue  # an empty section of a YAML file
        else:
            yield key, _number(value)


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-6 as a string; a number is meant."""
    if isinstance(value, str):
        try:
            return float(value) if "e" in value.lower() and value[:1] in "0123456789.-+" else value
        except ValueError:
            return value
    return value


def _unflatten(values: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in values.items():
        section, dot, leaf = key.partition(".")
        if dot:
            tree.setdefault(section, {})[leaf] = value
        else:
            tree[key] = value
    return tree


def _check_key(key: str, layer: str) -> None:
    if key in _KNOWN:
        return
    if key in _SECTIONS:
        raise UserError(
            f"{layer}: {key} is a section: it takes keys such as {next(k for k in _KNOWN if k.startswith(key + '.'))}"
        )
    leaf = key.rpartition(".")[2]
    near = difflib.get_close_matches(key, _KNOWN, n=1, cutoff=0.6)
    near = near or [k for k in _KNOWN if k.rpartition(".")[2] == leaf][:1]
    near = near or difflib.get_close_matches(key, _KNOWN, n=1, cutoff=0.3)
    hint = f"; did you mean {near[0]}?" if near else "; --help lists all keys"
    raise UserError(f"{layer}: unknown key {key}{hint}")


def _explain(error: Any, origin: dict[str, str], path: Path) -> str:
    parts = [str(p) for p in error["loc"]]
    key = next((k for n in (2, 1) if (k := ".".join(parts[:n])) in origin), ".".join(parts[:2]))
    message = error["msg"].removeprefix("Value error, ")
    if set(parts) & {"source", "sources"}:  # which of several sources, and which of its keys
        inner = [part for part in parts[2:] if part not in ("source", "sources")]
        place = key + "".join(f"[{part}]" if part.isdecimal() else f".{part}" for part in inner)
        if error["type"] in ("missing", "extra_forbidden"):
            near = difflib.get_close_matches(parts[-1], [name for name, _ in keys(TrainSource)], n=1)
            hint = f"; did you mean {near[0]}?" if near else "; --help lists the keys of a source"
            said = "is required" if error["type"] == "missing" else f"is unknown{hint}"
            return f"{origin.get(key, path)}: {place} {said}"
        return f"{origin.get(key, path)}: {place}: {message[0].lower()}{message[1:]}, got {error['input']!r}"
    if error["type"] == "missing":
        return f"{origin[key]}: {key}: too few values" if key in origin else f"{path}: {key} is required"
    if error["type"] == "value_error":  # our own messages name the keys
        sources = dict.fromkeys(source for key, source in origin.items() if "." in key and key in message)
        return f"{', '.join(sources) or origin.get(key, path)}: {message}"
    return f"{origin.get(key, path)}: {key}: {message[0].lower()}{message[1:]}, got {error['input']!r}"
