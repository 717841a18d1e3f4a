"""Factories are created from protocol names and option texts, without a reactor."""

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
from rtservice.hosting.aliases import ALIASES
from rtservice.hosting.factory import make_factory, resolve_options
from rtservice.hosting.listing import listing
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
    """Has annotations as strings, one of which only type checkers can evaluate."""

    def __init__(self, count: "int" = 1, what: "Unknown | None" = None) -> None:  # noqa: F821  # see above
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
        made = super().__new__(cls)
        made.count = count
        return made


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
    """Returns no factory."""


@pytest.fixture(autouse=True)
def _module(monkeypatch) -> Iterator[None]:
    """Provide the definitions above as the module `mine`."""
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
    loaded = load_settings(given, {}, None, ALIASES)
    options = resolve_options(loaded, environment or {}, directory)
    return make_factory(loaded, options=options, directory=directory, processes=processes)


def problem(protocol: str, *options: str, **more: Any) -> str:
    with pytest.raises(SettingError) as caught:
        made(protocol, *options, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_options_become_keyword_arguments_of_the_annotated_types() -> None:
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
        "plain": "6",  # without annotation; the type of its default would be a guess
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
        (["text=x", "other=1"], "option other: its type object cannot be given as text"),
        ([], "option text is missing; accepted is a string"),
        (
            ["text=x", "wohle=1"],
            "no option 'wohle'; accepted are text, raw, whole, number, flag, path, color, word, some",
        ),
        (
            ["text=x", "Whole_=1"],
            "no option 'Whole_'; accepted are text, raw, whole, number, flag, path, color, word, some",
        ),
    ],
)
def test_an_invalid_option_is_reported_with_the_accepted_values(options, words) -> None:
    assert problem("mine:Everything", *options).startswith(f"--protocol mine:Everything: {words}")


def test_annotations_as_strings_are_evaluated_and_unknown_ones_are_ignored() -> None:
    for name in ("Late", "Inherits"):
        assert made(f"mine:{name}", "count=7").count == 7
        assert "option what: its type object" in problem(f"mine:{name}", "what=x")


@pytest.mark.parametrize("name", ["caller", "New"])
def test_every_kind_of_callable_accepts_options(name) -> None:
    assert made(f"mine:{name}", "count=7").count == 7
    assert "option count: the value is not a whole number" in problem(f"mine:{name}", "count=x")


def test_sequences_and_annotated_types_are_accepted_but_not_tuples_of_fixed_length() -> None:
    assert made("mine:Several", "more=1", "more=2", "odd=3").given == ([1, 2], 3)
    assert "option pair: its type tuple" in problem("mine:Several", "pair=1")


def test_a_positional_only_argument_is_rejected() -> None:
    assert problem("mine:Nameless").endswith(
        "its argument name cannot be passed by name; name a function that returns the factory"
    )


def test_a_missing_attribute_is_reported_in_one_line() -> None:
    assert problem("mine:caller.nothing").endswith("mine.caller has no attribute 'nothing'")
    assert problem("mine:caller.inner").endswith(
        "mine:caller.inner is not a Factory class, a function that returns a factory, or a Protocol class"
    )


def test_each_connection_gets_a_protocol_with_the_options() -> None:
    factory = made("mine:Answer", "text=no", "times=2")
    first, second = factory.buildProtocol(None), factory.buildProtocol(None)
    assert first is not second
    assert first.factory is factory
    assert (first.answer, second.answer) == (b"nono", b"nono")
    assert factory.logPrefix() == "Answer"
    assert made("mine:Answer").buildProtocol(None).answer == b"yes"


def test_a_function_returns_the_factory_or_its_error_is_reported() -> None:
    assert made("mine:make", "limit=7").limit == 7
    assert problem("mine:make", "limit=11") == "--protocol mine:make: 11 is too many"
    assert "cannot be created: OSError: no way (" in problem("mine:make", "limit=-1")
    assert problem("mine:make_nothing").endswith("returned NoneType, which is not a factory")


def test_a_secret_is_an_accepted_type(tmp_path) -> None:
    (tmp_path / "pw").write_text("hunter2\n")
    password, others, again = made(
        "mine:Door",
        *("password=@pw", "others=$ONE", "others=$$two", "again=three"),
        directory=str(tmp_path),
        environment={"ONE": "one"},
    ).given
    assert isinstance(password, Secret)
    assert [secret.reveal() for secret in (password, *others, again)] == ["hunter2", "one", "$two", "three"]
    assert "option password is missing; accepted is a secret, best given as @/path/to/file or $VARIABLE" in problem(
        "mine:Door"
    )


@pytest.mark.parametrize("raises", ["ValueError", "Conversion", "KeyError", "SystemExit"])
@pytest.mark.parametrize("password", ["password=hunter2", "password=@pw", "password=$PW"])
def test_secret_values_are_hidden_in_the_errors_of_a_factory(tmp_path, raises, password) -> None:
    (tmp_path / "pw").write_text("hunter2")
    message = problem(
        "mine:Careless", password, f"raises={raises}", directory=str(tmp_path), environment={"PW": "hunter2"}
    )
    assert "hunter2" not in message
    assert "<hidden>" in message


