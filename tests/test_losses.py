"""Tests of every claim of minicai/losses.py.

They compare the functions with hand-worked numbers and with exact enumeration over three tokens,
and check identities and invariance under padding and splitting.

`tests/mutate.py` replaces `L` by altered copies of the module and expects a test to fail for each.
Therefore call the functions as `L.name` when a test runs, never bind one at import, and use plain
asserts and no fixtures.
"""

from math import exp, log

import pytest
import torch
import torch.nn.functional as F
from torch import tensor

from minicai import losses as L

MASK = tensor([[True, True, False], [False, True, True]])  # padded on the right, padded on the left
LOGITS, REF_LOGITS = tensor([0.5, 0.25, 0.25]).log(), tensor([0.25, 0.5, 0.25]).log()
KL = log(2) / 4  # KL(pi || ref) = log(2) / 2 - log(2) / 4


def f64(*rows):
    return tensor(rows, dtype=torch.float64)


def assert_equals(actual, expected, tolerance=1e-9):
    actual, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def grad(loss, x):
    return torch.autograd.grad(loss.sum(), x)[0]


# --- by hand --------------------------------------------------------------------------------------


def test_nll_is_minus_the_logprob_inside_the_mask():
    assert_equals(
        L.nll_loss(f64([-0.5, -2, -7], [-9, -1, -0.25]), MASK), [[0.5, 2, 0], [0, 1, 0.25]]
    )


def test_preference_loss_is_the_cross_entropy_with_a_soft_label():
    second = f64(5, 5, 5)
    loss = L.preference_loss(second + log(3), second, f64(1, 0, 0.25))
    # sigma(log 3) = 3/4, sigma(-log 3) = 1/4
    assert_equals(loss, [log(4 / 3), log(4), 0.25 * log(4 / 3) + 0.75 * log(4)])


def test_the_margin_is_what_the_preferred_score_must_lead_by():
    loss = L.preference_loss(f64(log(6), log(6)), f64(0, 0), f64(1, 0), margin=log(2))
    # sigma(log 6 - log 2) = 3/4; sigma(-log 6 - log 2) = 1 / (1 + 12)
    assert_equals(loss, [log(4 / 3), log(13)])


def test_centering_is_the_square_of_the_sum():
    assert_equals(L.centering_loss(f64(1.5, 2, 1), f64(-0.5, 1, -1)), [1, 9, 0])


@pytest.mark.parametrize(
    "name, expected", [("kl_k1", log(2)), ("kl_k2", log(2) ** 2 / 2), ("kl_k3", log(2) - 0.5)]
)
def test_kl_estimators_of_one_token(name, expected):
    assert_equals(getattr(L, name)(f64(log(0.5)), f64(log(0.25))), [expected])


def test_exact_kl_and_entropy_sum_over_the_last_dimension():
    # A constant added to logits changes nothing.
    logits, ref_logits = LOGITS.expand(5, 4, 3) + 2, REF_LOGITS.expand(5, 4, 3) - 3
    assert_equals(L.exact_kl(logits, ref_logits), torch.full((5, 4), KL), 1e-6)
    # log(2)/2 + log(4)/4 + log(4)/4
    assert_equals(L.entropy(logits), torch.full((5, 4), 1.5 * log(2)), 1e-6)
    assert_equals(L.entropy(torch.zeros(3)), log(3), 1e-6)


def test_exact_kl_and_entropy_of_bfloat16_are_computed_in_float32():
    a, b = LOGITS.bfloat16(), REF_LOGITS.bfloat16()
    assert L.exact_kl(a, b).dtype == L.entropy(a).dtype == torch.float32
    assert_equals(L.exact_kl(a, b), L.exact_kl(a.float(), b.float()), 1e-7)


def test_shaped_rewards_pay_the_score_at_the_last_token_of_the_response():
    rewards = L.shaped_rewards(f64(2, -3), f64([0.5, -1, 99], [99, 2, 1]), MASK, kl_coef=0.1)
    assert_equals(rewards, [[-0.05, 0.1 + 2, 0], [0, -0.2, -0.1 - 3]])
    # The only token is the first.
    assert_equals(L.shaped_rewards(f64(5), f64([0, 0]), tensor([[True, False]]), 1.0), [[5, 0]])


