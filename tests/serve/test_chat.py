"""Chat over a pipe, and answers in a batch, against transformers' own generation."""

import io
import logging
from pathlib import Path

import pytest
import torch
from tiny import build_model, make_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmray.arguments.loading import load
from llmray.data.conversation import Message
from llmray.errors import DataError
from llmray.model import export, tuning
from llmray.serve.answering import Answerer, generate_answers
from llmray.serve.chat import chat


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("chat")
    make_tokenizer(directory)
    return make_model(directory, amplify=4.0)


def run_file(model_dir, **keys):
    return load(
        {
            "model_name_or_path": str(model_dir),
            "template": "chatml",
            "do_sample": False,
            "max_new_tokens": 8,
            **keys,
        }
    )


def piped(arguments, *lines):
    target = io.StringIO()
    code = chat(arguments, source=io.StringIO("\n".join(lines) + "\n"), target=target)
    return code, target.getvalue()


def expected(model_dir, messages, max_new_tokens=8):
    """What transformers alone answers, likeliest tokens, stopping at chatml's two tokens."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    text = "".join(f"<|im_start|>{m.role}\n{m.content}<|im_end|>\n" for m in messages)
    ids = tokenizer(text + "<|im_start|>assistant\n", return_tensors="pt")
    row = model.generate(
        **ids, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=[1, 2], pad_token_id=0
    )[0]
    return tokenizer.decode(row[ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_answers_continue_the_conversation_until_it_is_cleared(model_dir):
    first = [Message("user", "What is the sea?")]
    answers = [expected(model_dir, first)]
    second = [*first, Message("assistant", answers[0]), Message("user", "And the wind?")]
    answers.append(expected(model_dir, second))
    alone = expected(model_dir, second[-1:])
    assert alone != answers[1]  # else the history would not show

    code, said = piped(
        run_file(model_dir), "What is the sea?", "", "And the wind?", "/clear", "And the wind?"
    )

    assert code == 0
    assert said == "".join(f"{answer}\n" for answer in (*answers, alone))


def test_a_system_message_begins_a_conversation(model_dir, monkeypatch):
    asked = []

    def generate(self, prompts, streamer=None):
        asked.extend(self.tokenizer.decode(prompt) for prompt in prompts)
        return [[]]

    monkeypatch.setattr(Answerer, "generate", generate)
    piped(run_file(model_dir), "Hi", "/system Be brief, and kind.", "Hi", "Why?", "/system", "Hi")
    user, system = "<|im_start|>user\n{}<|im_end|>\n", "<|im_start|>system\n{}<|im_end|>\n"
    header = "<|im_start|>assistant\n"
    first = system.format("Be brief, and kind.") + user.format("Hi") + header
    assert asked == [
        user.format("Hi") + header,
        first,
        first + "<|im_end|>\n" + user.format("Why?") + header,
        user.format("Hi") + header,
    ]


def test_a_misspelt_command_is_no_message(model_dir, caplog):
    with caplog.at_level(logging.WARNING, "llmray"):
        assert piped(run_file(model_dir), "/claer") == (0, "")
    assert "/claer is no command: /clear forgets" in caplog.text


def test_exit_ends_it(model_dir):
    code, said = piped(run_file(model_dir), "/exit", "What is the sea?")
    assert (code, said) == (0, "")


def test_ctrl_c_cuts_an_answer_short_and_the_chat_goes_on(model_dir):
    whole = expected(model_dir, [Message("user", "What is the sea?")])
    seen = []

    class Interrupted(io.StringIO):
        """The terminal of a user who presses Ctrl-C at the third piece of the first answer."""

        def write(self, text):
            seen.append(text)
            if len(seen) == 3:
                raise KeyboardInterrupt
            return super().write(text)

    target = Interrupted()
    arguments = run_file(model_dir)
    source = io.StringIO("What is the sea?\n/clear\nWhat is the sea?\n")
    assert chat(arguments, source=source, target=target) == 0
    first, second = target.getvalue().split(" ...\n")
    assert whole.startswith(first)
    assert first != whole
    assert second == whole + "\n"


def test_ctrl_c_while_waiting_ends_the_chat(model_dir):
    class Waiting(io.StringIO):
        def __next__(self):
            raise KeyboardInterrupt

    assert chat(run_file(model_dir), source=Waiting(), target=io.StringIO()) == 130


def test_beams_are_written_at_their_end(model_dir):
    arguments = run_file(model_dir, num_beams=3)
    _, said = piped(arguments, "What is the sea?")
    [answer] = generate_answers(arguments, ["What is the sea?"])
    assert said.strip() == answer
    assert answer != generate_answers(run_file(model_dir), ["What is the sea?"])[0]


def test_the_oldest_turns_go_when_the_model_has_no_more_positions(tmp_path, caplog):
    make_tokenizer(tmp_path)
    make_model(tmp_path, amplify=4.0, max_position_embeddings=50)
    arguments = run_file(tmp_path)
    last = expected(tmp_path, [Message("user", "And the wind?")])
    with caplog.at_level(logging.INFO, "llmray"):
        _, said = piped(arguments, "What is the sea?", "And the wind?")
    assert "the oldest turn is forgotten" in caplog.text
    assert said.endswith(f"\n{last}\n")


def test_answers_of_a_batch_are_those_of_each_question_alone(model_dir):
    questions = ["What is the sea?", "Hi", "Give three tips for staying healthy!"]
    found = generate_answers(run_file(model_dir), questions)
    assert found == [expected(model_dir, [Message("user", q)]).strip() for q in questions]


def test_an_answer_ends_at_the_templates_and_the_models_own_tokens(model_dir):
    answerer = Answerer.load(run_file(model_dir))
    assert answerer.sampling.stop_ids == (1, 2)  # <|im_start|>, <|im_end|>
    model = build_model()
    model.generation_config.eos_token_id = [7, 8]
    arguments = run_file(model_dir, template="default")
    assert Answerer.of(model, answerer.tokenizer, arguments).sampling.stop_ids == (2, 7, 8)


def test_special_tokens_show_where_they_are_asked_for(model_dir):
    keys = {"skip_special_tokens": False}
    shown = Answerer.load(run_file(model_dir, **keys))
    hidden = Answerer.load(run_file(model_dir))
    ids = [0, *shown.tokenizer("sea")["input_ids"]]
    assert shown.text(ids, plain=False) == "<|endoftext|>sea"
    assert shown.text(ids, plain=True) == hidden.text(ids, plain=False) == "sea"


def test_the_adapter_answers_where_one_is_named(model_dir, tmp_path, caplog):
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    keys = {"stage": "sft", "do_train": True, "dataset": "x", "output_dir": str(tmp_path)}
    tuned = tuning.apply(
        build_model(amplify=4.0), run_file(model_dir, **keys), is_trainable=True, upcast=True
    )
    torch.manual_seed(0)
    for parameter in tuning.trainable(tuned).values():
        torch.nn.init.normal_(parameter, std=0.3)
    export.write_weights(tuned, tmp_path, tokenizer)
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    question = Message("user", "What is the sea?")
    before, after = (expected(path, [question]) for path in (model_dir, tmp_path / "merged"))
    assert before != after

    with caplog.at_level(logging.INFO, "llmray"):
        assert piped(run_file(model_dir, **keys), question.content) == (0, before + "\n")
    assert f"adapter_name_or_path={tmp_path} asks what this file trained" in caplog.text
    arguments = run_file(model_dir, **keys, adapter_name_or_path=str(tmp_path))
    assert piped(arguments, question.content) == (0, after + "\n")


def test_draws_depend_on_the_seed(model_dir):
    def answers(seed):
        arguments = run_file(
            model_dir, do_sample=True, temperature=2.0, top_p=1.0, top_k=0, seed=seed
        )
        return generate_answers(arguments, ["What is the sea?"])

    assert answers(1) == answers(1)
    assert answers(1) != answers(2)


def test_a_message_that_fills_the_model_is_said(tmp_path, caplog):
    make_tokenizer(tmp_path)
    make_model(tmp_path, max_position_embeddings=30)
    with caplog.at_level(logging.WARNING, "llmray"):
        code, said = piped(run_file(tmp_path), "What is the sea, and what is the wind? " * 3)
    assert (code, said) == (0, "")
    assert "no room for an answer" in caplog.text


def test_messages_that_the_template_cannot_write(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    tokenizer.chat_template = "{{ raise_exception('no users here') }}"
    tokenizer.save_pretrained(tmp_path)
    make_model(tmp_path)
    with pytest.raises(DataError, match="no users here"):
        piped(run_file(tmp_path, template=None), "Hi")
