"""The teacher of continuous tasks: progress against brute force, what it draws against what it should, and files."""

import numpy as np
import pytest
from scipy import stats

from mixtura.core.errors import FileFormatError, OptionError, ShapeError
from mixtura.density import ALPGMM, GaussianMixture

LOW, HIGH = np.array([-1.0, 0.0]), np.array([1.0, 8.0])


def teach(teacher, student, n):
    tasks = []
    for _ in range(n):
        task = teacher.ask()
        teacher.tell(task, student(task))
        tasks.append(task)
    return np.array(tasks)


def bump(task):
    """A reward that is flat on the left and steep on the right."""
    return float(max(task[0], 0) ** 2 * 10 + np.sin(3 * task[1]) * (task[0] > 0))


def slow_progress(tasks, rewards):
    """Absolute learning progress, by one loop in the unit box."""
    unit, out = (np.array(tasks) - LOW) / (HIGH - LOW), []
    for i, reward in enumerate(rewards):
        best, progress = np.inf, 0.0
        for j in range(i):
            distance = np.linalg.norm(unit[i] - unit[j])
            if distance <= best:  # the latest of equally near ones
                best, progress = distance, abs(reward - rewards[j])
        out.append(progress)
    return np.array(out)


def test_progress_is_that_to_the_nearest_task_before():
    teacher = ALPGMM(LOW, HIGH, fit_every=40, n_components=[2, 3], random_state=0)
    tasks = teach(teacher, bump, 130)
    np.testing.assert_allclose(teacher.tasks, tasks, atol=1e-12)
    np.testing.assert_allclose(teacher.rewards, [bump(task) for task in tasks])
    np.testing.assert_allclose(teacher.progress, slow_progress(tasks, teacher.rewards), atol=1e-12)


def test_of_equally_near_tasks_the_latest_counts():
    teacher = ALPGMM([0], [1], random_state=0)
    for reward in (1.0, 4.0, 9.0):
        teacher.tell([0.5], reward)
    assert teacher.progress.tolist() == [0, 3, 5]


def test_all_random_is_uniform():
    teacher = ALPGMM(LOW, HIGH, fit_every=100, n_components=[2], random_share=1, random_state=0)
    tasks = teach(teacher, bump, 1000)
    for axis in (0, 1):
        assert stats.kstest(tasks[:, axis], stats.uniform(LOW[axis], HIGH[axis] - LOW[axis]).cdf).pvalue > 1e-3
    assert teacher.mixture is not None


def test_a_student_that_never_changes_gets_uniform_tasks():
    teacher = ALPGMM(LOW, HIGH, fit_every=100, n_components=[2, 3], random_share=0, random_state=1)
    tasks = teach(teacher, lambda task: 0.7, 1500)
    assert not teacher.progress.any()
    counts = np.histogram2d(*((tasks - LOW) / (HIGH - LOW)).T, bins=5)[0]
    assert stats.chisquare(counts.ravel()).pvalue > 1e-3


def with_components(weights, progress):
    """A teacher of two narrow components, at 0.2 and 0.8 of the unit box."""
    teacher = ALPGMM([0], [1], random_share=0, random_state=0)
    means, covariance = np.column_stack([[0.2, 0.8], progress]), np.diag([1e-4, 1e-4])
    teacher.mixture = GaussianMixture.from_parameters(weights, means, np.stack([covariance] * 2))
    return teacher


def test_components_are_drawn_by_their_progress_and_not_by_their_weights():
    for progress, share in (([0.5, 0.5], 0.5), ([0.3, 0.1], 0.75), ([0.0, 0.2], 0.0)):
        teacher = with_components([0.95, 0.05], progress)
        left = sum(teacher.ask()[0] < 0.5 for _ in range(2000))
        assert stats.binomtest(int(left), 2000, share).pvalue > 1e-3


def test_draws_of_a_component_have_its_mean_and_variance():
    teacher = with_components([0.5, 0.5], [1.0, 0.0])
    draws = np.array([teacher.ask()[0] for _ in range(2000)])
    assert stats.kstest(draws, stats.norm(0.2, 0.01).cdf).pvalue > 1e-3


def test_tasks_lie_in_the_box():
    teacher = ALPGMM(LOW, HIGH, fit_every=50, n_components=[2, 3], random_share=0, random_state=0)
    tasks = teach(teacher, lambda task: 100 * float(task[0] > 0.9) * np.cos(99 * task[1]), 400)
    assert (tasks >= LOW).all()
    assert (tasks <= HIGH).all()


