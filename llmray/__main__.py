"""`python -m llmray`: the command line, as torchrun starts it."""

from llmray.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
