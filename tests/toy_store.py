"""Small artifacts for the tests of the store and of its command."""

import json
import subprocess
import sys
import textwrap

import yaml

from vislearn.store import key, recipe

FORGET = {"class_path": "vislearn.forget.ClassForget", "init_args": {"classes": [3]}}
SSD = {"class_path": "vislearn.methods.SSD", "init_args": {"alpha": 10.0}}


def config(seed=0, forget=None, method=None, model=None, trainer=None, **data):
    """A resolved configuration as the command line hands it over."""
    learner = {"arch": "resnet8", "lr": 0.1} | (model or {})
    return {
        "seed_everything": seed,
        "unlearn_seed": 0,
        "model": {"class_path": "vislearn.learner.Classifier", "init_args": learner},
        "data": {"class_path": "vislearn.datamodules.Digits", "init_args": {"batch_size": 8, "forget": forget, **data}},
        "method": method,
        "trainer": {"max_epochs": 3, "accelerator": "cpu"} | (trainer or {}),
    }


def keep(store, settings):
    """Store a small artifact of a configuration and return its key."""
    made = recipe(settings)
    with store.writing(key(made)) as folder:
        (folder / "recipe.json").write_text(json.dumps(made))
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
        (folder / "split.json").write_text(json.dumps({"sets": {"train": {"ids": [0, 1], "sha256": "ab" * 32}}}))
        (folder / "meta.json").write_text(json.dumps({"kind": "fit", "seconds": 1.5}))
        (folder / "model.safetensors").write_bytes(bytes(1000))
    return key(made)


def one_line(error):
    return "\n" not in str(error.value)


def python(code, *arguments, **kwargs):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], text=True, stderr=subprocess.PIPE, **kwargs
    )
