from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import erfinv
from scipy.stats import t as student

from emca_bench import stats
from emca_bench.stats import Mean, Ratio


def test_round_medians_takes_the_median_of_each_round_and_skips_empty_ones():
    assert stats.round_medians({1: [3.0, 1.0, 100.0], 0: [2.0, 4.0], 2: []}) == {0: 3.0, 1: 3.0}


def test_mean_interval_is_the_textbook_t_interval():
    found = stats.mean_interval([1.0, 2.0, 3.0])
    half = 4.302652729911275 / math.sqrt(3)  # t quantile at 97.5 %, 2 degrees of freedom; standard deviation 1
    assert found == Mean(2.0, pytest.approx(2 - half), pytest.approx(2 + half), 3)


def test_mean_interval_of_one_value_has_no_bounds():
    assert stats.mean_interval([5.0]) == Mean(5.0, None, None, 1)


def test_mean_interval_refuses_nothing():
    with pytest.raises(ValueError, match="no values"):
        stats.mean_interval([])


def test_paired_ratio_is_above_one_where_the_second_is_faster():
    found = stats.paired_ratio({0: 2.0, 1: 4.0, 2: 6.0}, {0: 1.0, 1: 2.0, 2: 3.0})
    assert found == Ratio(pytest.approx(2), pytest.approx(2), pytest.approx(2), 3)


def test_paired_ratio_pairs_by_round_not_by_position():
    found = stats.paired_ratio({0: 10.0, 1: 20.0, 5: 1.0}, {1: 10.0, 0: 5.0, 7: 9.0})
    assert (found.estimate, found.rounds) == (pytest.approx(2), 2)


def test_paired_ratio_of_one_round_has_no_interval():
    assert stats.paired_ratio({0: 3.0}, {0: 2.0}) == Ratio(pytest.approx(1.5), None, None, 1)


@pytest.mark.parametrize(("a", "b", "match"), [({0: 1.0}, {1: 1.0}, "no common round"), ({0: 0.0}, {0: 1.0}, "positive")])
def test_paired_ratio_refuses_what_has_no_ratio(a, b, match):
    with pytest.raises(ValueError, match=match):
        stats.paired_ratio(a, b)


def test_quotient_of_geometric_means_is_the_paired_estimate(rng: np.random.Generator):
    a, b = (dict(enumerate(rng.lognormal(size=5))) for _ in range(2))
    quotient = stats.geometric_mean(a).estimate / stats.geometric_mean(b).estimate
    assert stats.paired_ratio(a, b).estimate == pytest.approx(quotient)


def _interleaved(random: np.random.Generator, rounds: int, true_ratio: float) -> Ratio:
    """Two arms under a drift of 3 % from round to round, medians of 9 calls with 5 % noise and rare spikes."""
    drift = np.exp(np.cumsum(random.normal(0, 0.03, rounds)))
    arms = []
    for factor in (true_ratio, 1.0):
        calls = factor * drift[:, None] * random.lognormal(0, 0.05, (rounds, 9)) * np.where(random.random((rounds, 9)) < 0.03, 3, 1)
        arms.append(stats.round_medians(dict(enumerate(calls))))
    return stats.paired_ratio(*arms)


@pytest.mark.parametrize("rounds", [3, 7])
def test_equal_arms_under_drift_are_rarely_called_different(rounds):
    random = np.random.default_rng(20)
    trials = 500
    verdicts = [stats.speed_verdict(_interleaved(random, rounds, 1.0)) for _ in range(trials)]
    assert sum(verdict in ("faster", "slower") for verdict in verdicts) < 0.08 * trials


def test_the_paired_interval_covers_the_true_ratio():
    random = np.random.default_rng(21)
    found = [_interleaved(random, 7, 1.3) for _ in range(500)]
    covered = sum(ratio.low <= 1.3 <= ratio.high for ratio in found if ratio.low and ratio.high)
    assert 0.91 < covered / 500 < 0.99


def test_a_true_difference_of_five_percent_is_found():
    random = np.random.default_rng(22)
    verdicts = [stats.speed_verdict(_interleaved(random, 9, 1.05)) for _ in range(300)]
    assert verdicts.count("faster") > 0.8 * 300
    assert verdicts.count("slower") == 0


