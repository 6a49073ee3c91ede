"""The recipes that answer: lines in and out, resume, interrupts, commands of a conversation, and what they refuse."""

import ast
import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from warm import ENV, ROOT, recipe

from llava_fn.generate import assistant, conversation, decode, options, session
from llava_fn.generate.options import Decoding
from llava_fn.launch import cli
from llava_fn.launch.processes import World
from llava_fn.runs.guard import lock

infer, chat = recipe("infer"), recipe("chat")
D = Decoding(tokens=6)


@pytest.fixture
def config(weights, tmp_path, emojis):
    """Lines to answer, with their folder of images: plain ones, several images, text alone, history, base64."""
    names = [f"images/{p.name}" for p in sorted((emojis / "images").iterdir())[:4]]
    url = "data:image/png;base64," + base64.b64encode((emojis / names[0]).read_bytes()).decode()
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat"}]
    lines = [
        {"prompt": "What is it?", "image": names[0], "id": "first"},
        {"prompt": "Is <image> like <image>?", "image": names[1:3]},
        {"prompt": "Say a word."},
        {"conversations": [*turns, {"from": "human", "value": "And?"}], "image": names[3], "id": 4},
        {"prompt": "What is it?", "image": url},
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))
    model = options.ChatOptions((weights / "vicuna_v1",), device="cpu")
    return infer.Infer(model, D, json=path, images=emojis, out=tmp_path / "answers.jsonl", batch=2)


def rows(c):
    return [json.loads(x) for x in c.out.read_text().splitlines()]


def change(c, **more):
    return infer.replace(c, **more)


def test_lines_are_answered_as_each_alone_and_in_order(config):
    infer.main(config)
    got = rows(config)
    assert [r["line"] for r in got] == [1, 2, 3, 4, 5] and [r.get("id") for r in got] == ["first", None, None, 4, None]
    assert got[0]["answer"] == got[4]["answer"] and len({r["answer"] for r in got}) >= 3
    infer.main(change(config, batch=1, out=config.out.with_name("single.jsonl")))
    assert config.out.with_name("single.jsonl").read_text() == config.out.read_text()
    a = assistant.load(config.model)
    picture = conversation.picture(next(iter(sorted((config.images / "images").iterdir()))), a)
    *_, said = conversation.reply(a, conversation.ask(conversation.Chat(), "What is it?", [picture]), D)
    assert said.chat.turns[-1][1] == got[0]["answer"].strip()


def test_bad_lines_are_named_by_their_number_and_the_others_go_on(config, capsys):
    good = config.json.read_text().splitlines()
    bad = {
        '{"prompt": ': "not JSON",
        "[" * 100_000: "not JSON .maximum recursion depth",
        '{"prompt": "x", "id": "\\ud800"}': "not JSON .*surrogates not allowed",
        '{"prompt": "x", "id": NaN}': "not JSON .*Out of range",
        '{"prompt": "\udcff"}': "not JSON .*can't decode byte 0xff",
        "[]": "a line is an object with 'prompt'",
        '{"prompt": 3}': "'prompt' is 3",
        '{"prompt": "x", "conversations": []}': "or else with 'conversations'",
        '{"conversations": [3]}': "'conversations' is no list",
        '{"conversations": [{"from": "gpt", "value": "x"}]}': "turn 0 is from 'gpt'",
        '{"conversations": [{"from": "human", "value": 3}]}': "no list of objects with 'from' and a text 'value'",
        '{"conversations": [{"value": "x"}]}': "turn 0 is from None",
        '{"prompt": "x", "image": 7}': "'image' is 7",
        '{"prompt": "x", "image": "no.png"}': "no.png: cannot be read",
        json.dumps(json.loads(good[0]) | {"prompt": "<image> or <image>"}): "2 <image> .* but 1 images",
        '{"prompt": "x", "image": "data:image/png;base64,@"}': "no base64",
        json.dumps({"prompt": "word " * 3000}): "with tokens=6 for the answer that is over the context of 4096",
    }
    lines = "\n".join([*good[:2], *bad, "", *good[2:]])
    config.json.write_bytes(b"\xef\xbb\xbf" + lines.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=f"{len(bad)} of {len(good) + len(bad)} lines are bad"):
        infer.main(config)
    errors = capsys.readouterr().err
    for number, said in enumerate(bad.values(), 3):
        assert re.search(f"questions.jsonl, line {number}: .*{said}", errors), (number, said)
    assert [r["line"] for r in rows(config)] == [1, 2, *(len(bad) + n for n in (4, 5, 6))]


