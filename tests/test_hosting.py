"""From names and texts to factories, without a reactor."""

import importlib.metadata
import re
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from twisted.internet.interfaces import IProtocolFactory
from twisted.internet.protocol import Factory, Protocol
from zope.interface import implementer

from rtservice.config.sources import load_settings
from rtservice.config.values import SettingError
from rtservice.hosting import ECHO_SETTINGS, listing, make_factory, resolve_options
from rtservice.interfaces import IOneProcess, Secret
from rtservice.protocols.echo import EchoFactory


class Color(Enum):
    RED = 1
    BLUE = 2


class Everything(Factory):
    """Takes one of each.

    And more.
    """

    def __init__(
        self,
        text: str,
        *,
        raw: bytes = b"",
        whole: int = 1,
        number: float = 1.0,
        flag: bool = False,
        path: Path = Path("here"),
        color: Color = Color.RED,
        word: Literal["one", "two"] = "one",
        some: list[int] | None = None,
        both: tuple[str, ...] = (),
        plain=5,
        other: object = None,
    ) -> None:
        self.given = {name: value for name, value in locals().items() if name != "self"}


class Late(Factory):
    """Its annotations are texts, and one of them is for type checkers alone."""

    def __init__(self, count: "int" = 1, what: "Unknown | None" = None) -> None:  # noqa: F821  # as said
        self.count = count


class Inherits(Late):
    pass


class Answer(Protocol):
    def __init__(self, text: bytes = b"yes", times: int = 1) -> None:
        self.answer = text * times


class Door(Factory):
    def __init__(self, password: Secret, *, others: list[Secret] | None = None, again: "Secret | None" = None) -> None:
        self.given = (password, others, again)


class Careless(Factory):
    def __init__(self, password: str, raises: str = "ValueError") -> None:
        if raises == "Conversion":
            int(password)
        raise {"ValueError": ValueError, "KeyError": KeyError, "SystemExit": SystemExit}[raises](f"bad: {password}")


class Needs(Factory):
    def __init__(self, realm: Factory) -> None: ...


class Anything(Factory):
    def __init__(self, **keywords: Any) -> None:
        self.keywords = keywords


@implementer(IOneProcess)
class Alone(Factory):
    pass


class Caller:
    def __call__(self, count: "int") -> Factory:
        return Late(count)


caller = Caller()
caller.inner = None


class New(Factory):
    def __new__(cls, count: "int") -> "New":
        one = super().__new__(cls)
        one.count = count
        return one


class Several(Factory):
    def __init__(self, pair: tuple[int, int] | None = None, *, more: Sequence[int] = (), odd: Annotated[int, "x"] = 1):
        self.given = (list(more), odd)


class Nameless(Protocol):
    def __init__(self, name, /) -> None: ...


def make(limit: int = 5) -> Factory:
    if limit > 10:
        raise ValueError(f"{limit} is too many")
    if limit < 0:
        raise OSError("no way")
    factory = Factory()
    factory.limit = limit
    return factory


def make_nothing() -> None:
    """Gives no factory."""


@pytest.fixture(autouse=True)
def _module(monkeypatch) -> Iterator[None]:
    """What is above, as the module `mine`."""
    module = types.ModuleType("mine")
    vars(module).update({name: value for name, value in globals().items() if not name.startswith("__")})
    monkeypatch.setitem(sys.modules, "mine", module)
    return


def made(
    protocol: str,
    *options: str,
    directory: str = "/srv",
    processes: int = 1,
    environment: dict[str, str] | None = None,
    **settings: str,
) -> Any:
    given = {"protocol": protocol, "protocol-option": options, **settings}
    loaded = load_settings(given, {}, None)
    options = resolve_options(loaded, environment or {}, directory)
    return make_factory(loaded, options=options, directory=directory, processes=processes)


