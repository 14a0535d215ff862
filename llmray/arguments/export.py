"""Arguments of export: one model out of base and adapters, in files or on a hub."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, SecretStr

from llmray.arguments.group import Field, Float, Group, Int, as_number

Bits = Annotated[Literal[2, 3, 4, 8], BeforeValidator(as_number)]


class ExportArguments(Group):
    """Everything about exported models."""

    export_dir: str | None = Field(None, description="Folder that the exported model goes to.")
    export_size: Float = Field(5, gt=0, description="Largest weight file, in gigabytes.")
    export_device: Literal["cpu", "auto"] = Field(
        "cpu", description="Where adapters are merged: on the CPU, or on a GPU if there is one."
    )
    export_quantization_bit: Bits | None = Field(
        None, description="Bits per weight of the exported model (GPTQ)."
    )
    export_quantization_dataset: str | None = Field(
        None, description="Texts on which the quantization is calibrated: a file or a hub set."
    )
    export_quantization_nsamples: Int = Field(128, ge=1, description="Texts used for calibration.")
    export_quantization_maxlen: Int = Field(
        1024, ge=1, description="Tokens of each text used for calibration."
    )
    export_legacy_format: bool = Field(
        False, description="Save .bin files instead of .safetensors."
    )
    export_hub_model_id: str | None = Field(
        None, description="Hub repository that the exported model is uploaded to."
    )
    push_to_hub: bool = Field(False, description="Upload the trained model to a hub.")
    hub_model_id: str | None = Field(None, description="Hub repository of the upload.")
    hub_token: SecretStr | None = Field(None, description="Access token of the upload.")
    hub_strategy: Literal["end", "every_save", "checkpoint", "all_checkpoints"] = Field(
        "every_save", description="When and what is uploaded."
    )
    hub_private_repo: bool | None = Field(None, description="Make the hub repository private.")
    hub_always_push: bool = Field(
        False, description="Upload although the previous upload has not ended."
    )
    hub_revision: str | None = Field(None, description="Branch of the upload.")
