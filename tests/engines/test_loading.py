"""What the engines load, and what each refuses in one line."""

import pytest
from engines import each

from treeflash.decoding.session import SequenceSession
from treeflash.errors import BackendError, CheckpointError, ConfigError, UnsupportedModelError
from treeflash.testing.models import edit_config, write_target


@pytest.mark.sample(4)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_dtype_is_the_one_asked_for(engine, pair, dtype):
    backend = engine.load(*pair, dtype=dtype)
    assert backend.dtype == dtype
    weights = [backend.drafter_model.fc.weight, backend.head.module.norm.weight]
    assert [str(x.dtype).rpartition(".")[2] for x in weights] == [dtype] * 2


@each(
    ("settings", "message"),
    cuda=[
        ({"kv_bits": 4}, "kv_bits must be 8 on the cuda backend, got 4"),
        ({"draft_bits": 7}, r"draft_bits must be one of \(4, 8, 16\) .* got 7"),
        ({"device_map": "auto"}, "remove device"),
        ({"memory_gb": 1}, "sets no memory aside on a CPU; remove memory_gb"),
    ],
    mlx=[
        ({"kv_bits": 7}, "kv_bits must be one of"),
        ({"draft_bits": 7}, "draft_bits must be one of"),
        ({"device": "cuda:0"}, "gpu or cpu"),
    ],
)
def test_settings_that_an_engine_lacks_are_refused(engine, pair, settings, message):
    with pytest.raises((BackendError, ConfigError), match=message):
        engine.load(*pair, **settings)


HALF_ROTATED = {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}


@each(
    ("damage", "error", "message"),
    cuda=[
        ({"model_type": "lama"}, CheckpointError, r"config\.json is not usable"),
        ({"rms_norm_eps": "x"}, CheckpointError, r"config\.json is not usable.*rms_norm_eps"),
        ({"hidden_act": "silo"}, CheckpointError, "transformers does not know 'silo'"),
        (
            {"rope_parameters": HALF_ROTATED},
            CheckpointError,
            "cannot run .* with the settings .*: ",
        ),
        ({"vocab_size": 33}, CheckpointError, r"weight has the shape \(.*asks for \("),
        (
            {"layer_types": ["chunked_attention", "full_attention"] * 2},
            UnsupportedModelError,
            "llama .* have chunked_attention",
        ),
    ],
    mlx=[({"model_type": "nothing"}, UnsupportedModelError, "'nothing'")],
)
def test_a_configuration_that_makes_no_model_is_one_line(
    engine, tmp_path, capfd, damage, error, message
):
    write_target(tmp_path, "llama", seed=1)
    edit_config(tmp_path, lambda config: config.update(damage))
    with pytest.raises(error, match=message) as caught:
        engine.load(tmp_path)
    assert "\n" not in str(caught.value)
    assert "REPORT" not in capfd.readouterr().err


@pytest.mark.parametrize("which", [0, 1], ids=["target", "drafter"])
def test_a_damaged_file_is_named(engine, pair, tmp_path, which):
    folders = []
    for i, source in enumerate(pair):
        folders.append(tmp_path / str(i))
        folders[i].mkdir()
        for file in source.iterdir():
            data = file.read_bytes()
            cut = i == which and file.suffix == ".safetensors"
            (folders[i] / file.name).write_bytes(data[: len(data) // 2] if cut else data)
    with pytest.raises(CheckpointError) as caught:
        engine.load(*folders)
    assert str(folders[which]) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_several_pairs_are_loaded_at_once(engine, pair):
    """What one computes is no part of another."""
    sequences = [SequenceSession(engine.load(*pair), drafts=True) for _ in range(2)]
    roots = [sequence.extend([5, 6, 7]) for sequence in sequences]
    assert roots[0] == roots[1]
    blocks = [sequence.draft(roots[0]) for sequence in sequences]
    log_probs = [x.backend.drafter.log_probs(y) for x, y in zip(sequences, blocks, strict=True)]
    assert (log_probs[0] == log_probs[1]).all()
