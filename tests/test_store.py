"""The store: keys, artifacts, and the faults that happen to folders."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from toy_store import FORGET, SSD, config, keep, one_line, python

from vislearn.errors import UserError
from vislearn.recipe import as_yaml, differences, load_yaml
from vislearn.store import Store, key, recipe

# recipes and keys


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (config(model={"lr": 1}), config(model={"lr": 1.0})),
        (config(model={"lr": 0.5}), config(model={"lr": np.float32(0.5)})),
        (config(seed=3), config(seed=np.int64(3))),
        (config(model={"x": -0.0}), config(model={"x": 0})),
        (config(model={"milestones": (1, 2)}), config(model={"milestones": [1, 2]})),
        (config(model={"milestones": [1, 2]}), config(model={"milestones": np.array([1, 2])})),
        (config(model={"names": {"b", "a"}}), config(model={"names": ["a", "b"]})),
        (config(model={"flag": np.bool_(True)}), config(model={"flag": True})),
        (config(model={"_class_path": "x"}), config()),
        (config(root="here", num_workers=4, download=True), config(root=Path("nowhere"), num_workers=0)),
        (config(trainer={"accelerator": "gpu", "devices": 2, "logger": True}), config()),
        (config(trainer={"precision": None}), config(trainer={"precision": "32-true"})),
        (config(trainer={"precision": 16}), config(trainer={"precision": "16-mixed"})),
        (config(trainer={"limit_train_batches": 1.0}), config(trainer={"limit_train_batches": None})),
        (config(trainer={"max_steps": -1, "accumulate_grad_batches": 1}), config()),
        (config(method={"class_path": "m.U"}), config(method={"class_path": "m.U", "init_args": {}})),
        ({**config(), "unlearn_seed": 7}, config()),
    ],
)
def test_same_weights_one_key(one, other):
    assert key(recipe(one)) == key(recipe(other))


@pytest.mark.parametrize(
    "changed",
    [
        config(seed=1),
        config(model={"lr": 0.2}),
        config(model={"flag": True}),
        config(batch_size=64),
        config(forget=FORGET),
        config(method=SSD),
        config(trainer={"max_epochs": 4}),
        config(trainer={"precision": "bf16-mixed"}),
        config(trainer={"gradient_clip_val": 1.0}),
        config(trainer={"limit_train_batches": 1}),
        config(trainer={"fast_dev_run": True}),
        config(trainer={"overfit_batches": 2}),
    ],
)
def test_other_weights_another_key(changed):
    assert key(recipe(changed)) != key(recipe(config()))


def test_true_is_not_one_and_one_batch_is_not_all():
    assert key(recipe(config(model={"x": True}))) != key(recipe(config(model={"x": 1})))
    one, everything = (recipe(config(trainer={"limit_train_batches": n}))["trainer"] for n in (1, 1.0))
    assert one["limit_train_batches"] == 1
    assert everything["limit_train_batches"] == "all"


def test_three_models_three_keys():
    full = config(forget=FORGET, method=SSD)
    unlearned, retrained, original = (key(recipe(full, *w)) for w in ((), ("method",), ("method", "forget")))
    assert len({unlearned, retrained, original}) == 3
    assert retrained == key(recipe(config(forget=FORGET)))
    assert original == key(recipe(config()))
    assert key(recipe({**full, "unlearn_seed": 1})) != unlearned
    assert all(len(k) == 12 and set(k) <= set("0123456789abcdef") for k in (unlearned, retrained, original))
    with pytest.raises(ValueError, match="without"):
        recipe(full, "metod")


def test_the_key_is_pinned():
    """A change of the key's definition orphans every stored model: it has to be meant."""
    assert key(recipe(config(forget=FORGET, method=SSD))) == "ad98117b6540"


