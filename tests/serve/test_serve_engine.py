"""Continuous batching: each answer is what its prompt alone gives, whatever comes and goes beside it."""

import dataclasses
import queue
import threading

import pytest
from serving import steps_take

from llava_fn import cache, llama, tree
from llava_fn.generate import assistant, conversation, sampling
from llava_fn.generate.conversation import Chat, ask, picture
from llava_fn.generate.family import Family
from llava_fn.generate.graph import Graphs
from llava_fn.generate.options import ChatOptions, Decoding
from llava_fn.serve import engine
from llava_fn.serve.options import Limits
from llava_fn.serve.pages import Claim, Pages, Stored
from llava_fn.serve.refused import Refused
from llava_fn.serve.seat import AnswerRequest
from llava_fn.serve.worker import Ticket, Worker

OPTIONS = (
    Decoding(tokens=9),
    Decoding(tokens=14, temperature=1.0, seed=5),
    Decoding(tokens=11, temperature=1.5, top_p=0.7, seed=6, repetition_penalty=3.0),
    Decoding(tokens=1, logprobs=True),
    Decoding(tokens=17, temperature=1.0, seed=7, logprobs=True),
)


@pytest.fixture(scope="module")
def a(weights):
    return assistant.load(ChatOptions((weights / "vicuna_v1",), device="cpu", context=256))


@pytest.fixture(scope="module")
def chats(a, emojis):
    """Of several lengths: an image, text alone, two images, a second turn, a system prompt of its own."""
    shots = [picture(path, a) for path in sorted((emojis / "images").iterdir())[:4]]
    first = ask(Chat(), "What is it?", shots[:1])
    return [
        first,
        ask(Chat(), "Say a word or two about nothing."),
        ask(Chat(), "Is <image> like <image>?", shots[1:3]),
        ask(dataclasses.replace(first, turns=(*first.turns, ("gpt", "A cat"))), "And?"),
        ask(Chat(system="Be brief."), "What?", shots[3:]),
    ]


def job(a, chat, d, name="x", sample=0):
    none = a.model.embed[:0]
    d = assistant.with_stop(a, d)
    prompt, keys = conversation.prompt(a, dataclasses.replace(chat, feats={p.key: none for p in chat.pictures}), d)
    return AnswerRequest((name, sample), prompt.ids, keys, chat.pictures, d, assistant.vocabulary(a))


def alone(a, chat, d):
    """ids, text, logprobs, ended: by the functions that answer one batch at a time."""
    chat = dataclasses.replace(chat, feats=conversation.features(a, chat.pictures, {}))
    ((text,),) = conversation.answers(a, [chat], d)
    return text.ids, text.text, text.logprobs, text.ended


class Collected:
    """The pieces of all answers, put together."""

    def __init__(self):
        self.ids, self.text, self.logprobs, self.finish = {}, {}, {}, {}

    def add(self, pieces):
        for p in pieces:
            assert self.finish.get(p.name) is None, "a piece after the end"
            self.ids[p.name] = self.ids.get(p.name, ()) + p.ids
            self.text[p.name] = self.text.get(p.name, "") + p.new
            self.logprobs[p.name] = self.logprobs.get(p.name, ()) + p.logprobs
            self.finish[p.name] = p.finish


def serve(a, jobs, slots, desk=None, every=1):
    """A new job every so many steps, if there is room for it."""
    desk, got, waiting, t = desk or engine.empty(Family(a), slots), Collected(), list(jobs), 0
    while waiting or desk.free < slots:
        if waiting and t % every == 0 and engine.takes(desk, waiting[0]):
            desk = engine.admit(Family(a), desk, waiting.pop(0))
        desk, pieces = engine.step(Family(a), desk)
        got.add(pieces)
        t += 1
    return desk, got


def captured(a):
    """The assistant with steps that stand in for captured ones: they run again on the same tensors."""
    launcher = Graphs(lambda warm, step: (warm(), step)[1])
    return dataclasses.replace(a, model=dataclasses.replace(a.model, launcher=launcher))


