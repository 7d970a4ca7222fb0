"""Load the datasets that need no download: a sample of Fashion-MNIST, and the digits.

Flow: a name and a split → a HF dataset with the columns ``image`` and ``label``, in memory.
Source: Fashion-MNIST (Xiao, Rasul, Vollgraf, 2017, arXiv:1708.07747): the license is in
``fashion_mnist.LICENSE``; the digits are scikit-learn's.
Differs from the whole Fashion-MNIST: 1,200 training and 3,800 test images, as one parquet file.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Features, Image

FASHION_MNIST = "fashion_mnist"
DIGITS = "digits"

DIGITS_TEST_SHARE = 0.2

# A network of a size for them: timm's name and arguments, as JSON, of a ResNet with 77,158 weights
# for ten classes. It trains in seconds on a CPU, and all its 3×3 kernels see more than one position
# of a 32×32 image. Its narrow stem makes it slow to fit: a warm start harms on few images already.
SMALL_RESNET = (
    "resnet10t",
    '{"layers": [1, 1, 1, 0], "channels": [16, 32, 64, 64], "stem_width": 4, "stem_type": "deep",'
    ' "zero_init_last": false}',
)


def load_fashion_mnist(split: str = "train") -> Dataset:
    """Return a sample of Fashion-MNIST, 28×28 photographs of clothes in ten classes.

    The gray images are stored as PNG and decoded as RGB. Nothing is written to disk.

    Args:
        split: ``"train"`` (1,200 examples) or ``"test"`` (3,800), always the same.

    Raises:
        ValueError: ``split`` has another value.
    """
    _check_split(FASHION_MNIST, split)
    path = Path(__file__).with_name("fashion_mnist.parquet")
    table = pq.read_table(path, filters=[("split", "==", split)]).drop_columns("split")
    features = Features(
        {"image": Image(mode="RGB"), "label": Features.from_arrow_schema(table.schema)["label"]}
    )
    return Dataset(table.replace_schema_metadata(features.arrow_schema.metadata))


def load_digits(split: str = "train") -> Dataset:
    """Return scikit-learn's handwritten digits as 32×32 RGB images.

    Args:
        split: ``"train"`` (1,437 examples) or ``"test"`` (360), stratified, always the same.

    Raises:
        ValueError: ``split`` has another value.
        ImportError: scikit-learn is not installed.
    """
    _check_split(DIGITS, split)
    from PIL import Image as PILImage
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    digits = load()
    rows = train_test_split(
        np.arange(len(digits.target)),
        test_size=DIGITS_TEST_SHARE,
        stratify=digits.target,
        random_state=0,
    )[split == "test"]
    # Gray levels come as 0 … 16 on 8×8 pixels.
    levels = (digits.images[rows] * (255 / 16)).round().astype(np.uint8)
    images = [PILImage.fromarray(gray).resize((32, 32)).convert("RGB") for gray in levels]
    names = [str(digit) for digit in digits.target_names]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    labels = [int(label) for label in digits.target[rows]]
    return Dataset.from_dict({"image": images, "label": labels}, features=features)


def _check_split(name: str, split: str) -> None:
    if split not in ("train", "test"):
        raise ValueError(f"split of {name} must be 'train' or 'test', got {split!r}")


EMBEDDED: dict[str, Callable[[str], Dataset]] = {
    FASHION_MNIST: load_fashion_mnist,
    DIGITS: load_digits,
}
