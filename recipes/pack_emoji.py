"""Pack llava_fn/data/emoji.zip: 2,261 small pictures of people with human-written captions, a split and a tokenizer.

    npm pack emoji-datasource-google@16.0.0 emojibase-data@17.0.0
    python recipes/pack_emoji.py emoji-datasource-google-16.0.0.tgz emojibase-data-17.0.0.tgz

Pictures: Noto Emoji (64 px PNG, Apache-2.0). Captions: CLDR English short names (Unicode License V3). See NOTICE.

Selection: every emoji of the Unicode group "People & Body", with all its skin tones, that has a picture: 386 bases and
1,875 variants. Emoji of Unicode 17 are named in emojibase-data 17.0.0 but have no picture in this Noto release.

Split: HELD-OUT = 281 skin-tone variants (15 %). They test composition: the base is in train, the tone is in train, and
the pair is new. Variants are visited in the order of the SHA-256 of their hexcode (no random state); each is held out
if at least 3 other variants of its base stay in train, until there are 281. A base is never held out, nor is a variant
whose packed picture equals another one, since that picture does not determine its caption: Noto draws all snowboarders
alike (and, in train, a few families; so 2,261 captions are of 2,251 distinct pictures).
So each base of a held-out variant is in train with >= 3 tones, and each word of a held-out caption occurs in train.

Equal input and equal versions of Pillow, zlib and sentencepiece give equal bytes.
"""

import hashlib
import io
import json
import tarfile
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import tyro
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
GROUP = 1  # "people-body" in emojibase-data's meta/groups.json
VARIANTS_IN_TRAIN = 3  # of every base that has a held-out variant
SPLITS = ("train", "heldout")
COLUMNS = 48  # of the sheet
LIMIT = 1_000_000  # bytes, of the zip file


@dataclass(frozen=True)
class Config:
    """What to read, what to write; `side` in pixels, `heldout` in captions, `vocab` in pieces."""

    pictures: tyro.conf.Positional[Path]  # emoji-datasource-google, .tgz or unpacked
    names: tyro.conf.Positional[Path]  # emojibase-data, .tgz or unpacked
    out: Path = ROOT / "llava_fn" / "data" / "emoji.zip"
    notice: Path = ROOT / "NOTICE"
    side: int = 32
    colours: int = 256
    heldout: int = 281
    vocab: int = 512


def read_package(path: Path, keep: tuple[str, ...]) -> dict[str, bytes]:
    """The files of an npm package whose names start with one of `keep`, from a .tgz or an unpacked folder.

    ValueError if there is no package.json at the top.
    """
    if path.is_dir():
        names = {p.relative_to(path).as_posix(): p for p in path.rglob("*") if p.is_file()}
        files = {name: p.read_bytes() for name, p in names.items() if name.startswith(keep)}
    else:
        with tarfile.open(path) as tar:
            members = {m.name.removeprefix("package/"): tar.extractfile(m) for m in tar if m.isfile()}
            files = {name: file.read() for name, file in members.items() if file and name.startswith(keep)}
    if "package.json" not in files:
        raise ValueError(f"{path} is no npm package (no package.json at its top): give the .tgz or the unpacked folder")
    return files


def check_source(files: dict[str, bytes], name: str, notice: str) -> str:
    """A package's name and version. ValueError if it is another package, or if NOTICE does not name that version."""
    package = json.loads(files["package.json"])
    source = f"{package['name']} {package['version']}"
    if package["name"] != name:
        raise ValueError(f"this is {source}, not {name}: give {name} there")
    if source not in notice:
        raise ValueError(f"NOTICE does not name {source}: correct NOTICE, or give the version that it names")
    return source


def bare(hexcode: str) -> str:
    """A hexcode without the variation selector FE0F, which the two packages write differently."""
    return hexcode.removesuffix("-FE0F").replace("-FE0F-", "-")


def picture_names(emoji: list[dict]) -> dict[str, str]:
    """bare hexcode -> file name of the picture, from emoji.json of emoji-datasource-google."""
    entries = [entry for base in emoji for entry in [base, *base.get("skin_variations", {}).values()]]
    return {bare(entry["unified"]): entry["image"] for entry in entries if entry["has_img_google"]}


def select(names: list[dict], pictures: dict[str, str]) -> list[dict]:
    """One record {caption, hexcode, base} for each emoji of the group with a picture, in Unicode order.

    ValueError if a caption occurs twice.
    """
    found = []
    for base in (base for base in names if base.get("group") == GROUP):
        for entry in [base, *base.get("skins", [])]:
            record = {"caption": entry["label"], "hexcode": entry["hexcode"], "base": base["hexcode"]}
            if bare(entry["hexcode"]) in pictures:
                found.append((entry["order"], record))
    records = [record for _, record in sorted(found, key=lambda pair: pair[0])]
    captions = [record["caption"] for record in records]
    twice = sorted(caption for caption, count in Counter(captions).items() if count > 1)
    if twice:
        raise ValueError(f"captions that occur twice: {twice[:5]}: a caption must name one picture")
    return records


def small(png: bytes, side: int) -> Image.Image:
    """A PNG file's picture on a white ground, scaled to side x side pixels, RGB."""
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    ground = Image.new("RGBA", picture.size, "white")
    ground.alpha_composite(picture)  # before scaling, so that clear pixels' hidden colours do not bleed in
    return ground.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)


def box(index: int, side: int) -> tuple[int, int, int, int]:
    """Where picture `index` lies on the sheet, in pixels: left, upper, right, lower."""
    left, upper = index % COLUMNS * side, index // COLUMNS * side
    return left, upper, left + side, upper + side


