"""Added tokens: their ids, how their rows begin, what trains, what an adapter needs."""

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from tiny import make_model, make_tokenizer

from llmray import vocabulary
from llmray.arguments.loading import load
from llmray.arguments.model import ModelArguments
from llmray.data.tokenizer import load_tokenizer
from llmray.errors import ArgumentsError, ModelError
from llmray.model import embedding, export, tuning
from llmray.model.load import load_model
from llmray.train.random_state import seed_everything

UNTIED = {"tie_word_embeddings": False}
ARCHITECTURES = [
    ("llama", {}),
    ("llama", UNTIED),
    ("qwen3", {}),
    ("gemma3_text", {}),  # embeddings are scaled after they are looked up
    ("qwen3_moe", UNTIED),
    ("gptj", UNTIED),  # a head with bias
]
KEYS = {
    "stage": "sft",
    "do_train": True,
    "dataset": "identity",
    "template": "chatml",
    "output_dir": "out",
    "lora_rank": 2,
}
NEW = ModelArguments(add_tokens=("wug", "blick"), add_special_tokens=("<call>",))


@pytest.fixture
def place(tmp_path):
    make_tokenizer(tmp_path)
    return make_model(tmp_path, amplify=2.0)


def loaded(directory, arguments, dtype=torch.float32):
    return load_model(
        directory, arguments, dtype=dtype, device=torch.device("cpu"), gradient_checkpointing=False
    )


def described(directory: Path, method: str, texts: dict[str, str]) -> ModelArguments:
    path = directory / "tokens.json"
    path.write_text(json.dumps(texts))
    return ModelArguments(new_special_tokens_config=str(path), init_special_tokens=method)


def tables(model):
    return [
        m.weight.detach() for m in (model.get_input_embeddings(), model.get_output_embeddings())
    ]


@pytest.mark.parametrize(("arch", "fields"), ARCHITECTURES)
def test_rows_of_added_tokens_begin_near_the_mean_and_spare_rows_at_it(tmp_path, arch, fields):
    """Noise of deviation 1/sqrt(32) over 32 numbers has a length of about 1: within 0.5 and 1.7
    but for one in 10^5. 323 ids are filled up to 384 rows."""
    make_tokenizer(tmp_path)
    make_model(tmp_path, arch, amplify=2.0, **fields)
    plain, model = loaded(tmp_path, ModelArguments()), loaded(tmp_path, NEW)
    assert model.config.get_text_config().vocab_size == 384
    is_tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert is_tied == (not fields)
    for before, after in zip(tables(plain), tables(model), strict=True):
        assert after.shape == (384, 32)
        torch.testing.assert_close(after[:320], before, rtol=0, atol=0)
        mean = before.mean(0)
        torch.testing.assert_close(after[323:], mean.expand(61, 32))
        for row in after[320:323]:
            assert 0.5 < (row - mean).norm() < 1.7
        assert (after[320] - after[321]).norm() > 0.5
    ids = torch.arange(8)[None]
    torch.testing.assert_close(
        model(ids, use_cache=False).logits[..., :320], plain(ids, use_cache=False).logits
    )


def test_a_head_of_its_own_begins_elsewhere_than_the_embedding(tmp_path):
    make_tokenizer(tmp_path)
    make_model(tmp_path, amplify=2.0, **UNTIED)
    below, above = tables(loaded(tmp_path, NEW))
    assert (below[320] - above[320]).norm() > 0.5


def test_a_head_with_bias_has_the_mean_bias_for_new_rows(tmp_path):
    make_tokenizer(tmp_path)
    make_model(tmp_path, "gptj", **UNTIED)
    plain, model = loaded(tmp_path, ModelArguments()), loaded(tmp_path, NEW)
    torch.testing.assert_close(
        model.lm_head.bias[320:], plain.lm_head.bias.mean().expand(64).contiguous()
    )


@pytest.mark.parametrize(("arch", "fields"), ARCHITECTURES[:4])
def test_descriptions_give_the_mean_of_their_tokens(tmp_path, arch, fields):
    """Of embedding and head each by its own rows; an id that is added itself does not count."""
    tokenizer = make_tokenizer(tmp_path)
    make_model(tmp_path, arch, amplify=2.0, **fields)
    texts = {"<call>": "the sea <stop> and the wind", "<stop>": "a short poem"}
    model = loaded(tmp_path, described(tmp_path, "desc_init", texts))
    ids = tokenizer("the sea ")["input_ids"] + tokenizer(" and the wind")["input_ids"]
    for before, after in zip(
        tables(loaded(tmp_path, ModelArguments())), tables(model), strict=True
    ):
        torch.testing.assert_close(after[320], before[ids].mean(0))
        torch.testing.assert_close(
            after[321], before[tokenizer("a short poem")["input_ids"]].mean(0)
        )
    noisy = loaded(tmp_path, described(tmp_path, "desc_init_w_noise", texts))
    for before, after in zip(tables(model), tables(noisy), strict=True):
        assert 0.5 < (after[320] - before[320]).norm() < 1.7
        torch.testing.assert_close(after[322:], before[322:], rtol=0, atol=0)


