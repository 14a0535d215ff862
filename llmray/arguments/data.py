"""Arguments of the data: which sets, how they are mixed, cut, masked and packed into rows."""

from __future__ import annotations

from typing import Literal

from llmray.arguments.group import Field, Group, Int, Names, Numbers, RowsOrShare, TextOrObject


class DataArguments(Group):
    """Everything about the data."""

    template: str | None = Field(
        None,
        description="Conversation format, by name. Not given: the tokenizer's own chat template.",
    )
    dataset: Names = Field((), description="Sets to train on: names in dataset_info.json.")
    eval_dataset: Names = Field((), description="Sets to evaluate on: names in dataset_info.json.")
    eval_on_each_dataset: bool = Field(
        False, description="Report the loss of each evaluation set by itself."
    )
    dataset_dir: TextOrObject = Field(
        "data",
        description="Folder of dataset_info.json and the files it names; REMOTE:name for a hub "
        "repository that holds them, ONLINE when every name is a hub set; or the entries of "
        "dataset_info.json themselves.",
    )
    media_dir: str | None = Field(
        None, description="Folder of images, video and audio. Not given: dataset_dir."
    )
    data_shared_file_system: bool = Field(
        False,
        description="Whether all nodes see the same files. True: the data is prepared once for "
        "the cluster; false: once on each node.",
    )
    cutoff_len: Int = Field(2048, ge=1, description="Tokens of a row; what is longer is cut.")
    truncation: Literal["structure", "llamafactory", "error", "drop", "keep_start", "keep_end"] = (
        Field(
            "structure",
            description="What becomes of a row of more than cutoff_len tokens: its content is "
            "cut, headers and end tokens stay; it is cut as LLaMA-Factory does; it is an error; "
            "it is left out; its first, or its last, tokens stay.",
        )
    )
    bad_rows: Literal["error", "skip", "quarantine"] = Field(
        "error",
        description="What becomes of a row that cannot be read: the run ends and says why; it is "
        "left out and counted; it is also written with the reason to bad_rows.jsonl in the run "
        "directory.",
    )
    train_on_prompt: bool = Field(False, description="Also learn the tokens of the prompt.")
    mask_history: bool = Field(False, description="Learn only the last response of a conversation.")
    streaming: bool = Field(
        False,
        description="Read the data while training, not prepare it first. Requires max_steps.",
    )
    buffer_size: Int = Field(
        16384,
        ge=1,
        description="Rows among which a stream is shuffled; they are part of a checkpoint.",
    )
    mix_strategy: Literal["concat", "interleave_under", "interleave_over", "interleave_once"] = (
        Field(
            "concat",
            description="How several sets become one: one after the other, or drawn in turns until "
            "the first, the last, or each exactly once is used up. Evaluation sets follow one "
            "another.",
        )
    )
    interleave_probs: Numbers = Field(
        (), description="Probability of drawing from each set, in the order of dataset."
    )
    overwrite_cache: bool = Field(
        False, description="Prepare the data anew although it lies there prepared."
    )
    preprocessing_batch_size: Int = Field(
        1000, ge=1, description="Rows that are tokenized at once."
    )
    preprocessing_num_workers: Int | None = Field(
        None, ge=1, description="Processes that prepare the data. Not given: one."
    )
    max_samples: Int | None = Field(
        None, ge=1, description="Rows taken from the head of each set. Not given: all."
    )
    eval_num_beams: Int | None = Field(
        None, ge=1, description="Beams when evaluation generates. Not given: num_beams."
    )
    ignore_pad_token_for_loss: bool = Field(
        True, description="Leave padding out of the loss. llmray always does."
    )
    val_size: RowsOrShare = Field(
        0.0,
        ge=0,
        description="Rows set aside for evaluation: a share of the data below 1, a number of rows "
        "from 1 on.",
    )
    packing: bool | None = Field(
        None,
        description="Stage pt: lay texts into full rows. Others: put rows together into bins of up "
        "to cutoff_len tokens (pairs: twice that), which per_device_train_batch_size counts; they "
        "do not see each other. Not given: true for stage pt, else false.",
    )
    neat_packing: bool = Field(
        False, description="The same as packing outside stage pt: rows never see each other."
    )
    tool_format: str | None = Field(
        None, description="Text of tools and their calls, by name. Not given: the template's."
    )
    tokenized_path: str | None = Field(
        None, description="Folder of the prepared data: read when it is there, else written."
    )
    default_system: str | None = Field(
        None,
        description="System message of conversations without one. Not given: the template's.",
    )
    enable_thinking: bool | None = Field(
        True,
        description="Reasoning templates: true learns an empty thought where a response has none, "
        "false leaves thoughts out and puts an empty one into the prompt, null keeps thoughts "
        "and puts an empty one into the prompt where there is none.",
    )
    preserve_thinking: bool = Field(
        False,
        description="Reasoning templates: keep the thoughts of earlier responses in the text. "
        "Otherwise they are in it only where earlier responses are learned (mask_history: false).",
    )

    def packs(self, stage: str) -> bool:
        """Whether rows are packed in a stage: texts into blocks, conversations into bins."""
        return self.neat_packing or (stage == "pt" if self.packing is None else self.packing)

    @property
    def has_evaluation(self) -> bool:
        """Whether rows are set aside or named for evaluation."""
        return bool(self.eval_dataset) or self.val_size > 0

    @property
    def dataset_folder(self) -> str | None:
        """The folder that dataset_dir names; None where it is on a hub, or holds the entries."""
        value = self.dataset_dir
        if isinstance(value, dict) or value == "ONLINE" or value.startswith("REMOTE:"):
            return None
        return value
