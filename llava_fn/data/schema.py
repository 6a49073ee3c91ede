"""What each key of a record, and of a turn in it, means to training, and the marks of other tools in its texts.

used       conversations, image, images, system; of a turn, from and value
refused    media, instructions and weights of the loss under any other name, if they are set, and any unknown key whose
           value names a media file that is not one of the record's images: training would go on without them
unread     all other keys: what people note about a record, such as id, model or source. They change nothing, and
           `unread` names them for whoever trains
A key is set unless it is null, NaN, "", [] or {}, which exporters of tables write into every row.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from llava_fn import fields
from llava_fn.fields import FREE, Field, Table

EMPTY = (None, "", [], {})
MEDIA = """image_path image_paths image_file image_files image_url image_urls img imgs img_path picture pictures
pixel_values video videos video_path video_url video_file audio audios audio_path audio_url audio_file sound speech
frames depth mask masks point_cloud""".split()
TEXTS = "messages history system_prompt system_message tools functions".split()
WEIGHTS = "loss weight loss_weight sample_weight train".split()  # of a record's or a turn's share in the loss
FILE = re.compile(
    r"\.(?:jpe?g|png|gif|webp|bmp|tiff?|ppm|jp2|heic|avif|svg|mp4|avi|mov|mkv|webm|wav|mp3|flac|ogg|m4a|npy)$|^data:\w+/",
    re.IGNORECASE,
)
LONGEST = 1024  # characters of a path or an address
_FOREIGN = r"""
    <(?:video|audio|speech|sound|img|picture|vid|image_placeholder|image_?here|image_?patch|im_patch|im_start|img_context
        |image_soft_token|image[ _]?\d+)>
    | <\|(?:image|video|audio|vision_start|image_pad|video_pad|audio_pad|(?:image|video|audio)_\d+)\|>
    | \[IMG\]
    | (?!(?-i:<image>))<image>
"""
FOREIGN = re.compile(_FOREIGN, re.VERBOSE | re.IGNORECASE)
ALONE = re.compile(rf"\A\s*({_FOREIGN})|\n[ \t]*({_FOREIGN})\s*\Z", re.VERBOSE | re.IGNORECASE)


def is_set(value: Any) -> bool:
    """Whether a key with this value says anything."""
    return value not in EMPTY and value == value


def _unset(value: Any) -> bool:
    return not is_set(value) or value is False


def _weighs(weight: int) -> Field:
    """A weight that changes nothing."""
    wanted = f"only {weight} is supported: training gives all answers one weight, and questions none"
    return Field(lambda value: not is_set(value) or value == weight, wanted)


def _table(used: Iterable[str], **more: Field) -> Table:
    media = Field(_unset, "media of this name are not read; move images to 'image', or remove the record")
    texts = Field(_unset, "it is not read; put it into 'conversations' or 'system', or remove the key")
    advice = "it names a file that is not read; move it to 'image' if it should be seen, or remove the key"
    other = Field(lambda value: not any(map(FILE.search, _texts(value))), advice)
    return {
        **dict.fromkeys(used, FREE), **dict.fromkeys(MEDIA, media), **dict.fromkeys(TEXTS, texts),
        **dict.fromkeys(WEIGHTS, _weighs(1)), fields.OTHER: other, **more,
    }  # fmt: skip


USED = ("image", "images", "system", "conversations")
PLAIN_RECORD = {"id", *USED}
PLAIN_TURN = {"from", "value"}
RECORD = _table(PLAIN_RECORD)
_IMAGE = Field(_unset, "images are named by the record's 'image', in the order of their <image>")
ANSWER = _table(PLAIN_TURN, image=_IMAGE, images=_IMAGE)
QUESTION = {**ANSWER, **dict.fromkeys(WEIGHTS, _weighs(0))}


def flaws(record: Mapping[str, Any]) -> list[str]:
    """One text for each key of a record, or of a turn, that says something which training would not see."""
    own = {_last(text) for key in ("image", "images") for text in _texts(record.get(key))}
    out = [] if record.keys() <= PLAIN_RECORD else fields.flaws(_without(record, own), RECORD)
    for i, turn in enumerate(_turns(record)):
        if not turn.keys() <= PLAIN_TURN:  # seldom
            out += fields.flaws(_without(turn, own), ANSWER if turn.get("from") == "gpt" else QUESTION, f"turn {i}: ")
    return out


def unread(record: Any) -> list[str]:
    """The keys that are set and change nothing: "model", "conversations: markdown"."""
    if not isinstance(record, dict):
        return []
    out = [key for key in record if key not in RECORD and is_set(record[key])]
    for turn in _turns(record):
        if not turn.keys() <= PLAIN_TURN:
            out += [f"conversations: {key}" for key in turn if key not in ANSWER and is_set(turn[key])]
    return list(dict.fromkeys(out))


def _turns(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    turns = record.get("conversations")
    return [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []


def _texts(value: Any) -> Iterator[str]:
    """The texts in a value that may be paths, addresses or files themselves."""
    if isinstance(value, str):
        if len(value) <= LONGEST or value.startswith("data:"):
            yield value[:LONGEST].strip()
    elif isinstance(value, (Mapping, list)):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(inner)


def _last(path: str) -> str:
    return path.replace("\\", "/").rpartition("/")[2]


def _without(values: Mapping[str, Any], own: set[str]) -> dict[str, Any]:
    """The keys but those that only say again where the record's own images are, or where they came from."""
    return {key: value for key, value in values.items() if not (own and value and _is_origin(value, own))}


def _is_origin(value: Any, own: set[str]) -> bool:
    texts = [value] if isinstance(value, str) else value
    return isinstance(texts, list) and all(
        isinstance(text, str) and (_last(text) in own or text.startswith(("http://", "https://"))) for text in texts
    )


def foreign(question: str) -> str | None:
    """The mark of another tool that a question begins with, or that is its last line: it stands for something unseen.

    Elsewhere such a mark may be what a conversation is about, as <video> is in one about HTML.
    """
    found = ALONE.search(question)
    return found and (found[1] or found[2])
