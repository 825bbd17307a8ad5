"""The examples drive any timm model by a Plan: in a bare loop, Hugging Face's Trainer, Lightning and fastai.

Those of a package that is not installed are skipped.
"""
import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import timm_amf

ROOT = Path(__file__).resolve().parents[1]
# The first blocks never train, the others from the second epoch on; a pull, a warm-up of the head by itself.
PLAN = timm_amf.Plan(
    opt='sgd', lr=0.02, weight_decay=0.01, epochs=3, schedule=timm_amf.Schedule(warmup_epochs=0),
    roles={'backbone': dict(start_epoch=1, train=[-1, -2], l2sp_alpha=0.1),
           'head': dict(lr=0.2, schedule=dict(warmup_epochs=1))})
BATCH = 4


@pytest.fixture(autouse=True)
def examples(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'examples'))


def small_model():
    torch.manual_seed(0)
    return timm.create_model('test_resnet', num_classes=3).double()  # in which nothing hides among rounding errors


def data(count=12):
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.randn(count, 3, 32, 32, generator=generator, dtype=torch.float64), torch.arange(count) % 3)


def reference(model, plan=PLAN, epochs=None, batch=BATCH):
    """The loop in the words of the library alone: GroupScheduler, and a state after each epoch."""
    optimizer = timm_amf.create_optimizer(model, plan)
    scheduler = timm_amf.GroupScheduler(optimizer, plan, 12 // batch)
    updates, states = 0, []
    model.train()
    for epoch in range(plan.epochs if epochs is None else epochs):
        timm_amf.apply_freeze(model, plan, epoch)
        for x, y in DataLoader(data(), batch):
            scheduler.step_update(updates)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            updates += 1
        scheduler.step(epoch + 1)
        states.append(copy.deepcopy(model.state_dict()))
    return states


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f'{n}: {m}')


def moved(before, after) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_the_reference_does_what_the_plan_says():
    start, states = small_model().state_dict(), reference(small_model())
    heads = moved(start, states[0])
    assert heads == {'fc.weight', 'fc.bias'}
    later = moved(states[0], states[1])
    assert heads < later and {name.partition('.')[0] for name in later} == {'layer3', 'layer4', 'fc'}
    assert any('running_mean' in name for name in later)


def test_bare_loop(capsys):
    from bare_loop import fine_tune

    model = fine_tune(small_model(), PLAN, DataLoader(data(), BATCH))
    assert_close(model.state_dict(), reference(small_model())[-1])
    assert capsys.readouterr().out.count('loss of the last batch') == 3


def test_huggingface(tmp_path):
    pytest.importorskip('transformers')
    from huggingface_trainer import PlanTrainer
    from torch.utils.data import SequentialSampler
    from transformers import TrainingArguments

    class InOrder(PlanTrainer):
        def _get_train_sampler(self, *args):
            return SequentialSampler(self.train_dataset)

    def trainer():
        args = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=BATCH, save_strategy='epoch', report_to='none', use_cpu=True,
            max_grad_norm=0, disable_tqdm=True)
        return InOrder(
            small_model(), PLAN, args, data(), eval_dataset=data(),
            compute_metrics=lambda p: dict(accuracy=(p.predictions.argmax(1) == p.label_ids).mean()))

    expected = reference(small_model())
    whole = trainer()
    whole.train()
    assert_close(whole.model.state_dict(), expected[-1])
    assert 0 <= whole.evaluate()['eval_accuracy'] <= 1
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / 'checkpoint-6'))  # unfrozen before: two epochs of three batches
    assert_close(resumed.model.state_dict(), expected[-1])


def lightning_trainer(folder, epochs=PLAN.epochs, **kwargs):
    import lightning as L
    from lightning_callback import PlanCallback

    return L.Trainer(
        accelerator='cpu', max_epochs=epochs, default_root_dir=folder, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[PlanCallback()], **kwargs)