def test_units_of_tasks_and_rewards_change_nothing():
    plain = ALPGMM([0, 0], [1, 1], fit_every=50, n_components=[2, 3], random_state=0)
    scaled = ALPGMM([0, 0], [4, 0.25], fit_every=50, n_components=[2, 3], random_state=0)
    student = lambda task: float(task[0] > 0.5) * np.sin(20 * task[1])
    tasks = teach(plain, student, 200)
    other = teach(scaled, lambda task: 1024 * student(task / [4, 0.25]), 200)
    assert (other == tasks * [4, 0.25]).all()


def test_the_mixture_is_that_of_the_lowest_criterion():
    teacher = ALPGMM(LOW, HIGH, fit_every=200, n_components=[1, 2, 4], random_share=0, random_state=3)
    tasks = teach(teacher, bump, 200)
    rows = np.column_stack([(tasks - LOW) / (HIGH - LOW), teacher.progress / teacher.progress.max()])
    alone = GaussianMixture(1).fit(rows)
    D = 3
    by_hand = -2 * stats.multivariate_normal(alone.means_[0], alone.covariances_[0]).logpdf(rows).sum()
    assert alone.aic(rows) == pytest.approx(by_hand + 2 * (D + D * (D + 1) / 2))  # D counts the axis of progress
    assert teacher.mixture.n_components > 1
    assert teacher.mixture.aic(rows) < alone.aic(rows)


def test_it_finds_where_progress_is():
    visits = np.zeros(10)

    def student(task):  # learns in one tenth of the box alone
        cell = int(task[0] * 9.999)
        visits[cell] += cell == 6
        return min(visits[cell], 400) / 400

    teacher = ALPGMM([0], [1], fit_every=50, n_components=[2, 3, 4], random_state=0)
    tasks = teach(teacher, student, 500)
    share = ((tasks[100:] >= 0.6) & (tasks[100:] < 0.7)).mean()
    assert share > 0.3  # uniform tasks give 0.1


def test_where_no_mixture_can_be_fitted_tasks_are_uniform():
    teacher = ALPGMM([0], [1], fit_every=10, n_components=[3], random_share=0, random_state=0)
    for i in range(10):
        teacher.tell([0.0], float(i == 0))
    assert teacher.mixture is None  # two distinct rows, three components
    assert stats.kstest([teacher.ask()[0] for _ in range(500)], "uniform").pvalue > 1e-3


@pytest.mark.parametrize("told", [7, 120, 257])
def test_a_teacher_in_a_file_goes_on_as_if_nothing_had_happened(tmp_path, told):
    teacher = ALPGMM(LOW, HIGH, fit_every=50, n_components=[2, 3], random_state=5)
    teach(teacher, bump, told)
    teacher.save(tmp_path / "teacher.safetensors")
    again = ALPGMM.load(tmp_path / "teacher.safetensors")
    assert (again.progress == teacher.progress).all()
    assert (teach(again, bump, 80) == teach(teacher, bump, 80)).all()


def test_other_files_are_refused(tmp_path):
    (tmp_path / "words").write_text("no teacher")
    with pytest.raises(FileFormatError, match="safetensors"):
        ALPGMM.load(tmp_path / "words")
    GaussianMixture.from_parameters([1], [[0]], [[[1]]]).save(tmp_path / "mixture")
    with pytest.raises(FileFormatError, match="no ALPGMM"):
        ALPGMM.load(tmp_path / "mixture")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"low": [0, 1], "high": [1]}, ShapeError, "low and high"),
        ({"low": [0], "high": [0]}, OptionError, "low must lie below high"),
        ({"low": [0], "high": [np.inf]}, OptionError, "finite"),
        ({"n_components": []}, OptionError, "n_components"),
        ({"n_components": [300]}, OptionError, "n_components"),
        ({"n_components": [0]}, OptionError, "n_components"),
        ({"fit_every": 1}, OptionError, "fit_every"),
        ({"random_share": 1.5}, OptionError, "random_share"),
        ({"random_share": -0.1}, OptionError, "random_share"),
    ],
)
def test_wrong_options_are_named(options, error, words):
    with pytest.raises(error, match=words):
        ALPGMM(**({"low": [0], "high": [1]} | options))


@pytest.mark.parametrize(
    ("task", "reward", "error", "words"),
    [
        ([0.5, 0.5], 1.0, ShapeError, "task"),
        ([1.5], 1.0, OptionError, "task must lie"),
        ([np.nan], 1.0, OptionError, "task must lie"),
        ([0.5], np.nan, OptionError, "reward"),
        ([0.5], None, OptionError, "reward"),
        ([0.5], "much", OptionError, "reward"),
    ],
)
def test_wrong_tellings_are_named(task, reward, error, words):
    teacher = ALPGMM([0], [1])
    with pytest.raises(error, match=words):
        teacher.tell(task, reward)
    assert len(teacher.tasks) == 0
