"""``constants.bin``: its bytes, where they come from, and what is not believed."""

from __future__ import annotations

import hashlib

import constants_definition
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from pocketrec.errors import ArtifactError, StorageError
from pocketrec.format import constants, quantiser
from pocketrec.format.layouts import hash_mlp
from pocketrec.format.trellis_codes import CODES


def test_the_bytes_are_those_of_the_digest():
    assert hashlib.sha256(constants.PATH.read_bytes()).hexdigest() == constants.DIGEST


def test_every_number_is_what_its_definition_says():
    stored, defined = constants.constants(), constants_definition.tables()
    assert set(stored) == set(defined)
    for name, table in defined.items():
        assert (stored[name].dtype, stored[name].shape) == (np.float32, table.shape)
        assert_allclose(stored[name], table, rtol=1e-6, atol=0)


def test_a_second_writing_is_the_same_file(tmp_path):
    constants_definition.write(tmp_path / "a.bin")
    constants_definition.write(tmp_path / "b.bin")
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()
    assert (tmp_path / "a.bin").stat().st_size == constants.PATH.stat().st_size


@pytest.mark.parametrize("number", range(1, len(CODES) + 1))
def test_a_code_has_the_table_of_its_number(number):
    code, (bits, span, memory, _) = CODES[number - 1], constants_definition.TRELLISES[number - 1]
    assert (code.bits, code.span, code.memory) == (bits, span, memory)
    assert code.table.shape == (1 << memory, span)
    assert_array_equal(code.table, constants.trellis(number))


@pytest.mark.parametrize("bits", range(quantiser.MOST_BITS + 1))
def test_levels_rise_and_are_their_own_mirror(bits):
    found = quantiser.levels(bits)
    assert len(found) == 1 << bits
    assert (np.diff(found) > 0).all()
    assert_array_equal(found, -found[::-1])
    assert_array_equal(found * 2**14, np.rint(found * 2**14))


def test_no_other_file_is_believed(tmp_path):
    content = bytearray(constants.PATH.read_bytes())
    content[-3] ^= 1
    (tmp_path / "other.bin").write_bytes(content)
    with pytest.raises(ArtifactError, match="install PocketRec again"):
        constants.read(tmp_path / "other.bin")
    with pytest.raises(StorageError, match=r"Cannot read .*none\.bin"):
        constants.read(tmp_path / "none.bin")


def test_primes_are_all_primes_of_their_range():
    for buckets in (2, 3, 10, 100, 1009):
        numbers = np.arange(16 * buckets + 1, 17 * buckets)
        prime = [int(n) for n in numbers if all(n % d for d in range(2, int(n**0.5) + 1))]
        assert hash_mlp._primes(buckets).tolist() == prime
