"""A conversation in the terminal, with keys from a pipe."""

import io
import json
import os
import signal
import stat

import pytest
from failures import failing, full_disk
from prompt_toolkit.application import Application, create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.output import DummyOutput
from rich.console import Console

import treeflash
from treeflash.commands import chat
from treeflash.commands.chat import COMMANDS, STYLES, ChatSession, make_session
from treeflash.decoding import Scheduler
from treeflash.decoding.interfaces import DeviceReport

TEXT = "Es war einmal ein Bär, der schlief den ganzen Winter lang."
INTERRUPT, END, NEW_LINE = "\x03", "\x04", "\x1b\r"
ENTER = "\r"


def contents(talked):
    return [(message["role"], message["content"]) for message in talked.messages]


def asked(model) -> list[str]:
    """The prompts of the model, without special tokens."""
    return [model.tokenizer.decode(prompt) for prompt in model.backend.prompts]


def test_messages_are_answered_in_turn(talk, scripted):
    model = scripted("One.", "Two.")
    talked, shown = talk("hi", ENTER, "more", ENTER, model=model)
    assert contents(talked) == [
        ("user", "hi"), ("assistant", "One."), ("user", "more"), ("assistant", "Two."),
    ]  # fmt: skip
    assert asked(model)[-1].startswith("user: hiassistant: One.")
    assert "user: more" in asked(model)[-1]
    assert shown.startswith("One.\n[")
    assert "tokens/s, block efficiency" in shown


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([ENTER, "  ", ENTER, "first", NEW_LINE, "second", ENTER], "first\nsecond"),
        (["\x1b[200~a\nb\n\nc\x1b[201~", ENTER], "a\nb\n\nc"),  # pasted
        (["dropped", INTERRUPT, "kept", ENTER], "kept"),
        ([" /etc", ENTER], " /etc"),
    ],
)
def test_keys_of_a_message(talk, keys, message):
    assert contents(talk(*keys)[0])[0] == ("user", message)


@pytest.mark.parametrize(
    ("lines", "messages", "said"),
    [
        (["/exit", "never"], 0, ""),
        (["hi", "/reset"], 0, "a new conversation begins"),
        (["hi", "/speed"], 2, "tokens gained per forward pass, and how often"),
        (["/save talk.jsonl"], 0, "there is no message to save yet"),
        (["/retry"], 0, "there is no message to answer yet"),
        (["/tree"], 0, "there is no answer yet"),
        (["hi", "/tree x"], 2, "/tree takes a number of iterations, not 'x'"),
        (["hi", "/save"], 2, "/save needs the name of a file"),
    ],
)
def test_commands(talk, tmp_path, monkeypatch, lines, messages, said):
    monkeypatch.chdir(tmp_path)
    talked, shown = talk(*(f"{line}{ENTER}" for line in lines))
    assert len(talked.messages) == messages
    assert said in shown
    assert not list(tmp_path.iterdir())


def test_the_history_has_messages_and_commands(talk):
    talk("hi", ENTER, "/help", ENTER)
    assert talk.history.get_strings() == ["hi", "/help"]


def test_commands_are_completed_and_explained(talk):
    with create_app_session(output=DummyOutput()):
        completer = make_session(talk.history).completer
    found = completer.get_completions(Document("/s"), CompleteEvent())
    assert [completion.text for completion in found] == ["/system", "/set", "/save", "/speed"]
    _, shown = talk("/help", ENTER)
    assert all(command in shown for command in COMMANDS)


def test_an_interruption_stops_the_answer_and_not_the_program(talk, scripted):
    model = scripted(TEXT)
    verify = model.backend.verify

    def interrupt(*args):
        if model.backend.verified == 2:
            signal.raise_signal(signal.SIGINT)
        return verify(*args)

    model.backend.verify = interrupt
    before = signal.getsignal(signal.SIGINT)
    talked, shown = talk("hi", ENTER, "go on", ENTER, model=model)
    assert signal.getsignal(signal.SIGINT) is before
    (_, first), (_, second) = contents(talked)[1::2]
    assert first
    assert TEXT.startswith(first)
    assert len(first) < len(TEXT)
    assert second == TEXT
    assert "interrupted]" in shown


@pytest.mark.parametrize("name", ["assembler", "summarise"])
def test_an_interruption_beside_an_answer_does_not_end_the_program(
    talk, scripted, monkeypatch, name
):
    model = scripted(TEXT)
    place = type(model) if name == "assembler" else chat
    before, presses = getattr(place, name), iter([signal.SIGINT])

    def interrupt(*args):
        for press in presses:  # the first call's alone
            signal.raise_signal(press)
        return before(*args)

    monkeypatch.setattr(place, name, interrupt)
    talked, shown = talk("hi", ENTER, "hello", ENTER, "/speed", ENTER, model=model)
    assert contents(talked)[-2:] == [("user", "hello"), ("assistant", TEXT)]
    assert ("the message is dropped" in shown) == (name == "assembler")
    assert "tokens gained per forward pass, and how often" in shown


