"""Rules between keys: what contradicts itself whatever llmray can do. One small function a fact.

Each rule takes the arguments of a run and yields the problems it finds. Those of the method stand
in `method_rules`.
"""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from typing import TYPE_CHECKING

from llmray.arguments.best import BEST_RULES
from llmray.arguments.derived import DERIVED_RULES
from llmray.arguments.method_rules import METHOD_RULES, Rule
from llmray.arguments.preference_rules import PREFERENCE_RULES
from llmray.arguments.problems import Problem, given, shown
from llmray.arguments.reward_rules import REWARD_RULES
from llmray.arguments.settings import SETTINGS_RULES
from llmray.arguments.template_rules import TEMPLATE_RULES
from llmray.arguments.tracking import OTHER_TRACKERS, TRACKERS, TrackingArguments
from llmray.arguments.tune_rules import tune_remarks

if TYPE_CHECKING:
    from llmray.arguments.run import RunArguments

# schedules that begin at the full rate
WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau")


def model_is_named(arguments: RunArguments) -> Iterator[Problem]:
    """A run needs a model."""
    if arguments.model.model_name_or_path is None:
        yield Problem(
            ("model_name_or_path",),
            "model_name_or_path is not given. Write the folder or the hub name of a model.",
        )


def training_needs_data(arguments: RunArguments) -> Iterator[Problem]:
    """Training needs data, to prepare or prepared."""
    data = arguments.data
    if arguments.training.do_train and not data.dataset and not data.tokenized_path:
        yield Problem(
            ("do_train", "dataset"),
            "do_train=true, but no dataset is given. Write dataset: with names that stand in "
            "dataset_info.json.",
        )


def runs_need_output(arguments: RunArguments) -> Iterator[Problem]:
    """Training and evaluation need a place for their results."""
    training = arguments.training
    for key in ("do_train", "do_eval", "do_predict"):
        if getattr(training, key) and training.output_dir is None:
            yield Problem(
                (key, "output_dir"),
                f"{key}=true, but no output_dir is given. Write output_dir: with a folder.",
            )
            return


def evaluation_needs_rows(arguments: RunArguments) -> Iterator[Problem]:
    """Evaluation and prediction need rows."""
    training = arguments.training
    asked = {
        "do_eval": training.do_eval,
        "do_predict": training.do_predict,
        "predict_with_generate": training.predict_with_generate,
        "eval_strategy": training.eval_strategy != "no" and training.do_train,
    }
    for key, is_asked in asked.items():
        if is_asked and not arguments.data.has_evaluation:
            value = given(key, getattr(training, key))
            yield Problem(
                (key, "eval_dataset", "val_size"),
                f"{value}, but there are no rows to evaluate. Write eval_dataset or val_size, or "
                f"remove {key}.",
            )


def sft_only(arguments: RunArguments) -> Iterator[Problem]:
    """Some keys speak of responses, which only stage sft learns."""
    stage = arguments.finetuning.stage
    asked = {
        "predict_with_generate": arguments.training.predict_with_generate,
        "neat_packing": arguments.data.neat_packing,
        "train_on_prompt": arguments.data.train_on_prompt,
        "mask_history": arguments.data.mask_history,
    }
    for key, is_asked in asked.items():
        if is_asked and stage != "sft":
            yield Problem(
                (key, "stage"),
                f"{key}=true with stage={stage}: it is for stage sft. Remove {key}, or write "
                "stage: sft.",
            )


def prediction_generates(arguments: RunArguments) -> Iterator[Problem]:
    """Prediction of stage sft writes responses."""
    training = arguments.training
    is_sft = arguments.finetuning.stage == "sft"
    if is_sft and training.do_predict and not training.predict_with_generate:
        yield Problem(
            ("do_predict", "predict_with_generate"),
            "do_predict=true writes responses and requires predict_with_generate: true. Write it.",
        )