def test_unpaired_ratio_is_welch_on_logarithms():
    a, b = [1.0, 1.1, 0.9, 1.05], [2.0, 2.5, 2.2]
    from scipy.stats import ttest_ind

    expected = ttest_ind(np.log(a), np.log(b), equal_var=False).confidence_interval(0.95)
    found = stats.unpaired_ratio(a, b)
    assert (found.low, found.high) == (pytest.approx(math.exp(expected.low)), pytest.approx(math.exp(expected.high)))


def test_unpaired_ratio_without_spread_or_rounds():
    alike = Ratio(pytest.approx(2), pytest.approx(2), pytest.approx(2), 3, interleaved=False)
    assert stats.unpaired_ratio([2.0] * 3, [1.0] * 3) == alike
    assert stats.unpaired_ratio([2.0] * 2, [1.0] * 3).low is None
    with pytest.raises(ValueError, match="no rounds"):
        stats.unpaired_ratio([], [1.0])


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [
        (Ratio(1.10, 1.05, 1.15, 5), "faster"),
        (Ratio(0.90, 0.85, 0.95, 5), "slower"),
        (Ratio(1.00, 0.99, 1.01, 5), "no difference"),
        (Ratio(1.01, 1.005, 1.015, 5), "no difference"),
        (Ratio(1.015, 1.005, 1.03, 5), "undecided"),
        (Ratio(1.00, 0.80, 1.25, 5), "undecided"),
        (Ratio(1.10, 0.99, 1.22, 5), "undecided"),
        (Ratio(2.00, 1.90, 2.10, 2), "undecided"),
        (Ratio(2.00, None, None, 1), "undecided"),
    ],
)
def test_speed_verdict(ratio, verdict):
    assert stats.speed_verdict(ratio) == verdict


def test_paired_difference_uses_common_seeds_only():
    assert stats.paired_difference({0: 3.0, 1: 5.0, 9: 0.0}, {0: 1.0, 1: 3.0, 7: 50.0}) == Mean(2.0, 2.0, 2.0, 2)
    assert stats.paired_difference({0: 1.0}, {1: 1.0}) is None


def _block_design(random: np.random.Generator, arms: int, seeds: int, effects: np.ndarray) -> dict[str, dict[int, float]]:
    """Scores of arms that scatter alike around an effect of the arm and a larger one of the seed."""
    table = effects[:, None] + random.normal(0, 5, seeds) + random.normal(0, 1, (arms, seeds))
    return {f"arm {index}": dict(enumerate(row)) for index, row in enumerate(table)}


def test_joint_differences_are_the_textbooks_two_way_analysis(rng: np.random.Generator):
    arms, seeds = int(rng.integers(3, 9)), int(rng.integers(2, 6))
    scores = _block_design(rng, arms, seeds, rng.normal(size=arms))
    table = np.array([list(by_seed.values()) for by_seed in scores.values()])
    residual = table - table.mean(1, keepdims=True) - table.mean(0, keepdims=True) + table.mean()
    freedom = (arms - 1) * (seeds - 1)
    baseline = int(rng.integers(arms))
    found = stats.joint_differences(scores, f"arm {baseline}")
    assert found is not None
    assert list(found.arms) == [f"arm {index}" for index in range(arms) if index != baseline]
    assert found.pooled == pytest.approx(math.sqrt((residual**2).sum() / freedom))
    for index in range(arms):
        mine = (residual[index] ** 2).sum() / (seeds - 1) * arms / (arms - 1)
        assert found.scatter[f"arm {index}"] == pytest.approx(math.sqrt(mine))
    for name, joint in found.arms.items():
        assert joint.estimate == pytest.approx(table[int(name[-1])].mean() - table[baseline].mean())
        assert joint.alone == pytest.approx(student.ppf(0.975, freedom) * found.pooled * math.sqrt(2 / seeds))
        assert joint.count == seeds


