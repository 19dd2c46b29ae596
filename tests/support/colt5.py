"""Properties of CoLT5's router, once for both frameworks, and the inputs of its layers. The judges are plain numpy."""

import numpy as np
import pytest

from flash_attention.core.mechanisms import colt5 as shared

rng = np.random.default_rng(5)
B, N, DIM = 2, 17, 12
X, X_OUT = rng.standard_normal((2, B, N, DIM))
CONTEXT = rng.standard_normal((B, 23, DIM))
MASK = np.ones((B, N), bool)
MASK[0, 11:], MASK[1, ::3] = False, False  # 11 valid tokens each
SCORES = rng.standard_normal((3, 2, 40))
KEEP = rng.random(SCORES.shape) < 0.7
KEEP[0, 0] = False  # nothing to choose from

ATTENTION = {
    "num_heavy_tokens_q": 5, "num_heavy_tokens_kv": 6, "light_dim_head": 4, "light_heads": 3, "light_window_size": 6,
    "heavy_dim_head": 5, "heavy_heads": 4,
}  # fmt: skip
FEED_FORWARD = {"num_heavy_tokens": 6, "light_ff_mult": 0.5, "heavy_ff_mult": 2}
BLOCK = dict(
    {name: value for name, value in ATTENTION.items() if not name.startswith("num")},
    num_heavy_attn_tokens_q=5, num_heavy_attn_tokens_kv=6, num_heavy_ff_tokens=6, heavy_ff_mult=2,
)  # fmt: skip
CROSS = {"num_tokens_q": 5, "num_tokens_kv": 7, "dim_head": 5, "heads": 4, "num_sets_kv": 2}


class Router:
    """A framework gives `descent(s, **options)` and `route(weight, x, num_tokens, mask, **options)`, numpy in and out;
    the latter gives (tokens, indices, gates, mask)."""

    @pytest.mark.parametrize("options", [
        {"n_iters": 20, "k": 9, "eps": 0.03, "eps_init": 4.0, "eps_decay": 0.7},
        {"n_iters": 5, "k": 4.5, "mask": KEEP},
    ], ids=["annealed", "masked"])  # fmt: skip
    def test_descent_equals_the_plain_iteration(self, options):
        want = shared.coor_descent(np, SCORES, **options)
        np.testing.assert_allclose(self.descent(SCORES, **options), want, atol=2e-4)

    def test_descent_is_a_soft_choice(self):
        for k in (1, 7, 40):
            got = self.descent(SCORES, n_iters=200, k=k, eps=0.5)
            assert (got >= 0).all() and (got <= 1 + 1e-6).all()
            np.testing.assert_allclose(got.sum(-1), k, rtol=1e-2)
            order = np.argsort(SCORES, -1)
            assert (np.diff(np.take_along_axis(got, order, -1)) >= -1e-6).all()
        masked = self.descent(SCORES, n_iters=20, k=3, eps=0.5, mask=KEEP)
        assert not masked[~KEEP].any() and np.isfinite(masked).all()
        np.testing.assert_allclose(
            self.descent(np.where(KEEP, SCORES, 99.0), n_iters=20, k=3, eps=0.5, mask=KEEP), masked, atol=1e-6
        )

    @pytest.mark.parametrize("change, match", [
        ({"n_iters": 0}, "'n_iters' must be an int >= 1"),
        ({"k": 0}, "'k' must be"),
        ({"eps": 0.0}, "'eps' must be"),
        ({"eps_init": -1.0}, "'eps_init' must be"),
        ({"mask": KEEP[0]}, "'mask' must be of the scores' shape"),
    ])  # fmt: skip
    def test_descent_refuses(self, change, match):
        with pytest.raises((ValueError, TypeError), match=match):
            self.descent(SCORES, **dict({"n_iters": 2, "k": 3}, **change))

    def test_the_largest_scores_are_chosen(self):
        weight = rng.standard_normal((2, DIM))
        scores = np.einsum("bnd,rd->brn", X, weight)
        tokens, indices, gates, mask = self.route(weight, X, 5, None)
        np.testing.assert_array_equal(indices, shared.selection(scores, 5))
        np.testing.assert_allclose(tokens, X[np.arange(B)[:, None, None], indices], atol=1e-6)
        assert mask is None and (gates == 1.0).all()  # exactly, by the straight-through rule
        soft = self.route(weight, X, 5, None, straight_through=False)[2]
        want = shared.coor_descent(np, scores, 20, 5 * 9 / 8, 0.03, 4.0, 0.7)
        np.testing.assert_allclose(soft, np.take_along_axis(want, indices, -1), atol=1e-3)

    def test_ties_take_the_lower_index(self):
        x = np.repeat(X[:, :3], 6, 1)  # every token six times
        weight = rng.standard_normal((1, DIM))
        scores = np.einsum("bnd,rd->brn", np.float32(x), np.float32(weight))
        np.testing.assert_array_equal(self.route(weight, x, 8, None)[1], shared.selection(scores, 8))

    def test_masked_tokens_are_chosen_last_and_weigh_nothing(self):
        weight = rng.standard_normal((1, DIM))
        _, indices, gates, mask = self.route(weight, X, 9, MASK)
        assert np.take_along_axis(MASK[:, None], indices, -1).all() and mask.all() and (gates == 1.0).all()
        _, indices, gates, mask = self.route(weight, X, 14, MASK)
        chosen = np.take_along_axis(MASK[:, None], indices, -1)
        assert (chosen.sum(-1) == 11).all()
        np.testing.assert_array_equal(mask, chosen)
        np.testing.assert_array_equal(gates, chosen.astype(float))

    def test_few_tokens_are_all_taken(self):
        tokens, indices, gates, mask = self.route(rng.standard_normal((2, DIM)), X, N, MASK)
        assert indices is None and (gates == 1.0).all() and gates.shape == (B, 2, N)
        np.testing.assert_allclose(tokens, np.repeat(X[:, None], 2, 1), atol=1e-6)
        np.testing.assert_array_equal(mask, np.repeat(MASK[:, None], 2, 1))


BAD_ROUTERS = [
    ({"dim": 0}, "'dim' must be an int >= 1"),
    ({"straight_through": 1}, "'straight_through' must be a bool"),
    ({"fetch_k_ratio": 0.5}, "'fetch_k_ratio' must be a float >= 1"),
    ({"num_routing_tokens": 0}, "'num_routing_tokens' must be an int >= 1"),
    ({"eps": -1.0}, "'eps' must be"),
]
BAD_ATTENTION = [
    ({"num_heavy_tokens_q": 0}, "'num_heavy_tokens_q' must be an int >= 1"),
    ({"num_routed_kv": 3}, "'num_routed_kv' must be a divisor of the 4 heavy heads"),
    ({"light_window_size": 0}, "'light_window_size' must be an int >= 1"),
    ({"use_null_q_tokens": 1}, "'use_null_q_tokens' must be a bool"),
]
BAD_FEED_FORWARD = [
    ({"num_heavy_tokens": 1.5}, "'num_heavy_tokens' must be an int >= 1"),
    ({"light_ff_mult": 0.01}, "'light_ff_mult' must be at least 1 / dim = 1 / 12"),
    ({"heavy_ff_mult": None}, "'heavy_ff_mult' must be a float > 0"),
    ({"router_straight_through": None}, "'straight_through' must be a bool"),
]
