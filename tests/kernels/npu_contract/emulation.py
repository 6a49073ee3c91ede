"""The fused ops in plain PyTorch on the CPU, as their documentation describes them, under their real schemas.

They are written from the documentation of torch_npu, not from llava_fn: other layouts, masks by hand, no shared code.
Each asserts what the documentation demands and the real op would not check. They replace the kernel and its autograd
formula for CPU tensors only, so that the code of llava_fn that prepares the call and takes the result apart computes.
"""

from __future__ import annotations

import torch


def npu_fusion_attention(
    query, key, value, head_num, input_layout, pse=None, padding_mask=None, atten_mask=None, scale=1.0, keep_prob=1.0,
    pre_tockens=2147483647, next_tockens=2147483647, inner_precise=0, prefix=None, actual_seq_qlen=None,
    actual_seq_kvlen=None, sparse_mode=0, gen_mask_parallel=True, sync=False, softmax_layout="", sink=None,
    dropout_mask=None, seed=0, offset=0,
):  # fmt: skip
    """Block-diagonal in TND, dense in BSND. Without a mask nothing is masked, whatever sparse_mode says."""
    assert pse is padding_mask is prefix is sink is dropout_mask is None and keep_prob == 1.0
    assert query.is_contiguous() and key.is_contiguous() and value.is_contiguous()
    if input_layout == "TND":
        assert actual_seq_qlen[0] > 0 and actual_seq_qlen[-1] == len(query)  # cumulative, without a leading 0
        assert max(len(query), len(key)) <= 2**20 and len(actual_seq_qlen) <= 1024
        assert actual_seq_kvlen[-1] == len(key) and len(actual_seq_qlen) == len(actual_seq_kvlen)
        q_from, k_from = [0, *actual_seq_qlen[:-1]], [0, *actual_seq_kvlen[:-1]]
        spans = zip(q_from, actual_seq_qlen, k_from, actual_seq_kvlen, strict=True)
        blocks = [(query[a:b], key[c:d], value[c:d], None) for a, b, c, d in spans]
    else:
        assert input_layout == "BSND" and actual_seq_qlen is actual_seq_kvlen is None
        blocks = [(query[j], key[j], value[j], j) for j in range(len(query))]
    out = [_softmax_attention(*block, head_num, atten_mask, scale, sparse_mode) for block in blocks]
    empty = query.new_empty(0)
    return (torch.cat(out) if input_layout == "TND" else torch.stack(out)), empty, empty, empty, 0, 0, 0


