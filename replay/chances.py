"""Chances under three distributions, exact enough to test by; scipy would be a large dependency for three functions."""

from __future__ import annotations

import math


def gamma_tail(shape: float, x: float) -> float:
    """P(Gamma(shape, 1) > x): series below the mean, continued fraction above (Numerical Recipes, 6.2)."""
    if x <= 0:
        return 1.0
    front = math.exp(-x + shape * math.log(x) - math.lgamma(shape))
    if x < shape + 1:
        term = total = 1.0 / shape
        k = shape
        while term > total * 1e-14:
            k += 1
            term *= x / k
            total += term
        return max(0.0, 1.0 - total * front)
    b, c = x + 1 - shape, 1e300
    d = h = 1 / b
    for i in range(1, 10_000):
        a = -i * (i - shape)
        b += 2
        d = 1 / (a * d + b)
        c = b + a / c
        h *= d * c
        if abs(d * c - 1) < 1e-12:
            break
    return front * h


def binomial_limit(tokens: int, share: float, chance: float) -> int:
    """The smallest limit with P(Binomial(tokens, share) > limit) <= chance."""
    if share >= 1:
        return tokens
    below, log_p, log_q = 0.0, math.log(share), math.log1p(-share)
    for k in range(tokens + 1):
        choose = math.lgamma(tokens + 1) - math.lgamma(k + 1) - math.lgamma(tokens - k + 1)
        below += math.exp(choose + k * log_p + (tokens - k) * log_q)
        if 1 - below <= chance:
            return k
    return tokens


def upper_share(misses: int, tokens: int) -> float:
    """A share that is exceeded with a chance of about 1e-4, given `misses` of `tokens` (Poisson, by Wilson and Hilferty)."""
    shape = misses + 1
    quantile = shape * (1 - 1 / (9 * shape) + 3.72 / (3 * math.sqrt(shape))) ** 3
    return min(1.0, quantile / max(tokens, 1))
