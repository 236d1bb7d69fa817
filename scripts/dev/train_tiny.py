"""Train the small models that ship in assets/, from text to the figures of their cards.

    python scripts/dev/train_tiny.py prepare --wikipedia DIR --gsm8k FILE --mbpp FILE   text -> tokenizer, token arrays
    python scripts/dev/train_tiny.py train [--arch mixtral]                             resumable; logs a CSV
    python scripts/dev/train_tiny.py export [--arch mixtral]                            last state -> assets/<arch>-tiny
    python scripts/dev/train_tiny.py evaluate [--arch mixtral]                          the card's figures

`--arch blockffn` (the default) is assets/blockffn-tiny, `--arch mixtral` assets/mixtral-tiny; each one's config.json
says how large it is, and src/models/pretraining.py how it is trained. Flags: `train_tiny.py train --help`.
"""

import argparse
import json
import math
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from src.base import cli
from src.base.errors import UserError

SCRIPT = "scripts/dev/train_tiny.py"


def read_arguments(argv: list[str]) -> argparse.Namespace:
    """The command and its flags; UserError where what the command reads is not there."""
    chooser = cli.Parser(__doc__)
    chooser.add_argument("command", choices=COMMANDS, help="What to do; each command shows its flags with --help.")
    command = chooser.parse_args(argv[:1]).command
    parser = cli.Parser(COMMANDS[command].__doc__)
    parser.prog += f" {command}"

    def add(name, help, **reading):
        shown = help if reading.get("default") is None else f"{help} (default: {reading['default']})"
        parser.add_argument(f"--{name}", help=shown, **reading)

    add("cache", "The working folder, of the token arrays and the training's state.", type=Path,
        default=cli.REPOSITORY / "cache" / "tiny")  # fmt: skip
    if command == "prepare":
        add("wikipedia", "A folder of train-*.jsonl.xz and valid.jsonl.xz.", type=Path, required=True)
        add("gsm8k", "The file train.jsonl of GSM8K.", type=Path, required=True)
        add("mbpp", "The file mbpp.jsonl.", type=Path, required=True)
        add("shards", "Files of Wikipedia that are read.", type=cli.whole(1), default=7)
    else:
        add("arch", "The shipped model that is made.", choices=("blockffn", "mixtral"), default="blockffn")
    if command == "train":
        add("tokens", "Millions of tokens of the whole training.", type=cli.POSITIVE, default=30.0)
        add("start-from", "An exported folder to go on from, where no state is saved.", type=Path)
        add("minutes", "Minutes after which training stops, its state saved.", type=cli.POSITIVE, default=math.inf)
        add("device", "The device to compute on: auto, cpu, cuda, cuda:1.", default="auto")
        add("quick", "Train on 0.02 M tokens, uncompiled: does it run?", action="store_true")
        add("lr", "The peak learning rate.", type=cli.POSITIVE, default=2e-3)
        add("log-every", "Steps between two lines of the log.", type=cli.whole(1), default=50)
        add("threads", "CPU threads; 0 leaves them to PyTorch.", type=cli.whole(0), default=0)
        add("compile", "Compile the layers: it takes a minute, and pays in a long run.",
            action=argparse.BooleanOptionalAction, default=True)  # fmt: skip
        add("seed", "The seed of the weights and of the batches.", type=cli.whole(0), default=0)
    if command in ("export", "evaluate"):
        add("assets", "The folder of the checkpoint; by default assets/<arch>-tiny.", type=Path)
    if command == "evaluate":
        add("validation-sequences", "Validation rows of 1,024 tokens.", type=cli.whole(2), default=48)
    arguments = parser.parse_args(argv[1:])
    arguments.command = command
    check_inputs(arguments)
    return arguments


def check_inputs(arguments: argparse.Namespace) -> None:
    """Fill in the paths that follow from others; UserError for files that are not there."""
    if arguments.command == "prepare":
        needed, hint = [arguments.wikipedia / "valid.jsonl.xz", arguments.gsm8k, arguments.mbpp], ""
    else:
        arguments.shape = cli.REPOSITORY / "assets" / f"{arguments.arch}-tiny"  # of its config.json
        needed = [arguments.cache / "tokenizer.json", arguments.shape / "config.json"]
        hint = f"; prepare the text first: python {SCRIPT} prepare --help"
    if arguments.command in ("export", "evaluate"):
        arguments.assets = arguments.assets or arguments.shape
    for path in needed:
        if not path.exists():
            raise UserError(f"{path} does not exist{hint}")


def prepare(arguments: argparse.Namespace) -> None:
    """Write tokenizer.json, and for each domain and split its tokens and where documents begin in them."""
    from tokenizers import Tokenizer

    from src.models import pretraining_text

    arguments.cache.mkdir(parents=True, exist_ok=True)
    texts = pretraining_text.read_texts(arguments.wikipedia, arguments.gsm8k, arguments.mbpp, arguments.shards)
    file = arguments.cache / "tokenizer.json"
    if not file.exists():
        pretraining_text.train_tokenizer(texts).save(str(file))
    tokenizer = Tokenizer.from_file(str(file))
    for name, documents in texts.items():
        tokens = pretraining_text.write_tokens(arguments.cache, name, documents, tokenizer)
        each = sum(map(len, documents)) / tokens
        print(f"{name}: {len(documents)} documents, {tokens} tokens, {each:.2f} characters per token")


