"""A conversation as token ids, and which of them are targets.

A conversation becomes token ids span by span, so that which tokens are targets is known by construction and nothing is
ever tokenized twice.

How a conversation is encoded (`compat=None`):
- A prompt is cut at its images. Each piece begins with a space (the "dummy prefix" of sentencepiece), as the prompt
  does; nothing is put in front of the text that follows a control token.
- An answer is a span of its own, from the space in front of it, so `prompt(...)` is always a prefix of `encode(...)`.
- Only the template makes control tokens: "</s>" in anybody's text is spelled in ordinary pieces.
- "<image>" in a question is one `IMAGE`, where it stands, however many there are; in an answer it is text.

`compat` names one version of LLaVA's tokenization and gives its ids: there "<s>" and "</s>" inside a text are control
tokens, and the text after a control token
- "llava_437": has nothing in front (transformers >= 4.34, legacy=False: LLaVA's last pin, what users run);
- "llava_431": loses the space of its first piece as a string (transformers 4.31, legacy=False: LLaVA-1.5's training);
- "legacy": has a space in front (legacy=True).
"hf" gives the ids of transformers' own LLaVA (legacy=False, "<image>" one token): nothing is put in front of the text
after an image either, which is one token less an image. Where several spaces stand in a row its ids can differ.
A record without control tokens in its texts has the same ids in the default mode and in "llava_437".
The ids are LLaVA's for vocabularies in which a space only begins a piece, such as Llama's and Mistral's.
Differs: chatml templates after the first answer, where "<|im_end|>" is no piece of its own. There LLaVA's ids run over
the end of an answer ("><" is one piece), and its trainer zeroed every such record; here the answer's span ends.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from llava_fn.batch import IMAGE
from llava_fn.data import schema
from llava_fn.data.templates import MARK, SPECIAL, Template
from llava_fn.data.tokenizer import Tokenizer
from llava_fn.errors import BadRecord

COMPAT = ("llava_437", "llava_431", "legacy", "hf")
ROLES = ("human", "gpt")  # as the records call them

Turns = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Encoded:
    """One conversation as tokens.

    ids: int[t], BOS first, `IMAGE` once for each image.
    supervised: bool[t], True where the token itself is a target (not shifted): answers and what ends them.
    """

    ids: list[int]
    supervised: list[bool]


@dataclass(frozen=True)
class _Part:
    text: str
    supervised: bool
    fixed: bool  # text of the template, not of a turn


def _parts(turns: Turns, template: Template) -> Iterator[_Part]:
    if template.caption:
        _check_caption(turns)
    for i, (_, text) in enumerate(turns):
        if i % 2 == 0:
            question = MARK if template.caption else text.replace(MARK, template.image)
            yield _Part(template.next if i else template.first, False, True)
            yield _Part(question, False, False)
            yield _Part(template.reply, False, True)
        else:
            yield _Part(template.lead, True, True)
            yield _Part(text, True, False)
            yield _Part(template.end, True, True)


def render(turns: Turns, template: Template) -> str:
    """The conversation as text, for people and logs. The last turn may be a question. Source: LLaVA get_prompt.

    Raises BadRecord if the turns do not alternate or one of them is empty.
    """
    _check_turns(turns)
    return "".join(part.text for part in _parts(turns, template))


def encode(turns: Turns, template: Template, tokenizer: Tokenizer, compat: str | None = None) -> Encoded:
    """The tokens and targets of a whole conversation, for training.

    turns: ("human", text), ("gpt", text), ... ending with an answer; "<image>" in a question is an image.
    Targets of a chat template are the answers and the "</s>" (or other end) after each; of "plain", the caption and
    its newline, without EOS.
    Raises BadRecord for what LLaVA silently drops, zeroes or garbles: empty turns, a template's separators inside an
    answer, images in an answer, and with `compat` also separators or "<unk>" in any text and several images in a turn.
    Source: LLaVA train.py preprocess_plain, preprocess_v1, preprocess_llama_2, preprocess_mpt.
    Differs: separators in a question are ordinary text unless `compat` is given; a turn of spaces counts as empty.
    """
    _check_turns(turns)
    _check_answered(turns)
    _check_images(turns)
    _check_texts(turns, template, compat)
    return _tokenize(_parts(turns, template), tokenizer, compat)


def prompt(
    turns: Turns, template: Template, tokenizer: Tokenizer, compat: str | None = None, goes_on: bool = False
) -> list[int]:
    """The tokens of a conversation up to the answer of its last question, for inference ("... ASSISTANT:", no space).

    turns: as for `encode`, but ending with a question or, with `goes_on`, with the beginning of an answer. Raises
    BadRecord if they do not, if they do not alternate, or if one is empty.
    """
    _check_turns(turns)
    if goes_on != (len(turns) % 2 == 0):
        ends, last = ("an answer that goes on", "a question") if goes_on else ("a question", "an answer")
        raise BadRecord(f"a prompt ends with {ends}, but the last turn is {last}")
    parts = list(_parts(turns, template))
    return _tokenize(iter(parts[:-1] if goes_on else parts), tokenizer, compat).ids


def raw(prompt: str, tokenizer: Tokenizer, compat: str | None = None) -> list[int]:
    """The tokens of a prompt as it stands, with BOS in front: "<s>" and "</s>" in it are control tokens."""
    return _tokenize(iter([_Part(prompt, False, True)]), tokenizer, compat).ids


def pieces(parts: Sequence[str | None], tokenizer: Tokenizer, compat: str | None = None) -> list[int]:
    """The tokens of a prompt that is already cut at its images; None stands for an image.

    A text becomes ordinary tokens, "<image>" and "</s>" in it too; an empty text is left out.
    Source: LLaVA mm_utils.py tokenizer_image_token, which cuts at every "<image>".
    """
    ids, after = [tokenizer.bos], "start"
    for part in parts:
        ids += [IMAGE] if part is None else _encode_after(after, part, tokenizer, compat) if part else []
        after = "image" if part is None else "text" if part else after
    return ids


def _check_turns(turns: Turns) -> None:
    if not turns:
        raise BadRecord("the conversation is empty")
    for i, (role, text) in enumerate(turns):
        if role != ROLES[i % 2]:
            raise BadRecord(f"turn {i} is from {role!r}; turns alternate, 'human' first and then 'gpt'")
        if not text.strip():
            raise BadRecord(f"turn {i} ({role}) is empty, which spoils the prompt; remove the question and its answer")


def _check_caption(turns: Turns) -> None:
    marks = turns[0][1].count(MARK)
    if len(turns) > 2 or marks != 1:
        raise BadRecord(
            f"template 'plain' takes one question with one {MARK} and its caption, but this has {len(turns)} turns and "
            f"{marks} {MARK} in the first; use a chat template"
        )


def _check_answered(turns: Turns) -> None:
    if len(turns) % 2:
        raise BadRecord("the last question has no answer; add one or remove the question")


def _check_texts(turns: Turns, template: Template, compat: str | None) -> None:
    for i, (role, text) in enumerate(turns):
        forbidden = template.reserved if compat or role == "gpt" else ()
        for mark in forbidden + (("<unk>",) if compat else ()):
            if mark in f" {text} ":  # the template puts spaces around
                raise BadRecord(f"turn {i} ({role}) holds {mark!r}, at which LLaVA loses the answers; reword it")
        if compat and text.count(MARK) > 1:
            raise BadRecord(
                f"turn {i} ({role}) holds {text.count(MARK)} {MARK}; LLaVA would have dropped all but one, so "
                f"compat={compat!r} cannot encode it; use compat=None"
            )


def _check_images(turns: Turns) -> None:
    for i, (role, text) in enumerate(turns):
        if role == "gpt" and MARK in text:
            raise BadRecord(f"turn {i} (gpt) holds {MARK}; images belong to questions")
        if role == "human" and (mark := schema.foreign(text)):
            raise BadRecord(
                f"turn {i} (human) has {mark!r}, another tool's mark of what is not there; {MARK} is an image"
            )


def _atoms(parts: Iterator[_Part], tokenizer: Tokenizer, compat: str | None) -> Iterator[tuple[str | int, bool]]:
    """(text or control token or IMAGE, whether it is a target) of each part; no text is empty."""
    control = {"<s>": tokenizer.bos, "</s>": tokenizer.eos}
    for part in parts:
        for text in filter(None, SPECIAL.split(part.text)):
            if text == MARK and not part.supervised:
                yield IMAGE, False
            elif text in control and (part.fixed or compat is not None):
                yield control[text], part.supervised
            else:
                yield text, part.supervised


def _tokenize(parts: Iterator[_Part], tokenizer: Tokenizer, compat: str | None) -> Encoded:
    if compat is not None and compat not in COMPAT:
        raise ValueError(f"no compat {compat!r}; there are: None, {', '.join(COMPAT)}")
    ids, supervised = [tokenizer.bos], [False]
    after = "start"
    for (_, target), group in groupby(_atoms(parts, tokenizer, compat), lambda a: (isinstance(a[0], str), a[1])):
        atoms = [atom for atom, _ in group]
        words, tokens = "".join(a for a in atoms if isinstance(a, str)), [a for a in atoms if isinstance(a, int)]
        new = tokens or _encode_after(after, words, tokenizer, compat)
        after = "text" if not tokens else "image" if tokens[-1] == IMAGE else "control"
        ids += new
        supervised += [target] * len(new)
    return Encoded(ids, supervised)


def _encode_after(after: str, text: str, tokenizer: Tokenizer, compat: str | None) -> list[int]:
    """The ids of a span of text. after: what stands before it: "start", "image", "control" or "text"."""
    if after == "start" or (after == "image" and compat != "hf") or (after == "control" and compat == "legacy"):
        return tokenizer.encode(" " + text)
    if after == "control" and compat == "llava_431":
        return tokenizer.encode_stripped(text)
    return tokenizer.encode(text)


def images_of(record: Mapping) -> list[str]:
    """The image paths of a LLaVA record: none, its "image" or "images", a path or a list; BadRecord for anything else.

    null and an empty text mean none.
    """
    given = {key: record[key] for key in ("image", "images") if schema.is_set(record.get(key))}
    for key, value in given.items():
        paths = [value] if isinstance(value, str) else value
        if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
            raise BadRecord(f"{key!r} is {reprlib.repr(value)}; give a path, a list of paths, or leave it out for text")
        given[key] = paths
    if len(given) == 2 and given["image"] != given["images"]:
        raise BadRecord(f"'image' and 'images' differ: {reprlib.repr(given)}; keep one of them")
    return next(iter(given.values()), [])


def system_of(record: Mapping) -> str:
    """The system prompt of a LLaVA record: its "system", or the text of a first turn from "system"; else empty.

    BadRecord if it is no text, or if both differ.
    """
    turns = record["conversations"]
    own = record["system"] if schema.is_set(record.get("system")) else ""
    first = turns[0].get("value") if turns[0].get("from") == "system" else own
    if not isinstance(own, str) or not isinstance(first, str):
        odd = first if isinstance(own, str) else own
        raise BadRecord(f"'system' is {reprlib.repr(odd)}; it must be a text")
    if own and first != own:
        raise BadRecord("'system' and the first turn, which is from 'system', differ; keep one of them")
    return first


def template_for(record: Mapping, template: Template, compat: str | None = None) -> Template:
    """The template with the record's own system prompt, if it has one. BadRecord if there is no place for it."""
    system = system_of(record)
    for mark in template.reserved + ("<unk>",) if compat else ():
        if mark in f" {system} ":
            raise BadRecord(f"the system prompt holds {mark!r}, at which LLaVA loses the answers; reword it")
    return template.with_system(system) if system else template


