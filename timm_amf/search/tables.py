"""What `advise` prints."""
from collections.abc import Mapping, Sequence

from timm_amf.search.measure import LABELS, Measures
from timm_amf.search.rules import PAPER, RULES, Decision, sureness
from timm_amf.text import columns
from timm_amf.tuning import Plan

__all__ = ['component_table', 'plan_table', 'ranking_table']

_NO_VOTE = {
    'emd': 'no vote: the paper finds it a poor predictor',
    'random_init': 'see above',
    'fixed_top1': 'see above',
}
_ORDER = (
    'random_minus_fixed', 'fixed_accuracy', 'fisher', 'emd', 'random_init', 'fixed_top1', 'log_me', 'leep', 'nce',
    'h_score', 'trans_rate',
)


def component_table(name: str, network: str, measures: Measures, decision: Decision) -> str:
    """Two tables: what each measure says, and what each rule then says, and how surely."""
    votes = {vote.measure: vote for vote in decision.votes}
    rows = [('measure', 'value', 'sides part at', 'speaks for', 'weight')]
    for key in _ORDER:
        label = LABELS[key]
        if key in votes:
            vote = votes[key]
            side = 'well suited' if vote.score > 0 else 'not well suited'
            rows.append((
                label, f'{vote.value:.4g}', f'{"" if vote.threshold == 0 else "about "}{vote.threshold:.3g}',
                f'{side} ({vote.score:+.2f})', f'{vote.reliability:g}: {vote.why}'))
        elif key in measures.values:
            rows.append((label, f'{measures.values[key]:.4g}', '', '', _NO_VOTE.get(key, 'ranks models; no rule')))
        elif key in measures.missing:
            rows.append((label, '-', '', '', measures.missing[key]))
    side = 'well suited' if decision.suited else 'not well suited'
    names = {True: [], False: []}
    for vote in decision.votes:
        names[(vote.score > 0) == decision.suited].append(LABELS[vote.measure])
    rules = [('rule (Table 7)', 'advice', 'how sure', "the paper's results agree", 'for', 'against')]
    for rule in RULES.values():
        sure = decision.sure * max(0., 2 * rule.support - 1)
        rules.append((
            rule.name, rule.suited if decision.suited else rule.unsuited, f'{sureness(sure)} ({sure:.2f})',
            f'{rule.support:.0%}', ', '.join(names[True]), ', '.join(names[False])))
    title = f'{name} under {network}: {measures.images} training images, {measures.classes} classes'
    verdict = f'The pretrained weights are {side}, {sureness(decision.sure)} ({decision.sure:.2f}); nearest of the ' \
              f"paper's data sets: {decision.like} (LR {PAPER[decision.like].lr:g})"
    return '\n'.join([title, columns(rows), verdict, columns(rules)])


def plan_table(model: str, plan: Plan, followed: Mapping[str, str]) -> str:
    """The settings of each role that the Plan names."""
    names = ('lr', 'low_blocks', 'low_lr_scale', 'reinit_blocks', 'l2sp_alpha', 'l2sp_blocks', 'weight_decay')
    rows = [(f'plan for {model}', 'follows', *names)]
    for role, settings in plan.roles.items():
        values = [getattr(settings, name) for name in names]
        rows.append((role, followed.get(role, ''), *('' if v is None else f'{v:.4g}' for v in values)))
    return columns(rows)


def ranking_table(ranking: Sequence[tuple[str, float, Mapping[str, float]]]) -> str:
    """Models by mean rank over the measures, the best first."""
    names = list(ranking[0][2])
    rows = [('model', 'mean rank', *(LABELS[name] for name in names))]
    for model, rank, values in ranking:
        rows.append((model, f'{rank:.2f}', *(f'{values[name]:.4g}' for name in names)))
    return columns(rows)
