"""Typed settings: YAML files, overlays and dotted overrides become one checked object, with every error at once.

A settings class derives from `Settings`; each field has a docstring (its help) and a resume class:

* `free`      may change when a run is resumed (logging, saving, workers, hardware),
* `recorded`  may change, is printed and written to the run's history (learning rate, schedule, batch),
* `fixed`     may not: the resume is refused with all such differences listed (model, order of samples, optimizer class).

Precedence, later wins: defaults in the class < the YAML file named by `base:` < the YAML file < overlays such as
`--tiny` < `key=value` on the command line. `Loaded.sources` says for every key which of them won.
Mappings are merged key by key, everything else (lists too) is replaced.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from tubelet.errors import ConfigError, Problems, nearest

ResumeClass = Literal["free", "recorded", "fixed"]


class Settings(BaseModel):
    """Base of every settings class: unknown keys are errors, values are checked also when assigned."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, validate_assignment=True, protected_namespaces=()
    )


S = TypeVar("S", bound=Settings)


def free(default: Any = ..., **kwargs: Any) -> Any:
    """A field that may change when a run is resumed."""
    return Field(default, json_schema_extra={"resume": "free"}, **kwargs)


def recorded(default: Any = ..., **kwargs: Any) -> Any:
    """A field that may change on resume; the change is printed and written to `events.jsonl`."""
    return Field(default, json_schema_extra={"resume": "recorded"}, **kwargs)


def fixed(default: Any = ..., **kwargs: Any) -> Any:
    """A field that must be equal on resume."""
    return Field(default, json_schema_extra={"resume": "fixed"}, **kwargs)


@dataclass
class Loaded(Generic[S]):
    """Checked settings, and for each dotted key that was set, where its value came from."""

    settings: S
    sources: dict[str, str] = field(default_factory=dict)
    path: str = ""

    def as_yaml(self) -> str:
        """The resolved settings as YAML, each line that is not a default marked with its source."""
        return to_yaml(self.settings.model_dump(mode="json"), self.sources)


# ---------------------------------------------------------------------------------------------------- reading


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-3 as a number and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if key in seen:
                where = f"{node.start_mark.name}, line {line}"
                raise ConfigError(f"`{key}` is given twice in one mapping ({where}; first on line {seen[key]}).",
                                  "delete one of the two lines")
            seen[key] = line
        return super().construct_mapping(node, deep)


