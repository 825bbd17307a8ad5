"""Candidates in one network against each in a network of its own."""
import copy
import gc
import weakref

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath

from timm_amf.models.blocks import classifiers, list_blocks, probe_units
from timm_amf.search.candidates import (
    Candidate,
    Traced,
    candidate_parameters,
    layer_candidates,
    window_candidates,
)
from timm_amf.search.lockstep import (
    HEAD,
    Lockstep,
    LockstepUnfit,
    create_member,
    plain_logits,
)

SIZE = (3, 32, 32)
CLASSIFIER = Candidate('classifier', 'classifier', 0, ())


def network(name, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **kwargs).double()
    for module in model.modules():
        if getattr(module, 'running_var', None) is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.5, 1.5)  # timm starts the last norm of a residual branch at zero
    return model.requires_grad_(False).eval()


def candidates_of(model):
    layers = Traced(model, SIZE).layers()
    return [
        *Traced(model, SIZE).blocks(), *layer_candidates(layers)[::3], *window_candidates(layers)[::4], CLASSIFIER]


def lockstep(model, candidates):
    probe = probe_units(model, SIZE)
    (head,) = classifiers(model)
    members = []
    for candidate in candidates:
        try:
            members.append(create_member(model, candidate, head, candidate_parameters(model, candidate), probe))
        except LockstepUnfit:
            assert model.pretrained_cfg['architecture'].startswith('vit'), candidate  # its position embedding
    return Lockstep(model, probe, members)


def alone(model, candidate):
    """The plain network, written out: what trains, and which modules are in training mode."""
    net = copy.deepcopy(model)
    (head,) = classifiers(net)
    for name in candidate_parameters(net, candidate):
        net.get_parameter(name).requires_grad_(True)
    head.requires_grad_(True).train()
    for path in candidate.modules:
        parent, _, last = path.rpartition('.')
        if last in dict(net.get_submodule(parent).named_children()):
            net.get_submodule(path).train()
    return net, head


def steps(forward, optimizer, batches):
    for x, y in batches:
        loss = sum(F.cross_entropy(logits, y) for logits in forward(x).values())
        loss.backward()
        for opt in optimizer:
            opt.step()
            opt.zero_grad()