def test_without_a_description_and_under_noise_init_rows_are_near_the_mean(place):
    texts = {"<call>": "the sea"}
    arguments = described(place, "desc_init", texts)
    both = ModelArguments(**{**arguments.model_dump(), "add_tokens": ("wug",)})
    model, noisy = loaded(place, both), loaded(place, described(place, "noise_init", texts))
    mean = tables(loaded(place, ModelArguments()))[0].mean(0)
    assert 0.5 < (tables(model)[0][320] - mean).norm() < 1.7  # wug
    torch.testing.assert_close(
        tables(noisy)[0][320],
        tables(loaded(place, ModelArguments(add_special_tokens=("<call>",))))[0][320],
    )


def test_a_row_depends_on_no_seed_and_draws_nothing_from_it(place):
    seed_everything(1)
    first = tables(loaded(place, NEW))[0]
    drawn = torch.rand(1)
    seed_everything(2)
    torch.testing.assert_close(tables(loaded(place, NEW))[0], first, rtol=0, atol=0)
    seed_everything(1)
    loaded(place, ModelArguments())
    assert torch.rand(1) == drawn


def test_tokens_that_fit_into_spare_rows_begin_there(tmp_path, caplog):
    make_tokenizer(tmp_path)
    make_model(tmp_path, vocab_size=350)
    with caplog.at_level(logging.INFO, "llmray"):
        model = loaded(tmp_path, described(tmp_path, "desc_init", {"<call>": "the sea"}))
    before = tables(loaded(tmp_path, ModelArguments()))[0]
    ids = make_tokenizer(tmp_path / "again")("the sea")["input_ids"]
    after = tables(model)[0]
    assert after.shape[0] == 350
    torch.testing.assert_close(after[320], before[ids].mean(0))
    torch.testing.assert_close(after[321:], before[321:], rtol=0, atol=0)
    assert "the embedding has 350 rows for 321 ids: it stays" in caplog.text


def test_the_mean_is_that_of_rows_that_stand_for_tokens(tmp_path):
    make_tokenizer(tmp_path)
    make_model(tmp_path, vocab_size=322)
    model = loaded(tmp_path, NEW)
    before = tables(loaded(tmp_path, ModelArguments()))[0]
    torch.testing.assert_close(tables(model)[0][323], before[:320].mean(0))


def test_low_precision_rows_are_those_of_float32_rounded(place):
    exact, rounded = tables(loaded(place, NEW))[0], tables(loaded(place, NEW, torch.bfloat16))[0]
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=1e-2, atol=1e-2)


def test_a_tokenizer_with_more_tokens_than_rows(place):
    tokenizer = make_tokenizer(place)
    tokenizer.add_tokens(["wug", "blick"])
    tokenizer.save_pretrained(place)
    plain = loaded(place, ModelArguments())
    with pytest.raises(ModelError, match=r"ids up to 321, its embedding 320 rows.*resize_vocab"):
        embedding.require_room(plain, load_tokenizer(place, ModelArguments()))
    model = loaded(place, ModelArguments(resize_vocab=True))
    embedding.require_room(model, tokenizer)
    table = tables(model)[0]
    assert table.shape[0] == 384
    mean = table[:320].mean(0)
    assert (table[321] - mean).norm() > 0.5
    torch.testing.assert_close(table[322], mean)


def test_tokens_that_are_there_already_are_not_added(place, caplog):
    with caplog.at_level(logging.INFO, "llmray"):
        model = loaded(place, ModelArguments(add_special_tokens=("<|im_end|>",)))
    assert tables(model)[0].shape[0] == 320
    assert "all tokens that are to be added are in the tokenizer already" in caplog.text
    assert embedding.of(model).added == {}


def test_ordinary_and_special_tokens_of_the_tokenizer(place):
    tokenizer = load_tokenizer(place, NEW)
    ids = tokenizer("a wug<call>", add_special_tokens=False)["input_ids"]
    assert ids[-1] == 322
    assert 320 in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a wug"
    assert load_tokenizer(place, ModelArguments(model_max_length=77)).model_max_length > 77
    tokenizer.model_max_length = 5
    tokenizer.save_pretrained(place)
    raised = load_tokenizer(place, ModelArguments(model_max_length=77))
    assert raised.model_max_length == 77


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "There is no run file"),
        ("", "is empty"),
        ("- <a>\n- <b>\n", "holds a list"),
        ("<a>: 3\n", "description of '<a>' is 3"),
        ("<a>:\n", "description of '<a>' is None"),
        ("<a>: ' '\n", "description of '<a>' is ' '"),
        ("<a>: b: c\n", "is no YAML"),
        ("<a>: one\n<a>: two\n", "stands in the file twice"),
    ],
)
def test_malformed_descriptions(tmp_path, content, message):
    path = tmp_path / "tokens.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ArgumentsError, match=message) as error:
        vocabulary.additions(ModelArguments(new_special_tokens_config=str(path)))
    assert "new_special_tokens_config" in str(error.value)


