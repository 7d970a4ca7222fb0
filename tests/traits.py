"""What users' folders and files are like: one trait each, built small, and what is right for it.

Each recipe either reads exactly the images and classes named here, or ends with an error that says
what is wrong.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Value
from image_files import encoded, photo, write_folder
from trait_builders import (
    DEEP,
    TWO,
    add,
    archive,
    copy_in_another_format,
    copy_of_the_first,
    cut,
    deep,
    deep_photo,
    described,
    folders,
    in_a_folder_called,
    link_a_class,
    link_an_image,
    link_each_other,
    nested,
    nothing,
    packed,
    rename_by,
    replace_one,
    replaced_table,
    saved,
    saved_splits,
    saved_without_its_data,
    split_folders,
    table_and_copy,
    table_of,
    tables_by_split,
    truncated_photo,
    two_tables,
)

RECIPES = ("continual", "retrain", "promote")


@dataclass(frozen=True)
class Trait:
    """One trait.

    Args:
        name: in the table.
        build: writes images to a path, from a first number on, and returns the name to give.
        count: images that are to be read; None where an error is right.
        classes: their names.
        says: part of the error's last line, where an error is right.
        flags: that the trait needs.
        parent: classes of the model to continue with.
        held_out: how the held-out images are built; None as the others, with other images.
        own: recipes for which something else is right, with its count or error.
    """

    name: str
    build: Callable[[Path, int], str]
    count: int | None = 12
    classes: Sequence[str] = TWO
    says: str = ""
    flags: Sequence[str] = ()
    parent: Sequence[str] = TWO
    held_out: Callable[[Path, int], str] | None = None
    own: dict[str, "int | str | None"] = field(default_factory=dict)


RGB = ("--image_mode", "RGB")

NFD = "cafe\u0301"

FOLDERS = [
    Trait("class folders", folders()),
    Trait("a linked class folder", folders(change=link_a_class), 18, (*TWO, "owl")),
    Trait("a linked image", folders(change=link_an_image), 13),
    Trait(
        "a loop of links",
        folders(change=lambda path, first: (path / "cat" / "up").symlink_to(path)),
        None,
        says="link to a folder above it",
    ),
    Trait(
        "links between two folders",
        folders(change=link_each_other),
        None,
        says="'cat/x/y' is a link to a folder above it",
    ),
    Trait(
        "a link to nothing",
        folders(change=lambda path, first: (path / "cat" / "x.png").symlink_to(path / "none")),
        None,
        says="cat/x.png (a link to nothing)",
    ),
    Trait(
        "files called train-… and test-…",
        rename_by(lambda n, f: f"{('train', 'test')[n % 2]}-{n}.png"),
    ),
    Trait("[2026] tuesday", in_a_folder_called("[2026] tuesday")),
    Trait("a folder called *?", in_a_folder_called("a*b?")),
    Trait("a folder called über {x} ☕", in_a_folder_called("über {x} ☕")),
    Trait("suffixes in capitals", rename_by(lambda n, f: f"{f.stem}.PNG")),
    Trait("files without a suffix", rename_by(lambda n, f: f.stem)),
    Trait("spaces and brackets in names of files", rename_by(lambda n, f: f"a [{n}] (1).png")),
    Trait("one class only", folders(classes=("cat",), count=12), classes=("cat",)),
    Trait(
        "an empty class folder",
        folders(change=lambda path, first: (path / "owl").mkdir()),
        None,
        says="class folder owl",
    ),
    Trait(
        "hidden files and folders",
        add({".DS_Store": b"x", ".ipynb_checkpoints/cat.png": b"x", "cat/._a.png": b"x"}),
    ),
    Trait("__MACOSX beside the classes", add({"__MACOSX/cat/._a.png": b"x"})),
    Trait("text files among images", add({"labels.txt": b"x", "cat/Thumbs.db": b"x"})),
    Trait(
        "an image outside of class folders",
        add({"x.png": encoded(photo(0, 999))}),
        None,
        says="x.png (not in a class folder)",
    ),
    Trait(
        "images without class folders",
        lambda path, first: str(write_folder(path, {"a.png": encoded(photo(0, first))})),
        None,
        says="images must be in class folders, but 'a.png'",
    ),
    Trait("class/camera/image", nested, None, says="class_folder='first' makes the classes"),
    Trait("class/camera/image, --class_folder first", nested, flags=("--class_folder", "first")),
    Trait(
        "class/camera/image, --class_folder last",
        nested,
        classes=("left", "right"),
        parent=("left", "right"),
        flags=("--class_folder", "last"),
    ),
    Trait(
        "an archive among images",
        add({"cat/more.zip": b"x"}),
        None,
        says="cat/more.zip (not unpacked)",
    ),
    Trait(
        "an image still being written",
        add({"cat/x.jpg.part": b"x"}),
        None,
        says="still being written",
    ),
    Trait(
        "the same, --allow_missing",
        add({"cat/x.jpg.part": b"x"}),
        flags=("--allow_missing",),
    ),
    Trait("blanks around names of classes", folders(classes=(" cat", "dog ")), classes=TWO),
    Trait(
        "names of classes in NFD",
        folders(classes=(NFD, "dog")),
        classes=("caf\u00e9", "dog"),
        parent=("caf\u00e9", "dog"),
    ),
    Trait(
        "names that differ by case", folders(classes=("cat", "Cat")), None, says="'Cat' and 'cat'"
    ),
    Trait(
        "names that differ by blanks",
        folders(classes=("big cat", "bigcat")),
        None,
        says="'big cat' and 'bigcat'",
    ),
    Trait("metadata.csv", described("metadata.csv"), flags=("--label_column_name", "kind")),
    Trait("metadata.jsonl", described("metadata.jsonl"), flags=("--label_column_name", "kind")),
    Trait(
        "metadata.csv that names a missing image",
        described("metadata.csv", missing=True),
        None,
        says="names '12.png', which does not exist",
        flags=("--label_column_name", "kind"),
    ),
    Trait(
        "a pipe among images",
        folders(change=lambda path, first: os.mkfifo(path / "cat" / "x.png")),
        None,
        says="cat/x.png (a pipe, socket or device)",
    ),
    Trait("a name of nothing", nothing, None, says="does not exist"),
    Trait("a zip file", packed, None, says="an archive has to be unpacked"),
    Trait(
        "a last batch of one image",
        folders(change=lambda path, first: photo(0, first + 60).save(path / "cat" / "z.png")),
        13,
    ),
    Trait("streaming class folders", folders(), flags=("--streaming",)),
    Trait(
        "corrupt and --on_bad_example skip, streaming",
        folders(change=truncated_photo),
        flags=("--on_bad_example", "skip", "--streaming"),
    ),
]

PIXELS = [
    Trait("JPEG and PNG side by side", replace_one("JPEG", "jpeg")),
    Trait("WebP", folders(end="webp")),
    Trait("AVIF", folders(end="avif")),
    Trait("TIFF", folders(end="tiff")),
    Trait("BMP and GIF", replace_one("GIF", "gif", lambda image: image.quantize()), flags=RGB),
    Trait("HEIC", add({"cat/x.heic": b"x"}), None, says="needs the plug-in pillow-heif"),
    Trait("JPEG XL", add({"cat/x.jxl": b"x"}), None, says="needs the plug-in pillow-jxl-plugin"),
    Trait("camera raw", add({"cat/x.CR2": b"x"}), None, says="needs the plug-in rawpy"),
    *(
        Trait(f"{name}, --image_mode RGB", deep(*how), None, says="has more than 8 bits", flags=RGB)
        for name, how in DEEP.items()
    ),
    Trait(
        "gray among color",
        replace_one("PNG", "png", lambda i: i.convert("L")),
        None,
        says="cat/odd.png: image mode is 'L'",
    ),
    Trait("gray, --image_mode RGB", replace_one("PNG", "png", lambda i: i.convert("L")), flags=RGB),
    Trait(
        "palette, --image_mode RGB", replace_one("PNG", "png", lambda i: i.quantize()), flags=RGB
    ),
    Trait(
        "transparent, --image_mode RGB",
        replace_one("PNG", "png", lambda i: i.convert("RGBA")),
        flags=RGB,
    ),
    Trait("gray and transparent", replace_one("PNG", "png", lambda i: i.convert("LA")), flags=RGB),
    Trait(
        "CMYK, --image_mode RGB", replace_one("JPEG", "jpg", lambda i: i.convert("CMYK")), flags=RGB
    ),
    Trait(
        "turned by EXIF",
        replace_one(
            "JPEG",
            "jpg",
            exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0",
        ),
    ),
    Trait(
        "animated", replace_one("GIF", "gif", save_all=True, append_images=[photo(1, 5)]), flags=RGB
    ),
    Trait(
        "half a JPEG",
        folders(change=truncated_photo),
        None,
        says="cat/broken photo.jpg is a corrupt image",
    ),
    Trait(
        "half a JPEG, --on_bad_example skip",
        folders(change=truncated_photo),
        flags=("--on_bad_example", "skip"),
    ),
    Trait(
        "an empty file called .jpg",
        add({"cat/x.jpg": b""}),
        None,
        says="cat/x.jpg is a corrupt image",
    ),
    Trait(
        "a text called .png", add({"cat/x.png": b"text"}), None, says="cat/x.png is a corrupt image"
    ),
]

PNG_CLS = ("--image_column_name", "png", "--label_column_name", "cls")

FILES = [
    Trait("parquet with ClassLabel", table_of()),
    Trait("parquet, streaming", table_of(), flags=("--streaming",)),
    Trait("parquet with text labels", table_of(TWO * 6, Value("string"))),
    Trait("parquet with labels in large_string", table_of(TWO * 6, Value("large_string"))),
    Trait(
        "parquet with integers, for a parent with names",
        table_of((0, 1) * 6, Value("int64")),
        classes=("0", "1"),
        own={
            "retrain": "integer labels need names",
            "promote": "integer labels need names",
        },
    ),
    Trait(
        "parquet with product ids",
        table_of((3001, 9002) * 6, Value("int64")),
        classes=("3001", "9002"),
        parent=("3001", "9002"),
    ),
    Trait(
        "parquet with a label of a billion",
        table_of((7, 10**9) * 6, Value("int64")),
        classes=("7", "1000000000"),
        parent=("7", "1000000000"),
    ),
    Trait(
        "parquet with a label missing",
        table_of((0, 1) * 5 + (0, None)),
        None,
        says="day.parquet:11 has no label",
    ),
    Trait(
        "parquet with an empty text label",
        table_of(TWO * 5 + ("cat", " "), Value("string")),
        None,
        says="day.parquet:11 has no label",
    ),
    Trait(
        "parquet with an image missing",
        table_of(images={3: None}),
        None,
        says="day.parquet:3 is a corrupt image",
    ),
    Trait("parquet with images as bytes", table_of(raw=True)),
    Trait(
        "parquet with columns of other names",
        table_of(columns=("img", "fine_label")),
        flags=("--image_column_name", "img", "--label_column_name", "fine_label"),
    ),
    Trait(
        "parquet without the column",
        table_of(columns=("image", "kind")),
        None,
        says="label_column 'label' is not a column",
    ),
    Trait(
        "parquet with float labels",
        table_of((0.0, 1.0) * 6, Value("float32")),
        None,
        says="label_column must hold ClassLabel",
    ),
    Trait(
        "parquet that was cut off",
        table_of(change=cut(100)),
        None,
        says="day.parquet cannot be read",
    ),
    Trait("parquet without rows", table_of(()), None, says="hold no example"),
    Trait("parquet replaced with its time stamp kept", replaced_table),
    Trait("a file and its copy", table_and_copy),
    Trait(
        "parquet with a float TIFF",
        table_of(images={3: deep_photo("float TIFF")}),
        None,
        says="day.parquet:3 has more than 8 bits",
        flags=RGB,
    ),
    Trait(
        "classes in another order in the second file", two_tables(("cat", "dog"), ("dog", "cat"))
    ),
    Trait(
        "files of a folder named train and valid",
        tables_by_split,
        held_out=tables_by_split,
        own={"promote": 6},
    ),
    Trait(
        "one of two files named train",
        two_tables(TWO, TWO, ("train.parquet", "more.parquet")),
        None,
        says="must name the split of every shard or of none",
    ),
    Trait("tar", archive(), classes=("0", "1"), parent=("0", "1"), flags=PNG_CLS),
    Trait(
        "tar, streaming",
        archive(),
        classes=("0", "1"),
        parent=("0", "1"),
        flags=(*PNG_CLS, "--streaming"),
    ),
    Trait(
        "tar with text labels",
        archive(label="txt"),
        flags=("--image_column_name", "png", "--label_column_name", "txt"),
    ),
    Trait(
        "tar.gz", archive("tar.gz", "w:gz"), classes=("0", "1"), parent=("0", "1"), flags=PNG_CLS
    ),
    Trait("tgz", archive("tgz", "w:gz"), classes=("0", "1"), parent=("0", "1"), flags=PNG_CLS),
    Trait(
        "tar that was cut off",
        archive(lost=20_000),
        None,
        says="day.tar cannot be read",
        flags=PNG_CLS,
    ),
    Trait(
        "tar.gz that was cut off",
        archive("tar.gz", "w:gz", lost=600),
        None,
        says="day.tar.gz cannot be read",
        flags=PNG_CLS,
    ),
    Trait("tar with a label missing", archive(without=11), None, says="day.tar", flags=PNG_CLS),
    Trait("written by save_to_disk", saved),
    Trait(
        "written by save_to_disk, a file missing",
        saved_without_its_data,
        None,
        says="saved cannot be read",
    ),
    Trait(
        "several splits written by save_to_disk",
        saved_splits,
        held_out=saved_splits,
        own={"promote": 6},
    ),
]

SPLITS = [
    *(
        Trait(
            f"folders called train and {name}",
            split_folders("train", name),
            held_out=split_folders("train", name),
            own={"promote": 6},
        )
        for name in ("val", "valid", "dev", "validation", "test")
    ),
    Trait(
        "held-out images among those to train on",
        folders(),
        None,
        says="1 of 7 held-out images are also training images",
        held_out=copy_of_the_first,
        own={"promote": 7},
    ),
    Trait(
        "the same, --allow_overlap",
        folders(),
        held_out=copy_of_the_first,
        flags=("--allow_overlap",),
        own={"promote": 7},
    ),
    Trait(
        "one of them in another format",
        folders(),
        None,
        says="1 of 7 held-out images",
        held_out=copy_in_another_format,
        flags=("--compare_images_by", "pixels"),
        own={"promote": 7},
    ),
    Trait(
        "a class that only held-out images have",
        folders(),
        classes=TWO,
        held_out=folders(classes=("cat", "owl"), count=3),
        own={"retrain": "labels ['owl'] of the held-out images", "promote": 6},
    ),
    Trait(
        "no class in common with the parent",
        folders(classes=("owl", "fox")),
        classes=("owl", "fox"),
        own={"retrain": "must share a class with its parent", "promote": "must share a class"},
    ),
    Trait(
        "a parent without names of classes",
        folders(),
        parent=("LABEL_0", "LABEL_1"),
        own={"retrain": "classes have no names", "promote": "classes have no names"},
    ),
]

TRAITS = [*FOLDERS, *PIXELS, *FILES, *SPLITS]
