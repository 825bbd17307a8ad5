"""What arrives at the candidates, kept on disk."""
import pytest
import timm
import torch

from timm_amf import cli
from timm_amf.models.blocks import classifiers
from timm_amf.search import contest, taps
from timm_amf.search.candidates import Candidate, block_candidates, candidate_parameters
from timm_amf.search.lockstep import Lockstep
from timm_amf.search.members import lockstep_member
from timm_amf.search.taps import TapCache
from timm_amf.search.units import probe_units

COUNT = 12
BATCHES = [torch.tensor([3, 0, 7, 5]), torch.tensor([1, 2, 11, 4]), torch.tensor([6, 8, 9, 10])]


def lockstep(name='test_resnet', **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **kwargs).requires_grad_(False).eval()
    probe, (head,) = probe_units(model, (3, 32, 32)), classifiers(model)
    found = [*block_candidates(model, (3, 32, 32))[1:], Candidate('classifier', 'classifier', 0, ())]
    return Lockstep(model, probe, [
        lockstep_member(model, probe, c, head, candidate_parameters(model, c)) for c in found])


@pytest.fixture
def pixels():
    return torch.randn(COUNT, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def pays(monkeypatch):
    """Reading is taken to be fast, whatever this machine measures."""
    monkeypatch.setattr(taps, '_MARGIN', 0)


def size_of(net, pixels):
    return sum(t.numel() * t.element_size() for t in net.taps(pixels).values())


def forbid(net):
    def called(x):
        raise AssertionError('computed again')
    net.taps = called


@pytest.mark.parametrize('name,kwargs,channels_last,dtype', [
    ('test_resnet', {}, False, None),
    ('test_resnet', {}, True, None),
    ('test_resnet', {}, False, torch.bfloat16),
    ('test_vit', dict(img_size=32), False, None),
    ('test_convnext', {}, True, torch.bfloat16),
])
def test_equal_to_the_bit_after_the_first_epoch(name, kwargs, channels_last, dtype, pixels, tmp_path, pays):
    net = lockstep(name, **kwargs)
    if channels_last:
        net.model.to(memory_format=torch.channels_last)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    cache = TapCache(net, COUNT, tmp_path / 'taps', 1e9)
    with torch.autocast('cpu', torch.bfloat16, enabled=dtype is not None):
        first = [cache.taps(pixels[b], b) for b in BATCHES]
    assert set(cache.files) == set(net.tap_names) and len(net.tap_names) > 2
    assert dtype is None or dtype in {t.dtype for t in first[0].values()}
    forbid(net)
    order = torch.tensor([10, 3, 4, 4, 0])  # another batch than any of them, of another size
    again = cache.taps(pixels[order], order)
    for tap, tensor in again.items():
        rows = {int(i): row for b, part in zip(BATCHES, first) for i, row in zip(b, part[tap])}
        assert tensor.dtype == first[0][tap].dtype
        assert torch.equal(tensor, torch.stack([rows[int(i)] for i in order])), tap
        if first[0][tap].ndim == 4 and not first[0][tap].is_contiguous():
            assert tensor.is_contiguous(memory_format=torch.channels_last)


def test_images_not_seen_before_are_computed(pixels, tmp_path, pays):
    net = lockstep()
    cache = TapCache(net, COUNT, tmp_path, 1e9)
    cache.taps(pixels[BATCHES[0]], BATCHES[0])
    mixed = torch.tensor([3, 1])  # one of them is known
    expected = net.taps(pixels[mixed])
    assert all(torch.equal(t, expected[n]) for n, t in cache.taps(pixels[mixed], mixed).items())
    forbid(net)
    cache.taps(pixels[mixed], mixed)
    with pytest.raises(AssertionError, match='computed again'):
        cache.taps(pixels[BATCHES[1]], BATCHES[1])


def test_limit(pixels, tmp_path, pays):
    net = lockstep()
    size = size_of(net, pixels)
    within, beyond = (TapCache(net, COUNT, tmp_path / str(n), n) for n in (size, size - 1))
    for cache in (within, beyond):
        cache.taps(pixels[BATCHES[0]], BATCHES[0])
    assert sum(f.stat().st_size for f in within.folder.iterdir()) == size
    assert beyond.files == {} and not beyond.folder.exists()
    expected = net.taps(pixels[BATCHES[0]])
    assert all(torch.equal(t, expected[n]) for n, t in beyond.taps(pixels[BATCHES[0]], BATCHES[0]).items())


def test_not_where_it_does_not_pay(pixels, tmp_path, monkeypatch):
    monkeypatch.setattr(taps, '_MARGIN', float('inf'))
    cache = TapCache(lockstep(), COUNT, tmp_path / 'taps', 1e9)
    cache.taps(pixels[BATCHES[0]], BATCHES[0])
    assert cache.files == {} and not cache.folder.exists()


def test_files_are_removed(pixels, tmp_path, pays):
    cache = TapCache(lockstep(), COUNT, tmp_path, 1e9)
    cache.taps(pixels[BATCHES[0]], BATCHES[0])
    assert list(tmp_path.iterdir())
    cache.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('extra,expected', [
    (['--no-aug'], {'train', 'val'}),
    (['--no-aug', '--mixup', '0.2'], {'val'}),  # what is mixed changes from epoch to epoch
    ([], {'val'}),
    (['--no-aug', '--cache-gb', '0'], set()),
])
def test_only_of_images_that_stay(extra, expected, flags, images, tmp_path, monkeypatch, pays):
    used, closed = set(), set()

    class Recorder(TapCache):
        def taps(self, x, index):
            used.add(self.folder.name.split('-')[-3])
            return super().taps(x, index)

        def close(self):
            super().close()
            closed.add(self.folder.name.split('-')[-3])

    monkeypatch.setattr(contest, 'TapCache', Recorder)
    code = cli.main(['search', str(images / 'noise'), *flags, '--output', str(tmp_path), '--experiment', 's', *extra])
    assert code == 0 and used == closed == expected
