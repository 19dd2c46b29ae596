"""The options of the transformer wrappers as one table: the tests of both frameworks and the table in the docs use it.

A `Case` switches one option on; `COMBINED` are few stacks that hold all of them, for the fast tests.
"""

from typing import NamedTuple

import numpy as np

from flash_attention.core.transformer.layers import make_stack

ATTENTION, FEED_FORWARD, LAYERS = "Attention", "FeedForward", "AttentionLayers"
B, N, DIM, HEADS, HEAD, CONTEXT = 2, 9, 16, 4, 8, 6
SIZES = {"dim": DIM, "depth": 2, "heads": HEADS, "attn_dim_head": HEAD, "ff_mult": 2}


class Case(NamedTuple):
    """One option.

    Attributes:
        owner: the class that takes it.
        option: its name there.
        arguments: of `AttentionLayers`, beside `SIZES`, that switch it on.
        english, chinese: what it does.
        without: arguments of the stack that it is compared with, where not all of `arguments` are the option's.
    """

    owner: str
    option: str
    arguments: dict
    english: str
    chinese: str
    without: dict = {}


CASES = (
    Case(ATTENTION, "causal", {"causal": True}, "a query sees no later key", "查询看不到后面的键"),
    Case(ATTENTION, "kv_heads", {"attn_kv_heads": 2}, "query heads share key/value heads", "多个查询头共用键值头"),
    Case(ATTENTION, "one_kv_head", {"attn_one_kv_head": True}, "one key/value head for all",
         "所有查询头共用一个键值头"),
    Case(ATTENTION, "kv_head_mapping", {"attn_kv_heads": 2, "attn_kv_head_mapping": "interleave"},
         "which key/value head a query head uses", "查询头使用哪个键值头", {"attn_kv_heads": 2}),
    Case(ATTENTION, "num_mem_kv", {"attn_num_mem_kv": 3}, "learned keys and values that all see",
         "所有查询可见的可学习键值"),
    Case(ATTENTION, "qk_norm", {"attn_qk_norm": True}, "queries and keys of length 1, a fixed scale",
         "查询与键归一化，固定缩放"),
    Case(ATTENTION, "qk_norm_scale", {"attn_qk_norm": True, "attn_qk_norm_scale": 3.0}, "that scale", "该缩放值",
         {"attn_qk_norm": True}),
    Case(ATTENTION, "qk_norm_groups", {"attn_qk_norm": True, "attn_qk_norm_groups": 2},
         "groups of features each of length 1",
         "特征分组分别归一化", {"attn_qk_norm": True}),
    Case(ATTENTION, "qk_norm_dim_scale", {"attn_qk_norm": True, "attn_qk_norm_dim_scale": True},
         "learned factors on normalised features", "归一化特征上的可学习系数", {"attn_qk_norm": True}),
    Case(ATTENTION, "talking_heads", {"attn_talking_heads": True}, "heads mixed before and after the softmax",
         "softmax 前后混合各头"),
    Case(ATTENTION, "sparse_topk", {"attn_sparse_topk": 3}, "the largest scores of a row only",
         "每行只保留最大的分数"),
    Case(ATTENTION, "max_attend_past", {"attn_max_attend_past": 3}, "no key further back", "看不到更早的键"),
    Case(ATTENTION, "head_scale", {"attn_head_scale": True}, "a learned factor a head", "每头一个可学习系数"),
    Case(ATTENTION, "gate_values", {"attn_gate_values": True}, "the output gated by the input", "输出由输入门控"),
    Case(ATTENTION, "on_attn", {"attn_on_attn": True}, "attention on attention", "注意力上的注意力"),
    Case(ATTENTION, "shared_kv", {"attn_shared_kv": True}, "values are the keys", "值即键"),
    Case(ATTENTION, "value_dim_head", {"attn_value_dim_head": 5}, "size of a value head", "值头的大小"),
    Case(FEED_FORWARD, "mult", {"ff_mult": 3}, "inner width over dim", "内部宽度与 dim 之比"),
    Case(FEED_FORWARD, "glu", {"ff_glu": True}, "value times act(gate)", "值乘以 act(门)"),
    Case(FEED_FORWARD, "swish", {"ff_swish": True}, "SiLU", "SiLU 激活"),
    Case(FEED_FORWARD, "relu_squared", {"ff_relu_squared": True}, "ReLU squared", "ReLU 的平方"),
    Case(FEED_FORWARD, "post_act_ln", {"ff_post_act_ln": True}, "LayerNorm of inner features",
         "内部特征的 LayerNorm"),
    Case(FEED_FORWARD, "no_bias", {"ff_no_bias": True}, "projections without bias", "投影无偏置"),
    Case(LAYERS, "cross_attend", {"cross_attend": True}, "cross-attention in each block", "每个块含交叉注意力"),
    Case(LAYERS, "only_cross", {"only_cross": True}, "cross-attention instead of self-attention",
         "以交叉注意力代替自注意力"),
    Case(LAYERS, "macaron", {"macaron": True}, "a half feed-forward on both sides", "两侧各有半权重前馈层"),
    Case(LAYERS, "sandwich_coef", {"sandwich_coef": 1}, "attentions first, feed-forwards last",
         "注意力在前，前馈在后"),
    Case(LAYERS, "pre_norm", {"pre_norm": False}, "norm before a branch, or after the residual",
         "分支前或残差后归一化"),
    Case(LAYERS, "sandwich_norm", {"sandwich_norm": True}, "a norm of the branch too", "分支输出也归一化"),
    Case(LAYERS, "use_rmsnorm", {"use_rmsnorm": True}, "RMSNorm", "RMSNorm"),
    Case(LAYERS, "use_scalenorm", {"use_scalenorm": True}, "ScaleNorm", "ScaleNorm"),
    Case(LAYERS, "rotary_pos_emb", {"rotary_pos_emb": True}, "rotated queries and keys", "旋转查询与键"),
    Case(LAYERS, "rotary_emb_dim", {"rotary_pos_emb": True, "rotary_emb_dim": 34, "attn_dim_head": 36},
         "features that turn", "旋转的特征数", {"rotary_pos_emb": True, "attn_dim_head": 36}),
    Case(LAYERS, "rotary_xpos", {"rotary_xpos": True, "causal": True}, "rotary with xPos's decay",
         "带 xPos 衰减的旋转",
         {"rotary_pos_emb": True, "causal": True}),
    Case(LAYERS, "rotary_xpos_scale_base", {"rotary_xpos": True, "rotary_xpos_scale_base": 64, "causal": True},
         "how fast it decays", "衰减速度", {"rotary_xpos": True, "causal": True}),
    Case(LAYERS, "alibi_pos_bias", {"alibi_pos_bias": True}, "ALiBi", "ALiBi"),
    Case(LAYERS, "alibi_num_heads", {"alibi_pos_bias": True, "alibi_num_heads": 2}, "heads that have it",
         "使用它的头数",
         {"alibi_pos_bias": True}),
    Case(LAYERS, "rel_pos_bias", {"rel_pos_bias": True}, "T5's bias", "T5 偏置"),
    Case(LAYERS, "rel_pos_num_buckets", {"rel_pos_bias": True, "rel_pos_num_buckets": 8}, "its buckets", "其桶数",
         {"rel_pos_bias": True}),
    Case(LAYERS, "rel_pos_max_distance",
         {"rel_pos_bias": True, "rel_pos_num_buckets": 8, "rel_pos_max_distance": 5},
         "where the last bucket begins", "最后一桶的起点", {"rel_pos_bias": True, "rel_pos_num_buckets": 8}),
    Case(LAYERS, "dynamic_pos_bias", {"dynamic_pos_bias": True}, "a network of the distance",
         "由距离的小网络给出偏置"),
    Case(LAYERS, "dynamic_pos_bias_num_layers", {"dynamic_pos_bias": True, "dynamic_pos_bias_num_layers": 1},
         "its depth", "其层数", {"dynamic_pos_bias": True}),
    Case(LAYERS, "dynamic_pos_bias_log_distance", {"dynamic_pos_bias": True, "dynamic_pos_bias_log_distance": True},
         "it reads the logarithm", "以对数距离为输入", {"dynamic_pos_bias": True}),
    Case(LAYERS, "gate_residual", {"gate_residual": True}, "a GRU cell joins branch and residual",
         "GRU 单元合并分支与残差"),
    Case(LAYERS, "scale_residual", {"scale_residual": True}, "learned factors on the residual", "残差上的可学习系数"),
    Case(LAYERS, "residual_attn", {"residual_attn": True}, "scores of layers before are added", "加上前面各层的分数"),
    Case(LAYERS, "cross_residual_attn", {"cross_attend": True, "cross_residual_attn": True},
         "the same among cross-attentions", "交叉注意力之间同理", {"cross_attend": True}),
    Case(LAYERS, "resi_dual", {"resi_dual": True}, "a second residual stream", "第二条残差流"),
    Case(LAYERS, "shift_tokens", {"shift_tokens": 1}, "shares of features moved along the tokens",
         "部分特征沿词元移动"),
    Case(LAYERS, "deepnorm", {"deepnorm": True}, "DeepNorm's residuals and first weights",
         "DeepNorm 的残差与初始权重"),
)  # fmt: skip

