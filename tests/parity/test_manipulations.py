"""Manipulations of the corrective benchmark and its metrics, against the authors' own code."""

import numpy as np
import torch
from torch import Tensor

from vislearn.data import ForgetDataModule, Labels, Memory
from vislearn.forget import Forget
from vislearn.manipulation import Backdoor, ClassConfusion, IdentifiedForget, LabelNoise, Manipulation
from vislearn.metrics.accuracy import accuracy
from vislearn.metrics.corrective import attack_success, named

from .harness import Case, of_kind


class Stored(ForgetDataModule):
    """The case's rows, which are normalised already: a mean of 0 and a standard deviation of 1 leave them alone."""

    channels, mean, std = 3, (0.0,), (1.0,)

    def __init__(self, case: Case, manipulation: Manipulation, forget: Forget) -> None:
        super().__init__(val_fraction=0.0, manipulation=manipulation, forget=forget)
        self.x, self.y = case["x"], case["y"]
        self.num_classes = case.meta["hyperparameters"]["classes"]
        self.classes = tuple(map(str, range(self.num_classes)))
        self.image_size = self.x.shape[-1]

    def source(self, train: bool) -> Memory:
        return Memory(self.x)

    def labels(self, train: bool) -> Labels:
        return Labels(self.y, self.classes)

    def _largest(self) -> float:
        return float(self.x.max())  # the base reads pixels in [0, 255]


def rows(data: ForgetDataModule, name: str | Tensor) -> tuple[Tensor, Tensor]:
    """All rows of a set as a model gets them."""
    each = list(data.loader(name, train=False))
    return torch.cat([x for x, _ in each]), torch.cat([y for _, y in each])


@of_kind("manipulations")
def test_rows_labels_images_and_identified_rows_are_those_of_the_benchmark(case: Case) -> None:
    given = case.meta["hyperparameters"]
    size, seed = given["manipulated"], given["numpy_seed_set_before_each_method"]
    known = IdentifiedForget(given["identified"] / size, seed=seed, draws="official")
    kinds: dict[str, Manipulation] = {
        "poisoning": Backdoor(count=size, size=given["patch_size"], seed=seed, draws="official"),
        "interclasslabelswap": ClassConfusion([3, 5], size, seed=seed),
        "randomlabelswap": LabelNoise(count=size, kind="permute", seed=seed, draws="official"),
    }
    for name, manipulation in kinds.items():
        data = Stored(case, manipulation, known)
        data.setup()
        made = data.observed(train=True).manipulated
        assert made is not None
        case.close("all", made.rows, case[f"{name}/manip_keys"], name)
        case.close("all", made.targets, case[f"{name}/manip_labels"], name)
        case.close("all", data.ids("forget"), case[f"{name}/deletion_idx"].sort().values, name)
        case.close("all", data.ids("retain"), case[f"{name}/retain_idx"].sort().values, name)
        x, y = rows(data, "train")
        case.close("all", y, case[f"{name}/train_labels_seen"], name)
        changed = int((y != case["y"]).sum())
        assert changed == case.meta["expected"][name]["label_changes"]
        if manipulation.stamps:
            case.close("all", x, case[f"{name}/train_images_seen"], name)
            x, y = rows(data, "triggered")
            case.close("all", x, case[f"{name}/adv_images"], name)
            case.close("all", y, case[f"{name}/adv_labels"], name)
        else:
            case.close("all", x, case["x"], name)


@of_kind("metrics", topic="corrective")
def test_corrected_and_retained_accuracy_and_attack_success(case: Case) -> None:
    intended, given = case.meta["expected"]["intended"], case.meta["hyperparameters"]
    truth, test = case["test_labels"], case["test_logits"].float()
    confused = torch.isin(truth, torch.tensor(given["confused_classes"]))
    swapped = intended["interclass"]
    case.close("all", accuracy(test[confused], truth[confused]), swapped["acc_corr"])
    case.close("all", accuracy(test[~confused], truth[~confused]), swapped["acc_retain"])
    train, labels, deleted = case["train_logits"].float(), case["train_labels"], case["deletion_idx"]
    manipulated = case["manip_idx"]
    case.close("all", named(train[manipulated], labels[manipulated]), swapped["manip_train_acc"])
    case.close("all", named(train[deleted], labels[deleted]), swapped["deletion_acc_true_label"])
    a, b = given["confused_classes"]
    wrong = torch.where(labels[deleted] == a, b, a)
    case.close("all", named(train[deleted], wrong), swapped["deletion_acc_wrong_label"])
    poisoned, stamped = intended["poisoning"], case["adv_test_logits"].float()
    case.close("all", accuracy(stamped, truth), poisoned["acc_corr"])
    case.close("all", accuracy(test, truth), poisoned["acc_retain"])
    success = attack_success(stamped, truth, given["poison_target"])
    case.close("all", success, poisoned["attack_success_excluding_target_class"])
    others = np.asarray(truth != given["poison_target"])
    assert success == np.mean(np.asarray(stamped.argmax(1))[others] == given["poison_target"])
