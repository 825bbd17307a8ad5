"""L2-SP against the penalty in the loss, the closed form of decoupled decay, and what each optimiser itself does."""
import copy
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

from timm_amf import Plan, UserError, apply_freeze, create_optimizer
from timm_amf.tuning import L2SP
from timm_amf.tuning.l2sp import is_decoupled

ALPHA, BETA = 0.3, 0.2


class Net(nn.Module):
    """Three blocks between a stem and a last norm; small enough for float64 and many steps."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(5, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)) for _ in range(3))
        self.norm = nn.LayerNorm(6)
        self.proj = nn.Linear(6, 6)
        self.fc = nn.Linear(6, 3)

    tuning_roles = dict(backbone=['stem', 'blocks.0', 'blocks.1', 'blocks.2', 'norm', 'proj'], head='fc')

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.fc(self.proj(self.norm(x)))


def net(seed=0):
    torch.manual_seed(seed)
    return Net().double()


def batches(count=6):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randn(8, 5, generator=generator, dtype=torch.float64), torch.randint(3, (8,), generator=generator)


def plan(opt='sgd', alpha=ALPHA, blocks=3, role=None, **kwargs):
    settings = dict(l2sp_alpha=alpha, l2sp_blocks=blocks, **(role or {}))
    return Plan(lr=0.05, opt=opt, weight_decay=BETA, roles=dict(backbone=settings), **kwargs)


def pulled_by_hand(name):
    """Matrices of the first three of the five blocks: what decays and what does not, by the papers' words."""
    return name in ('stem.weight', 'blocks.0.0.weight', 'blocks.1.0.weight')


def decayed_by_hand(name):
    return name in ('blocks.2.0.weight', 'proj.weight', 'fc.weight')


def train(model, optimizer, loss=None):
    for x, y in batches():
        optimizer.zero_grad()
        (F.cross_entropy(model(x), y) + (loss(model) if loss else 0.)).backward()
        optimizer.step()
    return model


def assert_same(a, b, tol=1e-12):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=tol, atol=tol, msg=lambda m, n=name: f'{n}: {m}')


@pytest.mark.parametrize('opt, make', [
    ('sgd', lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True)),
    ('adam', lambda p: torch.optim.Adam(p, lr=0.05)),
])
def test_coupled_is_the_penalty_in_the_loss(opt, make):
    model, reference = net(), net()
    start = {n: p.detach().clone() for n, p in reference.named_parameters()}

    def penalty(model):
        params = dict(model.named_parameters())
        pull = sum((params[n] - start[n]).square().sum() for n in params if pulled_by_hand(n))
        return ALPHA / 2 * pull + BETA / 2 * sum(params[n].square().sum() for n in params if decayed_by_hand(n))

    train(model, create_optimizer(model, plan(opt)))
    train(reference, make(reference.parameters()), penalty)
    assert_same(model, reference)
    # The test can fail: with alpha off the run is another.
    other = net()
    train(other, create_optimizer(other, plan(opt, alpha=0.)))
    assert (other.stem.weight - model.stem.weight).abs().max() > 1e-3


@pytest.mark.parametrize('opt, make', [
    ('adamw', lambda p: torch.optim.Adam(p, lr=0.05)),
    ('sgdw', lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True)),
    ('lookahead_adamw', None),
])
def test_decoupled_is_the_closed_form(opt, make):
    """w <- w - lr * alpha * (w - w_0), then the optimiser's step without any decay."""
    model, reference = net(), net()
    start = {n: p.detach().clone() for n, p in reference.named_parameters()}
    train(model, create_optimizer(model, plan(opt)))
    if make is None:
        inner = torch.optim.Adam(reference.parameters(), lr=0.05)
        from timm.optim.lookahead import Lookahead
        optimizer = Lookahead(inner)
    else:
        inner = optimizer = make(reference.parameters())

    @torch.no_grad()
    def decay(*_):
        for name, p in reference.named_parameters():
            if pulled_by_hand(name):
                p -= 0.05 * ALPHA * (p - start[name])
            elif decayed_by_hand(name):
                p -= 0.05 * BETA * p
    inner.register_step_pre_hook(decay)
    train(reference, optimizer)
    assert_same(model, reference)


def test_spottunes_baseline_alpha_on_what_is_transferred_and_beta_on_the_classifier():
    model = net()
    groups = create_optimizer(model, Plan(roles=dict(
        backbone=dict(l2sp_alpha=0.1), head=dict(weight_decay=0.01)))).param_groups
    assert {(g['role'], g['l2sp_alpha'], g['weight_decay']) for g in groups} == {
        ('backbone', 0.1, 0.), ('backbone', 0., 0.), ('head', 0., 0.01), ('head', 0., 0.)}
    spared = {n for g in groups if g['role'] == 'backbone' and not g['l2sp_alpha'] for n in g['param_names']}
    assert spared == {n for n, p in model.named_parameters() if p.ndim < 2 and not n.startswith('fc')}