def sheet(pictures: list[Image.Image], side: int, colours: int) -> Image.Image:
    """All pictures in rows of COLUMNS, with one palette."""
    rows = -(-len(pictures) // COLUMNS)
    joined = Image.new("RGB", (COLUMNS * side, rows * side), "white")
    for index, picture in enumerate(pictures):
        joined.paste(picture, box(index, side))
    # Maximum coverage keeps rare colours (dark skin, small objects); k-means then halves the error.
    return joined.quantize(colours, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)


def words(caption: str) -> set[str]:
    """The words of a caption, without its ":" and ","."""
    return set(caption.replace(":", " ").replace(",", " ").split())


def hold_out(records: list[dict], cells: list[bytes], count: int) -> set[str]:
    """The hexcodes of `count` held-out variants, by the rule at the top of this file; cells: their packed pixels.

    ValueError if the rule does not allow so many.
    """
    variants = [record for record in records if record["hexcode"] != record["base"]]
    in_train = Counter(record["base"] for record in variants)
    drawn = Counter(cells)
    unlike = {record["hexcode"] for record, cell in zip(records, cells, strict=True) if drawn[cell] == 1}
    chosen = set()
    for record in sorted(variants, key=lambda record: hashlib.sha256(record["hexcode"].encode()).hexdigest()):
        if len(chosen) < count and record["hexcode"] in unlike and in_train[record["base"]] > VARIANTS_IN_TRAIN:
            in_train[record["base"]] -= 1
            chosen.add(record["hexcode"])
    if len(chosen) < count:
        raise ValueError(f"only {len(chosen)} of {count} captions can be held out: ask for fewer (--heldout)")
    return chosen


def split(records: list[dict], heldout: set[str]) -> list[dict]:
    """The records with "split" (train or heldout) added. ValueError if a held-out word is not in train."""
    done = [{**record, "split": "heldout" if record["hexcode"] in heldout else "train"} for record in records]
    seen = {part: {word for r in done if r["split"] == part for word in words(r["caption"])} for part in SPLITS}
    new = seen["heldout"] - seen["train"]
    if new:
        raise ValueError(f"words that only held-out captions have: {sorted(new)}: hold out other captions")
    return done


def tokenizer(captions: list[str], vocab: int) -> bytes:
    """A sentencepiece model file with Llama's settings: BPE, byte fallback, unk 0, bos 1, eos 2, no pad."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,  # one order of counting, so one result
        minloglevel=2,
    )
    return model.getvalue()


def check_tokenizer(model: bytes, captions: list[str]) -> None:
    """ValueError for a caption that encoding and decoding change."""
    loaded = sentencepiece.SentencePieceProcessor(model_proto=model)
    for caption in captions:
        if loaded.decode(loaded.encode(caption)) != caption:
            raise ValueError(f"the tokenizer does not give {caption!r} back: change its settings")


def zip_bytes(files: dict[str, bytes]) -> bytes:
    """A zip file with fixed timestamps and permissions. ValueError above LIMIT bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            info.external_attr = 0o644 << 16
            info.create_system = 3  # Unix, whatever the machine
            archive.writestr(info, content, zipfile.ZIP_DEFLATED, compresslevel=9)
    if len(buffer.getvalue()) > LIMIT:
        raise ValueError(f"{len(buffer.getvalue())} bytes are above the limit of {LIMIT}: use fewer --colours")
    return buffer.getvalue()


def pack(config: Config) -> bytes:
    """The content of emoji.zip: sheet.png, records.json, metadata.json, tokenizer.model, NOTICE."""
    notice = config.notice.read_text(encoding="utf-8")
    google = read_package(config.pictures, ("package.json", "emoji.json", "img/google/64/"))
    base = read_package(config.names, ("package.json", "en/data.json"))
    sources = [check_source(google, "emoji-datasource-google", notice), check_source(base, "emojibase-data", notice)]
    pictures = picture_names(json.loads(google["emoji.json"]))
    records = select(json.loads(base["en/data.json"]), pictures)
    paths = [f"img/google/64/{pictures[bare(record['hexcode'])]}" for record in records]
    joined = sheet([small(google[path], config.side) for path in paths], config.side, config.colours)
    cells = [joined.crop(box(index, config.side)).tobytes() for index in range(len(records))]
    records = split(records, hold_out(records, cells, config.heldout))
    model = tokenizer([r["caption"] for r in records if r["split"] == "train"], config.vocab)
    check_tokenizer(model, [r["caption"] for r in records])
    png = io.BytesIO()
    joined.save(png, "PNG", optimize=True)
    return zip_bytes(
        {
            "sheet.png": png.getvalue(),
            "records.json": lines(records),
            "metadata.json": json.dumps(metadata(sources, config), indent=1).encode(),
            "tokenizer.model": model,
            "NOTICE": notice.encode(),
        }
    )


def lines(records: list[dict]) -> bytes:
    """A JSON list with one record a line."""
    return ("[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n").encode()


def metadata(sources: list[str], config: Config) -> dict:
    """Where the data comes from, its licences, how to cite it, and the geometry of the sheet (pixels, columns)."""
    return {
        "sources": sources,
        "licences": {"pictures": "Apache-2.0", "captions": "Unicode-3.0", "packages": "MIT"},
        "cite": f"Noto Emoji (Google) with CLDR short names (Unicode, Inc.), npm {' and '.join(sources)}",
        "made_by": "recipes/pack_emoji.py",
        "side": config.side,
        "columns": COLUMNS,
    }


def main(config: Config) -> None:
    """Write emoji.zip and print its size and digest."""
    content = pack(config)
    config.out.write_bytes(content)
    print(f"{config.out}: {len(content)} bytes, sha256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
