"""What the vendor's documents say of each op that is launched on an NPU, in one table.

A row is read by machine (`broken`, on every recorded call of the contract suite) and by people (docs/npu.md). It holds
what its source says and nothing else, for the arguments that are used here. Cards that a page does not list are
"not listed"; that says nothing of whether the op works there. Nothing here has been tried on a card.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace

from torch import Tensor

PLUGIN = (
    "https://github.com/Ascend/op-plugin/blob/517f2e7d0f202f38b76310706cb977ca2388ad21/docs/zh/custom_APIs/torch_npu/"
)
REPO = "https://github.com/hicann/ops-math/blob"
MATH = f"{REPO}/c41933244c31e44fd496e3bb3212164f8c48c214/"
NN = "https://github.com/hicann/ops-nn/blob/e5c3fa9327ea95ba26d06227e746923580d10921/"
ATTENTION = "https://github.com/hicann/ops-transformer/blob/c29bc1069d3252c641e2aa059ec88f392d3f05ac/"

CARDS = ("A2", "A3", "950")
HALF, FLOAT = "fp16 bf16", "fp16 bf16 fp32"
DTYPES = {
    "float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64", "int64": "int64", "int32": "int32",
    "int8": "int8", "uint8": "uint8", "bool": "bool", "int16": "int16",
}  # fmt: skip
YES = dict.fromkeys(CARDS, "yes")
A2_A3 = {"A2": "yes", "A3": "yes", "950": "not listed"}
Size = tuple[str, Callable[[SimpleNamespace], bool]]  # in words, and of the call's arguments by name


@dataclass(frozen=True)
class Limit:
    """The limits of one op, by the names of its schema's arguments.

    op: its name in the dispatcher. contract: what the call here means. dtypes: of a tensor, or of each of a list.
    cards: "yes", "no" or "not listed" on Atlas A2, Atlas A3, Ascend 950. source: the page. risk: what may go wrong
    although every limit is kept; "" if nothing is known. reach: how the call is checked here besides its limits.
    """

    op: str
    contract: str
    dtypes: Mapping[str, str]
    source: str
    cards: Mapping[str, str] = field(default_factory=lambda: YES)
    ranks: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    contiguous: tuple[str, ...] = ()
    alike: tuple[str, ...] = ()  # tensors of one dtype
    sizes: tuple[Size, ...] = ()
    risk: str = ""
    reach: str = "schema, shapes and gradients without memory"


EMULATED = "schema, shapes and gradients without memory; values against the reference by an emulation of its page"


def _causal(a: SimpleNamespace) -> bool:
    mask = a.atten_mask
    if a.sparse_mode in (2, 3):
        return mask is not None and tuple(mask.shape) == (2048, 2048)
    return (a.sparse_mode == 0 and mask is None) or (a.sparse_mode == 1 and mask is not None)


def _ends(a: SimpleNamespace) -> bool:
    q, k = a.actual_seq_qlen, a.actual_seq_kvlen
    if a.input_layout != "TND":
        return q is None and k is None
    rising = all(x[0] > 0 and all(i <= j for i, j in zip(x, x[1:], strict=False)) for x in (q, k))
    return len(q) == len(k) and rising and (q[-1], k[-1]) == (len(a.query), len(a.key))


def _room(a: SimpleNamespace) -> int:
    """Keys that a row of the cache has room for."""
    return a.key.shape[1] if a.block_table is None else a.block_size * a.block_table.shape[1]


VARLEN: tuple[Size, ...] = (
    ("layout TND or BSND", lambda a: a.input_layout in ("TND", "BSND")),
    ("at most 256 query heads, a multiple of the KV heads",
     lambda a: a.head_num == a.query.shape[-2] <= 256 and a.head_num % a.key.shape[-2] == 0),
    ("at most 1,024 segments (one page says 2,048)", lambda a: len(a.actual_seq_qlen or ()) <= 1024),
    ("1 to 1,048,576 rows", lambda a: 0 < max(len(a.query), len(a.key)) <= 2**20),
    ("ends on the host: cumulative, no leading 0, the last is the number of rows", _ends),
    ("sparse_mode 2 or 3 with the 2048 x 2048 mask, 1 with a whole mask, 0 with none", _causal),
    ("no dropout", lambda a: a.keep_prob == 1),
)  # fmt: skip
FA_CARDS = {"A2": "yes", "A3": "not listed", "950": "yes"}

FUSED = (
    Limit(
        "npu::npu_fusion_attention", "attention over a ragged stream; True in the mask hides a key",
        {"query": FLOAT, "key": FLOAT, "value": FLOAT, "atten_mask": "bool uint8"},
        PLUGIN + "torch_npu-npu_fusion_attention.md", FA_CARDS,
        ranks={"query": (3, 4), "key": (3, 4), "value": (3, 4)}, alike=("query", "key", "value"),
        sizes=(*VARLEN, ("heads of 1 to 768", lambda a: a.query.shape[-1] <= 768)),
        risk="the page of CANN's varlen op says that A3 has none; without a mask it was reported to fail with 161001 "
        "in an image tower (vllm-ascend 10094, 11720); without a mask sparse_mode is ignored in silence",
        reach=EMULATED,
    ),
    Limit(
        "npu::npu_fusion_attention_grad", "its backward pass",
        {"query": FLOAT, "key": FLOAT, "value": FLOAT, "dy": FLOAT, "atten_mask": "bool uint8"},
        ATTENTION + "attention/flash_attention_score_grad/docs/aclnnFlashAttentionUnpaddingScoreGrad.md",
        {"A2": "yes", "A3": "no", "950": "not listed"},
        ranks={"query": (3, 4), "dy": (3, 4)}, alike=("query", "key", "value", "dy"),
        sizes=(*VARLEN, ("heads of 1 to 512", lambda a: a.query.shape[-1] <= 512)),
        risk="the page is of November 2025 and lists A3 as without the op; torch_npu's own page of the forward op "
        "allows heads of up to 768",
    ),
    Limit(
        "npu::npu_fused_infer_attention_score", "one query a row against the cache, by lengths and without a mask",
        {"query": HALF, "key": HALF, "value": HALF, "block_table": "int32"},
        PLUGIN + "torch_npu-npu_fused_infer_attention_score.md", A2_A3,
        ranks={"query": (4, 4), "key": (3, 4), "block_table": (2, 2)}, contiguous=("query", "key", "value"),
        alike=("query", "key", "value"),
        sizes=(
            ("one query a row", lambda a: a.input_layout == "BSND" and a.query.shape[1] == 1),
            ("heads of 16 bytes, at most 512", lambda a: a.query.shape[-1] % 8 == 0 and a.query.shape[-1] <= 512),
            ("at most 256 query heads, a multiple of the KV heads",
             lambda a: a.num_heads == a.query.shape[2] <= 256 and a.num_heads % a.num_key_value_heads == 0),
            ("at most 65,536 rows and 262,144 keys a row", lambda a: len(a.query) <= 65536 and _room(a) <= 262144),
            ("pages of 16, 32 .. 512 tokens, as many as the rows have together at least",
             lambda a: a.block_table is None or (
                 a.block_size % 16 == 0 and 0 < a.block_size == a.key.shape[1] <= 512
                 and sum(-(-n // a.block_size) for n in a.actual_seq_lengths_kv) <= len(a.key))),
            ("a length for each row, on the host, 1 to the room of the cache",
             lambda a: len(a.actual_seq_lengths_kv) == len(a.query)
             and 0 < min(a.actual_seq_lengths_kv) <= max(a.actual_seq_lengths_kv) <= _room(a)),
        ),
        risk="with a mask keys beyond 512 were reported ignored (vllm-ascend 15503): no mask is given; it has no "
        "gradient and says nothing", reach=EMULATED,
    ),
    Limit(
        "npu::npu_scatter_pa_kv_cache", "keys and values of tokens written into the pages of a cache, in place",
        {"key": FLOAT, "value": FLOAT, "key_cache": FLOAT, "value_cache": FLOAT, "slot_mapping": "int32 int64"},
        PLUGIN + "torch_npu-npu_scatter_pa_kv_cache.md", A2_A3,
        ranks={"key": (3, 3), "value": (3, 3), "key_cache": (4, 4), "value_cache": (4, 4), "slot_mapping": (1, 1)},
        contiguous=("key", "value", "key_cache", "value_cache", "slot_mapping"),
        alike=("key", "value", "key_cache", "value_cache"),
        sizes=(("the plain memory format, not NZ", lambda a: a.cache_mode == "Norm"),
               ("a place for each token", lambda a: len(a.slot_mapping) == len(a.key) == len(a.value))),
        risk="a place beyond the cache, or one given twice, is not checked", reach=EMULATED,
    ),
    Limit(
        "npu::npu_rms_norm", "RMSNorm, rounded once", {"input": FLOAT, "gamma": FLOAT},
        NN + "norm/rms_norm/docs/aclnnRmsNorm.md", ranks={"input": (1, 8), "gamma": (1, 8)},
        sizes=(("gain of the last dim, in the dtype of x or fp32",
                lambda a: a.gamma.shape[-1] == a.input.shape[-1] and str(a.gamma.dtype) in (
                    str(a.input.dtype), "torch.float32")),),
        reach=EMULATED,
    ),
    Limit(
        "npu::npu_rms_norm_backward", "its backward pass",
        {"dy": FLOAT, "input": FLOAT, "rstd": "fp32", "gamma": FLOAT},
        NN + "norm/rms_norm_grad/docs/aclnnRmsNormGrad.md", ranks={"dy": (2, 8), "rstd": (1, 7)}, alike=("dy", "input"),
        reach=EMULATED,
    ),
    Limit(
        "npu::npu_add_rms_norm", "sum of two tensors, and its RMSNorm", {"x1": FLOAT, "x2": FLOAT, "gamma": FLOAT},
        NN + "norm/add_rms_norm/docs/aclnnAddRmsNorm.md", ranks={"x1": (1, 8)}, alike=("x1", "x2", "gamma"),
        risk="it has no gradient: the backward pass is ours, by npu_rms_norm_backward", reach=EMULATED,
    ),
    Limit(
        "npu::npu_rotary_mul", "rotary position embedding of halves, BSND with tables 1 S 1 D",
        {"input": FLOAT, "r1": FLOAT, "r2": FLOAT}, PLUGIN + "torch_npu-npu_rotary_mul.md", A2_A3,
        ranks={"input": (3, 4), "r1": (3, 4), "r2": (3, 4)}, alike=("input", "r1", "r2"),
        sizes=(
            ("an even head below 896", lambda a: a.input.shape[-1] % 2 == 0 and a.input.shape[-1] < 896),
            ("batch and heads below 1,000", lambda a: a.input.shape[0] < 1000 and a.input.shape[2] < 1000),
            ("tables 1 S 1 D", lambda a: tuple(a.r1.shape) == (1, a.input.shape[1], 1, a.input.shape[3])),
        ), reach=EMULATED,
    ),
    Limit(
        "npu::npu_rotary_mul_backward", "its backward pass", {"grad": FLOAT, "input": FLOAT, "r1": FLOAT, "r2": FLOAT},
        ATTENTION + "posembedding/rotary_position_embedding_grad/docs/aclnnRotaryPositionEmbeddingGrad.md", A2_A3,
        ranks={"grad": (4, 4)},
    ),
    Limit(
        "npu::npu_swiglu", "silu of the first half, times the second", {"input": FLOAT},
        NN + "activation/swi_glu/docs/aclnnSwiGlu.md", ranks={"input": (1, 8)}, contiguous=("input",),
        sizes=(("an even size to halve, at least one row",
                lambda a: a.input.shape[a.dim] % 2 == 0 and a.input.numel() > 0),),
        reach=EMULATED,
    ),
    Limit(
        "npu::npu_swiglu_backward", "its backward pass", {"grad_output": FLOAT, "input": FLOAT},
        NN + "activation/swi_glu_grad/docs/aclnnSwiGluGrad.md", contiguous=("grad_output",),
        ranks={"grad_output": (1, 8), "input": (1, 8)}, alike=("grad_output", "input"),
        sizes=(("x of a multiple of 64 bytes along the last dim",
                lambda a: a.input.shape[-1] * a.input.element_size() % 64 == 0),),
    ),
    Limit(
        "npu::npu_fast_gelu", "CLIP's GELU, x / (1 + exp(-1.702 x))", {"input": FLOAT},
        NN + "activation/fast_gelu/docs/aclnnFastGelu.md", ranks={"input": (0, 8)},
        risk="cards older than A2 compute another formula", reach=EMULATED,
    ),
    Limit(
        "npu::npu_fast_gelu_backward", "its backward pass", {"grad": FLOAT, "input": FLOAT},
        NN + "activation/fast_gelu_grad/docs/aclnnFastGeluBackward.md", alike=("grad", "input"),
    ),
    Limit(
        "npu::npu_gelu", "GELU by erf, where F.gelu is the form by tanh", {"input": FLOAT},
        NN + "activation/gelu_v2/docs/aclnnGeluV2.md", ranks={"input": (0, 8)},
        sizes=(("approximate none", lambda a: a.approximate == "none"),), reach=EMULATED,
    ),
    Limit(
        "npu::npu_gelu_backward", "its backward pass", {"grad_output": FLOAT, "input": FLOAT},
        NN + "activation/gelu_grad_v2/docs/aclnnGeluBackwardV2.md",
    ),
    Limit(
        "npu::npu_cross_entropy_loss", "loss of each row, from logits in fp32", {"input": FLOAT, "target": "int64"},
        PLUGIN + "torch_npu-npu_cross_entropy_loss.md", ranks={"input": (2, 2), "target": (1, 1)},
        sizes=(("1 to 200,000 rows", lambda a: 0 < len(a.input) <= 200_000),
               ("no reduction and no weight", lambda a: a.reduction == "none" and a.weight is None)),
        risk="a negative ignore_index ignores nothing: labels are selected before", reach=EMULATED,
    ),
    Limit(
        "npu::npu_cross_entropy_loss_backward", "its backward pass",
        {"grad_loss": FLOAT, "log_prob": FLOAT, "target": "int64"},
        NN + "loss/cross_entropy_loss_grad/docs/aclnnCrossEntropyLossGrad.md",
        ranks={"grad_loss": (1, 1), "log_prob": (2, 2), "target": (1, 1)},
    ),
    Limit(
        "npu::npu_weight_quant_batchmatmul", "product with a weight of int8, a scale for each output",
        {"x": HALF, "weight": "int8", "antiquant_scale": HALF}, PLUGIN + "torch_npu-npu_weight_quant_batchmatmul.md",
        A2_A3, ranks={"x": (2, 2), "weight": (2, 2), "antiquant_scale": (1, 2)}, alike=("x", "antiquant_scale"),
        sizes=(("k and n of at most 65,535", lambda a: max(a.weight.shape) <= 65_535 and a.x.numel() > 0),
               ("x and weight contiguous, or transposed ones that are",
                lambda a: all(y.is_contiguous() or y.t().is_contiguous() for y in (a.x, a.weight)))),
        risk="it has no gradient and says nothing; not deterministic unless that is asked for", reach=EMULATED,
    ),
    Limit(
        "npu::npu_all_gather_base_mm", "all-gather of tokens and product with a weight, in pieces",
        {"input": HALF, "x2": HALF}, PLUGIN + "torch_npu-npu_all_gather_base_mm.md", A2_A3,
        ranks={"input": (2, 2), "x2": (2, 2)}, contiguous=("input",), alike=("input", "x2"),
        sizes=(("k from 256 to 65,534", lambda a: 256 <= a.input.shape[1] < 65_535),
               ("2, 4, 8, 16 or 32 ranks, on A2 at most 8", lambda a: a.world_size in (2, 4, 8, 16, 32))),
        risk="no model calls it yet; all such ops of a model need one communicator on A2; it has no gradient",
        reach=EMULATED,
    ),
    Limit(
        "npu::npu_mm_reduce_scatter_base", "product with a weight and reduce-scatter of tokens, in pieces",
        {"input": HALF, "x2": HALF}, PLUGIN + "torch_npu-npu_mm_reduce_scatter_base.md", A2_A3,
        ranks={"input": (2, 2), "x2": (2, 2)}, contiguous=("input",), alike=("input", "x2"),
        sizes=(("k from 256 to 65,534", lambda a: 256 <= a.input.shape[1] < 65_535),
               ("2, 4, 8, 16 or 32 ranks, on A2 at most 8", lambda a: a.world_size in (2, 4, 8, 16, 32)),
               ("tokens that divide over the ranks", lambda a: len(a.input) % a.world_size == 0)),
        risk="as npu_all_gather_base_mm", reach=EMULATED,
    ),
)  # fmt: skip

INDEX = "int32 int64"
NUMBERS = "fp16 bf16 fp32 int8 uint8 int16 int32 int64"
ANY = NUMBERS + " bool"
INTEGERS = "int8 uint8 int16 int32 int64"
ATEN = (
    Limit(
        "aten::_fused_adamw_", "one AdamW update of all leaves",
        {"self": FLOAT, "grads": FLOAT, "exp_avgs": FLOAT, "exp_avg_sqs": FLOAT, "state_steps": "fp32 int64"},
        NN + "optim/apply_adam_w_v2/docs/aclnnApplyAdamWV2.md", contiguous=("state_steps",),
        sizes=(("one number as the step, no amsgrad", lambda a: a.state_steps[0].numel() == 1 and not a.amsgrad),),
    ),
    Limit(
        "aten::native_layer_norm", "LayerNorm", {"input": FLOAT, "weight": FLOAT, "bias": FLOAT},
        NN + "norm/layer_norm_v4/docs/aclnnLayerNorm%26aclnnLayerNormWithImplMode.md", ranks={"input": (1, 8)},
        alike=("weight", "bias"),
    ),
    Limit(
        "aten::native_layer_norm_backward", "its backward pass", {"grad_out": FLOAT, "input": FLOAT, "weight": FLOAT},
        NN + "norm/layer_norm_grad_v3/docs/aclnnLayerNormBackward.md", ranks={"input": (1, 8)},
        alike=("grad_out", "input"),
    ),
    Limit(
        "aten::embedding", "rows of the embedding table", {"weight": FLOAT, "indices": INDEX},
        NN + "index/embedding/docs/aclnnEmbedding.md", ranks={"weight": (2, 2)},
    ),
    Limit(
        "aten::embedding_dense_backward", "its backward pass", {"grad_output": FLOAT, "indices": INDEX},
        NN + "index/embedding_dense_grad_v2/docs/aclnnEmbeddingDenseBackward.md",
        ranks={"grad_output": (2, 8), "indices": (1, 8)}, risk="not deterministic unless that is asked for",
    ),
    Limit(
        "aten::index.Tensor", "rows by their numbers", {"self": ANY, "indices": "int32 int64 bool"},
        NN + "index/index/docs/aclnnIndex.md", ranks={"self": (1, 8), "indices": (1, 8)},
    ),
    Limit(
        "aten::index_select", "rows by their numbers", {"self": ANY, "index": INDEX},
        NN + "index/gather_v2/docs/aclnnIndexSelect.md", ranks={"self": (0, 8), "index": (0, 1)},
    ),
    Limit(
        "aten::index_put", "rows written by their numbers", {"self": ANY, "indices": "int32 int64 bool", "values": ANY},
        NN + "index/index_put_v2/docs/aclnnIndexPutImpl.md", ranks={"self": (1, 8), "indices": (1, 8)},
        alike=("self", "values"),
        risk="not deterministic unless that is asked for; on 950 the order of writes to one place is free",
    ),
    Limit(
        "aten::index_put_", "the same, in place", {"self": ANY, "indices": "int32 int64 bool", "values": ANY},
        NN + "index/index_put_v2/docs/aclnnIndexPutImpl.md", ranks={"self": (1, 8), "indices": (1, 8)},
        alike=("self", "values"), risk="as aten::index_put",
    ),
    Limit(
        "aten::scatter.src", "entries written along a dim", {"self": ANY, "index": INDEX, "src": ANY},
        NN + "index/scatter_elements_v2/docs/aclnnScatter%26aclnnInplaceScatter.md", ranks={"self": (0, 8)},
        alike=("self", "src"),
    ),
    Limit(
        "aten::scatter.value", "one value written along a dim", {"self": ANY, "index": INDEX},
        NN + "index/scatter_elements_v2/docs/aclnnScatterValue%26aclnnInplaceScatterValue.md",
    ),
    Limit(
        "aten::index_copy", "rows replaced by others", {"self": ANY, "index": INDEX, "source": ANY},
        NN + "index/scatter_update/docs/aclnnIndexCopy%26aclnnInplaceIndexCopy.md", alike=("self", "source"),
    ),
    Limit(
        "aten::index_copy_", "the same, in place", {"self": ANY, "index": INDEX, "source": ANY},
        NN + "index/scatter_update/docs/aclnnIndexCopy%26aclnnInplaceIndexCopy.md", alike=("self", "source"),
    ),
    Limit(
        "aten::index_fill.int_Scalar", "rows set to 0: the gradient of rows replaced", {"self": ANY, "index": INDEX},
        NN + "index/index_fill_d/docs/aclnnIndexFill%26aclnnInplaceIndexFill.md",
        risk="with a CANN that lacks aclnnInplaceIndexFill torch_npu reads the numbers of the rows one by one on the "
        "host (op-plugin, IndexFillKernelNpuOpApi.cpp)",
    ),
    Limit(
        "aten::repeat_interleave.self_int", "rows repeated", {"self": ANY},
        NN + "index/repeat_interleave/docs/aclnnRepeatInterleaveIntWithDim.md",
    ),
    Limit("aten::mm", "product of two matrices", {"self": FLOAT, "mat2": FLOAT},
          NN + "matmul/mat_mul_v3/docs/aclnnMm.md", ranks={"self": (2, 2), "mat2": (2, 2)}, alike=("self", "mat2")),
    Limit("aten::matmul", "product of rows and a matrix", {"self": FLOAT, "other": FLOAT},
          NN + "matmul/mat_mul_v3/docs/aclnnMatmul.md", ranks={"self": (1, 6), "other": (1, 6)},
          alike=("self", "other")),
    Limit("aten::addmm", "product of two matrices, and a bias", {"self": FLOAT, "mat1": FLOAT, "mat2": FLOAT},
          NN + "matmul/mat_mul_v3/docs/aclnnAddmm%26aclnnInplaceAddmm.md", ranks={"mat1": (2, 2), "mat2": (2, 2)},
          alike=("self", "mat1", "mat2")),
    Limit("aten::_foreach_norm.Scalar", "norms of all gradients", {"self": FLOAT},
          NN + "foreach/foreach_norm/docs/aclnnForeachNorm.md"),
    Limit("aten::linalg_vector_norm", "norm of these norms", {"self": FLOAT},
          NN + "norm/lp_norm_v2/docs/aclnnLinalgVectorNorm.md"),
    Limit("aten::amax", "largest value", {"self": ANY}, MATH + "math/reduce_max/docs/aclnnAmax.md"),
    Limit(
        "aten::gather", "entries read along a dim", {"self": ANY, "index": INDEX},
        NN + "index/gather_elements_v2/docs/aclnnGather.md", {"A2": "yes", "A3": "yes", "950": "no"},
    ),
    Limit(
        "aten::cummax", "running maximum", {"self": FLOAT}, MATH + "math/cummax/docs/aclnnCummax.md",
        {"A2": "yes", "A3": "yes", "950": "no"},
    ),
    Limit(
        "aten::cumsum", "running sum", {"self": ANY}, MATH + "math/cumsum/docs/aclnnCumsum.md", ranks={"self": (0, 8)},
        risk="whether a sum of numbers that are not negative never falls is not said: sampling does not rely on it",
    ),
    Limit(
        "aten::sort", "sorted values, and where they were", {"self": ANY}, MATH + "math/sort/docs/aclnnSort.md",
        ranks={"self": (1, 8)},
    ),
    Limit(
        "aten::topk", "the largest values", {"self": NUMBERS}, MATH + "math/topk/docs/aclnnTopk.md",
        ranks={"self": (1, 8)}, sizes=(("sorted", lambda a: a.sorted),),
    ),
    Limit(
        "aten::argmax", "place of the largest value", {"self": NUMBERS}, MATH + "math/arg_max_v2/docs/aclnnArgMax.md",
        ranks={"self": (0, 8)}, risk="which of several largest values is not said",
    ),
    Limit(
        "aten::amin", "smallest value", {"self": ANY}, MATH + "math/reduce_min/docs/aclnnAmin.md",
    ),
    Limit(
        "aten::_softmax", "softmax", {"self": FLOAT}, NN + "activation/softmax_v2/docs/aclnnSoftmax.md",
        ranks={"self": (0, 8)},
    ),
    Limit(
        "aten::_log_softmax", "logarithm of softmax", {"self": FLOAT},
        NN + "activation/log_softmax_v2/docs/aclnnLogSoftmax.md", ranks={"self": (1, 8)},
    ),
    Limit(
        "aten::bitwise_xor.Scalar", "keys of dropout", {"self": INTEGERS},
        f"{REPO}/29bf6a1bbcdf37a391bfcd4545c977a9d34f7d86/math/bitwise_xor/docs/"
        "aclnnBitwiseXorScalar%26aclnnInplaceBitwiseXorScalar.md",
        ranks={"self": (0, 8)},
    ),
    Limit(
        "aten::bitwise_xor.Tensor", "the same", {"self": INTEGERS, "other": INTEGERS},
        f"{REPO}/61da8fd8285378b6e0e10e728da70b0067b94228/math/bitwise_xor/docs/"
        "aclnnBitwiseXorTensor%26aclnnInplaceBitwiseXorTensor.md",
        ranks={"self": (0, 8)},
    ),
    Limit(
        "aten::__rshift__.Scalar", "the same", {"self": INTEGERS},
        f"{REPO}/019fdf8074b3e830955bcfa0a18c3a4a1cbeef71/math/right_shift/docs/"
        "aclnnRightShift.md",
        ranks={"self": (0, 1)},
        risk="on A2 and A3 an AI CPU computes it, which is slow: it is called on one dim alone",
    ),
    Limit(
        "aten::where.self", "one of two by a condition", {"condition": "bool uint8", "self": ANY, "other": ANY},
        MATH + "math/select/docs/aclnnSWhere.md", ranks={"condition": (0, 8)},
    ),
)  # fmt: skip

# Views, memory, arithmetic and comparisons number by number, sums, collectives: their pages were not looked up.
PLAIN = frozenset(
    """
    _foreach_mul_ _local_scalar_dense _pin_memory _to_copy _unsafe_view add alias any arange bitwise_and
    bitwise_not bitwise_or cat clamp clone copy_ cos detach div empty empty_like eq exp expand floor_divide full
    ge gt is_pinned isin le lift_fresh log lt masked_fill matmul_backward min mul ne neg new_zeros ones ones_like
    permute pow promote_types reciprocal remainder repeat scalar_tensor select select_backward sin slice
    slice_backward split squeeze stack sub sum t triu unbind unsqueeze view zeros zeros_like device
    all_gather_into_tensor all_reduce reduce_scatter_tensor wait_tensor broadcast
    """.split()
)

LIMITS: Mapping[str, Limit] = {row.op: row for row in (*FUSED, *ATEN)}


def broken(row: Limit, given: Mapping[str, object]) -> list[str]:
    """The limits of the row that a call breaks. given: its arguments by the names of the schema, defaults included."""
    lists = {name: _tensors(x) for name, x in given.items()}
    said = [f"{name} is no argument" for name in (*row.dtypes, *row.ranks, *row.contiguous) if name not in given]
    for name, dtypes in row.dtypes.items():
        said += [f"{name} is {_dtype(x)}, not {dtypes}" for x in lists.get(name, ()) if _dtype(x) not in dtypes.split()]
    for name, (low, high) in row.ranks.items():
        said += [f"{name} has {x.ndim} dims, not {low} to {high}" for x in lists[name] if not low <= x.ndim <= high]
    for name in row.contiguous:
        said += [f"{name} is not contiguous" for x in lists[name] if not x.is_contiguous()]
    if len({_dtype(x) for name in row.alike for x in lists[name]}) > 1:
        said.append(f"{', '.join(row.alike)} are not of one dtype")
    return said + [words for words, holds in row.sizes if not holds(SimpleNamespace(**given))]


def _tensors(x: object) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    return [y for y in x if isinstance(y, Tensor)] if isinstance(x, (list, tuple)) else []


def _dtype(x: Tensor) -> str:
    name = str(x.dtype).removeprefix("torch.")
    return DTYPES.get(name, name)