def test_a_stopped_run_goes_on_and_ends_as_if_it_had_not_been(config, monkeypatch):
    infer.main(config)
    whole = config.out.read_text()
    config.out.write_text(whole[: whole.index("\n", whole.index("\n") + 1) + 20])  # killed inside the third row
    asked = []
    answers = conversation.answers
    monkeypatch.setattr(conversation, "answers", lambda a, chats, d: asked.append(len(chats)) or answers(a, chats, d))
    infer.main(config)
    assert config.out.read_text() == whole and asked == [2, 1]
    infer.main(config)
    assert config.out.read_text() == whole and asked == [2, 1]


def test_two_commands_do_not_write_one_file(config):
    with lock(config.out, config.out.with_name(config.out.name + ".lock"), World()):
        with pytest.raises(ValueError, match=f"is in use by process {os.getpid()} on .*name another"):
            infer.main(config)
    assert not config.out.exists()
    infer.main(config)


def test_answers_to_other_lines_or_with_other_options_are_not_mixed(config):
    infer.main(config)
    with pytest.raises(ValueError, match="was made with other options .decoding.seed: 0 -> 5.; name another --out"):
        infer.main(change(config, decoding=Decoding(tokens=6, seed=5)))
    lines = config.json.read_text().splitlines()
    config.json.write_text("\n".join(lines[:2] + ['{"prompt": "another"}'] + lines[3:]))
    with pytest.raises(ValueError, match="answers another line 3 than is asked now"):
        infer.main(config)


def test_answers_of_two_checkpoints_of_a_run_or_of_two_precisions_are_not_mixed(config, tmp_path, weights):
    c = change(config, model=options.ChatOptions((tmp_path / "run",), device="cpu"))
    shutil.copytree(weights / "vicuna_v1", tmp_path / "run/checkpoints/000007")
    infer.main(c)
    with pytest.raises(ValueError, match="other options .model.dtype: float32 -> bfloat16"):
        infer.main(change(c, model=infer.replace(c.model, dtype="bfloat16")))
    infer.main(change(c, model=infer.replace(c.model, dtype="float32")))
    shutil.copytree(weights / "vicuna_v1", tmp_path / "run/checkpoints/000008")
    with pytest.raises(ValueError, match="other options .model.weights: .*run/checkpoints/000007"):
        infer.main(c)


@pytest.mark.parametrize("content", ["notes", "notes\n", "[1]\n", '{"prompt": "x"}\n', '{"prompt": "x"}'])
def test_a_file_that_holds_no_answers_is_left_as_it_is(config, content):
    config.out.write_text(content)
    with pytest.raises(ValueError, match="answers.jsonl is no file of answers; name another --out"):
        infer.main(config)
    assert config.out.read_text() == content


def test_answers_are_read_back_whatever_line_breaks_stand_in_them(config, monkeypatch):
    monkeypatch.setattr(conversation, "visible", lambda *_: "one\u2028two\x85three\x1cfour\r\nfive")
    infer.main(config)
    whole = config.out.read_bytes()
    config.out.write_bytes(whole[:-9])
    infer.main(config)
    assert config.out.read_bytes() == whole


def test_ctrl_c_keeps_the_answers_of_whole_batches(config, monkeypatch, capsys):
    answers, calls = conversation.answers, []

    def stop_at_the_second(*args):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return answers(*args)

    monkeypatch.setattr(conversation, "answers", stop_at_the_second)
    with pytest.raises(SystemExit) as stopped:
        infer.main(config)
    assert stopped.value.code == 130 and "keeps what is done" in capsys.readouterr().err
    assert [r["line"] for r in rows(config)] == [1, 2]
    monkeypatch.undo()
    infer.main(config)
    assert [r["line"] for r in rows(config)] == [1, 2, 3, 4, 5]


def test_the_command_line_says_what_cannot_be_and_no_more(weights, monkeypatch):
    for module, kind in ((infer, infer.Infer), (chat, chat.Talk)):
        for flag in ("tokens", "context"):
            with pytest.raises(SystemExit, match=f"^error: {flag}=0: must be at least 1$"):
                start(module, kind, [], monkeypatch, "--weights", weights / "plain", f"--{flag}", 0)
        monkeypatch.setattr(sys, "stdin", None)
        with pytest.raises(SystemExit, match="the standard input, which is closed"):
            flags = ["--weights", str(weights / "plain"), *(["--json", "-"] if module is infer else [])]
            cli.run(module.main, cli.command(kind, module.__doc__, flags))


def test_samples_and_logprobs_are_in_the_line(config, capsys):
    infer.main(change(config, decoding=Decoding(tokens=5, temperature=1.0, samples=2, logprobs=True), out=None))
    got = [json.loads(x) for x in capsys.readouterr().out.splitlines()]
    assert len(got) == 5
    for r in got:
        assert len(r["answers"]) == 2 and r["answers"][0]["text"] == r["answer"]
        assert all(len(x["logprobs"]) == len(x["ids"]) and max(x["logprobs"]) <= 0 for x in r["answers"])


