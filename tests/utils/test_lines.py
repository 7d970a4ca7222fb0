import hashlib
import json

import pytest

from hf_dash.utils.lines import append_line, cut_torn_line, read_lines, write_lines

FIRST, SECOND = {"b": 1, "a": "ä"}, {"of": [1.5, None]}


@pytest.fixture
def path(tmp_path):
    write_lines(tmp_path / "lines", [("one", FIRST)])
    return tmp_path / "lines"


def test_lines_come_back_with_their_digests(path):
    size = append_line(path, "two", SECOND, path.stat().st_size)
    lines, read = read_lines(path, 1000)
    assert read == size == path.stat().st_size
    assert [(line.name, line.content) for line in lines] == [("one", FIRST), ("two", SECOND)]
    for line in lines:
        text = json.dumps(line.content, sort_keys=True)
        assert line.digest == hashlib.sha256(text.encode()).hexdigest()
    # Any reader of JSON lines reads them.
    assert [json.loads(text) for text in path.read_text().splitlines()] == [
        {"digest": line.digest, line.name: line.content} for line in lines
    ]


@pytest.mark.parametrize("how", ["flush", "write"])
def test_a_full_disk_leaves_the_file_as_it_was(path, how, monkeypatch):
    before = path.read_bytes()

    def full(file_number):
        raise OSError(28, "No space left on device")

    if how == "flush":
        monkeypatch.setattr("hf_dash.utils.lines.os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            append_line(path, "two", SECOND, len(before))
    else:
        with pytest.raises(OSError, match=r"No space left|File too large"):
            append_beyond_a_limit(path, len(before) + 10)
    assert path.read_bytes() == before


def append_beyond_a_limit(path, limit):
    """Let the system write a part of a line only, as a full disk does."""
    resource = pytest.importorskip("resource", reason="only POSIX limits the size of a file")
    import signal

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        append_line(path, "two", SECOND, path.stat().st_size)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_another_size_is_refused(path):
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"lines has {len(before)} bytes, not the 7 that were"):
        append_line(path, "two", SECOND, 7)
    assert path.read_bytes() == before


def test_a_torn_line_is_left_out_and_cut_off(path):
    size = path.stat().st_size
    assert not cut_torn_line(path, size)
    for torn in (b"{", b'{"digest": "', bytes(100)):
        with path.open("ab") as file:
            file.write(torn)
        lines, read = read_lines(path, 1000)
        assert ([line.content for line in lines], read) == ([FIRST], size)
        assert cut_torn_line(path, size)
        assert path.stat().st_size == size


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"[]\n", "line 2 was changed by something else"),
        (b"\n", "line 2 is not JSON"),
        (b'{"digest": "", "a": {}, "b": {}}\n', "line 2 was changed by something else"),
        (b'{"digest": "%b", "a": {}}\n' % (b"0" * 64), "line 2 was changed by something else"),
        (bytes(1001), "line 2 has more than 1,000 bytes"),
    ],
)
def test_other_lines_are_named(path, line, message):
    with path.open("ab") as file:
        file.write(line)
    with pytest.raises(ValueError, match=message):
        read_lines(path, 1000)


def test_a_line_that_is_nested_too_deeply_is_named(path):
    deep = b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    line = b'{"digest": "%b", "a": %b}\n' % (hashlib.sha256(deep).hexdigest().encode(), deep)
    with path.open("ab") as file:
        file.write(line)
    with pytest.raises(ValueError, match="line 2 is nested too deeply"):
        read_lines(path, 10**6)
