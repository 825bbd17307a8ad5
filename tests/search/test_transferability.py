"""Each measure against a formulation that shares no code with it."""
import numpy as np
import pytest
from scipy import optimize, stats
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from timm_amf.engine.head import C_GRID, held_out
from timm_amf.errors import UserError
from timm_amf.search import transferability as tr


def clusters(number=120, width=6, classes=4, spread=1.5, seed=0):
    """Gaussian classes of unequal size with correlated features."""
    rng = np.random.default_rng(seed)
    labels = np.sort(np.concatenate([np.arange(classes).repeat(3), rng.integers(0, classes, number - 3 * classes) ** 2
                                     // max(1, classes - 1)]))
    mixing = rng.normal(size=(width, width))
    centres = spread * rng.normal(size=(classes, width))
    return rng.normal(size=(number, width)) @ mixing + centres[labels], labels


def distributions(number=60, source=5, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.full(source, 0.3), number), np.arange(number) % classes


def scatter(x, y):
    """(within, between) by Fukunaga's sums, one image and one class at a time."""
    within, between = np.zeros((x.shape[1],) * 2), np.zeros((x.shape[1],) * 2)
    mean = sum(x) / len(x)
    for k in set(y.tolist()):
        members = [row for row, label in zip(x, y) if label == k]
        centre = sum(members) / len(members)
        for row in members:
            within += np.outer(row - centre, row - centre) / len(x)
        between += len(members) / len(x) * np.outer(centre - mean, centre - mean)
    return within, between


@pytest.fixture
def shrunk_by(monkeypatch):
    return lambda a: monkeypatch.setattr(tr, 'ledoit_wolf_shrinkage', lambda *_, **__: a)


class TestFisher:
    @pytest.mark.parametrize('a', [0., 0.3])
    def test_loops(self, shrunk_by, a):
        x, y = clusters()
        shrunk_by(a)
        within, between = scatter(x, y)
        within = (1 - a) * within + a * np.trace(within) / 6 * np.eye(6)
        assert tr.fisher_score(x, y) == pytest.approx(np.trace(np.linalg.solve(within, between)) / 4)

    def test_two_spheres(self):
        """Two equal spherical classes at distance d: Tr = (1/2)(1/2) d^2 / s^2."""
        rng = np.random.default_rng(0)
        x = rng.normal(size=(40000, 3)) * 2
        y = np.arange(40000) % 2
        x[y == 1, 0] += 6
        assert tr.fisher_score(x, y) == pytest.approx(0.25 * 36 / 4 / 2, rel=0.02)

    def test_shrinkage_vanishes_with_many_images_and_helps_with_few(self):
        def share(number, width):
            x, y = clusters(number, width, seed=1)
            return tr.fisher_score(x, y) / (np.trace(np.linalg.solve(*scatter(x, y))) / 4)

        assert share(300, 6) < share(3000, 6) < share(30000, 6)
        assert share(30000, 6) == pytest.approx(1, abs=0.05)
        assert 0 < tr.fisher_score(*clusters(20, 60, seed=1)) < 1e6

    def test_no_spread_within(self):
        with pytest.raises(UserError, match='equal features'):
            tr.fisher_score(np.eye(3)[[0, 0, 1, 1]], [0, 0, 1, 1])


class TestHScore:
    def test_canonical_correlations(self, shrunk_by):
        """Without shrinkage: the sum of the squared canonical correlations of features and one-hot labels."""
        x, y = clusters()
        bases = [np.linalg.svd(z - z.mean(0), full_matrices=False) for z in (x, np.eye(4)[y])]
        q = [u[:, s > 1e-9 * s[0]] for u, s, _ in bases]
        correlations = np.linalg.svd(q[0].T @ q[1], compute_uv=False)
        shrunk_by(0.)
        assert tr.h_score(x, y) == pytest.approx((correlations ** 2).sum())

    def test_more_features_than_images(self, shrunk_by):
        """Every label can be told from the features: all K - 1 correlations are one."""
        x, y = clusters(20, 60)
        shrunk_by(0.)
        assert tr.h_score(x, y) == pytest.approx(3)

    def test_shrunk(self, shrunk_by):
        x, y = clusters()
        means = np.stack([x[y == k].mean(0) for k in y])
        total, between = np.cov(x.T, bias=True), np.cov(means.T, bias=True)
        shrunk = 0.8 * total + 0.2 * np.trace(total) / 6 * np.eye(6)
        shrunk_by(0.2)
        assert tr.h_score(x, y) == pytest.approx(np.trace(np.linalg.inv(shrunk) @ between) * 0.8)


class TestLogME:
    @pytest.mark.parametrize('number, width', [(50, 6), (20, 30)])
    def test_marginal_likelihood(self, number, width):
        """The evidence is the density of y under N(0, I / beta + F F^T / alpha), maximised by a general optimiser."""
        x, y = clusters(number, width, 3, spread=1.)
        expected = []
        for k in range(3):
            target = (y == k).astype(float)

            def loss(logs, target=target):
                alpha, beta = np.exp(logs)
                covariance = np.eye(number) / beta + x @ x.T / alpha
                return -stats.multivariate_normal(np.zeros(number), covariance).logpdf(target) / number

            found = [optimize.minimize(loss, start, method='Nelder-Mead', options=dict(xatol=1e-5, fatol=1e-10))
                     for start in ((0, 0), (5, 2))]
            expected.append(-min(f.fun for f in found))
        assert tr.log_me(x, y) == pytest.approx(np.mean(expected), abs=1e-3)

    def test_prefers_what_separates(self):
        assert tr.log_me(*clusters(spread=4.)) > tr.log_me(*clusters(spread=0.2))


class TestSourceProbabilities:
    def test_leep_by_loops(self):
        theta, y = distributions()
        joint = np.zeros((3, 5))
        for p, label in zip(theta, y):
            joint[label] += p / len(y)
        total = 0.
        for p, label in zip(theta, y):
            total += np.log(sum(joint[label, z] / joint[:, z].sum() * p[z] for z in range(5)))
        assert tr.leep(theta, y) == pytest.approx(total / len(y))

    def test_nce_by_loops(self):
        theta, y = distributions()
        z = theta.argmax(1)
        expected = np.mean([np.log(sum((y == k) & (z == c)) / sum(z == c)) for k, c in zip(y, z)])
        assert tr.nce(theta, y) == pytest.approx(expected)

    def test_hard_predictions_make_them_equal(self):
        theta, y = distributions()
        hard = np.eye(5)[theta.argmax(1)]
        assert tr.leep(hard, y) == pytest.approx(tr.nce(hard, y))

    def test_source_that_knows_the_target(self):
        y = np.arange(12) % 3
        assert tr.nce(np.eye(3)[y], y) == pytest.approx(0, abs=1e-12)


class TestTransRate:
    @pytest.mark.parametrize('number, width', [(60, 5), (30, 80)])
    def test_eigenvalues(self, number, width):
        x, y = clusters(number, width, 3)
        z = x / np.sqrt(np.trace(x @ x.T))
        z = z - z.mean(0)

        def rate(rows):
            return 0.5 * np.log1p(np.linalg.eigvalsh(rows.T @ rows / len(rows)).clip(0) / 1e-4).sum()

        expected = rate(z) - sum(len(z[y == k]) / len(z) * rate(z[y == k]) for k in range(3))
        assert tr.trans_rate(x, y) == pytest.approx(expected)

    def test_scale_does_not_matter(self):
        x, y = clusters()
        assert tr.trans_rate(x, y) == pytest.approx(tr.trans_rate(1000 * x, y))


class TestDomainSimilarity:
    def test_one_dimension(self):
        rng = np.random.default_rng(0)
        a, b, wa, wb = rng.normal(size=7), rng.normal(3, 1, 5), rng.random(7), rng.random(5)
        expected = np.exp(-0.01 * stats.wasserstein_distance(a, b, wa, wb))
        assert tr.domain_similarity(a[:, None], wa, b[:, None], wb) == pytest.approx(expected)

    def test_linear_programme(self):
        rng = np.random.default_rng(1)
        a, b, wa, wb = rng.normal(size=(4, 6)), rng.normal(size=(3, 6)), np.full(4, 0.25), np.array([0.5, 0.3, 0.2])
        cost = np.array([[np.sqrt(((p - q) ** 2).sum()) for q in b] for p in a])
        rows = np.array([np.eye(4)[i][:, None].repeat(3, 1).ravel() for i in range(4)])
        columns = np.array([np.eye(3)[j][None].repeat(4, 0).ravel() for j in range(3)])
        found = optimize.linprog(cost.ravel(), A_eq=np.vstack([rows, columns]), b_eq=np.concatenate([wa, wb]))
        assert tr.domain_similarity(a, wa, b, wb, gamma=0.5) == pytest.approx(np.exp(-0.5 * found.fun))

    def test_itself(self):
        a = np.random.default_rng(0).normal(size=(5, 3))
        assert tr.domain_similarity(a, np.ones(5), a[::-1], 2 * np.ones(5)) == pytest.approx(1)


class TestFixedFeatures:
    def test_is_the_best_of_the_grid(self):
        """The accuracy of scikit-learn's own pipeline, with the penalty that is best of all on a held-out quarter."""
        x, y = clusters(300, 10, 4, spread=0.8)
        test = clusters(301, 10, 4, spread=0.8)
        held = held_out(y, 0.25, 0)

        def score(c, fit, score):
            scaler = StandardScaler().fit(x)
            model = LogisticRegression(C=c, max_iter=2000).fit(scaler.transform(fit[0]), fit[1])
            return 100 * model.score(scaler.transform(score[0]), score[1])

        best = max(C_GRID, key=lambda c: score(c, (x[~held], y[~held]), (x[held], y[held])))
        assert tr.fixed_feature_accuracy(x, y, *test) == pytest.approx(score(best, (x, y), test), abs=1.)

    def test_held_out_part(self):
        y = np.array([0] * 8 + [1] * 2 + [2] * 40)
        held = held_out(y, 0.25, 0)
        assert [held[y == k].sum() for k in range(3)] == [2, 1, 10]

    def test_noise_is_at_chance_and_separable_is_not(self):
        rng = np.random.default_rng(0)
        y = np.arange(400) % 4
        noise = rng.normal(size=(800, 5))
        assert tr.fixed_feature_accuracy(noise[:400], y, noise[400:], y) < 35
        x = np.eye(4)[y] * 10 + rng.normal(size=(400, 4))
        assert tr.fixed_feature_accuracy(x[:200], y[:200], x[200:], y[200:]) == 100

    def test_labels_with_gaps_and_unknown_ones(self):
        """Labels of one component of a mixture; a class that only the evaluation has is always wrong."""
        rng = np.random.default_rng(0)
        y = np.arange(60) % 3
        x = np.eye(3)[y] * 10 + rng.normal(size=(60, 3))
        labels = np.array([4, 7, 9])[y]
        assert tr.fixed_feature_accuracy(x, labels, x, labels) == 100
        assert tr.fixed_feature_accuracy(x, labels, x, np.where(labels == 9, 8, labels)) == pytest.approx(200 / 3)

    def test_constant_features_change_nothing(self):
        x, y = clusters()
        padded = np.insert(x, 2, 7., axis=1)
        assert tr.fixed_feature_accuracy(padded, y, padded, y) == tr.fixed_feature_accuracy(x, y, x, y)


MEASURES = [tr.fisher_score, tr.h_score, tr.log_me, tr.trans_rate]


@pytest.mark.parametrize('measure', MEASURES)
class TestBadInput:
    def test_one_image(self, measure):
        x, y = clusters()
        y = y.copy()
        y[5] = 9
        with pytest.raises(UserError, match='class 9 has one image'):
            measure(x, y)

    def test_no_variance(self, measure):
        with pytest.raises(UserError, match='no feature varies'):
            measure(np.ones((20, 3)), np.arange(20) % 2)

    @pytest.mark.parametrize('value', [np.nan, np.inf])
    def test_not_finite(self, measure, value):
        x, y = clusters()
        x[3, 1] = value
        with pytest.raises(ValueError, match='NaN|infinity'):
            measure(x, y)

    def test_one_class(self, measure):
        with pytest.raises(UserError, match='1 class only'):
            measure(clusters()[0], np.zeros(120, dtype=int))

    def test_shapes(self, measure):
        x, y = clusters()
        with pytest.raises(ValueError, match='inconsistent numbers'):
            measure(x, y[:-1])