def test_shaped_rewards_refuse_an_empty_response():
    with pytest.raises(ValueError, match="no token"):
        L.shaped_rewards(
            f64(2, -3), f64([1, 1], [1, 1]), tensor([[True, True], [False, False]]), 0.1
        )


@pytest.mark.parametrize(
    "kl, expected", [(6, 0.5), (6.6, 0.505), (5.4, 0.495), (12, 0.51), (600, 0.51), (0, 0.49)]
)
def test_adaptive_kl_coef_rises_above_the_target_falls_below_it_and_is_clipped(kl, expected):
    # error = clip(kl / 6 - 1, -0.2, 0.2) = 0, 0.1, -0.1, 0.2, 0.2, -0.2
    # The coefficient is multiplied by 1 + error * 10 / 100.
    assert_equals(L.adaptive_kl_coef(0.5, kl, target=6.0, horizon=100, episodes=10), expected)


def test_gae():
    rewards, values = f64([1, 2, 99], [99, 0, 4]), f64([0.5, 1, 99], [99, 2, 3])
    advantages, returns = L.gae(rewards, values, MASK, gamma=0.9, lam=0.5)
    # first: A_1 = 2 - 1 = 1; A_0 = (1 + 0.9 * 1 - 0.5) + 0.45 * 1
    # second: A_2 = 4 - 3 = 1; A_1 = (0 + 0.9 * 3 - 2) + 0.45 * 1
    assert_equals(advantages, [[1.85, 1, 0], [0, 1.15, 1]])
    assert_equals(returns, [[2.35, 2, 0], [0, 3.15, 4]])


def test_gae_of_a_response_of_one_token():
    advantages, returns = L.gae(f64([3]), f64([1]), tensor([[True]]), 0.9, 0.5)
    assert_equals((advantages.item(), returns.item()), (2, 3))


def test_moments_mean_and_variance():
    moments = L.moments(tensor([[1.0, 2, 99], [99, 3, 4]]), MASK)
    assert moments.dtype == torch.float64
    assert_equals(moments, [4, 10, 30])
    assert_equals(torch.stack(L.mean_and_variance(moments)), [2.5, 1.25])
    assert_equals(torch.stack(L.mean_and_variance(f64(1, 3, 9))), [3, 0])  # one entry
    assert_equals(torch.stack(L.mean_and_variance(f64(0, 0, 0))), [0, 0])  # none


def test_variance_of_a_constant_is_never_negative():
    for count in range(1, 20):
        # 0.1 is not a binary fraction: for some counts rounding falls below 0.
        x = torch.full((count,), 0.1, dtype=torch.float64)
        assert L.mean_and_variance(L.moments(x, x > 0))[1] >= 0


def test_whiten_and_whiten_scale_by_hand():
    x = f64([1, 2, 99], [99, 3, 4])
    # sqrt(1.25 + 1) = 1.5
    assert_equals(L.whiten(x, MASK, L.moments(x, MASK), eps=1.0), [[-1, -1 / 3, 0], [0, 1 / 3, 1]])
    assert_equals(
        L.whiten_scale(x, MASK, L.moments(x, MASK), eps=1.0), [[2 / 3, 4 / 3, 0], [0, 2, 8 / 3]]
    )


def test_policy_loss_clips_only_what_would_be_gained():
    logprobs = f64([1.5, 0.5, 9], [9, 0.5, 1.5]).log()
    loss = L.policy_loss(
        logprobs, torch.zeros_like(logprobs), f64([2, 2, 9], [9, -1, -1]), MASK, 0.2
    )
    assert_equals(loss, [[-1.2 * 2, -0.5 * 2, 0], [0, 0.8, 1.5]])


def test_value_loss_is_the_worse_of_plain_and_clipped_error():
    values, returns = f64([3, 3, 9], [9, -1, -1]), f64([2, 4, 0], [0, 0, -1])
    loss = L.value_loss(values, torch.ones_like(values), returns, MASK, 0.5)
    # Clipped to 1.5, 1.5, 0.5, 0.5.
    # Halves of max(1, 0.25), max(1, 6.25), max(1, 0.25), max(0, 2.25).
    assert_equals(loss, [[0.5, 3.125, 0], [0, 0.5, 1.125]])


