"""(B) Forward and backward on tensors without memory: the real dispatcher, autograd formulas and shape rules."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch_npu
from record import Log
from tensordict import TensorDict
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore

from llava_fn import config, kernels, linear, llama, llava, lora, optim, spec, train, tree
from llava_fn.batch import Batch, Stream
from llava_fn.cache import Cache
from llava_fn.config import STAGES
from llava_fn.grad import remat, scan, value_and_grad
from llava_fn.kernels import Held, Segments
from llava_fn.kernels.decode import masked
from llava_fn.linear import Kind
from llava_fn.parallel import vocab
from llava_fn.parallel.collectives import TP
from llava_fn.parallel.mesh import Axis, Mesh
from llava_fn.parallel.zero import Zero

BF16 = torch.bfloat16
SMALL = config.Llava(config.Vision(blocks=3), config.Llama(blocks=2, kv_heads=8))
SEGMENTS = Segments((300, 40, 1), (300, 300, 40))
UNFUSED = {  # what an op of kernels/ runs as where its fused form is not taken
    "aten::silu", "aten::gelu", "aten::sigmoid", "aten::rsqrt", "aten::pow.Tensor_Scalar", "aten::bmm",
    "aten::_softmax", "aten::_log_softmax", "aten::nll_loss_forward", "aten::addcmul", "aten::convolution",
    "aten::sqrt", "aten::lerp",
    "aten::silu_backward", "aten::gelu_backward", "aten::_log_softmax_backward_data", "aten::_softmax_backward_data",
    "npu::npu_fusion_attention_v3", "aten::scaled_dot_product_attention",
}  # fmt: skip


def E(*shape, dtype=BF16, grad=False):
    return torch.empty(*shape, dtype=dtype, device="npu", requires_grad=grad)


def G(*shape, dtype=BF16):
    return E(*shape, dtype=dtype, grad=True)


class Group:
    """What parallel_linear.py asks of a process group of two."""

    def size(self):
        return 2

    def rank(self):
        return 0

    def _get_backend(self, device):
        assert device.type == "npu"
        return self

    def get_hccl_comm_name(self, rank):
        return "group"


def qkv(n=32, m=32, h=128, dtype=BF16):
    return G(341, n, h, dtype=dtype), G(640, m, h, dtype=dtype), G(640, m, h, dtype=dtype)


TABLES = {"dtype": torch.float32}
CASES = {  # name -> (arguments, call, shapes of the results, the fused ops in order)
    "causal attention": (qkv, lambda *x: kernels.attention(*x, SEGMENTS, True), [(341, 32, 128)],
                         ["npu_fusion_attention", "npu_fusion_attention_grad"]),
    "grouped attention": (lambda: qkv(32, 8), lambda *x: kernels.attention(*x, SEGMENTS, True), [(341, 32, 128)],
                          ["npu_fusion_attention", "npu_fusion_attention_grad"]),
    "full attention, heads of 64": (lambda: qkv(16, 16, 64), lambda *x: kernels.attention(*x, SEGMENTS, False),
                                    [(341, 16, 64)], ["npu_fusion_attention", "npu_fusion_attention_grad"]),
    "fp32 attention": (lambda: qkv(dtype=torch.float32), lambda *x: kernels.attention(*x, SEGMENTS, True),
                       [(341, 32, 128)], ["npu_fusion_attention", "npu_fusion_attention_grad"]),
    "RMSNorm": (lambda: (G(9, 4096), G(4096)), lambda *x: kernels.rms_norm(*x, 1e-5), [(9, 4096)],
                ["npu_rms_norm", "npu_rms_norm_backward"]),
    "RMSNorm, fp32 gain": (lambda: (G(9, 4096), G(4096, dtype=torch.float32)), lambda *x: kernels.rms_norm(*x, 1e-5),
                           [(9, 4096)], ["npu_rms_norm", "npu_rms_norm_backward"]),
    "add and RMSNorm": (lambda: (G(9, 64), G(9, 64), G(64)), lambda *x: kernels.add_rms_norm(*x, 1e-5),
                        [(9, 64), (9, 64)], ["npu_add_rms_norm", "npu_rms_norm_backward"]),
    "rotary": (lambda: (G(9, 32, 128), E(9, 1, 128, **TABLES), E(9, 1, 128, **TABLES)), kernels.rotary, [(9, 32, 128)],
               ["npu_rotary_mul", "npu_rotary_mul_backward"]),
    "SwiGLU, many rows": (lambda: (G(99, 64), G(160, 64), G(160, 64)), kernels.swiglu, [(99, 160)],
                          ["npu_swiglu", "npu_swiglu_backward"]),
    "SwiGLU, few rows": (lambda: (G(9, 64), G(160, 64), G(160, 64)), kernels.swiglu, [(9, 160)],
                         ["npu_swiglu", "npu_swiglu_backward"]),
    "quick GELU": (lambda: (G(9, 64),), kernels.quick_gelu, [(9, 64)], ["npu_fast_gelu", "npu_fast_gelu_backward"]),
    "erf GELU": (lambda: (G(9, 64),), kernels.gelu, [(9, 64)], ["npu_gelu", "npu_gelu_backward"]),
    "LayerNorm": (lambda: (G(9, 64), G(64), G(64)), lambda *x: kernels.layer_norm(*x, 1e-5), [(9, 64)], []),
    "patch embedding": (lambda: (E(2, 3, 336, 336), G(1024, 588)), lambda *x: kernels.patch_embedding(*x, 14),
                        [(2, 576, 1024)], []),
    "column linear": (lambda: (G(8, 512), E(256, 512)), lambda *x: kernels.column_linear(*x, Group()), [(16, 256)],
                      ["npu_all_gather_base_mm", "npu_mm_reduce_scatter_base"]),
    "row linear": (lambda: (G(16, 512), G(256, 512)), lambda *x: kernels.row_linear(*x, Group()), [(8, 256)],
                   ["npu_mm_reduce_scatter_base", "npu_all_gather_base_mm"]),
    "fp32 decoding": (lambda: (G(2, 8, 64, **TABLES), G(2, 9, 4, 64, **TABLES), G(2, 9, 4, 64, **TABLES)),
                      lambda *x: masked(*x, Held(E(2, dtype=torch.int64))), [(2, 8, 64)],
                      ["npu_fusion_attention", "npu_fusion_attention_grad"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_op_keeps_shape_dtype_and_device_forward_and_backward(fake, name):
    make, call, shapes, fused = CASES[name]
    args = make()
    log = Log()
    with log:
        out = call(*args)
        out = out if isinstance(out, tuple) else (out,)
        assert [(tuple(x.shape), x.dtype, x.device.type) for x in out] == [(s, args[0].dtype, "npu") for s in shapes]
        leaves = [x for x in args if x.requires_grad]
        grads = torch.autograd.grad(out, leaves, [torch.empty_like(x) for x in out])
    for x, g in zip(leaves, grads, strict=True):
        assert (g.shape, g.dtype, g.device) == (x.shape, x.dtype, x.device)
    assert list(log.fused) == fused and set(log.fused.values()) <= {1}
    assert not UNFUSED & log.ops.keys()


def test_cross_entropy_keeps_fp32_from_bf16_logits(fake):
    logits, targets = G(7, 32000), E(7, dtype=torch.int64)
    with Log() as log:
        loss = kernels.cross_entropy(logits, targets)
        (g,) = torch.autograd.grad(loss.sum(), logits)
    assert (loss.shape, loss.dtype) == ((7,), torch.float32) and (g.shape, g.dtype) == (logits.shape, BF16)
    assert list(log.fused) == ["npu_cross_entropy_loss", "npu_cross_entropy_loss_backward"]
    assert not UNFUSED & log.ops.keys()


def held(table=None) -> Held:
    return Held.of(E(2, dtype=torch.int64), 4096, table, (5, 9))


def test_decoding_takes_the_inference_kernel_in_bf16_and_the_training_kernel_in_fp32(fake):
    for dtype, op in ((BF16, "npu_fused_infer_attention_score"), (torch.float32, "npu_fusion_attention")):
        with Log() as log:
            x = kernels.decode_attention(
                E(2, 32, 128, dtype=dtype), *(E(2, 4096, 8, 128, dtype=dtype) for _ in "kv"), held()
            )
        assert (x.shape, x.dtype, x.device.type) == ((2, 32, 128), dtype, "npu") and list(log.fused) == [op]


def test_int8_linears_take_the_fused_product_in_half_precision(fake):
    codes, scale = E(172, 64, dtype=torch.int8), E(172, 1, dtype=torch.float32)
    for dtype, ops in ((BF16, ["npu_weight_quant_batchmatmul"]), (torch.float32, [])):
        with Log() as log:
            y = kernels.int8_linear(E(2, 3, 64, dtype=dtype), codes, scale)
        assert (y.shape, y.dtype, y.device.type) == ((2, 3, 172), dtype, "npu") and list(log.fused) == ops


def test_decoding_refuses_to_drop_a_gradient(fake):
    with pytest.raises(ValueError, match="it gives no gradient, silently"):
        kernels.decode_attention(G(2, 32, 128), *(E(2, 4096, 8, 128) for _ in "kv"), held())


def raw_attention(x):
    return torch_npu.npu_fusion_attention(x, x, x, 4, "TND", actual_seq_qlen=[8], actual_seq_kvlen=[8])[0]


RAW = {  # the op as torch_npu has it -> how its gradient fares: this is why some are wrapped
    "npu_fusion_attention": (lambda: G(8, 4, 64), raw_attention, "given"),
    "npu_rms_norm": (lambda: G(8, 64), lambda x: torch_npu.npu_rms_norm(x, E(64), 1e-5)[0], "given"),
    "npu_rotary_mul": (lambda: G(1, 8, 4, 64), lambda x: torch_npu.npu_rotary_mul(x, *[E(1, 8, 1, 64)] * 2), "given"),
    "npu_swiglu": (lambda: G(8, 64), torch_npu.npu_swiglu, "given"),
    "npu_fast_gelu": (lambda: G(8, 64), torch_npu.npu_fast_gelu, "given"),
    "npu_gelu": (lambda: G(8, 64), torch_npu.npu_gelu, "given"),
    "npu_cross_entropy_loss": (
        lambda: G(8, 64, dtype=torch.float32),
        lambda x: torch_npu.npu_cross_entropy_loss(x, E(8, dtype=torch.int64), reduction="none")[0], "given",
    ),
    "npu_add_rms_norm": (lambda: G(8, 64), lambda x: torch_npu.npu_add_rms_norm(x, E(8, 64), E(64))[0], "refused"),
    "npu_fused_infer_attention_score": (
        lambda: G(2, 1, 4, 64),
        lambda x: torch_npu.npu_fused_infer_attention_score(
            x, *[E(2, 9, 4, 64)] * 2, num_heads=4, input_layout="BSND"
        )[0], "dropped",
    ),
    "npu_scatter_pa_kv_cache": (
        lambda: G(2, 4, 64),
        lambda x: [c := E(9, 16, 4, 64), torch_npu.npu_scatter_pa_kv_cache(
            x, x, c, c, E(2, dtype=torch.int64), cache_mode="Norm"
        )][0], "dropped",
    ),
    "npu_weight_quant_batchmatmul": (
        lambda: G(8, 64),
        lambda x: torch_npu.npu_weight_quant_batchmatmul(x, E(64, 32, dtype=torch.int8), E(1, 32)), "dropped",
    ),
    "npu_all_gather_base_mm": (
        lambda: G(8, 512), lambda x: torch_npu.npu_all_gather_base_mm(x, E(512, 64), "group", 2)[0], "dropped",
    ),
    "npu_mm_reduce_scatter_base": (
        lambda: G(8, 512), lambda x: torch_npu.npu_mm_reduce_scatter_base(x, E(512, 64), "group", 2), "dropped",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("op", RAW)
def test_which_ops_of_torch_npu_have_a_gradient(fake, op):
    make, call, fate = RAW[op]
    x = make()
    try:
        y = call(x)
        (g,) = torch.autograd.grad(y.sum(), x, allow_unused=True)
        found = "dropped" if g is None else "given"
    except RuntimeError as error:
        found = "refused" if "is not implemented" in str(error) else "dropped"
        assert found == "refused" or "does not require grad" in str(error)
    assert found == fate


def test_a_real_npu_tensor_cannot_be_made():
    with pytest.raises(RuntimeError):
        torch.ones(4).npu()


def params(c: config.Llava, dtype, mesh=Mesh(), adapters: config.Lora | None = None) -> TensorDict:
    """Parameters without memory, this rank's shards."""

    def leaf(path, p):
        sizes = [part.stop - part.start for part in spec.shard(p, mesh)]
        return torch.empty(sizes, dtype=dtype, device="npu")

    return spec.build(lora.extended(llava.spec(c), adapters), leaf)