def test_an_unknown_way_to_begin_and_one_without_descriptions():
    keys = {**KEYS, "model_name_or_path": "m", "add_special_tokens": "<a>"}
    with pytest.raises(ArgumentsError, match="noise_init, desc_init, desc_init_w_noise"):
        load({**keys, "init_special_tokens": "zero_init"}, environ={})
    with pytest.raises(ArgumentsError, match="there are no descriptions"):
        load({**keys, "init_special_tokens": "desc_init"}, environ={})


def test_tokens_of_both_keys_and_the_file_are_added_once(tmp_path):
    path = tmp_path / "tokens.yaml"
    path.write_text('"<a>": the first\n"<b>": the second\n')
    found = vocabulary.additions(
        ModelArguments(
            add_special_tokens=("<c>", "<a>", "<c>"), new_special_tokens_config=str(path)
        )
    )
    assert found.tokens == ("<c>", "<a>", "<b>")
    with pytest.raises(ArgumentsError, match=r"holds <a>, also named as special"):
        vocabulary.additions(
            ModelArguments(add_tokens=("<a>",), new_special_tokens_config=str(path))
        )


# ---- what trains, and what an adapter needs -----------------------------------------------------


def arguments(place, **keys):
    return load({**KEYS, "model_name_or_path": str(place), **keys}, environ={})


def tuned(place, *, is_trainable=True, **keys):
    made = arguments(place, **keys)
    return tuning.apply(
        loaded(place, made.model), made, is_trainable=is_trainable, upcast=is_trainable
    )


ADDS = {"add_tokens": ["wug"], "add_special_tokens": ["<call>"]}


def shaken(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tuning.trainable(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def saved(model, place, directory, **keys):
    tokenizer = load_tokenizer(place, arguments(place, **keys).model)
    export.write_weights(model, directory, tokenizer)
    return str(directory)


def logits(model):
    ids = torch.tensor([[3, 4, 320, 321, 5]])
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize(("arch", "fields"), [a for a in ARCHITECTURES if a[0] != "gptj"])
def test_the_embedding_trains_beside_an_adapter_and_reloads(tmp_path, arch, fields, caplog):
    place, output = tmp_path / "base", tmp_path / "adapter"
    make_tokenizer(place)
    make_model(place, arch, amplify=2.0, **fields)
    with caplog.at_level(logging.INFO, "llmray"):
        model = shaken(tuned(place, **ADDS))
    trained = {name for name in tuning.trainable(model) if "lora_" not in name}
    assert "embed_tokens" in " ".join(trained)
    assert any("lm_head" in name for name in trained) == bool(fields)
    assert "train(s) whole beside the adapter" in caplog.text
    expected = logits(model)
    name = saved(model, place, output, **ADDS)
    written = json.loads((output / "vocabulary.json").read_text())
    assert written == {"rows": 384, "added": {"wug": 320, "<call>": 321}, "special": ["<call>"]}
    again = tuned(place, adapter_name_or_path=name, **ADDS).eval()
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-5)
    merged = tuned(place, is_trainable=False, adapter_name_or_path=name, **ADDS)
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-4)
    export.write_weights(merged, tmp_path / "whole", load_tokenizer(place, NEW))
    whole = loaded(tmp_path / "whole", ModelArguments())
    torch.testing.assert_close(logits(whole), expected, rtol=0, atol=1e-4)


def test_an_adapter_without_the_embedding_still_holds_the_rows(place, tmp_path, caplog):
    """Loaded after other rows were put in place, it restores those that it was trained with."""
    with caplog.at_level(logging.WARNING, "llmray"):
        model = shaken(tuned(place, **ADDS, additional_target="norm"))
    assert "additional_target=norm leaves out model.embed_tokens" in caplog.text
    assert "the embedding does not train" in caplog.text
    expected = logits(model)
    name = saved(model, place, tmp_path / "adapter", **ADDS)
    made = arguments(place, adapter_name_or_path=name, **ADDS)
    base = loaded(place, made.model)
    with torch.no_grad():
        base.get_input_embeddings().weight[320:] = 9.0
    again = tuning.apply(base, made, is_trainable=False, upcast=False)
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-4)