def generated_responses_have_no_accuracy(arguments: RunArguments) -> Iterator[Problem]:
    """Token accuracy is that of the loss, not of generated text."""
    if arguments.training.predict_with_generate and arguments.finetuning.compute_accuracy:
        yield Problem(
            ("predict_with_generate", "compute_accuracy"),
            "predict_with_generate=true with compute_accuracy=true: generated text has no token "
            "accuracy. Remove one of them.",
        )


def history_is_masked_or_learnt(arguments: RunArguments) -> Iterator[Problem]:
    """The history cannot be masked and its prompts learnt."""
    if arguments.data.mask_history and arguments.data.train_on_prompt:
        yield Problem(
            ("mask_history", "train_on_prompt"),
            "mask_history=true with train_on_prompt=true: one leaves prompts out, the other "
            "learns them. Remove one of them.",
        )


def one_source_of_evaluation_rows(arguments: RunArguments) -> Iterator[Problem]:
    """Rows for evaluation are named or set aside, not both."""
    data = arguments.data
    if data.val_size > 0 and data.eval_dataset:
        yield Problem(
            ("val_size", "eval_dataset"),
            f"val_size={data.val_size} with eval_dataset={shown(','.join(data.eval_dataset))}: "
            "rows are set aside or named. Remove one of them.",
        )


def split_needs_data(arguments: RunArguments) -> Iterator[Problem]:
    """Rows are set aside from a data set."""
    if arguments.data.val_size > 0 and not arguments.data.dataset:
        yield Problem(
            ("val_size", "dataset"),
            f"val_size={arguments.data.val_size}, but no dataset is given. Write dataset:, or "
            "remove val_size.",
        )


def neat_packing_packs(arguments: RunArguments) -> Iterator[Problem]:
    """Neat packing is a kind of packing."""
    if arguments.data.neat_packing and arguments.data.packing is False:
        yield Problem(
            ("neat_packing", "packing"),
            "neat_packing=true with packing=false: it is a kind of packing. Remove one of them.",
        )


def prompts_are_not_packed(arguments: RunArguments) -> Iterator[Problem]:
    """Stage ppo takes prompts one by one."""
    data = arguments.data
    if (data.packing or data.neat_packing) and arguments.finetuning.stage == "ppo":
        key = "neat_packing" if data.neat_packing else "packing"
        yield Problem(
            (key, "stage"),
            f"{key}=true with stage=ppo: responses are not there yet when rows would be packed. "
            f"Remove {key}; they are not padded without it either.",
        )


def probabilities_interleave(arguments: RunArguments) -> Iterator[Problem]:
    """Probabilities are for interleaving."""
    data = arguments.data
    if data.interleave_probs and data.mix_strategy == "concat":
        yield Problem(
            ("interleave_probs", "mix_strategy"),
            f"{given('interleave_probs', data.interleave_probs)} with mix_strategy=concat: sets "
            "that follow one another are not drawn. Write mix_strategy: interleave_under, or "
            "remove interleave_probs.",
        )


def one_probability_a_set(arguments: RunArguments) -> Iterator[Problem]:
    """Each set has a probability; they are positive and sum to 1."""
    data = arguments.data
    probabilities = data.interleave_probs
    if probabilities and len(probabilities) != len(data.dataset):
        yield Problem(
            ("interleave_probs", "dataset"),
            f"{given('interleave_probs', probabilities)} are {len(probabilities)} for "
            f"{len(data.dataset)} sets in dataset. Write one for each set.",
        )
    if probabilities and (min(probabilities) < 0 or abs(sum(probabilities) - 1) > 1e-6):
        yield Problem(
            ("interleave_probs",),
            f"{given('interleave_probs', probabilities)} sum to {sum(probabilities):g}. Write "
            "probabilities from 0 on that sum to 1.",
        )


