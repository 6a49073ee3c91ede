"""A growing answer is decoded piece by piece: its text is that of all its tokens at once, after each of them."""

import importlib.util
import random
from pathlib import Path

import pytest

from llava_fn.data.tokenizer import read_tokenizer
from llava_fn.generate.conversation import WINDOW, GrowingText, text_of


def of_llamas_kind():
    package = importlib.util.find_spec("mistral_common")
    return read_tokenizer(Path(package.submodule_search_locations[0]) / "data/tokenizer.model.v1")


def token_of(rng, t, data):
    """A byte, a space, a control token, or any."""
    kinds = data, [b for b in data if t.piece(b)[3] in "EF"], [*t.encode(" "), *t.encode("  "), t.bos, t.eos, 0]
    return rng.choice([*map(rng.choice, kinds), rng.randrange(t.vocab_size)])


def answer_of(rng, t, data):
    if rng.random() < 0.5:
        return [token_of(rng, t, data) for _ in range(rng.randint(1, 40))]
    ids = [i for char in rng.choices("é€😀日 \ufffda", k=15) for i in t.encode(char)]
    return ids[: (cut := rng.randint(0, len(ids)))] + [token_of(rng, t, data)] * rng.randint(0, 2) + ids[cut:]


@pytest.mark.parametrize("goes_on", [False, True])
@pytest.mark.parametrize("kind", ["own", "llamas"])
def test_the_text_after_each_token_is_that_of_all_tokens_at_once(kind, goes_on, tokenizer):
    t, rng = of_llamas_kind() if kind == "llamas" else tokenizer, random.Random(len(kind))
    data = [i for i in range(t.vocab_size) if t.piece(i).startswith("<0x")]
    for ids in [[data[0x80]] * 30, *(answer_of(rng, t, data) for _ in range(80))]:
        grown = GrowingText(t, goes_on)
        for n, token in enumerate(ids, 1):
            grown = grown.grow([token])
            assert grown.text == text_of(t, ids[:n], goes_on), ids[:n]
            assert len(grown.window) <= WINDOW