_NUMBER = {"tag:yaml.org,2002:int": r"[-+]?(0b[0-1_]+|0x[0-9a-fA-F_]+|0[0-7_]+|0|[1-9][0-9_]*)$",
           "tag:yaml.org,2002:float": r"([-+]?([0-9][0-9_]*)\.[0-9_]*([eE][-+][0-9]+)?|\.[0-9][0-9_]*([eE][-+][0-9]+)?"
                                      r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"}
"""As YAML 1.1 has it, but 1:30:00 is a text and no number in base 60."""
_Loader.yaml_implicit_resolvers = {
    first: [(tag, re.compile(_NUMBER[tag]) if tag in _NUMBER else rule) for tag, rule in rules]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?([0-9][0-9_]*)(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str, name: str = "<text>") -> Any:
    """YAML text -> plain Python values. Raises `ConfigError` with the line on a syntax error."""
    loader = _Loader(text)
    loader.name = name
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{name}{line} is not YAML: {problem}.", "check indentation, quotes and brackets") from None
    finally:
        loader.dispose()


def read_yaml(path: str | Path) -> dict:
    """A YAML file as a mapping, with the file named by its `base:` key (relative to it) merged below."""
    path = Path(path)
    try:
        text = path.read_text()
    except OSError as error:
        beside = sorted(p.stem for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        similar = nearest(path.stem, beside, 3) or beside[:6]
        hint = f"one of {', '.join(similar)} in {path.parent}/" if similar else "the path of a YAML file"
        raise ConfigError(f"Config file {path} cannot be read: {error.strerror}.", hint) from None
    data = parse_yaml(text, str(path)) or {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds a {type(data).__name__}, a config is a mapping of keys to values.",
                          "start with `run: {name: ...}`")
    base = data.pop("base", None)
    return merge(read_yaml(path.parent / base), data) if base else data


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """`a.b=1`, `--a.b=1` and `--a.b 1` -> {"a.b": 1}; values are YAML. Unreadable words are reported together."""
    found: dict[str, Any] = {}
    problems = Problems(ConfigError)
    words = list(words)
    while words:
        word = words.pop(0)
        key, equals, value = word.lstrip("-").partition("=")
        if not equals and word.startswith("--") and words and "=" not in words[0] and not words[0].startswith("--"):
            equals, value = "=", words.pop(0)
        if not equals or not key:
            problems.add(f"`{word}` is not an override.", "write key=value, e.g. optimizer.lr=1e-3")
            continue
        key = key.replace("-", "_")
        if str(found.get(key, "")).endswith(".tar") and value.endswith(".tar"):
            problems.add(f"`{key}` is given twice, as {found[key]} and {value}; only the last would count.",
                         f"quotes, if the shell expanded braces: '{key}=x-{{0000..0063}}.tar'; or a list [A.tar, B.tar]")
        found[key] = parse_yaml(value, f"value of {key}") if value else None
    problems.raise_if_any()
    return found


# ---------------------------------------------------------------------------------------------------- merging


def merge(below: Any, above: Any) -> Any:
    """`above` laid over `below`: mappings key by key, anything else replaces."""
    if isinstance(below, dict) and isinstance(above, dict):
        return {key: merge(below[key], above[key]) if key in below and key in above else above.get(key, below.get(key))
                for key in [*below, *(k for k in above if k not in below)]}
    return above


def flatten(data: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings -> {"a.b.c": leaf}; lists of mappings are numbered (a.0.b), other lists and empty ones are leaves."""
    if isinstance(data, list) and data and all(isinstance(item, dict) for item in data):
        data = dict(enumerate(data))
    if not isinstance(data, dict) or not data:
        return {prefix: data} if prefix else {}
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def _assign(data: dict, dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    for parent in parents:
        if not isinstance(data.get(parent), dict):
            data[parent] = {}
        data = data[parent]
    data[leaf] = value


# ---------------------------------------------------------------------------------------------------- schema


def _settings_in(annotation: Any) -> list[type[Settings]]:
    """The Settings classes a field's annotation mentions: X, X | None, list[X], dict[str, X]."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return [annotation]
    return [cls for arg in typing.get_args(annotation) for cls in _settings_in(arg)]


def known_fields(cls: type[Settings], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(dotted key, field) of everything that can be set, parents before children."""
    for name, info in cls.model_fields.items():
        key = f"{prefix}.{name}" if prefix else name
        yield key, info
        for child in _settings_in(info.annotation):
            yield from known_fields(child, key)


def resume_class(cls: type[Settings], dotted: str) -> ResumeClass:
    """How a change of this key is treated on resume; keys inside free-form mappings follow their parent."""
    classes = {key: (info.json_schema_extra or {}).get("resume")  # type: ignore[union-attr]
               for key, info in known_fields(cls)}
    parts = [part for part in dotted.split(".") if not part.isdigit()]
    for length in range(len(parts), 0, -1):
        found = classes.get(".".join(parts[:length]))
        if found:
            return typing.cast(ResumeClass, found)
    return "fixed"


@dataclass(frozen=True)
class Difference:
    """One key that differs between a saved and a new configuration."""

    key: str
    old: Any
    new: Any
    resume: ResumeClass

    def __str__(self) -> str:
        return f"{self.key}: {self.old!r} -> {self.new!r}"


def differences(cls: type[Settings], old: dict, new: dict) -> list[Difference]:
    """Every key whose value differs between two resolved configurations (`model_dump(mode="json")`).

    `old` may be of an earlier version: a setting that it does not know yet had what is the default now, and one that no
    longer exists is passed over.
    """
    a, b = flatten(old), flatten(new)
    fields = dict(known_fields(cls))
    a = {key: value for key, value in a.items() if key in b or not _retired(key, fields)}
    for key in b.keys() - a.keys():
        item = re.match(r".*\.\d+\.", key)  # an entry of a list that was not there is no new setting of one that was
        info = fields.get(".".join(part for part in key.split(".") if not part.isdigit()))
        if info and not info.is_required() and (item is None or any(known.startswith(item[0]) for known in a)):
            a[key] = to_jsonable_python(info.get_default(call_default_factory=True))
    return [Difference(key, a.get(key), b.get(key), resume_class(cls, key))
            for key in sorted({*a, *b}) if a.get(key) != b.get(key)]


def _retired(dotted: str, fields: Mapping[str, FieldInfo]) -> bool:
    """Whether a key is none of `fields`, nor part of one that is a free-form mapping."""
    parts = [part for part in dotted.split(".") if not part.isdigit()]
    for length in range(len(parts), 0, -1):
        info = fields.get(".".join(parts[:length]))
        if info is not None:
            return length < len(parts) and bool(_settings_in(info.annotation))
    return True


# ---------------------------------------------------------------------------------------------------- checking


def load(cls: type[S], path: str | Path, overrides: Sequence[str] = (),
         overlay: Callable[[dict], dict] | None = None, overlay_name: str = "overlay") -> Loaded[S]:
    """Read, merge and check. Raises one `ConfigError` that lists every problem, with the nearest known key for a typo.

    `overlay` gets the file's values and returns what is to be laid over them (before the command line's overrides).
    """
    data = read_yaml(path)
    sources = {key: str(path) for key in flatten(data)}
    if overlay is not None:
        layer = overlay(data)
        data = merge(data, layer)
        sources.update({key: overlay_name for key in flatten(layer)})
    for key, value in parse_overrides(overrides).items():
        _assign(data, key, value)
        sources.update({k: "command line" for k in flatten(value, key)})
    return Loaded(check(cls, data, sources), sources, str(path))


def check(cls: type[S], data: dict, sources: dict[str, str] | None = None) -> S:
    """Plain values -> settings. Raises one `ConfigError` for all problems."""
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        problems = Problems(ConfigError, f"{error.error_count()} problems in the configuration:")
        for item in error.errors():
            problem, hint = _explain(cls, dict(item), sources or {})
            problems.add(problem, hint)
        problems.raise_if_any()
        raise


_NOT_A_KEY = re.compile(r"[A-Z]\w+|(list|dict|tuple|literal|tagged-union|function-\w+)\[.*|str|int|float|bool|none")


def _explain(cls: type[Settings], item: dict[str, Any], sources: dict[str, str]) -> tuple[str, str]:
    known = [key for key, _ in known_fields(cls)]
    # pydantic puts list indexes and the names of union members into the location; keep what a user wrote
    parts = [str(part) for part in item["loc"] if not _NOT_A_KEY.fullmatch(str(part))]
    dotted = ".".join(parts)
    schema_key = ".".join(part for part in parts if not part.isdigit())
    where = f" ({sources[dotted]})" if dotted in sources else ""
    if item["type"] == "extra_forbidden":
        parent = schema_key.rpartition(".")[0]
        close = nearest(schema_key, known, 2)
        siblings = [key.rpartition(".")[2] for key in known if key.rpartition(".")[0] == parent]
        hint = " or ".join(close) if close else f"one of {', '.join(sorted(set(siblings)))}"
        return f"`{dotted}` is not a setting{where}.", hint
    if item["type"] == "missing":
        return f"`{dotted}` is required and was not given.", f"{dotted}=..."
    message = re.sub(r"^(Value error|Assertion failed), ", "", item["msg"])
    inner = item.get("ctx", {}).get("error")
    if isinstance(inner, ConfigError):
        return inner.problem, inner.hint
    info = dict(known_fields(cls)).get(schema_key)
    help_text = f" ({info.description.splitlines()[0]})" if info is not None and info.description else ""
    return f"`{dotted or 'configuration'}` = {item.get('input')!r}: {message}{where}.", f"another value{help_text}"


def to_yaml(data: dict, sources: dict[str, str] | None = None, prefix: str = "", indent: int = 0) -> str:
    """A mapping as YAML in its own order; keys in `sources` get a comment that names where the value came from."""
    lines = []
    for key, value in data.items():
        dotted = f"{prefix}.{key}" if prefix else str(key)
        pad = "  " * indent
        if isinstance(value, dict) and value:
            lines.append(f"{pad}{key}:")
            lines.append(to_yaml(value, sources, dotted, indent + 1).rstrip("\n"))
            continue
        text = yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False).strip()
        text = text.removesuffix("...").strip()
        source = (sources or {}).get(dotted)
        lines.append(f"{pad}{key}: {text}" + (f"  # {source}" if source else ""))
    return "\n".join(lines) + "\n"
