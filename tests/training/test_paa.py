"""Mixtures of two Gaussians: as scikit-learn fits them, row by row."""

import numpy as np
import pytest
import torch

from tood_deploy.training.losses.paa import fit_two_gaussians, separate


def rows(count: int, seed: int) -> list[torch.Tensor]:
    """Losses as PAA sees them: 2 to 45 values, some of two kinds, some of one, some all alike."""
    random = np.random.default_rng(seed)
    made = []
    for i in range(count):
        size = int(random.integers(2, 46))
        values = random.normal(3.0, 0.8, size)
        values[: size // 3] -= random.uniform(0, 2.5)
        if i % 10 == 0:
            values[:] = 1.25
        made.append(torch.from_numpy(np.sort(np.abs(values)).astype(np.float32)))
    return made


def padded(values: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    table = torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=9.0).double()
    lengths = torch.tensor([len(row) for row in values])
    return table, torch.arange(table.shape[1]) < lengths[:, None]


def test_fits_equal_scikit_learn() -> None:
    mixture = pytest.importorskip("sklearn.mixture")
    values = rows(60, seed=1)
    table, mask = padded(values)
    ours = fit_two_gaussians(table, mask)
    densities = ours.log_densities(table)
    for i, row in enumerate(values):
        column = row.double().numpy()[:, None]
        theirs = mixture.GaussianMixture(
            2,
            covariance_type="diag",
            weights_init=[0.5, 0.5],
            means_init=[[column.min()], [column.max()]],
            precisions_init=[[1.0], [1.0]],
        ).fit(column)
        np.testing.assert_allclose(ours.means[i], theirs.means_[:, 0], rtol=1e-6)
        np.testing.assert_allclose(ours.weights[i], theirs.weights_, rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(ours.precisions[i], theirs.precisions_[:, 0], rtol=1e-4)
        own = densities[i, : len(row)]
        np.testing.assert_allclose(own.logsumexp(1), theirs.score_samples(column), atol=1e-4)
        np.testing.assert_array_equal(own.argmax(1), theirs.predict(column))


def test_a_row_does_not_feel_the_others() -> None:
    values = rows(12, seed=2)
    together = fit_two_gaussians(*padded(values))
    for i, row in enumerate(values):
        alone = fit_two_gaussians(*padded([row]))
        torch.testing.assert_close(together.means[i], alone.means[0])
        torch.testing.assert_close(together.precisions[i], alone.precisions[0])


def test_no_candidates_separate_into_none() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert separate(torch.zeros(0), none, none).tolist() == []


def test_a_single_candidate_of_a_box_is_no_positive() -> None:
    losses, owners = torch.tensor([1.0, 0.2, 0.3, 4.0]), torch.tensor([0, 1, 1, 1])
    chosen = separate(losses, owners, torch.zeros(4, dtype=torch.int64))
    assert 0 not in chosen
    assert 1 in chosen


def test_nine_candidates_a_level_take_part() -> None:
    losses = torch.linspace(0.1, 1.0, 20)
    owners = torch.zeros(20, dtype=torch.int64)
    one_level, two = torch.zeros(20, dtype=torch.int64), torch.arange(20) // 10
    assert max(separate(losses, owners, one_level).tolist()) < 9
    taken = separate(losses + 10 * (two == 0), owners, two)
    assert set(taken.tolist()) <= set(range(10, 19))