def stream_of(lengths, tails=None) -> Stream:
    """Made on the host, where lengths are numbers."""
    with unset_fake_temporarily():
        real = Stream.of(lengths, tails)
    return replace(real, **{name: E(len(getattr(real, name)), dtype=torch.int64) for name in ("positions", "read")})


def make_batch(c: config.Llava, captions=(20, 40)) -> Batch:
    """One image and one caption a sample."""
    lengths = [1 + c.vision.patches + n for n in captions]
    stream, total = stream_of(lengths, [n + 1 for n in captions]), sum(captions)
    return Batch(
        ("a", "b"), stream, E(sum(lengths), dtype=torch.int64),
        E(len(captions), 3, c.vision.image, c.vision.image, dtype=torch.uint8),
        *(E(n, dtype=torch.int64) for n in (len(captions) * c.vision.patches, total, total)),
        sum(lengths),
    )  # fmt: skip


def step_ops(
    c: config.Llava, parts: Sequence[str], adapters: config.Lora | None = None, kind: Kind | None = None
) -> Log:
    """Every op of one whole train_step, whose only wait for the device is for two numbers: the loss and the norm.

    They are read as one tensor, which is one wait on a card; without memory each number is seen alone.
    """
    mine, frozen = tree.split(params(c, torch.float32, adapters=adapters), train.trains(parts))
    frozen = tree.build(
        (path, linear.empty(w, kind) if kind and linear.compressible(path) else w.to(BF16))
        for path, w in zip(tree.paths(frozen), tree.values(frozen), strict=True)
    )
    state = train.TrainState(0, mine, optim.init(mine))
    task = train.Task(frozen, c, optim.Optim(), 100, Zero(dtype=BF16), lora=adapters)
    with Log() as log:
        after, metrics = train.train_step(state, [make_batch(c)], task)
    assert after.step == 1 and metrics.labelled == 60 and log.copies == []
    assert log.waits == ["aten::_local_scalar_dense"] * 2
    for path, leaf in zip(tree.paths(mine), tree.values(after.params), strict=True):
        assert (leaf.shape, leaf.dtype) == (mine[path].shape, torch.float32)
    return log


