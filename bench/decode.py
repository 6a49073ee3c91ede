"""Time of generation with a cache: prefill and decoding steps, ours and Hugging Face transformers', in turns.

    python bench/decode.py --rows 1 --context 600 --new 32

Both have the same random weights, and every row is continued greedily by `new` tokens from its own `context` random
ones; the tokens must agree in fp32. A step is bound by memory: it reads every weight of the blocks and the head once,
and the keys and values so far. The last column is the share of the device's copy bandwidth that this comes to. Figures
are medians over rounds with lower and upper quartile, in wall seconds; on a card, sizes are those of the 7B. Needs the
test extra.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from operations import ceilings, find_device
from tensordict import TensorDict
from transformers import LlamaConfig, LlamaForCausalLM

from llava_fn import config, llama, spec, tree
from llava_fn.batch import Stream
from llava_fn.cache import Cache
from llava_fn.kernels import check

MODELS = {
    "small": config.Llama(vocab=1024, width=512, blocks=8, heads=8, kv_heads=8, ffn=1376),
    "7b": config.LLAVA_7B.llama,
}


@dataclass(frozen=True)
class Bench:
    """One comparison."""

    model: Literal["small", "7b"] = "small"
    rows: int = 1
    context: int = 600  # tokens of a row before the first new one
    new: int = 32
    rounds: int = 5
    dtype: Literal["float32", "bfloat16"] = "float32"
    json: bool = False


def make_peer(c: config.Llama, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    """transformers' Llama with random weights."""
    torch.manual_seed(0)
    about = LlamaConfig(
        vocab_size=c.vocab, hidden_size=c.width, intermediate_size=c.ffn, num_hidden_layers=c.blocks,
        num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, rms_norm_eps=c.eps, max_position_embeddings=4096,
        eos_token_id=None,
    )  # fmt: skip
    with device:
        return LlamaForCausalLM(about).eval().to(dtype)


def weights(peer: LlamaForCausalLM, c: config.Llama) -> TensorDict:
    """The peer's tensors under our names; nothing is copied."""
    names = {
        "norm1": "input_layernorm", "norm2": "post_attention_layernorm", "wq": "self_attn.q_proj",
        "wk": "self_attn.k_proj", "wv": "self_attn.v_proj", "wo": "self_attn.o_proj", "w_gate": "mlp.gate_proj",
        "w_up": "mlp.up_proj", "w_down": "mlp.down_proj",
    }  # fmt: skip
    state = peer.state_dict()
    outer = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}

    def leaf(path: tuple[str, ...], _) -> torch.Tensor:
        if path[0] == "blocks":
            return state[f"model.layers.{path[1]}.{names[path[2]]}.weight"]
        return state[outer[path[0]]]

    return spec.build(llama.spec(c), leaf)


@torch.no_grad()
def ours(p: TensorDict, ids: torch.Tensor, new: int, c: config.Llama) -> tuple[list[float], torch.Tensor]:
    """(seconds of the prefill and of each step, new tokens: rows new)."""
    b, n = ids.shape
    stream = Stream.of([n] * b, [1] * b).to(ids.device)
    marks = [now(ids.device)]
    cache = Cache.empty(c, b, n + new, p["embed"])
    x, cache = llama.prefill(p, p["embed"][ids.flatten()], stream, cache, c)
    out = [llama.logits(p, x, c).argmax(-1)]
    marks.append(now(ids.device))
    for _ in range(new - 1):
        x, cache = llama.decode_step(p, out[-1], cache, c)
        out.append(llama.logits(p, x, c).argmax(-1))
        marks.append(now(ids.device))
    return [b - a for a, b in zip(marks, marks[1:], strict=False)], torch.stack(out, 1)


@torch.no_grad()
def theirs(peer: LlamaForCausalLM, ids: torch.Tensor, new: int) -> tuple[list[float], torch.Tensor]:
    """The same by the peer's forward pass and its own cache, without the checks of `generate`."""
    marks = [now(ids.device)]
    said = peer(input_ids=ids, use_cache=True, logits_to_keep=1)
    out = [said.logits[:, -1].argmax(-1)]
    marks.append(now(ids.device))
    for _ in range(new - 1):
        said = peer(input_ids=out[-1][:, None], past_key_values=said.past_key_values, use_cache=True)
        out.append(said.logits[:, -1].argmax(-1))
        marks.append(now(ids.device))
    return [b - a for a, b in zip(marks, marks[1:], strict=False)], torch.stack(out, 1)


def now(device: torch.device) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def main(c: Bench) -> list[dict]:
    """Print the table, or JSON; return its rows."""
    device, dtype, model = find_device(), getattr(torch, c.dtype), MODELS[c.model]
    peer = make_peer(model, device, dtype)
    p = weights(peer, model)
    ids = torch.randint(3, model.vocab, (c.rows, c.context), generator=torch.Generator().manual_seed(0)).to(device)
    times: dict[str, list[list[float]]] = {"ours": [], "transformers": []}
    for turn in range(c.rounds + 1):
        (a, mine), (b, other) = ours(p, ids, c.new, model), theirs(peer, ids, c.new)
        if turn:  # the first warms up
            times["ours"].append(a)
            times["transformers"].append(b)
    same = float((mine == other).float().mean())
    keys = 2 * model.blocks * c.rows * (c.context + c.new // 2) * model.kv_heads * model.head
    moved = (sum(x.numel() for x in tree.values(p)) - p["embed"].numel() + keys) * dtype.itemsize
    copy, found = ceilings(device, dtype)[0], []
    for name, rounds in times.items():
        low, middle, high = statistics.quantiles([t for r in rounds for t in r[1:]], n=4)
        found.append({
            "who": name, "prefill ms": 1e3 * statistics.median(r[0] for r in rounds), "step ms": 1e3 * middle,
            "step spread": f"{1e3 * low:.3g} to {1e3 * high:.3g}", "tokens/s": c.rows / middle,
            "GB/s": moved / middle / 1e9, "share of copy": moved / middle / copy,
        })  # fmt: skip
    about = check.machine(device) | {"threads": torch.get_num_threads(), "same tokens": same} | vars(c)
    print(json.dumps({"about": about, "rows": found}) if c.json else f"{about}\n\n{check.show(found)}")
    return found


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))