def test_norms_and_biases_on_request():
    model = net()
    groups = create_optimizer(model, plan(role=dict(l2sp_1d=True))).param_groups
    pulled = {n for g in groups if g['l2sp_alpha'] for n in g['param_names']}
    assert pulled == {n for n, _ in model.named_parameters() if n.startswith(('stem', 'blocks.0', 'blocks.1'))}
    everything = create_optimizer(model, plan(blocks=3, weight_decay_exclude_1d=False)).param_groups
    assert {n for g in everything if g['l2sp_alpha'] for n in g['param_names']} == pulled


def _last_weights(opt, wd, before, grad_of, kwargs):
    p = nn.Parameter(torch.tensor([[1.5, -0.7], [0.3, 2.]], dtype=torch.float64))
    optimizer = create_optimizer_v2([dict(params=[p], weight_decay=wd)], opt=opt, lr=0.1, weight_decay=wd, **kwargs)
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        grad = torch.randn(2, 2, dtype=torch.float64, generator=generator)
        with torch.no_grad():
            before(p)
        p.grad = grad_of(grad, p.detach())
        optimizer.step()
    return p.detach(), optimizer


def _optimizers():
    # kron's first use takes seconds, and its three names share one flag.
    return [o for o in list_optimizers() if not o.startswith(('bnb', 'fused', 'kron'))]


@pytest.mark.parametrize('opt', _optimizers())
def test_each_optimiser_is_judged_as_it_behaves(opt):
    """Which of the two formulas an optimiser's own weight decay obeys, found by trying both."""
    kwargs = {}
    try:
        own, optimizer = _last_weights(opt, 0.1, lambda p: None, lambda g, p: g.clone(), kwargs)
    except RuntimeError:  # second-order ones need a graph
        pytest.skip('takes no plain gradient')
    coupled, _ = _last_weights(opt, 0., lambda p: None, lambda g, p: g + 0.1 * p, kwargs)
    decoupled, _ = _last_weights(opt, 0., lambda p: p.mul_(1 - 0.1 * 0.1), lambda g, p: g.clone(), kwargs)
    fits = {name for name, w in (('coupled', coupled), ('decoupled', decoupled)) if torch.allclose(own, w, atol=1e-7)}
    if len(fits) == 1:
        assert is_decoupled(optimizer) == (fits == {'decoupled'})
    else:
        is_decoupled(optimizer)  # known all the same


def test_most_optimisers_obey_one_of_the_two():
    count = 0
    for opt in ('sgd', 'momentum', 'sgdw', 'adam', 'adamw', 'nadamw', 'lion', 'rmsprop', 'adopt', 'adoptw', 'muon',
                'laprop', 'adanw', 'radam', 'radamw', 'madgradw', 'adabelief', 'mars', 'rmsproptf', 'rmsproptfw'):
        own, _ = _last_weights(opt, 0.1, lambda p: None, lambda g, p: g.clone(), {})
        coupled, _ = _last_weights(opt, 0., lambda p: None, lambda g, p: g + 0.1 * p, {})
        decoupled, _ = _last_weights(opt, 0., lambda p: p.mul_(1 - 0.1 * 0.1), lambda g, p: g.clone(), {})
        count += torch.allclose(own, coupled, atol=1e-7) != torch.allclose(own, decoupled, atol=1e-7)
    assert count >= 15, count


def test_an_unknown_optimiser_is_refused():
    class Strange(torch.optim.Optimizer):
        pass

    with pytest.raises(UserError, match='sgd or adamw'):
        L2SP(Strange([nn.Parameter(torch.zeros(1))], {}))


def test_after_clipping_and_with_accumulation():
    model, reference = net(), net()
    start = {n: p.detach().clone() for n, p in reference.named_parameters()}
    ours = create_optimizer(model, plan('momentum', momentum=0.))
    theirs = torch.optim.SGD(reference.parameters(), lr=0.05)
    for x, y in batches():
        for m in (model, reference):
            for half in (slice(4), slice(4, 8)):
                (F.cross_entropy(m(x[half]), y[half]) / 2).backward()
            nn.utils.clip_grad_norm_(m.parameters(), 0.1)
        for name, p in reference.named_parameters():
            if pulled_by_hand(name):
                p.grad += ALPHA * (p.detach() - start[name])
            elif decayed_by_hand(name):
                p.grad += BETA * p.detach()
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    assert_same(model, reference)