def test_recipe_is_idempotent_and_survives_json(tmp_path):
    (tmp_path / "rows.txt").write_text("1\n2\n")
    rule = {"class_path": "vislearn.forget.IndexForget", "init_args": {"path": str(tmp_path / "rows.txt")}}
    made = recipe(config(forget=rule, method=SSD, trainer={"limit_train_batches": 0.5}))
    assert recipe(made) == made
    assert key(json.loads(json.dumps(made))) == key(made)


def test_a_file_counts_by_its_contents(tmp_path):
    def at(path):
        return key(recipe(config(forget={"class_path": "IndexForget", "init_args": {"path": path}})))

    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    a.write_text("1\n2\n")
    b.write_text("1\n2\n")
    before = at(str(a))
    assert at(str(b)) == at(b) == before
    b.write_text("1\n2\n3\n")
    assert at(str(b)) != before
    with pytest.raises(UserError, match=r"none\.txt \(data\.forget\.path\)") as error:
        at(str(tmp_path / "none.txt"))
    assert one_line(error)


def test_a_value_without_a_plain_form_is_named():
    with pytest.raises(TypeError, match=r"model\.init_args\.loss is a object"):
        recipe(config(model={"loss": object()}))


def test_yaml_reads_a_float_without_a_dot_and_leaves_a_date_as_it_is(tmp_path):
    text = "model: {lr: 1e-05, x: 3, y: 1.5, z: .5e3, name: 1e, none: null, day: 2016-12-01}\n"
    (tmp_path / "c.yaml").write_text(text)
    assert load_yaml(tmp_path / "c.yaml")["model"] == {
        "lr": 1e-05, "x": 3, "y": 1.5, "z": 500.0, "name": "1e", "none": None, "day": "2016-12-01",
    }  # fmt: skip
    (tmp_path / "bad.yaml").write_text("a: !!python/object/apply:os.system [echo]\n")
    with pytest.raises(UserError, match="not valid YAML"):
        load_yaml(tmp_path / "bad.yaml")


@pytest.mark.parametrize("text", ["8e6db776d05c", "123456e78901", "1e5", "123456789012", "2021-01-01", "null", "1_000"])
def test_a_text_that_looks_like_a_number_stays_a_text(text, tmp_path):
    """Keys of artifacts are twelve hex digits, and e is one."""
    content = {"unlearned": text, "models": [text], "lr": 1e-5, "n": 3, text: True}
    (tmp_path / "c.yaml").write_text(as_yaml(content))
    assert load_yaml(tmp_path / "c.yaml") == content
    assert yaml.safe_load((tmp_path / "c.yaml").read_text()) == content, "whoever reads it"
    if text.startswith("8"):  # as a user writes it, without quotes
        (tmp_path / "d.yaml").write_text(f"unlearned: {text}\nlr: 1e-5\n")
        assert load_yaml(tmp_path / "d.yaml") == {"unlearned": text, "lr": 1e-5}


def test_differences_are_named_as_flags():
    a, b = recipe(config(forget=FORGET, method=SSD)), recipe(config(seed=1, model={"lr": 0.2}))
    assert differences(a, b) == [
        ("data.forget", "vislearn.forget.ClassForget", "(not set)"),
        ("data.forget.classes", [3], "(not set)"),
        ("method", "vislearn.methods.SSD", "(not set)"),
        ("method.alpha", 10, "(not set)"),
        ("model.lr", 0.1, 0.2),
        ("seed_everything", 0, 1),
        ("unlearn_seed", 0, "(not set)"),
    ]
    assert differences({"x": True}, {"x": 1}) == [("x", True, 1)]


# artifacts


def test_an_artifact_appears_whole(tmp_path):
    store, name = Store(tmp_path / "s"), "0" * 12
    assert store.keys() == []
    with store.writing(name) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a.bin").write_bytes(b"abc")
        assert store.keys() == []
        assert name not in store
    assert store.keys() == [name]
    artifact = store[name]
    assert artifact.done
    assert artifact.size == 3
    assert list(artifact.manifest) == ["sub/a.bin"]
    assert artifact.faults() == []
    assert [p.name for p in store.root.iterdir()] == [name]


