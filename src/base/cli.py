"""The command line of every script: each flag once, with its help, its bounds and the setting behind its default.

A script names its flags and gives config.py; `parse` reads --model and --quick first, because other defaults depend on
them. Nothing here imports torch, numpy or pandas, so that `--help` and wrong values are answered at once.
"""

import argparse
import dis
import errno
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from src.base.errors import UserError, fail

REPOSITORY = Path(__file__).resolve().parents[2]
# Flags that a script's `next:` line, and the command that an error names, repeat where they were given.
REPEATED = ("model", "device", "dtype", "seed", "quick", "output_dir")


# -- types of values
def whole(least: int) -> Callable[[str], int]:
    """A reader of whole numbers from `least` on."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is too small; it must be at least {least}")
        return value

    return read


def number(low: float, high: float, bounds: bool = True) -> Callable[[str], float]:
    """A reader of numbers between `low` and `high`, with the bounds themselves or without."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        inside = low <= value <= high if bounds else low < value < high
        if not inside:  # NaN is not inside anything
            shown = f"[{low:g}, {high:g}]" if bounds else f"({low:g}, {high:g})"
            raise argparse.ArgumentTypeError(f"{text} lies outside {shown}")
        return value

    return read


def listed(read: Callable[[str], Any]) -> Callable[[str], list]:
    """A reader of comma-separated values: rising and without repeats."""

    def read_list(text: str) -> list:
        return sorted({read(part.strip()) for part in text.split(",")})

    return read_list


def yes_or_no(text: str) -> bool:
    """`yes` or `no`."""
    if text not in ("yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither yes nor no")
    return text == "yes"


def layer_set(text: str) -> str:
    """`all`, `middle`, `first_half`, `last_half`, or indices such as 4,5,6; which layers those are, the model says."""
    if text not in ("all", "middle", "first_half", "last_half") and not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} names no layers; give all, middle, first_half, last_half, or indices such as 4,5,6"
        )
    return text


POSITIVE = number(0.0, math.inf, bounds=False)
SHARE = number(0.0, 1.0, bounds=False)
FRACTION = number(0.0, 1.0)
PERCENT = number(0.0, 100.0)
# Those of src/journeys/predictors.py, which takes a second to import.
PREDICTORS = (
    "uniform", "majority", "previous_token", "transition", "lookup", "xgboost", "mlp", "mlp_tuned", "stale_gate",
    "linear_probe", "mlp_probe",
)  # fmt: skip
DTYPES = ("auto", "float32", "float16", "bfloat16")
AUTO = ("auto", "yes", "no")


@dataclass(frozen=True)
class Flag:
    """One flag: what it means in a sentence, the setting of config.py that is its default, and how values are read.

    `choices`, `nargs`, `metavar` and `const` are argparse's. A flag whose `read` is bool takes no value.
    """

    help: str
    setting: str | None = None
    read: Callable[[str], Any] = str
    choices: Sequence[str] | None = None
    nargs: str | None = None
    metavar: str | None = None
    const: Any = None