def train(arguments: argparse.Namespace) -> None:
    """Train from the saved state, or from scratch, until --tokens are seen or --minutes have passed."""
    import torch

    from src.models import pretraining
    from src.models.loading import resolve_device

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.quick:
        arguments.tokens, arguments.compile, arguments.log_every = 0.02, False, 2
    settings = pretraining.TrainingSettings(
        arch=arguments.arch, shape=arguments.shape, cache=arguments.cache, device=resolve_device(arguments.device),
        tokens=int(1e6 * arguments.tokens), minutes=arguments.minutes, lr=arguments.lr, log_every=arguments.log_every,
        compiled=arguments.compile, start_from=arguments.start_from, seed=arguments.seed,
    )  # fmt: skip
    training = pretraining.train(settings)
    print(f"step {training.step}, {training.tokens / 1e6:.2f} M tokens")
    cli.say_written([training.file, training.log], f"{SCRIPT} export --arch {arguments.arch}", argv=[])


def export(arguments: argparse.Namespace) -> None:
    """Write the saved state to the folder of the checkpoint, as the hub has it: bf16 weights, config, tokenizer."""
    import torch
    from transformers import PreTrainedTokenizerFast

    from src.models import pretraining

    file, log = pretraining.training_files(arguments.cache, arguments.arch)
    if not file.exists():
        raise UserError(f"{file} does not exist; train first: python {SCRIPT} train --arch {arguments.arch}")
    state = torch.load(file, weights_only=True, map_location="cpu")
    model = pretraining.new_model(arguments.arch, arguments.shape, seed=0)
    model.load_state_dict(state["model"])
    model.to(torch.bfloat16).save_pretrained(arguments.assets)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(arguments.cache / "tokenizer.json"), bos_token="<s>", eos_token="</s>", pad_token="</s>",
        model_max_length=1024, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(arguments.assets)
    training = {"steps": state["step"], "tokens_seen": state["tokens"]}
    (arguments.assets / "training.json").write_text(json.dumps(training) + "\n")
    shutil.copyfile(log, arguments.assets / "training_log.csv")
    print(f"{state['tokens'] / 1e6:.2f} M tokens")
    cli.say_written([arguments.assets], f"{SCRIPT} evaluate --arch {arguments.arch}", argv=[])


def evaluate(arguments: argparse.Namespace) -> None:
    """Write evaluation.json: what the card states about the exported checkpoint, measured on validation text."""
    import torch
    from transformers import AutoTokenizer

    from src.hybrid.recovery import zeroed_attention
    from src.models import model_card, pretraining
    from src.models.pretraining_text import TextRows

    cache, rows = arguments.cache, arguments.validation_sequences
    tokenizer = AutoTokenizer.from_pretrained(arguments.assets)
    model = pretraining.MODELS[arguments.arch].from_pretrained(arguments.assets, dtype=torch.float32).eval()
    figures = {}
    if arguments.arch == "mixtral":
        load = model_card.expert_load(model, cache, rows)
        figures |= {"smallest_expert_share": load.min(), "largest_expert_share": load.max(), "expert_load": load}
    else:
        prose = TextRows(cache, "valid_prose").beginnings(rows, model_card.ROW_TOKENS)
        code = TextRows(cache, "valid_code").beginnings(min(12, rows), model_card.ROW_TOKENS)
        sparsity, nll = model_card.sparsity_and_nll(model, prose)
        figures |= sparsity
        for name in ("prose", "code"):
            gain = model_card.context_gain(model, cache, f"valid_{name}", 6 * rows)
            figures.setdefault("context", {})[name] = gain
        count, half = model.config.num_hidden_layers, rows // 2
        with zeroed_attention(model, range(count // 3, 2 * count // 3)):
            figures["zeroed_middle_cost"] = (pretraining.token_nll(model, prose[:half]) - nll[:half]).mean().item()
        figures["random_span"] = model_card.random_spans(model)
        scored = [(prose, nll), (code, pretraining.token_nll(model, code))]
        figures["natural_repeats"] = model_card.repeats_nll(tokenizer, scored)
    figures["bits_per_byte"] = model_card.bits_per_byte(model, tokenizer, cache, rows)
    figures |= json.loads((arguments.assets / "training.json").read_text())
    text, file = json.dumps(model_card.rounded(figures), indent=1), arguments.assets / "evaluation.json"
    file.write_text(text + "\n")
    print(text, f"wrote {file}", sep="\n")


COMMANDS = {"prepare": prepare, "train": train, "export": export, "evaluate": evaluate}


def main() -> None:
    arguments = read_arguments(sys.argv[1:])
    COMMANDS[arguments.command](arguments)


if __name__ == "__main__":
    cli.run_main(main)