def streams_have_no_length(arguments: RunArguments) -> Iterator[Problem]:
    """A stream has no known length, so steps and split are counted."""
    data, training = arguments.data, arguments.training
    if data.streaming and training.do_train and training.max_steps <= 0:
        yield Problem(
            ("streaming", "max_steps"),
            "streaming=true, but no max_steps is given: a stream has no known length. Write "
            "max_steps, or streaming: false.",
        )
    if data.streaming and 0 < data.val_size < 1:
        yield Problem(
            ("streaming", "val_size"),
            f"val_size={data.val_size} is a share, but a stream has no known length. Set val_size "
            "to a whole number of rows, or streaming: false.",
        )


def streams_are_not_planned(arguments: RunArguments) -> Iterator[Problem]:
    """What needs the whole data beforehand cannot be had of a stream."""
    data, training = arguments.data, arguments.training
    if not data.streaming:
        return
    if arguments.finetuning.stage != "pt" and data.packs(arguments.finetuning.stage):
        key = "neat_packing" if data.neat_packing else "packing"
        yield Problem(
            ("streaming", key),
            f"streaming=true with {key}=true: bins are planned over the lengths of all rows, which "
            f"a stream does not know. Remove {key}; rows are not padded without it either.",
        )
    if training.train_sampling_strategy == "group_by_length":
        yield Problem(
            ("streaming", "train_sampling_strategy"),
            "streaming=true with train_sampling_strategy=group_by_length: a stream does not know "
            "the lengths of all rows. Remove train_sampling_strategy.",
        )
    if data.tokenized_path is not None:
        yield Problem(
            ("streaming", "tokenized_path"),
            f"streaming=true with tokenized_path={data.tokenized_path}: a stream keeps nothing, "
            "and prepared data is mapped, never read into memory as a whole. Remove streaming to "
            "use or to write what tokenized_path names, or remove tokenized_path.",
        )
    for key in ("save_strategy", "eval_strategy", "logging_strategy"):
        if getattr(training, key) == "epoch":
            yield Problem(
                ("streaming", key),
                f"streaming=true with {key}=epoch: where an epoch of a stream ends is not known "
                f"beforehand. Write {key}: steps.",
            )


def streams_train(arguments: RunArguments) -> Iterator[Problem]:
    """What is streamed is trained on; evaluation alone reads its rows once."""
    training = arguments.training
    evaluates = training.do_eval or training.do_predict
    if arguments.data.streaming and evaluates and not training.do_train:
        yield Problem(
            ("streaming", "do_train"),
            "streaming=true without do_train: rows that are only evaluated on are prepared. Remove "
            "streaming.",
        )


def calibration_needs_texts(arguments: RunArguments) -> Iterator[Problem]:
    """A quantized export is calibrated on texts."""
    export = arguments.export
    if export.export_quantization_bit is not None and export.export_quantization_dataset is None:
        yield Problem(
            ("export_quantization_bit", "export_quantization_dataset"),
            f"export_quantization_bit={export.export_quantization_bit}, but there are no texts to "
            "calibrate it on. Write export_quantization_dataset.",
        )


def pixel_limits_are_in_order(arguments: RunArguments) -> Iterator[Problem]:
    """The smallest size is not above the largest."""
    model = arguments.model
    limits = {
        "image": (model.image_min_pixels, model.image_max_pixels),
        "video": (model.video_min_pixels, model.video_max_pixels),
    }
    for kind, (least, most) in limits.items():
        if most < least:
            yield Problem(
                (f"{kind}_max_pixels", f"{kind}_min_pixels"),
                f"{kind}_max_pixels={most} with {kind}_min_pixels={least}: the largest is below "
                "the smallest. Write them the other way round.",
            )


