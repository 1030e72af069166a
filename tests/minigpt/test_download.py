"""Downloads from a server on 127.0.0.1 that can do what real ones do: ranges, breaks, lies, errors, other versions."""

import hashlib
import http.server
import json
import multiprocessing
import threading
from dataclasses import dataclass, field

import numpy as np
import pytest

from common.cli import UserError
from minigpt.data import load_data
from minigpt.download import download, endpoint_from_env, parquet_splits, read_json

DATA = np.random.default_rng(0).integers(256, size=300_000, dtype=np.uint8).tobytes()
SHA = hashlib.sha256(DATA).hexdigest()


@dataclass
class Site:
    """What the server holds and how it misbehaves; `asked` is the (path, Range) of each request."""

    files: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True
    if_range: bool = True  # whether If-Range is looked at
    etag: str | None = '"one"'
    breaks: list[int] = field(default_factory=list)  # after so many bytes the next answers break off
    codes: list[int] = field(default_factory=list)  # the next answers are these errors
    shift: int = 0  # a 206 begins so many bytes off the place asked for
    length: bool | int = True  # whether Content-Length is sent, or which
    after: list = field(default_factory=list)  # called after each request, one of them
    asked: list = field(default_factory=list)
    address: str = ""

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        wanted = request.headers.get("Range")
        self.asked.append((request.path, wanted))
        if self.codes:
            return request.send_error(self.codes.pop(0))
        if request.path not in self.files:
            return request.send_error(404)
        whole, start = self.files[request.path], 0
        same = not self.if_range or request.headers.get("If-Range") in (None, self.etag)
        if wanted and self.ranges and same:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(whole):
                return request.send_error(416)
            start += self.shift
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {start}-{len(whole) - 1}/{len(whole)}")
        else:
            request.send_response(200)
        body = whole[start:]
        if self.length is not False:
            request.send_header("Content-Length", str(len(body) if self.length is True else self.length))
        if self.etag:
            request.send_header("ETag", self.etag)
        request.end_headers()
        request.wfile.write(body[: self.breaks.pop(0)] if self.breaks else body)
        if self.after:
            self.after.pop(0)()
        return None


def serve(site: Site) -> http.server.ThreadingHTTPServer:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            site.answer(self)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    return server


@pytest.fixture
def site():
    site = Site({"/file": DATA})
    server = serve(site)
    yield site
    server.shutdown()
    server.server_close()


def fetch(site, path, **options):
    return download(f"{site.address}/file", path, **{"wait_s": 0.001, "timeout_s": 5, **options})


def starts(site):
    """Where each request began."""
    return [int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0 for _, wanted in site.asked]


def whole(path):
    assert path.read_bytes() == DATA
    assert [file.name for file in path.parent.iterdir()] == [path.name], "nothing else is left"
    return True


def test_a_whole_file_comes_once(site, tmp_path):
    seen = []
    path = tmp_path / "deep" / "file"
    assert fetch(site, path, sha256=SHA, size=len(DATA), progress=lambda *now: seen.append(now)) == path
    assert whole(path) and seen[-1] == (len(DATA), len(DATA))
    fetch(site, path)
    assert len(site.asked) == 1, "what is there is not fetched again"


def test_a_break_is_resumed_where_it_happened(site, tmp_path):
    site.breaks = [100_000, 50_000, 0]
    assert fetch(site, tmp_path / "file") and whole(tmp_path / "file")
    assert starts(site) == [0, 100_000, 150_000, 150_000]


def test_another_process_goes_on_with_the_part(site, tmp_path):
    site.breaks = [70_000]
    with pytest.raises(
        UserError, match=r"/file -> .*file: the connection ended after 70,000 of 300,000 bytes; gave up"
    ):
        fetch(site, tmp_path / "file", tries=1)
    assert not (tmp_path / "file").exists() and (tmp_path / "file.part").read_bytes() == DATA[:70_000]
    assert fetch(site, tmp_path / "file") and whole(tmp_path / "file") and starts(site) == [0, 70_000]


def test_without_a_validator_it_starts_anew_but_with_a_digest_it_resumes(site, tmp_path):
    site.etag, site.breaks = None, [70_000]
    assert fetch(site, tmp_path / "file") and whole(tmp_path / "file") and starts(site) == [0, 0]
    (tmp_path / "file").unlink()
    site.asked, site.breaks = [], [70_000]
    assert fetch(site, tmp_path / "file", sha256=SHA) and whole(tmp_path / "file") and starts(site) == [0, 70_000]