def test_a_whole_7b_train_step_runs_fused(fake):
    """Stage 1 at the shapes of LLaVA-1.5-7B. The image tower is frozen and first, so it has no backward pass."""
    log = step_ops(config.LLAVA_7B, STAGES["projector"])
    assert log.fused == {
        "npu_fast_gelu": 23, "npu_fusion_attention": 23 + 32, "npu_gelu": 1, "npu_gelu_backward": 1,
        "npu_rms_norm": 32 + 1, "npu_add_rms_norm": 32, "npu_rms_norm_backward": 2 * 32 + 1,
        "npu_rotary_mul": 2 * 32, "npu_rotary_mul_backward": 2 * 32, "npu_fusion_attention_grad": 32,
        "npu_swiglu": 32, "npu_swiglu_backward": 32,
        "npu_cross_entropy_loss": 1, "npu_cross_entropy_loss_backward": 1, "aten::_fused_adamw_": 1,
    }  # fmt: skip
    assert not UNFUSED & log.ops.keys()


def test_training_every_part_runs_fused(fake):
    log = step_ops(SMALL, STAGES["all"])
    assert log.fused["npu_fast_gelu_backward"] == 2 and log.fused["npu_fusion_attention_grad"] == 2 + 2
    assert not UNFUSED & log.ops.keys()


