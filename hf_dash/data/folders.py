"""A folder of images on disk: every file accounted for.

Flow: a folder → all files below it, links followed → images with a class, and the image files that
cannot be read, each with the reason → checked, so that nothing is left out in silence.
Differs from the imagefolder loader of ``datasets``: names of files never make splits, links are
followed, whatever Pillow can open is an image, and what is not loaded is named.
"""

import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import pyarrow.csv
import pyarrow.json
import pyarrow.parquet
from PIL import Image as PILImage
from PIL import UnidentifiedImageError

from hf_dash.data.names import canonical, shown
from hf_dash.utils.checks import refuse_unless
from hf_dash.utils.logging import get_logger

logger = get_logger(__name__, main_process_only=True)

# Largest share of the images that may be missing without allow_missing.
MISSING_SHARE = 0.01

# Image files that Pillow opens with a plug-in only.
PLUGINS = {
    **dict.fromkeys((".heic", ".heif", ".hif"), "pillow-heif"),
    ".avif": "pillow-avif-plugin",
    ".jxl": "pillow-jxl-plugin",
    **dict.fromkeys((".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"), "rawpy"),
}

# Formats that Pillow only recognizes or hands to another program.
NOT_PIXELS = {"HDF5", "BUFR", "GRIB", "MPEG", "EPS", "WMF", "PDF"}

PACKED = (".zip", ".7z", ".rar", ".gz", ".bz2", ".xz", ".tar", ".tgz", ".parquet", ".arrow")

TEMPORARY_SUFFIXES = (".tmp", ".part", ".crdownload")

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")

# Files named in a message.
SHOWN = 5

Kind = Literal["folder", "file", "broken link", "no file", "hidden"]


