"""The command line of every script: flags with sentences, values with bounds, defaults of the model asked for."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import config
from src.base import cli
from src.base.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [*sorted((ROOT / "scripts").glob("[01]*.py")), *sorted((ROOT / "scripts" / "journeys").glob("0*.py"))]


def parse(*argv, names=tuple(cli.FLAGS), **options):
    return cli.parse("A script.", config, names, list(argv), **options)


def refused(capsys, *argv, names=tuple(cli.FLAGS)) -> str:
    """The one line on stderr that wrong values end in, with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        parse(*argv, names=names)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().split("\n")
    return line


@pytest.mark.parametrize("name", cli.FLAGS)
def test_every_flag_has_a_sentence_and_a_setting_that_exists(name):
    flag = cli.FLAGS[name]
    assert re.match(r"[A-Z0-9].*\w\.$", flag.help) and len(flag.help.split()) >= 3, flag.help
    assert flag.setting is None or hasattr(config, flag.setting)


def test_help_shows_the_sentence_and_the_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help", names=["documents", "alphas", "confidence_level"])
    shown = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "The number of evaluation documents. (default: 64)" in shown
    assert "(default: 0.0,0.1,0.2,0.3,0.5,0.7,1.0)" in shown and "0.95 gives 95 % intervals" in shown


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_help_and_wrong_values_answer_at_once_and_without_torch(script):
    """The best of three: what is measured is the script, not how busy the machine is."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        run = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True)
        seconds.append(time.perf_counter() - started)
        assert run.returncode == 0 and "--model" in run.stdout
        if seconds[-1] < 1.0:
            break
    assert min(seconds) < 1.0
    code = "import runpy, sys\ntry:\n    runpy.run_path(sys.argv.pop(1), run_name='__main__')\n"
    code += "except SystemExit as stop:\n    print(stop.code, 'torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code, script, "--nope"], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout == "2 False\n" and run.stderr.startswith("error: unrecognized arguments: --nope")


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--documents", "0"], "argument --documents: 0 is too small; it must be at least 1"),
        (["--documents", "many"], "'many' is not a whole number"),
        (["--document-tokens", "2"], "2 is too small; it must be at least 3"),
        (["--threshold", "1.5"], "1.5 lies outside [0, 1]"),
        (["--threshold", "nan"], "nan lies outside [0, 1]"),
        (["--gate-share", "1"], "1 lies outside (0, 1)"),
        (["--temperature", "0"], "0 lies outside (0, inf)"),
        (["--confidence-level", "1"], "1 lies outside (0, 1)"),
        (["--alphas", "0,2"], "2 lies outside [0, 1]"),
        (["--alphas", "0,,1"], "'' is not a number"),
        (["--layers", "most"], "'most' names no layers; give all, middle"),
        (["--use-8bit-fallback", "maybe"], "'maybe' is neither yes nor no"),
        (["--signal", "next"], "invalid choice: 'next'"),
        (["--dtype", "int3"], "invalid choice: 'int3'"),
        (["--document", "3"], "unrecognized arguments"),
        (["--documents"], "expected one argument"),
    ],
)
def test_wrong_values_are_one_line(capsys, argv, words):
    line = refused(capsys, *argv)
    assert line.startswith("error: ") and words in line and "--help" in line


def test_values_are_read_by_their_types():
    arguments = parse(
        "--alphas", "1,0.3,0.3", "--layers", "4,5", "--documents", "3", "--use-8bit-fallback", "no", "--output-dir",
        "there", "--quick", "--export", "--prompts", "a b", "c",
    )  # fmt: skip
    assert arguments.alphas == [0.3, 1.0] and arguments.layers == "4,5" and arguments.documents == 3
    assert arguments.use_8bit_fallback is False and arguments.output_dir == Path("there") and arguments.quick is True
    assert arguments.export == "tokens" and arguments.prompts == ["a b", "c"] and arguments.restart is False
    assert {"alphas", "layers", "quick", "prompts"} <= arguments.given and "restart" not in arguments.given


def test_a_repeated_flag_of_several_values_keeps_them_all():
    assert parse("--prompts", "a", "--prompts", "b", "c", names=("prompts",)).prompts == ["a", "b", "c"]


def test_defaults_are_those_of_the_model_asked_for():
    names = ["model", "quick", "window_tokens", "documents", "steps_b"]
    found = {
        model: parse(*(["--model", model] if model else []), names=names)
        for model in (None, "blockffn-tiny", "SparseLLM/BlockFFN-3B-SFT", "somebody/else")
    }
    assert [one.window_tokens for one in found.values()] == [1024, 1024, 512, 512]
    assert [one.steps_b for one in found.values()] == [500, 500, 0, 0]
    assert all(one.documents == config.MAX_EVAL_SAMPLES for one in found.values())
    assert parse("--model=somebody/else", names=names).window_tokens == 512
    assert parse("--model", "somebody/else", "--window-tokens", "900", names=names).window_tokens == 900


def test_quick_settings_are_defaults_and_a_flag_beats_them():
    names = ["model", "quick", "documents", "shares", "window_tokens"]
    quick = parse("--quick", names=names)
    assert (quick.documents, quick.shares, quick.window_tokens) == (8, [0.5], 1024)
    assert parse("--quick", "--documents", "11", names=names).documents == 11
    assert parse(names=names).documents == config.MAX_EVAL_SAMPLES


def test_a_script_may_have_another_setting_or_default():
    names = ["documents", "layers"]
    options = {"settings": {"documents": "SPARSITY_SAMPLES"}, "defaults": {"layers": "0"}}
    arguments = parse(names=names, **options)
    assert (arguments.documents, arguments.layers) == (config.SPARSITY_SAMPLES, "0") and arguments.given == set()
    assert parse("--layers", "all", names=names, **options).layers == "all"


def test_a_flag_without_effect_is_refused():
    arguments = parse("--steps-a", "3", names=["steps_a", "steps_b"])
    cli.refuse(arguments, ["steps_b"], "nothing is trained")
    with pytest.raises(UserError, match="^--steps-a has no effect here: nothing is trained$"):
        cli.refuse(arguments, ["steps_b", "steps_a"], "nothing is trained")


def test_meta_files_keep_all_but_where_results_go():
    arguments = parse("--output-dir", "x", names=["model", "documents", "output_dir", "restart"])
    assert cli.recorded(arguments) == {"model": config.MODEL_NAME, "documents": config.MAX_EVAL_SAMPLES}


def test_the_next_line_repeats_the_flags_given(capsys):
    argv = ["--documents", "3", "--model", "a model", "--quick", "--seed=4", "--alphas", "1"]
    assert cli.repeated_flags(argv) == ["--model", "'a model'", "--seed", "4", "--quick"]
    assert cli.repeated_flags(argv, unknown=["seed", "model"]) == ["--quick"]
    cli.say_written(["a.csv"], "scripts/06_replace_layer.py", argv)
    last = capsys.readouterr().out.strip().split("\n")[-1]
    assert last == "next: python scripts/06_replace_layer.py --model 'a model' --seed 4 --quick"
    cli.say_written(["a.csv"], "jupyter lab", argv)
    assert capsys.readouterr().out.endswith("  a.csv\nnext: jupyter lab\n")


def test_a_command_in_an_error_repeats_the_flags_given(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["07.py", "--quick", "--model", "m", "--shares", "0.5"])

    def main():
        raise UserError("there are no sidecars in x; make them", "scripts/04_test_sidecar.py --retrain")

    with pytest.raises(SystemExit) as stop:
        cli.run_main(main)
    line = "error: there are no sidecars in x; make them: python scripts/04_test_sidecar.py --retrain --model m --quick"
    assert stop.value.code == 2 and capsys.readouterr().err == f"{line}\n"
    assert str(UserError("no", "scripts/01.py")) == "no: python scripts/01.py" and str(UserError("no")) == "no"


def test_run_main_returns_what_main_does_and_keeps_bugs():
    assert cli.run_main(lambda: 7) == 7
    with pytest.raises(ValueError, match="invalid literal"):  # raised by Python, not by this repository
        cli.run_main(lambda: int("x"))
    with pytest.raises(KeyError):
        cli.run_main(lambda: {}["x"])


# -- run_main


def run_main_with(statement):
    code = f"from src.base import cli, errors\ndef main():\n    {statement}\ncli.run_main(main)"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("raise errors.UserError('alpha is 2;\\n use 0 to 1')", "error: alpha is 2; use 0 to 1\n"),
        ("open('no/such/file')", "error: [Errno 2] No such file or directory: 'no/such/file'\n"),
        ("from src.base.text_data import load_documents; load_documents('x.y', 'z')", None),
        ("cli.Parser('d').parse_args(['--nope'])", "error: unrecognized arguments: --nope (see -c --help)\n"),
        ("raise MemoryError", "error: out of memory: MemoryError; try fewer --window-tokens or --device cpu\n"),
    ],
)
def test_user_errors_are_one_line_and_exit_code_2(statement, message):
    run = run_main_with(statement)
    assert run.returncode == 2, run.stderr
    assert run.stderr.count("\n") == 1 and run.stderr.startswith("error: ")
    assert message is None or run.stderr == message


@pytest.mark.parametrize(
    "statement",
    ["int('x')", "import numpy; numpy.ones(2) + numpy.ones(3)", "import json; json.loads('{')", "{}['x']", "1 / 0"],
)
def test_bugs_keep_their_traceback(statement):
    run = run_main_with(statement)
    assert run.returncode == 1
    assert "Traceback" in run.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_one_line_and_exit_code_1():
    run = run_main_with("open('/dev/full', 'w', buffering=1).write('x' * 9999 + chr(10))")
    assert run.returncode == 1, run.stderr
    assert run.stderr.count("\n") == 1 and "No space left on device" in run.stderr


def test_interrupt_is_130_without_traceback():
    run = run_main_with("raise KeyboardInterrupt")
    assert run.returncode == 130 and "Traceback" not in run.stderr


def test_a_closed_pipe_is_quiet():
    code = "from src.base import cli\ndef main():\n    for i in range(100000): print(i)\ncli.run_main(main)"
    run = subprocess.run(
        f"'{sys.executable}' -c '{code}' | head -n 1", shell=True, cwd=ROOT, capture_output=True, text=True
    )
    assert run.stdout == "0\n" and run.stderr == ""
