"""Small images of several classes, written the way users keep them."""

import io
import tarfile

import numpy as np
from PIL import Image as PILImage

COLORS = [(200, 40, 40), (40, 200, 40), (40, 40, 200), (180, 180, 40)]


def photo(label, number, size=(40, 36)):
    """A noisy RGB image in the color of its class; no two are equal."""
    generator = np.random.default_rng([label, number])
    noise = generator.normal(0, 25, (size[1], size[0], 3))
    pixels = np.clip(np.array(COLORS[label % 4]) + noise, 0, 255)
    return PILImage.fromarray(pixels.astype(np.uint8))


def encoded(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def class_folders(path, classes=("cat", "dog"), count=6, first=0, end="png"):
    """A folder with one folder a class, of ``count`` images each."""
    for label, name in enumerate(classes):
        (path / name).mkdir(parents=True, exist_ok=True)
        for number in range(first, first + count):
            photo(label, number).save(path / name / f"{chr(97 + label)}_{number:03d}.{end}")
    return path


def write_folder(path, files):
    """A folder of files, by their paths below it."""
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def write_tar(path, members, mode="w"):
    """A tar archive of named contents."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path
