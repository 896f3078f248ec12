"""pomegranate's general mixture of normal distributions, from given parameters. D columns, K components."""

import functools
import os

import numpy as np
import pomegranate
import torch
from loop import serve
from pomegranate.distributions import Normal
from pomegranate.gmm import GeneralMixtureModel

NAMES = {"full": "full", "diag": "diag", "spherical": "sphere"}  # ours to pomegranate's


class Mixtures:
    """A table and the parameters to start from; ``calls`` fit so many iterations as their names say."""

    def load(self, threads):
        """Tell the version."""
        torch.set_num_threads(threads)
        return {"versions": {"pomegranate": pomegranate.__version__}}

    def case(self, folder, kind, iterations):
        """Take table and start from the folder."""
        if kind not in NAMES:
            raise ValueError(f"it has no {kind} covariances")
        self.kind = NAMES[kind]
        read = {name: np.load(os.path.join(folder, f"{name}.npy")) for name in ("X", "weights", "means", "covariances")}
        self.X = torch.from_numpy(read.pop("X"))
        self.start = {name: torch.from_numpy(array).to(self.X.dtype) for name, array in read.items()}
        self.calls = {str(n): functools.partial(self.fit, n) for n in iterations}

    def fit(self, iterations):
        """A fit that goes so many iterations: no gain ends it."""
        # a sphere is given with a variance for each column: means and variances must have one shape, and fitting makes
        # all of them their mean
        covariances = self.start["covariances"]
        if self.kind != "full":
            covariances = covariances.diagonal(dim1=1, dim2=2)
        pairs = zip(self.start["means"].clone(), covariances.clone(), strict=True)
        normals = [Normal(mean, covariance, covariance_type=self.kind) for mean, covariance in pairs]
        priors = self.start["weights"].clone()
        return GeneralMixtureModel(normals, priors=priors, max_iter=iterations, tol=-float("inf")).fit(self.X)

    def output(self, iterations, path):
        """Write the means (K, D) after so many iterations."""
        np.save(path, torch.stack([one.means for one in self.fit(iterations).distributions]).numpy())


serve(Mixtures())
