"""Text: the tokenizer, the conversation templates, and the targets of a conversation.

The tokenizer is sentencepiece itself, on the `tokenizer.model` of the Llama family. A conversation becomes token ids
span by span, so that which tokens are targets is known by construction and nothing is ever tokenized twice.

How a conversation is encoded (`compat=None`):
- A prompt is cut at its images. Each piece begins with a space (the "dummy prefix" of sentencepiece), as the prompt
  does; nothing is put in front of the text that follows a control token.
- An answer is a span of its own, from the space in front of it, so `prompt(...)` is always a prefix of `encode(...)`.
- Only the template makes control tokens: "</s>" in anybody's text is spelled in ordinary pieces.
- "<image>" in a question is one `IMAGE`, where it stands, however many there are; in an answer it is text.

`compat` names one history of LLaVA's tokenizer and gives its ids: there "<s>" and "</s>" inside a text are control
tokens, and the text after a control token
- "llava_437": has nothing in front (transformers >= 4.34, legacy=False: LLaVA's last pin, what users run);
- "llava_431": loses the space of its first piece as a string (transformers 4.31, legacy=False: LLaVA-1.5's training);
- "legacy": has a space in front (legacy=True).
"hf" gives the ids of transformers' own LLaVA (legacy=False, "<image>" one token): nothing is put in front of the text
after an image either, which is one token less an image. Where spaces stand in a row its ids can differ from these.
A record without control tokens in its texts has the same ids in the default mode and in "llava_437".
The ids are LLaVA's for vocabularies in which a space only begins a piece, such as Llama's and Mistral's.
Differs: chatml templates after the first answer, where "<|im_end|>" is no piece of its own. There LLaVA's ids run over
the end of an answer ("><" is one piece), and its trainer zeroed every such record; here the answer's span ends.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from os import PathLike
from pathlib import Path
from types import MappingProxyType

import sentencepiece

from llava_fn.batch import IMAGE
from llava_fn.errors import BadRecord

MARK = "<image>"
COMPAT = ("llava_437", "llava_431", "legacy", "hf")
ROLES = ("human", "gpt")  # as the records call them

_SPECIAL = re.compile("(<image>|</?s>)")
_SPACE = "\u2581"  # how sentencepiece writes a space
# The protobuf message ModelProto{normalizer_spec{add_dummy_prefix: false}}. Protobuf merges concatenated messages, so
# these bytes behind a model switch its dummy prefix off.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"

Turns = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Tokenizer:
    """A sentencepiece model, held as the bytes of its file; it pickles as those bytes.

    Raises ValueError if the bytes are no such model, or if it has no BOS, EOS or byte fallback, or drops spaces.
    """

    model: bytes = field(repr=False)
    _processor: sentencepiece.SentencePieceProcessor = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=self.model + _NO_DUMMY_PREFIX)
        except RuntimeError as error:
            raise ValueError(
                f"not a sentencepiece model (it begins with {self.model[:24]!r}). Give the tokenizer.model file of the"
                " checkpoint; tokenizer.json, tiktoken files and git-lfs pointers are something else"
            ) from error
        _check_model(processor)
        object.__setattr__(self, "_processor", processor)

    def __reduce__(self):
        return Tokenizer, (self.model,)

    @classmethod
    def from_bytes(cls, model: bytes) -> "Tokenizer":
        """The tokenizer whose `tokenizer.model` file holds these bytes (`.model` gives them back)."""
        return cls(bytes(model))

    @classmethod
    def load(cls, path: str | PathLike) -> "Tokenizer":
        """The tokenizer in the file `path`; ValueError names the file if it cannot be used."""
        try:
            return cls(Path(path).read_bytes())
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @property
    def vocab_size(self) -> int:
        """Number of pieces; every id is below it."""
        return self._processor.vocab_size()

    @property
    def bos(self) -> int:
        """Id of the token that begins a sequence."""
        return self._processor.bos_id()

    @property
    def eos(self) -> int:
        """Id of the token that ends an answer."""
        return self._processor.eos_id()

    def encode(self, text: str) -> list[int]:
        """The ids of `text` exactly as given: no BOS, no space in front, never a control token.

        Raises BadRecord for text that is not valid Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadRecord(f"text is not valid Unicode ({error}); repair it where it was written") from error
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without control tokens and without one leading space, the one that begins a span.

        Raises ValueError for an id outside the vocabulary, such as `IMAGE`.
        """
        for i, token in enumerate(ids):
            if not 0 <= token < self.vocab_size:
                what = "stands for an image" if token == IMAGE else f"is outside the vocabulary of {self.vocab_size}"
                raise ValueError(f"cannot decode: id {token} at position {i} {what}; decode the text around it")
        return self._processor.decode([int(token) for token in ids]).removeprefix(" ")

    def encode_stripped(self, text: str) -> list[int]:
        """The ids of `text` where it follows a control token in transformers 4.31 with legacy=False.

        There a space is put in front, and taken off the first piece again as a string, unless `text` begins with a
        space itself. What is left of the piece may be no piece: the unknown token.
        """
        ids = self.encode(" " + text)
        if text.startswith((" ", _SPACE)):
            return ids
        first = self._processor.id_to_piece(ids[0])[1:]
        return ([self._processor.piece_to_id(first)] if first else []) + ids[1:]


def _check_model(processor) -> None:
    if processor.bos_id() < 0 or processor.eos_id() < 0:
        raise ValueError("the sentencepiece model has no BOS or no EOS token, which every template needs")
    if processor.unk_id() in processor.encode("\U0010ffff"):
        raise ValueError("the sentencepiece model has no byte fallback: it would replace characters that it lacks")
    if processor.decode(processor.encode(" a  b ")) != " a  b ":
        raise ValueError("the sentencepiece model drops or merges spaces; a model of the Llama family keeps them")


@dataclass(frozen=True)
class Template:
    """The fixed text around the turns: `first` q `reply` `lead` a `end`, then `next` q `reply` `lead` a `end`, ...

    "<s>" and "</s>" in these fields are control tokens. `lead` and `end` belong to the answer and are targets with it.
    reserved: strings at which LLaVA cuts a conversation again to find the answers, so no answer may hold them.
    image: how one image of a question is written.
    caption: alignment pairs; the question is replaced by the image alone.
    around: what stands around a system prompt in `first`, if there is a place for one.
    """

    first: str
    next: str
    reply: str
    lead: str
    end: str
    reserved: tuple[str, ...]
    image: str = MARK
    caption: bool = False
    around: tuple[str, str] | None = None

    def with_system(self, system: str) -> "Template":
        """The same template with another system prompt; without one where it is empty.

        Raises BadRecord if there is no place for one, or if it holds an image or a control token.
        """
        if self.around is None:
            raise BadRecord("the template of this model has no place for a system prompt; put it into the question")
        held = _SPECIAL.search(system)
        if held:
            raise BadRecord(f"the system prompt holds {held[0]!r}; reword it, and put images into a question")
        before, after = self.around
        return replace(self, first=f"{before}{system}{after}" if system else self.next.removeprefix("<s>"))


def _roles(system: str, image: str = MARK) -> Template:
    """SeparatorStyle.TWO of LLaVA conversation.py."""
    reserved = (" ASSISTANT: ", "</s>")
    around = ("", " USER: ")
    return Template(system.join(around), "USER: ", " ASSISTANT:", " ", "</s>", reserved, image, around=around)


def _hashes(system: str, image: str = MARK) -> Template:
    """SeparatorStyle.SINGLE."""
    around = ("", "###Human: ")
    return Template(system.join(around), "Human: ", "###Assistant:", " ", "###", ("###",), image, around=around)


def _inst(system: str, bos: str) -> Template:
    """SeparatorStyle.LLAMA_2; LLaVA strips the `bos` of the first turn, because the tokenizer adds one."""
    around = ("[INST] <<SYS>>\n", "\n<</SYS>>\n\n") if system else None
    first = system.join(around) if around else "[INST] "
    return Template(first, f"{bos}[INST] ", " [/INST]", " ", " </s>", ("[/INST] ", "</s>"), around=around)


def _chatml(system: str) -> Template:
    """SeparatorStyle.MPT; its marks are control tokens only of a vocabulary that has them, else ordinary text."""
    user, reply, end = "<|im_start|>user\n", "<|im_end|><|im_start|>assistant\n", "<|im_end|>"
    around = ("<|im_start|>system\n", end + user)
    return Template(system.join(around), user, reply, "", end, (end,), around=around)


_PLAIN = Template("", "", "", "", "\n", (), caption=True)
_CURIOUS_USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_CURIOUS_HUMAN = _CURIOUS_USER.replace("user", "human")
_VISION = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
_SAFE = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
# No space after "natural language.": so it was trained.
_TAGS = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant is able to understand the "
    "visual content that the user provides, and assist the user with a variety of tasks using natural language."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
_TAGGED = f"<Image>{MARK}</Image>"

# Each is named as in LLaVA conversation.py, but for "hf", the prompt of transformers' documentation. LLaVA's trainer
# wrote the two "v0" layouts differently ("### Human: "); here they are as it served them.
TEMPLATES: Mapping[str, Template] = MappingProxyType({
    "plain": _PLAIN,
    "v0_plain": _PLAIN,
    "vicuna_v1": _roles(_CURIOUS_USER),
    "v1": _roles(_CURIOUS_USER),
    "llava_v1": _roles(_CURIOUS_HUMAN),
    "hf": Template(
        "USER: ", "USER: ", " ASSISTANT:", " ", "</s>", (" ASSISTANT: ", "</s>"), around=("", " USER: ")
    ),
    "v1_mmtag": _roles(_TAGS, _TAGGED),
    "llava_v0": _hashes(_CURIOUS_HUMAN),
    "v0_mmtag": _hashes(_TAGS, _TAGGED),
    "llama_2": _inst(_SAFE, "<s>"),
    "llava_llama_2": _inst(_VISION, "<s>"),
    "mistral_instruct": _inst("", ""),
    "chatml_direct": _chatml("Answer the questions."),
    "mistral_direct": _chatml("Answer the questions."),
    "mpt": _chatml(
        "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
    ),
})


def template_of(name: str) -> Template:
    """The template called `name`; ValueError lists the names if there is none.

    Differs: LLaVA falls back to vicuna_v1.
    """
    if name not in TEMPLATES:
        raise ValueError(f"no conversation template {name!r}; there are: {', '.join(sorted(TEMPLATES))}")
    return TEMPLATES[name]


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
    ours: bool  # written by the template, not by a person


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
    """The prompt as text, for people and logs: `Conversation.get_prompt` of LLaVA, with the last turn open or not.

    Raises BadRecord if the turns do not alternate or one of them is empty.
    """
    _check_turns(turns)
    return "".join(part.text for part in _parts(turns, template))


def encode(turns: Turns, template: Template, tokenizer: Tokenizer, compat: str | None = None) -> Encoded:
    """The tokens and targets of a whole conversation, for training.

    turns: ("human", text), ("gpt", text), ... ending with an answer; "<image>" in a question is an image.
    Targets of a chat template are the answers and the "</s>" (or other end) after each; of "plain", the caption and
    its newline, without EOS.
    Raises BadRecord for what LLaVA drops, zeroes or garbles silently: empty turns, a template's separators inside an
    answer, images in an answer, and with `compat` also separators or "<unk>" in any text and several images in a turn.
    Source: LLaVA train.py preprocess_plain, preprocess_v1, preprocess_llama_2, preprocess_mpt.
    Differs: separators in a question are ordinary text unless `compat` is given; a turn of spaces counts as empty.
    """
    _check_turns(turns)
    _check_answered(turns)
    _check_images(turns)
    _check_texts(turns, template, compat)
    return _tokenize(_parts(turns, template), tokenizer, compat)


def prompt(turns: Turns, template: Template, tokenizer: Tokenizer, compat: str | None = None) -> list[int]:
    """The tokens up to where the answer to the last question begins, for inference ("... ASSISTANT:", no space).

    turns: as for `encode`, but ending with a question. Raises BadRecord if they do not alternate or one is empty.
    """
    _check_turns(turns)
    if len(turns) % 2 == 0:
        raise BadRecord("a prompt ends with a question, but the last turn is an answer")
    return _tokenize(_parts(turns, template), tokenizer, compat).ids


def pieces(parts: Sequence[str | None], tokenizer: Tokenizer, compat: str | None = None) -> list[int]:
    """The tokens of a prompt that is cut at its images already; None stands for an image.

    A text is spelled as it is, "<image>" and "</s>" in it too; an empty one counts for nothing.
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