@pytest.mark.parametrize("raises", ["ValueError", "KeyError", "SystemExit"])
@pytest.mark.parametrize("between", ["\x1b", "\n", "\u202e", "\\", "  "])
def test_secret_values_are_hidden_as_an_error_shows_them(raises, between) -> None:
    message = problem("mine:Careless", f"password=s3cret{between}part2", f"raises={raises}")
    assert "s3cret" not in message
    assert "part2" not in message
    assert "<hidden>" in message


def test_a_file_value_is_unchanged_bytes_or_utf_8_text(tmp_path) -> None:
    (tmp_path / "raw").write_bytes(b"\\q\xff\0\r\n")
    (tmp_path / "text").write_bytes("grüß\n\n".encode())
    given = made("mine:Everything", "text=@text", "raw=@raw", directory=str(tmp_path)).given
    assert given["raw"] == b"\\q\xff\0"
    assert given["text"] == "grüß\n"
    for option, words in (
        ("text=@raw", f"option text: the value of '{tmp_path}/raw' is not UTF-8: line 1, the byte at offset 2"),
        ("path=@nul", "the value contains a NUL"),
    ):
        (tmp_path / "nul").write_bytes(b"a\0")
        assert words in problem("mine:Everything", option, directory=str(tmp_path))


def test_a_value_from_a_file_is_hidden_for_shipped_protocols_too(tmp_path) -> None:
    (tmp_path / "size").write_text("hunter2")
    assert problem("echo", "max-message=@size", directory=str(tmp_path)).endswith(
        "option max-message: the value is not a whole number"
    )
    assert problem("echo", "max-message=x").endswith("option max-message: 'x' is not a whole number")
    (tmp_path / "size").write_text("77")
    assert made("echo", "max-message=@size", directory=str(tmp_path)).max_message == 77


def test_a_missing_file_or_variable_is_named_with_the_option(tmp_path) -> None:
    assert problem("mine:Door", "password=@pw", directory=str(tmp_path)) == (
        f"--protocol mine:Door: option password: cannot read the file '{tmp_path}/pw': no such file or directory"
    )
    assert problem("mine:Door", "password=$PW") == (
        "--protocol mine:Door: option password: the environment variable PW is not set"
    )


def test_an_alias_never_reads_a_file() -> None:
    assert made("echo", greeting="@home").greeting == b"@home"