def test_cai_loss_weighs_the_reinforcement_term():
    assert_equals(L.cai_loss(f64(2), f64(3), alpha=0.5), [3.5])


def test_approx_kl_of_one_token():
    logprobs, old_logprobs = (
        f64([log(0.25), -1, 9], [9, -1, log(0.5)]),
        f64([log(0.5), -1, 0], [0, -1, log(0.25)]),
    )
    # rho = pi / pi_old = 1/2: -1/2 - log(1/2).  rho = 2: 1 - log 2
    assert_equals(
        L.approx_kl(logprobs, old_logprobs, MASK), [[log(2) - 0.5, 0, 0], [0, 0, 1 - log(2)]]
    )


def test_clip_fraction_counts_both_sides_whatever_the_advantage():
    # 1 / 1.22 and 1 / 0.82 are on the other side of the edge.
    logprobs = f64([1.22, 1.1, 9], [9, 0.82, 0.7]).log()
    assert_equals(
        L.clip_fraction(logprobs, torch.zeros_like(logprobs), MASK, 0.2), [[1, 0, 0], [0, 0, 1]]
    )
    # The edge itself is inside.
    assert_equals(L.clip_fraction(f64([-1.0]), f64([-1.0]), tensor([[True]]), 0.0), [[0]])
    assert L.clip_fraction(logprobs.float(), logprobs.float(), MASK, 0.2).dtype == torch.float32


@pytest.mark.parametrize(
    "values, expected",
    [((1, 2, 3, 4), 1), ((7, 7, 7, 7), 0), ((1, 2, 3, 3), 0.85), ((4, 3, 2, 1), -3)],
)
def test_explained_variance(values, expected):
    values, mask = f64([*values, 1e9]), tensor([[True] * 4 + [False]])
    # 1 - (3/16) / (5/4) = 0.85; 1 - 5 / (5/4) = -3
    assert_equals(L.explained_variance(values, f64([1, 2, 3, 4, -1e9]), mask), expected)
    assert_equals(L.explained_variance(values / 10, f64([0.1, 0.2, 0.3, 0.4, 0]), mask), expected)
    # A variance of exactly eps counts as none.
    assert L.explained_variance(values, f64([1, -1, 1, -1, 0]), mask, eps=1.0) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_explained_variance_of_constant_returns_is_0_in_spite_of_rounding(dtype):
    for count in range(1, 200):
        returns, values = (
            torch.full((1, count), 0.1, dtype=dtype),
            torch.arange(count, dtype=dtype)[None],
        )
        assert L.explained_variance(values, returns, returns > 0) == 0


# --- by enumeration -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kl_k1", "kl_k3"])
def test_the_mean_of_k1_and_of_k3_under_the_policy_is_the_exact_kl(name):
    assert_equals(
        (LOGITS.exp() * getattr(L, name)(LOGITS, REF_LOGITS)).sum(),
        L.exact_kl(LOGITS, REF_LOGITS),
        1e-6,
    )


def test_the_mean_of_approx_kl_under_the_old_policy_is_the_kl_from_the_old_to_the_new():
    kl = L.approx_kl(LOGITS[None], REF_LOGITS[None], torch.ones(1, 3, dtype=torch.bool))
    assert_equals((REF_LOGITS.exp() * kl).sum(), L.exact_kl(REF_LOGITS, LOGITS), 1e-6)


@pytest.mark.parametrize("name, follows_the_kl", [("kl_k1", False), ("kl_k2", True)])
def test_the_mean_gradient_of_k2_is_that_of_the_kl_and_of_k1_is_zero(name, follows_the_kl):
    logits = LOGITS.clone().requires_grad_()
    # The weights are constants: tokens are drawn first, and then fixed.
    estimate = LOGITS.exp() * getattr(L, name)(logits.log_softmax(-1), REF_LOGITS)
    true_gradient = grad(L.exact_kl(logits, REF_LOGITS), logits)
    assert true_gradient.abs().max() > 0.1
    assert_equals(grad(estimate, logits), true_gradient if follows_the_kl else torch.zeros(3), 1e-6)