def _softmax_attention(q, k, v, row, head_num, mask, scale, sparse_mode):
    """q: t n h, k v: s m h. The mask is True where a key is hidden."""
    t, s, m = len(q), len(k), k.shape[1]
    assert q.shape[1] == head_num and head_num % m == 0
    hidden = torch.zeros(t, s, dtype=torch.bool)
    if mask is not None and sparse_mode in (2, 3):
        assert mask.dtype in (torch.bool, torch.uint8) and mask.shape == (2048, 2048)
        assert torch.equal(mask.bool(), torch.ones(2048, 2048).triu(1).bool()), "True must stand above the diagonal"
        hidden = torch.ones(t, s).triu(1 if sparse_mode == 2 else s - t + 1).bool()
    elif mask is not None:
        assert sparse_mode in (0, 1) and mask.dtype == torch.bool and mask.ndim == 4 and mask.shape[2:] == (t, s)
        hidden = mask[row, 0]
    assert not hidden.all(1).any(), "a row without a key"
    k, v = (x.repeat_interleave(head_num // m, 1) for x in (k, v))
    scores = torch.einsum("tnh,snh->nts", q.float(), k.float()) * scale
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("nts,snh->tnh", weights, v.float()).to(q.dtype)


def npu_fused_infer_attention_score(query, key, value, **given):
    """The decoding branch: one query a row, BSND, lengths of the rows' keys as host integers."""
    names = {"actual_seq_lengths_kv", "num_heads", "num_key_value_heads", "scale", "input_layout"}
    assert {*names} <= {*given} <= {*names, "block_table", "block_size"}
    assert given["input_layout"] == "BSND" and query.shape[1] == 1 and query.dtype in (torch.float16, torch.bfloat16)
    assert query.is_contiguous() and key.is_contiguous() and value.is_contiguous()
    lengths, table, size = given["actual_seq_lengths_kv"], given.get("block_table"), given.get("block_size", 0)
    if table is not None:  # the pages: blocks, tokens, heads times their width
        assert table.dtype == torch.int32 and table.is_contiguous() and table.shape[0] == len(query)
        assert key.shape[1] == size and size % 16 == 0 and size <= 512 and key.ndim == 3
        used = [-(-n // size) for n in lengths]
        assert max(used) <= table.shape[1] and sum(used) <= len(key)
        heads = given["num_key_value_heads"]
        key, value = (x[table.long()].flatten(1, 2).unflatten(2, (heads, -1)) for x in (key, value))
    else:
        assert size == 0
    assert given["num_key_value_heads"] == key.shape[2] and len(lengths) == len(query)
    out = [
        _softmax_attention(query[j], key[j, :n], value[j, :n], j, given["num_heads"], None, given["scale"], 0)
        for j, n in enumerate(lengths)
    ]
    return torch.stack(out), torch.empty(1)


def npu_scatter_pa_kv_cache(
    key, value, key_cache, value_cache, slot_mapping, *, compress_lens=None, compress_seq_offsets=None, seq_lens=None,
    cache_mode="PA_NZ",
):  # fmt: skip
    """Tokens to places counted through all blocks; "Norm" is the plain memory format: blocks, tokens, heads, width."""
    assert compress_lens is compress_seq_offsets is seq_lens is None and cache_mode == "Norm"
    assert key.dtype == value.dtype == key_cache.dtype == value_cache.dtype and key.ndim == 3 and key_cache.ndim == 4
    assert all(x.is_contiguous() for x in (key, value, key_cache, value_cache, slot_mapping))
    assert slot_mapping.dtype in (torch.int32, torch.int64) and slot_mapping.shape == key.shape[:1]
    for j, slot in enumerate(slot_mapping.tolist()):
        block, place = divmod(slot, key_cache.shape[1])
        key_cache[block, place], value_cache[block, place] = key[j], value[j]


def npu_rms_norm(input, gamma, epsilon=1e-6):
    """One rounding, at the end."""
    scale = (input.float() ** 2).mean(-1, keepdim=True).add(epsilon) ** -0.5
    return (input.float() * scale * gamma.float()).to(input.dtype), scale


def npu_rms_norm_backward(dy, input, gamma, rstd):
    """dx in the input's dtype, dgamma in fp32."""
    assert dy.is_contiguous() and rstd.shape == (*input.shape[:-1], 1) and rstd.dtype == torch.float32
    x, g = input.float() * rstd, dy.float() * gamma.float()
    dx = rstd * (g - x * (g * x).mean(-1, keepdim=True))
    return dx.to(input.dtype), (dy.float() * x).sum(tuple(range(x.ndim - 1)))


def npu_add_rms_norm(x1, x2, gamma, epsilon=1e-6):
    """The norm, its scale, the sum: in this order."""
    assert x1.dtype == x2.dtype == gamma.dtype
    total = x1 + x2
    return *npu_rms_norm(total, gamma, epsilon), total


def npu_rotary_mul(input, r1, r2, rotary_mode="half", rotate=None):
    """BSND with tables 1 S 1 D."""
    b, s, n, d = input.shape  # strided too
    assert r1.shape == r2.shape == (1, s, 1, d) and rotate is None and rotary_mode in ("half", "interleave")
    r1, r2 = r1.to(input.dtype), r2.to(input.dtype)
    if rotary_mode == "half":
        turned = torch.cat([-input[..., d // 2 :], input[..., : d // 2]], -1)
    else:
        turned = torch.stack([-input[..., 1::2], input[..., ::2]], -1).flatten(-2)
    return input * r1 + turned * r2


def npu_swiglu(input, dim=-1):
    """silu of the first half, times the second."""
    assert input.is_contiguous() and input.numel() and input.shape[dim] % 2 == 0
    gate, up = input.chunk(2, dim)
    return gate / (1 + torch.exp(-gate)) * up


def npu_weight_quant_batchmatmul(x, weight, antiquant_scale, antiquant_offset=None, quant_scale=None, **options):
    """x: m k, weight: int8[k, n], contiguous but for a transposition; a scale for each column, of x's dtype."""
    assert antiquant_offset is quant_scale is None and not options and weight.dtype == torch.int8
    assert x.dtype == antiquant_scale.dtype in (torch.float16, torch.bfloat16) and x.ndim == weight.ndim == 2
    assert weight.is_contiguous() or weight.t().is_contiguous()
    assert antiquant_scale.shape in ((weight.shape[1],), (1, weight.shape[1]))
    return (x.float() @ weight.float() * antiquant_scale.float()).to(x.dtype)


def npu_fast_gelu(input):
    """x / (1 + exp(-1.702 x))."""
    return input / (1 + torch.exp(-1.702 * input))


def npu_gelu(input, *, approximate="none"):
    """Exact, or by tanh."""
    assert approximate in ("none", "tanh")
    return torch.nn.functional.gelu(input, approximate=approximate)


def npu_cross_entropy_loss(
    input, target, weight=None, reduction="mean", ignore_index=-100, label_smoothing=0.0,
    lse_square_scale_for_zloss=0.0, return_zloss=False,
):  # fmt: skip
    """A negative ignore_index ignores nothing; the loss keeps the dtype of its input."""
    assert target.dtype == torch.int64 and 0 <= int(target.min()) and int(target.max()) < input.shape[1]
    logs = input - input.exp().sum(1, keepdim=True).log()
    loss = -logs[torch.arange(len(input)), target]
    total = {"none": loss, "mean": loss.mean()[None], "sum": loss.sum()[None]}[reduction]
    return total, logs, input.new_empty(0), input.new_empty(0)


def npu_all_gather_base_mm(input, x2, hcom, world_size, **options):
    """On ranks that all hold the same: the tokens, as many times as there are ranks."""
    assert hcom == "twins" and not options and input.is_contiguous()
    tokens = input.repeat(world_size, 1)
    return tokens @ x2, tokens


def npu_mm_reduce_scatter_base(input, x2, hcom, world_size, *, reduce_op="sum"):
    """On ranks that all hold the same: as many times the first rank's rows."""
    assert hcom == "twins" and reduce_op == "sum" and input.is_contiguous()
    return (input @ x2).chunk(world_size)[0] * world_size


def register() -> torch.library.Library:
    """Put all of them under their real names. They are undone when the result is dropped."""
    library = torch.library.Library("npu", "IMPL")
    for name, function in globals().items():
        if name.startswith("npu_"):
            library.impl(name, function, "AutogradCPU")
    return library
