"""What is wrong with a W&B sweep file: each fault as one line that says where it is and what would be right."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from .sweep import EXPONENTS, distribution, leaves
from .sweep_command import ARGUMENTS, DEFAULT, ENVIRONMENT, MACROS, expand, macro, own_verb

KEYS = ("apiVersion", "kind", "controller", "description", "program", "job", "image_uri", "entity", "project", "method",
        "command", "name", "run_cap", "metric", "early_terminate", "parameters")  # fmt: skip
METHODS = ("grid", "random", "bayes")
GOALS = ("minimize", "maximize")
IMPUTE = ("latest", "best", "worst")
STOPPING = ("type", "min_iter", "max_iter", "s", "eta", "strict")
ENDS, Q = ("min", "max"), ("min", "max", "q")
NORMAL, BETA = ("mu", "sigma"), ("a", "b")
# the keys of every distribution; those without a default come first
DISTRIBUTIONS: dict[str, tuple[str, ...]] = {
    "constant": ("value",), "categorical": ("values",), "categorical_w_probabilities": ("values", "probabilities"),
    "int_uniform": ENDS, "uniform": ENDS, "q_uniform": Q, "log_uniform": ENDS, "log_uniform_values": ENDS,
    "q_log_uniform": Q, "q_log_uniform_values": Q, "inv_log_uniform": ENDS, "inv_log_uniform_values": ENDS,
    "normal": NORMAL, "q_normal": (*NORMAL, "q"), "log_normal": NORMAL, "q_log_normal": (*NORMAL, "q"),
    "beta": BETA, "q_beta": (*BETA, "q"),
}  # fmt: skip
NEEDED = ("value", "values", "probabilities", "min", "max")
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
TEXT_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
CLASS_FLAGS = ("method", "model", "data", "data.forget")
VERBS = ("fit", "unlearn")  # those that log numbers

Fault = tuple[str, str]  # (where in the file, what is wrong and what would be right)


def lint(config: Mapping[str, Any], file: Path) -> list[str]:
    """All faults of a sweep file; those of its structure first, and only without any the parser's."""
    from .sweep_options import refused  # the parser takes seconds to import

    return structure(config, file) or [f"{file}: {where}: {what}" for where, what in refused(config)]


def structure(config: Mapping[str, Any], file: Path) -> list[str]:
    """The faults that can be seen without the command's own parser."""
    checks = (_keys, _method, _metric, _parameters, _search, _early_terminate, _command, _classes)
    return [f"{file}: {where}: {what}" for check in checks for where, what in check(config)]


def near(word: Any, known: Sequence[str]) -> str:
    """The known word that looks most like another, or all of them."""
    found = difflib.get_close_matches(str(word), known, n=1, cutoff=0.5)
    return f"did you mean '{found[0]}'?" if found else f"known are {', '.join(known)}"


def _keys(config: Mapping[str, Any]) -> Iterator[Fault]:
    for key in config:
        if key in ("scheduler", "metrics"):
            yield str(key), "it needs W&B's service; leave it out, and use method: grid, random or bayes"
        elif key not in KEYS:
            yield str(key), f"unknown key; {near(key, KEYS)}"
    cap = config.get("run_cap", 1)
    if not isinstance(cap, int) or isinstance(cap, bool) or cap < 1:
        yield "run_cap", f"{cap!r} is no number of trials; write a whole number, run_cap: 20"


def _method(config: Mapping[str, Any]) -> Iterator[Fault]:
    if "method" not in config:
        yield "method", f"missing; write method: with one of {', '.join(METHODS)}"
    elif config["method"] not in METHODS:
        yield "method", f"unknown method {config['method']!r}; {near(config['method'], METHODS)}"


def _metric(config: Mapping[str, Any]) -> Iterator[Fault]:
    example = "write metric: {name: gap/mean, goal: minimize}"
    if "metric" not in config:
        needy = [f"method: {m}" for m in ("random", "bayes") if config.get("method") == m]
        needy += ["early_terminate"] if "early_terminate" in config else []
        if needy:
            yield "metric", f"missing, and {needy[0]} looks for its best value; {example}"
        return
    metric = config["metric"]
    if not isinstance(metric, Mapping):
        yield "metric", f"{metric!r} is no mapping; {example}"
        return
    known = ("name", "goal", "target", "impute", "impute_while_running")
    for key in metric:
        if key not in known:
            yield f"metric.{key}", f"unknown key; {near(key, known)}"
    if not isinstance(metric.get("name"), str) or not metric["name"]:
        yield "metric.name", f"missing; {example}"
    if metric.get("goal", "minimize") not in GOALS:
        yield "metric.goal", f"unknown goal {metric['goal']!r}; {near(metric['goal'], GOALS)}"
    if not _number(metric.get("target", 0)):
        yield "metric.target", f"{metric['target']!r} is no number; write the value at which the sweep may end"
    for key, allowed in (("impute", IMPUTE), ("impute_while_running", (*IMPUTE, "false"))):
        if metric.get(key, "best") not in allowed:
            yield f"metric.{key}", f"unknown value {metric[key]!r}; {near(metric[key], allowed)}"