def test_a_kl_reward_of_the_other_sign_pays_for_divergence():
    def rejected_k1(logprobs, ref_logprobs):
        return ref_logprobs - logprobs

    def mean_reward(estimator):
        rewards = L.shaped_rewards(
            tensor([0.0]),
            estimator(LOGITS, REF_LOGITS)[None],
            torch.ones(1, 3, dtype=torch.bool),
            0.1,
        )
        return (LOGITS.exp() * rewards).sum()

    assert_equals(mean_reward(L.kl_k1), -0.1 * KL, 1e-6)
    assert_equals(mean_reward(rejected_k1), 0.1 * KL, 1e-6)


def test_the_score_read_at_the_token_before_the_first_pad_lands_in_the_first_turn():
    # pad = eos: a first turn, then a response with its own end token, then padding.
    tokens, pad = tensor([[5, 0, 6, 7, 0, 0]]), 0
    mask = tensor([[False, False, True, True, True, False]])
    rejected_position = (tokens == pad).int().argmax(-1) - 1
    rewards = L.shaped_rewards(tensor([1.0]), torch.zeros(1, 6), mask, 0.1)
    assert rewards.argmax(-1).item() == 4 and rejected_position.item() == 0


# --- identities -----------------------------------------------------------------------------------


def test_swapping_a_pair_and_its_label_leaves_the_preference_loss():
    first, second, p_first = f64(1.0, -2.0, 0.3), f64(0.2, 0.1, 5.0), f64(0.9, 0.3, 0.0)
    assert_equals(
        L.preference_loss(first, second, p_first, 0.3),
        L.preference_loss(second, first, 1 - p_first, 0.3),
    )


def test_a_soft_label_of_one_half_is_symmetric_and_least_at_a_tie():
    loss = L.preference_loss(f64(-2, 0, 2), f64(0, 0, 0), f64(0.5, 0.5, 0.5))
    assert_equals(loss[0], loss[2])
    assert_equals(loss[1], log(2))
    assert loss[1] < loss[0]


def test_the_gradient_of_the_preference_loss_is_the_prediction_minus_the_label():
    first, p_first = f64(-1, 0, 2).requires_grad_(), f64(0, 0.5, 0.9)
    prediction = [1 / (1 + exp(-d)) for d in (-2, -1, 1)]
    assert_equals(
        grad(L.preference_loss(first, f64(1, 1, 1), p_first), first), f64(*prediction) - p_first
    )


@pytest.mark.parametrize("name", ["kl_k2", "kl_k3"])
def test_k2_and_k3_are_never_negative_and_zero_only_on_agreement(name):
    kl = getattr(L, name)(f64(-3, -1, -0.5), f64(-1, -1, -2))
    assert kl[1] == 0 and kl[0] > 0 and kl[2] > 0


def test_gae_with_lambda_1_is_the_return_minus_the_value_and_with_lambda_0_the_td_error():
    rewards, values, mask = (
        f64([1, 2, 4]),
        f64([0.3, -0.7, 0.1]),
        torch.ones(1, 3, dtype=torch.bool),
    )
    advantages, returns = L.gae(rewards, values, mask, gamma=0.5, lam=1.0)
    assert_equals(returns, [[1 + 0.5 * 2 + 0.25 * 4, 2 + 0.5 * 4, 4]])
    assert_equals(advantages, returns - values)
    td_errors, _ = L.gae(rewards, values, mask, gamma=0.5, lam=0.0)
    assert_equals(td_errors, [[1 + 0.5 * -0.7 - 0.3, 2 + 0.5 * 0.1 + 0.7, 4 - 0.1]])


@pytest.mark.parametrize("wanted", ["rewards", "values"])
def test_no_gradient_flows_through_gae(wanted):
    inputs = {"rewards": f64([1, 2]), "values": f64([3, 4])}
    inputs[wanted].requires_grad_()
    assert not any(
        x.requires_grad for x in L.gae(**inputs, mask=tensor([[True, True]]), gamma=0.9, lam=0.9)
    )


