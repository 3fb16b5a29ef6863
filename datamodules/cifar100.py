"""CIFAR-100 (Krizhevsky, 2009), with its 100 fine or its 20 coarse classes."""

from pathlib import Path
from typing import Any

import torch

from vislearn.data import Labels

from .cifar10 import CIFAR10

# the 20 coarse classes and the 5 fine ones within each, from the data set's page
COARSE = {
    "aquatic_mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food_containers": "bottle bowl can cup plate",
    "fruit_and_vegetables": "apple mushroom orange pear sweet_pepper",
    "household_electrical_devices": "clock keyboard lamp telephone television",
    "household_furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large_carnivores": "bear leopard lion tiger wolf",
    "large_man-made_outdoor_things": "bridge castle house road skyscraper",
    "large_natural_outdoor_scenes": "cloud forest mountain plain sea",
    "large_omnivores_and_herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium_mammals": "fox porcupine possum raccoon skunk",
    "non-insect_invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small_mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles_1": "bicycle bus motorcycle pickup_truck train",
    "vehicles_2": "lawn_mower rocket streetcar tank tractor",
}
FINE = tuple(sorted(name for names in COARSE.values() for name in names.split()))
COARSE_OF_FINE = torch.tensor([next(i for i, c in enumerate(COARSE.values()) if fine in c.split()) for fine in FINE])


class CIFAR100(CIFAR10):
    """60,000 colour images, 32x32 pixels, 100 fine classes in 20 coarse ones; 50,000 for training.

    The forms on disk are those of CIFAR10, named `cifar-100-python`, `cifar100/` and `cifar100.tar.gz`. Both labellings
    are attributes, "fine" and "coarse", for GroupForget and SubclassForget.

    Args:
        root: folder with the data, or the .tar.gz file itself; the folder that the environment variable VISLEARN_DATA
            names is searched next.
        coarse: learn the 20 coarse classes, in which a fine class is a subclass; this setting is called CIFAR-20.
        download: fetch the data into `root` with torchvision (170 MB) when they are not there.
        **kwargs: see :class:`ForgetDataModule`.
    """

    num_classes, classes = 100, FINE
    mean, std = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)  # over the pixels of the 50,000 training images
    stem, official = "cifar100", "cifar-100-python"

    def __init__(self, root: Path = Path("data"), coarse: bool = False, download: bool = False, **kwargs: Any) -> None:
        super().__init__(root=root, download=download, **kwargs)
        self.coarse = coarse
        if coarse:
            self.name, self.num_classes, self.classes = "CIFAR20", len(COARSE), tuple(COARSE)

    def labels(self, train: bool) -> Labels:
        fine = self._read()[0][f"{'train' if train else 'test'}_targets"]
        coarse = COARSE_OF_FINE[fine]
        attributes = {"fine": (fine, FINE), "coarse": (coarse, tuple(COARSE))}
        return Labels(coarse if self.coarse else fine, self.classes, attributes)

    def _file_classes(self) -> tuple[str, ...]:
        return FINE
