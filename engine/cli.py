"""`stopgo COMMAND …`: the project's entry points under one name. Each is a module with `main(argv) -> exit code`."""

from __future__ import annotations

import sys
from importlib import import_module

COMMANDS = {
    "train": ("engine.train", "train a run configuration, or resume a run"),
    "evaluate": ("engine.evaluate", "each data set's official rule, and result files for test servers"),
    "predict": ("engine.predict", "ask a trained model about an image"),
    "report": ("engine.report.__main__", "one HTML file that shows a run or an experiment, with pictures"),
    "experiment": ("engine.experiments.__main__", "train and compare the paper's systems; its tables and figures"),
    "consistency": ("engine.consistency", "does it find what it answers questions about? (paper section 5)"),
    "export": ("engine.export", "a trained model as a folder to pass on: weights, tokenizer, labels, model card"),
    "convert": ("engine.convert", "weights between checkpoints, .safetensors, .bin and ZeRO folders"),
    "verify": ("engine.verify", "compare the model with a folder of golden numbers"),
    "check": ("pipelines.check", "check all data of a run or data sheet without training"),
    "clean": ("pipelines.clean", "find test images that data sets train on, and list them for removal"),
    "features": ("pipelines.convert.__main__", "convert region features of other formats into a store"),
    "extract": ("pipelines.extract.__main__", "images -> region features in a store, by a detector"),
    "mine": ("pipelines.mine.__main__", "mine hard negatives for retrieval"),
    "world": ("pipelines.world.__main__", "build the embedded world"),
    "doctor": ("engine.doctor.__main__", "what is wrong with this machine, or held a run back, and how to mend it"),
}
"""Command, module, and what it does. Modules are imported when they are called, not before."""


def main(argv: list[str] | None = None) -> int:
    """Run the command named first with the arguments after it; returns its exit code, 2 for an unknown command."""
    arguments = sys.argv[1:] if argv is None else argv
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(_help())
        return 0
    if command not in COMMANDS:
        print(f"error: no command {command} (there are {', '.join(COMMANDS)})", file=sys.stderr)
        return 2
    return int(import_module(COMMANDS[command][0]).main(arguments[1:]) or 0)


def entry() -> None:
    """What the installed `stopgo` calls."""
    code = main()
    if "engine.ranks" in sys.modules:  # importing it takes a second, which --help need not wait for
        import_module("engine.ranks").finish(code)
    sys.exit(code)


def _help() -> str:
    lines = [f"  {name:<13}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(["usage: stopgo COMMAND ...", "", *lines, "", "stopgo COMMAND --help says more."])


if __name__ == "__main__":
    entry()
