"""Train py-16m: a small Llama (`LlamaForCausalLM`) on Python source code.

Run it as a folder:

  python examples/train_py_16m prepare SITE_PACKAGES... --out data
  python examples/train_py_16m train --data data --out run
  python examples/train_py_16m join --data data --run run --out py-16m

`prepare` runs on the CPU, `train` wants a GPU. Besides teal's own dependencies it needs none.
"""

import argparse
from dataclasses import asdict, fields
from pathlib import Path

from tokens import prepare
from training import Settings, join, train

_ABOUT = (__doc__ or "").split("\n")[0]


def main() -> None:
    """Run the verb on the command line."""
    parser = argparse.ArgumentParser(prog="train_py_16m", description=_ABOUT)
    verbs = parser.add_subparsers(dest="verb", required=True)
    _add_prepare(verbs.add_parser("prepare", help="Corpus, tokenizer and token files."))
    _add_train(verbs.add_parser("train", help="A time-boxed run."))
    _add_join(verbs.add_parser("join", help="Weights and tokenizer into one folder."))
    arguments = parser.parse_args()
    if arguments.verb == "prepare":
        prepare(arguments.site_packages, arguments.out)
    elif arguments.verb == "train":
        names = [field.name for field in fields(Settings)]
        settings = Settings(**{name: getattr(arguments, name) for name in names})
        train(arguments.data, arguments.out, settings)
    else:
        join(arguments.data, arguments.run, arguments.out)


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("site_packages", nargs="*", type=Path, help="Folders of packages.")
    parser.add_argument("--out", type=Path, required=True)


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, help="Output of prepare.")
    parser.add_argument("--out", type=Path, required=True)
    for name, default in asdict(Settings()).items():
        flag, shown = f"--{name.replace('_', '-')}", "Default: %(default)s."
        if isinstance(default, bool):
            yes_or_no = argparse.BooleanOptionalAction
            parser.add_argument(flag, action=yes_or_no, default=default, help=shown)
        else:
            parser.add_argument(flag, type=type(default), default=default, metavar="N", help=shown)


def _add_join(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, help="Output of prepare.")
    parser.add_argument("--run", type=Path, required=True, help="Output of train.")
    parser.add_argument("--out", type=Path, required=True)


if __name__ == "__main__":
    main()
