"""Prints the polynomial coefficients of csrc/math-inl.h and how far each fit is off.

Chebyshev interpolation at 40 digits (mpmath, `pip install mpmath`). The reduced functions are
smooth at the points where the plain formula would be 0/0, so each has its limit there.

    python tools/fit_activations.py
"""

from collections.abc import Callable

from mpmath import chebyfit, erfc, exp, expm1, log, mp, mpf, nstr, pi, sqrt, tanh

mp.dps = 40


def exp_remainder(r: mpf) -> mpf:
    """(e^r - 1 - r) / r^2: exp and expm1 keep their two leading terms exact."""
    return (expm1(r) - r) / r**2 if r else mpf(1) / 2


def tanh_remainder(s: mpf) -> mpf:
    """(tanh(x) / x - 1) / x^2 as a function of s = x^2."""
    x = sqrt(s)
    return (tanh(x) / x - 1) / s if s else -mpf(1) / 3


def scaled_erfc(t: mpf) -> mpf:
    """erfc(v) e^(v^2) / t for t = 1 / (1 + v/2), which maps v >= 0 to 0 < t <= 1."""
    v = 2 * (1 / t - 1)
    return erfc(v) * exp(v**2) / t


def show(name: str, function: Callable[[mpf], mpf], low: mpf, high: mpf, terms: int) -> None:
    """Prints the coefficients, highest power first, and the largest absolute error of the fit."""
    coefficients, error = chebyfit(function, [low, high], terms, error=True)
    print(f"{name}: largest error {nstr(error, 2)}")
    for coefficient in coefficients:
        print("   ", nstr(coefficient, 10))


if __name__ == "__main__":
    # A little beyond the reduced range, because the reduction itself rounds.
    half_ln2 = log(2) / 2 * mpf("1.001")
    show("exp", exp_remainder, -half_ln2, half_ln2, 5)
    show("expm1, -1/2 < x < 0", exp_remainder, mpf("-0.5"), mpf(0), 5)
    show("tanh, |x| < 0.625", tanh_remainder, mpf(0), mpf("0.4"), 5)
    # Down to t = 0.13, v = 13.4: beyond it e^(-v^2) is below the smallest float.
    show("erfc", scaled_erfc, mpf("0.13"), mpf(1), 11)
    print("limit of the erfc fit at t = 0:", nstr(1 / (2 * sqrt(pi)), 10))