def problem(protocol: str, *options: str, **more: Any) -> str:
    with pytest.raises(SettingError) as caught:
        made(protocol, *options, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_options_become_keyword_arguments_of_the_types_that_the_callable_says() -> None:
    given = made(
        "mine:Everything",
        *("text=a=b", r"raw=\x00\n", "whole=-7", "number=2.5e3", "flag=true", "path=sub/../file", "color=blue"),
        *("word=two", "some=1", "some=2", "both=x", "both=", "plain=6"),
    ).given
    assert given == {
        "text": "a=b",
        "raw": b"\0\n",
        "whole": -7,
        "number": 2500.0,
        "flag": True,
        "path": Path("/srv/file"),
        "color": Color.BLUE,
        "word": "two",
        "some": [1, 2],
        "both": ("x", ""),
        "plain": "6",  # nothing is said of its type, and its default's would be a guess
        "other": None,
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["text=x", "whole=1.5"], "option whole: the value is not a whole number"),
        (["text=x", "number=inf"], "option number: the value is not a number"),
        (["text=x", "flag=yes"], "option flag: the value is not true or false"),
        (["text=x", "path="], "option path: the path is empty"),
        (["text=x", "color=green"], "option color: the value is not one of red, blue"),
        (["text=x", "word=three"], "option word: the value is not one of one, two"),
        (["text=x", "some=1", "some=x"], "option some: the value is not a whole number"),
        (["text=x", "text=y"], "option text is given twice"),
        (["text=x", r"raw=\q"], "option raw: "),
        (["text=x", "other=1"], "option other: it is object, which no text can be"),
        ([], "option text is missing, a string"),
        (["text=x", "wohle=1"], "no option 'wohle'; it has text, raw, whole, number, flag, path, color, word, some"),
        (["text=x", "Whole_=1"], "no option 'Whole_'; it has text, raw, whole, number, flag, path, color, word, some"),
    ],
)
def test_a_mistake_in_an_option_names_it_and_what_there_is(options, words) -> None:
    assert problem("mine:Everything", *options).startswith(f"--protocol mine:Everything: {words}")


def test_annotations_that_are_texts_are_understood_and_one_that_cannot_be_harms_no_other() -> None:
    for name in ("Late", "Inherits"):
        assert made(f"mine:{name}", "count=7").count == 7
        assert "option what: it is object" in problem(f"mine:{name}", "what=x")


@pytest.mark.parametrize("name", ["caller", "New"])
def test_whatever_is_called_says_what_its_options_are(name) -> None:
    assert made(f"mine:{name}", "count=7").count == 7
    assert "option count: the value is not a whole number" in problem(f"mine:{name}", "count=x")


def test_sequences_and_annotated_types_are_understood_and_tuples_of_so_many_are_not() -> None:
    assert made("mine:Several", "more=1", "more=2", "odd=3").given == ([1, 2], 3)
    assert "option pair: it is tuple" in problem("mine:Several", "pair=1")


def test_what_has_no_name_cannot_be_given() -> None:
    assert problem("mine:Nameless").endswith(
        "it needs name, which cannot be given by its name; name a function that returns the factory"
    )


def test_what_is_not_in_an_object_is_said_in_one_line() -> None:
    assert problem("mine:caller.nothing").endswith("there is no 'nothing' in mine.caller")
    assert problem("mine:caller.inner").endswith(
        "mine:caller.inner is not a Factory class, a function that returns a factory, or a Protocol class"
    )


def test_a_protocol_class_is_made_for_each_connection_with_its_options() -> None:
    factory = made("mine:Answer", "text=no", "times=2")
    one, other = factory.buildProtocol(None), factory.buildProtocol(None)
    assert one is not other
    assert one.factory is factory
    assert (one.answer, other.answer) == (b"nono", b"nono")
    assert factory.logPrefix() == "Answer"
    assert made("mine:Answer").buildProtocol(None).answer == b"yes"


def test_a_function_gives_the_factory_and_says_what_is_wrong() -> None:
    assert made("mine:make", "limit=7").limit == 7
    assert problem("mine:make", "limit=11") == "--protocol mine:make: 11 is too many"
    assert "it cannot be made: OSError: no way (" in problem("mine:make", "limit=-1")
    assert problem("mine:make_nothing").endswith("it gives no factory, but NoneType")


