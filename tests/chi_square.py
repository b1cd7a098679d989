"""Pearson's chi-square test, as the tests of chance use it."""

import numpy as np


def chi_square_excess(counts, expected, z=4.0):
    """Tell how far the statistic lies above its limit; below 0 the counts fit.

    The limit is exceeded by chance in about 3 of 100,000 draws (Wilson and Hilferty's
    approximation), and never by a fixed seed that passed once.
    """
    counts, expected = np.asarray(counts, float).ravel(), np.asarray(expected, float).ravel()
    assert counts.shape == expected.shape
    assert counts[expected == 0].sum() == 0, "something impossible was drawn"
    rare = expected < 5  # pooled: the approximation needs a few draws in every cell
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = len(counts) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + z * np.sqrt(2 / (9 * freedom))) ** 3
    return statistic - limit