def test_lightning_after_a_resume(tmp_path):
    """Lightning's issue 21901: what was unfrozen before an interruption trains on after it."""
    pytest.importorskip('lightning')
    from lightning_callback import Classifier

    expected = reference(small_model())
    loaders = DataLoader(data(), BATCH), DataLoader(data(), BATCH)
    whole = Classifier(small_model(), PLAN)
    lightning_trainer(tmp_path / 'whole', enable_checkpointing=False).fit(whole, *loaders)
    assert_close(whole.model.state_dict(), expected[-1])

    class Killed(Exception):
        pass

    class Dies(Classifier):
        def on_train_epoch_start(self):
            if self.current_epoch == 2:
                raise Killed

    trainer = lightning_trainer(tmp_path / 'resumed')
    with pytest.raises(Killed):
        trainer.fit(Dies(small_model(), PLAN), *loaders)
    last, = (tmp_path / 'resumed').rglob('*.ckpt')
    resumed = Classifier(small_model(), PLAN)
    lightning_trainer(tmp_path / 'resumed').fit(resumed, *loaders, ckpt_path=last)
    trains = {name for name, p in resumed.model.named_parameters() if p.requires_grad}
    assert {name.partition('.')[0] for name in trains} == {'layer3', 'layer4', 'fc'}
    assert_close(resumed.model.state_dict(), expected[-1])


DDP = """
import sys
import torch
from torch.utils.data import DataLoader
from test_examples import BATCH, PLAN, data, lightning_trainer, small_model
from lightning_callback import Classifier

torch.set_num_threads(1)
trainer = lightning_trainer(
    sys.argv[1], devices=2, strategy='ddp', enable_checkpointing=False, use_distributed_sampler=False)
rank = trainer.global_rank
# Each process has its half of each batch, so that both together see the batches of one.
halves = [i for i in range(12) if i % BATCH // (BATCH // 2) == rank]
module = Classifier(small_model(), PLAN)
trainer.fit(module, DataLoader(torch.utils.data.Subset(data(), halves), BATCH // 2))
torch.save(module.model.state_dict(), f'{sys.argv[1]}/{rank}.pt')
"""


@pytest.mark.slow
def test_lightning_under_ddp(tmp_path):
    """Lightning's issue 20340: what is unfrozen under DDP is the same in all processes, and trained by all of them."""
    pytest.importorskip('lightning')
    script = tmp_path / 'ddp.py'
    script.write_text(DDP)
    paths = [ROOT, ROOT / 'tests', ROOT / 'examples', os.environ.get('PYTHONPATH', '')]
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=600,
        env={**os.environ, 'PYTHONPATH': os.pathsep.join(map(str, paths))})
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (torch.load(tmp_path / f'{rank}.pt') for rank in (0, 1))
    parameters = [name for name, _ in small_model().named_parameters()]
    assert all(torch.equal(first[name], second[name]) for name in parameters)
    assert {n.partition('.')[0] for n in moved(small_model().state_dict(), first)} == {'layer3', 'layer4', 'fc'}


def test_fastai():
    pytest.importorskip('fastai')
    from fastai.vision.all import Callback, CrossEntropyLossFlat, DataLoaders
    from fastai_splitter import plan_learner

    plan = PLAN.with_role('backbone', l2sp_alpha=0.)
    model = small_model()
    start, seen = copy.deepcopy(model.state_dict()), []

    class See(Callback):
        order = 99

        def after_epoch(self):
            seen.append((copy.deepcopy(self.model.state_dict()), [h['lr'] for h in self.opt.hypers]))

    loaders = DataLoaders(DataLoader(data(), BATCH), DataLoader(data(), BATCH))
    learn = plan_learner(loaders, model, plan, loss_func=CrossEntropyLossFlat(), cbs=See())
    groups = timm_amf.param_groups(model, plan)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(3)
    assert [h['wd'] for h in learn.opt.hypers] == [group['weight_decay'] for group in groups]
    ratios = {round(lr / group['lr'], 6) for lr, group in zip(seen[0][1], groups)}
    assert len(ratios) == 1, 'each part has its LR, times the schedule of fastai'
    assert moved(start, seen[0][0]) == {'fc.weight', 'fc.bias'}
    assert {name.partition('.')[0] for name in moved(seen[0][0], seen[1][0])} == {'layer3', 'layer4', 'fc'}
