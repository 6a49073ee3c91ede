"""Time of a training step: ours and Hugging Face transformers', same weights, same samples, in turns, in one process.

    python bench/step.py --model prop --stage projector --threads 1

The peer is LlavaForConditionalGeneration as it is usually trained: a right-padded batch with a mask, sdpa attention,
towers frozen by requires_grad, torch.optim.AdamW. Both begin with the same losses, which are printed; then each round
times one step of each. The figure is CPU seconds of the process (with one thread: work done, whatever else the machine
does) and, with more threads or on a card, wall seconds. The last line is the ratio of medians. Needs the test extra.

    python bench/step.py --model wide --stage lora

compares adapters and the projector with PEFT's, and with our own steps of a frozen decoder and of one that is trained.

    python bench/step.py --device cuda --model 7b --dtype bfloat16 --samples 16

is LLaVA-1.5's pre-training on a card, with random weights: the peer's frozen parts are in bf16 too, its projector and
ours in fp32. It also prints samples a second, the share of the rate of a large matrix product (floating-point
operations counted by torch's FlopCounterMode in our step), and memory above what is resident between steps.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from operations import ceilings
from tensordict import TensorDict
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from llava_fn import config, llava, lora, optim, spec, tree, vit
from llava_fn.batch import IMAGE, Batch, Sample, collate
from llava_fn.parallel.zero import Zero
from llava_fn.train import Task, TrainState, train_step, trains
from llava_fn.weights import peft
from llava_fn.weights.model import from_state_dict

LLAMA = {"width": 512, "blocks": 8, "heads": 8, "kv_heads": 8, "ffn": 1376}
MODELS = {
    "brief": config.Llava(  # a large vocabulary weighs most
        config.Vision(image=224, width=384, blocks=6, heads=6, ffn=1536), config.Llama(vocab=32000, **LLAMA)
    ),
    "prop": config.Llava(  # head, image tower and decoder have the shares of LLaVA-1.5-7B
        config.Vision(image=336, width=128, blocks=8, heads=2, ffn=512), config.Llama(vocab=1024, **LLAMA)
    ),
    "wide": config.Llava(  # blocks a quarter as wide as the 7B's; few tokens but those of pictures
        config.Vision(image=336, width=128, blocks=4, heads=2, ffn=512),
        config.Llama(vocab=1024, width=1024, blocks=4, heads=16, kv_heads=16, ffn=2752),
    ),
    "7b": config.LLAVA_7B,
}
OPTIM = optim.Optim(lr=1e-4)
OURS = {"frozen decoder": "projector", "whole decoder": "projector+llama"}  # what adapters are compared with
HF_IMAGE = 3  # the id of the peer's placeholder


@dataclass(frozen=True)
class Bench:
    """One comparison."""

    model: Literal["brief", "prop", "wide", "7b"] = "prop"
    device: Literal["cpu", "cuda", "npu"] = "cpu"
    stage: Literal["projector", "projector+llama", "lora"] = "projector"  # lora: the projector, and adapters
    rank: int = 16  # of adapters
    samples: int = 4  # per step
    threads: int = 1
    rounds: int = 7
    compile: str = ""  # backend for our blocks, e.g. inductor; the peer stays eager
    dtype: Literal["float32", "bfloat16"] = "float32"


def make_samples(c: config.Llava, stage: str, n: int) -> list[Sample]:
    """Pre-training: an image and a caption of 12 to 40 tokens. Fine-tuning: 45 tokens of prompt, 20 to 80 of answer."""
    rng = torch.Generator().manual_seed(0)
    prompt, low, high = (0, 12, 40) if stage == "projector" else (45, 20, 80)
    out = []
    for j in range(n):
        answer = int(torch.randint(low, high + 1, (1,), generator=rng))
        words = torch.randint(4, c.llama.vocab, (prompt + answer,), generator=rng).tolist()
        ids = [1, *[IMAGE] * c.vision.patches, *words]
        label = [False] * (len(ids) - answer) + [True] * answer
        pixels = torch.randint(0, 256, (1, 3, c.vision.image, c.vision.image), generator=rng, dtype=torch.uint8)
        out.append(Sample(str(j), tuple(ids), tuple(label), pixels))
    return out


def peer_model(model: config.Llava, c: Bench) -> LlavaForConditionalGeneration:
    """The peer with random weights; on a card and for bf16, all but the projector in bf16."""
    v, t = model.vision, model.llama
    vision = CLIPVisionConfig(
        hidden_size=v.width, intermediate_size=v.ffn, num_hidden_layers=v.blocks, num_attention_heads=v.heads,
        image_size=v.image, patch_size=v.patch,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=t.vocab, hidden_size=t.width, intermediate_size=t.ffn, num_hidden_layers=t.blocks,
        num_attention_heads=t.heads, num_key_value_heads=t.kv_heads, rms_norm_eps=t.eps,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    both = LlavaConfig(vision_config=vision, text_config=text, image_token_id=HF_IMAGE, image_seq_length=v.patches)
    with torch.device(c.device):
        peer = LlavaForConditionalGeneration(both).train()
    if c.device != "cpu" and c.dtype == "bfloat16":
        peer.bfloat16().model.multi_modal_projector.float()
    return peer


def adapted(model: torch.nn.Module, rank: int) -> torch.nn.Module:
    """The peer with PEFT's adapters at every linear of the decoder, and with its projector trained."""
    from peft import LoraConfig, get_peft_model  # it takes seconds to import

    projector = ["multi_modal_projector"]
    how = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=peft.DECODER, modules_to_save=projector)
    return get_peft_model(model, how)


