"""How values cross between a program and its test."""

from __future__ import annotations

import pytest

from marlhf.jail.values import decode, encode


@pytest.mark.parametrize("data", [{"int": 1}, {"set": [[]]}, {"a": 1, "b": 2}, {"dict": [1]}, {}])
def test_what_is_no_encoded_value_is_refused(data):
    with pytest.raises(ValueError, match="not an encoded value"):
        decode([data])


def test_values_survive_the_way_across():
    value = [None, True, 1, -(2**60), 0.1, "é\ud800", (1, [2]), {"a": {(1, 2): b"\0"}}, {1}, 2j]
    assert decode(encode(value)) == value
    assert encode({1: 2}) == {"dict": [[1, 2]]}
