"""The data set that comes with the package: 2,261 pictures of people, 32 px, with human-written captions.

It is packed in emoji.zip (made by recipes/pack_emoji.py, which states the split; sources and licences in NOTICE) and
unpacked as an ordinary data set in LLaVA's format, so that the code that reads it reads other data too.
"""

import errno
import hashlib
import io
import json
import os
import tempfile
import zipfile
from importlib import resources
from pathlib import Path

from PIL import Image

INSTRUCTION = "<image>\nWhat is this?"


def unpack(folder: str | Path) -> Path:
    """Write the data set into `folder` if it is not there, and return the folder.

    train.json, heldout.json: lists of {"id", "image", "conversations"}; images/<hexcode>.png: 32 x 32 pixels, RGB;
    tokenizer.model: sentencepiece, trained on the train captions; NOTICE; manifest.json: the SHA-256 of all of these.
    The folder appears complete or not at all, also when several processes unpack at once. Other files may be added.
    Raises ValueError if `folder` holds something else, another version, or a changed or incomplete copy.
    """
    folder = Path(folder)
    content = resources.files("llava_fn.data").joinpath("emoji.zip").read_bytes()
    version = hashlib.sha256(content).hexdigest()
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
            written = Path(temporary) / "data"
            write(written, files(content), version)
            try:
                os.rename(written, folder)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # these two: another process was first
                    raise
    check(folder, version)
    return folder


def files(content: bytes) -> dict[str, bytes]:
    """Name -> content of each file of the data set, without the manifest. content: the bytes of emoji.zip."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        packed = {name: archive.read(name) for name in archive.namelist()}
    records = json.loads(packed["records.json"])
    made = {name: packed[name] for name in ("tokenizer.model", "NOTICE")}
    for split in ("train", "heldout"):
        chosen = [conversation(record) for record in records if record["split"] == split]
        made[f"{split}.json"] = ("[\n" + ",\n".join(json.dumps(record) for record in chosen) + "\n]\n").encode()
    geometry = json.loads(packed["metadata.json"])
    pictures = cut(packed["sheet.png"], len(records), geometry["side"], geometry["columns"])
    return made | {image_name(record): picture for record, picture in zip(records, pictures, strict=True)}


def image_name(record: dict) -> str:
    """Where a record's picture lies, relative to the data set's folder."""
    return f"images/{record['hexcode']}.png"


def conversation(record: dict) -> dict:
    """A packed record as one record of LLaVA's pretraining format: one question, the caption as its answer."""
    turns = [{"from": "human", "value": INSTRUCTION}, {"from": "gpt", "value": record["caption"]}]
    return {"id": record["hexcode"], "image": image_name(record), "conversations": turns}


def cut(sheet: bytes, count: int, side: int, columns: int) -> list[bytes]:
    """The first `count` pictures of a PNG sheet, row by row, each as an RGB PNG of side x side pixels."""
    with Image.open(io.BytesIO(sheet)) as opened:
        joined = opened.convert("RGB")
    pictures = []
    for index in range(count):
        left, upper = index % columns * side, index // columns * side
        png = io.BytesIO()
        picture = joined.crop((left, upper, left + side, upper + side))
        picture.save(png, "PNG", compress_level=1)  # quick; the files are tiny anyway
        pictures.append(png.getvalue())
    return pictures


def write(folder: Path, contents: dict[str, bytes], version: str) -> None:
    """Write all files and the manifest into a new folder."""
    (folder / "images").mkdir(parents=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    manifest = {"emoji.zip": version, "files": digests}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def check(folder: Path, version: str) -> None:
    """Raises ValueError unless `folder` is a complete, unchanged copy made from the emoji.zip with that SHA-256."""
    advice = "delete it or name another folder"
    manifest_path = folder / "manifest.json"
    if not manifest_path.is_file():
        raise ValueError(f"{folder} exists and is not the unpacked emoji data set (no manifest.json): {advice}")
    manifest = json.loads(manifest_path.read_bytes())
    if manifest.get("emoji.zip") != version:
        raise ValueError(f"{folder} was not unpacked from this version's emoji.zip: {advice}")
    for name, digest in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing from the unpacked emoji data set: delete {folder} to unpack it again")
        if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise ValueError(f"{path} was changed after it was unpacked: keep your own data elsewhere, delete {folder}")
