"""Every equation of the method, each one a pure function of tensors. Imports only torch.

Shapes: B sequences of a batch, T tokens, V vocabulary entries.

Everything about a token is stored at that token's own index: logprobs[b, t] is the log-prob of
token t given the tokens before it, values[b, t] the value of the state in which it was chosen.
`mask` [B, T] is bool, True at the tokens that the policy chose, its end of sequence included.

Losses are unreduced, and zero outside the mask. The caller sums them and divides once, by a count
of tokens or sequences over all micro-batches and processes. So accumulation and data parallelism
give the gradient of one large batch.

Papers:
    CAI  Bai et al. 2022, arXiv 2212.08073          HH   Bai et al. 2022a, arXiv 2204.05862
    PPO  Schulman et al. 2017, arXiv 1707.06347     GAE  Schulman et al. 2016, arXiv 1506.02438
    LM   Ziegler et al. 2019, arXiv 1909.08593
    KL   Schulman 2020, joschu.net/blog/kl-approx.html
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# --- phase 1: supervised --------------------------------------------------------------------------


def nll_loss(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Negative log-likelihood of the response tokens. The prompt is masked.

    CAI section 3.1:  L_SL = - sum_i log P_theta(y_i_revised | x_i)
    loss = -logprobs where mask else 0
    logprobs [B, T] nats, mask [B, T] bool -> [B, T] nats.
    """
    return torch.where(mask, -logprobs, 0.0)


# --- phase 2: the preference model ----------------------------------------------------------------


def preference_loss(
    score_first: Tensor, score_second: Tensor, p_first: Tensor, margin: float = 0.0
) -> Tensor:
    """Bradley-Terry loss with a soft target: cross-entropy between the label and sigma(r_A - r_B).

    CAI section 4.1:  L_RM = - [ p log sigma(r_A - r_B) + (1 - p) log sigma(r_B - r_A) ]
    loss = -( p_first       * logsigmoid( difference - margin)
            + (1 - p_first) * logsigmoid(-difference - margin) )
    scores [B]; p_first [B] in 0..1, P(first is better); 0 or 1 for a hard label -> [B] nats.
    With a margin (Touvron et al. 2023, section 3.2.2) the preferred score must lead by that much.
    CAI has no margin (0).
    """
    difference = score_first - score_second
    first_wins, second_wins = F.logsigmoid(difference - margin), F.logsigmoid(-difference - margin)
    return -(p_first * first_wins + (1 - p_first) * second_wins)


def centering_loss(score_first: Tensor, score_second: Tensor) -> Tensor:
    """Pulls the mean score of a pair to 0. Bradley-Terry sees only the difference of the two.

    Eisenstein et al. 2023, arXiv 2312.09244, section 2:
    loss = (score_first + score_second) ** 2
    scores [B] -> [B]. The caller adds it to the preference loss with a small weight (0.01).
    An extension: CAI does not have it.
    """
    return (score_first + score_second) ** 2


# --- phase 2: divergence from the reference -------------------------------------------------------


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimator k1 of KL(pi || pi_ref), for tokens sampled from pi.

    It is unbiased, has a high variance, and can be negative. It is the usual choice in the reward.
    KL:  k1 = log pi(y) - log pi_ref(y)
    logprobs, ref_logprobs: nats, of the same shape -> that shape.
    """
    return logprobs - ref_logprobs


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimator k2 of KL(pi || pi_ref), for tokens sampled from pi.

    It is biased, has a low variance near the reference, and is never negative. As a loss, its mean
    gradient is that of the KL of this token's distribution. (That a token changes the KL of later
    ones is not in it.)
    KL:  k2 = (log pi(y) - log pi_ref(y))^2 / 2
    logprobs, ref_logprobs: nats, of the same shape -> that shape.
    """
    return 0.5 * (logprobs - ref_logprobs) ** 2


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimator k3 of KL(pi || pi_ref), for tokens sampled from pi.

    It is unbiased, never negative, and has a low variance near the reference. Far from it, its mean
    depends on rare tokens with a large rho: a mean of few samples is then mostly too low.
    KL:  k3 = (rho - 1) - log rho  with  rho = pi_ref(y) / pi(y)
    logprobs, ref_logprobs: nats, of the same shape -> that shape. Set both to 0 outside the mask
    before the call: masking the result is too late, since the exponential may have overflowed.
    """
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


def exact_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(pi || pi_ref) of each next-token distribution, summed over the whole vocabulary.

    sum_v pi(v) (log pi(v) - log pi_ref(v))
    logits, ref_logits [..., V] -> [...] nats, computed in float32. The rounding errors of bfloat16
    would be larger than a KL of 0.01.
    """
    logp, ref_logp = logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)
    return (logp.exp() * (logp - ref_logp)).sum(-1)