@pytest.mark.parametrize(
    "slots, every, chunk, late, pages",
    [(1, 1, 1024, False, None), (3, 2, 11, True, Pages(8, 45, True)), (16, 1, 64, True, Pages(8, 52, False))],
)
def test_each_answer_is_what_its_prompt_alone_gives(a, chats, slots, every, chunk, late, pages, monkeypatch):
    """Prompts in one piece or in chunks, tokens read at once or while the next ones are chosen.

    In fewer pages than the context of each slot has: rows that share them, and rows that do not.
    """
    rows = rows_computed(monkeypatch)
    served = captured(a) if slots == 3 else a
    desk = engine.empty(Family(served), slots, chunk, late, pages)
    assert pages is None or pages.count < slots * a.context // pages.size
    asked = {(f"{i}-{j}", 0): (chat, d) for i, chat in enumerate(chats) for j, d in enumerate(OPTIONS)}
    _, got = serve(served, [job(a, chat, d, *name) for name, (chat, d) in asked.items()], slots, desk, every)
    assert 0 < max(rows) <= chunk
    assert got.ids.keys() == asked.keys() and len(set(got.ids.values())) > 15
    for name, (chat, d) in asked.items():
        ids, text, logprobs, ended = alone(a, chat, d)
        assert (got.ids[name], got.text[name]) == (ids, text), name
        assert got.finish[name] == ("stop" if ended else "length")
        assert got.logprobs[name] == pytest.approx(logprobs, abs=1e-4)


def test_a_stop_text_ends_one_answer_and_not_its_neighbours(a, chats):
    d = Decoding(tokens=25)
    free = alone(a, chats[1], d)[1]
    stop = free[4:6]
    _, got = serve(a, [job(a, chats[1], d, "free"), job(a, chats[1], dataclasses.replace(d, stop=(stop,)), "cut")], 2)
    assert got.text == {("free", 0): free, ("cut", 0): free[: free.index(stop)]}
    assert got.finish["cut", 0] == "stop"


def test_an_answer_may_fill_the_context_to_the_last_token(a, chats):
    chat = chats[1]
    d = Decoding(tokens=a.context - len(job(a, chat, Decoding(tokens=1)).ids), temperature=1.0)
    jobs = [job(a, chat, d, "full"), *(job(a, c, OPTIONS[1], f"{j}") for j, c in enumerate(chats * 2))]
    _, got = serve(a, jobs, 2)
    assert got.ids["full", 0] == alone(a, chat, d)[0]
    assert got.finish["full", 0] == "length"
    assert got.ids["4", 0] == alone(a, chats[4], OPTIONS[1])[0]


def rows_computed(monkeypatch):
    rows, prefill = [], llama.prefill
    monkeypatch.setattr(llama, "prefill", lambda p, x, *rest: rows.append(len(x)) or prefill(p, x, *rest))
    return rows


def test_samples_of_a_question_compute_its_prompt_once(a, chats, monkeypatch):
    d, rows = Decoding(tokens=8, temperature=1.5), rows_computed(monkeypatch)
    jobs = [job(a, chats[2], dataclasses.replace(d, seed=s), "x", s) for s in range(3)]
    _, got = serve(a, jobs, 4)
    assert rows == [len(jobs[0].ids), 1, 1]
    for s in range(3):
        assert got.ids["x", s] == alone(a, chats[2], dataclasses.replace(d, seed=s))[0]
    assert len(set(got.ids.values())) == 3


def test_prompts_that_came_together_are_prefilled_together_and_equal_ones_after_each_other(a, chats, monkeypatch):
    d, rows, desk = Decoding(tokens=8, temperature=1.5), rows_computed(monkeypatch), engine.empty(Family(a), 4)
    jobs = [job(a, chats[0], d), job(a, chats[4], d, "y"), job(a, chats[0], dataclasses.replace(d, seed=1), "z")]
    for each in jobs[:2]:
        assert engine.takes(desk, each)
        desk = engine.admit(Family(a), desk, each)
    assert not engine.takes(desk, jobs[2])
    desk, pieces = engine.step(Family(a), desk)
    assert engine.takes(desk, jobs[2]) and {p.name[0] for p in pieces} == {"x", "y"}
    serve(a, jobs[2:], 4, desk)
    assert rows == [len(jobs[0].ids) + len(jobs[1].ids), 1]


