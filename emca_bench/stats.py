"""Statistics of measurements: ratios of latencies over rounds, means over seeds, verdicts against stated margins.

Latencies are compared through the logarithms of round medians, accuracies through differences over common seeds; intervals are
Student t at 95 %. NumPy and SciPy only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from scipy.optimize import brentq
from scipy.special import gammaincinv, ndtr, stdtrit

CONFIDENCE = 0.95
"""Coverage of every interval."""
FLOOR = 0.02
"""Smallest relative difference of latency that is called one: below it, alignment and code placement decide."""
MIN_ROUNDS = 3
"""Fewest rounds that give an interval or a verdict on latency: two rest on one degree of freedom, whose t quantile is 12.7."""
MIN_SEEDS = 2
"""Fewest seeds that carry a verdict on accuracy."""
UNEVEN = 1.5
"""Scatter of one arm, in that of all arms together, above which they do not count as scattering alike."""

TICKS_MS = (10.0, 4.0)
"""Scheduler ticks of common Linux kernels (100 and 250 Hz); shorter ones cannot be told from noise."""
MIN_TICK_SAMPLES = 20
"""Fewest samples in which a tick is looked for."""

Key = TypeVar("Key", int, tuple[str, int])
"""What values are paired by: a seed, a round, or the round of a session, since rounds of different sessions were never interleaved."""

SpeedVerdict = Literal["faster", "slower", "no difference", "undecided"]
AccuracyVerdict = Literal["not worse", "worse", "undecided"]
JointVerdict = Literal["better", "not worse", "worse", "undecided"]
Sensitivity = Literal["can decide", "cannot decide", "undecided"]


@dataclass(frozen=True)
class Ratio:
    """A ratio with its interval; `low` and `high` are None where there are fewer than MIN_ROUNDS rounds."""

    estimate: float
    low: float | None
    high: float | None
    rounds: int
    interleaved: bool = True
    """Whether both sides were measured within each round. If not, the interval does not cover a drift between them."""


@dataclass(frozen=True)
class Mean:
    """A mean, or a difference of means, in the unit of its samples; no interval from one sample."""

    estimate: float
    low: float | None
    high: float | None
    count: int


@dataclass(frozen=True)
class Joint:
    """A difference whose error was estimated from all arms of a study, with half the widths of two intervals."""

    estimate: float
    alone: float
    """Of the interval of this difference."""
    together: float
    """Of intervals that cover all differences of the study at once."""
    count: int

    def mean(self, half: float) -> Mean:
        """With the interval of that half width."""
        return Mean(self.estimate, self.estimate - half, self.estimate + half, self.count)


@dataclass(frozen=True)
class JointDifferences:
    """All arms of a study against its baseline."""

    baseline: str
    arms: Mapping[str, Joint]
    """By name, the baseline not among them."""
    scatter: Mapping[str, float]
    """By name, the baseline among them: standard deviation of an arm around the sum of its effect and that of the seed."""
    pooled: float
    """The same of all arms together, from which the errors come."""


def round_medians(samples: Mapping[Key, Sequence[float]]) -> dict[Key, float]:
    """Median of each round, in the unit of the samples; rounds without samples are left out."""
    return {index: float(np.median(values)) for index, values in samples.items() if len(values)}


def mean_interval(values: Sequence[float]) -> Mean:
    """Mean with its t interval over independent repeats (seeds).

    Raises:
        ValueError: no values.
    """
    if not len(values):
        raise ValueError("mean of no values")
    center, half = _center_and_half_width(values)
    return Mean(center, None if half is None else center - half, None if half is None else center + half, len(values))


def geometric_mean(rounds: Mapping[Key, float]) -> Mean:
    """Geometric mean of round medians with its t interval: quotients of two of them are the estimates of `paired_ratio`.

    Raises:
        ValueError: no rounds, or a median that is not positive.
    """
    if not rounds:
        raise ValueError("geometric mean of no rounds")
    return _exponentiate(*_center_and_half_width(_logs(rounds.values())), count=len(rounds))


def paired_ratio(rounds_a: Mapping[Key, float], rounds_b: Mapping[Key, float]) -> Ratio:
    """How many times faster b is than a: the ratio a / b of round medians, paired by round.

    Pairing takes out what drifts from round to round (clock, temperature, neighbours), because both were measured within each
    round. The estimate is the exponential of the mean log-ratio, the interval its t interval.

    Args:
        rounds_a: latency by round, in any unit, for example of the baseline.
        rounds_b: latency by round in the same unit.

    Raises:
        ValueError: no common round, or a latency that is not positive.
    """
    common = sorted(set(rounds_a) & set(rounds_b))
    if not common:
        raise ValueError("no common round")
    difference = _logs(rounds_a[index] for index in common) - _logs(rounds_b[index] for index in common)
    found = _exponentiate(*_center_and_half_width(difference), count=len(common))
    return Ratio(found.estimate, found.low, found.high, len(common))


def unpaired_ratio(rounds_a: Sequence[float], rounds_b: Sequence[float]) -> Ratio:
    """The ratio a / b of two runs that were not interleaved: Welch's t interval on log medians.

    It covers the noise within each run and nothing else. A drift between the runs looks like a difference, so use it only where
    pairing is impossible (two commits, two machines, two sessions) and say so.

    Raises:
        ValueError: no rounds on one side, or a latency that is not positive.
    """
    if not len(rounds_a) or not len(rounds_b):
        raise ValueError("ratio of no rounds")
    a, b = _logs(rounds_a), _logs(rounds_b)
    center = float(a.mean() - b.mean())
    rounds = min(len(a), len(b))
    if rounds < MIN_ROUNDS:
        return Ratio(math.exp(center), None, None, rounds, interleaved=False)
    half = _welch_half_width(a, b)
    return Ratio(math.exp(center), math.exp(center - half), math.exp(center + half), rounds, interleaved=False)


def latency_ratio(rounds_a: Mapping[Key, float], rounds_b: Mapping[Key, float]) -> Ratio | None:
    """The ratio a / b: paired by round, or unpaired where too few rounds hold both; None where a side has no rounds.

    Raises:
        ValueError: a latency that is not positive.
    """
    if not rounds_a or not rounds_b:
        return None
    common, fewest = len(set(rounds_a) & set(rounds_b)), min(len(rounds_a), len(rounds_b))
    if common >= min(MIN_ROUNDS, fewest):
        return paired_ratio(rounds_a, rounds_b)
    return unpaired_ratio(list(rounds_a.values()), list(rounds_b.values()))


def speed_verdict(speedup: Ratio, *, floor: float = FLOOR, across_runs: bool = False) -> SpeedVerdict:
    """What a speedup (latency of the baseline over latency of the arm) shows.

    `faster` and `slower` need an interval that excludes 1 and an estimate beyond the floor. `no difference` needs the whole
    interval within the floor: a wide interval around 1 shows nothing and is `undecided`.

    Fewer than three rounds are always `undecided`: one round has no spread at all, and the spread of two numbers rests on one
    degree of freedom (its t quantile is 12.7), so that a single disturbed round can neither be seen nor outvoted. So are rounds that
    were not interleaved, unless two runs are what is compared (`across_runs`).
    """
    if not (speedup.interleaved or across_runs) or speedup.rounds < MIN_ROUNDS or speedup.low is None or speedup.high is None:
        return "undecided"
    if speedup.low > 1 and speedup.estimate > 1 + floor:
        return "faster"
    if speedup.high < 1 and speedup.estimate < 1 / (1 + floor):
        return "slower"
    if speedup.low >= 1 / (1 + floor) and speedup.high <= 1 + floor:
        return "no difference"
    return "undecided"


def paired_difference(seeds_a: Mapping[Key, float], seeds_b: Mapping[Key, float]) -> Mean | None:
    """Mean of a - b over the seeds that both have, with its t interval; None without a common seed."""
    common = sorted(set(seeds_a) & set(seeds_b))
    return mean_interval([seeds_a[seed] - seeds_b[seed] for seed in common]) if common else None


def joint_differences(seeds: Mapping[str, Mapping[Key, float]], baseline: str) -> JointDifferences | None:
    """Every arm minus the baseline, with an error that all arms tell; None without two other arms.

    The model is a randomised block design, fitted by least squares: an effect of the arm, one of the seed, and an error that scatters
    alike in all arms, the baseline included. A few seeds of many arms then tell the error as many seeds of two do. If the baseline
    scatters more than the others, all differences share more error than is counted; `joint_verdict` says nothing then.

    Intervals are Student t, and for all differences at once Dunnett's, or where not all arms have the same seeds Sidak's, which is wider.

    Args:
        seeds: by arm, the baseline included, values by seed. Seeds that the baseline lacks count for nothing, and arms that share fewer
            than MIN_SEEDS with it are left out.
        baseline: one of the arms.

    Raises:
        KeyError: the baseline is none of the arms.
    """
    blocks = list(seeds[baseline])
    kept = {name: [seed for seed in blocks if seed in values] for name, values in seeds.items()}
    names = [name for name, found in kept.items() if len(found) >= MIN_SEEDS]
    if baseline not in names or len(names) < 3:
        return None
    cells = [(name, seed) for name in names for seed in kept[name]]
    arm = np.array([[float(name == other) for other in names] for name, _ in cells])
    block = np.array([[float(seed == other) for other in blocks[1:]] for _, seed in cells])
    design, values = np.hstack([arm, block]), np.array([seeds[name][seed] for name, seed in cells])
    spread = np.linalg.inv(design.T @ design)
    effects = spread @ design.T @ values
    squares, freedom = (values - design @ effects) ** 2, len(cells) - design.shape[1]
    # of each cell, the part of the error's variance that the fit leaves to its residual
    left = 1 - np.einsum("ni,ij,nj->n", design, spread, design)
    pooled = math.sqrt(squares.sum() / freedom)
    reach = _t_quantile(freedom), _quantile_of_all(len(names) - 1, freedom, shared=len(cells) == len(names) * len(blocks))
    first, found = names.index(baseline), {}
    for index, name in enumerate(names):
        error = pooled * math.sqrt(max(0.0, spread[index, index] + spread[first, first] - 2 * spread[index, first]))
        found[name] = Joint(float(effects[index] - effects[first]), reach[0] * error, reach[1] * error, len(kept[name]))
    del found[baseline]
    scatter = {name: math.sqrt(squares @ arm[:, index] / (left @ arm[:, index])) for index, name in enumerate(names)}
    return JointDifferences(baseline, found, scatter, pooled)


def joint_verdict(found: JointDifferences, arm: str, margin: float) -> JointVerdict:
    """What holds for all arms at once: "better" needs an interval above zero, of whatever size; the rest as `non_inferiority`.

    Each word errs in at most half of the uncovered share of studies, if all arms scatter alike; an arm or a baseline that scatters more
    than UNEVEN times as far as all is `undecided`.

    Args:
        found: from `joint_differences`.
        arm: one of `found.arms`.
        margin: largest loss that still counts as not worse; stated before the run.
    """
    if max(found.scatter[arm], found.scatter[found.baseline]) > UNEVEN * found.pooled:
        return "undecided"
    joint = found.arms[arm]
    return "better" if joint.estimate > joint.together else non_inferiority(joint.mean(joint.together), margin)


def non_inferiority(difference: Mean, margin: float) -> AccuracyVerdict:
    """Whether an arm loses no more than the margin; one seed is never a verdict.

    Args:
        difference: arm minus baseline, in points.
        margin: largest loss, in the same points, that still counts as not worse; stated before the run.
    """
    if difference.count < MIN_SEEDS or difference.low is None or difference.high is None:
        return "undecided"
    if difference.low > -margin:
        return "not worse"
    return "worse" if difference.high < -margin else "undecided"


def sensitivity(difference: Mean, margin: float) -> Sensitivity:
    """Whether a data set can rank cross-attentions at all: taking the cross-attention away must cost more than the margin.

    Where it does not, "not worse" would be true of deleting the module too, and shows nothing.

    Args:
        difference: baseline minus the arm `none`, in points.
        margin: the non-inferiority margin in the same points.
    """
    if difference.count < MIN_SEEDS or difference.low is None or difference.high is None:
        return "undecided"
    if difference.low > margin:
        return "can decide"
    return "cannot decide" if difference.high <= margin else "undecided"


def pareto_front(costs: Sequence[float], qualities: Sequence[float]) -> list[int]:
    """Indices of the points that no other point beats (cost at most as high, quality at least as high), by rising cost."""
    order = sorted(range(len(costs)), key=lambda index: (costs[index], -qualities[index]))
    front: list[int] = []
    for index in order:
        tie = bool(front) and (costs[index], qualities[index]) == (costs[front[-1]], qualities[front[-1]])
        if tie or not front or qualities[index] > qualities[front[-1]]:
            front.append(index)
    return front


def crossover(sizes: Sequence[float], curve_a: Sequence[float], curve_b: Sequence[float]) -> float | None:
    """Size at which two positive curves cross for the last time, or None where one stays below the other.

    Between measured sizes the ratio of the curves is taken as a power law (log-linear interpolation); nothing is extrapolated.
    """
    order = np.argsort(np.asarray(sizes, dtype=float))
    x = np.log(np.asarray(sizes, dtype=float)[order])
    gap = (_logs(curve_a) - _logs(curve_b))[order]
    apart = np.flatnonzero(gap)
    for left, right in reversed(list(itertools.pairwise(apart))):
        if gap[left] * gap[right] < 0:
            if right > left + 1:
                return float(np.exp(x[left + 1]))
            return float(np.exp(x[left] + (x[right] - x[left]) * gap[left] / (gap[left] - gap[right])))
    return None


def amdahl_bound(share: float) -> float:
    """Largest possible speedup from making a component free that takes this share of the whole: 1 / (1 - share).

    Raises:
        ValueError: a share outside of [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share {share} is not between 0 and 1")
    return math.inf if share == 1 else 1 / (1 - share)


def scheduler_tick(samples_ms: Sequence[float]) -> float | None:
    """Period in ms of the scheduler tick that the samples are multiples of, or None where they are spread as latencies are.

    Threads that wait for each other while other processes hold the cores wait for whole ticks. Such samples repeat very well and
    count parallel regions instead of arithmetic, so that no interval shows the trouble.
    """
    array = np.asarray(samples_ms, dtype=float)
    for tick in TICKS_MS:
        longer = array[array > tick]
        apart = np.abs(longer - tick * np.round(longer / tick))
        # chance puts a tenth of all samples this near to a multiple
        if len(longer) >= MIN_TICK_SAMPLES and (apart < tick / 20).mean() > 0.5:
            return tick
    return None


def _logs(values: Iterable[float]) -> np.ndarray:
    array = np.asarray(list(values), dtype=float)
    if (array <= 0).any() or not np.isfinite(array).all():
        raise ValueError(f"latencies must be positive and finite, found {array.min()}")
    return np.log(array)


def _center_and_half_width(values: Sequence[float] | np.ndarray) -> tuple[float, float | None]:
    array = np.asarray(values, dtype=float)
    center = float(array.mean())
    if len(array) < 2:
        return center, None
    error = float(array.std(ddof=1)) / math.sqrt(len(array))
    return center, _t_quantile(len(array) - 1) * error


def _exponentiate(center: float, half: float | None, *, count: int) -> Mean:
    low, high = (None, None) if half is None or count < MIN_ROUNDS else (math.exp(center - half), math.exp(center + half))
    return Mean(math.exp(center), low, high, count)


def _welch_half_width(a: np.ndarray, b: np.ndarray) -> float:
    share_a, share_b = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    variance = share_a + share_b
    if variance == 0:
        return 0.0
    freedom = variance**2 / (share_a**2 / (len(a) - 1) + share_b**2 / (len(b) - 1))
    return _t_quantile(freedom) * math.sqrt(variance)


def _t_quantile(freedom: float) -> float:
    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))


