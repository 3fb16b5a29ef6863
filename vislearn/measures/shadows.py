"""Attacks row by row with shadow models: LiRA, RMIA and U-LiRA on every model of an audit.

What the shadow models say is a `Pool`, made by `shadows.Shadows` and given as an argument or through `Bench.shared`
under `HALVES` or `THIRDS`. Members are the rows of the asked set; non-members are validation rows, which the model
under evaluation has never seen and half of the shadow models have, of the same classes where a class is forgotten. The
aim is the value of the retrained models, to which the forget set is as foreign as the validation rows.

The attacker knows the training algorithm and has data enough to train shadow models, sees the model's outputs on the
rows asked about, and for U-LiRA knows the unlearning method and its settings. Cost: no forward pass (one over the rows
asked about with `queries=2`), milliseconds per model once the pool is there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import UserError
from ..measure import Bench, Column, Curve, Found, Graph, Measure, Subject
from ..metrics.rmia import rmia as rmia_scores
from ..metrics.roc import numbers, roc
from ..metrics.shadow_attacks import FEW, Scores, held_out, row_accuracy, u_lira
from ..metrics.shadow_attacks import lira as lira_scores
from ..metrics.signals import logit_scaled
from ..shadow_matrix import IN, OUT, UNLEARN
from ..shadow_pool import Pool, signals

HALVES, THIRDS = "shadows/halves", "shadows/thirds"  # names in Bench.shared
ASKED = ("forget", "retain")
GAMES = ("ulira_game", "ulira_game_oracle", "ulira_game_null")
LEARNED = {"forget": UNLEARN, "retain": IN}  # what a shadow model of U-LiRA did with rows like those of the set
NONE = torch.empty(0, dtype=torch.int64)
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Question:
    """One set that is asked about.

    Attributes:
        name: of the set.
        where: (n,) positions in `Pool.rows`: rows of the set, then rows that the model has never seen.
        member: (n,) bool: the former.
        phi: (n, queries) what the model says of them.
    """

    name: str
    where: Tensor
    member: NDArray[np.bool_]
    phi: Floats


def lira(subject: Subject, bench: Bench, pool: Pool | None = None) -> Found:
    """LiRA: is the answer on a row like that of models trained with the row, or like that of models without it?

    Online (`lira`), and offline (`lira_offline`), which knows the models without the row alone.
    """
    found = Found()
    pool = _pool(bench, pool, HALVES, found)
    if pool is None:
        return found
    for asked in _questions(subject, bench, pool, found):
        keep = pool.mask(IN, asked.where)
        phi = pool.phi[:, asked.where]
        if _enough((keep, ~keep), "lira", asked, found):
            _report(found, asked, "lira", lira_scores(asked.phi, phi, keep, "online"))
        if _enough((~keep,), "lira_offline", asked, found):
            _report(found, asked, "lira_offline", lira_scores(asked.phi, phi, keep, "offline"))
    return found


def rmia(subject: Subject, bench: Bench, pool: Pool | None = None) -> Found:
    """RMIA (online): the share of population rows that a row beats in its probability over that of other models."""
    found = Found()
    pool = _pool(bench, pool, HALVES, found)
    if pool is None:
        return found
    for asked in _questions(subject, bench, pool, found):
        z = torch.isin(pool.population, _alike(bench, asked.name)).nonzero().flatten()
        if not len(z):
            found.notes.append(f"no RMIA on the {asked.name} set: no validation row of its kind is left as population")
            continue
        own, theirs = _signals(subject, bench, pool, pool.population[z], "val"), pool.population_phi[:, z]
        if not np.isfinite(own).all():
            found.notes.append(f"no RMIA on the {asked.name} set: outputs on the population rows are not finite")
            continue
        p, p_z, refs, refs_z = (_probability(a) for a in (asked.phi, own, pool.phi[:, asked.where], theirs))
        scores = rmia_scores(p, p_z, refs, refs_z, pool.mask(IN, asked.where), mode="online")
        _report(found, asked, "rmia", scores)
    return found


def ulira(subject: Subject, bench: Bench, pool: Pool | None = None) -> Found:
    """U-LiRA: LiRA with shadow models that were themselves unlearned by the method under test.

    On the forget set it tells models that unlearned a row from models that never saw it, on the retain set models that
    kept it from the latter. Never seen means, for `ulira`, that the same pipeline ran without the row: trained without
    it, then unlearned others (`pipeline_out`); for `ulira_oracle`, trained without it and not unlearned
    (`oracle_out`), which also finds the trace of the unlearning step, whatever the row.
    """
    found = Found()
    pool = _pool(bench, pool, THIRDS, found)
    if pool is None:
        return found
    for asked in _questions(subject, bench, pool, found):
        for attack, oracle in (("ulira", False), ("ulira_oracle", True)):
            phi, learned, out = _sides(pool, asked.where, LEARNED[asked.name], oracle)
            if _enough((learned, out), attack, asked, found):
                scores = u_lira(asked.phi, phi, learned, out, variance=_variance(pool))
                if _report(found, asked, attack, scores):
                    members, others = scores.split(asked.member)
                    right = ((members > 0).mean() + (others <= 0).mean()) / 2
                    found.numbers[f"{asked.name}/{attack}_accuracy"] = float(right)
    return found


def ulira_game(subjects: Sequence[Subject], retrained: Sequence[Subject], bench: Bench) -> Found:
    """U-LiRA as in its paper, a number of the method: shadow models judged by shadow models that they did not fit.

    For every target row, models that unlearned (or kept) it against models that never saw it. The worst rows tell what
    an average hides: `..._rows_p95` is the 95th percentile of the accuracies of single rows. What chance alone gives is
    `ulira_game_null`, the same with the sides of every row dealt again: with few models its AUC is a little below one
    half (a judged model is missing on its own side) and its worst rows far above.
    """
    found = Found()
    pool = _pool(bench, None, THIRDS, found)
    if pool is None:
        return found
    for name, part in LEARNED.items():
        for attack in GAMES:
            phi, learned, out = _sides(pool, torch.arange(len(pool.rows)), part, attack == "ulira_game_oracle")
            if attack == "ulira_game_null":
                learned, out = _dealt_again(learned, out, bench.seed)
            scores = held_out(phi, learned, out, variance=_variance(pool), seed=bench.seed)
            members, others = scores.split(learned)
            if not len(members) or not len(others):
                found.notes.append(f"no {attack} for rows like the {name} set: no row has models on both sides")
                continue
            values, _ = numbers(members, others, interval=False)  # rows of one model are no independent draws
            rows = row_accuracy(scores, learned)
            found.numbers |= {f"{name}/{attack}_{key}": value for key, value in values.items()}
            found.numbers[f"{name}/{attack}_accuracy"] = float(np.nanmean(rows))
            found.numbers[f"{name}/{attack}_rows_p95"] = float(np.nanpercentile(rows, 95))
            found.curves[f"{name}/{attack}_roc"] = Curve(*roc(members, others).log_points())
    return found


# what the attacks have in common


def _pool(bench: Bench, pool: Pool | None, name: str, found: Found) -> Pool | None:
    """What the shadow models say: what is given, or what the bench has; a note when there is nothing."""
    pool = pool or bench.shared.get(name)
    if pool is None:
        what = "LiRA and RMIA" if name == HALVES else "U-LiRA"
        found.notes.append(f"no {what}: no shadow models were made; they come with --evaluation=thorough")
    else:
        found.notes += pool.notes
    return pool


def _questions(subject: Subject, bench: Bench, pool: Pool, found: Found) -> Iterator[Question]:
    """The sets that can be asked about; a note for each that cannot."""
    for name in ASKED:
        sides = [pool.where(bench.sets.get(name, NONE)), pool.where(_alike(bench, name))]
        if not all(map(len, sides)):
            who = f"row of the {name} set" if not len(sides[0]) else "validation row of its kind"
            found.notes.append(f"no attack with shadow models on the {name} set: no {who} is among their target rows")
            continue
        phi = [_signals(subject, bench, pool, pool.rows[w], s) for w, s in zip(sides, ("train", "val"), strict=True)]
        yield Question(name, torch.cat(sides), np.repeat([True, False], list(map(len, sides))), np.concatenate(phi))


def _alike(bench: Bench, name: str) -> Tensor:
    """Validation rows of the kinds of a set: those of its classes where classes are forgotten, else all."""
    divided = any(f"{split}_forget" in bench.sets for split in ("val", "test"))
    return bench.sets.get(f"val_{name}" if divided else "val", NONE)


def _signals(subject: Subject, bench: Bench, pool: Pool, ids: Tensor, split: str) -> Floats:
    """What the model under evaluation says of rows, (n, queries): from its stored outputs, if they will do.

    Raises:
        UserError: it has no outputs there, or the rows have other classes than the shadow models were trained on.
    """
    if split not in subject.predictions:
        raise UserError(f"the model {subject.key} has no outputs on {split}, and shadow attacks ask about rows of it")
    p = subject.predictions[split].of(ids)
    where = torch.searchsorted(pool.rows, ids).clamp(max=len(pool.rows) - 1)
    known = pool.rows[where] == ids
    if not torch.equal(p.targets[known], pool.targets[where][known]):
        raise UserError(f"these shadow models were trained on other data than the model {subject.key}")
    if pool.queries == 1:
        return logit_scaled(p.outputs, p.targets).numpy()[:, None]
    if bench.data is None:
        raise UserError("an attack that also asks about mirror images needs the data, and only outputs are there")
    return signals(subject.model, bench.data, ids, pool.queries).astype(np.float64)


def _sides(pool: Pool, where: Tensor, part: int, oracle: bool) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Signals (r, n, queries) and masks (r, n) of models that learned rows and of models that never saw them."""
    assert pool.before is not None
    learned, out, after = pool.mask(part, where), pool.mask(OUT, where), pool.phi[:, where]
    if not oracle:
        return after, learned, out
    nobody = np.zeros_like(out)
    both = np.concatenate([after, pool.before[:, where]])
    return both, np.concatenate([learned, nobody]), np.concatenate([nobody, out])


