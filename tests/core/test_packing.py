"""The bit stream, against Python's integers and against the independent decoder."""

import json

import decoder
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from optq.core.packing import pack, unpack
from optq.errors import SettingError

BITS = (2, 3, 4, 8)


def words_of(values, bits):
    """The words of one stream, as signed ints, by arithmetic on one big integer."""
    stream = sum(int(value) << (i * bits) for i, value in enumerate(values))
    words = [(stream >> (32 * w)) & 0xFFFFFFFF for w in range(len(values) * bits // 32)]
    return [word - 2**32 if word >= 2**31 else word for word in words]


def random_codes(bits, count, streams, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 2**bits, size=(count, streams), dtype=np.uint8)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.sampled_from(BITS), st.integers(1, 4), st.integers(1, 5), st.integers(0, 1000))
def test_packing_is_one_little_endian_bit_stream(bits, periods, streams, seed):
    codes = random_codes(bits, 32 * periods, streams, seed)
    packed = pack(torch.tensor(codes), bits)
    assert packed.dtype == torch.int32
    assert packed.T.tolist() == [words_of(column, bits) for column in codes.T]
    assert torch.equal(unpack(packed, bits), torch.tensor(codes))
    np.testing.assert_array_equal(decoder.stream_values(packed.numpy().T, bits).T, codes)


@pytest.mark.parametrize("bits", BITS)
def test_the_highest_codes_fill_every_bit(bits):
    codes = torch.full((32, 2), 2**bits - 1, dtype=torch.uint8)
    assert (pack(codes, bits) == -1).all()
    assert torch.equal(unpack(pack(codes, bits), bits), codes)


def test_codes_of_any_integer_dtype_pack_alike():
    codes = torch.tensor(random_codes(3, 64, 3))
    for dtype in (torch.int32, torch.int64):
        assert torch.equal(pack(codes.to(dtype), 3), pack(codes, 3))


def test_codes_need_not_be_contiguous():
    codes = torch.tensor(random_codes(4, 6, 32)).T
    assert torch.equal(pack(codes, 4), pack(codes.contiguous(), 4))
    packed = pack(codes, 4).T.contiguous().T
    assert torch.equal(unpack(packed, 4), codes)


@pytest.mark.parametrize("bits", (2, 4, 8))
def test_the_fewest_values_that_fill_a_word_pack_into_it(bits):
    codes = random_codes(bits, 32 // bits, 2)
    packed = pack(torch.tensor(codes), bits)
    assert packed.T.tolist() == [words_of(column, bits) for column in codes.T]


@pytest.mark.parametrize(("bits", "count"), [(2, 15), (2, 8), (3, 16), (3, 33), (4, 12), (8, 6)])
def test_values_that_do_not_fill_words_are_refused(bits, count):
    with pytest.raises(SettingError):
        pack(torch.zeros(count, 1, dtype=torch.uint8), bits)


@pytest.mark.parametrize(("bits", "stored", "word"), [(4, 7, 0x77777777), (2, 1, 0x55555555)])
def test_the_symmetric_zero_fields_of_version_1_are_the_documented_words(bits, stored, word):
    fields = torch.full((32, 1), stored, dtype=torch.uint8)
    assert (pack(fields, bits) == word).all()


# ------------------------------------------------------------- the decoder, on files made by hand


def handmade(bits, version, inputs=64, outputs=32, size=32, seed=0):
    """A layer's four arrays packed with Python's integers, and its weight by plain loops."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**bits, size=(outputs, inputs))
    zeros = rng.integers(1, 2**bits, size=(outputs, inputs // size))
    scales = rng.uniform(0.01, 0.1, size=zeros.shape).astype(np.float16)
    arrays = {
        "qweight": np.array([words_of(row, bits) for row in codes], dtype=np.int32).T,
        "qzeros": np.array(
            [words_of(zeros[:, g] - (version == 1), bits) for g in range(zeros.shape[1])],
            dtype=np.int32,
        ),
        "scales": scales.T,
        "g_idx": np.array([k // size for k in range(inputs)], dtype=np.int32),
    }
    weight = np.empty(codes.shape)
    for n in range(outputs):
        for k in range(inputs):
            weight[n, k] = float(scales[n, k // size]) * (codes[n, k] - zeros[n, k // size])
    return {name: np.ascontiguousarray(a) for name, a in arrays.items()}, weight


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", BITS)
def test_the_decoder_reads_a_layer_made_by_hand(bits, version):
    arrays, weight = handmade(bits, version)
    np.testing.assert_array_equal(
        decoder.decode_layer(**arrays, bits=bits, version=version).weight, weight
    )


def write_folder(folder, layers, files, config):
    """Layers into the named files, with an index where there are several."""
    where = {}
    for i, (module, arrays) in enumerate(layers.items()):
        for part, array in arrays.items():
            where[f"{module}.{part}"] = (files[i % len(files)], array)
    for file in files:
        save_file({name: a for name, (f, a) in where.items() if f == file}, folder / file)
    if len(files) > 1:
        index = {"weight_map": {name: file for name, (file, _) in where.items()}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))


CONFIG = {
    "quant_method": "gptq",
    "checkpoint_format": "gptq",
    "bits": 4,
    "group_size": 32,
    "desc_act": False,
    "pack_dtype": "int32",
    "dynamic": {"+:.*down": {"bits": 8}, "-:.*lm_head": {}},
}


@pytest.mark.parametrize("files", [["model.safetensors"], ["a.safetensors", "b.safetensors"]])
def test_the_decoder_reads_a_folder_of_one_file_or_many(tmp_path, files):
    q, q_weight = handmade(4, 1, seed=1)
    down, down_weight = handmade(8, 1, seed=2)
    write_folder(tmp_path, {"block.q": q, "block.down": down}, files, CONFIG)
    decoded = decoder.decode(tmp_path)
    assert sorted(decoded) == ["block.down", "block.q"]
    np.testing.assert_array_equal(decoded["block.q"], q_weight)
    np.testing.assert_array_equal(decoded["block.down"], down_weight)


def test_the_decoder_refuses_a_zero_point_that_version_1_cannot_hold():
    arrays, _ = handmade(4, 1)
    arrays["qzeros"][0, 0] = -1
    with pytest.raises(ValueError, match="zero point"):
        decoder.decode_layer(**arrays, bits=4, version=1)


def test_the_decoder_refuses_groups_out_of_order_that_are_not_announced(tmp_path):
    arrays, _ = handmade(4, 1)
    arrays["g_idx"] = arrays["g_idx"][::-1].copy()
    write_folder(tmp_path, {"q": arrays}, ["model.safetensors"], CONFIG)
    with pytest.raises(ValueError, match="desc_act"):
        decoder.decode(tmp_path)
    write_folder(tmp_path, {"q": arrays}, ["model.safetensors"], CONFIG | {"desc_act": True})
    assert list(decoder.decode(tmp_path)) == ["q"]