def _atoms(parts: Iterator[_Part], tokenizer: Tokenizer, compat: str | None) -> Iterator[tuple[str | int, bool]]:
    """Each part cut into text and single tokens, with its mark; nothing is empty."""
    control = {"<s>": tokenizer.bos, "</s>": tokenizer.eos}
    for part in parts:
        for text in filter(None, _SPECIAL.split(part.text)):
            if text == MARK and not part.supervised:
                yield IMAGE, False
            elif text in control and (part.ours or compat is not None):
                yield control[text], part.supervised
            else:
                yield text, part.supervised


def _tokenize(parts: Iterator[_Part], tokenizer: Tokenizer, compat: str | None) -> Encoded:
    if compat is not None and compat not in COMPAT:
        raise ValueError(f"no compat {compat!r}; there are: None, {', '.join(COMPAT)}")
    ids, supervised = [tokenizer.bos], [False]
    after = "start"
    for (is_text, target), group in groupby(_atoms(parts, tokenizer, compat), lambda a: (isinstance(a[0], str), a[1])):
        atoms = [atom for atom, _ in group]
        new = _encode_after(after, "".join(atoms), tokenizer, compat) if is_text else atoms
        after = "text" if is_text else "image" if atoms[-1] == IMAGE else "control"
        ids += new
        supervised += [target] * len(new)
    return Encoded(ids, supervised)