def test_a_second_interruption_ends_the_program(talk, scripted):
    model = scripted(TEXT)

    def interrupt(*args):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    model.backend.verify = interrupt
    with pytest.raises(KeyboardInterrupt):
        talk("hi", ENTER, model=model)


def test_system_begins_anew(talk, scripted):
    model = scripted(TEXT)
    talked, _ = talk("hi", ENTER, "/system Be brief.", ENTER, "hello", ENTER, model=model)
    assert asked(model)[-1] == "system: Be brief.user: helloassistant: "
    assert len(talked.messages) == 2
    talk("/system", ENTER, "hello", ENTER, model=model, system="Be.")
    assert asked(model)[-1] == "user: helloassistant: "


def test_save_writes_what_train_reads(talk, tmp_path):
    file = tmp_path / "talk.jsonl"
    save = f"/save {file}"
    _, shown = talk("hi", ENTER, save, ENTER, save, ENTER, system="Be.")
    messages = json.loads(file.read_text(encoding="utf-8"))["messages"]
    assert messages == [
        {"role": "system", "content": "Be."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": TEXT},
    ]
    assert "cannot be written: File exists" in " ".join(shown.split())
    assert "already; choose another name" in " ".join(shown.split())


def test_a_full_disk_keeps_no_part_of_a_conversation(talk, tmp_path):
    with full_disk():
        _, shown = talk("hi", ENTER, f"/save {tmp_path / 'talk.jsonl'}", ENTER)
    assert "cannot be written: File too large" in " ".join(shown.split())
    assert not list(tmp_path.iterdir())


def test_a_saved_conversation_is_loaded(talk, scripted, tmp_path):
    file = tmp_path / "talk.jsonl"
    talk("hi", ENTER, f"/save {file}", ENTER, system="Be.")
    model = scripted("More.")
    talked, shown = talk("old", ENTER, f"/load {file}", ENTER, "go on", ENTER, model=model)
    assert contents(talked) == [
        ("user", "hi"), ("assistant", TEXT), ("user", "go on"), ("assistant", "More."),
    ]  # fmt: skip
    assert asked(model)[-1].startswith(f"system: Be.user: hiassistant: {TEXT}")
    assert "2 messages; the next one continues the conversation" in shown


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"messages": []}', '{"messages": [{"role": "user"}]}',
             '{"messages": [{"role": "user", "content": 3}]}', '{"messages": 5}', "[" * 100_000,
             '{"messages": [{"role": "system", "content": "Be."}]}',
             '{"messages": [{"role": "system", "content": [{"type": "text", "text": "Be."}]}, '
             '{"role": "user", "content": "hi"}]}'],
)  # fmt: skip
def test_what_is_no_conversation_is_not_loaded(talk, tmp_path, text):
    file = tmp_path / "other.json"
    file.write_text(text)
    talked, shown = talk("hi", ENTER, f"/load {file}", ENTER)
    assert "is not a conversation that /save wrote" in " ".join(shown.split())
    assert len(talked.messages) == 2


def test_retry_answers_the_last_message_again(talk, scripted):
    model = scripted("One.", "Two.", "Three.")
    talked, _ = talk("hi", ENTER, "more", ENTER, "/retry", ENTER, model=model)
    assert contents(talked) == [
        ("user", "hi"), ("assistant", "One."), ("user", "more"), ("assistant", "Three."),
    ]  # fmt: skip
    assert asked(model)[-1] == asked(model)[-2]


def test_a_retry_that_fails_keeps_the_answer(talk, scripted):
    model = scripted(TEXT, drafter=False)
    talked, shown = talk("hi", ENTER, "/set method dflash", ENTER, "/retry", ENTER, model=model)
    assert "method dflash needs a drafter" in " ".join(shown.split())
    assert contents(talked) == [("user", "hi"), ("assistant", TEXT)]


def test_set_changes_options(talk):
    talked, shown = talk(
        "/set temperature 0.5", ENTER, "/set max-tokens 7", ENTER, "/set", ENTER, "hi", ENTER
    )
    assert talked.answer.config.sampling.temperature == 0.5
    assert contents(talked)[1] == ("assistant", TEXT[:7])
    assert "temperature is 0.5" in shown
    assert "  temperature 0.5\n" in shown
    assert "top-p, min-p, seed" in " ".join(shown.split())
    talked, shown = talk("/set max_tokens", ENTER, "hi", ENTER, max_tokens=3)
    assert contents(talked)[1] == ("assistant", TEXT)
    assert "max-tokens has its default" in shown


