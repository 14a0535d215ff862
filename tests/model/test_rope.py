"""Stretched rotary positions: which configuration comes of a key, and what a model does with it."""

import json
import math

import pytest
import torch
from layouts import make_rows
from tiny import build_model, make_model, make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llmray.arguments.loading import load as load_arguments
from llmray.arguments.model import ModelArguments
from llmray.batch import Segments
from llmray.errors import ArgumentsError, ModelError
from llmray.model import export, rope, tuning
from llmray.model.attention import use_flat
from llmray.model.load import load_model

KINDS = ("linear", "dynamic", "yarn", "llama3")
ARCHS = ("llama", "qwen3", "gemma3_text", "qwen3_moe")
OWN = 16  # tokens that the models below were "trained" for


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("rope")
    for arch in ARCHS:
        make_model(root / arch, arch, amplify=4.0, max_position_embeddings=OWN)
    make_tokenizer(root / "llama")
    return root


def loaded(directory, cutoff_len, **keys):
    return load_model(
        directory,
        ModelArguments(**keys),
        dtype=torch.float32,
        device=torch.device("cpu"),
        gradient_checkpointing=False,
        cutoff_len=cutoff_len,
    )


def of_whole_rows(config):
    """The parameters of the layers that see the whole row."""
    parameters = config.rope_parameters
    return parameters.get("full_attention", parameters)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_factor_is_the_cutoff_over_the_models_length_rounded_up(kind, arch, folders):
    """40 / 16 = 2.5, so 3; 3 * 16 = 48 positions, a whole number."""
    config = loaded(folders / arch, 40, rope_scaling=kind).config

    found = of_whole_rows(config)
    assert (found["rope_type"], found["factor"]) == (kind, 3.0)
    assert type(config.max_position_embeddings) is int
    # dynamic positions count from the model's own length, the others from what is written
    assert config.max_position_embeddings == (16 if kind == "dynamic" else 48)
    assert rope.max_positions(config) == 48
    if kind in ("yarn", "llama3"):
        assert found["original_max_position_embeddings"] == 16
    if kind == "llama3":
        assert (found["low_freq_factor"], found["high_freq_factor"]) == (1.0, 4.0)
    if arch == "gemma3_text":
        assert config.rope_parameters["sliding_attention"]["rope_type"] == "default"


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_is_read_by_transformers_with_the_same_logits(kind, arch, folders, tmp_path):
    model = loaded(folders / arch, 40, rope_scaling=kind)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    plain = loaded(folders / arch, 40)
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        found, expected, before = (m(ids).logits for m in (model, again, plain))

    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found - before).abs().max() > 0.01


def test_linear_frequencies_are_divided():
    model, config = build_model(max_position_embeddings=OWN), build_model().config
    config.max_position_embeddings = OWN
    rope.configure(config, "linear", 2 * OWN)
    stretched = AutoModelForCausalLM.from_config(config)
    torch.testing.assert_close(
        stretched.model.rotary_emb.inv_freq * 2, model.model.rotary_emb.inv_freq
    )


def test_dynamic_base_by_hand():
    """Size 8, length 32 over 16, factor 3: the base grows by (3 * 2 - 2) ** (8 / 6) = 4 ** (4/3);
    the frequency of pair i is divided by that to the power of 2 i / 8.
    """
    found = rope._exponent(3.0, 2.0, 8)
    expected = [1 / math.pow(4 ** (4 / 3), 2 * i / 8) for i in range(4)]
    torch.testing.assert_close(found, torch.tensor(expected))


@pytest.mark.parametrize("arch", ["llama", "gemma3_text"])
def test_dynamic_positions_of_a_row_are_those_of_each_sequence_alone(arch, folders):
    """Reference: transformers' own, a fresh model for each sequence; lengths 9, 33, 17."""
    model = loaded(folders / arch, 40, rope_scaling="dynamic")
    parts = torch.randint(3, 300, (1, 59), generator=torch.Generator().manual_seed(0))
    expected = []
    for part in parts.split((9, 33, 17), 1):
        fresh = AutoModelForCausalLM.from_config(model.config)
        fresh.load_state_dict(model.state_dict())
        with torch.no_grad():
            expected.append(fresh.eval()(part, use_cache=False).logits)
    use_flat(model)
    positions = torch.cat([torch.arange(n) for n in (9, 33, 17)])[None]
    for _ in range(2):  # what came before changes nothing
        with torch.no_grad():
            found = model(
                parts,
                position_ids=positions,
                segments=Segments((9, 33, 17), (9, 33, 17)),
                use_cache=False,
            ).logits
        torch.testing.assert_close(found, torch.cat(expected, 1), atol=2e-5, rtol=1e-5)


