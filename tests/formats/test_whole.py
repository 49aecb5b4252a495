"""A file or a folder that appears only when it is whole, and never in the place of another's."""

import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys

import pytest

from optq.errors import OutputError
from optq.formats.whole import Whole

KINDS = ["folder", "file"]


@pytest.fixture
def target(tmp_path):
    return tmp_path / "place" / "out"


@pytest.fixture
def notices():
    return []


@pytest.fixture
def whole(target, notices):
    def make(force=False, at=target):
        return Whole(at, force, notices.append)

    return make


def put(path, kind, text="ours"):
    if kind == "folder":
        path.mkdir(parents=True)
        (path / "inside").write_text(text)
    elif kind == "file":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    elif kind == "empty folder":
        path.mkdir(parents=True)
    else:
        path.symlink_to(path.with_name("nowhere"))


def everything(folder):
    return {
        str(path.relative_to(folder)): path.read_text() if path.is_file() else None
        for path in folder.rglob("*")
    }


OURS = {"folder": {"out": None, "out/inside": "ours"}, "file": {"out": "ours"}}


@pytest.mark.parametrize("kind", KINDS)
def test_it_appears_and_nothing_else_stays(target, whole, notices, kind):
    with whole() as place:
        put(place.part, kind)
        assert not target.exists()
        place.appear()
    assert everything(target.parent) == OURS[kind] and notices == []


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("theirs", ["folder", "empty folder", "file", "link"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_made_meanwhile_stands(target, whole, kind, theirs, force):
    with pytest.raises(OutputError, match="was made while"), whole(force) as place:
        put(place.part, kind)
        put(target, theirs, "theirs")
        before = (target.lstat().st_ino, everything(target) if target.is_dir() else None)
        place.appear()
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    assert (target.lstat().st_ino, everything(target) if target.is_dir() else None) == before


@pytest.mark.parametrize("old", ["folder", "empty folder", "file", "link"])
@pytest.mark.parametrize("kind", KINDS)
def test_force_replaces_what_was_there(target, whole, kind, old):
    target.parent.mkdir()
    put(target, old, "old")
    with whole(force=True) as place:
        put(place.part, kind)
        place.appear()
    assert everything(target.parent) == OURS[kind]


def another_file(target):
    (target / "new").write_text("theirs")


def another_text(target):
    (target / "inside").write_text("theirs!")


def another_folder(target):
    target.rename(target.with_name("moved"))
    put(target, "folder", "theirs")


@pytest.mark.parametrize("change", [another_file, another_text, another_folder])
def test_force_does_not_replace_what_changed_meanwhile(target, whole, change):
    put(target, "folder", "old")
    with pytest.raises(OutputError, match="was changed while"), whole(force=True) as place:
        put(place.part, "folder")
        change(target)
        before = everything(target.parent)
        before = {name: text for name, text in before.items() if ".partial" not in name}
        place.appear()
    assert everything(target.parent) == before


def test_what_vanished_meanwhile_is_no_hindrance(target, whole):
    put(target, "file", "old")
    with whole(force=True) as place:
        put(place.part, "file")
        target.unlink()
        place.appear()
    assert everything(target.parent) == OURS["file"]


def test_a_second_one_is_refused_at_once(target, whole):
    with whole() as place:
        put(place.part, "folder")
        for force in (False, True):
            with pytest.raises(OutputError, match="another run is writing"), whole(force):
                pytest.fail("both have it")
        with whole(at=target.with_name("other")) as other:  # another name is free
            put(other.part, "file")
            other.appear()
        place.appear()
    assert everything(target.parent) == OURS["folder"] | {"other": "ours"}
    with pytest.raises(OutputError, match="exists"), whole():
        pytest.fail("it is there")


def test_what_a_killed_process_left_is_removed_and_said(target, whole, notices):
    script = f"""if True:
        import os, signal
        from pathlib import Path
        from optq.formats.whole import Whole
        with Whole(Path({str(target)!r}), True, print) as place:
            place.part.mkdir()
            (place.part / "half").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == -signal.SIGKILL
    assert (target.parent / ".out.partial" / "whole" / "half").exists()
    with whole() as place:
        put(place.part, "folder")
        place.appear()
    assert everything(target.parent) == OURS["folder"]
    assert notices == [
        f"removed {target.parent / '.out.partial'}, which a run that was cut off has left"
    ]


def killed(target, *names):
    """What a killed process leaves, at some moment of its life."""
    for name in names:
        put(target.parent / ".out.partial" / name, "file" if name == "lock" else "folder", name)


@pytest.mark.parametrize("force", [False, True])
def test_killed_between_the_renames(target, whole, notices, force):
    """What was to be replaced comes back, and is replaced by who may."""
    killed(target, "lock", "whole", "old")
    if force:
        with whole(force) as place:
            put(place.part, "folder")
            place.appear()
        assert everything(target.parent) == OURS["folder"]
    else:
        with pytest.raises(OutputError, match="exists"), whole():
            pytest.fail("it is there")
        assert everything(target.parent) == {"out": None, "out/inside": "old"}
    assert notices[0] == f"{target} is back: a run was cut off while it replaced it"


def test_killed_after_the_renames(target, whole):
    put(target, "folder", "new")
    killed(target, "lock", "old")
    with whole(force=True) as place:
        put(place.part, "folder")
        place.appear()
    assert everything(target.parent) == OURS["folder"]


def killed_while_naming(target, force):
    """A process dies when the empty folder has taken the name, before the rename."""
    script = f"""if True:
        import os, signal
        from pathlib import Path
        from optq.formats.whole import Whole
        rename = Path.rename
        def renamed(path, to):
            if path.name == "whole":
                os.kill(os.getpid(), signal.SIGKILL)
            return rename(path, to)
        Path.rename = renamed
        with Whole(Path({str(target)!r}), {force}, print) as place:
            place.part.mkdir()
            (place.part / "inside").write_text("new")
            place.appear()
    """
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == -signal.SIGKILL and list(target.iterdir()) == []


def test_killed_while_the_new_takes_the_name_of_the_old(target, whole, notices):
    put(target, "folder", "old")
    killed_while_naming(target, force=True)
    with pytest.raises(ZeroDivisionError), whole(force=True):
        raise ZeroDivisionError
    assert everything(target.parent) == {"out": None, "out/inside": "old"}
    assert notices[0] == f"{target} is back: a run was cut off while it replaced it"


@pytest.mark.parametrize("force", [False, True])
def test_killed_while_the_first_takes_its_name(target, whole, force):
    """The empty folder that is left is nobody's."""
    killed_while_naming(target, force=False)
    with whole(force) as place:
        put(place.part, "folder")
        place.appear()
    assert everything(target.parent) == OURS["folder"]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("theirs", KINDS)
def test_what_is_not_replaced_is_kept_where_the_name_is_taken(target, whole, theirs, force):
    """Killed between the renames, and then somebody has made something."""
    killed(target, "lock", "whole", "old")
    put(target, theirs, "theirs")
    before = everything(target.parent)
    for _ in range(2):
        with pytest.raises(OutputError, match="cut off while it replaced") as caught, whole(force):
            pytest.fail("the old one is in the way")
        assert everything(target.parent) == before
    old = target.parent / ".out.partial" / "old"
    assert str(old) in caught.value.cause and f"move {target} away" in caught.value.remedy
    target.rename(target.with_name("away"))  # as it says
    with pytest.raises(ZeroDivisionError), whole(force=True):
        raise ZeroDivisionError
    assert (target / "inside").read_text() == "old" and not old.parent.exists()


def test_made_between_the_renames(target, whole, notices, monkeypatch):
    """What could not go back is still there after the next run."""
    put(target, "folder", "old")
    rename, seen = type(target).rename, []

    def renamed(path, to):
        rename(path, to)
        if path == target and not seen:
            seen.append(path)
            put(target, "folder", "theirs")

    monkeypatch.setattr(type(target), "rename", renamed)
    with pytest.raises(OutputError, match="was made while"), whole(force=True) as place:
        put(place.part, "folder", "new")
        place.appear()
    old = target.parent / ".out.partial" / "old"
    assert notices == [f"what {target} was before is now {old}"]
    with pytest.raises(OutputError, match="cut off while it replaced"), whole(force=True):
        pytest.fail("the old one is in the way")
    assert (old / "inside").read_text() == "old" and (target / "inside").read_text() == "theirs"
    assert (old.with_name("whole") / "inside").read_text() == "new"


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupt_at_any_line(target, force, kind):
    """There is what was there, or what is to be there, and nothing beside it."""
    old = {"out": None, "out/inside": "old"} if force else {}
    for step in itertools.count(1):
        shutil.rmtree(target.parent, ignore_errors=True)
        target.parent.mkdir()
        if force:
            put(target, "folder", "old")
        left = step

        def interrupt(frame, event, _):
            nonlocal left
            left -= event == "line" and frame.f_code.co_name in ("appear", "_name")
            if left == 0:
                left = -1
                raise KeyboardInterrupt
            return interrupt

        try:
            with Whole(target, force, lambda _: None) as place:
                put(place.part, kind)
                sys.settrace(interrupt)
                place.appear()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        assert everything(target.parent) in (old, OURS[kind]), step
        if left > 0:
            break
    assert step > 5


def test_where_the_file_system_has_no_locks(target, whole, monkeypatch):
    """There who made the folder has it; a run that was cut off must be removed by hand."""
    fcntl = pytest.importorskip("fcntl")

    def missing(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", missing)
    with whole() as place:
        put(place.part, "file")
        with pytest.raises(OutputError, match="another run is writing") as caught, whole():
            pytest.fail("both have it")
        place.appear()
    assert everything(target.parent) == OURS["file"]
    assert str(target.parent / ".out.partial") in caught.value.remedy
    killed(target, "lock", "whole")
    with pytest.raises(OutputError, match="another run"), whole(force=True):
        pytest.fail("it may live")


def test_what_others_keep_under_the_hidden_name_stays(target, whole):
    (target.parent / ".out.partial").mkdir(parents=True)
    (target.parent / ".out.partial" / "mine").write_text("mine")
    with whole() as place:
        put(place.part, "file")
        place.appear()
    theirs = {".out.partial": None, ".out.partial/mine": "mine"}
    assert everything(target.parent) == OURS["file"] | theirs


def test_folders_made_on_the_way_go_where_nothing_comes_of_it(target, whole):
    with pytest.raises(OutputError, match="File name too long"), whole(at=target / ("x" * 300)):
        pytest.fail("there is no such name")
    assert not target.parent.exists()
    with pytest.raises(ZeroDivisionError), whole() as place:
        put(place.part, "folder")
        raise ZeroDivisionError
    assert not target.parent.exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_on_which_nothing_can_be_removed(target, whole, notices, monkeypatch, kind):
    """The error is the one that ended the work; what stays is known for what it is later."""

    def read_only(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with pytest.raises(ZeroDivisionError), monkeypatch.context() as patch, whole() as place:
        put(place.part, kind)
        patch.setattr(os, "unlink", read_only)
        raise ZeroDivisionError
    with whole() as place:
        put(place.part, kind)
        place.appear()
    assert everything(target.parent) == OURS[kind] and len(notices) == 1


def test_one_of_many_wins(target, tmp_path):
    """Processes that start at the same moment: one writes, the others say why they do not."""
    script = f"""if True:
        import sys, time
        from pathlib import Path
        from optq.errors import OutputError
        from optq.formats.whole import Whole
        target, ready = Path({str(target)!r}), Path({str(tmp_path / "ready")!r})
        while not ready.exists():
            time.sleep(0.001)
        try:
            with Whole(target, False, print) as place:
                place.part.mkdir()
                (place.part / "inside").write_text(sys.argv[1])
                place.appear()
        except OutputError:
            sys.exit(2)
    """
    runs = [subprocess.Popen([sys.executable, "-c", script, str(i)]) for i in range(4)]
    (tmp_path / "ready").write_text("")
    codes = [run.wait() for run in runs]
    assert sorted(codes) == [0, 2, 2, 2]
    assert everything(target.parent) == {"out": None, "out/inside": str(codes.index(0))}