def test_a_secret_is_converted_and_given_like_any_other_type(tmp_path) -> None:
    (tmp_path / "pw").write_text("hunter2\n")
    password, others, again = made(
        "mine:Door",
        *("password=@pw", "others=$ONE", "others=$$two", "again=three"),
        directory=str(tmp_path),
        environment={"ONE": "one"},
    ).given
    assert isinstance(password, Secret)
    assert [one.reveal() for one in (password, *others, again)] == ["hunter2", "one", "$two", "three"]
    assert "option password is missing, a secret, best given as @/path/to/file or $VARIABLE" in problem("mine:Door")


@pytest.mark.parametrize("raises", ["ValueError", "Conversion", "KeyError", "SystemExit"])
@pytest.mark.parametrize("password", ["password=hunter2", "password=@pw", "password=$PW"])
def test_what_a_factory_says_as_it_is_made_has_no_value_in_it(tmp_path, raises, password) -> None:
    (tmp_path / "pw").write_text("hunter2")
    said = problem(
        "mine:Careless", password, f"raises={raises}", directory=str(tmp_path), environment={"PW": "hunter2"}
    )
    assert "hunter2" not in said
    assert "<hidden>" in said


def test_bytes_of_a_file_are_taken_as_they_are_and_texts_are_utf_8(tmp_path) -> None:
    (tmp_path / "raw").write_bytes(b"\\q\xff\0\r\n")
    (tmp_path / "text").write_bytes("grüß\n\n".encode())
    given = made("mine:Everything", "text=@text", "raw=@raw", directory=str(tmp_path)).given
    assert given["raw"] == b"\\q\xff\0"
    assert given["text"] == "grüß\n"
    for option, words in (
        ("text=@raw", f"option text: the value of '{tmp_path}/raw' is not UTF-8: line 1, the byte at offset 2"),
        ("path=@nul", "the value holds a NUL"),
    ):
        (tmp_path / "nul").write_bytes(b"a\0")
        assert words in problem("mine:Everything", option, directory=str(tmp_path))


def test_a_value_from_a_file_is_not_shown_for_what_ships_either(tmp_path) -> None:
    (tmp_path / "size").write_text("hunter2")
    assert problem("echo", "max-message=@size", directory=str(tmp_path)).endswith(
        "option max-message: the value is not a whole number"
    )
    assert problem("echo", "max-message=x").endswith("option max-message: 'x' is not a whole number")
    (tmp_path / "size").write_text("77")
    assert made("echo", "max-message=@size", directory=str(tmp_path)).max_message == 77


def test_a_file_or_a_variable_that_is_not_there_is_named_with_the_option(tmp_path) -> None:
    assert problem("mine:Door", "password=@pw", directory=str(tmp_path)) == (
        f"--protocol mine:Door: option password: cannot read the file '{tmp_path}/pw': no such file or directory"
    )
    assert problem("mine:Door", "password=$PW") == (
        "--protocol mine:Door: option password: the environment has no variable PW"
    )


def test_a_greeting_of_its_own_setting_is_never_the_name_of_a_file() -> None:
    assert made("echo", greeting="@home").greeting == b"@home"