def _parameters(config: Mapping[str, Any]) -> Iterator[Fault]:
    parameters = config.get("parameters")
    if not isinstance(parameters, Mapping) or not parameters:
        yield "parameters", "missing or empty; write parameters: {method.alpha: {values: [1, 10]}}"
        return
    yield from _names(parameters, "")
    for path, spec in leaves(parameters):
        where = "parameters." + ".".join(path)
        faults = _shape(spec)
        yield from ((where, fault) for fault in faults)


def _names(parameters: Mapping[str, Any], above: str) -> Iterator[Fault]:
    for name, spec in parameters.items():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            right = str(name).lstrip("-").split("=")[0]
            yield f"parameters.{above}{name}", f"no name of a parameter; write the option without hyphens, {right}"
        if isinstance(spec, Mapping) and "parameters" in spec:
            extra = [str(key) for key in spec if key != "parameters"]
            if not isinstance(spec["parameters"], Mapping) or not spec["parameters"]:
                yield f"parameters.{above}{name}", "parameters: holds nothing; give it at least one parameter"
            elif extra:
                yield f"parameters.{above}{name}", f"{extra[0]} beside parameters; a nested block has them alone"
            else:
                yield from _names(spec["parameters"], f"{above}{name}.")


def _shape(spec: Any) -> list[str]:
    """What is wrong with one parameter; the first fault hides the others."""
    if not isinstance(spec, Mapping):
        return [f"{spec!r} is no mapping; write {{{'values' if isinstance(spec, list) else 'value'}: {spec}}}"]
    named = spec.get("distribution")
    if named is not None and named not in DISTRIBUTIONS:
        return [f"unknown distribution {named!r}; {near(named, tuple(DISTRIBUTIONS))}"]
    everything = ("distribution", *dict.fromkeys(key for keys in DISTRIBUTIONS.values() for key in keys))
    unknown = [key for key in spec if key not in everything]
    if unknown:
        return [f"unknown key {unknown[0]}; {near(unknown[0], everything)}"]
    if named is None and not any(key in spec for key in ("value", "values", "min", "max")):
        return ["nothing to draw from; write value: 1, values: [1, 2], or min: and max:"]
    if named is None and ("min" in spec) != ("max" in spec) and "values" not in spec and "value" not in spec:
        return [f"{'max' if 'min' in spec else 'min'} is missing; a range has both ends, min: 1, max: 10"]
    kind = distribution(spec)
    extra = [key for key in spec if key not in (*DISTRIBUTIONS[kind], "distribution")]
    if extra:
        hint = "write distribution: q_uniform" if extra == ["q"] else "leave it out, or name the distribution it is for"
        return [f"{extra[0]} is no key of the distribution {kind}; {hint}"]
    missing = [key for key in DISTRIBUTIONS[kind] if key in NEEDED and key not in spec]
    if missing:
        return [f"{missing[0]} is missing; the distribution {kind} has {', '.join(DISTRIBUTIONS[kind])}"]
    return _values(spec, kind) if "values" in spec else _range(spec, kind)


def _values(spec: Mapping[str, Any], kind: str) -> list[str]:
    values, shares = spec["values"], spec.get("probabilities")
    if not isinstance(values, list) or not values:
        return [f"values is {values!r}; give a list with at least one value, values: [1, 10]"]
    # "16" may well be meant as text, but nobody writes 1e-3 for text
    texts = [v for v in values if isinstance(v, str) and TEXT_NUMBER.fullmatch(v) and "e" in v.lower()]
    if texts:
        return [f"{texts[0]!r} is text, which W&B hands on as text; write {_as_float(texts[0])}"]
    if shares is not None:
        if not isinstance(shares, list) or len(shares) != len(values) or not all(map(_number, shares)):
            return [f"probabilities is {shares!r}; give one number for each of the {len(values)} values"]
        if min(shares) < 0 or not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
            return [f"the probabilities add up to {sum(shares):g}; they have to be 0 or more and add up to 1"]
    return []