def test_whitened_entries_have_mean_0_and_variance_1_and_scaled_ones_keep_their_sign():
    x = f64([1, -2, 1e6], [1e6, 3, 7])
    whitened, scaled = (f(x, MASK, L.moments(x, MASK))[MASK] for f in (L.whiten, L.whiten_scale))
    assert_equals(
        (
            whitened.mean().item(),
            whitened.var(correction=0).item(),
            scaled.var(correction=0).item(),
        ),
        (0, 1, 1),
        1e-7,
    )
    assert scaled.sign().tolist() == [1, -1, 1, 1]


def test_whitening_a_constant_gives_zeros_and_scaling_it_stays_finite():
    x = torch.full((2, 3), 2.0)
    assert_equals(L.whiten(x, MASK, L.moments(x, MASK)), torch.zeros(2, 3))
    # 1 / sqrt(1e-8) = 1e4
    assert_equals(L.whiten_scale(x, MASK, L.moments(x, MASK)) / 1e4, 2.0 * MASK, 1e-6)


def test_at_ratio_1_the_policy_gradient_is_reinforce():
    logprobs, advantages = (
        f64([-1, -2, -3], [-4, -5, -6]).requires_grad_(),
        f64([2, -1, 9], [9, 0.5, -3]),
    )
    assert_equals(
        grad(L.policy_loss(logprobs, logprobs.detach(), advantages, MASK, 0.2), logprobs),
        -advantages * MASK,
    )


def test_the_policy_gradient_stops_beyond_the_clip_on_the_side_of_gain_only():
    ratios = f64([1.5, 0.5, 1.5, 0.5])
    logprobs = ratios.log().requires_grad_()
    loss = L.policy_loss(
        logprobs, torch.zeros(1, 4), f64([2, 2, -2, -2]), torch.ones(1, 4, dtype=torch.bool), 0.2
    )
    assert_equals(grad(loss, logprobs), [[0, -2 * 0.5, 2 * 1.5, 0]])


@pytest.mark.parametrize("target", [3.7, 0.3])
def test_value_loss_is_the_plain_error_inside_the_clip_and_never_less_beyond_it(target):
    values = f64([0, 1, 2, 3, 4]).requires_grad_()  # the old value is 2, the clip 1
    loss = L.value_loss(
        values,
        torch.full((1, 5), 2.0),
        torch.full((1, 5), target),
        torch.ones(1, 5, dtype=torch.bool),
        1.0,
    )
    plain = (values - target) ** 2 / 2
    assert_equals(loss[:, 1:4], plain[:, 1:4], 1e-6)
    beyond = 4 if target > 2 else 0  # it moved towards the target by more than the clip
    assert loss[0, beyond] > plain[0, beyond] and grad(loss, values)[0, beyond] == 0


# --- invariance -----------------------------------------------------------------------------------

PER_TOKEN = {  # every function with a mask, over the fields of `batch`
    "nll_loss": lambda b: L.nll_loss(b["logprobs"], b["mask"]),
    "shaped_rewards": lambda b: L.shaped_rewards(b["scores"], b["rewards"], b["mask"], 0.3),
    "gae": lambda b: torch.stack(L.gae(b["rewards"], b["values"], b["mask"], 0.9, 0.8), -1),
    "whiten": lambda b: L.whiten(b["rewards"], b["mask"], b["moments"]),
    "whiten_scale": lambda b: L.whiten_scale(b["rewards"], b["mask"], b["moments"]),
    "policy_loss": lambda b: L.policy_loss(
        b["logprobs"], b["old_logprobs"], b["rewards"], b["mask"], 0.2
    ),
    "value_loss": lambda b: L.value_loss(
        b["values"], b["old_values"], b["returns"], b["mask"], 0.2
    ),
    "approx_kl": lambda b: L.approx_kl(b["logprobs"], b["old_logprobs"], b["mask"]),
    "clip_fraction": lambda b: L.clip_fraction(b["logprobs"], b["old_logprobs"], b["mask"], 0.2),
}
WHOLE = {
    "moments": lambda b: L.moments(b["rewards"], b["mask"]),
    "explained_variance": lambda b: L.explained_variance(b["values"], b["returns"], b["mask"]),
}
FIELDS = ["logprobs", "old_logprobs", "values", "old_values", "returns", "rewards"]


