"""The shipped data set (size, split, pictures, tokenizer), its unpacking, and the packer on two tiny fake packages."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from importlib import resources
from pathlib import Path

import pytest
import sentencepiece
from PIL import Image, ImageStat
from warm import recipe

from llava_fn.data import emoji

ROOT = Path(__file__).resolve().parents[2]
CONTENT = resources.files("llava_fn.data").joinpath("emoji.zip").read_bytes()
TONES = ["light", "medium-light", "medium", "medium-dark", "dark"]
MODIFIERS = ["1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"]
COLOURS = {"1F600": (250, 0, 0), "1F601": (0, 250, 0), "1F602-FE0F": (0, 0, 250)}
packer = recipe("pack_emoji")
LABELS = {"1F600": "hand", "1F601": "nose", "1F602-FE0F": "ear"}


@pytest.fixture(scope="module")
def archive():
    return zipfile.ZipFile(io.BytesIO(CONTENT))


@pytest.fixture(scope="module")
def records(archive):
    return json.loads(archive.read("records.json"))


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    return emoji.unpack(tmp_path_factory.mktemp("data") / "new" / "emoji")


@pytest.fixture(scope="module")
def pictures(unpacked, records):
    """caption -> decoded picture"""
    opened = {r["caption"]: Image.open(unpacked / "images" / f"{r['hexcode']}.png") for r in records}
    for picture in opened.values():
        picture.load()
    return opened


def of_split(records, split):
    return [record for record in records if record["split"] == split]


def words(caption):
    return caption.replace(":", " ").replace(",", " ").split()


# The shipped file.


def test_zip_is_at_most_1_mb_and_has_fixed_timestamps(archive):
    assert len(CONTENT) <= 1_000_000
    assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_captions_and_hexcodes_are_unique_and_counted(records):
    assert len({r["caption"] for r in records}) == len({r["hexcode"] for r in records}) == len(records) == 2261
    assert Counter(r["split"] for r in records) == {"train": 1980, "heldout": 281}
    assert sum(r["hexcode"] == r["base"] for r in records) == 386


def test_only_skin_tone_variants_are_held_out(records):
    for record in of_split(records, "heldout"):
        assert record["hexcode"] != record["base"]
        assert record["caption"].count(" skin tone") in (1, 2)


def test_base_of_each_heldout_variant_keeps_itself_and_three_tones_in_train(records):
    train = of_split(records, "train")
    variants = Counter(r["base"] for r in train if r["hexcode"] != r["base"])
    bases = {r["hexcode"] for r in train if r["hexcode"] == r["base"]}
    for record in of_split(records, "heldout"):
        assert record["base"] in bases and variants[record["base"]] >= 3


def test_each_word_of_heldout_captions_occurs_in_train(records):
    known = {word for r in of_split(records, "train") for word in words(r["caption"])}
    assert {word for r in of_split(records, "heldout") for word in words(r["caption"])} <= known


def test_each_tone_is_held_out_about_as_often(records):
    first = [words(r["caption"].split(": ")[1].replace(" skin tone", "")) for r in of_split(records, "heldout")]
    counts = Counter(next(word for word in tones if word in TONES) for tones in first)
    assert set(counts) == set(TONES) and min(counts.values()) > 281 / 5 / 2


def test_shipped_split_is_the_packers_split(records, pictures):
    plain = [{key: r[key] for key in ("caption", "hexcode", "base")} for r in records]
    cells = [pictures[r["caption"]].tobytes() for r in records]
    assert packer.split(plain, packer.hold_out(plain, cells, 281)) == records


def test_metadata_and_notice_name_the_same_sources(archive):
    metadata = json.loads(archive.read("metadata.json"))
    notice = archive.read("NOTICE").decode()
    assert metadata["sources"] == ["emoji-datasource-google 16.0.0", "emojibase-data 17.0.0"]
    for name in [*metadata["sources"], metadata["made_by"], "Noto Emoji", "CLDR", "Cal Henderson", "Miles Johnson"]:
        assert name in notice, name
    for licence in ["Apache License", "UNICODE LICENSE V3", "MIT License", "Permission is hereby granted"]:
        assert licence in notice, licence


def test_repository_notice_names_what_the_zip_holds(archive):
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    for source in json.loads(archive.read("metadata.json"))["sources"]:
        assert source in notice


# Unpacked.


def test_unpacked_records_are_llava_records_in_the_order_of_the_split(unpacked, records):
    for split in ("train", "heldout"):
        written = json.loads((unpacked / f"{split}.json").read_bytes())
        for got, record in zip(written, of_split(records, split), strict=True):
            human, gpt = got["conversations"]
            assert got["id"] == record["hexcode"] and got["image"] == f"images/{record['hexcode']}.png"
            assert human["from"] == "human" and human["value"].startswith("<image>\n")
            assert gpt == {"from": "gpt", "value": record["caption"]}


def test_pictures_are_rgb_of_32_px_on_white_and_not_blank(unpacked, pictures):
    assert len(list((unpacked / "images").iterdir())) == len(pictures)
    for caption, picture in pictures.items():
        assert picture.mode == "RGB" and picture.size == (32, 32)
        assert max(ImageStat.Stat(picture).stddev) > 10, caption
        assert picture.getpixel((0, 0)) == (255, 255, 255), caption


def test_pictures_differ_unless_noto_draws_them_alike(pictures, records):
    drawn = Counter(picture.tobytes() for picture in pictures.values())
    alike = [r for r in records if drawn[pictures[r["caption"]].tobytes()] > 1]
    assert len(drawn) == 2251
    assert {r["caption"].split(":")[0] for r in alike} == {"snowboarder", "family"}
    assert {r["split"] for r in alike} == {"train"}


def test_pictures_get_darker_with_the_named_skin_tone(pictures):
    brightness = {caption: sum(ImageStat.Stat(picture).mean) for caption, picture in pictures.items()}
    bases = [c for c in brightness if f"{c}: dark skin tone" in brightness and c != "snowboarder"]
    assert len(bases) == 280
    assert [c for c in bases if brightness[f"{c}: light skin tone"] <= brightness[f"{c}: dark skin tone"]] == []
    hand = [brightness[f"raised hand: {tone} skin tone"] for tone in TONES]
    assert hand == sorted(hand, reverse=True)


def test_tokenizer_gives_all_captions_back_without_byte_pieces(unpacked, records):
    model = sentencepiece.SentencePieceProcessor(model_file=str(unpacked / "tokenizer.model"))
    for record in records:
        ids = model.encode(record["caption"])
        assert model.decode(ids) == record["caption"]
        assert not any(model.is_byte(i) or model.is_unknown(i) for i in ids)


@pytest.mark.parametrize("trained", ["shipped", "now"])
def test_tokenizer_has_the_settings_of_llamas(archive, records, trained):
    train = [r["caption"] for r in of_split(records, "train")]
    proto = archive.read("tokenizer.model") if trained == "shipped" else packer.tokenizer(train, 512)
    model = sentencepiece.SentencePieceProcessor(model_proto=proto)
    assert model.vocab_size() == 512
    assert (model.unk_id(), model.bos_id(), model.eos_id(), model.pad_id()) == (0, 1, 2, -1)
    assert model.encode("hand", out_type=str)[0].startswith("\u2581")  # dummy prefix
    assert model.decode(model.encode("\u00c9 \uff21  !")) == "\u00c9 \uff21  !"  # byte fallback, nothing normalised


def test_unpack_twice_keeps_the_folder(unpacked):
    before = {path: path.stat().st_mtime_ns for path in unpacked.rglob("*")}
    assert emoji.unpack(unpacked) == unpacked
    assert {path: path.stat().st_mtime_ns for path in unpacked.rglob("*")} == before


# Unpacking when something is in the way: on a small stand-in for the zip's files, as only folders matter here.


@pytest.fixture
def few(monkeypatch):
    contents = {"train.json": b"[]", "images/A.png": b"picture"}
    monkeypatch.setattr(emoji, "files", lambda content: contents)
    return contents


def test_unpack_leaves_nothing_but_the_folder(few, tmp_path):
    folder = emoji.unpack(str(tmp_path / "data"))
    assert list(tmp_path.iterdir()) == [folder]
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert names == {*few, "manifest.json"}


@pytest.mark.parametrize("make", ["file", "foreign", "other version", "missing", "changed"])
def test_unpack_refuses_a_folder_that_is_not_its_own_complete_copy(few, tmp_path, make):
    folder = tmp_path / "data"
    if make == "file":
        folder.write_text("mine")
    elif make == "foreign":
        folder.mkdir()
        (folder / "mine").write_text("mine")
    else:
        emoji.unpack(folder)
    if make == "other version":
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(manifest | {"emoji.zip": "0" * 64}))
    elif make == "missing":
        (folder / "images" / "A.png").unlink()
    elif make == "changed":
        (folder / "train.json").write_text("[1]")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=r"data.*(delete|name another folder)"):
        emoji.unpack(folder)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_unpack_keeps_files_that_the_user_added(few, tmp_path):
    folder = emoji.unpack(tmp_path / "data")
    (folder / "features.npy").write_bytes(b"mine")
    assert (emoji.unpack(folder) / "features.npy").read_bytes() == b"mine"


def test_interrupted_unpack_leaves_no_folder(few, tmp_path, monkeypatch):
    real = Path.write_bytes

    def fail(path, content):
        assert tmp_path in path.parents  # a folder elsewhere might lie on another disk, where a rename cannot reach
        if path.name == "A.png":
            raise OSError("disk full")
        return real(path, content)

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        emoji.unpack(tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


def test_unpack_accepts_the_copy_of_a_process_that_was_first(few, tmp_path, monkeypatch):
    real = emoji.write

    def write_and_be_overtaken(folder, contents, version):
        real(folder, contents, version)
        real(tmp_path / "data", contents, version)

    monkeypatch.setattr(emoji, "write", write_and_be_overtaken)
    assert emoji.unpack(tmp_path / "data") == tmp_path / "data"
    assert list(tmp_path.iterdir()) == [tmp_path / "data"]


# The packer, on two fake packages: three bases of one colour each, darker with the tone; "ear" is drawn alike for all.


def fake_entries():
    """Each base with its variants (order, hexcode, tone); "ear" has an FE0F that emojibase-data leaves out."""
    for order, base in enumerate(COLOURS):
        stem = base.removesuffix("-FE0F")
        yield order, base, [(order + (i + 1) / 10, f"{stem}-{m}", i) for i, m in enumerate(MODIFIERS)]


def fake_google(root):
    """emoji-datasource-google with 18 pictures of the group, and one of another."""
    emojis = [{"unified": "1F436", "image": "1f436.png", "has_img_google": True}]
    paint = {"1f436.png": (9, 9, 9)}
    for _, base, variants in fake_entries():
        entry = {"unified": base, "image": f"{base.lower()}.png", "has_img_google": True, "skin_variations": {}}
        paint[entry["image"]] = COLOURS[base]
        for _, hexcode, i in variants:
            name = f"{hexcode.lower()}.png"
            entry["skin_variations"][hexcode[-5:]] = {"unified": hexcode, "image": name, "has_img_google": True}
            scale = 1 if LABELS[base] == "ear" else 1 - 0.15 * (i + 1)
            paint[name] = tuple(int(c * scale) for c in COLOURS[base])
        emojis.append(entry)
    (root / "img" / "google" / "64").mkdir(parents=True)
    for name, colour in paint.items():
        picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
        picture.paste((*colour, 255), (8, 8, 56, 56))
        picture.save(root / "img" / "google" / "64" / name)
    (root / "emoji.json").write_text(json.dumps(emojis))
    (root / "package.json").write_text(json.dumps({"name": "emoji-datasource-google", "version": "1.2.3"}))
    return root


def fake_names():
    """data.json of emojibase-data: the same, not in order, and one emoji without a picture."""
    named = [{"label": "dog", "hexcode": "1F436", "group": 3, "order": 0}, {"label": "letter", "hexcode": "1F1E6"}]
    named.append({"label": "too new", "hexcode": "1FAEF", "group": 1, "order": 9})
    for order, base, variants in fake_entries():
        label = LABELS[base]
        skins = [
            {"label": f"{label}: {TONES[i]} skin tone", "hexcode": hexcode, "group": 1, "order": place}
            for place, hexcode, i in variants
        ]
        entry = {"label": label, "hexcode": base.removesuffix("-FE0F"), "group": 1, "order": order, "skins": skins}
        named.insert(0, entry)
    return named


def write_names(root, named):
    (root / "en").mkdir(parents=True, exist_ok=True)
    (root / "en" / "data.json").write_text(json.dumps(named))
    (root / "package.json").write_text(json.dumps({"name": "emojibase-data", "version": "4.5.6"}))
    return root


@pytest.fixture
def config(tmp_path):
    (tmp_path / "NOTICE").write_text("emoji-datasource-google 1.2.3, emojibase-data 4.5.6")
    return packer.Config(
        pictures=fake_google(tmp_path / "google"),
        names=write_names(tmp_path / "names", fake_names()),
        out=tmp_path / "emoji.zip",
        notice=tmp_path / "NOTICE",
        colours=64,
        heldout=4,
        vocab=285,
    )


def test_packing_twice_gives_equal_bytes(config, tmp_path):
    """Once here, and once from .tgz files in a process with another hash seed, through the command line."""
    tgz = {}
    for name in ("pictures", "names"):
        tgz[name] = tmp_path / f"{name}.tgz"
        with tarfile.open(tgz[name], "w:gz") as tar:
            tar.add(getattr(config, name), "package")
    options = {"--notice": config.notice, "--out": tmp_path / "b.zip", "--colours": 64, "--heldout": 4, "--vocab": 285}
    flat = [str(word) for pair in options.items() for word in pair]
    command = [sys.executable, str(ROOT / "recipes" / "pack_emoji.py"), str(tgz["pictures"]), str(tgz["names"]), *flat]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": "7"}, stdout=subprocess.DEVNULL)
    packer.main(config)
    assert (tmp_path / "b.zip").read_bytes() == config.out.read_bytes()
    assert {info.date_time for info in zipfile.ZipFile(config.out).infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_packed_emoji_come_back_with_their_own_colour_and_caption(config):
    files = emoji.files(packer.pack(config))
    records = json.loads(files["train.json"]) + json.loads(files["heldout.json"])
    assert len(records) == 18
    for record in records:
        caption = record["conversations"][1]["value"]
        label, _, tone = caption.partition(": ")
        base = next(base for base, name in LABELS.items() if name == label)
        step = TONES.index(tone.removesuffix(" skin tone")) + 1 if tone and label != "ear" else 0
        picture = Image.open(io.BytesIO(files[record["image"]]))
        assert picture.size == (32, 32) and min(picture.getpixel((0, 0))) > 250
        expected = [int(c * (1 - 0.15 * step)) for c in COLOURS[base]]
        assert all(abs(a - b) <= 3 for a, b in zip(picture.getpixel((16, 16)), expected, strict=True)), caption


def test_scaling_averages_neighbours_and_clear_pixels_are_white():
    picture = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    for x in range(0, 64, 2):
        picture.paste((0, 0, 0, 255), (x, 0, x + 1, 32))
    png = io.BytesIO()
    picture.save(png, "PNG")
    scaled = packer.small(png.getvalue(), 32)
    assert all(abs(value - 127) < 12 for value in scaled.getpixel((16, 8)))
    assert scaled.getpixel((16, 24)) == (255, 255, 255)


def test_records_stand_in_unicode_order(config):
    archive = zipfile.ZipFile(io.BytesIO(packer.pack(config)))
    captions = [r["caption"] for r in json.loads(archive.read("records.json"))]
    assert captions[:3] == ["hand", "hand: light skin tone", "hand: medium-light skin tone"] and captions[12] == "ear"


def test_pictures_alike_are_never_held_out_and_three_variants_stay(config):
    archive = zipfile.ZipFile(io.BytesIO(packer.pack(config)))
    heldout = [r["caption"].split(":")[0] for r in json.loads(archive.read("records.json")) if r["split"] == "heldout"]
    assert Counter(heldout) == {"hand": 2, "nose": 2}


def test_heldout_variants_are_the_first_by_sha256_of_the_hexcode():
    records = [{"caption": "hand", "hexcode": "A", "base": "A"}]
    records += [{"caption": f"hand: {i}", "hexcode": f"A-{i}", "base": "A"} for i in range(25)]
    cells = [bytes([i]) for i in range(26)]
    ranked = sorted((f"A-{i}" for i in range(25)), key=lambda code: hashlib.sha256(code.encode()).hexdigest())
    assert packer.hold_out(records, cells, 6) == set(ranked[:6])


def test_tokenizer_is_trained_on_train_captions_only(config, monkeypatch):
    seen = []
    real = packer.tokenizer
    monkeypatch.setattr(packer, "tokenizer", lambda captions, vocab: seen.extend(captions) or real(captions, vocab))
    archive = zipfile.ZipFile(io.BytesIO(packer.pack(config)))
    train = [r["caption"] for r in json.loads(archive.read("records.json")) if r["split"] == "train"]
    assert seen == train and len(train) == 14


def test_packer_refuses_more_heldout_than_the_rule_allows(config):
    records = packer.select(fake_names(), dict.fromkeys(["1F600", *(f"1F600-{m}" for m in MODIFIERS)], ""))
    cells = [bytes([i]) for i in range(6)]
    assert len(packer.hold_out(records, cells, 2)) == 2
    with pytest.raises(ValueError, match="only 2 of 3 captions"):
        packer.hold_out(records, cells, 3)


def test_packer_refuses_a_heldout_word_that_train_lacks():
    records = [{"caption": "hand", "hexcode": "A"}, {"caption": "hand: dark", "hexcode": "B"}]
    with pytest.raises(ValueError, match=r"\['dark'\]"):
        packer.split(records, {"B"})


def test_packer_refuses_a_caption_that_occurs_twice(config):
    named = fake_names()
    named[0]["label"] = named[1]["label"]
    write_names(config.names, named)
    with pytest.raises(ValueError, match="captions that occur twice: .'nose'"):
        packer.pack(config)


def test_packer_refuses_swapped_packages(config):
    swapped = packer.Config(pictures=config.names, names=config.pictures, notice=config.notice)
    with pytest.raises(ValueError, match="emojibase-data 4.5.6, not emoji-datasource-google"):
        packer.pack(swapped)


def test_packer_refuses_a_folder_that_is_no_package(config, tmp_path):
    with pytest.raises(ValueError, match="no package.json"):
        packer.read_package(tmp_path, ("package.json",))


def test_packer_refuses_a_version_that_notice_does_not_name(config):
    config.notice.write_text("emoji-datasource-google 1.2.3, emojibase-data 4.5.5")
    with pytest.raises(ValueError, match="NOTICE does not name emojibase-data 4.5.6"):
        packer.pack(config)


def test_packer_refuses_a_zip_above_the_limit(monkeypatch):
    monkeypatch.setattr(packer, "LIMIT", 100)
    with pytest.raises(ValueError, match="above the limit of 100"):
        packer.zip_bytes({"noise": bytes(range(256))})


def test_packer_refuses_a_tokenizer_that_loses_text():
    model = packer.tokenizer(["hand: dark skin tone"], 275)
    with pytest.raises(ValueError, match="does not give 'a\\u2581b' back"):
        packer.check_tokenizer(model, ["hand", "a\u2581b"])  # the mark of a space decodes as a space