def test_where_seeds_are_missing_the_fit_is_that_of_least_squares(rng: np.random.Generator):
    scores = _block_design(rng, 5, 4, np.arange(5.0))
    del scores["arm 1"][2], scores["arm 4"][0], scores["arm 4"][3]
    cells = [(int(name[-1]), seed) for name, by_seed in scores.items() for seed in by_seed]
    design = np.array([[arm == i for i in range(5)] + [seed == i for i in range(1, 4)] for arm, seed in cells], dtype=float)
    values = np.array([scores[f"arm {arm}"][seed] for arm, seed in cells])
    solution, squares, rank, _ = np.linalg.lstsq(design, values, rcond=None)
    covariance = np.linalg.inv(design.T @ design) * squares[0] / (len(values) - rank)
    found = stats.joint_differences({**scores, "once": {1: 0.0, 9: 3.0}}, "arm 0")
    assert found is not None
    assert list(found.arms) == ["arm 1", "arm 2", "arm 3", "arm 4"]
    for name, joint in found.arms.items():
        index = int(name[-1])
        error = math.sqrt(covariance[index, index] + covariance[0, 0] - 2 * covariance[0, index])
        assert joint.estimate == pytest.approx(solution[index] - solution[0])
        assert joint.alone == pytest.approx(student.ppf(0.975, len(values) - rank) * error)
    assert [joint.count for joint in found.arms.values()] == [3, 4, 4, 2]


@pytest.mark.parametrize("missing", [0, 3])
def test_joint_intervals_cover_as_often_as_they_say(missing: int):
    random, effects, trials = np.random.default_rng(23), np.array([0.0, 1.0, -2.0, 0.0, 0.5, 3.0]), 1000
    alone = together = 0
    for _ in range(trials):
        scores = _block_design(random, 6, 3, effects)
        for index in range(1, 1 + missing):
            del scores[f"arm {index}"][index % 3]
        found = stats.joint_differences(scores, "arm 0")
        assert found is not None
        misses = [abs(joint.estimate - effects[int(name[-1])]) for name, joint in found.arms.items()]
        alone += sum(miss <= joint.alone for miss, joint in zip(misses, found.arms.values(), strict=True))
        together += all(miss <= joint.together for miss, joint in zip(misses, found.arms.values(), strict=True))
    assert alone / trials / 5 == pytest.approx(0.95, abs=0.015)
    # what is independent is wider apart than what shares a baseline
    assert (-0.015 if missing == 0 else 0) < together / trials - 0.95 < (0.015 if missing == 0 else 0.04)


@pytest.mark.parametrize(
    ("freedom", "published"),
    [(5, [2.57, 3.03, 3.29, 3.48, 3.62, 3.73, 3.82, 3.90, 3.97]), (20, [2.09, 2.38, 2.54, 2.65, 2.73, 2.80, 2.86, 2.90, 2.95])],
)
def test_intervals_of_all_at_once_are_dunnetts(freedom: int, published: list[float]):
    found = [stats._quantile_of_all(comparisons, freedom, shared=True) for comparisons in range(1, 10)]
    assert found == pytest.approx(published, abs=0.0101)


def test_a_bound_for_any_correlation_is_that_of_independent_differences():
    """At very many degrees of freedom the error is known, and the bound is Sidak's."""
    normal = [math.sqrt(2) * erfinv(0.95 ** (1 / comparisons)) for comparisons in (1, 5, 20)]
    assert [stats._quantile_of_all(comparisons, 10**6, shared=False) for comparisons in (1, 5, 20)] == pytest.approx(normal, abs=1e-4)


@pytest.mark.parametrize(
    "scores",
    [
        {"a": {0: 1.0, 1: 2.0}, "b": {0: 1.0, 1: 2.0}},
        {"a": {0: 1.0, 1: 2.0}, "b": {0: 1.0}, "c": {0: 1.0}},
        {"a": {0: 1.0, 1: 2.0}, "b": {2: 1.0, 3: 2.0}, "c": {0: 1.0, 1: 2.0}},
        {"a": {0: 1.0}, "b": {0: 1.0}, "c": {0: 1.0}},
        {"a": {}, "b": {}, "c": {}},
    ],
)
def test_two_arms_or_one_common_seed_have_no_joint_differences(scores: dict[str, dict[int, float]]):
    assert stats.joint_differences(scores, "a") is None


def test_arms_that_move_together_have_no_error():
    scores = {name: {0: shift, 1: shift + 1.0, 2: shift - 2.0} for name, shift in (("a", 0), ("b", 1), ("c", 2))}
    found = stats.joint_differences(scores, "a")
    assert found is not None
    assert [joint.estimate for joint in found.arms.values()] == pytest.approx([1, 2])
    assert all(abs(half) < 1e-12 for joint in found.arms.values() for half in (joint.alone, joint.together))