@pytest.mark.parametrize("kind", [None, "int8", "nf4"])
def test_training_adapters_runs_fused(fake, kind):
    """With dropout, on a base as it is and on a compressed one, which is made whole by plain operations."""
    log = step_ops(SMALL, ("projector", "lora"), config.Lora(rank=8, dropout=0.1), kind)
    assert log.fused["npu_fusion_attention_grad"] == log.fused["npu_swiglu_backward"] == 2
    assert not UNFUSED & log.ops.keys() and log.cards["950"] == set()


def test_recomputation_runs_fused(fake):
    c = config.Llama(blocks=2)
    p, stream = params(config.Llava(llama=c), BF16)["llama"], stream_of([30, 40])

    def loss(p):
        return llama.decode(p, E(70, 4096), stream, c, blocks=scan(remat(llama.block))).float().sum(), None

    with Log() as log:
        value_and_grad(loss)(p)
    assert log.fused["npu_fusion_attention"] == 2 * 2 and log.fused["npu_fusion_attention_grad"] == 2
    assert not UNFUSED & log.ops.keys()


def test_a_7b_prefill_and_decode_step_run_fused(fake):
    c = config.LLAVA_7B.llama
    p = params(config.LLAVA_7B, BF16)["llama"]
    stream = stream_of([600, 630], [1, 1])
    cache = Cache.empty(c, 2, 1024, p["embed"])
    with torch.no_grad():
        with Log() as log:
            x, cache = llama.prefill(p, E(1230, 4096), stream, cache, c)
        per_block = {"npu_rms_norm": 33, "npu_add_rms_norm": 32, "npu_rotary_mul": 64, "npu_swiglu": 32}
        written = {"npu_scatter_pa_kv_cache": 32}
        assert log.fused == {**per_block, **written, "npu_fusion_attention": 32} and x.shape == (2, 4096)
        assert not UNFUSED & log.ops.keys() and cache.numbers == (600, 630) and log.copies == log.waits == []
        pages = replace(Cache.empty(c, 40, 128, p["embed"]), table=E(2, 8, dtype=torch.int32))
        for held in (cache, replace(pages, lengths=cache.lengths, numbers=cache.numbers)):
            with Log() as log:
                x, after = llama.decode_step(p, E(2, dtype=torch.int64), held, c)
                logits = llama.logits(p, x, c)
            assert log.fused == {**per_block, **written, "npu_fused_infer_attention_score": 32}
            assert not UNFUSED & log.ops.keys() and log.sent == log.waits == []
            assert after.k is held.k and after.numbers == (601, 631) and after.lengths.device.type == "npu"
            assert (logits.shape, logits.dtype) == ((2, 32000), BF16)


