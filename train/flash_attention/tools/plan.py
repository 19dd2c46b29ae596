"""`python -m flash_attention plan`: draw which tiles a call visits, without computing anything; `--ascend`: what the
Ascend 910 kernels would do with it.
"""

import importlib

from flash_attention.core.errors import invalid_value
from flash_attention.core.plan import make_plan
from flash_attention.core.spec import NO_LIMIT, AttentionSpec
from flash_attention.core.tiling import choose_tile, get_strategy, strategy_names
from flash_attention.core.tiling.base import Tile
from flash_attention.core.validation import check_int, check_window

LAYER = "plan"


def add_arguments(parser):
    """Sizes and restrictions under the names of the functional call."""
    parser.add_argument("--q-len", type=int, default=4096, metavar="N", help="queries (default 4096)")
    parser.add_argument("--kv-len", type=int, metavar="N", help="keys (default: as many as queries)")
    parser.add_argument("--causal", action="store_true", help="key j visible only when j <= position")
    parser.add_argument("--prev", type=int, default=NO_LIMIT, metavar="N", help="visible blocks before the own one")
    parser.add_argument("--next", type=int, default=NO_LIMIT, metavar="N", help="visible blocks after the own one")
    parser.add_argument("--window", type=int, nargs=2, metavar=("L", "R"), help="visible tokens to the left and right")
    parser.add_argument("--block-size", type=int, metavar="N", help="tokens in a block (default: the strategy's)")
    parser.add_argument("--q-offset", type=int, metavar="P", help="position of query 0 (default kv_len - q_len)")
    parser.add_argument("--strategy", choices=strategy_names(), default="sparse", help="tiling strategy (sparse)")
    parser.add_argument("--head-dim", type=int, default=64, metavar="D", help="head size the strategy sees (64)")
    parser.add_argument("--tile", type=int, nargs=2, metavar=("Q", "KV"), help="compute tile (default: the strategy's)")
    parser.add_argument("--cores", type=int, default=1, metavar="N", help="split the query tiles over N cores")
    parser.add_argument("--ascend", nargs="?", const="910A", choices=("910A", "310P"),
                        help="predict the kernels' cycles on this chip (910A)")  # fmt: skip
    parser.add_argument("--batch", type=int, metavar="N", help="batch size, with --ascend (default 1)")
    parser.add_argument("--heads", type=int, metavar="N", help="heads, with --ascend (default 8)")
    parser.add_argument("--plot", metavar="FILE.png", help="draw buffers and pipes, with --ascend")


def run(args):
    """Print the drawing; returns 0. Bad sizes end in the parser's usage message and exit code 2."""
    try:
        print(describe(args))
    except ValueError as error:
        args.parser.error(str(error))
    return 0


def describe(args):
    """The plan as text: the drawing, and the loads of the cores when there are several; or the kernels' prediction."""
    if args.ascend:
        if args.tile or args.cores != 1:
            raise invalid_value(LAYER, "tile and cores", "left out with --ascend: the kernels choose", "a value")
        return importlib.import_module("flash_attention.tools.plan_ascend").describe(args, spec_of(args))
    if args.plot or args.batch is not None or args.heads is not None:
        raise invalid_value(LAYER, "plot, batch and heads", "given with --ascend only", "a value")
    plan = plan_of(args)
    if args.cores == 1:
        return str(plan)
    loads = plan.core_loads().tolist()
    return "{}\ntiles per core: {}".format(plan, " ".join(str(load) for load in loads))


def spec_of(args):
    """The :class:`~flash_attention.core.spec.AttentionSpec` that the arguments describe."""
    strategy = get_strategy(args.strategy, LAYER)
    block_size = strategy.block_size if args.block_size is None else args.block_size
    q_len = check_int(LAYER, "q_len", args.q_len, 1)
    heads = check_int(LAYER, "heads", 8 if args.heads is None else args.heads, 1)
    return AttentionSpec(
        batch=check_int(LAYER, "batch", 1 if args.batch is None else args.batch, 1),
        heads=heads,
        kv_heads=heads,
        q_len=q_len,
        kv_len=q_len if args.kv_len is None else check_int(LAYER, "kv_len", args.kv_len, 1),
        head_dim=check_int(LAYER, "head_dim", args.head_dim, 1),
        causal=args.causal,
        prev_block_num=check_int(LAYER, "prev_block_num", args.prev, 0),
        next_block_num=check_int(LAYER, "next_block_num", args.next, 0),
        block_size=check_int(LAYER, "block_size", block_size, 1),
        local_window_size=check_window(LAYER, args.window),
        q_offset=args.q_offset,
        dtype="float16",
        tiling=args.strategy,
    )


def plan_of(args):
    """The :class:`~flash_attention.core.plan.TilePlan` that the arguments describe; it is the same for every head."""
    spec, strategy = spec_of(args), get_strategy(args.strategy, LAYER)
    tile = Tile(*args.tile) if args.tile else choose_tile(strategy, spec, LAYER, (Tile(128, 128),))
    return make_plan(spec.band, spec.offset, tile.q, tile.kv, args.cores)