def _range(spec: Mapping[str, Any], kind: str) -> list[str]:
    for key in (*Q, *NORMAL, *BETA):
        value = spec.get(key, 1)
        if isinstance(value, str) and TEXT_NUMBER.fullmatch(value):
            return [f"{key} is the text {value!r}; in a sweep file a number needs its point: write {_as_float(value)}"]
        if not _number(value):
            return [f"{key} is {value!r}, no number; write {key}: 1"]
    if spec.get("q", 1) <= 0 or spec.get("sigma", 1) < 0 or min(spec.get("a", 1), spec.get("b", 1)) < 0:
        return ["q has to be above 0; sigma, a and b must not be below it"]
    if "min" not in spec:
        return []
    low, high = spec["min"], spec["max"]
    if low >= high:
        return [f"min {low:g} is not below max {high:g}; exchange them, or write value: {low:g}"]
    if kind == "int_uniform" and not (isinstance(low, int) and isinstance(high, int)):
        return [f"int_uniform from {low:g} to {high:g}; give it whole numbers, or write distribution: uniform"]
    if kind in EXPONENTS and low > 0:
        most = math.exp(min(high, 700))
        return [f"{kind} takes exponents: from e^{low:g} = {math.exp(min(low, 700)):.3g} to e^{high:g} = {most:.3g}; "
                f"for values from {low:g} to {high:g} write distribution: {EXPONENTS[kind]}"]  # fmt: skip
    if kind in EXPONENTS.values() and low <= 0:
        return [f"{kind} takes values, and min {low:g} has no logarithm; write a min above 0, such as 1.0e-5"]
    return []


def _as_float(text: str) -> str:
    """A number as YAML 1.1 takes it for one."""
    mantissa, _, exponent = text.lower().partition("e")
    if not exponent:
        return text
    mantissa = mantissa if "." in mantissa else f"{mantissa}.0"
    return f"{mantissa}e{exponent if exponent[0] in '+-' else '+' + exponent}"


def _search(config: Mapping[str, Any]) -> Iterator[Fault]:
    """What a method cannot draw from."""
    method, parameters = config.get("method"), config.get("parameters")
    if not isinstance(parameters, Mapping):
        return
    sound = [(path, spec) for path, spec in leaves(parameters) if not _shape(spec)]
    kinds = {"parameters." + ".".join(path): distribution(spec) for path, spec in sound}
    for where, kind in kinds.items():
        if method == "grid" and kind not in ("constant", "categorical", "int_uniform", "q_uniform"):
            yield where, f"a grid has no {kind}; list the values, values: [1, 10], or use method: random"
        if method == "bayes" and kind == "categorical_w_probabilities":
            yield where, "a Bayesian search takes no probabilities; leave them out, or use method: random"
    searched = [kind for kind in kinds.values() if kind != "constant"]
    if method == "bayes" and searched and all(kind == "categorical" for kind in searched):
        yield "method", ("bayes over lists of values alone, which have no distances; use method: grid or random, or "
                         "give a parameter min: and max:")  # fmt: skip
    if method == "bayes" and kinds and not searched:
        yield "parameters", "nothing to search: every parameter is a constant; give one min: and max:"


def _early_terminate(config: Mapping[str, Any]) -> Iterator[Fault]:
    if "early_terminate" not in config:
        return
    stop = config["early_terminate"]
    example = "write early_terminate: {type: hyperband, min_iter: 3}"
    if not isinstance(stop, Mapping) or "type" not in stop:
        yield "early_terminate", f"no type; {example}"
        return
    if stop["type"] != "hyperband":
        yield "early_terminate.type", f"unknown type {stop['type']!r}; {example}"
    for key in stop:
        if key not in STOPPING:
            yield f"early_terminate.{key}", f"unknown key; {near(key, STOPPING)}"
    if "min_iter" not in stop and "max_iter" not in stop:
        yield "early_terminate", "neither min_iter nor max_iter; write min_iter: 3, or max_iter: 27 and s: 2"
    elif "min_iter" not in stop and "s" not in stop:
        yield "early_terminate", "max_iter needs s, the number of cuts before it; write max_iter: 27, s: 2"
    for key, least in (("min_iter", 1), ("max_iter", 1), ("s", 1), ("eta", 1)):
        value = stop.get(key, least + 1)
        whole = key == "eta" or isinstance(value, int)
        if not _number(value) or not whole or value < least or (key == "eta" and value == 1):
            yield f"early_terminate.{key}", f"{value!r} is out of range; write {key}: {3 if key != 's' else 2}"


