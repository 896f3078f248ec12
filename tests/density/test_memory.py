"""What fitting needs beside the data: chunks, and one number a row for the start."""

import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from density.tables import rows
from mixtura.density import BayesianGaussianMixture, GaussianMixture

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
X, _ = rows(150_000, 8)


def peak(work):
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", ["f8", "f4"])
@pytest.mark.parametrize(
    "mixture",
    [
        GaussianMixture(3, random_state=0),
        GaussianMixture(3, covariance="diag", init="whitened-kmeans", random_state=0),
        GaussianMixture(3, covariance="tied", init="hierarchical", noise_component=True, random_state=0),
        BayesianGaussianMixture(3, random_state=0),
    ],
    ids=["full", "diag", "tied with noise", "bayesian"],
)
def test_a_row_more_needs_less_than_itself(mixture, dtype):
    """The start sees 50,000 rows at most; what grows with the rows is the number of a component, and a flag."""
    data = X.astype(dtype)
    few, many = (peak(lambda part=part: mixture.set_params(max_iter=2).fit(part)) for part in (data[:75_000], data))
    assert many - few < 24 * 75_000 < 0.8 * data[:75_000].nbytes


def test_scores_need_only_what_they_return():
    fitted = GaussianMixture(3, max_iter=2, random_state=0).fit(X[:5000])
    assert peak(lambda: fitted.score_samples(X)) < 8 * len(X) + 4_000_000


def test_a_file_is_read_in_batches_and_never_whole(tmp_path):
    np.save(tmp_path / "rows.npy", X)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    stream = GaussianMixture(3, random_state=0)

    def work():
        for start in range(0, len(mapped), 10_000):
            stream.partial_fit(mapped[start : start + 10_000])

    assert peak(work) < 0.6 * X.nbytes
    assert stream.weight_seen_ == len(X)
    whole = GaussianMixture(3, random_state=0, tol=1e-7).fit(mapped)
    assert whole.score(X) - stream.score(X) < 0.01


LIMITED = """
import resource, sys
import numpy as np
from mixtura.density import GaussianMixture

path = sys.argv[1]
rows = np.load(path, mmap_mode="r")
stream = GaussianMixture(2, random_state=0).partial_fit(rows[:20_000])
used = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (used + (32 << 20),) * 2)
try:
    np.load(path)
    print("the whole file fits")
except MemoryError:
    for start in range(20_000, len(rows), 20_000):
        stream.partial_fit(rows[start : start + 20_000])
    print(stream.weight_seen_)
"""


def test_a_file_larger_than_the_memory_that_is_allowed(tmp_path):
    """The system gives 32 MiB more than the imports take; the file has 64."""
    shape = (1 << 21, 8)
    table = np.lib.format.open_memmap(tmp_path / "rows.npy", "w+", np.float32, shape)
    table[:] = X[np.arange(shape[0]) % len(X)]
    table.flush()
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "rows.npy")]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == str(float(shape[0])), done.stderr[-500:]