# By destination: `output_dir` is --output-dir. In the order of `--help`.
FLAGS: dict[str, Flag] = {
    # what runs, and where results go
    "model": Flag("The model: blockffn-tiny, a folder, a .gguf file or a hub name.", "MODEL_NAME"),
    "device": Flag("The device to compute on: auto, cpu, cuda, cuda:1.", "DEVICE"),
    "dtype": Flag("The number format of the weights; auto suits the device.", "DTYPE", choices=DTYPES),
    "quick": Flag("Take the same path on less, with results in a folder of their own.", "QUICK", bool),
    "seed": Flag("The seed of everything that draws.", "SEED", whole(0)),
    "output_dir": Flag("The root folder of all results.", "OUTPUT_DIR", Path, metavar="FOLDER"),
    "cache_dir": Flag("The folder in which downloads are kept.", "MODEL_CACHE_DIR", Path, metavar="FOLDER"),
    "max_memory_gb": Flag("GB of GPU memory that the weights may take.", "MAX_MEMORY_GB", POSITIVE),
    "use_8bit_fallback": Flag("Whether to load in 8 bit where the weights do not fit otherwise: yes or no.",
                              "USE_8BIT_FALLBACK", yes_or_no),
    "restart": Flag("Compute everything again, also what an earlier run left.", None, bool),
    # text
    "dataset": Flag("The text: mixed, docs, code, math, story, wikitext, or a .txt or .jsonl file.", "EVAL_DATASET"),
    "documents": Flag("The number of evaluation documents.", "MAX_EVAL_SAMPLES", whole(1)),
    "calibration_documents": Flag("The number of documents that choices are made on, none of which is scored.",
                                  "CALIBRATION_SAMPLES", whole(1)),
    "document_tokens": Flag("Tokens kept of a document, its beginning.", "MAX_EVAL_DOCUMENT_TOKENS", whole(3)),
    "window_tokens": Flag("Tokens of a scoring window, within the model's context.", "MAX_SEQ_LEN", whole(3)),
    "oom_window_tokens": Flag("Tokens of a window in the second attempt, after running out of GPU memory.",
                              "OOM_SEQ_LEN_FALLBACK", whole(3)),
    "stride": Flag("Tokens between the starts of two scoring windows.", "EVAL_STRIDE", whole(1)),
    "batch_windows": Flag("Full windows in one forward pass.", "EVAL_BATCH_SIZE", whole(1)),
    "resamples": Flag("Bootstrap resamples behind every interval.", "BOOTSTRAP_RESAMPLES", whole(1)),
    "confidence_level": Flag("The level of every interval: 0.95 gives 95 % intervals.", "CONFIDENCE_LEVEL", SHARE),
    "rank_resamples": Flag("Bootstrap resamples behind the intervals of rank correlations.",
                           "RANK_RESAMPLES", whole(1)),
    "new_tokens": Flag("Tokens generated after each prompt.", "MAX_NEW_TOKENS", whole(1)),
    "prompts": Flag("Prompts in place of TEST_PROMPTS.", None, nargs="+", metavar="TEXT"),
    "prompt_file": Flag("A text file with a prompt on each line, in place of TEST_PROMPTS.", None, Path),
    # layers, sidecars and gates
    "layers": Flag("The layers: all, middle, first_half, last_half, or 4,5,6.", "TARGET_LAYERS", layer_set),
    "weights": Flag("Show statistics of the weights of these layers too.", None, bool),
    "sidecar_dir": Flag("The folder of distilled sidecars; by default the run's own, else the shipped ones.",
                        None, Path, metavar="FOLDER"),
    "stage": Flag("The stage of the sidecars; auto takes b, which was trained end to end, where there is one.",
                  "SIDECAR_STAGE", choices=("auto", "a", "b")),
    "alphas": Flag("Mamba shares from 0 (attention only) to 1 (Mamba only), separated by commas.",
                   "ALPHA_SWEEP", listed(FRACTION)),
    "together": Flag("How many of the safest layers are replaced together, separated by commas.",
                     "LAYERS_TOGETHER", listed(whole(2))),
    "shares": Flag("Mean Mamba shares at which gates are compared, separated by commas.", "GATE_SHARES", listed(SHARE)),
    "signal": Flag("The router that routing gates read.", "GATE_SIGNAL", choices=("previous", "lookahead")),
    "threshold": Flag("The sparsity from which the uncalibrated routing gate sends a token to Mamba.",
                      "SPARSITY_THRESHOLD", FRACTION),
    "temperature": Flag("The width of soft gates, in units of sparsity.", "GATE_TEMPERATURE", POSITIVE),
    "temperatures": Flag("Further widths of soft gates, at the verdict's share, separated by commas.",
                         "GATE_TEMPERATURES", listed(POSITIVE)),
    "mask_seeds": Flag("Seeds of the masks that are drawn at random, separated by commas.",
                       "RANDOM_GATE_SEEDS", listed(whole(0))),
    # distillation
    "stage_a_layers": Flag("The layers that get a stage A sidecar.", "STAGE_A_LAYERS", layer_set),
    "retrain": Flag("Distil anew; an interrupted run with the same settings goes on.", None, bool),
    "checks_only": Flag("Check untrained sidecars; neither load nor distil any.", None, bool),
    "d_state": Flag("The sidecars' state width per head.", "MAMBA_D_STATE", whole(1)),
    "d_conv": Flag("Tokens that the sidecars' convolution sees.", "MAMBA_D_CONV", whole(1)),
    "expand": Flag("The sidecars' inner width over the model's.", "MAMBA_EXPAND", whole(1)),
    "headdim": Flag("The width of a head of the sidecars.", "MAMBA_HEADDIM", whole(1)),
    "init": Flag("How sidecars start: at random, or from the layer's own attention.",
                 "MAMBA_INIT", choices=("random", "attention")),
    "sequence_tokens": Flag("Tokens of a training sequence.", "DISTILL_SEQ_LEN", whole(2)),
    "batch_sequences": Flag("Training sequences in one optimiser step.", "DISTILL_BATCH_SIZE", whole(1)),
    "steps_a": Flag("Optimiser steps of stage A; 0 keeps the stage A that is there.", "DISTILL_STEPS_A", whole(0)),
    "steps_b": Flag("Optimiser steps of stage B; 0 leaves it out.", "DISTILL_STEPS_B", whole(0)),
    "steps_gate": Flag("Optimiser steps of the learned gate; 0 leaves it out.", "DISTILL_STEPS_GATE", whole(0)),
    "lr_a": Flag("The peak learning rate of stage A.", "DISTILL_LR_A", POSITIVE),
    "lr_b": Flag("The peak learning rate of stage B.", "DISTILL_LR_B", POSITIVE),
    "lr_gate": Flag("The peak learning rate of the learned gate.", "DISTILL_LR_GATE", POSITIVE),
    "gate_share": Flag("The mean Mamba share that the learned gate is trained for.", "LEARNED_GATE_SHARE", SHARE),
    "train_sequences": Flag("Training sequences in the pool that steps draw from.", "DISTILL_TRAIN_WINDOWS", whole(1)),
    "validation_sequences": Flag("Sequences behind the validation loss.", "DISTILL_VALIDATION_WINDOWS", whole(1)),
    "one_layer_at_a_time": Flag("Whether stage A trains layer by layer, in little memory; auto does for large models.",
                                "DISTILL_ONE_LAYER_AT_A_TIME", choices=AUTO),
    "bf16": Flag("Whether a frozen float32 model runs in bfloat16 while sidecars train; auto does where that is fast.",
                 "DISTILL_BF16", choices=AUTO),
    "recovery_documents": Flag("Calibration documents on which the sidecars' recovery is measured.",
                               "RECOVERY_SAMPLES", whole(1)),
    # journeys: collecting
    "datasets": Flag("The problems: humaneval, gsm8k (generated where the hub is out of reach), gsm_symbolic, or .txt "
                     "and .jsonl files.", "JOURNEY_DATASETS", nargs="+", metavar="NAME"),
    "problems": Flag("The number of problems of each data set.", "JOURNEY_PROBLEMS", whole(1)),
    "prompt_tokens": Flag("Tokens kept of a prompt, its beginning.", "JOURNEY_MAX_TOKENS", whole(1)),
    "generate": Flag("Tokens generated after each prompt, whose journeys are kept too.", "JOURNEY_GENERATE", whole(0)),
    "top_k": Flag("Experts kept of each token of a BlockFFN; other models choose as many as they do.", None, whole(1)),
    "hidden_problems": Flag("Keep the router inputs of the first N problems of each data set; 0 keeps none.",
                            None, whole(0), metavar="N"),
    "hidden_dtype": Flag("The number format of router inputs; auto is float32 for a float32 model, whose near ties "
                         "float16 would swap.", "JOURNEY_HIDDEN_DTYPE", choices=("auto", "float16", "float32")),
    "batch_problems": Flag("Problems in one forward pass.", "JOURNEY_BATCH_PROBLEMS", whole(1)),
    "shard_problems": Flag("Problems in one file, which is what an interruption can cost.",
                           "JOURNEY_SHARD_PROBLEMS", whole(1)),
    "engine": Flag("What runs the model.", "JOURNEY_ENGINE", choices=("transformers", "vllm")),
    "tensor_parallel_size": Flag("GPUs that vLLM splits the model over.", None, whole(1)),
    "device_map": Flag("Spread a large model over all GPUs and host memory.", None, choices=("auto",)),
    "export": Flag("Write one file for each token as well, or one file of all rows.",
                   None, choices=("tokens", "rows"), nargs="?", const="tokens"),
    "import_from": Flag("Store these records, a .jsonl file or a folder, instead of running a model.", None, Path),
    # journeys: reading
    "input": Flag("Read these records instead of the collected ones: a .jsonl file of (token, layer) rows, a folder of "
                  "files p<problem>_token_<idx>.jsonl or of such folders, or a store.", None, Path),
    "limit": Flag("Token files read of each folder of --input, in the order of their names.", None, whole(1)),
    "strict": Flag("Stop at a faulty record instead of leaving it out.", None, bool),
    "num_experts": Flag("Experts of the model behind the records; found in them unless given.", None, whole(1)),
    "folds": Flag("Parts of the problems for accuracy out of sample.", "JOURNEY_FOLDS", whole(2)),
    "permutations": Flag("Permutations behind p-values.", "JOURNEY_PERMUTATIONS", whole(1)),
    "top": Flag("Paths listed of each length, the most common ones.", "JOURNEY_TOP_PATHS", whole(1)),
    "top_tokens": Flag("Tokens listed, the most frequent ones.", "JOURNEY_TOP_TOKENS", whole(1)),
    "high_confidence": Flag("The gate probability above which a decision counts as confident.",
                            "JOURNEY_HIGH_CONFIDENCE", FRACTION),
    "dominant_percent": Flag("The usage above which an expert of a layer is listed.",
                             "JOURNEY_DOMINANT_PERCENT", PERCENT),
    "strong_percent": Flag("The probability above which a transition is listed.", "JOURNEY_STRONG_PERCENT", PERCENT),
    "low_accuracy_percent": Flag("The accuracy under which looking further ahead counts as lost.",
                                 "JOURNEY_LOW_ACCURACY_PERCENT", PERCENT),
    "domain_percent": Flag("The difference in usage above which an expert prefers a domain.",
                           "JOURNEY_DOMAIN_PERCENT", PERCENT),
    # journeys: predicting
    "predictors": Flag(f"The predictors to run, of {', '.join(PREDICTORS)}; by default all that the data allow.",
                       None, choices=PREDICTORS, nargs="+", metavar="NAME"),
    "hops": Flag("Layers ahead that experts are predicted, separated by commas.", "PREDICT_HOPS", listed(whole(1))),
    "split": Flag("How problems are divided: problems is honest; rows fits every predictor on a leaky split as well, "
                  "both only those of --row-predictors.", "PREDICT_SPLIT", choices=("problems", "rows", "both")),
    "row_predictors": Flag("The predictors that --split both fits on the leaky split.",
                           "PREDICT_ROW_PREDICTORS", choices=PREDICTORS, nargs="+", metavar="NAME"),
    "predictor_seeds": Flag("Runs of each predictor, which are averaged.", "PREDICT_SEEDS", whole(1)),
    "tune": Flag("Search the setting of mlp_tuned first, among so many networks.", None, whole(1), metavar="NETWORKS"),
    "train_rows": Flag("Cells in one epoch of a network.", "PREDICT_TRAIN_ROWS", whole(2)),
    "epochs": Flag("Epochs of a network at most.", "PREDICT_EPOCHS", whole(1)),
    "validation_rows": Flag("Cells that choices are made on.", "PREDICT_VALIDATION_ROWS", whole(1)),
    "xgboost_values": Flag("Cells times experts that XGBoost trains on: it grows one tree for each expert and round.",
                           "PREDICT_XGBOOST_VALUES", whole(1)),
    "xgboost_rounds": Flag("Rounds of XGBoost at most.", "PREDICT_XGBOOST_ROUNDS", whole(1)),
    "cache_tokens": Flag("Tokens of the simulated cache; 0 simulates none.", "CACHE_TOKENS", whole(0)),
    "cache_capacities": Flag("Experts held of each layer, separated by commas; by default eighths of all.",
                             None, listed(whole(0))),
    "bandwidths": Flag("Bandwidths of the link to host memory in GB/s; tables show the first.",
                       "CACHE_BANDWIDTHS_GB_S", POSITIVE, nargs="+"),
    "cache_model": Flag("Whose shapes the simulated cache has, in 4 bits on an RTX 3060: Mixtral's, or those of the "
                        "collected model.", "CACHE_MODEL", choices=("mixtral-8x7b", "own")),
    "expert_mb": Flag("The size of an expert in 1e6 bytes, in place of --cache-model's.", None, POSITIVE),
    "compute_ms": Flag("Milliseconds that a layer computes for a token, in place of --cache-model's.", None, POSITIVE),
    # measuring speed
    "repeats": Flag("Rounds in which what is compared runs in turns.", None, whole(1)),
    "journeys": Flag("The number of random journeys.", None, whole(2)),
    "no_loops": Flag("Leave the loops out, which take long for many journeys.", None, bool),
    "save": Flag("Write the figures and their provenance too, to <command>.json in this folder.",
                 None, Path, nargs="?", metavar="FOLDER", const=str(REPOSITORY / "docs" / "results" / "benchmarks")),
}  # fmt: skip
MODEL_FLAGS = ("model", "device", "dtype", "cache_dir", "max_memory_gb", "use_8bit_fallback")
RUN_FLAGS = ("quick", "seed", "output_dir")
# Of the scripts that open a session (`hybrid/session.py`), and of those among them that score text.
SESSION_FLAGS = (*MODEL_FLAGS, *RUN_FLAGS, "restart", "dataset", "documents", "document_tokens")
SCORING_FLAGS = ("window_tokens", "oom_window_tokens", "stride", "batch_windows")
# Of the scripts that compare gates.
STUDY_FLAGS = (
    *SESSION_FLAGS, *SCORING_FLAGS, "calibration_documents", "layers", "sidecar_dir", "stage", "shares", "signal",
    "threshold", "temperature", "temperatures", "mask_seeds", "resamples", "confidence_level",
)  # fmt: skip