def test_the_progress_of_a_long_prompt_is_shown(talk, scripted):
    model = scripted(TEXT)
    model.backend.max_positions = 1000
    talk.prefill_chunk = 512
    talked, shown = talk("a" * 600, ENTER, model=model, color=True)
    total = len(talked.answer.prompt_ids)
    assert [f"reading the prompt: {n} of {total} tokens" in shown for n in (0, 512, 513)] == [
        True, True, False,
    ]  # fmt: skip


def test_a_message_whose_prompt_was_interrupted_is_dropped(talk, scripted):
    model = scripted(TEXT)
    extend = model.backend.extend

    def interrupt(text, token_ids):
        if not model.backend.prompts:
            signal.raise_signal(signal.SIGINT)
        return extend(text, token_ids)

    model.backend.extend = interrupt
    talk.prefill_chunk = 16
    talked, shown = talk("a message", ENTER, "hi", ENTER, model=model)
    assert contents(talked) == [("user", "hi"), ("assistant", TEXT)]
    assert "interrupted before the answer; the message is dropped" in shown


def test_what_is_typed_during_an_answer_is_not_shown(talk, scripted, stdin):
    termios = pytest.importorskip("termios")
    model = scripted(TEXT)
    verify = model.backend.verify
    main, terminal = os.openpty()
    echoes = []

    def echo() -> bool:
        return bool(termios.tcgetattr(terminal)[3] & termios.ECHO)

    model.backend.verify = lambda *args: echoes.append(echo()) or verify(*args)
    with open(terminal, closefd=False) as stream:
        stdin(stream)
        talk("hi", ENTER, model=model)
    assert echoes
    assert not any(echoes)
    assert echo()
    os.close(main)
    os.close(terminal)


def test_ctrl_z_suspends(talk, monkeypatch):
    suspended = []
    monkeypatch.setattr(Application, "suspend_to_background", lambda *args: suspended.append(args))
    talked, _ = talk("\x1a", "hi", ENTER)
    assert len(suspended) == 1
    assert contents(talked)[0] == ("user", "hi")


def test_tree_draws_the_last_iterations(talk, scripted):
    _, shown = talk("hi", ENTER, "/tree 2", ENTER)
    assert shown.count("accepted") == 2
    assert "root" in shown
    _, shown = talk("hi", ENTER, "/tree", ENTER, model=scripted(""))
    assert "the answer ended with its first token, so nothing was drafted" in shown


def test_iterations_have_colours(talk):
    _, shown = talk("hi", ENTER, color=True)
    codes = Console(color_system="standard")
    found = [style for style in STYLES if codes.get_style(style).render("x")[:5] in shown]
    assert len(found) > 2
    _, shown = talk("/color", ENTER, "hi", ENTER, color=True)
    assert "\x1b[36m" not in shown
    assert "colours are off" in shown


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/set tempature 1", "unknown option tempature; /set lists the options"),
        ("/set temperature x", "invalid float value: 'x'"),
        ("/set temperature -1", "temperature must be"),
        ("/load", "/load needs the name of a file"),
        ("/load ~no-such-user/x", "~no-such-user/x cannot be read: Could not determine home"),
        ("/load /no/such/file", "/no/such/file"),
        ("/nothing", "unknown command /nothing; /help lists the commands"),
        ("/temperature 0.7", "unknown command /temperature, write /set temperature 0.7; /help"),
        ("/Top_K 5", "unknown command /Top_K, write /set top-k 5; /help"),
        ("/sistem Be brief.", "unknown command /sistem, write /system Be brief.; /help"),
        ("/file", "/file needs the name of a file"),
        ("/file /no/such/file", "/no/such/file cannot be read"),
        ("/save ~no-such-user/x", "~no-such-user/x cannot be written: Could not determine home"),
        ("x" * 500, "/reset begins a new conversation"),
    ],
)
def test_errors_are_one_line_and_not_the_end(talk, line, message):
    talked, shown = talk(line, ENTER, "hi", ENTER)
    assert message in " ".join(shown.split())
    assert contents(talked) == [("user", "hi"), ("assistant", TEXT)]


def test_files_are_put_before_the_next_message(talk, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).write_text(f"Text {name}.\n")
    one, two = (f"/file {tmp_path / name}" for name in ("one", "two"))
    talked, shown = talk(one, ENTER, two, ENTER, "Sum up.", ENTER, "Go on.", ENTER)
    assert contents(talked)[::2] == [
        ("user", "Text one.\n\nText two.\n\nSum up."),
        ("user", "Go on."),
    ]
    assert "files before the next message: 2" in shown
    talked, _ = talk(one, ENTER, "/new", ENTER, "hi", ENTER)
    assert contents(talked)[0] == ("user", "hi")