# Every option of the table is in one of these, except those that another excludes.
COMBINED = {
    "decoder": {
        "causal": True, "attn_kv_heads": 2, "attn_num_mem_kv": 3, "attn_head_scale": True, "attn_gate_values": True,
        "attn_on_attn": True, "attn_max_attend_past": 5, "alibi_pos_bias": True, "alibi_num_heads": 3,
        "residual_attn": True, "use_rmsnorm": True, "ff_glu": True, "ff_swish": True, "ff_no_bias": True,
        "shift_tokens": 1, "scale_residual": True,
    },
    "formed": {
        "causal": True, "attn_kv_heads": 2, "attn_num_mem_kv": 2, "attn_talking_heads": True, "attn_sparse_topk": 4,
        "attn_value_dim_head": 5, "attn_qk_norm": True, "attn_qk_norm_groups": 2, "attn_qk_norm_dim_scale": True,
        "rel_pos_bias": True, "rel_pos_num_buckets": 8, "rel_pos_max_distance": 5, "sandwich_norm": True,
        "ff_relu_squared": True, "ff_post_act_ln": True,
    },
    "cross": {
        "cross_attend": True, "cross_residual_attn": True, "macaron": True, "dynamic_pos_bias": True,
        "dynamic_pos_bias_log_distance": True, "resi_dual": True, "attn_shared_kv": True, "use_scalenorm": True,
        "shift_tokens": 1,
    },
    "xpos": {
        "causal": True, "rotary_xpos": True, "rotary_xpos_scale_base": 64, "gate_residual": True, "sandwich_coef": 1,
        "attn_one_kv_head": True, "attn_qk_norm": True, "attn_qk_norm_scale": 3.0,
    },
}  # fmt: skip