def test_a_callable_that_takes_any_keyword_gets_texts() -> None:
    assert made("mine:Anything", "some-thing=1").keywords == {"some_thing": "1"}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mien", "not one of echo, "),
        ("mine:Nothing", "there is no 'Nothing' in mine"),
        ("mine:", "mine: is not package.module:name"),
        ("my-module:x", "is not package.module:name"),
        ("nowhere.at_all:x", "there is no module nowhere"),
        ("mine:Color", "mine:Color is not a Factory class, a function"),
        ("mine:sys", "mine:sys is not a Factory class, a function"),
        ("mine:Needs", "it needs realm, which no text can be: Factory; name a function that returns the factory"),
    ],
)
def test_a_name_that_cannot_be_served_says_why(name, words) -> None:
    assert words in problem(name)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import nowhere_at_all", "broken cannot be imported: ModuleNotFoundError: No module named 'nowhere_at_all' ("),
        ("def f(:", "broken cannot be imported: SyntaxError: "),
        ("\n1 / 0", "broken.py, line 2)"),
        ("import sys; sys.exit('a\\nb')", "broken cannot be imported: SystemExit: a b ("),
    ],
)
def test_a_module_that_fails_to_be_imported_is_named_with_its_error_and_line(
    tmp_path, monkeypatch, source, words
) -> None:
    (tmp_path / "broken.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert words in problem("broken:x")


def test_a_module_of_the_current_directory_is_pointed_to(tmp_path, monkeypatch) -> None:
    (tmp_path / "hidden_here.py").write_text("")
    monkeypatch.chdir(tmp_path)
    assert "PYTHONPATH=." in problem("hidden_here:x")
    assert "PYTHONPATH" not in problem("hidden_there:x")


@pytest.mark.parametrize("name", ["greeting", "greet", "framing", "max-message"])
def test_the_exchange_has_its_options_by_both_names_and_other_protocols_refuse_them(name) -> None:
    assert name in ECHO_SETTINGS
    value = {"greeting": "hi", "greet": "first-data", "framing": "line", "max-message": "50"}[name]
    ours = vars(made("echo", **{name: value}))
    assert ours == vars(made("echo", f"{name}={value}")) != vars(made("echo"))
    assert isinstance(made("echo"), EchoFactory)
    assert "is given twice" in problem("echo", f"{name}={value}", **{name: value})
    refused = problem("mine:Answer", **{name: value})
    assert refused == f"--{name}: an option of the protocol echo, and not of --protocol mine:Answer"


def test_what_the_exchange_refuses_is_a_settings_error() -> None:
    assert problem("echo", "max-message=0").startswith("--protocol echo: max-message is 0 bytes")
    assert problem("echo", framing="line", greeting=r"a\n").startswith("--greeting: the greeting contains a line feed")


def test_what_has_to_be_in_one_process_is_refused_with_several() -> None:
    assert IProtocolFactory.providedBy(made("mine:Alone"))
    assert problem("mine:Alone", processes=2).endswith("--workers has to be 1, not 2")


def test_the_list_has_a_line_for_each_and_for_each_option() -> None:
    lines = listing().splitlines()
    assert "echo: Greets each client, then echoes everything that it sends." in lines
    assert "    --protocol-option max-message=…: a whole number [default: 65536]" in lines


@pytest.fixture
def offer(tmp_path, monkeypatch) -> Callable[[str, str], None]:
    """Installs a distribution of a name with entry points, whatever else is installed."""
    monkeypatch.syspath_prepend(tmp_path)

    def offer(name: str, entry_points: str) -> None:
        package = tmp_path / f"{name}-1.0.dist-info"
        package.mkdir()
        (package / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (package / "entry_points.txt").write_text(f"[rtservice.protocols]\n{entry_points}")

    return offer


def known(said: str) -> list[str]:
    """The names of protocols in an error that lists them."""
    match = re.search(r"not one of (.*), nor package\.module:name", said)
    assert match is not None, said
    return match[1].split(", ")


@pytest.mark.parametrize("others", ["", "aaa = nowhere:X\nmine-other = mine:Late\nzzz = mine:Gone\nchat = nowhere:X\n"])
def test_installed_packages_offer_protocols_by_name(offer, others) -> None:
    """And what other packages have to offer changes nothing of it."""
    before = set(known(problem("no-such-name")))
    if others:
        offer("others", others)
    offer(
        "mine",
        "mine-everything = mine:Everything\nmine-answer = mine:Answer [extra]\n"
        "mine-gone = mine:Gone\necho = mine:Answer\n",
    )
    assert made("mine-answer").logPrefix() == "Answer"
    assert isinstance(made("echo"), EchoFactory)  # nobody else takes the name of what ships
    names = known(problem("no-such-name"))
    assert names[:2] == ["echo", "chat"]
    assert names[2:] == sorted(set(names[2:]))
    new = {"aaa", "mine-other", "zzz"} if others else set()
    assert set(names) == before | new | {"mine-answer", "mine-everything", "mine-gone"}
    assert problem("mine-answers").endswith("; did you mean mine-answer?")
    listed = listing()
    assert "mine-everything: Takes one of each.\n    --protocol-option text=…: a string [required]\n" in listed
    assert "    --protocol-option color=…: one of red, blue [default: red]\n" in listed
    assert "    --protocol-option some=…: a whole number, repeatable [default: none]\n" in listed
    assert "    --protocol-option other=…: object, which no text can be [default: none]\n" in listed
    assert "mine-answer: (it says nothing about itself)\n" in listed
    assert "mine-gone: there is no 'Gone' in mine" in listed


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("mine.Answer", "mine:Answer"),
        ("twisted.protocols.wire.Discard", "twisted.protocols.wire:Discard"),
        ("chatt", "chat"),
        ("Echo", "echo"),
        ("mine.py", "mine:NAME"),
        ("./sub/mine.py", "mine:NAME"),
        ("mine.py:Answer", "mine:Answer"),
        ("/srv/mine.py:Answer", "mine:Answer"),
        ("mine:answer", "mine:Answer"),
        ("mine:Anwser", "mine:Answer"),
        ("mine:Color.RAD", "mine:Color.RED"),
        ("twisted.protocols.wir:Discard", "twisted.protocols.wire:Discard"),
        ("twistd.protocols.wire:Discard", "twisted.protocols.wire:Discard"),
        ("twisted.protocols.wire:Discrad", "twisted.protocols.wire:Discard"),
        ("zzzz", None),
        ("mine:Zzzzzz", None),
        ("mine:_Zzzzzz", None),
    ],
)
def test_a_name_that_does_not_exist_is_answered_with_the_one_that_was_meant(monkeypatch, name, meant) -> None:
    # What is installed here may be nearer.
    nothing = importlib.metadata.EntryPoints()
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **given: nothing)
    said = problem(name)
    assert re.findall("did you mean (.*?)[?]", said) == ([] if meant is None else [meant]), said