def shaped_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """The reward of each token: minus the KL penalty, and at the last token plus the score.

    CAI section 4.1, HH section 4.1:  r = r_PM - lambda_KL KL(pi || pi_0)
    rewards = -kl_coef * kl, + scores at the last token of the response
    scores [B] of the preference model, kl [B, T] nats (usually k1), mask [B, T]
    -> [B, T], zero outside the mask.
    Raises ValueError if a row of the mask has no True: no token could receive the score.
    """
    if not mask.any(-1).all():
        raise ValueError(
            "shaped_rewards: a response has no token; an empty one has at least an end of sequence"
        )
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, positions, 0).amax(-1)
    score = torch.where(positions == last[:, None], scores[:, None], 0.0)
    return torch.where(mask, -kl_coef * kl, 0.0) + score


def adaptive_kl_coef(
    kl_coef: float, kl: float, target: float, horizon: int, episodes: int
) -> float:
    """Moves the KL coefficient so that the measured KL approaches a target. An extension.

    LM section 2.2:  e = clip(KL / target - 1, -0.2, 0.2);  beta <- beta (1 + K e)
    K is 0.1 in the paper, and n / horizon in its code and here.
    kl, target: nats per response. episodes (n): since the last call; horizon: the larger, the
    slower -> the new coefficient. CAI's coefficient is fixed.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * episodes / horizon)


# --- phase 2: advantages --------------------------------------------------------------------------


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over the response, which ends the episode.

    GAE equation 16, by recursion:
        delta_t = r_t + gamma V_{t+1} - V_t
        A_t     = delta_t + gamma lambda A_{t+1}
        returns = advantages + values
    rewards, values, mask [B, T] -> advantages, returns [B, T], zero outside the mask, without
    gradient. The True entries of each row must be contiguous. After the last of them V and A are 0.
    So a response that the length limit cut off counts as ended.
    """
    # Values of padding must be 0: the last token reads the value after it as V_{t+1}.
    rewards, values = rewards.detach(), torch.where(mask, values, 0.0).detach()
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = torch.where(mask[:, t], delta + gamma * lam * next_advantage, 0.0)
        next_value, next_advantage = values[:, t], advantages[:, t]
    return advantages, torch.where(mask, advantages + values, 0.0)


def moments(x: Tensor, mask: Tensor) -> Tensor:
    """Count, sum and sum of squares of the entries inside the mask.

    Unlike means, they can be added over micro-batches and processes.
    x, mask: of the same shape -> [3] float64. Float32 would lose the variance, which is a small
    difference of large sums.
    """
    x = torch.where(mask, x, 0.0).double()
    return torch.stack([mask.sum(), x.sum(), (x * x).sum()])