# Decoders that generate with cached keys and values: arguments of the stack, arguments of the model.
DECODING = {
    "learned": ({"attn_kv_heads": 1, "use_rmsnorm": True}, {"num_memory_tokens": 2}),
    "sinusoidal": ({"resi_dual": True, "attn_gate_values": True}, {"scaled_sinu_pos_emb": True, "emb_dim": 12}),
    "alibi": (
        {"alibi_pos_bias": True, "attn_num_mem_kv": 2, "residual_attn": True, "heads": 4, "attn_kv_heads": 2},
        {"use_abs_pos_emb": False, "max_seq_len": 3},
    ),
    "xpos": ({"rotary_xpos": True, "attn_one_kv_head": True}, {"max_seq_len": 3}),
    "t5": (
        {"rel_pos_bias": True, "attn_talking_heads": True, "attn_sparse_topk": 4, "attn_max_attend_past": 5,
         "attn_value_dim_head": 6},
        {},
    ),
    "network": ({"dynamic_pos_bias": True, "attn_max_attend_past": 3, "attn_flash": False}, {}),
    "cross": (
        {"cross_attend": True, "rotary_pos_emb": True, "attn_qk_norm": True, "attn_shared_kv": True},
        {"num_memory_tokens": 2, "tie_embedding": True},
    ),
}  # fmt: skip