def _judged(estimate: float, together: float, scatter: float = 1.0, baseline: float = 1.0) -> str:
    found = stats.JointDifferences("a", {"b": stats.Joint(estimate, together / 2, together, 3)}, {"a": baseline, "b": scatter}, 1.0)
    return stats.joint_verdict(found, "b", 0.5)


@pytest.mark.parametrize(
    ("estimate", "together", "verdict"),
    [
        (2.0, 1.0, "better"),
        (0.2, 0.1, "better"),
        (0.1, 0.4, "not worse"),
        (0.1, 2.0, "undecided"),
        (-0.6, 0.2, "undecided"),
        (-2.0, 1.0, "worse"),
    ],
)
def test_joint_verdicts(estimate: float, together: float, verdict: str):
    assert _judged(estimate, together) == verdict


@pytest.mark.parametrize(("scatter", "baseline", "verdict"), [(1.6, 1.0, "undecided"), (1.0, 1.6, "undecided"), (1.4, 1.4, "better")])
def test_arms_that_scatter_unlike_the_others_have_no_joint_verdict(scatter: float, baseline: float, verdict: str):
    assert _judged(2.0, 1.0, scatter, baseline) == verdict


@pytest.mark.parametrize(
    ("difference", "verdict"),
    [
        (Mean(0.1, -0.3, 0.5, 3), "not worse"),
        (Mean(-2.0, -2.5, -1.5, 3), "worse"),
        (Mean(-0.4, -0.9, 0.1, 3), "undecided"),
        (Mean(5.0, None, None, 1), "undecided"),
    ],
)
def test_non_inferiority(difference, verdict):
    assert stats.non_inferiority(difference, 0.5) == verdict


@pytest.mark.parametrize(
    ("difference", "verdict"),
    [
        (Mean(7.0, 6.0, 8.0, 3), "can decide"),
        (Mean(0.1, -0.2, 0.4, 3), "cannot decide"),
        (Mean(0.6, 0.1, 1.1, 3), "undecided"),
        (Mean(9.0, None, None, 1), "undecided"),
    ],
)
def test_sensitivity(difference, verdict):
    assert stats.sensitivity(difference, 0.5) == verdict


def test_pareto_front_keeps_what_nothing_beats():
    costs, qualities = [3, 1, 2, 2, 4, 1], [30, 10, 25, 20, 29, 10]
    assert stats.pareto_front(costs, qualities) == [1, 5, 2, 0]


def test_pareto_front_of_nothing_is_empty():
    assert stats.pareto_front([], []) == []


def test_crossover_of_power_laws_is_exact():
    sizes = np.array([4096.0, 64.0, 512.0])
    assert stats.crossover(sizes, sizes, 1000**0.5 * sizes**0.5) == pytest.approx(1000)


def test_crossover_is_none_where_one_curve_stays_below():
    assert stats.crossover([1, 2, 4], [1, 2, 3], [2, 3, 4]) is None
    assert stats.crossover([1, 2], [1, 1], [1, 1]) is None
    assert stats.crossover([7], [1], [2]) is None


def test_crossover_on_a_measured_size_and_the_last_of_several():
    assert stats.crossover([1, 2, 4], [1, 2, 3], [2, 2, 1]) == pytest.approx(2)
    assert stats.crossover([1, 10, 100], [1, 4, 1], [2, 2, 2]) == pytest.approx(10 ** (1 + 0.5))


def test_amdahl_bound():
    assert stats.amdahl_bound(0.2) == pytest.approx(1.25)
    assert stats.amdahl_bound(0) == 1
    assert stats.amdahl_bound(1) == math.inf
    with pytest.raises(ValueError, match="between 0 and 1"):
        stats.amdahl_bound(1.2)


@pytest.mark.parametrize("tick", [4.0, 10.0])
def test_samples_in_steps_of_the_scheduler_tick_are_found(tick):
    random = np.random.default_rng(23)
    samples = tick * random.integers(5, 40, 30) + random.normal(0, 0.05, 30)
    assert stats.scheduler_tick(samples) == tick


def test_honest_samples_have_no_scheduler_tick():
    random = np.random.default_rng(24)
    found = [
        stats.scheduler_tick(random.lognormal(math.log(center), 0.03, 60)) for center in (0.3, 5.0, 40.0, 160.0, 900.0) for _ in range(50)
    ]
    assert set(found) == {None}
    assert stats.scheduler_tick([]) is None
    assert stats.scheduler_tick([8.0] * 19) is None