def _command(config: Mapping[str, Any]) -> Iterator[Fault]:
    command = config.get("command", list(DEFAULT))
    if not isinstance(command, list) or not command:
        yield "command", ('no list of words; write command: ["${env}", vislearn, unlearn, -c, recipe.yaml, -c, '
                          '"${args_json_file}"]')  # fmt: skip
        return
    names = [macro(item) for item in command]
    if "command" not in config and not config.get("program"):
        yield "command", "missing, and so is program; name the command, or program: train.py"
        return
    if "program" in names and not config.get("program"):
        yield "program", "the command has ${program}, which is empty; write program: train.py"
    elif {"program", "interpreter"} <= {*names} and not Path(str(config["program"])).is_file():
        right = 'or write command: ["${env}", vislearn, unlearn, -c, recipe.yaml, -c, "${args_json_file}"]'
        yield "program", f"${{interpreter}} is Python, and there is no file {config['program']}; name a script, {right}"
    for item, name in zip(command, names, strict=True):
        yield from _item(str(item), name)
    own = own_verb(expand([item for item in command if macro(item) not in ARGUMENTS], config.get("program"), {}, ""))
    given = [(at, name) for at, name in enumerate(names) if name in ARGUMENTS]
    if not given and not any("${args" in str(item) for item in command):
        right = '-c, "${args_json_file}"' if own is not None else '"${args}"'
        yield "command", f"no ${{args...}} macro, so that no parameter reaches the program; end it with {right}"
    parameters = config["parameters"] if isinstance(config.get("parameters"), Mapping) else {}
    nulls = [".".join(path) for path, spec in leaves(parameters) if _holds_null(spec)]
    blocks = [name for name, spec in parameters.items() if isinstance(spec, Mapping) and "parameters" in spec]
    for at, name in given:
        text = f"${{{name}}}"
        if name == "args_json_file" and own is not None and str(command[at - 1]) not in ("-c", "--config"):
            yield "command", f'{text} is the name of a file; put -c before it: -c, "{text}"'
        if own is not None and name not in ("args", "args_json_file"):
            yield "command", f'{text} is not what vislearn reads; write -c, "${{args_json_file}}"'
        if name not in ("args_json_file", "args_json") and (nulls or blocks) and name != "args_no_hyphens":
            why = f"{nulls[0]} can be null, and {text} writes it as the word None" if nulls else (
                f"{blocks[0]} is a nested block, and {text} writes it as one word")  # fmt: skip
            yield "command", f'{why}; write -c, "${{args_json_file}}"'
        if own is not None and own[:1] and own[0] in command:
            yield from _order([str(item) for item in command], at, text, command.index(own[0]))
    verb = None if own is None else " ".join(own[:1])
    if verb is not None and verb not in VERBS:
        yield "command", f"vislearn {verb or 'without a verb'} logs no numbers; {near(verb, VERBS)}"


def _item(item: str, name: str | None) -> Iterator[Fault]:
    if name is not None and not ENVIRONMENT.fullmatch(item) and name not in MACROS:
        yield "command", f"unknown macro {item}, which W&B drops; {near(name, MACROS)}"
    for variable in ENVIRONMENT.findall(item):
        if variable not in os.environ:
            yield "command", f"{item}: the variable {variable} is not set, and W&B puts its name there; set it first"
    if item.startswith("-") and re.search(r"\s-", item):
        yield "command", f"{item}: options in one item arrive as one; write an item each"
    inside = re.findall(r"\$\{(?!envvar:)[^}]*\}", item)
    if name is None and inside:
        rest = item.replace(inside[0], "").rstrip("= ")
        right = f'{rest}, "{inside[0]}"'
        yield "command", f"{item}: a macro inside a longer item is not expanded; write two items: {right}"


def _order(command: list[str], at: int, text: str, verb: int) -> Iterator[Fault]:
    """What comes on the wrong side of the parameters."""
    if at < verb:
        yield "command", f"{text} stands before {command[verb]}; put it behind the verb, at the end"
        return
    for item, value in pairwise([*command[at + 1 :], ""]):
        flag = item.partition("=")[0]
        if flag in ("-c", "--config"):
            file = item.partition("=")[2] or value
            yield "command", f"{file} comes after {text} and wins over the parameters; put {text} at the end"
        elif flag.lstrip("-") in CLASS_FLAGS:
            why = "and a class has to be chosen before its arguments"
            yield "command", f"{item} comes after {text}, {why}; put {text} at the end"


def _classes(config: Mapping[str, Any]) -> Iterator[Fault]:
    """Swept choices of a class beside its arguments: another class gets them, or refuses them."""
    parameters = config.get("parameters")
    if not isinstance(parameters, Mapping):
        return
    names = {".".join(path): spec for path, spec in leaves(parameters)}
    for flag in CLASS_FLAGS:
        chosen = next((name for name in (flag, f"{flag}.class_path") if name in names), None)
        others = [name for name in names if name.startswith(f"{flag}.") and name not in (chosen, *CLASS_FLAGS)]
        if chosen is not None and others:
            yield (
                f"parameters.{chosen}",
                (
                    f"a swept class beside its argument {others[0]}, which other classes lack or mean otherwise; "
                    f"write --{flag}=CLASS in the command, and one sweep a class"
                ),
            )


def _holds_null(spec: Any) -> bool:
    """Whether a parameter can be null, at any depth of its values."""
    if isinstance(spec, Mapping):
        return any(_holds_null(spec[key]) for key in spec if key not in ("distribution",))
    return spec is None or (isinstance(spec, list) and any(map(_holds_null, spec)))


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