@pytest.mark.parametrize('name,kwargs,optimizer', [
    ('resnet10t', {}, 'sgd'),
    ('mobilenetv2_050', {}, 'adamw'),
    pytest.param('convnext_atto', {}, 'adamw', marks=pytest.mark.slow),
    ('vit_tiny_patch16_224', {'img_size': 32, 'depth': 4}, 'adamw'),
    pytest.param('mobilenetv3_small_050', {}, 'sgd', marks=pytest.mark.slow),
])
def test_steps_equal_training_alone(name, kwargs, optimizer):
    model = network(name, **kwargs)
    start = copy.deepcopy(model.state_dict())
    every = candidates_of(model)
    candidates = list(dict.fromkeys([*every[::max(1, len(every) // 5)], CLASSIFIER]))
    net = lockstep(model, candidates)
    for member in net.members:
        member.train()
    torch.manual_seed(1)
    size = (3, *SIZE)
    batches = [(torch.randn(size, dtype=torch.double), torch.randint(5, (3,))) for _ in range(6)]

    def create(params):
        kinds = dict(sgd=lambda p: torch.optim.SGD(p, lr=0.001, momentum=0.9, nesterov=True, weight_decay=1e-3),
                     adamw=lambda p: torch.optim.AdamW(p, lr=1e-4, weight_decay=0.1))
        return kinds[optimizer](params)

    steps(net, [create(list(m.params.values())) for m in net.members], batches)
    for member in net.members:
        plain, head = alone(model, member.candidate)
        optim = create([p for p in plain.parameters() if p.requires_grad])
        steps(lambda x, plain=plain: {'': plain(x)}, [optim], batches)
        found = dict(plain.named_parameters()) | dict(plain.named_buffers())
        found |= {f'{HEAD}{n}': p for n, p in head.named_parameters()}
        for key, tensor in member.tensors().items():
            torch.testing.assert_close(tensor, found[key], rtol=1e-6, atol=1e-6, msg=f'{member.name} {key}')
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, start[key]), key  # bit for bit, statistics of norms included


def test_what_trains_moves_and_nothing_else():
    model = network('resnet10t')
    candidate = Candidate('layer1.0.conv1', 'layer', 0, ('layer1.0.conv1', 'layer1.0.bn1'))
    net = lockstep(model, [candidate])
    (member,) = net.members
    assert set(member.params) == {
        'layer1.0.conv1.weight', 'layer1.0.bn1.weight', 'layer1.0.bn1.bias', f'{HEAD}weight', f'{HEAD}bias'}
    assert {n for n in member.tensors() if 'running' in n} == {'layer1.0.bn1.running_mean', 'layer1.0.bn1.running_var'}
    before = {n: t.clone() for n, t in member.tensors().items()}
    member.train()
    loss = F.cross_entropy(net(torch.randn(4, *SIZE, dtype=torch.double))[member.name], torch.tensor([0, 1, 2, 3]))
    loss.backward()
    torch.optim.SGD(member.params.values(), lr=0.1).step()
    assert not [n for n, t in member.tensors().items() if torch.equal(t, before[n])]
    assert all(p.grad is None for p in model.parameters())


def test_frozen_norm_of_a_tuned_block_stays():
    """Of a candidate's layers, what the Plan freezes (`freeze_bn`) neither trains nor moves."""
    model = network('resnet10t')
    probe = probe_units(model, SIZE)
    candidate = Candidate('layer2.0', 'block', 0, ('layer2.0',))
    trains = [n for n in candidate_parameters(model, candidate) if '.bn' not in n]
    member = create_member(model, candidate, model.fc, trains, probe)
    net = Lockstep(model, probe, [member])
    before = {n: t.clone() for n, t in member.tensors().items() if 'bn' in n}
    member.train()
    net(torch.randn(4, *SIZE, dtype=torch.double))
    assert before and all(torch.equal(t, before[n]) for n, t in member.tensors().items() if n in before)


def test_evaluation_equals_the_plain_network():
    model = network('mobilenetv2_050')
    net = lockstep(model, candidates_of(model))
    for member in net.members:
        for param in member.params.values():
            param.data.mul_(1 + 0.1 * torch.rand_like(param))
    x = torch.randn(3, *SIZE, dtype=torch.double)
    with torch.no_grad():
        found = net(x)
        for member in net.members:
            plain, head = alone(model, member.candidate)
            plain.eval()
            for name, param in member.params.items():
                target = head.get_parameter(name[len(HEAD):]) if name.startswith(HEAD) else plain.get_parameter(name)
                target.copy_(param)
            torch.testing.assert_close(found[member.name], plain(x), rtol=1e-9, atol=1e-9)


def test_a_network_to_itself_equals_the_shared_one():
    model = network('resnet10t')
    candidate = Candidate('layer3.0', 'block', 0, ('layer3.0',))
    trains = candidate_parameters(model, candidate)
    single = create_member(model, candidate, model.fc, trains)
    net = lockstep(model, [candidate])
    x, y = torch.randn(4, *SIZE, dtype=torch.double), torch.tensor([0, 1, 2, 3])
    single.train()
    net.members[0].train()
    F.cross_entropy(plain_logits(single.copies[''], single.head, x, True), y).backward()
    F.cross_entropy(net(x)[net.members[0].name], y).backward()
    assert set(single.params) == set(net.members[0].params)
    for name, param in single.params.items():
        torch.testing.assert_close(param.grad, net.members[0].params[name].grad, rtol=1e-9, atol=1e-12)
    # What is frozen is not there twice.
    frozen = {id(p) for p in model.parameters()}
    assert id(single.copies[''].layer1[0].conv1.weight) in frozen
    assert id(single.copies[''].layer3[0].conv1.weight) not in frozen


def test_dropout_is_the_same_for_all_and_follows_from_the_seed():
    model = network('resnet10t')
    probe = probe_units(model, SIZE)
    head = torch.nn.Sequential(torch.nn.Dropout(0.5), copy.deepcopy(model.fc))
    candidates = [CLASSIFIER, Candidate('layer4.0', 'block', 0, ('layer4.0',))]
    # Norms in evaluation mode, so that both compute the same but for what they draw.
    members = [create_member(model, c, head, [], probe) for c in candidates]
    net = Lockstep(model, probe, members)
    for member in members:
        member.train()
    members[1].copies['layer4.0'].eval()
    x = torch.randn(4, *SIZE, dtype=torch.double)
    net.step_seed = 5
    first = list(net(x).values())
    again = list(net(x).values())
    net.step_seed = 6
    other = list(net(x).values())
    torch.testing.assert_close(first[0], first[1])
    torch.testing.assert_close(first[0], again[0])
    assert (first[0] - other[0]).abs().max() > 1e-3


def test_stochastic_depth_of_frozen_blocks_is_off():
    model = timm.create_model('resnet10t', num_classes=5, drop_path_rate=0.5).double().requires_grad_(False)
    assert any(isinstance(m, DropPath) and m.drop_prob for m in model.modules())
    net = lockstep(model.eval(), [Candidate('layer4.0', 'block', 0, ('layer4.0',))])
    x = torch.randn(2, *SIZE, dtype=torch.double)
    taps = [net.taps(x)['layer4.0'] for _ in range(2)]
    assert torch.equal(*taps)
    with torch.no_grad():
        expected = model.layer3(model.layer2(model.layer1(model.maxpool(model.act1(model.bn1(model.conv1(x)))))))
    torch.testing.assert_close(taps[0], expected, rtol=1e-9, atol=1e-9)


def test_channels_last_and_autocast():
    model = network('resnet10t').float().to(memory_format=torch.channels_last)
    net = lockstep(model, [Candidate(b, 'block', i, (b,)) for i, b in enumerate(list_blocks(model))])
    for member in net.members:
        member.train()
    x = torch.randn(4, *SIZE).to(memory_format=torch.channels_last)
    y = torch.tensor([0, 1, 2, 3])
    with torch.autocast('cpu', torch.bfloat16):
        low = net(x)
        sum(F.cross_entropy(o.float(), y) for o in low.values()).backward()
    assert all(p.grad.isfinite().all() for m in net.members for p in m.params.values())
    high = net(x)
    for name in low:
        torch.testing.assert_close(low[name].float(), high[name], rtol=0.1, atol=0.1)


def test_blocks_that_share_lists_are_refused_and_say_so():
    model = network('densenet121', block_config=(2, 2, 2, 2))
    block = next(b for b in list_blocks(model) if 'denselayer' in b)
    with pytest.raises(LockstepUnfit, match='denselayer.* takes no single tensor'):
        create_member(model, Candidate(block, 'block', 0, (block,)), model.classifier, [], probe_units(model, SIZE))


def test_a_network_whose_blocks_differ_is_found_out():
    """A unit whose rows depend on each other gives other values in a batch that grows."""
    model = network('resnet10t')
    model.layer4[0].register_forward_pre_hook(lambda m, args: (args[0] - args[0].mean(0, keepdim=True),))
    candidates = [Candidate(f'layer{i}.0', 'block', i, (f'layer{i}.0',)) for i in (1, 2)]
    with pytest.raises(LockstepUnfit, match='other values'):
        lockstep(model, candidates).check(SIZE)


def test_probe_leaves_the_model_as_it_was():
    model = network('mobilenetv2_050').train()
    model.blocks[0].eval()
    modes = [m.training for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    probe = probe_units(model, SIZE)
    assert torch.rand(1) == expected
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert probe.order[0] == 'conv_stem' and probe.order[-1] == 'bn2' and not probe.refused
    assert ('blocks.1.0.conv_pw', 'blocks.1.0.bn1') in probe.pairs


def test_a_network_goes_with_its_last_user():
    """A search measures each candidate in a network of its own, with folded weights: they must not pile up."""
    model = network('resnet10t')
    net = lockstep(model, [CLASSIFIER])
    net(torch.randn(2, *SIZE).double())
    left = weakref.ref(net.units[-1])
    gc.disable()
    try:
        del net
        assert left() is None
    finally:
        gc.enable()