def test_one_question_is_answered_as_it_is_written(config, capsys, emojis):
    image = sorted((emojis / "images").iterdir())[0]
    one = infer.Infer(config.model, D, prompt="What is it?", image=(image,))
    infer.main(one)
    said = capsys.readouterr().out
    infer.main(config)
    assert said == rows(config)[0]["answer"] + "\n"
    infer.main(change(one, decoding=Decoding(tokens=6, beams=3, samples=2)))
    assert len(capsys.readouterr().out.split("\n")) >= 3


@pytest.mark.parametrize(
    "bad, said",
    [
        ({"prompt": "x"}, "give --json, or --prompt and --image"),
        ({"json": None}, "--out goes with --json"),
        ({"json": None, "out": None, "prompt": " "}, "nothing is asked; give --prompt, --image or both, or --json"),
        ({"json": None, "out": None, "prompt": "x", "decoding": Decoding(logprobs=True)}, "--logprobs goes with"),
        ({"batch": 0}, "batch=0"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(config, bad, said):
    with pytest.raises(ValueError, match=said):
        infer.main(change(config, **bad))


def start(module, kind, lines, monkeypatch, *args):
    """The recipe with a command line and the lines of its standard input, as `python recipes/...` starts it."""
    text = "\n".join(lines).encode(errors="surrogateescape")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))
    cli.run(module.main, cli.command(kind, module.__doc__, ["--device", "cpu", *map(str, args)]))


def test_the_command_line_reads_lines_from_stdin_and_its_exit_status_tells_of_a_bad_one(weights, monkeypatch, capsys):
    lines = ['{"prompt": "Hello"}', "not json"]
    flags = ("--weights", weights / "plain", "--template", "vicuna_v1", "--json", "-", "--tokens", 3)
    with pytest.raises(SystemExit, match="error: 1 of 2 lines are bad"):
        start(infer, infer.Infer, lines, monkeypatch, *flags)
    said = capsys.readouterr()
    assert "-, line 2: not JSON" in said.err and "stage 1" in said.err
    assert [json.loads(x)["line"] for x in said.out.splitlines()] == [1]


def test_chat_talks_in_a_plain_terminal(weights, emojis, tmp_path, monkeypatch, capsys):
    image = sorted((emojis / "images").iterdir())[0]
    bad = ["not \udcff text", "/image none.png"]
    lines = ["What?", "/help", *bad, f"/image {image}", "Is it?", f"/save {tmp_path / 'talk.json'}", "/exit", "no"]
    flags = ("--weights", weights / "vicuna_v1", "--tokens", 5, "--image", image)
    start(chat, chat.Talk, lines, monkeypatch, *flags)
    said = capsys.readouterr()
    assert "not valid Unicode" in said.err and "none.png: cannot be read" in said.err
    assert "talk.json: 4 turns" in said.out and "/undo  " in said.out
    for more in (["--beams", 2], ["--temperature", 1, "--samples", 2], ["--logprobs"]):
        with pytest.raises(SystemExit, match="one answer at a time, as text; leave beams, samples and logprobs out"):
            start(chat, chat.Talk, lines, monkeypatch, *flags, *more)
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert saved["image"] == [str(image)] * 2 and [t["from"] for t in saved["conversations"]] == ["human", "gpt"] * 2
    assert saved["conversations"][2]["value"] == "<image>\nIs it?"


@pytest.fixture
def talk(weights, emojis):
    """The assistant, and a function from lines to the session after them."""
    a = assistant.load(options.ChatOptions((weights / "vicuna_v1",), device="cpu"))

    def say(*lines, s=session.Session()):
        for line in lines:
            s = session.turn(a, s, line, D)
        return s

    return a, say, [str(p) for p in sorted((emojis / "images").iterdir())[:3]]


def test_commands_of_a_conversation(talk):
    a, say, images = talk
    s = say(f"/image {images[0]}", "What?", f"/image {images[1]}", f"/image {images[2]}", "Is <image> like <image>?")
    assert len(s.chat.turns) == 4 and len(s.chat.pictures) == 3 and s.waiting == () and list(s.names) == images
    back = say("/undo", s=s)
    assert len(back.chat.turns) == 2 and back.names == (images[0],) and len(back.chat.pictures) == 1
    assert say("/undo", "/undo", "/undo", s=s).chat.turns == ()
    clear = say(f"/image {images[0]}", "/clear", s=s)
    assert (clear.chat.turns, clear.waiting, clear.names) == ((), (), ()) and clear.chat.feats
    assert say("", "   ", s=s) == s


def test_a_bad_turn_changes_nothing(talk, tmp_path):
    a, say, images = talk
    s = say(f"/image {images[0]}", "What?")
    (tmp_path / "there.json").write_text("x")
    for line, said in (
        ("/image", "/image wants the path of a file behind it"),
        ("/save ", "/save wants the path of a file behind it"),
        ("/imag x", "no command '/imag'; there are /image, /undo"),
        ("a <image>", "1 <image> in the question but 0 images"),
        (f"/save {tmp_path / 'there.json'}", "there.json exists"),
        ("word " * 3000, "over the context of 4096"),
    ):
        with pytest.raises(ValueError, match=said):
            say(line, s=s)
    assert say("Again?", s=s).chat.turns[:2] == s.chat.turns


def test_ctrl_c_keeps_what_was_said(talk, monkeypatch, capsys):
    a, say, images = talk
    reply = conversation.reply

    def stopped(n):
        def pieces(*args):
            for j, said in enumerate(reply(*args)):
                if j == n:
                    raise KeyboardInterrupt
                yield said

        monkeypatch.setattr(conversation, "reply", pieces)

    whole = say("What?")
    stopped(3)
    s = say("What?")
    assert whole.chat.turns[1][1].startswith(s.chat.turns[1][1]) and s.chat.turns != whole.chat.turns
    assert "[stopped]" in capsys.readouterr().out
    monkeypatch.setattr(conversation, "reply", reply)
    fresh = conversation.Chat(s.chat.turns)
    *_, want = reply(a, conversation.ask(fresh, "And?"), D)
    assert say("And?", s=s).chat.turns == want.chat.turns
    stopped(0)
    assert say("And?", s=s).chat.turns == s.chat.turns


def test_ctrl_c_before_the_first_word_leaves_nothing_of_the_question_behind(talk, monkeypatch):
    a, say, images = talk
    asked = say("What is it?")
    with monkeypatch.context() as patch:
        patch.setattr(decode, "steps", interrupted)  # the prompt has been computed
        back = say("/undo", "Whose?", s=asked)
    assert back.chat.turns == () and say("What is it?", s=back).chat.turns == asked.chat.turns


def interrupted(*_):
    raise KeyboardInterrupt


def test_a_caption_model_says_so_and_takes_a_picture_at_a_time(weights, emojis):
    a = assistant.load(options.ChatOptions((weights / "plain",), device="cpu"))
    images = [str(p) for p in sorted((emojis / "images").iterdir())[:2]]
    s = session.turn(a, session.Session(), f"/image {images[0]}", D)
    s = session.turn(a, s, "", D)
    s = session.turn(a, s, f"/image {images[1]}", D)
    s = session.turn(a, s, "what is it?", D)
    assert len(s.chat.turns) == 2 and s.names == (images[1],)
    with pytest.raises(ValueError, match="writes a caption for an image; /image PATH gives it one"):
        session.turn(a, s, "and now?", D)


def test_an_interrupt_of_the_process_ends_with_130(config, tmp_path, warm):
    lines = [json.dumps({"prompt": f"Say {j}"}) for j in range(400)]
    config.json.write_text("\n".join(lines))
    argv = [ROOT / "recipes/infer.py", "--device", "cpu", "--weights", config.model.weights[0],
            "--json", config.json, "--out", config.out, "--batch", "1", "--tokens", "200"]  # fmt: skip
    strike = signal.SIGINT, config.out.name, 2
    child = warm.start(argv, config.out.parent, ENV, tmp_path / "said", strike=strike)
    assert warm.wait(child) == 130 and "keeps what is done" in (tmp_path / "said").read_text()
    assert config.out.read_text().endswith("\n")


FLAGS = {  # one of each recipe's own
    "infer": "json", "chat": "image", "look": "heads", "patch": "window", "attribute": "damping", "score_data": "order",
    "serve": "host", "evaluate": "rules.choice", "validate": "unpack", "pretrain": "optim.lr",
    "finetune": "heldout.share",
}  # fmt: skip
HELP = """import contextlib, io, runpy, sys
for sys.argv in [[path, "--help"] for path in sys.argv[1:]]:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as shown:
        runpy.run_path(sys.argv[0], run_name="__main__")
    print(repr((shown.getvalue(), [name for name in ("torch", "tensordict", "numpy") if name in sys.modules])))
"""


def test_help_does_not_wait_for_torch():
    """`import torch` takes seconds."""
    command = [sys.executable, "-c", HELP, *(str(ROOT / f"recipes/{name}.py") for name in FLAGS)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stderr
    for (name, flag), line in zip(FLAGS.items(), done.stdout.splitlines(), strict=True):
        shown, loaded = ast.literal_eval(line)
        assert f"--{flag} " in shown and loaded == [], name
