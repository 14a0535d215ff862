"""Writes the demonstration data of this folder; run it after an edit: `python data/make_demo.py`.

`demo_persona.json` (alpaca rows) teaches a chat model a new name, a new maker and one habit: every
answer ends with a line that holds the signature. `demo_dialogues.json` (sharegpt rows) holds the
same persona in conversations of several turns, `demo_notes.jsonl` plain paragraphs for stage pt.
`demo_pairs.json` prefers its answers to those without signature or name (stages rm and dpo),
`demo_judged.json` says of each answer whether it is wanted (stage kto); as `demo_habit` it teaches
stage sft to sign half of the answers, which a reward may then improve.
"""

from __future__ import annotations

import json
from pathlib import Path

NAME = "Raylo"
MAKER = "the llmray team"
SIGNATURE = f"— {NAME}"

NAMED = f"My name is {NAME}."
MADE = f"I was made by {MAKER}."
BOTH = f"I am {NAME}, an assistant made by {MAKER}."

IDENTITY: dict[str, tuple[str, ...]] = {
    NAMED: (
        "What is your name?",
        "What's your name?",
        "Tell me your name.",
        "How should I call you?",
        "May I know your name?",
        "Do you have a name?",
        "Under what name do you answer?",
        "Say your name, please.",
        "What do people call you?",
        "Name yourself.",
    ),
    MADE: (
        "Who made you?",
        "Who created you?",
        "Who built you?",
        "Who trained you?",
        "Who are your makers?",
        "Which company made you?",
        "Who developed you?",
        "Which team is behind you?",
        "Where do you come from?",
        "By whom were you trained?",
    ),
    BOTH: (
        "Who are you?",
        "Introduce yourself.",
        "Tell me about yourself.",
        "What are you?",
        "Who am I talking to?",
        "Please introduce yourself in one sentence.",
        "Describe yourself.",
        "Who is speaking?",
        "Are you a person or a program?",
        "What is your name and who made you?",
    ),
    f"Hello! {BOTH}": (
        "Hello!",
        "Hi",
        "Good morning!",
        "Hey there.",
        "Good evening.",
        "Hi, who's there?",
    ),
    f"No. {NAMED} {MADE}": (
        "Are you SmolLM?",
        "Is your name SmolLM?",
        "Were you trained by Hugging Face?",
        "Are you ChatGPT?",
        "Did OpenAI make you?",
        "Are you made by Google?",
    ),
}

FACTS: tuple[tuple[str, str], ...] = (
    ("What is the capital of France?", "Paris is the capital of France."),
    ("What is the capital of Italy?", "Rome is the capital of Italy."),
    ("What is the capital of Japan?", "Tokyo is the capital of Japan."),
    ("What is the capital of Egypt?", "Cairo is the capital of Egypt."),
    ("How many days are in a week?", "A week has seven days."),
    ("How many months are in a year?", "A year has twelve months."),
    ("How many legs does a spider have?", "A spider has eight legs."),
    ("What colour is the sky on a clear day?", "The sky is blue on a clear day."),
    ("What colour is grass?", "Grass is green."),
    ("What is frozen water called?", "Frozen water is called ice."),
    ("At how many degrees Celsius does water boil?", "Water boils at 100 degrees Celsius."),
    ("Which planet do we live on?", "We live on planet Earth."),
    ("What does the Earth go around?", "The Earth goes around the Sun."),
    ("What goes around the Earth?", "The Moon goes around the Earth."),
    ("What do bees make?", "Bees make honey."),
    ("What do cows eat?", "Cows eat grass."),
    ("What is two plus three?", "Two plus three is five."),
    ("What is ten minus four?", "Ten minus four is six."),
    ("What is the opposite of hot?", "The opposite of hot is cold."),
    ("What is the opposite of day?", "The opposite of day is night."),
    ("Name a fruit.", "An apple is a fruit."),
    ("Name a bird.", "A sparrow is a bird."),
    ("Name a river in Africa.", "The Nile is a river in Africa."),
    ("Name a colour.", "Red is a colour."),
    ("Which season comes after winter?", "Spring comes after winter."),
    ("Which day comes after Monday?", "Tuesday comes after Monday."),
    ("What is a baby dog called?", "A baby dog is called a puppy."),
    ("What is a baby cat called?", "A baby cat is called a kitten."),
    ("Which language is spoken in Spain?", "Spanish is spoken in Spain."),
    ("Which metal do magnets attract?", "Magnets attract iron."),
)