def _dealt_again(learned: NDArray[Any], out: NDArray[Any], seed: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """The sides (r, n) of every row shuffled among the models that are on one: as many on each, and no difference."""
    asked = learned | out
    draws = np.where(asked, np.random.default_rng(seed).random(asked.shape), 2.0)
    first = draws.argsort(0).argsort(0) < learned.sum(0)
    return asked & first, asked & ~first


def _variance(pool: Pool) -> Any:
    """One variance for all rows of a side below 64 models, as LiRA's authors advise."""
    return "centred" if len(pool.phi) < FEW else "sample"


def _enough(sides: Sequence[NDArray[np.bool_]], attack: str, asked: Question, found: Found) -> bool:
    """Whether some row has two models on each side, without which there is no variance."""
    if all((side.sum(0) > 1).any() for side in sides):
        return True
    found.notes.append(f"no {attack} on the {asked.name} set: a variance needs two shadow models on a side of a row")
    return False


def _probability(phi: NDArray[Any]) -> Floats:
    """The probability of the true class from its log-odds."""
    return torch.from_numpy(np.asarray(phi, np.float64)).sigmoid().numpy()


def _report(found: Found, asked: Question, attack: str, scores: Scores) -> bool:
    """Numbers, curve and notes of one attack on one set; whether there are rows left on both sides."""
    where = f"{attack} on the {asked.name} set"
    found.notes += [f"{where}: {note}" for note in scores.notes]
    members, others = scores.split(asked.member)
    if not len(members) or not len(others):
        found.notes.append(f"no {where}: no row with a score is left among its {'non-' * bool(len(members))}members")
        return False
    values, notes = numbers(members, others)
    found.numbers |= {f"{asked.name}/{attack}_{key}": value for key, value in values.items()}
    found.notes += [f"{where}: {note}" for note in notes]
    found.curves[f"{asked.name}/{attack}_roc"] = Curve(*roc(members, others).log_points())
    return True


TITLES = {
    "lira": ("LiRA", "the online likelihood ratio attack (Carlini et al. 2022)"),
    "lira_offline": ("LiRA offline", "the likelihood ratio attack with models without the row alone"),
    "rmia": ("RMIA", "the attack by pairs against population rows (Zarifzadeh et al. 2024)"),
    "ulira": ("U-LiRA", "LiRA with shadow models unlearned by the same method; never seen = same pipeline without the "
              "row (pipeline_out)"),
    "ulira_oracle": ("U-LiRA, oracle", "as U-LiRA, never seen = trained without the row and not unlearned "
                     "(oracle_out): it also finds the trace of unlearning"),
    "ulira_game": ("U-LiRA game", "U-LiRA among the shadow models, a number of the method (Hayes et al. 2025)"),
    "ulira_game_oracle": ("U-LiRA game, oracle", "the same against models that were not unlearned"),
    "ulira_game_null": ("U-LiRA game, chance", "the same with the sides of every row dealt again: what chance gives"),
}  # fmt: skip
PLAIN = {
    "auc": ("AUC", "chance that a row of {set} scores above one never seen; one half is guessing", ""),
    "accuracy": ("acc.", "balanced accuracy at threshold 0", "%"),
    "balanced": ("best acc.", "best balanced accuracy over thresholds, chosen on these rows", "%"),
    "tpr_at_1": ("TPR at 1 %", "share of {set} found at 1 % false positives", "%"),
    "tpr_at_01": ("TPR at 0.1 %", "share of {set} found at 0.1 % false positives", "%"),
    "tpr_at_0": ("TPR at 0", "share of {set} found without a false positive", "%"),
    "rows_p95": ("worst rows", "95th percentile over rows of the accuracy on a row; one half is guessing", "%"),
}
ONLY = {"accuracy": "ulira", "rows_p95": "game"}  # numbers that only some attacks have


def columns(*attacks: str) -> tuple[Column, ...]:
    """How the numbers of some attacks are printed."""
    out = []
    for attack, name, (key, (short, said, unit)) in product(attacks, ASKED, PLAIN.items()):
        if ONLY.get(key, "") in attack:
            title = TITLES[attack][0] + (" (kept)" if name == "retain" else "")
            text = f"{TITLES[attack][1]}: {said.format(set='D_f' if name == 'forget' else 'D_r')}"
            better = None if "game" in attack else "retrained"
            out.append(Column(f"{name}/{attack}_{key}", f"{title} {short}", text, unit, better, "membership"))
            out += [Column(f"{name}/{attack}_{key}_{end}", f"{title} {short}, {end}",
                           f"{end} end of the 95 % interval over rows of: {text}", unit, None, "membership")
                    for end in ("low", "high") if key not in ONLY and "game" not in attack]  # fmt: skip
    return tuple(out)


def graphs(*attacks: str) -> tuple[Graph, ...]:
    """The ROC curves of some attacks, in log-log."""
    return tuple(
        Graph(f"{name}/{attack}_roc", f"{TITLES[attack][0]} on the {name} set", TITLES[attack][1],
              "false positive rate (validation rows called members)", f"share of {name} rows called members",
              "membership", "roc")
        for attack in attacks for name in ASKED
    )  # fmt: skip


MEASURES = (
    Measure(lira, tier="thorough", pool=HALVES, columns=columns("lira", "lira_offline"),
            graphs=graphs("lira", "lira_offline")),
    Measure(rmia, tier="thorough", pool=HALVES, columns=columns("rmia"), graphs=graphs("rmia")),
    Measure(ulira, tier="thorough", pool=THIRDS, columns=columns("ulira", "ulira_oracle"),
            graphs=graphs("ulira", "ulira_oracle")),
    Measure(ulira_game, of="runs", tier="thorough", pool=THIRDS, columns=columns(*GAMES), graphs=graphs(*GAMES)),
)  # fmt: skip
