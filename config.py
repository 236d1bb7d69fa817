"""Settings of the study: flat constants, read by scripts and notebooks (never by src).

Every script shows its settings as flags (`--help`); a flag beats this file. Four environment variables beat it too, so
that scripts, notebooks and scripts/run_all.sh agree: BLOCKFFN_MODEL, BLOCKFFN_JOURNEY_MODEL, BLOCKFFN_OUTPUT_DIR,
BLOCKFFN_QUICK.

What suits one model does not suit another. A setting such as {"tiny": 1024, "any": 512} has a value for each profile;
which profile a model has, PROFILES says, and a model that is not there takes "any". A plain number counts for all.
"""

import os
import re
from pathlib import Path

_ROOT = Path(__file__).resolve().parent

# --- Model ---------------------------------------------------------------------------------------------------------
# `blockffn-tiny` (ships in assets/), a folder, or a hub name. On a 12 GB GPU: "SparseLLM/BlockFFN-3B-SFT".
MODEL_NAME = os.environ.get("BLOCKFFN_MODEL") or "blockffn-tiny"
# The profile of a model; the settings below have values for each.
PROFILES = {"blockffn-tiny": "tiny", "mixtral-tiny": "tiny", "SparseLLM/BlockFFN-3B-SFT": "3b"}
# Where hub downloads are kept, one folder for all models (the 3B takes about 6 GB).
MODEL_CACHE_DIR = _ROOT / "cache"
# "auto" (cuda where there is one, else cpu), "cpu", "cuda", "cuda:1" ...
DEVICE = "auto"
# "auto" (float32 on CPU; on CUDA bfloat16 where the card has it, else float16), "float32", "float16", "bfloat16".
DTYPE = "auto"
# Load in 8 bit (bitsandbytes) when the weights do not fit otherwise.
USE_8BIT_FALLBACK = True
# Tokens: the MAX_SEQ_LEN to try again with after running out of GPU memory.
OOM_SEQ_LEN_FALLBACK = 256
# GB (1e9 bytes) of GPU memory that weights and activations may take; a little below the 12 GB of an RTX 3060.
MAX_MEMORY_GB = 11.0

# --- Mamba-2 sidecar -----------------------------------------------------------------------------------------------
MAMBA_D_STATE = 64  # state width N per head
MAMBA_D_CONV = 4  # tokens the causal convolution sees
MAMBA_EXPAND = 2  # inner width / model width
MAMBA_HEADDIM = 64  # width of a head
# "random", or "attention": in_proj from the layer's V, K, Q, out_proj from O (then d_state = head width, expand 1).
MAMBA_INIT = "random"

# --- Hybrid layers and gates ---------------------------------------------------------------------------------------
# Mamba shares of 05: 0 = attention only, 1 = Mamba only.
ALPHA_SWEEP = [0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0]
# Layers that get a sidecar: "all", "middle" (L//3 .. 2L//3-1), "first_half", "last_half", or a list of indices.
TARGET_LAYERS = "middle"
# Layers that get a stage A sidecar, which is what 06 replaces one by one.
STAGE_A_LAYERS = "all"
# Stage of the sidecars that 05 and 07 to 10 take: "a", "b", or "auto": b where all layers have it.
SIDECAR_STAGE = "auto"
# How many of the safest layers 06 replaces together.
LAYERS_TOGETHER = [2, 4, 6, 8]
# Which router a routing gate reads: "previous" (layer l-1's) or "lookahead" (layer l's on the layer's normed input).
GATE_SIGNAL = "previous"
# Sparsity (0-1) from which an uncalibrated hard routing gate sends a token to Mamba.
SPARSITY_THRESHOLD = 0.7
# Width of the soft routing gate's sigmoid, in units of sparsity: small = nearly a step.
GATE_TEMPERATURE = 0.1
# The temperatures that 07 compares.
GATE_TEMPERATURES = [0.03, 0.1, 0.3]
# Mean Mamba shares (0-1) at which 07 compares the gates.
GATE_SHARES = [0.25, 0.5, 0.75]