def _encode_after(after: str, text: str, tokenizer: Tokenizer, compat: str | None) -> list[int]:
    """The ids of one span, by what stands before it: nothing, an image, a control token, or more text."""
    if after == "start" or (after == "image" and compat != "hf") or (after == "control" and compat == "legacy"):
        return tokenizer.encode(" " + text)
    if after == "control" and compat == "llava_431":
        return tokenizer.encode_stripped(text)
    return tokenizer.encode(text)


def images_of(record: Mapping) -> list[str]:
    """The image paths of a LLaVA record: none, its "image", or each of a list; BadRecord if it is anything else."""
    image = record.get("image", [])
    paths = [image] if isinstance(image, str) else image
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise BadRecord(f"'image' is {image!r}; give a path, a list of paths, or leave it out for text")
    return paths


def turns_of(record: Mapping) -> list[tuple[str, str]]:
    """The turns of one record of the LLaVA schema, checked, with its images in place.

    record: {"image"?: path or paths, "conversations": [{"from": "human" | "gpt", "value": text}, ...]}; other keys are
    ignored. The one image of a question is moved to its front, "<image>\\n" + text, as LLaVA trains it; several
    images in a question stay where they stand.
    Raises BadRecord, giving the reason only: the caller adds the file and the record's id.
    Source: LLaVA train.py preprocess_multimodal.
    Differs: LLaVA drops a leading gpt turn and all but one image of a turn, and does not count images.
    """
    if not isinstance(record, Mapping):
        raise BadRecord(f"a record is an object with 'conversations', not {type(record).__name__}")
    conversations = record.get("conversations")
    if not isinstance(conversations, list) or not conversations:
        raise BadRecord("'conversations' is missing, empty or no list")
    turns = [_turn(i, turn) for i, turn in enumerate(conversations)]
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