# (owner, arguments beside the sizes, what the message says)
ILLEGAL = (
    (ATTENTION, {"one_kv_head": True, "kv_heads": 2}, "both say how many key/value heads"),
    (ATTENTION, {"kv_heads": 3}, "'kv_heads' must be a divisor of heads = 4"),
    (ATTENTION, {"shared_kv": True, "value_dim_head": 4}, "values are the keys"),
    (ATTENTION, {"qk_norm_scale": 3.0}, "left out without qk_norm="),
    (ATTENTION, {"qk_norm_groups": 2}, "left out without qk_norm="),
    (ATTENTION, {"qk_norm_dim_scale": True}, "left out without qk_norm="),
    (ATTENTION, {"flash": True, "talking_heads": True}, "needs whole rows"),
    (ATTENTION, {"flash": True, "sparse_topk": 4}, "needs whole rows"),
    (ATTENTION, {"attention": "flash_attn2", "talking_heads": True}, "computes its own softmax"),
    (ATTENTION, {"attention": "flash_attn2", "num_mem_kv": 1}, "computes its own softmax"),
    (ATTENTION, {"attention": "nothing"}, "'attn_mechanism' must be one of"),
    (ATTENTION, {"attention_options": {"block_size": 4}}, "left out without attention="),
    (ATTENTION, {"talking": True}, "'talking' must be one of dim, dim_head"),
    (ATTENTION, {"dropout": 1.0}, "'dropout' must be a float in"),
    (FEED_FORWARD, {"swish": True, "relu_squared": True}, "each is the activation"),
    (LAYERS, {"alibi_pos_bias": True, "rel_pos_bias": True}, "one bias by position"),
    (LAYERS, {"rel_pos_bias": True, "dynamic_pos_bias": True}, "one bias by position"),
    (LAYERS, {"use_rmsnorm": True, "use_scalenorm": True}, "each is the norm"),
    (LAYERS, {"resi_dual": True, "deepnorm": True}, "residuals and norms of its own"),
    (LAYERS, {"deepnorm": True, "gate_residual": True}, "post-norm"),
    (LAYERS, {"pre_norm": False, "sandwich_norm": True}, "the sandwich is a pre-norm"),
    (LAYERS, {"layer_dropout": 0.1, "residual_attn": True}, "no scores to hand on"),
    (LAYERS, {"cross_attend": True, "only_cross": True}, "which layers there are"),
    (LAYERS, {"only_cross": True, "rotary_pos_emb": True}, "has no self-attention"),
    (LAYERS, {"only_cross": True, "attn_attention": "local"}, "without self-attention"),
    (LAYERS, {"cross_residual_attn": True}, "without cross-attention"),
    (LAYERS, {"rotary_xpos": True}, "left out without causal="),
    (LAYERS, {"rotary_emb_dim": 8}, "left out without rotary_pos_emb="),
    (LAYERS, {"alibi_num_heads": 2}, "left out without alibi_pos_bias="),
    (LAYERS, {"rel_pos_num_buckets": 16}, "left out without rel_pos_bias="),
    (LAYERS, {"dynamic_pos_bias_log_distance": True}, "left out without dynamic_pos_bias="),
    (LAYERS, {"residual_attn": True, "attn_attention": "flash_attn2"}, "hands on no scores"),
    (LAYERS, {"attn_causal": True}, "given as 'causal'"),
    (LAYERS, {"attn_talking": True}, "'talking' must be one of"),
    (LAYERS, {"ff_gelu": True}, "'gelu' must be one of dim, mult"),
    (LAYERS, {"depht": 3}, "'depht' must be one of dim, depth"),
    (LAYERS, {"sandwich_coef": 3}, "'sandwich_coef' must be an int in \\[1, 2\\]"),
)


def arguments(extra):
    """Arguments of `AttentionLayers` for tests: `SIZES` and the option's."""
    return dict(SIZES, **extra)


def stack_of(extra):
    """The `Stack` of `AttentionLayers(**arguments(extra))`."""
    return make_stack(LAYERS, (), arguments(extra), {})


def draws(seed=0):
    """``x`` (B, N, DIM), ``context`` (B, CONTEXT, DIM), ``d_out`` like x, float64."""
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal((B, length, DIM)) for length in (N, CONTEXT, N))


def masks():
    """``mask`` (B, N), ``context_mask`` (B, CONTEXT), ``attn_mask`` (HEADS, N, N), booleans; each hides something."""
    rng = np.random.default_rng(1)
    mask, context_mask = np.ones((B, N), bool), np.ones((B, CONTEXT), bool)
    mask[0, -2:], context_mask[1, :2] = False, False
    return mask, context_mask, rng.random((HEADS, N, N)) < 0.8


def randomised(params, seed=0):
    """Nested parameters whose constants (ones of norms, zeros of gates) are replaced by numbers that matter."""
    rng = np.random.default_rng(seed)

    def fill(x):
        x = np.asarray(x, np.float32)
        constant = x.size > 0 and np.all(x == x.flat[0])
        return (1.0 + 0.3 * rng.standard_normal(x.shape)).astype(np.float32) if constant else x

    def walk(node):
        return {name: walk(child) if isinstance(child, dict) else fill(child) for name, child in node.items()}

    return walk(params)