# Controls that 07 matches to hard routing at VERDICT_SHARE; at the other shares it is the random one alone. 08 takes
# all there are (src/gating/controls.py), the oracle and the probes, at every share.
GATE_CONTROLS = ["random", "token_shuffled", "block_shuffled"]

# --- The rule: by what 07 answers, stated before the numbers (src/gating/rule.py has it in words) -------------------
VERDICT_SHARE = 0.5  # of tokens on Mamba
VERDICT_SIGNAL = "previous"  # of the routing gate
VERDICT_LAYERS = "middle"
VERDICT_SIDECAR_SETS = 3  # sets of sidecars from different seeds, averaged over, their variance in the interval
VERDICT_DOCUMENTS = 60  # evaluation documents, at least
# Differences inside +- this share of random gating's penalty (on calibration text, fixed before the evaluation text is
# scored) are of no interest.
VERDICT_MARGIN = 0.2
# A study is large enough if the effect that it would find with 80 % power is at most this share of that penalty.
VERDICT_DETECTABLE = 0.25

# --- Distillation of the sidecars (04) -----------------------------------------------------------------------------
# Stage A: each sidecar alone, teacher's input to teacher's attention output. Stage B: end to end,
# KL(teacher || hybrid) under random masks.
# The 3B on 12 GB: stage A one layer at a time (DISTILL_BATCH_SIZE 2, DISTILL_SEQ_LEN 512), stage B optional.
DISTILL_SEQ_LEN = 512  # tokens per training sequence
DISTILL_BATCH_SIZE = {"tiny": 8, "any": 2}  # sequences per step
DISTILL_STEPS_A = {"tiny": 200, "any": 1000}  # optimiser steps per layer
DISTILL_STEPS_B = {"tiny": 500, "any": 0}  # optimiser steps for all target layers together; 0 leaves stage B out
DISTILL_STEPS_GATE = {"tiny": 250, "any": 0}  # optimiser steps of the learned gate; 0 leaves it out
DISTILL_LR_A = {"tiny": 2e-3, "any": 5e-4}  # AdamW's peak learning rate
DISTILL_LR_B = {"tiny": 1e-3, "any": 1e-4}
DISTILL_LR_GATE = 5e-3
LEARNED_GATE_SHARE = 0.5  # mean Mamba share that the learned gate is trained for
DISTILL_ONE_LAYER_AT_A_TIME = "auto"  # stage A in little memory: "yes", "no", or "auto": from 1 B parameters on
DISTILL_BF16 = "auto"  # a frozen float32 model in bfloat16 while sidecars train: "yes", "no", or "auto": where fast
DISTILL_WARMUP = 0.05  # share of the steps over which the learning rate rises
DISTILL_WEIGHT_DECAY = 0.01
DISTILL_TRAIN_WINDOWS = 2048  # training sequences in the pool that steps draw from
DISTILL_VALIDATION_WINDOWS = 16  # sequences behind the validation curve
RECOVERY_SAMPLES = 16  # calibration documents on which 04 measures what the sidecars win back

