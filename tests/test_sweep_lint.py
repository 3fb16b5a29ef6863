"""Sweeps: broken files, each with one line that says where it is broken and what would be right."""

import copy
import os
from pathlib import Path

import pytest
import yaml

from vislearn.sweep_cli import main
from vislearn.sweep_lint import structure
from vislearn.sweep_options import refused, samples

ROOT = Path(__file__).parent.parent
BASE = {
    "command": ["${env}", "vislearn", "unlearn", "-c", "sweeps/digits/recipe.yaml", "--data.forget=ClassForget",
                "--data.forget.classes=[3]", "--method=SSD", "-c", "${args_json_file}"],
    "method": "random",
    "metric": {"name": "gap/mean", "goal": "minimize"},
    "parameters": {"method.alpha": {"min": 1.0, "max": 50.0}},
}  # fmt: skip
GONE = object()


def broken(*changes):
    """The sound file with (path..., value) put in; GONE takes a key away."""
    config = copy.deepcopy(BASE)
    for *path, last, value in changes:
        place = config
        for name in path:
            place = place[name]
        if value is GONE:
            del place[last]
        else:
            place[last] = value
    return config


def command(*words):
    return ("command", ["${env}", "vislearn", "unlearn", "-c", "r.yaml", "--method=SSD", *words])


def parameter(spec, name="method.alpha"):
    return ("parameters", name, spec)


HYPERBAND = {"type": "hyperband"}
CASES = [
    # the keys
    ((("metrc", {"name": "x"}),), "metrc: unknown key; did you mean 'metric'?"),
    ((("method", GONE),), "method: missing; write method: with one of grid, random, bayes"),
    ((("method", "baeys"),), "method: unknown method 'baeys'; did you mean 'bayes'?"),
    ((("run_cap", "many"),), "run_cap: 'many' is no number of trials"),
    ((("scheduler", {"engine": "optuna"}),), "scheduler: it needs W&B's service"),
    # the metric
    (
        (("metric", GONE),),
        "metric: missing, and method: random looks for its best value; write metric: {name: gap/mean",
    ),
    ((("metric", "name", GONE),), "metric.name: missing"),
    ((("metric", "goal", "minimise"),), "metric.goal: unknown goal 'minimise'; did you mean 'minimize'?"),
    ((("metric", "gaol", "minimize"),), "metric.gaol: unknown key; did you mean 'goal'?"),
    # the parameters
    ((("parameters", {}),), "parameters: missing or empty"),
    ((parameter([1, 2]),), "parameters.method.alpha: [1, 2] is no mapping; write {values: [1, 2]}"),
    ((parameter({"values": []}),), "parameters.method.alpha: values is []; give a list with at least one value"),
    ((parameter({"vales": [1]}),), "parameters.method.alpha: unknown key vales; did you mean 'values'?"),
    ((parameter({"min": 5.0, "max": 1.0}),), "parameters.method.alpha: min 5 is not below max 1"),
    ((parameter({"min": 1.0}),), "parameters.method.alpha: max is missing"),
    (
        (parameter({"min": "1e-3", "max": 0.1}),),
        "min is the text '1e-3'; in a sweep file a number needs its point: write 1.0e-3",
    ),
    ((parameter({"values": ["1e5"]}),), "'1e5' is text, which W&B hands on as text; write 1.0e+5"),
    (
        (parameter({"min": 1, "max": 9, "q": 2}),),
        "q is no key of the distribution int_uniform; write distribution: q_uniform",
    ),
    (
        (parameter({"distribution": "uniform_log", "min": 1, "max": 2}),),
        "unknown distribution 'uniform_log'; did you mean",
    ),
    (
        (parameter({"distribution": "log_uniform", "min": 0.001, "max": 0.1}),),
        "log_uniform takes exponents: from e^0.001 = 1 to e^0.1 = 1.11; for values from 0.001 to 0.1 write "
        "distribution: "
        "log_uniform_values",
    ),
    (
        (parameter({"distribution": "log_uniform_values", "min": -9, "max": -1}),),
        "takes values, and min -9 has no logarithm",
    ),
    ((parameter({"values": [1, 2], "probabilities": [0.5, 0.4]}),), "the probabilities add up to 0.9"),
    (
        (parameter({"values": [1]}, "--method.alpha"),),
        "parameters.--method.alpha: no name of a parameter; write the option without hyphens, method.alpha",
    ),
    # the search
    ((("method", "grid"),), "parameters.method.alpha: a grid has no uniform; list the values"),
    ((("method", "bayes"), parameter({"values": [1, 10]})), "method: bayes over lists of values alone"),
    ((("method", "bayes"), ("metric", GONE)), "metric: missing, and method: bayes looks for its best value"),
    ((("method", "bayes"), parameter({"values": [1, 2], "probabilities": [0.5, 0.5]}, "x")), "takes no probabilities"),
    ((("early_terminate", HYPERBAND),), "early_terminate: neither min_iter nor max_iter; write min_iter: 3"),
    ((("early_terminate", {**HYPERBAND, "max_iter": 27}),), "early_terminate: max_iter needs s"),
    ((("early_terminate", {**HYPERBAND, "min_iter": 0}),), "early_terminate.min_iter: 0 is out of range"),
    ((("early_terminate", {"type": "median", "min_iter": 1}),), "early_terminate.type: unknown type 'median'"),
    (
        (
            ("method", "grid"),
            parameter({"values": [1]}),
            ("metric", GONE),
            ("early_terminate", {**HYPERBAND, "min_iter": 1}),
        ),
        "metric: missing, and early_terminate looks for its best value",
    ),
    # the command
    ((("command", GONE),), "command: missing, and so is program"),
    (
        (command(),),
        'command: no ${args...} macro, so that no parameter reaches the program; end it with -c, "${args_json_file}"',
    ),
    (
        (command("--config=${args_json_file}"),),
        'a macro inside a longer item is not expanded; write two items: --config, "${args_json_file}"',
    ),
    (
        (command("-c", "${args_json_file}", "${arg}"),),
        "command: unknown macro ${arg}, which W&B drops; did you mean 'args'?",
    ),
    (
        (command("${args_no_hyphens}"),),
        'command: ${args_no_hyphens} is not what vislearn reads; write -c, "${args_json_file}"',
    ),
    ((command("${args_json_file}"),), "command: ${args_json_file} is the name of a file; put -c before it"),
    (
        (command("${args}"), parameter({"values": [None, 1.0]})),
        "command: method.alpha can be null, and ${args} writes it as the word None",
    ),
    (
        (command("${args}"), parameter({"parameters": {"alpha": {"values": [1]}}}, "method")),
        "command: method is a nested block",
    ),
    (
        (command("-c", "${args_json_file}", "-c", "more.yaml"),),
        "command: more.yaml comes after ${args_json_file} and wins over",
    ),
    (
        (command("-c", "${args_json_file}", "--method=SSD"),),
        "command: --method=SSD comes after ${args_json_file}, and a class",
    ),
    (
        (("command", ["vislearn", "${args}", "unlearn"]),),
        "command: ${args} stands before unlearn; put it behind the verb",
    ),
    (
        (("command", ["vislearn", "unlern", "${args}"]),),
        "command: vislearn unlern logs no numbers; did you mean 'unlearn'?",
    ),
    ((command("${envvar:NOT_SET_ANYWHERE}", "${args}"),), "the variable NOT_SET_ANYWHERE is not set"),
    ((("command", ["${env}", "${program}", "${args}"]),), "program: the command has ${program}, which is empty"),
    (
        (("program", "vislearn"), ("command", GONE)),
        "program: ${interpreter} is Python, and there is no file vislearn; name a script",
    ),
    (
        (command("--store=s --watch=true", "-c", "${args_json_file}"),),
        "command: --store=s --watch=true: options in one item arrive as one; write an item each",
    ),
    # a class among the parameters
    (
        (parameter({"values": ["SSD", "LFSSD"]}, "method"),),
        "parameters.method: a swept class beside its argument method.alpha",
    ),
]


