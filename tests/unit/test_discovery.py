"""Discovery: which modules are imported, and which projections they declare."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from kappa_log.discovery import discover
from kappa_log.errors import ConfigError, RegistrationError

DECLARE = """
from kappa_log import projection

@projection(topics=["t"], version={version})
def {name}(state: int | None, event) -> int | None:
    return {result}
"""


def declare(file: Path, name: str, version: int = 1, result: int = 1) -> None:
    """Write a module with one projection."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(DECLARE.format(name=name, version=version, result=result))


@pytest.fixture(autouse=True)
def _clean_imports() -> Iterator[None]:
    """Modules and paths of one test are none of another's."""
    modules, path = set(sys.modules), list(sys.path)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def test_each_module_of_a_folder_is_imported(tmp_path: Path) -> None:
    """With or without __init__.py, in folders below too; other files are not."""
    folder = tmp_path / "found_folder"
    declare(folder / "a.py", "first")
    declare(folder / "deeper" / "b.py", "second")
    declare(folder / "not-a-module.py", "third")
    (folder / "notes.txt").write_text("no python")

    assert discover(["found_folder"], tmp_path).names == ["first", "second"]
    assert sys.path[0] == str(tmp_path)


def test_a_nested_folder_may_be_named(tmp_path: Path) -> None:
    """As a path, with or without a slash or dot around it."""
    declare(tmp_path / "some_app" / "views" / "a.py", "nested")

    for name in ("some_app/views", "some_app/views/", "./some_app/views"):
        assert discover([name], tmp_path).names == ["nested"]


def test_a_package_is_imported_whole_and_a_module_alone(tmp_path: Path) -> None:
    """Both by the names that Python knows them by."""
    declare(tmp_path / "found_package" / "__init__.py", "first")
    declare(tmp_path / "found_package" / "sub" / "__init__.py", "second")
    declare(tmp_path / "found_package" / "sub" / "c.py", "third")
    declare(tmp_path / "found_module.py", "fourth")

    assert discover(["found_package.sub"], tmp_path).names == ["second", "third"]
    assert discover(["found_module"], tmp_path).names == ["fourth"]


def test_a_module_that_is_not_there_is_a_wrong_setting(tmp_path: Path) -> None:
    """The message names the setting and where was looked."""
    with pytest.raises(
        ConfigError, match="'no_such_thing' is neither a module nor a folder of"
    ):
        discover(["no_such_thing"], tmp_path)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("1 / 0", r"ZeroDivisionError: division by zero at \w+\.py, line 1$"),
        ("import no_such_library", "No module named 'no_such_library'"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("def f(:", r"SyntaxError: [^<]*\.py, line 1\)$"),
        (
            (
                "from kappa_log import projection\n"
                "@projection(topics=[], version=1)\n"
                "def f(state: int | None, event) -> int | None: ..."
            ),
            r"'f': topics= is \[\]",
        ),
    ],
)
@pytest.mark.parametrize("place", ["failing_folder/a.py", "failing_module.py"])
def test_a_module_that_cannot_be_imported_is_named(
    tmp_path: Path, code: str, message: str, place: str
) -> None:
    """With what is wrong in it; nothing leaves by another way."""
    file = tmp_path / place
    file.parent.mkdir(exist_ok=True)
    file.write_text(code)

    with pytest.raises(RegistrationError, match=message):
        discover([place.partition("/")[0].removesuffix(".py")], tmp_path)


def test_two_of_one_name_and_version_are_refused(tmp_path: Path) -> None:
    """Both modules are named."""
    declare(tmp_path / "double" / "a.py", "total")
    declare(tmp_path / "double" / "b.py", "total")

    with pytest.raises(
        RegistrationError, match=r"'total' version 1 .* double.a and in double.b"
    ):
        discover(["double"], tmp_path)


def test_an_older_version_may_stay_in_another_module(tmp_path: Path) -> None:
    """Live folding and undo need its code."""
    declare(tmp_path / "versions" / "a.py", "total", 1)
    declare(tmp_path / "versions" / "b.py", "total", 2)

    assert discover(["versions"], tmp_path).latest("total").version == 2


def test_a_projection_imported_by_another_module_is_one(tmp_path: Path) -> None:
    """It is the same object."""
    declare(tmp_path / "shared_folder" / "a.py", "total")
    (tmp_path / "shared_folder" / "b.py").write_text(
        "from shared_folder.a import total"
    )

    assert discover(["shared_folder"], tmp_path).names == ["total"]


@pytest.mark.parametrize(("one", "two"), [("one", "two"), ("shop", "shop2")])
@pytest.mark.parametrize("place", ["same_name", "same_app/same_name"])
def test_two_folders_of_one_name_are_told_apart_in_one_process(
    tmp_path: Path, one: str, two: str, place: str
) -> None:
    """Two logs may be open in one process, each with its own projections/."""
    declare(tmp_path / one / place / "a.py", "first")
    declare(tmp_path / two / place / "a.py", "second")

    for folder, names in ((two, ["second"]), (one, ["first"]), (two, ["second"])):
        assert discover([place], tmp_path / folder).names == names


def test_a_users_module_never_replaces_one_of_pythons(tmp_path: Path) -> None:
    """A folder called json is the user's mistake, not everybody's."""
    json = sys.modules["json"]
    (tmp_path / "json").mkdir()

    discover(["json"], tmp_path)

    assert sys.modules["json"] is json


def test_a_helper_module_beside_the_folder_can_be_imported(tmp_path: Path) -> None:
    """The configuration's folder goes first on the path."""
    (tmp_path / "beside_helper.py").write_text("RATE = 2")
    (tmp_path / "uses_helper").mkdir()
    (tmp_path / "uses_helper" / "a.py").write_text(
        "from beside_helper import RATE\n" + dedent(DECLARE.format(
            name="rated", version=1, result="RATE"
        ))
    )  # fmt: skip

    assert discover(["uses_helper"], tmp_path).names == ["rated"]
