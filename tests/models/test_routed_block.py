"""Routed execution against both copies for every image, in outputs and in every gradient."""
import copy

import pytest
import timm
import torch
import torch.multiprocessing as mp
from spottune_sweep import error, spread, without_dropout
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

import timm_amf
from timm_amf import RolePlan
from timm_amf.errors import UserError
from timm_amf.models import routed_block
from timm_amf.models.routed_block import RoutedBlock
from timm_amf.tuning.freeze import freeze_norm

# Basic blocks and a bottleneck; depthwise convolutions and squeeze-excite; layer norms; tokens; blocks without norms.
BACKBONES = ('test_resnet', 'test_efficientnet', 'test_convnext', 'test_vit', 'test_byobnet', 'test_nfnet')
WITHOUT_BATCH_NORM = ('test_convnext', 'test_vit', 'test_nfnet')
SIZE = 64
BATCH = 4


@pytest.fixture(autouse=True)
def every_block_is_frugal(monkeypatch):
    monkeypatch.setattr(routed_block, '_LARGE', 0)


def create(backbone='test_resnet', freeze=True, **kwargs):
    kwargs = {**dict(policy='test_efficientnet', policy_input_size=32, num_classes=3, img_size=SIZE), **kwargs}
    model = without_dropout(timm.create_model('spottune', backbone=backbone, **kwargs))
    spread(model)
    if freeze:
        timm_amf.apply_freeze(model, timm_amf.Plan(lr=0.1, roles={'stem': RolePlan(train='all')}))
    return model


def images(batch=BATCH, **kwargs):
    return torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5)).to(**kwargs)


def choose(model, actions):
    """All forward passes decide so, with the gradient that a relaxed decision has."""
    def forward_shares(x):
        soft = model.forward_policy(x).to(model.tuned_share.dtype).softmax(-1)[..., 1]
        return actions[:len(x)].to(soft) + (soft - soft.detach())

    model.forward_shares = forward_shares


def actions_of(subset, blocks):
    """(BATCH, blocks) decisions."""
    actions = torch.zeros(BATCH, blocks)
    if subset == 'tuned':
        actions.fill_(1)
    elif subset == 'random':
        actions.bernoulli_(0.5, generator=torch.Generator().manual_seed(2))
    elif subset == 'one tuned':
        actions[2] = 1
    elif subset == 'one frozen':
        actions.fill_(1)[1] = 0
    elif subset == 'in turn':  # whole batches one way and the other
        actions[:, ::2] = 1
    return actions


SUBSETS = ('random', 'frozen', 'tuned', 'one tuned', 'one frozen', 'in turn')


def fix_tuned_norms(model):
    for block in model.blocks_tuned:
        for norm in block.modules():
            if isinstance(norm, _BatchNorm):
                freeze_norm(norm)


def gradients(model, x, routing, routed=None):
    """The output, then the gradient of every trainable parameter and of the input."""
    model.zero_grad()
    model.routing = routing
    x = x.clone().requires_grad_()
    y = model(x)
    assert model._route.decision.routed == (routing == 'routed' if routed is None else routed)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    return {'output': y.detach(), 'input': x.grad,
            **{n: p.grad for n, p in model.named_parameters() if p.requires_grad}}


def assert_equal_gradients(routed, both, tolerance):
    assert routed.keys() == both.keys() and len(both) > 10
    scale = max(g.abs().max() for g in both.values())
    for name, expected in both.items():
        assert routed[name] is not None, name
        # Of a gradient that is truly zero, such as that of a bias before a norm, both see rounding only.
        least = max(expected.abs().max().item(), 1e-4 * scale)
        assert (routed[name] - expected).abs().max() <= tolerance * least, name


@pytest.mark.parametrize('backbone,norms', [
    *((b, 'training') for b in BACKBONES), *((b, 'fixed') for b in BACKBONES if b not in WITHOUT_BATCH_NORM)])
def test_gradients(backbone, norms):
    """In float64, of every parameter: the policy's, the stem's, both copies' and the tail's."""
    model = create(backbone).double().train()
    if norms == 'fixed':
        fix_tuned_norms(model)
    x = images(dtype=torch.float64)
    for subset in SUBSETS if norms == 'fixed' or backbone == 'test_vit' else ('random', 'frozen', 'one tuned'):
        choose(model, actions_of(subset, len(model.block_names)))
        both = gradients(model, x, 'both')
        routed = gradients(model, x, 'routed')
        assert_equal_gradients(routed, both, 1e-10)
        assert any(g.abs().max() > 0 for n, g in routed.items() if n.startswith('policy'))