def test_a_callable_with_arbitrary_keywords_receives_strings() -> None:
    assert made("mine:Anything", "some-thing=1").keywords == {"some_thing": "1"}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mien", "not one of echo, "),
        ("mine:Nothing", "mine has no attribute 'Nothing'"),
        ("mine:", "mine: is not package.module:name"),
        ("my-module:x", "is not package.module:name"),
        ("nowhere.at_all:x", "there is no module nowhere"),
        ("mine:Color", "mine:Color is not a Factory class, a function"),
        ("mine:sys", "mine:sys is not a Factory class, a function"),
        (
            "mine:Needs",
            "its argument realm of the type Factory cannot be given as text; name a function that returns the factory",
        ),
    ],
)
def test_an_unusable_name_is_rejected_with_the_reason(name, words) -> None:
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
def test_a_failed_import_is_reported_with_its_error_and_line(tmp_path, monkeypatch, source, words) -> None:
    (tmp_path / "broken.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert words in problem("broken:x")


def test_a_module_in_the_current_directory_is_suggested(tmp_path, monkeypatch) -> None:
    (tmp_path / "hidden_here.py").write_text("")
    monkeypatch.chdir(tmp_path)
    assert "PYTHONPATH=." in problem("hidden_here:x")
    assert "PYTHONPATH" not in problem("hidden_there:x")


@pytest.mark.parametrize("name", ["greeting", "greet", "framing", "max-message"])
def test_aliases_work_by_both_names_and_other_protocols_reject_them(name) -> None:
    assert (name, "echo") in {(alias.name, alias.protocol) for alias in ALIASES}
    value = {"greeting": "hi", "greet": "first-data", "framing": "line", "max-message": "50"}[name]
    ours = vars(made("echo", **{name: value}))
    assert ours == vars(made("echo", f"{name}={value}")) != vars(made("echo"))
    assert isinstance(made("echo"), EchoFactory)
    assert "is given twice" in problem("echo", f"{name}={value}", **{name: value})
    rejection = problem("mine:Answer", **{name: value})
    assert rejection == f"--{name}: an option of the protocol echo, and not of --protocol mine:Answer"


def test_an_error_of_the_echo_factory_names_the_setting() -> None:
    assert problem("echo", "max-message=0").startswith("--protocol echo: max-message is 0 bytes")
    assert problem("echo", framing="line", greeting=r"a\n").startswith(
        "--greeting: the greeting contains a line feed; with the framing `line`"
    )


def test_a_single_process_protocol_is_rejected_with_several_workers() -> None:
    assert IProtocolFactory.providedBy(made("mine:Alone"))
    assert problem("mine:Alone", processes=2).endswith("--workers has to be 1, not 2")


def test_the_list_of_protocols_has_a_line_for_each_protocol_and_option() -> None:
    lines = listing().splitlines()
    assert "echo: Greets each client, then echoes everything that it sends." in lines
    assert "    --protocol-option max-message=…: a whole number [default: 65536]" in lines


@pytest.fixture
def install_entry_points(tmp_path, monkeypatch) -> Callable[[str, str], None]:
    """Install a distribution with entry points."""
    monkeypatch.syspath_prepend(tmp_path)

    def install_entry_points(name: str, entry_points: str) -> None:
        package = tmp_path / f"{name}-1.0.dist-info"
        package.mkdir()
        (package / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (package / "entry_points.txt").write_text(f"[rtservice.protocols]\n{entry_points}")

    return install_entry_points


def listed_protocols(message: str) -> list[str]:
    """The names of protocols in an error that lists them."""
    match = re.search(r"not one of (.*), nor package\.module:name", message)
    assert match is not None, message
    return match[1].split(", ")


@pytest.mark.parametrize("others", ["", "aaa = nowhere:X\nmine-other = mine:Late\nzzz = mine:Gone\nchat = nowhere:X\n"])
def test_installed_packages_provide_protocols_by_name(install_entry_points, others) -> None:
    """Other packages do not change the result."""
    before = set(listed_protocols(problem("no-such-name")))
    if others:
        install_entry_points("others", others)
    install_entry_points(
        "mine",
        "mine-everything = mine:Everything\nmine-answer = mine:Answer [extra]\n"
        "mine-gone = mine:Gone\necho = mine:Answer\n",
    )
    assert made("mine-answer").logPrefix() == "Answer"
    assert isinstance(made("echo"), EchoFactory)  # a package cannot take the name of a shipped protocol
    names = listed_protocols(problem("no-such-name"))
    assert names[:2] == ["echo", "chat"]
    assert names[2:] == sorted(set(names[2:]))
    new = {"aaa", "mine-other", "zzz"} if others else set()
    assert set(names) == before | new | {"mine-answer", "mine-everything", "mine-gone"}
    assert problem("mine-answers").endswith("; did you mean mine-answer?")
    listed = listing()
    assert "mine-everything: Takes one of each.\n    --protocol-option text=…: a string [required]\n" in listed
    assert "    --protocol-option color=…: one of red, blue [default: red]\n" in listed
    assert "    --protocol-option some=…: a whole number, repeatable [default: none]\n" in listed
    assert "    --protocol-option other=…: object, cannot be given as text [default: none]\n" in listed
    assert "mine-answer: (no description)\n" in listed
    assert "mine-gone: mine has no attribute 'Gone'" in listed


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
def test_an_unknown_name_suggests_a_known_one(monkeypatch, name, meant) -> None:
    # A package installed on this machine may have a more similar name.
    nothing = importlib.metadata.EntryPoints()
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **given: nothing)
    message = problem(name)
    assert re.findall("did you mean (.*?)[?]", message) == ([] if meant is None else [meant]), message


def test_a_module_whose_names_cannot_be_listed_is_reported_in_one_line(monkeypatch) -> None:
    def fail() -> list[str]:
        raise RuntimeError

    monkeypatch.setattr(sys.modules["mine"], "__dir__", fail, raising=False)
    assert problem("mine:Nothing").endswith("mine has no attribute 'Nothing'")


@pytest.mark.parametrize(
    ("option", "meant"),
    [("max_mesage=5", "max-message"), ("maxmessage=5", "max-message"), ("Greeting=x", "greeting"), ("zzz=x", None)],
)
def test_an_unknown_option_suggests_a_known_one(option, meant) -> None:
    message = problem("echo", option)
    assert re.findall("; did you mean (.*?)[?]$", message) == ([] if meant is None else [meant]), message


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
def test_the_text_of_a_file_is_utf_8_with_or_without_a_byte_order_mark(tmp_path, content, words) -> None:
    (tmp_path / "text").write_bytes(content)
    if words is None:
        assert made("mine:Everything", "text=@text", directory=str(tmp_path)).given["text"] == "grün"
    else:
        message = problem("mine:Everything", "text=@text", directory=str(tmp_path))
        assert message == f"--protocol mine:Everything: option text: the value of '{tmp_path}/text' {words}"
    # Bytes are unchanged.
    raw = made("mine:Everything", "text=x", "raw=@text", directory=str(tmp_path)).given["raw"]
    assert raw == content.removesuffix(b"\n").removesuffix(b"\r")