def test_a_server_without_ranges_sends_all_of_it_again(site, tmp_path):
    site.ranges, site.breaks = False, [70_000]
    assert fetch(site, tmp_path / "file") and whole(tmp_path / "file") and starts(site) == [0, 70_000]


@pytest.mark.parametrize("if_range", [True, False])
@pytest.mark.parametrize("size", [len(DATA), len(DATA) - 17])
def test_two_versions_are_never_glued_together(site, tmp_path, if_range, size):
    def change():
        site.files["/file"], site.etag = DATA[::-1][:size], '"two"'

    site.if_range, site.breaks, site.after = if_range, [70_000], [change]
    fetch(site, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == DATA[::-1][:size]
    assert starts(site) == ([0, 70_000] if if_range else [0, 70_000, 0]), "If-Range spares a request where it is known"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_wrong_range_is_not_believed(site, tmp_path):
    site.shift, site.breaks = 5, [70_000]
    assert fetch(site, tmp_path / "file") and whole(tmp_path / "file") and starts(site) == [0, 70_000, 0]


def test_a_part_that_is_too_long_starts_anew(site, tmp_path):
    site.breaks = [70_000]
    with pytest.raises(UserError):
        fetch(site, tmp_path / "file", tries=1)
    (tmp_path / "file.part").write_bytes(DATA + b"more")
    assert fetch(site, tmp_path / "file") and whole(tmp_path / "file")


def test_a_part_that_is_whole_only_gets_its_name(site, tmp_path):
    site.breaks = [70_000]
    with pytest.raises(UserError):
        fetch(site, tmp_path / "file", tries=1)
    (tmp_path / "file.part").write_bytes(DATA)
    assert fetch(site, tmp_path / "file", sha256=SHA) and whole(tmp_path / "file") and len(site.asked) == 1


def test_parts_that_do_not_fit_are_found_by_the_digest(site, tmp_path):
    site.breaks = [70_000]
    with pytest.raises(UserError):
        fetch(site, tmp_path / "file", tries=1)
    (tmp_path / "file.part").write_bytes(bytes(70_000))
    assert fetch(site, tmp_path / "file", sha256=SHA) and whole(tmp_path / "file") and starts(site) == [0, 70_000, 0]


def test_errors_that_pass_are_waited_for_and_others_are_not(site, tmp_path):
    site.codes = [503, 429, 500]
    assert fetch(site, tmp_path / "file") and whole(tmp_path / "file") and len(site.asked) == 4
    for code in (404, 401, 403):
        site.codes, site.asked = [code], []
        with pytest.raises(UserError, match=f"http://.*/file -> .*/other: the server answered {code}"):
            fetch(site, tmp_path / "other")
        assert len(site.asked) == 1
    site.codes, site.asked = [500] * 9, []
    with pytest.raises(UserError, match="answered 500 .*gave up after 3 tries"):
        fetch(site, tmp_path / "other", tries=3)
    assert len(site.asked) == 3 and not (tmp_path / "other").exists()


def test_tries_are_bounded_when_every_answer_breaks(site, tmp_path):
    site.breaks = [1000] * 99
    with pytest.raises(UserError, match="gave up after 4 tries in a row"):
        fetch(site, tmp_path / "file", tries=4)
    assert len(site.asked) == 4 and not (tmp_path / "file").exists()


@pytest.mark.parametrize(
    ("lie", "options", "message"),
    [
        ({"length": len(DATA) + 5}, {"tries": 1}, "ended after 300,000 of 300,005 bytes"),
        ({"length": False}, {}, "does not say how long it is"),
        ({}, {"size": 5}, "is 300,000 bytes, expected 5"),
        ({}, {"sha256": "ab" * 32}, f"has SHA-256 {SHA}, expected abab"),
        ({"length": False, "breaks": [70_000]}, {"size": len(DATA), "tries": 1}, "ended after 70,000 of 300,000"),
    ],
)
def test_lies_never_get_the_final_name(site, tmp_path, lie, options, message):
    for name, value in lie.items():
        setattr(site, name, value)
    with pytest.raises(UserError, match=message):
        fetch(site, tmp_path / "file", **{"tries": 2, **options})
    assert not (tmp_path / "file").exists()


def test_what_is_there_must_have_the_size_asked_for(site, tmp_path):
    (tmp_path / "file").write_bytes(b"short")
    with pytest.raises(UserError, match="file is 5 bytes, expected 300,000: delete it"):
        fetch(site, tmp_path / "file", size=len(DATA))


def test_nobody_answers(tmp_path):
    with pytest.raises(UserError, match=r"http://127.0.0.1:9/file -> .*URLError.*gave up after 2 tries"):
        download("http://127.0.0.1:9/file", tmp_path / "file", tries=2, wait_s=0.001)


def test_ranks_that_start_together_fetch_once(site, tmp_path):
    context = multiprocessing.get_context("spawn")
    arguments = (f"{site.address}/file", tmp_path / "file")
    ranks = [context.Process(target=download, args=arguments) for _ in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(20)
        assert rank.exitcode == 0
    assert whole(tmp_path / "file") and len(site.asked) == 1


def test_json_and_the_endpoint(site, monkeypatch):
    site.files |= {"/good": b'{"a": [1]}', "/bad": b"<html>"}
    site.codes = [503]
    assert read_json(f"{site.address}/good", wait_s=0.001) == {"a": [1]}
    for name, message in (("bad", "the answer is no JSON"), ("none", "the server answered 404")):
        with pytest.raises(UserError, match=f"/{name}: {message}"):
            read_json(f"{site.address}/{name}", wait_s=0.001)
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    assert endpoint_from_env() == "https://mirror.example"
    monkeypatch.delenv("HF_ENDPOINT")
    assert endpoint_from_env() == "https://huggingface.co"


def test_the_config_of_a_data_set(site):
    hub = "https://huggingface.co/api/datasets/o/n/parquet"
    one = b'{"plain": {"train": ["%s/plain/train/0.parquet", "http://elsewhere/1"]}}' % hub.encode()
    two = b'{"default": {"train": []}, "other": {"test": ["http://elsewhere/2"]}}'
    site.files |= {"/api/datasets/o/n/parquet": one, "/api/datasets/o/two/parquet": two}
    site.files |= {"/api/datasets/o/odd/parquet": b"[]"}
    at_endpoint = f"{site.address}/api/datasets/o/n/parquet/plain/train/0.parquet"
    expected = ("plain", {"train": [at_endpoint, "http://elsewhere/1"]})
    assert parquet_splits("o/n", None, endpoint=site.address) == expected
    assert parquet_splits("o/two", None, endpoint=site.address)[0] == "default"
    assert parquet_splits("o/two", "other", endpoint=site.address) == ("other", {"test": ["http://elsewhere/2"]})
    with pytest.raises(ValueError, match="o/two has no config 'third': expected one of default, other"):
        parquet_splits("o/two", "third", endpoint=site.address)
    with pytest.raises(UserError, match=r"expected \{config"):
        parquet_splits("o/odd", None, endpoint=site.address)


def shard_bytes(tokens) -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    return header.tobytes() + np.array(tokens, "<u2").tobytes()


def test_fineweb_comes_with_its_vocabulary(site, tmp_path):
    """256 bytes, one merge and the separator, in GPT-2's files, where bytes are written as printable characters."""
    printable = [byte for byte in range(256) if chr(byte).isprintable() and byte not in (32, 0xA0, 0xAD)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}
    vocabulary = [letters[byte] for byte in printable + others] + ["th", "<|endoftext|>"]
    gpt2, shards = "/openai-community/gpt2/resolve/main", "/datasets/kjj0/fineweb10B-gpt2/resolve/main"
    site.files = {
        f"{gpt2}/vocab.json": json.dumps({token: number for number, token in enumerate(vocabulary)}).encode(),
        f"{gpt2}/merges.txt": b"#version: 0.2\nt h\n",
        f"{shards}/fineweb_val_000000.bin": shard_bytes([257, 256, 256, 0]),
        f"{shards}/fineweb_train_000001.bin": shard_bytes(range(100)),
        f"{shards}/fineweb_train_000002.bin": shard_bytes(range(100, 250)),
    }
    data = load_data("fineweb10B:2", root=tmp_path, endpoint=site.address)
    assert [shard.size for shard in data.train.shards] == [100, 150]
    assert data.held_out_bytes == 5 and data.tokenizer.separator == 257 and data.byte_lengths[256] == 2
    assert len(site.asked) == 5
    assert load_data("fineweb10B:1", root=tmp_path, endpoint="http://127.0.0.1:9").train.size == 100
    assert load_data(str(tmp_path / "fineweb10B")).train.size == 250, "the folder by its path, all that it holds"
    with pytest.raises(UserError, match=r"fineweb_train_000003.bin: the server answered 404"):
        load_data("fineweb10B:3", root=tmp_path, endpoint=site.address)
    with pytest.raises(ValueError, match="but the shards in .* were made with"):
        load_data("fineweb10B:1", "bytes", root=tmp_path, endpoint=site.address)