def trackers_are_known(arguments: RunArguments) -> Iterator[Problem]:
    """Trackers are some of those that are built in."""
    report_to = arguments.tracking.report_to
    known = (*TRACKERS, "all", "none")
    for name in report_to:
        if name in known:
            continue
        close = get_close_matches(name, known, n=1)
        advice = f"Did you mean {close[0]}? " if close else ""
        what = "is not built in" if name in OTHER_TRACKERS else "is no tracker"
        yield Problem(
            ("report_to",),
            f"{given('report_to', report_to)}: {name} {what}. {advice}Use some of "
            f"{', '.join(TRACKERS)}, or all, or none.",
        )


def signed_notices_have_an_address(arguments: RunArguments) -> Iterator[Problem]:
    """A signing secret is for notices, which need an address."""
    tracking = arguments.tracking
    if tracking.swanlab_lark_secret and not tracking.swanlab_lark_webhook_url:
        yield Problem(
            ("swanlab_lark_secret", "swanlab_lark_webhook_url"),
            "swanlab_lark_secret is given, but there is no address that notices go to. Write "
            "swanlab_lark_webhook_url, or remove the secret.",
        )


def nothing_beside_none(arguments: RunArguments) -> Iterator[Problem]:
    """`none` stands alone."""
    report_to = arguments.tracking.report_to
    if "none" in report_to and len(report_to) > 1:
        yield Problem(
            ("report_to",),
            f"report_to={shown(','.join(report_to))}: none stands alone. Remove it, or the others.",
        )


# names that other trainers log, or that are text: the number of trainer_log.jsonl that was meant
LOGGED_AS = {
    "learning_rate": "lr",
    "train_loss": "loss",
    "elapsed_time": "epoch",
    "remaining_time": "epoch",
}


def plotted_keys_are_logged(arguments: RunArguments) -> Iterator[Problem]:
    """Keys that are plotted are logged by the run."""
    plotted = arguments.finetuning.plot_loss
    for name in plotted if isinstance(plotted, tuple) else ():
        if name in LOGGED_AS:
            yield Problem(
                ("plot_loss",),
                f"{given('plot_loss', plotted)}: trainer_log.jsonl has no number {name}. Write "
                f"{LOGGED_AS[name]}.",
            )
        elif name.startswith("eval_") and arguments.training.eval_strategy == "no":
            yield Problem(
                ("plot_loss", "eval_strategy"),
                f"{given('plot_loss', plotted)}, but eval_strategy=no: {name} is never logged. "
                "Write eval_strategy: steps, or remove the name.",
            )


def described_tokens_need_descriptions(arguments: RunArguments) -> Iterator[Problem]:
    """Embeddings that start from descriptions need these."""
    model = arguments.model
    if model.init_special_tokens != "noise_init" and model.new_special_tokens_config is None:
        yield Problem(
            ("init_special_tokens", "new_special_tokens_config"),
            f"init_special_tokens={model.init_special_tokens}, but there are no descriptions. "
            "Write new_special_tokens_config.",
        )


def one_order(arguments: RunArguments) -> Iterator[Problem]:
    """Rows have one order."""
    if (
        arguments.finetuning.disable_shuffling
        and arguments.training.train_sampling_strategy == "group_by_length"
    ):
        yield Problem(
            ("disable_shuffling", "train_sampling_strategy"),
            "disable_shuffling=true with train_sampling_strategy=group_by_length: one keeps the "
            "order of the data, the other groups rows by length. Remove one of them.",
        )


def threads_read_ahead(arguments: RunArguments) -> Iterator[Problem]:
    """Threads read ahead, so there must be some."""
    training = arguments.training
    factor = training.dataloader_prefetch_factor
    if factor is not None and training.dataloader_num_workers == 0:
        yield Problem(
            ("dataloader_prefetch_factor", "dataloader_num_workers"),
            f"dataloader_prefetch_factor={factor} with dataloader_num_workers=0: nothing reads "
            "ahead. Write dataloader_num_workers, or remove it.",
        )