def test_a_text_that_runs_out_of_memory_is_not_the_end(talk, scripted):
    model = scripted(TEXT)
    with failing(model.backend, "verify", RuntimeError("CUDA out of memory.\nMore."), call=2):
        talked, shown = talk("hi", ENTER, "hello", ENTER, model=model)
    assert "error: CUDA out of memory.\n" in shown
    assert contents(talked) == [("user", "hello"), ("assistant", TEXT)]
    with failing(model.backend, "verify", IndexError), pytest.raises(IndexError):
        talk("hi", ENTER, model=model)  # a fault of the program is not hidden


def test_markdown_can_be_turned_off(talk, scripted):
    model = scripted("**Bär**", "**Bär**")
    _, shown = talk("hi", ENTER, "/markdown", ENTER, "hi", ENTER, model=model)
    formatted, source = shown.split("Markdown is off")
    assert "Bär" in formatted
    assert "**" not in formatted
    assert "**Bär**" in source


def test_answers_have_random_seeds_unless_one_is_given(talk):
    def seeds(**options):
        return {talk("hi", ENTER, **options)[0].answer.config.sampling.seed for _ in range(2)}

    assert len(seeds()) == 2
    assert seeds(seed=5) == {5}


def test_only_new_messages_are_prefilled(talk, tiny_pair):
    model = treeflash.load(*tiny_pair, backend="reference")
    talked, _ = talk("hi", ENTER, "more", ENTER, model=model, max_tokens=5)
    assert len(talked.messages) == 4
    assert talked.answer.chunks[0].step.cached_tokens > 10


def test_an_answer_that_a_stop_string_ends_is_not_prefilled_again(talk, tiny_pair):
    model = treeflash.load(*tiny_pair, backend="reference")
    options = {"max_tokens": 5, "temperature": 0}
    talked, _ = talk("hi", ENTER, model=model, **options)
    stop = talked.messages[1]["content"][1]
    talked, _ = talk("hi", ENTER, "more", ENTER, model=model, **options, stop=stop)
    assert len(talked.messages[1]["content"]) == 1
    assert talked.answer.chunks[0].step.cached_tokens > 10


def test_an_interrupted_answer_is_not_prefilled_again(talk, tiny_pair, monkeypatch):
    model = treeflash.load(*tiny_pair, backend="reference")
    step, presses = Scheduler.step, iter([signal.SIGINT])

    def interrupt(scheduler):
        for press in presses:  # the first call's alone
            signal.raise_signal(press)
        return step(scheduler)

    monkeypatch.setattr(Scheduler, "step", interrupt)
    talked, shown = talk("hi", ENTER, "more", ENTER, model=model, max_tokens=5, temperature=0)
    assert "interrupted]" in shown
    assert talked.answer.chunks[0].step.cached_tokens > 10


def test_a_conversation_is_kept_on_a_disk(use, tiny_pair, tmp_path, run_chat):
    use(treeflash.load(tiny_pair[0], False, backend="reference"))
    arguments = ["--max-tokens", "3", "--prefix-cache-dir", str(tmp_path / "states")]
    first, second = (run_chat(*arguments, keys="x" * 300 + ENTER) for _ in range(2))
    assert [x.answer.chunks[0].step.disk_tokens for x in (first, second)] == [0, 256]
    assert contents(first) == contents(second)


def test_the_command_needs_a_terminal(capsys, stdin):
    stdin("hi\n")
    assert chat.main([]) == 2
    assert "chat needs a terminal" in capsys.readouterr().err


def test_the_file_of_messages_is_private(tmp_path, monkeypatch):
    monkeypatch.setenv("TREEFLASH_CACHE", str(tmp_path / "cache"))
    history = chat.message_history(False)
    history.append_string("a secret")
    file = tmp_path / "cache" / "chat_history"
    assert "a secret" in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert isinstance(chat.message_history(True), InMemoryHistory)
    monkeypatch.setenv("TREEFLASH_CACHE", str(file))  # no folder can be there
    with pytest.warns(UserWarning, match=f"messages will not be remembered: {file} cannot be"):
        assert isinstance(chat.message_history(False), InMemoryHistory)


@pytest.mark.parametrize(("available", "kept"), [(None, 1 << 30), (20 << 30, 9 << 30)])
def test_a_conversation_is_kept_in_half_of_the_memory_that_is_free(scripted, available, kept):
    model = scripted(TEXT)
    report = DeviceReport(available_bytes=available)
    model.backend.device_report = lambda: report
    talked = ChatSession(model, {}, Console(file=io.StringIO(), markup=False))
    assert talked.scheduler.prefix_cache.max_bytes == kept
