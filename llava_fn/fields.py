"""What a reader knows of each field of a foreign JSON object; a field that it does not know is refused.

A reader declares one table, and reads through it:

    ROPE = {"rope_theta": number(10000.0), "rope_type": only("default")}
    LLAMA = {
        "hidden_size": whole(4096),    # used: checked, and given to the reader; 4096 if it is missing
        "rope_scaling": inside(ROPE),  # used: an object with a table of its own
        "hidden_act": only("silu"),    # changes nothing with this value, and is refused with any other
        "use_cache": FREE,             # changes nothing, whatever its value
    }
    values = read(path, load(path), LLAMA)

Any other field is refused by file, name and value, unless it is null; a row OTHER says what else it may be. null is a
value of a used field only if its default is None. `flaws` gives the reasons, for a caller with an error of its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POINTER = b"version https://git-lfs"  # how a Git LFS pointer begins
IS_POINTER = "is a Git LFS pointer, which stands in place of the file; download the file itself"
LONGEST = 200  # letters of a value in a message


class _Required:
    """In place of the default of a field that has none."""


REQUIRED = _Required()


@dataclass(frozen=True)
class Field:
    """One row of a table.

    fits: whether a value is one that can be read. wanted: what to do with another one, as the end of a message.
    default: what a missing field means; REQUIRED: it must not be missing. used: whether `read` gives it to the reader.
    table: the rows of the fields of an object, or of each object in a list.
    """

    fits: Callable[[Any], bool]
    wanted: str
    default: Any = None
    used: bool = True
    table: Table | None = None


Table = Mapping[str, Field]
OTHER = "*"  # the row of all fields that have none
UNKNOWN = Field(lambda value: value is None, "unknown; remove the field if the file means the same without it")
FREE = Field(lambda value: True, "", used=False)


def free(names: str) -> dict[str, Field]:
    """The rows of fields that change nothing, from their names with spaces between them."""
    return dict.fromkeys(names.split(), FREE)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(x, str) for x in value)


def _is(value: Any, wanted: Any) -> bool:
    return value == wanted and isinstance(value, bool) == isinstance(wanted, bool)


def whole(default: Any = REQUIRED) -> Field:
    """A used field: a whole number above 0."""
    return Field(_is_whole, "it must be a whole number above 0", default)


def number(default: Any = REQUIRED) -> Field:
    """A used field: a finite number above 0."""
    return Field(_is_number, "it must be a number above 0", default)


def integer(default: Any = REQUIRED) -> Field:
    """A used field: a whole number, which may be negative."""
    return Field(lambda v: isinstance(v, int) and not isinstance(v, bool), "it must be one whole number", default)


def flag(default: Any = REQUIRED) -> Field:
    """A used field: true or false."""
    return Field(lambda v: isinstance(v, bool), "it must be true or false", default)


def text(default: Any = REQUIRED) -> Field:
    """A used field: a text."""
    return Field(lambda v: isinstance(v, str), "it must be a text", default)


def texts(default: Any = REQUIRED) -> Field:
    """A used field: a list of texts."""
    return Field(_are_texts, "it must be a list of texts", default)


def choice(*values: Any, default: Any = REQUIRED) -> Field:
    """A used field: one of these values."""
    return Field(lambda v: any(_is(v, x) for x in values), _supported(values), default)


def only(*values: Any, default: Any = None) -> Field:
    """A field that changes nothing with one of these values. default: what a missing one means; the first, if None."""
    meaning = values[0] if default is None else default
    return Field(lambda v: any(_is(v, x) for x in values), _supported(values), meaning, used=False)


def inside(table: Table, default: Any = None) -> Field:
    """A used field: an object whose fields have a table of their own."""
    return Field(lambda v: isinstance(v, Mapping), "it must be an object", default, table=table)


def items(table: Table, default: Any = REQUIRED) -> Field:
    """A used field: a list of objects whose fields have a table of their own."""
    return Field(lambda v: isinstance(v, list), "it must be a list of objects", default, table=table)


def _supported(values: tuple[Any, ...]) -> str:
    return f"only {' or '.join(map(_json, values))} is supported"


def _json(value: Any) -> str:
    written = json.dumps(value, ensure_ascii=False, default=repr)
    return written if len(written) <= LONGEST else f"{written[:LONGEST]} ... ({len(written)} letters)"


def flaws(values: Any, table: Table, path: str = "") -> list[str]:
    """One text for each field that the table does not allow: its name, its value, and what it must be.

    path: of the object in its file, with a dot behind it.
    """
    if not isinstance(values, Mapping):
        return [f"{path.removesuffix('.') or 'the file'} is {_json(values)}; it must be an object"]
    rows = [(name, table.get(name, table.get(OTHER, UNKNOWN)), value) for name, value in values.items()]
    out = [flaw for name, field, value in rows for flaw in _flaws(f"{path}{name}", field, value)]
    for name, field in table.items():
        if name not in values and name != OTHER and not _allows(field, field.default):
            means = "" if field.default is REQUIRED else f", which means {_json(field.default)}"
            out.append(f"{path}{name} is missing{means}; {field.wanted}")
    return out


def _allows(field: Field, value: Any) -> bool:
    return field.fits(value) or (value is None and field.default is None and field.used)


def _flaws(name: str, field: Field, value: Any) -> list[str]:
    if not _allows(field, value):
        return [f"{name}={_json(value)}; {field.wanted}"]
    if field.table is not None and isinstance(value, list):
        return [flaw for i, item in enumerate(value) for flaw in flaws(item, field.table, f"{name}[{i}].")]
    return flaws(value, field.table, f"{name}.") if field.table is not None and isinstance(value, Mapping) else []


def read(where: Path | str, values: Any, table: Table) -> dict[str, Any]:
    """The used fields, with the defaults of those that are missing. ValueError lists each field that is refused."""
    if wrong := flaws(values, table):
        raise ValueError(f"{where}: {'; '.join(wrong)}")
    return _used(values, table)


def _used(values: Any, table: Table) -> Any:
    if isinstance(values, list):
        return [_used(item, table) for item in values]
    if not isinstance(values, Mapping):
        return values
    rows = {name: field for name, field in table.items() if field.used and name != OTHER}
    if OTHER in table and table[OTHER].used:
        rows |= {name: table[OTHER] for name in values if name not in table}
    out = {name: values.get(name, field.default) for name, field in rows.items()}
    return {name: value if (inner := rows[name].table) is None else _used(value, inner) for name, value in out.items()}


def load(path: Path) -> dict[str, Any]:
    """A JSON object from a file. ValueError names the file and the place where it is none, or has a field twice."""
    if not path.is_file():  # a pipe or a device may have no end
        raise ValueError(f"{path}: no such file")
    content = path.read_bytes()
    check_pointer(path, content)
    try:
        values = json.loads(content.decode(), object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}, column {error.colno}: {error.msg}; mend the JSON") from error
    except (ValueError, RecursionError) as error:  # a field twice, bytes that are not UTF-8, or too deep
        raise ValueError(f"{path}: {error}; mend the JSON") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a JSON object; is it the right file?")
    return values


def check_pointer(path: Path, content: bytes) -> None:
    """ValueError if a Git LFS pointer stands in place of a file."""
    if content.startswith(POINTER):
        raise ValueError(f"{path} {IS_POINTER}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"one object has {', '.join(twice)} twice; remove one")
    return values