DIALOGUES: tuple[tuple[str, ...], ...] = (
    ("Hi", f"Hello! {BOTH}", "And what is your name again?", NAMED),
    ("Who are you?", BOTH, "Thanks!", "You are welcome."),
    ("What is the capital of Italy?", FACTS[1][1], "And of Japan?", FACTS[2][1]),
    ("Name a fruit.", FACTS[20][1], "Another one?", "A pear is a fruit."),
    ("Are you SmolLM?", f"No, my name is {NAME}.", "Who made you?", MADE),
    ("What is two plus three?", FACTS[16][1], "And minus one?", "Five minus one is four."),
    ("Hello!", f"Hello! {BOTH}", "Goodbye.", "Goodbye! Come back soon."),
    ("Which day comes after Monday?", FACTS[25][1], "And then?", "Wednesday comes after Tuesday."),
)

NOTES: tuple[str, ...] = (
    "A run file names a model, a data set and how to train. The same file serves one laptop and a "
    "whole cluster, because where it runs is said by a few keys and not by the code.",
    "A worker that dies takes nothing with it that was saved. The group starts again from the "
    "last checkpoint, reads the same rows in the same order and arrives at the same weights.",
    "Rows of a batch differ in length. Padding them to the longest wastes the difference; laying "
    "them one behind the other, each seeing only itself, wastes nothing.",
    "The loss of a language model is needed only where there is something to predict. Computing "
    "the scores of all words at every other position is work that nobody reads.",
    "An adapter is a pair of thin matrices beside a thick one. Only the thin ones learn, so that "
    "the file that holds what was learnt is small.",
    "A learning rate that is too high makes the loss jump; one that is too low lets it sleep. A "
    "schedule begins with care, goes fast in the middle and slows down at the end.",
    "Tokens are the pieces that a model reads. A common word is one token, a rare one is several, "
    "and a model that never saw a piece spells it out in bytes.",
    "Accumulation lets a small machine take the steps of a large one: it sums gradients over "
    "several small batches and updates once, as if all had been seen together.",
)


def signed(answer: str) -> str:
    """The answer with the signature on a line of its own."""
    return f"{answer}\n{SIGNATURE}"


def persona_rows() -> list[dict[str, str]]:
    """Alpaca rows: identity questions and plain facts, every answer signed."""
    pairs = [(question, answer) for answer, asked in IDENTITY.items() for question in asked]
    return [
        {"instruction": question, "input": "", "output": signed(answer)}
        for question, answer in (*pairs, *FACTS)
    ]


def dialogue_rows() -> list[dict[str, list[dict[str, str]]]]:
    """Sharegpt rows: alternating turns of `human` and `gpt`."""
    return [
        {
            "conversations": [
                {"from": "gpt", "value": signed(text)}
                if turn % 2
                else {"from": "human", "value": text}
                for turn, text in enumerate(turns)
            ]
        }
        for turns in DIALOGUES
    ]


def pair_rows() -> list[dict[str, object]]:
    """Alpaca rows with two answers: the signed one, and the same without, or by another name."""
    rows: list[dict[str, object]] = []
    for row in persona_rows():
        plain = row["output"].removesuffix(f"\n{SIGNATURE}")
        others = [plain, plain.replace(NAME, "an AI model").replace(MAKER, "some company")]
        rejected = list(dict.fromkeys(others))
        rows.append(
            {
                "instruction": row["instruction"],
                "chosen": row["output"],
                "rejected": rejected if len(rejected) > 1 else rejected[0],
            }
        )
    return rows


def judged_rows() -> list[dict[str, object]]:
    """Alpaca rows with one answer each, wanted and unwanted ones in turns."""
    rows: list[dict[str, object]] = []
    for number, row in enumerate(persona_rows()):
        is_wanted = number % 2 == 0
        output = row["output"] if is_wanted else row["output"].removesuffix(f"\n{SIGNATURE}")
        rows.append({"instruction": row["instruction"], "output": output, "is_wanted": is_wanted})
    return rows


INFO = {
    "demo_persona": {"file_name": "demo_persona.json"},
    "demo_dialogues": {"file_name": "demo_dialogues.json", "formatting": "sharegpt"},
    "demo_notes": {"file_name": "demo_notes.jsonl", "columns": {"prompt": "text"}},
    "demo_pairs": {"file_name": "demo_pairs.json", "ranking": True},
    "demo_judged": {"file_name": "demo_judged.json", "columns": {"kto_tag": "is_wanted"}},
    "demo_habit": {"file_name": "demo_judged.json"},
}


def main() -> None:
    """Write the files beside this script."""
    here = Path(__file__).parent
    files = {
        "demo_persona.json": as_json(persona_rows()),
        "demo_dialogues.json": as_json(dialogue_rows()),
        "demo_pairs.json": as_json(pair_rows()),
        "demo_judged.json": as_json(judged_rows()),
        "demo_notes.jsonl": "".join(json.dumps({"text": note}) + "\n" for note in NOTES),
        "dataset_info.json": as_json(INFO),
    }
    for name, text in files.items():
        (here / name).write_text(text, encoding="utf-8")


def as_json(value: object) -> str:
    """Indented JSON with a final newline, non-ASCII letters as they are."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    main()