def test_nothing_changes_where_the_cutoff_fits(folders, caplog):
    with caplog.at_level("INFO", "llmray"):
        config = loaded(folders / "llama", OWN, rope_scaling="yarn").config
    assert config.rope_parameters["rope_type"] == "default"
    assert "rope_scaling: not needed, the model has positions for 16 tokens" in caplog.text


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_more_of_the_same_multiplies(kind):
    config = build_model(max_position_embeddings=OWN).config
    rope.configure(config, kind, 2 * OWN)
    rope.configure(config, kind, 6 * OWN)
    assert (config.max_position_embeddings, config.rope_parameters["factor"]) == (6 * OWN, 6.0)
    assert config.rope_parameters.get("original_max_position_embeddings", OWN) == OWN


def test_another_kind_on_top_is_refused():
    config = build_model(max_position_embeddings=OWN).config
    rope.configure(config, "linear", 2 * OWN)
    with pytest.raises(ArgumentsError, match=r"stretched by linear already.*rope_scaling: linear"):
        rope.configure(config, "yarn", 6 * OWN)


@pytest.mark.parametrize("arch", ["gpt2", "bloom"])
def test_models_without_rotary_positions_are_refused(arch):
    with pytest.raises(ArgumentsError, match=f"{arch} has no rotary positions"):
        rope.configure(build_model(arch).config, "linear", 4000)


def test_the_cutoff_is_asked_for(folders):
    with pytest.raises(ValueError, match="cutoff_len"):
        loaded(folders / "llama", None, rope_scaling="linear")


def adapter(folders, place, **keys):
    base = {"model_name_or_path": str(folders / "llama"), "cutoff_len": 40, **keys}
    arguments = load_arguments(base, environ={})
    model = loaded(folders / "llama", 40, **keys)
    tuned = tuning.apply(model, arguments, is_trainable=True, upcast=True)
    export.write_weights(tuned, place, AutoTokenizer.from_pretrained(folders / "llama"))
    return place


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_records_the_positions_that_it_needs(kind, folders, tmp_path):
    place = adapter(folders, tmp_path / "adapter", rope_scaling=kind)
    again = loaded(folders / "llama", None, adapter_name_or_path=(str(place),))
    expected = loaded(folders / "llama", 40, rope_scaling=kind)
    assert again.config.rope_parameters == expected.config.rope_parameters
    assert again.config.max_position_embeddings == expected.config.max_position_embeddings
    # and so does one that is trained on from there
    tuned = adapter(folders, tmp_path / "next", adapter_name_or_path=(str(place),))
    assert (tuned / rope.RECORD).read_bytes() == (place / rope.RECORD).read_bytes()


def test_a_plain_adapter_records_nothing(folders, tmp_path):
    assert not (adapter(folders, tmp_path / "adapter") / rope.RECORD).exists()


def test_records_that_differ_or_are_damaged_are_refused(folders, tmp_path):
    config = AutoConfig.from_pretrained(folders / "llama")
    for name, length in (("one", 32), ("two", 64)):
        (tmp_path / name).mkdir()
        config.max_position_embeddings = length
        rope.write_record(config, tmp_path / name)
    with pytest.raises(ModelError, match="trained on different rotary positions"):
        rope.configure(config, None, None, [tmp_path / "one", tmp_path / "two"])
    (tmp_path / "one" / rope.RECORD).write_text(json.dumps({"factor": 2}))
    with pytest.raises(ModelError, match="is damaged"):
        rope.configure(config, None, None, [tmp_path / "one"])


def test_lengths_of_sequences():
    positions = torch.tensor([[0, 1, 2, 0, 1, 5, 6, 2]])
    assert rope._lengths(positions).tolist() == [[3, 3, 3, 2, 2, 7, 7, 3]]


def test_padded_rows_have_the_lengths_of_their_sequences():
    rows = make_rows()
    assert (rope._lengths(rows.padded.position_ids) >= 1).all()


@pytest.mark.parametrize(
    ("arch", "parameters", "expected"),
    [
        ("llama", {"rope_type": "dynamic", "factor": 2.0}, True),
        ("llama", {"rope_type": "linear", "factor": 2.0}, False),
        ("llama", {"rope_type": "default"}, False),
        ("gpt2", None, False),
    ],
)
def test_positions_that_change_with_the_length_are_known(arch, parameters, expected):
    more = {} if parameters is None else {"rope_parameters": {**parameters, "rope_theta": 1e4}}
    assert rope.follows_length(build_model(arch, **more).config) is expected