def turns_of(record: Mapping) -> list[tuple[str, str]]:
    """The turns of one record of the LLaVA schema, checked, with its images in place.

    record: {"image"?: path or paths, "system"?: text, "conversations": [{"from": "human" | "gpt", "value": text}, ...]}
    and other keys, see schema.py. A first turn from "system" is left to `system_of`. The one image of a question is
    moved to its front, "<image>\\n" + text, as LLaVA trains it; several images in a question stay where they stand.
    Raises BadRecord, giving the reason only: the caller adds the file and the record's id.
    Source: LLaVA train.py preprocess_multimodal.
    Differs: LLaVA drops a leading gpt turn and all but one image of a turn, and does not count images.
    """
    if not isinstance(record, Mapping):
        raise BadRecord(f"a record is an object with 'conversations', not {type(record).__name__}")
    conversations = record.get("conversations")
    if not isinstance(conversations, list) or not conversations:
        raise BadRecord("'conversations' is missing, empty or no list")
    if unseen := schema.flaws(record):
        raise BadRecord("; ".join(unseen))
    first = int(isinstance(conversations[0], Mapping) and conversations[0].get("from") == "system")
    turns = [_turn(i, turn) for i, turn in enumerate(conversations[first:], first)]
    _check_turns(turns)
    _check_answered(turns)
    _check_images(turns)
    paths, marks = images_of(record), sum(text.count(MARK) for _, text in turns)
    if marks != len(paths):
        raise BadRecord(f"{len(paths)} images in 'image' but {marks} {MARK} in the questions; make them agree")
    return turns


def _turn(i: int, turn: object) -> tuple[str, str]:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
        raise BadRecord(f"turn {i} is not an object with 'from' and a text 'value'")
    if turn.get("from") not in ROLES:
        raise BadRecord(f"turn {i} is from {turn.get('from')!r}; 'from' is 'human' or 'gpt'")
    return turn["from"], _image_first(turn["value"])


def _image_first(text: str) -> str:
    if text.count(MARK) != 1:
        return text
    return f"{MARK}\n{text.replace(MARK, '').strip()}".strip()
