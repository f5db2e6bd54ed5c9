"""Rotations after which all dimensions of an embedding have the same variance (PHI-S, Ranzinger 2024, 2410.01680)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def phi_s_rotation(covariance_DD: NDArray[np.float64]) -> NDArray[np.float64]:
    """[D,D], orthogonal: after ``rows @ rotation`` every dimension has the mean of the variances.

    The principal components, by descending variance, are rotated by a Hadamard matrix over √D. For a D without a known
    one, D - 1 plane rotations give one dimension after another the mean variance (Chan and Li 1983). Signs and orders
    are fixed, so two machines differ by rounding alone; where several components have the same variance, any basis of
    them would do.
    """
    variance_D, component_DD = np.linalg.eigh(covariance_DD)
    variance_D, component_DD = variance_D[::-1], component_DD[:, ::-1]
    # The sign of a component is arbitrary: its largest entry becomes positive.
    largest_D = np.abs(component_DD).argmax(0)
    component_DD = component_DD * np.sign(np.take_along_axis(component_DD, largest_D[None], axis=0))
    hadamard_DD = hadamard(len(variance_D))
    if hadamard_DD is None:
        return component_DD @ _plane_rotations(variance_D)
    return component_DD @ (hadamard_DD / np.sqrt(len(variance_D)))


def hadamard(size: int) -> NDArray[np.float64] | None:
    """[D,D] of entries ±1 with orthogonal columns, for D = 2^k and D = 2^k · (q + 1) with a prime q = 3 mod 4: the
    constructions of Sylvester and of Paley. They include the widths of most networks: 384, 768, 1152, 1280, 1536.
    None for other sizes."""
    cores = [size >> halvings for halvings in range(size.bit_length()) if size % (1 << halvings) == 0]
    # The smallest first: a power of two has Sylvester's.
    core = next((core for core in reversed(cores) if core == 1 or (core % 4 == 0 and _is_prime(core - 1))), None)
    if core is None:
        return None
    matrix = np.ones((1, 1)) if core == 1 else _paley(core - 1)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def _paley(prime: int) -> NDArray[np.float64]:
    """[q+1,q+1]: 1 + S, where S is skew and has the quadratic residues of the differences of its indexes."""
    residue_Q = np.full(prime, -1.0)
    residue_Q[np.arange(1, prime) ** 2 % prime] = 1
    residue_Q[0] = 0
    skew = np.zeros((prime + 1, prime + 1))
    skew[0, 1:], skew[1:, 0] = 1, -1
    skew[1:, 1:] = residue_Q[(np.arange(prime)[:, None] - np.arange(prime)) % prime]
    return skew + np.eye(prime + 1)


def _plane_rotations(variance_D: NDArray[np.float64]) -> NDArray[np.float64]:
    """[D,D], orthogonal: after it, uncorrelated dimensions of these variances have the mean variance each."""
    size, mean = len(variance_D), float(variance_D.mean())
    rotation_DD, covariance_DD = np.eye(size), np.diag(variance_D)
    open_D = np.ones(size, bool)
    for _ in range(size - 1):
        variances_D = np.diag(covariance_DD)
        # The largest is not below the mean of the open ones, which is the mean of all, and the smallest not above.
        low = int(np.where(open_D, variances_D, np.inf).argmin())
        high = int(np.where(open_D, variances_D, -np.inf).argmax())
        if low == high or variances_D[high] - variances_D[low] <= 1e-15 * abs(mean):
            break
        plane = _turn(covariance_DD[low, low], covariance_DD[high, high], covariance_DD[low, high], mean)
        pair = [low, high]
        rotation_DD[:, pair] = rotation_DD[:, pair] @ plane
        covariance_DD[:, pair] = covariance_DD[:, pair] @ plane
        covariance_DD[pair] = plane.T @ covariance_DD[pair]
        open_D[low] = False
    return rotation_DD


def _turn(low: float, high: float, covariance: float, mean: float) -> NDArray[np.float64]:
    """[2,2]: the turn that gives the first of two dimensions the variance ``mean``, which lies between the two."""
    # With t = tan: c²(low − 2t·covariance + t²·high) = mean, c² = 1 / (1 + t²).
    a, b, c = high - mean, -2 * covariance, low - mean
    root = np.sqrt(max(b * b - 4 * a * c, 0.0))
    # The form without cancellation, of the smaller turn.
    denominator = -(b + np.copysign(root, b))
    tangent = 2 * c / denominator if denominator else 0.0
    cosine = 1 / np.sqrt(1 + tangent * tangent)
    sine = tangent * cosine
    return np.array([[cosine, sine], [-sine, cosine]])