@pytest.fixture
def ranks():
    """A world of eight in which nothing is sent."""
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=8)
    yield Axis("tp", 8, 3, dist.group.WORLD)
    dist.destroy_process_group()


def test_a_sharded_step_runs_fused_on_local_shapes(fake, ranks):
    c = config.Llama(blocks=2)
    p = params(config.Llava(llama=c), BF16, Mesh(tp=ranks))["llama"]
    assert p["blocks", "0", "w_gate"].shape == (11008 // 8, 4096)
    tp, stream = TP(ranks, True), stream_of([30, 50], [8, 8])

    def loss(p):
        x = vocab.embed(p["embed"], E(80, dtype=torch.int64), tp.axis)
        x = llama.decode(p, tp.split(x), stream, c, tp)
        return llama.nll(p, x, E(16, dtype=torch.int64), c, tp).sum(), None

    with Log() as log:
        (value, _), grads = value_and_grad(loss)(p)
    assert value.shape == () and math.prod(grads["embed"].shape) == 4000 * 4096
    assert log.fused["npu_fusion_attention"] == log.fused["npu_fusion_attention_grad"] == 2
    assert log.fused["npu_swiglu"] == 2 and log.fused["npu_add_rms_norm"] == 2
    assert not UNFUSED & log.ops.keys()
