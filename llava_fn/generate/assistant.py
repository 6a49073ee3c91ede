"""A model that one can talk to: weights of any layout, their template, pictures, turns, and answers as text.

    a = load(ChatOptions((Path("llava-1.5-7b-hf"),)))
    chat = ask(Chat(), "What is shown?", [picture("cat.jpg", a)])
    for said in reply(a, chat, Decoding()):
        print(said.new, end="")
    chat = ask(said.chat, "And what colour is it?")

A Chat is a value, but for the tensors of its cache: only the newest of a conversation may be continued.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image
from tensordict import TensorDict
from torch import Tensor

from llava_fn import linear, llama, tree
from llava_fn.batch import IMAGE
from llava_fn.cache import Cache
from llava_fn.config import Llava
from llava_fn.data import image, text
from llava_fn.data.templates import MARK, template_of
from llava_fn.data.tokenizer import Tokenizer, open_tokenizer
from llava_fn.errors import BadRecord
from llava_fn.generate import decode as generate
from llava_fn.generate.options import PRESETS, ChatOptions, Decoding, Form, ModelOptions
from llava_fn.generate.types import Answer, Decoder, PartialAnswer, Prompt, Words
from llava_fn.launch.device import pick_device
from llava_fn.parallel.collectives import TP
from llava_fn.parallel.mesh import Mesh
from llava_fn.weights import model
from llava_fn.weights.source import Weights, open_source

KEPT = 256  # images whose features are kept for when they come again


@dataclass(frozen=True)
class Assistant:
    """A model in memory, and what goes with it."""

    params: TensorDict
    model: Llava
    tokenizer: Tokenizer
    form: Form
    trained: str  # the template that it was trained with, as its files say
    context: int = 4096  # tokens of a conversation at most, image positions included
    run: Decoder = Decoder()


@dataclass(frozen=True)
class Placement:
    """Where a model's parameters go, and as what. mesh: its tensor axis shards the decoder."""

    device: torch.device
    dtype: torch.dtype
    mesh: Mesh = Mesh()
    int8: bool = False  # quantise the decoder's linears; see linear.py
    compile: str = ""  # the backend of torch.compile for a step of decoding

    @staticmethod
    def of(m: ModelOptions, mesh: Mesh = Mesh()) -> Placement:
        """What the options ask for. ValueError if the device is not there."""
        device = pick_device(m.device)
        name = m.dtype if m.dtype != "auto" else "float32" if device.type == "cpu" else "bfloat16"
        return Placement(device, getattr(torch, name), mesh, m.quantise == "int8", m.compile)

    @property
    def precision(self) -> str:
        """The name of the dtype: float32, bfloat16 or float16."""
        return str(self.dtype).removeprefix("torch.")


def load(m: ChatOptions, mesh: Mesh = Mesh()) -> Assistant:
    """The model that the options name, in memory, or this rank's shard of it.

    The options' preset, template and image mode overrule what the files say. ValueError if a part, the tokenizer or the
    form is in none of the files.
    """
    weights = open_weights(m.weights)
    return place(weights, form_of(weights, m.preset, m.template, m.image_mode), Placement.of(m, mesh), m.context)


def open_weights(paths: Sequence[Path]) -> Weights:
    """Files and folders of any layout as the weights of one model; no tensor is read yet.

    A run's folder stands for its newest checkpoint. ValueError if a part or the tokenizer is in none of them.
    """
    weights = model.merge([open_source(path) for path in paths])
    model.config(weights)
    if "projector" not in weights.parts:
        raise ValueError(f"{weights.where} does not bring the projector; name a file that does too")
    if weights.tokenizer is None:
        raise ValueError(f"{weights.where} brings no tokenizer.model; put that file into its folder")
    return weights


def place(weights: Weights, form: Form, to: Placement, context: int = 4096) -> Assistant:
    """The model in memory, or this rank's shard of it.

    ValueError if the decoder does not divide over the mesh, or if there is no such backend of torch.compile.
    """
    c, axis = model.config(weights), to.mesh.tp
    llama.check_tp(c.llama, axis.size)
    run = Decoder(TP(axis, sequence=False), generate.compiled_step(to.compile))
    params = model.load(weights, to.mesh)
    if to.int8:
        params = linear.quantise(params, to.device, to.dtype, axis)
    else:
        params = tree.rebuild(params, [leaf.to(to.device, to.dtype) for leaf in tree.values(params)])
    assert weights.tokenizer is not None  # open_weights has checked it
    tokenizer = open_tokenizer(weights.tokenizer)
    return Assistant(params, c, tokenizer, form, weights.template or form.template, context, run)


def form_of(
    weights: Weights, preset: str | None = None, template: str | None = None, image_mode: str | None = None
) -> Form:
    """The form that the preset or else the files name, with `template` and `image_mode` in place of its own.

    ValueError if a template or an image mode is named nowhere.
    """
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"no preset {preset!r}; there are: {', '.join(PRESETS)}")
    base = PRESETS[preset] if preset else Form(weights.template or "", weights.image_mode or "", weights.compat)
    form = replace(base, template=template or base.template, image_mode=image_mode or base.image_mode)
    if not form.template or not form.image_mode:
        raise ValueError(f"{weights.where} does not say its template or its image mode; give them, or a preset")
    template_of(form.template)
    return form