def test_views_of_an_artifact(tmp_path):
    store = Store(tmp_path)
    artifact = store[keep(store, config(forget=FORGET))]
    assert artifact.config == config(forget=FORGET)
    assert key(recipe(artifact.config)) == artifact.key
    assert artifact.recipe == recipe(artifact.config)
    assert artifact.split["sets"]["train"]["ids"] == [0, 1]
    assert artifact.meta["seconds"] == 1.5
    assert artifact.report is None
    assert artifact.weights.stat().st_size == 1000
    (artifact.path / "meta.json").write_text("{")
    with pytest.raises(UserError, match=r"meta\.json is not valid JSON") as error:
        _ = artifact.meta
    assert one_line(error)
    (artifact.path / "split.json").unlink()
    with pytest.raises(UserError, match=r"has no split\.json"):
        _ = artifact.split


def test_an_exception_leaves_nothing(tmp_path):
    store, name = Store(tmp_path), "1" * 12

    def broken():
        with store.writing(name) as folder:
            (folder / "a").write_bytes(bytes(10))
            raise RuntimeError("the training broke")

    with pytest.raises(RuntimeError, match="broke"):
        broken()
    assert list(tmp_path.iterdir()) == []


def test_a_done_artifact_stays_unless_it_is_to_be_replaced(tmp_path):
    store, name = Store(tmp_path), "2" * 12
    for content, replace in ((b"first", False), (b"second", False), (b"third", True)):
        with store.writing(name, replace=replace) as folder:
            (folder / "a").write_bytes(content)
        assert (store[name].path / "a").read_bytes() == (b"third" if replace else b"first")
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_folder_without_a_manifest_is_no_artifact_and_gives_way(tmp_path):
    store, name = Store(tmp_path), "3" * 12
    (tmp_path / name).mkdir()
    (tmp_path / name / "model.safetensors").write_bytes(b"half")
    assert store.keys() == []
    with pytest.raises(UserError, match="no artifact 333333333333"):
        store[name]
    with store.writing(name) as folder:
        (folder / "a").write_bytes(b"whole")
    assert sorted(p.name for p in store[name].path.iterdir()) == ["a", "manifest.json"]
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_success_removes_the_partial_training(tmp_path):
    store, name = Store(tmp_path), "4" * 12
    store.partial(name).mkdir(parents=True)
    (store.partial(name) / "last.ckpt").write_bytes(b"x")
    with store.writing(name) as folder:
        (folder / "a").write_bytes(b"a")
    assert not store.partial(name).exists()


@pytest.mark.parametrize("name", ["../../etc", "", "ABCDEF012345", "0" * 11])
def test_what_is_no_key_is_never_a_path(tmp_path, name):
    store = Store(tmp_path)
    assert name not in store
    with pytest.raises(ValueError, match="twelve hex digits"):
        store.partial(name)


def test_find_by_the_first_digits(tmp_path):
    store = Store(tmp_path)
    for name in ("ab0000000000", "ab1111111111", "cd0000000000"):
        with store.writing(name) as folder:
            (folder / "a").write_bytes(b"a")
    assert store.find("c").key == "cd0000000000"
    assert store.find(str(tmp_path / "ab0000000000")).key == "ab0000000000"
    with pytest.raises(UserError, match="2 keys: ab0000000000, ab1111111111") as error:
        store.find("ab")
    assert one_line(error)
    for unknown in ("ff", ""):
        with pytest.raises(UserError, match=r"no artifact .* vislearn store ls"):
            store.find(unknown)


def test_retrained_models_are_those_of_other_seeds(tmp_path):
    store = Store(tmp_path)
    for seed in (10, 0, 2):
        keep(store, config(seed=seed, forget=FORGET))
        keep(store, config(seed=seed))
        keep(store, config(seed=seed, forget=FORGET, method=SSD))
    keep(store, config(seed=5, forget=FORGET, model={"lr": 0.2}))
    found = store.retrained(recipe(config(forget=FORGET), "method"))
    assert [a.recipe["seed_everything"] for a in found] == [2, 10]
    assert all("method" not in a.recipe and a.recipe["data"]["init_args"]["forget"] == FORGET for a in found)
    assert store.retrained(recipe(config(forget=FORGET, method=SSD))) == found


