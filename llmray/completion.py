"""Shell completion: a script for bash, zsh or fish that knows commands, options, keys and choices.

    source <(llmray completion bash)          # or into ~/.bashrc
    llmray completion fish > ~/.config/fish/completions/llmray.fish

A script holds all words, so that nothing of llmray starts when the user presses Tab. What a
command takes is read from its usage line: RUN.yaml is a file and keys, KEY a key, DIR a folder,
`a|b` a choice, `--word` an option.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from llmray.arguments.problems import choices, plain_types
from llmray.arguments.run import FIELDS
from llmray.arguments.template_rules import TEMPLATES, TOOL_FORMATS
from llmray.errors import ArgumentsError

OPTION = re.compile(r"--[a-z][a-z-]*")
ALTERNATIVES = re.compile(r"(?<![\w-])[a-z]+(?:\|[a-z]+)+")


@dataclass(frozen=True)
class Takes:
    """What may follow a command: `kinds` are runs (a run file and its keys), keys and folders."""

    words: tuple[str, ...]
    kinds: tuple[str, ...]


def takes(usage: str) -> Takes:
    """What a command takes, read from its usage line."""
    usage = usage.replace("[key=value | --key value ...]", "")
    fixed = [word for found in ALTERNATIVES.findall(usage) for word in found.split("|")]
    plain = re.sub(r"--\S+ [A-Z]+", "", usage)  # an option's own value is none of the command's
    kinds = {"runs": "RUN.yaml", "keys": "KEY", "folders": "DIR"}
    return Takes(
        words=(*OPTION.findall(usage), *fixed),
        kinds=tuple(kind for kind, mark in kinds.items() if mark in plain),
    )


def values() -> dict[str, tuple[str, ...]]:
    """The values of each key that takes few."""
    found: dict[str, tuple[str, ...]] = {}
    for key, field in FIELDS.items():
        if choices(field):
            found[key] = tuple(str(choice) for choice in choices(field))
        elif bool in plain_types(field):
            found[key] = ("true", "false")
    return found | {"template": TEMPLATES, "tool_format": TOOL_FORMATS}


def script(shell: str, usages: Mapping[str, str]) -> str:
    """The completion script of a shell.

    Args:
        shell: a key of `SCRIPTS`.
        usages: the usage line of each command by its name.

    Raises:
        ArgumentsError: there is none for that shell.
    """
    if shell not in SCRIPTS:
        raise ArgumentsError(
            f"{shell!r} has no completion. Required: one of {', '.join(SCRIPTS)}. Name that."
        )
    by_command = {name: takes(usage) for name, usage in usages.items()}
    tables = {
        "_llmray_kinds": {name: taken.kinds for name, taken in by_command.items()},
        "_llmray_words": {name: taken.words for name, taken in by_command.items()},
        "_llmray_values": values(),
    }
    table = _fish_table if shell == "fish" else _posix_table
    lists = {"_llmray_commands": tuple(usages), "_llmray_keys": tuple(FIELDS)}
    parts = [table(name, rows) for name, rows in tables.items()]
    parts += [
        f"set -g {name} {' '.join(words)}" if shell == "fish" else f'{name}="{" ".join(words)}"'
        for name, words in lists.items()
    ]
    head = "#compdef llmray\n" if shell == "zsh" else ""
    return f"{head}{_HEADER}" + "\n".join([*parts, SCRIPTS[shell]])


def _posix_table(name: str, rows: Mapping[str, tuple[str, ...]]) -> str:
    """A function that prints the words of its argument, for bash and zsh."""
    lines = [f"        {key}) echo '{' '.join(words)}' ;;" for key, words in rows.items() if words]
    return "\n".join([f"{name}() {{", '    case "$1" in', *lines, "    esac", "}"])


def _fish_table(name: str, rows: Mapping[str, tuple[str, ...]]) -> str:
    """The same for fish, one word a line."""
    lines = [
        f"        case {key}\n            printf '%s\\n' {' '.join(words)}"
        for key, words in rows.items()
        if words
    ]
    return "\n".join([f"function {name}", "    switch $argv[1]", *lines, "    end", "end"])


_HEADER = "# Written by `llmray completion`; write it anew after an update.\n"

# To bash a word that holds `=` is several, where COMP_WORDBREAKS has it: the word is taken from the
# line, and a reply is what follows the `=`. Replies end with a blank of their own: keys have none.
_BASH = r"""
_llmray_reply() {  # the word, then its candidates
    local word="$1" IFS=$'\n'
    shift
    COMPREPLY+=($(compgen -W "$(printf '%s\n' "$@")" -- "$word"))
}
_llmray_files() {  # the word, what is taken: folders are always offered, as the way to files
    local path
    while IFS= read -r path; do
        if [[ -d $path ]]; then COMPREPLY+=("$path/")
        elif [[ " $2 " == *" runs "* && $path =~ \.(yaml|yml|json)$ ]]; then COMPREPLY+=("$path ")
        fi
    done < <(compgen -f -- "$1")
}
_llmray_assigned() {  # a word that holds `=`
    local key="${1%%=*}" value="${1#*=}"
    local fixed=($(_llmray_values "${key#--}"))
    if [[ ${#fixed[@]} -gt 0 ]]; then _llmray_reply "$value" "${fixed[@]/%/ }"
    else _llmray_files "$value" "runs"
    fi
    if [[ $COMP_WORDBREAKS != *=* ]]; then COMPREPLY=("${COMPREPLY[@]/#/$key=}"); fi
}
_llmray() {
    local line="${COMP_LINE:0:COMP_POINT}"
    local word="${line##*[[:space:]]}"
    local -a before
    read -r -a before <<< "${line%"$word"}"
    local previous="${before[${#before[@]}-1]}" kinds="$(_llmray_kinds "${before[1]}")"
    local keys=($_llmray_keys) words=($(_llmray_words "${before[1]}")) fixed=()
    COMPREPLY=()
    if [[ ${#before[@]} -eq 1 ]]; then
        words=($_llmray_commands)
        _llmray_reply "$word" "${words[@]/%/ }"
        return
    fi
    if [[ $previous == --* && $word != -* ]]; then
        if [[ $previous == --explain ]]; then fixed=("${keys[@]}")
        else fixed=($(_llmray_values "${previous#--}"))
        fi
        _llmray_reply "$word" "${fixed[@]/%/ }"
        if [[ ${#fixed[@]} -gt 0 ]]; then return; fi
    fi
    if [[ $word == *=* ]]; then
        _llmray_assigned "$word"
        return
    fi
    _llmray_reply "$word" "${words[@]/%/ }"
    if [[ " $kinds " == *" runs "* ]]; then
        if [[ $word == -* ]]; then
            keys=("${keys[@]/#/--}")
            _llmray_reply "$word" "${keys[@]/%/ }"
        else
            _llmray_reply "$word" "${keys[@]/%/=}"
            _llmray_files "$word" "$kinds"
        fi
    elif [[ " $kinds " == *" keys "* ]]; then
        _llmray_reply "$word" "${keys[@]/%/ }"
    elif [[ " $kinds " == *" folders "* ]]; then
        _llmray_files "$word" "$kinds"
    fi
}
complete -o nospace -F _llmray llmray
"""

_ZSH = r"""
_llmray() {
    local word="${words[CURRENT]}" previous="${words[CURRENT-1]}" command="${words[2]}"
    local -a keys fixed offered kinds
    keys=(${=_llmray_keys})
    kinds=($(_llmray_kinds "$command"))
    if (( CURRENT == 2 )); then
        compadd -- ${=_llmray_commands}
        return
    fi
    if [[ $previous == --* && $word != -* ]]; then
        if [[ $previous == --explain ]]; then fixed=($keys)
        else fixed=($(_llmray_values "${previous#--}"))
        fi
        if (( ${#fixed} )); then
            compadd -- $fixed
            return
        fi
    fi
    if [[ $word == *=* ]]; then
        fixed=($(_llmray_values "${${word%%=*}#--}"))
        compset -P '*='
        if (( ${#fixed} )); then compadd -- $fixed; else _files; fi
        return
    fi
    offered=($(_llmray_words "$command"))
    compadd -- $offered
    if (( ${kinds[(I)runs]} )); then
        if [[ $word == -* ]]; then compadd -p -- -- $keys
        else
            compadd -S = -- $keys
            _files -g '*.(yaml|yml|json)'
        fi
    elif (( ${kinds[(I)keys]} )); then compadd -- $keys
    elif (( ${kinds[(I)folders]} )); then _files -/
    fi
}
if (( $+functions[compdef] )); then compdef _llmray llmray; fi
"""

_FISH = r"""
function _llmray_candidates
    set -l before (commandline -opc)
    set -l word (commandline -ct)
    if test (count $before) -eq 1
        printf '%s\n' $_llmray_commands
        return
    end
    set -l kinds (_llmray_kinds $before[2])
    set -l previous $before[-1]
    if string match -q -- '--*' $previous; and not string match -q -- '-*' $word
        if test $previous = --explain
            printf '%s\n' $_llmray_keys
            return
        end
        set -l fixed (_llmray_values (string replace -- -- '' $previous))
        if test (count $fixed) -gt 0
            printf '%s\n' $fixed
            return
        end
    end
    if string match -q '*=*' -- $word
        set -l key (string split -m 1 = -- $word)[1]
        set -l fixed (_llmray_values (string replace -r '^--' '' -- $key))
        if test (count $fixed) -gt 0
            printf "$key=%s\n" $fixed
        else
            __fish_complete_path (string split -m 1 = -- $word)[2] | string replace -r '^' "$key="
        end
        return
    end
    _llmray_words $before[2]
    if contains runs $kinds
        if string match -q -- '-*' $word
            printf '%s\n' --$_llmray_keys
        else
            printf '%s=\n' $_llmray_keys
            __fish_complete_suffix .yaml
            __fish_complete_suffix .json
        end
    else if contains keys $kinds
        printf '%s\n' $_llmray_keys
    else if contains folders $kinds
        __fish_complete_directories $word
    end
end
complete -c llmray -f -a '(_llmray_candidates)'
"""

SCRIPTS: dict[str, str] = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}