@pytest.mark.parametrize('backbone', BACKBONES)
def test_outputs(backbone):
    model = create(backbone).eval()
    x = images()
    seen = []
    for subset in SUBSETS:
        choose(model, actions_of(subset, len(model.block_names)))
        with torch.no_grad():
            model.routing = 'both'
            both = model(x)
            model.routing = 'auto'
            assert error(model(x), both) < 1e-5
            for i in range(BATCH):  # as a batch of one
                choose(model, actions_of(subset, len(model.block_names))[i:])
                assert error(model(x[i:i + 1]), both[i:i + 1]) < 1e-5
        seen.append(both)
    assert all(error(a, b) > 1e-3 for i, a in enumerate(seen) for b in seen[:i])


def test_the_policys_own_decisions():
    """Equal seeds draw equal noise, whatever computes the blocks."""
    model = create().double().train()
    x = images(dtype=torch.float64)
    results = []
    for routing in ('both', 'routed'):
        torch.manual_seed(7)
        results.append(gradients(model, x, routing))
    shares = model._route.decision.shares
    assert set(shares.unique().tolist()) == {0., 1.} and shares.requires_grad
    assert_equal_gradients(results[1], results[0], 1e-10)


@pytest.mark.parametrize('backbone', ['test_resnet', 'test_vit'])
def test_checkpointing(backbone):
    model = create(backbone).double().train()
    fix_tuned_norms(model)
    x = images(dtype=torch.float64)
    for subset in ('random', 'frozen', 'one tuned'):
        choose(model, actions_of(subset, len(model.block_names)))
        model.set_grad_checkpointing(False)
        plain = gradients(model, x, 'both')
        model.set_grad_checkpointing()
        for routing in ('both', 'routed'):
            assert_equal_gradients(gradients(model, x, routing), plain, 1e-10)


@pytest.mark.parametrize('backbone, norms', [
    ('test_resnet', 'training'), ('test_convnext', 'training'), ('test_efficientnet', 'fixed')])
def test_channels_last(backbone, norms):
    model = create(backbone).double().train()
    if norms == 'fixed':
        fix_tuned_norms(model)
    x = images(dtype=torch.float64)
    choose(model, actions_of('random', len(model.block_names)))
    both = gradients(model, x, 'both')
    model.to(memory_format=torch.channels_last)
    outputs = []
    for block in model.routed_blocks:
        block.register_forward_hook(lambda _, args, y: outputs.append(y))
    routed = gradients(model, x.contiguous(memory_format=torch.channels_last), 'routed')
    assert_equal_gradients(routed, both, 1e-10)
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in outputs) and outputs


@pytest.mark.parametrize('backbone, norms', [
    ('test_resnet', 'training'), ('test_resnet', 'fixed'), ('test_convnext', 'training'), ('test_vit', 'training')])
def test_autocast(backbone, norms):
    model = create(backbone).train()
    if norms == 'fixed':
        fix_tuned_norms(model)
    x = images()
    choose(model, actions_of('random', len(model.block_names)))
    results = []
    for routing in ('both', 'routed'):
        with torch.autocast('cpu', torch.bfloat16):
            results.append(gradients(model, x, routing))
    both, routed = results
    assert error(routed['output'].float(), both['output'].float()) < 0.05
    for kind in ('policy.', 'backbone.'):
        a, b = (torch.cat([g.flatten() for n, g in r.items() if n.startswith(kind)]) for r in (routed, both))
        assert torch.cosine_similarity(a, b, dim=0) > 0.97


def test_drop_path_is_the_tuned_copys_alone():
    model = create('test_vit', drop_path_rate=0.9).train()
    model.set_blocks('frozen')
    x = images()
    for routing in ('both', 'routed'):
        model.routing = routing
        with torch.no_grad():
            assert error(model(x), model(x)) < 1e-6
    for frozen, tuned in zip(model.blocks_frozen[1:], model.blocks_tuned[1:]):
        assert tuned.training and not any(m.training for m in frozen.modules())


# -- the ends ---------------------------------------------------------------------------------------------------------


def plain_of(model, backbone, which):
    """A timm model with the weights of one of the copies."""
    plain = without_dropout(timm.create_model(backbone, num_classes=3, **(
        dict(img_size=SIZE) if 'vit' in backbone else {})))
    state = {k.replace(f'.{which}.', '.'): v for k, v in model.backbone.state_dict().items()
             if not any(f'.{c}.' in k for c in {'frozen', 'tuned'} - {which})}
    plain.load_state_dict(state)
    return plain.to(model.tuned_share.dtype)


@pytest.mark.parametrize('backbone', BACKBONES)
def test_all_frozen_is_the_pretrained_network(backbone):
    model = create(backbone).eval()
    plain = plain_of(model, backbone, 'frozen').eval()
    choose(model, torch.zeros(BATCH, len(model.block_names)))
    x = images()
    features = model.backbone.forward_features if model.tokens else model.forward_features
    for model.routing in ('auto', 'both'):
        with torch.no_grad():
            model._decide(x)
            got, expected = features(x), plain.forward_features(x)
            assert torch.equal(got, expected)
            assert error(model(x), plain(x)) < 1e-5