def test_a_module_whose_names_cannot_be_listed_is_no_traceback(monkeypatch) -> None:
    def refuse() -> list[str]:
        raise RuntimeError

    monkeypatch.setattr(sys.modules["mine"], "__dir__", refuse, raising=False)
    assert problem("mine:Nothing").endswith("there is no 'Nothing' in mine")


@pytest.mark.parametrize(
    ("option", "meant"),
    [("max_mesage=5", "max-message"), ("maxmessage=5", "max-message"), ("Greeting=x", "greeting"), ("zzz=x", None)],
)
def test_an_option_that_does_not_exist_is_answered_with_the_one_that_was_meant(option, meant) -> None:
    said = problem("echo", option)
    assert re.findall("; did you mean (.*?)[?]$", said) == ([] if meant is None else [meant]), said


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("grün\n".encode("utf-8-sig"), None),
        ("grün\r\n".encode("utf-8-sig"), None),
        ("grün".encode("utf-16"), "is UTF-16 by its byte order mark; save it as UTF-8"),
        ("grün".encode("utf-32"), "is UTF-32 by its byte order mark; save it as UTF-8"),
        ("a\nb\ngrün".encode("latin-1"), "is not UTF-8: line 3, the byte at offset 6"),
    ],
)
def test_a_text_of_a_file_is_utf_8_with_or_without_a_mark(tmp_path, content, words) -> None:
    (tmp_path / "text").write_bytes(content)
    if words is None:
        assert made("mine:Everything", "text=@text", directory=str(tmp_path)).given["text"] == "grün"
    else:
        said = problem("mine:Everything", "text=@text", directory=str(tmp_path))
        assert said == f"--protocol mine:Everything: option text: the value of '{tmp_path}/text' {words}"
    # Bytes are what they are.
    raw = made("mine:Everything", "text=x", "raw=@text", directory=str(tmp_path)).given["raw"]
    assert raw == content.removesuffix(b"\n").removesuffix(b"\r")