def batch(left=0, right=0, garbage=0.0):
    """Three responses of 4, 2 and 1 tokens, with `left` and `right` more columns of garbage.

    The sign of the garbage alternates from field to field.
    """
    generator = torch.Generator().manual_seed(0)
    mask = tensor([[True] * 4, [False, True, True, False], [False, False, False, True]])
    b = {name: torch.randn(3, 4, generator=generator) for name in FIELDS}
    for i, (name, x) in enumerate(b.items()):
        b[name] = F.pad(
            torch.where(mask, x, garbage * (-1) ** i), (left, right), value=garbage * (-1) ** i
        )
    b |= {"mask": F.pad(mask, (left, right)), "scores": torch.randn(3, generator=generator)}
    return b | {"moments": L.moments(b["rewards"], b["mask"])}


@pytest.mark.parametrize("name", [*PER_TOKEN, *WHOLE])
@pytest.mark.parametrize("left, right, garbage", [(0, 2, 3.0), (3, 0, -50.0), (2, 1, 1e30)])
def test_padding_changes_nothing_inside_the_mask_and_is_exactly_zero_outside(
    name, left, right, garbage
):
    f = (PER_TOKEN | WHOLE)[name]
    plain, padded, mask = f(batch()), f(batch(left, right, garbage)), batch(left, right)["mask"]
    if name in WHOLE:
        assert_equals(padded, plain)
    else:
        assert_equals(padded[mask], plain[batch()["mask"]], 1e-6)
        assert padded.dtype == torch.float32 and padded[mask].any() and (padded[~mask] == 0).all()


@pytest.mark.parametrize("name", ["nll_loss", "policy_loss", "value_loss", "approx_kl"])
def test_gradients_are_finite_and_exactly_zero_at_huge_padding(name):
    b = batch(2, 1, 1e30)
    x = b["values" if name == "value_loss" else "logprobs"].requires_grad_()
    gradient = grad(PER_TOKEN[name](b), x)
    assert (
        gradient.isfinite().all()
        and (gradient[~b["mask"]] == 0).all()
        and gradient[b["mask"]].abs().sum() > 0
    )


@pytest.mark.parametrize("name", PER_TOKEN)
def test_batch_order_and_micro_batches_change_nothing(name):
    f, b = PER_TOKEN[name], batch()
    for rows in ([2, 0, 1], [0], [1, 2]):
        part = {key: x if key == "moments" else x[rows] for key, x in b.items()}
        assert torch.equal(f(part), f(b)[rows])


def test_sums_over_micro_batches_divided_once_are_the_whole_and_means_of_means_are_not():
    logprobs = f64([-1, -2, -3], [-4, 0, 0])
    mask = tensor([[True, True, True], [True, False, False]])
    parts = [
        (L.nll_loss(logprobs[i : i + 1], mask[i : i + 1]).sum(), mask[i].sum()) for i in (0, 1)
    ]
    whole = L.nll_loss(logprobs, mask).sum() / mask.sum()
    assert_equals(sum(loss for loss, _ in parts) / mask.sum(), whole)
    assert_equals(whole, 2.5)  # (1 + 2 + 3 + 4) / 4
    assert_equals(sum(loss / count for loss, count in parts) / 2, 3)  # rejected: (2 + 4) / 2


def test_moments_add_over_micro_batches_and_variances_do_not():
    x = f64([1, 2, 0], [0, 5, 6])
    parts = [L.moments(x[i], MASK[i]) for i in (0, 1)]
    # (2.5^2 + 1.5^2) * 2 / 4 = 4.25
    assert_equals(torch.stack(L.mean_and_variance(sum(parts))), [3.5, 4.25])
    assert_equals(sum(L.mean_and_variance(part)[1] for part in parts) / 2, 0.25)  # rejected


def test_arguments_are_left_as_they_were():
    b = batch(1, 1, 3.0)
    before = {key: x.clone() for key, x in b.items()}
    for f in (PER_TOKEN | WHOLE).values():
        f(b)
    for name in ("centering_loss", "kl_k1", "kl_k2", "kl_k3", "exact_kl"):
        getattr(L, name)(b["values"], b["old_values"])
    L.preference_loss(b["scores"], b["scores"], b["scores"])
    L.entropy(b["values"])
    L.mean_and_variance(b["moments"])
    assert [key for key in b if not torch.equal(b[key], before[key])] == []