def peer_step(model: torch.nn.Module, samples: list[Sample], c: Bench, o: optim.Optim) -> Callable[[int], float]:
    """One step of the usual kind, from its number to its loss."""
    longest = max(len(s.ids) for s in samples)
    ids, labels, mask = (torch.full((len(samples), longest), fill) for fill in (0, -100, 0))
    for row, s in enumerate(samples):
        n, tokens = len(s.ids), torch.tensor(s.ids)
        ids[row, :n] = torch.where(tokens == IMAGE, HF_IMAGE, tokens)
        labels[row, :n] = torch.where(torch.tensor(s.label), tokens, -100)
        mask[row, :n] = 1
    pixels = vit.normalise(torch.cat([s.pixels for s in samples]))
    ids, labels, mask, pixels = (x.to(c.device) for x in (ids, labels, mask, pixels))
    if c.stage == "lora":
        model = adapted(model, c.rank)
    else:
        for name, p in model.named_parameters():
            p.requires_grad = "multi_modal_projector" in name or (c.stage != "projector" and "vision_tower" not in name)
    adamw = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.0)

    def step(number: int) -> float:
        for group in adamw.param_groups:
            group["lr"] = optim.learning_rate(o, number, 100)
        with torch.autocast(c.device, torch.bfloat16, enabled=c.dtype == "bfloat16"):
            loss = model(input_ids=ids, labels=labels, attention_mask=mask, pixel_values=pixels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adamw.param_groups[0]["params"], o.clip)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return loss.item()

    return step


def our_step(params: TensorDict, batch: Batch, model: config.Llava, c: Bench, stage: str) -> Callable[[int], float]:
    """One step of ours, from its number to its loss."""
    dtype, adapters = getattr(torch, c.dtype), config.Lora(c.rank, 2.0 * c.rank) if stage == "lora" else None
    parts = ("projector", "lora") if adapters else config.STAGES[stage]
    if adapters:
        params = tree.merge(params, spec.init({"lora": lora.spec(llava.spec(model), adapters)}, 0).to(c.device))
    mine, frozen = tree.split(params, trains(parts))
    mine = tree.rebuild(mine, [leaf.detach().clone() for leaf in tree.values(mine)])
    run = llava.execution(backend=c.compile, vision=model.vision)
    task = Task(tree.cast(frozen, dtype), model, OPTIM, 100, Zero(dtype=dtype), run=run, lora=adapters)
    state = [TrainState(0, mine, optim.init(mine))]

    def step(number: int) -> float:
        state[0], metrics = train_step(state[0], [batch], task)
        return metrics.loss

    return step


def timed(step: Callable[[int], float], number: int, c: Bench) -> tuple[float, float]:
    """(seconds of this step, bytes that it needs above what is resident; 0 on a CPU)."""
    if c.device == "cpu":
        clock = time.process_time if c.threads == 1 else time.perf_counter
        began = clock()
        step(number)
        return clock() - began, 0.0
    torch.accelerator.synchronize()
    torch.accelerator.reset_peak_memory_stats()
    resident, began = torch.accelerator.memory_allocated(), time.perf_counter()
    step(number)
    torch.accelerator.synchronize()
    return time.perf_counter() - began, torch.accelerator.max_memory_allocated() - resident


def on_a_card(c: Bench, seconds: dict[str, float], memory: dict[str, float], flops: int) -> str:
    """Samples a second, share of the rate of a matrix product, memory."""
    _, rate = ceilings(torch.device(c.device), getattr(torch, c.dtype))
    return "\n".join(
        f"{name}: {c.samples / t:.1f} samples/s, {flops / t / 1e12:.0f} of {rate / 1e12:.0f} TFLOP/s "
        f"({flops / t / rate:.1%}), {memory[name] / 2**30:.1f} GiB above the weights"
        for name, t in seconds.items()
    )


def main(c: Bench) -> float:
    """Print both times of each round and the ratio; return it."""
    torch.set_num_threads(c.threads)
    model = MODELS[c.model]
    samples, peer = make_samples(model, c.stage, c.samples), peer_model(model, c)
    params = from_state_dict(peer.state_dict(), model)
    batch = collate(samples).to(torch.device(c.device))
    pair = {"ours": our_step(params, batch, model, c, c.stage)}
    if c.stage == "lora":
        pair |= {name: our_step(params, batch, model, c, stage) for name, stage in OURS.items()}
    pair["transformers"] = peer_step(peer, samples, c, OPTIM)
    for number in (1, 2, 3):  # also the warm-up
        print(f"loss of step {number}: " + ", ".join(f"{name} {step(number):.6f}" for name, step in pair.items()))
    with FlopCounterMode(display=False) as counter:
        pair["ours"](4)
    times: dict[str, list[float]] = {name: [] for name in pair}
    memory = dict.fromkeys(pair, 0.0)
    for number in range(5, 5 + c.rounds):
        for name, step in pair.items():
            seconds, memory[name] = timed(step, number, c)
            times[name].append(seconds)
        print("  ".join(f"{name} {t[-1]:.3f} s" for name, t in times.items()), flush=True)
    medians = {name: statistics.median(t) for name, t in times.items()}
    ours, theirs = medians["ours"], medians["transformers"]
    if c.device != "cpu":
        print(on_a_card(c, medians, memory, counter.get_total_flops()))
    kind = "CPU" if c.threads == 1 and c.device == "cpu" else "wall"
    for name in OURS.keys() & medians.keys():
        print(f"{name}: {medians[name]:.3f} s, ours {ours / medians[name]:.2f} of it")
    print(f"{c}\nmedian {kind} seconds: ours {ours:.3f}, transformers {theirs:.3f}; ratio {theirs / ours:.2f}")
    return theirs / ours


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))