def mean_and_variance(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance, float64 scalars, from moments [3] or a sum of several.

    Both are 0 if the count is 0.
    """
    mean, mean_square = moments[1:] / moments[0].clamp(min=1)
    return mean, (mean_square - mean**2).clamp(min=0)  # rounding can make it negative


def whiten(x: Tensor, mask: Tensor, moments: Tensor, eps: float = 1e-8) -> Tensor:
    """Shifts and scales the entries inside the mask to mean 0 and variance 1, for advantages.

    (x - mean) / sqrt(variance + eps)
    x, mask: of the same shape; moments [3] of the *whole* batch, over all processes -> that shape,
    zero outside the mask.
    """
    mean, variance = mean_and_variance(moments)
    return torch.where(mask, ((x - mean) * (variance + eps).rsqrt()).to(x.dtype), 0.0)


def whiten_scale(x: Tensor, mask: Tensor, moments: Tensor, eps: float = 1e-8) -> Tensor:
    """Scales the entries inside the mask to variance 1, for rewards. No shift: it could flip signs.

    x / sqrt(variance + eps)
    x, mask: of the same shape; moments [3] of the whole batch -> that shape, zero outside the mask.
    """
    _, variance = mean_and_variance(moments)
    return torch.where(mask, (x * (variance + eps).rsqrt()).to(x.dtype), 0.0)


# --- phase 2: PPO ---------------------------------------------------------------------------------


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_range: float
) -> Tensor:
    """The clipped surrogate objective, negated.

    PPO equation 7:  L = - min( rho A, clip(rho, 1 - eps, 1 + eps) A ),  rho = pi(y) / pi_old(y)
    logprobs, old_logprobs [B, T] nats, advantages, mask [B, T] -> [B, T], zero outside the mask.
    """
    # Mask before exp, not after: an infinite ratio outside the mask would make gradients NaN.
    ratio = torch.where(mask, logprobs - old_logprobs, 0.0).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.where(mask, -torch.minimum(ratio * advantages, clipped * advantages), 0.0)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_range: float
) -> Tensor:
    """The clipped value loss: the larger of two squared errors, halved.

    One is the error of the new value. The other is the error of the new value clipped to within
    clip_range of the old one. The larger one keeps a value from gaining by a long step.
    Source: PPO2 in OpenAI baselines, and LM's code.
    L = max( (V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2 ) / 2
    values, old_values, returns [B, T] in units of reward, mask [B, T] -> [B, T], zero outside the
    mask.
    """
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    loss = 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    return torch.where(mask, loss, 0.0)


def cai_loss(l_sl: Tensor, l_rl: Tensor, alpha: float) -> Tensor:
    """The combined objective: PPO with a supervised term.

    L_CAI = L_SL + alpha L_RL
    l_sl, l_rl: reduced losses (scalars) -> scalar.
    An extension: CAI runs the two phases one after the other.
    """
    return l_sl + alpha * l_rl


# --- what to watch --------------------------------------------------------------------------------


def entropy(logits: Tensor) -> Tensor:
    """Entropy of each next-token distribution.

    - sum_v pi(v) log pi(v)
    logits [..., V] -> [...] nats, computed in float32.
    """
    logp = logits.float().log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def approx_kl(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Measures how far updates have moved the policy from the one that sampled.

    It is k3 of KL(pi_old || pi), old policy first, since the old policy sampled the tokens.
    logprobs, old_logprobs [B, T] nats, mask [B, T] -> [B, T] nats, zero outside the mask, never
    negative.
    """
    return kl_k3(torch.where(mask, old_logprobs, 0.0), torch.where(mask, logprobs, 0.0))


def clip_fraction(
    logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, clip_range: float
) -> Tensor:
    """1 where the ratio is outside the clip range, else 0. The sign of the advantage is ignored.

    logprobs, old_logprobs [B, T] nats, mask [B, T] -> [B, T].
    """
    ratio = torch.where(mask, logprobs - old_logprobs, 0.0).exp()
    return ((ratio - 1).abs() > clip_range).to(logprobs.dtype)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """Fraction of the variance of the returns that the values explain.

    1 - Var(returns - values) / Var(returns), over the entries inside the mask
    1 for a perfect value model, 0 for a constant, negative for a model worse than a constant.
    values, returns, mask [B, T] -> float64 scalar. It is 0 if the variance of the returns is at
    most eps: what is below is rounding.
    """
    _, variance = mean_and_variance(moments(returns, mask))
    _, residual = mean_and_variance(moments(returns - values, mask))
    return torch.where(variance > eps, 1 - residual / variance.clamp(min=eps), 0.0)