def test_warming_up_captures_every_step_that_requests_lead_to(a, chats):
    captures, slots = [], 3
    launcher = Graphs(lambda warm, step: captures.append(1) or step)
    f = Family(dataclasses.replace(a, model=dataclasses.replace(a.model, launcher=launcher)))
    desk = engine.warm(f, engine.empty(f, slots))
    assert len(captures) == 3 * len(engine.USED)  # 1, 2 and 3 rows
    assert desk.free == slots and not desk.pages.kept and not desk.feats
    jobs = [job(f.base, chat, d, f"{i}-{j}") for i, chat in enumerate(chats) for j, d in enumerate(OPTIONS)]
    serve(f.base, [j for j in jobs if not j.decoding.logprobs], slots, desk)
    assert len(captures) == 3 * len(engine.USED)


def test_a_step_on_a_card_does_not_make_the_host_wait(a, chats, monkeypatch):
    """Tensors without values stand for the card's: to read one is an error. A step sends lengths and random numbers."""
    params = tree.rebuild(a.model.params, [x.to("meta") for x in tree.values(a.model.params)])
    f = Family(dataclasses.replace(a, model=dataclasses.replace(a.model, params=params)))
    monkeypatch.setattr(engine.decode, "fetch", lambda x: lambda: [[5.0]] * len(x))
    sent = []
    for module in (engine, cache, sampling):
        monkeypatch.setattr(module, "to_device", lambda x, device: sent.append(x.shape) or x.to(device))
    desk = engine.empty(f, 2)
    for j in (0, 1):
        desk = engine.admit(f, desk, job(a, chats[j], Decoding(tokens=9, temperature=1.0), f"{j}"))
    counts = []
    for _ in range(4):
        sent.clear()
        desk, pieces = engine.step(f, desk)
        counts.append((len(pieces), len(sent)))
    assert counts == [
        (0, 6),
        (2, 4),
        (2, 0),
        (2, 0),
    ]  # pages, lengths, options, random numbers: when the requests change


def test_a_long_prompt_does_not_hold_up_the_answers_under_way(a, chats, monkeypatch):
    desk, pieces, rows = engine.empty(Family(a), 3, chunk=4), [], rows_computed(monkeypatch)
    desk = engine.admit(Family(a), desk, job(a, chats[1], Decoding(tokens=40, temperature=2.0), "x"))
    while not pieces:
        desk, pieces = engine.step(Family(a), desk)
    long = job(a, chats[2], Decoding(tokens=2), "y")
    desk = engine.admit(Family(a), desk, long)
    assert not engine.takes(desk, job(a, chats[4], Decoding(tokens=2), "z"))
    names, rows[:] = [], []
    while ("y", 0) not in names:
        desk, pieces = engine.step(Family(a), desk)
        names += [p.name for p in pieces]
    assert max(rows) == 4 and len(rows) == names.count(("x", 0)) > 3
    assert sum(rows) == len(long.ids) - conversation.common_prefix(long.keys, job(a, chats[1], Decoding(tokens=1)).keys)


def test_a_released_answer_is_not_read_into_the_next_one_of_its_slot(a, chats):
    desk = engine.admit(Family(a), engine.empty(Family(a), 1, late=True), job(a, chats[0], Decoding(tokens=9), "x"))
    desk, pieces = engine.step(Family(a), desk)
    assert not pieces and desk.flights
    _, got = serve(a, [job(a, chats[1], Decoding(tokens=9), "y")], 1, engine.release(desk, "x"))
    assert list(got.ids) == [("y", 0)] and got.ids["y", 0] == alone(a, chats[1], Decoding(tokens=9))[0]


def test_the_next_turn_computes_only_what_is_new(a, chats, monkeypatch):
    d = Decoding(tokens=8)
    desk, got = serve(a, [job(a, chats[0], d)], 3)
    turns = (*chats[0].turns, ("gpt", got.text["x", 0].strip()))
    after = ask(dataclasses.replace(chats[0], turns=turns), "And what else is there?")
    want, rows = alone(a, after, d)[0], rows_computed(monkeypatch)
    again = job(a, after, d, "y")
    _, got = serve(a, [again], 3, desk)
    assert got.ids["y", 0] == want
    assert rows[0] <= len(again.ids) - len(job(a, chats[0], d).ids)