def the_cpu_is_no_gpu(arguments: RunArguments) -> Iterator[Problem]:
    """A run on the CPU asks for no GPU."""
    resources = arguments.cluster.resources_per_worker or {}
    if arguments.training.use_cpu and resources.get("GPU"):
        yield Problem(
            ("use_cpu", "resources_per_worker"),
            f"use_cpu=true with {given('resources_per_worker', resources)}: workers would hold "
            'GPUs that they do not use. Write such as {"CPU": 2}, or remove use_cpu.',
        )


def resources_are_amounts(arguments: RunArguments) -> Iterator[Problem]:
    """A worker needs amounts of resources, and at least one of them."""
    resources = arguments.cluster.resources_per_worker
    if resources is None:
        return
    amounts = [
        isinstance(amount, int | float) and not isinstance(amount, bool) and amount >= 0
        for amount in resources.values()
    ]
    if not all(amounts) or not any(resources.values()):
        yield Problem(
            ("resources_per_worker",),
            f"{given('resources_per_worker', resources)}: a worker requires amounts from 0 on, one "
            'of them above 0. Write such as {"GPU": 1} or {"CPU": 2}.',
        )


RULES: tuple[Rule, ...] = (
    model_is_named,
    training_needs_data,
    runs_need_output,
    evaluation_needs_rows,
    sft_only,
    prediction_generates,
    generated_responses_have_no_accuracy,
    history_is_masked_or_learnt,
    one_source_of_evaluation_rows,
    split_needs_data,
    neat_packing_packs,
    prompts_are_not_packed,
    probabilities_interleave,
    one_probability_a_set,
    streams_have_no_length,
    streams_are_not_planned,
    streams_train,
    calibration_needs_texts,
    pixel_limits_are_in_order,
    trackers_are_known,
    signed_notices_have_an_address,
    nothing_beside_none,
    plotted_keys_are_logged,
    described_tokens_need_descriptions,
    one_order,
    threads_read_ahead,
    the_cpu_is_no_gpu,
    resources_are_amounts,
    *METHOD_RULES,
    *REWARD_RULES,
    *PREFERENCE_RULES,
    *SETTINGS_RULES,
    *DERIVED_RULES,
    *BEST_RULES,
    *TEMPLATE_RULES,
)


def broken(arguments: RunArguments) -> list[Problem]:
    """Every rule that the arguments break."""
    return [problem for rule in RULES for problem in rule(arguments)]


def remarks(arguments: RunArguments) -> list[str]:
    """What is no mistake, and still may not be what was meant."""
    optimizer, said = arguments.optimizer, []
    steps, ratio = optimizer.warmup_steps, optimizer.warmup_ratio
    warmup = f"warmup_steps={steps}" if steps else f"warmup_ratio={ratio}"
    if (steps or ratio) and optimizer.lr_scheduler_type in WITHOUT_WARMUP:
        said.append(f"{warmup} does nothing with lr_scheduler_type={optimizer.lr_scheduler_type}")
    elif steps and ratio:
        said.append(f"{warmup} goes before warmup_ratio={ratio}, which does nothing")
    return said + _idle_tracking_keys(arguments.tracking) + tune_remarks(arguments)


def _idle_tracking_keys(tracking: TrackingArguments) -> list[str]:
    asked = set(tracking.report_to) - {"none"}
    uses_swanlab = tracking.use_swanlab or bool(asked & {"swanlab", "all"})
    idle = [
        key
        for key, field in type(tracking).model_fields.items()
        if key.startswith("swanlab_") and not uses_swanlab
        if getattr(tracking, key) != field.get_default()
    ]
    said = [f"{', '.join(idle)}: without use_swanlab: true this does nothing"] if idle else []
    if tracking.run_name is not None and not (asked or uses_swanlab):
        said.append(f"run_name={tracking.run_name} does nothing: report_to names no tracker")
    if tracking.logging_dir is not None and not asked & {"tensorboard", "all"}:
        said.append("logging_dir does nothing: report_to does not name tensorboard")
    return said