def test_verify_sees_a_flipped_byte(tmp_path):
    store = Store(tmp_path)
    artifact = store[keep(store, config())]
    content = bytearray(artifact.weights.read_bytes())
    content[500] ^= 1
    artifact.weights.write_bytes(content)
    assert artifact.faults() == ["model.safetensors has other contents than were stored"]
    artifact.weights.write_bytes(bytes(7))
    assert artifact.faults() == ["model.safetensors has 7 bytes instead of 1000"]
    artifact.weights.unlink()
    (artifact.path / "extra").write_bytes(b"")
    assert artifact.faults() == ["model.safetensors is missing", "extra is not in the manifest"]
    (artifact.path / "manifest.json").write_text("[]")
    assert artifact.faults() == ["manifest.json cannot be read"]


def test_the_cache_is_atomic_and_no_part_of_the_artifact(tmp_path):
    store = Store(tmp_path)
    name = keep(store, config())
    store.put_cache(name, "importance.safetensors", lambda path: path.write_bytes(b"first"))
    assert store.cache(name, "importance.safetensors").read_bytes() == b"first"

    def broken(path):
        path.write_bytes(b"half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        store.put_cache(name, "importance.safetensors", broken)
    assert store.cache(name, "importance.safetensors").read_bytes() == b"first"
    assert len(list((store[name].path / "cache").iterdir())) == 1
    assert store[name].faults() == []
    with pytest.raises(ValueError, match="plain file name"):
        store.cache(name, "../x")


# faults


def test_killed_while_writing_then_the_same_again(tmp_path):
    code = """
        import sys
        from vislearn.store import Store
        with Store(sys.argv[1]).lock("a" * 12), Store(sys.argv[1]).writing("a" * 12) as folder:
            (folder / "model.safetensors").write_bytes(bytes(1000))
            print("writing", flush=True)
            sys.stdin.read()
    """
    process = python(code, tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "writing\n"
    store, name = Store(tmp_path), "a" * 12
    assert store.leftovers() == []  # a live process's work is not a leftover
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert store.keys() == []
    assert [item.path.name[:17] for item in store.leftovers() if "half-written" in item.why] == [f".tmp-{name}"]
    with store.lock(name), store.writing(name) as folder:
        (folder / "model.safetensors").write_bytes(bytes(2000))
    assert store.keys() == [name]
    assert list(tmp_path.glob(".tmp-*")) == []
    assert store[name].size == 2000


def test_two_processes_make_one_artifact(tmp_path):
    code = """
        import sys, time
        from vislearn.store import Store
        store, name = Store(sys.argv[1]), "b" * 12
        with store.lock(name):
            if name in store:
                print("found")
            else:
                time.sleep(0.6)
                with store.writing(name) as folder:
                    (folder / "a").write_bytes(b"a")
                print("made")
    """
    both = [python(code, tmp_path, stdout=subprocess.PIPE) for _ in range(2)]
    outputs = [process.communicate(timeout=20) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(out for out, _ in outputs) == ["found\n", "made\n"]
    said = dict(outputs)
    assert said["found\n"].count("another process is making bbbbbbbbbbbb") == 1
    assert said["made\n"] == ""
    assert Store(tmp_path).keys() == ["b" * 12]


def test_two_processes_without_the_lock_leave_one_artifact(tmp_path):
    store, name = Store(tmp_path), "c" * 12
    with store.writing(name) as folder:
        (folder / "a").write_bytes(b"late")
        code = """
            import sys
            from vislearn.store import Store
            with Store(sys.argv[1]).writing("c" * 12) as folder:
                (folder / "a").write_bytes(b"early")
        """
        assert python(code, tmp_path).wait() == 0
    assert (store[name].path / "a").read_bytes() == b"early"
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_the_lock_can_be_taken_twice_by_its_holder(tmp_path):
    store = Store(tmp_path)
    with store.lock("d" * 12), store.lock("d" * 12):
        assert store._held("e" * 12) is False


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def wrapped(path):
    raise RuntimeError("serializing: I/O error: No space left on device (os error 28)")


def really_full(path):
    with open("/dev/full", "wb") as file:
        file.write(bytes(100_000))


@pytest.mark.parametrize("writer", [full_disk, wrapped, really_full])
def test_full_disk_in_the_block(tmp_path, writer):
    store = Store(tmp_path)

    def attempt():
        with store.writing("e" * 12) as folder:
            writer(folder / "a")

    with pytest.raises(UserError, match=r"the disk is full: .* eeeeeeeeeeee was not stored; .*--store=DIR") as error:
        attempt()
    assert one_line(error)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_at_the_end(tmp_path, monkeypatch):
    store = Store(tmp_path)
    monkeypatch.setattr(os, "fsync", full_disk)

    def attempt():
        with store.writing("e" * 12) as folder:
            (folder / "a").write_bytes(b"a")

    with pytest.raises(UserError, match="the disk is full"):
        attempt()
    assert list(tmp_path.iterdir()) == []


def test_full_disk_for_the_cache(tmp_path):
    store = Store(tmp_path)
    name = keep(store, config())
    with pytest.raises(UserError, match="the disk is full"):
        store.put_cache(name, "x", full_disk)
    assert list((store[name].path / "cache").iterdir()) == []


def test_the_store_is_a_file(tmp_path):
    (tmp_path / "s").write_text("not a folder")
    store = Store(tmp_path / "s")
    for context in (store.writing("f" * 12), store.lock("f" * 12)):
        with pytest.raises(UserError, match="the store is not a folder") as error, context:
            pass
        assert one_line(error)
    with pytest.raises(UserError, match="cannot read the store"):
        store.keys()


@pytest.mark.parametrize(("code", "words"), [(errno.EACCES, "no permission"), (errno.EROFS, "read-only")])
def test_the_store_cannot_be_written(tmp_path, monkeypatch, code, words):
    def refuse(path, *_, **__):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(os, "mkdir", refuse)
    store = Store(tmp_path / "s")
    for context in (store.writing("f" * 12), store.lock("f" * 12)):
        with pytest.raises(UserError, match=words) as error, context:
            pass
        assert one_line(error)


def test_a_fault_elsewhere_is_not_blamed_on_the_store(tmp_path):
    def attempt(filename):
        with Store(tmp_path / "s").writing("f" * 12):
            raise PermissionError(errno.EACCES, "Permission denied", filename)

    with pytest.raises(PermissionError):
        attempt(str(tmp_path / "data.bin"))


def test_leftovers_by_age_and_by_life(tmp_path):
    store, host = Store(tmp_path), os.uname().nodename
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = {
        "dead": f".tmp-{'0' * 12}-{host}-{dead.pid}", "live": f".tmp-{'1' * 12}-{host}-{os.getpid()}",
        "far new": f".tmp-{'2' * 12}-else-where-1", "far old": f".tmp-{'3' * 12}-else-where-1",
    }  # fmt: skip
    for name in names.values():
        (tmp_path / name).mkdir()
    store.partial("4" * 12).mkdir(parents=True)
    os.utime(tmp_path / names["far old"], (0, time.time() - 2 * 86400))
    listed = [item.path.name for item in store.leftovers()]
    assert listed == [names["dead"], names["far old"], "4" * 12]
    assert [item.path.name for item in store.leftovers(older_than=1)] == [names["far old"]]
    with store.lock("4" * 12):  # somebody resumes it
        assert "4" * 12 not in [item.path.name for item in store.leftovers()]
