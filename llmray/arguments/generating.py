"""Arguments of generation, used by chat, by prediction and by sampling in ppo."""

from __future__ import annotations

from llmray.arguments.group import Field, Float, Group, Int


class GeneratingArguments(Group):
    """How a response is drawn from the model."""

    do_sample: bool = Field(True, description="Draw tokens; false always takes the likeliest.")
    temperature: Float = Field(
        0.95, ge=0, description="Above 1 flattens, below 1 sharpens the choice; 0 does not draw."
    )
    top_p: Float = Field(
        0.7, gt=0, le=1, description="Draw from the likeliest tokens that hold this probability."
    )
    top_k: Int = Field(50, ge=0, description="Draw from this many likeliest tokens; 0 from all.")
    num_beams: Int = Field(1, ge=1, description="Beams searched side by side; 1 for none.")
    max_length: Int = Field(
        1024,
        ge=1,
        description="Tokens of prompt and response together; counts where max_new_tokens is 0.",
    )
    max_new_tokens: Int = Field(
        1024, ge=0, description="Tokens of the response; 0 leaves it to max_length."
    )
    repetition_penalty: Float = Field(
        1.0, gt=0, description="Above 1 makes tokens that occurred already less likely."
    )
    length_penalty: Float = Field(
        1.0, description="Beam search: above 0 prefers long, below 0 short responses."
    )
    skip_special_tokens: bool = Field(True, description="Leave special tokens out of the text.")
