"""Is a key file private, whole and never overwritten, and does nothing of a key leak?"""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from swarm.errors import SettingsError
from swarm.security import cluster_key
from swarm.security.cluster_key import FILE_BYTES_MAX, KEY_BYTES, ClusterKey, Keyring

ONE, TWO, THREE = (ClusterKey(bytes([n]) * KEY_BYTES) for n in (1, 2, 3))
LINE = "swarm-key-1:AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE"


def parsed(text: str) -> Keyring:
    return cluster_key.parse(text.encode(), Path("k"))


def test_what_was_created_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "swarm.key"
    key = cluster_key.create(path)
    assert cluster_key.load(path).keys == (key,)
    assert path.stat().st_mode & 0o777 == 0o600
    assert str(key) in path.read_text()  # its fingerprint, for people


def test_does_an_odd_umask_not_matter(tmp_path: Path) -> None:
    before = os.umask(0o777)
    try:
        cluster_key.create(tmp_path / "k")
    finally:
        os.umask(before)
    assert cluster_key.load(tmp_path / "k")


def test_are_two_keys_never_the_same(tmp_path: Path) -> None:
    assert cluster_key.generate() != cluster_key.generate()


def test_is_a_key_never_overwritten(tmp_path: Path) -> None:
    cluster_key.create(tmp_path / "k")
    before = (tmp_path / "k").read_bytes()
    with pytest.raises(SettingsError, match="no key is ever overwritten"):
        cluster_key.create(tmp_path / "k")
    assert (tmp_path / "k").read_bytes() == before


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="No such file"):
        cluster_key.create(tmp_path / "missing" / "k")


@pytest.mark.parametrize("mode", [0o604, 0o660, 0o644, 0o601, 0o620])
def test_is_a_file_that_others_can_use_refused_with_what_to_run(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "k"
    cluster_key.create(path)
    path.chmod(mode)
    with pytest.raises(SettingsError, match=rf"mode {mode:04o}.*run: chmod 600 {path}"):
        cluster_key.load(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_is_a_file_of_another_user_refused(tmp_path: Path) -> None:
    path = tmp_path / "k"
    cluster_key.create(path)
    os.chown(path, 12345, -1)
    with pytest.raises(SettingsError, match=r"uid 12345.*chown"):
        cluster_key.load(path)


@pytest.mark.parametrize(
    ("user", "owner", "mode", "fine"),
    [
        (1000, 0, 0o440, True),
        (1000, 0, 0o444, False),
        (1000, 1000, 0o440, False),
        (0, 0, 0o440, False),
    ],
)
def test_may_a_group_read_what_root_owns_and_another_user_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, user: int, owner: int, mode: int, fine: bool
) -> None:
    key = cluster_key.create(tmp_path / "k")
    found = list((tmp_path / "k").stat())
    found[0], found[4] = stat.S_IFREG | mode, owner
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setattr(os, "fstat", lambda fd: os.stat_result(found))
    if fine:
        assert cluster_key.load(tmp_path / "k").first == key
    else:
        with pytest.raises(SettingsError, match="can be used by others"):
            cluster_key.load(tmp_path / "k")


def test_is_what_is_no_file_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(SettingsError, match="not a file"):
        cluster_key.load(tmp_path / "pipe")
    with pytest.raises(SettingsError, match=r"not a file|Is a directory"):
        cluster_key.load(tmp_path)


def test_is_a_missing_file_named_with_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="swarm keygen"):
        cluster_key.load(tmp_path / "k")


def test_is_a_link_to_a_private_file_fine(tmp_path: Path) -> None:
    key = cluster_key.create(tmp_path / "k")  # orchestrators mount secrets so
    (tmp_path / "link").symlink_to(tmp_path / "k")
    assert cluster_key.load(tmp_path / "link").first == key


def test_is_a_huge_file_not_read(tmp_path: Path) -> None:
    path = tmp_path / "k"
    path.write_bytes(b"#" * (FILE_BYTES_MAX + 1))
    path.chmod(0o600)
    with pytest.raises(SettingsError, match="has more than"):
        cluster_key.load(path)


def test_are_comments_and_blank_lines_nothing() -> None:
    assert parsed(f"# mine\n\n  {LINE}  \r\n# end").keys == (ONE,)


def test_is_the_first_of_two_keys_used() -> None:
    other = LINE.replace("AQ", "Ag").replace("EB", "IC").replace("E", "I")
    assert parsed(f"{LINE}\n{other}").keys == (ONE, TWO)
    assert parsed(f"{other}\n{LINE}").first == TWO


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no key"),
        ("# nothing\n", "holds no key"),
        (LINE[:-1], "line 1 is no key"),
        (LINE + "A", "line 1 is no key"),
        (f"#\n{LINE.replace('key-1', 'key-2')}", "line 2 is no key"),
        (LINE[:-1] + "\N{LATIN SMALL LETTER E WITH ACUTE}", "line 1 is no key"),
        (f"{LINE}\n{LINE}", "twice"),
        ("\n".join(LINE[:-10] + c * 10 for c in "ABC"), "3 keys"),
    ],
)
def test_is_what_is_no_key_file_refused_without_showing_it(text: str, says: str) -> None:
    with pytest.raises(SettingsError, match=says) as caught:
        parsed(text)
    assert "AQEBAQ" not in str(caught.value)


def test_do_keys_not_show_themselves() -> None:
    shown = repr(ONE) + str(ONE) + repr(Keyring((ONE, TWO))) + str(Keyring((ONE, TWO)))
    assert ONE.secret.hex() not in shown
    assert repr(ONE.secret) not in shown
    assert str(Keyring((ONE, TWO))) == f"{ONE} and {TWO}"


def test_has_every_purpose_its_own_secret() -> None:
    secrets = {key.derive(purpose) for key in (ONE, TWO) for purpose in ("authority", "gossip")}
    secrets |= {seal.secret for seal in Keyring((THREE,)).seal_keys}
    assert len(secrets) == 5
    assert ONE.secret not in secrets


def test_is_the_derivation_the_same_for_ever() -> None:
    # Members of different versions must agree: these bytes are part of the protocol.
    assert ONE.derive("authority").hex()[:16] == "cdf3378f4aaf4b7e"
    assert ONE.fingerprint.hex() == "efd9ac13"
    assert Keyring((ONE,)).seal_keys[0].secret.hex()[:16] == "bc22bb2287f6f688"