@dataclass(frozen=True)
class FolderImages:
    """What lies below a folder.

    Args:
        images: paths below the folder, with forward slashes, sorted.
        rows: for each image, its class as ``"label"``, or the columns of a metadata file.
        left_out: image files that are not among them, and why.
        empty: class folders without a readable image.
        hidden: folders and images whose names begin with a dot; they do not count as missing.
    """

    images: tuple[str, ...]
    rows: tuple[Mapping[str, Any], ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    empty: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()

    def check(self, name: str, *, allow_missing: bool) -> None:
        """Say what is left out of the folder ``name``.

        Raises:
            ValueError: that is a whole class, an archive, or more than 1 % of the images, and
                ``allow_missing`` is not set.
        """
        if self.hidden:
            logger.info("%s: hidden, and not read: %s", name, shown(self.hidden))
        if not self.left_out and not self.empty:
            return
        total = len(self.images) + len(self.left_out)
        parts = [f"{path} ({why})" for path, why in list(self.left_out.items())[:SHOWN]]
        parts += ["…"] if len(self.left_out) > SHOWN else []
        parts += [f"class folder {folder} (no readable image)" for folder in self.empty]
        message = (
            f"{name}: {len(self.left_out):,} of {total:,} image files are left out:"
            f" {', '.join(parts)}"
        )
        packed = any(path.lower().endswith(PACKED) for path in self.left_out)
        many = len(self.left_out) > MISSING_SHARE * total
        allowed = allow_missing or not (self.empty or packed or many)
        refuse_unless(allowed, message, "; allow_missing=True continues without them", logger)


def find_images(folder: Path, class_folder: str | None = None) -> FolderImages:
    """Find the images below a folder and their classes.

    Args:
        folder: with one folder a class, or a ``metadata.csv``, ``.jsonl`` or ``.parquet`` that
            describes the images of its folder, one a row, in a column ``file_name``.
        class_folder: ``"first"`` or ``"last"``: which folder names the class of an image that lies
            several folders deep.

    Raises:
        ValueError: no image lies in a class folder, one lies several folders deep and
            ``class_folder`` is None, a link leads back to a folder above it, or a metadata file is
            wrong.
    """
    images, metadata, tops, hidden = [], [], [], []
    left_out: dict[str, str] = {}
    for name, kind in walk(folder):
        if kind == "hidden":
            hidden += [name] if _holds_images(folder / name) else []
        elif kind == "folder":
            tops += [name] if "/" not in name else []
        elif PurePosixPath(name).name in METADATA:
            metadata.append(name)
        elif why := unreadable(name, kind):
            left_out[name] = why
        elif is_image(folder / name):
            images.append(name)
    images.sort()
    if metadata:
        return _described(folder, images, left_out, metadata)
    loose = [name for name in images if "/" not in name]
    if loose and len(loose) == len(images):
        raise ValueError(f"images must be in class folders, but {loose[0]!r} is not in one")
    left_out |= dict.fromkeys(loose, "not in a class folder")
    kept = [name for name in images if "/" in name]
    rows = tuple({"label": _class_of(name, kept, class_folder)} for name in kept)
    filled = {name.partition("/")[0] for name in kept}
    empty = tuple(name for name in tops if name not in filled)
    return FolderImages(tuple(kept), rows, left_out, empty, tuple(hidden))


def _holds_images(path: Path) -> bool:
    """Check whether something hidden may be missed: a folder or an image, not what macOS adds."""
    added = path.name.startswith("._") or path.name == "__MACOSX"
    return not added and (path.is_dir() or is_image(path))


def _class_of(name: str, images: Sequence[str], class_folder: str | None) -> str:
    folders = name.split("/")[:-1]
    if len(folders) > 1 and class_folder is None:
        firsts, lasts = (sorted({n.split("/")[place] for n in images})[:3] for place in (0, -2))
        splits = "; dataset_name finds splits" if all(map(canonical, firsts)) else ""
        raise ValueError(
            f"images must lie in one class folder, but {name!r} lies in several:"
            f" class_folder='first' makes the classes {firsts}, 'last' makes {lasts}{splits}"
        )
    return folders[0 if class_folder == "first" else -1]


def _described(
    folder: Path, images: Sequence[str], left_out: dict[str, str], metadata: Sequence[str]
) -> FolderImages:
    """Take the columns of metadata files; the image's folder gives a label they lack."""
    table: dict[str, Mapping[str, Any]] = {}
    for name in metadata:
        for number, row in enumerate(_read_metadata(folder / name, name)):
            file = (PurePosixPath(name).parent / str(row.pop("file_name"))).as_posix()
            if file not in left_out and not (folder / file).is_file():
                raise ValueError(f"{name}:{number} names {file!r}, which does not exist")
            table[file] = row
    left_out |= {image: f"not in {metadata[0]}" for image in images if image not in table}
    kept = tuple(image for image in images if image in table)
    parents = [PurePosixPath(image).parent.name for image in kept]
    rows = [
        {**({"label": parent} if parent else {}), **table[image]}
        for image, parent in zip(kept, parents, strict=True)
    ]
    return FolderImages(kept, tuple(rows), left_out)


def _read_metadata(path: Path, name: str) -> list[dict[str, Any]]:
    try:
        if path.suffix == ".jsonl":
            table = pyarrow.json.read_json(path)
        elif path.suffix == ".parquet":
            table = pyarrow.parquet.read_table(path)
        else:
            missing = pyarrow.csv.ConvertOptions(strings_can_be_null=True, null_values=[""])
            table = pyarrow.csv.read_csv(path, convert_options=missing)
    except (ValueError, OSError) as error:  # Arrow's errors are among them
        raise ValueError(f"{name} cannot be read: {error}") from error
    if "file_name" not in table.column_names:
        raise ValueError(f"{name} must have a column 'file_name', got {table.column_names}")
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def walk(folder: Path) -> Iterator[tuple[str, Kind]]:
    """Yield the paths below a folder in the order of their names, links followed.

    Nothing below what is hidden (its name begins with a dot, or is ``__MACOSX``) is yielded.

    Raises:
        ValueError: a link leads back to a folder above it.
    """

    def visit(prefix: str, above: frozenset[str]) -> Iterator[tuple[str, Kind]]:
        place = folder / prefix
        real = os.path.realpath(place)
        if real in above:
            raise ValueError(f"{prefix.rstrip('/')!r} is a link to a folder above it")
        with os.scandir(place) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        for entry in found:
            name = prefix + entry.name
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                yield name, "hidden"
            elif entry.is_dir():
                yield name, "folder"
                yield from visit(f"{name}/", above | {real})
            else:
                yield name, _kind_of(entry)

    yield from visit("", frozenset())


def _kind_of(entry: "os.DirEntry[str]") -> Kind:
    if entry.is_file():
        return "file"
    return "broken link" if entry.is_symlink() else "no file"


def is_image(path: Path) -> bool:
    """Check whether Pillow takes a file for an image, by its suffix or else by its content."""
    form = PILImage.registered_extensions().get(path.suffix.lower())
    if form in NOT_PIXELS:
        return False
    if form in PILImage.OPEN:
        return True
    try:
        with PILImage.open(path) as image:
            return image.format not in NOT_PIXELS
    except PILImage.DecompressionBombError:
        return True  # so that it is named where it is decoded
    except (UnidentifiedImageError, OSError, ValueError):
        return False


def unreadable(name: str, kind: Kind) -> str | None:
    """Return why a file that seems to hold images cannot be read; None for all others."""
    path = PurePosixPath(name.lower())
    if kind == "broken link":
        return "a link to nothing"
    if kind == "no file":
        return "a pipe, socket or device"
    if path.suffix in TEMPORARY_SUFFIXES:
        return "still being written"
    if path.suffix in PACKED:
        return "not unpacked"
    try:
        name.encode()
    except UnicodeEncodeError:
        return "its name is not UTF-8"
    plugin = PLUGINS.get(path.suffix)
    if plugin is None or path.suffix in PILImage.registered_extensions():
        return None
    if plugin == "pillow-heif" and _register_heif():
        return None
    return f"needs the plug-in {plugin}"


def _register_heif() -> bool:
    """Let Pillow read HEIC if its plug-in is installed."""
    try:
        plugin = importlib.import_module("pillow_heif")
    except ImportError:
        return False
    plugin.register_heif_opener()
    return True
