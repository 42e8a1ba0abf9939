from __future__ import annotations

import json

import pytest

from swarm.engines.layout import Fingerprint, is_loaded, metadata_id, short_digest
from swarm.errors import ManifestInvalid, SettingsError

ONE = {"engine": "vllm", "version": "0.32.0", "tp_rank": "0 of 2", "content": "a" * 64}


def test_are_fields_in_any_order_one_fingerprint() -> None:
    other = Fingerprint(dict(reversed(ONE.items())))
    assert Fingerprint(ONE) == other
    assert Fingerprint(ONE).digest == other.digest
    assert Fingerprint(ONE).model_id("org/m") == f"org/m#loaded-{other.digest}"


@pytest.mark.parametrize("name", ONE)
def test_does_every_field_count_and_is_it_named(name: str) -> None:
    ours, theirs = Fingerprint(ONE), Fingerprint({**ONE, name: "other"})
    assert ours.digest != theirs.digest
    (difference,) = ours.differences(theirs)
    assert (difference.field, difference.ours, difference.theirs) == (name, ONE[name], "other")


def test_is_a_field_that_one_side_lacks_a_difference() -> None:
    without = Fingerprint({name: value for name, value in ONE.items() if name != "version"})
    assert [str(one) for one in without.differences(Fingerprint(ONE))] == [
        "version is (not said) here and 0.32.0 there"
    ]
    assert without.differences(without) == []


def test_is_it_read_as_it_was_written() -> None:
    assert Fingerprint.read(Fingerprint(ONE).text) == Fingerprint(ONE)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"a":1}', '{"a": "b"}', '{"b":"1","a":"2"}', "[" * 4000, json.dumps({"a": None})]
)
def test_is_what_strangers_write_refused_unless_it_is_canonical(text: str) -> None:
    with pytest.raises(ManifestInvalid):
        Fingerprint.read(text)


def test_is_one_that_no_manifest_can_carry_refused() -> None:
    with pytest.raises(SettingsError, match="4096"):
        Fingerprint({"config": "x" * 5000})


def test_do_digests_of_configs_depend_on_what_they_say_only() -> None:
    assert short_digest({"a": 1, "b": [2]}) == short_digest({"b": [2], "a": 1})
    assert short_digest({"a": 1}) != short_digest({"a": 2})
    assert short_digest(None) == ""


def test_are_ids_of_one_model_told_from_those_of_another() -> None:
    assert metadata_id("org/m") == "org/m#metadata"
    assert is_loaded(Fingerprint(ONE).model_id("org/m"), "org/m")
    assert not is_loaded(Fingerprint(ONE).model_id("org/m2"), "org/m")
    assert not is_loaded("org/m", "org/m")