# --- Text and evaluation -------------------------------------------------------------------------------------------
# "mixed" (docs + code + math + story), one of these, "wikitext" (needs the hub), or a .txt/.jsonl file.
EVAL_DATASET = "mixed"
# Documents that 03, 05 and 07 to 10 read; "mixed" takes its domains in turn.
MAX_EVAL_SAMPLES = 64
# Tokens kept of one document (its beginning).
MAX_EVAL_DOCUMENT_TOKENS = {"tiny": 768, "any": 512}
# Documents on which 01 measures the model's sparsity.
SPARSITY_SAMPLES = 8
# Documents that 06 scores (it scores them once for every layer).
LAYER_EVAL_SAMPLES = 24
# Documents that gates are calibrated on (disjoint from those that are scored).
CALIBRATION_SAMPLES = 24
# Tokens a scoring window holds.
MAX_SEQ_LEN = {"tiny": 1024, "any": 512}
# Tokens between the starts of scoring windows; the rest of a window is context. MAX_SEQ_LEN = no overlap.
EVAL_STRIDE = {"tiny": 512, "any": 256}
# Windows per forward pass.
EVAL_BATCH_SIZE = {"tiny": 4, "any": 1}
# Tokens generated for each prompt.
MAX_NEW_TOKENS = 40
# Level of every interval: 0.95 gives 95 % intervals.
CONFIDENCE_LEVEL = 0.95
# Bootstrap resamples (of documents) behind every interval.
BOOTSTRAP_RESAMPLES = 10_000
# Resamples behind the intervals of 03's rank correlations.
RANK_RESAMPLES = 200
# Prompts of 03, and of the generations in 05 and 07.
# No dollar signs: plots print them, and matplotlib reads those as maths.
TEST_PROMPTS = [
    "The capital of France is",
    "Water boils at 100 degrees Celsius because",
    'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n',
    'import os\n\nfor name in sorted(os.listdir(".")):\n    if name.endswith(".py"):',
    "Question: A baker sells 12 loaves in the morning and 15 after lunch. How many is that in two days?\nAnswer:",
    "If 3x + 4 = 19, then x =",
    "Once upon a time, in a village between two rivers, there lived a clockmaker who",
    "Alice gave the red book to Bob. Bob gave the red book to Carol. Now the red book belongs to",
]

# --- What explains the answer (08 to 10) ----------------------------------------------------------------------------
SENSITIVITY_SAMPLES = 16  # label sequences drawn from the model behind every estimate
SENSITIVITY_VALIDATION_DOCUMENTS = 12  # of the calibration text, on which estimates meet interventions
SENSITIVITY_INTERVENTIONS = 600  # single cells switched to Mamba and measured
SENSITIVITY_RESAMPLES = 500  # bootstrap resamples (of documents) behind the intervals of correlations
SENSITIVITY_PERMUTATIONS = 2000  # of blocks of 16 tokens, behind their p-values
SENSITIVITY_MAP_TOKENS = 160  # shown of a document
PROBE_DOCUMENTS = 48  # of the calibration text, that probes are trained on
RECALL_LENGTHS = [256, 512, 1024, 2048, 4096]  # tokens; those that the model's context holds
RECALL_EXAMPLES = 16  # of each task and length
ABLATION_STEPS_A = 40  # optimiser steps of stage A, alike for all variants of the sidecars
ABLATION_STEPS_B = 80  # of stage B

# --- Seeds ---------------------------------------------------------------------------------------------------------
SEED = 0  # everything that draws: data order, initialisation, bootstrap, tie-breaking of hard gates
RANDOM_GATE_SEEDS = [0]  # masks of controls drawn at random, for each set of sidecars, at VERDICT_SHARE

# --- Results -------------------------------------------------------------------------------------------------------
# True under `run_all.sh --quick`: fewer documents and steps, results in a folder of their own.
QUICK = os.environ.get("BLOCKFFN_QUICK", "0") not in ("", "0")
# What --quick takes in place of the settings of these names: the same path through every script, on less.
QUICK_SETTINGS = {
    "ALPHA_SWEEP": [0.0, 0.3, 1.0],
    "LAYERS_TOGETHER": [2, 4],
    "GATE_SHARES": [0.5],
    "GATE_TEMPERATURES": [0.03],
    "RANDOM_GATE_SEEDS": [0],
    "DISTILL_SEQ_LEN": 128,
    "DISTILL_STEPS_A": 20,
    "DISTILL_STEPS_B": {"tiny": 20, "any": 0},
    "DISTILL_STEPS_GATE": {"tiny": 10, "any": 0},
    "DISTILL_TRAIN_WINDOWS": 64,
    "DISTILL_VALIDATION_WINDOWS": 4,
    "RECOVERY_SAMPLES": 4,
    "MAX_EVAL_SAMPLES": 8,
    "MAX_EVAL_DOCUMENT_TOKENS": 192,
    "SPARSITY_SAMPLES": 2,
    "LAYER_EVAL_SAMPLES": 8,
    "CALIBRATION_SAMPLES": 8,
    "MAX_NEW_TOKENS": 8,
    "TEST_PROMPTS": TEST_PROMPTS[:2],
    "BOOTSTRAP_RESAMPLES": 1000,
    "RANK_RESAMPLES": 50,
    "JOURNEY_PROBLEMS": 12,
    "JOURNEY_PERMUTATIONS": 200,
    "JOURNEY_RESAMPLES": 200,
    "JOURNEY_HIDDEN_PROBLEMS": 12,
    "PREDICT_TRAIN_ROWS": 20_000,
    "PREDICT_EPOCHS": 3,
    "PREDICT_PROBE_EPOCHS": 3,
    "PREDICT_XGBOOST_VALUES": 100_000,
    "PREDICT_XGBOOST_ROUNDS": 10,
    "CACHE_TOKENS": 200,
}
# Root of all results; a relative BLOCKFFN_OUTPUT_DIR is relative to this file.
OUTPUT_DIR = _ROOT / (os.environ.get("BLOCKFFN_OUTPUT_DIR") or "outputs")


