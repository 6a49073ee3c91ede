"""Conversation templates: the fixed text around the turns of a conversation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from llava_fn.errors import BadRecord

MARK = "<image>"  # an image, in records and in templates
SPECIAL = re.compile("(<image>|</?s>)")


@dataclass(frozen=True)
class Template:
    """The text around questions q and answers a: `first` q `reply` `lead` a `end` `next` q `reply` `lead` a `end` ...

    "<s>" and "</s>" in these fields are control tokens. `lead` and `end` belong to the answer and are targets with it.
    reserved: strings at which LLaVA splits a conversation to find the answers, so no answer may hold them.
    image: the text for an image of a question.
    caption: an image and its caption; the question is replaced by the image alone.
    around: the text before and behind a system prompt in `first`; None if there is no place for one.
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

    def with_system(self, system: str) -> Template:
        """The same template with another system prompt; without one where it is empty.

        Raises BadRecord if there is no place for one, or if it holds an image or a control token.
        """
        if self.around is None:
            raise BadRecord("the template of this model has no place for a system prompt; put it into the question")
        held = SPECIAL.search(system)
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
TEMPLATES: Mapping[str, Template] = MappingProxyType(
    {
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
            "A conversation between a user and an LLM-based AI assistant. "
            "The assistant gives helpful and honest answers."
        ),
    }
)


def template_of(name: str) -> Template:
    """The template called `name`; ValueError lists the names if there is none.

    Differs: LLaVA falls back to vicuna_v1.
    """
    if name not in TEMPLATES:
        raise ValueError(f"no conversation template {name!r}; there are: {', '.join(sorted(TEMPLATES))}")
    return TEMPLATES[name]