def test_a_released_slot_is_free_and_the_others_go_on(a, chats):
    desk, got = engine.empty(Family(a), 2), Collected()
    for j in range(2):
        desk = engine.admit(Family(a), desk, job(a, chats[j], Decoding(tokens=12), f"{j}"))
    desk, pieces = engine.step(Family(a), desk)
    got.add(pieces)
    desk = engine.release(desk, "0")
    assert desk.free == 1
    _, rest = serve(a, [job(a, chats[2], Decoding(tokens=5), "2")], 2, desk)
    assert ("0", 0) not in rest.ids and rest.ids["2", 0] == alone(a, chats[2], Decoding(tokens=5))[0]
    assert got.ids["1", 0] + rest.ids["1", 0] == alone(a, chats[1], Decoding(tokens=12))[0]


def test_features_of_a_picture_are_computed_once(a, chats, monkeypatch):
    counts, features = [], conversation.decode.features
    monkeypatch.setattr(conversation.decode, "features", lambda m, x: counts.append(len(x)) or features(m, x))
    serve(a, [job(a, chats[i], Decoding(tokens=2), f"{j}") for j, i in enumerate((0, 0, 3, 2))], 1)
    assert counts == [1, 2]


def test_a_desk_has_a_slot_and_each_slot_a_page(a):
    with pytest.raises(ValueError, match="slots=0"):
        engine.empty(Family(a), 0)
    with pytest.raises(ValueError, match="cache_tokens=150 are 3 pages of 64 tokens, fewer than the 4 slots"):
        engine.pages_for(Family(a), 4, 150)
    assert (engine.pages_for(Family(a), 4).count, engine.pages_for(Family(a), 3, 150).count) == (4 * a.context // 64, 3)


def test_prompts_share_the_pages_of_what_they_have_in_common(a, chats, monkeypatch):
    """While the first answer is under way, and after it: whole pages are shared, and the one where they part copied."""
    d, rows = Decoding(tokens=12, temperature=1.5), rows_computed(monkeypatch)
    jobs = [job(a, chats[2], dataclasses.replace(d, seed=s), f"{s}") for s in range(3)]
    whole = (len(jobs[0].ids) - 1) // 8
    desk = engine.admit(Family(a), engine.empty(Family(a), 2, pages=Pages(8, 40, True)), jobs[0])
    desk, _ = engine.step(Family(a), desk)
    desk = engine.admit(Family(a), desk, jobs[1])
    first, second = (seat.pages for seat in desk.seats)
    assert first[:whole] == second[:whole] and not {*first[whole:]} & {*second[whole:]}
    desk, got = serve(a, [], 2, desk)
    desk, more = serve(a, jobs[2:], 2, desk)
    assert rows == [len(jobs[0].ids), 1, 1] and len(desk.pages.kept) == 3
    assert len({page for row in desk.pages.kept for page in row.pages}) < 2 * len(first)
    for (s, _), ids in (got.ids | more.ids).items():
        assert ids == alone(a, chats[2], dataclasses.replace(d, seed=int(s)))[0][-len(ids) :]


def test_a_prompt_waits_until_pages_are_free_and_takes_none_from_an_answer(a, chats):
    long, short = (job(a, chats[i], Decoding(tokens=20, temperature=2.0), f"{i}") for i in (0, 1))
    needed = Pages(8, 1, False).needed(len(long.ids) + 19)
    desk = engine.admit(Family(a), engine.empty(Family(a), 2, pages=Pages(8, needed + 2, False)), long)
    assert desk.free and engine.fits(desk, short) and not engine.takes(desk, short)
    desk, got = serve(a, [short], 2, desk)
    assert {*got.ids} == {("0", 0), ("1", 0)}
    for i in (0, 1):
        assert got.ids[f"{i}", 0] == alone(a, chats[i], Decoding(tokens=20, temperature=2.0))[0]


def stored(keys, *pages):
    return Stored(tuple(keys), pages)


def fits(pages, running, keys, tokens):
    return pages.fits(running, tokens, *pages.best(running, keys))


def test_pages_of_finished_answers_are_taken_in_the_order_of_their_last_use():
    pages = Pages(2, 6, True).keep(stored("abc", 1, 2, 6)).keep(stored("xyz", 3, 4))
    assert pages.kept[0].pages == (1, 2)  # as far as they hold something
    used, claim = pages.claim([], tuple("ab"), 3)
    assert claim == Claim((1, 5), 2, ((), ())) and used.kept == (pages.kept[1], pages.kept[0])
    running = [stored("ab", *claim.pages)]
    assert used.figures(running) == {"pages": 6, "busy_pages": 2, "kept_pages": 3}
    assert fits(used, running, tuple("klm"), 8) and not fits(used, running, tuple("klm"), 9)
    assert fits(used, running, tuple("abk"), 10) and not fits(used, running, tuple("abk"), 11)  # a page is shared
    used, claim = used.claim(running, tuple("klm"), 4)
    assert claim == Claim((3, 4), 0, ((), ())) and [row.pages for row in used.kept] == [(1, 2)]
    used, claim = used.claim(running, tuple("xyz"), 8)  # what it might have shared is gone
    assert claim == Claim((2, 3, 4, 6), 0, ((), ())) and not used.kept


@pytest.mark.parametrize(
    "shares, claim", [(True, Claim((1, 5, 6), 3, ((2,), (5,)))), (False, Claim((5, 6, 7), 3, ((1, 2), (5, 6))))]
)
def test_pages_in_which_prompts_part_are_copied_or_all_where_none_are_shared(shares, claim):
    pages = Pages(2, 8, shares).keep(stored("abcd", 1, 2)).keep(stored("q", 4))
    assert pages.claim([stored("", 8)], tuple("abcx"), 5)[1] == claim  # page 3 is free, but stands alone


def test_a_finished_answer_replaces_the_rows_that_it_goes_on_from():
    pages = Pages(2, 9, True).keep(stored("abc", 1, 2)).keep(stored("x", 3)).keep(stored("abcde", 1, 4, 5))
    assert [row.keys for row in pages.kept] == [("x",), tuple("abcde")] and pages.keep(stored("")) == pages


def test_a_request_that_never_fits_is_refused_with_the_numbers(a, chats):
    w = Worker(Family(a), 1, Limits(), cache_tokens=64)
    asked = job(a, chats[1], Decoding(tokens=100))
    with pytest.raises(
        Refused, match=rf"{len(asked.ids)} tokens; with 100 .* this server's cache of 64 \(--cache-tokens"
    ):
        Client(w, [asked], "x")


class Client:
    """What a worker sends to one request."""

    def __init__(self, worker, jobs, name, seconds=60.0):
        self.got = queue.Queue()
        worker.submit(Ticket.of(name, tuple(jobs), self.got.put, seconds))

    def next(self):
        return self.got.get(timeout=100)

    def all(self, answers=1):
        """All pieces, or why there are no more."""
        out, left = [], answers
        while left:
            out.append(self.next())
            left = 0 if isinstance(out[-1], Refused) else left - (out[-1].finish is not None)
        return out


@pytest.fixture
def worker(a):
    made = []

    def make(**more):
        made.append(Worker(Family(a), more.pop("slots", 2), Limits(**more)))
        made[-1].start()
        return made[-1]

    yield make
    for w in made:
        w.stop()


def text_of(pieces):
    return "".join(p.new for p in pieces)


def hold(monkeypatch):
    """The engine stands still before a step until the event is set."""
    go, step = threading.Event(), engine.step
    monkeypatch.setattr(engine, "step", lambda a, desk: go.wait(100) and step(a, desk))
    return go


def test_requests_wait_for_a_slot_and_are_all_answered(a, chats, worker):
    w = worker()
    clients = [Client(w, [job(a, chats[i % 5], OPTIONS[1], f"{i}")], f"{i}") for i in range(12)]
    want = [alone(a, chat, OPTIONS[1])[1] for chat in chats]
    assert [text_of(c.all()) for c in clients] == [want[i % 5] for i in range(12)]
    assert w.figures() | {"slots": 2, "free": 2, "waiting": 0, "busy_pages": 0} == w.figures()


def test_too_long_a_queue_is_refused(a, chats, worker, monkeypatch):
    go, w = hold(monkeypatch), worker(slots=1, queue=2)
    jobs = [[job(a, chats[1], OPTIONS[0], f"{i}")] for i in range(4)]
    first = Client(w, jobs[0], "0")
    while w.figures()["waiting"]:
        pass
    waiting = [Client(w, jobs[i], f"{i}") for i in (1, 2)]
    with pytest.raises(Refused, match="2 requests are waiting already") as refused:
        Client(w, jobs[3], "3")
    assert refused.value.status == 429
    go.set()
    assert len({text_of(c.all()) for c in (first, *waiting)}) == 1
    assert Client(w, jobs[3], "3").all()


def test_a_cancelled_request_frees_its_slot_and_its_place_in_the_queue(a, chats, worker):
    w = worker(slots=1, queue=1)
    endless = Client(w, [job(a, chats[1], Decoding(tokens=100, temperature=2.0), "long")], "long")
    endless.next()
    waiting = Client(w, [job(a, chats[1], OPTIONS[0], "w")], "w")
    w.cancel("w")
    w.cancel("long")
    w.cancel("never was")
    assert text_of(Client(w, [job(a, chats[0], OPTIONS[0], "y")], "y").all()) == alone(a, chats[0], OPTIONS[0])[1]
    assert waiting.got.empty()


def test_a_request_has_so_much_time_in_the_queue_and_in_its_slot(a, chats, worker, monkeypatch):
    steps_take(monkeypatch, 1)
    w = worker(slots=1)
    slow = Client(w, [job(a, chats[1], Decoding(tokens=100, temperature=2.0), "slow")], "slow", 20)
    waiting = Client(w, [job(a, chats[1], OPTIONS[0], "w")], "w", 5)
    *pieces, last = slow.all()
    assert last.status == 504 and 0 < len(pieces) < 100
    (refused,) = waiting.all()
    assert refused.status == 504
    assert text_of(Client(w, [job(a, chats[1], OPTIONS[0], "z")], "z").all()) == alone(a, chats[1], OPTIONS[0])[1]


def test_samples_end_each_for_itself(a, chats, worker):
    jobs = [job(a, chats[0], Decoding(tokens=3 + 4 * j, temperature=1.0, seed=j), "x", j) for j in range(3)]
    pieces = Client(worker(), jobs, "x").all(3)
    for j in range(3):
        mine = [p for p in pieces if p.name == ("x", j)]
        assert text_of(mine) == alone(a, chats[0], Decoding(tokens=3 + 4 * j, temperature=1.0, seed=j))[1]
        assert [p.finish is None for p in mine] == [True] * (len(mine) - 1) + [False]


def test_a_stopped_worker_refuses_what_it_has_and_what_comes(a, chats):
    w = Worker(Family(a), 1, Limits())
    w.start()
    running = Client(w, [job(a, chats[1], Decoding(tokens=100, temperature=2.0), "r")], "r")
    waiting = Client(w, [job(a, chats[1], OPTIONS[0], "w")], "w")
    running.next()
    w.stop()
    assert running.all()[-1].status == waiting.all()[-1].status == 503
    with pytest.raises(Refused, match="stopping"):
        Client(w, [job(a, chats[1], OPTIONS[0], "l")], "l")
    assert w.error is None


def test_a_model_that_fails_is_told_to_everybody(a, chats, monkeypatch):
    crashed = threading.Event()
    w = Worker(Family(a), 1, Limits(), crashed.set)
    monkeypatch.setattr(engine, "step", lambda a, desk: 1 / 0)
    w.start()
    clients = [Client(w, [job(a, chats[1], OPTIONS[0], f"{j}")], f"{j}") for j in range(1)]
    assert [c.all()[-1].status for c in clients] == [500]
    assert crashed.wait(100) and isinstance(w.error, ZeroDivisionError)
    with pytest.raises(Refused, match="has failed"):
        Client(w, [job(a, chats[1], OPTIONS[0], "z")], "z")
    w.stop()
