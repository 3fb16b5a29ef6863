"""Requests, uniformity, the membership attack and the stability table against the authors' code."""

import torch
from toy_data import refusal

from vislearn.metrics.continual import attack, stability, uni_js, uni_release
from vislearn.stream_requests import parse, standings

from .harness import Case, of_kind


@of_kind("uncle")
def test_requests(case: Case) -> None:
    for run in case.meta["expected"]["requests"]["value"]:
        requests = parse(run["string"])
        for request, now, row in zip(requests, standings(requests), run["rows"], strict=True):
            kind, task, seen, forgotten = row
            assert (request.kind, list(request.tasks)) == (kind, [task])
            assert (list(now.seen), list(now.forgotten)) == (seen, forgotten)
    for bad in case.meta["expected"]["requests"]["bad_strings"]["must_raise"]:
        assert "request" in refusal(lambda bad=bad: standings(parse(bad)))


@of_kind("uncle")
def test_uniformity(case: Case) -> None:
    logits = case["uni.probs"].log()
    case.close("uniformity", uni_release(logits), case.meta["expected"]["uniformity"]["uni"])
    textbook = case.meta["expected"]["uniformity"]["textbook_js_version_for_contrast"]  # in nats
    case.close("uniformity", 1 - (1 - uni_js(logits)) * torch.tensor(2.0).log().item(), textbook)


@of_kind("uncle")
def test_membership_attack(case: Case) -> None:
    pairs = [tuple(case[f"mia.{who}_{part}"] for part in ("train", "test")) for who in ("shadow", "target")]
    score, same = attack(*pairs)
    assert not same
    case.close("membership_attack", score, case.meta["expected"]["membership_attack"])


@of_kind("uncle")
def test_stability(case: Case) -> None:
    expected, first_seen = case.meta["expected"]["stability"], []
    requests = parse(expected["sequence"])
    for request in requests:
        first_seen += [t for t in request.tasks if t not in first_seen]
    table = case["stab.acc"] / 100
    accuracy = torch.empty_like(table)
    accuracy[:, first_seen] = table
    rows = stability(accuracy, requests, torch.full((table.shape[1],), 0.1, dtype=torch.float64))
    for row, (name, mean, std) in zip(rows, expected["rows"], strict=True):
        assert row.name == name
        case.close("stability", [row.mean, row.std], [mean, std], name)
