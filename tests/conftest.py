"""A tokenizer, a tiny model and a tiny data set that the tests of data, training and checkpoints share."""

import io
import json
import multiprocessing
import os
import shutil
import zipfile
from importlib import resources

import hypothesis
import pytest
import torch
from pretraining import Launcher
from warm import Warm

from llava_fn import config, llava, spec, tree
from llava_fn.checkpoint import folder as checkpoint
from llava_fn.data import emoji
from llava_fn.data import records as data
from llava_fn.data.options import Source
from llava_fn.data.tokenizer import open_tokenizer

hypothesis.settings.register_profile("untimed", hypothesis.settings.default, deadline=None)  # the machine may be busy
hypothesis.settings.load_profile("untimed")
# one: two workers run the tests, on the two cores of a small machine; another number checks what follows from it
torch.set_num_threads(int(os.environ.get("LLAVA_FN_TEST_THREADS", "1")))
# what ranks and workers of the data set import, once for all of them: see warm.ranks
multiprocessing.set_forkserver_preload(["torch", "tensordict", "torchdata.nodes", "llava_fn.train"])
CONTENT = resources.files("llava_fn.data").joinpath("emoji.zip").read_bytes()
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
LONGEST = (
    "test_default_runs.py",
    "test_docs.py",
    "test_npu_contract.py",
    "test_mesh.py",
    "test_many.py",
)  # begin first


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def warm():
    """Starts recipes without the seconds of their imports."""
    with Warm() as warm:
        yield warm


@pytest.fixture(scope="session")
def launcher(warm):
    return Launcher(warm)


@pytest.fixture(scope="module")  # while it is open, no other loop of asyncio can run
def browser():
    """Chromium, which fetches nothing by itself."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as p:
        opened = p.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def tiny():
    return config.Llava(
        config.Vision(image=16, patch=8, width=16, blocks=2, heads=2, ffn=32),
        config.Llama(vocab=512, width=16, blocks=2, heads=2, kv_heads=1, ffn=32),
    )


@pytest.fixture(scope="session")
def tokenizer():
    return open_tokenizer(zipfile.ZipFile(io.BytesIO(CONTENT)).read("tokenizer.model"))


@pytest.fixture(scope="session")
def emojis(tmp_path_factory, tokenizer):
    """A folder: train.json (12 records), heldout.json (3), images/, tokenizer.model. Read it, never write to it."""
    folder = tmp_path_factory.mktemp("emojis")
    archive = zipfile.ZipFile(io.BytesIO(CONTENT))
    packed = json.loads(archive.read("records.json"))[:15]
    (folder / "images").mkdir()
    for record, picture in zip(packed, emoji.cut(archive.read("sheet.png"), 15, 32, 48), strict=True):
        (folder / emoji.image_name(record)).write_bytes(picture)
    records = [emoji.conversation(record) for record in packed]
    (folder / "train.json").write_text(json.dumps(records[:12]))
    (folder / "heldout.json").write_text(json.dumps(records[12:]))
    (folder / "tokenizer.model").write_bytes(tokenizer.model)
    return folder


@pytest.fixture(scope="session")
def how(tiny, tokenizer):
    return data.Preparation(tokenizer, "plain", None, "square", tiny.vision.image, tiny.vision.patches, 64)


@pytest.fixture(scope="session")
def samples(emojis, how):
    return [data.sample(r, how) for r in data.read(Source(emojis / "train.json", emojis))]


@pytest.fixture(scope="session")
def lively(tiny):
    """Weights of `tiny` that answer different prompts differently, and not with one token again and again."""
    rng = torch.Generator().manual_seed(3)
    shapes = spec.init(llava.spec(tiny), 0)
    return tree.rebuild(shapes, [torch.randn(x.shape, generator=rng) * 0.7 for x in tree.values(shapes)])


@pytest.fixture(scope="session")
def weights(tiny, tokenizer, lively, tmp_path_factory):
    """Template -> a checkpoint of ours that was trained with it. Read it, never write to it."""
    folder = tmp_path_factory.mktemp("weights")
    for template, mode in (("plain", "square"), ("vicuna_v1", "pad")):
        manifest = checkpoint.Manifest(tiny, ("vision", "projector", "llama"), mode, template, None, step=7)
        checkpoint.save(folder / template, manifest, lively, None, tokenizer.model)
    return folder