def warning(a: Assistant) -> str:
    """What a person should know of this model before they talk to it, or nothing."""
    if not template_of(a.trained).caption:
        return ""
    return (
        f"warning: these weights are of stage 1 (pre-training, template {a.trained!r}): they caption one image and "
        "were never trained to follow a question; a model of stage 2 (instruction tuning) does"
    )


@dataclass(frozen=True)
class Picture:
    """pixels: uint8[3, image, image]. key: the same for the same pixels."""

    pixels: Tensor
    key: str


def picture(source: str | Path | bytes | Image.Image, a: Assistant, name: str | None = None) -> Picture:
    """A picture from a path, the bytes of a file, a data URL of base64, or an image open in Pillow.

    Raises BadRecord for what is no image, and for one above image.MAX_PIXELS.
    """
    if isinstance(source, Image.Image):
        img = image.to_rgb(source, name or "image")
    elif isinstance(source, str) and source.startswith("data:"):
        img = image.from_base64(source, name or "data URL")
    else:
        img = image.open_image(source, name)
    pixels = image.to_pixels(img, a.model.vision.image, a.form.image_mode, name or "image")
    return Picture(pixels, hashlib.sha256(pixels.numpy().tobytes()).hexdigest())


@dataclass(frozen=True)
class Chat:
    """A conversation, and what is worth keeping of its computation."""

    turns: tuple[tuple[str, str], ...] = ()  # ("human", text), ("gpt", text), ...
    pictures: tuple[Picture, ...] = ()  # in the order of their marks
    system: str | None = None  # instead of the template's own system prompt
    feats: Mapping[str, Tensor] = field(default_factory=dict)  # of pictures, key -> f[p, d]
    cache: Cache | None = None  # of one row
    held: tuple[int | str, ...] = ()  # the token, or the picture's key, at each position that the cache holds


def ask(chat: Chat, question: str, pictures: Sequence[Picture] = ()) -> Chat:
    """With one more question. Its pictures stand where it says "<image>", or in front of it if it never does.

    Raises BadRecord if there are marks and their number is not that of the pictures.
    """
    marks = question.count(MARK)
    if marks and marks != len(pictures):
        raise BadRecord(f"{marks} {MARK} in the question but {len(pictures)} images; make them agree")
    if not marks:
        question = f"{MARK}\n" * len(pictures) + question if question.strip() else MARK * len(pictures)
    return replace(chat, turns=(*chat.turns, ("human", question)), pictures=(*chat.pictures, *pictures))


def undo(chat: Chat) -> Chat:
    """Without the last question, its pictures and its answer; as it is if there is none."""
    asked = [i for i, (role, _) in enumerate(chat.turns) if role == "human"]
    if not asked:
        return chat
    marks = chat.turns[asked[-1]][1].count(MARK)
    return replace(chat, turns=chat.turns[: asked[-1]], pictures=chat.pictures[: len(chat.pictures) - marks])


