"""What `llmray COMMAND --help` says below the usage line: texts alone."""

RUN_FILE_HELP = """
RUN.yaml is a flat YAML or JSON file with LLaMA-Factory's keys. Words after it
override it: key=value or --key value. Without a file the words are the run."""
PLOT_HELP = """
DIR is the output_dir of a run, local or a URI; while a run on Ray goes on, its
log is in <ray_storage_path>/<ray_run_name>. --key names what trainer_log.jsonl
logs, loss by default. --out names the picture, .png, .svg or .pdf; by default
it is runs_<key>.png in the current folder."""
CHECK_HELP = """

  --explain KEY  what a key means, what it is in this run, where that came from and what follows
                 from it; without a run file, what it means alone"""
CHAT_HELP = """

Answers stream. /clear forgets the conversation, /system TEXT begins one with that
system message (default_system is the run's), /exit or Ctrl-D ends, Ctrl-C stops
an answer. A pipe works too: each line is a message.
adapter_name_or_path=DIR asks what a run has trained."""
EXPORT_HELP = """

A training file will do: export_dir=DIR adapter_name_or_path=OUTPUT_DIR. What is
written is loaded again and compared before DIR gets its name."""
RENDER_HELP = """

  --rows N  how many rows (3)
  --eval    rows to evaluate on instead of rows to train on
  --ids     one token a line, with its place and id
  --json    one object a row: text, input_ids, labels (-100 where nothing is learned), source, cuts

Targets stand in brackets, or in colour on a terminal; what cutoff_len took out is said in place."""
SCORE_HELP = """

  --input FILE  lines of JSON instead of the run's data; - is the standard input. A line is a text,
                {"text": …}, {"prompt": …, "response": …} or {"messages": […]}
  --eval        rows to evaluate on instead of rows to train on

Writes one object a row: source, and score, or chosen and rejected of a pair.
adapter_name_or_path=DIR scores with the reward model that a run of stage rm has trained."""
SERVER_HELP = """

  --host ADDRESS     127.0.0.1, or API_HOST; one that other machines reach needs a token
  --port PORT        8000, or API_PORT
  --token-file FILE  what callers must bring as `Authorization: Bearer …`; or API_KEY

POST /v1/score/evaluation {"model": "any", "messages": ["prompt and response", …]} answers
{"scores": […]}. GET /health, /metrics and /docs."""
COMPLETION_HELP = """
  bash  source <(llmray completion bash), in ~/.bashrc for good
  zsh   source <(llmray completion zsh), in ~/.zshrc after compinit
  fish  llmray completion fish > ~/.config/fish/completions/llmray.fish"""

TUNE_HELP = """
The section tune of the run file says what is searched and how trials are compared:

  tune:
    search: {learning_rate: {loguniform: [1e-5, 1e-3]}, lora_rank: {choice: [4, 8, 16]}}
    num_samples: 8
    scheduler: asha

The section may also be a file of its own, SWEEP.yaml; tune.num_samples=4 changes a key of it.
--dry-run tells trials, resources and expected cost, and starts nothing.
Results are results.csv, best.yaml and tune.png in output_dir; each trial has a folder there.
resume=true goes on with a sweep whose driver was stopped or killed, and repeats no trial that had
ended.
"""