@pytest.mark.parametrize(("changes", "said"), CASES, ids=lambda value: value[:40] if isinstance(value, str) else "")
def test_a_broken_file_has_one_useful_line(changes, said):
    faults = structure(broken(*changes), Path("sweep.yaml"))
    assert len(faults) == 1, faults
    assert faults[0].startswith("sweep.yaml: ")
    assert said in faults[0]


def test_a_sound_file_has_no_fault():
    assert structure(BASE, Path("sweep.yaml")) == []
    grid = broken(("method", "grid"), ("metric", GONE), parameter({"values": [1]}))  # a grid may only make models
    assert structure(grid, Path("sweep.yaml")) == []


def test_the_command_prints_every_fault_and_exits_with_2(tmp_path, capsys):
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(broken(("method", "gird"), ("metric", "goal", "min"))))
    for argv in (["--lint", str(file)], [str(file)]):  # a broken file is not run either
        assert main(argv) == 2
        lines = capsys.readouterr().err.splitlines()
        assert [line.split(": ")[:4:2] for line in lines] == [["vislearn", str(file)]] * 2
        assert ["method" in lines[0], "metric.goal" in lines[1]] == [True, True]


@pytest.fixture(scope="module")
def at_root():
    before = Path.cwd()
    os.chdir(ROOT)
    yield
    os.chdir(before)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            (parameter({"values": [1]}, "method.alhpa"),),
            "parameters.method.alhpa: Option 'alhpa' is not accepted (did you mean 'alpha'?)",
        ),
        (
            (parameter({"distribution": "q_uniform", "min": 8, "max": 64, "q": 8.0}, "method.batch_size"),),
            "parameters.method.batch_size: the option takes whole numbers, and q_uniform gives 8 as 8.0; write q: 8",
        ),
        (
            (parameter({"min": 8.0, "max": 64.0}, "method.batch_size"),),
            "gives 8 as 8.0; write distribution: int_uniform",
        ),
        ((parameter({"values": ["batch", "samples"]}, "method.fisher"),), "parameters.method.fisher: "),
        ((("metric", "name", "gap_mean"),), "metric.name: vislearn logs no 'gap_mean'; did you mean 'gap/mean'?"),
        ((("command", 4, "sweeps/digits/none.yaml"),), "command: no configuration file sweeps/digits/none.yaml"),
    ],
)
def test_the_parser_has_its_say(at_root, changes, said):
    faults = [": ".join(fault) for fault in refused(broken(*changes))]
    assert len(faults) == 1, faults
    assert said in faults[0]


@pytest.mark.parametrize("name", ["digits", "ssd"])
def test_the_example_files_have_no_fault(at_root, name, capsys):
    assert main(["--lint", f"sweeps/{name}/sweep.yaml"]) == 0
    assert "no fault found" in capsys.readouterr().out


def test_samples_are_what_the_search_gives():
    assert samples({"distribution": "log_uniform", "min": 0, "max": 1}) == [1.0, pytest.approx(2.718, abs=1e-3)]
    assert samples({"distribution": "q_uniform", "min": 1, "max": 5, "q": 2}) == [0, 4]
    assert [type(v) for v in samples({"distribution": "q_uniform", "min": 1, "max": 5})] == [float, float]
    assert samples({"min": 1, "max": 5}) == [1, 5]
    assert samples({"distribution": "log_normal", "mu": 0}) == [1.0]
    assert samples({"distribution": "q_beta", "q": 0.25}) == [0.5]