@pytest.mark.parametrize('routing', ['auto', 'both'])
@pytest.mark.parametrize('backbone', BACKBONES)
def test_all_tuned_is_standard_fine_tuning(backbone, routing):
    """Outputs, gradients and norm statistics of a training step."""
    model = create(backbone, routing=routing).double().train()
    plain = plain_of(model, backbone, 'tuned').double().train()
    model.set_blocks('tuned')
    x = images(dtype=torch.float64)
    weights = torch.randn(BATCH, 3, dtype=torch.float64)
    (model(x) * weights).sum().backward()
    (plain(x) * weights).sum().backward()
    mine = {n.replace('.tuned.', '.'): p.grad for n, p in model.backbone.named_parameters()
            if '.frozen.' not in n}
    scale = max(p.grad.abs().max() for p in plain.parameters())
    for name, p in plain.named_parameters():
        # torch.equal but for a graph that adds in another order.
        assert (mine[name] - p.grad).abs().max() <= 1e-13 * scale, name
    buffers = {n.replace('.tuned.', '.'): b for n, b in model.backbone.named_buffers()}
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(buffers[name], buffer, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert error(model(x), plain(x)) < 1e-13


# -- what an empty subset leaves --------------------------------------------------------------------------------------


@pytest.mark.parametrize('norms', ['training', 'fixed'])
@pytest.mark.parametrize('checkpointing', [False, True])
def test_an_empty_subset_leaves_zeros(norms, checkpointing):
    model = create().train()
    if norms == 'fixed':
        fix_tuned_norms(model)
    model.set_grad_checkpointing(checkpointing)
    actions = torch.ones(BATCH, 4)
    actions[:, 1] = 0
    choose(model, actions)
    gradients(model, images(), 'routed')
    for i, block in enumerate(model.blocks_tuned):
        for p in block.parameters():
            assert p.grad is not None and bool(p.grad.any()) == (i != 1)
    assert all(p.grad is None for block in model.blocks_frozen for p in block.parameters())


def _train_on_two(rank, store, queue):
    torch.distributed.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2)
    torch.manual_seed(0)
    model = create()
    fix_tuned_norms(model)
    choose(model, torch.zeros(BATCH, 4) if rank == 0 else actions_of('random', 4))
    wrapped = DistributedDataParallel(model.train(), broadcast_buffers=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(3):
        optimizer.zero_grad()
        torch.manual_seed(10 * step + rank)
        wrapped(torch.randn(BATCH, 3, SIZE, SIZE)).square().mean().backward()
        optimizer.step()
    assert model._route.decision.routed
    queue.put((rank, {n: p.detach().numpy() for n, p in model.named_parameters()}))
    torch.distributed.destroy_process_group()


def test_two_processes_train_to_the_end(tmp_path):
    """On one of them no image takes a tuned block."""
    context = mp.get_context('fork')
    queue = context.Queue()
    processes = [
        context.Process(target=_train_on_two, args=(rank, tmp_path / 'store', queue)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        results = dict(queue.get(timeout=60) for _ in processes)
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    torch.manual_seed(0)
    start = dict(create().named_parameters())
    for name, p in results[0].items():
        assert (p == results[1][name]).all(), name
    moved = [n for n, p in results[0].items() if (torch.from_numpy(p) != start[n]).any()]
    assert any('.tuned.' in n for n in moved) and not any('.frozen.' in n for n in moved)


# -- what is exact ----------------------------------------------------------------------------------------------------


def test_what_auto_takes():
    x = images()
    model = create(freeze=False)
    model.train()(x)
    assert not model._route.decision.routed  # the frozen path trains: nothing froze it
    model.routing = 'routed'
    with pytest.raises(UserError, match="routing='auto'"):
        model(x)
    with torch.no_grad():
        model(x)
    assert model._route.decision.routed
    model.eval()(x)
    assert model._route.decision.routed
    model.routing = 'auto'
    timm_amf.apply_freeze(model, timm_amf.Plan(lr=0.1))
    model.train()(x)
    assert model._route.decision.routed
    model.routing = 'both'
    model(x)
    assert not model._route.decision.routed


def test_a_norm_without_statistics_is_never_exact():
    """It mixes the images of a batch in evaluation mode too."""
    block = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), torch.nn.BatchNorm2d(3, track_running_stats=False)).eval()
    routed = RoutedBlock(block, copy.deepcopy(block), 0, None).requires_grad_(False)
    assert not routed.exact()


def test_only_within_its_model():
    model = create()
    with pytest.raises(RuntimeError, match='within its model'):
        model.routed_blocks[0](torch.zeros(1, 32, 8, 8))
