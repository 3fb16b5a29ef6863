"""Images of your own in class folders, with a column of their table as the shortcut."""

from typing import Any

from vislearn.errors import UserError
from vislearn.metrics.bias import agreeing, majority_values

from .biased import ALIGNED, ALIGNMENT, BIAS, Shortcut
from .image_folder import TABLE, ImageFolder


class BiasedImageFolder(Shortcut, ImageFolder):
    """Images of your own, where one attribute of attributes.csv is a shortcut to the class.

    The attribute is there under the name "bias" too. A row is aligned, as the attribute "aligned" says, when it has the
    value that most training images of its class have.

    Args:
        bias_attribute: the column of attributes.csv that is the shortcut, for example background.
        **kwargs: see :class:`ImageFolder`.
    """

    def __init__(self, bias_attribute: str = BIAS, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        columns = list(self._attributes[True])
        if bias_attribute not in columns:
            has = f"has the columns {', '.join(columns)}" if columns else "is not there"
            raise UserError(f"there is no attribute {bias_attribute!r}: {self.root / TABLE} {has}; name the one that "
                            "is the shortcut with --data.bias_attribute")  # fmt: skip
        taken = next((name for name in (ALIGNED, BIAS) if name in columns and name != bias_attribute), None)
        if taken:
            raise UserError(f"{self.root / TABLE} has a column {taken!r}, the name under which the bench keeps what it "
                            f"finds about {bias_attribute!r}; rename the column")  # fmt: skip
        names = self._attributes[True][bias_attribute][1]
        if len(names) < 2:
            raise UserError(f"the attribute {bias_attribute!r} has the one value {names[0]!r} on all images; a "
                            "shortcut needs two (--data.bias_attribute)")  # fmt: skip
        attribute = self._attributes[True][bias_attribute][0]
        usual = majority_values(self._targets[True], attribute, self.num_classes, len(names))
        for train in (True, False):
            values = self._attributes[train][bias_attribute][0]
            found = agreeing(self._targets[train], values, usual)
            self._attributes[train] |= {BIAS: (values, names), ALIGNED: (found, ALIGNMENT)}