def _slug(name: str) -> str:
    """The folder name of a model: the same rule as results.model_slug (tested; config imports nothing of the repo)."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._") or "model"


# This model's results, as results.output_dir says.
MODEL_SLUG = _slug(MODEL_NAME)
MODEL_OUTPUT_DIR = OUTPUT_DIR / (MODEL_SLUG + ("-quick" if QUICK else ""))
MODEL_INFO_PATH = MODEL_OUTPUT_DIR / "model_info.json"
ROUTING_SIGNALS_PATH = MODEL_OUTPUT_DIR / "routing_signals.json"
ROUTING_TOKENS_PATH = MODEL_OUTPUT_DIR / "routing_tokens.npz"
ALPHA_SWEEP_RESULTS_PATH = MODEL_OUTPUT_DIR / "alpha_sweep_results.csv"
LAYER_REPLACEMENT_PATH = MODEL_OUTPUT_DIR / "layer_replacement_results.csv"
GATED_HYBRID_RESULTS_PATH = MODEL_OUTPUT_DIR / "gated_hybrid_results.csv"
VERDICT_PATH = MODEL_OUTPUT_DIR / "verdict.json"

# --- Journeys (scripts/journeys/) -----------------------------------------------------------------------------------
# The model whose routing is studied: `mixtral-tiny` (ships in assets/), `blockffn-tiny`, or the folder or hub name of
# any mixture of experts.
JOURNEY_MODEL = os.environ.get("BLOCKFFN_JOURNEY_MODEL") or "mixtral-tiny"
# Data sets that are collected; domains are compared in this order.
JOURNEY_DATASETS = ["humaneval", "gsm8k"]
JOURNEY_PROBLEMS = 200  # problems of each data set (HumanEval has 164)
JOURNEY_MAX_TOKENS = 512  # prompt tokens kept of a problem (its beginning)
JOURNEY_GENERATE = 0  # tokens generated after each prompt, whose journeys are kept too
JOURNEY_BATCH_PROBLEMS = 8  # problems in one forward pass
JOURNEY_SHARD_PROBLEMS = 16  # problems in one file, which is what an interruption can cost
JOURNEY_ENGINE = "transformers"  # what runs the model: "transformers" or "vllm"
JOURNEY_HIDDEN_DTYPE = "auto"  # of router inputs: "float16", "float32", or "auto": float32 for float32 models
JOURNEY_FOLDS = 5  # parts that problems are split into for out-of-sample accuracy
JOURNEY_PERMUTATIONS = 1000  # divisions of the problems behind the p-values of domain differences
JOURNEY_RESAMPLES = 1000  # bootstrap resamples (of problems) behind the intervals of out-of-sample accuracy
JOURNEY_HIGH_CONFIDENCE = 0.8  # strongest gate probability above which a decision counts as confident
JOURNEY_DOMINANT_PERCENT = 20.0  # share of a layer's tokens above which an expert is listed
JOURNEY_STRONG_PERCENT = 30.0  # probability above which a transition is listed
JOURNEY_LOW_ACCURACY_PERCENT = 15.0  # accuracy under which looking further ahead counts as lost
JOURNEY_TOP_PATHS = 10  # paths listed of each length
JOURNEY_TOP_TOKENS = 200  # tokens listed
JOURNEY_DOMAIN_PERCENT = 5.0  # percentage points of usage above which an expert is specific to a domain
# Problems of each data set whose router inputs run_all.sh has journeys/01_collect keep (--hidden-problems) for the
# predictors that read them; about 16 kB a token on mixtral-tiny.
JOURNEY_HIDDEN_PROBLEMS = 60
# Layers ahead (h) that journeys/03_predict predicts experts for.
PREDICT_HOPS = [1]
PREDICT_SEEDS = 1  # runs of each predictor, from SEED on; results are means over them
PREDICT_SPLIT = "both"  # "problems" (honest), "rows" (all predictors leaky too), or "both" (those of the next setting)
# Predictors that are fitted again on the leaky split by row.
PREDICT_ROW_PREDICTORS = ["mlp", "mlp_tuned"]
# Cells (journey x layer; 50,000 journeys of 32 layers have 1.55 M at h = 1) that the trained predictors see, so that
# the default run takes five minutes on 2 cores. Predictors that count use all.
PREDICT_TRAIN_ROWS = 150_000  # of one epoch of a network, drawn anew for each
PREDICT_EPOCHS = 8  # of a network on journeys, at most
PREDICT_PROBE_EPOCHS = 12  # of a probe of router inputs, at most; each sees all its journeys
PREDICT_PATIENCE = 3  # epochs without a better validation loss until training stops
PREDICT_VALIDATION_ROWS = 30_000  # cells that choices are made on
PREDICT_XGBOOST_VALUES = 1_600_000  # cells x experts: XGBoost grows one tree for each expert and round
PREDICT_XGBOOST_ROUNDS = 150  # at most
# Shapes and training of the networks; see predictors.Network. `mlp` has the widths of the published study's first one.
PREDICT_MLP = {"widths": [256, 128, 64], "layer_width": 10, "expert_width": 5, "dropout": 0.1, "learning_rate": 5e-3}
# Where --tune has not been run: what `--tune 10` found on mixtral-tiny, by validation loss.
PREDICT_MLP_TUNED = {
    "widths": [384, 384, 384],
    "history": 12,
    "layer_width": 16,
    "expert_width": 8,
    "dropout": 0.1,
    "learning_rate": 3e-3,
    "weight_decay": 7e-4,
    "batch_rows": 512,
}
PREDICT_LINEAR_PROBE = {"widths": [], "learning_rate": 5e-3, "weight_decay": 0.1, "batch_rows": 512}
PREDICT_MLP_PROBE = {"widths": [128], "dropout": 0.2, "learning_rate": 3e-3, "weight_decay": 0.1, "batch_rows": 512}
# The simulated cache: Mixtral-8x7B in 4 bits on an RTX 3060 behind PCIe 4 x16 (theory; src/journeys/expert_cache.py).
CACHE_TOKENS = 2000  # tokens of test problems that are simulated, the first ones
CACHE_BANDWIDTHS_GB_S = [25.0, 12.5, 6.0, 50.0]  # of the link; the first (PCIe 4 x16 as used) is the one in tables
CACHE_MODEL = "mixtral-8x7b"  # whose shapes: these, or "own": the collected model's
CACHE_BITS_PER_WEIGHT = 4.5  # 4-bit weights and a 16-bit scale for each group of 32
CACHE_MEMORY_GB_S = 360.0  # of the GPU's own memory: computing at batch 1 is as slow as reading the weights
CACHE_EXPERT_WIDTHS = (4096, 14336)  # of the three matrices of an expert
# Weights that a layer reads for a token: attention, router, two experts.
CACHE_LAYER_WEIGHTS = 4096 * (4096 + 1024 + 1024 + 4096) + 4096 * 8 + 2 * 3 * 4096 * 14336
# The journeys and what is made of them: the same rule as above.
JOURNEYS_DIR = OUTPUT_DIR / (_slug(JOURNEY_MODEL) + ("-quick" if QUICK else "")) / "journeys"