def test_rows_of_an_embedding_with_an_adapter_of_its_own(place, tmp_path):
    """It trains by that, not whole; its file holds the rows that the adapter was trained on."""
    keys = {**ADDS, "lora_target": "embed_tokens,q_proj"}
    model = shaken(tuned(place, **keys))
    assert {name.split(".lora_")[0] for name in tuning.trainable(model)} == {
        "base_model.model.model.embed_tokens",
        *(f"base_model.model.model.layers.{i}.self_attn.q_proj" for i in range(2)),
    }
    expected = logits(model)
    name = saved(model, place, tmp_path / "adapter", **ADDS)
    made = arguments(place, adapter_name_or_path=name, **ADDS)
    again = tuning.apply(loaded(place, made.model), made, is_trainable=False, upcast=False)
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "target", "left_out"),
    [
        ({}, "lm_head", None),  # it is the embedding
        (UNTIED, "lm_head", "model.embed_tokens"),
        (UNTIED, "embed_tokens", "lm_head"),
        (UNTIED, "embed_tokens,lm_head", None),
    ],
)
def test_what_additional_target_leaves_out_is_said(tmp_path, caplog, fields, target, left_out):
    make_tokenizer(tmp_path)
    make_model(tmp_path, **fields)
    with caplog.at_level(logging.WARNING, "llmray"):
        tuned(tmp_path, **ADDS, additional_target=target)
    said = [r.getMessage() for r in caplog.records if "leaves out" in r.getMessage()]
    assert (f"leaves out {left_out}:" in said[0]) if left_out else not said


@pytest.mark.parametrize("trains", [True, False])
def test_an_adapter_of_another_vocabulary_is_refused(place, tmp_path, trains):
    name = saved(tuned(place, **ADDS), place, tmp_path / "adapter", **ADDS)
    for keys, message in [
        ({}, r"2 added tokens.* write add_tokens: wug and add_special_tokens: <call>, first"),
        ({"add_tokens": ["wug"]}, r"here <call> has no such id"),
        ({"add_tokens": ["<call>", "wug"]}, r"here <call>, wug have no such id"),
    ]:
        with pytest.raises(ModelError, match=message):
            tuned(place, is_trainable=trains, adapter_name_or_path=name, **keys)
    many = [f"t{i}" for i in range(80)]
    with pytest.raises(ModelError, match=r"belongs to an embedding of 384 rows.* has 448"):
        tuned(
            place,
            is_trainable=trains,
            adapter_name_or_path=name,
            add_tokens=["wug"],
            add_special_tokens=["<call>", *many],
        )


def test_an_adapter_made_elsewhere_is_judged_by_its_tensors(place, tmp_path):
    name = saved(tuned(place, **ADDS), place, tmp_path / "adapter", **ADDS)
    (tmp_path / "adapter" / "vocabulary.json").unlink()
    with pytest.raises(ModelError, match="belongs to an embedding of 384 rows, and the model has"):
        tuned(place, adapter_name_or_path=name)
    tuned(place, adapter_name_or_path=name, **ADDS)
    (tmp_path / "adapter" / "vocabulary.json").write_text('{"rows": 384}')
    with pytest.raises(ModelError, match=r"vocabulary\.json is damaged"):
        tuned(place, adapter_name_or_path=name, **ADDS)


def test_an_adapter_fits_a_base_that_was_enlarged_before(place, tmp_path):
    name = saved(tuned(place, **ADDS), place, tmp_path / "adapter", **ADDS)
    whole = tmp_path / "whole"
    export.write_weights(loaded(place, NEW_SAME), whole, load_tokenizer(place, NEW_SAME))
    tuned(whole, adapter_name_or_path=name)


NEW_SAME = ModelArguments(**ADDS)


def test_an_adapter_without_added_tokens_goes_on_with_some(place, tmp_path, caplog):
    name = saved(tuned(place), place, tmp_path / "adapter")
    with caplog.at_level(logging.WARNING, "llmray"):
        tuned(place, adapter_name_or_path=name, **ADDS)
    assert "the embedding does not train" in caplog.text


def test_freezing_says_that_added_tokens_do_not_train(place, caplog):
    freeze = {"finetuning_type": "freeze", "freeze_trainable_layers": 1, **ADDS}
    with caplog.at_level(logging.WARNING, "llmray"):
        tuned(place, **freeze, freeze_extra_modules="embed_tokens")
        assert caplog.text == ""
        tuned(place, **freeze)
    assert "freeze_extra_modules" in caplog.text


def test_noise_has_the_length_that_is_said():
    known = torch.zeros(3, 4096)
    row = embedding._row(known, None, "t", "embedding", is_noisy=True)
    assert math.isclose(row.norm(), 1.0, rel_tol=0.05)
