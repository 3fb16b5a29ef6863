"""Requests of a stream: every form, every refusal with its position, and what is learned after each."""

from pathlib import Path

import pytest
from toy_data import refusal

from vislearn.stream_requests import Request, Standing, parse, standings


def test_every_form() -> None:
    found = parse("L3, U1+3 ,Ccat,C4,D50,F3\n")
    assert found == [
        Request("L3", "L", (3,)),
        Request("U1+3", "U", (1, 3)),
        Request("Ccat", "C", item="cat"),
        Request("C4", "C", item="4"),
        Request("D50", "D", count=50),
        Request("F3", "F", (3,)),
    ]
    assert parse(["L3", "U1+3", " Ccat", "C4", "D50", "F3"]) == found
    assert [r.unlearns for r in found] == [False, True, True, True, True, False]
    assert parse("[L3, U1+3, Ccat, C4, D50, F3]") == found
    assert parse("Cpickup truck")[0].item == "pickup truck"
    assert parse("L0") == parse(["L0"])


def test_a_file_of_requests(tmp_path: Path) -> None:
    path = tmp_path / "Comments.txt"
    path.write_text("# a stream\nL0, L1\n\nU0,  # the first\nL2\n")
    assert [r.text for r in parse(str(path))] == ["L0", "L1", "U0", "L2"]
    path.write_text("# nothing\n")
    assert "no request" in refusal(lambda: parse(str(path)))
    assert "cannot read the requests" in refusal(lambda: parse(str(tmp_path / "absent.txt")))
    path.write_bytes(b"\xff\xfe")
    assert "cannot read the requests" in refusal(lambda: parse(str(path)))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("", "there is no request"),
        (" ", "there is no request"),
        ("[ ]", "there is no request"),
        ("[L0,1]", "request 2, '1': a request begins with"),
        ("L0,,L1", "request 2 is empty"),
        ("L0,", "request 2 is empty"),
        ("L0,l1", "request 2, 'l1': requests begin with a capital, L1"),
        ("X1", "request 1, 'X1': a request begins with L, U, C, D, F: "),
        ("L0,Lx", "request 2, 'Lx'"),
        ("L 0", "request 1, 'L 0'"),
        ("L-1", "request 1, 'L-1'"),
        ("L00", "request 1, 'L00'"),
        ("L1+2", "request 1, 'L1+2'"),
        ("L", "request 1, 'L'"),
        ("U", "request 1, 'U'"),
        ("U1+", "request 1, 'U1+'"),
        ("U1+1", "request 1, 'U1+1' names a task twice"),
        ("C", "request 1, 'C'"),
        ("C 4", "request 1, 'C 4'"),
        ("D0", "request 1, 'D0'"),
        ("D-5", "request 1, 'D-5'"),
        ("D", "request 1, 'D'"),
        ("F", "request 1, 'F': F3 finalises task 3"),
        ("F0+1", "request 1, 'F0+1'"),
        ("f0", "request 1, 'f0': requests begin with a capital, F0"),
    ],
)
def test_what_is_no_request(given: str, said: str) -> None:
    assert said in refusal(lambda: parse(given))


def test_an_empty_list() -> None:
    assert "there is no request" in refusal(lambda: parse([]))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("L0,L0", "request 2, 'L0': task 0 is learned since request 1"),
        ("L0,U1", "request 2, 'U1': task 1 was never learned"),
        ("L0,U0,U0", "request 3, 'U0': task 0 was unlearned by request 2"),
        ("L0,L1,U0+2", "request 3, 'U0+2': task 2 was never learned"),
        ("L3", "request 1, 'L3': there is no task 3; tasks are 0 to 2"),
        ("L0,F3", "request 2, 'F3': there is no task 3; tasks are 0 to 2"),
        ("L0,F1", "request 2, 'F1': task 1 was never learned; only what is learned can be finalised"),
        ("L0,U0,F0", "request 3, 'F0': task 0 was unlearned by request 2"),
        ("L0,F0,L1,F0", "request 4, 'F0': task 0 was finalised by request 2 and stays learned; once is enough"),
        ("L0,L1,F0,U1+0", "request 4, 'U1+0': task 0 was finalised by request 3 and stays learned; leave out one"),
        ("L0,F0,L0", "request 3, 'L0': task 0 was finalised by request 2 and stays learned (--requests)"),
    ],
)
def test_what_cannot_be_asked(given: str, said: str) -> None:
    assert said in refusal(lambda: standings(parse(given), 3))


def test_standings() -> None:
    found = standings(parse("L2,L0,C4,U2,D5,L1,U0+1,L2"))
    assert found[1] == Standing((2, 0), (2, 0), ())
    assert found[2] == found[1]  # a class and rows leave the tasks as they are
    assert found[4] == Standing((2, 0), (0,), (2,))
    assert found[6] == Standing((2, 0, 1), (), (2, 0, 1))
    assert found[7] == Standing((2, 0, 1), (2,), (0, 1))
    final = standings(parse("L2,L0,F2,U0,L1,F1"))
    assert final[2] == Standing((2, 0), (2, 0), (), (2,))
    assert final[5] == Standing((2, 0, 1), (2, 1), (0,), (2, 1))