def features(a: Assistant, pictures: Sequence[Picture], known: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """key -> f[p, d] of these pictures and the newest others that were known; only new ones are computed."""
    new = {s.key: s.pixels for s in pictures if s.key not in known}
    made = {}
    if new:
        pixels = torch.stack(list(new.values())).to(a.params["projector"]["w1"].device)
        parts = generate.features(a.params, pixels, a.model).split(a.model.vision.patches)
        made = dict(zip(new, parts, strict=True))
    wanted = {s.key for s in pictures}
    others = {key: f for key, f in known.items() if key not in wanted}
    return dict(list(others.items())[-KEPT:]) | {key: f for key, f in known.items() if key in wanted} | made


def prompt(a: Assistant, chat: Chat, d: Decoding) -> tuple[Prompt, tuple[int | str, ...]]:
    """The prompt of a conversation that ends with a question, and the token or picture's key at each position.

    chat: its features are there. Raises BadRecord for more or fewer marks than pictures, and for a prompt that leaves
    no room in the context for `d.tokens` more; nothing is ever cut.
    """
    template = template_of(a.form.template)
    if chat.system is not None:
        template = template.with_system(chat.system)
    ids = text.prompt(chat.turns, template, a.tokenizer, a.form.compat)
    return laid_out(a, ids, chat.pictures, chat.feats, d)


def laid_out(
    a: Assistant, ids: Sequence[int], pictures: Sequence[Picture], feats: Mapping[str, Tensor], d: Decoding
) -> tuple[Prompt, tuple[int | str, ...]]:
    """`prompt` of the tokens of text, with IMAGE once for each picture. feats: of each picture."""
    if ids.count(IMAGE) != len(pictures):
        raise BadRecord(f"the prompt has {ids.count(IMAGE)} {MARK} but {len(pictures)} images; make them agree")
    patches, left = a.model.vision.patches, iter(pictures)
    keys = [key for i in ids for key in ([next(left).key] * patches if i == IMAGE else [i])]
    if len(keys) + d.tokens > a.context:
        raise BadRecord(
            f"the prompt has {len(keys)} tokens, {patches * len(pictures)} of them for {len(pictures)} "
            f"images; with tokens={d.tokens} for the answer that is over the context of {a.context}; "
            "shorten it, ask for fewer tokens, or begin a new conversation"
        )
    none = a.params["llama"]["embed"][:0]
    feats = torch.cat([none, *(feats[s.key] for s in pictures)])
    return Prompt(tuple(IMAGE if isinstance(key, str) else key for key in keys), feats), tuple(keys)


def words(a: Assistant) -> Words:
    """What ends an answer of this template besides EOS, where it is one token."""
    end = a.tokenizer.encode(template_of(a.form.template).end)
    return Words.of(a.tokenizer, *(end if len(end) == 1 else ()))


def stops(a: Assistant, d: Decoding) -> Decoding:
    """The options with the text that ends an answer of this template among the stop texts."""
    end = template_of(a.form.template).end
    return d if "</s>" in end else replace(d, stop=(*d.stop, end))


def shown(whole: str, stop: Sequence[str], ended: bool) -> str:
    """How much of an answer can be shown: up to a stop text, and before its end nothing that may still change.

    That is a character whose bytes are not all there, and what may become a stop text.
    """
    cut = min((whole.index(s) for s in stop if s in whole), default=None)
    if cut is not None or ended:
        return whole[:cut]
    whole = whole.rstrip("\ufffd")
    longest = max((n for s in stop for n in range(len(s)) if whole.endswith(s[:n])), default=0)
    return whole[: len(whole) - longest]


def _cache(a: Assistant, size: int) -> Cache:
    return Cache.empty(a.model.llama, 1, size, a.params["llama"]["embed"], a.run.tp.axis.size)


@dataclass(frozen=True)
class Said:
    """A piece of an answer. chat: the conversation with the answer as far as it goes."""

    new: str
    chat: Chat
    ended: bool = False


def reply(a: Assistant, chat: Chat, d: Decoding) -> Iterator[Said]:
    """The answer to the last question, piece by piece; only tokens that the cache does not hold are computed.

    It can be left at any time: the last `chat` holds what was said. Left before there is one, the cache that it was
    given may be spoilt: go on without it. ValueError for beams or several samples.
    """
    if d.beams > 1 or d.samples > 1:
        raise ValueError("an answer that is shown as it grows has one sample and no beams; leave them out")
    d, vocabulary = stops(a, d), words(a)
    chat = replace(chat, feats=features(a, chat.pictures, chat.feats))
    asked, keys = prompt(a, chat, d)
    held = common(keys[:-1], chat.held)
    size = generate.room([asked], d)
    cache = chat.cache.grown(size) if chat.cache else _cache(a, size)
    state = generate.prefill(a.params, [asked], cache, vocabulary, a.model, [held], a.run)
    before, row = "", PartialAnswer()
    steps = generate.steps(a.params, state, d, [d.seed], a.model, a.run)
    for t, ((token, *logprobs),) in enumerate(generate.on_host(steps)):
        fed = (*keys, *row.ids[:t])
        row = row.grow(int(token), logprobs, d, vocabulary)
        ended = row.ended or t + 1 == d.tokens
        now = shown(a.tokenizer.decode(row.ids), d.stop, ended)
        turns = (*chat.turns, ("gpt", now.strip()))
        yield Said(now[len(before) :], replace(chat, turns=turns, cache=state.cache, held=fed), ended)
        before = now
        if ended:
            return


def common(a: Sequence, b: Sequence) -> int:
    """Length of the longest beginning that two sequences share."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@dataclass(frozen=True)
class Text:
    """One answer as text. ids and logprobs: of its tokens, a stop text included. score: of a beam."""

    text: str
    ids: tuple[int, ...]
    ended: bool
    logprobs: tuple[float, ...] = ()
    score: float | None = None


def answers(a: Assistant, chats: Sequence[Chat], d: Decoding, seeds: Sequence[int] | None = None) -> list[list[Text]]:
    """`d.samples` answers to the last question of each conversation, in one batch. Missing features are computed."""
    known = features(a, [s for chat in chats for s in chat.pictures], {k: f for c in chats for k, f in c.feats.items()})
    chats = [replace(chat, feats=known) for chat in chats]
    return answers_to(a, [prompt(a, chat, d)[0] for chat in chats], d, seeds)


def answers_to(
    a: Assistant, prompts: Sequence[Prompt], d: Decoding, seeds: Sequence[int] | None = None
) -> list[list[Text]]:
    """`answers` to prompts that are laid out already."""
    d = stops(a, d)
    rows = generate.generate(a.params, prompts, d, words(a), a.model, seeds, a.run)
    return [[_text(a, r, d) for r in row] for row in rows]


def _text(a: Assistant, r: Answer, d: Decoding) -> Text:
    return Text(shown(a.tokenizer.decode(r.ids), d.stop, True), *(getattr(r, f.name) for f in dataclasses.fields(r)))