def _quantile_of_all(comparisons: int, freedom: int, *, shared: bool) -> float:
    """What all of so many differences, divided by their common estimated error, stay below in size, with the coverage of intervals.

    Source: Dunnett, A multiple comparison procedure for comparing several treatments with a control, 1955: given the baseline's own
    deviation, which differences between equally many values share, and the estimated error, they are independent. That leaves an
    integral over these two. Not shared, as if all were independent, it is a bound whatever their correlations are (Sidak, 1967).
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(64)
    points, shares = np.polynomial.legendre.leggauss(64)
    # the estimated error over the true one, at quantiles
    errors = np.sqrt(2 * gammaincinv(freedom / 2, (points + 1) / 2) / freedom)[:, None]
    baseline, scale = (nodes, math.sqrt(2)) if shared else (np.zeros_like(nodes), 1.0)

    def missing(quantile: float) -> float:
        reach = scale * quantile * errors
        inside = (ndtr(baseline + reach) - ndtr(baseline - reach)) ** comparisons
        return float(shares / 2 @ inside @ weights) / math.sqrt(2 * math.pi) - CONFIDENCE

    # between no correction and Bonferroni's
    return float(brentq(missing, _t_quantile(freedom) - 0.1, float(stdtrit(freedom, 1 - (1 - CONFIDENCE) / 2 / comparisons)) + 0.1))