@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('opt', ['sgd', 'adamw'])
def test_under_a_loss_scaler(opt, fused):
    """The same run with and without a scale of the loss; a step that overflows moves nothing."""
    kwargs = dict(opt_kwargs=dict(fused=True)) if fused else {}
    model, reference = net().float(), net().float()
    ours, theirs = create_optimizer(model, plan(opt, **kwargs)), create_optimizer(reference, plan(opt))
    scaler = torch.amp.GradScaler('cpu', init_scale=1024.)
    for step, (x, y) in enumerate(batches()):
        before = copy.deepcopy(model.state_dict())
        loss = F.cross_entropy(model(x.float()), y)
        scaler.scale(loss * float('inf') if step == 3 else loss).backward()
        scaler.step(ours)
        scaler.update()
        ours.zero_grad()
        if step == 3:
            assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
            continue
        theirs.zero_grad()
        F.cross_entropy(reference(x.float()), y).backward()
        theirs.step()
    assert_same(model, reference, tol=1e-5)


def test_what_is_frozen_or_has_no_gradient_stays():
    model = net()
    late = plan(role=dict(start_epoch=1))
    optimizer = create_optimizer(model, late)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)  # away from the start, so that a pull would show
    before = copy.deepcopy(model.state_dict())
    apply_freeze(model, late, 0)
    train(model, optimizer)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith('fc'), name
    apply_freeze(model, late, 1)
    train(model, optimizer)
    assert not torch.equal(model.stem.weight, before['stem.weight'])


def test_the_starting_point_is_restored():
    model = net()
    start = model.stem.weight.detach().clone()
    first = create_optimizer(model, plan())
    train(model, first)
    state = {n: t.clone() for n, t in first.l2sp.state_dict().items()}
    assert set(state) == {'stem.weight', 'blocks.0.0.weight', 'blocks.1.0.weight'}, 'only what is pulled is stored'
    assert torch.equal(state['stem.weight'], start)

    other = copy.deepcopy(model)
    second = create_optimizer(other, plan())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.l2sp.load_state_dict(state)
    assert_same(train(model, first), train(other, second), tol=0)
    with pytest.raises(UserError, match=r'stem\.weight'):
        second.l2sp.load_state_dict({n: t for n, t in state.items() if n != 'stem.weight'})


def test_off_is_off():
    for settings in (Plan(), plan(alpha=0.)):
        optimizer = create_optimizer(net(), settings)
        assert optimizer.l2sp is None
    assert {g['weight_decay'] for g in optimizer.param_groups} == {0., BETA}


def test_branches_of_a_composite():
    with torch.device('cpu'):
        model = timm.create_model('amf', backbones=('test_resnet', 'test_resnet'), policy='test_resnet', num_classes=3)
    settings = Plan(weight_decay=BETA, roles={
        'branch.0': dict(l2sp_alpha=ALPHA), 'branch.1': dict(l2sp_alpha=0.1, l2sp_blocks=1)})
    optimizer = create_optimizer(model, settings)
    pulled = {n: g['l2sp_alpha'] for g in optimizer.param_groups if g['l2sp_alpha'] for n in g['param_names']}
    matrices = [n for n, p in model.named_parameters() if p.ndim > 1]
    assert pulled == {
        **{n: ALPHA for n in matrices if n.startswith('branches.0.')},
        **{n: 0.1 for n in matrices if n.startswith(('branches.1.conv1', 'branches.1.layer1.0.'))}}
    assert set(optimizer.l2sp.state_dict()) == set(pulled)


def test_the_starting_point_follows_a_model_that_is_moved():
    model, reference = net(), net()
    model.float()
    optimizers = [create_optimizer(m, plan()) for m in (model, reference)]
    model.double()  # as trainers move it to a device, after the optimiser was made
    with torch.no_grad():
        for p in (*model.parameters(), *reference.parameters()):
            p.add_(1.)
    for m, optimizer in zip((model, reference), optimizers):
        for x, y in batches(2):
            optimizer.zero_grad()
            F.cross_entropy(m(x), y).backward()
            optimizer.step()
    for p, q in zip(model.parameters(), reference.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@pytest.mark.parametrize('opt', ['sgd', 'adamw'])
@pytest.mark.parametrize('named', [False, True])
def test_gradients_that_a_closure_computes_within_the_step(opt, named):
    models = [net(), net()]
    optimizers = [create_optimizer(m, plan(opt)) for m in models]
    for x, y in batches():
        def closure(model, optimizer, x=x, y=y):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss
        before = closure(models[0], optimizers[0])
        optimizers[0].step()
        within = partial(closure, models[1], optimizers[1])
        assert torch.equal(optimizers[1].step(closure=within) if named else optimizers[1].step(within), before)
    assert_same(*models, tol=0)