# -- settings
def setting(config: ModuleType, name: str, model: str, quick: bool) -> Any:
    """A setting of config.py for a model: `QUICK_SETTINGS` beats it in a quick run, and a setting that is a dictionary
    with the key "any" holds a value for each profile (`config.PROFILES`: model -> profile), "any" for all others."""
    value = config.QUICK_SETTINGS[name] if quick and name in config.QUICK_SETTINGS else getattr(config, name)
    if isinstance(value, dict) and "any" in value:
        value = value.get(config.PROFILES.get(model), value["any"])
    return value


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and exit code 2, without the usage block, and which knows no abbreviations."""

    def __init__(self, description: str | None = None, add_help: bool = True):
        super().__init__(
            description=description, allow_abbrev=False, add_help=add_help,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip

    def error(self, message: str) -> NoReturn:
        """One line and exit code 2, without argparse's usage block."""
        fail(f"{message} (see {self.prog} --help)")


def parse(
    description: str,
    config: ModuleType,
    names: Sequence[str],
    argv: Sequence[str] | None = None,
    settings: Mapping[str, str] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> argparse.Namespace:
    """Read a command line that knows the flags `names`: a namespace with one entry for each, and `given`, the names of
    those that stood on the command line.

    description: the script's docstring, which `--help` shows. config: the module config.py, whose settings are the
    defaults. argv: the words of the command line; None takes those of the process. settings: flag -> setting that is
    its default here, where that is not the flag's usual one. defaults: flag -> default that no setting has.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    names = [name for name in FLAGS if name in {*names}]
    given = _given(argv)
    quick = config.QUICK or "quick" in given
    wanted = {name: FLAGS[name].setting for name in names} | dict(settings or {})
    model = given.get("model") or (getattr(config, wanted["model"]) if wanted.get("model") else "")
    values = {name: False if FLAGS[name].read is bool else None for name in names}
    values |= {name: setting(config, key, model, quick) for name, key in wanted.items() if key} | dict(defaults or {})
    parser = Parser(description.strip())
    for name in names:
        _add(parser, name, values[name])
    given = vars(parser.parse_args(argv))
    others = {name: values[name] for name in names if name not in given}
    return argparse.Namespace(**given, **others, given=set(given))


def _option(name: str) -> str:
    """`output_dir` -> `--output-dir`."""
    return f"--{name.replace('_', '-')}"


def _add(parser: argparse.ArgumentParser, name: str, default: Any) -> None:
    """Add one flag; what was not given stays out of the namespace, so that `parse` can tell."""
    flag = FLAGS[name]
    option, shown = _option(name), flag.help.replace("%", "%%")
    if flag.read is bool:
        parser.add_argument(option, action="store_true", default=argparse.SUPPRESS, help=shown)
        return
    if default is not None:
        if isinstance(default, list):
            default = ("," if flag.nargs is None else " ").join(map(str, default))
        shown += f" (default: {default})".replace("%", "%%")
    # A flag of several values may be repeated: none of them is lost.
    parser.add_argument(
        option, action="extend" if flag.nargs == "+" else "store", type=flag.read, choices=flag.choices,
        nargs=flag.nargs, metavar=flag.metavar, const=flag.const, default=argparse.SUPPRESS, help=shown,
    )  # fmt: skip


def _given(argv: Sequence[str]) -> dict[str, str | bool]:
    """Those of the flags REPEATED that stand on a command line, by name, whatever other flags it has."""
    reader = Parser(add_help=False)
    for name in REPEATED:
        action = "store_true" if FLAGS[name].read is bool else "store"
        reader.add_argument(_option(name), action=action, default=argparse.SUPPRESS)
    return vars(reader.parse_known_args(argv)[0])


def refuse(arguments: argparse.Namespace, names: Sequence[str], reason: str) -> None:
    """Raise UserError where one of these flags was given although it has no effect in this run; `reason` says why."""
    for name in names:
        if name in arguments.given:
            raise UserError(f"{_option(name)} has no effect here: {reason}")


def recorded(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a meta file keeps of the arguments: all but where results go and whether they are computed again."""
    return {name: value for name, value in vars(arguments).items() if name not in ("given", "output_dir", "restart")}


# -- what is said at the end
def repeated_flags(argv: Sequence[str] | None = None, unknown: Sequence[str] = ()) -> list[str]:
    """Those of the flags REPEATED that stand on the command line, with their values, as words of a shell.

    The flags `unknown`, which the command to come does not have, are left out.
    """
    given = _given(sys.argv[1:] if argv is None else argv)
    words = []
    for name in REPEATED:
        if name in given and name not in unknown:
            words += [_option(name)] if given[name] is True else [_option(name), shlex.quote(given[name])]
    return words


def say_written(
    paths: Sequence[object], then: str, argv: Sequence[str] | None = None, unknown: Sequence[str] = ()
) -> None:
    """Say which files a script wrote and what comes next: a script (with the flags given), or another command.

    `unknown` names flags that this script knows and the next one does not.
    """
    print("\nwritten:", *(f"  {path}" for path in paths), sep="\n")
    command = ["python", then, *repeated_flags(argv, unknown)] if then.startswith("scripts/") else [then]
    print(f"next: {' '.join(command)}", flush=True)


def run_main(main: Callable[[], Any]) -> Any:
    """Run a script's `main` and return what it does; what the user can put right becomes one line and exit code 2.

    The user's are OSError (no file, no right, no network), running out of memory, and every ValueError that came from
    a `raise` in this repository. A full disk is one line and exit code 1. A ValueError out of a library is a bug, and
    bugs keep their traceback.
    """
    try:
        return main()
    except BrokenPipeError:
        # The reader of our output (`| head`) has gone; keep Python from complaining again while it shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted; the files written so far are complete", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        fail(f"{error}; results written before it are intact" if full else error, code=1 if full else 2)
    except UserError as error:
        fail(error.with_flags(repeated_flags()))
    except ValueError as error:
        if not _raised_by_repository(error):
            raise
        fail(error)
    except Exception as error:
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            fail(f"out of memory: {str(error) or type(error).__name__}; try fewer --window-tokens or --device cpu")
        raise


def _raised_by_repository(error: BaseException) -> bool:
    """Whether a `raise` statement in this repository's own files raised `error` (not a library, not a builtin)."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    # argparse types and the like are called from libraries; what counts is the innermost frame.
    file = Path(code.co_filename).resolve()
    inside = file.parent == REPOSITORY or any(REPOSITORY / top in file.parents for top in ("src", "scripts"))
    return inside and code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]
